"""The ROC curves of all face models in one plot."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.paper.style import LINES, LOSSES
from experiments.report.outcomes import Outcome, face_loss, seeds_words, went_on

# Colours of what has no loss, such as pixels and embeddings from a file. No loss has these colours.
OTHERS = ("black", "tab:green", "goldenrod", "navy")


def roc_figure(outcomes: Mapping[str, Outcome]) -> Figure:
    """True against false accepts of verifications by title.

    The axis of false accepts is logarithmic. A curve begins where one false accept is possible: of
    300 different pairs, at a rate of 1/300.
    """
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    panel = figure.add_subplot(
        xscale="log", ylim=(0, 1), xlabel="false accepts (FAR)", ylabel="true accepts (TAR)"
    )
    lowest, others, drawn = 1.0, cycle(OTHERS), list[dict[str, Any]]()
    for title, outcome in outcomes.items():
        rates = np.array(outcome["curve"]["false_accepts"])
        accepts = np.array(outcome["curve"]["true_accepts"])
        possible = rates >= lowest_rate(outcome)
        lowest = min(lowest, rates[possible][0])
        seen = outcome["metrics"]
        label = f"{title}: AUC {seen['auc']:.3f}, {outcome['pairs']:,} pairs"
        look = _line(outcome, others)
        # Two runs of one loss that differ in a constant alone.
        look["alpha"] = 0.5 ** drawn.count(look)
        drawn.append({n: value for n, value in look.items() if n != "alpha"})
        panel.plot(rates[possible], accepts[possible], label=label, **look)
    chance = np.geomspace(lowest, 1, 100)
    panel.plot(chance, chance, color="0.7", linestyle=":", label="chance")
    panel.set_xlim(min(lowest, 0.5), 1)  # two pairs allow one rate alone
    panel.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def _line(outcome: Outcome, others: Iterator[str]) -> dict[str, Any]:
    """The colour of the loss and the dashes of λ; thin if the network did not go on from another.

    What has no loss, such as pixels, takes the next of the other colours.
    """
    config, name = outcome["config"], face_loss(outcome)
    color = LOSSES[name].color if "margin" in config and name in LOSSES else next(others)
    dashes = "-" if name == "softmax" else LINES[config.get("pace", "annealed")]
    return {"color": color, "linestyle": dashes, "linewidth": 1.6 if went_on(outcome) else 0.9}


def for_choosing(outcome: Outcome) -> bool:
    """Whether a verification is of LFW's view 1, which is for choosing and is not reported."""
    return "view 1" in outcome["protocol"]


def face_title(outcome: Outcome) -> str:
    """What was verified: pixels, a file of embeddings, or a network and how far it was trained."""
    config = outcome["config"]
    if "pixels" in config:
        return "raw pixels"
    if "embeddings" in config:
        return config["embeddings"]
    loss, family = face_loss(outcome), config.get("family", "l-softmax")
    if loss in LOSSES and (loss == "normface" or family != "l-softmax"):
        loss = LOSSES[loss].title
    elif loss != "softmax":
        loss = f"m = {config['margin']:g}"
    width, updates = f"width {config['width']:g}", f"{config['steps']:,} updates"
    said = [loss, face_words(outcome), width, updates, seeds_words(outcome["seeds"])]
    return ", ".join(filter(None, said))


def titled(outcomes: Sequence[Outcome]) -> dict[str, Outcome]:
    """Verifications by `face_title`; of those that share one, each has its file's name too."""
    titles = [face_title(outcome) for outcome in outcomes]
    return {
        title if titles.count(title) == 1 else f"{title}, {outcome['file']}": outcome
        for title, outcome in zip(titles, outcomes, strict=True)
    }


def face_words(outcome: Outcome) -> str:
    """The scale, what decides λ, and whether the run began as another; empty for softmax.

    Of an annealed λ what it never fell below.
    """
    config, said = outcome["config"], []
    if config.get("scale") is not None:
        said.append(f"scale {config['scale']:g}")
    if face_loss(outcome) not in ("softmax", "normface"):
        lam, pace = config["lam"], config.get("pace", "annealed")
        minimum = lam["minimum"] if isinstance(lam, dict) else lam[-1]
        words = {"annealed": f"λ minimum {minimum:g}", "lead": "λ by lead", "none": "λ = 0"}
        said.append(words.get(pace, f"λ {pace}"))
    if went_on(outcome):
        said.append("from softmax")
    return ", ".join(said)


def lowest_rate(outcome: Outcome) -> float:
    """The rate of one false accept: half of a network's pairs are of two people."""
    return 2 * outcome.get("networks", 1) / outcome["pairs"]
