"""The loss over a sample of the classes, an approximation for when even a shard is too many.

The target logit and its gradient are exact. The sum over the other logits is estimated from the
classes of the batch's labels, which are always in the sample, and from others drawn without
replacement. Only the sampled columns of the kernel are read and updated.

Source: An et al., "Partial FC: Training 10 Million Identities on a Single Machine", 2021,
https://arxiv.org/abs/2010.05222.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._pace import SelfPaced
from lsoftmax_jax._plans import Plan, pieces_of
from lsoftmax_jax.loss import Call, Given, per_example
from lsoftmax_jax.margins import Margin

_ROUNDS = 6
# Up to here shuffling all classes is as quick, and so small a Feistel network mixes badly.
_SHUFFLED_CLASSES = 4096


class Sample(NamedTuple):
    """Classes drawn for a batch.

    Attributes:
      ids: (batch + negatives,) int32 class numbers: the distinct labels, then the drawn others.
        An entry without a class, for a repeated or a drawn label, holds the number of classes.
      offset: added to the logits of these classes except as a target; -inf without a class.
      labels: the batch's labels as positions in `ids`, -1 for a label outside [0, classes).
    """

    ids: jax.Array
    offset: jax.Array
    labels: jax.Array


def sample_classes(
    key: jax.Array, labels: ArrayLike, classes: int, negatives: int, *, corrected: bool = True
) -> Sample:
    r"""Draws `negatives` distinct classes uniformly, and adds the classes of the labels.

    The draw is the start of a keyed permutation of [0, classes): a Feistel network, applied again
    where a number is beyond. It takes O(negatives) time and memory for any number of classes. (A
    few thousand classes are shuffled instead.)

    Args:
      key: a key of `jax.random`.
      labels: (...,) integers in [0, classes).
      classes: number of classes, static.
      negatives: how many to draw, from 1 to `classes`, static. Those that are labels count once.
      corrected: add :math:`\log\frac{\text{classes} - p}{n}` to the logits of the n drawn classes
        (p being the number of distinct labels), which makes the sum of the other exponentials an
        unbiased estimate. False lets fewer classes compete, as the published Partial FC does.

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
    shape = _checks.shape_of("labels", labels, "integers")
    kind = getattr(key, "dtype", None)
    if kind is None or not (jnp.issubdtype(kind, jax.dtypes.prng_key) or kind == jnp.uint32):
        raise TypeError(f"key must be a key of jax.random, got {key!r}")
    labels = _checks.check_labels(labels, shape, classes).reshape(math.prod(shape))
    known = jnp.where(labels >= 0, labels, classes)
    positives = jnp.unique(known, size=labels.size, fill_value=classes)
    drawn = _permuted(key, classes, negatives)
    before, through = (jnp.searchsorted(positives, drawn, side=side) for side in ("left", "right"))
    drawn = jnp.where(before < through, classes, drawn)  # a label already
    ids = jnp.concatenate([positives, drawn])
    offset = jnp.zeros(ids.shape, jnp.float32)
    if corrected:
        rest = classes - jnp.sum(positives < classes)
        count = jnp.maximum(jnp.sum(drawn < classes), 1)
        correction = jnp.log(rest.astype(jnp.float32)) - jnp.log(count.astype(jnp.float32))
        offset = offset.at[labels.size :].set(correction)
    offset = jnp.where(ids < classes, offset, -jnp.inf)
    position = jnp.searchsorted(positives, labels).astype(jnp.int32)
    return Sample(ids, offset, jnp.where(labels >= 0, position, -1))


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


def take_columns(kernel: jax.Array, sample: Sample) -> jax.Array:
    """The sampled columns of a kernel, or of an array like it, such as its momentum.

    Args:
      kernel: (D, classes).
      sample: from `sample_classes`.

    Returns:
      (D, batch + negatives), zero where `sample` has no class.

    Raises:
      TypeError, ValueError: `kernel` is no matrix, or `sample` no `Sample`.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> sample = lsm.sampled.Sample(jnp.array([1, 3]), jnp.array([0, -jnp.inf]), jnp.array([0]))
      >>> lsm.sampled.take_columns(jnp.eye(3), sample).tolist()
      [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    """
    kernel, ids = _kernel_and_ids(kernel, sample)
    return kernel.at[:, ids].get(mode="fill", fill_value=0)


def put_columns(kernel: jax.Array, sample: Sample, columns: jax.Array) -> jax.Array:
    """The kernel with its sampled columns replaced; if it is donated, only they are written.

    Treat the kernel's optimiser state in the same way: take its columns, update them, put them
    back.

    Args:
      kernel: (D, classes).
      sample: from `sample_classes`.
      columns: (D, batch + negatives), cast to the dtype of `kernel`.

    Returns:
      (D, classes), as `kernel`.

    Raises:
      TypeError, ValueError: `kernel` is no matrix, `sample` no `Sample`, or `columns` has another
        shape, which would be broadcast.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> sample = lsm.sampled.Sample(jnp.array([1, 3]), jnp.array([0, -jnp.inf]), jnp.array([0]))
      >>> lsm.sampled.put_columns(jnp.eye(3), sample, jnp.full((3, 2), 9.0))[0].tolist()
      [1.0, 9.0, 0.0]
    """
    kernel, ids = _kernel_and_ids(kernel, sample)
    columns = _checks.as_array("columns", columns, "an array (D, batch + negatives)")
    if columns.shape != (kernel.shape[0], ids.size):
        raise ValueError(
            f"columns must have shape {(kernel.shape[0], ids.size)}, as take_columns gives them, "
            f"got {columns.shape}"
        )
    return kernel.at[:, ids].set(columns.astype(kernel.dtype), mode="drop")


def _kernel_and_ids(kernel: ArrayLike, sample: Sample) -> tuple[jax.Array, jax.Array]:
    kernel = _checks.as_array("kernel", kernel, "an array (D, classes)")
    if kernel.ndim != 2:
        raise ValueError(f"kernel must have shape (D, classes), got {kernel.shape}")
    return kernel, _checked_sample(sample).ids


def _checked_sample(sample: Sample) -> Sample:
    if not isinstance(sample, Sample):
        raise TypeError(f"sample must be what sample_classes gives, got {type(sample).__name__}")
    return sample


def lsoftmax_sampled_loss(
    features: ArrayLike,
    columns: ArrayLike,
    sample: Sample,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    scale: float | None = None,
    where: ArrayLike | None = None,
    plan: Plan | None = None,
) -> jax.Array:
    r"""`lsoftmax_jax.lsoftmax_loss` against the sampled classes alone, one value an example.

    .. math:: \ell = -\log \frac{e^{z_y}}{e^{z_y} + \sum_{j \ne y,\, j \in S} e^{z_j + o_j}}

    It is an approximation. With all classes drawn it is the exact loss. Otherwise its expectation
    is lower, because it is the logarithm of an unbiased estimate. The fewer are drawn, the lower it
    is.

    Args:
      features: (..., D) floating point.
      columns: (D, batch + negatives), `take_columns(kernel, sample)`; differentiate with respect
        to these, update them and their optimiser state, and put them back.
      sample: from `sample_classes` for the labels of these features.
      margin, lam, scale, where, plan: as in `lsoftmax_jax.lsoftmax_loss`.

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
    sample = _checked_sample(sample)
    features, columns = _checks.check_features(features, columns, "columns")
    if columns.shape[1] != sample.ids.size:
        raise ValueError(
            f"columns (D, batch + negatives) must be those of the sample, {sample.ids.size}, got "
            f"{columns.shape}"
        )
    if sample.labels.size != math.prod(features.shape[:-1]):
        raise ValueError(
            f"sample must be drawn for the labels of these features {features.shape}, got one "
            f"for {sample.labels.size} labels"
        )
    labels = sample.labels.reshape(features.shape[:-1])
    call = Call.checked(features, columns, labels, margin, lam, scale, where, 0.0)
    pieces = pieces_of(plan, *call.size, call.operands.kernel.dtype, rows_cost_no_more=False)
    offset = sample.offset.astype(call.lam.dtype)
    given = Given(*call.operands[:3], call.lam, offset, call.counted())
    loss, _ = per_example(call.setting, pieces, given)
    return call.mask(call.unflattened(loss))
