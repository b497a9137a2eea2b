"""lsoftmax_loss and lsoftmax_loss_sum in float64 against the arccos oracle."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lsoftmax_jax as lsm
from tests import oracle
from tests.answers import LAMBDAS, MANY, B, C, D, assert_gradients_close, loss_and_gradients
from tests.oracle import Gradients, as_arrays, assert_close


@pytest.mark.parametrize("margin", range(1, 9))
def test_values_and_random_cotangents(x64, margin):
    cotangent = np.random.default_rng(margin).standard_normal(B)
    for seed, lam in enumerate(LAMBDAS):
        problem = oracle.problem(10 * margin + seed, B, D, C, scale=2.0)
        loss, pulled = loss_and_gradients(
            *as_arrays(problem, jnp.float64),
            jnp.asarray(cotangent),
            jnp.float64(lam),
            margin=margin,
        )
        assert_close(loss, oracle.loss(*problem, margin, lam), 1e-12)
        assert_gradients_close(
            pulled, oracle.loss_pullback(*problem, cotangent, margin, lam), 1e-12
        )


def test_many_classes(x64):
    problem = oracle.problem(1, *MANY, scale=2.0)
    cotangent = np.random.default_rng(1).standard_normal(6)
    arguments = *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(0.3)
    loss, pulled = loss_and_gradients(*arguments, margin=4)
    assert_close(loss, oracle.loss(*problem, 4, 0.3), 1e-12)
    assert_gradients_close(pulled, oracle.loss_pullback(*problem, cotangent, 4, 0.3), 1e-12)


def test_margin_one_is_optax_cross_entropy(x64):
    problem = oracle.problem(1, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(B))

    @jax.jit
    def plain(features, kernel):
        return optax.softmax_cross_entropy_with_integer_labels(features @ kernel, labels)

    wanted, pull = jax.vjp(plain, features, kernel)
    for lam in (0.0, 5.0):
        loss, pulled = loss_and_gradients(
            features, kernel, labels, cotangent, jnp.float64(lam), margin=1
        )
        assert_close(loss, wanted, 1e-14)
        assert_gradients_close(pulled, Gradients(*pull(cotangent)), 1e-13)
        np.testing.assert_allclose(pulled.lam, 0, atol=1e-15)


def test_sum_without_weights_is_the_sum_and_scales_its_gradients(x64):
    problem = oracle.problem(4, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)

    @jax.jit
    def squared(features, kernel):
        return lsm.lsoftmax_loss_sum(features, kernel, labels, margin=4, lam=0.0) ** 2

    value, gradients = jax.value_and_grad(squared, argnums=(0, 1))(features, kernel)
    total = np.sum(oracle.loss(*problem, 4))
    wanted = oracle.loss_pullback(*problem, np.full(B, 2 * total), 4)
    assert_close(value, total**2, 1e-12)
    assert_gradients_close(Gradients(*gradients), wanted._replace(lam=None), 1e-12)


def test_label_smoothing_is_optax_smoothing_of_the_margin_logits(x64):
    features, kernel, labels = as_arrays(oracle.problem(5, B, D, C), jnp.float64)
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(B))

    @jax.jit
    def wanted(features, kernel, lam):
        logits = lsm.lsoftmax_logits(features, kernel, labels, margin=3, lam=lam)
        one_hot = jax.nn.one_hot(labels, C, dtype=jnp.float64)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, 0.2))

    value, pull = jax.vjp(wanted, features, kernel, jnp.float64(1))
    loss, pulled = loss_and_gradients(
        features, kernel, labels, cotangent, jnp.float64(1), margin=3, label_smoothing=0.2
    )
    assert_close(loss, value, 1e-13)
    assert_gradients_close(pulled, Gradients(*pull(cotangent)), 1e-12)


def test_full_label_smoothing_forgets_the_label(x64):
    problem = oracle.problem(5, B, D, C)
    cotangent = np.ones(B)
    loss, pulled = loss_and_gradients(
        *as_arrays(problem, jnp.float64),
        jnp.asarray(cotangent),
        jnp.float64(1),
        margin=3,
        label_smoothing=1.0,
    )
    assert_close(loss, oracle.loss(*problem, 3, 1.0, None, 1.0), 1e-13)
    assert_gradients_close(
        pulled, oracle.loss_pullback(*problem, cotangent, 3, 1.0, None, 1.0), 1e-12
    )


def test_statistics_are_what_the_loss_saw(x64):
    problem = oracle.problem(18, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)

    @jax.jit
    def loss(features, kernel, lam):
        value, seen = lsm.lsoftmax_loss_and_statistics(features, kernel, labels, margin=4, lam=lam)
        return jnp.sum(value), (value, seen)

    gradients, (value, seen) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        features, kernel, jnp.float64(0.5)
    )
    rows = np.arange(B)
    plain = problem.features @ problem.kernel
    theta = oracle.target_geometry(*problem)[-1]
    assert_close(value, oracle.loss(*problem, 4, 0.5), 1e-12)
    assert_close(seen.target_cosine, np.cos(theta), 1e-12)
    assert_close(seen.target_logit, oracle.logits(*problem, 4, 0.5)[rows, problem.labels], 1e-12)
    assert_close(seen.plain_logit, plain[rows, problem.labels], 1e-12)
    plain[rows, problem.labels] = -np.inf
    assert_close(seen.max_logit, np.max(plain, axis=1), 1e-12)
    wanted = oracle.loss_pullback(*problem, np.ones(B), 4, 0.5)._replace(lam=None)
    assert_gradients_close(Gradients(*gradients), wanted, 1e-12)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_leading_batch_shapes(leading):
    rows = int(np.prod(leading))
    problem = oracle.problem(11, rows, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float32)
    cotangent, where = np.linspace(0.5, 1.5, rows), np.arange(rows) != 1
    loss, pulled = loss_and_gradients(
        features.reshape(*leading, D),
        kernel,
        labels.reshape(leading),
        jnp.asarray(cotangent, jnp.float32).reshape(leading),
        jnp.float32(1),
        jnp.asarray(where).reshape(leading),
        margin=3,
    )
    chex.assert_shape([loss, pulled.features], [leading, (*leading, D)])
    assert_close(loss.reshape(rows), oracle.loss(*problem, 3, 1.0, where), 1e-5)
    wanted = oracle.loss_pullback(*problem, cotangent, 3, 1.0, where)
    pulled = pulled._replace(features=pulled.features.reshape(rows, D))
    assert_gradients_close(pulled, wanted, 1e-5)


@pytest.mark.parametrize("kind", ["big-endian", "nnx.Param"])
def test_big_endian_arrays_and_params_are_read_by_value(kind):
    rng = np.random.default_rng(0)
    given = rng.normal(size=(4, 3)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    given = *given, np.array([0, 4, 2, 2], np.int32)
    if kind == "big-endian":
        other = [array.astype(array.dtype.newbyteorder(">")) for array in given]
    else:
        other = [given[0], nnx.Param(jnp.asarray(given[1])), given[2]]
    for rule in (lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum, lsm.lsoftmax_logits):
        found = rule(*other, margin=2, lam=1.0)
        np.testing.assert_array_equal(found, rule(*given, margin=2, lam=1.0))
