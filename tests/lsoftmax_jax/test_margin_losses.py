"""Compares losses and logits of every margin with the oracle, in every plan and dtype."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, NormFace, SphereFace
from tests import oracle
from tests.margin_cases import (
    BATCH,
    CASES,
    CLASSES,
    DIM,
    PLANS,
    SCALE,
    Case,
    assert_all_close,
    each_kind,
    every_angular,
    every_case,
    given,
    loss_and_gradients,
    oracle_unit,
    sum_and_gradients,
    value_and_pullback,
    wanted_of,
)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@each_kind
def test_every_plan_with_random_cotangents(x64, case, plan):
    problem = oracle.problem(2, BATCH, DIM, CLASSES, scale=3.0)
    *arguments, cotangent = given(problem)
    keywords = {"label_smoothing": 0.1, "plan": plan}
    loss, bars = wanted_of(case, problem, cotangent, 0.7, 0.1)
    run = jax.jit(functools.partial(loss_and_gradients, case, **keywords))
    value, gradients = run(*arguments, jnp.float64(0.7))
    oracle.assert_close(value, loss, 1e-12)
    assert_all_close(gradients, bars, 1e-11)
    run = jax.jit(functools.partial(sum_and_gradients, case, **keywords))
    total, gradients = run(*arguments, jnp.float64(0.7))
    oracle.assert_close(total, np.sum(cotangent * loss), 1e-12)
    assert_all_close(gradients, bars, 1e-11)


@every_case
def test_lambda_from_zero_to_infinity_with_many_classes(x64, case):
    problem = oracle.problem(4, BATCH, DIM, 301)
    *arguments, cotangent = given(problem)
    run = jax.jit(functools.partial(loss_and_gradients, case))
    for lam in (0.0, 5.0, np.inf):
        value, gradients = run(*arguments, jnp.float64(lam))
        loss, bars = wanted_of(case, problem, cotangent, lam)
        oracle.assert_close(value, loss, 1e-12)
        assert_all_close(gradients, bars, 1e-11)


@every_case
def test_logits(x64, case):
    problem = oracle.problem(5, BATCH, DIM, CLASSES)
    keywords = {"margin": case.margin, "lam": 0.4}
    logits = jax.jit(functools.partial(lsm.lsoftmax_logits, **keywords))
    wanted = oracle.angular(*problem, case.of_theta, case.scale, 0.4)[0]
    oracle.assert_close(logits(*oracle.as_arrays(problem, jnp.float64)), wanted, 1e-13)
    wanted = oracle.angular(*problem, case.of_theta, case.scale, np.inf)[0]
    oracle.assert_close(logits(*problem[:2], None), wanted, 1e-13)

    def through_logits(features, kernel):
        z = logits(features, kernel, problem.labels)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(z, problem.labels))

    gradients = jax.jit(jax.grad(through_logits, (0, 1)))(*map(jnp.asarray, problem[:2]))
    assert_all_close(gradients, wanted_of(case, problem, np.ones(BATCH), 0.4)[1][:2], 1e-11)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@each_kind
def test_narrower_operands(strict, case, dtype):
    problem = oracle.problem(6, 64, 16, CLASSES)
    features, kernel, labels, cotangent, _ = given(problem, dtype)
    rounded = oracle.Problem(*(np.asarray(a, np.float64) for a in (features, kernel)), labels)
    run = jax.jit(functools.partial(loss_and_gradients, case, plan=lsm.Plan(class_block=4)))
    value, bars = run(features, kernel, labels, cotangent, jnp.float32(0))
    assert value.dtype == jnp.float32 and [bar.dtype for bar in bars[:2]] == [dtype] * 2
    loss, wanted = wanted_of(case, rounded, np.asarray(cotangent, np.float64), 0.0)
    # An unbounded slope magnifies the cosine's rounding to eps / theta^2; the least theta is 0.018.
    tolerance = 4e-4 if dtype == jnp.float32 else 4e-3
    oracle.assert_close(value, loss, tolerance)
    for bar, exact in zip(bars[:2], wanted[:2], strict=True):
        error = np.linalg.norm(np.asarray(bar, np.float64) - exact)
        assert error <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("plan", [PLANS["one-shot"], PLANS["class blocks, stored"]], ids=str)
@each_kind
def test_bfloat16_at_the_small_angles_of_a_trained_network(case, plan):
    """At small angles ArcFace's slope is large and nearly all of it cancels."""
    rng = np.random.default_rng(6)
    _, kernel, labels = oracle.problem(6, 64, 16, CLASSES)
    features = 0.5 * (kernel[:, labels].T + 0.05 * rng.standard_normal((64, 16)))
    problem = oracle.Problem(features, kernel, labels)
    features, kernel, labels, cotangent, _ = given(problem, jnp.bfloat16)
    rounded = oracle.Problem(*(np.asarray(a, np.float64) for a in (features, kernel)), labels)
    run = jax.jit(functools.partial(loss_and_gradients, case, plan=plan))
    _, bars = run(features, kernel, labels, cotangent, jnp.float32(0))
    _, wanted = wanted_of(case, rounded, np.asarray(cotangent, np.float64), 0.0)
    for bar, exact in zip(bars[:2], wanted[:2], strict=True):
        error = np.linalg.norm(np.asarray(bar, np.float64) - exact)
        assert error <= 4e-3 * np.linalg.norm(exact)


def test_no_margin_is_normalised_softmax(x64):
    problem = oracle.problem(7, BATCH, DIM, CLASSES)
    *arguments, _ = given(problem)
    norm_face = Case(NormFace(scale=SCALE), {})
    wanted = jax.jit(functools.partial(loss_and_gradients, norm_face))(*arguments, 0.0)

    def literal(features, kernel):
        z = SCALE * oracle_unit(features, 1) @ oracle_unit(kernel, 0)
        return optax.softmax_cross_entropy_with_integer_labels(z, arguments[2])

    value, bars = value_and_pullback(literal, *arguments[:2], arguments[3])
    oracle.assert_close(wanted[0], value, 1e-13)
    assert_all_close(wanted[1][:2], bars, 1e-12)
    for margin in (
        ArcFace(0.0, scale=SCALE),
        CosFace(0.0, scale=SCALE),
        Combined(scale=SCALE),
        SphereFace(1, scale=SCALE),
    ):
        got = jax.jit(functools.partial(loss_and_gradients, Case(margin, {})))
        got = got(*arguments, 0.0)
        oracle.assert_close(got[0], wanted[0], 1e-15)
        assert_all_close(got[1][:2], wanted[1][:2], 1e-14)


@pytest.mark.parametrize(
    "margin",
    [
        ArcFace(0.5, scale=SCALE, detach=True),
        Combined(1.2, 0.3, 0.2, scale=SCALE, detach=True),
    ],
    ids=str,
)
def test_a_detached_margin_is_added_without_gradient(x64, margin):
    problem = oracle.problem(8, BATCH, DIM, CLASSES)
    *arguments, _ = given(problem)
    case = CASES["ArcFace" if isinstance(margin, ArcFace) else "Combined"]
    rows = jnp.arange(BATCH), arguments[2]

    def literal(features, kernel):
        cosine = oracle_unit(features, 1) @ oracle_unit(kernel, 0)
        angle = np.arccos(np.asarray(jax.lax.stop_gradient(cosine[rows])))
        added = case.of_theta(angle)[0] - np.cos(angle)
        z = SCALE * cosine.at[rows].add(added)
        return optax.softmax_cross_entropy_with_integer_labels(z, arguments[2])

    value, pull = jax.vjp(literal, *arguments[:2])
    detached = Case(margin, {})
    run = jax.jit(functools.partial(loss_and_gradients, detached))
    got, bars = run(*arguments, jnp.float64(0))
    oracle.assert_close(got, value, 1e-12)
    assert_all_close(bars[:2], pull(arguments[3]), 1e-12)
    true = jax.jit(functools.partial(loss_and_gradients, case))(*arguments, jnp.float64(0))[1]
    assert np.max(np.abs(bars[0] - true[0])) > 0.1 * np.max(np.abs(true[0]))


@every_angular
def test_reverse_over_reverse(x64, case):
    problem = oracle.problem(3, 4, DIM, CLASSES)
    features, kernel, labels, _, _ = given(problem)
    direction = np.random.default_rng(1).standard_normal(features.shape)
    rest = kernel, labels, jnp.ones(4), jnp.float64(0)

    @jax.jit
    def turned(features):
        gradient = loss_and_gradients(case, features, *rest)[1][0]
        return jnp.sum(gradient * direction)

    step = 1e-6
    ends = [turned(features + h * direction) for h in (step, -step)]
    wanted = (ends[0] - ends[1]) / (2 * step)
    got = jnp.sum(jax.grad(turned)(features) * direction)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    along = jnp.asarray(kernel[:, labels].T)
    assert np.all(np.isfinite(jax.grad(turned)(along)))
