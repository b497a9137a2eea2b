"""Where arrays lie on a mesh, and what its devices exchange.

This is the one file that asks which JAX it runs on. JAX calls the axes of a mesh Auto (the compiler
places), Explicit (types carry the placement) or Manual (inside `jax.shard_map`).

Collectives of `lsoftmax_loss_sum` with a layout, loss and gradients:

- 4 if the features are split over another axis than the kernel: `blocks.exchanged`, the features'
  gradient, the kernel's gradient over the data axis, the scalars;
- 5 if they are split over the class axis too, which gathers them first; 3 if over it alone.

With a data axis every device sums its columns' gradient over that axis. For very many classes this
is most of the bytes sent. A single axis for features and classes sends none of it.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

from lsoftmax_jax._core.spec import AnyMesh, Arrays, Layout


def anywhere(core: Callable[..., Any], out_like: Any, arrays: Any) -> Any:
    """Calls `core(arrays)` correctly on Explicit meshes and inside `jax.shard_map`.

    On a mesh with Explicit axes a hand-written contraction raises, so the core runs with those
    axes Auto and its outputs are placed again.

    Inside `jax.shard_map` a hand-written gradient of an operand that is the same on every device
    would miss the sum over devices; marking all operands as varying makes JAX add it.

    Args:
      out_like: where the output lies, a word or a tree prefix of words: "batch" as the batch of
        features, "features" and "kernel" as those, "logits" as batch by columns, or "scalar".
      arrays: a tuple that starts with features (..., D) and kernel (D, columns).
    """
    varying = frozenset().union(*map(varying_axes, jax.tree.leaves(arrays)))
    arrays = jax.tree.map(lambda array: vary_over(array, varying), arrays)
    features, kernel = (jax.typeof(array).sharding for array in arrays[:2])
    meshes = [s.mesh for s in (features, kernel) if s.mesh.explicit_axes]
    if not meshes:
        return core(arrays)
    batch, columns = features.spec[:-1], kernel.spec[-1]
    taken = {axis for entry in batch for axis in _names(entry)}
    specs = {
        "batch": P(*batch),
        "features": P(*features.spec),
        "kernel": P(*kernel.spec),
        "logits": P(*batch, None if taken.intersection(_names(columns)) else columns),
        "scalar": P(),
    }
    placed = jax.tree.map(lambda kind: NamedSharding(meshes[0], specs[kind]), out_like)
    return auto_axes(core, axes=meshes[0].explicit_axes, out_sharding=placed)(arrays)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The Manual mesh axes over which `array` differs inside `jax.shard_map`."""
    kind = jax.typeof(array)
    # Before JAX 0.10 the type of an array has its varying axes as `vma`.
    return frozenset(
        kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    )


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`array` marked as varying over the Manual mesh `axes` (none outside `jax.shard_map`)."""
    missing = tuple(axes - varying_axes(array))
    if not missing:
        return array
    if pcast := getattr(jax.lax, "pcast", None):
        return cast(jax.Array, pcast(array, missing, to="varying"))
    before_0_8_2 = "pvary"
    return cast(jax.Array, getattr(jax.lax, before_0_8_2)(array, missing))


def zeros_like_rows(shape: tuple[int, ...], rows: jax.Array) -> jax.Array:
    """Zeros of the dtype of `rows`, varying over devices as `rows` does in `jax.shard_map`."""
    return vary_over(jnp.zeros(shape, rows.dtype), varying_axes(rows))


def resharded(array: jax.Array, mesh: AnyMesh, spec: P) -> jax.Array:
    """`array` split as `spec` over Explicit axes, where shard_map takes no other placement."""
    explicit = mesh.explicit_axes
    if not explicit:
        return array
    if not hasattr(jax.lax, "pcast") and not isinstance(array, jax.core.Tracer):
        raise NotImplementedError(  # of JAX before 0.8.2, which has no pcast
            f"a mesh with Explicit axes outside jax.jit needs a newer JAX than {jax.__version__}: "
            f"wrap the call in jax.jit, or make the mesh's axes AxisType.Auto"
        )
    kept = (tuple(axis for axis in _names(entry) if axis in explicit) or None for entry in spec)
    return jax.sharding.reshard(array, NamedSharding(mesh, P(*kept)))


def first_columns(logits: jax.Array, count: int) -> jax.Array:
    """logits (..., columns) without the columns that fill up a sharded kernel."""
    if logits.shape[-1] == count:
        return logits
    sharding = jax.typeof(logits).sharding
    # Classes that the axis does not divide cannot stay split.
    logits = resharded(logits, sharding.mesh, P(*sharding.spec[:-1], None))
    return logits[..., :count]


# The devices of a layout. A function that takes None, for one device, then changes nothing.


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


def placed(layout: Layout, arrays: Arrays) -> Arrays:
    """Every array split as the layout says."""
    return Arrays(
        *(
            None if array is None else resharded(jnp.asarray(array), layout.mesh, split)
            for array, split in zip(arrays, splits(layout), strict=True)
        )
    )


def stacked(layout: Layout | None, tree: Any) -> Any:
    """Each device's arrays, stacked along a new first axis of whole ones."""
    return tree if layout is None else jax.tree.map(lambda array: array[None], tree)


def unstacked(layout: Layout | None, tree: Any) -> Any:
    """This device's part of what `stacked` made."""
    return tree if layout is None else jax.tree.map(lambda array: array[0], tree)


def first_class(layout: Layout | None, width: int) -> Any:
    """The class of the first column of this device."""
    return 0 if layout is None else jax.lax.axis_index(layout.class_axis) * width


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
