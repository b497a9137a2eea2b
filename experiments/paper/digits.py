"""scikit-learn's 1,797 scanned digits: runs that need no data, in no table of the paper.

    python -m experiments train digits-m4

A small network with a two-dimensional feature: 1,297 digits to train on, 500 to test on. Half a
minute on two CPU cores.
"""

from dataclasses import replace

from experiments.paper.cell import Cell
from experiments.paper.config import Config

TIME = "30 s, two CPU cores"

_S = Config(
    name="digits-softmax",
    dataset="digits",
    network="digits-2d",
    pace="lead",
    steps=500,
    written_for=500,
    batch=128,
    learning_rate=0.02,
    drops=(350, 430),
    weight_decay=0.02,
)

CELLS = (
    Cell("quickstart", TIME, _S),
    Cell("quickstart", TIME, replace(_S, name="digits-m4", margin=4)),
)
