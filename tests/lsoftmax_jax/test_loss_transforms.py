"""The losses under jit, vmap, scan and remat, in second derivatives, and on several devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import lsoftmax_jax as lsm
from tests import hlo, oracle
from tests.answers import (
    LOSS_AND_SUM_PLANS,
    PLANS,
    RAGGED,
    B,
    C,
    D,
    assert_gradients_close,
    loss_and_gradients,
    sum_and_gradients,
)
from tests.oracle import Gradients, as_arrays, assert_close


def test_lambda_never_retraces():
    features, kernel, labels = as_arrays(oracle.problem(0, B, D, C), jnp.float32)
    traces = []

    @jax.jit
    def both(lam):
        traces.append(lam)
        arguments = features, kernel, labels
        total = lsm.lsoftmax_loss_sum(*arguments, margin=4, lam=lam)
        return jnp.sum(lsm.lsoftmax_loss(*arguments, margin=4, lam=lam)), total

    results = [both(lam) for lam in (0.0, 5.0, 1e6, np.inf)]
    assert len(traces) == 1
    assert results[0][0] > results[1][0] > results[2][0]
    for per_example, total in results:
        np.testing.assert_allclose(per_example, total, rtol=1e-6)


def at(row, tree):
    return jax.tree.map(lambda array: array[row], tree)


def test_vmap_over_problems_and_lambda(x64):
    problems = [oracle.problem(seed, B, D, C) for seed in (13, 14)]
    stacked = [np.stack(parts) for parts in zip(*problems, strict=True)]
    lams, weights = np.array([0.0, 5.0]), np.random.default_rng(0).standard_normal((2, B))
    arguments = *as_arrays(stacked, jnp.float64), jnp.asarray(weights), jnp.asarray(lams)
    loss, pulled = jax.vmap(lambda *a: loss_and_gradients(*a, margin=3))(*arguments)
    total, gradients = jax.vmap(lambda *a: sum_and_gradients(*a, margin=3))(*arguments)
    for row, (problem, lam) in enumerate(zip(problems, lams, strict=True)):
        value = oracle.loss(*problem, 3, lam)
        wanted = oracle.loss_pullback(*problem, weights[row], 3, lam)
        assert_close(loss[row], value, 1e-12)
        assert_close(total[row], weights[row] @ value, 1e-12)
        assert_gradients_close(at(row, pulled), wanted, 1e-12)
        assert_gradients_close(at(row, gradients), wanted._replace(weights=value), 1e-12)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
def test_remat_and_scan_over_microbatches(x64, rule):
    problem = oracle.problem(15, 6, D, C)

    @jax.jit
    def accumulated(features, kernel, labels):
        @jax.checkpoint
        def total(kernel, features, labels):
            return jnp.sum(rule(features, kernel, labels, margin=3, lam=0.0))

        def step(carry, microbatch):
            return carry + jax.grad(total)(kernel, *microbatch), None

        batches = features.reshape(3, 2, D), labels.reshape(3, 2)
        return jax.lax.scan(step, jnp.zeros_like(kernel), batches)[0]

    kernel_bar = accumulated(*as_arrays(problem, jnp.float64))
    assert_close(kernel_bar, oracle.loss_pullback(*problem, np.ones(6), 3).kernel, 1e-12)


def test_second_order_in_reverse_mode(x64):
    features, kernel, labels = as_arrays(oracle.problem(16, 3, D, C), jnp.float64)

    @jax.jit
    def loss(features, kernel, lam):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=3, lam=lam, label_smoothing=0.1)

    check_grads(loss, (features, kernel, jnp.float64(0.7)), order=2, modes=["rev"])


@pytest.mark.parametrize(("rule", "plan"), LOSS_AND_SUM_PLANS)
def test_reverse_over_reverse_is_the_derivative_of_the_oracles_gradient(x64, rule, plan):
    problem = oracle.problem(17, *RAGGED)
    rng = np.random.default_rng(17)
    cotangent, direction = rng.standard_normal(6), rng.standard_normal((8, 11))

    @jax.jit
    def moved(features, kernel, labels, cotangent, direction):
        pulled = rule(features, kernel, labels, cotangent, 0.5, margin=4, plan=PLANS[plan])[1]
        return jnp.vdot(direction, pulled.kernel)

    hessian_vector = jax.jit(jax.grad(moved, argnums=(0, 1)))(
        *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.asarray(direction)
    )
    up, down = (
        oracle.loss_pullback(*problem._replace(kernel=problem.kernel + h), cotangent, 4, 0.5)
        for h in (1e-6 * direction, -1e-6 * direction)
    )
    wanted = jax.tree.map(lambda one, other: (one - other) / 2e-6, up, down)
    assert_close(hessian_vector[0], wanted.features, 1e-7)
    assert_close(hessian_vector[1], wanted.kernel, 1e-7)


OVER_BATCH, OVER_CLASSES = (P("devices"), P()), (P(), P(None, "devices"))


@pytest.mark.parametrize(
    ("specs", "plan"),
    [
        (OVER_BATCH, "one-shot"),
        (OVER_BATCH, "row blocks with a tail"),
        (OVER_CLASSES, "one-shot"),
    ],
    ids=str,
)
def test_four_devices_give_the_numbers_of_one(mesh, specs, plan):
    problem = oracle.problem(19, 8, D, 8)
    features, kernel, labels = as_arrays(problem, jnp.float32)
    weights = jnp.asarray(np.random.default_rng(19).standard_normal(8), jnp.float32)
    rows, columns = (NamedSharding(mesh, spec) for spec in specs)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def both(features, kernel, labels, weights, margin, plan):
        def total(features, kernel, weights):
            static = {"margin": margin, "lam": 1.0, "plan": PLANS[plan]}
            loss = lsm.lsoftmax_loss(features, kernel, labels, **static)
            total = lsm.lsoftmax_loss_sum(features, kernel, labels, weights, **static)
            return jnp.sum(weights * loss) + total, loss

        by, loss = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(features, kernel, weights)
        return Gradients(by[0], by[1], weights=by[2]), loss

    pulled, loss = both(
        *jax.device_put((features, kernel, labels, weights), (rows, columns, rows, rows)), 4, plan
    )
    wanted = oracle.loss_pullback(*problem, 2 * np.asarray(weights, np.float64), 4, 1.0)
    assert_close(loss, oracle.loss(*problem, 4, 1.0), 1e-5)
    wanted = wanted._replace(lam=None, weights=2 * oracle.loss(*problem, 4, 1.0))
    assert_gradients_close(pulled, wanted, 1e-5)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
def test_devices_that_share_a_batch_share_each_row_block(mesh, rule):
    """Each once multiplied the whole block, so that four devices took as long as one."""

    def total(features, kernel, labels):
        plan = lsm.Plan(row_block=32)
        return jnp.sum(rule(features, kernel, labels, margin=4, lam=0.0, plan=plan))

    rows, whole = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
    arguments = (
        jax.ShapeDtypeStruct((128, 4), jnp.float32, sharding=rows),
        jax.ShapeDtypeStruct((4, 512), jnp.float32, sharding=whole),
        jax.ShapeDtypeStruct((128,), jnp.int32, sharding=rows),
    )
    program = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*arguments).compile()
    found = hlo.INSTRUCTION.findall(program.as_text())
    products = [hlo.largest(shape) for shape, kind, rest in found if hlo.is_product(kind, rest)]
    assert max(products) == 32 // 4 * 512


def test_pmap_gives_the_numbers_of_one_device():
    problem = oracle.problem(20, 8, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float32)

    def step(features, kernel, labels):
        def mean(features, kernel):
            loss = lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=0.0)
            total = lsm.lsoftmax_loss_sum(features, kernel, labels, margin=4, lam=0.0)
            return jnp.mean(loss) + total / loss.size

        value, (features_bar, kernel_bar) = jax.value_and_grad(mean, argnums=(0, 1))(
            features, kernel
        )
        return *jax.lax.pmean((value, kernel_bar), "devices"), features_bar

    devices = jax.devices()[:4]
    value, kernel_bar, features_bar = jax.pmap(
        step, "devices", in_axes=(0, None, 0), devices=devices
    )(features.reshape(4, 2, D), kernel, labels.reshape(4, 2))
    wanted = oracle.loss_pullback(*problem, np.full(8, 2 / 8), 4)
    assert_close(value, np.full(4, 2 * np.mean(oracle.loss(*problem, 4))), 1e-5)
    assert_close(kernel_bar[0], wanted.kernel, 1e-5)
    assert_close(features_bar.reshape(8, D) / 4, wanted.features, 1e-5)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
def test_gradient_inside_shard_map_sums_over_devices(mesh, rule):
    """As for any JAX function, a replicated kernel's cotangent is the sum over the devices."""
    problem = oracle.problem(21, 8, D, C)

    def gradients(features, kernel, labels):
        def total(features, kernel):
            return jnp.sum(rule(features, kernel, labels, margin=4, lam=0.0))

        return jax.grad(total, argnums=(0, 1))(features, kernel)

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P("devices"), P(), P("devices")),
        out_specs=(P("devices"), P()),
    )
    features, kernel, labels = as_arrays(problem, jnp.float32)
    rows = NamedSharding(mesh, P("devices"))
    pulled = jax.jit(sharded)(
        jax.device_put(features, rows),
        jax.device_put(kernel, NamedSharding(mesh, P())),
        jax.device_put(labels, rows),
    )
    wanted = oracle.loss_pullback(*problem, np.ones(8), 4)
    assert_close(pulled[0], wanted.features, 1e-5)
    assert_close(pulled[1], wanted.kernel, 1e-5)
