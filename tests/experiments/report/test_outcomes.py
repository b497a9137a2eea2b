"""Which files are results, and which results form a group."""

import json
import shutil
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.paper.cells import run_name
from experiments.paper.config import Config
from experiments.report import figures, outcomes, roc
from experiments.report.outcomes import RESULTS, RUNS
from experiments.store import results as result
from made_up import run_of

COMMANDS = (["report", "--check"], ["figures"], ["list"])


def write(folder, runs):
    for number, outcome in enumerate(runs):
        result.save(folder / f"r{number}.json", outcome)


FOREIGN = {
    "empty": ("{}", "it has no name, seed"),
    "list": ("[]", "a JSON object, got []"),
    "null": ("null", "a JSON object, got None"),
    "number": ("3", "a JSON object, got 3"),
    "cut": ('{"name": "mnist-m4", ', "must hold a result as JSON"),
    "kind": ('{"kind": 7}', "got kind 7"),
    "tuning": ('{"kind": "tuning"}', "it has no config, best, candidates"),
    "half": (json.dumps(run_of("mnist-m4", 0, None) | {"status": "finished"}), "no train, test"),
    "unknown": (json.dumps(run_of("mnist-m4", 0, 1.0) | {"name": "mnist-m9"}), "'mnist-m9'"),
}


@pytest.mark.parametrize(("text", "said"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("folder", ["mnist-m4", "tune/mnist-m4"])
def test_a_foreign_file_is_named_in_one_line(text, said, folder, tmp_path, capsys):
    file = tmp_path / folder / "x.json"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    for command in COMMANDS:
        assert main([*command, "--out", str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(file) in line and said in line


def test_a_copied_file_is_no_second_seed(tmp_path, capsys):
    first = tmp_path / "mnist-m4" / "steps8-seed0.json"
    result.save(first, run_of("mnist-m4", 0, 1.0, steps=8, width=0.5))
    result.save(first.with_name("seed1.json"), run_of("mnist-m4", 1, 1.0, width=0.5, steps=8))
    assert len(outcomes.load_outcomes(tmp_path).runs) == 2
    shutil.copy(first, tmp_path / "copy.json")
    assert main(["report", "--check", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'copy.json'} and {first} hold the same run" in line


def test_a_run_of_an_older_configuration_is_not_averaged_with_todays(tmp_path, capsys):
    run, older = run_of("mnist-m4", 0, 1.0), run_of("mnist-m4", 1, 9.0)
    older["config"]["weight_decay"] = 0.5
    write(tmp_path, [run, older])
    assert main(["report", "--check", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'r1.json'} is of another mnist-m4 than today's" in line
    assert "weight_decay None -> 0.5" in line


def test_benchmarks_and_checkpoints_are_no_runs(tmp_path):
    result.save(tmp_path / "bench" / "head.json", {"kind": "bench head"})
    result.save(tmp_path / "runs" / "mnist-m4" / "seed0" / "config.json", {"name": "mnist-m4"})
    assert outcomes.load_outcomes(tmp_path) == ([], [], [], [])


def test_a_trained_cell_shows_beside_the_results_of_the_clone(tmp_path, monkeypatch, capsys):
    """`train` writes into runs; list, report and figures read this folder without a flag."""
    monkeypatch.chdir(tmp_path)
    run = run_of("cifar100-m2", 0, 12.34)
    result.save(RUNS / "cifar100-m2" / "seed0.json", run)
    for command in ("list", "report"):
        assert main([command]) == 0
        said = capsys.readouterr().out
        assert "12.34 (1)" in said and "11.40 (1)" in said
    again = run_of("mnist-m4", 0, 43.21)
    result.save(RUNS / "mnist-m4" / "seed0.json", again)
    assert main(["list"]) == 0
    assert "43.21 (1)" in capsys.readouterr().out
    monkeypatch.setattr(figures, "DRAWINGS", {})
    assert main(["figures"]) == 0
    assert capsys.readouterr().out == "runs/figures/roc.png written\n"
    assert (tmp_path / "runs" / "figures" / "roc.png").exists()


def test_candidates_of_a_tuning_are_no_results(tmp_path):
    write(tmp_path / "tune", [run_of("mnist-m4", 0, 2.0, validation=True)])
    found = outcomes.load_outcomes(tmp_path)
    assert found.runs == [] and len(found.validated) == 1


def test_groups_are_seeds_in_the_order_of_the_cells(tmp_path):
    lam = {"base": 1000.0, "gamma": 2.5e-05, "power": 35.0, "minimum": 5.0}
    runs = [
        run_of("mnist-m4", 1, 3.0, steps=9, lam=lam, learning_rate=0.05),
        run_of("mnist-m4", 0, 1.0, steps=9, lam=lam, learning_rate=0.05),
        run_of("mnist-m4", 2, None, steps=9),
        run_of("mnist-m4", 0, 4.0, steps=1000, pace="self-paced", mirror=True),
        run_of("mnist-softmax", 0, 4.0),
    ]
    softmax, tuned, paced = outcomes.grouped(runs)
    assert softmax.name == "mnist-softmax" and softmax.text == ""
    assert [run["seed"] for run in tuned.runs] == [0, 1]
    assert tuned.reduction == {"steps": 9}
    assert tuned.text == "9 updates, λ annealed to 5, learning rate 0.05"
    assert paced.text == "1,000 updates, mirror, λ self-paced by batch"


def test_runs_on_different_data_have_no_mean():
    runs = [run_of("mnist-m4", seed, 1.0) | {"file": f"r{seed}.json"} for seed in (0, 1)]
    runs[1]["data"] = {"fingerprint": "other"}
    with pytest.raises(ValueError, match=r"different data.*r0\.json, r1\.json"):
        outcomes.grouped(runs)


def test_spread_is_mean_and_sample_deviation():
    assert [outcomes.counted(v) for v in ([], [0.375], [0.3, 0.4])] == [
        "",
        "0.38 (1)",
        "0.35 ± 0.07 (2)",
    ]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [([0], "seed 0"), ([2, 0, 1], "seeds 0, 1, 2"), ([0, 2], "seeds 0, 2")],
)
def test_seeds_in_words(seeds, said):
    assert outcomes.seeds_words(seeds) == said


def test_committed_results_lie_where_their_configuration_says():
    found = outcomes.load_outcomes(RESULTS)
    candidates = [
        result.load(file) | {"file": Path(file).relative_to(RESULTS / "tune").as_posix()}
        for file in (RESULTS / "tune").rglob("*seed*.json")
    ]
    assert found.runs and candidates
    for outcome in (*found.runs, *candidates):
        assert outcome["file"] == f"{run_name(Config.from_json(outcome['config']))}.json"


def of_fold(fold, accuracy, **config):
    return {
        "kind": "verification",
        "protocol": "LFW",
        "pairs": 600,
        "tested_folds": [fold],
        "people_trained_on": 550 + fold,
        "config": {"margin": 4, "left_out_fold": fold} | config,
        "curve": {"false_accepts": [0.1, 1.0], "true_accepts": [accuracy - 0.1, 1.0]},
        "metrics": {
            "accuracy": accuracy,
            "standard_error": None,
            "fold_accuracy": [accuracy],
            "auc": accuracy,
            "equal_error_rate": 1 - accuracy,
            "tar_at_far": {"0.1": accuracy},
        },
        "all_pairs": {
            "genuine": 10,
            "impostors": 90,
            "metrics": {"equal_error_rate": 0.5 - accuracy / 2, "tar_at_far": {"0.1": 0.3}},
        },
    }


def test_folds_with_separate_networks_are_one_verification(tmp_path):
    written = [of_fold(0, 0.7), of_fold(2, 0.8), of_fold(5, 0.9), of_fold(0, 0.5, margin=1)]
    write(tmp_path, written)
    folds, alone = outcomes.load_outcomes(tmp_path).verifications
    assert alone["config"]["margin"] == 1 and alone["metrics"]["accuracy"] == 0.5
    assert folds["tested_folds"] == [0, 2, 5] and folds["pairs"] == 1800
    assert folds["people_trained_on"] == 550
    metrics = folds["metrics"]
    assert metrics["standard_error"] == pytest.approx(0.1 / 3**0.5)
    for name in ("accuracy", "auc"):
        assert metrics[name] == pytest.approx(0.8)
    assert metrics["equal_error_rate"] == pytest.approx(0.2)
    assert metrics["tar_at_far"] == {"0.1": pytest.approx(0.8)}
    assert folds["curve"]["true_accepts"] == pytest.approx([0.7, 1.0])
    everybody = folds["all_pairs"]
    assert (everybody["genuine"], everybody["impostors"]) == (30, 270)
    assert everybody["metrics"]["equal_error_rate"] == pytest.approx(0.1)
    written[1]["all_pairs"] = None
    write(tmp_path, written)
    assert outcomes.load_outcomes(tmp_path).verifications[0]["all_pairs"] is None
    assert roc.lowest_rate(folds) == roc.lowest_rate(alone) == 2 / 600


def test_other_pairs_are_another_verification(tmp_path):
    """One checkpoint on two test sets; their mean would be of nothing."""
    one, other = (of_fold(0, of, seed=0) | {"verified": [f"{of}.bin"]} for of in (0.7, 0.8))
    write(tmp_path, [one, other])
    found = outcomes.load_outcomes(tmp_path).verifications
    assert [of["metrics"]["accuracy"] for of in found] == [0.7, 0.8]
    write(tmp_path, [one, one | {"pairs": 1}])
    with pytest.raises(ValueError, match="hold the same run"):
        outcomes.load_outcomes(tmp_path)


def test_seeds_with_the_same_folds_are_one_verification(tmp_path):
    accuracies = {(0, 0): 0.7, (0, 1): 0.8, (1, 0): 0.9, (1, 1): 0.6, (2, 0): 0.5}
    runs = [of_fold(fold, of, seed=seed) for (seed, fold), of in accuracies.items()]
    write(tmp_path, [*runs, *(of_fold(fold, 0.4, margin=1, seed=3) for fold in (0, 1))])
    both, third, other = outcomes.load_outcomes(tmp_path).verifications
    assert [of["seeds"] for of in (both, third, other)] == [[0, 1], [2], [3]]
    assert both["tested_folds"] == [0, 1] and both["pairs"] == 1200  # each pair counts once
    metrics = both["metrics"]
    assert metrics["fold_accuracy"] == pytest.approx([0.8, 0.7])
    assert metrics["accuracy"] == metrics["auc"] == pytest.approx(0.75)
    assert metrics["standard_error"] == pytest.approx(0.05)
    assert both["curve"]["true_accepts"] == pytest.approx([0.65, 1.0])
    everybody = both["all_pairs"]
    assert (everybody["genuine"], everybody["impostors"]) == (20, 180)
    assert everybody["fold_eer"] == pytest.approx([0.1, 0.15])
    assert everybody["fold_tar"] == pytest.approx([0.3, 0.3])
    assert everybody["metrics"]["equal_error_rate"] == pytest.approx(0.125)
    assert third["metrics"]["standard_error"] is None
    assert roc.lowest_rate(both) == 2 / 600
