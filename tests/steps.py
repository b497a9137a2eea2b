"""Small networks with a head, shared by the tests of training steps."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh

import lsoftmax_jax as lsm
from lsoftmax_jax.nnx import LSoftmaxDense

LAM = lsm.annealed_lambda(10.0, 0.1, 2.0)
OPTIMIZER = optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 0.1}), momentum=0.9)
CLASSES, WIDTH, BATCH = 5, 6, 8


class Small(nnx.Module):
    """One convolution, batch normalisation, and the head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.head = LSoftmaxDense(64, CLASSES, margin=3, rngs=rngs)

    def __call__(self, images: jax.Array, where: jax.Array | None = None) -> jax.Array:
        mask = None if where is None else where[:, None, None, None]
        outputs = nnx.relu(self.norm(self.conv(images), mask=mask))
        return outputs.reshape(len(images), -1)


class Line(nnx.Module):
    """One linear layer and the head."""

    def __init__(self, rngs: nnx.Rngs, features: int = 4, **head) -> None:
        self.layer = nnx.Linear(WIDTH, features, rngs=rngs)
        self.head = LSoftmaxDense(features, CLASSES, rngs=rngs, **head)

    def __call__(self, rows: jax.Array, where: jax.Array | None = None) -> jax.Array:
        return nnx.relu(self.layer(rows))


class Headed(nnx.Module):
    """The head alone."""

    def __init__(self, rngs: nnx.Rngs, **head) -> None:
        self.head = LSoftmaxDense(3, CLASSES, rngs=rngs, **head)

    def __call__(self, rows: jax.Array, where: jax.Array | None = None) -> jax.Array:
        return rows


def images_and_labels(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images of `shape`, and a label for each."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=shape).astype(np.float32)
    return images, rng.integers(0, CLASSES, shape[0]).astype(np.int32)


def mesh_of(*shape: int, kind: AxisType = AxisType.Auto) -> Mesh:
    """A mesh with the axes "data" and "model", or "data" alone."""
    names = ("data", "model")[: len(shape)]
    devices = jax.devices()[: np.prod(shape)]
    return jax.make_mesh(shape, names, (kind,) * len(shape), devices=devices)


def assert_close(left, right):
    chex.assert_trees_all_close(jax.device_get(left), jax.device_get(right), rtol=2e-4, atol=2e-5)


def stacked(trees):
    return jax.tree.map(lambda *rows: jnp.stack(rows), *trees)
