"""The ROC curves of all models have names, and end where their pairs end."""

import numpy as np
import pytest

from experiments.paper.style import LOSSES
from experiments.report import roc

RATES = np.geomspace(1e-3, 1, 100).tolist()


def verification(pairs, **config):
    curve = {"false_accepts": RATES, "true_accepts": np.sqrt(RATES).tolist()}
    measured = {"pairs": pairs, "metrics": {"auc": 0.875}, "curve": curve}
    return {"config": config, "seeds": [config.get("seed", 0)]} | measured


def test_a_curve_begins_at_one_false_accept():
    few, many = verification(600), verification(6000)
    (panel,) = roc.roc_figure({"few": few, "many": many}).axes
    first, second, _ = panel.lines
    # 300 and 3,000 of the pairs show two people.
    below = first.get_xdata()[0] / (RATES[1] / RATES[0])
    assert below < 1 / 300 <= first.get_xdata()[0]
    assert second.get_xdata()[0] == panel.get_xlim()[0] == RATES[0]
    assert first.get_label() == "few: AUC 0.875, 600 pairs"
    np.testing.assert_allclose(first.get_ydata(), np.sqrt(first.get_xdata()))
    assert first.get_color() != second.get_color()
    assert panel.get_xscale() == "log"
    (panel,) = roc.roc_figure({"few": few}).axes
    assert panel.get_xlim()[0] >= 1 / 300


NETWORK = {"width": 0.25, "steps": 600, "seed": 1}
TITLES = {
    "raw pixels": {"pixels": [28, 24]},
    "mine.npz": {"embeddings": "mine.npz"},
    "softmax, width 0.25, 600 updates, seed 1": NETWORK | {"margin": 1, "lam": [1, 1, 1, 5.0]},
    "m = 4, λ minimum 5, width 0.25, 600 updates, seed 1": NETWORK
    | {"margin": 4, "lam": {"minimum": 5.0}},
    "m = 4, λ self-paced, width 0.25, 600 updates, seed 1": NETWORK
    | {"margin": 4, "pace": "self-paced", "lam": {"minimum": 5.0}},
}


@pytest.mark.parametrize(("title", "config"), TITLES.items())
def test_a_model_is_named_by_its_loss_and_training(title, config):
    assert roc.face_title(verification(600, **config)) == title


def test_a_loss_has_the_same_colour_beside_any_other():
    softmax, margin = {"margin": 1, "lam": {}}, {"margin": 4, "lam": {"minimum": 5.0}}
    models = {
        "pixels": verification(600, pixels=[28, 24]),
        "paced": verification(600, **margin, pace="self-paced"),
        "margin": verification(600, **margin),
        "higher λ": verification(600, **margin | {"lam": {"minimum": 20.0}}),
        "softmax": verification(600, **softmax, pace="self-paced"),
        "cosface": verification(600, family="cosface", margin=0.35, lam={"minimum": 0.0}),
    }
    (panel,) = roc.roc_figure(models).axes
    looks = [(line.get_color(), line.get_linestyle()) for line in panel.lines[:6]]
    assert [line.get_alpha() for line in panel.lines[:6]] == [1, 1, 1, 0.5, 1, 1]
    assert looks == [
        ("black", "-"),
        (LOSSES["m4"].color, "--"),
        (LOSSES["m4"].color, "-"),
        (LOSSES["m4"].color, "-"),
        (LOSSES["softmax"].color, "-"),
        (LOSSES["cosface"].color, "-"),
    ]
