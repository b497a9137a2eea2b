"""The order in which a TPU stores the kernel; test_compiled.py has the compiled programs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsoftmax_jax._core import tiles


@pytest.mark.parametrize(
    "shape, by_columns",
    [
        ((512, 1_000_000), True),
        ((512, 1_048_576), False),
        ((500, 1_000_000), False),
        ((256, 10), True),
        ((65, 1_000_000), False),
    ],
)
def test_the_order_with_less_padding_is_stored(shape, by_columns):
    # libtpu 0.0.42 reported these orders for bfloat16 and float32, on v5e and v6e.
    assert tiles.is_by_columns(shape) == by_columns


@pytest.mark.parametrize("shape", [(121, 1_000_001), (1_000_001, 121), (9, 129), (8, 128)])
def test_tiles_are_of_8_by_128(shape):
    def bytes_of(rows, columns):
        return 8 * math.ceil(rows / 8) * 128 * math.ceil(columns / 128)

    assert tiles.is_by_columns(shape) == (bytes_of(*shape[::-1]) < bytes_of(*shape))


@pytest.mark.parametrize("classes", [128, 300, 384])
def test_strips_hold_the_labels_columns(classes):
    kernel = np.random.default_rng(0).standard_normal((5, classes), np.float32)
    labels = np.array([0, 127, classes - 1, classes // 2, -1])
    columns = jax.jit(tiles.read_in_strips)(kernel, labels)
    np.testing.assert_array_equal(columns[:4], kernel[:, labels[:4]].T)
    assert np.all(np.isfinite(columns[4]))


def test_a_strips_other_columns_may_hold_anything():
    kernel = jnp.full((3, 256), jnp.nan).at[:, 200].set(7.0)
    columns = tiles.read_in_strips(kernel, jnp.array([200]))
    np.testing.assert_array_equal(columns, [[7.0, 7.0, 7.0]])


@pytest.mark.parametrize("classes, order", [(1_000_000, "0, 1"), (1_048_576, "1, 0")])
def test_a_tpu_is_told_the_stored_order_minor_to_major(classes, order):
    kernel = jax.ShapeDtypeStruct((512, classes), jnp.float32)
    traced = jax.jit(tiles.as_stored, static_argnums=1).trace(kernel, 256)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert f"result_layouts = [dense<[{order}]>" in text


def test_an_array_in_its_stored_order_is_itself():
    array = jnp.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(tiles.as_stored(array, 4), array)


@pytest.mark.parametrize("rows, read", [(8, "while"), (32768, "gather")])
def test_columns_are_read_in_strips_where_that_is_less_than_a_copy(rows, read):
    kernel = jax.ShapeDtypeStruct((512, 1_048_576), jnp.float32)
    traced = jax.jit(tiles.columns_at).trace(kernel, jax.ShapeDtypeStruct((rows,), jnp.int32))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert {word for word in ("while", "gather") if f"stablehlo.{word}" in text} == {read}


# Rows that do not divide, that do, fewer rows than a turn of the loop takes, and few numbers.
MATRICES = (13, 8192), (64, 4096), (5, 20_000), (3, 5)


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_over_rows_and_what_is_taken_off_the_columns(shape, dtype):
    rng = np.random.default_rng(0)
    one, two = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    first, second = (np.asarray(array, np.float64) for array in (one, two))
    sums = jax.jit(lambda one, two: tiles.sum_over_rows(one, two, jnp.float32, 2.0))(one, two)
    np.testing.assert_allclose(sums, 4 * (first * second).sum(axis=0), rtol=1e-5, atol=1e-4)
    matrix, inverse, along = (rng.standard_normal(size) for size in (shape, shape[1], shape[1]))
    given = (jnp.asarray(array, jnp.float32) for array in (matrix, inverse, along))
    less = jax.jit(tiles.less_along)(next(given), one, *given)
    np.testing.assert_allclose(less, matrix - along * inverse * first, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", MATRICES[:3])
def test_a_cpu_adds_rows_without_a_reduction(shape):
    """XLA's reduction over the rows takes 30 times as long as adding one row after the other."""
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    traced = jax.jit(lambda kernel: tiles.sum_over_rows(kernel, kernel, jnp.float32)).trace(kernel)
    assert "reduce" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.reduce" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_kernel_narrower_than_a_strip_is_gathered():
    kernel = jnp.arange(6.0 * 100).reshape(6, 100)
    columns = jax.jit(tiles.columns_at)(kernel, jnp.array([7]))
    np.testing.assert_array_equal(columns, kernel[:, 7][None])
