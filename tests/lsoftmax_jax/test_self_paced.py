"""λ that a batch shows, against the rule of `self_paced`'s docstring written out in NumPy."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import _pace
from tests import oracle
from tests.answers import PLANS, assert_gradients_close
from tests.oracle import Gradients, as_arrays, assert_close

BATCH, DIM, CLASSES, MARGIN = 16, 8, 12, 4
PACE = lsm.self_paced()


def learned(seed: int, noise: float = 0.15) -> oracle.Problem:
    """Features near their columns, so that a margin is borne; a few are misclassified."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((DIM, CLASSES))
    kernel /= np.linalg.norm(kernel, axis=0)
    labels = rng.integers(CLASSES, size=BATCH)
    features = 6 * (kernel[:, labels].T + noise * rng.standard_normal((BATCH, DIM)))
    return oracle.Problem(features, kernel, labels)


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def shown(problem, margin=MARGIN, weights=None, pace=PACE) -> float:
    """λ by the formula, s* from the force at 2,001 shares; the library knows it at 17."""
    features, kernel, labels = problem
    weights = np.ones(len(labels)) if weights is None else weights
    rows = np.arange(len(labels))
    plain = features @ kernel
    u, v = plain[rows, labels], oracle.logits(features, kernel, labels, margin)[rows, labels]
    others = plain.copy()
    others[rows, labels] = -np.inf
    z = np.log(np.sum(np.exp(others), axis=1))
    part = np.exp(others - z[:, None])
    mean = np.sum(part * np.where(part > 0, others, 0), axis=1)

    def force(share):
        t = u + share * (v - u)
        return np.sum(weights * sigmoid(z - t) * (t - mean))

    borne = [share for share in np.linspace(0, 1, 2001) ** 3 if force(share) >= 0]
    probability = np.sum(weights * sigmoid(u - z)) / np.sum(weights)
    share = pace.fraction * max(borne, default=0.0) * probability**pace.power
    return 1 / share - 1 if share > 0 else np.inf


class Paced(NamedTuple):
    loss: Any
    lam: Any
    gradients: Gradients


@functools.partial(jax.jit, static_argnames=("margin", "plan", "pace"))
def paced(features, kernel, labels, where=None, *, margin=MARGIN, plan=None, pace=PACE):
    """The self-paced loss, the λ it reports, and the gradients of the sum."""

    def total(features, kernel):
        loss, seen = lsm.lsoftmax_loss_and_statistics(
            features, kernel, labels, margin=margin, lam=pace, where=where, plan=plan
        )
        return jnp.sum(loss), (loss, seen.lam)

    by, (loss, lam) = jax.grad(total, (0, 1), has_aux=True)(features, kernel)
    return Paced(loss, lam, Gradients(*by))


def assert_is_the_loss_of_its_lam(got, problem, weights=None, margin=MARGIN, tolerance=1e-12):
    """The value and the gradients are those with the λ it reports, given as a constant."""
    weights = np.ones(len(problem.labels)) if weights is None else weights
    lam = float(got.lam)
    assert_close(got.loss, oracle.loss(*problem, margin, lam, weights != 0), tolerance)
    wanted = oracle.loss_pullback(*problem, weights, margin, lam, weights != 0)
    assert_gradients_close(got.gradients, wanted._replace(lam=None), tolerance)


# By this much at most its grid moves s*.
GRID = 2e-2


@pytest.mark.parametrize("margin", [2, 4])
@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_lam_is_the_documented_rule(x64, margin, noise):
    problem = learned(1, noise)
    got = paced(*as_arrays(problem, jnp.float64), margin=margin)
    wanted = shown(problem, margin)
    assert np.isfinite(wanted)
    np.testing.assert_allclose(1 / (1 + got.lam), 1 / (1 + wanted), rtol=GRID)
    assert got.lam >= 1 / PACE.fraction - 1
    assert_is_the_loss_of_its_lam(got, problem, margin=margin)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_shows_the_same_lam(x64, plan):
    problem = learned(1)
    got = paced(*as_arrays(problem, jnp.float64), plan=PLANS[plan])
    np.testing.assert_allclose(got.lam, paced(*as_arrays(problem, jnp.float64)).lam, rtol=1e-12)
    assert_is_the_loss_of_its_lam(got, problem)


@functools.partial(jax.jit, static_argnames="plan")
def paced_sum(features, kernel, labels, weights, plan):
    def total(features, kernel, weights):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights, margin=MARGIN, lam=PACE, plan=plan
        )

    return jax.value_and_grad(total, (0, 1, 2))(features, kernel, weights)


@pytest.mark.parametrize("plan", ["one-shot", "row blocks with a tail", "class blocks, stored"])
def test_the_sum_weighs_the_rows_that_show_lam(x64, plan):
    problem = learned(1)
    weights = np.random.default_rng(2).uniform(0.1, 2, BATCH)
    weights[3] = 0.0
    total, by = paced_sum(*as_arrays(problem, jnp.float64), jnp.asarray(weights), plan=PLANS[plan])
    # λ is not reported; the losses, which are the weights' gradients, give it away.
    lam = shown(problem, weights=weights)
    losses = oracle.loss(*problem, MARGIN, lam)
    assert_close(by[2], losses, GRID)
    assert_close(total, weights @ np.asarray(by[2]), 1e-12)
    plain = oracle.loss(*problem, MARGIN, shown(problem))
    assert np.max(np.abs(plain - losses)) > 2 * np.max(np.abs(by[2] - losses))


def test_masked_rows_do_not_show_anything(x64):
    problem = learned(3)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    where = np.arange(BATCH) % 5 != 2
    poisoned = features.at[2].set(jnp.nan), kernel, labels.at[7].set(-1)
    got = paced(*poisoned, jnp.asarray(where))
    kept = oracle.Problem(problem.features[where], problem.kernel, problem.labels[where])
    alone = paced(*as_arrays(kept, jnp.float64))
    np.testing.assert_allclose(got.lam, alone.lam, rtol=1e-12)
    assert_is_the_loss_of_its_lam(got, problem, where.astype(float))
    nothing = paced(features, kernel, labels, jnp.zeros(BATCH, bool))
    assert np.isinf(nothing.lam) and not np.any(nothing.loss)
    assert not np.any(nothing.gradients.kernel)


def test_a_bad_label_costs_its_own_row_only(x64):
    problem = learned(3)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    got = paced(features, kernel, labels.at[2].set(CLASSES))
    good = np.arange(BATCH) != 2
    alone = oracle.Problem(problem.features[good], problem.kernel, problem.labels[good])
    np.testing.assert_allclose(got.lam, paced(*as_arrays(alone, jnp.float64)).lam, rtol=1e-12)
    assert np.isnan(got.loss[2]) and np.all(np.isfinite(got.loss[good]))


def test_an_untrained_batch_and_margin_one_are_plain_softmax():
    problem = oracle.problem(1, BATCH, DIM, CLASSES, scale=1e-3)
    got = paced(*as_arrays(problem, jnp.float32))
    assert got.lam > 1000
    assert_close(got.loss, oracle.loss(*problem, 1), 1e-5)
    one = paced(*as_arrays(problem, jnp.float32), margin=1)
    assert np.isinf(one.lam)
    assert_close(one.loss, oracle.loss(*problem, 1), 1e-5)


def test_seeds_under_vmap_pace_themselves(x64):
    problems = [learned(seed, noise) for seed, noise in ((4, 0.1), (5, 0.25))]
    stacked = [np.stack(parts) for parts in zip(*problems, strict=True)]
    together = jax.vmap(paced)(*as_arrays(stacked, jnp.float64))
    assert together.lam[0] != together.lam[1]
    for index, problem in enumerate(problems):
        alone = paced(*as_arrays(problem, jnp.float64))
        of_seed = jax.tree.map(lambda array, index=index: array[index], together)
        chex.assert_trees_all_close(of_seed, alone, rtol=1e-10)


def test_scan_paces_every_microbatch(x64):
    problem = learned(6)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    batches = features.reshape(2, 8, DIM), labels.reshape(2, 8)

    @jax.jit
    def scanned(kernel):
        def step(total, batch):
            got = paced(batch[0], kernel, batch[1])
            return total + got.gradients.kernel, got.lam

        return jax.lax.scan(step, jnp.zeros_like(kernel), batches)

    dkernel, lams = scanned(kernel)
    wanted = np.zeros_like(problem.kernel)
    for half, lam in zip((slice(0, 8), slice(8, 16)), lams, strict=True):
        rows = problem.features[half], problem.kernel, problem.labels[half]
        wanted += oracle.loss_pullback(*rows, np.ones(8), MARGIN, float(lam)).kernel
    assert lams[0] != lams[1]
    assert_close(dkernel, wanted, 1e-12)


@pytest.mark.parametrize(
    "force, zero",
    [
        ([-1.0, -2.0, -3.0], 0.0),  # always below
        ([0.0, -1.0, -2.0], 0.0),
        ([3.0, 1.0, -1.0], 0.75),
        ([-1.0, 1.0, -3.0], 0.625),  # for good, not at first
        ([3.0, 2.0, 1.0], 1.0),
    ],
)
def test_the_share_is_where_the_force_falls_below_zero_for_good(force, zero):
    found = _pace._last_zero(jnp.array([0.0, 0.5, 1.0]), jnp.array(force))
    assert float(found) == zero


def test_batches_do_not_retrace():
    traces = []

    @jax.jit
    def loss(features, kernel, labels):
        traces.append(labels)
        return lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=lsm.self_paced())

    for seed in range(3):
        loss(*as_arrays(learned(seed), jnp.float32))
    assert len(traces) == 1


def test_pmap_with_its_axis_name_is_one_device():
    problem = learned(7)
    features, kernel, labels = as_arrays(problem, jnp.float32)
    whole = paced(features, kernel, labels)

    def of_device(axis_name):
        pace = lsm.self_paced(axis_name=axis_name)
        step = jax.pmap(
            functools.partial(paced, pace=pace), "batch", in_axes=(0, None, 0),
            devices=jax.devices()[:4],
        )  # fmt: skip
        return step(features.reshape(4, 4, DIM), kernel, labels.reshape(4, 4))

    together = of_device("batch")
    np.testing.assert_allclose(together.lam, np.full(4, whole.lam), rtol=1e-4)
    assert_close(together.loss.reshape(BATCH), whole.loss, 1e-5)
    assert_close(together.gradients.features.reshape(BATCH, DIM), whole.gradients.features, 1e-4)
    assert len(set(np.asarray(of_device(None).lam).tolist())) > 1


LAYOUTS = {
    "one axis": ("model", ("model",)),
    "replicated features": ("model", ()),
    "data by model": ("model", ("data",)),
    "features over both": ("model", ("data", "model")),
    "features over both, crossed": ("model", ("model", "data")),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_sharded_classes_show_the_same_lam(x64, name, axis_type):
    class_axis, batch_axes = LAYOUTS[name]
    mesh = jax.make_mesh((2, 4), ("data", "model"), (axis_type,) * 2)
    layout = lsm.ClassParallel(class_axis, batch_axes, mesh)
    problem = learned(8)
    arrays = as_arrays(problem, jnp.float64)
    where = jnp.arange(BATCH) != 5
    whole = paced(*arrays, where)
    rows = NamedSharding(mesh, P(batch_axes or None))

    @jax.jit
    def sharded(features, kernel, labels, where):
        def total(features, kernel):
            loss, seen = lsm.sharded.lsoftmax_loss_and_statistics(
                features, kernel, labels, margin=MARGIN, lam=PACE, layout=layout, where=where
            )
            return jnp.sum(loss), (loss, seen.lam)

        by, (loss, lam) = jax.grad(total, (0, 1), has_aux=True)(features, kernel)
        return Paced(loss, lam, Gradients(*by))

    columns = NamedSharding(mesh, P(None, class_axis))
    placements = rows, columns, rows, rows
    got = sharded(*map(jax.device_put, (*arrays, where), placements))
    np.testing.assert_allclose(got.lam, whole.lam, rtol=1e-12)
    assert_close(got.loss, whole.loss, 1e-12)
    assert_gradients_close(got.gradients, whole.gradients, 1e-12)


def test_the_sampled_loss_and_the_fused_update_pace_themselves_too():
    features, kernel, labels = as_arrays(learned(9), jnp.float32)
    whole = paced(features, kernel, labels)

    @jax.jit
    def sampled(features, kernel, labels):
        sample = lsm.sample_classes(jax.random.key(0), labels, CLASSES, CLASSES)
        columns = lsm.sampled.take_columns(kernel, sample)
        return lsm.lsoftmax_sampled_loss(features, columns, sample, margin=MARGIN, lam=PACE)

    assert_close(sampled(features, kernel, labels), whole.loss, 1e-5)
    update = jax.jit(functools.partial(lsm.lsoftmax_sgd, margin=MARGIN, lam=PACE, class_block=5))
    step = update(features, kernel, jnp.zeros_like(kernel), labels, learning_rate=0.1)
    np.testing.assert_allclose(step.statistics.lam, whole.lam, rtol=1e-4)
    assert_close(step.kernel, kernel - 0.1 * whole.gradients.kernel, 1e-5)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("fraction", 1.5, ValueError),
        ("fraction", -0.1, ValueError),
        ("fraction", "half", TypeError),
        ("power", -1.0, ValueError),
        ("power", float("inf"), ValueError),
        ("power", "4", TypeError),
        ("axis_name", 3, TypeError),
        ("axis_name", ("batch", None), TypeError),
    ],
)
def test_mistakes_are_named(argument, value, error):
    with pytest.raises(error, match=argument):
        lsm.self_paced(**{argument: value})


def test_a_schedule_in_place_of_its_value_is_refused_in_words():
    features, kernel, labels = as_arrays(learned(9), jnp.float32)
    for lam in (lsm.margin_schedule(100), lsm.self_paced):
        with pytest.raises(TypeError, match=r"lam .*pass schedule\(step\), not the schedule"):
            lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=lam)
