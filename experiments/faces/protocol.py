"""Face verification on LFW's pairs by cosine, with thresholds cross-validated over the folds.

The protocol is view 2 of LFW as SphereFace's evaluation runs it. The mean, the optional PCA and the
threshold for a fold are fitted on the other folds:

    z = (embedding - mean) P,   score = cos(z_first, z_second),   "same" where score >= threshold

>>> rng = np.random.default_rng(0)
>>> first, noise = rng.normal(size=(2, 40, 8))
>>> same = np.arange(40) % 2 == 0
>>> second = np.where(same[:, None], first + 0.1 * noise, noise)
>>> result = verify(first, second, same, fold=np.arange(40) // 10)
>>> result.accuracy, result.roc.auc
(1.0, 1.0)
"""

import math
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from unicodedata import normalize as in_form

import numpy as np
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from experiments.store.files import read_text
from lsoftmax_jax.verification import Roc, roc

if TYPE_CHECKING:
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    Projection: TypeAlias = StandardScaler | PCA


class Pairs(NamedTuple):
    """Pairs of images by name without extension (`Person/Person_0001`); four (pairs,) arrays."""

    first: NDArray[np.str_]
    second: NDArray[np.str_]
    same: NDArray[np.bool_]
    fold: NDArray[np.int64]


class Verification(NamedTuple):
    """The result of `verify`; the ROC pools the scores of the tested folds."""

    accuracy: float
    standard_error: float
    fold_accuracy: NDArray[np.float64]
    fold_threshold: NDArray[np.float64]
    roc: Roc


def read_pairs(*paths: str | Path) -> Pairs:
    """Reads pairs from files in LFW's formats, and numbers the folds through all files.

    The first line of a file holds the number of folds and n, as in view 2's `pairs.txt`. A file of
    one fold may hold n alone there, as view 1's `pairsDevTrain.txt` and `pairsDevTest.txt` do. Each
    fold has n lines `name i j` (images i and j of one person), then n lines `name i other j`. Image
    i of name is `name/name_000i`. Returned names have Unicode's composed form (NFC).

    Raises:
      ValueError: a line does not fit, or the number of pairs is not that of the first line.
    """
    files = [_pairs_of_file(path) for path in paths]
    before = np.cumsum([0] + [pairs.fold.max() + 1 for pairs in files[:-1]])
    files = [pairs._replace(fold=pairs.fold + n) for pairs, n in zip(files, before, strict=True)]
    return Pairs(*map(np.concatenate, zip(*files, strict=True)))


def _pairs_of_file(path: str | Path) -> Pairs:
    # Some editors begin a file with a byte-order mark.
    lines = in_form("NFC", read_text(Path(path)).removeprefix("\ufeff")).splitlines()
    rows = [line.split("\t" if "\t" in line else None) for line in lines if line.strip()]
    first_line = [field.strip() for field in rows[0]] if rows else []
    if len(first_line) not in (1, 2) or not all(field.isdecimal() for field in first_line):
        raise ValueError(
            f"{path}: the first line must be `folds pairs` or `pairs`, numbers, as in LFW"
        )
    *several, half = map(int, first_line)
    folds = several[0] if several else 1
    if folds * half == 0 or len(rows) - 1 != folds * 2 * half:
        raise ValueError(
            f"{path}: expected {folds} folds of {half} + {half} pairs; got {len(rows) - 1} pairs"
        )
    same = np.tile(np.repeat([True, False], half), folds)
    names = [_names(row, one, path) for row, one in zip(rows[1:], same.tolist(), strict=True)]
    first, second = np.array(names).T
    return Pairs(first, second, same, np.repeat(np.arange(folds), 2 * half))


def people_of_fold(pairs: Pairs, fold: int) -> frozenset[str]:
    """Returns everybody in a fold's pairs.

    Raises:
      ValueError: the pairs have no such fold.
    """
    if fold not in pairs.fold:
        raise ValueError(f"fold must be in 0..{pairs.fold.max()}; got {fold}")
    names = np.concatenate([pairs.first, pairs.second])[np.tile(pairs.fold == fold, 2)]
    return frozenset(name.split("/")[0] for name in names.tolist())


def _names(row: list[str], one_person: bool, path: str | Path) -> tuple[str, str]:
    match one_person, [field.strip() for field in row]:
        case True, [name, i, j] if i.isdecimal() and j.isdecimal() and int(i) != int(j):
            return f"{name}/{name}_{i:0>4}", f"{name}/{name}_{j:0>4}"
        case False, [name, i, other, j] if i.isdecimal() and j.isdecimal() and name != other:
            return f"{name}/{name}_{i:0>4}", f"{other}/{other}_{j:0>4}"
    expected = "`name i j`" if one_person else "`name i other j`"
    pair = "two images of one person" if one_person else "images of two people"
    raise ValueError(f"{path}: expected {expected}; got {' '.join(row)!r}, not {pair}")


def verify(
    first: ArrayLike,
    second: ArrayLike,
    same: ArrayLike,
    fold: ArrayLike,
    *,
    components: int | None = None,
    tested: Collection[int] | None = None,
) -> Verification:
    """Measures how well embeddings tell which pairs show one person: accuracy and ROC.

    The accuracy is the mean over folds. Its standard error is the sample standard deviation of the
    folds / sqrt(folds).

    Args:
      first, second: embeddings, (pairs, D) each; row i of both is pair i. Computed in at least f32.
      same: (pairs,) bool, whether both embeddings are of one person.
      fold: (pairs,) integer, the fold of each pair; at least two folds.
      components: number of principal components kept, fitted on the other folds' embeddings;
          None subtracts their mean and keeps all D.
      tested: the folds to test, all by default; the ROC holds only their scores. The standard error
          of a single fold is NaN.

    Raises:
      ValueError: shapes disagree; an embedding is not finite; there are fewer than two folds; the
          tested folds, or the folds other than a tested one, lack same or different pairs; or
          components or tested is out of range.

    Source: LFW's technical report 07-49 for the protocol; SphereFace for the mean and the cosine.
    """
    first, second = _checked("first", first), _checked("second", second)
    same, fold = np.asarray(same, bool), np.asarray(fold)
    if first.shape != second.shape:
        raise ValueError(f"second must have first's shape, {first.shape}; got {second.shape}")
    for name, array in {"same": same, "fold": fold}.items():
        if array.shape != first.shape[:1]:
            raise ValueError(f"{name} must have shape {first.shape[:1]}; got {array.shape}")
    if len(folds := np.unique(fold)) < 2:
        raise ValueError(f"fold must name at least two folds; got {len(folds)}")
    tested = folds if tested is None else np.unique(list(tested))
    if not len(tested) or not np.isin(tested, folds).all():
        raise ValueError(f"tested must be some of the folds {folds}; got {tested}")

    def of_fold(held_out: Any) -> tuple[NDArray, NDArray, float, np.floating]:
        """Scores and kinds of the fold's pairs, threshold of the other folds, accuracy."""
        test = fold == held_out
        known = np.concatenate([first[~test], second[~test]])
        scores = pair_scores(first, second, fitted(known, components))
        threshold = best_threshold(roc(scores[~test], same[~test]))
        right = (scores[test] >= threshold) == same[test]
        return scores[test], same[test], threshold, np.mean(right)

    # Give BLAS one thread a fold: on shared cores, several threads mostly wait for each other.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        *pooled, thresholds, accuracy = zip(*threads.map(of_fold, tested), strict=True)
    n = len(accuracy)
    return Verification(
        accuracy=float(np.mean(accuracy)),
        standard_error=float(np.std(accuracy, ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        fold_accuracy=np.array(accuracy),
        fold_threshold=np.array(thresholds),
        roc=roc(*map(np.concatenate, pooled)),
    )


def fitted(embeddings: NDArray[np.floating], components: int | None = None) -> "Projection":
    """Fits the projection of `verify`: subtract the mean, then apply PCA if components is given.

    Raises:
      ValueError: components is below 1, or above D or the number of embeddings.
    """
    # scikit-learn takes seconds to import, for which no other command should wait.
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    if components is None:
        projection = StandardScaler(with_std=False)
    elif 1 <= components <= min(embeddings.shape):
        projection = PCA(components, svd_solver="covariance_eigh")
    else:
        raise ValueError(f"components must be in 1..{min(embeddings.shape)}; got {components}")
    return projection.fit(embeddings)


def pair_scores(
    first: NDArray[np.floating], second: NDArray[np.floating], projection: "Projection"
) -> NDArray[np.floating]:
    """Cosine of each pair, (pairs,), after a projection.

    An embedding equal to the mean has cosine 0 with every other.
    """
    # scikit-learn's `normalize` leaves rows shorter than 10 eps as they are, in float32 1e-6.
    left, right = (projection.transform(side).astype(np.float64) for side in (first, second))
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.sum(left * right, axis=1) / np.where(lengths > 0, lengths, 1)


def best_threshold(seen: Roc) -> float:
    """Returns the threshold with the most right decisions; of several such, the highest.

    The threshold lies halfway between the two scores that it separates.

    >>> best_threshold(roc([0.9, 0.5, 0.1], [True, True, False]))
    0.3
    """
    right = seen.tar * seen.genuine + (1 - seen.far) * seen.impostors
    best = int(np.argmax(np.round(right)))
    # No cosine lies outside [-1, 1]: 2 accepts no pair, -2 every pair.
    lower = seen.thresholds[best + 1] if best + 1 < len(seen.thresholds) else -2.0
    return float((min(seen.thresholds[best], 2.0) + lower) / 2)


def _checked(name: str, embeddings: ArrayLike) -> NDArray[np.floating]:
    embeddings = np.asarray(embeddings)
    embeddings = embeddings.astype(np.promote_types(embeddings.dtype, np.float32), copy=False)
    if embeddings.ndim != 2:
        raise ValueError(f"{name} must be embeddings of shape (pairs, D); got {embeddings.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(embeddings).all(axis=1))):
        raise ValueError(f"{name} must be finite; {len(bad)} rows are not: {bad[:5].tolist()}")
    return embeddings
