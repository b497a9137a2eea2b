"""How every figure looks, and how it is written; the losses with their titles and colours."""

from pathlib import Path
from typing import Any, NamedTuple

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


class Loss(NamedTuple):
    """The title of a loss in tables and legends, and its colour in every figure."""

    title: str
    color: str


LOSSES = {
    "hinge": Loss("hinge", "tab:brown"),
    "softmax": Loss("softmax", "0.35"),
    "m2": Loss("L-Softmax, m = 2", "tab:blue"),
    "m3": Loss("L-Softmax, m = 3", "tab:orange"),
    "m4": Loss("L-Softmax, m = 4", "tab:red"),
    "asoftmax": Loss("A-Softmax, m = 4", "tab:purple"),
    "normface": Loss("NormFace", "tab:olive"),
    "cosface": Loss("CosFace", "tab:cyan"),
    "arcface": Loss("ArcFace", "tab:pink"),
}
# The line style shows what decides λ, so that two runs of one loss differ in a picture.
# "self-paced" is the earlier rule, which chose one λ for a batch.
LINES = {"annealed": "-", "lead": "--", "self-paced": "--", "schedule": ":", "none": "-"}


def loss_name(family: str, margin: float, hinge: bool = False, scale: float | None = None) -> str:
    """The name in `LOSSES` of a loss, from the fields of its recipe; of m > 4 there is none."""
    if hinge:
        return "hinge"
    if family == "l-softmax":
        plain = "softmax" if scale is None else "normface"
        return plain if margin == 1 else f"m{margin:g}"
    return family.replace("-", "")


def write(figure: Figure, file: Path) -> None:
    """A PNG; the same figure gives the same bytes."""
    with replacing(file) as pixels:
        figure.savefig(pixels, format="png", dpi=160, metadata={"Software": None})


def mark_runs(figure: Figure, how: str, reduced: bool) -> None:
    """Says over a figure which runs it shows, and whether they are the paper's."""
    what, color = ("Reduced runs, not the paper's", "tab:red") if reduced else ("Full runs", "0.3")
    figure.suptitle(f"{what}: {how}", color=color, fontsize=9)
