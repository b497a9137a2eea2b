"""The first run: softmax beside L-Softmax on scikit-learn's digits, a table and a picture.

Both train the same small network, whose feature has two numbers, on 1,297 real scans that come with
scikit-learn, and are tested on 500 others; they differ in the margin alone.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from experiments.paper import measures as measure
from experiments.paper.cells import CONFIGS
from experiments.run import train
from experiments.store.files import replacing

OUT = Path(__file__).parent.parent / "quickstart"
RUNS = {"softmax": CONFIGS["digits-softmax"], "L-Softmax, m = 4": CONFIGS["digits-m4"]}


def run(out: Path = OUT, stop: Callable[[], bool] = lambda: False) -> bool:
    """Trains both, or what is left of them; prints the table, draws the picture.

    Returns:
      False if it was stopped or a run diverged.
    """
    outcomes = {}
    for title, config in RUNS.items():
        outcome = train.run(config, out=out, stop=stop)
        if outcome is None or outcome["status"] != "finished":
            return False
        outcomes[title] = outcome["test"]
    picture = draw(outcomes, out / "features.png")
    console = Console()
    console.print(table(outcomes))
    console.print(f"picture: {picture}", soft_wrap=True)
    return True


def table(outcomes: dict[str, dict[str, Any]]) -> Table:
    """Measures of the test split, one column a loss."""
    count = next(iter(outcomes.values()))["count"]
    shown = Table(f"{count:,} test digits", title="The same network with two losses")
    for title in outcomes:
        shown.add_column(title, justify="right")
    for name, key in measure.TITLES.items():
        shown.add_row(name, *(f"{measured[key]:.2f}" for measured in outcomes.values()))
    return shown


def draw(outcomes: dict[str, dict[str, Any]], file: Path) -> Path:
    """Writes the picture as PNG."""
    with replacing(file) as unfinished:
        picture(outcomes).savefig(unfinished, format="png", dpi=160)
    return file


def picture(outcomes: dict[str, dict[str, Any]]) -> Figure:
    """The test features in the plane, one panel a loss, in the manner of the paper's Fig. 2."""
    figure = Figure(figsize=(5.2 * len(outcomes), 5.6), layout="constrained")
    panels = figure.subplots(1, len(outcomes), squeeze=False)[0]
    for panel, (title, measured) in zip(panels, outcomes.items(), strict=True):
        draw_features(panel, measured)
        panel.set_title(
            f"{title}\ntest error {measured['error']:.1f} %, "
            f"mean target angle {measured['target_angle']:.1f}°",
            fontsize=11,
        )
    return figure


def draw_features(panel: Axes, measured: dict[str, Any]) -> None:
    """Points of a 2-D feature by class, and the directions of the head's kernel columns."""
    points, labels = np.asarray(measured["points"]), np.asarray(measured["labels"])
    directions = measure.unit(np.asarray(measured["kernel"]).T)
    # Every panel reaches as far as its own longest feature: lengths differ between losses.
    reach = 1.12 * np.linalg.norm(points, axis=1).max()
    for label, direction in enumerate(directions):
        color = colormaps["tab10"](label % 10)
        panel.plot(*np.outer(direction, (0, 0.93 * reach)), color=color, lw=0.9)
        x, y = 0.97 * reach * direction
        panel.text(x, y, str(label), color=color, ha="center", va="center", fontweight="bold")
        x, y = points[labels == label].T
        # Thousands of points are smaller as pixels, in a vector graphic too.
        panel.scatter(x, y, s=11, color=color, alpha=0.75, linewidths=0, zorder=3, rasterized=True)
    panel.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    panel.tick_params(labelsize=8, colors="0.45")
    panel.spines[:].set_color("0.8")
