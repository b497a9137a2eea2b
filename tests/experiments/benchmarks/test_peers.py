"""Other libraries' losses are checked before timing, and timed before and after ours."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.benchmarks import arms, head, peers
from experiments.benchmarks.arms import Shape

SHAPE = Shape(16, 8, 12)


def stand_in(loss):
    """The output of the peers' process, if its large-margin loss were this number."""
    given = arms.problem(SHAPE, "f32", 0.0)
    losses = {peers.SOFTMAX: arms.exact_loss(given, 1), peers.LARGE_MARGIN: loss}
    losses |= {
        name: arms.exact_loss(given, arms.FAMILY[family]) for name, family in peers.FAMILY.items()
    }

    def printed(python, *arguments):
        if arguments == ("versions",):
            return json.dumps(dict.fromkeys(peers.PACKAGES, "1.0"))
        timed = {"loss": losses[arguments[-1]], "seconds": [0.1, 0.3], "growth_bytes": 5}
        return json.dumps(timed)

    return given, printed


def test_peers_are_checked_and_timed_before_and_after(monkeypatch):
    exact = arms.exact_loss(arms.problem(SHAPE, "f32", 0.0), 4)
    given, printed = stand_in(exact)
    monkeypatch.setattr(head, "_run_torch", printed)
    timed = head.torch_times(Path("python"), given, 4, 2)
    plain = SimpleNamespace(seconds=[0.1])
    rows = head.torch_rows(timed, timed, {arms.PLAIN: plain})
    timed_arms = {row["arm"]: row for row in rows}
    assert timed_arms.keys() == {*peers.arms(peers.PACKAGES)} and len(rows) == 4
    softmax = timed_arms[peers.SOFTMAX]
    assert softmax["milliseconds"] == [200, 100, 300] and softmax["ratio"] == [2, 1, 3]
    monkeypatch.setattr(head, "_run_torch", stand_in(1.1 * exact)[1])
    with pytest.raises(ValueError, match=f"{peers.LARGE_MARGIN} computes something else"):
        head.torch_times(Path("python"), given, 4, 2)


def test_torch_computes_the_same_loss():
    pytest.importorskip("pytorch_metric_learning")
    given = arms.problem(SHAPE, "f32", 0.0)
    assert peers.ARCFACE in head.torch_times(Path(sys.executable), given, 4, 1)
