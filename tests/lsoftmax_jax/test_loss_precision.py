"""The number of digits that float32, bfloat16 and float16 keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import ArcFace, CosFace
from tests import oracle
from tests.answers import (
    EPS,
    MANY,
    PLANS,
    B,
    C,
    D,
    assert_norm_close,
    conditioning,
    loss_and_gradients,
    rounded,
    sum_and_gradients,
)
from tests.oracle import as_arrays, assert_close


def confident(margin):
    """Losses from 1 down to 1e-9: features near their columns, with growing norms."""
    rng = np.random.default_rng(margin)
    kernel = rng.standard_normal((D, C))
    kernel /= np.linalg.norm(kernel, axis=0)
    labels = np.arange(B) % C
    column = kernel[:, labels].T
    across = rng.standard_normal((B, D))
    across -= np.sum(across * column, axis=1, keepdims=True) * column
    direction = column + 0.3 / margin * across / np.linalg.norm(across, axis=1, keepdims=True)
    logits = oracle.logits(direction, kernel, labels, margin)
    target = logits[np.arange(B), labels]
    logits[np.arange(B), labels] = -np.inf
    norms = np.linspace(1, 21, B) / (target - np.max(logits, axis=1))
    return oracle.Problem(norms[:, None] * direction, kernel, labels)


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 8])
def test_tiny_float32_losses_keep_their_digits(margin):
    features, kernel, labels = as_arrays(confident(margin), jnp.float32)
    given = (*rounded(features, kernel), np.asarray(labels))
    exact = oracle.exact_loss(*given, margin)
    assert np.min(exact) < 2e-9 and np.max(exact) > 0.1
    loss, pulled = loss_and_gradients(
        features, kernel, labels, jnp.ones(B), jnp.float32(0), margin=margin
    )
    error = np.abs(np.asarray(loss, np.float64) - exact) / exact
    bound = 1e-5 + 8 * EPS * conditioning(*given, margin)
    np.testing.assert_array_less(error, bound)

    # One rounding of the cosine moves psi' by up to m^4 / 3 times this rounding.
    features_bar = oracle.exact_gradients(*given, np.ones(B), margin).features
    bound = bound + 8 * EPS * margin**4 / 3
    error = np.linalg.norm(np.asarray(pulled.features, np.float64) - features_bar, axis=1)
    np.testing.assert_array_less(error, bound * np.linalg.norm(features_bar, axis=1))


@pytest.mark.parametrize("margin", [1, 4])
def test_tiny_float32_losses_of_the_sum(margin):
    """Each weight's gradient is the loss of its example, to the same digits."""
    features, kernel, labels = as_arrays(confident(margin), jnp.float32)
    given = (*rounded(features, kernel), np.asarray(labels))
    _, gradients = sum_and_gradients(
        features, kernel, labels, jnp.ones(B), jnp.float32(0), margin=margin
    )
    exact = oracle.exact_loss(*given, margin)
    error = np.abs(np.asarray(gradients.weights, np.float64) - exact) / exact
    np.testing.assert_array_less(error, 1e-5 + 8 * EPS * conditioning(*given, margin))


@pytest.mark.parametrize(
    ("dtype", "plan", "classes"),
    [
        (jnp.float16, "one-shot", 11),
        (jnp.bfloat16, "one-shot", 11),
        (jnp.bfloat16, "one-shot", 301),
        (jnp.bfloat16, "class blocks, stored", 301),
    ],
)
def test_half_precision_operands(dtype, plan, classes):
    problem = oracle.problem(6, 64, 16, classes)
    features, kernel, labels = as_arrays(problem, dtype)
    cotangent = np.linspace(0.5, 1.5, 64)
    loss, pulled = loss_and_gradients(
        features,
        kernel,
        labels,
        jnp.asarray(cotangent, jnp.float32),
        jnp.float32(0.5),
        margin=4,
        plan=PLANS[plan],
    )
    given = (*rounded(features, kernel), problem.labels)
    assert loss.dtype == jnp.float32
    assert pulled.features.dtype == pulled.kernel.dtype == dtype
    assert pulled.lam.dtype == jnp.float32
    np.testing.assert_allclose(loss, oracle.loss(*given, 4, 0.5), rtol=3e-3)
    wanted = oracle.loss_pullback(*given, cotangent, 4, 0.5)
    assert_norm_close(pulled.features, wanted.features, 3e-3)
    assert_norm_close(pulled.kernel, wanted.kernel, 3e-3)
    assert_norm_close(pulled.lam, wanted.lam, 3e-3)


@pytest.mark.parametrize(
    ("rule", "plan", "classes"),
    [
        (loss_and_gradients, "one-shot", 11),
        (loss_and_gradients, "class blocks, stored", 301),
        (sum_and_gradients, "one-shot", 301),
        (sum_and_gradients, "row blocks with a tail", 11),
    ],
)
def test_bfloat16_gradients_at_the_small_angles_of_a_trained_network(rule, plan, classes):
    """At small angles alpha is m^2 and nearly all of it cancels: its rounding must cancel too."""
    rng = np.random.default_rng(6)
    _, kernel, labels = oracle.problem(6, 64, 16, classes)
    features = 0.5 * (kernel[:, labels].T + 0.05 * rng.standard_normal((64, 16)))
    features, kernel, _ = as_arrays((features, kernel, labels), jnp.bfloat16)
    arguments = features, kernel, jnp.asarray(labels), jnp.ones(64), jnp.float32(0)
    wanted = oracle.loss_pullback(*rounded(features, kernel), labels, np.ones(64), 4)
    pulled = rule(*arguments, margin=4, plan=PLANS[plan])[1]
    assert_norm_close(pulled.features, wanted.features, 3e-3)
    assert_norm_close(pulled.kernel, wanted.kernel, 3e-3)


def test_tiny_bfloat16_losses_keep_their_digits():
    features, kernel, labels = as_arrays(confident(3), jnp.bfloat16)
    given = (*rounded(features, kernel), np.asarray(labels))
    loss, _ = loss_and_gradients(features, kernel, labels, jnp.ones(B), jnp.float32(0), margin=3)
    exact = oracle.exact_loss(*given, 3)
    assert np.min(exact) < 1e-8
    np.testing.assert_allclose(loss, exact, rtol=3e-3)


@given(
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    shape_and_margin=st.sampled_from([((B, D, C), 2), (MANY, 4)]),
    scale=st.floats(0.01, 5),
    lam=st.floats(0, 100),
    seed=st.integers(0, 2**16),
)
def test_any_draw_agrees_with_the_oracle_on_the_same_rounded_inputs(
    dtype, shape_and_margin, scale, lam, seed
):
    shape, margin = shape_and_margin
    features, kernel, labels = as_arrays(oracle.problem(seed, *shape, scale), dtype)
    loss, pulled = loss_and_gradients(
        features, kernel, labels, jnp.ones(shape[0]), jnp.float32(lam), margin=margin
    )
    given = (*rounded(features, kernel), np.asarray(labels))
    lam = float(np.float32(lam))
    exact = oracle.exact_loss(*given, margin, lam)
    single = dtype == jnp.float32
    lost = 8 * EPS * conditioning(*given, margin)
    bound = (1e-5 if single else 3e-3) + lost
    np.testing.assert_array_less(np.abs(np.asarray(loss, np.float64) - exact), bound * exact)
    # Two roundings to bfloat16, of G and of the result, are eps at most; 3e-3 is their average.
    bound = (1e-5 if single else float(jnp.finfo(dtype).eps)) + np.max(lost)
    wanted = oracle.loss_pullback(*given, np.ones(shape[0]), margin, lam)
    bound += 8 * EPS * margin**4 / 3
    assert_norm_close(pulled.features, wanted.features, bound)
    assert_norm_close(pulled.kernel, wanted.kernel, bound)


def test_float16_keeps_the_direction_of_a_well_classified_examples_gradient():
    """At a loss of 3e-8 the gradient of the label's logit is subnormal in float16."""
    features = np.array([[-10.516, -1.541]], np.float16)
    kernel = np.array([[-0.839, -3.283], [1.284, 0.5005]], np.float16)

    def gradient(dtype):
        def scaled(features, kernel):
            losses = lsm.lsoftmax_loss(features, kernel, jnp.array([1]), margin=16, lam=10.0)
            return 256 * losses[0]

        found = jax.grad(scaled)(features.astype(dtype), kernel.astype(dtype))
        return np.asarray(found[0], np.float64)

    ours, wanted = gradient(np.float16), gradient(np.float32)
    assert np.linalg.norm(ours - wanted) < 0.02 * np.linalg.norm(wanted)


def test_a_loss_scale_reaches_what_is_cast_to_float16():
    """Without the scale, most of 20,000 probabilities are below the least float16."""
    problem = oracle.problem(7, 64, 16, 20_000)
    features, kernel, labels = as_arrays(problem, jnp.float16)
    weights = jnp.full(64, 1 / 64)

    @jax.jit
    def scaled(features, kernel):
        keywords = {"margin": 4, "lam": 0.5}
        return 2**15 * lsm.lsoftmax_loss_sum(features, kernel, labels, weights, **keywords)

    pulled = jax.grad(scaled, (0, 1))(features, kernel)
    wanted = oracle.loss_pullback(
        *rounded(features, kernel), problem.labels, np.full(64, 1 / 64), 4, 0.5
    )
    for gradient, exact in zip(pulled, wanted[:2], strict=True):
        assert gradient.dtype == jnp.float16
        assert_norm_close(np.asarray(gradient, np.float64) / 2**15, exact, 1e-3)


@pytest.mark.parametrize("norm", [1e-3, 30.0])
def test_float16_logits_of_unit_columns_keep_the_argmax(norm):
    """A product with two norms of 30 overflows; a product with two norms of 1e-3 underflows."""
    rng = np.random.default_rng(8)
    features, kernel = rng.standard_normal((64, 512)), rng.standard_normal((512, 50))
    features *= norm / np.linalg.norm(features, axis=1, keepdims=True)
    kernel *= norm / np.linalg.norm(kernel, axis=0)
    features, kernel = jnp.asarray(features, jnp.float16), jnp.asarray(kernel, jnp.float16)
    logits = lsm.lsoftmax_logits(features, kernel, None, margin=lsm.margins.SphereFace(4), lam=0.0)
    wide, columns = rounded(features, kernel)
    wanted = wide @ (columns / np.linalg.norm(columns, axis=0))
    assert logits.dtype == jnp.float16
    np.testing.assert_allclose(logits, wanted, rtol=2e-3, atol=2e-3 * norm)
    found = wanted[np.arange(64), np.argmax(logits, axis=1)]
    np.testing.assert_allclose(found, wanted.max(axis=1), rtol=2e-3)


FLOAT16_LOSSES = {
    "each": lambda f, k, y, **keywords: lsm.lsoftmax_loss(f, k, y, **keywords).sum(),
    "sum": lsm.lsoftmax_loss_sum,
    "row blocks": partial(lsm.lsoftmax_loss_sum, plan=lsm.Plan(row_block=2)),
    "class blocks": partial(lsm.lsoftmax_loss_sum, plan=lsm.Plan(class_block=4)),
    "logits": lambda f, k, y, **keywords: optax.softmax_cross_entropy_with_integer_labels(
        lsm.lsoftmax_logits(f, k, y, **keywords).astype(jnp.float32), y
    ).sum(),
}


@pytest.mark.parametrize("name", FLOAT16_LOSSES)
@pytest.mark.parametrize("margin", [CosFace(0.35, scale=64.0), ArcFace(0.5, scale=64.0)], ids=str)
def test_float16_gradients_of_short_features_are_finite(name, margin):
    """The lengths of features and columns, and the scale, are in the gradient of the logits."""
    rng = np.random.default_rng(0)
    features, kernel = (0.02 * rng.standard_normal(shape) for shape in ((5, 6), (6, 9)))
    features, kernel = (jnp.asarray(array, jnp.float16) for array in (features, kernel))
    labels = jnp.arange(5)
    gradient = jax.jit(jax.grad(partial(FLOAT16_LOSSES[name], margin=margin, lam=0.0), (0, 1)))
    exact = gradient(features.astype(jnp.float32), kernel.astype(jnp.float32), labels)
    for ours, wanted in zip(gradient(features, kernel, labels), exact, strict=True):
        assert ours.dtype == jnp.float16 and 100 < np.abs(wanted).max() < 65504
        assert_close(ours, wanted, 3e-3)


def test_float16_sgd_of_short_features_is_finite():
    rng = np.random.default_rng(0)
    features, kernel = (0.02 * rng.standard_normal(shape) for shape in ((5, 6), (6, 9)))
    features, kernel = (jnp.asarray(array, jnp.float16) for array in (features, kernel))
    step = partial(
        lsm.lsoftmax_sgd, labels=jnp.arange(5), weights=jnp.ones(5), lam=0.0, learning_rate=1e-4,
        margin=CosFace(0.35, scale=64.0),
    )  # fmt: skip
    momentum = jnp.zeros(kernel.shape)
    ours = step(features, kernel, momentum)
    wanted = step(features.astype(jnp.float32), kernel.astype(jnp.float32), momentum)
    assert_close(ours.dfeatures, wanted.dfeatures, 3e-3)
    assert_close(ours.momentum, wanted.momentum, 3e-3)


def test_a_short_column_that_fills_up_the_kernel_costs_float16_no_digits():
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    layout = lsm.ClassParallel("model", mesh=mesh, classes=9)
    rng = np.random.default_rng(0)
    features, kernel = rng.standard_normal((5, 6)), rng.standard_normal((6, 10))
    kernel[:, 9] = [1e-7, 0, 0, 0, 0, 0]
    arrays = tuple(jnp.asarray(array, jnp.float16) for array in (features, kernel))
    # The classes of the device that holds the short column.
    labels, keywords = jnp.arange(4, 9), {"margin": ArcFace(0.5, scale=64.0), "lam": 0.0}

    def total(features, kernel):
        ours = lsm.lsoftmax_loss(features, kernel, labels, layout=layout, **keywords)
        return jnp.sum(ours)

    def exact(features, kernel):
        return jnp.sum(lsm.lsoftmax_loss(features, kernel[:, :9], labels, **keywords))

    ours = jax.jit(jax.grad(total, (0, 1)))(*arrays)
    wanted = jax.grad(exact, (0, 1))(*(array.astype(jnp.float32) for array in arrays))
    for got, right in zip(ours, wanted, strict=True):
        assert_close(got, right, 3e-3)
