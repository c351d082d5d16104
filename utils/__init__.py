"""What the four model folders share: device choice, strict checkpoints, downloads, metrics, hccl tools.

Import this package before `mindspore`: the framework reads these variables once, when it loads.
"""

import os

os.environ.setdefault("GLOG_v", "3")
# With AVX-512, oneDNN runs most float32 NCHW convolutions in its reference code, about a hundred times slower than the
# AVX2 kernels (README.md, "Speed on a CPU").
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX2")
