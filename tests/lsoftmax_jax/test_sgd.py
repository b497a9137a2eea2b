"""Compares the fused SGD step with the oracle's gradient and Optax's update."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import lsoftmax_jax as lsm
from tests import oracle

BATCH, DIM, CLASSES = 7, 5, 11
MARGIN, LAM, ETA, MU, OMEGA = 3, 1.5, 0.1, 0.9, 5e-4

step = jax.jit(lsm.lsoftmax_sgd, static_argnames=("margin", "label_smoothing", "plan"))


def problem(dtype):
    features, kernel, labels = oracle.as_arrays(oracle.problem(1, BATCH, DIM, CLASSES), dtype)
    rng = np.random.default_rng(2)
    momentum = jnp.asarray(rng.standard_normal((DIM, CLASSES)), dtype)
    return features, kernel, momentum, labels, jnp.asarray(rng.uniform(0.1, 1, BATCH), dtype)


@pytest.mark.parametrize("block", [4, 11, 1000], ids=["ragged", "whole", "larger than the head"])
def test_the_fused_step_equals_the_unfused_step(x64, block):
    features, kernel, momentum, labels, weights = problem(jnp.float64)
    rates = {"learning_rate": ETA, "decay": MU, "weight_decay": OMEGA}
    with jax.numpy_dtype_promotion("strict"):
        got = step(
            features, kernel, momentum, labels, weights,
            margin=MARGIN, lam=LAM, label_smoothing=0.1, plan=lsm.Plan(class_block=block), **rates,
        )  # fmt: skip
    arrays = [np.asarray(array) for array in (features, kernel, labels)]
    loss = oracle.loss(*arrays, MARGIN, LAM, label_smoothing=0.1)
    wanted = oracle.loss_pullback(*arrays, np.asarray(weights), MARGIN, LAM, label_smoothing=0.1)
    optimizer = optax.chain(optax.add_decayed_weights(OMEGA), optax.sgd(ETA, momentum=MU))
    state = optax.tree.set(optimizer.init(kernel), trace=momentum)
    updates, state = optimizer.update(jnp.asarray(wanted.kernel), state, kernel)
    oracle.assert_close(got.loss, np.sum(loss * np.asarray(weights)), 1e-12)
    oracle.assert_close(got.dfeatures, wanted.features, 1e-12)
    oracle.assert_close(got.kernel, optax.apply_updates(kernel, updates), 1e-12)
    oracle.assert_close(got.momentum, optax.tree.get(state, "trace"), 1e-12)


def test_statistics_are_those_of_the_loss(x64):
    features, kernel, momentum, labels, weights = problem(jnp.float64)
    batch = features.reshape(1, BATCH, DIM), labels.reshape(1, BATCH)
    done = lsm.lsoftmax_sgd(
        batch[0], kernel, momentum, batch[1], weights.reshape(1, BATCH),
        margin=MARGIN, lam=LAM, learning_rate=ETA, plan=lsm.Plan(class_block=4),
    )  # fmt: skip
    _, seen = lsm.lsoftmax_loss_and_statistics(batch[0], kernel, batch[1], margin=MARGIN, lam=LAM)
    assert seen.max_logit.shape == (1, BATCH)
    jax.tree.map(lambda one, other: oracle.assert_close(one, other, 1e-14), done.statistics, seen)


def test_narrow_features_get_a_gradient_of_their_dtype():
    """A network in bfloat16 under a float32 kernel: jax.vjp refuses a gradient in float32."""
    features, kernel, momentum, labels, weights = problem(jnp.float32)
    features, pull = jax.vjp(lambda x: x.astype(jnp.bfloat16), features)
    rates = {"margin": MARGIN, "lam": LAM, "learning_rate": ETA}
    got = step(features, kernel, momentum, labels, weights, **rates)
    exact = step(features.astype(jnp.float32), kernel, momentum, labels, weights, **rates)
    oracle.assert_close(got.kernel, exact.kernel, 1e-6)
    (gradient,) = pull(got.dfeatures)
    oracle.assert_close(gradient, exact.dfeatures, 1e-2)


def test_masked_rows_leave_no_trace():
    features, kernel, momentum, labels, weights = problem(jnp.float32)
    where = jnp.ones(BATCH, bool).at[2].set(False)
    static = {"margin": MARGIN, "lam": 0.0, "learning_rate": ETA, "plan": lsm.Plan(class_block=4)}
    poisoned = features.at[2].set(jnp.nan), labels.at[2].set(-1)
    masked = step(poisoned[0], kernel, momentum, poisoned[1], weights, where=where, **static)
    keep = np.flatnonzero(np.asarray(where))
    alone = step(features[keep], kernel, momentum, labels[keep], weights[keep], **static)
    oracle.assert_close(masked.kernel, alone.kernel, 1e-6)
    oracle.assert_close(masked.loss, alone.loss, 1e-6)
    assert not np.any(np.asarray(masked.dfeatures[2]))


def test_an_invalid_label_is_not_trained_on():
    features, kernel, momentum, labels, weights = problem(jnp.float32)
    got = step(
        features, kernel, momentum, labels.at[0].set(CLASSES), weights,
        margin=MARGIN, lam=0.0, learning_rate=ETA,
    )  # fmt: skip
    assert np.isnan(got.loss) and np.all(np.isnan(got.kernel))


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older compilers take more memory; see CONTRIBUTING.md"
)
def test_no_gradient_and_no_copy_of_the_kernel():
    """At (512, 256, 102400) the kernel alone is 105 MB."""
    spec = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    kernel = spec((256, 102_400))
    run = jax.jit(
        functools.partial(
            lsm.lsoftmax_sgd, margin=4, lam=0.0, learning_rate=0.1, plan=lsm.Plan(class_block=2048)
        ),
        donate_argnums=(1, 2),
    )
    labels = jax.ShapeDtypeStruct((512,), jnp.int32)
    compiled = run.lower(spec((512, 256)), kernel, kernel, labels, spec((512,))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8e6
    assert "f32[256,102400]{1,0} copy(" not in compiled.as_text()


MISTAKES = {
    "momentum": ({"momentum": jnp.zeros((DIM, 3))}, ValueError),
    "momentum must be floating": ({"momentum": jnp.zeros((DIM, CLASSES), int)}, TypeError),
    "plan": ({"plan": lsm.Plan(row_block=2)}, ValueError),
    "learning_rate": ({"learning_rate": jnp.ones(3)}, ValueError),
    "weights": ({"weights": jnp.ones(3)}, ValueError),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    features, kernel, momentum, labels, weights = problem(jnp.float32)
    change, error = MISTAKES[name]
    call = {"momentum": momentum, "weights": weights, "learning_rate": ETA} | change
    with pytest.raises(error, match=name):
        lsm.lsoftmax_sgd(features, kernel, labels=labels, margin=MARGIN, lam=0.0, **call)


def test_devices_that_share_a_batch_take_the_block_of_their_part():
    """A budget is one device's, so four times the batch on four devices needs no smaller block."""
    kernel = jnp.zeros((4, 8192))
    for devices in (1, 4):
        mesh = jax.make_mesh((devices, 1), ("data", "model"), (AxisType.Auto,) * 2)
        run = functools.partial(
            lsm.lsoftmax_sgd, margin=2, lam=1.0, learning_rate=0.1, plan=lsm.Plan(2**20),
            layout=lsm.ClassParallel("model", "data", mesh),
        )  # fmt: skip
        rows = devices * 128
        batch = jnp.zeros((rows, 4)), kernel, kernel, jnp.zeros(rows, int), jnp.ones(rows)
        # 2**20 bytes hold two arrays of 128 rows and 1,024 classes.
        assert "f32[128,1024]" in str(jax.make_jaxpr(run)(*batch)), devices
