"""The error of each caller's mistake names the argument."""

import numpy as np
import pytest

import lsoftmax_jax as lsm
from tests.answers import B, C, D

GOOD = {
    "features": np.ones((B, D), np.float32),
    "kernel": np.ones((D, C), np.float32),
    "labels": np.zeros(B, np.int32),
    "margin": 4,
    "lam": 0.0,
}
MISTAKES = [
    ("margin", 0, ValueError),
    ("margin", 2.5, TypeError),
    ("margin", True, TypeError),
    ("margin", "4", TypeError),
    ("lam", -1.0, ValueError),
    ("lam", float("nan"), ValueError),
    ("lam", np.zeros(3, np.float32), ValueError),
    ("lam", "5", TypeError),
    ("labels", np.zeros(B, np.float32), TypeError),
    ("labels", np.zeros(B, bool), TypeError),
    ("labels", np.zeros(B + 1, np.int32), ValueError),
    ("labels", np.zeros((B, 1), np.int32), ValueError),
    ("kernel", np.ones(D, np.float32), ValueError),
    ("kernel", np.ones((D + 1, C), np.float32), ValueError),
    ("kernel", np.ones((D, 0), np.float32), ValueError),
    ("kernel", np.ones((D, C), np.int32), TypeError),
    ("features", np.ones((B, D), np.int32), TypeError),
    ("features", np.float32(1), ValueError),
    ("label_smoothing", -0.1, ValueError),
    ("label_smoothing", 1.1, ValueError),
    ("label_smoothing", float("nan"), ValueError),
    ("label_smoothing", "0.1", TypeError),
    ("labels", None, TypeError),
    ("where", np.ones(B + 1, bool), ValueError),
    ("where", np.ones((B, C), bool), ValueError),
    ("where", np.ones(B, np.int32), TypeError),
    ("where", np.ones(B, np.float32), TypeError),
    ("plan", {"row_block": 4}, TypeError),
]


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
@pytest.mark.parametrize(("argument", "value", "error"), MISTAKES)
def test_mistakes_are_named(rule, argument, value, error):
    with pytest.raises(error, match=argument):
        rule(**{**GOOD, argument: value})


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (np.ones(B + 1, np.float32), ValueError),
        (np.float32(1), ValueError),
        (np.ones(B, np.int32), TypeError),
    ],
)
def test_weights_mistakes_are_named(weights, error):
    with pytest.raises(error, match="weights"):
        lsm.lsoftmax_loss_sum(**GOOD, weights=weights)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("row_block", 0, ValueError),
        ("row_block", 2.0, TypeError),
        ("class_block", -1, ValueError),
        ("class_block", True, TypeError),
        ("memory_budget", -1, ValueError),
        ("memory_budget", "1 GB", TypeError),
        ("keep_exponentials", "yes", TypeError),
    ],
)
def test_mistakes_in_a_plan_are_named(argument, value, error):
    with pytest.raises(error, match=argument):
        lsm.Plan(**{argument: value})


def test_two_kinds_of_blocks_at_once_are_refused():
    with pytest.raises(ValueError, match="row_block and class_block"):
        lsm.Plan(row_block=2, class_block=2)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_soft_labels_are_refused_in_words(rule, dtype):
    with pytest.raises((TypeError, ValueError), match="margin belongs to one class"):
        rule(**{**GOOD, "labels": np.ones((B, C), dtype)})
