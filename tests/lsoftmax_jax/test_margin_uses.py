"""Every margin in class-parallel and sampled losses, in the step with SGD, and in both heads."""

import functools

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
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, SphereFace
from tests import oracle
from tests.margin_cases import (
    BATCH,
    CLASSES,
    DIM,
    KINDS,
    assert_all_close,
    each_kind,
    given,
    wanted_of,
)

MESHES = {
    "one axis": ((8,), ("model",), ("model",)),
    "data by model": ((2, 4), ("data", "model"), ("data",)),
    "features over both": ((2, 4), ("data", "model"), ("data", "model")),
}


# Every kind on every mesh. Each kind and each mesh has axes of both types; test_sharded.py has all
# meshes with axes of all types.
@pytest.mark.parametrize(
    ("kind", "name", "axis_type"),
    [
        (kind, name, AxisType.Auto if (i + j) % 2 else AxisType.Explicit)
        for i, kind in enumerate(KINDS)
        for j, name in enumerate(MESHES)
    ],
)
def test_classes_split_over_devices(x64, kind, name, axis_type):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, {jax.devices()[0].platform} has {jax.device_count()}")
    case, (shape, names, batch_axes) = KINDS[kind], MESHES[name]
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


def test_six_classes_train():
    """Six tight groups in the plane: a head with any margin at scale 10 learns them."""
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
