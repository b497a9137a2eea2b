"""The fused losses with the classes sharded over a mesh axis.

Each device computes the logits of its own columns of the kernel. For every row the devices
exchange a handful of numbers, never logits, and sum the gradient of the features. Collectives of
a step of `lsoftmax_loss_sum`, loss and gradients:

- features split over another axis than the kernel: the exchange, the features' gradient, the
  kernel's gradient over the data axis, the scalars: 4;
- features split over the class axis too: gathering them comes first, 5; over it alone: 3.

With a data axis every device sums its columns' gradient over that axis, which for very many classes
is most of the bytes sent; one axis for both features and classes sends none of it.
"""

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lsoftmax_jax import arguments
from lsoftmax_jax.algebra import (
    Columns,
    Others,
    Row,
    Setting,
    Statistics,
    gradient_row,
    gradients,
    loss_and_z,
    statistics_of,
    summarise,
)
from lsoftmax_jax.logits import target_of
from lsoftmax_jax.loss import (
    DEFAULT_MEMORY_BUDGET,
    Call,
    Knobs,
    check_weights,
    scaled_gradients,
)
from lsoftmax_jax.margin import Target


class _Layout(NamedTuple):
    """How the operands lie on the mesh. Static."""

    mesh: Mesh | AbstractMesh
    class_axis: str
    batch_axes: tuple[str, ...]

    @property
    def data_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.batch_axes if axis != self.class_axis)

    @property
    def axes(self) -> tuple[str, ...]:
        return (*self.data_axes, self.class_axis)

    @property
    def rows(self) -> P:
        return P(self.batch_axes) if self.batch_axes else P()

    @property
    def columns(self) -> P:
        return P(None, self.class_axis)

    @property
    def local(self) -> P:
        """For arrays that belong to one device each, stacked along a new first axis."""
        return P(self.axes)

    @property
    def gathers(self) -> bool:
        return self.class_axis in self.batch_axes


@overload
def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int,
    class_axis: str,
    batch_axes: str | tuple[str, ...] = ...,
    mesh: Mesh | AbstractMesh | None = ...,
    classes: int | None = ...,
    lam: ArrayLike = ...,
    where: ArrayLike | None = ...,
    label_smoothing: float = ...,
    statistics: Literal[False] = ...,
    memory_budget: int = ...,
    row_block: int | None = ...,
    class_block: int | None = ...,
    keep_exponentials: bool | None = ...,
) -> jax.Array: ...
@overload
def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int,
    class_axis: str,
    batch_axes: str | tuple[str, ...] = ...,
    mesh: Mesh | AbstractMesh | None = ...,
    classes: int | None = ...,
    lam: ArrayLike = ...,
    where: ArrayLike | None = ...,
    label_smoothing: float = ...,
    statistics: Literal[True],
    memory_budget: int = ...,
    row_block: int | None = ...,
    class_block: int | None = ...,
    keep_exponentials: bool | None = ...,
) -> tuple[jax.Array, Statistics]: ...
def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int,
    class_axis: str,
    batch_axes: str | tuple[str, ...] = (),
    mesh: Mesh | AbstractMesh | None = None,
    classes: int | None = None,
    lam: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    statistics: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    row_block: int | None = None,
    class_block: int | None = None,
    keep_exponentials: bool | None = None,
) -> jax.Array | tuple[jax.Array, Statistics]:
    r"""`lsoftmax_jax.lsoftmax_loss` with the kernel's columns sharded over `class_axis`.

    .. math:: \ell = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}

    The same numbers. Takes the whole arrays, as any function under `jax.jit` with a mesh does, on
    Auto and Explicit meshes; the kernel is never gathered and no device sees another's logits.

    Args:
      features: (batch, D), split over `batch_axes`.
      kernel: (D, columns), split over `class_axis`, whose size must divide the columns: fill up
        with columns of any finite value and say how many `classes` are real. The filling takes no
        part and gets zero gradient.
      labels: (batch,) integers in [0, classes).
      margin, lam, where, label_smoothing, statistics: as in `lsoftmax_jax.lsoftmax_loss`.
      memory_budget, row_block, class_block, keep_exponentials: as there, of each device.
      class_axis: mesh axis of the classes.
      batch_axes: mesh axes of the batch, which may include `class_axis`: then every device
        gathers the rows of its group.
      mesh: the mesh, by default that of `jax.set_mesh`.
      classes: number of real classes, by default all columns.

    Returns:
      (batch,) float32, or float64 for float64 operands; with `statistics` a pair.

    Raises:
      TypeError, ValueError: as `lsoftmax_jax.lsoftmax_loss`; also a missing mesh or axis, and
        sizes that the mesh does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> mesh = jax.make_mesh((1, jax.device_count()), ("data", "model"))
      >>> features, kernel = jnp.ones((2, 3)), jnp.eye(3, 8 * jax.device_count())
      >>> lsm.sharded.lsoftmax_loss(
      ...     features, kernel, jnp.array([0, 2]), margin=4, lam=5.0, classes=3,
      ...     mesh=mesh, class_axis="model", batch_axes="data").round(3).tolist()
      [1.473..., 1.473...]

    Source: Liu et al., ICML 2016; class-parallel softmax as in An et al., "Partial FC", 2021.
    """
    layout = _layout(mesh, class_axis, batch_axes)
    call = _checked(layout, features, kernel, labels, margin, lam, where, label_smoothing, classes)
    knobs = Knobs(memory_budget, row_block, class_block, keep_exponentials).checked()
    setting = call.setting(_plan(layout, call, knobs))
    loss, seen = _loss(layout, setting, *_placed(layout, call), call.lam)
    loss = call.mask(loss)
    return (loss, seen) if statistics else loss


def lsoftmax_loss_sum(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int,
    class_axis: str,
    batch_axes: str | tuple[str, ...] = (),
    mesh: Mesh | AbstractMesh | None = None,
    classes: int | None = None,
    lam: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    row_block: int | None = None,
    class_block: int | None = None,
    keep_exponentials: bool | None = None,
) -> jax.Array:
    r"""`lsoftmax_jax.lsoftmax_loss_sum` with the kernel's columns sharded over `class_axis`.

    .. math:: L = \sum_i s_i \ell_i

    Under differentiation the forward pass computes all gradients, with at most 5 collectives.

    Args:
      features, kernel, labels, class_axis, batch_axes, mesh, classes: as in `lsoftmax_loss` here.
      weights: (batch,) floating-point weights of the examples, or None for ones.
      margin, lam, where, label_smoothing: as in `lsoftmax_jax.lsoftmax_loss_sum`.
      memory_budget, row_block, class_block, keep_exponentials: as there, of each device, but row
        blocks compute the logits twice.

    Returns:
      scalar, float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `lsoftmax_loss` here.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"))
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> lsm.sharded.lsoftmax_loss_sum(
      ...     features, kernel, labels, jnp.full(2, 0.5), margin=4,
      ...     mesh=mesh, class_axis="model", batch_axes="data").round(3).item()
      3.832...

    Source: Liu et al., ICML 2016; class-parallel softmax as in An et al., "Partial FC", 2021.
    """
    layout = _layout(mesh, class_axis, batch_axes)
    call = _checked(layout, features, kernel, labels, margin, lam, where, label_smoothing, classes)
    weights = call.mask(check_weights(weights, call.head.batch_shape, call.lam.dtype))
    knobs = Knobs(memory_budget, row_block, class_block, keep_exponentials).checked()
    setting = call.setting(_plan(layout, call, knobs))
    weights = _place(layout, weights, layout.rows)
    return _sum(layout, setting, *_placed(layout, call), call.lam, weights)


# The arguments.


def padded_columns(classes: int, class_axis: str, mesh: Mesh | AbstractMesh | None = None) -> int:
    """The least number of kernel columns >= classes that the mesh axis divides.

    Args:
      classes: number of classes.
      class_axis: the mesh axis that the classes are sharded over.
      mesh: by default that of `jax.set_mesh`.

    Returns:
      the number of columns that the kernel of a sharded head has.

    Raises:
      ValueError: there is no mesh, or it has no such axis.

    Example:
      >>> import jax, lsoftmax_jax as lsm
      >>> lsm.sharded.padded_columns(10575, "model", jax.sharding.AbstractMesh((8,), ("model",)))
      10576
    """
    classes = arguments.check_size("classes", classes)
    shards = _layout(mesh, class_axis, ()).mesh.shape[class_axis]
    return -(-classes // shards) * shards


def placed_columns(
    kernel: jax.Array, class_axis: str, mesh: Mesh | AbstractMesh | None = None
) -> jax.Array:
    """kernel split over `class_axis` where the mesh has Explicit axes and would not do it."""
    layout = _layout(mesh, class_axis, ())
    return _place(layout, kernel, layout.columns)


def real_logits(logits: jax.Array, classes: int) -> jax.Array:
    """logits (..., columns) without those of the columns that only fill up the kernel."""
    if logits.shape[-1] == classes:
        return logits
    sharding = jax.typeof(logits).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        # An odd number of classes cannot stay split.
        logits = jax.reshard(logits, NamedSharding(sharding.mesh, P(*sharding.spec[:-1], None)))
    return logits[..., :classes]


def _mesh(mesh: Mesh | AbstractMesh | None) -> Mesh | AbstractMesh:
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    if mesh.empty:
        raise ValueError("mesh must be given, or set by jax.set_mesh; got neither")
    return mesh


def _layout(
    mesh: Mesh | AbstractMesh | None, class_axis: str, batch_axes: str | tuple[str, ...]
) -> _Layout:
    mesh = _mesh(mesh)
    batch_axes = (batch_axes,) if isinstance(batch_axes, str) else tuple(batch_axes)
    for name, axes in (("class_axis", (class_axis,)), ("batch_axes", batch_axes)):
        for axis in axes:
            if axis not in mesh.axis_names:
                raise ValueError(f"{name} must be axes of the mesh {mesh.axis_names}, got {axis!r}")
    return _Layout(mesh, class_axis, batch_axes)


def _checked(
    layout: _Layout,
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    margin: int,
    lam: ArrayLike,
    where: ArrayLike | None,
    label_smoothing: float,
    classes: int | None,
) -> Call:
    features, kernel = arguments.check_features(features, kernel)
    if features.ndim != 2:
        raise ValueError(f"features must have shape (batch, D), got {features.shape}")
    columns = kernel.shape[1]
    if classes is not None and not 1 <= arguments.check_size("classes", classes) <= columns:
        raise ValueError(f"classes must be at most the kernel's {columns} columns, got {classes}")
    shards, groups = layout.mesh.shape[layout.class_axis], 1
    for axis in layout.batch_axes:
        groups *= layout.mesh.shape[axis]
    if columns % shards:
        raise ValueError(
            f"kernel must have a multiple of {shards} columns to lie on axis "
            f"{layout.class_axis!r}, got {columns}: fill it up and pass classes={columns}"
        )
    if features.shape[0] % groups:
        raise ValueError(
            f"features must have a multiple of {groups} rows to lie on axes "
            f"{layout.batch_axes}, got {features.shape[0]}"
        )
    return Call.checked(features, kernel, labels, margin, lam, where, label_smoothing, classes)


def _plan(layout: _Layout, call: Call, knobs: Knobs) -> Any:
    batch, columns = call.size
    for axis in layout.data_axes:
        batch //= layout.mesh.shape[axis]
    columns //= layout.mesh.shape[layout.class_axis]
    return knobs.plan(batch, columns, call.head.kernel.dtype, rows_cost_no_more=False)


def _placed(layout: _Layout, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
    features, kernel, labels, _ = call.head
    return (
        _place(layout, features, layout.rows),
        _place(layout, kernel, layout.columns),
        _place(layout, labels, layout.rows),
    )


def _place(layout: _Layout, array: jax.Array, spec: P) -> jax.Array:
    """On a mesh with Explicit axes shard_map takes no operand that is placed otherwise."""
    if AxisType.Explicit not in layout.mesh.axis_types:
        return array
    return jax.reshard(array, NamedSharding(layout.mesh, spec))


# The loss of each example.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(
    layout: _Layout,
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
) -> tuple[jax.Array, Statistics]:
    return _loss_fwd(layout, setting, features, kernel, labels, lam)[0]


def _loss_fwd(
    layout: _Layout,
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
) -> tuple[Any, Any]:
    def local(features: Any, kernel: Any, labels: Any, lam: Any) -> tuple[Any, Any]:
        rows = _gather(layout, features, labels)
        shard = _forward(layout, setting, rows[0], kernel, rows[1], lam)
        seen = shard.loss, statistics_of(shard.t, shard.others)
        residuals = rows[0], shard.labels, shard.t, shard.z, shard.kept
        return _own_rows(layout, seen), jax.tree.map(lambda array: array[None], residuals)

    outputs, residuals = _on_devices(
        layout,
        local,
        (layout.rows, layout.columns, layout.rows, P()),
        (layout.rows, layout.local),
    )(features, kernel, labels, lam)
    return outputs, (kernel, residuals)


def _loss_bwd(
    layout: _Layout, setting: Setting, residuals: Any, cotangents: tuple[jax.Array, Statistics]
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    def local(kernel: Any, residuals: Any, cotangent: jax.Array) -> Any:
        features, labels, t, z, kept = jax.tree.map(lambda array: array[0], residuals)
        if layout.gathers:
            cotangent = jax.lax.all_gather(cotangent, layout.class_axis, tiled=True)
        row = gradient_row(setting, t, z, cotangent, features.dtype)
        dfeatures, dkernel = _backward(layout, setting, features, kernel, labels, row, kept)
        return dfeatures, dkernel, _over_data(layout, jnp.sum(row.dlam))

    dfeatures, dkernel, dlam = _on_devices(
        layout,
        local,
        (layout.columns, layout.local, layout.rows),
        (layout.rows, layout.columns, P()),
    )(*residuals, cotangents[0])
    return dfeatures, dkernel, None, dlam


_loss.defvjp(_loss_fwd, _loss_bwd)


# The weighted sum, its gradients computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(
    layout: _Layout,
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    # Not _sum_fwd(...)[0], which would pay for the gradients.
    return jnp.sum(weights * _loss(layout, setting, features, kernel, labels, lam)[0])


def _sum_fwd(
    layout: _Layout,
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, Any]:
    def local(features: Any, kernel: Any, labels: Any, lam: Any, weights: Any) -> Any:
        features, labels, weights = _gather(layout, features, labels, weights)
        shard = _forward(layout, setting, features, kernel, labels, lam)
        row = gradient_row(setting, shard.t, shard.z, weights, features.dtype)
        gradient = _backward(layout, setting, features, kernel, shard.labels, row, shard.kept)
        sums = jnp.stack([jnp.sum(weights * shard.loss), jnp.sum(row.dlam)])
        return _over_data(layout, sums), *gradient, _own_rows(layout, shard.loss)

    sums, dfeatures, dkernel, loss = _on_devices(
        layout,
        local,
        (layout.rows, layout.columns, layout.rows, P(), layout.rows),
        (P(), layout.rows, layout.columns, layout.rows),
    )(features, kernel, labels, lam, weights)
    return sums[0], (dfeatures, dkernel, sums[1], loss)


def _sum_bwd(
    layout: _Layout, setting: Setting, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    return scaled_gradients(residuals, cotangent)


_sum.defvjp(_sum_fwd, _sum_bwd)


# What one device does.


class _Shard(NamedTuple):
    """All classes' view of the rows, and what of it belongs to this device alone."""

    loss: jax.Array
    z: jax.Array
    others: Others
    t: Target  # logit, lam, cosine and plain of any row; the rest of rows whose class is here
    labels: jax.Array  # counted from this device's first class, -1 where the class is elsewhere
    kept: Any


def _forward(
    layout: _Layout,
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
) -> _Shard:
    width = kernel.shape[1]
    start = jax.lax.axis_index(layout.class_axis) * width
    here = (labels >= start) & (labels < start + width)
    t = target_of(features, kernel, jnp.where(here, labels - start, 0), lam, setting.margin)
    t = jax.tree.map(lambda value: jnp.where(here, value, 0), t)
    t = t._replace(logit=jnp.where(labels >= 0, t.logit, jnp.nan))
    labels = jnp.where(here, labels - start, -1)
    columns = _real_columns(layout, setting, kernel, start)
    others, kept = summarise(setting, features, columns, labels)
    t, others = _exchange(layout, t, others)
    loss, z = loss_and_z(setting, t, others)
    return _Shard(loss, z, others, t, labels, kept)


def _exchange(layout: _Layout, t: Target, others: Others) -> tuple[Target, Others]:
    """Sums what each device knows of the target and the other logits, in one collective."""
    mine = jnp.stack([*others, t.logit, t.lam, t.cosine, t.plain])
    peaks, masses, totals, *target = jnp.moveaxis(jax.lax.all_gather(mine, layout.class_axis), 1, 0)
    peak = jnp.max(peaks, axis=0)
    mass = jnp.sum(masses * jnp.exp(peaks - peak[None, :]), axis=0)
    logit, dlam, cosine, plain = (jnp.sum(value, axis=0) for value in target)
    t = t._replace(logit=logit, lam=dlam, cosine=cosine, plain=plain)
    return t, Others(peak, mass, jnp.sum(totals, axis=0))


def _backward(
    layout: _Layout,
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    row: Row,
    kept: Any,
) -> tuple[jax.Array, jax.Array]:
    start = jax.lax.axis_index(layout.class_axis) * kernel.shape[1]
    columns = _real_columns(layout, setting, kernel, start)
    dfeatures, dkernel = gradients(setting, features, columns, labels, row, kept)
    if layout.gathers:
        dfeatures = jax.lax.psum_scatter(dfeatures, layout.class_axis, tiled=True)
    else:
        dfeatures = jax.lax.psum(dfeatures, layout.class_axis)
    return dfeatures.astype(features.dtype), _over_data(layout, dkernel)


def _real_columns(
    layout: _Layout, setting: Setting, kernel: jax.Array, start: jax.Array
) -> Columns:
    width = kernel.shape[1]
    if width * layout.mesh.shape[layout.class_axis] == setting.classes:
        return Columns(kernel)
    real = start + jnp.arange(width, dtype=jnp.int32) < setting.classes
    dtype = arguments.at_least_f32(kernel.dtype)
    return Columns(kernel, jnp.where(real, 0, -jnp.inf).astype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather(layout: _Layout, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The rows of all devices along the class axis, in one collective, as bits."""
    if not layout.gathers:
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


def _gather_fwd(layout: _Layout, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    return _gather(layout, *arrays), None


def _gather_bwd(
    layout: _Layout, _: None, cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array | None, ...]:
    # Bits have no derivative; only a second derivative of the loss comes here.
    def own(cotangent: jax.Array) -> jax.Array | None:
        if cotangent.dtype == jax.dtypes.float0:
            return None
        if not layout.gathers:
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


def _own_rows(layout: _Layout, tree: Any) -> Any:
    if not layout.gathers:
        return tree
    shards = layout.mesh.shape[layout.class_axis]

    def own(array: jax.Array) -> jax.Array:
        rows = array.shape[0] // shards
        start = jax.lax.axis_index(layout.class_axis) * rows
        return jax.lax.dynamic_slice_in_dim(array, start, rows)

    return jax.tree.map(own, tree)


def _over_data(layout: _Layout, array: jax.Array) -> jax.Array:
    return jax.lax.psum(array, layout.data_axes) if layout.data_axes else array


def _on_devices(layout: _Layout, local: Any, in_specs: Any, out_specs: Any) -> Any:
    # What is gathered is the same on every device of the class axis, which JAX cannot know.
    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
