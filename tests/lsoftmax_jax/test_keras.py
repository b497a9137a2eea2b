"""Compares the loss with Keras's on its JAX backend; `nox -s parity` installs Keras."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from tests import oracle

os.environ["KERAS_BACKEND"] = "jax"
keras = pytest.importorskip("keras", reason="needs Keras: nox -s parity")

# Keras promotes dtypes and ranks by itself.
pytestmark = pytest.mark.lax


@pytest.fixture
def dense():
    """A Keras classifier without bias and with a known kernel."""
    layer = keras.layers.Dense(10, use_bias=False)
    layer.build((None, 16))
    layer.kernel.assign(oracle.problem(seed=7, batch=64, dim=16, classes=10).kernel)
    return layer


def test_keras_cross_entropy_is_ours_with_margin_1(dense):
    features, _, labels = oracle.problem(seed=7, batch=64, dim=16, classes=10)
    features, labels = jnp.asarray(features, jnp.float32), jnp.asarray(labels)
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def theirs(features, kernel):
        logits, _ = dense.stateless_call([kernel], [], features)
        return cross_entropy(labels, logits)

    def ours(features, kernel):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=1, lam=0.0).mean()

    given = features, dense.kernel.value
    wanted, found = (jax.value_and_grad(loss, (0, 1))(*given) for loss in (theirs, ours))
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_a_keras_kernel_takes_a_margin(dense):
    problem = oracle.problem(seed=7, batch=64, dim=16, classes=10)
    features, kernel = (np.float32(array) for array in problem[:2])
    loss = lsm.lsoftmax_loss(features, dense.kernel.value, problem.labels, margin=4, lam=0.0)
    exact = oracle.exact_loss(features, kernel, problem.labels, 4)
    np.testing.assert_allclose(loss, exact, rtol=1e-5)
