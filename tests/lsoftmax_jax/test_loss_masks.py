"""Masked rows, and rows with invalid labels or features."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.answers import (
    LOSS_AND_SUM_PLANS,
    MANY,
    PLANS,
    RAGGED,
    B,
    C,
    D,
    assert_gradients_close,
    loss_and_gradients,
    sum_and_gradients,
)
from tests.oracle import as_arrays, assert_close


@pytest.mark.parametrize(("rule", "plan"), LOSS_AND_SUM_PLANS)
def test_a_masked_row_changes_nothing_whatever_it_holds(x64, rule, plan):
    problem = oracle.problem(7, *RAGGED)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    where = np.arange(6) != 2
    loss = oracle.loss(*problem, 4, 0.5, where)
    wanted = oracle.loss_pullback(*problem, np.ones(6), 4, 0.5, where)
    if rule is sum_and_gradients:
        wanted, loss = wanted._replace(weights=loss), np.sum(loss)
    for poison in (np.nan, np.inf, -np.inf):
        value, gradients = rule(
            features.at[2].set(poison),
            kernel,
            labels.at[2].set(-1),
            jnp.ones(6),
            jnp.float64(0.5),
            jnp.asarray(where),
            margin=4,
            plan=PLANS[plan],
        )
        of_row = [gradients.features[2]]
        of_row += [value[2]] if rule is loss_and_gradients else [gradients.weights[2]]
        assert all(np.all(each == 0) for each in of_row)
        assert_close(value, loss, 1e-12)
        assert_gradients_close(gradients, wanted, 1e-12)


def test_a_mask_of_nothing_gives_zero_and_a_mask_of_all_changes_nothing():
    features, kernel, labels = as_arrays(oracle.problem(8, B, D, C), jnp.float32)
    arguments = features, kernel, labels, jnp.ones(B), jnp.float32(0)
    loss, pulled = loss_and_gradients(*arguments, jnp.zeros(B, bool), margin=4)
    chex.assert_trees_all_equal((loss, pulled), jax.tree.map(jnp.zeros_like, (loss, pulled)))
    everything = loss_and_gradients(*arguments, jnp.ones(B, bool), margin=4)
    chex.assert_trees_all_close(everything, loss_and_gradients(*arguments, margin=4), rtol=1e-6)


@pytest.mark.parametrize("shape", [RAGGED, MANY])
@pytest.mark.parametrize("plan", ["one-shot", "class blocks, stored"])
def test_a_label_outside_the_classes_gives_nan_for_its_row(plan, shape):
    features, kernel, labels = as_arrays(oracle.problem(9, *shape), jnp.float32)
    good = np.arange(6) != 2
    for wrong in (-1, shape[2], 2**30):
        arguments = features, kernel, labels.at[2].set(wrong), jnp.ones(6), jnp.float32(0)
        loss, pulled = loss_and_gradients(*arguments, margin=4, plan=PLANS[plan])
        assert np.isnan(loss[2]) and np.all(np.isfinite(loss[good]))
        assert np.all(np.isnan(pulled.features[2])) and np.all(np.isfinite(pulled.features[good]))
        assert np.any(np.isnan(pulled.kernel))


@pytest.mark.parametrize("plan", ["one-shot", "row blocks with a tail"])
def test_a_label_outside_the_classes_makes_the_sum_nan(plan):
    features, kernel, labels = as_arrays(oracle.problem(9, *RAGGED), jnp.float32)
    good = np.arange(6) != 2
    for wrong in (-1, RAGGED[2]):
        arguments = features, kernel, labels.at[2].set(wrong), jnp.ones(6), jnp.float32(0)
        total, pulled = sum_and_gradients(*arguments, margin=4, plan=PLANS[plan])
        assert np.isnan(total) and np.any(np.isnan(pulled.kernel))
        for by_row in (pulled.features, pulled.weights):
            assert np.all(np.isnan(by_row[2])) and np.all(np.isfinite(by_row[good]))


def test_a_nan_feature_gives_a_nan_loss_in_its_row_only():
    features, kernel, labels = as_arrays(oracle.problem(9, B, D, C), jnp.float32)
    loss, _ = loss_and_gradients(
        features.at[2, 0].set(np.nan), kernel, labels, jnp.ones(B), jnp.float32(0), margin=4
    )
    np.testing.assert_array_equal(np.isnan(loss), np.arange(B) == 2)
