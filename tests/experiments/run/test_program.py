"""A run's updates are compiled without the CPU kernels that make convolutions slow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from experiments.run import program


@pytest.fixture(scope="module")
def gradient():
    """A convolution's gradient, of a size that XLA gives to YNNPACK."""
    conv = linen.Conv(16, (3, 3))
    images = jax.ShapeDtypeStruct((32, 28, 28, 16), jnp.float32)
    params = jax.eval_shape(conv.init, jax.random.key(0), images)

    def loss(params, images):
        return jnp.sum(conv.apply(params, images) ** 2)

    return jax.jit(jax.grad(loss)).lower(params, images)


def test_updates_have_no_kernels_of_ynnpack(gradient):
    if "ynn_fusion" not in gradient.compile().as_text():
        pytest.skip("this version of XLA gives the gradient of a convolution to other kernels")
    assert "ynn_fusion" not in program.compiled(gradient).as_text()


def test_a_jaxlib_without_the_option_compiles_all_the_same(gradient, monkeypatch):
    monkeypatch.setattr(program, "_WITHOUT_YNNPACK", {"xla_no_such_option": ""})
    zeros = jax.tree.map(lambda of: np.zeros(of.shape, of.dtype), gradient.args_info[0])
    found = program.compiled(gradient)(*zeros)
    assert not np.any(jax.tree.leaves(found)[0])
