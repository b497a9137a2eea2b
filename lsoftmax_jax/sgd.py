"""A step of the head with its SGD update inside, so that the kernel's gradient never exists."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import arguments
from lsoftmax_jax.algebra import (
    Columns,
    Plan,
    Statistics,
    block_gradients,
    gradient_row,
    loss_and_z,
    statistics_of,
    summarise,
)
from lsoftmax_jax.logits import along_columns, along_rows, column_sums, target_of
from lsoftmax_jax.loss import Call, check_weights


class SgdStep(NamedTuple):
    """What a step of `lsoftmax_sgd` gives back.

    Attributes:
      loss: scalar, the weighted sum of the losses before the update.
      dfeatures: its gradient, for the backward pass of the rest of the model.
      kernel: after the update.
      momentum: after the update.
      statistics: of each example before the update; `plain_logit > max_logit` is the margin-free
        hit. At no cost where it is not used.
    """

    loss: jax.Array
    dfeatures: jax.Array
    kernel: jax.Array
    momentum: jax.Array
    statistics: Statistics


def lsoftmax_sgd(
    features: ArrayLike,
    kernel: jax.Array,
    momentum: jax.Array,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int,
    learning_rate: ArrayLike,
    decay: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    lam: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    class_block: int = 4096,
) -> SgdStep:
    r"""Loss, gradient of the features, and the kernel after one step of SGD with momentum.

    .. math::
        v \leftarrow \mu v + \partial L / \partial W + \omega W, \qquad W \leftarrow W - \eta v,
        \qquad L = \sum_i s_i \ell_i

    the update of `optax.chain(optax.add_decayed_weights(ω), optax.sgd(η, momentum=μ))`. The
    kernel's gradient is made and used up `class_block` classes at a time: beside the arguments a
    step needs about 8 batch x class_block bytes and not the D x classes of a gradient. Donate
    `kernel` and `momentum` to the jitted step and they are updated in place.

    Not to be differentiated: chain `dfeatures` into the rest of the model by `jax.vjp`.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes).
      momentum: v, as `kernel`; zeros at the start.
      labels: (...,) integers in [0, classes). An unmasked label outside makes loss, kernel and
        momentum NaN.
      weights: (...,) floating-point weights s, or None for ones.
      margin: integer m >= 1, static.
      learning_rate: η, may be traced.
      decay: μ, the momentum's decay, may be traced.
      weight_decay: ω, may be traced.
      lam, where, label_smoothing: as in `lsoftmax_jax.lsoftmax_loss`.
      class_block: classes at a time.

    Returns:
      `SgdStep`; kernel and momentum in their own dtypes, the update computed in float32 or better.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> step = lsm.lsoftmax_sgd(
      ...     features, kernel, jnp.zeros_like(kernel), labels, jnp.full(2, 0.5),
      ...     margin=4, learning_rate=0.1)
      >>> step.loss.round(3).item(), step.dfeatures.shape, step.kernel.shape
      (3.832..., (2, 3), (3, 3))

    Source: Liu et al., ICML 2016.
    """
    call = Call.checked(features, kernel, labels, margin, lam, where, label_smoothing)
    weights = call.mask(check_weights(weights, call.head.batch_shape, call.lam.dtype))
    kernel, momentum = jnp.asarray(kernel), jnp.asarray(momentum)
    if momentum.shape != kernel.shape:
        raise ValueError(
            f"momentum must have the kernel's shape {kernel.shape}, got {momentum.shape}"
        )
    if not jnp.issubdtype(momentum.dtype, jnp.floating):
        raise TypeError(f"momentum must be floating point, got dtype {momentum.dtype}")
    block = min(arguments.check_size("class_block", class_block), kernel.shape[1])
    setting = call.setting(Plan(class_block=block, keep_exponentials=False))
    eta = _rate("learning_rate", learning_rate, call.lam.dtype)
    mu = _rate("decay", decay, call.lam.dtype)
    omega = _rate("weight_decay", weight_decay, call.lam.dtype)

    features, operand, labels, _ = call.head
    t = target_of(features, operand, labels, call.lam, call.margin)
    others, _ = summarise(setting, features, Columns(operand), labels)
    loss, z = loss_and_z(setting, t, others)
    weights = weights.reshape(labels.shape)
    row = gradient_row(setting, t, z, weights, features.dtype)
    sums = column_sums(row.target.column, labels, kernel.shape[1])

    def update(start: Any, width: int, carry: Any) -> Any:
        # Reads from the carry, and in this order, or XLA copies kernel and momentum in the loop:
        # features' gradient, momentum, kernel.
        dfeatures, kernel, momentum = carry
        columns = _block(kernel, start, width)
        change, gradient = block_gradients(
            features, Columns(columns.astype(features.dtype)), labels - start, row, None
        )
        decayed = jax.lax.dynamic_slice_in_dim(sums, start, width) + omega
        gradient = gradient + along_columns(decayed, columns)
        velocity = mu * _block(momentum, start, width).astype(mu.dtype) + gradient
        momentum = _with_block(momentum, velocity, start)
        velocity = _block(momentum, start, width).astype(eta.dtype)
        changed = _block(kernel, start, width).astype(eta.dtype) - eta * velocity
        return dfeatures + change, _with_block(kernel, changed, start), momentum

    carry = along_rows(row.target.row, features), kernel, momentum
    count = kernel.shape[1] // block
    carry = jax.lax.fori_loop(0, count, lambda j, carry: update(j * block, block, carry), carry)
    if tail := kernel.shape[1] - count * block:
        carry = update(count * block, tail, carry)
    dfeatures, kernel, momentum = carry
    dfeatures = dfeatures.astype(features.dtype).reshape(*call.head.batch_shape, features.shape[1])
    seen = jax.tree.map(
        lambda value: value.reshape(call.head.batch_shape), statistics_of(t, others)
    )
    return SgdStep(jnp.sum(weights * loss), dfeatures, kernel, momentum, seen)


def _rate(name: str, value: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    rate = jnp.asarray(value)
    if rate.shape != () or not jnp.isrealobj(rate):
        raise ValueError(f"{name} must be a real scalar, got {value!r}")
    return rate.astype(dtype)


def _block(array: jax.Array, start: Any, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, width, axis=1)


def _with_block(array: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, block.astype(array.dtype), start, axis=1)
