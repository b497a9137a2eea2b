"""The margin logits, the annealed target logit, and the three matrix products of every head here.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295; the annealing is that of the
authors' released code.
"""

import functools
import math
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._placement import on_any_mesh
from lsoftmax_jax._tiles import columns_at
from lsoftmax_jax.margins import Margin, check_margin, value_and_slope

# Up to here a product at full precision costs less than gathering each label's column, and the
# gradients are worth one.
_FEW_CLASSES = 256
# Of batch x classes: up to here an accelerator compares them all in less than a launch takes.
_FEW_CELLS = 2**23
# Squares are taken of 2^14 times the numbers; a power of two is exact. In float32 a norm of 1e15
# then has a normal square, and so has each of 512 entries of a norm of 1e-20 that counts.
_SCALE = 2.0**14


def lsoftmax_logits(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: int | Margin,
    lam: ArrayLike,
    scale: float | None = None,
) -> jax.Array:
    r"""Logits of the large-margin softmax: features @ kernel with the label's logit replaced.

    .. math::
        z_j = \|w_j\| \|x\| \cos\theta_j \;(j \ne y), \qquad
        z_y = \frac{\lambda \|w_y\| \|x\| \cos\theta_y + \|w_y\| \|x\| \psi(\theta_y)}{1+\lambda}

    The gradient is written by hand: it has two matrix products and no division by a sine, and is
    finite at every angle. Reverse mode works to any order. JAX has no forward mode for such
    functions; for a Hessian take reverse over reverse, as in `jax.jacrev(jax.grad(f))`.

    Another margin puts its v(cos θ) in place of ψ. With a `scale` s the product ‖w‖‖x‖ is s.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes), as in Flax's Dense; no bias.
      labels: (...,) integers in [0, classes). A label outside, -1 included, makes that row of
        logits and its gradient NaN. None gives the plain product, for inference.
      margin: integer m >= 1, static; 1 gives the plain logits. Or one of `lsoftmax_jax.margins`.
      lam: annealing λ >= 0, scalar, may be traced and infinite; its gradient is the true one.
        A traced λ that is negative or NaN makes all target logits NaN.
      scale: s > 0, a Python float, for features and columns of unit length times s; None keeps
        their norms.

    Returns:
      (..., classes) in the promoted dtype of `features` and `kernel`; angles, norms and sums are
      computed in float32 or better.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> logits = lsm.lsoftmax_logits(jnp.array([3.0, 4.0]), kernel, 0, margin=2, lam=0.0)
      >>> logits.round(2).tolist()
      [-1.399999976158142, 4.0]
    """
    head = check_head(margin, scale)
    features, kernel = _checks.check_features(features, kernel)
    dtype = _checks.promoted(features, kernel)
    lam = _checks.check_scalar("lam", lam, _checks.at_least_f32(dtype))
    features, kernel = features.astype(dtype), kernel.astype(dtype)
    if labels is None:
        return _plain_logits(head, features, kernel)
    classes = kernel.shape[1]
    labels = _checks.check_labels(labels, features.shape[:-1], classes)
    operands = _checks.flattened(features, kernel, labels)
    core = functools.partial(_logits, head)
    logits = on_any_mesh(core, "logits", (*operands[:3], lam))
    return logits.reshape(*operands.batch_shape, classes)


def _plain_logits(head: "Head", features: jax.Array, kernel: jax.Array) -> jax.Array:
    if not head.unit_columns:
        return features @ kernel
    dtype = _checks.at_least_f32(features.dtype)
    logits = (features @ kernel).astype(dtype)
    logits = logits * inverse_norms(kernel, 0).reshape((1,) * (logits.ndim - 1) + (-1,))
    if head.scale is not None:
        logits = logits * (head.scale * inverse_norms(features, -1)[..., None])
    return logits.astype(features.dtype)


class Head(NamedTuple):
    """What kind of head it is. Static."""

    margin: int | Margin
    scale: float | None  # of unit features; None keeps their norms
    unit_columns: bool


def check_head(margin: int | Margin, scale: float | None) -> Head:
    margin = check_margin(margin)
    if scale is None and getattr(margin, "needs_scale", False):
        raise ValueError(f"scale must be given with {margin}, such as 64.0, or 8.0 for ten classes")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, Real)):
        raise TypeError(f"scale must be a Python float > 0 or None, got {scale!r}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    unit_columns = scale is not None or getattr(margin, "unit_columns", False)
    return Head(margin, None if scale is None else float(scale), unit_columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(
    head: Head, features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array
) -> jax.Array:
    return _logits_fwd(head, features, kernel, labels, lam)[0]


def _logits_fwd(
    head: Head, features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array
) -> tuple[jax.Array, Any]:
    rows, columns = rows_of(head, features, labels), columns_of(head, kernel)
    t = annealed_target(head, label_terms(head, rows, kernel), lam)
    plain = product(rows, columns)
    logits = jnp.where(is_label(labels, plain.shape[1]), t.logit[:, None], plain)
    logits = jnp.where(labels[:, None] >= 0, logits, jnp.nan).astype(features.dtype)
    return logits, (rows, columns, t)


def _logits_bwd(
    head: Head, residuals: Any, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    rows, columns, t = residuals
    features, kernel, labels = rows.features, columns.kernel, rows.labels
    at_label = is_label(labels, kernel.shape[1])
    g = jnp.sum(jnp.where(at_label, cotangent, 0), axis=1, dtype=t.alpha.dtype)
    g = jnp.where(labels >= 0, g, jnp.nan)
    pull = pulled_back(g, t, features.dtype)
    grad = jnp.where(at_label, pull.plain[:, None], cotangent.astype(g.dtype))
    grad = jnp.where(labels[:, None] >= 0, grad, jnp.nan)
    dfeatures, dkernel = products_gradient(rows, columns, grad)
    sums = label_sums(pull.along_column, labels, kernel.shape[1])
    dfeatures = finished_features(rows, pull, dfeatures)
    dkernel = finished_columns(columns, sums, dkernel)
    dlam = jnp.sum(g * t.dlam)
    return dfeatures.astype(features.dtype), dkernel.astype(kernel.dtype), None, dlam


_logits.defvjp(_logits_fwd, _logits_bwd)


class Rows(NamedTuple):
    """The rows of a batch."""

    features: jax.Array  # (batch, D)
    labels: jax.Array  # (batch,)
    scale: jax.Array | None = None  # (batch,): times features it is the unit feature times s


class Columns(NamedTuple):
    """Columns of a kernel, and what is added to their logits except as a target.

    An offset of -inf takes a column out: padding of a ragged shard, a sample drawn twice.
    """

    kernel: jax.Array  # (D, columns)
    offset: jax.Array | None = None  # (columns,)
    inverse_norm: jax.Array | None = None  # (columns,): given where they count as unit columns


def rows_of(head: Head, features: jax.Array, labels: jax.Array) -> Rows:
    scale = None if head.scale is None else head.scale * inverse_norms(features, 1)
    return Rows(features, labels, scale)


def columns_of(head: Head, kernel: jax.Array, offset: jax.Array | None = None) -> Columns:
    return Columns(kernel, offset, inverse_norms(kernel, 0) if head.unit_columns else None)


def inverse_norms(array: jax.Array, axis: int) -> jax.Array:
    """1 / norm along an axis, 0 where it counts as no direction, in float32 or better."""
    wide = array.astype(_checks.at_least_f32(array.dtype))
    return _norm(jnp.sum((_SCALE * wide) ** 2, axis=axis))[1]


# The target logit of each row, and its derivatives.


class LabelTerms(NamedTuple):
    """What the label's logit is made of, one value a row, without margin and λ."""

    product: jax.Array  # features . kernel_y as they are; NaN where the label is -1
    feature_norm: jax.Array  # 0 where it counts as no direction, as the three below
    inverse_feature_norm: jax.Array
    column_norm: jax.Array
    inverse_column_norm: jax.Array


class Target(NamedTuple):
    """The annealed target logit t and its partial derivatives, one value a row.

    dt/dfeatures = alpha kernel_y + beta |kernel_y| features / |features|
    dt/dkernel_y = alpha features + beta |features| kernel_y / |kernel_y|

    of the features and columns that the logits are made of: where unit ones are, the gradient of
    those that were given follows by `products_gradient` and `finished_...`.
    """

    plain: jax.Array  # u = n cos(theta_y), the logit without margin
    logit: jax.Array
    alpha: jax.Array
    beta: jax.Array | None  # None for the plain logit, where it is 0
    dlam: jax.Array  # dt/dlam
    cosine: jax.Array
    terms: LabelTerms
    unit: jax.Array | None  # du/dproduct, where that is not 1


def label_terms(head: Head, rows: Rows, kernel: jax.Array) -> LabelTerms:
    """`LabelTerms` of every row, in float32 or better.

    Never from logits of the default precision: bfloat16 or TF32, which that is on TPU and GPU,
    would put a cosine on the wrong side of a knot. With few classes the logits have full
    precision; the compiler finds them computed once.
    """
    features, labels = rows.features, rows.labels
    dtype = _checks.at_least_f32(features.dtype)
    wide = features.astype(dtype)
    if kernel.shape[1] <= _FEW_CLASSES:
        at_label = is_label(labels, kernel.shape[1])
        plain = jnp.sum(jnp.where(at_label, raw_product(features, kernel), 0), axis=1)
        squares = jnp.sum((_SCALE * kernel.astype(dtype)) ** 2, axis=0)
        column_square = jnp.sum(jnp.where(at_label, squares[None, :], 0), axis=1)
    else:
        columns = columns_at(kernel, labels).astype(dtype)
        plain = jnp.sum(wide * columns, axis=1)
        column_square = jnp.sum((_SCALE * columns) ** 2, axis=1)
    feature_square = jnp.sum((_SCALE * wide) ** 2, axis=1)
    plain = jnp.where(labels >= 0, plain, jnp.nan)
    return LabelTerms(plain, *_norm(feature_square), *_norm(column_square))


def _norm(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A norm and its inverse from the square of _SCALE times it.

    Both are 0 where the square is no positive normal number. Norms of features and columns stay
    apart: their product or quotient would under- or overflow.
    """
    normal = (square > jnp.finfo(square.dtype).tiny) & (square < jnp.inf)
    root = jnp.sqrt(jnp.where(normal, square, 1))
    # A NaN must stay one.
    zero = jnp.where(jnp.isnan(square), square, 0)
    return jnp.where(normal, root / _SCALE, zero), jnp.where(normal, _SCALE / root, zero)


def annealed_target(head: Head, terms: LabelTerms, lam: jax.Array) -> Target:
    """t = (lam u + n v(u / n)) / (1 + lam) with n = |features| |kernel_y|, and its derivatives.

    Args:
      terms: of each row.
      lam: scalar >= 0; infinity gives the plain logit.

    Without a direction (a norm that is 0, or too small or large for its square to be a normal
    number) the cosine counts as 0.
    """
    u, unit = terms.product, None
    cosine = jnp.clip(u * terms.inverse_feature_norm * terms.inverse_column_norm, -1, 1)
    if head.unit_columns:
        unit = terms.inverse_column_norm
        if head.scale is not None:
            unit = unit * (head.scale * terms.inverse_feature_norm)
            terms = terms._replace(feature_norm=jnp.full_like(u, head.scale))
        ones = jnp.ones_like(u)
        terms = terms._replace(column_norm=ones, inverse_column_norm=ones)
        u = terms.feature_norm * cosine
    if head.margin == 1:
        return Target(u, u, jnp.ones_like(u), None, jnp.zeros_like(u), cosine, terms, unit)
    value, slope = value_and_slope(head.margin, cosine)
    # t = u + gap / (1 + lam) rather than the quotient of the formula also serves lam = infinity.
    share = 1 / (1 + lam)
    gap = terms.feature_norm * terms.column_norm * value - u
    return Target(
        plain=u,
        logit=u + gap * share,
        alpha=1 + (slope - 1) * share,
        beta=(value - cosine * slope) * share,
        dlam=-gap * share**2,
        cosine=cosine,
        terms=terms,
        unit=unit,
    )


class Pull(NamedTuple):
    """A cotangent g of the target logit, pulled back: one value a row."""

    plain: jax.Array  # the gradient of the logit at the label, as `products_gradient` takes it
    along_feature: jax.Array  # times features / |features|, a part of dfeatures
    inverse_feature_norm: jax.Array
    along_column: jax.Array  # times the label's column, a part of dkernel


def pulled_back(g: jax.Array, t: Target, dtype: jnp.dtype) -> Pull:
    """`Pull` for matrix products with operands of `dtype`.

    At small angles alpha is near m² and beta takes most of it back. Half precision would round
    the one and not the other, so what rounding takes off `plain` is given back along features
    and kernel; what stays lost is smaller by the sine of the angle.
    """
    exact = g * t.alpha
    zero = jnp.zeros_like(exact)
    if t.beta is None and t.unit is None and dtype == exact.dtype:
        # Nobody asks for the norms, which cost plain softmax a fifth of its time at ten classes.
        return Pull(exact, zero, zero, zero)
    rounded, beta = exact, zero if t.beta is None else g * t.beta
    if dtype != exact.dtype:
        # A cast there and back the compiler may drop.
        info = jnp.finfo(dtype)
        unit = 1 if t.unit is None else jnp.where(t.unit > 0, t.unit, 1)
        rounded = jax.lax.reduce_precision(exact * unit, info.nexp, info.nmant) / unit
        beta = beta + (exact - rounded) * t.cosine
    along_column = beta * t.terms.feature_norm * t.terms.inverse_column_norm
    return Pull(rounded, beta * t.terms.column_norm, t.terms.inverse_feature_norm, along_column)


def is_label(labels: jax.Array, classes: int) -> jax.Array:
    """(batch, classes), true at each row's label: compared with an iota, nothing gathered."""
    shape = labels.shape[0], classes
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) == labels[:, None]


# The products.


def product(rows: Rows, columns: Columns) -> jax.Array:
    """The plain logits without offsets, in float32 or better."""
    logits = raw_product(rows.features, columns.kernel)
    if rows.scale is not None:
        logits = logits * rows.scale[:, None]
    if columns.inverse_norm is not None:
        logits = logits * columns.inverse_norm[None, :]
    return logits


def raw_product(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """features @ kernel, accumulated in float32 or better; see `label_terms` for the precision."""
    return _contract(features, 1, kernel, 0, _precision(kernel))


def _precision(kernel: jax.Array) -> jax.lax.Precision | None:
    """Of the products with a kernel: full with few classes, else JAX's default.

    The default on a TPU rounds float32 operands to bfloat16. At small angles two terms that are up
    to m² times as long nearly cancel in a gradient, and so the error grows.
    """
    return jax.lax.Precision.HIGHEST if kernel.shape[1] <= _FEW_CLASSES else None


def products_gradient(rows: Rows, columns: Columns, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dfeatures, dkernel) of the logits' gradient (batch, columns), to be finished."""
    if rows.scale is not None:
        grad = grad * rows.scale[:, None]
    if columns.inverse_norm is not None:
        grad = grad * columns.inverse_norm[None, :]
    grad = grad.astype(rows.features.dtype)
    precision = _precision(columns.kernel)
    dfeatures = _contract(grad, 1, columns.kernel, 1, precision)
    return dfeatures, _contract(rows.features, 0, grad, 0, precision)


def finished_features(rows: Rows, pull: Pull, dfeatures: jax.Array) -> jax.Array:
    """Adds what lies along features, or takes it out where their norm counts for nothing.

    Two factors, whose product may overflow.
    """
    dtype = dfeatures.dtype
    directions = pull.inverse_feature_norm[:, None] * rows.features.astype(dtype)
    if rows.scale is None:
        return dfeatures + pull.along_feature[:, None] * directions
    return dfeatures - directions * jnp.sum(directions * dfeatures, axis=1, keepdims=True)


def finished_columns(columns: Columns, sums: jax.Array, dkernel: jax.Array) -> jax.Array:
    """The same for columns; `sums` holds `Pull.along_column` of each column's rows."""
    wide = columns.kernel.astype(dkernel.dtype)
    if columns.inverse_norm is None:
        return dkernel + sums[None, :] * wide
    along = jnp.sum(wide * dkernel, axis=0) * columns.inverse_norm
    return dkernel - along[None, :] * (columns.inverse_norm[None, :] * wide)


def label_sums(values: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """(classes,): the sum of each row's value into its label's column.

    Scalars are scattered, not rows of D values, which is the slow path on GPU. Few enough are
    rather summed where the logits' gradient is made: one kernel more on a GPU, not three.
    """

    def scattered(values: jax.Array, labels: jax.Array) -> jax.Array:
        # A negative index would wrap to the last class.
        index = jnp.where(labels >= 0, labels, classes)
        return jnp.zeros(classes, values.dtype).at[index].add(values, mode="drop")

    def summed(values: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_label(labels, classes), values[:, None], 0), axis=0)

    if labels.shape[0] * classes > _FEW_CELLS:
        return scattered(values, labels)
    return jax.lax.platform_dependent(values, labels, cpu=scattered, default=summed)


def _contract(
    lhs: jax.Array,
    lhs_axis: int,
    rhs: jax.Array,
    rhs_axis: int,
    precision: jax.lax.Precision | None,
) -> jax.Array:
    dtype = _checks.at_least_f32(lhs.dtype)
    axes = (((lhs_axis,), (rhs_axis,)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, axes, precision, preferred_element_type=dtype)
