"""Gradients are right, not only finite, over the range of norms in the README."""

import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from tests import oracle
from tests.answers import EPS, assert_norm_close, loss_and_gradients, rounded, sum_and_gradients
from tests.oracle import Gradients, as_arrays, assert_close

SMALLEST, LARGEST = 1e-20, 1e15
SHAPE = (16, 64, 301)


def with_norms(which: str, norm: float) -> oracle.Problem:
    """Rows of features, or columns of the kernel, of one length."""
    problem = oracle.problem(5, *SHAPE)
    array, axis = getattr(problem, which), 1 if which == "features" else 0
    unit = array / np.linalg.norm(array, axis=axis, keepdims=True)
    return problem._replace(**{which: norm * unit})


# Every two of rule, dtype and margin occur together.
@pytest.mark.parametrize(
    ("rule", "dtype", "margin"),
    [
        *((loss_and_gradients, jnp.float32, margin) for margin in (2, 4)),
        *((loss_and_gradients, jnp.bfloat16, margin) for margin in (4, 8)),
        *((sum_and_gradients, jnp.float32, margin) for margin in (4, 8)),
        *((sum_and_gradients, jnp.bfloat16, margin) for margin in (2, 4)),
    ],
)
def test_both_ends_of_the_range(rule, dtype, margin):
    tolerance = 1e-5 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
    for which in ("features", "kernel"):
        # Rounding to the dtype must not leave the range.
        for norm in (1.01 * SMALLEST, 1.0, 0.99 * LARGEST):
            problem = with_norms(which, norm)
            features, kernel, labels = as_arrays(problem, dtype)
            ones = np.ones(SHAPE[0])
            arguments = features, kernel, labels, jnp.asarray(ones, jnp.float32), jnp.float32(0)
            got = rule(*arguments, margin=margin)[1]
            given = (*rounded(features, kernel), problem.labels)
            wanted = oracle.loss_pullback(*given, ones, margin)
            assert_norm_close(got.features, wanted.features, tolerance)
            assert_norm_close(got.kernel, wanted.kernel, tolerance)


def opposite(feature_norm: float, kernel_norm: float, margin: int) -> tuple:
    """A feature opposite to its column (theta = pi) beside another column; exact gradients."""
    features = feature_norm * np.array([[-0.6, 0.8]])
    kernel = kernel_norm * np.array([[0.6, 1.0], [-0.8, 0.0]])
    features, kernel = (np.asarray(array, np.float32).astype(float) for array in (features, kernel))
    norms = np.linalg.norm(features), np.linalg.norm(kernel[:, 0])
    slope = 1 - 2 * margin  # the target logit is slope |x| |w| to first order
    other = features[0] @ kernel[:, 1]
    probability = np.exp(-np.logaddexp(0, slope * norms[0] * norms[1] - other))
    along_feature, along_column = features[0] / norms[0], kernel[:, 0] / norms[1]
    dfeatures = probability * (kernel[:, 1] - slope * norms[1] * along_feature)
    dkernel = probability * np.stack([-slope * norms[0] * along_column, features[0]], axis=1)
    problem = oracle.Problem(features, kernel, np.array([0]))
    return problem, Gradients(dfeatures[None, :], dkernel)


@pytest.mark.parametrize("margin", [2, 4, 8, 256])
def test_opposite_directions(margin):
    """Norms of 1e-19 and 1e15 once gave a zero gradient, and m = 256 gave infinities."""
    for norms in ((1e-19, 1e15), (1e15, 1e-19), (1e-20, 1.0), (1.0, 1e-20), (1.0, 1e15)):
        problem, wanted = opposite(*norms, margin)
        arguments = *as_arrays(problem, jnp.float32), jnp.ones(1), jnp.float32(0)
        got = loss_and_gradients(*arguments, margin=margin)[1]
        # A rounding of the cosine moves psi's slope by m^4 / 3, which is m^2 at pi.
        tolerance = 1e-5 + EPS * margin**2 / 3
        assert_close(got.features, wanted.features, tolerance)
        assert_close(got.kernel, wanted.kernel, tolerance)


@pytest.mark.parametrize("margin", [2, 4, 8, 256])
def test_beyond_the_range_nothing_overflows(margin):
    for norms in ((2e19, 1.0), (1.0, 2e19), (1e-30, 1.0), (1e-30, 1e-30)):
        problem = opposite(*norms, margin)[0]
        arguments = *as_arrays(problem, jnp.float32), jnp.ones(1), jnp.float32(0)
        loss, got = loss_and_gradients(*arguments, margin=margin)
        for array in (loss, got.features, got.kernel):
            assert np.all(np.isfinite(array)), norms


@pytest.mark.parametrize("scale", [0.1, 0.01])
def test_full_label_smoothing_keeps_the_digits_of_tiny_logits(scale):
    """The gradient must subtract numbers near 1 / classes: numbers near 1 would lose its digits."""
    rng = np.random.default_rng(0)
    problem = oracle.Problem(
        scale * rng.standard_normal((7, 5)),
        0.3 * rng.standard_normal((5, 300)),
        rng.integers(300, size=7),
    )
    features, kernel, labels = as_arrays(problem, jnp.float32)
    arguments = features, kernel, labels, jnp.ones(7), jnp.float32(0)
    got = loss_and_gradients(*arguments, margin=4, label_smoothing=1.0)[1]
    given = (*rounded(features, kernel), problem.labels)
    wanted = oracle.loss_pullback(*given, np.ones(7), 4, label_smoothing=1.0)
    # p - 1 / C is about scale / C, and p has an error of eps / C.
    assert_close(got.kernel, wanted.kernel, 2.5e-7 / scale)


@pytest.mark.parametrize("length", [1, 2])
def test_tiny_features_keep_their_direction(length):
    """The square of 2e-20 is 0 in float32."""
    features, kernel = jnp.full((1, length), 2e-20), jnp.ones((length, 3))
    margin = lsm.margins.NormFace(scale=16.0)
    for labels in (None, jnp.array([0])):
        logits = lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=0.0)
        np.testing.assert_allclose(logits, 16.0, rtol=1e-6)
