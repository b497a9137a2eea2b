"""The calls that the Flax heads share; each of them creates the parameter only."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import _checks, sharded
from lsoftmax_jax._fused import Statistics
from lsoftmax_jax._pace import SelfPaced
from lsoftmax_jax._placement import first_columns
from lsoftmax_jax._plans import Plan
from lsoftmax_jax.logits import check_head, lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss_and_statistics
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.schedule import self_paced
from lsoftmax_jax.sharded import ClassParallel


class _Fields(Protocol):
    classes: int
    margin: int | Margin
    scale: float | None
    dtype: Any
    param_dtype: Any
    layout: ClassParallel | None

    def _kernel_for(self, features: jax.Array) -> jax.Array: ...


class HeadCalls:
    """`__call__`, `loss` and `loss_and_statistics` of a head with the fields of `_Fields`."""

    def __call__(
        self: _Fields,
        features: ArrayLike,
        labels: ArrayLike | None = None,
        lam: ArrayLike | None = None,
    ) -> jax.Array:
        """Logits of a batch.

        Args:
          features: (..., D) floating point.
          labels: (...,) integers in [0, classes), or None for inference.
          lam: λ >= 0, given with labels.

        Returns:
          (..., classes): the plain logits, features @ kernel; with labels and lam those with the
          margin, `lsoftmax_jax.lsoftmax_logits`.
        """
        features, kernel = _operands(self, features)
        if (labels is None) != (lam is None):
            raise TypeError(
                f"labels and lam must be given together, got labels {_given(labels)} and lam "
                f"{_given(lam)}; for training there is loss, which needs no lam"
            )
        if labels is not None and kernel.shape[1] > self.classes:
            labels = _checks.check_labels(labels, features.shape[:-1], self.classes)
        lam = 0.0 if lam is None else lam
        logits = lsoftmax_logits(
            features, kernel, labels, margin=self.margin, lam=lam, scale=self.scale
        )
        return first_columns(logits, self.classes)

    def loss(
        self: Any,
        features: ArrayLike,
        labels: ArrayLike,
        lam: ArrayLike | SelfPaced | None = None,
        *,
        where: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        plan: Plan | None = None,
    ) -> jax.Array:
        """The fused loss of each example, `lsoftmax_jax.lsoftmax_loss`.

        Args:
          features: (..., D) floating point.
          labels: (...,) integers in [0, classes).
          lam: λ >= 0, or a rule for it; None is `lsoftmax_jax.self_paced()`, which needs neither a
            schedule nor the number of steps.
          where: (...,) bool; False gives exactly zero loss and gradient.
          label_smoothing: in [0, 1].
          plan: in which pieces to compute.

        Returns:
          (...,) float32, or float64 for float64 operands.
        """
        return self.loss_and_statistics(
            features, labels, lam, where=where, label_smoothing=label_smoothing, plan=plan
        )[0]

    def loss_and_statistics(
        self: _Fields,
        features: ArrayLike,
        labels: ArrayLike,
        lam: ArrayLike | SelfPaced | None = None,
        *,
        where: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        plan: Plan | None = None,
    ) -> tuple[jax.Array, Statistics]:
        """`loss`, and the `lsoftmax_jax.Statistics` of the same pass."""
        features, kernel = _operands(self, features)
        lam = self_paced() if lam is None else lam
        if self.layout is None:
            return lsoftmax_loss_and_statistics(
                features,
                kernel,
                labels,
                margin=self.margin,
                lam=lam,
                scale=self.scale,
                where=where,
                label_smoothing=label_smoothing,
                plan=plan,
            )
        return sharded.lsoftmax_loss_and_statistics(
            features,
            kernel,
            labels,
            margin=self.margin,
            lam=lam,
            layout=dataclasses.replace(self.layout, classes=self.classes),
            scale=self.scale,
            where=where,
            label_smoothing=label_smoothing,
            plan=plan,
        )


def check_fields(head: _Fields) -> None:
    _checks.check_size("classes", head.classes)
    check_head(head.margin, head.scale)
    check_dtype("param_dtype", head.param_dtype)
    if head.dtype is not None:
        check_dtype("dtype", head.dtype)
    if head.layout is not None and not isinstance(head.layout, ClassParallel):
        raise TypeError(f"layout must be a lsoftmax_jax.ClassParallel, got {head.layout!r}")


def check_dtype(name: str, dtype: Any) -> None:
    try:
        floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise TypeError(f"{name} must be a floating-point dtype, got {dtype!r}")


def _operands(head: _Fields, features: ArrayLike) -> tuple[jax.Array, jax.Array]:
    features = _checks.as_array("features", features, "a floating-point array (..., D)")
    if features.ndim < 1:
        raise ValueError("features must have shape (..., D), got a scalar")
    kernel = head._kernel_for(features)
    if head.dtype is None:
        return features, kernel
    return features.astype(head.dtype), kernel.astype(head.dtype)


def _given(value: Any) -> str:
    return "missing" if value is None else jnp.shape(value).__repr__()
