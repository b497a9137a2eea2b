"""Where arrays lie on a mesh, and the one file that asks which JAX it runs on.

JAX calls the axes of a mesh Auto (the compiler places), Explicit (types carry the placement) or
manual (inside `jax.shard_map`).
"""

from collections.abc import Callable
from typing import Any, cast

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P

AnyMesh = Mesh | AbstractMesh


def on_any_mesh(core: Callable[..., Any], out_like: Any, operands: tuple[Any, ...]) -> Any:
    """Calls `core(*operands)` correctly on Explicit meshes and inside `jax.shard_map`.

    On a mesh with Explicit axes a hand-written contraction raises, so the core runs with those
    axes Auto and its outputs are placed again, as `out_like` (a tree like the output) says: "batch"
    like the rows of `operands[0]`, "logits" like the rows of `operands[0]` by the columns of
    `operands[1]`, "scalar" replicated.

    Inside `jax.shard_map` a hand-written gradient of an operand that is the same on every device
    would miss the sum over devices; marking all operands as varying makes JAX add it.
    """
    varying = frozenset().union(*(varying_axes(operand) for operand in jax.tree.leaves(operands)))
    operands = jax.tree.map(lambda operand: vary_over(operand, varying), operands)
    features, kernel = (jax.typeof(operand).sharding for operand in operands[:2])
    meshes = [s.mesh for s in (features, kernel) if is_explicit(s.mesh)]
    if not meshes:
        return core(*operands)
    rows, columns = features.spec[0], kernel.spec[-1]
    specs = {
        "batch": P(rows),
        "logits": P(rows, columns if columns != rows else None),
        "scalar": P(),
    }
    placed = jax.tree.map(lambda kind: NamedSharding(meshes[0], specs[kind]), out_like)
    return auto_axes(core, out_sharding=placed)(*operands)


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The manual mesh axes that `array` differs over inside `jax.shard_map`."""
    kind = jax.typeof(array)
    # Before JAX 0.10 the type of an array has its varying axes as `vma`.
    return frozenset(
        kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    )


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`array` marked as varying over the manual mesh `axes` (nothing outside shard_map)."""
    missing = tuple(axes - varying_axes(array))
    if not missing:
        return array
    if pcast := getattr(jax.lax, "pcast", None):
        return cast(jax.Array, pcast(array, missing, to="varying"))
    before_0_8_2 = "pvary"
    return cast(jax.Array, getattr(jax.lax, before_0_8_2)(array, missing))


def is_explicit(mesh: AnyMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types


def given_or_set(mesh: AnyMesh | None) -> AnyMesh:
    """The mesh, by default that of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if not isinstance(mesh, AnyMesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {mesh!r}")
    if mesh.empty:
        raise ValueError("mesh must be given, or set by jax.set_mesh; got neither")
    return mesh


def resharded(array: jax.Array, mesh: AnyMesh, spec: P) -> jax.Array:
    """`array` split as `spec` on an Explicit mesh, where shard_map takes it no other way."""
    if not is_explicit(mesh):
        return array
    if not hasattr(jax.lax, "pcast") and not isinstance(array, jax.core.Tracer):
        raise NotImplementedError(
            f"a mesh with Explicit axes outside jax.jit needs a newer JAX than {jax.__version__}: "
            f"wrap the call in jax.jit, or make the mesh's axes AxisType.Auto"
        )
    return jax.sharding.reshard(array, NamedSharding(mesh, spec))


def first_columns(logits: jax.Array, count: int) -> jax.Array:
    """logits (..., columns) without those of the columns that only fill up a sharded kernel."""
    if logits.shape[-1] == count:
        return logits
    sharding = jax.typeof(logits).sharding
    # An odd number of classes cannot stay split.
    logits = resharded(logits, sharding.mesh, P(*sharding.spec[:-1], None))
    return logits[..., :count]


def with_auto_axes(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Leaves the placement inside `function` to the compiler on an Explicit mesh too."""
    if not is_explicit(mesh):
        return function
    return auto_axes(function, axes=mesh.axis_names, out_sharding=NamedSharding(mesh, P()))
