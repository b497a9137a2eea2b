"""`bench all`: its order, its time limit, and its continuation after a stop."""

import json
import os

import pytest

from experiments.__main__ import main
from experiments.benchmarks import budget

DEVICE = {"commit": "a" * 40, "versions": {"jax": "1"}, "device": "H200", "backend": "gpu"}


def bench(monkeypatch, out, codes, device=DEVICE, minutes=10.0):
    """The exit code, the pieces that ran, and what the command wrote."""
    ran = []

    def outcome(command, environment, seconds):
        assert 0 < seconds <= 60 * minutes and environment["JAX_PLATFORMS"]
        ran.append(command)
        return codes.get(len(ran), 0), "last line"

    monkeypatch.setattr(budget, "output", lambda command: json.dumps(device))
    monkeypatch.setattr(budget, "outcome", outcome)
    code = budget.bench(minutes, out=out)
    file = out / "all-gpu.json"
    return code, ran, json.loads(file.read_text()) if file.exists() else None


def test_the_most_useful_comes_first_and_every_size_is_there():
    names = list(budget.pieces("gpu", budget.OUT, quick=False))
    main_arms = [name for name in names if name.endswith("main arms")]
    assert names[:10] == main_arms and names[10:12] == ["step", "tests of the losses"]
    for size in (*budget.SHAPES, budget.MILLION):
        for dtype in ("f32", "bf16"):
            assert {f"head {size} {dtype}, {kind} arms" for kind in ("main", "all")} <= {*names}


def test_every_named_test_file_exists():
    for words in budget.pieces("gpu", budget.OUT, quick=False).values():
        files = [word for word in words if word.startswith("tests/")]
        assert all((budget.CLONE / file).exists() for file in files)
        assert files or words[0] == "experiments"


def test_a_stopped_command_goes_on(tmp_path, monkeypatch, capsys):
    stops = {3: None, 2: 1}
    code, ran, saved = bench(monkeypatch, tmp_path, stops)
    assert code == 1 and len(ran) == 3
    assert [piece["code"] for piece in saved["pieces"]] == [0, 1]
    assert saved["device"] == "H200" and "go on" not in saved["command"]
    assert "the same command goes on" in capsys.readouterr().out
    code, again, saved = bench(monkeypatch, tmp_path, {})
    # The failed piece is tried again, and the finished piece is not.
    assert again[0] == ran[1] and len(again) == len(saved["pieces"]) - 1
    assert code == 0 and "continues: 1 of" in capsys.readouterr().out
    assert bench(monkeypatch, tmp_path, {})[1] == []


def test_a_result_of_another_commit_is_kept(tmp_path, monkeypatch):
    _, _, saved = bench(monkeypatch, tmp_path, {})
    with pytest.raises(ValueError, match="holds another result"):
        bench(monkeypatch, tmp_path, {}, DEVICE | {"commit": "b" * 40})
    assert json.loads((tmp_path / "all-gpu.json").read_text()) == saved


def test_a_piece_ends_at_its_time_limit():
    sleeps = [budget.sys.executable, "-c", "import time; time.sleep(60)"]
    assert budget.outcome(sleeps, dict(os.environ), 0.2) == (None, "")
    fails = [budget.sys.executable, "-c", "raise SystemExit('why')"]
    assert budget.outcome(fails, dict(os.environ), 60) == (1, "why")


def test_minutes_must_be_positive(capsys):
    assert main(["bench", "all", "--minutes", "0"]) == 2
    assert "minutes must be > 0" in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.slow  # a process for each piece, and each compiles anew
def test_one_of_each_kind_runs(tmp_path):
    assert main(["bench", "all", "--quick", "--minutes", "30", "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "all-cpu.json").read_text())
    assert [piece["name"] for piece in saved["pieces"]] == ["head", "step", "tests"]
    assert "passed" in saved["pieces"][-1]["said"]
    (entry,) = json.loads((tmp_path / "head-cpu-f32.json").read_text())["shapes"]
    assert len(entry["arms"]) == 2 and len(list(tmp_path.glob("step-cpu-*.json"))) == 1
