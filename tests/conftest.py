"""What every test folder shares."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (sets the environment before any test imports mindspore)
