"""Meshes, and the steps of `lsoftmax_jax.training` compiled for them."""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from lsoftmax_jax._core.placement import with_auto_axes
from lsoftmax_jax.training import State, StepMetrics, TrainStep

DATA_AXIS = "data"

Batch = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the one axis "data".

    Args:
      devices: how many, the first ones; by default all. Under `jax.distributed` they are counted
        over all processes, and each process must have one in the mesh.

    Returns:
      the mesh; its axis is of Auto type.

    Raises:
      TypeError: `devices` is no int.
      ValueError: there are fewer devices, or a process has none in the mesh.

    Example:
      >>> dict(data_mesh(1).shape)
      {'data': 1}
    """
    if isinstance(devices, bool) or not isinstance(devices, int | None):
        raise TypeError(f"devices must be an int or None, got {devices!r}")
    if devices is not None and not 1 <= devices <= jax.device_count():
        raise ValueError(f"devices must be 1 to {jax.device_count()}, got {devices}")
    chosen = jax.devices()[:devices]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise ValueError(
            f"devices must reach into all {jax.process_count()} processes, got {devices} "
            f"of {jax.device_count()}"
        )
    return jax.make_mesh((len(chosen),), (DATA_AXIS,), (AxisType.Auto,), devices=chosen)


def put(arrays: Any, mesh: Mesh, spec: P) -> Any:
    """A tree of host arrays on the devices of a mesh, which may be those of several processes.

    Args:
      arrays: the same in every process; each copies its own devices' parts and sends nothing.
      mesh: of any axes.
      spec: how to split each array; one for all.

    Returns:
      the tree, each leaf a `jax.Array`.

    Raises:
      ValueError: an axis of an array does not divide over its part of the mesh.

    Example:
      >>> import numpy as np
      >>> from jax.sharding import PartitionSpec
      >>> put(np.arange(3), data_mesh(1), PartitionSpec("data")).shape
      (3,)
    """

    def one(array: NDArray) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(one, arrays)


class CompiledStep:
    """A step that is compiled when it is first called; `lower` takes abstract arguments too.

    Both take the step's arguments, `where` last and optional.
    """

    def __init__(self, jitted: Any, shards: int) -> None:
        self._jitted, self._shards = jitted, shards

    def __call__(
        self, state: State, images: Any, labels: Any, where: jax.Array | None = None
    ) -> Any:
        self._check(labels)
        return self._jitted(state, images, labels, where)

    def lower(self, state: Any, images: Any, labels: Any, where: Any = None) -> jax.stages.Lowered:
        self._check(labels)
        return cast(jax.stages.Lowered, self._jitted.lower(state, images, labels, where))

    def _check(self, labels: Any) -> None:
        shape = np.shape(labels)
        if shape and shape[0] % self._shards:
            raise ValueError(
                f"the batch must divide over the {self._shards} devices of the mesh, got "
                f"{shape[0]} examples"
            )


def compile_step(step: Any, mesh: Mesh, *, donate: bool = True) -> CompiledStep:
    """`step` compiled for a mesh with a "data" axis, of Auto or Explicit type.

    Args:
      step: from `train_step` or `eval_step`.
      mesh: the state is replicated on it; images, labels and where are split along "data".
      donate: reuse the memory of the state for the new one. For an `eval_step` pass False: its
        state is needed again.

    Returns:
      a function of the arguments of `step`, compiled when first called, with
      ``.lower(...)`` for compiling ahead.

    Raises:
      TypeError, ValueError: `mesh` is none, or lacks the axis "data"; in calls, if its size does
        not divide the batch.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> from lsoftmax_jax.training import create, eval_step, train_step
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(model, optax.sgd(0.1))
      >>> evaluate = compile_step(eval_step(graphdef), data_mesh(1), donate=False)
      >>> float(evaluate(state, jnp.eye(3), jnp.array([0, 1, 0])).examples)
      3.0
    """
    _check_mesh(mesh)
    replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(DATA_AXIS))
    return CompiledStep(
        jax.jit(
            with_auto_axes(step, mesh),
            in_shardings=(replicated, rows, rows, rows),
            out_shardings=replicated,
            donate_argnums=0 if donate else (),
        ),
        mesh.shape[DATA_AXIS],
    )


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as data_mesh(), got {mesh!r}")
    if DATA_AXIS not in mesh.axis_names:
        raise ValueError(f'mesh must have an axis "{DATA_AXIS}", got {mesh.axis_names}')


def repeat(step: TrainStep, batch: Batch, mesh: Mesh, *, loop: bool | None = None) -> Any:
    """Many updates in one dispatch, on batches made on the device.

    Args:
      step: from `train_step`.
      batch: (step, data) -> (images, labels), pure: the rows of a step, augmented.
      mesh: has a "data" axis, of Auto or Explicit type; each batch is split along it.
      loop: compile one update in a loop, not ``length`` updates in a row. The default is False on
        CPUs, where XLA makes a convolution's gradient in a loop up to 50 times slower, else True.

    Returns:
      ``many(state, data, length) -> (state, metrics)``, jitted with the length static and the state
      donated; metrics are `StepMetrics` with a leading axis of that length.

    Raises:
      TypeError, ValueError: `mesh` is none, or lacks the axis "data"; when traced, as
        `lsoftmax_jax.lsoftmax_loss`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> from lsoftmax_jax.training import create, eval_step, train_step
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> sgd = optax.sgd(0.1)
      >>> graphdef, state = create(model, sgd)
      >>> step = train_step(graphdef, sgd, lambda step: jnp.float32(5.0))
      >>> many = repeat(step, lambda step, data: data, data_mesh(1))
      >>> state, metrics = many(state, (jnp.eye(3), jnp.array([0, 1, 0])), 2)
      >>> int(state.step), metrics.sums.loss.shape
      (2, (2,))
    """
    _check_mesh(mesh)
    # Inside, where all axes are Auto.
    inside = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    rows = NamedSharding(inside, P(DATA_AXIS))
    if loop is None:
        loop = mesh.devices.flat[0].platform != "cpu"

    def many(state: State, data: Any, length: int) -> Any:
        def update(state: State, data: Any) -> tuple[State, StepMetrics]:
            images, labels = jax.lax.with_sharding_constraint(batch(state.step, data), rows)
            return step(state, images, labels)

        def updates(state: State, data: Any) -> tuple[State, StepMetrics]:
            if loop:
                return jax.lax.scan(lambda state, _: update(state, data), state, length=length)
            metrics = []
            for _ in range(length):
                state, seen = update(state, data)
                metrics.append(seen)
            return state, jax.tree.map(lambda *entries: jnp.stack(entries), *metrics)

        return with_auto_axes(updates, mesh)(state, data)

    replicated = NamedSharding(mesh, P())
    return jax.jit(
        many,
        in_shardings=(replicated, replicated),
        out_shardings=replicated,
        static_argnums=2,
        donate_argnums=0,
    )
