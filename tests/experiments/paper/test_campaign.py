"""The batches hold the planned runs, and `campaign` trains the missing runs of a batch."""

import re
import signal
import sys
from dataclasses import replace

import pytest

from experiments.__main__ import main
from experiments.paper import campaign
from experiments.paper.cells import CONFIGS, changes_of, run_name, toy
from experiments.report.outcomes import RESULTS
from experiments.run import abreast
from experiments.store import logs, progress
from experiments.store import results as result


def test_no_run_is_in_two_batches_and_a_call_of_ten_minutes_has_nine_at_most():
    names = [run_name(run) for batch in campaign.BATCHES.values() for run in batch]
    assert len(set(names)) == len(names)
    assert all(len(campaign.BATCHES[batch]) <= 9 for batch in "ABC")
    assert list(campaign.BATCHES) == list(abreast.Batch.__args__)


def test_batch_a_varies_mirroring_and_the_released_recipe():
    wanted = campaign.BATCHES["A"]
    assert [(run.name, run.seed, changes_of(run)) for run in wanted] == [
        ("cifar10-softmax", 0, {"mirror": True}),
        ("cifar10-m2", 0, {"mirror": True}),
        ("cifar10-m4", 0, {"mirror": True}),
        ("cifar10-softmax", 1, {}),
        ("cifar10-m4", 1, {}),
        ("released-cifar10-softmax", 0, {}),
        ("released-cifar10-m2", 0, {}),
        ("cifar10-m4", 0, {"mirror": True, "pace": "lead"}),
        ("released-cifar10-softmax", 0, {"mirror": False}),
    ]


@pytest.mark.parametrize("batch", ["fits", "recipe", "narrow", "paced", "scaled"])
def test_every_arm_has_a_seed_before_any_arm_has_the_next(batch):
    runs = campaign.BATCHES[batch]
    for data in {run.dataset for run in runs}:
        seeds = [run.seed for run in runs if run.dataset == data]
        assert seeds == sorted(seeds) and len(set(seeds)) == (6 if batch == "fits" else 3)
        assert all(seeds.count(seed) == seeds.count(0) for seed in seeds)


def test_scales_are_tried_on_validation_images_alone_and_used_without_lambda():
    tried, used = campaign.BATCHES["scales"], campaign.BATCHES["scaled"]
    assert all(run.validation for run in tried) and not any(run.validation for run in used)
    for name in {run.name for run in tried}:
        assert [run.scale for run in tried if run.name == name] == [8, 16]
        mine = [run for run in used if run.name == name]
        assert [(run.seed, run.pace) for run in mine] == [(seed, "none") for seed in range(3)]
        tries = [run for run in tried if run.name == name]
        files = [RESULTS / "tune" / f"{run_name(run)}.json" for run in tries]
        errors = [result.load(file)["test"]["error"] for file in files]
        assert {run.scale for run in mine} == {tries[errors.index(min(errors))].scale}


@pytest.mark.slow
@pytest.mark.ci
def test_a_batch_is_trained_side_by_side_and_a_second_call_has_nothing_to_do(
    tmp_path, monkeypatch, capfd
):
    runs = [replace(toy(CONFIGS["digits-softmax"]), seed=seed) for seed in range(2)]
    broken = replace(runs[0], init="nothing/there")
    monkeypatch.setitem(campaign.BATCHES, "A", [broken, *runs])
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    command = ["campaign", "A", "--processes", "2", "--out", str(tmp_path)]
    assert main(command) == 1
    said, lines = capfd.readouterr()
    assert said.count(": exit code ") == 3
    counted = re.findall(r"campaign A: (\d+) of 24 updates, \d of 3 runs at work", lines)
    assert [int(count) for count in counted] == sorted(int(count) for count in counted)
    assert "campaign A: 16 of 24 updates, 0 of 3 runs at work" in lines
    log = tmp_path / f"{run_name(broken)}.log"
    assert f"{log} says why" in said and "1 of 3 runs left" in said
    assert "nothing/there" in log.read_text()
    for run in runs:
        saved = result.load(tmp_path / f"{run_name(run)}.json")
        assert saved["status"] == "finished" and saved["seed"] == run.seed
    monkeypatch.setitem(campaign.BATCHES, "A", runs)
    monkeypatch.setattr(abreast.subprocess, "Popen", None)
    assert main(command) == 0
    assert "all runs are done" in capfd.readouterr().out


def test_the_step_that_a_run_at_work_has_reached(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert logs.last_step(tmp_path) == 0
    line = b'{"kind": "train", "step": %d}\n'
    for written, step in (
        (b"", 0),
        (line[:9], 0),
        (line % 1, 1),
        (b"".join(line % number for number in range(1000)) + line[:9], 999),
        (b"no JSON\n", 0),
        (b"[]\n", 0),
    ):
        log.write_bytes(written)
        assert logs.last_step(tmp_path) == step


def test_the_command_and_environment_of_a_process(tmp_path, monkeypatch):
    begun = []

    class Process:
        pid = 0
        returncode = 0

        def __init__(self, command, env, stdout, **_):
            begun.append((command, env))

        def poll(self):
            return 0

    monkeypatch.setattr(abreast.subprocess, "Popen", Process)
    monkeypatch.setattr(abreast.os, "cpu_count", lambda: 8)
    for name in (abreast.MEMORY, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    data = ["--data", str(tmp_path / "data")]
    assert main(["campaign", "A", "--processes", "7", "--out", str(tmp_path), *data]) == 0
    assert len(begun) == len(campaign.BATCHES["A"])
    command, environment = begun[0]
    assert environment[abreast.MEMORY] == "0.12"
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert command == [
        sys.executable,
        *["-m", "experiments", "train", "cifar10-softmax", "--mirror", "--seed", "0"],
        *["--out", str(tmp_path), *data],
    ]


def test_nothing_begins_after_the_budget(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(abreast.subprocess, "Popen", None)
    assert main(["campaign", "B", "--budget-minutes", "0", "--out", str(tmp_path)]) == 0
    assert "9 of 9 runs left" in capsys.readouterr().out


def test_a_run_that_the_budget_stops_has_not_failed(tmp_path, monkeypatch, capsys):
    class Process:
        pid = 0
        returncode = None

        def __init__(self, *_, **__):
            pass

        def poll(self):
            return self.returncode

        def terminate(self):
            self.returncode = -signal.SIGTERM  # what a process that is only starting ends with

    monkeypatch.setattr(abreast.subprocess, "Popen", Process)
    command = ["campaign", "A", "--budget-minutes", "0.01", "--out", str(tmp_path)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "9 of 9 runs left" in said and "failed" not in said


def test_each_process_has_a_core_of_this_one(monkeypatch):
    monkeypatch.setattr(abreast.os, "sched_getaffinity", lambda _: {5, 3}, raising=False)
    assert abreast.cores_of(2) == [3, 5]
    with pytest.raises(ValueError, match="pin: expected 3 cores for this process, got 2"):
        abreast.cores_of(3)


def test_no_process_outlives_a_campaign_that_fails(tmp_path, monkeypatch):
    ended = []

    class Process:
        def __init__(self, *_, **__):
            pass

        def poll(self):
            raise OSError("the table of processes is gone")

        def terminate(self):
            ended.append(self)

    monkeypatch.setattr(abreast.subprocess, "Popen", Process)
    assert main(["campaign", "A", "--out", str(tmp_path)]) == 2
    assert len(ended) == 1


def test_more_processes_than_cores_are_refused(capsys):
    assert main(["campaign", "A", "--processes", "4097"]) == 2
    assert "processes must be in 1.." in capsys.readouterr().err


def test_a_batch_does_not_take_any_file_for_the_result_of_a_run(tmp_path, monkeypatch, capfd):
    run = toy(CONFIGS["digits-softmax"])
    monkeypatch.setitem(campaign.BATCHES, "A", [run])
    monkeypatch.setattr(abreast.subprocess, "Popen", None)
    file = tmp_path / f"{run_name(run)}.json"
    result.save(file, {"name": run.name})
    assert main(["campaign", "A", "--out", str(tmp_path)]) == 2
    assert f"{file} must hold a result with status, seed" in capfd.readouterr().err
