"""A step of the head with its SGD update inside, so that the kernel's gradient never exists."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._fused import Statistics, logit_gradient, loss_of, paced_target, statistics_of
from lsoftmax_jax._pace import SelfPaced
from lsoftmax_jax._plans import Pieces, block_gradients, summarise, zeros_like_rows
from lsoftmax_jax._tiles import as_stored
from lsoftmax_jax.logits import (
    Columns,
    columns_of,
    finished_columns,
    finished_features,
    label_sums,
    label_terms,
    rows_of,
)
from lsoftmax_jax.loss import Call
from lsoftmax_jax.margins import Margin


class SgdStep(NamedTuple):
    """What a step of `lsoftmax_sgd` gives back.

    Attributes:
      loss: scalar, the weighted sum of the losses before the update.
      dfeatures: its gradient, for the backward pass of the rest of the model.
      kernel: after the update.
      momentum: after the update.
      statistics: of each example before the update; `plain_logit > max_logit` is the margin-free
        classification. It costs nothing if it is not used.
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
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    learning_rate: ArrayLike,
    decay: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    class_block: int = 4096,
) -> SgdStep:
    r"""Loss, gradient of the features, and the kernel after one step of SGD with momentum.

    .. math::
        v \leftarrow \mu v + \partial L / \partial W + \omega W, \qquad W \leftarrow W - \eta v,
        \qquad L = \sum_i s_i \ell_i

    This is the update of `optax.chain(optax.add_decayed_weights(ω), optax.sgd(η, momentum=μ))`. The
    kernel's gradient is computed and used `class_block` classes at a time. Besides its arguments a
    step needs about 8 batch x class_block bytes, and no gradient of D x classes numbers. Donate
    `kernel` and `momentum` to the jitted step to update them in place.

    Do not differentiate it: chain `dfeatures` into the rest of the model by `jax.vjp`.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes).
      momentum: v, as `kernel`; zeros at the start.
      labels: (...,) integers in [0, classes). An unmasked label outside makes loss, kernel and
        momentum NaN.
      weights: (...,) floating-point weights s, or None for ones.
      margin: integer m >= 1, static, or one of `lsoftmax_jax.margins`.
      learning_rate: η >= 0, may be traced.
      decay: μ in [0, 1], the momentum's decay, may be traced.
      weight_decay: ω >= 0, may be traced.
      lam, scale, where, label_smoothing: as in `lsoftmax_jax.lsoftmax_loss`.
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
      ...     margin=4, lam=5.0, learning_rate=0.1)
      >>> step.loss.round(3).item(), step.dfeatures.shape, step.kernel.shape
      (1.473..., (2, 3), (3, 3))
    """
    call = Call.checked(features, kernel, labels, margin, lam, scale, where, label_smoothing)
    weights = _checks.check_weights(weights, call.operands.batch_shape, call.lam.dtype)
    weights = call.mask(weights).reshape(call.operands.labels.shape)
    kernel = jnp.asarray(kernel)
    momentum = _checks.as_array("momentum", momentum, "an array like kernel")
    if momentum.shape != kernel.shape:
        raise ValueError(
            f"momentum must have the kernel's shape {kernel.shape}, got {momentum.shape}"
        )
    if not jnp.issubdtype(momentum.dtype, jnp.floating):
        raise TypeError(f"momentum must be floating point, got dtype {momentum.dtype}")
    block = min(_checks.check_size("class_block", class_block), kernel.shape[1])
    pieces = Pieces(class_block=block, keep_exponentials=False)
    eta = _checks.check_scalar("learning_rate", learning_rate, call.lam.dtype)
    mu = _checks.check_scalar("decay", decay, call.lam.dtype, most=1)
    omega = _checks.check_scalar("weight_decay", weight_decay, call.lam.dtype)

    features, operand, labels, batch_shape = call.operands
    head = call.setting.head
    rows, columns = rows_of(head, features, labels), columns_of(head, operand)
    others, _ = summarise(call.setting, pieces, rows, columns)
    t, lam = paced_target(call.setting, label_terms(head, rows, operand), others, call.lam, weights)
    gradient = logit_gradient(call.setting, t, others, weights, features.dtype)
    sums = label_sums(gradient.target.along_column, labels, kernel.shape[1])

    def update(start: Any, width: int, carry: Any) -> Any:
        # Reads from the carry, and in this order, or XLA copies kernel and momentum in the loop:
        # features' gradient, momentum, kernel.
        dfeatures, kernel, momentum = carry
        kernel, momentum = as_stored(kernel), as_stored(momentum)
        own = _block(kernel, start, width)
        inverse = columns.inverse_norm
        if inverse is not None:
            inverse = jax.lax.dynamic_slice_in_dim(inverse, start, width)
        columns_here = Columns(own.astype(features.dtype), None, inverse)
        shifted = rows._replace(labels=labels - start)
        change, dkernel = block_gradients(shifted, columns_here, gradient, None)
        along = jax.lax.dynamic_slice_in_dim(sums, start, width)
        dkernel = finished_columns(columns_here._replace(kernel=own), along, dkernel)
        dkernel = dkernel + omega * own.astype(omega.dtype)
        velocity = mu * _block(momentum, start, width).astype(mu.dtype) + dkernel
        # The barrier keeps XLA of JAX 0.12 from copying kernel and momentum for the tail.
        momentum = jax.lax.optimization_barrier(_with_block(momentum, velocity, start))
        velocity = _block(momentum, start, width).astype(eta.dtype)
        changed = _block(kernel, start, width).astype(eta.dtype) - eta * velocity
        return dfeatures + change, _with_block(kernel, changed, start), momentum

    carry = zeros_like_rows(features.shape, gradient.softmax), kernel, momentum
    count = kernel.shape[1] // block
    carry = jax.lax.fori_loop(0, count, lambda j, carry: update(j * block, block, carry), carry)
    if tail := kernel.shape[1] - count * block:
        carry = update(count * block, tail, carry)
    dfeatures, kernel, momentum = carry
    dfeatures = finished_features(rows, gradient.target, dfeatures)
    dfeatures = dfeatures.astype(features.dtype).reshape(*batch_shape, features.shape[1])
    seen = call.unflattened(statistics_of(t, others, lam))
    loss = jnp.sum(weights * loss_of(call.setting, t, others))
    return SgdStep(loss, dfeatures, kernel, momentum, seen)


def _block(array: jax.Array, start: Any, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, width, axis=1)


def _with_block(array: jax.Array, block: jax.Array, start: Any) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(array, block.astype(array.dtype), start, axis=1)
