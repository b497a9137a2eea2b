"""The algebra of the fused loss and its gradient, and the plans that compute it.

For a row with target logit t and the logsumexp Z of the OTHER logits:

    loss = softplus(Z - t) = logsumexp(all) - t,    g = dloss/dt = -sigmoid(Z - t)

softplus keeps the digits of a small loss, which the difference of two large numbers has lost.
With G the gradient of the logits, G_j = -g exp(z_j - Z) for j != y and G_y = g alpha, the
gradients are the two matrix products of plain softmax, a scaled copy of features and a scaled
copy of the kernel (`Target` has alpha, row and column):

    dfeatures = G kernel^T + diag(g row) features
    dkernel = features^T G + kernel diag(sum over the rows of each class of g column)

A plan says in which pieces the (batch, classes) arrays exist; it never changes the numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lsoftmax_jax import arguments
from lsoftmax_jax.logits import (
    Pull,
    along_columns,
    along_rows,
    column_sums,
    features_gradient,
    hits,
    kernel_gradient,
    product,
    pull_target,
)
from lsoftmax_jax.margin import Target

Carry = TypeVar("Carry")


class Statistics(NamedTuple):
    """What the loss saw of each row, at no second pass; no gradients flow through it.

    `plain_logit > max_logit` is the margin-free hit, the one to report as training accuracy.

    Attributes:
      target_cosine: cos(theta_y).
      target_logit: the label's logit with margin and annealing.
      plain_logit: features . kernel_y, the label's logit without.
      max_logit: the largest other logit.
    """

    target_cosine: jax.Array
    target_logit: jax.Array
    plain_logit: jax.Array
    max_logit: jax.Array


class Plan(NamedTuple):
    """In which pieces the (batch, classes) arrays exist. Static."""

    row_block: int | None = None  # rows at a time, all classes
    class_block: int | None = None  # classes at a time, all rows
    keep_exponentials: bool = True  # for the backward pass; otherwise it recomputes the logits


class Setting(NamedTuple):
    margin: int
    label_smoothing: float
    plan: Plan
    classes: int  # of the whole head, of which a kernel may hold a shard


class Columns(NamedTuple):
    """Columns of a kernel, and what is added to their logits except as a target.

    An offset of -inf takes a column out: padding of a ragged shard, a sample drawn twice.
    """

    kernel: jax.Array  # (D, columns)
    offset: jax.Array | None = None  # (columns,)


class Others(NamedTuple):
    """A row's logits but the target's, summarised: sum exp(z - peak), sum z."""

    peak: jax.Array  # the largest; the lowest finite number where there is none
    mass: jax.Array
    total: jax.Array  # 0 unless label smoothing asks for it


class Row(NamedTuple):
    """What the gradient of a row's logits is made of."""

    z: jax.Array  # logsumexp of the other logits
    others: jax.Array  # the weight of exp(z_j - z) in the other logits' gradient
    uniform: jax.Array | None  # what label smoothing takes off every one of them
    target: Pull
    dlam: jax.Array


def summarise(
    setting: Setting, features: jax.Array, columns: Columns, labels: jax.Array
) -> tuple[Others, Any]:
    """Every row's other logits over all columns, and what the plan keeps for `gradients`."""
    plan, totals = setting.plan, setting.label_smoothing > 0
    if plan.row_block is not None:

        def row_step(_: None, rows: tuple[jax.Array, jax.Array]) -> tuple[None, Others]:
            return None, _summary(*rows, columns, totals)[0]

        return scan_rows(row_step, None, plan.row_block, (features, labels))[1], None
    if plan.class_block is None:
        others, exponentials = _summary(features, labels, columns, totals)
        return others, (exponentials, others.peak)

    def step(others: Others, start: Any, block: Columns, _: None) -> tuple[Others, Any]:
        more, exponentials = _summary(features, labels - start, block, totals)
        kept = (exponentials.astype(features.dtype), more.peak) if plan.keep_exponentials else None
        return merge(others, more), kept

    none = zeros_like_rows(labels.shape, features.astype(arguments.at_least_f32(features.dtype)))
    nothing = Others(none + jnp.finfo(none.dtype).min, none, none)
    return scan_classes(step, nothing, columns, plan.class_block, (None, None))


def _summary(
    features: jax.Array, labels: jax.Array, columns: Columns, totals: bool
) -> tuple[Others, jax.Array]:
    """The other logits of a block, and exp(z - peak), 0 at the target."""
    _, others = _other_logits(features, labels, columns)
    # The lowest finite number rather than -inf where there is no other class: no inf - inf.
    lowest = jnp.finfo(others.dtype).min
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(others, axis=1), lowest))
    exponentials = jnp.exp(others - peak[:, None])
    total = jnp.zeros_like(peak)
    if totals:
        total = jnp.sum(jnp.where(jnp.isneginf(others), 0, others), axis=1)
    return Others(peak, jnp.sum(exponentials, axis=1), total), exponentials


def _other_logits(
    features: jax.Array, labels: jax.Array, columns: Columns
) -> tuple[jax.Array, jax.Array]:
    """Where the target is, and the logits with -inf there."""
    hit = hits(labels, columns.kernel.shape[1])
    logits = product(features, columns.kernel)
    if columns.offset is not None:
        logits = logits + columns.offset[None, :]
    return hit, jnp.where(hit, -jnp.inf, logits)


def merge(one: Others, two: Others) -> Others:
    peak = jnp.maximum(one.peak, two.peak)
    mass = one.mass * jnp.exp(one.peak - peak) + two.mass * jnp.exp(two.peak - peak)
    return Others(peak, mass, one.total + two.total)


def loss_and_z(setting: Setting, t: Target, others: Others) -> tuple[jax.Array, jax.Array]:
    """The loss and the logsumexp of the other logits, the lowest finite number without any."""
    some = others.mass != 0
    z = jnp.where(some, others.peak + jnp.log(jnp.where(some, others.mass, 1)), others.peak)
    loss = jax.nn.softplus(z - t.logit)
    if setting.label_smoothing:
        mean = (t.logit + others.total) / setting.classes
        loss = loss + setting.label_smoothing * (t.logit - mean)
    return loss, z


def statistics_of(t: Target, others: Others) -> Statistics:
    seen = Statistics(t.cosine, t.logit, t.plain, others.peak)
    return jax.tree.map(jax.lax.stop_gradient, seen)


def gradient_row(
    setting: Setting, t: Target, z: jax.Array, weight: jax.Array, dtype: jnp.dtype
) -> Row:
    """From the cotangent `weight` of the row's loss, for matrix products in `dtype`."""
    smoothing, classes = setting.label_smoothing, setting.classes
    others = weight * jax.nn.sigmoid(z - t.logit)
    g = weight * (smoothing * (1 - 1 / classes)) - others
    uniform = weight * (smoothing / classes) if smoothing else None
    return Row(z, others, uniform, pull_target(g, t, dtype), g * t.lam)


def gradients(
    setting: Setting,
    features: jax.Array,
    columns: Columns,
    labels: jax.Array,
    row: Row,
    kept: Any,
) -> tuple[jax.Array, jax.Array]:
    """dfeatures in the accumulation dtype and dkernel in the kernel's, by the plan."""
    plan, kernel = setting.plan, columns.kernel
    if plan.class_block is None:

        def row_step(dkernel: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
            features, labels, row = rows
            dfeatures, change = block_gradients(features, columns, labels, row, kept)
            return change if dkernel is None else dkernel + change, dfeatures

        rows = features, labels, row
        if plan.row_block is None:
            dkernel, dfeatures = row_step(None, rows)
        else:
            zeros = zeros_like_rows(kernel.shape, row.z)
            dkernel, dfeatures = scan_rows(row_step, zeros, plan.row_block, rows)
        return add_along(features, kernel, labels, row, dfeatures, dkernel)
    sums = column_sums(row.target.column, labels, kernel.shape[1])

    def class_step(carry: Any, start: Any, block: Columns, kept: Any) -> tuple[Any, None]:
        dfeatures, dkernel = carry
        change, dcolumns = block_gradients(features, block, labels - start, row, kept)
        mine = jax.lax.dynamic_slice_in_dim(sums, start, block.kernel.shape[1])
        dcolumns = (dcolumns + along_columns(mine, block.kernel)).astype(kernel.dtype)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, dcolumns, start, axis=1)
        return (dfeatures + change, dkernel), None

    dkernel = zeros_like_rows(kernel.shape, row.z).astype(kernel.dtype)
    carry = along_rows(row.target.row, features), dkernel
    return scan_classes(class_step, carry, columns, plan.class_block, kept)[0]


def block_gradients(
    features: jax.Array,
    columns: Columns,
    labels: jax.Array,
    row: Row,
    kept: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """The two products with the logits' gradient, for a block of columns.

    Labels count from the block's first class. What was kept is (exp(z - peak), peak) with
    another peak for each block; without, the logits are computed again.
    """
    if kept is None:
        hit, others = _other_logits(features, labels, columns)
        exponentials, scale = jnp.exp(others - row.z[:, None]), row.others
    else:
        hit = hits(labels, columns.kernel.shape[1])
        exponentials, scale = kept[0], row.others * jnp.exp(kept[1] - row.z)
    grad = exponentials.astype(scale.dtype) * scale[:, None]
    if row.uniform is not None:
        uniform = row.uniform[:, None]
        if columns.offset is not None:
            uniform = jnp.where(jnp.isneginf(columns.offset)[None, :], 0, uniform)
        grad = grad - uniform
    grad = jnp.where(hit, row.target.at_target[:, None], grad).astype(features.dtype)
    return features_gradient(grad, columns.kernel), kernel_gradient(features, grad)


def add_along(
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    row: Row,
    dfeatures: jax.Array,
    dkernel: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adds what the target's norm and angle contribute along features and kernel."""
    sums = column_sums(row.target.column, labels, kernel.shape[1])
    dkernel = (dkernel + along_columns(sums, kernel)).astype(kernel.dtype)
    return dfeatures + along_rows(row.target.row, features), dkernel


# Loops over blocks of rows and of classes; a ragged tail is a block of its own, nothing is padded.


def scan_rows(
    step: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, block: int, rows: Any
) -> tuple[Carry, Any]:
    """Like `lax.scan(step, carry, rows)` with `block` rows a step."""
    count = jax.tree.leaves(rows)[0].shape[0]
    whole = count // block * block
    pieces = jax.tree.map(lambda r: r[:whole].reshape(-1, block, *r.shape[1:]), rows)
    carry, outputs = jax.lax.scan(step, carry, pieces)
    outputs = jax.tree.map(lambda r: r.reshape(whole, *r.shape[2:]), outputs)
    if whole < count:
        carry, last = step(carry, jax.tree.map(lambda r: r[whole:], rows))
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
    return carry, outputs


def scan_classes(
    step: Callable[[Carry, Any, Columns, Any], tuple[Carry, Any]],
    carry: Carry,
    columns: Columns,
    block: int,
    kept: tuple[Any, Any],
) -> tuple[Carry, tuple[Any, Any]]:
    """step(carry, first class, columns, kept of the block) -> (carry, kept), block by block.

    What is kept is a pair: of the full blocks, stacked, and of the tail.
    """
    classes = columns.kernel.shape[1]
    count = classes // block

    def body(carry: Carry, piece: Any) -> tuple[Carry, Any]:
        index, kept = piece
        return step(carry, index * block, slice_columns(columns, index * block, block), kept)

    carry, stacked = jax.lax.scan(body, carry, (jnp.arange(count, dtype=jnp.int32), kept[0]))
    tail = None
    if count * block < classes:
        last = slice_columns(columns, count * block, classes - count * block)
        carry, tail = step(carry, count * block, last, kept[1])
    return carry, (stacked, tail)


def slice_columns(columns: Columns, start: Any, width: int) -> Columns:
    return jax.tree.map(
        lambda array: jax.lax.dynamic_slice_in_dim(array, start, width, axis=array.ndim - 1),
        columns,
    )


def zeros_like_rows(shape: tuple[int, ...], rows: jax.Array) -> jax.Array:
    """Zeros of the dtype of `rows`, varying over devices as it does inside `jax.shard_map`."""
    return arguments.vary_over(jnp.zeros(shape, rows.dtype), arguments.varying_axes(rows))
