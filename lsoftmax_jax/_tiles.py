"""How XLA lays a matrix out in a TPU's memory, and what follows for a large kernel.

A TPU stores a matrix in tiles of 8 x 128 numbers, row by row or column by column, whichever of the
two fills up less. A loop's body is given the order that its products like best, which for a kernel
of many classes means a copy before the loop and one after it; and a single column of a matrix
stored by rows cannot be gathered, so that the whole is copied first.
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

_SUBLANES, _LANES = 8, 128


def is_by_columns(shape: tuple[int, int]) -> bool:
    """Whether a TPU stores such a matrix column by column."""

    def filled_up(rows: int, columns: int) -> int:
        return -(-rows // _SUBLANES) * _SUBLANES * (-(-columns // _LANES) * _LANES)

    rows, columns = shape
    return filled_up(columns, rows) < filled_up(rows, columns)


def as_stored(array: jax.Array) -> jax.Array:
    """`array`, a matrix, in the order that a TPU stores it in outside a loop."""
    rows, columns = array.shape
    layout = Layout((1, 0) if is_by_columns((rows, columns)) else (0, 1))

    def constrained(array: jax.Array) -> jax.Array:
        return with_layout_constraint(array, layout)

    return jax.lax.platform_dependent(array, tpu=constrained, default=lambda array: array)


def columns_at(kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """(batch, D): each row's column of the kernel (D, classes); any column where the label is -1.

    A TPU reads strips of 128 columns, one row after the other, where that is less than to copy the
    kernel.
    """
    rows, classes = kernel.shape
    # A copy reads and writes all columns.
    if is_by_columns((rows, classes)) or 2 * classes < _LANES * labels.shape[0]:
        return _gathered(kernel, labels)
    return jax.lax.platform_dependent(kernel, labels, tpu=read_in_strips, default=_gathered)


def _gathered(kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.take(kernel, labels, axis=1, mode="clip").T


def read_in_strips(kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """`columns_at` of a kernel with at least as many columns as a strip."""
    last = kernel.shape[1] - _LANES

    def column(label: jax.Array) -> jax.Array:
        start = jnp.clip(label // _LANES * _LANES, 0, last)
        strip = jax.lax.dynamic_slice_in_dim(kernel, start, _LANES, axis=1)
        return jnp.sum(jnp.where(jnp.arange(_LANES) == label - start, strip, 0), axis=1)

    return jax.lax.map(column, labels)
