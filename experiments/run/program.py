"""What a configuration computes: its network, optimizer, updates and evaluation as functions."""

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from numpy.typing import NDArray

from experiments.paper import data
from experiments.paper import networks as models
from experiments.paper.config import Config, Recipe
from experiments.store.progress import Progress
from lsoftmax_jax import training
from lsoftmax_jax.devices import DATA_AXIS, compile_step, put, repeat

# By default XLA gives YNNPACK convolutions too, whose gradients are many times slower there than in
# XLA (https://github.com/jax-ml/jax/issues/37465 has another slow case). The sums over a batch that
# batch normalisation needs are faster in YNNPACK.
_PRODUCTS_AND_SUMS: dict[str, str | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
}


def compiled(lowered: Lowered) -> Compiled:
    """The program of some updates; on CPUs YNNPACK computes its products and sums alone."""
    if jax.default_backend() == "cpu":
        # Some versions of jaxlib have no such option.
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            return lowered.compile(compiler_options=_PRODUCTS_AND_SUMS)
    return lowered.compile()


def network_state(
    recipe: Recipe, network: models.Network, classes: int, mesh: Mesh | None = None
) -> tuple[nnx.GraphDef[Any], Callable[[Any], training.State]]:
    """A network's structure, and seed -> its first state, whole on every device of the mesh.

    `jax.eval_shape` of the latter says where the arrays lie, too.
    """

    def model(seed: Any) -> models.ConvNet:
        return models.ConvNet(
            network,
            classes,
            margin=recipe.head_margin,
            dtype=recipe.activation_dtype,
            rngs=nnx.Rngs(jax.random.key(seed)),
        )

    def create(seed: Any) -> training.State:
        return training.create(model(seed), recipe.optimizer)[1]

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model(0)))
    whole = None if mesh is None else jax.NamedSharding(mesh, jax.P())
    return graphdef, jax.jit(create, out_shardings=whole)


def check_batch(batch: int, mesh: Mesh, examples: int) -> None:
    """Raises ValueError if a batch does not divide over the devices, or the data are fewer."""
    if batch > examples:
        raise ValueError(f"batch must be at most the {examples} training images, got {batch}")
    if batch % mesh.size:
        raise ValueError(
            f"batch must divide over the {mesh.size} devices, got {batch}; see --devices"
        )


class Program:
    """A configuration's data and functions, the same for all its seeds, compiled when called.

    Args:
      config: of the run.
      folder: where the data is, see `data.load`.
      mesh: has a "data" axis.

    Attributes:
      dataset: the training split, and what it is tested on.
      mean: subtracted from the images.
      create: seed -> a fresh `training.State`, whole on every device; jitted.
      updates: (state, `data.OnDevice`, length) -> (state, metrics); compiled for each length, the
        state donated.
    """

    def __init__(self, config: Config, folder: Path | None, mesh: Mesh) -> None:
        self.dataset, self._mesh = load(config, folder), mesh
        network, train = config.built_network, self.dataset.train
        if train.images.shape[1:] != network.image:
            raise ValueError(
                f"{config.dataset}: images must be {network.image}, got {train.images.shape[1:]}"
            )
        check_batch(config.batch, mesh, len(train.labels))
        self.mean: NDArray[np.float32] = np.asarray(
            train.images.mean(axis=0, dtype=np.float64) if config.mean is None else config.mean,
            np.float32,
        )
        graphdef, self.create = network_state(config, network, config.classes, mesh)
        loss = optax.losses.multiclass_hinge_loss if config.hinge else None
        step = training.train_step(graphdef, config.optimizer, config.lam_policy, loss=loss)
        batch = partial(data.batch, size=config.batch, crop=config.crop, mirror=config.mirror)
        evaluate, embed = training.eval_step(graphdef, loss=loss), training.embed_step(graphdef)

        def examine(state: Any, images: Any, labels: Any, where: Any = None) -> Any:
            images = data.centred(images, jnp.asarray(self.mean))
            return evaluate(state, images, labels, where), embed(state, images)

        self.updates = repeat(step, batch, mesh)
        self._examine = compile_step(examine, mesh, donate=False)

    @property
    def like(self) -> training.State:
        """A state, abstract, with where its arrays lie."""
        return jax.eval_shape(self.create, 0)

    def evaluate(
        self, state: training.State, split: data.Split, progress: Progress | None = None
    ) -> tuple[training.Sums, NDArray, NDArray]:
        """Sums, features and plain logits of a whole split; `progress` counts its images."""
        mesh, count, seen = self._mesh, len(split.labels), []
        size = mesh.size * -(-500 // mesh.size)
        for images, labels, where in data.padded_batches(split, size):
            batch = put((images, labels, where), mesh, jax.P(DATA_AXIS))
            # Wait for each program: collectives of several can hang fake CPU devices.
            seen.append(jax.device_get(self._examine(state, *batch)))
            if progress is not None:
                progress.advance(int(where.sum()))
        sums, outputs = zip(*seen, strict=True)
        features, logits = (np.concatenate(parts)[:count] for parts in zip(*outputs, strict=True))
        return jax.tree.map(lambda *parts: np.sum(parts), *sums), features, logits


def load(config: Config, folder: Path | None) -> data.Dataset:
    """The configuration's training split, and what it is tested on."""
    dataset = data.load(config.dataset, folder)
    if config.validation:
        dataset = dataset.with_validation()
    return dataset if config.examples is None else dataset.first(config.examples)


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
    seen = metrics._asdict()
    sums = seen.pop("sums")
    return averages(sums) | {n: np.asarray(value, np.float32) for n, value in seen.items()}
