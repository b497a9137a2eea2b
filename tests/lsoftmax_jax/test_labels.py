"""Labels of any width, 64-bit ones before JAX cuts them to 32 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lsoftmax_jax as lsm
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.nnx import LSoftmaxDense as NnxHead
from tests import oracle
from tests.answers import D

B, C = 7, 4
ARGUMENTS = {"margin": 4, "lam": 0.5}


def nnx_head():
    head = NnxHead(D, C, rngs=nnx.Rngs(0))
    head.kernel[...] = KERNEL
    return head


def linen_loss(labels):
    variables = {"params": {"kernel": KERNEL}}
    return LinenHead(C).apply(variables, FEATURES, labels, 0.5, method="loss")


def sharded_loss(labels):
    mesh = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
    layout = lsm.ClassParallel("model", mesh=mesh)
    return lsm.lsoftmax_loss(FEATURES, KERNEL, labels, layout=layout, **ARGUMENTS)


def sampled_loss(labels):
    sample = lsm.sample_classes(jax.random.key(0), labels, C, C)
    columns = lsm.sampled.take_columns(KERNEL, sample)
    return lsm.lsoftmax_sampled_loss(FEATURES, columns, sample, **ARGUMENTS)


FEATURES, KERNEL = (jnp.asarray(array, jnp.float32) for array in oracle.problem(1, B, D, C)[:2])
# Each gives one number a row, which a bad label makes NaN: the loss, a gradient or a sum of logits.
RULES = {
    "logits": lambda y: lsm.lsoftmax_logits(FEATURES, KERNEL, y, **ARGUMENTS).sum(axis=1),
    "loss": lambda y: lsm.lsoftmax_loss(FEATURES, KERNEL, y, **ARGUMENTS),
    "statistics": lambda y: lsm.lsoftmax_loss_and_statistics(FEATURES, KERNEL, y, **ARGUMENTS)[0],
    "sum": lambda y: jax.grad(lambda w: lsm.lsoftmax_loss_sum(FEATURES, KERNEL, y, w, **ARGUMENTS))(
        jnp.ones(B)
    ),
    "sgd": lambda y: lsm.lsoftmax_sgd(
        FEATURES, KERNEL, jnp.zeros_like(KERNEL), y, learning_rate=0.1, **ARGUMENTS
    ).dfeatures.sum(axis=1),
    "sharded": sharded_loss,
    "sampled": sampled_loss,
    "nnx head": lambda y: nnx_head().loss(FEATURES, y, 0.5),
    "nnx logits": lambda y: nnx_head()(FEATURES, y, 0.5).sum(axis=1),
    "linen head": linen_loss,
}
BAD = [2**32 + 1, 2**32, -(2**32) + 1, -1, C]
SIGNED = np.array([1, *BAD, 3], np.int64)
WIDE = {
    "int64": SIGNED,
    "uint64": SIGNED.astype(np.uint64),
    "a list": SIGNED.tolist(),
}
GOOD = (SIGNED >= 0) & (SIGNED < C)


@pytest.mark.parametrize("rule", RULES)
def test_a_wide_label_is_not_cut_to_a_class(rule):
    """The function closes over the labels: JAX would cut an argument before the library sees it."""
    narrow = jnp.asarray(np.where(GOOD, SIGNED, -1), jnp.int32)
    wanted = jax.jit(lambda: RULES[rule](narrow))()
    np.testing.assert_array_equal(np.isnan(wanted), ~GOOD)
    for name, labels in WIDE.items():
        answer = jax.jit(lambda labels=labels: RULES[rule](labels))()
        np.testing.assert_array_equal(answer, wanted, err_msg=name)


def test_a_masked_wide_label_gives_zero():
    loss = lsm.lsoftmax_loss(FEATURES, KERNEL, SIGNED, where=GOOD, **ARGUMENTS)
    np.testing.assert_array_equal(np.asarray(loss) == 0, ~GOOD)


def test_int64_labels_of_jax_itself(x64):
    labels = jnp.asarray(SIGNED)
    assert labels.dtype == jnp.int64
    loss = jax.jit(lambda y: lsm.lsoftmax_loss(FEATURES, KERNEL, y, **ARGUMENTS))(labels)
    np.testing.assert_array_equal(np.isnan(loss), ~GOOD)
