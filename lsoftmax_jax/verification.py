r"""How well embeddings verify: do two embeddings show one class, such as one person?

A pair of embeddings is genuine if both have one label, and an impostor pair if not. It is accepted
where the cosine of the two is at least a threshold. FAR is the share of the impostor pairs that a
threshold accepts, TAR the share of the genuine pairs::

    result = lsm.verification.verify(embeddings, labels)     # all pairs
    result.roc.eer, result.roc.auc, result.roc.tar_at(1e-3), result.rank_1

The functions run in NumPy on the host, outside of `jax.jit`, and take NumPy and JAX arrays. They
work in blocks of a fixed size, so that all pairs of many embeddings need little memory.

**What is exact.** A cosine is the product of two float32 unit vectors, rounded to a multiple of
2**-20. The order of the product's sum changes its last bits by about 1e-7. Without the rounding,
equal pairs would tie in one block and not in another. With it a few, near the middle of two
multiples, still come out 2**-20 apart in blocks of other shapes, or in a list of pairs. ROC, EER,
AUC, TAR and rank 1 then count every pair at its rounded cosine: no pair is sampled, and no coarser
bins are made. The rounding moves a cosine by at most 2**-21 = 4.8e-7.
"""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from lsoftmax_jax import _checks

_Floats = NDArray[np.float64]
_Units = NDArray[np.float32]
_Integers = NDArray[np.integer]

_IMPOSTOR, _GENUINE = 0, 1
# Steps of a rounded cosine between 0 and 1; float32 holds every multiple exactly.
_STEPS = 2**20
# Cosines of a block are _BLOCK x _BLOCK. Larger blocks need more memory and are no faster.
_BLOCK = 1024
# This many pairs of 512 numbers stay in a core's cache between gather and product.
_PAIRS = 512


class Roc(NamedTuple):
    """The receiver operating characteristic: one entry a threshold, thresholds falling.

    Every score that occurs is a threshold, and pairs of equal score are accepted together. The
    curve is the line through all points (FAR, TAR), as scikit-learn's `roc_curve` has them.

    Attributes:
      thresholds: (points,) float64. A pair is accepted where its score is at least the threshold.
        The first is infinite and accepts no pair, the last accepts all.
      far: (points,) float64, the share of impostor pairs accepted, from 0 to 1.
      tar: (points,) float64, the share of genuine pairs accepted, from 0 to 1.
      genuine: number of genuine pairs.
      impostors: number of impostor pairs. No FAR between 0 and 1 / impostors was measured.
    """

    thresholds: _Floats
    far: _Floats
    tar: _Floats
    genuine: int
    impostors: int

    @property
    def eer(self) -> float:
        """The equal error rate: FAR where the line of the curve crosses FAR = 1 - TAR.

        The crossing is unique, because FAR + TAR rises at every point.
        """
        return float(np.interp(0.0, self.far + self.tar - 1, self.far))

    @property
    def auc(self) -> float:
        """The area under the curve: how often a genuine pair scores above an impostor pair.

        A tie counts as a half.
        """
        return float(np.trapezoid(self.tar, self.far))

    def tar_at(self, far: float) -> float:
        """The highest TAR of a threshold whose FAR is at most `far`, without interpolation.

        Args:
          far: in [0, 1]. Below 1 / impostors it allows no false accept at all.

        Returns:
          TAR in [0, 1].
        """
        return float(self.tar[self._last(far)])

    def threshold_at(self, far: float) -> float:
        """The lowest threshold whose FAR is at most `far`; infinite if every score's is higher.

        Args:
          far: in [0, 1].

        Returns:
          the threshold, to use on other pairs.
        """
        return float(self.thresholds[self._last(far)])

    def _last(self, far: float) -> int:
        return int(np.searchsorted(self.far, _checks.check_fraction("far", far), side="right")) - 1


class Verification(NamedTuple):
    """What `verify` measures.

    Attributes:
      roc: over the compared pairs, with EER, AUC and TAR at FAR.
      rank_1: the share of embeddings that are nearest to one of their own class. An embedding
        counts if it is in a genuine and in an impostor pair, so the only embedding of a class does
        not. A tie between own and other class counts as a half. NaN if no embedding counts.
    """

    roc: Roc
    rank_1: float


class Angles(NamedTuple):
    """What `angles` measures, in radians.

    Attributes:
      to_column: (n,) float64, from each embedding to its label's kernel column; None without one.
      within: (n,) float64, from each embedding to the centre of its class. It is 0 for the only
        embedding of a class.
      between: (classes,) float64, from each class's centre to the nearest other centre, in the
        order of the sorted labels.
    """

    to_column: _Floats | None
    within: _Floats
    between: _Floats


def verify(
    embeddings: ArrayLike, labels: ArrayLike, pairs: ArrayLike | None = None
) -> Verification:
    """ROC and rank 1 of all pairs of embeddings, or of given pairs, by cosine.

    n embeddings have n (n - 1) / 2 pairs. All of them need at most 300 MB beside two float32 copies
    of the embeddings, whatever n is. On two CPU cores it is a few seconds for 13,000 embeddings.

    Args:
      embeddings: (n, D) real numbers, finite, none of length zero.
      labels: (n,) integers or strings. Equal labels are one class.
      pairs: (pairs, 2) integers, two rows of `embeddings` each; by default all pairs. A pair that
        is listed twice counts twice.

    Returns:
      `Verification`, on the host.

    Raises:
      TypeError: an argument is not such an array, or is a masked array.
      ValueError: a shape or a row of `pairs` does not fit, an embedding is not finite or has length
        zero, or there is no genuine or no impostor pair.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> embeddings = [[9.0, 0.0], [8.0, 2.0], [5.0, 5.0], [0.0, 9.0]]
      >>> result = lsm.verification.verify(embeddings, ["Ada", "Ada", "Bob", "Bob"])
      >>> result.roc.genuine, result.roc.impostors, result.rank_1
      (2, 4, 0.75)
      >>> round(result.roc.eer, 3), result.roc.auc, result.roc.tar_at(0.1)
      (0.333, 0.8125, 0.5)
    """
    units, classes = _units("embeddings", embeddings), _classes(labels)
    if classes.shape != units.shape[:1]:
        raise ValueError(f"labels must have shape {units.shape[:1]}, got {classes.shape}")
    if pairs is None:
        return _all_pairs(units, classes)
    rows = _rows(pairs, len(units))
    steps, same = _pair_steps(units, rows), classes[rows[:, 0]] == classes[rows[:, 1]]
    if not len(rows) or same.all() or not same.any():
        raise ValueError(
            f"pairs must hold genuine and impostor pairs, got {same.sum()} genuine pairs of "
            f"{len(rows)}"
        )
    counts, nearest = _nothing_seen(len(units))
    for kind in (_IMPOSTOR, _GENUINE):
        chosen = same == kind
        counts[kind] = np.bincount(steps[chosen], minlength=counts.shape[1])
        for row in rows[chosen].T:
            np.maximum.at(nearest[kind], row, steps[chosen])
    return _verification(counts, nearest)


def roc(scores: ArrayLike, same: ArrayLike) -> Roc:
    """The ROC of scores that you have, such as cosines or negative distances. It is exact.

    Args:
      scores: (pairs,) finite real numbers, higher for more alike.
      same: (pairs,) boolean, whether the pair is genuine.

    Returns:
      `Roc`, with a point at every score that occurs.

    Raises:
      TypeError: an argument is not such an array, or is a masked array.
      ValueError: shapes differ, a score is not finite, or no pair is genuine, or all are.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> seen = lsm.verification.roc([0.9, 0.8, 0.7, 0.1], [True, False, True, False])
      >>> seen.auc, seen.eer, seen.tar_at(0.1), seen.threshold_at(0.5)
      (0.75, 0.5, 0.5, 0.7)
      >>> seen.far.tolist(), seen.tar.tolist()
      ([0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0])
    """
    values, genuine = _reals("scores", scores, "(pairs,)"), _host("same", same, "boolean")
    if genuine.dtype != np.bool_:
        raise TypeError(f"same must be boolean, got dtype {genuine.dtype}")
    if values.ndim != 1:
        raise ValueError(f"scores must have shape (pairs,), got {values.shape}")
    if genuine.shape != values.shape:
        raise ValueError(f"same must have the shape {values.shape} of scores, got {genuine.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(values))):
        raise ValueError(f"scores must be finite, got NaN or infinity in {_some(bad, len(values))}")
    if not len(genuine) or genuine.all() or not genuine.any():
        raise ValueError(
            f"same must hold True and False, got {genuine.sum()} True of {len(genuine)}"
        )
    scores, place = np.unique(values.astype(np.float64), return_inverse=True)
    counts = [np.bincount(place[kind], minlength=len(scores)) for kind in (~genuine, genuine)]
    return _roc(scores, *counts)


def pair_cosines(embeddings: ArrayLike, pairs: ArrayLike) -> _Units:
    """The cosine of each pair, as `verify` compares given pairs.

    Where `verify` compares all pairs, a few cosines are 2**-20 higher or lower.

    Args:
      embeddings: (n, D) real numbers, finite and not of length zero.
      pairs: (pairs, 2) integers, the rows of each pair.

    Returns:
      (pairs,) float32 in [-1, 1], multiples of 2**-20.

    Raises:
      TypeError: an argument is not such an array, or is a masked array.
      ValueError: a shape or a row of `pairs` does not fit, or an embedding is not finite or has
        length zero.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> lsm.verification.pair_cosines([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]], [[0, 1], [0, 2]])
      array([1., 0.], dtype=float32)
    """
    units = _units("embeddings", embeddings)
    steps = _pair_steps(units, _rows(pairs, len(units)))
    return ((steps - _STEPS) / _STEPS).astype(np.float32)


def angles(embeddings: ArrayLike, labels: ArrayLike, kernel: ArrayLike | None = None) -> Angles:
    """How narrow classes are and how far apart, in radians, as ArcFace's paper measures it.

    The centre of a class is the direction of the mean of its unit embeddings. A centre of length
    zero is at a right angle to everything. Angles are right to about 1e-6, small ones too.

    Args:
      embeddings: (n, D) real numbers, finite and not of length zero.
      labels: (n,) integers or strings, of at least two classes. With `kernel` integers in
        [0, classes).
      kernel: (D, classes) of the head that the embeddings were trained with, if they were.

    Returns:
      `Angles`, on the host: `.within.mean()` and so on reduce them.

    Raises:
      TypeError: an argument is not such an array, or is a masked array.
      ValueError: shapes do not fit, an embedding or the column of a label is not finite or has
        length zero, a label has no column, or there is only one class.

    Example:
      >>> import numpy as np
      >>> import lsoftmax_jax as lsm
      >>> embeddings = [[1.0, 0.0], [2.0, 2.0], [0.0, 1.0]]
      >>> seen = lsm.verification.angles(embeddings, [0, 0, 1], np.eye(2))
      >>> np.degrees(seen.to_column).round(1).tolist()
      [0.0, 45.0, 0.0]
      >>> np.degrees(seen.within).round(1).tolist(), np.degrees(seen.between).round(1).tolist()
      ([22.5, 22.5, 0.0], [67.5, 67.5])

    Source: Deng et al., ArcFace, CVPR 2019, the table of angle statistics.
    """
    units = _units("embeddings", embeddings)
    names, classes, counts = np.unique(_labels(labels), return_inverse=True, return_counts=True)
    if classes.shape != units.shape[:1]:
        raise ValueError(f"labels must have shape {units.shape[:1]}, got {classes.shape}")
    if len(names) < 2:
        raise ValueError(f"labels must hold at least two classes, got {len(names)}")
    to_column = None
    if kernel is not None:
        to_column = _angles(units, _columns(kernel, units.shape[1], names), classes)
    starts = np.cumsum(counts) - counts
    sorted_units = units[np.argsort(classes, kind="stable")]
    sums = np.add.reduceat(sorted_units, starts, axis=0, dtype=np.float64)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    # Opposite unit vectors leave the rounding of their sum.
    exists = lengths > 1e-6 * counts[:, None]
    centres = np.where(exists, sums / np.where(exists, lengths, 1), 0)
    return Angles(to_column, _angles(units, centres, classes), _between(centres))


def _all_pairs(units: _Units, classes: _Integers) -> Verification:
    sizes = np.bincount(classes)
    if len(sizes) < 2 or sizes.max() < 2:
        raise ValueError(
            f"labels must give genuine and impostor pairs, got {len(sizes)} classes of "
            f"{len(units)} embeddings"
        )
    # With the classes side by side, most blocks hold no genuine pair.
    order = np.argsort(classes, kind="stable")
    units, classes = units[order], classes[order]
    counts, nearest = _nothing_seen(len(units))
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(units), _BLOCK)]
    for number, rows in enumerate(blocks):
        for columns in blocks[number:]:
            steps = _steps(units[rows] @ units[columns].T)
            same = classes[rows, None] == classes[columns]
            for kind, chosen in ((_IMPOSTOR, ~same), (_GENUINE, same)):
                if rows == columns:
                    chosen = np.triu(chosen, 1)
                if chosen.any():
                    counts[kind] += np.bincount(steps[chosen], minlength=counts.shape[1])
                    seen, best = np.where(chosen, steps, -1), nearest[kind]
                    best[rows] = np.maximum(best[rows], seen.max(axis=1))
                    best[columns] = np.maximum(best[columns], seen.max(axis=0))
    return _verification(counts, nearest)


def _nothing_seen(n: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """For both kinds of pairs: their number at each step, and each row's largest step or -1."""
    return np.zeros((2, 2 * _STEPS + 1), np.int64), np.full((2, n), -1, np.int32)


def _verification(counts: NDArray[np.int64], nearest: NDArray[np.int32]) -> Verification:
    occurs = np.flatnonzero(counts.any(axis=0))
    other, own = nearest[:, (nearest >= 0).all(axis=0)]
    rank_1 = float(np.mean((own > other) + 0.5 * (own == other))) if len(own) else math.nan
    return Verification(_roc((occurs - _STEPS) / _STEPS, *counts[:, occurs]), rank_1)


def _roc(scores: _Floats, impostors: _Integers, genuine: _Integers) -> Roc:
    """Of rising scores and the pairs of each kind at each."""
    accepted = [np.cumsum(np.append(0, kind[::-1])) for kind in (impostors, genuine)]
    far, tar = (kind / kind[-1] for kind in accepted)
    totals = [int(kind[-1]) for kind in accepted]
    return Roc(np.append(math.inf, scores[::-1]), far, tar, totals[1], totals[0])


def _steps(cosines: _Units) -> NDArray[np.int32]:
    """Cosines as steps from 0 to 2 _STEPS; overwrites the array of cosines."""
    cosines *= _STEPS
    np.rint(cosines, out=cosines)
    np.clip(cosines, -_STEPS, _STEPS, out=cosines)
    cosines += _STEPS
    return cosines.astype(np.int32)


def _pair_steps(units: _Units, rows: _Integers) -> NDArray[np.int32]:
    """The steps of pairs of rows, on all cores."""
    steps = np.empty(len(rows), np.int32)

    def fill(start: int) -> None:
        first, second = rows[start : start + _PAIRS].T
        cosines = np.vecdot(units.take(first, axis=0), units.take(second, axis=0))
        steps[start : start + _PAIRS] = _steps(cosines)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(fill, range(0, len(rows), _PAIRS)))
    return steps


def _angles(units: _Units | _Floats, directions: _Units | _Floats, classes: _Integers) -> _Floats:
    """The angle from each row to the direction of its class."""
    found = np.empty(len(units))
    for start in range(0, len(units), _BLOCK):
        rows = slice(start, start + _BLOCK)
        left = units[rows].astype(np.float64)
        right = directions[classes[rows]].astype(np.float64)
        # arccos of a float32 cosine is wrong by 3e-4 near 0; this is right everywhere (Kahan 2006).
        apart, along = (np.linalg.norm(side, axis=1) for side in (left - right, left + right))
        exists = left.any(axis=1) & right.any(axis=1)
        found[rows] = np.where(exists, 2 * np.arctan2(apart, along), np.pi / 2)
    return found


def _between(centres: _Floats) -> _Floats:
    """The angle from each centre to the nearest other."""
    nearest = np.zeros(len(centres), np.int64)
    for start in range(0, len(centres), _BLOCK):
        rows = np.arange(start, min(start + _BLOCK, len(centres)))
        best = np.full(len(rows), -2.0)
        for other in range(0, len(centres), _BLOCK):
            cosines = centres[rows] @ centres[other : other + _BLOCK].T
            if other == start:
                np.fill_diagonal(cosines, -2)
            place = cosines.argmax(axis=1)
            value = np.take_along_axis(cosines, place[:, None], axis=1)[:, 0]
            nearest[rows] = np.where(value > best, other + place, nearest[rows])
            best = np.maximum(best, value)
    return _angles(centres, centres, nearest)


def _host(name: str, value: Any, expected: str) -> NDArray:
    """`value` as a NumPy array; a TypeError that names the argument if it is not an array."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be {expected}, got a masked array: leave masked rows out")
    if value is None or isinstance(value, str) or callable(value):
        raise TypeError(f"{name} must be {expected}, got {value!r}")
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:
        got = type(value).__name__
        raise TypeError(f"{name} must be {expected}, got {got}: {error}") from error


def _reals(name: str, value: Any, shape: str) -> NDArray:
    array = _host(name, value, f"real numbers {shape}")
    number = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    if array.size and not number:
        raise TypeError(f"{name} must be real numbers {shape}, got dtype {array.dtype}")
    return array


def _units(name: str, value: Any, numbers: _Integers | None = None) -> _Units:
    """Rows of length 1; a message calls them by `numbers`, by default from 0."""
    rows = _reals(name, value, "(n, D)")
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"{name} must have shape (n, D >= 1), got {rows.shape}")
    units, largest = np.empty(rows.shape, np.float32), np.empty(len(rows))
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK].astype(np.float64)
        top = largest[start : start + _BLOCK] = np.abs(block).max(axis=1)
        block[~(np.isfinite(top) & (top > 0))] = 1  # refused below
        # Scale before squaring, so that very long and very short rows keep their direction.
        block /= np.abs(block).max(axis=1, keepdims=True)
        units[start : start + _BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    numbers = np.arange(len(rows)) if numbers is None else numbers
    if len(bad := numbers[~np.isfinite(largest)]):
        raise ValueError(f"{name} must be finite, got NaN or infinity in {_some(bad, len(rows))}")
    if len(bad := numbers[largest == 0]):
        raise ValueError(f"{name} must not be of length zero, got zeros in {_some(bad, len(rows))}")
    return units


def _labels(value: Any) -> NDArray:
    labels = _host("labels", value, "integers or strings (n,)")
    if labels.dtype.kind in "OT" and all(isinstance(label, str) for label in labels.flat):
        labels = labels.astype(object).astype(str)  # as pandas holds them
    if labels.size and labels.dtype.kind not in "iuUS":
        raise TypeError(f"labels must be integers or strings (n,), got dtype {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (n,), got {labels.shape}")
    return labels


def _classes(value: Any) -> _Integers:
    """Labels numbered from 0, for comparisons as fast as integers'."""
    return np.unique(_labels(value), return_inverse=True)[1].astype(np.int32)


def _rows(value: Any, n: int) -> _Integers:
    pairs = _host("pairs", value, "integers (pairs, 2)")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape (pairs, 2), got {pairs.shape}")
    if not np.issubdtype(pairs.dtype, np.integer):
        raise TypeError(f"pairs must be integers (pairs, 2), got dtype {pairs.dtype}")
    outside = (pairs < 0) | (pairs >= n)
    if len(bad := np.flatnonzero(outside.any(axis=1))):
        raise ValueError(
            f"pairs must be rows of embeddings in [0, {n}), got {pairs[bad[0]].tolist()} "
            f"as pair {bad[0]}"
        )
    if len(bad := np.flatnonzero(pairs[:, 0] == pairs[:, 1])):
        raise ValueError(
            f"pairs must be of two rows each, got {pairs[bad[0]].tolist()} as pair {bad[0]}"
        )
    return pairs.astype(np.int64)


def _columns(value: Any, length: int, labels: NDArray) -> _Units:
    """The columns of the labels as rows of length 1."""
    kernel = _reals("kernel", value, "(D, classes)")
    if kernel.ndim != 2 or kernel.shape[0] != length:
        raise ValueError(f"kernel must have shape ({length}, classes), got {kernel.shape}")
    if labels.dtype.kind not in "iu":
        raise TypeError(f"labels must be integers for a kernel, got dtype {labels.dtype}")
    if labels[0] < 0 or labels[-1] >= kernel.shape[1]:
        raise ValueError(
            f"labels must be in [0, {kernel.shape[1]}), the columns of kernel, got {labels[0]} "
            f"to {labels[-1]}"
        )
    return _units("the columns of kernel", kernel.T[labels], labels)


def _some(numbers: _Integers, n: int) -> str:
    """The first few of bad rows, for a message."""
    more = ", ..." if len(numbers) > 5 else ""
    return f"{len(numbers)} of {n}: {', '.join(map(str, numbers[:5].tolist()))}{more}"
