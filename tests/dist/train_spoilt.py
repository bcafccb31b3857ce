"""cca_ds/train.py with numbers that no file or recipe may hold, for tests of what is not finite.

SPOILT_CLASS=c makes the embedding of class c infinite once the weights are read; SPOILT_BETA=b sets loss.beta.
"""

import os
import sys

import torch

from cca_ds.train import main
from cca_ds.training import run as training

read, train = training.starting_weights, training.run_training


def starting_weights(*arguments):
    """The weights with one row of infinities."""
    weights = read(*arguments)
    weights["cls_embedding.embedding_table.weight"][int(os.environ["SPOILT_CLASS"])] = torch.inf
    return weights


def run_training(run, *arguments):
    """The run with another beta, unchecked."""
    run.loss.beta = float(os.environ["SPOILT_BETA"])
    return train(run, *arguments)


if "SPOILT_CLASS" in os.environ:
    training.starting_weights = starting_weights
if "SPOILT_BETA" in os.environ:
    training.run_training = run_training
sys.exit(main())
