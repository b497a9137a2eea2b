"""The first run prints its table, draws its picture, and continues where it was stopped."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from matplotlib.image import imread

from experiments import quickstart
from experiments.__main__ import main
from experiments.paper.cells import run_name
from experiments.run import train


@pytest.fixture
def tiny(monkeypatch):
    small = {"steps": 4, "batch": 8, "width": 1 / 8, "examples": 40}
    runs = {title: replace(config, **small) for title, config in quickstart.RUNS.items()}
    monkeypatch.setattr(quickstart, "RUNS", runs)
    monkeypatch.setattr(train, "run", partial(train.run, devices=1))
    return runs


def test_stops_continues_and_shows(tiny, tmp_path, capsys):
    asked = iter([False, True])
    assert quickstart.run(tmp_path, lambda: next(asked)) == 130
    assert main(["quickstart", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for title in (*tiny, "error, %", "intra-class angle", "inter-class angle", "features.png"):
        assert title in printed
    names = [run_name(config) for config in tiny.values()]
    assert all((tmp_path / f"{name}.json").exists() for name in names)
    assert imread(tmp_path / "features.png").shape[:2] == (848, 1664)


def test_the_two_differ_in_the_margin_alone():
    softmax, large = quickstart.RUNS.values()
    assert replace(softmax, name=large.name, margin=4) == large


def test_picture_shows_points_where_they_are(tmp_path):
    """Two classes of opposite directions: their colours fill opposite halves of the panel."""
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
