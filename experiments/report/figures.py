"""The paper's figures, drawn from results alone, as PNG; error against iteration for more data.

Figs. 3 and 4 are computed from the loss and need no run; the others need the runs of their
configurations, and are left out, by name, until those are there.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from experiments.paper.cells import CONFIGS
from experiments.report.features import common_reach, draw_features
from experiments.report.outcomes import (
    RESULTS,
    Group,
    Outcome,
    grouped,
    load_outcomes,
    seeds_words,
)
from experiments.report.roc import face_title, for_choosing, roc_figure
from experiments.report.style import COLORS, MARGINS, STYLE, mark_reduced, write

# Of W1 and W2 in Fig. 4.
LENGTHS = {
    "$|W_1| = |W_2|$": (1.0, 1.0),
    "$|W_1| > |W_2|$": (1.2, 0.85),
    "$|W_1| < |W_2|$": (0.85, 1.2),
}
WHITE = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}


class Drawing(NamedTuple):
    """A figure of the paper.

    Attributes:
      needs: the configurations whose runs it shows.
      draw: makes it from their groups, in this order.
      enough: of how many of them reduced runs make a figure.
      across: a reduction that may differ between its runs.
    """

    needs: tuple[str, ...]
    draw: Callable[[Sequence[Group]], Figure]
    enough: int = 2
    across: str = ""


@rc_context(STYLE)
def figures(out: Path = RESULTS, reduced: bool = False) -> int:
    """Draws the ROC and every figure whose runs are there, into the subfolder figures of --out.

    Args:
      out: folder of the results.
      reduced: draw from reduced runs, into the subfolder figures-reduced. Each figure says how its
        runs are reduced. Figures that need no run are left out.
    """
    outcomes = load_outcomes(out)
    groups = [group for group in grouped(outcomes.runs) if bool(group.changes) == reduced]
    folder = out / ("figures-reduced" if reduced else "figures")
    for name, drawing in DRAWINGS.items():
        if reduced and not drawing.needs:
            continue
        found = chosen(drawing, groups)
        missing = [need for need in drawing.needs if need not in names(found)]
        if len(names(found)) < (drawing.enough if reduced else len(drawing.needs)):
            print(f"{name} left out, no finished run of {', '.join(missing)}")
            continue
        figure = drawing.draw(found)
        if reduced:
            mark_reduced(figure, how(found, drawing.across))
        write(figure, folder / f"{name}.png")
        without = f", without {', '.join(missing)}" if missing else ""
        print(f"{folder / name}.png written{without}")
    faces = [outcome for outcome in outcomes.verifications if not for_choosing(outcome)]
    if faces and not reduced:
        write(roc_figure({face_title(outcome): outcome for outcome in faces}), folder / "roc.png")
        print(f"{folder / 'roc.png'} written")
    return 0


def names(groups: Sequence[Group]) -> set[str]:
    return {group.name for group in groups}


def chosen(drawing: Drawing, groups: Sequence[Group]) -> list[Group]:
    """The groups of a figure, all reduced alike: as shows most of it, then as trains longest."""
    alike = defaultdict(list)
    for group in groups:
        if group.name in drawing.needs:
            alike[group.reduced_by(drawing.across)].append(group)

    def worth(found: list[Group]) -> tuple[int, int]:
        return len(names(found)), max(group.of("steps") for group in found)

    return max(alike.values(), key=worth, default=[])


def how(groups: Sequence[Group], across: str = "") -> str:
    """How the runs of a figure are reduced, and their seeds."""
    seeds = dict.fromkeys(seeds_words(group.runs) for group in groups)
    return ", ".join([groups[0].reduced_by(across), " or ".join(seeds)])


def loss_title(margin: float) -> str:
    return "softmax" if margin == 1 else f"L-Softmax, m = {margin}"


def label(group: Group) -> str:
    """The loss, and what the group has of its own."""
    return ", ".join(filter(None, [loss_title(group.of("margin")), group.own_words]))


def draw_planes(groups: Sequence[Group]) -> Figure:
    """Fig. 2: the 2-D features of the first seed, a column a margin, test images below.

    All panels have the same scale.
    """
    figure = Figure(figsize=(12, 6.9), layout="constrained")
    panels = figure.subplots(2, len(MARGINS), sharex=True, sharey=True)
    runs = [next(g.runs[0] for g in groups if g.name == f"fig2-m{m}") for m in MARGINS]
    reach = common_reach(run[split] for run in runs for split in ("train", "test"))
    for column, margin, run in zip(panels.T, MARGINS, runs, strict=True):
        for panel, split in zip(column, ("train", "test"), strict=True):
            draw_features(panel, run[split], reach)
            loss = "softmax (m = 1)" if margin == 1 else f"L-Softmax (m = {margin})"
            panel.set_title(f"{loss}\n{split} accuracy {100 - run[split]['error']:.2f} %")
            panel.label_outer()
    return figure


def draw_psi(_: Sequence[Group]) -> Figure:
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


def draw_geometry(_: Sequence[Group]) -> Figure:
    """Fig. 4: two classes in the plane; where each counts as won, with its margin."""
    figure = Figure(figsize=(9, 4.9), layout="constrained")
    panels = figure.subplots(2, len(LENGTHS), sharex=True, sharey=True)
    for row, margin in zip(panels, (1, 2), strict=True):
        for panel, (title, lengths) in zip(row, LENGTHS.items(), strict=True):
            kernel = plane_kernel(lengths)
            draw_regions(panel, kernel, margin)
            if margin > 1:
                _name_margin(panel, kernel, margin)
            panel.set_title(f"{loss_title(margin)}, {title}")
    dashed = Line2D([], [], color="0.3", linestyle="--", label="the boundary of softmax")
    figure.legend(handles=[dashed], loc="outside lower center")
    return figure


def plane_kernel(lengths: tuple[float, float]) -> NDArray:
    """Two kernel columns of these lengths, 70 degrees apart."""
    angles = np.radians([125, 55])
    return np.stack([np.cos(angles), np.sin(angles)]) * np.asarray(lengths)


def lead(features: NDArray, kernel: NDArray, label: int, margin: int) -> NDArray:
    """How far the margin logit of a label is above the other class's, for features (..., 2)."""
    labels = jnp.full(features.shape[:-1], label)
    logits = lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=0.0)
    return np.asarray(logits[..., label] - logits[..., 1 - label])


def draw_regions(panel: Axes, kernel: NDArray, margin: int) -> None:
    """Where the logit of each class, with its margin, is ahead; dashed, the boundary without."""
    across, up = np.linspace(-1.2, 1.2, 241), np.linspace(0, 1.45, 146)
    features = np.stack(np.meshgrid(across, up), axis=-1).astype(np.float32)
    for label, color in enumerate(("tab:blue", "tab:red")):
        ahead = lead(features, kernel, label, margin)
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


def draw_confusions(groups: Sequence[Group]) -> Figure:
    """Fig. 5: rows by class, in % of it, softmax beside L-Softmax; seeds summed."""
    figure = Figure(figsize=(0.8 + 3.8 * len(groups), 4.1), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True)
    for panel, group in zip(panels, groups, strict=True):
        counts = np.sum([run["test"]["confusion"] for run in group.runs], axis=0)
        share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        # Mistakes are few: a linear scale from 0 to 100 would show the diagonal alone.
        image = panel.imshow(share, cmap="Blues", vmin=0, vmax=20, interpolation="nearest")
        if len(share) <= 20:
            draw_numbers(panel, share)
            panel.set(xticks=range(len(share)), yticks=range(len(share)))
        panel.set(title=label(group), xlabel="predicted class")
    panels[0].set_ylabel("class")
    figure.colorbar(image, ax=panels, extend="max", label="% of the class's test images")
    return figure


def draw_numbers(panel: Axes, share: NDArray) -> None:
    for (row, column), value in np.ndenumerate(share):
        if value >= 0.05:
            color = "white" if value > 12 else "black"
            text = f"{value:.1f}"
            panel.text(column, row, text, color=color, ha="center", va="center", fontsize=5.5)


def draw_curves(lines: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Figs. 6 and 7: error against iteration, training left, test right.

    Args:
      lines: runs by label; the mean over seeds, with their range shaded.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, split in zip(panels, ("train", "test"), strict=True):
        for (name, runs), color in zip(lines.items(), COLORS, strict=False):
            curves = [run["curves"][split] for run in runs]
            steps = curves[0]["step"]
            errors = np.array([np.interp(steps, c["step"], c["error"]) for c in curves])
            if split == "train":  # of single batches: noise would hide the order of the lines
                errors = np.array([running_mean(row) for row in errors])
            panel.plot(steps, errors.mean(axis=0), color=color, label=name, lw=1.2)
            low, high = errors.min(axis=0), errors.max(axis=0)
            panel.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        panel.set(xlabel="iteration", xlim=(0, None), ylim=(0, None))
        panel.yaxis.set_major_formatter(PercentFormatter())
        panel.grid(alpha=0.25)
    panels[0].set(title="Training", ylabel="training error, running mean over batches")
    panels[1].set(title="Test", ylabel="test error")
    panels[1].legend()
    return figure


def running_mean(values: NDArray) -> NDArray:
    """The mean over a twentieth of the points around each; fewer at the ends."""
    window = np.ones(max(1, len(values) // 20))
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(values, window, mode="same") / counts


def draw_losses(groups: Sequence[Group]) -> Figure:
    """Error against iteration, Fig. 6 and others: a line a loss."""
    return draw_curves({label(group): group.runs for group in groups})


def draw_widths(groups: Sequence[Group]) -> Figure:
    """Fig. 7: a line a number of filters, those that ran."""
    lines = {}
    for group in groups:
        config = replace(CONFIGS[group.name], width=group.of("width"))
        filters = f"{config.built_network.stages[0].filters} filters"
        lines[", ".join(filter(None, [filters, group.own_words]))] = group.runs
    return draw_curves(lines)


def _of(data: str, losses: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{data}-{loss}" for loss in losses)


LOSSES, ENDS = ("softmax", "m2", "m3", "m4"), ("softmax", "m4")

DRAWINGS = {
    "fig2": Drawing(_of("fig2", ("m1", "m2", "m3", "m4")), draw_planes, enough=4),
    "fig3": Drawing((), draw_psi),
    "fig4": Drawing((), draw_geometry),
    "fig5-cifar10": Drawing(_of("cifar10", ENDS), draw_confusions),
    "fig5-cifar10plus": Drawing(_of("cifar10plus", ENDS), draw_confusions),
    "fig5-cifar100": Drawing(_of("cifar100", ENDS), draw_confusions),
    "fig6": Drawing(_of("cifar100", LOSSES), draw_losses),
    "error-mnist": Drawing(_of("mnist", LOSSES), draw_losses),
    "error-cifar10": Drawing(_of("cifar10", ENDS), draw_losses),
    "fig7": Drawing(_of("fig7", ("32", "64", "96", "128")), draw_widths, across="width"),
}
