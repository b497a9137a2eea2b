"""The fused losses with the classes sharded over a mesh axis.

Each device computes the logits of its own columns of the kernel. For every row the devices
exchange a handful of numbers, never logits, and sum the gradient of the features. Collectives of
a step of `lsoftmax_loss_sum`, loss and gradients:

- 4 if the features are split over another axis than the kernel: the exchange, the features'
  gradient, the kernel's gradient over the data axis, the scalars;
- 5 if they are split over the class axis too, which gathers them first; 3 if over it alone;
- 1 more for self-pacing with a data axis: a sum of 19 numbers.

With a data axis every device sums its columns' gradient over that axis. For very many classes this
is most of the bytes sent. A single axis for features and classes sends none of it.

Source: class-parallel softmax as in An et al., "Partial FC", 2021,
https://arxiv.org/abs/2010.05222.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._fused import (
    LogitGradient,
    Others,
    Setting,
    Statistics,
    like_statistics,
    logit_gradient,
    loss_of,
    paced_target,
    statistics_of,
)
from lsoftmax_jax._pace import SelfPaced
from lsoftmax_jax._placement import AnyMesh, given_or_set, resharded
from lsoftmax_jax._plans import Pieces, Plan, gradients, pieces_of, summarise
from lsoftmax_jax.logits import Columns, LabelTerms, Rows, Target, columns_of, label_terms, rows_of
from lsoftmax_jax.loss import Call, Given, gradient_of, lam_gradient, scaled
from lsoftmax_jax.margins import Margin


@dataclass(frozen=True)
class ClassParallel:
    """How a head lies on a mesh: its kernel's columns split over an axis.

    Attributes:
      class_axis: mesh axis of the classes.
      batch_axes: mesh axes of the batch, a name or names. If `class_axis` is among them, every
        device gathers the rows of its group.
      mesh: the mesh, by default that of `jax.set_mesh`.
      classes: number of real classes, by default all columns of the kernel. The size of
        `class_axis` must divide the columns. Add columns of any finite value until it does, and
        give the number of real ones here. The added columns take no part and get zero gradient. A
        Flax head does both by itself.

    Raises:
      TypeError: an axis is no name, or `classes` no int.
      ValueError: `classes` is below 1. Where the layout is used: there is no mesh, or it lacks an
        axis.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> lsm.ClassParallel("model", "data").batch_axes
      ('data',)
    """

    class_axis: str
    batch_axes: str | tuple[str, ...] = ()
    mesh: AnyMesh | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        axes = (self.batch_axes,) if isinstance(self.batch_axes, str) else self.batch_axes
        if not isinstance(axes, (tuple, list)):
            raise TypeError(f"batch_axes must name axes of a mesh, got {axes!r}")
        axes = tuple(axes)
        object.__setattr__(self, "batch_axes", axes)
        for name, values in (("class_axis", (self.class_axis,)), ("batch_axes", axes)):
            for axis in values:
                if not isinstance(axis, str):
                    raise TypeError(f"{name} must name axes of a mesh, got {axis!r}")
        if self.classes is not None:
            _checks.check_size("classes", self.classes)


class Layout(NamedTuple):
    """A `ClassParallel` whose mesh is known. Static."""

    mesh: AnyMesh
    class_axis: str
    batch_axes: tuple[str, ...]

    @classmethod
    def of(cls, parallel: ClassParallel) -> "Layout":
        if not isinstance(parallel, ClassParallel):
            raise TypeError(f"layout must be a lsoftmax_jax.ClassParallel, got {parallel!r}")
        mesh, batch_axes = given_or_set(parallel.mesh), tuple(parallel.batch_axes)
        for name, axes in (("class_axis", (parallel.class_axis,)), ("batch_axes", batch_axes)):
            for axis in axes:
                if axis not in mesh.axis_names:
                    raise ValueError(
                        f"layout: {name} must be axes of the mesh {mesh.axis_names}, got {axis!r}"
                    )
        return cls(mesh, parallel.class_axis, batch_axes)

    @property
    def shards(self) -> int:
        return self.mesh.shape[self.class_axis]

    @property
    def data_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.batch_axes if axis != self.class_axis)

    @property
    def rows(self) -> P:
        return P(self.batch_axes) if self.batch_axes else P()

    @property
    def columns(self) -> P:
        return P(None, self.class_axis)

    @property
    def given(self) -> Any:
        """How each array of a `Given` is split."""
        specs: Any = self.rows, self.columns, self.rows, P(), P(), self.rows
        return Given(*specs)

    @property
    def local(self) -> P:
        """For arrays that belong to one device each, stacked along a new first axis."""
        return P((*self.data_axes, self.class_axis))

    @property
    def splits_rows(self) -> bool:
        """Whether the class axis splits the rows too, which each device then gathers."""
        return self.class_axis in self.batch_axes


def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    layout: ClassParallel,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
) -> jax.Array:
    r"""`lsoftmax_jax.lsoftmax_loss` with the kernel's columns sharded over a mesh axis.

    .. math:: \ell = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}

    It gives the same numbers. It takes the whole arrays, as any function under `jax.jit` with a
    mesh does, on Auto and Explicit meshes. The kernel is never gathered, and no device sees the
    logits of another.

    Args:
      features: (batch, D), split over the batch axes of `layout`.
      kernel: (D, columns), split over its class axis, whose size must divide the columns.
      labels: (batch,) integers in [0, classes).
      layout: how the head lies on the mesh.
      margin, lam, scale, where, label_smoothing: as in `lsoftmax_jax.lsoftmax_loss`.
      plan: as there, of each device.

    Returns:
      (batch,) float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `lsoftmax_jax.lsoftmax_loss`; also a missing mesh or axis, and
        sizes that the mesh does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> mesh = jax.make_mesh((1, jax.device_count()), ("data", "model"))
      >>> features, kernel = jnp.ones((2, 3)), jnp.eye(3, 8 * jax.device_count())
      >>> layout = lsm.ClassParallel("model", "data", mesh, classes=3)
      >>> @jax.jit
      ... def loss(features, kernel, labels):
      ...     return lsm.sharded.lsoftmax_loss(
      ...         features, kernel, labels, margin=4, lam=5.0, layout=layout)
      >>> loss(features, kernel, jnp.array([0, 2])).round(3).tolist()
      [1.473..., 1.473...]
    """
    return lsoftmax_loss_and_statistics(
        features,
        kernel,
        labels,
        margin=margin,
        lam=lam,
        layout=layout,
        scale=scale,
        where=where,
        label_smoothing=label_smoothing,
        plan=plan,
    )[0]


def lsoftmax_loss_and_statistics(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    layout: ClassParallel,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
) -> tuple[jax.Array, Statistics]:
    """`lsoftmax_loss` of this module, and the `Statistics` of the same pass.

    Args:
      features, kernel, labels, margin, lam, layout, scale, where, label_smoothing, plan: as
        there.

    Returns:
      the loss (batch,), and `lsoftmax_jax.Statistics`, through which no gradient flows.

    Raises:
      TypeError, ValueError: as `lsoftmax_loss` here.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> layout = lsm.ClassParallel("model", "data", jax.make_mesh((1, 1), ("data", "model")))
      >>> @jax.jit
      ... def loss(features, kernel, labels):
      ...     return lsm.sharded.lsoftmax_loss_and_statistics(
      ...         features, kernel, labels, margin=4, lam=5.0, layout=layout)
      >>> losses, seen = loss(jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2]))
      >>> seen.plain_logit.tolist(), float(seen.lam)
      ([1.0, 1.0], 5.0)
    """
    call, on_mesh = _checked(
        layout, features, kernel, labels, margin, lam, scale, where, label_smoothing
    )
    pieces = _pieces(on_mesh, call, plan)
    loss, seen = _loss(on_mesh, call.setting, pieces, _placed(on_mesh, call, call.counted()))
    return call.mask(loss), seen


def lsoftmax_loss_sum(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    layout: ClassParallel,
    scale: float | None = None,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
) -> jax.Array:
    r"""`lsoftmax_jax.lsoftmax_loss_sum` with the kernel's columns sharded over a mesh axis.

    .. math:: L = \sum_i s_i \ell_i

    Under differentiation the forward pass computes all gradients, with at most 5 collectives.

    Args:
      features, kernel, labels, layout: as in `lsoftmax_loss` here.
      weights: (batch,) floating-point weights of the examples, or None for ones.
      margin, lam, scale, where, label_smoothing: as in `lsoftmax_jax.lsoftmax_loss_sum`.
      plan: as there, of each device, but row blocks compute the logits twice.

    Returns:
      scalar, float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `lsoftmax_loss` here.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> layout = lsm.ClassParallel("model", "data", jax.make_mesh((1, 1), ("data", "model")))
      >>> @jax.jit
      ... def mean(features, kernel, labels):
      ...     return lsm.sharded.lsoftmax_loss_sum(
      ...         features, kernel, labels, jnp.full(2, 0.5), margin=4, lam=5.0, layout=layout)
      >>> mean(jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])).round(3).item()
      1.473...
    """
    call, on_mesh = _checked(
        layout, features, kernel, labels, margin, lam, scale, where, label_smoothing
    )
    weights = call.mask(_checks.check_weights(weights, call.operands.batch_shape, call.lam.dtype))
    pieces = _pieces(on_mesh, call, plan)
    return _sum(on_mesh, call.setting, pieces, _placed(on_mesh, call, weights))


# The arguments.


def padded_columns(classes: int, layout: ClassParallel) -> int:
    """The least number of kernel columns >= classes that the class axis divides.

    Args:
      classes: number of classes.
      layout: says the mesh and the axis.

    Returns:
      the number of columns that the kernel of a sharded head has.

    Raises:
      ValueError: there is no mesh, or it has no such axis.

    Example:
      >>> import jax, lsoftmax_jax as lsm
      >>> mesh = jax.sharding.AbstractMesh((8,), ("model",))
      >>> lsm.sharded.padded_columns(10575, lsm.ClassParallel("model", mesh=mesh))
      10576
    """
    classes = _checks.check_size("classes", classes)
    shards = Layout.of(layout).shards
    return -(-classes // shards) * shards


def _checked(
    parallel: ClassParallel,
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    scale: float | None,
    where: ArrayLike | None,
    label_smoothing: float,
) -> tuple[Call, Layout]:
    layout, classes = Layout.of(parallel), parallel.classes
    features, kernel = _checks.check_features(features, kernel)
    if features.ndim != 2:
        raise ValueError(f"features must have shape (batch, D), got {features.shape}")
    columns = kernel.shape[1]
    if classes is not None and classes > columns:
        raise ValueError(
            f"layout: classes must be at most the kernel's {columns} columns, got {classes}"
        )
    groups = 1
    for axis in layout.batch_axes:
        groups *= layout.mesh.shape[axis]
    if columns % layout.shards:
        raise ValueError(
            f"kernel must have a multiple of {layout.shards} columns to lie on axis "
            f"{layout.class_axis!r}, got {columns}: fill it up and say classes={columns}"
        )
    if features.shape[0] % groups:
        raise ValueError(
            f"features must have a multiple of {groups} rows to lie on axes "
            f"{layout.batch_axes}, got {features.shape[0]}"
        )
    call = Call.checked(
        features, kernel, labels, margin, lam, scale, where, label_smoothing, classes
    )
    return call, layout


def _pieces(layout: Layout, call: Call, plan: Plan | None) -> Pieces:
    batch, columns = call.size
    for axis in layout.data_axes:
        batch //= layout.mesh.shape[axis]
    dtype = call.operands.kernel.dtype
    return pieces_of(plan, batch, columns // layout.shards, dtype, rows_cost_no_more=False)


def _placed(layout: Layout, call: Call, weights: jax.Array | None) -> Given:
    features, kernel, labels, _ = call.operands
    return Given(
        resharded(features, layout.mesh, layout.rows),
        resharded(kernel, layout.mesh, layout.columns),
        resharded(labels, layout.mesh, layout.rows),
        call.lam,
        weights=None if weights is None else resharded(weights, layout.mesh, layout.rows),
    )


# The loss of each example.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(
    layout: Layout, setting: Setting, pieces: Pieces, given: Given
) -> tuple[jax.Array, Statistics]:
    return _loss_fwd(layout, setting, pieces, given)[0]


def _loss_fwd(
    layout: Layout, setting: Setting, pieces: Pieces, given: Given
) -> tuple[tuple[jax.Array, Statistics], Any]:
    def local(given: Given) -> tuple[Any, Any]:
        shard = _forward(layout, setting, pieces, _of_all_rows(layout, given))
        seen = statistics_of(shard.t, shard.others, shard.lam)
        residuals = shard.rows, shard.t, shard.others, shard.kept
        outputs = _own_rows(layout, (shard.loss, seen))
        return outputs, jax.tree.map(lambda array: array[None], residuals)

    rows = layout.rows
    specs = (rows, like_statistics(rows, P())), layout.local
    outputs, residuals = _on_devices(layout, local, (layout.given,), specs)(given)
    return outputs, (given.kernel, residuals)


def _loss_bwd(
    layout: Layout,
    setting: Setting,
    pieces: Pieces,
    residuals: Any,
    cotangents: tuple[jax.Array, Statistics],
) -> tuple[Given]:
    def local(kernel: Any, residuals: Any, cotangent: jax.Array) -> Any:
        rows, t, others, kept = jax.tree.map(lambda array: array[0], residuals)
        if layout.splits_rows:
            cotangent = jax.lax.all_gather(cotangent, layout.class_axis, tiled=True)
        gradient = logit_gradient(setting, t, others, cotangent, kernel.dtype)
        dfeatures, dkernel = _backward(layout, setting, pieces, rows, kernel, gradient, kept)
        return dfeatures, dkernel, _over_data(layout, lam_gradient(setting, gradient))

    found = _on_devices(
        layout,
        local,
        (layout.columns, layout.local, layout.rows),
        (layout.rows, layout.columns, P()),
    )(*residuals, cotangents[0])
    return (gradient_of(*found),)


_loss.defvjp(_loss_fwd, _loss_bwd)


# The weighted sum, its gradients computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum(layout: Layout, setting: Setting, pieces: Pieces, given: Given) -> jax.Array:
    # Not _sum_fwd(...)[0], which would pay for the gradients.
    counted = None if setting.pace is None else jax.lax.stop_gradient(given.weights)
    losses, _ = _loss(layout, setting, pieces, given._replace(weights=counted))
    return jnp.sum(given.weights * losses)


def _sum_fwd(
    layout: Layout, setting: Setting, pieces: Pieces, given: Given
) -> tuple[jax.Array, Given]:
    def local(given: Given) -> Any:
        given = _of_all_rows(layout, given)
        kernel, weights = given.kernel, given.weights
        shard = _forward(layout, setting, pieces, given)
        gradient = logit_gradient(setting, shard.t, shard.others, weights, kernel.dtype)
        pulled = _backward(layout, setting, pieces, shard.rows, kernel, gradient, shard.kept)
        sums = jnp.stack([jnp.sum(weights * shard.loss), lam_gradient(setting, gradient)])
        return _over_data(layout, sums), *pulled, _own_rows(layout, shard.loss)

    specs = P(), layout.rows, layout.columns, layout.rows
    sums, dfeatures, dkernel, losses = _on_devices(layout, local, (layout.given,), specs)(given)
    return sums[0], gradient_of(dfeatures, dkernel, sums[1], losses)


def _sum_bwd(
    layout: Layout, setting: Setting, pieces: Pieces, gradients: Given, cotangent: jax.Array
) -> tuple[Given]:
    return scaled(gradients, cotangent)


_sum.defvjp(_sum_fwd, _sum_bwd)


# What one device does.


class _Shard(NamedTuple):
    """All classes' view of the rows, and what of it belongs to this device alone."""

    loss: jax.Array
    t: Target
    lam: jax.Array
    others: Others
    rows: Rows  # labels count from this device's first class, -1 where the class is elsewhere
    kept: Any


def _forward(layout: Layout, setting: Setting, pieces: Pieces, given: Given) -> _Shard:
    features, kernel, labels, lam, _, counted = given
    width = kernel.shape[1]
    start = jax.lax.axis_index(layout.class_axis) * width
    here = (labels >= start) & (labels < start + width)
    rows = rows_of(setting.head, features, jnp.where(here, labels - start, 0))
    terms = label_terms(setting.head, rows, kernel)
    terms = terms._replace(
        product=jnp.where(here, terms.product, 0),
        column_norm=jnp.where(here, terms.column_norm, 0),
    )
    rows = rows._replace(labels=jnp.where(here, rows.labels, -1))
    columns = _real_columns(layout, setting, kernel, start)
    others, kept = summarise(setting, pieces, rows, columns)
    terms, others = _exchange(layout, setting, terms, others)
    terms = terms._replace(product=jnp.where(labels >= 0, terms.product, jnp.nan))
    t, lam = paced_target(setting, terms, others, lam, counted, layout.data_axes)
    return _Shard(loss_of(setting, t, others), t, lam, others, rows, kept)


def _exchange(
    layout: Layout, setting: Setting, terms: LabelTerms, others: Others
) -> tuple[LabelTerms, Others]:
    """Joins what each device knows of the label's and the other logits, in one collective."""
    known = [terms.product, terms.column_norm, others.peak, others.mass]
    known += [others.total] if setting.label_smoothing else []
    known += [others.moment] if setting.pace is not None else []
    gathered = jax.lax.all_gather(jnp.stack(known), layout.class_axis)
    products, norm, peaks, masses, *more = jnp.moveaxis(gathered, 1, 0)
    peak = jnp.max(peaks, axis=0, keepdims=True)
    scale = jnp.exp(peaks - peak)
    total = jnp.sum(more.pop(0), axis=0) if setting.label_smoothing else others.total
    moment = others.moment
    if setting.pace is not None:
        # See `merge`: nothing may be infinitely far below.
        shift = jnp.where(masses != 0, peaks - peak, 0)
        moment = jnp.sum((more.pop(0) + masses * shift) * scale, axis=0)
    norm = jnp.sum(norm, axis=0)
    inverse_norm = jnp.where(norm > 0, 1 / jnp.where(norm > 0, norm, 1), norm)
    terms = terms._replace(
        product=jnp.sum(products, axis=0), column_norm=norm, inverse_column_norm=inverse_norm
    )
    return terms, Others(peak[0], jnp.sum(masses * scale, axis=0), total, moment)


def _backward(
    layout: Layout,
    setting: Setting,
    pieces: Pieces,
    rows: Rows,
    kernel: jax.Array,
    gradient: LogitGradient,
    kept: Any,
) -> tuple[jax.Array, jax.Array]:
    # What lies along the features is added once, by the device that has the row's class.
    along = jnp.where(rows.labels >= 0, gradient.target.along_feature, 0)
    gradient = gradient._replace(target=gradient.target._replace(along_feature=along))
    start = jax.lax.axis_index(layout.class_axis) * kernel.shape[1]
    columns = _real_columns(layout, setting, kernel, start)
    dfeatures, dkernel = gradients(pieces, rows, columns, gradient, kept)
    if layout.splits_rows:
        dfeatures = jax.lax.psum_scatter(dfeatures, layout.class_axis, tiled=True)
    else:
        dfeatures = jax.lax.psum(dfeatures, layout.class_axis)
    return dfeatures.astype(kernel.dtype), _over_data(layout, dkernel)


def _real_columns(layout: Layout, setting: Setting, kernel: jax.Array, start: jax.Array) -> Columns:
    width = kernel.shape[1]
    columns = columns_of(setting.head, kernel)
    if width * layout.shards == setting.classes:
        return columns
    real = start + jnp.arange(width, dtype=jnp.int32) < setting.classes
    dtype = _checks.at_least_f32(kernel.dtype)
    return columns._replace(offset=jnp.where(real, 0, -jnp.inf).astype(dtype))


def _of_all_rows(layout: Layout, given: Given) -> Given:
    """With the rows of all devices along the class axis."""
    of_rows = {"features": given.features, "labels": given.labels, "weights": given.weights}
    present = {name: array for name, array in of_rows.items() if array is not None}
    gathered = _gather(layout, *present.values())
    return given._replace(**dict(zip(present, gathered, strict=True)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(layout: Layout, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of all devices along the class axis, in one collective, as bits."""
    if not layout.splits_rows:
        return arrays
    bits = jnp.dtype(f"uint{8 * arrays[0].dtype.itemsize}")
    parts = [_bits(array, bits) for array in arrays]
    packed = jnp.concatenate(parts, axis=1)
    packed = jax.lax.all_gather(packed, layout.class_axis, tiled=True)
    outputs, start = [], 0
    for array, part in zip(arrays, parts, strict=True):
        piece = packed[:, start : start + part.shape[1]]
        outputs.append(_from_bits(piece, array.dtype, array.shape[1:]))
        start += part.shape[1]
    return tuple(outputs)


def _gather_fwd(layout: Layout, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    return _gather(layout, *arrays), None


def _gather_bwd(
    layout: Layout, _: None, cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    # Bits have no derivative; only a second derivative of the loss comes here.
    def own(cotangent: jax.Array) -> jax.Array | None:
        if cotangent.dtype == jax.dtypes.float0:
            return None
        if not layout.splits_rows:
            return cotangent
        return jax.lax.psum_scatter(cotangent, layout.class_axis, tiled=True)

    return tuple(own(cotangent) for cotangent in cotangents)


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


def _own_rows(layout: Layout, tree: Any) -> Any:
    if not layout.splits_rows:
        return tree
    shards = layout.mesh.shape[layout.class_axis]

    def own(array: jax.Array) -> jax.Array:
        if array.ndim == 0:
            return array
        rows = array.shape[0] // shards
        start = jax.lax.axis_index(layout.class_axis) * rows
        return jax.lax.dynamic_slice_in_dim(array, start, rows)

    return jax.tree.map(own, tree)


def _over_data(layout: Layout, array: jax.Array) -> jax.Array:
    return jax.lax.psum(array, layout.data_axes) if layout.data_axes else array


def _on_devices(layout: Layout, local: Any, in_specs: Any, out_specs: Any) -> Any:
    # What is gathered is the same on every device of the class axis, which JAX cannot know.
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
