"""The networks of Table 1: their sizes, and the order of a layer's parts."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.paper import networks as models
from experiments.paper.networks import NETWORKS, ConvNet, Network, Stage


def conv(size: int, *filters: int) -> int:
    """Parameters of convolutions with bias, BN scale and bias, and a PReLU slope per channel."""
    return sum(size * size * i * o + 4 * o for i, o in itertools.pairwise(filters))


def fully(inputs: int, outputs: int, classes: int) -> int:
    """Parameters of the fully connected layer with bias, BN and PReLU, and of the head."""
    return inputs * outputs + 4 * outputs + outputs * classes


SLOPES_MNIST = 64 + 3 * (64 + 128 + 256) + 512
SLOPES_CIFAR = 64 + 4 * (64 + 128 + 256) + 512

# Columns of Table 1, of the released prototxts (ReLU: no slopes) and of Fig. 7, layer by layer.
COUNTS = {
    "mnist-2d": (
        10,
        conv(5, 1, 32, 32) + conv(5, 32, 64, 64) + conv(5, 64, 128, 128) + 3 * 3 * 128 * 2 + 2 + 20,
    ),
    "mnist": (10, conv(3, 1, *[64] * 10) + fully(3 * 3 * 64, 256, 10)),
    "cifar10": (10, conv(3, 3, *[64] * 5, *[96] * 4, *[128] * 4) + fully(4 * 4 * 128, 256, 10)),
    "cifar100": (100, conv(3, 3, *[96] * 5, *[192] * 4, *[384] * 4) + fully(16 * 384, 512, 100)),
    "lfw": (
        10575,
        conv(3, 3, *[64] * 5, *[256] * 12) + fully(3 * 3 * 256, 512, 10575),
    ),
    "released-mnist": (
        10,
        conv(3, 1, *[64] * 4, *[128] * 3, *[256] * 3) + fully(16 * 256, 512, 10) - SLOPES_MNIST,
    ),
    "released-cifar10": (
        10,
        conv(3, 3, *[64] * 5, *[128] * 4, *[256] * 4) + fully(16 * 256, 512, 10) - SLOPES_CIFAR,
    ),
    "fig7-32": (10, conv(3, 3, *[32] * 13) + fully(16 * 32, 256, 10)),
    "fig7-64": (10, conv(3, 3, *[64] * 13) + fully(16 * 64, 256, 10)),
    "fig7-96": (10, conv(3, 3, *[96] * 13) + fully(16 * 96, 256, 10)),
    "fig7-128": (10, conv(3, 3, *[128] * 13) + fully(16 * 128, 256, 10)),
    "sphere20": (
        10575,
        conv(3, 3, *[64] * 3, *[128] * 5, *[256] * 9, *[512] * 3) + fully(7 * 6 * 512, 512, 10575),
    ),
    "digits-2d": (10, conv(3, 1, 32, 32, 64, 64) + 2 * 2 * 64 * 2 + 2 + 20),
}


def test_every_network_is_counted():
    assert COUNTS.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_table_1s_arithmetic(name):
    classes, count = COUNTS[name]
    assert models.parameter_count(NETWORKS[name], classes) == count


def test_multiply_adds_of_the_mnist_network():
    blocks = [28**2 * (1 + 64), *(size**2 * 3 * 64 for size in (28, 14, 7))]
    convolutions = 9 * 64 * (blocks[0] - 28**2 * 64 + sum(blocks[1:]))
    assert models.multiply_adds(NETWORKS["mnist"], 10) == convolutions + 256 * (3 * 3 * 64 + 10)


def test_sphere20_has_twenty_convolutions():
    assert sum(stage.layers for stage in NETWORKS["sphere20"].stages) == 20


TINY = Network((5, 5, 2), (Stage(3, 2),), features=4, ceil=True)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(6, 5, 5, 2)).astype(np.float32)


@nnx.jit
def features_of(model, images):
    return model(images)


def normalise(array, axes):
    mean, variance = array.mean(axes), array.var(axes)
    return (array - mean) / np.sqrt(variance + 1e-5)


def prelu(array):
    return np.where(array >= 0, array, 0.25 * array)


def convolve(array, kernel):
    """A 3 x 3 convolution with padding 1 and stride 1, written out."""
    padded = np.pad(array, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = array.shape[1:3]
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


@pytest.mark.parametrize("stage", [Stage(3, 2), Stage(3, 3, residual=True)], ids=["plain", "res"])
def test_layers_are_convolution_normalisation_prelu(stage, images):
    network = Network(TINY.image, (stage,), TINY.features, ceil=True)
    model = ConvNet(network, 7, rngs=nnx.Rngs(0))
    kernels = [np.asarray(layer.layer.kernel[...]) for layer in model.stages[0].layers]
    array = images.astype(np.float64)
    for i, kernel in enumerate(kernels):
        before = array
        array = prelu(normalise(convolve(array, kernel), (0, 1, 2)))
        if stage.residual and i == 1:
            shortcut = before
        if stage.residual and i == 2:
            array = array + shortcut
    array = np.pad(array, ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=-np.inf)
    array = array.reshape(6, 3, 2, 3, 2, 3).max((2, 4)).reshape(6, -1)
    expected = prelu(normalise(array @ np.asarray(model.full.layer.kernel[...]), 0))
    chex.assert_trees_all_close(
        np.asarray(features_of(model, images)), expected, rtol=1e-3, atol=1e-4
    )


def test_bfloat16_stays_in_the_activations(images):
    model = ConvNet(TINY, 7, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    features = features_of(model, images)
    assert features.dtype == jnp.float32
    arrays = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model)))
    assert {array.dtype for array in arrays if jnp.issubdtype(array.dtype, jnp.floating)} == {
        jnp.dtype(jnp.float32)
    }
    exact = features_of(ConvNet(TINY, 7, rngs=nnx.Rngs(0)), images)
    assert 1e-4 < float(jnp.abs(features - exact).max()) < 0.3


def test_linear_feature_is_neither_normalised_nor_activated_nor_scaled():
    network = NETWORKS["digits-2d"].scaled(1 / 8)
    model = nnx.eval_shape(lambda: ConvNet(network, 10, rngs=nnx.Rngs(0)))
    assert isinstance(model.full, nnx.Linear)
    assert network.features == 2 and [s.filters for s in network.stages] == [4, 8]
