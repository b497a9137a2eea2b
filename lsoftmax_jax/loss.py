"""The fused losses of the large-margin softmax: of each example, and their weighted sum.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._fused import (
    LogitGradient,
    Setting,
    Statistics,
    like_statistics,
    logit_gradient,
    loss_of,
    paced_target,
    statistics_of,
)
from lsoftmax_jax._pace import SelfPaced
from lsoftmax_jax._placement import on_any_mesh
from lsoftmax_jax._plans import (
    Pieces,
    Plan,
    block_gradients,
    finished,
    gradients,
    pieces_of,
    scan_rows,
    summarise,
    zeros_like_rows,
)
from lsoftmax_jax.logits import LabelTerms, Rows, check_head, columns_of, label_terms, rows_of
from lsoftmax_jax.margins import Margin


def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
) -> jax.Array:
    r"""Cross-entropy of the margin logits, one value an example, fused with its gradient.

    .. math:: \ell = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}, \qquad z = \text{lsoftmax\_logits}

    With `label_smoothing` e, the cross-entropy against Optax's smoothed labels:
    softplus(Z - t) + e (t - (t + sum of the other logits) / classes).

    The result may be weighted, masked or averaged: its gradient is right for any cotangent. For a
    (weighted) sum over many classes `lsoftmax_loss_sum` is cheaper. Reverse mode works to any
    order; for a Hessian take reverse over reverse.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes).
      labels: (...,) integers in [0, classes). Outside, -1 included, loss and gradient are NaN
        unless `where` masks the example.
      margin: integer m >= 1, static; 1 gives plain softmax. Or one of `lsoftmax_jax.margins`.
      lam: annealing λ >= 0, scalar, may be traced and infinite; its gradient is the true one. Or
        `lsoftmax_jax.self_paced()`, which computes λ from the batch without a gradient.
      scale: s > 0, for features and columns of unit length times s; None keeps their norms.
      where: (...,) bool; False gives exactly zero loss and gradient, whatever the row holds.
      label_smoothing: e in [0, 1], a Python float.
      plan: in which pieces to compute, by default the fastest that takes 1 GiB.

    Returns:
      (...,) float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.ones((2, 3)), jnp.eye(3)
      >>> lsm.lsoftmax_loss(features, kernel, jnp.array([0, 2]), margin=4, lam=5.0).round(3)
      Array([1.473, 1.473], dtype=float32)
    """
    return lsoftmax_loss_and_statistics(
        features,
        kernel,
        labels,
        margin=margin,
        lam=lam,
        scale=scale,
        where=where,
        label_smoothing=label_smoothing,
        plan=plan,
    )[0]


def lsoftmax_loss_and_statistics(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
) -> tuple[jax.Array, Statistics]:
    """`lsoftmax_loss`, and the `Statistics` of the same pass.

    Args:
      features, kernel, labels, margin, lam, scale, where, label_smoothing, plan: as there.

    Returns:
      the loss (...,), and `Statistics`, through which no gradient flows.

    Raises:
      TypeError, ValueError: as `lsoftmax_loss`.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> loss, seen = lsm.lsoftmax_loss_and_statistics(
      ...     features, kernel, labels, margin=4, lam=lsm.self_paced())
      >>> seen.plain_logit.tolist(), float(seen.lam)
      ([1.0, 1.0], inf)
    """
    call = Call.checked(features, kernel, labels, margin, lam, scale, where, label_smoothing)
    pieces = pieces_of(plan, *call.size, call.operands.kernel.dtype, rows_cost_no_more=False)

    def core(*arrays: Any) -> tuple[jax.Array, Statistics]:
        return per_example(call.setting, pieces, Given(*arrays))

    given = Given(*call.operands[:3], call.lam, weights=call.counted())
    loss, seen = on_any_mesh(core, ("batch", like_statistics("batch", "scalar")), given)
    return call.mask(call.unflattened(loss)), call.unflattened(seen)


def lsoftmax_loss_sum(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
) -> jax.Array:
    r"""The scalar sum of weights * `lsoftmax_loss`, its gradients computed in the forward pass.

    .. math:: L = \sum_i s_i \ell_i

    Under differentiation the forward pass computes the gradients of features and kernel, and the
    backward pass only scales them. The one-shot and row-block plans so take three matrix products
    and keep no logits. Without differentiation the call computes the loss alone.

    Args:
      weights: (...,) floating-point weights s of the examples, or None for ones; for a mean pass
        `jnp.full(labels.shape, 1 / labels.size)`. Their gradient is the loss of each example.
      features, kernel, labels, margin, lam, scale, where, label_smoothing, plan: as in
        `lsoftmax_loss`. Self-pacing weighs the examples by `weights`, negative ones by 0.

    Returns:
      scalar, float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> def mean(kernel):
      ...     weights = jnp.full(2, 0.5)
      ...     return lsm.lsoftmax_loss_sum(features, kernel, labels, weights, margin=4, lam=5.0)
      >>> loss, gradient = jax.value_and_grad(mean)(kernel)
      >>> round(float(loss), 3), gradient.shape
      (1.473, (3, 3))
    """
    call = Call.checked(features, kernel, labels, margin, lam, scale, where, label_smoothing)
    pieces = pieces_of(plan, *call.size, call.operands.kernel.dtype, rows_cost_no_more=True)
    weights = _checks.check_weights(weights, call.operands.batch_shape, call.lam.dtype)
    weights = call.mask(weights).reshape(call.operands.labels.shape)

    def core(*arrays: Any) -> jax.Array:
        return _sum(call.setting, pieces, Given(*arrays))

    return on_any_mesh(core, "scalar", Given(*call.operands[:3], call.lam, weights=weights))


class Call(NamedTuple):
    """The checked arguments of a loss."""

    operands: _checks.Operands
    setting: Setting
    lam: jax.Array  # 0 where the loss is self-paced
    where: jax.Array | None

    @classmethod
    def checked(
        cls,
        features: ArrayLike,
        kernel: ArrayLike,
        labels: ArrayLike,
        margin: int | Margin,
        lam: ArrayLike | SelfPaced,
        scale: float | None,
        where: ArrayLike | None,
        label_smoothing: float,
        classes: int | None = None,
    ) -> "Call":
        head = check_head(margin, scale)
        label_smoothing = _checks.check_fraction("label_smoothing", label_smoothing)
        features, kernel = _checks.check_features(features, kernel)
        dtype = _checks.promoted(features, kernel)
        pace, lam = _paced(lam, margin)
        lam = _checks.check_scalar("lam", lam, _checks.at_least_f32(dtype))
        where = _checks.check_mask(where, features.shape[:-1])
        classes = kernel.shape[1] if classes is None else classes
        labels = _checks.check_labels(labels, features.shape[:-1], classes)
        if where is not None:
            # A masked row may hold NaN, which zero times its gradient would not silence.
            features = jnp.where(where[..., None], features, 0)
            labels = jnp.where(where, labels, 0)
        operands = _checks.flattened(features.astype(dtype), kernel.astype(dtype), labels)
        return cls(operands, Setting(head, label_smoothing, pace, classes), lam, where)

    @property
    def size(self) -> tuple[int, int]:
        return self.operands.features.shape[0], self.operands.kernel.shape[1]

    def mask(self, values: jax.Array) -> jax.Array:
        return values if self.where is None else jnp.where(self.where, values, 0)

    def counted(self) -> jax.Array | None:
        """The weights of the rows for self-pacing; None where it has no use for them."""
        if self.where is None or self.setting.pace is None:
            return None
        return self.where.reshape(self.operands.labels.shape).astype(self.lam.dtype)

    def unflattened(self, tree: Any) -> Any:
        """(batch,) arrays in the batch's own shape; scalars as they are."""
        shape = self.operands.batch_shape
        return jax.tree.map(lambda value: value.reshape(shape) if value.ndim else value, tree)


def _paced(lam: ArrayLike | SelfPaced, margin: int | Margin) -> tuple[SelfPaced | None, ArrayLike]:
    if not isinstance(lam, SelfPaced):
        return None, lam
    # Plain softmax has no margin to pace: the same as if λ were infinite.
    return (None, jnp.inf) if margin == 1 else (lam, 0.0)


class Given(NamedTuple):
    """The arrays that a loss is computed from."""

    features: jax.Array
    kernel: jax.Array
    labels: jax.Array
    lam: jax.Array
    offset: jax.Array | None = None  # of the columns, see `Columns`
    weights: Any = None  # of the rows: in the sum, and for self-pacing; or None


# The loss of each example.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def per_example(setting: Setting, pieces: Pieces, given: Given) -> tuple[jax.Array, Statistics]:
    """The core of `lsoftmax_loss`; no gradient for offset and weights."""
    return _per_example_fwd(setting, pieces, given)[0]


def _per_example_fwd(
    setting: Setting, pieces: Pieces, given: Given
) -> tuple[tuple[jax.Array, Statistics], Any]:
    rows = rows_of(setting.head, given.features, given.labels)
    columns = columns_of(setting.head, given.kernel, given.offset)
    terms = label_terms(setting.head, rows, given.kernel)
    others, kept = summarise(setting, pieces, rows, columns)
    t, lam = paced_target(setting, terms, others, given.lam, given.weights)
    seen = statistics_of(t, others, lam)
    return (loss_of(setting, t, others), seen), (rows, columns, t, others, kept)


def _per_example_bwd(
    setting: Setting, pieces: Pieces, residuals: Any, cotangents: tuple[jax.Array, Statistics]
) -> tuple[Any]:
    rows, columns, t, others, kept = residuals
    dtype = rows.features.dtype
    gradient = logit_gradient(setting, t, others, cotangents[0], dtype)
    dfeatures, dkernel = gradients(pieces, rows, columns, gradient, kept)
    dlam = lam_gradient(setting, gradient)
    return (gradient_of(dfeatures.astype(dtype), dkernel, dlam),)


per_example.defvjp(_per_example_fwd, _per_example_bwd)


def lam_gradient(setting: Setting, gradient: LogitGradient) -> jax.Array:
    """That of the λ that was given, which a self-paced loss ignores."""
    dlam = jnp.sum(gradient.dlam)
    return dlam if setting.pace is None else jnp.zeros_like(dlam)


# The weighted sum, its gradients computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(setting: Setting, pieces: Pieces, given: Given) -> jax.Array:
    # Not _sum_fwd(...)[0], which would pay for the gradients.
    counted = None if setting.pace is None else jax.lax.stop_gradient(given.weights)
    losses, _ = per_example(setting, pieces, given._replace(weights=counted))
    return jnp.sum(given.weights * losses)


def _sum_fwd(setting: Setting, pieces: Pieces, given: Given) -> tuple[jax.Array, Given]:
    features, kernel, labels, lam, _, weights = given
    rows, columns = rows_of(setting.head, features, labels), columns_of(setting.head, kernel)

    def forward(
        pieces: Pieces, rows: Rows, terms: LabelTerms, weights: jax.Array
    ) -> tuple[jax.Array, LogitGradient, Any]:
        others, kept = summarise(setting, pieces, rows, columns)
        t, _ = paced_target(setting, terms, others, lam, weights)
        gradient = logit_gradient(setting, t, others, weights, features.dtype)
        return loss_of(setting, t, others), gradient, kept

    terms = label_terms(setting.head, rows, kernel)
    if pieces.row_block is None or setting.pace is not None:
        # λ of the whole batch comes before the gradient of any row.
        losses, gradient, kept = forward(pieces, rows, terms, weights)
        dfeatures, dkernel = gradients(pieces, rows, columns, gradient, kept)
    else:

        def step(dkernel: jax.Array, block: Any) -> tuple[jax.Array, Any]:
            losses, gradient, kept = forward(Pieces(), *block)
            dfeatures, change = block_gradients(block[0], columns, gradient, kept)
            return dkernel + change, (losses, gradient, dfeatures)

        zeros, whole = zeros_like_rows(kernel.shape, weights), (rows, terms, weights)
        dkernel, (losses, gradient, dfeatures) = scan_rows(step, zeros, pieces.row_block, whole)
        dfeatures, dkernel = finished(rows, columns, gradient, dfeatures, dkernel)
    dlam = lam_gradient(setting, gradient)
    dfeatures = dfeatures.astype(features.dtype)
    return jnp.sum(weights * losses), gradient_of(dfeatures, dkernel, dlam, losses)


def _sum_bwd(
    setting: Setting, pieces: Pieces, gradients: Given, cotangent: jax.Array
) -> tuple[Given]:
    return scaled(gradients, cotangent)


def gradient_of(features: Any, kernel: Any, lam: Any, weights: Any = None) -> Given:
    """The gradient of what was given; labels and offset have none."""
    nothing: Any = None
    return Given(features, kernel, nothing, lam, weights=weights)


def scaled(gradients: Given, cotangent: jax.Array) -> tuple[Given]:
    """What a sum's backward pass returns from the gradients of its forward pass."""

    def times(gradient: jax.Array) -> jax.Array:
        return (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)

    return (jax.tree.map(times, gradients),)


_sum.defvjp(_sum_fwd, _sum_bwd)
