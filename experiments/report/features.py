"""Features of two dimensions in the plane, as in the paper's Fig. 2."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.paper.measures import unit


def features_figure(measured: Mapping[str, Mapping[str, Any]]) -> Figure:
    """One panel for each loss, all of one scale.

    Args:
      measured: the measures of a split by title, of networks with a feature of two dimensions.
    """
    figure = Figure(figsize=(5.2 * len(measured), 5.3), layout="constrained")
    panels = figure.subplots(1, len(measured), squeeze=False)[0]
    reach = common_reach(measured.values())
    for panel, (title, split) in zip(panels, measured.items(), strict=True):
        draw_features(panel, split, reach)
        panel.set_title(f"{title}: {split['target_angle']:.1f}° from the class's column on average")
    return figure


def common_reach(measured: Iterable[Mapping[str, Any]]) -> float:
    """The end of axes that hold the features of all these splits, with room for the digits."""
    longest = max(np.linalg.norm(split["points"], axis=1).max() for split in measured)
    return 1.2 * float(longest)


def draw_features(panel: Axes, measured: Mapping[str, Any], reach: float) -> None:
    """Points by class, and the direction of each class's kernel column up to the class's digit.

    Args:
      panel: where.
      measured: the measures of a split: points, their labels, the head's kernel.
      reach: the axes go from -reach to reach.
    """
    points, labels = np.asarray(measured["points"]), np.asarray(measured["labels"])
    directions = unit(np.asarray(measured["kernel"]).T)
    for label, direction in enumerate(directions):
        color = colormaps["tab10"](label % 10)
        panel.plot(*np.outer(direction, (0, 0.88 * reach)), color=color, lw=0.9)
        x, y = 0.94 * reach * direction
        panel.text(x, y, str(label), color=color, ha="center", va="center", fontweight="bold")
        x, y = points[labels == label].T
        panel.scatter(x, y, s=7, color=color, alpha=0.75, linewidths=0, zorder=3)
    panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    panel.set(xlabel="first feature", ylabel="second feature")
    panel.tick_params(labelsize=8, colors="0.45")
    panel.spines[:].set(color="0.8", visible=True)
