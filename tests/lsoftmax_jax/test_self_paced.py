"""Compares λ from each example's lead with the rule in `self_paced`'s docstring, in NumPy."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.nnx import LSoftmaxDense as NnxHead
from tests import oracle
from tests.answers import PLANS
from tests.oracle import Gradients, as_arrays, assert_close

BATCH, DIM, CLASSES, MARGIN = 16, 8, 12, 4
PACE = lsm.self_paced()


def learned(seed: int, noise: float = 0.15) -> oracle.Problem:
    """Features near their columns, so that most have a lead; a few are misclassified."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((DIM, CLASSES))
    kernel /= np.linalg.norm(kernel, axis=0)
    labels = rng.integers(CLASSES, size=BATCH)
    features = 6 * (kernel[:, labels].T + noise * rng.standard_normal((BATCH, DIM)))
    features[1] *= -1
    return oracle.Problem(features, kernel, labels)


def shares(problem, margin=MARGIN, strength=PACE.strength) -> np.ndarray:
    """The share of each example, by the formula."""
    features, kernel, labels = problem
    rows = np.arange(len(labels))
    plain = features @ kernel
    u, v = plain[rows, labels], oracle.logits(features, kernel, labels, margin)[rows, labels]
    others = plain.copy()
    others[rows, labels] = -np.inf
    lead = (u - others.max(axis=1)) / np.where(u > v, u - v, np.inf)
    return 0.9 * strength * np.clip(lead, 0, 0.4)


def with_shares(problem, share, margin=MARGIN):
    """The oracle's losses and gradients of the sum, row by row with the λ of each share."""
    losses, dfeatures, dkernel = [], [], np.zeros_like(problem.kernel)
    for row, part in enumerate(share):
        alone = problem.features[[row]], problem.kernel, problem.labels[[row]]
        lam = 1 / part - 1 if part > 0 else np.inf
        losses += oracle.loss(*alone, margin, lam).tolist()
        pulled = oracle.loss_pullback(*alone, np.ones(1), margin, lam)
        dfeatures.append(pulled.features[0])
        dkernel = dkernel + pulled.kernel
    return np.array(losses), Gradients(np.array(dfeatures), dkernel)


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


def assert_is_the_rule(got, problem, where=None, margin=MARGIN, tolerance=1e-12):
    """Compares λ, losses and gradients with the rule; the shares are constants."""
    where = np.ones(len(problem.labels), bool) if where is None else where
    kept = oracle.Problem(problem.features[where], problem.kernel, problem.labels[where])
    share = shares(kept, margin)
    assert_close(1 / (1 + got.lam[where]), share, tolerance)
    losses, by = with_shares(kept, share, margin)
    assert_close(got.loss[where], losses, tolerance)
    assert not np.any(got.loss[~where]) and not np.any(got.gradients.features[~where])
    assert_close(got.gradients.features[where], by.features, tolerance)
    assert_close(got.gradients.kernel, by.kernel, tolerance)


@pytest.mark.parametrize("margin", [2, 3, 4, 8])
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_lam_is_the_documented_rule(x64, margin, noise):
    problem = learned(1, noise)
    got = paced(*as_arrays(problem, jnp.float64), margin=margin)
    share = shares(problem, margin)
    assert np.any(share == 0) and np.any(share > 0.05) and np.all(share <= 0.36)
    assert_is_the_rule(got, problem, margin=margin)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_shows_the_same_lam(x64, plan):
    problem = learned(1)
    assert_is_the_rule(paced(*as_arrays(problem, jnp.float64), plan=PLANS[plan]), problem)


@functools.partial(jax.jit, static_argnames="plan")
def paced_sum(features, kernel, labels, weights, plan):
    def total(features, kernel, weights):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights, margin=MARGIN, lam=PACE, plan=plan
        )

    return jax.value_and_grad(total, (0, 1, 2))(features, kernel, weights)


@pytest.mark.parametrize("plan", PLANS)
def test_weights_of_a_sum_change_no_lam(x64, plan):
    problem = learned(1)
    weights = np.random.default_rng(2).uniform(-1, 2, BATCH)
    total, by = paced_sum(*as_arrays(problem, jnp.float64), jnp.asarray(weights), plan=PLANS[plan])
    losses, each = with_shares(problem, shares(problem))
    assert_close(by[2], losses, 1e-12)
    assert_close(total, weights @ losses, 1e-12)
    assert_close(by[0], weights[:, None] * each.features, 1e-12)


def test_masked_rows_and_bad_labels_touch_no_other_row(x64):
    problem = learned(3)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    where = np.arange(BATCH) % 5 != 2
    poisoned = features.at[2].set(jnp.nan), kernel, labels.at[7].set(-1)
    assert_is_the_rule(paced(*poisoned, jnp.asarray(where)), problem, where)
    got = paced(features, kernel, labels.at[2].set(CLASSES))
    good = np.arange(BATCH) != 2
    assert np.isnan(got.loss[2])
    assert_close(1 / (1 + got.lam[good]), shares(problem)[good], 1e-12)


def test_an_example_that_leads_keeps_its_lead(x64):
    """Even at full strength the margin turns no right answer into a wrong answer."""
    for noise in (0.05, 0.3, 0.6):
        problem = learned(4, noise)
        for margin in (2, 4, 8):
            _, seen = jax.jit(lsm.lsoftmax_loss_and_statistics, static_argnames=("margin",))(
                *as_arrays(problem, jnp.float64), margin=margin, lam=lsm.self_paced(1.0)
            )
            leads = seen.plain_logit > seen.max_logit
            assert np.any(leads) and np.all((seen.target_logit >= seen.max_logit - 1e-12)[leads])
            assert_close(seen.target_logit[~leads], seen.plain_logit[~leads], 1e-15)


def test_margin_one_and_one_class_are_plain_softmax():
    problem = learned(1)
    one = paced(*as_arrays(problem, jnp.float32), margin=1)
    assert np.all(np.isinf(one.lam))
    assert_close(one.loss, oracle.loss(*problem, 1), 1e-5)
    features, kernel = as_arrays(problem, jnp.float32)[:2]
    alone = paced(features, kernel[:, :1], jnp.zeros(BATCH, jnp.int32))
    assert not np.any(alone.loss) and np.all(np.isfinite(alone.gradients.kernel))


def test_vmap_and_microbatches_change_no_lam(x64):
    problem = learned(5)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    whole = paced(features, kernel, labels)

    def alone(features, labels):
        return lsm.lsoftmax_loss_and_statistics(features, kernel, labels, margin=MARGIN, lam=PACE)

    for loss, seen in (
        jax.jit(jax.vmap(alone))(features, labels),
        jax.tree.map(
            lambda part: part.reshape(BATCH),
            jax.lax.map(
                lambda half: alone(*half), (features.reshape(4, 4, DIM), labels.reshape(4, 4))
            ),
        ),
    ):
        assert_close(loss, whole.loss, 1e-12)
        chex.assert_trees_all_close(seen.lam, whole.lam, rtol=1e-9)


def test_batches_do_not_retrace():
    traces = []

    @jax.jit
    def loss(features, kernel, labels):
        traces.append(labels)
        return lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=lsm.self_paced())

    for seed in range(3):
        loss(*as_arrays(learned(seed), jnp.float32))
    assert len(traces) == 1


def test_the_rule_is_a_static_pytree():
    features, kernel, labels = as_arrays(learned(1), jnp.float32)

    @jax.jit
    def loss(rule):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=rule)

    assert jax.tree.leaves(PACE) == []
    assert_close(loss(PACE), paced(features, kernel, labels).loss, 1e-6)
    assert np.max(loss(lsm.self_paced(1.0)) - loss(PACE)) > 0


LAYOUTS = {
    "one axis": ("model", ("model",)),
    "replicated features": ("model", ()),
    "data by model": ("model", ("data",)),
    "features over both": ("model", ("data", "model")),
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
    rows = NamedSharding(mesh, P(batch_axes or None))

    @jax.jit
    def sharded(features, kernel, labels, where):
        def total(features, kernel):
            loss, seen = lsm.lsoftmax_loss_and_statistics(
                features, kernel, labels, margin=MARGIN, lam=PACE, layout=layout, where=where
            )
            return jnp.sum(loss), (loss, seen.lam)

        by, (loss, lam) = jax.grad(total, (0, 1), has_aux=True)(features, kernel)
        return Paced(loss, lam, Gradients(*by))

    columns = NamedSharding(mesh, P(None, class_axis))
    placements = rows, columns, rows, rows
    got = sharded(*map(jax.device_put, (*arrays, where), placements))
    assert_is_the_rule(jax.tree.map(np.asarray, got), problem, np.asarray(where))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_a_column_that_only_fills_up_the_kernel_is_no_rival(kind):
    """Three classes on two devices: the logits with labels have the λ and gradient of the loss."""
    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    layout = lsm.ClassParallel("model", mesh=mesh)
    kernel = jnp.concatenate([jnp.eye(3), jnp.full((3, 1), 5.0)], axis=1)
    features, labels = jnp.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), jnp.array([0, 1])

    def call(features, method):
        if kind == "linen":
            head = LinenHead(3, margin=MARGIN, layout=layout)
            return head.apply({"params": {"kernel": kernel}}, features, labels, method=method)
        head = NnxHead(3, 3, margin=MARGIN, layout=layout, rngs=nnx.Rngs(0))
        head.kernel[...] = kernel
        return getattr(head, method)(features, labels)

    def from_logits(features):
        logits = call(features, "__call__")
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def from_loss(features):
        return jnp.sum(call(features, "loss"))

    ours, wanted = (jax.jit(jax.value_and_grad(f))(features) for f in (from_logits, from_loss))
    chex.assert_trees_all_close(ours, wanted, rtol=1e-5)
    assert wanted[0] > 0.85  # 0.82 with a share of 0


def test_the_sampled_loss_and_the_fused_update_pace_themselves_too():
    features, kernel, labels = as_arrays(learned(9), jnp.float32)
    whole = paced(features, kernel, labels)

    @jax.jit
    def sampled(features, kernel, labels):
        sample = lsm.sample_classes(jax.random.key(0), labels, CLASSES, CLASSES)
        columns = lsm.sampled.take_columns(kernel, sample)
        return lsm.lsoftmax_sampled_loss(features, columns, sample, margin=MARGIN, lam=PACE)

    assert_close(sampled(features, kernel, labels), whole.loss, 1e-5)
    plan = lsm.Plan(class_block=5)
    update = jax.jit(functools.partial(lsm.lsoftmax_sgd, margin=MARGIN, lam=PACE, plan=plan))
    step = update(features, kernel, jnp.zeros_like(kernel), labels, learning_rate=0.1)
    chex.assert_trees_all_close(step.statistics.lam, whole.lam, rtol=1e-4)
    assert_close(step.kernel, kernel - 0.1 * whole.gradients.kernel, 1e-5)


@pytest.mark.parametrize("make", [lsm.self_paced, lsm.SelfPaced])
@pytest.mark.parametrize(
    ("strength", "error"), [(1.5, ValueError), (-0.1, ValueError), ("half", TypeError)]
)
def test_mistakes_are_named(make, strength, error):
    with pytest.raises(error, match="strength"):
        make(strength)


def test_a_schedule_in_place_of_its_value_is_refused_in_words():
    features, kernel, labels = as_arrays(learned(9), jnp.float32)
    for lam, wanted in (
        (lsm.margin_schedule(100), r"pass schedule\(step\), not the schedule"),
        (lsm.self_paced, r"call the rule, self_paced\(\)"),
    ):
        with pytest.raises(TypeError, match=f"lam .*{wanted}"):
            lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=lam)
