"""How compilers lay out and sum a large kernel, and what follows for it.

A TPU stores a matrix in tiles of 8 x 128 numbers, row by row or column by column, whichever pads
less. A loop's body is given the order that its products like best, which for a kernel of many
classes means a copy before the loop and another after it; and a single column of a matrix stored
by rows cannot be gathered, so XLA copies the whole matrix first.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from lsoftmax_jax._core.mesh import zeros_like_rows

_SUBLANES, _LANES = 8, 128
# Below this many numbers a sum over the rows of a matrix costs less than a loop.
_FEW = 2**16


def is_by_columns(shape: tuple[int, int]) -> bool:
    """Whether a TPU stores such a matrix column by column."""

    def padded(rows: int, columns: int) -> int:
        return -(-rows // _SUBLANES) * _SUBLANES * (-(-columns // _LANES) * _LANES)

    rows, columns = shape
    return padded(columns, rows) < padded(rows, columns)


def as_stored(array: jax.Array, batch: Any) -> jax.Array:
    """`array`, a matrix, in the order in which a TPU stores it outside a loop.

    Args:
      batch: the number of rows of the features. Where it is a symbol of `jax.export`, the order is
        left to the compiler: an exported program may not hold the constraint.
    """
    if not isinstance(batch, int):
        return array
    rows, columns = array.shape
    layout = Layout((1, 0) if is_by_columns((rows, columns)) else (0, 1))

    def constrained(array: jax.Array) -> jax.Array:
        return with_layout_constraint(array, layout)

    return jax.lax.platform_dependent(array, tpu=constrained, default=lambda array: array)


def columns_at(kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """(batch, D): each row's column of the kernel (D, classes); any column where the label is -1.

    A TPU reads strips of 128 columns, one row after the other, where that moves fewer bytes than a
    copy of the kernel.
    """
    (rows, classes), batch = kernel.shape, labels.shape[0]
    # A copy reads and writes all columns. A symbolic batch of jax.export is not an int.
    strips = isinstance(batch, int) and classes >= _LANES and 2 * classes >= _LANES * batch
    if is_by_columns((rows, classes)) or not strips:
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


def sum_over_rows(
    one: jax.Array, two: jax.Array, dtype: jnp.dtype, factor: float = 1.0
) -> jax.Array:
    """(columns,) of `dtype`: the sum over the rows of two matrices, each times `factor`.

    On a CPU XLA's reduction sums the squares of a (256, 102400) matrix in 110 ms, and so does a
    loop over blocks of rows; a loop that adds one row after the other takes 3 ms. Other platforms
    reduce in one kernel.
    """

    def product(one: jax.Array, two: jax.Array) -> jax.Array:
        return (factor * one.astype(dtype)) * (factor * two.astype(dtype))

    def summed(one: jax.Array, two: jax.Array) -> jax.Array:
        return jnp.sum(product(one, two), axis=0)

    def looped(one: jax.Array, two: jax.Array) -> jax.Array:
        rows = one.shape[0]

        def add(total: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
            for row in range(count):
                parts = (
                    jax.lax.dynamic_index_in_dim(array, start + row, keepdims=False)
                    for array in (one, two)
                )
                total = total + product(*parts)
            return total

        whole = rows // _SUBLANES
        total = zeros_like_rows(one.shape[1:], one).astype(dtype)
        total = jax.lax.fori_loop(
            0, whole, lambda block, total: add(total, block * _SUBLANES, _SUBLANES), total
        )
        return add(total, whole * _SUBLANES, rows - whole * _SUBLANES)

    if one.size < _FEW:
        return summed(one, two)
    return jax.lax.platform_dependent(one, two, cpu=looped, default=summed)


def less_along(
    matrix: jax.Array, kernel: jax.Array, inverse_norm: jax.Array, along: jax.Array
) -> jax.Array:
    """`matrix` less `along` times the unit columns of the kernel, both (rows, columns).

    A loop changes the matrix in place on a CPU, where XLA would hold it twice.
    """

    def less(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
        # Two factors, because their product may overflow.
        return matrix - along[None, :] * (inverse_norm[None, :] * kernel.astype(matrix.dtype))

    def looped(matrix: jax.Array, kernel: jax.Array) -> jax.Array:
        def change(matrix: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
            parts = (jax.lax.dynamic_slice_in_dim(a, start, count) for a in (matrix, kernel))
            return jax.lax.dynamic_update_slice_in_dim(matrix, less(*parts), start, axis=0)

        whole = matrix.shape[0] // _SUBLANES
        matrix = jax.lax.fori_loop(
            0, whole, lambda block, matrix: change(matrix, block * _SUBLANES, _SUBLANES), matrix
        )
        rest = matrix.shape[0] - whole * _SUBLANES
        return change(matrix, whole * _SUBLANES, rest) if rest else matrix

    # A slice of the loop's body may not be larger than the matrix, even where the loop has no turn.
    if matrix.size < _FEW or matrix.shape[0] < _SUBLANES:
        return less(matrix, kernel)
    return jax.lax.platform_dependent(matrix, kernel, cpu=looped, default=less)
