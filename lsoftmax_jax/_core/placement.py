"""Where arrays lie on a mesh, and the one file that asks which JAX it runs on.

JAX calls the axes of a mesh Auto (the compiler places), Explicit (types carry the placement) or
Manual (inside `jax.shard_map`).
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

AnyMesh = Mesh | AbstractMesh


def anywhere(core: Callable[..., Any], out_like: Any, arrays: Any) -> Any:
    """Calls `core(arrays)` correctly on Explicit meshes and inside `jax.shard_map`.

    On a mesh with Explicit axes a hand-written contraction raises, so the core runs with those
    axes Auto and its outputs are placed again.

    Inside `jax.shard_map` a hand-written gradient of an operand that is the same on every device
    would miss the sum over devices; marking all operands as varying makes JAX add it.

    Args:
      out_like: how the output is placed, or the start of a tree like it, with a word for each part:
        "batch" as the batch of features, "features" and "kernel" as those, "logits" as batch by
        columns, or "scalar".
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
        raise NotImplementedError(
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
    # An odd number of classes cannot stay split.
    logits = resharded(logits, sharding.mesh, P(*sharding.spec[:-1], None))
    return logits[..., :count]
