r"""Training and evaluation steps for any Flax NNX model that ends in a large-margin head.

The steps call the model as ``model(images) -> features`` and its head as ``model.head``. The steps
are pure functions of arrays: the same step runs under `jax.jit` on one device, under jit over a
mesh (`lsoftmax_jax.devices`), under `jax.pmap`, under `jax.shard_map`, and under `jax.vmap` over
seeds::

    graphdef, state = create(model, optimizer)
    step = jax.jit(train_step(graphdef, optimizer))
    state, metrics = step(state, images, labels)

λ is a function of the example or of ``state.step``, and Optax's learning rates are functions of the
step, so a restored state continues exactly. Batch normalisation spans the global batch on every
path: on a mesh because the step is written for the whole batch, under pmap and shard_map by
``axis_name``.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lsoftmax_jax import _checks
from lsoftmax_jax._core.mesh import anywhere, vary_over, varying_axes
from lsoftmax_jax._core.tiles import sum_over_rows
from lsoftmax_jax.margins import check_margin, value_and_slope
from lsoftmax_jax.schedule import SelfPaced, self_paced

Schedule = Callable[[jax.Array], jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]

# Below this share the loss is plain softmax but for a hundredth of the margin.
IDLE_SHARE = 0.01


class State(NamedTuple):
    """Everything that training changes, as one pytree of arrays.

    Attributes:
      step: number of calls of the step, int32 (): skipped updates count, and so does each call
        under `optax.MultiSteps`.
      params: the trained parameters, a nested dict.
      other: the model's remaining arrays, such as batch statistics, a nested dict.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    params: dict[Any, Any]
    other: dict[Any, Any]
    opt_state: optax.OptState


class Sums(NamedTuple):
    """Sums over the examples that count, float32 (). Add those of several batches or devices.

    Attributes:
      examples: number of examples.
      loss: sum of the losses.
      correct: number of examples whose label has the largest plain logit. It is margin-free: a
        margin logit is lower and would make training look worse than it is.
      target_angle: sum of the angles between feature and the label's kernel column, in radians.
      feature_norm: sum of the features' lengths.
      share: sum of the shares 1 / (1 + λ) of the margin; 0 for m = 1, `NormFace` and `loss`.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array
    target_angle: jax.Array
    feature_norm: jax.Array
    share: jax.Array


class StepMetrics(NamedTuple):
    """`Sums` of one update over its global batch, norms, and what went wrong.

    Attributes:
      sums: over the batch.
      share: mean share 1 / (1 + λ) of the margin, in [0, 1]; 0 for m = 1, `NormFace` and `loss`.
      kernel_norm: mean length of the kernel columns of the real classes, before the update.
      grad_norm: length of the whole gradient, float32, or float64 for float64 parameters.
      skipped: whether the update was not finite, so that nothing but the step changed.
      margin_idle: whether the head has a margin that takes no part: share is below 0.01. Normal
        while λ starts high; at the end of training a sign that λ should fall faster or further.
      collapsing: whether the margin takes part and is shrinking the features to nothing: the
        logits are nearly 0, and the loss is that of guessing. With a scale, where length counts for
        nothing: whether the features turn away, on average over 120 degrees from the columns of
        their labels. A higher λ helps in both cases.
    """

    sums: Sums
    share: jax.Array
    kernel_norm: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    margin_idle: jax.Array
    collapsing: jax.Array


class TrainStep(Protocol):
    """(state, images, labels, where) -> (new state, metrics)."""

    def __call__(
        self, state: State, images: Any, labels: jax.Array, where: jax.Array | None = None
    ) -> tuple[State, StepMetrics]: ...


class EvalStep(Protocol):
    """(state, images, labels, where) -> sums."""

    def __call__(
        self, state: State, images: Any, labels: jax.Array, where: jax.Array | None = None
    ) -> Sums: ...


def create(
    model: nnx.Module, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef[Any], State]:
    """The model's structure, and copies of its arrays with a fresh optimizer state as a `State`.

    Args:
      model: any NNX module; the steps call it as ``model(images)`` and use its ``head``. It stays
        as it is, and stays usable after a step that reuses the state's memory.
      optimizer: an Optax transformation.

    Returns:
      (graphdef, state): the structure, static, and step 0 of all arrays. Intermediates that the
      model has sown are left out.

    Raises:
      TypeError: `model` is no NNX module, or `optimizer` no Optax transformation.

    Example:
      >>> import optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> head = LSoftmaxDense(8, 10, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(head, optax.sgd(0.1))
      >>> state.params["kernel"].shape
      (8, 10)
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {model!r:.80}")
    _check_optimizer(optimizer)
    model = nnx.clone(model)
    nnx.pop(model, nnx.Intermediate)
    graphdef, *states = nnx.split(model, nnx.Param, ...)
    params, other = (jax.tree.map(jnp.copy, nnx.to_pure_dict(part)) for part in states)
    state = State(jnp.zeros((), jnp.int32), params, other, optimizer.init(params))
    return graphdef, _unaliased(state)


def _unaliased(state: State) -> State:
    """The state with a copy of every array that it holds twice.

    Some of Optax's transformations keep the parameters themselves in their state, and one buffer
    cannot be donated twice.

    Args:
      state: of any step.

    Returns:
      the state; arrays that it holds once are the same objects.

    Example:
      >>> import optax
      >>> ones = jnp.ones(2)
      >>> state = _unaliased(State(jnp.int32(0), {"kernel": ones}, {}, (ones,)))
      >>> state.params["kernel"] is ones, state.opt_state[0] is ones
      (True, False)
    """
    leaves, structure = jax.tree.flatten(state)
    if len(set(map(id, leaves))) == len(leaves):
        return state
    seen: set[int] = set()
    for i, leaf in enumerate(leaves):
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            leaves[i] = jnp.copy(leaf)
        seen.add(id(leaf))
    return cast(State, jax.tree.unflatten(structure, leaves))


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
    _check_state(state)
    model = nnx.merge(graphdef, state.params, state.other)
    model.eval()
    return model


def train_step(
    graphdef: nnx.GraphDef[Any],
    optimizer: optax.GradientTransformation,
    lam: Schedule | SelfPaced | None = None,
    *,
    loss: Loss | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    r"""Builds the pure function that makes one update on the batch's mean loss.

    .. math:: p_{t+1} = p_t + U\left(\nabla_p \frac1N \sum_i \ell_i(p_t, \lambda_t)\right)

    with the optimizer's update U, the large-margin loss of the head, and the number N of labels
    that count. An update changes nothing but the step if its loss or its gradient is not finite,
    or if a finite number of the state would become infinite or NaN.

    Args:
      graphdef: the model's structure, from `create`.
      optimizer: the Optax transformation that `create` was given. A transformation that wants
        `value` gets the mean loss.
      lam: a schedule step -> λ >= 0, such as `lsoftmax_jax.margin_schedule` returns, or what
        `lsoftmax_jax.self_paced` returns; None is the head's own rule. A λ below 0 is refused where
        it is known when the step is traced; where not, it is NaN, so that the update is skipped.
      loss: (plain logits, labels) -> floating-point losses of the shape of labels, in place of the
        head's large-margin loss. For label smoothing, weights or a second loss write the step
        yourself, with `jax.value_and_grad` of the head's loss.
      axis_name: the axis over which the batch is split when the step runs under `jax.pmap` or
        `jax.shard_map`, and the state is the same on every device. The new state and the metrics
        are then those of the global batch, the same on every device. Random streams of the model,
        such as dropout's, differ between devices. Batch statistics span the axis; other
        floating-point variables that the model changes are averaged over it.

    Returns:
      ``step(state, images, labels, where=None) -> (state, StepMetrics)``. The step calls
      ``model.train()`` and ``model(images)``. ``images`` may be any pytree. ``where``, of the shape
      of labels, marks the labels that count. Floating-point padding may hold anything: in each
      floating-point array of ``images`` whose first axes are those of ``where``, the model sees
      zeros there. The call is then ``model(images, where=where)``, so that batch statistics can
      leave the padding out too. (Under ``axis_name`` Flax averages the devices' statistics with
      equal weight, exact where each has as many real rows.)

    Raises:
      TypeError, ValueError: an argument here has the wrong type. When the step is traced: as
        `lsoftmax_jax.lsoftmax_loss`; the model has no large-margin head; `state` is no `State`,
        was donated, or belongs to another optimizer; `loss` does not give one number an example;
        `optimizer` wants more than `value`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> sgd = optax.sgd(0.1)
      >>> graphdef, state = create(model, sgd)
      >>> step = jax.jit(train_step(graphdef, sgd))
      >>> state, metrics = step(state, jnp.ones((4, 3)), jnp.array([0, 1, 1, 1]))
      >>> int(state.step), float(metrics.sums.examples), bool(metrics.skipped)
      (1, 4.0, False)
    """
    _check_graphdef(graphdef)
    _check_optimizer(optimizer)
    _check_loss(loss)
    if cast(Any, lam) is self_paced or not (
        lam is None or isinstance(lam, SelfPaced) or callable(lam)
    ):
        raise TypeError(f"lam must be a schedule step -> λ, self_paced() or None, got {lam!r}")

    def total(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def step(
        state: State, images: Any, labels: jax.Array, where: jax.Array | None = None
    ) -> tuple[State, StepMetrics]:
        _check_state(state)
        _check_opt_state(optimizer, state)
        shape = _checks.shape_of("labels", labels, "integers")
        where = _checks.check_mask(where, shape)
        images = _cleared(images, where)
        count = (
            jnp.float32(math.prod(shape)) if where is None else jnp.sum(where, dtype=jnp.float32)
        )
        count = jnp.maximum(total(count), 1)
        given: Any = lam
        if lam is not None and not isinstance(lam, SelfPaced):
            given = _checks.check_scalar("lam", lam(state.step))

        def mean_loss(params: Any) -> tuple[jax.Array, tuple[Any, Sums]]:
            model = nnx.merge(graphdef, params, state.other)
            model.train()
            _normalise_over(model, axis_name)
            with _stream_of_device(model, axis_name):
                features = _called(model, images, where)
            losses, sums = _losses(_head_of(model), features, labels, given, where, loss)
            other = _like(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))), state.other)
            return jnp.sum(losses) / count.astype(losses.dtype), (other, sums)

        params = _of_each_device(state.params, axis_name)
        grads, (other, sums) = jax.grad(mean_loss, has_aux=True)(params)
        grads, sums = total((grads, sums))
        other = _averaged(other, axis_name)
        params, opt_state = _updated(optimizer, state, grads, sums.loss / count)

        new, old = (params, other, opt_state), (state.params, state.other, state.opt_state)
        finite = _uncopied(jnp.isfinite(sums.loss) & _all_finite(grads) & _stays_finite(new, old))
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        head = _head_of(nnx.merge(graphdef, state.params, state.other))
        kernel_norm, share = _kernel_norm(head), sums.share / count
        metrics = StepMetrics(
            sums=sums,
            share=share,
            kernel_norm=kernel_norm,
            grad_norm=optax.tree.norm(jax.tree.map(_widened, grads)),
            skipped=~finite,
            margin_idle=(share < IDLE_SHARE) & (loss is None and _has_margin(head)),
            collapsing=_collapsing(head, sums, kernel_norm),
        )
        return State(state.step + 1, *kept), metrics

    return step


def eval_step(
    graphdef: nnx.GraphDef[Any], *, loss: Loss | None = None, axis_name: str | None = None
) -> EvalStep:
    """Builds the pure function that evaluates a batch without a margin.

    The loss is the plain softmax cross-entropy (the head's loss at λ = infinity).

    Args:
      graphdef: the model's structure, from `create`.
      loss: (plain logits, labels) -> floating-point losses of the shape of labels, in place of the
        cross-entropy.
      axis_name: the axis to sum over when the step runs under `jax.pmap` or `jax.shard_map`.

    Returns:
      ``step(state, images, labels, where=None) -> Sums``; ``where``, of the shape of labels, marks
      the labels that count. The model gets ``where`` and zeros for floating-point padding, as in
      `train_step`.

    Raises:
      TypeError, ValueError: as `train_step`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.head = LSoftmaxDense(3, 2, margin=4, rngs=rngs)
      ...     def __call__(self, images, where=None):
      ...         return nnx.relu(images)
      >>> graphdef, state = create(Model(nnx.Rngs(0)), optax.sgd(0.1))
      >>> where = jnp.array([True, True, False])
      >>> sums = jax.jit(eval_step(graphdef))(state, jnp.eye(3), jnp.array([0, 1, 0]), where)
      >>> float(sums.examples), bool(sums.correct <= 2)
      (2.0, True)
    """

    _check_graphdef(graphdef)
    _check_loss(loss)

    def step(state: State, images: Any, labels: jax.Array, where: jax.Array | None = None) -> Sums:
        where = _checks.check_mask(where, _checks.shape_of("labels", labels, "integers"))
        model = restore_model(graphdef, state)
        features = _called(model, _cleared(images, where), where)
        _, sums = _losses(_head_of(model), features, labels, jnp.inf, where, loss)
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return step


def embed_step(
    graphdef: nnx.GraphDef[Any],
) -> Callable[[State, Any], tuple[jax.Array, jax.Array]]:
    """Builds the pure function that gives a batch's features, the network at inference.

    Args:
      graphdef: the model's structure, from `create`.

    Returns:
      ``step(state, images) -> (features, plain logits)``, of shapes (batch, D) and
      (batch, classes). `jax.jit` compiles it, on a mesh too.

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

    _check_graphdef(graphdef)

    def step(state: State, images: Any) -> tuple[jax.Array, jax.Array]:
        model = restore_model(graphdef, state)
        features = model(images)
        return features, _head_of(model)(features)

    return step


# What a caller may pass.


def _check_state(state: Any) -> None:
    """Raises where `state` is no `State`, or was given to a step that reused its memory."""
    if not isinstance(state, State):
        raise TypeError(f"state must be a State, as `create` makes it, got {type(state).__name__}")
    if not any(map(_is_deleted, jax.tree.leaves(state))):
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if _is_deleted(leaf):
            raise ValueError(
                f"state must be alive, got a deleted state{jax.tree_util.keystr(path)}: a step "
                f"that donates its state reuses the memory; go on with the state it returned"
            )


def _is_deleted(leaf: Any) -> bool:
    return (
        not isinstance(leaf, jax.core.Tracer) and isinstance(leaf, jax.Array) and leaf.is_deleted()
    )


def _check_opt_state(optimizer: optax.GradientTransformation, state: State) -> None:
    expected = jax.eval_shape(optimizer.init, state.params)
    wanted, got = (cast(Any, jax.tree.flatten(tree)) for tree in (expected, state.opt_state))
    if wanted[1] != got[1] or [*map(np.shape, wanted[0])] != [*map(np.shape, got[0])]:
        raise ValueError(
            f"state.opt_state must be a state of this optimizer for these parameters, expected "
            f"{wanted[1]}, got {got[1]}: give `create` and `train_step` the same optimizer, or "
            f"take optimizer.init(state.params)"
        )


def _check_graphdef(graphdef: Any) -> None:
    if not isinstance(graphdef, nnx.GraphDef):
        raise TypeError(
            f"graphdef must be the structure that `create` gives, got {type(graphdef).__name__}"
        )


def _check_optimizer(optimizer: Any) -> None:
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"optimizer must be an Optax transformation, got {optimizer!r}")


def _check_loss(loss: Any) -> None:
    if loss is not None and not callable(loss):
        raise TypeError(f"loss must be a function (logits, labels) -> losses, got {loss!r}")


def _check_losses(losses: Any, shape: tuple[int, ...]) -> jax.Array:
    expected = f"one floating-point number an example, shape {shape}"
    if not isinstance(losses, jax.Array | np.ndarray):
        raise TypeError(f"loss must give {expected}, got {type(losses).__name__}")
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"loss must give {expected}, got dtype {losses.dtype}")
    if losses.shape != shape:
        raise ValueError(f"loss must give {expected}, got shape {losses.shape}")
    return jnp.asarray(losses)


def _cleared(images: Any, where: jax.Array | None) -> Any:
    """The images with zeros for padding, whose NaN would reach the gradient of a layer's weights.

    An array whose first axes are not those of `where` stays as it is.
    """
    if where is None:
        return images

    def cleared(array: Any) -> jax.Array:
        array = jnp.asarray(array)
        if not jnp.issubdtype(array.dtype, jnp.inexact) or array.shape[: where.ndim] != where.shape:
            return array
        mask = jnp.expand_dims(where, tuple(range(where.ndim, array.ndim)))
        return jnp.where(mask, array, jnp.zeros_like(array))

    return jax.tree.map(cleared, images)


# What devices share under `axis_name`.


def _of_each_device(params: Any, axis_name: str | None) -> Any:
    """The parameters, marked so that their gradient is each device's own on every kind of axis.

    With check_vma, `jax.shard_map` would sum the gradient of replicated parameters by itself, and
    `jax.pmap` would not.
    """
    if axis_name is None:
        return params
    tracked = varying_axes(jax.lax.axis_index(axis_name))  # none where JAX tracks no axes
    return jax.tree.map(lambda array: vary_over(array, tracked), params)


@contextmanager
def _stream_of_device(model: Any, axis_name: str | None) -> Iterator[None]:
    """Gives each device its own random streams, and the model its replicated keys back."""
    if axis_name is None:
        yield
        return
    index, keys = jax.lax.axis_index(axis_name), nnx.to_pure_dict(nnx.state(model, nnx.RngKey))

    def own(key: jax.Array) -> jax.Array:
        folded = jax.vmap(jax.random.fold_in, (0, None))(key.reshape(-1), index)
        return folded.reshape(key.shape)

    nnx.update(model, jax.tree.map(own, keys))
    yield
    nnx.update(model, keys)


def _averaged(tree: Any, axis_name: str | None) -> Any:
    if axis_name is None:
        return tree

    def averaged(array: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(array.dtype, jnp.inexact)
        return jax.lax.pmean(array, axis_name) if floating else array

    return jax.tree.map(averaged, tree)


# The model and its head.


def _called(model: Any, images: Any, where: jax.Array | None) -> Any:
    """The features."""
    if where is None:
        return model(images)
    try:
        return model(images, where=where)
    except TypeError as error:
        if "unexpected keyword argument 'where'" not in str(error):
            raise
        raise TypeError(
            f"model must take `where`, which may change what it computes, as in "
            f"def __call__(self, images, where=None): {error}"
        ) from error


def _normalise_over(model: Any, axis_name: str | None) -> None:
    """Makes batch normalisation span the axis; on None it keeps what the model has."""
    if axis_name is None:
        return
    for _, module in nnx.iter_graph(model):
        if isinstance(module, nnx.BatchNorm):
            if module.axis_name not in (None, axis_name):
                # jax.lax.pmean takes no axis of vmap together with one of shard_map.
                raise ValueError(
                    f"axis_name must be the axis of the model's batch normalisation, "
                    f"{module.axis_name!r}, got {axis_name!r}: train on a mesh, by compile_step"
                )
            module.axis_name = axis_name


def _like(new: dict[Any, Any], old: dict[Any, Any]) -> dict[Any, Any]:
    """The variables of `new` that `old` has, without those that a call has sown."""
    for name, value in old.items():
        if (name not in new) or (value is None) != (new[name] is None):
            raise TypeError(
                f"model must keep its variable {name!r} from `create` on: make it in __init__"
            )
    return {
        name: _like(new[name], value) if isinstance(value, dict) else new[name]
        for name, value in old.items()
    }


def _head_of(model: Any) -> Any:
    head = getattr(model, "head", None)
    wanted = "loss_and_statistics", "kernel", "classes", "margin"
    if not all(hasattr(head, name) for name in wanted):
        got = "none" if head is None else f"a {type(head).__name__}"
        raise TypeError(
            f"model must have a large-margin head as its attribute `head`, such as "
            f"lsoftmax_jax.nnx.LSoftmaxDense, with {', '.join(wanted)}; {type(model).__name__} has "
            f"{got}"
        )
    return head


def _has_margin(head: Any) -> bool:
    """Whether the margin changes a target's cosine, which 1, NormFace or ArcFace(0) does not."""
    with jax.ensure_compile_time_eval():
        cosines = jnp.linspace(-1, 1, 33, dtype=jnp.float32)
        values, _ = value_and_slope(check_margin(head.margin), cosines)
        return not np.allclose(values, cosines, atol=1e-6)


def _kernel_norm(head: Any) -> jax.Array:
    """Mean length of the columns of the real classes."""

    def mean(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        norms = jnp.sqrt(sum_over_rows(*arrays, jnp.dtype(jnp.float32)))
        return jnp.sum(norms, where=jnp.arange(norms.size) < head.classes) / head.classes

    kernel = head.kernel[...]
    return cast(jax.Array, anywhere(mean, "scalar", (kernel, kernel)))


def _losses(
    head: Any,
    features: jax.Array,
    labels: jax.Array,
    lam: Any,
    where: jax.Array | None,
    loss: Loss | None,
) -> tuple[jax.Array, Sums]:
    """The loss of each example, 0 where it does not count, and the sums over the others."""
    if loss is None:
        losses, seen = head.loss_and_statistics(features, labels, lam, where=where)
        share = 1 / (1 + seen.lam) if _has_margin(head) else jnp.zeros(())
    else:
        labels = _checks.check_labels(labels, features.shape[:-1], head.classes)
        labels = _checks.known_labels(labels, head.classes)
        if where is not None:
            features = jnp.where(where[..., None], features, jnp.zeros_like(features))
            labels = jnp.where(where, labels, 0)
        losses = _check_losses(loss(head(features), labels), labels.shape)
        losses = _checks.nan_unless(labels >= 0, _widened(losses))
        if where is not None:
            losses = jnp.where(where, losses, 0)
        _, seen = head.loss_and_statistics(features, labels, jnp.inf, where=where)
        share = jnp.zeros(())
    rows = (
        jnp.ones_like(losses),
        losses,
        seen.plain_logit > seen.max_logit,
        jnp.arccos(jnp.clip(seen.target_cosine, -1, 1)),
        jnp.linalg.norm(_widened(features), axis=-1),
        jnp.broadcast_to(share, losses.shape),
    )
    return losses, Sums(*(jnp.sum(row, where=where, dtype=jnp.float32) for row in rows))


def _collapsing(head: Any, sums: Sums, kernel_norm: jax.Array) -> jax.Array:
    margin, count = check_margin(head.margin), jnp.maximum(sums.examples, 1)
    takes_part = sums.share / count > IDLE_SHARE
    if margin.scale is not None:
        # At the start the angles are near 90 degrees. ArcFace's slope is 0 at 180 degrees less m.
        return takes_part & (sums.target_angle / count > 2 * math.pi / 3)
    # The largest logit of a feature of length 1.
    per_length = jnp.ones(()) if margin.unit_columns else kernel_norm
    guessing = sums.loss / count > 0.98 * math.log(head.classes)
    # Logits below a tenth move no probability by much; at the start features are longer.
    vanishing = sums.feature_norm / count * per_length < 0.1
    return takes_part & guessing & vanishing


# The update.


def _updated(
    optimizer: optax.GradientTransformation, state: State, grads: Any, value: jax.Array
) -> tuple[dict[Any, Any], optax.OptState]:
    wanted = inspect.signature(optimizer.update).parameters
    takes_value = "value" in wanted or any(w.kind is w.VAR_KEYWORD for w in wanted.values())
    extra = {"value": value} if takes_value else {}
    try:
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
    except (AttributeError, TypeError) as error:
        # optax.lookahead wants parameters with the attribute `fast`.
        lookahead = isinstance(error, AttributeError) and error.name == "fast"
        if not lookahead and "required keyword-only argument" not in str(error):
            raise
        raise TypeError(
            f"optimizer must want no more than the gradient, parameters and `value`: {error}"
        ) from error
    return cast(dict[Any, Any], optax.apply_updates(state.params, updates)), opt_state


def _all_finite(tree: Any) -> jax.Array:
    return _all(jnp.isfinite(array) for array in jax.tree.leaves(tree))


def _stays_finite(new: Any, old: Any) -> jax.Array:
    """Whether every finite number stays finite; some optimizers start at infinity."""
    pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    return _all(
        jnp.isfinite(after) | ~jnp.isfinite(before)
        for after, before in pairs
        if jnp.issubdtype(after.dtype, jnp.inexact)
    )


def _all(conditions: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.logical_and, map(jnp.all, conditions), jnp.bool_(True))


def _uncopied(condition: jax.Array) -> jax.Array:
    """The condition as a number that XLA computes once.

    XLA copies a cheap scalar into every fusion that reads it, here the condition of all arrays into
    the update of each: compiling 100 layers with Adam took 39 s of a CPU, and 9 s with a root. XLA
    does not copy a square root.
    """
    return jnp.sqrt(condition.astype(jnp.float32)) > 0


def _widened(array: jax.Array) -> jax.Array:
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return array
    return array.astype(_checks.at_least_f32(array.dtype))
