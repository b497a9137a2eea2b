r"""Training and evaluation steps for any Flax NNX model that ends in a large-margin head.

The model is called as ``model(images) -> features`` and carries the head as ``model.head``. The
steps are pure functions of arrays, so that the same step runs under `jax.jit` on one device, under
jit over a mesh (`compile_step`, `repeat`), under `jax.pmap` and under `jax.vmap` over seeds::

    graphdef, state = create(model, optimizer)
    step = compile_step(train_step(graphdef, optimizer, annealed_lambda(1000, 2.5e-5, 35)), mesh)
    state, metrics = step(state, images, labels)

λ is a function of ``state.step`` and so are Optax's learning-rate schedules, hence a restored state
continues exactly. Batch normalisation spans the global batch on every path: on a mesh because the
step is written for the whole batch, under pmap through ``axis_name``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

DATA_AXIS = "data"

Schedule = Callable[[jax.Array], jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]
Batch = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
    """All that training changes, as one pytree of arrays.

    Attributes:
      step: number of updates made, int32 ().
      params: the trained parameters, a nested dict.
      other: the model's remaining arrays, such as batch statistics, a nested dict.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: dict[Any, Any]
    other: dict[Any, Any]
    opt_state: optax.OptState


class Sums(NamedTuple):
    """Sums over examples, float32 (): batches and devices add up.

    Attributes:
      examples: their number.
      loss: the loss.
      correct: how often the plain logit of the label is the largest. It is margin-free: a margin
        logit is lower and would make training look worse than it is.
      target_angle: angle between feature and kernel column of the label, in radians.
      feature_norm: the feature's length.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array
    target_angle: jax.Array
    feature_norm: jax.Array


class StepMetrics(NamedTuple):
    """What one update saw: `Sums` over its global batch, λ, and norms.

    Attributes:
      sums: over the batch.
      lam: λ of this update.
      kernel_norm: mean length of the head's kernel columns before the update.
      grad_norm: length of the whole gradient.
    """

    sums: Sums
    lam: jax.Array
    kernel_norm: jax.Array
    grad_norm: jax.Array


class TrainStep(Protocol):
    """(state, images, labels, where) -> (new state, metrics)."""

    def __call__(
        self, state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> tuple[State, StepMetrics]: ...


class EvalStep(Protocol):
    """(state, images, labels, where) -> sums."""

    def __call__(
        self, state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> Sums: ...


def create(
    model: nnx.Module, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef[Any], State]:
    """The model's structure, and its arrays with a fresh optimizer state as a `State`.

    Args:
      model: any NNX module; the steps call it as ``model(images)`` and use its ``head``.
      optimizer: an Optax transformation.

    Returns:
      (graphdef, state): the structure, static, and step 0 of all arrays.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> head = LSoftmaxDense(8, 10, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(head, optax.sgd(0.1))
      >>> state.params["kernel"].shape
      (8, 10)
    """
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, other = map(nnx.to_pure_dict, states)
    return graphdef, State(jnp.zeros((), jnp.int32), params, other, optimizer.init(params))


def restore_model(graphdef: nnx.GraphDef[Any], state: State) -> Any:
    """The NNX model of a trained state, set to inference.

    Args:
      graphdef: the model's structure, from `create`.
      state: of any step.

    Returns:
      the module; its arrays are those of the state, not copies.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> head = LSoftmaxDense(8, 10, margin=4, rngs=nnx.Rngs(0))
      >>> restore_model(*create(head, optax.sgd(0.1)))(jnp.ones((2, 8))).shape
      (2, 10)
    """
    model = nnx.merge(graphdef, state.params, state.other)
    model.eval()
    return model


def train_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    lam_schedule: Schedule,
    *,
    loss: Loss | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    r"""Builds the pure function that makes one update on the batch's mean loss.

    .. math:: p_{t+1} = p_t + U\left(\nabla_p \frac1B \sum_i \ell_i(p_t, \lambda_t)\right)

    with the optimizer's update U, the large-margin loss of the head, and λ of the state's step.

    Args:
      graphdef: the model's structure, from `create`.
      optimizer: an Optax transformation.
      lam_schedule: step -> λ, such as `lsoftmax_jax.annealed_lambda`.
      loss: (plain logits, labels) -> per-example loss, in place of the head's large-margin loss.
      axis_name: the axis to sum over when the step runs under `jax.pmap` or `jax.shard_map`.

    Returns:
      ``step(state, images, labels, where=None) -> (state, StepMetrics)``. ``where`` (batch,) marks
      the real rows of a padded batch; the model is then called as ``model(images, where=where)`` so
      that its batch statistics can leave the padding out too. (Under ``axis_name`` Flax averages
      the devices' statistics with equal weight, exact where each has as many real rows.)

    Raises:
      TypeError, ValueError: when the step is traced, as `lsoftmax_jax.lsoftmax_loss`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax import annealed_lambda
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> sgd = optax.sgd(0.1)
      >>> graphdef, state = create(model, sgd)
      >>> step = train_step(graphdef, sgd, annealed_lambda(1000.0, 2.5e-5, 35.0))
      >>> state, metrics = step(state, jnp.ones((4, 3)), jnp.array([0, 1, 1, 1]))
      >>> int(state.step), round(float(metrics.lam), 2), float(metrics.sums.examples)
      (1, 999.13, 4.0)

    Source: Liu et al., ICML 2016; λ by the step as in the authors' released code.
    """

    def total(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def step(
        state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> tuple[State, StepMetrics]:
        lam = jnp.asarray(lam_schedule(state.step))
        count = total(jnp.float32(len(images)) if where is None else jnp.sum(where, dtype=float))

        def mean_loss(params: Any) -> tuple[jax.Array, tuple[Any, Sums]]:
            model = nnx.merge(graphdef, params, state.other)
            model.train()
            model.set_attributes(nnx.BatchNorm, raise_if_not_found=False, axis_name=axis_name)
            features = model(images) if where is None else model(images, where=where)
            sums = _sums(model.head, features, labels, lam, where, loss)
            other = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
            return sums.loss / jnp.maximum(count, 1), (other, sums)

        grads, (other, sums) = jax.grad(mean_loss, has_aux=True)(state.params)
        grads, sums = total((grads, sums))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(dict[Any, Any], optax.apply_updates(state.params, updates))
        metrics = StepMetrics(
            sums=sums,
            lam=lam.astype(jnp.float32),
            kernel_norm=jnp.mean(_norm(state.params["head"]["kernel"], axis=0)),
            grad_norm=optax.tree.norm(grads).astype(jnp.float32),
        )
        return State(state.step + 1, params, other, opt_state), metrics

    return step


def eval_step(
    graphdef: nnx.GraphDef[Any], *, loss: Loss | None = None, axis_name: str | None = None
) -> EvalStep:
    """Builds the pure function that evaluates a batch without a margin.

    The loss is the plain softmax cross-entropy (the head's loss at λ = infinity).

    Args:
      graphdef: the model's structure, from `create`.
      loss: (plain logits, labels) -> per-example loss, in place of the cross-entropy.
      axis_name: the axis to sum over when the step runs under `jax.pmap` or `jax.shard_map`.

    Returns:
      ``step(state, images, labels, where=None) -> Sums``; padding rows of a last batch are left
      out by ``where`` (batch,).

    Raises:
      TypeError, ValueError: when the step is traced, as `lsoftmax_jax.lsoftmax_loss`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(model, optax.sgd(0.1))
      >>> where = jnp.array([True, True, False])
      >>> sums = eval_step(graphdef)(state, jnp.eye(3), jnp.array([0, 1, 0]), where)
      >>> float(sums.examples), bool(sums.correct <= 2)
      (2.0, True)
    """

    def step(
        state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> Sums:
        model = restore_model(graphdef, state)
        sums = _sums(model.head, model(images), labels, jnp.float32(jnp.inf), where, loss)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return step


def embed_step(
    graphdef: nnx.GraphDef[Any],
) -> Callable[[State, jax.Array], tuple[jax.Array, jax.Array]]:
    """Builds the pure function that gives a batch's features, the network at inference.

    Args:
      graphdef: the model's structure, from `create`.

    Returns:
      ``step(state, images) -> (features, plain logits)``, of shapes (batch, D) and
      (batch, classes).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(model, optax.sgd(0.1))
      >>> features, logits = embed_step(graphdef)(state, jnp.eye(3))
      >>> features.shape, logits.shape
      ((3, 3), (3, 2))
    """

    def step(state: State, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = restore_model(graphdef, state)
        features = model(images)
        return features, model.head(features)

    return step


def _sums(
    head: Any,
    features: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    where: jax.Array | None,
    loss: Loss | None,
) -> Sums:
    if loss is None:
        losses, seen = head.loss(features, labels, lam, where=where, statistics=True)
        correct, cosine = seen.plain_logit > seen.max_logit, seen.target_cosine
    else:
        logits = head(features)
        losses, correct = loss(logits, labels), jnp.argmax(logits, axis=-1) == labels
        columns = head.kernel[...].T[labels].astype(features.dtype)
        cosine = jnp.sum(_unit(features) * _unit(columns), axis=-1)
    rows = (
        jnp.ones_like(losses),
        losses,
        correct,
        jnp.arccos(jnp.clip(cosine, -1, 1)),
        _norm(features, axis=-1),
    )
    return Sums(*(jnp.sum(row, where=where, dtype=jnp.float32) for row in rows))


def _norm(array: jax.Array, axis: int) -> jax.Array:
    return jnp.linalg.norm(array.astype(jnp.float32), axis=axis)


def _unit(array: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(array, axis=-1, keepdims=True)
    return array / jnp.where(norm > 0, norm, 1)


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the one axis "data".

    Args:
      devices: how many, the first ones; all by default. Under `jax.distributed` they are those of
        all processes, and each must have one in the mesh.

    Returns:
      the mesh; its axis is of Auto type.

    Raises:
      ValueError: there are fewer devices, or a process has none in the mesh.

    Example:
      >>> dict(data_mesh(1).shape)
      {'data': 1}
    """
    if devices is not None and not 1 <= devices <= jax.device_count():
        raise ValueError(f"devices must be 1 to {jax.device_count()}, got {devices}")
    chosen = jax.devices()[:devices]
    if len({device.process_index for device in chosen}) < jax.process_count():
        raise ValueError(
            f"devices must reach into all {jax.process_count()} processes, got {devices} "
            f"of {jax.device_count()}"
        )
    return jax.make_mesh((len(chosen),), (DATA_AXIS,), (AxisType.Auto,), devices=chosen)


def place(arrays: Any, mesh: Mesh, spec: P) -> Any:
    """A tree of host arrays on the devices of a mesh, which may be those of several processes.

    Args:
      arrays: the same in every process; each copies its own devices' parts and sends nothing.
      mesh: of any axes.
      spec: how each array is split, for all the same.

    Returns:
      The tree, each leaf a `jax.Array`.

    Raises:
      ValueError: an axis of an array does not divide over its part of the mesh.

    Example:
      >>> import numpy as np
      >>> from jax.sharding import PartitionSpec
      >>> place(np.arange(3), data_mesh(1), PartitionSpec("data")).shape
      (3,)
    """

    def one(array: NDArray) -> jax.Array:
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)

    return jax.tree.map(one, arrays)


def compile_step(step: Any, mesh: Mesh, *, donate: bool = True) -> Any:
    """`step` compiled for a mesh with a "data" axis, of Auto or Explicit type.

    Args:
      step: from `train_step` or `eval_step`.
      mesh: the state is replicated on it; images, labels and where are split along "data".
      donate: reuse the state's memory for the new one. For an `eval_step` pass False: its state
        is needed again.

    Returns:
      a function of the arguments of `step`, compiled when first called.

    Raises:
      ValueError: in calls, if the size of "data" does not divide the batch.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(model, optax.sgd(0.1))
      >>> evaluate = compile_step(eval_step(graphdef), data_mesh(1), donate=False)
      >>> float(evaluate(state, jnp.eye(3), jnp.array([0, 1, 0])).examples)
      3.0
    """
    replicated, rows = NamedSharding(mesh, P()), NamedSharding(mesh, P(DATA_AXIS))
    compiled = jax.jit(
        _with_auto_axes(step, mesh),
        in_shardings=(replicated, rows, rows, rows),
        out_shardings=replicated,
        donate_argnums=0 if donate else (),
    )

    def call(
        state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> Any:
        return compiled(state, images, labels, where)

    return call


def repeat(step: TrainStep, batch: Batch, mesh: Mesh, *, loop: bool | None = None) -> Any:
    """Many updates in one dispatch, on batches made on the device.

    Args:
      step: from `train_step`.
      batch: (step, data) -> (images, labels), pure: the rows of a step, augmented.
      mesh: has a "data" axis, of Auto or Explicit type; each batch is split along it.
      loop: compile one update in a loop, not ``length`` updates in a row; by default everywhere
        but on CPUs, where XLA makes the gradient of a convolution in a loop up to 50 times slower.

    Returns:
      ``many(state, data, length) -> (state, metrics)``, jitted with the length static and the state
      donated; metrics are `StepMetrics` with a leading axis of that length.

    Raises:
      TypeError, ValueError: when traced, as `lsoftmax_jax.lsoftmax_loss`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
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
    rows = P(DATA_AXIS) if _is_explicit(mesh) else NamedSharding(mesh, P(DATA_AXIS))
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

        return _with_auto_axes(updates, mesh)(state, data)

    replicated = NamedSharding(mesh, P())
    return jax.jit(
        many,
        in_shardings=(replicated, replicated),
        out_shardings=replicated,
        static_argnums=2,
        donate_argnums=0,
    )


def _is_explicit(mesh: Mesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def _with_auto_axes(function: Any, mesh: Mesh) -> Any:
    """Leaves the placement inside `function` to the compiler on an Explicit mesh too."""
    if not _is_explicit(mesh):
        return function
    return auto_axes(function, axes=mesh.axis_names, out_sharding=NamedSharding(mesh, P()))
