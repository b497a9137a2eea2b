"""Plans: in which pieces the (batch, classes) arrays of a loss and its gradient exist."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from lsoftmax_jax import _checks
from lsoftmax_jax._fused import LogitGradient, Others, Setting, merge
from lsoftmax_jax._placement import vary_over, varying_axes
from lsoftmax_jax._tiles import as_stored
from lsoftmax_jax.logits import (
    Columns,
    Rows,
    finished_columns,
    finished_features,
    is_label,
    label_sums,
    product,
    products_gradient,
)

Carry = TypeVar("Carry")

# Row blocks below this many rows starve the matrix units; class blocks win there.
_FEWEST_ROWS = 704
# A block of classes this wide keeps them busy; wider only costs memory.
_FEWEST_CLASSES, _MOST_CLASSES = 512, 8192


@dataclass(frozen=True)
class Plan:
    """In which pieces a loss is computed. It trades memory for time and never changes the numbers.

    The loss chooses one of three plans by `memory_budget`; `row_block` or `class_block` forces one:

    - one-shot: the backward pass keeps one (batch, classes) array of exponentials;
    - class blocks: only this kept array is large. Without `keep_exponentials` no array is large,
      and the backward pass computes the logits again;
    - row blocks: `row_block` rows of logits exist at a time and none are kept. With a given λ
      `lsoftmax_loss_sum` computes them once; all else computes them twice.

    Attributes:
      memory_budget: bytes that (batch, classes) temporaries may take, 1 GiB by default. Where the
        classes are sharded, it holds for each device.
      row_block: rows at a time; forces row blocks.
      class_block: classes at a time; forces class blocks. A block of all classes is the one-shot.
      keep_exponentials: True keeps the exponentials for the backward pass: three matrix products
        and a (batch, classes) array, in blocks of the operands' dtype. False computes them again:
        four products. None decides by the budget.

    Raises:
      TypeError, ValueError: a size is no int >= 1, or two of the fields contradict each other.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> plan = lsm.Plan(class_block=2, keep_exponentials=False)
      >>> loss = lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=5.0, plan=plan)
      >>> loss.round(3).tolist()
      [1.473..., 1.473...]
    """

    memory_budget: int = 2**30
    row_block: int | None = None
    class_block: int | None = None
    keep_exponentials: bool | None = None

    def __post_init__(self) -> None:
        _checks.check_size("memory_budget", self.memory_budget)
        for name in ("row_block", "class_block"):
            if getattr(self, name) is not None:
                _checks.check_size(name, getattr(self, name))
        if self.row_block is not None and self.class_block is not None:
            raise ValueError(
                f"row_block and class_block exclude each other, "
                f"got {self.row_block} and {self.class_block}"
            )
        if not (self.keep_exponentials is None or isinstance(self.keep_exponentials, bool)):
            raise TypeError(
                f"keep_exponentials must be True, False or None, got {self.keep_exponentials!r}"
            )
        if self.row_block is not None and self.keep_exponentials:
            raise ValueError("row_block keeps no exponentials, got keep_exponentials=True")


class Pieces(NamedTuple):
    """A plan for one size of head."""

    row_block: int | None = None
    class_block: int | None = None
    keep_exponentials: bool = True


def pieces_of(
    plan: Plan | None, batch: int, classes: int, dtype: jnp.dtype, *, rows_cost_no_more: bool
) -> Pieces:
    """The fastest pieces within the budget, as far as the plan leaves it open."""
    if plan is None:
        plan = Plan()
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a lsoftmax_jax.Plan or None, got {plan!r}")
    if plan.row_block is not None:
        return Pieces(row_block=min(plan.row_block, max(batch, 1)), keep_exponentials=False)
    wide = max(dtype.itemsize, 4)
    keep, block = plan.keep_exponentials, plan.class_block
    if block is None and keep is not False:
        rows = plan.memory_budget // (wide * classes)
        if batch <= rows:
            return Pieces()
        if keep is None and rows_cost_no_more and rows >= _FEWEST_ROWS:
            return Pieces(row_block=rows // 64 * 64, keep_exponentials=False)
    if keep is None:
        keep = dtype.itemsize * batch * classes <= plan.memory_budget
    if block is None:
        # A block's logits and exponentials exist at once.
        affordable = plan.memory_budget // (2 * wide * max(batch, 1)) // 128 * 128
        block = max(min(affordable, _MOST_CLASSES), _FEWEST_CLASSES)
    return Pieces(class_block=min(block, classes), keep_exponentials=keep)


def summarise(setting: Setting, pieces: Pieces, rows: Rows, columns: Columns) -> tuple[Others, Any]:
    """Every row's other logits over all columns, and what the plan keeps for `gradients`."""
    if pieces.row_block is not None:

        def row_step(_: None, block: Rows) -> tuple[None, Others]:
            return None, _summary(setting, block, columns)[0]

        return scan_rows(row_step, None, pieces.row_block, rows)[1], None
    if pieces.class_block is None:
        others, exponentials = _summary(setting, rows, columns)
        return others, (exponentials, others.peak)
    dtype = rows.features.dtype

    def step(others: Others, start: Any, block: Columns, _: None) -> tuple[Others, Any]:
        more, exponentials = _summary(setting, _from(start, rows), block)
        if not pieces.keep_exponentials:
            return merge(others, more), None
        return merge(others, more), (exponentials.astype(dtype), more.peak)

    wide = rows.features.astype(_checks.at_least_f32(dtype))
    none = zeros_like_rows(rows.labels.shape, wide)
    nothing = Others(none + jnp.finfo(none.dtype).min, none, none, none)
    return scan_classes(step, nothing, columns, pieces.class_block, (None, None))


def _from(start: Any, rows: Rows) -> Rows:
    """Rows whose labels count from the class `start`."""
    return rows._replace(labels=rows.labels - start)


def _summary(setting: Setting, rows: Rows, columns: Columns) -> tuple[Others, jax.Array]:
    """The other logits of a block, and exp(z - peak), 0 at the target."""
    _, logits = _other_logits(rows, columns)
    # The lowest finite number rather than -inf where there is no other class: no inf - inf.
    lowest = jnp.finfo(logits.dtype).min
    peak = jax.lax.platform_dependent(
        jax.lax.stop_gradient(logits),
        cpu=lambda logits: jnp.maximum(jnp.max(logits, axis=1), lowest),  # no pass more
        default=lambda logits: jnp.max(jnp.maximum(logits, lowest), axis=1),  # no kernel more
    )
    below = logits - peak[:, None]
    exponentials = jnp.exp(below)
    total = moment = jnp.zeros_like(peak)
    if setting.label_smoothing:
        total = jnp.sum(jnp.where(jnp.isneginf(logits), 0, logits), axis=1)
    if setting.pace is not None:
        moment = jnp.sum(jnp.where(exponentials > 0, exponentials * below, 0), axis=1)
    return Others(peak, jnp.sum(exponentials, axis=1), total, moment), exponentials


def _other_logits(rows: Rows, columns: Columns) -> tuple[jax.Array, jax.Array]:
    """Where the target is, and the logits with -inf there."""
    at_label = is_label(rows.labels, columns.kernel.shape[1])
    logits = product(rows, columns)
    if columns.offset is not None:
        logits = logits + columns.offset[None, :]
    return at_label, jnp.where(at_label, -jnp.inf, logits)


def gradients(
    pieces: Pieces, rows: Rows, columns: Columns, gradient: LogitGradient, kept: Any
) -> tuple[jax.Array, jax.Array]:
    """dfeatures in the accumulation dtype and dkernel in the kernel's, by the plan."""
    kernel, dtype = columns.kernel, columns.kernel.dtype
    if pieces.class_block is None:

        def row_step(dkernel: Any, block: Any) -> tuple[jax.Array, jax.Array]:
            dfeatures, change = block_gradients(block[0], columns, block[1], kept)
            return change if dkernel is None else dkernel + change, dfeatures

        if pieces.row_block is None:
            dkernel, dfeatures = row_step(None, (rows, gradient))
        else:
            zeros = zeros_like_rows(kernel.shape, gradient.softmax)
            dkernel, dfeatures = scan_rows(row_step, zeros, pieces.row_block, (rows, gradient))
        return finished(rows, columns, gradient, dfeatures, dkernel)
    sums = label_sums(gradient.target.along_column, rows.labels, kernel.shape[1])

    def class_step(carry: Any, start: Any, block: Columns, kept: Any) -> tuple[Any, None]:
        dfeatures, dkernel = carry
        change, dcolumns = block_gradients(_from(start, rows), block, gradient, kept)
        own = jax.lax.dynamic_slice_in_dim(sums, start, block.kernel.shape[1])
        dcolumns = finished_columns(block, own, dcolumns).astype(dtype)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, dcolumns, start, axis=1)
        return (dfeatures + change, dkernel), None

    zeros = zeros_like_rows(rows.features.shape, gradient.softmax)
    carry = zeros, zeros_like_rows(kernel.shape, gradient.softmax).astype(dtype)
    dfeatures, dkernel = scan_classes(class_step, carry, columns, pieces.class_block, kept)[0]
    return finished_features(rows, gradient.target, dfeatures), dkernel


def block_gradients(
    rows: Rows,
    columns: Columns,
    gradient: LogitGradient,
    kept: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """(dfeatures, dkernel) of a block of columns, to be finished.

    Labels count from the block's first class. What was kept is (exp(z - peak), peak) with
    another peak for each block; without, the logits are computed again.
    """
    if kept is None:
        at_label, logits = _other_logits(rows, columns)
        exponentials, scale = jnp.exp(logits - gradient.peak[:, None]), gradient.softmax
    else:
        at_label = is_label(rows.labels, columns.kernel.shape[1])
        exponentials, scale = kept[0], gradient.softmax * jnp.exp(kept[1] - gradient.peak)
    grad = exponentials.astype(scale.dtype) * scale[:, None]
    if gradient.uniform is not None:
        uniform = gradient.uniform[:, None]
        if columns.offset is not None:
            uniform = jnp.where(jnp.isneginf(columns.offset)[None, :], 0, uniform)
        grad = grad - uniform
    grad = jnp.where(at_label, gradient.target.plain[:, None], grad)
    return products_gradient(rows, columns, grad)


def finished(
    rows: Rows,
    columns: Columns,
    gradient: LogitGradient,
    dfeatures: jax.Array,
    dkernel: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """With what the norms of features and columns have to do with it."""
    sums = label_sums(gradient.target.along_column, rows.labels, columns.kernel.shape[1])
    # Or a v6e computes all products in the other order, and copies the kernel and its gradient.
    dkernel = as_stored(dkernel)
    dkernel = finished_columns(columns, sums, dkernel).astype(columns.kernel.dtype)
    return finished_features(rows, gradient.target, dfeatures), dkernel


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
    return vary_over(jnp.zeros(shape, rows.dtype), varying_axes(rows))
