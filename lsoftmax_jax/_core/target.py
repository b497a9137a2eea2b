"""The target logit of each row, with margin and λ, and its derivatives.

For a feature x and the kernel column w of the label, with u = x . w and n = |x| |w|,

    t = u + share (n v(u / n) - u),    share = 1 / (1 + λ)

which is the paper's (λ u + n v) / (1 + λ), and also serves an infinite λ.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsoftmax_jax import _checks
from lsoftmax_jax._core import mesh
from lsoftmax_jax._core.spec import Arrays, Spec
from lsoftmax_jax._core.tiles import columns_at, sum_over_rows
from lsoftmax_jax.margins import LSoftmax, value_and_slope

# Up to this many classes a product at full precision costs less than gathering the label's column.
FEW_CLASSES = 256
# Numbers are scaled by 2**14, exactly, before they are squared: in float32 a norm of 1e15 then has
# a normal square, and so has each entry that counts among 512 of norm 1e-20.
_SCALE = 2.0**14


class Rows(NamedTuple):
    """The rows of a batch."""

    features: jax.Array  # (batch, D)
    labels: jax.Array  # (batch,)
    scale: jax.Array | None = None  # (batch,): features times scale have the margin's length


class Columns(NamedTuple):
    """Columns of a kernel."""

    kernel: Any  # (D, columns)
    offset: jax.Array | None = None  # (columns,), added to logits of other classes; -inf: no class
    inverse_norm: jax.Array | None = None  # (columns,), where columns count as unit columns


def rows_of(spec: Spec, features: jax.Array, labels: jax.Array) -> Rows:
    length = spec.length
    return Rows(features, labels, None if length is None else length * inverse_norms(features, 1))


def columns_of(spec: Spec, kernel: jax.Array, offset: jax.Array | None = None) -> Columns:
    return Columns(kernel, offset, inverse_norms(kernel, 0) if spec.unit_columns else None)


def inverse_norms(matrix: jax.Array, axis: int) -> jax.Array:
    """1 / norm along an axis, 0 where the norm counts as no direction, in float32 or better."""
    return _norm(_squares(matrix, axis))[1]


def _squares(matrix: jax.Array, axis: int) -> jax.Array:
    """Sums of squares of _SCALE times the entries."""
    dtype = _checks.at_least_f32(matrix.dtype)
    if axis == 0 and matrix.shape[0] > 1:
        return sum_over_rows(matrix, matrix, dtype, _SCALE)
    scaled = _SCALE * matrix.astype(dtype)
    if matrix.shape[axis] == 1:
        # XLA would take the scale out of a single product, and the square of 1e-20 is 0.
        scaled = jnp.where(scaled == 0, 0, scaled)
    return jnp.sum(scaled**2, axis=axis)


def _norm(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A norm and its inverse from the square of _SCALE times the norm.

    Both are 0 where the square is not a positive normal number. The norms of features and columns
    stay apart: their product or quotient would under- or overflow.
    """
    normal = (square > jnp.finfo(square.dtype).tiny) & (square < jnp.inf)
    root = jnp.sqrt(jnp.where(normal, square, 1))
    # Propagate NaN.
    zero = jnp.where(jnp.isnan(square), square, 0)
    return jnp.where(normal, root / _SCALE, zero), jnp.where(normal, _SCALE / root, zero)


class LabelTerms(NamedTuple):
    """What the label's logit is made of, one value a row, without margin and λ."""

    product: jax.Array  # features . kernel_y; NaN where the label is -1
    feature_norm: jax.Array  # 0 where it counts as no direction, as the three below
    inverse_feature_norm: jax.Array
    column_norm: jax.Array
    inverse_column_norm: jax.Array


def label_terms(spec: Spec, rows: Rows, kernel: jax.Array) -> LabelTerms:
    """`LabelTerms` of every row, in float32 or better.

    They are never read off logits of the default precision. On a TPU or GPU the default may be
    bfloat16 or TF32, which would put a cosine on the wrong side of a knot. With few classes the
    logits have full precision, and the compiler computes them once; in blocks it would not.
    """
    features, labels = rows.features, rows.labels
    wide = features.astype(_checks.at_least_f32(features.dtype))
    classes, pieces = kernel.shape[1], spec.pieces
    in_blocks = pieces.row_block is not None or pieces.class_block not in (None, classes)
    if classes <= FEW_CLASSES and not in_blocks:
        plain = value_at(labels, product(features, 1, kernel, 0, classes))
        column_square = value_at(labels, _squares(kernel, 0))
    else:
        columns = columns_at(kernel, labels).astype(wide.dtype)
        plain = jnp.sum(wide * columns, axis=1)
        column_square = _squares(columns, 1)
    plain = _checks.nan_unless(labels >= 0, plain)
    return LabelTerms(plain, *_norm(_squares(features, 1)), *_norm(column_square))


def view(spec: Spec, arrays: Arrays) -> tuple[Rows, Columns, LabelTerms]:
    """A device's rows, columns, and what it knows of the labels' logits.

    The rows' labels count from the device's first class; -1 stands for a class elsewhere.
    """
    layout, kernel, labels = spec.layout, arrays.kernel, arrays.labels
    width = kernel.shape[1]
    if layout is None:
        rows = rows_of(spec, arrays.features, labels)
        return rows, columns_of(spec, kernel, arrays.offset), label_terms(spec, rows, kernel)
    start = mesh.first_class(layout, width)
    here = (labels >= start) & (labels < start + width)
    rows = rows_of(spec, arrays.features, jnp.where(here, labels - start, 0))
    terms = label_terms(spec, rows, kernel)
    terms = terms._replace(
        product=jnp.where(here, terms.product, 0),
        column_norm=jnp.where(here, terms.column_norm, 0),
    )
    rows = rows._replace(labels=jnp.where(here, rows.labels, -1))
    offset = arrays.offset
    if offset is None and width * layout.shards != spec.classes:
        # -inf for the columns that only fill up the last shards.
        real = start + jnp.arange(width, dtype=jnp.int32) < spec.classes
        offset = jnp.where(real, 0, -jnp.inf).astype(_checks.at_least_f32(kernel.dtype))
    return rows, columns_of(spec, kernel, offset), terms


def value_at(labels: jax.Array, values: jax.Array) -> jax.Array:
    """(batch,): the value at each row's label, of (batch, classes) or (classes,); -1 takes any.

    A CPU reads one value a row. Elsewhere comparing labels saves the launch of a gather.
    """

    def read(labels: jax.Array, values: jax.Array) -> jax.Array:
        if values.ndim == 1:
            return jnp.take(values, labels, mode="clip")
        return jnp.take_along_axis(values, labels[:, None], axis=1, mode="clip")[:, 0]

    def compared(labels: jax.Array, values: jax.Array) -> jax.Array:
        at_label = is_label(labels, values.shape[-1])
        return jnp.sum(jnp.where(at_label, values, 0), axis=1)

    return jax.lax.platform_dependent(labels, values, cpu=read, default=compared)


class Target(NamedTuple):
    """The target logit t and its partial derivatives, one value a row.

    dt/dfeatures = alpha kernel_y + beta |kernel_y| features / |features|
    dt/dkernel_y = alpha features + beta |features| kernel_y / |kernel_y|

    for the features and columns that the logits are made of. Where these have unit length, the
    gradients of the given ones follow in `blocks`.
    """

    plain: jax.Array  # u = n cos(theta_y), the logit without a margin
    logit: jax.Array
    alpha: jax.Array
    beta: jax.Array | None  # None for plain softmax, where it is 0
    dlam: jax.Array | None  # dt/dλ, of a given λ
    lam: jax.Array
    cosine: jax.Array
    terms: LabelTerms
    unit: jax.Array | None  # du/dproduct, where that is not 1


def target_of(spec: Spec, terms: LabelTerms, lam: jax.Array, rival: jax.Array | None) -> Target:
    """t and its derivatives.

    Args:
      terms: of each row.
      lam: the given λ, scalar >= 0, which a rule ignores.
      rival: (batch,) the largest other logit, for a rule; None if there is no rule.

    Without a direction (a norm that is 0, or too small or large for its square to be a normal
    number) the cosine counts as 0.
    """
    u, unit = terms.product, None
    cosine = jnp.clip(u * terms.inverse_feature_norm * terms.inverse_column_norm, -1, 1)
    if spec.unit_columns:
        unit = terms.inverse_column_norm
        if (length := spec.length) is not None:
            unit = unit * (length * terms.inverse_feature_norm)
            terms = terms._replace(feature_norm=jnp.full_like(u, length))
        ones = jnp.ones_like(u)
        terms = terms._replace(column_norm=ones, inverse_column_norm=ones)
        u = terms.feature_norm * cosine
    lam = jnp.broadcast_to(lam, u.shape)
    if spec.margin == LSoftmax(1):  # plain softmax
        lam = lam if spec.rule is None else jnp.full_like(u, jnp.inf)
        return Target(u, u, jnp.ones_like(u), None, jnp.zeros_like(u), lam, cosine, terms, unit)
    value, slope = value_and_slope(spec.margin, cosine)
    whole = terms.feature_norm * terms.column_norm * value
    if spec.rule is None or rival is None:
        share = 1 / (1 + lam)
        dlam = -(whole - u) * share**2
    else:
        share, dlam = spec.rule.share(u, whole, rival), None
        some = share > 0
        lam = jnp.where(some, 1 / jnp.where(some, share, 1) - 1, jnp.inf)
    return Target(
        plain=u,
        logit=u + (whole - u) * share,
        alpha=1 + (slope - 1) * share,
        beta=(value - cosine * slope) * share,
        dlam=dlam,
        lam=lam,
        cosine=cosine,
        terms=terms,
        unit=unit,
    )


class Pull(NamedTuple):
    """A cotangent g of the target logit, pulled back: one value a row."""

    plain: jax.Array  # the gradient of the logit at the label, a factor of both products
    # The rest is None for plain softmax, whose gradients have these two products alone.
    along_feature: jax.Array | None = None  # times features / |features|, a part of dfeatures
    inverse_feature_norm: jax.Array | None = None
    along_column: jax.Array | None = None  # times the label's column, a part of dkernel


def pulled_back(g: jax.Array, t: Target, dtype: jnp.dtype) -> Pull:
    """`Pull` for matrix products with operands of `dtype`.

    At small angles alpha is near m², and beta cancels most of it. Half precision would round alpha
    alone. So what rounding takes off `plain` is given back along features and kernel; the error
    that remains is smaller by the sine of the angle.
    """
    exact = g * t.alpha
    if t.beta is None and t.unit is None and dtype == exact.dtype:
        # Plain softmax needs no norms, which would cost a fifth of its time at ten classes.
        return Pull(exact)
    rounded, beta = exact, jnp.zeros_like(exact) if t.beta is None else g * t.beta
    if dtype != exact.dtype:
        # XLA may remove a round-trip cast.
        info = jnp.finfo(dtype)
        unit = 1 if t.unit is None else jnp.where(t.unit > 0, t.unit, 1)
        entry = exact * unit
        rounded = jax.lax.reduce_precision(entry, info.nexp, info.nmant)
        if dtype == jnp.float16:
            # reduce_precision takes the subnormal numbers of float16, below 6e-5, for zero.
            step = float(info.smallest_subnormal)
            subnormal = jnp.round(entry / step) * step
            rounded = jnp.where(jnp.abs(entry) < float(info.tiny), subnormal, rounded)
        rounded = rounded / unit
        beta = beta + (exact - rounded) * t.cosine
    along_column = beta * t.terms.feature_norm * t.terms.inverse_column_norm
    return Pull(rounded, beta * t.terms.column_norm, t.terms.inverse_feature_norm, along_column)


def is_label(labels: jax.Array, classes: int) -> jax.Array:
    """(batch, classes), true at each row's label: compared with an iota, nothing is gathered."""
    shape = labels.shape[0], classes
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) == labels[:, None]


def product(
    lhs: jax.Array, lhs_axis: int, rhs: jax.Array, rhs_axis: int, classes: int
) -> jax.Array:
    """The product summed over one axis of each matrix, accumulated in float32 or better.

    With few classes its precision is full, else JAX's default. The default on a TPU rounds float32
    operands to bfloat16. At small angles a gradient is the difference of two terms up to m² times
    as long, and the rounding error grows with them.
    """
    dtype: Any = _checks.at_least_f32(lhs.dtype)
    precision = jax.lax.Precision.HIGHEST if classes <= FEW_CLASSES else None
    axes = (((lhs_axis,), (rhs_axis,)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, axes, precision, preferred_element_type=dtype)
