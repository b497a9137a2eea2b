"""What a loss is computed from: `Spec`, all that is static, and `Arrays`, all that is data."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax.margins import Margin, check_margin
from lsoftmax_jax.schedule import SelfPaced

AnyMesh = Mesh | AbstractMesh

# Row blocks below this many rows starve the matrix units; class blocks win there.
_FEWEST_ROWS = 704
# Narrower blocks of classes starve the matrix units; wider ones only cost memory.
_FEWEST_CLASSES, _MOST_CLASSES = 512, 8192
# From this many classes and logits on, blocks that fit a CPU's caches save time (`bench head`).
_MANY_CLASSES, _MANY_LOGITS, _CPU_BLOCK = 2**14, 2**23, 1024


@dataclass(frozen=True)
class Plan:
    """In which pieces a loss is computed: memory against time, never other numbers.

    The loss chooses one of three plans by `memory_budget`; `row_block` or `class_block` forces one:

    - one-shot: the forward pass keeps one (batch, classes) array of exponentials. With many classes
      a CPU makes this array in blocks of classes, which stay in its caches;
    - class blocks: the kept exponentials are the only large array. Without `keep_exponentials` no
      array is large, and the backward pass computes the logits again;
    - row blocks: `row_block` rows of logits exist at a time and none are kept. `lsoftmax_loss_sum`
      without a layout computes them once; all else computes them twice.

    Attributes:
      memory_budget: bytes that (batch, classes) temporaries may take, 1 GiB by default. With a
        layout the budget holds for each device, without one for the arrays as a whole, however they
        lie on a mesh: n devices that share a batch may take n times as much.
      row_block: rows at a time; forces row blocks.
      class_block: classes at a time; forces class blocks. A TPU multiplies a block of up to 256
        classes at full precision, which is slow.
      keep_exponentials: True keeps the exponentials for the backward pass: three matrix products
        and a (batch, classes) array, which class blocks hold in the operands' dtype. False computes
        them again: four products. None decides by the budget.

    Raises:
      TypeError, ValueError: a size is not an int >= 1, or two of the fields contradict each other.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> plan = lsm.Plan(class_block=2, keep_exponentials=False)
      >>> loss = lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=5.0, plan=plan)
      >>> loss.round(3).tolist()
      [1.473..., 1.473...]
    """

    memory_budget: int = 2**30
    row_block: int | None = None
    class_block: int | None = None
    keep_exponentials: bool | None = None

    def __post_init__(self) -> None:
        budget = _checks.check_size("memory_budget", self.memory_budget, most=2**63)
        _checks.keep(self, memory_budget=budget)
        for name in ("row_block", "class_block"):
            if (size := getattr(self, name)) is not None:
                _checks.keep(self, **{name: _checks.check_size(name, size)})
        if self.row_block is not None and self.class_block is not None:
            raise ValueError(
                f"row_block and class_block exclude each other, "
                f"got {self.row_block} and {self.class_block}"
            )
        if self.keep_exponentials is not None:
            keep = _checks.check_flag("keep_exponentials", self.keep_exponentials)
            _checks.keep(self, keep_exponentials=keep)
        if self.row_block is not None and self.keep_exponentials:
            raise ValueError("row_block keeps no exponentials, got keep_exponentials=True")


class Pieces(NamedTuple):
    """A plan for one size of head."""

    row_block: int | None = None
    class_block: int | None = None
    keep_exponentials: bool = True
    # Classes at a time on a CPU, for a plan that is one-shot elsewhere.
    cpu_block: int | None = None


def pieces_of(
    plan: Plan | None, batch: Any, classes: int, dtype: jnp.dtype, *, one_pass: bool
) -> Pieces:
    """The fastest pieces within the budget, as far as the plan leaves them open.

    Args:
      one_pass: whether row blocks compute the logits once.
    """
    plan = Plan() if plan is None else plan
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a lsoftmax_jax.Plan or None, got {plan!r:.80}")
    if not isinstance(batch, int):
        # The batch is a symbol of jax.export: nothing is known of its size.
        if plan.row_block is not None:
            raise ValueError("plan: row_block needs a batch of known size, got a symbolic one")
        if plan.class_block is None:
            return Pieces()
        kept = plan.keep_exponentials is not False
        return Pieces(class_block=min(plan.class_block, classes), keep_exponentials=kept)
    if plan.row_block is not None:
        return Pieces(row_block=min(plan.row_block, max(batch, 1)), keep_exponentials=False)
    wide = max(dtype.itemsize, 4)
    keep: bool | None = plan.keep_exponentials
    block = plan.class_block
    # A block's logits and exponentials exist at once.
    affordable = plan.memory_budget // (2 * wide * max(batch, 1)) // 128 * 128
    if block is None and keep is not False:
        rows = plan.memory_budget // (wide * classes)
        if batch <= rows:
            many = classes >= _MANY_CLASSES and batch * classes >= _MANY_LOGITS
            return Pieces(cpu_block=_CPU_BLOCK if many and dtype.itemsize >= 4 else None)
        # With so many rows even the smallest class block would exceed the budget.
        by_rows = one_pass or affordable < min(classes, _FEWEST_CLASSES)
        if keep is None and by_rows and rows >= _FEWEST_ROWS:
            return Pieces(row_block=rows // 64 * 64, keep_exponentials=False)
    if keep is None:
        keep = dtype.itemsize * batch * classes <= plan.memory_budget
    if block is None:
        block = max(min(affordable, _MOST_CLASSES), _FEWEST_CLASSES)
    return Pieces(class_block=min(block, classes), keep_exponentials=keep)


@dataclass(frozen=True)
class ClassParallel:
    """How a head lies on a mesh: the kernel's columns split over an axis.

    Every loss takes it as `layout`, and so do the heads. Each device computes the logits of its own
    columns. The devices exchange a handful of numbers a row, never logits.

    Attributes:
      class_axis: mesh axis of the classes.
      batch_axes: mesh axes of the first batch axis, a name or names. If `class_axis` is among them,
        every device gathers the rows of its group.
      mesh: the mesh, by default that of `jax.set_mesh`. Where a mesh of the same axes is set, the
        one that is set counts, with its devices.
      classes: number of real classes, by default all columns of the kernel. The size of
        `class_axis` must divide the columns. Add columns of any finite value until it does, see
        `columns`, and give the number of real ones here. The added columns take no part and get
        zero gradient. A Flax head adds and counts them by itself.

    Raises:
      TypeError: an axis is not a name, or `classes` not an int.
      ValueError: `classes` is below 1, or an axis is named twice. Where the layout is used: there
        is no mesh, or the mesh lacks an axis.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> lsm.ClassParallel("model", "data").batch_axes
      ('data',)

    Source: class-parallel softmax as in An et al., "Partial FC", 2021,
    https://arxiv.org/abs/2010.05222.
    """

    class_axis: str
    batch_axes: str | tuple[str, ...] = ()
    mesh: AnyMesh | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        axes = (self.batch_axes,) if isinstance(self.batch_axes, str) else self.batch_axes
        if not isinstance(axes, (tuple, list)):
            raise TypeError(f"batch_axes must name axes of a mesh, got {axes!r:.80}")
        axes = tuple(axes)
        object.__setattr__(self, "batch_axes", axes)
        for name, values in (("class_axis", (self.class_axis,)), ("batch_axes", axes)):
            for axis in values:
                if not isinstance(axis, str):
                    raise TypeError(f"{name} must name axes of a mesh, got {axis!r:.80}")
        if len(set(axes)) < len(axes):
            raise ValueError(f"batch_axes must name each axis once, got {axes}")
        if self.classes is not None:
            _checks.check_size("classes", self.classes)

    def columns(self, classes: int) -> int:
        """The least number of kernel columns >= `classes` that the class axis divides.

        Args:
          classes: number of classes.

        Returns:
          the number of columns that the kernel of a sharded head has.

        Raises:
          ValueError: there is no mesh, or the mesh has no such axis; there would be 2**31 columns.

        Example:
          >>> import jax, lsoftmax_jax as lsm
          >>> mesh = jax.sharding.AbstractMesh((8,), ("model",))
          >>> lsm.ClassParallel("model", mesh=mesh).columns(10575)
          10576
        """
        classes = _checks.check_size("classes", classes)
        shards = Layout.of(self).shards
        return _checks.check_size("columns", -(-classes // shards) * shards)

    # A layout never changes, so a copy of a model shares the layout.
    def __copy__(self) -> "ClassParallel":
        return self

    def __deepcopy__(self, _: Any) -> "ClassParallel":
        return self

    def __getstate__(self) -> dict[str, Any]:
        if isinstance(self.mesh, Mesh):
            raise TypeError(
                "layout cannot be pickled with the devices of its mesh: leave its mesh out, and "
                "set the mesh by jax.set_mesh"
            )
        return self.__dict__


class Layout(NamedTuple):
    """A `ClassParallel` whose mesh is known. Static."""

    mesh: AnyMesh
    class_axis: str
    batch_axes: tuple[str, ...]

    @classmethod
    def of(cls, parallel: ClassParallel) -> "Layout":
        if not isinstance(parallel, ClassParallel):
            raise TypeError(f"layout must be a lsoftmax_jax.ClassParallel, got {parallel!r:.80}")
        context = jax.sharding.get_abstract_mesh()
        mesh = parallel.mesh
        # JAX takes the axes' types from the context: `compile_step` makes Explicit ones Auto.
        if mesh is None or getattr(mesh, "shape_tuple", None) == context.shape_tuple:
            mesh = context
        if not isinstance(mesh, Mesh | AbstractMesh):
            raise TypeError(f"mesh must be a jax.sharding.Mesh or AbstractMesh, got {mesh!r:.80}")
        if mesh.empty:
            raise ValueError("mesh must be given, or set by jax.set_mesh; got neither")
        batch_axes = tuple(parallel.batch_axes)
        for name, axes in (("class_axis", (parallel.class_axis,)), ("batch_axes", batch_axes)):
            for axis in axes:
                if axis not in mesh.axis_names:
                    raise ValueError(
                        f"layout: {name} must be axes of the mesh {mesh.axis_names}, got {axis!r}"
                    )
        if mapped := context.manual_axes:
            raise ValueError(
                f"layout: the axes {mapped} are already mapped by jax.shard_map or jax.pmap; call "
                f"a class-parallel loss outside, on the whole arrays"
            )
        return cls(mesh, parallel.class_axis, batch_axes)

    @property
    def shards(self) -> int:
        return self.mesh.shape[self.class_axis]

    @property
    def data_axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in self.batch_axes if axis != self.class_axis)

    @property
    def data_shards(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in self.data_axes)

    @property
    def splits_rows(self) -> bool:
        """Whether the class axis splits the rows too, which each device then gathers."""
        return self.class_axis in self.batch_axes

    @property
    def rows(self) -> P:
        return P(self.batch_axes) if self.batch_axes else P()

    @property
    def columns(self) -> P:
        return P(None, self.class_axis)

    @property
    def of_columns(self) -> P:
        """For one number a column."""
        return P(self.class_axis)

    @property
    def own(self) -> P:
        """For arrays that belong to one device each, stacked along a new first axis."""
        return P((*self.data_axes, self.class_axis))

    def check(self, features: jax.Array, kernel: jax.Array, classes: int | None, name: str) -> None:
        """Refuses what does not divide over the mesh; `name` is that of the kernel."""
        if not all(isinstance(size, int) for size in features.shape):
            raise ValueError(
                f"features must have a known shape with a layout, got {features.shape}: export a "
                f"class-parallel loss for one batch size"
            )
        columns = kernel.shape[1]
        if classes is not None and classes > columns:
            raise ValueError(
                f"layout: classes must be at most the kernel's {columns} columns, got {classes}"
            )
        if columns % self.shards:
            cure = f"fill it up and say classes={columns}"
            if name != "kernel":
                cure = "draw the sample with the same layout"
            raise ValueError(
                f"{name} must have a multiple of {self.shards} columns to lie on axis "
                f"{self.class_axis!r}, got {columns}: {cure}"
            )
        if not self.batch_axes:
            return
        if features.ndim < 2:
            raise ValueError(
                f"features must have rows to lie on axes {self.batch_axes}, got shape "
                f"{features.shape}"
            )
        groups = math.prod(self.mesh.shape[axis] for axis in self.batch_axes)
        rows, least = features.shape[0], groups if self.splits_rows else 0
        if rows % groups or rows < least:
            some = f", at least {least}," if least else ""
            raise ValueError(
                f"features must have a multiple of {groups} rows{some} to lie on axes "
                f"{self.batch_axes}, got shape {features.shape}"
            )


class Spec(NamedTuple):
    """All that is static of a call."""

    margin: Margin
    rule: SelfPaced | None  # computes λ in place of the λ that is given
    label_smoothing: float
    classes: int  # real ones of the whole head
    dtype: jnp.dtype  # of the matrix products
    pieces: Pieces
    layout: Layout | None

    @property
    def length(self) -> float | None:
        """The margin's scale. NumPy's float64, of a caller's own margin, would widen float32."""
        return None if self.margin.scale is None else float(self.margin.scale)

    @property
    def unit_columns(self) -> bool:
        return self.margin.scale is not None or self.margin.unit_columns


class Arrays(NamedTuple):
    """All that is data of a call; of each shard inside `jax.shard_map`."""

    features: Any  # (..., D)
    kernel: Any  # (D, columns)
    labels: Any  # (...,)
    lam: Any  # ()
    where: Any = None  # (...,) bool
    weights: Any = None  # (...,), of a sum
    offset: Any = None  # (columns,), added to the logits of other classes; -inf takes a column out
    classes: Any = None  # (), in place of `Spec.classes` where it is known only to a sample


def prepare(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
    one_pass: bool = False,
    name: str = "kernel",
) -> tuple[Spec, Arrays]:
    """The checked arguments of a loss.

    Args:
      one_pass: whether row blocks compute the logits once.
      name: of the argument `kernel`.
    """
    margin = check_margin(margin)
    label_smoothing = _checks.check_fraction("label_smoothing", label_smoothing)
    features, kernel = _checks.check_operands(features, kernel, name)
    batch_shape, (_, columns) = features.shape[:-1], kernel.shape
    rule, lam = (lam, np.float32(0)) if isinstance(lam, SelfPaced) else (None, lam)
    lam = _checks.check_scalar("lam", lam)
    where = _checks.check_mask(where, batch_shape)
    weights = _checks.check_weights(weights, batch_shape)
    classes, rows = columns, math.prod(batch_shape)
    on_mesh = None
    if layout is not None:
        on_mesh = Layout.of(layout)
        on_mesh.check(features, kernel, layout.classes, name)
        classes = columns if layout.classes is None else layout.classes
        columns, one_pass = columns // on_mesh.shards, False
        rows //= on_mesh.data_shards
    labels = _checks.check_labels(labels, batch_shape, classes)
    dtype = _checks.promoted(features, kernel)
    pieces = pieces_of(plan, rows, columns, dtype, one_pass=one_pass)
    spec = Spec(margin, rule, label_smoothing, classes, dtype, pieces, on_mesh)
    return spec, Arrays(features, kernel, labels, lam, where, weights)
