"""Inputs at the edge: one class, no rows, zero vectors, norms of any size, every λ."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from tests import oracle
from tests.answers import (
    LAMBDAS,
    PLANS,
    B,
    C,
    D,
    assert_gradients_close,
    loss_and_gradients,
    sum_and_gradients,
)
from tests.oracle import as_arrays, assert_close


@pytest.mark.parametrize(
    ("plan", "label_smoothing"),
    [("one-shot", 0.0), ("one-shot", 0.1), ("one class at a time", 0.1)],
)
def test_one_class_gives_exactly_zero(plan, label_smoothing):
    features = jnp.asarray(oracle.problem(10, B, D, C).features, jnp.float32)
    kernel, labels = jnp.ones((D, 1)), jnp.zeros(B, jnp.int32)
    arguments = features, kernel, labels, jnp.ones(B), jnp.float32(0.5)
    static = {"margin": 4, "label_smoothing": label_smoothing, "plan": PLANS[plan]}
    for results in (
        loss_and_gradients(*arguments, **static),
        sum_and_gradients(*arguments, **static),
    ):
        chex.assert_trees_all_equal(results, jax.tree.map(jnp.zeros_like, results))


def test_one_class_gives_exactly_zero_self_paced_and_filled_up():
    """One class has no rivals, and columns that only pad a shard are not classes."""
    features = jnp.asarray(oracle.problem(10, B, D, C).features, jnp.float32)
    labels = jnp.zeros(B, jnp.int32)
    mesh = jax.make_mesh((4,), ("model",), devices=jax.devices()[:4])
    layout = lsm.ClassParallel("model", mesh=mesh, classes=1)
    calls = {
        1: lsm.lsoftmax_loss_and_statistics,
        4: functools.partial(lsm.lsoftmax_loss_and_statistics, layout=layout),
    }
    for columns, call in calls.items():

        def total(features, kernel, call=call):
            loss, seen = call(features, kernel, labels, margin=4, lam=lsm.self_paced())
            return jnp.sum(loss), seen.lam

        gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
        (loss, lam), gradients = gradient(features, jnp.ones((D, columns)))
        assert loss == 0 and jnp.all(lam >= 1)
        chex.assert_trees_all_equal(gradients, jax.tree.map(jnp.zeros_like, gradients))


@pytest.mark.parametrize("plan", ["one-shot", "row blocks with a tail", "class blocks, stored"])
def test_empty_batch(plan):
    arguments = jnp.zeros((0, D)), jnp.ones((D, 11)), jnp.zeros(0, jnp.int32), jnp.zeros(0), 0.5
    loss, pulled = loss_and_gradients(*arguments, margin=4, plan=PLANS[plan])
    chex.assert_shape([loss, pulled.features, pulled.kernel], [(0,), (0, D), (D, 11)])
    total, gradients = sum_and_gradients(*arguments, margin=4, plan=PLANS[plan])
    assert total == 0
    assert np.all(pulled.kernel == 0) and np.all(gradients.kernel == 0)


@pytest.mark.parametrize(
    ("dtype", "plan", "classes"),
    [
        (jnp.float64, "one-shot", 5),
        (jnp.float32, "one-shot", 5),
        (jnp.float32, "row blocks with a tail", 301),
        (jnp.bfloat16, "class blocks, stored", 5),
    ],
)
def test_degenerate_inputs_give_finite_losses_and_gradients(dtype, plan, classes):
    static = {"margin": 4, "label_smoothing": 0.1, "plan": PLANS[plan]}
    with jax.enable_x64(dtype == jnp.float64):
        single = np.promote_types(dtype, np.float32)
        rows = as_arrays(oracle.extreme_problems(classes), dtype)
        ones = jnp.ones(rows[2].shape, single)
        for lam in LAMBDAS:
            lam = jnp.asarray(lam, single)
            for rule in (loss_and_gradients, sum_and_gradients):
                results = jax.vmap(lambda *a, rule=rule, lam=lam: rule(*a, lam, **static))(
                    *rows, ones
                )
                chex.assert_tree_all_finite(results)


@pytest.mark.parametrize("which", ["features", "kernel"])
def test_tiny_norms_give_the_uniform_loss(which):
    problem = oracle.problem(12, B, D, C)
    problem = problem._replace(**{which: 1e-20 * getattr(problem, which)})
    loss, _ = loss_and_gradients(
        *as_arrays(problem, jnp.float32), jnp.ones(B), jnp.float32(0), margin=4
    )
    np.testing.assert_allclose(loss, np.full(B, np.log(C)), rtol=1e-6)


@pytest.mark.parametrize("which", ["features", "kernel"])
def test_extreme_norms_are_right_and_not_only_finite(x64, which):
    cotangent = np.random.default_rng(1).standard_normal(B)
    for scale in (1e-20, 1e-3, 1e15):
        problem = oracle.problem(12, B, D, C)
        problem = problem._replace(**{which: scale * getattr(problem, which)})
        loss, pulled = loss_and_gradients(
            *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(0), margin=4
        )
        assert_close(loss, oracle.loss(*problem, 4), 1e-12)
        assert_gradients_close(pulled, oracle.loss_pullback(*problem, cotangent, 4), 1e-12)


def test_the_target_cosine_stays_within_one():
    """Rounding pushes about one in four cosines of parallel features past 1."""
    kernel = np.random.default_rng(0).standard_normal((D, 64))
    features = np.concatenate([0.3 * kernel.T, -1.7 * kernel.T])
    operands = jnp.asarray(features, jnp.float32), jnp.asarray(kernel, jnp.float32)
    labels = jnp.concatenate([jnp.arange(64), jnp.arange(64)])
    _, seen = jax.jit(lambda *a: lsm.lsoftmax_loss_and_statistics(*a, margin=4, lam=0.0))(
        *operands, labels
    )
    np.testing.assert_allclose(seen.target_cosine, np.repeat([1.0, -1.0], 64), rtol=1e-6)
    assert np.max(np.abs(seen.target_cosine)) <= 1


def test_a_traced_negative_or_nan_lambda_makes_the_loss_nan():
    features, kernel, labels = as_arrays(oracle.problem(0, B, D, C), jnp.float32)
    for lam in (-0.5, np.nan):
        loss, _ = loss_and_gradients(
            features, kernel, labels, jnp.ones(B), jnp.float32(lam), margin=4
        )
        assert np.all(np.isnan(loss))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_features_without_length_give_the_logarithm_of_the_classes(plan):
    """D = 0: every logit is 0."""
    features, kernel, labels = jnp.ones((5, 0)), jnp.ones((0, 4)), jnp.arange(5) % 4
    keywords = {"margin": 4, "lam": 0.0, "plan": plan}
    loss = lsm.lsoftmax_loss(features, kernel, labels, **keywords)
    np.testing.assert_allclose(loss, np.full(5, np.log(4)), rtol=1e-6)
    total, gradient = jax.value_and_grad(lsm.lsoftmax_loss_sum, 1)(
        features, kernel, labels, **keywords
    )
    np.testing.assert_allclose(total, 5 * np.log(4), rtol=1e-6)
    assert gradient.shape == (0, 4)
