"""OpenCV, which a module gets with `from utils.opencv import cv2`; without it a command ends with one line.

Modules are imported before `utils.cli.run` starts, so the line is written here.
"""

import sys

try:
    import cv2 as cv2
except ImportError as error:
    remedy = "pip install -r requirements.txt"
    if not isinstance(error, ModuleNotFoundError):  # it is there, but not what it loads
        remedy = "apt-get install libgl1 libglib2.0-0, or pip install opencv-python-headless in place of opencv-python"
    print(f"error: OpenCV cannot be loaded ({' '.join(str(error).split())}); {remedy}", file=sys.stderr)
    sys.exit(2)
