"""How every figure looks, and how it is written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments.store.files import replacing

STYLE: Any = {  # matplotlib types the keys as literals
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
MARGINS = (1, 2, 3, 4)
# Of the margins, and of whatever else stands side by side.
COLORS = ("0.35", "tab:blue", "tab:orange", "tab:red", "tab:green", "tab:purple")


def write(figure: Figure, file: Path) -> None:
    """A PNG; the same figure gives the same bytes."""
    with replacing(file) as pixels:
        figure.savefig(pixels, format="png", dpi=160, metadata={"Software": None})


def mark_reduced(figure: Figure, how: str) -> None:
    """Says over a figure that its runs are reduced, and how."""
    figure.suptitle(f"Reduced runs, not the paper's: {how}", color="tab:red", fontsize=9)
