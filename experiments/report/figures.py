"""The paper's figures of runs, drawn from results alone, as PNG.

A figure whose runs are missing is named and left out. Figs. 3 and 4 need no run: the guide has them
(docs/figures.py).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from experiments.paper.cells import CONFIGS
from experiments.paper.style import (
    LOSSES,
    MARGINS,
    STYLE,
    loss_name,
    mark_runs,
    write,
)
from experiments.report.features import common_reach, draw_features
from experiments.report.outcomes import (
    Group,
    Outcome,
    grouped,
    load_outcomes,
    seeds_words,
    words,
)
from experiments.report.roc import for_choosing, roc_figure, titled
from experiments.run.loop import RUNS


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
def figures(out: Path | None = None, reduced: bool = False) -> int:
    """Draws the ROC and every figure whose runs are there.

    Each figure says which runs it shows: updates, batch, width, seeds.

    Args:
      out: folder of the results; the figures go into its subfolder figures. By default
        experiments/results and runs are read, and the figures go into runs/figures.
      reduced: draw from reduced runs, into the subfolder figures-reduced.
    """
    outcomes = load_outcomes(out)
    groups = [group for group in grouped(outcomes.runs) if bool(group.changes) == reduced]
    folder = (out or RUNS) / ("figures-reduced" if reduced else "figures")
    for name, drawing in DRAWINGS.items():
        found = chosen(drawing, groups)
        missing = [need for need in drawing.needs if need not in names(found)]
        if len(names(found)) < (drawing.enough if reduced else len(drawing.needs)):
            print(f"{name} left out, no finished run of {', '.join(missing)}")
            continue
        figure = drawing.draw(found)
        mark_runs(figure, how(found, drawing.across), reduced)
        write(figure, folder / f"{name}.png")
        without = f", without {', '.join(missing)}" if missing else ""
        print(f"{folder / name}.png written{without}")
    faces = [outcome for outcome in outcomes.verifications if not for_choosing(outcome)]
    if faces and not reduced:
        write(roc_figure(titled(faces)), folder / "roc.png")
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
    """What the runs of a figure have in common, reduced or not, and their seeds."""
    shared = {n: groups[0].of(n) for n in ("steps", "batch", "width")} | groups[0].reduction
    seeds = dict.fromkeys(seeds_words(run["seed"] for run in group.runs) for group in groups)
    said = words({n: v for n, v in shared.items() if n != across})
    return ", ".join([said, " or ".join(seeds)])


def label(group: Group) -> str:
    """The loss, what the group has of its own, and the number of seeds."""
    seeds = "1 seed" if len(group.runs) == 1 else f"{len(group.runs)} seeds"
    return ", ".join(filter(None, [LOSSES[group.loss].title, group.own_words, seeds]))


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
            loss = LOSSES[loss_name("l-softmax", margin)].title
            panel.set_title(f"{loss}\n{split} accuracy {100 - run[split]['error']:.2f} %")
            panel.label_outer()
    return figure


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


def draw_curves(lines: Sequence[tuple[Sequence[Outcome], dict[str, Any]]]) -> Figure:
    """Figs. 6 and 7: error against iteration, training left, test right.

    Args:
      lines: runs, and how their line looks. It is the mean over seeds; their range is shaded.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, split in zip(panels, ("train", "test"), strict=True):
        for runs, look in lines:
            curves = [run["curves"][split] for run in runs]
            steps = curves[0]["step"]
            errors = np.array([np.interp(steps, c["step"], c["error"]) for c in curves])
            if split == "train":  # errors of single batches, whose noise would hide the lines
                errors = np.array([running_mean(row) for row in errors])
            panel.plot(steps, errors.mean(axis=0), lw=1.2, **look)
            low, high = errors.min(axis=0), errors.max(axis=0)
            panel.fill_between(steps, low, high, color=look["color"], alpha=0.2, lw=0)
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
    looks = [{"label": label(g), "color": LOSSES[g.loss].color, "ls": g.line} for g in groups]
    return draw_curves([(g.runs, look) for g, look in zip(groups, looks, strict=True)])


def draw_widths(groups: Sequence[Group]) -> Figure:
    """Fig. 7: a line a number of filters, those that ran, in shades of the colour of m = 4."""
    shades = LinearSegmentedColormap.from_list("m4", ["0.85", LOSSES["m4"].color, "black"])
    lines = []
    for group, shade in zip(groups, np.linspace(0.25, 0.85, len(groups)), strict=True):
        config = replace(CONFIGS[group.name], width=group.of("width"))
        filters = f"{config.built_network.stages[0].filters} filters"
        title = ", ".join(filter(None, [filters, group.own_words]))
        lines.append((group.runs, {"label": title, "color": shades(shade)}))
    return draw_curves(lines)


def _of(data: str, losses: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{data}-{loss}" for loss in losses)


PLAIN_AND_MARGINS, ENDS = ("softmax", "m2", "m3", "m4"), ("softmax", "m4")

DRAWINGS = {
    "fig2": Drawing(_of("fig2", ("m1", "m2", "m3", "m4")), draw_planes, enough=4),
    "fig5-cifar10": Drawing(_of("cifar10", ENDS), draw_confusions),
    "fig5-cifar10plus": Drawing(_of("cifar10plus", ENDS), draw_confusions),
    "fig5-cifar100": Drawing(_of("cifar100", ENDS), draw_confusions),
    "fig6": Drawing(_of("cifar100", PLAIN_AND_MARGINS), draw_losses),
    "error-mnist": Drawing(_of("mnist", PLAIN_AND_MARGINS), draw_losses),
    "error-cifar10": Drawing(_of("cifar10", ENDS), draw_losses),
    "fig7": Drawing(_of("fig7", ("32", "64", "96", "128")), draw_widths, across="width"),
}
