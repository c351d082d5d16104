"""Top-1 and top-5 accuracy from the result files of the Ascend 310 program and the labels of `preprocess.py`.

A result file is named after its image, `<name>_0.bin`, and holds the image's logits as float32.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import run
from utils.result_files import print_accuracy


def line(k: int, correct: int, total: int) -> str:
    """The line of the document that tells the top-k accuracy of `correct` among `total` images."""
    return f"after allreduce eval: top{k}_correct={correct}, tot={total}, acc={100 * correct / total:.2f}%"


if __name__ == "__main__":
    run(lambda: print_accuracy(line))
