"""Tries the installed lsoftmax_jax once, in an environment with nothing but the wheel."""

import importlib.metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import lsoftmax_jax as lsm
import lsoftmax_jax.linen
import lsoftmax_jax.nnx

files = importlib.metadata.files("lsoftmax-jax") or []
top_level = {file.parts[0] for file in files if not file.parts[0].endswith(".dist-info")}
assert top_level == {"lsoftmax_jax"}, f"expected one package in the wheel, got {top_level}"
assert Path("lsoftmax_jax/py.typed") in map(Path, files), "py.typed is not in the wheel"

features = jax.random.normal(jax.random.key(0), (6, 5))
labels = jnp.arange(6) % 3


@jax.jit
@jax.value_and_grad
def loss_and_gradient(kernel: jax.Array) -> jax.Array:
    """The function's mean loss and its gradient."""
    return lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=1.0).mean()


nnx_head = lsoftmax_jax.nnx.LSoftmaxDense(5, 3, margin=4, rngs=nnx.Rngs(0))
kernel = nnx_head.kernel[...]
linen_head = lsoftmax_jax.linen.LSoftmaxDense(3, margin=4)
loss, gradient = loss_and_gradient(kernel)
by_nnx = nnx_head.loss(features, labels, 1.0).mean()
variables = {"params": {"kernel": kernel}}
by_linen = jnp.asarray(linen_head.apply(variables, features, labels, 1.0, method="loss")).mean()
assert jnp.isfinite(gradient).all() and (gradient != 0).any(), f"gradient {gradient}"
assert jnp.allclose(loss, by_nnx), f"function {loss}, NNX head {by_nnx}"
assert jnp.allclose(loss, by_linen), f"function {loss}, Linen head {by_linen}"
print(f"lsoftmax_jax {lsm.__version__} from its wheel: loss {loss:.4f} by function and heads")
