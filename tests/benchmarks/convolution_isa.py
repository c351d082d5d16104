"""A float32 convolution with and without oneDNN's limit to AVX2, which `utils` sets: GFLOP/s and their ratio.

python tests/benchmarks/convolution_isa.py
"""

import os
import subprocess
import sys
import time


def measure() -> float:
    """GFLOP/s of a 3x3 convolution of 64 channels on (8, 64, 56, 56), best of five."""
    os.environ.setdefault("GLOG_v", "3")
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn

    ms.set_context(mode=ms.GRAPH_MODE)
    convolution = nn.Conv2d(64, 64, 3, pad_mode="pad", padding=1)
    x = Tensor(np.random.default_rng(0).standard_normal((8, 64, 56, 56)).astype(np.float32))
    convolution(x).asnumpy()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        convolution(x).asnumpy()
        seconds.append(time.perf_counter() - start)
    return 2 * 8 * 64 * 64 * 9 * 56 * 56 / min(seconds) / 1e9


def main() -> None:
    if len(sys.argv) > 1:
        print(measure())
        return
    rates = {}
    for limit in ("DEFAULT", "AVX2"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
        output = subprocess.run([sys.executable, __file__, "measure"], env=environment, capture_output=True, text=True)
        rates[limit] = float(output.stdout)
        print(f"ONEDNN_MAX_CPU_ISA={limit}: {rates[limit]:.1f} GFLOP/s", flush=True)
    print(f"ratio {rates['AVX2'] / rates['DEFAULT']:.1f}")


if __name__ == "__main__":
    main()
