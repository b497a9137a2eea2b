"""What margin and λ do, as small multiples: computed from the loss, or read from results."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

import lsoftmax_jax as lsm
from experiments.faces.embed import Embeddings
from experiments.faces.images import Faces, open_face
from experiments.paper.measures import unit
from experiments.report.figures import draw_regions, plane_kernel
from experiments.report.style import COLORS, MARGINS

LAMBDAS = (np.inf, 20.0, 5.0, 1.0, 0.0)
# Of a training curve: title, name in the result, scale of the axis.
TRAINING = (
    ("loss", "loss", "log"),
    ("margin-free error, %", "error", "linear"),
    ("angle to the label, degrees", "target_angle", "linear"),
    ("λ", "lam", "log"),
)


def targets(margins: Sequence[int] = MARGINS, lambdas: Sequence[float] = LAMBDAS) -> Figure:
    """The annealed target logit by the angle, feature and column of length 1; a panel a λ."""
    figure = Figure(figsize=(2.3 * len(lambdas), 2.9), layout="constrained")
    panels = figure.subplots(1, len(lambdas), sharey=True)
    degrees = np.linspace(0, 180, 361)
    radians = np.radians(degrees)
    features = np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)
    kernel, labels = jnp.array([[1.0], [0.0]]), np.zeros(len(degrees), int)
    for panel, lam in zip(panels, lambdas, strict=True):
        for margin, color in zip(margins, COLORS, strict=False):
            logits = lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=lam)
            panel.plot(degrees, logits[:, 0], color=color, label=f"m = {margin}")
        panel.set(title=_name(lam), xlabel="angle, degrees", xlim=(0, 180))
        panel.set_xticks(range(0, 181, 90))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("target logit")
    panels[0].legend(loc="lower left")
    return figure


def regions(margins: Sequence[int] = (2, 3, 4), lambdas: Sequence[float] = LAMBDAS) -> Figure:
    """Two classes in the plane, a row a margin, a column a λ: where each is ahead by its margin."""
    size = 2.3 * len(lambdas), 1.45 * len(margins) + 0.3
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(margins), len(lambdas), squeeze=False)
    kernel = plane_kernel((1.0, 1.0))
    for row, margin in zip(panels, margins, strict=True):
        for panel, lam in zip(row, lambdas, strict=True):
            draw_regions(panel, kernel, margin, lam)
        row[0].set_ylabel(f"m = {margin}", rotation=0, labelpad=22)
    for panel, lam in zip(panels[0], lambdas, strict=True):
        panel.set_title(_name(lam))
    return figure


def training(outcomes: dict[str, dict[str, Any]]) -> Figure:
    """Loss, margin-free error, angle and λ of runs by title, update by update."""
    figure = Figure(figsize=(11.5, 3.1), layout="constrained")
    for panel, (title, name, scale) in zip(
        figure.subplots(1, len(TRAINING)), TRAINING, strict=True
    ):
        for (run, outcome), color in zip(outcomes.items(), ("0.35", "tab:red"), strict=False):
            curve = outcome["curves"]["train"]
            panel.plot(curve["step"], curve[name], color=color, lw=1.1, label=run)
        panel.set(title=title, xlabel="update", yscale=scale)
        panel.grid(alpha=0.25)
    lines = figure.axes[0].get_lines()
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines))
    return figure


def agreement(losses: dict[str, NDArray]) -> Figure:
    """The same training in several ways: their losses, and how far they are from the first way's.

    Args:
      losses: of every update, by way.
    """
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    (first, expected), *_ = losses.items()
    # Lines that cover each other must all be seen.
    for (name, values), color, width in zip(losses.items(), COLORS, (5, 3.5, 2, 0.8), strict=False):
        left.plot(values, color=color, lw=width, label=name)
        if name != first:
            right.plot(np.abs(values - expected), color=color, label=name)
    left.set(title="loss", xlabel="update", yscale="log")
    right.set(title=f"distance from the loss of {first}", xlabel="update")
    right.set_ylim(0, None)
    for panel in (left, right):
        panel.grid(alpha=0.25)
    left.legend()
    return figure


def neighbours(faces: Faces, embeddings: Embeddings, queries: int = 5, nearest: int = 7) -> Figure:
    """Images, a row each, and the nearest others: framed green if of the same person.

    Nearness is the cosine about the mean, as in `verify`.

    Args:
      faces: the folder that was embedded.
      embeddings: of its images; the rows shown are evenly apart.
      queries: how many images.
      nearest: how many others beside each.
    """
    people = [name.partition("/")[0] for name in embeddings.names.tolist()]
    rows = np.linspace(0, len(people) - 1, queries + 2).astype(int)[1:-1]
    directions = unit(embeddings.embeddings - embeddings.embeddings.mean(axis=0))
    cosines = directions[rows] @ directions.T
    size = 1.15 * (nearest + 1), 1.32 * queries + 0.3
    figure = Figure(figsize=size, layout="constrained")
    for row, line, panels in zip(
        rows, cosines, figure.subplots(queries, nearest + 1, squeeze=False), strict=True
    ):
        closest = [image for image in np.argsort(-line) if image != row][:nearest]
        for panel, shown in zip(panels, [row, *closest], strict=True):
            panel.imshow(open_face(faces.root / embeddings.names[shown]))
            panel.set(xticks=(), yticks=())
            panel.spines[:].set_visible(True)
            right = people[shown] == people[row]
            panel.spines[:].set(color="tab:green" if right else "tab:red", linewidth=2.5)
            panel.set_title(f"{line[shown]:.2f}", fontsize=8)
        panels[0].spines[:].set(color="0.3", linewidth=1)
        panels[0].set_title(people[row].replace("_", " "), fontsize=7)
    return figure


def _name(lam: float) -> str:
    if np.isinf(lam):
        return "λ = ∞, softmax"
    return "λ = 0, the full margin" if lam == 0 else f"λ = {lam:g}"
