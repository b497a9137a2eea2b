"""The paper's figures, drawn from results alone, as PNG.

Figs. 3 and 4 are computed from the loss and need no run; the others need the runs of their
configurations, and are left out, by name, until those are there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

import lsoftmax_jax as lsm
from experiments.quickstart import draw_features
from experiments.report.report import Outcome, load_results
from experiments.report.roc import roc_figure
from experiments.report.style import COLORS, MARGINS, STYLE, write
from experiments.run import train

# Of W1 and W2 in Fig. 4.
LENGTHS = {
    "$|W_1| = |W_2|$": (1.0, 1.0),
    "$|W_1| > |W_2|$": (1.2, 0.85),
    "$|W_1| < |W_2|$": (0.85, 1.2),
}
WHITE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}

Runs = dict[str, list[Outcome]]


class Drawing(NamedTuple):
    """A figure of the paper.

    Attributes:
      needs: the configurations whose runs it shows.
      draw: makes it from the finished runs of every needed configuration.
    """

    needs: tuple[str, ...]
    draw: Callable[[Runs], Figure]


def figures(out: Path = train.RESULTS, reduced: bool = False) -> int:
    """Draws every figure whose runs are there into the folder figures of --out.

    Args:
      out: folder of the results.
      reduced: draw from reduced runs, into the folder figures-reduced; each figure says so. Those
        that need no run are left out.
    """
    if not out.is_dir():
        raise ValueError(f"out must be a folder of results, got {out}")
    outcomes = load_results(out)
    runs = finished(outcomes, reduced)
    folder = out / ("figures-reduced" if reduced else "figures")
    for name, drawing in DRAWINGS.items():
        if reduced and not drawing.needs:
            continue
        if missing := [config for config in drawing.needs if config not in runs]:
            print(f"{name} left out, no finished run of {', '.join(missing)}")
            continue
        with rc_context(STYLE):
            figure = drawing.draw(runs)
            if reduced:
                figure.suptitle("Reduced runs", color="tab:red")
            write(figure, folder / f"{name}.png")
        print(f"{folder / name}.png written")
    if faces := {o["file"][:-5]: o for o in outcomes if o.get("kind") == "verification"}:
        with rc_context(STYLE):
            write(roc_figure(faces), folder / "roc.png")
        print(f"{folder / 'roc.png'} written")
    return 0


def finished(outcomes: Sequence[Outcome], reduced: bool) -> Runs:
    """The finished runs by configuration; reduced ones, or the others."""
    runs: Runs = {}
    for outcome in outcomes:
        if outcome.get("status") == "finished" and outcome["reduced"] == reduced:
            runs.setdefault(outcome["name"], []).append(outcome)
    return runs


def draw_planes(runs: Runs) -> Figure:
    """Fig. 2: the 2-D features, one column a margin, training images above test images."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    panels = figure.subplots(2, len(MARGINS))
    for column, margin in zip(panels.T, MARGINS, strict=True):
        outcome = runs[f"fig2-m{margin}"][0]
        for panel, split in zip(column, ("train", "test"), strict=True):
            draw_features(panel, outcome[split])
            accuracy = 100 - outcome[split]["error"]
            head = "softmax (m = 1)" if margin == 1 else f"L-Softmax (m = {margin})"
            panel.set_title(f"{head}\n{split} accuracy {accuracy:.2f} %")
    return figure


def draw_psi(_: Runs) -> Figure:
    """Fig. 3: psi against the angle."""
    figure = Figure(figsize=(4.6, 3.6), layout="constrained")
    panel = figure.add_subplot(xlabel="angle θ, degrees", ylabel="ψ(θ)", xlim=(0, 180))
    degrees = np.linspace(0, 180, 721)
    for margin, color in zip(MARGINS, COLORS, strict=False):
        label = "cos θ (m = 1)" if margin == 1 else f"ψ(θ), m = {margin}"
        cosine = jnp.cos(jnp.radians(degrees))
        panel.plot(degrees, lsm.psi(cosine, margin), color=color, label=label)
    panel.set_xticks(range(0, 181, 45))
    panel.grid(alpha=0.25)
    panel.legend()
    return figure


def draw_geometry(_: Runs) -> Figure:
    """Fig. 4: two classes in the plane; where each counts as won, with its margin."""
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    panels = figure.subplots(2, len(LENGTHS), sharex=True, sharey=True)
    for row, margin in zip(panels, (1, 2), strict=True):
        for panel, (title, lengths) in zip(row, LENGTHS.items(), strict=True):
            kernel = plane_kernel(lengths)
            draw_regions(panel, kernel, margin)
            if margin > 1:
                _name_margin(panel, kernel, margin)
            head = "softmax" if margin == 1 else f"L-Softmax, m = {margin}"
            panel.set_title(f"{head}, {title}")
    dashed = Line2D([], [], color="0.3", linestyle="--", label="the boundary of softmax")
    figure.legend(handles=[dashed], loc="outside lower center")
    return figure


def plane_kernel(lengths: tuple[float, float]) -> NDArray:
    """Two kernel columns of these lengths, 70 degrees apart."""
    angles = np.radians([125, 55])
    return np.stack([np.cos(angles), np.sin(angles)]) * np.asarray(lengths)


def lead(features: NDArray, kernel: NDArray, label: int, margin: int, lam: float = 0.0) -> NDArray:
    """How far the margin logit of a label is above the other class's, for features (..., 2)."""
    labels = jnp.full(features.shape[:-1], label)
    logits = lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=lam)
    return np.asarray(logits[..., label] - logits[..., 1 - label])


def draw_regions(panel: Axes, kernel: NDArray, margin: int, lam: float = 0.0) -> None:
    """Where the logit of each class, with its margin, is ahead; dashed, the boundary without."""
    across, up = np.linspace(-1.2, 1.2, 241), np.linspace(0, 1.45, 146)
    features = np.stack(np.meshgrid(across, up), axis=-1).astype(np.float32)
    for label, color in enumerate(("tab:blue", "tab:red")):
        ahead = lead(features, kernel, label, margin, lam)
        panel.contourf(across, up, ahead, levels=(0, np.inf), colors=[color], alpha=0.14)
        if margin > 1:
            panel.contour(across, up, ahead, levels=(0,), colors=[color], linewidths=1.4)
        x, y = kernel[:, label]
        panel.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color})
        panel.text(1.1 * x, 1.1 * y, f"$W_{label + 1}$", color=color, ha="center", va="center")
    plain = lead(features, kernel, 0, 1)
    style = "-" if margin == 1 else "--"
    panel.contour(across, up, plain, levels=(0,), colors="0.3", linewidths=1.4, linestyles=style)
    panel.set(aspect="equal", xticks=(), yticks=())
    panel.spines[:].set_visible(False)


def _name_margin(panel: Axes, kernel: NDArray, margin: int) -> None:
    """The word in the middle of the angles at which neither class is ahead."""
    angles = np.linspace(0, np.pi, 721)
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
    neither = (lead(ring, kernel, 0, margin) < 0) & (lead(ring, kernel, 1, margin) < 0)
    between = neither & (np.abs(angles - np.pi / 2) < np.pi / 4)
    middle = angles[between].mean()
    x, y = 1.2 * np.cos(middle), 1.2 * np.sin(middle)
    panel.text(x, y, "margin", ha="center", va="center", fontsize=8, bbox=WHITE)


def draw_confusions(runs: Runs, data: str) -> Figure:
    """Fig. 5: rows by label, in % of it, softmax beside L-Softmax; seeds summed."""
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (loss, title) in zip(panels, FIG5_LOSSES.items(), strict=True):
        counts = np.sum([o["test"]["confusion"] for o in runs[f"{data}-{loss}"]], axis=0)
        share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        many = len(share) > 20
        # Mistakes are few: a linear scale from 0 to 100 would show the diagonal alone.
        image = panel.imshow(share, cmap="Blues", vmin=0, vmax=20, interpolation="nearest")
        if not many:
            draw_numbers(panel, share)
            panel.set(xticks=range(len(share)), yticks=range(len(share)))
        panel.set(title=title, xlabel="predicted class")
    panels[0].set_ylabel("class")
    figure.colorbar(image, ax=panels, extend="max", label="% of the class's test images")
    return figure


def draw_numbers(panel: Axes, share: NDArray) -> None:
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.05:
            color = "white" if value > 12 else "black"
            text = f"{value:.1f}"
            panel.text(column, row, text, color=color, ha="center", va="center", fontsize=5.5)


def draw_curves(runs: Runs, lines: dict[str, str]) -> Figure:
    """Figs. 6 and 7: error against iteration, training left, test right.

    Args:
      lines: label by configuration; mean over its seeds, with their range shaded.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, split in zip(panels, ("train", "test"), strict=True):
        for (config, label), color in zip(lines.items(), COLORS, strict=False):
            curves = [outcome["curves"][split] for outcome in runs[config]]
            steps = curves[0]["step"]
            errors = np.array([curve["error"] for curve in curves])
            panel.plot(steps, errors.mean(axis=0), color=color, label=label, lw=1.2)
            panel.fill_between(
                steps, errors.min(axis=0), errors.max(axis=0), color=color, alpha=0.2, lw=0
            )
        name = "Training" if split == "train" else "Test"
        panel.set(xlabel="iteration", ylabel=f"{name.lower()} error", title=name, xlim=(0, None))
        panel.set_ylim(0, None)
        panel.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        panel.grid(alpha=0.25)
        panel.legend()
    return figure


FIG5_LOSSES = {"softmax": "softmax", "m4": "L-Softmax, m = 4"}
FIG6_LINES = {"cifar100-softmax": "softmax"} | {
    f"cifar100-m{m}": f"L-Softmax, m = {m}" for m in (2, 3, 4)
}
FIG7_LINES = {f"fig7-{filters}": f"{filters} filters" for filters in (32, 64, 96, 128)}


def _fig5(data: str) -> Drawing:
    needs = tuple(f"{data}-{loss}" for loss in FIG5_LOSSES)
    return Drawing(needs, lambda runs: draw_confusions(runs, data))


def _curves(lines: dict[str, str]) -> Drawing:
    return Drawing(tuple(lines), lambda runs: draw_curves(runs, lines))


DRAWINGS: dict[str, Drawing] = {
    "fig2": Drawing(tuple(f"fig2-m{margin}" for margin in MARGINS), draw_planes),
    "fig3": Drawing((), draw_psi),
    "fig4": Drawing((), draw_geometry),
    "fig5-cifar10": _fig5("cifar10"),
    "fig5-cifar10plus": _fig5("cifar10plus"),
    "fig5-cifar100": _fig5("cifar100"),
    "fig6": _curves(FIG6_LINES),
    "fig7": _curves(FIG7_LINES),
}
