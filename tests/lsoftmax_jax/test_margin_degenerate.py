"""Extreme norms and degenerate data, for every margin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle
from tests.margin_cases import (
    BATCH,
    CASES,
    CLASSES,
    DIM,
    KINDS,
    assert_all_close,
    at_least_f32,
    each_kind,
    every_case,
    given,
    loss_and_gradients,
)


# Every margin in float32, where squares under- and overflow, and one of each kind in other dtypes.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, jnp.float32) for case in CASES.values()]
    + [(case, dtype) for case in KINDS.values() for dtype in (jnp.float64, jnp.bfloat16)],
    ids=[*CASES, *(f"{name}, {dtype}" for name in KINDS for dtype in ("float64", "bfloat16"))],
)
def test_degenerate_inputs_give_finite_losses_and_gradients(x64, case, dtype):
    features, kernel, labels = oracle.as_arrays(oracle.extreme_problems(3), dtype)
    wide = at_least_f32(dtype)

    @jax.jit
    @jax.vmap
    def run(features, kernel, labels):
        ones = jnp.ones(labels.shape, wide)
        return loss_and_gradients(case, features, kernel, labels, ones, jnp.zeros((), wide))

    for array in jax.tree.leaves(run(features, kernel, labels)):
        assert np.all(np.isfinite(np.asarray(array, np.float64)))


@every_case
def test_without_a_direction_the_cosine_counts_as_zero(x64, case):
    features, kernel, labels = oracle.problem(1, 3, DIM, CLASSES)
    labels[:] = 3, 5, 7
    features[0], kernel[:, 5] = 0.0, 0.0
    run = jax.jit(functools.partial(loss_and_gradients, case))
    value, (dfeatures, dkernel, _) = run(features, kernel, labels, jnp.ones(3), 0.0)
    target = float(case.margin.value_and_slope(jnp.zeros(()))[0])
    length = 0.0 if case.scale is None else case.scale
    score = np.array([length * target] + [0.0] * (CLASSES - 1))
    np.testing.assert_allclose(value[0], -oracle.log_probabilities(score[None])[0, 0])
    length = np.linalg.norm(features[1]) if case.scale is None else case.scale
    kernel[:, 5] = 1.0
    scores = oracle.angular(features[1:2], kernel, labels[1:2], case.of_theta, case.scale, 0.0)[0]
    scores[0, 5] = length * target
    np.testing.assert_allclose(value[1], -oracle.log_probabilities(scores)[0, 5])
    assert not np.any(dkernel[:, 5])
    assert case.scale is None or not np.any(dfeatures[0])
    assert np.any(dfeatures[1]) and np.any(dkernel[:, 7])


def test_lengths_do_not_matter_in_float32():
    features, kernel, labels = oracle.problem(3, BATCH, DIM, CLASSES)
    units = oracle.Problem(oracle.unit(features, 1)[0], oracle.unit(kernel, 0)[0], labels)
    features, kernel, *rest, _ = given(units, jnp.float32)
    run = jax.jit(functools.partial(loss_and_gradients, CASES["ArcFace"]))
    loss, (dfeatures, dkernel, _) = run(features, kernel, *rest, jnp.float32(0))
    for f, k in ((1e-20, 1.0), (1e15, 1.0), (1.0, 1e-20), (1.0, 1e15)):
        got, bars = run(features * f, kernel * k, *rest, jnp.float32(0))
        oracle.assert_close(got, loss, 1e-5)
        oracle.assert_close(np.float64(bars[0]) * f, dfeatures, 1e-5)
        oracle.assert_close(np.float64(bars[1]) * k, dkernel, 1e-5)


@each_kind
def test_masked_rows_change_nothing_and_invalid_labels_give_nan(case):
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    features, kernel, labels, cotangent, _ = given(problem, jnp.float32)
    where = np.arange(BATCH) % 3 != 0
    features = features.at[0].set(jnp.nan)
    labels = labels.at[3].set(-1)
    run = jax.jit(functools.partial(loss_and_gradients, case))
    value, (dfeatures, dkernel, _) = run(
        features, kernel, labels, cotangent, jnp.float32(0), where=where
    )
    assert not np.any(value[~where]) and not np.any(dfeatures[~where])
    rest = features[where], kernel, labels[where], cotangent[where], jnp.float32(0)
    kept, (dkept, dcolumns, _) = run(*rest)
    assert_all_close((value[where], dfeatures[where], dkernel), (kept, dkept, dcolumns), 1e-5)
    labels = labels.at[4].set(CLASSES)
    value, _ = run(features, kernel, labels, cotangent, jnp.float32(0), where=where)
    assert np.flatnonzero(np.isnan(value)).tolist() == [4]
