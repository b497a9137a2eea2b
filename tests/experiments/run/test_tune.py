"""λ is chosen on a validation split, from the whole grid, and tuning can be interrupted."""

import pytest

from experiments.__main__ import main
from experiments.paper import data
from experiments.paper.cells import run_name
from experiments.run import loop, train, tune
from experiments.store import results as result
from lsoftmax_jax.schedule import LambdaPreset

CONFIGURATION = [
    "digits-m4",
    "--pace",
    "annealed",
    "--steps",
    "4",
    "--batch",
    "16",
    "--width",
    "0.0625",
]
FILE = "digits-m4/annealed-steps4-batch16-width0.0625-tuned.json"


def words(out, *options):
    small = ["--gammas", "1", "--minimums", "0", "5", "--devices", "1"]
    return ["tune", *small, *options, "--out", str(out), *CONFIGURATION]


def test_grid_has_every_schedule_once():
    preset = LambdaPreset(1000.0, 0.01, 4.0)
    assert tune.grid(preset, (0.0, 10.0), (0.5, 2.0), (1.0,), (0.0, 5.0)) == [
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 0.0, 0.0, 5.0),
        (10.0, 0.005, 4.0, 0.0),
        (10.0, 0.005, 4.0, 5.0),
        (10.0, 0.02, 4.0, 0.0),
        (10.0, 0.02, 4.0, 5.0),
    ]


def test_tune_reads_no_test_image(tmp_path, capsys, monkeypatch):
    digits = data.load("digits")
    unseen = digits._replace(test=digits.test._replace(images=None, labels=None))
    monkeypatch.setattr(data, "load", lambda *_: unseen)
    once = words(tmp_path, "--minimums", "5")  # every λ compiles anew
    assert main(once) == 0
    found = result.load(tmp_path / "tune" / FILE)
    assert found["complete"] and found["best"]["minimum"] == 5.0
    (file,) = (tmp_path / "tune").glob("*/*-seed0.json")
    outcome = result.load(file)
    assert found["candidates"][0]["validation_error"] == outcome["test"]["error"]
    assert outcome["train"]["count"] == 1297 - 129 and outcome["test"]["count"] == 129
    assert outcome["reduced"] and "--validation" in outcome["command"]
    said = capsys.readouterr().out
    assert "best: python -m experiments train digits-m4 --pace annealed --lam.base 1000.0" in said
    monkeypatch.setattr(train, "run", None)
    assert main(once) == 0
    assert result.load(tmp_path / "tune" / FILE)["candidates"] == found["candidates"]


def outcomes(monkeypatch, error_of):
    """Replaces training by error_of, a run's validation error, or None if the run diverges."""

    def run(config, out, **_):
        error = error_of(config)
        status = "diverged" if error is None else "finished"
        outcome = {"status": status, "seed": config.seed, "config": config.to_json()}
        outcome |= {"seconds": {"wall": 3.0, "setup": 1.0, "compilation": 1.0}}
        outcome |= {"device": "none"} | ({} if error is None else {"test": {"error": error}})
        result.save(out / f"{run_name(config)}.json", outcome)
        return outcome

    monkeypatch.setattr(train, "run", run)


def test_lowest_mean_wins_and_no_diverged_candidate(tmp_path, monkeypatch):
    errors = {(0.0, 0): 1.0, (0.0, 1): None, (5.0, 0): 4.0, (5.0, 1): 6.0, (9.0, 0): 5.5}
    outcomes(monkeypatch, lambda config: errors.get((config.lam.minimum, config.seed), 5.5))
    assert main(words(tmp_path, "--minimums", "0", "5", "9", "--seeds", "2")) == 0
    found = result.load(tmp_path / "tune" / FILE)
    assert found["best"]["minimum"] == 5.0
    first, second, _ = found["candidates"]
    assert first["validation_error"] is None and first["diverged"] == 1
    assert second["validation_error"] == 5.0 and second["validation_errors"] == [4.0, 6.0]


def test_a_tuning_whose_runs_all_diverge_has_no_best(tmp_path, monkeypatch):
    outcomes(monkeypatch, lambda config: None)
    assert main(words(tmp_path)) == 1
    assert result.load(tmp_path / "tune" / FILE)["best"] is None


def test_time_up_leaves_candidates_missing(tmp_path, monkeypatch):
    outcomes(monkeypatch, lambda config: 1.0)
    over = iter([False, True])
    monkeypatch.setattr(loop, "budget", lambda _: lambda: next(over))
    assert main(words(tmp_path)) == 0
    found = result.load(tmp_path / "tune" / FILE)
    assert not found["complete"] and [c["missing"] for c in found["candidates"]] == [0, 1]


@pytest.mark.parametrize("loss", ["hinge", "softmax"])
def test_without_a_margin_there_is_nothing_to_tune(loss, tmp_path, capsys):
    assert main(["tune", "--out", str(tmp_path), f"mnist-{loss}"]) == 2
    assert "has no margin" in capsys.readouterr().err
