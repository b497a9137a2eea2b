"""On a CPU a run's updates are compiled with the kernels that are fast for them."""

import re

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


def kernels_of_ynnpack(compiled):
    """The text of what YNNPACK computes in a program."""
    text = compiled.as_text()
    names = re.findall(r"calls=%([\w.-]+),.*__ynn_fusion", text)
    return "\n".join(
        re.search(rf"^%{name} .*?^}}", text, re.DOTALL | re.MULTILINE)[0] for name in names
    )


def test_ynnpack_computes_sums_and_no_convolution(gradient):
    if " convolution(" not in kernels_of_ynnpack(gradient.compile()):
        pytest.skip("this version of XLA gives the gradient of a convolution to other kernels")
    compiled = program.compiled(gradient)
    own = kernels_of_ynnpack(compiled)
    assert " reduce(" in own and " convolution(" not in own
    # XLA's own sums over a batch are windows first.
    assert " reduce-window(" not in compiled.as_text()


def test_a_jaxlib_without_the_option_compiles_all_the_same(gradient, monkeypatch):
    monkeypatch.setattr(program, "_PRODUCTS_AND_SUMS", {"xla_no_such_option": ""})
    zeros = jax.tree.map(lambda of: np.zeros(of.shape, of.dtype), gradient.args_info[0])
    found = program.compiled(gradient)(*zeros)
    assert not np.any(jax.tree.leaves(found)[0])
