"""The other logits of each row and the two gradient products, in pieces.

For a row with target logit t and the logsumexp Z of the OTHER logits

    loss = softplus(Z - t) = logsumexp(all) - t,    g = dloss/dt = -sigmoid(Z - t)

softplus keeps the digits of a small loss, which a difference of two large numbers loses. With G the
gradient of the logits, G_j = -g exp(z_j - Z) for j != y and G_y = g alpha, the gradients are the
two matrix products of plain softmax, a scaled copy of features and a scaled copy of the kernel
(`Target` has alpha and beta):

    dfeatures = G kernel^T + diag(g beta |kernel_y| / |features|) features
    dkernel = features^T G + kernel diag(sum over a class's rows of g beta |features| / |kernel_y|)

The pieces in which the (batch, classes) arrays exist never change the numbers. A ragged tail is a
block of its own; nothing is padded.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lsoftmax_jax import _checks
from lsoftmax_jax._core.mesh import zeros_like_rows
from lsoftmax_jax._core.spec import Pieces, Spec
from lsoftmax_jax._core.target import (
    FEW_CLASSES,
    Columns,
    LabelTerms,
    Pull,
    Rows,
    Target,
    is_label,
    product,
    pulled_back,
)
from lsoftmax_jax._core.tiles import as_stored, less_along, sum_over_rows

Carry = TypeVar("Carry")

# Below this many logits an accelerator compares all labels faster than it launches a scatter.
_FEW_LOGITS = 2**23


class Others(NamedTuple):
    """A row's other logits in short; of none, `peak` is the lowest finite number, the rest 0."""

    peak: jax.Array  # the largest
    mass: jax.Array  # sum exp(z - peak)
    total: jax.Array  # their sum; 0 unless label smoothing asks for it

    @property
    def z(self) -> jax.Array:
        """Their logsumexp."""
        some = self.mass != 0
        return jnp.where(some, self.peak + jnp.log(jnp.where(some, self.mass, 1)), self.peak)

    @property
    def inverse_mass(self) -> jax.Array:
        some = self.mass != 0
        return jnp.where(some, 1 / jnp.where(some, self.mass, 1), 0)


class Kept(NamedTuple):
    """The exponentials that the backward pass takes from the forward pass."""

    exponentials: jax.Array  # (batch, columns): exp(z - peak) of the other logits, 0 at the target
    peaks: jax.Array  # (blocks, batch): the peak of each block of columns


def merge(one: Others, two: Others) -> Others:
    """The summary of two blocks of classes."""
    peak = jnp.maximum(one.peak, two.peak)
    mass = one.mass * jnp.exp(one.peak - peak) + two.mass * jnp.exp(two.peak - peak)
    return Others(peak, mass, one.total + two.total)


def exchanged(
    spec: Spec, labels: jax.Array, terms: LabelTerms, others: Others
) -> tuple[LabelTerms, Others]:
    """Joins what each device knows of the label's and the other logits, in one collective."""
    layout = spec.layout
    if layout is None:
        return terms, others
    known = [terms.product, terms.column_norm, others.peak, others.mass]
    known += [others.total] if spec.label_smoothing else []
    gathered = jax.lax.all_gather(jnp.stack(known), layout.class_axis)
    products, norms, peaks, masses, *totals = jnp.moveaxis(gathered, 1, 0)
    peak = jnp.max(peaks, axis=0, keepdims=True)
    mass = jnp.sum(masses * jnp.exp(peaks - peak), axis=0)
    total = jnp.sum(totals[0], axis=0) if totals else others.total
    norm = jnp.sum(norms, axis=0)
    terms = terms._replace(
        product=_checks.nan_unless(labels >= 0, jnp.sum(products, axis=0)),
        column_norm=norm,
        inverse_column_norm=jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), norm),
    )
    return terms, Others(peak[0], mass, total)


def summarise(spec: Spec, rows: Rows, columns: Columns) -> tuple[Others, Kept | None]:
    """Every row's other logits over all columns, and what the plan keeps for `gradients`."""
    pieces = spec.pieces
    if pieces.class_block is not None:
        return _summary_in_class_blocks(spec, pieces.class_block, rows, columns)
    if pieces.cpu_block is not None:
        in_blocks = functools.partial(_summary_in_class_blocks, spec, pieces.cpu_block)
        at_once = functools.partial(_summary_at_once, spec)
        return jax.lax.platform_dependent(rows, columns, cpu=in_blocks, default=at_once)
    if pieces.row_block is None:
        return _summary_at_once(spec, rows, columns)

    def step(_: None, block: Rows) -> tuple[None, Others]:
        return None, _summary(spec, block, columns)[0]

    return scan_rows(step, None, pieces.row_block, rows)[1], None


def _summary_at_once(spec: Spec, rows: Rows, columns: Columns) -> tuple[Others, Kept]:
    others, exponentials = _summary(spec, rows, columns)
    # The shape that a CPU's blocks give: both are branches of one conditional.
    count = _count_of(columns, spec.pieces.cpu_block)
    return others, Kept(exponentials, jnp.broadcast_to(others.peak, (count, *others.peak.shape)))


def _summary_in_class_blocks(
    spec: Spec, size: int, rows: Rows, columns: Columns
) -> tuple[Others, Kept | None]:
    dtype, shape = rows.features.dtype, (rows.labels.shape[0], columns.kernel.shape[1])

    def step(carry: Any, start: Any, block: Columns) -> Any:
        others, kept = carry
        more, exponentials = _summary(spec, _from(start, rows), block)
        if kept is not None:
            kept = Kept(
                with_part(kept.exponentials, exponentials, start, axis=1),
                with_part(kept.peaks, more.peak[None], start // size, axis=0),
            )
        return merge(others, more), kept

    wide = rows.features.astype(_checks.at_least_f32(dtype))
    none = zeros_like_rows(rows.labels.shape, wide)
    nothing, kept = Others(none + jnp.finfo(none.dtype).min, none, none), None
    if spec.pieces.keep_exponentials:
        peaks = zeros_like_rows((_count_of(columns, size), shape[0]), wide)
        kept = Kept(zeros_like_rows(shape, wide).astype(dtype), peaks)
    return scan_classes(step, (nothing, kept), columns, size)


def _count_of(columns: Columns, size: int | None) -> int:
    """The number of blocks of columns."""
    return 1 if size is None else -(-columns.kernel.shape[1] // size)


def _part(kept: Kept, start: Any, width: int, block: Any) -> Kept:
    """What was kept of a block of columns."""
    exponentials = jax.lax.dynamic_slice_in_dim(kept.exponentials, start, width, axis=1)
    return Kept(exponentials, jax.lax.dynamic_slice_in_dim(kept.peaks, block, 1))


def with_part(array: jax.Array, part: jax.Array, start: Any, axis: int) -> jax.Array:
    part = part.astype(array.dtype)
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)


def _from(start: Any, rows: Rows) -> Rows:
    """Rows whose labels count from the class `start`."""
    return rows._replace(labels=rows.labels - start)


def _summary(spec: Spec, rows: Rows, columns: Columns) -> tuple[Others, jax.Array]:
    """The other logits of a block, and exp(z - peak), 0 at the target."""
    at_label, plain = is_label(rows.labels, columns.kernel.shape[1]), plain_logits(rows, columns)
    logits = _others_of(at_label, plain, columns)
    # The lowest finite number, not -inf, where there is no other class: inf - inf is NaN.
    lowest = jnp.finfo(logits.dtype).min
    peak = jax.lax.platform_dependent(
        jax.lax.stop_gradient(logits),
        # On a CPU clamping every logit is a pass of its own (test_plans_hlo).
        cpu=lambda logits: jnp.maximum(jnp.max(logits, axis=1), lowest),
        # On an accelerator clamping the maxima is a kernel of its own (`compile`'s kernel counts).
        default=lambda logits: jnp.max(jnp.maximum(logits, lowest), axis=1),
    )
    exponentials = jnp.exp(logits - peak[:, None])
    total = jnp.zeros_like(peak)
    if spec.label_smoothing:
        total = jnp.sum(jnp.where(at_label, 0, _counted(plain, columns)), axis=1)
    return Others(peak, jnp.sum(exponentials, axis=1), total), exponentials


def plain_logits(rows: Rows, columns: Columns) -> jax.Array:
    """The logits without margin and offset, in float32 or better."""
    kernel = columns.kernel
    logits = product(rows.features, 1, kernel, 0, kernel.shape[1])
    if rows.scale is not None:
        logits = logits * rows.scale[:, None]
    if columns.inverse_norm is not None:
        logits = logits * columns.inverse_norm[None, :]
    return logits


def _others_of(at_label: jax.Array, plain: jax.Array, columns: Columns) -> jax.Array:
    """The logits with their offset, -inf at the target."""
    if columns.offset is not None:
        plain = plain + columns.offset[None, :]
    return jnp.where(at_label, -jnp.inf, plain)


def _counted(values: jax.Array, columns: Columns) -> jax.Array:
    """(batch, columns) values times the number of classes for which each column stands."""
    if columns.offset is None:
        return values
    count = jnp.exp(columns.offset)[None, :]
    return jnp.where(count > 0, count * values, 0)


def loss_of(spec: Spec, t: Target, others: Others, classes: Any) -> jax.Array:
    loss = jax.nn.softplus(others.z - t.logit)
    if spec.label_smoothing:
        mean = (t.logit + others.total) / classes
        loss = loss + spec.label_smoothing * (t.logit - mean)
    return loss


class LogitGradient(NamedTuple):
    """The gradient of the logits, in its factors: one value a row."""

    peak: jax.Array  # of the other logits
    softmax: jax.Array  # times exp(z_j - peak): the gradient of the other logits
    uniform: jax.Array | None  # what label smoothing subtracts from each of them
    target: Pull
    dlam: jax.Array | None


def logit_gradient(
    spec: Spec, t: Target, others: Others, classes: Any, cotangent: jax.Array
) -> LogitGradient:
    """From the cotangent of each row's loss."""
    smoothing = spec.label_smoothing
    below = cotangent * jax.nn.sigmoid(others.z - t.logit)
    g = -below
    if smoothing:
        # smoothing - below loses digits where both are near 1 and differ by 1 / classes.
        towards = jax.nn.sigmoid(t.logit - others.z) - 1 / classes
        g = cotangent * (smoothing * towards) + (1 - smoothing) * g
    uniform = cotangent * (smoothing / classes) if smoothing else None
    # Not times exp(-z): the rounding of a logarithm would be an error of all classes alike.
    softmax = below * others.inverse_mass
    dlam = None if t.dlam is None else g * t.dlam
    return LogitGradient(others.peak, softmax, uniform, pulled_back(g, t, spec.dtype), dlam)


def gradients(
    pieces: Pieces, rows: Rows, columns: Columns, gradient: LogitGradient, kept: Kept | None
) -> tuple[jax.Array, jax.Array]:
    """dfeatures in the accumulation dtype and dkernel in `stored_dtype`, by the plan."""
    operands = rows, columns, gradient, kept
    if pieces.class_block is not None:
        return _gradients_in_class_blocks(pieces.class_block, *operands)
    if pieces.cpu_block is not None:
        in_blocks = functools.partial(_gradients_in_class_blocks, pieces.cpu_block)
        return jax.lax.platform_dependent(*operands, cpu=in_blocks, default=_gradients_at_once)
    if pieces.row_block is None:
        return _gradients_at_once(*operands)

    def step(dkernel: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        dfeatures, change = block_gradients(block[0], columns, block[1], None)
        return dkernel + change, dfeatures

    zeros = zeros_like_rows(columns.kernel.shape, gradient.softmax)
    dkernel, dfeatures = scan_rows(step, zeros, pieces.row_block, (rows, gradient))
    return with_norms(rows, columns, gradient, dfeatures, dkernel)


def _gradients_at_once(
    rows: Rows, columns: Columns, gradient: LogitGradient, kept: Kept | None
) -> tuple[jax.Array, jax.Array]:
    dfeatures, dkernel = block_gradients(rows, columns, gradient, kept)
    return with_norms(rows, columns, gradient, dfeatures, dkernel)


def _gradients_in_class_blocks(
    size: int, rows: Rows, columns: Columns, gradient: LogitGradient, kept: Kept | None
) -> tuple[jax.Array, jax.Array]:
    kernel = columns.kernel
    sums = label_sums(gradient.target.along_column, rows.labels, kernel.shape[1])

    def step(carry: Any, start: Any, block: Columns) -> Any:
        dfeatures, dkernel = carry
        width = block.kernel.shape[1]
        own = None if kept is None else _part(kept, start, width, start // size)
        change, dcolumns = block_gradients(_from(start, rows), block, gradient, own)
        dcolumns = columns_with_norms(block, sums_from(sums, start, width), dcolumns)
        return dfeatures + change, with_part(dkernel, dcolumns, start, axis=1)

    zeros = zeros_like_rows(rows.features.shape, gradient.softmax)
    dkernel = zeros_like_rows(kernel.shape, gradient.softmax).astype(stored_dtype(kernel.dtype))
    dfeatures, dkernel = scan_classes(step, (zeros, dkernel), columns, size)
    return features_with_norms(rows, gradient.target, dfeatures), dkernel


def stored_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of a kernel's gradient until the loss is scaled.

    float16 ends at 6e-8 and 65504: a gradient is cast to float16 only after the caller's loss scale
    has been applied.
    """
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)


def block_gradients(
    rows: Rows,
    columns: Columns,
    gradient: LogitGradient,
    kept: Kept | None,
) -> tuple[jax.Array, jax.Array]:
    """(dfeatures, dkernel) of a block of columns, without the terms of the norms.

    Labels count from the block's first class. Without `kept`, which is the block's own, the logits
    are computed again.
    """
    at_label = is_label(rows.labels, columns.kernel.shape[1])
    if kept is None:
        logits = _others_of(at_label, plain_logits(rows, columns), columns)
        exponentials, scale = jnp.exp(logits - gradient.peak[:, None]), gradient.softmax
    else:
        exponentials = kept.exponentials
        scale = gradient.softmax * jnp.exp(kept.peaks[0] - gradient.peak)
    grad = exponentials.astype(scale.dtype) * scale[:, None]
    if gradient.uniform is not None:
        grad = grad - _counted(gradient.uniform[:, None], columns)
    return products(rows, columns, jnp.where(at_label, gradient.target.plain[:, None], grad))


def products(rows: Rows, columns: Columns, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(dfeatures, dkernel) of the logits' gradient (batch, columns), without the norms' terms."""
    if rows.scale is not None:
        grad = grad * rows.scale[:, None]
    if columns.inverse_norm is not None:
        grad = grad * columns.inverse_norm[None, :]
    grad = grad.astype(rows.features.dtype)
    kernel, classes = columns.kernel, columns.kernel.shape[1]
    dfeatures = product(grad, 1, kernel, 1, classes)
    return dfeatures, product(rows.features, 0, grad, 0, classes)


def with_norms(
    rows: Rows,
    columns: Columns,
    gradient: LogitGradient,
    dfeatures: jax.Array,
    dkernel: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adds the terms of the norms to both gradients."""
    sums = label_sums(gradient.target.along_column, rows.labels, columns.kernel.shape[1])
    # Without this, XLA for v6e transposes and copies the kernel (`compile`: kernel-sized moves).
    dkernel = as_stored(dkernel, rows.features.shape[0])
    dkernel = columns_with_norms(columns, sums, dkernel)
    dkernel = dkernel.astype(stored_dtype(columns.kernel.dtype))
    classes = columns.kernel.shape[1]
    return features_with_norms(rows, gradient.target, dfeatures, classes), dkernel


def features_with_norms(
    rows: Rows, pull: Pull, dfeatures: jax.Array, classes: int = 0
) -> jax.Array:
    """Adds the term along features, or removes that component where their norm is replaced.

    The term has two factors because their product may overflow.

    Args:
      classes: of the product that has just given `dfeatures`; 0 if a loop gave them.
    """
    if pull.along_feature is None or pull.inverse_feature_norm is None:
        return dfeatures
    directions = pull.inverse_feature_norm[:, None] * rows.features.astype(dfeatures.dtype)
    if rows.scale is None:
        return dfeatures + pull.along_feature[:, None] * directions

    def along(directions: jax.Array, dfeatures: jax.Array) -> jax.Array:
        return jnp.sum(directions * dfeatures, axis=1, keepdims=True)

    def compared(directions: jax.Array, dfeatures: jax.Array) -> jax.Array:
        parts = jnp.where(directions == 0, 0, directions * dfeatures)
        return jnp.sum(parts, axis=1, keepdims=True)

    # XLA for CPUs would fuse the sum with the product, which then takes half as long again
    # (test_plans_hlo, and ArcFace in `bench head`). A comparison between the two prevents that.
    on_cpu = compared if classes > FEW_CLASSES else along
    sizes = jax.lax.platform_dependent(directions, dfeatures, cpu=on_cpu, default=along)
    return dfeatures - directions * sizes


def columns_with_norms(columns: Columns, sums: jax.Array | None, dkernel: jax.Array) -> jax.Array:
    """The same for columns; `sums` has the sum of `Pull.along_column` over each column's rows."""
    if sums is None:
        return dkernel
    if columns.inverse_norm is None:
        return dkernel + sums[None, :] * columns.kernel.astype(dkernel.dtype)
    along = sum_over_rows(columns.kernel, dkernel, dkernel.dtype) * columns.inverse_norm
    return less_along(dkernel, columns.kernel, columns.inverse_norm, along)


def label_sums(values: jax.Array | None, labels: jax.Array, classes: int) -> jax.Array | None:
    """(classes,): the sum of each row's value into its label's column; None without values.

    Scalars are scattered, not rows of D values, which is the slow path on a GPU
    (https://github.com/openxla/xla/issues/46225). Below `_FEW_LOGITS` comparing labels beats
    launching a scatter: one kernel, not three.
    """

    def scattered(values: jax.Array, labels: jax.Array) -> jax.Array:
        # A negative index would wrap to the last class.
        index = jnp.where(labels >= 0, labels, classes)
        return jnp.zeros(classes, values.dtype).at[index].add(values, mode="drop")

    def summed(values: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(is_label(labels, classes), values[:, None], 0), axis=0)

    if values is None:
        return None
    batch = labels.shape[0]
    if not isinstance(batch, int) or batch * classes > _FEW_LOGITS:
        return scattered(values, labels)
    return jax.lax.platform_dependent(values, labels, cpu=scattered, default=summed)


def sums_from(sums: jax.Array | None, start: Any, width: int) -> jax.Array | None:
    """`label_sums` of `width` columns."""
    return None if sums is None else jax.lax.dynamic_slice_in_dim(sums, start, width)


def scan_rows(
    step: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, block: int, rows: Any
) -> tuple[Carry, Any]:
    """Like `lax.scan(step, carry, rows)` with `block` rows a step.

    A block takes every count-th row, so that devices that share the batch share each block. Every
    device would compute all of a block of neighbours.
    """
    total = jax.tree.leaves(rows)[0].shape[0]
    count = total // block
    if not count:
        return step(carry, rows)
    whole = count * block
    pieces = jax.tree.map(lambda r: r[:whole].reshape(block, count, *r.shape[1:]), rows)

    def body(carry: Carry, index: jax.Array) -> tuple[Carry, Any]:
        # Not scanned over: that would take a transposed copy of the features.
        return step(carry, jax.tree.map(lambda piece: piece[:, index], pieces))

    carry, outputs = jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))
    outputs = jax.tree.map(lambda r: r.swapaxes(0, 1).reshape(whole, *r.shape[2:]), outputs)
    if whole < total:
        carry, last = step(carry, jax.tree.map(lambda r: r[whole:], rows))
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
    return carry, outputs


def scan_classes(
    step: Callable[[Carry, Any, Columns], Carry], carry: Carry, columns: Columns, block: int
) -> Carry:
    """step(carry, first class, columns of the block) -> carry, block by block."""
    classes = columns.kernel.shape[1]
    count = classes // block

    def body(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
        return step(carry, index * block, slice_columns(columns, index * block, block)), None

    carry, _ = jax.lax.scan(body, carry, jnp.arange(count, dtype=jnp.int32))
    if tail := classes - count * block:
        carry = step(carry, count * block, slice_columns(columns, count * block, tail))
    return carry


def slice_columns(columns: Columns, start: Any, width: int) -> Columns:
    return jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, width, axis=array.ndim - 1),
        columns,
    )
