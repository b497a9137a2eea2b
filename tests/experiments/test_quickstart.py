"""The first run prints its table, draws its picture and writes its numbers."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import quickstart
from experiments.__main__ import main


@pytest.fixture
def tiny(monkeypatch):
    for name in ("SETTING", "PLANE"):
        monkeypatch.setattr(quickstart, name, getattr(quickstart, name)._replace(steps=60))
    monkeypatch.setattr(quickstart, "SEEDS", 2)


@pytest.mark.slow
@pytest.mark.ci
def test_shows_draws_and_writes(tiny, tmp_path, capsys):
    assert main(["quickstart", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in (*quickstart.LOSSES, "error, %", "never trained", "features.png"):
        assert title in printed
    assert imread(tmp_path / "features.png").shape[:2] == (848, 1664)
    result = json.loads((tmp_path / "quickstart.json").read_text())
    softmax, margin = result["numbers"].values()
    assert softmax.keys() == margin.keys() == quickstart.ROWS.keys()
    assert all(len(of) == 2 for of in margin.values())
    assert softmax["share"] == [0, 0] and min(margin["share"]) > 1
    for of in (softmax, margin):  # guessing has an error of 90 %
        assert np.mean(of["error_of_seen"]) < np.mean(of["error"]) + 3 < 20
        assert np.mean(of["error_of_noisy"]) > np.mean(of["error"])
        assert 10 < np.mean(of["eer_of_unseen"]) < 50
    assert result["features"]["softmax"]["count"] == 540


def test_an_interrupt_promises_no_checkpoint(tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(quickstart, "fitted", interrupted)
    assert main(["quickstart", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"


def test_digits_that_verify_were_not_trained(tiny, monkeypatch):
    """Training and its test see the first SEEN digits only."""
    seen = []
    fitted = quickstart.fitted

    def watched(setting, loss, split, seeds):
        seen.append(split)
        return fitted(setting, loss, split, seeds)

    monkeypatch.setattr(quickstart, "fitted", watched)
    quickstart.unseen("softmax")
    (split,) = seen
    assert split.classes == quickstart.SEEN
    for _, labels in split[:2]:
        assert set(labels) == set(range(quickstart.SEEN))


def test_spread_by_hand():
    assert quickstart.spread([1.0, 3.0]) == "2.00 ± 1.41"


def test_picture_shows_points_where_they_are(tmp_path):
    """Two classes with opposite directions: their colours fill opposite halves of the panel."""
    points = np.array([[0.0, 5.0]] * 50 + [[0.0, -5.0]] * 50)
    measured = {
        "points": points.tolist(),
        "labels": [0] * 50 + [1] * 50,
        "kernel": [[0.0, 0.0], [1.0, -1.0]],
        "error": 0.0,
        "target_angle": 0.0,
    }
    image = imread(quickstart.draw({"one": measured}, tmp_path / "one.png"))[..., :3]
    blue, orange = (
        np.abs(image - color).sum(-1) < 0.1 for color in ((0.12, 0.47, 0.71), (1, 0.5, 0.05))
    )
    assert blue.any() and orange.any()
    assert np.nonzero(blue)[0].max() < np.nonzero(orange)[0].min()
