"""The paper's networks, from one table.

Every network is built of stages: convolution, batch normalisation, PReLU, repeated; then a 2x2 max
pooling of stride 2; at the end a fully connected layer whose output is the feature that the
large-margin head classifies. ``NETWORKS`` is Table 1 of Liu et al. (ICML 2016), the networks of the
authors' released prototxts, Fig. 7's widths, and two small ones for a first run.

A model is called as ``model(images) -> features`` and carries its classifier as ``model.head``, all
that `lsoftmax_jax.training` asks of a model.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lsoftmax_jax.margins import Margin
from lsoftmax_jax.nnx import LSoftmaxDense

HE = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class Stage(NamedTuple):
    """``layers`` convolutions of ``filters`` filters, then a pooling.

    In a residual stage the first convolution stands alone and every following pair is added to its
    own input.
    """

    filters: int
    layers: int
    size: int = 3
    stride: int = 1
    pool: bool = True
    residual: bool = False


@dataclass(frozen=True)
class Network:
    """One column of Table 1.

    Attributes:
      image: height, width and channels of the input.
      stages: the convolutions, first to last.
      features: length of the feature vector.
      linear: the feature is the fully connected layer itself, neither normalised nor activated.
      prelu: PReLU with a slope per channel; otherwise ReLU.
      ceil: pooling rounds odd sizes up, as Caffe does; otherwise down.
    """

    image: tuple[int, int, int]
    stages: tuple[Stage, ...]
    features: int
    linear: bool = False
    prelu: bool = True
    ceil: bool = False

    def scaled(self, width: float) -> "Network":
        """The network with ``width`` times the filters and features (a linear feature stays)."""
        stages = tuple(s._replace(filters=_scaled(s.filters, width)) for s in self.stages)
        features = self.features if self.linear else _scaled(self.features, width)
        return replace(self, stages=stages, features=features)

    def shapes(self) -> list[tuple[int, int, int]]:
        """Height, width and channels of what goes into each stage, and of what the last gives."""
        shapes = [self.image]
        for stage in self.stages:
            height, width = (_after(stage, size, self.ceil) for size in shapes[-1][:2])
            shapes.append((height, width, stage.filters))
        return shapes


def _scaled(count: int, width: float) -> int:
    return max(1, round(count * width))


def _after(stage: Stage, size: int, ceil: bool) -> int:
    """The height or width after a stage."""
    size = -(-size // stage.stride)
    if not stage.pool:
        return size
    return -(-size // 2) if ceil else size // 2


def _first(filters: int, stride: int = 1) -> Stage:
    return Stage(filters, 1, stride=stride, pool=False)


def _residual(filters: int, layers: int) -> Stage:
    return Stage(filters, layers, stride=2, pool=False, residual=True)


_MNIST, _CIFAR, _FACE = (28, 28, 1), (32, 32, 3), (112, 96, 3)


def _released(image: tuple[int, int, int], layers: int) -> Network:
    stages = (_first(64), Stage(64, layers), Stage(128, layers), Stage(256, layers))
    return Network(image, stages, 512, prelu=False, ceil=True)


def _fig7(filters: int) -> Network:
    return Network(_CIFAR, (_first(filters), *[Stage(filters, 4)] * 3), 256)


NETWORKS: dict[str, Network] = {
    # Table 1
    "mnist-2d": Network(
        _MNIST, (Stage(32, 2, size=5), Stage(64, 2, size=5), Stage(128, 2, size=5)), 2, linear=True
    ),
    "mnist": Network(_MNIST, (_first(64), *[Stage(64, 3)] * 3), 256),
    "cifar10": Network(_CIFAR, (_first(64), Stage(64, 4), Stage(96, 4), Stage(128, 4)), 256),
    "cifar100": Network(_CIFAR, (_first(96), Stage(96, 4), Stage(192, 4), Stage(384, 4)), 512),
    "lfw": Network(_FACE, (_first(64, stride=2), Stage(64, 4), *[Stage(256, 4)] * 3), 512),
    # The authors' released prototxts
    "released-mnist": _released(_MNIST, layers=3),
    "released-cifar10": _released(_CIFAR, layers=4),
    # Fig. 7: filters per convolution
    **{f"fig7-{filters}": _fig7(filters) for filters in (32, 64, 96, 128)},
    # Twenty convolutions with residual connections, after the authors' SphereFace-20
    "sphere20": Network(
        _FACE, (_residual(64, 3), _residual(128, 5), _residual(256, 9), _residual(512, 3)), 512
    ),
    # scikit-learn's 8 x 8 digits with a 2-D feature, for the first run
    "digits-2d": Network((8, 8, 1), (Stage(32, 2), Stage(64, 2)), 2, linear=True),
}

# Flax 0.11 has no `List`: there a plain list may hold modules.
ModuleList: Any = getattr(nnx, "List", list)


class PReLU(nnx.Module):
    """max(0, inputs) + slope * min(0, inputs), one slope per channel (Flax's shares one)."""

    def __init__(self, channels: int) -> None:
        self.slope = nnx.Param(jnp.full((channels,), 0.25, jnp.float32))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return jnp.where(inputs >= 0, inputs, self.slope[...] * inputs)


class Normalised(nnx.Module):
    """A convolution or fully connected layer, then batch normalisation, then the activation.

    The layer computes in ``dtype``; the statistics and the activation are float32 whatever it is.
    """

    def __init__(
        self, layer: nnx.Conv | nnx.Linear, channels: int, prelu: bool, rngs: nnx.Rngs
    ) -> None:
        self.layer = layer
        self.norm = nnx.BatchNorm(
            channels, momentum=0.9, epsilon=1e-5, dtype=jnp.float32, rngs=rngs
        )
        self.activation = PReLU(channels) if prelu else nnx.relu

    def __call__(self, inputs: jax.Array, where: jax.Array | None) -> jax.Array:
        outputs = self.layer(inputs)
        mask = None if where is None else where.reshape(-1, *[1] * (outputs.ndim - 1))
        return self.activation(self.norm(outputs, mask=mask)).astype(outputs.dtype)


class Convolutions(nnx.Module):
    """One stage of a network."""

    def __init__(
        self, channels: int, stage: Stage, network: Network, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.stage, self.padding = stage, "SAME" if network.ceil else "VALID"
        layers = []
        for i in range(stage.layers):
            conv = nnx.Conv(
                stage.filters if i else channels,
                stage.filters,
                (stage.size, stage.size),
                strides=1 if i else stage.stride,
                padding=stage.size // 2,
                dtype=dtype,
                kernel_init=HE,
                rngs=rngs,
            )
            layers.append(Normalised(conv, stage.filters, network.prelu, rngs))
        self.layers = ModuleList(layers)

    def __call__(self, inputs: jax.Array, where: jax.Array | None) -> jax.Array:
        first, *others = self.layers
        outputs = first(inputs, where)
        if self.stage.residual:
            for left, right in zip(others[::2], others[1::2], strict=True):
                outputs = outputs + right(left(outputs, where), where)
        else:
            for layer in others:
                outputs = layer(outputs, where)
        if self.stage.pool:
            outputs = nnx.max_pool(outputs, (2, 2), strides=(2, 2), padding=self.padding)
        return outputs


class ConvNet(nnx.Module):
    """A network of the table with its large-margin head.

    Args:
      network: a value of ``NETWORKS``, scaled or with another image size if wanted.
      classes: number of classes.
      margin: of the head; 1 is the ordinary softmax.
      dtype: of the activations; parameters, BN statistics, features and head stay float32.
      rngs: draws the initial weights.
    """

    def __init__(
        self,
        network: Network,
        classes: int,
        *,
        margin: int | Margin = 1,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.dtype = jnp.dtype(dtype)
        *shapes, last = network.shapes()
        self.stages = ModuleList(
            [
                Convolutions(channels, stage, network, dtype, rngs)
                for stage, (*_, channels) in zip(network.stages, shapes, strict=True)
            ]
        )
        features = network.features
        full = nnx.Linear(math.prod(last), features, dtype=dtype, kernel_init=HE, rngs=rngs)
        self.full = full if network.linear else Normalised(full, features, network.prelu, rngs)
        self.head = LSoftmaxDense(features, classes, margin=margin, kernel_init=HE, rngs=rngs)

    def __call__(self, images: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """Features (batch, features), float32, of images (batch, height, width, channels).

        ``where`` (batch,) leaves padding rows out of the batch statistics.
        """
        outputs = images.astype(self.dtype)
        for stage in self.stages:
            outputs = stage(outputs, where)
        flat = outputs.reshape(len(outputs), -1)
        full = self.full(flat, where) if isinstance(self.full, Normalised) else self.full(flat)
        return full.astype(jnp.float32)


@cache
def parameter_count(network: Network, classes: int) -> int:
    """Trained parameters of the network and its head."""
    model = nnx.eval_shape(lambda: ConvNet(network, classes, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def multiply_adds(network: Network, classes: int) -> int:
    """Multiply-adds of one image's forward pass in convolutions, fully connected layer and head."""
    *shapes, last = network.shapes()
    total = network.features * (math.prod(last) + classes)
    for stage, (height, width, channels) in zip(network.stages, shapes, strict=True):
        pixels = -(-height // stage.stride) * -(-width // stage.stride)
        inputs = channels + (stage.layers - 1) * stage.filters
        total += pixels * stage.size**2 * inputs * stage.filters
    return total
