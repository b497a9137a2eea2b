"""The loss over a sample of the classes, an approximation for when even a shard is too many.

The target logit and its gradient are exact. The sum over the other logits is estimated from the
classes of the batch's labels, which are always in the sample, and from others drawn without
replacement. Only the sampled columns of the kernel are read and updated. With a `ClassParallel`
layout every device draws from its own classes, beside the positives that it holds (Partial FC).

Source: An et al., "Partial FC: Training 10 Million Identities on a Single Machine", 2021,
https://arxiv.org/abs/2010.05222.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._core import mesh, run
from lsoftmax_jax._core.mesh import resharded
from lsoftmax_jax._core.run import Statistics
from lsoftmax_jax._core.spec import Arrays, ClassParallel, Layout, Plan, Spec, prepare
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.schedule import SelfPaced

_ROUNDS = 6
# Up to this many classes a shuffle is as fast, and a Feistel network that small mixes badly.
_SHUFFLED_CLASSES = 4096


class Sample(NamedTuple):
    """Classes drawn for a batch.

    Attributes:
      ids: (min(batch, classes) + negatives,) int32 class numbers: the distinct labels, then the
        other drawn classes. An entry for a repeated label, or for a drawn class that is a label,
        has no class: it holds the number of classes. With a layout each device has such a part.
      offset: (ids.size,), added to the logits of other classes; -inf where an entry has no class.
        A class stands for exp(offset) classes.
      labels: (batch,), the batch's labels as positions in `ids`, -1 for a label outside
        [0, classes).
    """

    ids: jax.Array
    offset: jax.Array
    labels: jax.Array


def sample_classes(
    key: jax.Array,
    labels: ArrayLike,
    classes: int,
    negatives: int,
    *,
    corrected: bool = True,
    layout: ClassParallel | None = None,
) -> Sample:
    r"""Draws `negatives` distinct classes uniformly, and adds the classes of the labels.

    The draw is the start of a keyed permutation of [0, classes): a Feistel network, applied again
    where a number is beyond. It takes O(negatives) time and memory for any number of classes. (A
    few thousand classes are shuffled instead.)

    Args:
      key: a key of `jax.random`.
      labels: (...,) integers in [0, classes).
      classes: number of classes, static.
      negatives: how many to draw, from 1 to `classes`, static. A drawn class that is a label is in
        the sample once. (Paddle and insightface count the labels in: max(labels, negatives) classes
        in all.)
      corrected: add :math:`\log\frac{\text{classes} - p}{n}` to the logits of the n drawn classes
        that are no labels (p being the number of distinct labels). This makes the sum of the other
        exponentials an unbiased estimate as long as, on every device, one of the drawn is a class
        and no label. False lets fewer classes compete, as the published Partial FC does.
      layout: how the kernel lies on a mesh. Each device then draws its part of the negatives from
        its own classes; the class axis must divide `negatives`.

    Returns:
      `Sample`, labels flattened.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> sample = lsm.sample_classes(jax.random.key(0), jnp.array([7, 7, 3]), 1_000_000, 5)
      >>> sample.ids.shape, sample.ids[:3].tolist(), sample.labels.tolist()
      ((8,), [3, 7, 1000000], [1, 1, 0])
    """
    classes = _checks.check_size("classes", classes)
    if _checks.check_size("negatives", negatives) > classes:
        raise ValueError(f"negatives must be at most classes = {classes}, got {negatives}")
    corrected = _checks.check_flag("corrected", corrected)
    labels = _checks.check_labels(labels, _checks.shape_of("labels", labels, "integers"), classes)
    if not isinstance(labels.size, int):
        raise ValueError(
            "labels must have a known size, got a symbolic one: draw the sample outside of what "
            "jax.export exports"
        )
    _check_key(key)
    on_mesh = _layout_of(layout)
    if on_mesh is not None and negatives % on_mesh.shards:
        raise ValueError(
            f"negatives must be a multiple of the {on_mesh.shards} devices along "
            f"{on_mesh.class_axis!r}, got {negatives}"
        )
    return _drawn(classes, negatives, corrected, on_mesh, key, labels)


def _check_key(key: Any) -> None:
    key = _checks.as_array("key", key, "a key of jax.random")
    try:
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        keys = key if typed else jax.random.wrap_key_data(key)
    except TypeError as error:
        got = f"dtype {key.dtype} and shape {key.shape}"
        raise TypeError(f"key must be a key of jax.random, got {got}") from error
    if keys.shape:
        raise ValueError(f"key must be one key of jax.random, got keys of shape {keys.shape}")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3), inline=True)
def _drawn(
    classes: int,
    negatives: int,
    corrected: bool,
    layout: Layout | None,
    key: jax.Array,
    labels: jax.Array,
) -> Sample:
    given = jax.typeof(labels).sharding.mesh
    if given.explicit_axes:
        labels = resharded(labels, given, P(*(None,) * labels.ndim))
    labels = _checks.known_labels(labels, classes).reshape(math.prod(labels.shape))
    if layout is None:
        ids, offset, position = _drawn_from(key, labels, classes, classes, negatives, corrected)
        return Sample(ids, offset, jnp.where(labels >= 0, position, -1))
    width = -(-classes // layout.shards)

    def local(key: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        shard = jax.lax.axis_index(layout.class_axis)
        start = shard * width
        here = (labels >= start) & (labels - start < width)  # start + width may be 2**31
        ids, offset, position = _drawn_from(
            jax.random.fold_in(key, shard),
            jnp.where(here, labels - start, -1),
            width,
            jnp.clip(classes - start, 0, width),
            negatives // layout.shards,
            corrected,
        )
        position = jnp.where(here, shard * ids.size + position, 0)
        ids = jnp.where(ids < width, start + ids, classes)
        return ids, offset, jax.lax.psum(position, layout.class_axis)

    of_columns = layout.of_columns
    specs = (P(), P()), (of_columns, of_columns, P())
    ids, offset, position = mesh.on_devices(layout, local, *specs)(key, labels)
    return Sample(ids, offset, jnp.where(labels >= 0, position, -1).astype(jnp.int32))


def _drawn_from(
    key: jax.Array,
    labels: jax.Array,
    width: int,
    classes: int | jax.Array,
    negatives: int,
    corrected: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids, offset, position of each label) of a draw from [0, width), of which `classes` exist.

    An entry without a class has the id `width`.
    """
    known = jnp.where(labels >= 0, labels, width)
    slots = min(labels.size, width)
    # `known` may hold all classes, and `width` for labels elsewhere: one value more.
    positives = jnp.unique(known, size=min(labels.size, width + 1), fill_value=width)[:slots]
    drawn = _permuted(key, width, min(negatives, width))
    repeated = _holds(positives, drawn)[0]
    drawn = jnp.where(repeated | (drawn >= classes), width, drawn)
    ids = jnp.concatenate([positives, drawn]).astype(jnp.int32)
    offset = jnp.zeros(ids.shape, jnp.float32)
    if corrected:
        rest = jnp.maximum(classes - jnp.sum(positives < width, dtype=jnp.int32), 1)
        count = jnp.maximum(jnp.sum(drawn < width, dtype=jnp.int32), 1)
        correction = jnp.log(rest.astype(jnp.float32)) - jnp.log(count.astype(jnp.float32))
        offset = offset.at[slots:].set(correction)
    offset = jnp.where(ids < width, offset, -jnp.inf)
    return ids, offset, _holds(positives, labels)[1]


def _holds(ordered: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether an ordered array holds each value, and where the value is or would be."""
    # Not jnp.searchsorted, which fails where jax.shard_map has mapped some axes (JAX 0.10).
    size = ordered.size
    ordered = jnp.append(ordered, jnp.iinfo(ordered.dtype).max)  # never empty
    low = jnp.zeros_like(values)
    high = low + size
    for _ in range(size.bit_length()):
        middle = (low + high) // 2
        below = (middle < high) & (ordered[middle] < values)
        low, high = jnp.where(below, middle + 1, low), jnp.where(below, high, middle)
    return ordered[low] == values, low


def _permuted(key: jax.Array, classes: int, count: int) -> jax.Array:
    """The images of 0 .. count - 1 under a keyed permutation of [0, classes)."""
    if classes <= _SHUFFLED_CLASSES:
        return jax.random.permutation(key, classes)[:count].astype(jnp.int32)
    half = math.ceil(math.log2(classes) / 2)
    mask = jnp.uint32(2**half - 1)
    keys = jax.random.bits(key, (_ROUNDS,), jnp.uint32)

    def mixed(value: jax.Array) -> jax.Array:
        # The finaliser of MurmurHash3: every bit of the input moves every bit of the output.
        value = (value ^ (value >> 16)) * jnp.uint32(0x85EBCA6B)
        value = (value ^ (value >> 13)) * jnp.uint32(0xC2B2AE35)
        return value ^ (value >> 16)

    def permute(value: jax.Array) -> jax.Array:
        left, right = value >> half, value & mask
        for round_key in keys:
            left, right = right, left ^ (mixed(right ^ round_key) & mask)
        return (left << half) | right

    def walk(value: jax.Array) -> jax.Array:
        return jnp.where(value >= classes, permute(value), value)

    start = permute(jnp.arange(count, dtype=jnp.uint32))
    inside = jax.lax.while_loop(lambda value: jnp.any(value >= classes), walk, start)
    return inside.astype(jnp.int32)


def take_columns(
    kernel: jax.Array, sample: Sample, *, layout: ClassParallel | None = None
) -> jax.Array:
    """The sampled columns of a kernel, or of an array like it, such as its momentum.

    Args:
      kernel: (D, classes); with a layout (D, columns).
      sample: from `sample_classes`, with the same layout.
      layout: how the kernel lies on a mesh; no column leaves its device.

    Returns:
      (D, sample.ids.size): zero where `sample` has no class, NaN where the class is not on the
      device, because the sample was drawn with another layout or for more classes.

    Raises:
      TypeError, ValueError: `kernel` is not a matrix, or `sample` not a `Sample`.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> sample = lsm.sampled.Sample(jnp.array([1, 3]), jnp.array([0, -jnp.inf]), jnp.array([0]))
      >>> lsm.sampled.take_columns(jnp.eye(3), sample).tolist()
      [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    kernel, on_mesh = _checked_kernel(kernel, layout), _layout_of(layout)
    return _taken(on_mesh, kernel, _checked(sample))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _taken(layout: Layout | None, kernel: jax.Array, sample: Sample) -> jax.Array:
    def local(kernel: jax.Array, ids: jax.Array) -> jax.Array:
        here = _own_ids(layout, kernel, ids)
        columns = kernel.at[:, here].get(mode="fill", fill_value=0)
        # A class that this device does not hold: the sample was drawn with another layout.
        known = (ids < 0) | (here < kernel.shape[1])
        return _checks.nan_unless(known[None, :], columns)

    if layout is not None:
        in_specs = layout.columns, layout.of_columns
        local = mesh.on_devices(layout, local, in_specs, layout.columns)
    return local(*_split(layout, kernel, sample))


def put_columns(
    kernel: jax.Array,
    sample: Sample,
    columns: jax.Array,
    *,
    layout: ClassParallel | None = None,
) -> jax.Array:
    """The kernel with its sampled columns replaced; if it is donated, only they are written.

    Treat the kernel's optimiser state in the same way: take its columns, update them, put them
    back.

    Args:
      kernel: (D, classes); with a layout (D, columns).
      sample: from `sample_classes`, with the same layout.
      columns: (D, sample.ids.size), cast to the dtype of `kernel`.
      layout: how the kernel lies on a mesh; no column leaves its device.

    Returns:
      as `kernel`.

    Raises:
      TypeError, ValueError: `kernel` is not a matrix, `sample` not a `Sample`, or `columns` has
        another shape, which would be broadcast.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> sample = lsm.sampled.Sample(jnp.array([1, 3]), jnp.array([0, -jnp.inf]), jnp.array([0]))
      >>> lsm.sampled.put_columns(jnp.eye(3), sample, jnp.full((3, 2), 9.0))[0].tolist()
      [1.0, 9.0, 0.0]
    """
    kernel, on_mesh = _checked_kernel(kernel, layout), _layout_of(layout)
    sample = _checked(sample)
    columns = _checks.as_array("columns", columns, "an array (D, sample.ids.size)")
    wanted = kernel.shape[0], sample.ids.size
    if columns.shape != wanted:
        raise ValueError(
            f"columns must have shape {wanted}, as take_columns gives them, got {columns.shape}"
        )
    return _put(on_mesh, kernel, sample, columns)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _put(layout: Layout | None, kernel: jax.Array, sample: Sample, columns: jax.Array) -> jax.Array:
    def local(kernel: jax.Array, ids: jax.Array, columns: jax.Array) -> jax.Array:
        here = _own_ids(layout, kernel, ids)
        return kernel.at[:, here].set(columns.astype(kernel.dtype), mode="drop")

    if layout is not None:
        split = layout.columns
        columns = resharded(columns, layout.mesh, split)
        local = mesh.on_devices(layout, local, (split, layout.of_columns, split), split)
    return local(*_split(layout, kernel, sample), columns)


def _own_ids(layout: Layout | None, kernel: jax.Array, ids: jax.Array) -> jax.Array:
    """ids from this device's first class on; the number of its columns where there is no class."""
    width = kernel.shape[1]
    local = ids - mesh.first_class(layout, width)
    # A negative index would wrap to the last column.
    return jnp.where((local >= 0) & (local < width), local, width)


def _split(layout: Layout | None, kernel: jax.Array, sample: Sample) -> tuple[jax.Array, jax.Array]:
    """The kernel and the ids where they lie; -1 where an entry has no class."""
    ids = jnp.where(sample.offset > -jnp.inf, sample.ids, -1)
    if layout is None:
        return kernel, ids
    kernel = resharded(kernel, layout.mesh, layout.columns)
    return kernel, resharded(ids, layout.mesh, layout.of_columns)


def _layout_of(layout: ClassParallel | None) -> Layout | None:
    return None if layout is None else Layout.of(layout)


def _checked_kernel(kernel: ArrayLike, layout: ClassParallel | None) -> jax.Array:
    kernel = _checks.as_array("kernel", kernel, "an array (D, classes)")
    _checks.check_columns("kernel", kernel)
    if layout is None and jax.typeof(kernel).sharding.spec[-1:] not in ((), (None,)):
        # Its type says so on Explicit axes.
        raise ValueError(
            f"layout must be given for a kernel whose columns lie on a mesh, got "
            f"{jax.typeof(kernel)}"
        )
    if layout is not None and layout.classes is not None:
        # A sample counts classes from the first column of each device.
        columns = layout.columns(layout.classes)
        if kernel.shape[1] != columns:
            raise ValueError(
                f"kernel must have {columns} columns for {layout.classes} classes on this layout, "
                f"got {kernel.shape}"
            )
    return kernel


def _checked(sample: Sample) -> Sample:
    if not isinstance(sample, Sample):
        raise TypeError(f"sample must be what sample_classes gives, got {type(sample).__name__}")
    fields = sample._asdict().items()
    return Sample(
        *(_checks.as_array(f"sample.{name}", array, "an array") for name, array in fields)
    )


def lsoftmax_sampled_loss(
    features: ArrayLike,
    columns: ArrayLike,
    sample: Sample,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> jax.Array:
    r"""`lsoftmax_jax.lsoftmax_loss` against the sampled classes alone, one value an example.

    .. math:: \ell = -\log \frac{e^{z_y}}{e^{z_y} + \sum_{j \ne y,\, j \in S} e^{z_j + o_j}}

    It is an approximation. With all classes drawn it is the exact loss. Otherwise its expectation
    is lower, because it is the logarithm of an unbiased estimate. The fewer are drawn, the lower it
    is.

    Args:
      features: (..., D) floating point.
      columns: (D, sample.ids.size), `take_columns(kernel, sample)`; differentiate with respect
        to these, update them and their optimiser state, and put them back.
      sample: from `sample_classes` for the labels of these features, with the same layout.
      margin, lam, where, label_smoothing, plan, layout: as in `lsoftmax_jax.lsoftmax_loss`. The
        largest other logit, which `self_paced` reads, has its offset.

    Returns:
      (...,) float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `lsoftmax_jax.lsoftmax_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> kernel, features, labels = jnp.eye(4, 1000), jnp.ones((2, 4)), jnp.array([0, 2])
      >>> sample = lsm.sample_classes(jax.random.key(0), labels, 1000, negatives=1000)
      >>> columns = lsm.sampled.take_columns(kernel, sample)
      >>> sampled = lsm.lsoftmax_sampled_loss(features, columns, sample, margin=4, lam=5.0)
      >>> exact = lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=5.0)
      >>> bool(jnp.allclose(sampled, exact))
      True
    """
    keywords = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
    prepared = _prepared(features, columns, sample, layout, margin=margin, lam=lam, **keywords)
    return run.losses(*prepared)[0]


def lsoftmax_sampled_loss_and_statistics(
    features: ArrayLike,
    columns: ArrayLike,
    sample: Sample,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> tuple[jax.Array, Statistics]:
    """`lsoftmax_sampled_loss`, and the `lsoftmax_jax.Statistics` of the same pass.

    Args:
      features, columns, sample, margin, lam, where, label_smoothing, plan, layout: as there.

    Returns:
      the loss (...,), and `Statistics`; `max_logit` is the largest of the sampled others with its
      offset, so `plain_logit > max_logit` is not the classification.

    Raises:
      TypeError, ValueError: as `lsoftmax_sampled_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> kernel, features, labels = jnp.eye(4, 1000), jnp.ones((2, 4)), jnp.array([0, 2])
      >>> sample = lsm.sample_classes(jax.random.key(0), labels, 1000, negatives=100)
      >>> columns = lsm.sampled.take_columns(kernel, sample)
      >>> loss, seen = lsm.lsoftmax_sampled_loss_and_statistics(
      ...     features, columns, sample, margin=4, lam=5.0)
      >>> seen.plain_logit.tolist()
      [1.0, 1.0]
    """
    keywords = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
    prepared = _prepared(features, columns, sample, layout, margin=margin, lam=lam, **keywords)
    return run.losses(*prepared)


def lsoftmax_sampled_loss_sum(
    features: ArrayLike,
    columns: ArrayLike,
    sample: Sample,
    weights: ArrayLike | None = None,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> jax.Array:
    """The scalar sum of weights * `lsoftmax_sampled_loss`, its gradients in the forward pass.

    Args:
      weights: (...,) floating-point weights of the examples, or None for ones.
      features, columns, sample, margin, lam, where, label_smoothing, plan, layout: as there.

    Returns:
      scalar, float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: as `lsoftmax_sampled_loss`.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> kernel, features, labels = jnp.eye(4, 1000), jnp.ones((2, 4)), jnp.array([0, 2])
      >>> sample = lsm.sample_classes(jax.random.key(0), labels, 1000, negatives=100)
      >>> columns = lsm.sampled.take_columns(kernel, sample)
      >>> lsm.lsoftmax_sampled_loss_sum(features, columns, sample, margin=4, lam=5.0).shape
      ()
    """
    keywords: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
    keywords |= {"weights": weights, "one_pass": True}
    prepared = _prepared(features, columns, sample, layout, margin=margin, lam=lam, **keywords)
    return run.loss_sum(*prepared)


def _prepared(
    features: ArrayLike,
    columns: ArrayLike,
    sample: Sample,
    layout: ClassParallel | None,
    **keywords: Any,
) -> tuple[Spec, Arrays]:
    sample = _checked(sample)
    features, columns = _checks.check_operands(features, columns, "columns")
    if columns.shape[1] != sample.ids.size:
        raise ValueError(
            f"columns must have shape (D, {sample.ids.size}), one for each id of the sample, got "
            f"{columns.shape}"
        )
    if sample.labels.size != math.prod(features.shape[:-1]):
        raise ValueError(
            f"sample must be drawn for the labels of these features {features.shape}, got a sample "
            f"for {sample.labels.size} labels"
        )
    # All sampled columns count; the offset takes out those without a class.
    layout = None if layout is None else dataclasses.replace(layout, classes=None)
    labels = sample.labels.reshape(features.shape[:-1])
    spec, arrays = prepare(features, columns, labels, layout=layout, name="columns", **keywords)
    return spec, arrays._replace(offset=sample.offset)
