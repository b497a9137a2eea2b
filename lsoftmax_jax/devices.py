"""Meshes, and the steps of `lsoftmax_jax.training` compiled for them."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

from lsoftmax_jax import _checks
from lsoftmax_jax.training import State, StepMetrics, TrainStep, _check_state, _unaliased

DATA_AXIS = "data"

Batch = Callable[[jax.Array, Any], tuple[Any, jax.Array]]


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the one axis "data".

    Args:
      devices: how many, the first ones; by default all. Under `jax.distributed` they are counted
        over all processes, and each process must have one in the mesh.

    Returns:
      the mesh; its axis is of Auto type.

    Raises:
      TypeError: `devices` is no int.
      ValueError: `devices` is below 1, there are fewer, or a process has none in the mesh.

    Example:
      >>> dict(data_mesh(1).shape)
      {'data': 1}
    """
    if devices is not None:
        devices = _checks.check_size("devices", devices, jax.device_count())
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

    def one(array: Any) -> jax.Array:
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(one, arrays)


class CompiledStep:
    """A step that is compiled when it is first called; `lower` takes abstract arguments too.

    A call and `lower` take the step's arguments, `where` last and optional.
    """

    def __init__(self, step: Any, mesh: Mesh, donate: bool) -> None:
        # Jitted here, so that the step is traced once for the shapes and for the program.
        self._step, self._mesh, self._donate = jax.jit(step), mesh, donate
        self._programs = _Programs(mesh)

    def __call__(
        self, state: State, images: Any, labels: Any, where: jax.Array | None = None
    ) -> Any:
        _check_state(state)
        state = _unaliased(state) if self._donate else state
        return self._program(state, images, labels, where)(state, images, labels, where)

    def lower(self, state: Any, images: Any, labels: Any, where: Any = None) -> jax.stages.Lowered:
        program = self._program(state, images, labels, where)
        return cast(jax.stages.Lowered, program.lower(state, images, labels, where))

    def _program(self, state: State, *batch: Any) -> Any:
        mesh, (_, labels, where) = self._mesh, batch
        _check_batch(labels, mesh)

        def build(placement: Any) -> Any:
            shardings = (placement, *[_rows(mesh)] * 3)
            whole = _with_auto_axes(self._step, mesh, _whole(mesh))
            made = jax.jit(whole, in_shardings=shardings).eval_shape(state, *batch)
            placed = jax.tree.map(
                lambda node: placement if isinstance(node, State) else _whole(mesh),
                made,
                is_leaf=lambda node: isinstance(node, State),
            )
            return jax.jit(
                _with_auto_axes(self._step, mesh, placed),
                in_shardings=shardings,
                out_shardings=placed,
                donate_argnums=0 if self._donate else (),
            )

        return self._programs.of(state, build, variant=where is None)


def compile_step(step: Any, mesh: Mesh, *, donate: bool = True) -> CompiledStep:
    """`step` compiled for a mesh, of Auto or Explicit axes.

    The batch is split over all axes of the mesh, so that every device has rows of its own. Arrays
    of the state that lie on the mesh stay as they lie, such as the kernel of a class-parallel head;
    the others are replicated.

    Args:
      step: from `train_step` or `eval_step`.
      mesh: its size divides the batch.
      donate: reuse the memory of the state for the new one. For an `eval_step` pass False: its
        state is needed again.

    Returns:
      a function of the arguments of `step`, compiled when first called, with ``.lower(...)`` for
      compiling ahead. The first axis of each array in ``images`` is that of the batch.

    Raises:
      TypeError, ValueError: `mesh` is no mesh; in calls, its size does not divide the batch, an
        array of the state is deleted or in shards on another mesh, or as `step`.

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
    return CompiledStep(step, mesh, donate)


class RepeatedStep:
    """Many updates in one dispatch, (state, data, length) -> (state, metrics)."""

    def __init__(self, many: Any, mesh: Mesh) -> None:
        self._many, self._mesh, self._programs = many, mesh, _Programs(mesh)

    def __call__(self, state: State, data: Any, length: int) -> tuple[State, StepMetrics]:
        _check_state(state)
        length = _checks.check_size("length", length)
        state = _unaliased(state)
        return cast(tuple[State, StepMetrics], self._program(state)(state, data, length))

    def lower(self, state: Any, data: Any, length: int) -> jax.stages.Lowered:
        return cast(jax.stages.Lowered, self._program(state).lower(state, data, length))

    def _program(self, state: State) -> Any:
        mesh = self._mesh

        def build(placement: Any) -> Any:
            placed = placement, _whole(mesh)

            def many(state: State, data: Any, length: int) -> Any:
                updates = partial(self._many, length=length)
                return _with_auto_axes(updates, mesh, placed)(state, data)

            return jax.jit(
                many,
                in_shardings=(placement, _whole(mesh)),
                out_shardings=placed,
                static_argnums=2,
                donate_argnums=0,
            )

        return self._programs.of(state, build)


def repeat(step: TrainStep, batch: Batch, mesh: Mesh, *, loop: bool | None = None) -> RepeatedStep:
    """Many updates in one dispatch, on batches made on the device.

    Args:
      step: from `train_step`.
      batch: (step, data) -> (images, labels), pure: the rows of a step, augmented.
      mesh: of Auto or Explicit axes; each batch is split over all of them, and the state lies as
        for `compile_step`.
      loop: compile one update in a loop, not ``length`` updates in a row. The default is False on
        CPUs, where XLA makes a convolution's gradient in a loop up to 50 times slower, else True.

    Returns:
      ``many(state, data, length) -> (state, metrics)``, compiled for each length, with the state
      donated; metrics are `StepMetrics` with a leading axis of that length.

    Raises:
      TypeError, ValueError: `mesh` is no mesh; in calls, `length` is no int >= 1, `batch` does not
        return two things, or as `compile_step`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> from lsoftmax_jax.training import create, train_step
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
    # Inside, all axes are Auto.
    inside = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    if loop is None:
        loop = mesh.devices.flat[0].platform != "cpu"

    def update(state: State, data: Any) -> tuple[State, StepMetrics]:
        made = batch(state.step, data)
        parts = len(made) if isinstance(made, (tuple, list)) else 1
        if parts != 2:
            raise ValueError(f"batch must return two parts, (images, labels), got {parts}")
        images, labels = made
        _check_batch(labels, mesh)
        return step(state, *jax.lax.with_sharding_constraint((images, labels), _rows(inside)))

    def many(state: State, data: Any, length: int) -> tuple[State, StepMetrics]:
        if loop:
            return jax.lax.scan(lambda state, _: update(state, data), state, length=length)
        metrics = []
        for _ in range(length):
            state, seen = update(state, data)
            metrics.append(seen)
        return state, jax.tree.map(lambda *entries: jnp.stack(entries), *metrics)

    return RepeatedStep(many, mesh)


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as data_mesh(), got {mesh!r}")


def _check_batch(labels: Any, mesh: Mesh) -> None:
    shape = np.shape(labels)
    if shape and shape[0] % mesh.size:
        raise ValueError(
            f"labels must have a multiple of {mesh.size} rows, the devices of the mesh, got "
            f"{shape[0]}"
        )


def _whole(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P(mesh.axis_names))


class _Programs:
    """Jitted functions of a state, one for each way in which the state may lie on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._programs: dict[Any, Any] = {}

    def of(self, state: State, build: Callable[[Any], Any], variant: bool = True) -> Any:
        """The program for `state` where it lies, built once; `variant` tells signatures apart."""
        leaves, structure = jax.tree.flatten(state)
        found = variant, structure, *map(_sharding, leaves)
        if found not in self._programs:
            self._check(state)
            # A fresh state and the state of the first step share a program.
            placement = [self._place(sharding) for sharding in found[2:]]
            wanted = variant, structure, *placement
            if wanted not in self._programs:
                self._programs[wanted] = build(jax.tree.unflatten(structure, placement))
            self._programs[found] = self._programs[wanted]
        return self._programs[found]

    def _check(self, state: State) -> None:
        """Refuses an array in shards on another mesh."""
        mesh = self._mesh
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            at = _sharding(leaf)
            if not isinstance(at, NamedSharding) or not isinstance(at.mesh, Mesh):
                continue
            same = at.mesh.shape == mesh.shape and np.array_equal(at.mesh.devices, mesh.devices)
            whole = at.is_fully_replicated and at.device_set == {*mesh.devices.flat}
            if not (same or whole):
                raise ValueError(
                    f"state{jax.tree_util.keystr(path)} must lie on the mesh of the step, "
                    f"{dict(mesh.shape)}, got {at.spec} on {dict(at.mesh.shape)}, or on other "
                    f"devices: move the state with jax.device_put"
                )

    def _place(self, sharding: Any) -> NamedSharding:
        """Where an array lies on the mesh; replicated if it lies elsewhere."""
        mesh = self._mesh
        if isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names:
            return NamedSharding(mesh, sharding.spec)
        return _whole(mesh)


def _sharding(leaf: Any) -> Any:
    # A tracer has no sharding: inside another jit nothing is known before it compiles.
    return None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)


def _with_auto_axes(function: Any, mesh: Mesh, placed: Any) -> Any:
    """Leaves the placement inside `function` to the compiler on an Explicit mesh too."""
    if not mesh.explicit_axes:
        return function
    # Before JAX 0.8 auto_axes takes only the abstract mesh, which traced arrays have.
    placed = jax.tree.map(lambda at: NamedSharding(mesh.abstract_mesh, at.spec), placed)
    return auto_axes(function, axes=mesh.axis_names, out_sharding=placed)
