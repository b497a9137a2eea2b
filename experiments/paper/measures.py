"""What trained features look like: errors and angles, computed on the host from arrays."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

POINTS = 2000

TITLES = {
    "error, %": "error",
    "loss, margin-free": "loss",
    "angle to the label's kernel column, degrees": "target_angle",
    "intra-class angle, degrees": "intra_class_angle",
    "inter-class angle, degrees": "inter_class_angle",
}


def measures(
    features: NDArray, logits: NDArray, labels: NDArray, kernel: NDArray
) -> dict[str, Any]:
    """Margin-free measures of a split, ready for JSON.

    Args:
      features: (count, D).
      logits: (count, classes), plain ones.
      labels: (count,).
      kernel: (D, classes), the head's.

    Returns:
      count; error in %; confusion, rows by label; angles in degrees, each a mean over the examples
      or classes: target_angle between a feature and its label's kernel column, intra_class_angle
      between a feature and its class's mean direction, inter_class_angle between a class's mean
      direction and the nearest other class's. With D = 2 also the first 2,000 points.
    """
    predicted = np.argmax(logits, axis=-1)
    # scikit-learn takes seconds to import, for which no other command should wait.
    from sklearn.metrics import confusion_matrix

    confusion = confusion_matrix(labels, predicted, labels=np.arange(kernel.shape[1]))
    directions, columns = unit(features), unit(kernel.T)
    present = np.unique(labels)
    centres = unit(np.stack([directions[labels == label].mean(axis=0) for label in present]))
    own = centres[np.searchsorted(present, labels)]
    between = centres @ centres.T
    np.fill_diagonal(between, -1)
    measured: dict[str, Any] = {
        "count": len(labels),
        "error": 100 * float(np.mean(predicted != labels)),
        "target_angle": _mean_angle(np.sum(directions * columns[labels], axis=-1)),
        "intra_class_angle": _mean_angle(np.sum(directions * own, axis=-1)),
        "inter_class_angle": _mean_angle(between.max(axis=-1)),
        "confusion": confusion.tolist(),
    }
    if features.shape[1] == 2:
        measured["points"] = _rounded(features[:POINTS])
        measured["labels"] = labels[:POINTS].tolist()
        measured["kernel"] = _rounded(kernel)
    return measured


def table(
    title: str, columns: Mapping[str, Mapping[str, Any]], corner: str = "", number: str = ".4g"
) -> Table:
    """Measures side by side, of splits or of runs; the numbers in one format."""
    shown = Table(corner, title=title)
    for name in columns:
        shown.add_column(name, justify="right")
    for name, key in TITLES.items():
        shown.add_row(name, *(f"{measured[key]:{number}}" for measured in columns.values()))
    return shown


def unit(rows: NDArray) -> NDArray:
    """Rows of length 1, in float64; a zero row stays."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)


def _mean_angle(cosines: NDArray) -> float:
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def _rounded(array: NDArray) -> list[Any]:
    return [[float(f"{value:.4g}") for value in row] for row in array]
