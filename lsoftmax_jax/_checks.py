"""What a caller may pass, checked once, in the form the cores compute with."""

import math
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


class Operands(NamedTuple):
    """The arrays of a classification head, the batch flattened to one axis."""

    features: jax.Array  # (batch, D)
    kernel: jax.Array  # (D, classes), in the dtype of features
    labels: jax.Array  # (batch,) int32, -1 where outside [0, classes)
    batch_shape: tuple[int, ...]


def as_array(name: str, value: Any, expected: str) -> jax.Array:
    """`value` as an array; a TypeError that names the argument where it is none."""
    if value is None or isinstance(value, str) or callable(value):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__}: {error}"
        ) from error


def check_size(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a Python int >= 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return int(value)


def check_real(name: str, value: float, least: float, below: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not least <= value < below:
        raise ValueError(f"{name} must be in [{least}, {below:.4g}), got {value}")
    return float(value)


def check_fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python float in [0, 1], got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def shape_of(name: str, value: Any, expected: str) -> tuple[int, ...]:
    """The shape of what may be an array of any dtype."""
    try:
        return np.shape(value)
    except ValueError as error:
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__}: {error}"
        ) from error


def check_scalar(
    name: str, value: ArrayLike, dtype: jnp.dtype, most: float = math.inf
) -> jax.Array:
    """A real scalar in [0, most] of `dtype`; another number raises, in a JAX array it is NaN."""
    if callable(value):
        raise TypeError(
            f"{name} must be a real scalar: pass schedule(step), not the schedule, got {value!r}"
        )
    scalar = as_array(name, value, "a real scalar >= 0")
    if scalar.shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {scalar.shape}")
    if not jnp.issubdtype(scalar.dtype, jnp.floating) and not jnp.issubdtype(
        scalar.dtype, jnp.integer
    ):
        raise TypeError(f"{name} must be a real scalar >= 0, got dtype {scalar.dtype}")
    if not isinstance(value, jax.Array) and not 0 <= np.asarray(value) <= most:
        wanted = ">= 0" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {wanted}, got {value}")
    scalar = scalar.astype(dtype)
    return jnp.where((scalar >= 0) & (scalar <= most), scalar, jnp.nan)


def check_features(
    features: ArrayLike, kernel: ArrayLike, kernel_name: str = "kernel"
) -> tuple[jax.Array, jax.Array]:
    features = as_array("features", features, "a floating-point array (..., D)")
    kernel = as_array(kernel_name, kernel, "a floating-point array (D, classes)")
    for name, array in (("features", features), (kernel_name, kernel)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating point, got dtype {array.dtype}")
    if features.ndim < 1:
        raise ValueError("features must have shape (..., D), got a scalar")
    if kernel.ndim != 2 or kernel.shape[1] < 1:
        raise ValueError(f"{kernel_name} must have shape (D, classes >= 1), got {kernel.shape}")
    if features.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"features (..., D) and {kernel_name} (D, classes) must agree in D, "
            f"got features {features.shape} and {kernel_name} {kernel.shape}"
        )
    return features, kernel


def check_labels(labels: ArrayLike, batch_shape: tuple[int, ...], classes: int) -> jax.Array:
    """Labels as int32, every value outside [0, classes) as -1."""
    if not isinstance(labels, jax.Array):
        labels = _narrowed(labels, classes)
    labels = as_array("labels", labels, "integers")
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


def _narrowed(labels: Any, classes: int) -> Any:
    """Host integers wider than 32 bits with -1 outside [0, classes), before JAX cuts them off."""
    try:
        host = np.asarray(labels)
    except (TypeError, ValueError, jax.errors.TracerArrayConversionError):
        return labels  # a list of tracers, or nothing that is an array
    if not np.issubdtype(host.dtype, np.integer) or host.dtype.itemsize <= 4:
        return labels
    inside = (host >= 0) & (host < classes)
    # Unsigned integers hold no -1.
    return np.where(inside, np.where(inside, host, 0).astype(np.int32), np.int32(-1))


def check_mask(where: ArrayLike | None, batch_shape: tuple[int, ...]) -> jax.Array | None:
    if where is None:
        return None
    where = as_array("where", where, "boolean")
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got dtype {where.dtype}")
    if where.shape != batch_shape:
        raise ValueError(f"where must have the batch shape {batch_shape}, got {where.shape}")
    return where


def check_weights(
    weights: ArrayLike | None, batch_shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    if weights is None:
        return jnp.ones(batch_shape, dtype)
    weights = as_array("weights", weights, "a floating-point array")
    if weights.shape != batch_shape:
        raise ValueError(f"weights must have the batch shape {batch_shape}, got {weights.shape}")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"weights must be floating point, got dtype {weights.dtype}")
    return weights.astype(dtype)


def flattened(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> Operands:
    batch_shape = features.shape[:-1]
    if len(batch_shape) != 1:
        # Not reshape(-1, D): an empty batch has no -1 to infer.
        features = features.reshape(math.prod(batch_shape), features.shape[-1])
        labels = labels.reshape(math.prod(batch_shape))
    return Operands(features, kernel, labels, batch_shape)


def promoted(*arrays: jax.Array) -> jnp.dtype:
    """Their common dtype under the standard rules, whatever mode the caller is in."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(array.dtype for array in arrays))


def at_least_f32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype computed and accumulated in: float32, or float64 for float64 operands."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
