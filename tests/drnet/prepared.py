"""`RESULTS="0:9 1:3" python prepared.py FLAGS` is eager.py with prepared results in place of steps and evaluations.

RESULTS has for each epoch the candidate that all of 20 images are classified at, and how many of them are right.
"""

import os

import eager
import numpy as np
from src.evaluation import Evaluation
from src.trainer import StepResult

from utils.cli import run

results = (tuple(map(int, word.split(":"))) for word in os.environ["RESULTS"].split())


def evaluate(*_) -> Evaluation:
    candidate, right = next(results)
    at = np.arange(2) == candidate
    return Evaluation(at[:, None] * np.array([right, 20]), 20 * at, np.zeros(20, int), np.full(20, candidate))


eager.train.evaluate = evaluate
eager.train.TrainOneStep = lambda *_: lambda *_: StepResult(1.0, np.zeros(2, int), np.array([0, 20]))

if __name__ == "__main__":
    run(eager.train.main)
