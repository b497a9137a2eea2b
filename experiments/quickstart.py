"""The first run: softmax beside L-Softmax on scikit-learn's digits, a table and a picture.

    python -m experiments quickstart

One small network is trained with both losses and ten seeds: on the digits as they are, with 40 % of
the training labels drawn at random, and on seven of the ten digits, to verify the other three. The
data comes with scikit-learn. All of it takes about a minute on two quiet CPU cores.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import rc_context
from rich.console import Console
from rich.table import Table

from experiments.benchmarks.convergence import (
    DEFAULT,
    SOFTMAX,
    Data,
    Setting,
    Split,
    features_and_answers,
    split_of,
    trained,
)
from experiments.benchmarks.records import heading
from experiments.paper.measures import measures
from experiments.paper.style import STYLE, write
from experiments.report.features import features_figure
from experiments.report.outcomes import spread
from experiments.store.progress import Progress
from experiments.store.results import save
from lsoftmax_jax import verification

OUT = Path("quickstart")
SEEDS = 10
LOSSES = {"softmax": SOFTMAX, "L-Softmax, m = 4": DEFAULT}
SETTING = Setting("digits", optimizer="adamw", steps=800)
PLANE = SETTING._replace(feature=2, relu=False)  # a feature that can be drawn
SEEN = 7  # digits that are trained where the other ones are verified

ROWS = {
    "error": "error, %",
    "share": "share of the margin, %",
    "error_of_noisy": "error with 40 % of the labels at random, %",
    "error_of_seen": "error of seven digits, %",
    "eer_of_unseen": "EER of the three others, never trained, %",
}


def run(out: Path = OUT) -> None:
    """Trains softmax and L-Softmax on scikit-learn's digits; prints a table, draws a picture.

    Args:
      out: folder of the result and the picture.
    """
    result = heading("quickstart", "python -m experiments quickstart") | {"seeds": SEEDS}
    numbers: dict[str, dict[str, list[float]]] = {loss: {} for loss in LOSSES}
    planes: dict[str, dict[str, Any]] = {}
    with Progress("quickstart", 4 * len(LOSSES), "trainings") as progress:
        for loss, of in numbers.items():
            for part in (clean, noisy, unseen):
                of |= part(loss)
                progress.advance(1, loss)
            planes[loss] = plane(loss)
            progress.advance(1, loss)
    save(out / "quickstart.json", result | {"numbers": numbers, "features": planes})
    Console().print(shown(numbers))
    print(f"picture: {draw(planes, out / 'features.png')}")


def clean(loss: str) -> dict[str, list[float]]:
    split = split_of(Data())
    params, shares = fitted(SETTING, loss, split, SEEDS)
    return {"error": errors(params, split), "share": (100 * shares).tolist()}


def noisy(loss: str) -> dict[str, list[float]]:
    split = split_of(Data(noise=0.4))
    return {"error_of_noisy": errors(fitted(SETTING, loss, split, SEEDS)[0], split)}


def unseen(loss: str) -> dict[str, list[float]]:
    """Trains on some digits; all pairs of images of the others verify."""
    whole = split_of(Data())
    parts = [(of[0][of[1] < SEEN], of[1][of[1] < SEEN]) for of in whole[:2]]
    others = [(of[0][of[1] >= SEEN], of[1][of[1] >= SEEN]) for of in whole[:2]]
    inputs, labels = (np.concatenate(of) for of in zip(*others, strict=True))
    split = Split(parts[0], parts[1], SEEN)
    params, _ = fitted(SETTING, loss, split, SEEDS)
    features = features_and_answers(SETTING, 4, params, split._replace(test=(inputs, labels)))[0]
    rates = [100 * verification.verify(seed, labels).roc.eer for seed in features]
    return {"error_of_seen": errors(params, split), "eer_of_unseen": rates}


def plane(loss: str) -> dict[str, Any]:
    """What the first seed's test digits look like as a feature of two numbers."""
    split = split_of(Data())
    params, _ = fitted(PLANE, loss, split, 1)
    features = features_and_answers(PLANE, 4, params, split)[0][0]
    kernel = params["params"]["head"]["kernel"][0]
    return measures(*map(np.asarray, (features, features @ kernel, split.test[1], kernel)))


def fitted(setting: Setting, loss: str, split: Split, seeds: int) -> Any:
    """Parameters and shares, with a leading axis of seeds."""
    keys = jax.random.split(jax.random.key(0), seeds)
    lam = LOSSES[loss].over(setting.steps)
    return trained(setting, split.classes, 4, split.train, lam, keys)


def errors(params: Any, split: Split) -> list[float]:
    answers = features_and_answers(SETTING, 4, params, split)[1]
    return (100 * np.mean(answers != split.test[1], axis=1)).tolist()


def shown(numbers: dict[str, dict[str, list[float]]]) -> Table:
    table = Table("mean ± standard deviation over the seeds", title="The same network, two losses")
    for loss in numbers:
        table.add_column(loss, justify="right")
    for key, title in ROWS.items():
        table.add_row(title, *(spread(of[key]) for of in numbers.values()))
    return table


@rc_context(STYLE)
def draw(planes: dict[str, dict[str, Any]], file: Path) -> Path:
    """Writes the picture as PNG."""
    write(features_figure(planes), file)
    return file
