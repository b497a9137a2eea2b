"""A few rounds of `make fuzz`, and its reference beside the other oracle."""

import numpy as np
import pytest

import lsoftmax_jax as lsm
import oracle
from scripts import exact, fuzz


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_reference_is_the_papers_formula(smoothing):
    features, kernel, labels = oracle.problem(seed=0, batch=7, dim=4, classes=5)
    where, lam = np.arange(7) != 3, 0.5
    found = exact.numbers(
        *(array.astype(exact.Wide) for array in (features, kernel)),
        *(labels, where, lsm.margins.LSoftmax(4), lam, smoothing),
        exact.Rounding(exact.EPS["float64"], 0.0),
    )
    given = 4, lam, where, smoothing
    oracle.assert_close(found.logits, features @ kernel, 1e-14)
    oracle.assert_close(found.loss, oracle.loss(features, kernel, labels, *given).sum(), 1e-14)
    wanted = oracle.loss_pullback(features, kernel, labels, np.ones(7), *given)
    oracle.assert_close(found.dx, wanted.features, 1e-13)
    oracle.assert_close(found.dw, wanted.kernel, 1e-13)


@pytest.mark.slow
@pytest.mark.ci
def test_losses_and_gradients_are_those_of_the_reference():
    # The limit is rounds, not seconds, so that a slow machine draws the same cases.
    assert fuzz.fuzz(seconds=600, seed=0, rounds=12) == 0
