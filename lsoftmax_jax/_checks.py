"""Checks of what a caller passes. Each error names the argument, the expectation and the value."""

import math
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# The largest float32: every constant of a loss must survive the cast to float32.
LARGEST = float(np.finfo(np.float32).max)


def as_array(name: str, value: Any, expected: str) -> jax.Array:
    """`value` as an array; a TypeError that names the argument if `value` is not an array."""
    value = _held(value)
    if value is None or isinstance(value, (str, bytes)) or callable(value):
        raise TypeError(f"{name} must be {expected}, got {value!r:.80}")
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(
            f"{name} must be {expected}, got a masked array: fill it, and mask examples by `where`"
        )
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        if value.is_deleted():
            raise ValueError(f"{name} must be {expected}, got an array that was donated or deleted")
        return value
    if isinstance(value, np.ndarray) and not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__}: {error}"
        ) from error


def _held(value: Any) -> Any:
    """The array in a parameter of Flax NNX; anything else as it is."""
    held = None if isinstance(value, jax.Array) else getattr(value, "__jax_array__", None)
    return held() if callable(held) else value


def shown(value: Any) -> str:
    """`value` in an error, short; a traced value without JAX's word for it."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced {value.dtype} of shape {value.shape}: it must be known before tracing"
    return f"{value!r:.80}"


def keep(of: Any, /, **checked: Any) -> None:
    """Keeps the checked settings of a frozen dataclass, Python's numbers where NumPy's came.

    NumPy's float64 would make float32 operands float64 where JAX has 64 bits.
    """
    for name, value in checked.items():
        object.__setattr__(of, name, value)


def check_size(name: str, value: int, most: int = 2**31 - 1) -> int:
    """A Python int in [1, most]; JAX indexes with int32."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be a Python int >= 1, got {shown(value)}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value!r:.80}")
    return int(value)


def check_real(name: str, value: float, least: float, below: float, unit: str = "") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a real number, got {shown(value)}")
    if not least <= value < below:
        unit = unit and f" {unit}"
        raise ValueError(f"{name} must be in [{least:g}, {below:.4g}){unit}, got {value}")
    return float(value)


def check_fraction(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a Python float in [0, 1], got {shown(value)}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def check_flag(name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def check_scale(value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"scale must be a Python float > 0, got {shown(value)}")
    if not 0 < value <= LARGEST:
        raise ValueError(f"scale must be a finite float32 > 0, got {value}")
    return float(value)


def shape_of(name: str, value: Any, expected: str) -> tuple[int, ...]:
    """The shape of an array of any dtype."""
    try:
        return np.shape(value)
    except jax.errors.TracerArrayConversionError:  # a list of traced numbers
        return jnp.asarray(value).shape
    except ValueError as error:
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__}: {error}"
        ) from error


def check_scalar(name: str, value: ArrayLike, most: float = math.inf) -> Any:
    """A real scalar in [0, most]; in a JAX array the range is checked by `in_range`."""
    value = _held(value)
    if callable(value):
        wanted = "pass schedule(step), not the schedule"
        if getattr(value, "__name__", "") == "self_paced":
            wanted = "call the rule, self_paced()"
        raise TypeError(f"{name} must be a real scalar: {wanted}, got {value!r}")
    given = value
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool):
        value = as_array(name, value, "a real scalar >= 0")
    dtype, shape = jnp.result_type(value), np.shape(value)
    if shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {shape}")
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not real or isinstance(given, bool):
        raise TypeError(f"{name} must be a real scalar >= 0, got dtype {dtype}")
    if isinstance(given, jax.Array):
        return value
    try:
        number = float(given)  # type: ignore[arg-type]  # shape () was checked
    except OverflowError:
        number = math.inf
    if not 0 <= number <= most:
        wanted = ">= 0" if most == math.inf else f"in [0, {most:g}]"
        raise ValueError(f"{name} must be {wanted}, got {given}")
    return np.asarray(number, jnp.result_type(float))


def in_range(scalar: Any, dtype: jnp.dtype, most: float = math.inf) -> jax.Array:
    """`scalar` in `dtype`, NaN outside [0, most]."""
    scalar = jnp.asarray(scalar).astype(dtype)
    return nan_unless((scalar >= 0) & (scalar <= most), scalar)


def nan_unless(known: jax.Array, array: jax.Array) -> jax.Array:
    """`array` where `known`, else NaN.

    The NaN is computed where it is needed: a constant would raise under `jax_debug_nans`, op by op.
    """
    large = jnp.where(known, 0, jnp.inf).astype(array.dtype)
    return jnp.where(known, array, large - large)


def check_floating(name: str, array: jax.Array) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got dtype {array.dtype}")
    if array.dtype.itemsize < 2:
        raise TypeError(
            f"{name} must have a dtype of 16 bits or more, got {array.dtype}: cast it first"
        )


def check_features(features: ArrayLike) -> jax.Array:
    features = as_array("features", features, "a floating-point array (..., D)")
    check_floating("features", features)
    if features.ndim < 1:
        raise ValueError("features must have shape (..., D), got a scalar")
    return features


def check_operands(
    features: ArrayLike, kernel: ArrayLike, kernel_name: str = "kernel"
) -> tuple[jax.Array, jax.Array]:
    features = check_features(features)
    kernel = as_array(kernel_name, kernel, "a floating-point array (D, classes)")
    check_floating(kernel_name, kernel)
    check_columns(kernel_name, kernel)
    if features.shape[-1] != kernel.shape[0]:
        raise ValueError(
            f"features (..., D) and {kernel_name} (D, classes) must agree in D, "
            f"got features {features.shape} and {kernel_name} {kernel.shape}"
        )
    return features, kernel


def check_columns(name: str, kernel: jax.Array) -> None:
    if kernel.ndim != 2 or kernel.shape[1] < 1:
        raise ValueError(f"{name} must have shape (D, classes >= 1), got {kernel.shape}")
    if kernel.shape[1] >= 2**31:
        raise ValueError(f"{name} must have fewer than 2**31 classes, got {kernel.shape}")


def check_labels(labels: ArrayLike, batch_shape: tuple[int, ...], classes: int) -> jax.Array:
    """Integer labels of the batch shape; `known_labels` marks those outside [0, classes)."""
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
    return labels


def _narrowed(labels: Any, classes: int) -> Any:
    """Host integers wider than 32 bits with -1 outside [0, classes), before JAX truncates them."""
    if isinstance(labels, np.ma.MaskedArray):
        return labels
    try:
        host = np.asarray(labels)
    except (TypeError, ValueError, jax.errors.TracerArrayConversionError):
        return labels  # a list of tracers, or not an array
    if host.dtype.kind not in "iu" or host.dtype.itemsize <= 4:
        if host.dtype.kind in "mM":
            raise TypeError(f"labels must be integers, got dtype {host.dtype}")
        return labels
    inside = (host >= 0) & (host < classes)
    # Unsigned integers hold no -1.
    return np.where(inside, np.where(inside, host, 0).astype(np.int32), np.int32(-1))


def known_labels(labels: jax.Array, classes: int) -> jax.Array:
    """Labels as int32, with -1 for every label outside [0, classes)."""
    if labels.dtype.itemsize < 4:
        labels = labels.astype(jnp.int32)
    return jnp.where((labels >= 0) & (labels < classes), labels, -1).astype(jnp.int32)


def check_mask(where: ArrayLike | None, batch_shape: tuple[int, ...]) -> jax.Array | None:
    if where is None:
        return None
    where = as_array("where", where, "boolean")
    if where.dtype != jnp.bool_:
        raise TypeError(f"where must be boolean, got dtype {where.dtype}")
    if where.shape != batch_shape:
        raise ValueError(f"where must have the batch shape {batch_shape}, got {where.shape}")
    return where


def check_weights(weights: ArrayLike | None, batch_shape: tuple[int, ...]) -> jax.Array | None:
    if weights is None:
        return None
    weights = as_array("weights", weights, "a floating-point array")
    if weights.shape != batch_shape:
        raise ValueError(f"weights must have the batch shape {batch_shape}, got {weights.shape}")
    check_floating("weights", weights)
    return weights


def promoted(*arrays: jax.Array) -> jnp.dtype:
    """The common dtype under the standard rules, whatever promotion mode the caller is in."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(array.dtype for array in arrays))


def at_least_f32(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums and angles: float32, or float64 for float64 operands."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)
