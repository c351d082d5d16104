"""Write the labels of the images that the Ascend 310 program is to classify, as JSON: {name without ending: label}.

A class's label is its position among the sorted class folders or in `classes.txt`. `postprocess.py` reads the file,
in which the class names stand, too, under "/classes". With --model_path they have to be those of the model, and the
preparation of images that it was exported with is printed.
"""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from utils.cli import run
from utils.result_files import write_labels

if __name__ == "__main__":
    run(write_labels)
