"""What the devices of a class-parallel head exchange.

Collectives of `lsoftmax_loss_sum`, loss and gradients:

- 4 if the features are split over another axis than the kernel: the exchange, the features'
  gradient, the kernel's gradient over the data axis, the scalars;
- 5 if they are split over the class axis too, which gathers them first; 3 if over it alone.

With a data axis every device sums its columns' gradient over that axis. For very many classes this
is most of the bytes sent. A single axis for features and classes sends none of it.

`view` and `exchanged` take the `Spec`, `on_devices` and `splits` a `Layout`. All others take a
`Layout`, or None on one device, where they change nothing.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsoftmax_jax import _checks
from lsoftmax_jax._core.blocks import Others
from lsoftmax_jax._core.spec import Arrays, Layout, Spec
from lsoftmax_jax._core.target import Columns, LabelTerms, Rows, columns_of, label_terms, rows_of


def on_devices(
    layout: Layout, local: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`local` on every device of the layout."""
    # JAX cannot know that what a class axis gathers is the same on all its devices: no check.
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def splits(layout: Layout) -> Any:
    """How each array of an `Arrays` is split."""
    rows, scalar = layout.rows, P()
    specs: Any = rows, layout.columns, rows, scalar, rows, rows, layout.of_columns, scalar
    return Arrays(*specs)


def kept(layout: Layout | None, tree: Any) -> Any:
    """Each device's own arrays as the parts of whole ones, along a new first axis."""
    return tree if layout is None else jax.tree.map(lambda array: array[None], tree)


def own(layout: Layout | None, tree: Any) -> Any:
    """The device's part of what `kept` made."""
    return tree if layout is None else jax.tree.map(lambda array: array[0], tree)


def first_class(layout: Layout | None, width: int) -> Any:
    """The class of the first column of this device."""
    return 0 if layout is None else jax.lax.axis_index(layout.class_axis) * width


def view(spec: Spec, arrays: Arrays) -> tuple[Rows, Columns, LabelTerms]:
    """A device's rows, columns, and what it knows of the labels' logits.

    The rows' labels count from the device's first class; -1 stands for a class elsewhere.
    """
    layout, kernel, labels = spec.layout, arrays.kernel, arrays.labels
    width = kernel.shape[1]
    if layout is None:
        rows = rows_of(spec, arrays.features, labels)
        return rows, columns_of(spec, kernel, arrays.offset), label_terms(rows, kernel)
    start = first_class(layout, width)
    here = (labels >= start) & (labels < start + width)
    rows = rows_of(spec, arrays.features, jnp.where(here, labels - start, 0))
    terms = label_terms(rows, kernel)
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


def sum_of_features(layout: Layout | None, dfeatures: jax.Array) -> jax.Array:
    """The features' gradient summed over the classes, each device's own rows of it."""
    if layout is None:
        return dfeatures
    if layout.splits_rows:
        return jax.lax.psum_scatter(dfeatures, layout.class_axis, tiled=True)
    return jax.lax.psum(dfeatures, layout.class_axis)


def over_data(layout: Layout | None, tree: Any) -> Any:
    """Sums over the devices that split the batch."""
    return tree if layout is None or not layout.data_axes else jax.lax.psum(tree, layout.data_axes)


def own_rows(layout: Layout | None, tree: Any) -> Any:
    """This device's rows of arrays that hold the rows of the whole class axis."""
    if layout is None or not layout.splits_rows:
        return tree
    shards, index = layout.shards, jax.lax.axis_index(layout.class_axis)

    def part(array: jax.Array) -> jax.Array:
        rows = array.shape[0] // shards
        return jax.lax.dynamic_slice_in_dim(array, index * rows, rows)

    return jax.tree.map(part, tree)


def all_rows(layout: Layout | None, arrays: Arrays) -> Arrays:
    """`arrays` with the rows of all devices along the class axis."""
    if layout is None or not layout.splits_rows:
        return arrays
    of_rows = {"features": arrays.features, "labels": arrays.labels, "weights": arrays.weights}
    present = {name: array for name, array in of_rows.items() if array is not None}
    gathered = _gather(layout.class_axis, *present.values())
    return arrays._replace(**dict(zip(present, gathered, strict=True)))


def all_cotangents(layout: Layout | None, cotangent: jax.Array) -> jax.Array:
    if layout is None or not layout.splits_rows:
        return cotangent
    return jax.lax.all_gather(cotangent, layout.class_axis, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(axis: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of all devices along an axis, in one collective, as bits."""
    bits = jnp.dtype(f"uint{8 * arrays[0].dtype.itemsize}")
    parts = [_bits(array, bits) for array in arrays]
    packed = jax.lax.all_gather(jnp.concatenate(parts, axis=1), axis, tiled=True)
    outputs, start = [], 0
    for array, part in zip(arrays, parts, strict=True):
        piece = packed[:, start : start + part.shape[1]]
        outputs.append(_from_bits(piece, array.dtype, array.shape[1:]))
        start += part.shape[1]
    return tuple(outputs)


def _gather_fwd(axis: str, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    return _gather(axis, *arrays), None


def _gather_bwd(
    axis: str, _: None, cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    # Bits have no derivative; only a second derivative of the loss comes here.
    def scattered(cotangent: jax.Array) -> jax.Array | None:
        if cotangent.dtype == jax.dtypes.float0:
            return None
        return jax.lax.psum_scatter(cotangent, axis, tiled=True)

    return tuple(scattered(cotangent) for cotangent in cotangents)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _bits(array: jax.Array, bits: jnp.dtype) -> jax.Array:
    """(rows, ...) as (rows, words) of unsigned integers."""
    if array.dtype.itemsize < bits.itemsize:
        array = array.astype(jnp.int64)
    return jax.lax.bitcast_convert_type(array, bits).reshape(array.shape[0], -1)


def _from_bits(piece: jax.Array, dtype: jnp.dtype, shape: tuple[int, ...]) -> jax.Array:
    rows = piece.shape[0]
    if dtype.itemsize < piece.dtype.itemsize:
        return jax.lax.bitcast_convert_type(piece, jnp.int64).astype(dtype).reshape(rows, *shape)
    words = dtype.itemsize // piece.dtype.itemsize
    pieces = piece.reshape(rows, *shape, *((words,) if words > 1 else ()))
    return jax.lax.bitcast_convert_type(pieces, dtype)
