r"""Training and evaluation steps for any Flax NNX model that ends in a large-margin head.

The steps call the model as ``model(images) -> features`` and its head as ``model.head``. They are
pure functions of arrays: the same step runs under `jax.jit` on one device, under jit over a mesh
(`lsoftmax_jax.devices`), under `jax.pmap` and under `jax.vmap` over seeds::

    graphdef, state = create(model, optimizer)
    step = jax.jit(train_step(graphdef, optimizer, self_paced()))
    state, metrics = step(state, images, labels)

λ is a function of the batch or of ``state.step``, and Optax's learning rates are functions of the
step, so a restored state continues exactly. Batch normalisation spans the global batch on every
path: on a mesh because the step is written for the whole batch, under pmap by ``axis_name``.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lsoftmax_jax import _checks
from lsoftmax_jax.schedule import SelfPaced

Schedule = Callable[[jax.Array], jax.Array]
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class State(NamedTuple):
    """Everything that training changes, as one pytree of arrays.

    Attributes:
      step: number of updates made, int32 ().
      params: the trained parameters, a nested dict.
      other: the model's remaining arrays, such as batch statistics, a nested dict.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    params: dict[Any, Any]
    other: dict[Any, Any]
    opt_state: optax.OptState


class Sums(NamedTuple):
    """Sums over examples, float32 (). Add those of several batches or devices.

    Attributes:
      examples: number of examples.
      loss: sum of the losses.
      correct: number of examples whose label has the largest plain logit. It is margin-free: a
        margin logit is lower and would make training look worse than it is.
      target_angle: sum of the angles between feature and the label's kernel column, in radians.
      feature_norm: sum of the features' lengths.
    """

    examples: jax.Array
    loss: jax.Array
    correct: jax.Array
    target_angle: jax.Array
    feature_norm: jax.Array


class StepMetrics(NamedTuple):
    """`Sums` of one update over its global batch, λ, norms, and what went wrong.

    Attributes:
      sums: over the batch.
      lam: λ of this update, infinite for a loss without a margin.
      kernel_norm: mean length of the head's kernel columns before the update.
      grad_norm: length of the whole gradient.
      skipped: whether loss or gradient was not finite, so that nothing but the step changed.
      collapsing: whether the margin is shrinking the features to nothing: the logits are nearly
        0, the loss is that of guessing, and λ lets the margin in. A higher λ helps.
    """

    sums: Sums
    lam: jax.Array
    kernel_norm: jax.Array
    grad_norm: jax.Array
    skipped: jax.Array
    collapsing: jax.Array


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
    lam: Schedule | SelfPaced,
    *,
    loss: Loss | None = None,
    axis_name: str | None = None,
) -> TrainStep:
    r"""Builds the pure function that makes one update on the batch's mean loss.

    .. math:: p_{t+1} = p_t + U\left(\nabla_p \frac1B \sum_i \ell_i(p_t, \lambda_t)\right)

    with the optimizer's update U and the large-margin loss of the head. An update whose loss or
    gradient is not finite changes nothing but the step.

    Args:
      graphdef: the model's structure, from `create`.
      optimizer: an Optax transformation.
      lam: what `lsoftmax_jax.self_paced` returns, or a schedule step -> λ >= 0, such as
        `lsoftmax_jax.margin_schedule` returns. A λ below 0 is refused where it is known when the
        step is traced; where not, it is NaN, so that the update is skipped.
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
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax import self_paced
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> sgd = optax.sgd(0.1)
      >>> graphdef, state = create(model, sgd)
      >>> step = jax.jit(train_step(graphdef, sgd, self_paced()))
      >>> state, metrics = step(state, jnp.ones((4, 3)), jnp.array([0, 1, 1, 1]))
      >>> int(state.step), float(metrics.sums.examples), bool(metrics.skipped)
      (1, 4.0, False)
    """
    _check_graphdef(graphdef)
    _check_optimizer(optimizer)
    _check_loss(loss)
    if not isinstance(lam, SelfPaced) and not callable(lam):
        raise TypeError(f"lam must be a schedule step -> λ or self_paced(), got {lam!r}")

    def total(tree: Any) -> Any:
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    def step(
        state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> tuple[State, StepMetrics]:
        if isinstance(lam, SelfPaced):
            given: jax.Array | SelfPaced = lam
        else:
            given = _checks.check_scalar("lam", lam(state.step))
        where = _checks.check_mask(where, np.shape(labels))
        count = total(jnp.float32(len(images)) if where is None else jnp.sum(where, dtype=float))

        def mean_loss(params: Any) -> tuple[jax.Array, tuple[Any, Sums, jax.Array]]:
            model = nnx.merge(graphdef, params, state.other)
            model.train()
            model.set_attributes(nnx.BatchNorm, raise_if_not_found=False, axis_name=axis_name)
            features = model(images) if where is None else model(images, where=where)
            sums, used = _sums(_head_of(model), features, labels, given, where, loss)
            other = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
            return sums.loss / jnp.maximum(count, 1), (other, sums, used)

        grads, (other, sums, used) = jax.grad(mean_loss, has_aux=True)(state.params)
        grads, sums = total((grads, sums))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(dict[Any, Any], optax.apply_updates(state.params, updates))
        kernel = state.params["head"]["kernel"]
        grad_norm = optax.tree.norm(grads).astype(jnp.float32)
        finite = jnp.isfinite(sums.loss) & jnp.isfinite(grad_norm)
        new, old = (params, other, opt_state), (state.params, state.other, state.opt_state)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        kernel_norm = jnp.mean(_norm(kernel, axis=0))
        metrics = StepMetrics(
            sums=sums,
            lam=used,
            kernel_norm=kernel_norm,
            grad_norm=grad_norm,
            skipped=~finite,
            collapsing=_collapsing(sums, used, kernel_norm, kernel.shape[1]),
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
      loss: (plain logits, labels) -> per-example loss, in place of the cross-entropy.
      axis_name: the axis to sum over when the step runs under `jax.pmap` or `jax.shard_map`.

    Returns:
      ``step(state, images, labels, where=None) -> Sums``; padding rows of a last batch are left
      out by ``where`` (batch,).

    Raises:
      TypeError, ValueError: when the step is traced, as `lsoftmax_jax.lsoftmax_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> model = nnx.Sequential(nnx.relu)
      >>> model.head = LSoftmaxDense(3, 2, margin=4, rngs=nnx.Rngs(0))
      >>> graphdef, state = create(model, optax.sgd(0.1))
      >>> where = jnp.array([True, True, False])
      >>> sums = jax.jit(eval_step(graphdef))(state, jnp.eye(3), jnp.array([0, 1, 0]), where)
      >>> float(sums.examples), bool(sums.correct <= 2)
      (2.0, True)
    """

    _check_graphdef(graphdef)
    _check_loss(loss)

    def step(
        state: State, images: jax.Array, labels: jax.Array, where: jax.Array | None = None
    ) -> Sums:
        model = restore_model(graphdef, state)
        sums, _ = _sums(_head_of(model), model(images), labels, jnp.float32(jnp.inf), where, loss)
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

    _check_graphdef(graphdef)

    def step(state: State, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = restore_model(graphdef, state)
        features = model(images)
        return features, _head_of(model)(features)

    return step


def _head_of(model: Any) -> Any:
    if not hasattr(model, "head"):
        raise TypeError(
            f"model must have a large-margin head as its attribute `head`, such as "
            f"lsoftmax_jax.nnx.LSoftmaxDense; {type(model).__name__} has none"
        )
    return model.head


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


def _sums(
    head: Any,
    features: jax.Array,
    labels: jax.Array,
    lam: jax.Array | SelfPaced,
    where: jax.Array | None,
    loss: Loss | None,
) -> tuple[Sums, jax.Array]:
    """The sums over a batch, and its λ."""
    if loss is None:
        losses, seen = head.loss_and_statistics(features, labels, lam, where=where)
        correct, cosine = seen.plain_logit > seen.max_logit, seen.target_cosine
        used = jnp.mean(1 / (1 + seen.lam)).astype(jnp.float32)
    else:
        used = jnp.float32(jnp.inf)
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
    return Sums(*(jnp.sum(row, where=where, dtype=jnp.float32) for row in rows)), used


def _collapsing(sums: Sums, lam: jax.Array, kernel_norm: jax.Array, classes: int) -> jax.Array:
    count = jnp.maximum(sums.examples, 1)
    guessing = sums.loss / count > 0.98 * math.log(classes)
    # Logits below a tenth move no probability by much; at the start features are longer.
    vanishing = sums.feature_norm / count * kernel_norm < 0.1
    return guessing & vanishing & (1 / (1 + lam) > 0.01)


def _norm(array: jax.Array, axis: int) -> jax.Array:
    return jnp.linalg.norm(array.astype(jnp.float32), axis=axis)


def _unit(array: jax.Array) -> jax.Array:
    norm = jnp.linalg.norm(array, axis=-1, keepdims=True)
    return array / jnp.where(norm > 0, norm, 1)
