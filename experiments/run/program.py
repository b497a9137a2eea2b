"""What a configuration computes: its network, optimizer, updates and evaluation as functions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from experiments.paper import data
from experiments.paper import measures as measure
from experiments.paper import networks as models
from experiments.paper.config import Config, Recipe
from lsoftmax_jax import training
from lsoftmax_jax.devices import DATA_AXIS, compile_step, put, repeat


class Program(NamedTuple):
    """A configuration's functions, the same for all its seeds.

    Attributes:
      create: seed -> a fresh `training.State`; may be vmapped.
      updates: (states, `data.OnDevice`s, length) -> (states, metrics), lists with one entry a seed,
        all at the same step; jitted, the length static and the states donated.
      examine: (state, images, labels, where) -> (sums, (features, plain logits)).
      mean: subtracted from the images.
    """

    create: Callable[[Any], training.State]
    updates: Any
    examine: Any
    mean: NDArray[np.float32]


def network_state(
    recipe: Recipe, network: models.Network, classes: int
) -> tuple[nnx.GraphDef[Any], Callable[[Any], training.State]]:
    """A network's structure, and seed -> its first state."""

    def model(seed: Any) -> models.ConvNet:
        return models.ConvNet(
            network,
            classes,
            margin=recipe.margin,
            dtype=recipe.activation_dtype,
            rngs=nnx.Rngs(jax.random.key(seed)),
        )

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model(0)))
    return graphdef, lambda seed: training.create(model(seed), recipe.optimizer)[1]


def check_batch(batch: int, mesh: Mesh, examples: int) -> None:
    """Raises ValueError if a batch does not divide over the devices, or the data are fewer."""
    if batch > examples:
        raise ValueError(f"batch must be at most the {examples} training images, got {batch}")
    if batch % mesh.size:
        raise ValueError(
            f"batch must divide over the {mesh.size} devices, got {batch}; see --devices"
        )


def build(config: Config, train: data.Split, mesh: Mesh) -> Program:
    """The configuration's functions for a training split, compiled for a mesh when called."""
    network = config.built_network
    if train.images.shape[1:] != network.image:
        raise ValueError(
            f"{config.dataset}: images must be {network.image}, got {train.images.shape[1:]}"
        )
    check_batch(config.batch, mesh, len(train.labels))
    mean = np.asarray(
        train.images.mean(axis=0, dtype=np.float64) if config.mean is None else config.mean,
        np.float32,
    )
    graphdef, create = network_state(config, network, config.classes)
    loss = optax.losses.multiclass_hinge_loss if config.hinge else None
    step = training.train_step(graphdef, config.optimizer, config.lam_policy, loss=loss)
    batch = partial(data.batch, size=config.batch, crop=config.crop, mirror=config.mirror)
    evaluate, embed = training.eval_step(graphdef, loss=loss), training.embed_step(graphdef)

    def examine(state: Any, images: Any, labels: Any, where: Any = None) -> Any:
        images = data.centred(images, jnp.asarray(mean))
        return evaluate(state, images, labels, where), embed(state, images)

    return Program(
        create=create,
        updates=_of_seeds(repeat(step, batch, mesh), mesh),
        examine=compile_step(examine, mesh, donate=False),
        mean=mean,
    )


def _of_seeds(updates: Any, mesh: Mesh) -> Any:
    """Makes the updates of one seed those of several: lists in, lists out."""

    def several(
        states: list[training.State], sources: list[data.OnDevice], length: int
    ) -> tuple[list[training.State], list[training.StepMetrics]]:
        def unstacked(tree: Any) -> list[Any]:
            leaves, structure = jax.tree.flatten(tree)
            return [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]

        if len(states) == 1:
            state, metrics = updates(states[0], sources[0], length)
            return [state], [metrics]

        def of_one(state: training.State, key: jax.Array, order: jax.Array) -> Any:
            return updates(state, sources[0]._replace(key=key, order=order), length)

        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        keys = jnp.stack([source.key for source in sources])
        orders = jnp.stack([source.order for source in sources])
        try:
            state, metrics = jax.vmap(of_one)(stacked, keys, orders)
        except NotImplementedError as error:  # of JAX 0.7: a convolution placed over a mesh
            raise ValueError(
                "several seeds in one program need a newer JAX, whose vmap knows convolutions over "
                f"a mesh, got {jax.__version__}: run one seed at a time"
            ) from error
        return unstacked(state), unstacked(metrics)

    replicated = NamedSharding(mesh, P())
    return jax.jit(
        several,
        in_shardings=(replicated, replicated),
        out_shardings=replicated,
        static_argnums=2,
        donate_argnums=0,
    )


def load(config: Config, folder: Path | None) -> data.Dataset:
    """The configuration's training split, and what it is tested on."""
    dataset = data.load(config.dataset, folder)
    if config.validation:
        dataset = dataset.with_validation()
    return dataset if config.examples is None else dataset.first(config.examples)


def evaluate(
    program: Program, state: training.State, split: data.Split, mesh: Mesh
) -> tuple[training.Sums, NDArray, NDArray]:
    """Sums, features and plain logits of a whole split."""
    size = mesh.size * -(-500 // mesh.size)
    batches = [
        program.examine(state, *put(rows, mesh, P(DATA_AXIS)))
        for rows in data.padded_batches(split, size)
    ]
    sums = jax.tree.map(lambda *parts: np.sum(jax.device_get(parts)), *[b[0] for b in batches])
    features, logits = (
        np.concatenate(jax.device_get(parts))[: len(split.labels)]
        for parts in zip(*[b[1] for b in batches], strict=True)
    )
    return sums, features, logits


def measures(
    program: Program, state: training.State, dataset: data.Dataset, mesh: Mesh
) -> dict[str, Any]:
    """Everything `measure` knows about both splits, and their margin-free loss."""
    kernel = np.asarray(state.params["head"]["kernel"])
    measured = {}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        sums, features, logits = evaluate(program, state, split, mesh)
        loss = {"loss": float(averages(sums)["loss"])}
        measured[name] = loss | measure.measures(features, logits, split.labels, kernel)
    return measured


def averages(sums: training.Sums) -> dict[str, Any]:
    """Means over the examples, error in %, angle in degrees."""
    count = sums.examples
    return {
        "loss": sums.loss / count,
        "error": 100 * (1 - sums.correct / count),
        "target_angle": np.degrees(sums.target_angle / count),
        "feature_norm": sums.feature_norm / count,
    }


def per_update(metrics: training.StepMetrics) -> dict[str, NDArray[np.float32]]:
    """What each of a dispatch's updates saw, in the units of the logs."""
    return averages(metrics.sums) | {
        "lam": metrics.lam,
        "kernel_norm": metrics.kernel_norm,
        "grad_norm": metrics.grad_norm,
        "skipped": np.asarray(metrics.skipped, np.float32),
        "collapsing": np.asarray(metrics.collapsing, np.float32),
    }
