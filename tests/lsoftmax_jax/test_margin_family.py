"""ArcFace, CosFace, SphereFace and the combined margin, in everything that takes a margin."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import linen, nnx
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, NormFace, SphereFace
from tests import oracle

SCALE = 12.0
BATCH, DIM, CLASSES = 16, 6, 11


class Case(NamedTuple):
    """A margin and what the oracle calls it."""

    margin: Any
    m: dict[str, Any]

    @property
    def scale(self):
        return self.margin.scale

    def of_theta(self, theta):
        if isinstance(self.margin, SphereFace):
            m = self.margin.margin
            return oracle.psi_of_theta(theta, m), oracle.psi_slope_of_theta(theta, m)
        return oracle.combined_of_theta(theta, **self.m)


CASES = {
    "ArcFace": Case(ArcFace(0.5, scale=SCALE), {"m2": 0.5}),
    "ArcFace, easy": Case(ArcFace(0.3, easy=True, scale=SCALE), {"m2": 0.3, "easy": True}),
    "ArcFace, wide": Case(ArcFace(2.0, scale=SCALE), {"m2": 2.0}),
    "CosFace": Case(CosFace(0.35, scale=SCALE), {"m3": 0.35}),
    "Combined": Case(Combined(1.2, 0.3, 0.2, scale=SCALE), {"m1": 1.2, "m2": 0.3, "m3": 0.2}),
    "Combined, m1 = 2": Case(Combined(2.0, scale=SCALE), {"m1": 2.0}),
    "SphereFace": Case(SphereFace(4), {}),
    "SphereFace, scaled": Case(SphereFace(3, scale=SCALE), {}),
}
ANGULAR = {name: case for name, case in CASES.items() if case.m}
# One of each kind, where all would cost too much.
KINDS = {name: CASES[name] for name in ("ArcFace", "Combined", "SphereFace")}
PLANS = {
    "one-shot": lsm.Plan(),
    "row blocks": lsm.Plan(row_block=5),
    "class blocks, stored": lsm.Plan(class_block=4, keep_exponentials=True),
    "class blocks, recomputed": lsm.Plan(class_block=4, keep_exponentials=False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
every_angular = pytest.mark.parametrize("case", ANGULAR.values(), ids=ANGULAR)


# The functions of the cosine.


def value_and_slope(margin, cosines):
    return jax.jit(margin.value_and_slope)(cosines)


def kinks(m):
    """Where the value has a corner, as an angle."""
    last = (np.pi - m.get("m2", 0.0)) / m.get("m1", 1.0)
    return [last, np.pi / 2] if m.get("easy") else [last]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_angular
def test_value_and_slope_are_the_formula_at_60_digits(x64, case, dtype):
    eps = float(np.finfo(dtype).eps)
    ends = np.geomspace(4 * np.sqrt(eps), 0.1, 12)
    angles = np.concatenate([ends, np.linspace(0.11, 3.03, 40), np.pi - ends])
    angles = angles[np.min(np.abs(angles[:, None] - kinks(case.m)), axis=1) > 1e-3]
    cosines = np.cos(angles).astype(dtype)
    wide = cosines.astype(np.float64)
    value, slope = map(np.asarray, value_and_slope(case.margin, jnp.asarray(cosines)))
    wanted = np.array([float(oracle.exact_combined(c, **case.m)) for c in wide])
    exact = np.array([float(oracle.exact_combined_slope(c, **case.m)) for c in wide])
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_allclose(value, wanted, rtol=0, atol=8 * eps)
    # Near pi what is left of the slope is a difference, as large as its rounding over the sine.
    rounding = 8 * eps * (1 + 1 / np.sqrt(1 - wide**2))
    assert np.all(np.abs(slope - exact) <= rounding + 8 * eps * np.abs(exact))


@every_angular
def test_the_value_increases_with_the_cosine_and_only_easy_jumps(x64, case):
    cosines = np.linspace(-1, 1, 20001)
    value, slope = map(np.asarray, value_and_slope(case.margin, jnp.asarray(cosines)))
    steps, spacing = np.diff(value), cosines[1] - cosines[0]
    assert np.all(slope >= 0) and np.all(np.isfinite(slope))
    straddles = np.flatnonzero((cosines[:-1] <= 0) & (cosines[1:] > 0))
    if case.m.get("easy"):
        assert np.delete(steps, straddles).min() >= 0
        np.testing.assert_allclose(steps[straddles], -np.sin(case.m["m2"]), atol=2 * spacing)
        return
    assert np.all(steps > 0)
    # A root at the end, whose step is sqrt(2 spacing).
    assert np.max(steps) <= 1.3 * np.sqrt(2 * spacing)
    at_pi = np.cos((np.pi - case.m.get("m2", 0)) / case.m.get("m1", 1))
    np.testing.assert_allclose(value[0], -2 - at_pi - case.m.get("m3", 0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_slope_at_angle_zero_is_cut_off(x64, dtype):
    floor = np.sqrt(np.finfo(dtype).eps)
    ends = jnp.asarray([1.0, 1 - np.finfo(dtype).epsneg, -1.0], dtype)
    value, slope = value_and_slope(ArcFace(0.5, scale=1.0), ends)
    np.testing.assert_allclose(value[0], np.cos(0.5), rtol=1e-6)
    assert np.all(np.asarray(slope[:2]) <= 1.01 * np.sin(0.5) / floor) and slope[2] == 1
    _, slope = value_and_slope(Combined(m1=1.5, scale=1.0), ends)
    np.testing.assert_allclose(slope, [1.5**2, 1.5**2, 1], rtol=1e-6)


def test_nan_stays_nan():
    for case in CASES.values():
        assert np.isnan(value_and_slope(case.margin, jnp.float32(np.nan))[0])


# The losses against the oracle.


def loss_and_gradients(case, features, kernel, labels, cotangent, lam, **keywords):
    def loss(features, kernel, lam):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=case.margin, lam=lam, **keywords)

    value, pull = jax.vjp(loss, features, kernel, lam)
    return value, pull(cotangent)


def sum_and_gradients(case, features, kernel, labels, weights, lam, **keywords):
    def total(features, kernel, lam):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights,
            margin=case.margin, lam=lam, **keywords,
        )  # fmt: skip

    return jax.value_and_grad(total, (0, 1, 2))(features, kernel, lam)


def wanted_of(case, problem, cotangent, lam, label_smoothing=0.0):
    rest = case.of_theta, case.scale, lam, label_smoothing
    loss = oracle.angular_loss(*problem, *rest)
    return loss, oracle.angular_pullback(*problem, cotangent, *rest)


def assert_all_close(actual, wanted, tolerance):
    for one, other in zip(actual, wanted, strict=True):
        oracle.assert_close(one, other, tolerance)


def at_least_f32(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def given(problem, dtype=jnp.float64):
    cotangent = np.random.default_rng(9).standard_normal(len(problem.labels))
    wide = at_least_f32(dtype)
    return *oracle.as_arrays(problem, dtype), jnp.asarray(cotangent, wide), cotangent


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
    # An infinite slope feels the cosine's rounding: eps / theta^2, and the least theta is 0.018.
    tolerance = 4e-4 if dtype == jnp.float32 else 4e-3
    oracle.assert_close(value, loss, tolerance)
    for bar, exact in zip(bars[:2], wanted[:2], strict=True):
        error = np.linalg.norm(np.asarray(bar, np.float64) - exact)
        assert error <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("plan", [PLANS["one-shot"], PLANS["class blocks, stored"]], ids=str)
@each_kind
def test_bfloat16_at_the_small_angles_of_a_trained_network(case, plan):
    """There ArcFace's slope is large and nearly all of it cancels."""
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


def value_and_pullback(loss, features, kernel, cotangent):
    @jax.jit
    def run(*operands):
        value, pull = jax.vjp(loss, *operands)
        return value, pull(cotangent)

    return run(features, kernel)


def oracle_unit(array, axis):
    return array / jnp.sqrt(jnp.sum(array**2, axis=axis, keepdims=True))


@pytest.mark.parametrize(
    "margin",
    [
        ArcFace(0.5, scale=SCALE, detach=True),
        Combined(1.2, 0.3, 0.2, scale=SCALE, detach=True),
    ],
    ids=str,
)
def test_detached_is_a_margin_that_is_added_without_gradient(x64, margin):
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


# What norms and data may be.


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@every_case
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


@pytest.mark.parametrize("factors", [(1e-20, 1.0), (1e15, 1.0), (1.0, 1e-20), (1.0, 1e15)])
def test_lengths_do_not_matter_in_float32(factors):
    features, kernel, labels = oracle.problem(3, BATCH, DIM, CLASSES)
    units = oracle.Problem(oracle.unit(features, 1)[0], oracle.unit(kernel, 0)[0], labels)
    features, kernel, *rest, _ = given(units, jnp.float32)
    run = jax.jit(functools.partial(loss_and_gradients, CASES["ArcFace"]))
    loss, (dfeatures, dkernel, _) = run(features, kernel, *rest, jnp.float32(0))
    f, k = factors
    got, bars = run(features * f, kernel * k, *rest, jnp.float32(0))
    oracle.assert_close(got, loss, 1e-5)
    oracle.assert_close(np.float64(bars[0]) * f, dfeatures, 1e-5)
    oracle.assert_close(np.float64(bars[1]) * k, dkernel, 1e-5)


@each_kind
def test_masked_rows_are_absent_and_invalid_labels_nan(case):
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


# Everything else that takes a margin.

MESHES = {
    "one axis": ((8,), ("model",), ("model",)),
    "data by model": ((2, 4), ("data", "model"), ("data",)),
    "features over both": ((2, 4), ("data", "model"), ("data", "model")),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@each_kind
def test_classes_split_over_devices(x64, case, mesh, axis_type):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, {jax.devices()[0].platform} has {jax.device_count()}")
    shape, names, batch_axes = mesh
    mesh = jax.make_mesh(shape, names, (axis_type,) * len(shape))
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    features, kernel, labels, weights, cotangent = given(problem)
    filled = jnp.concatenate([kernel, jnp.full((DIM, 16 - CLASSES), 7.0)], axis=1)
    rows, columns = NamedSharding(mesh, P(batch_axes)), NamedSharding(mesh, P(None, "model"))
    features, labels, weights = (jax.device_put(a, rows) for a in (features, labels, weights))
    filled = jax.device_put(filled, columns)
    layout = lsm.ClassParallel("model", batch_axes, mesh, CLASSES)
    keywords = {"margin": case.margin, "lam": 0.7, "layout": layout}

    @jax.jit
    def each(features, kernel, labels, weights):
        loss, pull = jax.vjp(
            lambda f, k: lsm.lsoftmax_loss(f, k, labels, **keywords), features, kernel
        )
        return loss, pull(weights)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def total(features, kernel, labels, weights):
        plan = lsm.Plan(class_block=1, keep_exponentials=False)
        return lsm.lsoftmax_loss_sum(features, kernel, labels, weights, plan=plan, **keywords)

    loss, bars = wanted_of(case, problem, cotangent, 0.7)
    value, gradients = each(features, filled, labels, weights)
    oracle.assert_close(value, loss, 1e-12)
    summed, gradients_of_sum = total(features, filled, labels, weights)
    oracle.assert_close(summed, np.sum(loss * cotangent), 1e-12)
    for dfeatures, dkernel in (gradients, gradients_of_sum):
        dfeatures, dkernel = np.asarray(dfeatures), np.asarray(dkernel)
        assert_all_close((dfeatures, dkernel[:, :CLASSES]), bars[:2], 1e-11)
        assert not np.any(dkernel[:, CLASSES:])


@each_kind
def test_all_classes_drawn_is_the_exact_loss(x64, case):
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    features, kernel, labels, weights, cotangent = given(problem)

    @jax.jit
    def run(features, kernel, labels):
        sample = lsm.sample_classes(jax.random.key(0), labels, CLASSES, CLASSES)

        def loss(features, columns):
            return lsm.lsoftmax_sampled_loss(features, columns, sample, margin=case.margin, lam=0.7)

        value, pull = jax.vjp(loss, features, lsm.sampled.take_columns(kernel, sample))
        dfeatures, dcolumns = pull(weights)
        dkernel = lsm.sampled.put_columns(jnp.zeros_like(kernel), sample, dcolumns)
        return value, dfeatures, dkernel

    value, dfeatures, dkernel = run(features, kernel, labels)
    wanted, bars = wanted_of(case, problem, cotangent, 0.7)
    oracle.assert_close(value, wanted, 1e-12)
    assert_all_close((dfeatures, dkernel), bars[:2], 1e-11)


@each_kind
def test_the_step_with_sgd_inside(x64, case):
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    features, kernel, labels, weights, cotangent = given(problem)
    keywords = {"margin": case.margin, "lam": 0.7, "learning_rate": 0.1}
    step = jax.jit(functools.partial(lsm.lsoftmax_sgd, plan=lsm.Plan(class_block=4), **keywords))
    done = step(features, kernel, jnp.zeros_like(kernel), labels, weights)
    loss, bars = wanted_of(case, problem, cotangent, 0.7)
    oracle.assert_close(done.loss, np.sum(loss * cotangent), 1e-12)
    oracle.assert_close(done.dfeatures, bars[0], 1e-11)
    oracle.assert_close(done.momentum, bars[1], 1e-11)
    oracle.assert_close(done.kernel, problem.kernel - 0.1 * bars[1], 1e-12)


@each_kind
def test_both_heads(case):
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    features, kernel, labels, _, _ = given(problem, jnp.float32)
    ones = nnx.LSoftmaxDense(DIM, CLASSES, margin=case.margin, rngs=flax_nnx.Rngs(0))
    ones.kernel[...] = kernel
    twin = linen.LSoftmaxDense(CLASSES, case.margin)
    apply = functools.partial(twin.apply, {"params": {"kernel": kernel}}, features)
    rest = case.of_theta, case.scale
    wanted = oracle.angular_loss(*problem, *rest, 0.7)
    oracle.assert_close(ones.loss(features, labels, 0.7), wanted, 1e-5)
    oracle.assert_close(apply(labels, 0.7, method=twin.loss), wanted, 1e-5)
    wanted = oracle.angular(*problem, *rest, 0.7)[0]
    oracle.assert_close(ones(features, labels, 0.7), wanted, 1e-5)
    oracle.assert_close(apply(labels, 0.7), wanted, 1e-5)
    wanted = oracle.angular(*problem, *rest, np.inf)[0]
    oracle.assert_close(ones(features), wanted, 1e-5)
    oracle.assert_close(apply(), wanted, 1e-5)


def test_ten_classes_train():
    """Six tight groups in the plane: every margin finds them, at scale 10 and any length."""
    rng = np.random.default_rng(0)
    labels = rng.integers(6, size=64)
    angles = 2 * np.pi * labels / 6 + 0.05 * rng.standard_normal(64)
    features = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32)
    for margin in (
        ArcFace(0.3, scale=10.0),
        CosFace(0.2, scale=10.0),
        Combined(1.0, 0.1, 0.1, scale=10.0),
        SphereFace(2, scale=10.0),
    ):
        head = nnx.LSoftmaxDense(2, 6, margin=margin, rngs=flax_nnx.Rngs(1))
        optimizer = flax_nnx.Optimizer(head, optax.adam(0.1), wrt=flax_nnx.Param)

        @flax_nnx.jit
        def step(head, optimizer):
            def mean(head):
                return head.loss(features, labels, lam=0.0).mean()

            loss, gradients = flax_nnx.value_and_grad(mean)(head)
            optimizer.update(head, gradients)
            return loss

        with jax.numpy_dtype_promotion("standard"):  # Optax's Adam needs it
            for _ in range(60):
                loss = step(head, optimizer)
        assert np.isfinite(loss)
        np.testing.assert_array_equal(jnp.argmax(head(features), axis=1), labels)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A user's own: no base class, no registration."""

    bend: float
    scale: float | None = None
    unit_columns: bool = False

    def value_and_slope(self, cosine):
        return cosine - self.bend * (1 - cosine) ** 2, 1 + 2 * self.bend * (1 - cosine)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["norms kept", "scaled"])
def test_a_margin_of_ones_own(x64, scale):
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    *arguments, _ = given(problem)
    rows = jnp.arange(BATCH), arguments[2]

    def literal(features, kernel):
        cosine = oracle_unit(features, 1) @ oracle_unit(kernel, 0)
        lengths = jnp.outer(jnp.linalg.norm(features, axis=1), jnp.linalg.norm(kernel, axis=0))
        value = cosine.at[rows].add(-0.2 * (1 - cosine[rows]) ** 2)
        z = (lengths if scale is None else scale) * value
        return optax.softmax_cross_entropy_with_integer_labels(z, arguments[2])

    value, wanted = value_and_pullback(literal, *arguments[:2], arguments[3])
    run = jax.jit(functools.partial(loss_and_gradients, Case(Quadratic(0.2, scale), {})))
    got, bars = run(*arguments, jnp.float64(0))
    oracle.assert_close(got, value, 1e-12)
    assert_all_close(bars[:2], wanted, 1e-12)


# Mistakes, and what is usual.


def test_what_is_usual_is_the_default():
    assert ArcFace(scale=SCALE) == ArcFace(0.5, scale=SCALE)
    assert CosFace(scale=SCALE) == CosFace(0.35, scale=SCALE)
    assert SphereFace() == SphereFace(4)
    assert Combined(scale=SCALE) == Combined(1.0, 0.0, 0.0, scale=SCALE)


@pytest.mark.parametrize("scale", [None, 0, -1.0, np.nan, np.inf, 1e39, "x", True])
def test_scales_out_of_range_are_named(scale):
    for margin in (ArcFace, CosFace, Combined, NormFace):
        with pytest.raises((TypeError, ValueError), match="scale"):
            margin(scale=scale)
        with pytest.raises(TypeError, match="scale"):
            margin()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (
            lambda: ArcFace(np.pi, scale=1.0),
            ValueError,
            r"margin must be in \[0, 3.142\), got 3.14",
        ),
        (lambda: ArcFace(-0.1, scale=1.0), ValueError, "margin"),
        (lambda: ArcFace("x", scale=1.0), TypeError, "margin"),
        (lambda: CosFace(np.nan, scale=1.0), ValueError, "margin"),
        (lambda: Combined(m1=0.9, scale=1.0), ValueError, "m1"),
        (lambda: Combined(m2=28.6, scale=1.0), ValueError, "m2"),
        (lambda: Combined(m3=-0.1, scale=1.0), ValueError, "m3"),
        (lambda: Combined(m3=np.inf, scale=1.0), ValueError, "m3"),
        (lambda: SphereFace(1.5), TypeError, "margin"),
        (lambda: SphereFace(0), ValueError, "margin"),
    ],
)
def test_margins_that_are_none_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()


@dataclasses.dataclass
class Unhashable:
    scale: float | None = None
    unit_columns: bool = False

    def value_and_slope(self, cosine):
        return cosine, jnp.ones_like(cosine)


@pytest.mark.parametrize("margin", [ArcFace, 0.5, "ArcFace", None, Unhashable()], ids=repr)
def test_what_is_no_margin_is_refused(margin):
    with pytest.raises(TypeError, match="margin must be"):
        lsm.lsoftmax_loss(jnp.ones((2, 3)), jnp.eye(3), [0, 2], margin=margin, lam=0.0)
