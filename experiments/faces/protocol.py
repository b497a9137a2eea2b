"""Face verification on pairs of embeddings: cosine, cross-validated thresholds, ROC.

The protocol is that of LFW's view 2 as the authors' later evaluator (SphereFace) runs it. For each
fold, everything that is fitted (mean, optional PCA, threshold) is fitted on the other folds:

    z = (embedding - mean) P,   score = cos(z_first, z_second),   "same" where score >= threshold

>>> rng = np.random.default_rng(0)
>>> first, noise = rng.normal(size=(2, 40, 8))
>>> same = np.arange(40) % 2 == 0
>>> second = np.where(same[:, None], first + 0.1 * noise, noise)
>>> result = verify(first, second, same, fold=np.arange(40) // 10)
>>> result.accuracy, result.auc
(1.0, 1.0)
"""

import math
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize as in_form

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits

from experiments.store.files import read_text

FALSE_ACCEPT_RATES = (1e-3, 1e-2)


class Pairs(NamedTuple):
    """Pairs of images by name without extension (`Person/Person_0001`); four (pairs,) arrays."""

    first: NDArray[np.str_]
    second: NDArray[np.str_]
    same: NDArray[np.bool_]
    fold: NDArray[np.int64]


class Verification(NamedTuple):
    """What `verify` measures; AUC, EER, TAR and the curve pool the held-out scores of all folds."""

    accuracy: float
    standard_error: float
    fold_accuracy: NDArray[np.float64]
    fold_threshold: NDArray[np.float64]
    auc: float
    equal_error_rate: float
    tar_at_far: dict[float, float]
    false_accepts: NDArray[np.float64]
    true_accepts: NDArray[np.float64]


def read_pairs(*paths: str | Path) -> Pairs:
    """Pairs of files in LFW's formats; the folds of a file come after those of the one before it.

    The first line holds the number of folds and n, as in view 2's `pairs.txt`, or n alone for one
    fold, as in view 1's `pairsDevTrain.txt` and `pairsDevTest.txt`; each fold has n lines
    `name i j` (one person, images i and j), then n lines `name i other j`; image i of name is
    `name/name_000i`. The names come back in Unicode's composed form (NFC).

    Raises:
      ValueError: naming the line that does not fit, or the number of pairs expected and got.
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
    """Everybody in a fold's pairs.

    Raises:
      ValueError: if the pairs have no such fold.
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
    """Accuracy and ROC of deciding from two arrays of embeddings which pairs are one person.

    The accuracy is the mean over folds, its standard error their sample deviation / sqrt(folds).

    Args:
      first, second: embeddings, (pairs, D) each; row i of both is pair i. At least f32 inside.
      same: (pairs,) bool, whether both embeddings are of one person.
      fold: (pairs,) integer, the fold of each pair; at least two folds.
      components: number of principal components kept, fitted on the other folds' embeddings;
          None subtracts their mean and keeps all D.
      tested: the folds that are tested, all by default; the curve holds only their scores. One
          fold has no standard error (NaN).

    Raises:
      ValueError: if shapes disagree, an embedding is not finite, there are fewer than two folds,
          the tested folds or those beside one lack same or different pairs, or components or
          tested is out of range.

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
        """Its pairs' kinds and scores, the threshold fitted on the others, its accuracy."""
        test = fold == held_out
        scores = pair_scores(first, second, fitted_on=~test, components=components)
        threshold = best_threshold(scores[~test], same[~test])
        right = (scores[test] >= threshold) == same[test]
        return same[test], scores[test], threshold, np.mean(right)

    # One BLAS thread a fold: where cores are shared, several spend their time on waiting.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as threads:
        *seen, thresholds, accuracy = zip(*threads.map(of_fold, tested), strict=True)
    pooled = [np.concatenate(of_folds) for of_folds in seen]
    _check_kinds(pooled[0])
    false_accepts, true_accepts, _ = roc_curve(*pooled, drop_intermediate=False)
    n = len(accuracy)
    return Verification(
        accuracy=float(np.mean(accuracy)),
        standard_error=float(np.std(accuracy, ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        fold_accuracy=np.array(accuracy),
        fold_threshold=np.array(thresholds),
        auc=float(roc_auc_score(*pooled)),
        equal_error_rate=equal_error_rate(false_accepts, true_accepts),
        tar_at_far={
            rate: float(true_accepts[false_accepts <= rate].max()) for rate in FALSE_ACCEPT_RATES
        },
        false_accepts=false_accepts,
        true_accepts=true_accepts,
    )


def pair_scores(
    first: NDArray[np.floating],
    second: NDArray[np.floating],
    *,
    fitted_on: NDArray[np.bool_],
    components: int | None = None,
) -> NDArray[np.floating]:
    """Cosine of each pair, (pairs,), after the mean and PCA of the pairs where fitted_on is True.

    An embedding equal to the mean has cosine 0 with every other.

    Raises:
      ValueError: if components is below 1 or above D or the embeddings fitted on.
    """
    known = np.concatenate([first[fitted_on], second[fitted_on]])
    if components is None:
        projection = StandardScaler(with_std=False)
    elif 1 <= components <= min(known.shape):
        projection = PCA(components, svd_solver="covariance_eigh")
    else:
        raise ValueError(f"components must be in 1..{min(known.shape)}; got {components}")
    projection.fit(known)
    left, right = (normalize(projection.transform(side)) for side in (first, second))
    return np.sum(left * right, axis=1)


def best_threshold(scores: NDArray[np.floating], same: NDArray[np.bool_]) -> float:
    """The threshold with the most decisions right, halfway between the scores it separates;
    of several such, the highest.

    Raises:
      ValueError: if same lacks True or False.

    >>> best_threshold(np.array([0.9, 0.5, 0.1]), np.array([True, True, False]))
    0.3
    """
    _check_kinds(same)
    false_accepts, true_accepts, thresholds = roc_curve(same, scores, drop_intermediate=False)
    right = true_accepts * same.sum() + (1 - false_accepts) * (~same).sum()
    best = int(np.argmax(np.round(right)))
    # no cosine lies outside [-1, 1]: 2 accepts no pair, -2 every pair
    lower = thresholds[best + 1] if best + 1 < len(thresholds) else -2.0
    return float((min(thresholds[best], 2.0) + lower) / 2)


def equal_error_rate(
    false_accepts: NDArray[np.floating], true_accepts: NDArray[np.floating]
) -> float:
    """The error where false accepts and false rejects are equal, on the lines of the ROC.

    >>> equal_error_rate(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.8, 1.0]))
    0.2
    """
    return float(np.interp(0.0, false_accepts + true_accepts - 1, false_accepts))


def _check_kinds(same: NDArray[np.bool_]) -> None:
    if same.all() or not same.any():
        raise ValueError("same must hold pairs of one person and of two; got only one kind")


def _checked(name: str, embeddings: ArrayLike) -> NDArray[np.floating]:
    embeddings = np.asarray(embeddings)
    embeddings = embeddings.astype(np.promote_types(embeddings.dtype, np.float32), copy=False)
    if embeddings.ndim != 2:
        raise ValueError(f"{name} must be embeddings of shape (pairs, D); got {embeddings.shape}")
    if len(bad := np.flatnonzero(~np.isfinite(embeddings).all(axis=1))):
        raise ValueError(f"{name} must be finite; {len(bad)} rows are not: {bad[:5].tolist()}")
    return embeddings
