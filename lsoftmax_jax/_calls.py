"""What both Flax heads do: check settings, make a kernel in shards, and prepare a loss's call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._core import run
from lsoftmax_jax._core.mesh import first_columns, resharded
from lsoftmax_jax._core.spec import ClassParallel, Layout, prepare
from lsoftmax_jax.losses import lsoftmax_logits
from lsoftmax_jax.margins import Margin, SphereFace, check_margin
from lsoftmax_jax.schedule import SelfPaced, self_paced

_SELF_PACED = self_paced()


class Head(Protocol):
    """The settings of a head."""

    classes: int
    margin: int | Margin
    lam: float | SelfPaced | None
    dtype: Any
    param_dtype: Any
    layout: ClassParallel | None


def check_settings(head: Head) -> None:
    _checks.check_size("classes", head.classes)
    check_margin(head.margin)
    if head.lam is not None and not isinstance(head.lam, SelfPaced):
        _checks.check_scalar("lam", head.lam)
    check_dtype("param_dtype", head.param_dtype)
    if head.dtype is not None:
        check_dtype("dtype", head.dtype)


def layout_of(layout: ClassParallel | None, classes: int) -> ClassParallel | None:
    """The layout of a head with its number of classes, as the losses that take a kernel need it."""
    if layout is None:
        return None
    if not isinstance(layout, ClassParallel):
        raise TypeError(f"layout must be a lsoftmax_jax.ClassParallel, got {layout!r:.80}")
    if layout.classes not in (None, classes):
        raise ValueError(
            f"layout: classes must be the head's {classes} or None, got {layout.classes}"
        )
    return dataclasses.replace(layout, classes=_checks.check_size("classes", classes))


def known_lam(lam: Any) -> float | SelfPaced | None:
    """λ of a head as a number: NNX counts an array as state, which an optimizer may train."""
    if lam is None or isinstance(lam, SelfPaced):
        return lam
    lam = _checks.check_scalar("lam", lam)
    if isinstance(lam, jax.core.Tracer):
        raise TypeError(
            f"lam of a head must be known, got {_checks.shown(lam)}; or give it to a call"
        )
    return float(_checks.check_scalar("lam", float(lam)))


def check_dtype(name: str, dtype: Any) -> None:
    try:
        known = jnp.dtype(dtype)
        usable = jnp.issubdtype(known, jnp.floating) and known.itemsize > 1
    except TypeError:
        usable = False
    if not usable:
        raise TypeError(f"{name} must be a floating-point dtype of 16 bits or more, got {dtype!r}")


def sharded_kernel(
    layout: ClassParallel, init: Callable[..., jax.Array], length: int, classes: int, dtype: Any
) -> Callable[[jax.Array], jax.Array]:
    """key -> a kernel in shards: the real classes drawn, zeros in the columns that fill it up.

    The number of shards changes no real column, nor the kernel's length, which some optimizers
    read. Under jit no device ever holds more than its shard.
    """
    filling = layout.columns(classes) - classes
    # `Layout.of` prefers the context's mesh, whose axes may be of another type.
    on_mesh = Layout.of(layout)
    mesh, spec = on_mesh.mesh, on_mesh.columns

    @functools.partial(
        jax.jit, out_shardings=NamedSharding(mesh, spec) if isinstance(mesh, Mesh) else spec
    )
    def create(key: jax.Array) -> jax.Array:
        kernel = jnp.pad(init(key, (length, classes), dtype), ((0, 0), (0, filling)))
        return resharded(kernel, mesh, spec)

    return create


def lam_of(head: Head, lam: ArrayLike | SelfPaced | None) -> ArrayLike | SelfPaced:
    """λ of a call: the call's own, the head's, or the default of its margin."""
    if lam is not None:
        return lam
    if head.lam is not None:
        return head.lam
    # The papers anneal psi, the margin of L-Softmax and SphereFace, and use the others at λ = 0.
    margin = check_margin(head.margin)
    whole = margin.scale is not None and not isinstance(margin, SphereFace)
    return 0.0 if whole else _SELF_PACED


def call_of(
    head: Head, features: ArrayLike, kernel: jax.Array, lam: ArrayLike | SelfPaced | None
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
    """Features and kernel in the dtype of the head, and the settings that every loss takes."""
    features = _checks.check_features(features)
    kernel = _checks.as_array("kernel", kernel, "a floating-point array (D, classes)")
    columns = head.classes if head.layout is None else head.layout.columns(head.classes)
    if kernel.ndim != 2 or kernel.shape[1] != columns:
        cure = "load the weights of this head"
        if kernel.ndim > 2:
            cure = "call heads that nnx.vmap made in nnx.vmap too"
        elif kernel.shape[1] > head.classes and head.layout is not None:
            cure = "cut the kernel of another mesh to the classes, and pad it for this one"
        raise ValueError(
            f"kernel of the head must have shape (D, {columns}) for {head.classes} classes, got "
            f"{kernel.shape}: {cure}"
        )
    if head.dtype is not None:
        features, kernel = features.astype(head.dtype), kernel.astype(head.dtype)
    settings = {"margin": head.margin, "lam": lam_of(head, lam), "layout": head.layout}
    return features, kernel, settings


def logits(
    head: Head,
    features: ArrayLike,
    kernel: jax.Array,
    labels: ArrayLike | None,
    lam: ArrayLike | SelfPaced | None,
) -> jax.Array:
    """The logits of the head's classes, without the columns that fill up a sharded kernel."""
    if labels is None and lam is not None:
        raise TypeError("labels must be given with lam: inference has no margin and needs no lam")
    features, kernel, settings = call_of(head, features, kernel, lam)
    margin, lam = settings["margin"], settings["lam"]
    if labels is None:
        whole = lsoftmax_logits(features, kernel, None, margin=margin, lam=lam)
    else:
        labels = _checks.check_labels(labels, features.shape[:-1], head.classes)
        spec, arrays = prepare(features, kernel, labels, margin=margin, lam=lam)
        # No column that only fills up the kernel may be the rival that λ goes by.
        whole = run.margin_logits(spec._replace(classes=head.classes), arrays)
    return first_columns(whole, head.classes)
