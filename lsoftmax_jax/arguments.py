"""What a caller may pass, checked once, in the form the cores compute with."""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, auto_axes
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike


class Head(NamedTuple):
    """The operands of a classification head with the batch flattened to one axis."""

    features: jax.Array  # (batch, D)
    kernel: jax.Array  # (D, classes)
    labels: jax.Array  # (batch,) int32, -1 where outside [0, classes)
    batch_shape: tuple[int, ...]


def check_size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a Python int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def check_whole(batch_axes: str | tuple[str, ...], mesh: Mesh | AbstractMesh | None) -> None:
    """A head without `class_axis` leaves the placement to JAX and takes no mesh of its own."""
    for name, value in (("batch_axes", batch_axes), ("mesh", mesh)):
        if value not in ((), None):
            raise ValueError(f"{name} must come with class_axis, got {value!r} alone")


def check_lam(lam: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """λ as a scalar of `dtype`; a traced negative or NaN λ becomes NaN, a concrete one raises."""
    if isinstance(lam, (bool, np.bool_, complex, str)) or lam is None:
        raise TypeError(f"lam must be a real scalar >= 0, got {lam!r}")
    if isinstance(lam, Real) and not lam >= 0:
        raise ValueError(f"lam must be >= 0, got {lam}")
    lam = jnp.asarray(lam)
    if lam.shape != ():
        raise ValueError(f"lam must be a scalar, got shape {lam.shape}")
    if not jnp.issubdtype(lam.dtype, jnp.floating) and not jnp.issubdtype(lam.dtype, jnp.integer):
        raise TypeError(f"lam must be a real scalar, got dtype {lam.dtype}")
    lam = lam.astype(dtype)
    return jnp.where(lam >= 0, lam, jnp.nan)


def check_fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python float in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def check_features(features: ArrayLike, kernel: ArrayLike) -> tuple[jax.Array, jax.Array]:
    features, kernel = jnp.asarray(features), jnp.asarray(kernel)
    for name, array in (("features", features), ("kernel", kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got dtype {array.dtype}")
    if features.ndim < 1:
        raise ValueError("features must have shape (..., D), got a scalar")
    if kernel.ndim != 2 or kernel.shape[1] < 1:
        raise ValueError(f"kernel must have shape (D, classes >= 1), got {kernel.shape}")
    if features.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"features (..., D) and kernel (D, classes) must agree in D, "
            f"got features {features.shape} and kernel {kernel.shape}"
        )
    return features, kernel


def check_labels(labels: ArrayLike, batch_shape: tuple[int, ...], classes: int) -> jax.Array:
    """Labels as int32, every value outside [0, classes) as -1."""
    if labels is None:
        raise TypeError("labels must be integers, got None")
    labels = jnp.asarray(labels)
    soft = labels.shape == (*batch_shape, classes) or jnp.issubdtype(labels.dtype, jnp.floating)
    if soft and labels.shape != batch_shape:
        raise ValueError(
            f"labels must be integers of shape {batch_shape}, got shape {labels.shape} and dtype "
            f"{labels.dtype}; one-hot, soft and mixup labels have no margin logit, because a "
            f"margin belongs to one class"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(
            f"labels must be integers, got dtype {labels.dtype}; soft and mixup labels have no "
            f"margin logit, because a margin belongs to one class"
        )
    if labels.shape != batch_shape:
        raise ValueError(
            f"labels must have the batch shape {batch_shape} of features, got {labels.shape}"
        )
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    return jnp.where((labels >= 0) & (labels < classes), labels, -1).astype(jnp.int32)


def check_mask(where: ArrayLike | None, batch_shape: tuple[int, ...]) -> jax.Array | None:
    if where is None:
        return None
    where = jnp.asarray(where)
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got dtype {where.dtype}")
    if where.shape != batch_shape:
        raise ValueError(f"where must have the batch shape {batch_shape}, got {where.shape}")
    return where


def flatten(features: jax.Array, kernel: jax.Array, labels: ArrayLike, classes: int) -> Head:
    batch_shape = features.shape[:-1]
    labels = check_labels(labels, batch_shape, classes)
    if len(batch_shape) != 1:
        # Not reshape(-1, D): an empty batch has no -1 to infer.
        features = features.reshape(math.prod(batch_shape), features.shape[-1])
        labels = labels.reshape(math.prod(batch_shape))
    return Head(features, kernel, labels, batch_shape)


def promoted(*arrays: jax.Array) -> jnp.dtype:
    """Their common dtype under the standard rules, whatever mode the caller is in."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(array.dtype for array in arrays))


def at_least_f32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype computed and accumulated in: float32, or float64 for float64 operands."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def place(core: Callable[..., Any], out_axes: str, head: tuple[Any, ...]) -> Any:
    """Calls `core(*head)` correctly on Explicit meshes and inside `jax.shard_map`.

    On a mesh with Explicit axes a hand-written contraction raises, so the core runs with those
    axes Auto and its outputs are placed again: "batch" like the rows of `head[0]`, "logits" like
    the rows of `head[0]` by the columns of `head[1]`, "scalar" replicated.

    Inside `jax.shard_map` a hand-written gradient of an operand that is the same on every device
    would miss the sum over devices; marking all operands as varying makes JAX add it.
    """
    varying = frozenset().union(*(varying_axes(operand) for operand in head))
    head = tuple(vary_over(operand, varying) for operand in head)
    sharding = jax.typeof(head[0]).sharding, jax.typeof(head[1]).sharding
    meshes = [s.mesh for s in sharding if AxisType.Explicit in s.mesh.axis_types]
    if not meshes:
        return core(*head)
    rows, columns = sharding[0].spec[0], sharding[1].spec[-1]
    spec = {
        "batch": P(rows),
        "logits": P(rows, columns if columns != rows else None),
        "scalar": P(),
    }
    return auto_axes(core, out_sharding=NamedSharding(meshes[0], spec[out_axes]))(*head)


def varying_axes(array: jax.Array) -> frozenset[str]:
    """The manual mesh axes that `array` differs over inside `jax.shard_map`."""
    return frozenset(jax.typeof(array).manual_axis_type.varying)


def vary_over(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`array` marked as varying over the manual mesh `axes` (nothing outside shard_map)."""
    missing = axes - varying_axes(array)
    return jax.lax.pcast(array, tuple(missing), to="varying") if missing else array
