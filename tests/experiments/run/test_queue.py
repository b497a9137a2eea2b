"""The queue makes the missing runs in order; its results do not depend on interruptions."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.paper.cells import CONFIGS, run_name, toy
from experiments.run import loop, queue, train
from experiments.store import results as result
from experiments.store.checkpoints import steps_in
from experiments.store.files import locked
from experiments.store.progress import hours

pytestmark = pytest.mark.usefixtures("shared_programs")

SEEDS = [replace(toy(CONFIGS["digits-m4"]), seed=seed) for seed in range(3)]
ROOT = Path(__file__).parents[3]


def numbers(outcome):
    """The numbers that must not depend on interruptions."""
    return {key: outcome[key] for key in ("train", "test", "curves", "config", "data")}


def test_reproduce_runs_what_is_missing(tmp_path, capsys, monkeypatch):
    words = ["reproduce", "--only", "digits-m*", "--seeds", "2", "--toy", "--devices", "1"]
    words += ["--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "run 1 of 2: digits-m4/steps8" in said and "2 of 2 runs are done" in said
    for config in SEEDS[:2]:
        outcome = result.load(tmp_path / "toy" / f"{run_name(config)}.json")
        assert outcome["reduced"] and outcome["seed"] == config.seed
    monkeypatch.setattr(train, "run", None)
    assert main(words) == 0
    assert "2 of 2 runs are done" in capsys.readouterr().out


def test_the_result_of_another_recipe_is_not_taken_for_the_run(tmp_path, capsys):
    file = tmp_path / "toy" / f"{run_name(SEEDS[0])}.json"
    other = SEEDS[0].to_json() | {"weight_decay": 0.5}
    outcome = {"status": "diverged", "seed": 0, "reduced": True, "device": "none", "config": other}
    result.save(file, outcome)
    words = ["reproduce", "--only", "digits-m4", "--seeds", "1", "--toy", "--out", str(tmp_path)]
    assert main(words) == 2
    said = f"{file} must hold the result of this run, not weight_decay 0.5 -> 0.02"
    assert said in capsys.readouterr().err


def test_failed_and_diverged_runs_are_named(tmp_path, capsys, monkeypatch):
    def run(config, **_):
        if config.seed == 0:
            raise RuntimeError("out of memory\nand more")
        outcome = {"status": "diverged" if config.seed == 1 else "finished"}
        outcome |= {"seconds": {"wall": 9.0}}
        return outcome | {"config": config.to_json()}

    monkeypatch.setattr(train, "run", run)
    words = ["reproduce", "--only", "digits-m4", "fig2-m1", "--seeds", "3", "--out", str(tmp_path)]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "failed: digits-m4/seed0: out of memory\n" in said
    assert "failed: fig2-m1/seed0: out of memory\n" in said
    assert "diverged: digits-m4/seed1" in said and "4 of 6 runs are done" in said
    assert said.index("run 1 of 6: digits-m4/seed0") < said.index("run 4 of 6: fig2-m1/seed0")
    assert "run 3 of 6: digits-m4/seed2, about an unknown time" in said
    cost = queue.work(CONFIGS["fig2-m1"]) / queue.work(CONFIGS["digits-m4"])
    assert f"about {hours(3 * 9 * cost)} to go" in said


def test_a_run_that_another_process_trains_is_left_to_it(tmp_path, capsys):
    words = ["reproduce", "--only", "digits-m4", "--seeds", "1", "--toy", "--devices", "1"]
    folder = tmp_path / "toy" / run_name(SEEDS[0])
    lock = locked(folder)
    assert main([*words, "--out", str(tmp_path)]) == 0
    lock.release()
    said = capsys.readouterr().out
    assert f"left to another process: {folder} is in use" in said and "failed" not in said
    assert "1 of 1 runs left" in said


def test_missing_data_fails_every_run_with_one_message(tmp_path, capsys):
    words = ["reproduce", "--only", "mnist-*", "--seeds", "1", "--toy", "--data", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.count("Two ways to get it") == 1 and said.count("failed: mnist-") == 8


def test_cheapest_runs_come_first():
    names = [config.name for config in queue.runs(("*",), 1, toy=False)]
    assert set(names) == set(CONFIGS) and names[0].startswith("digits")
    assert names.index("mnist-m4") < names.index("cifar10-m4") < names.index("cifar100-m4")
    chosen = queue.runs(("cifar10-*", "fig7-32"), 2, toy=True)
    assert len(chosen) == 18 and all(config.steps == 8 for config in chosen)
    assert not any(config.name.startswith("cifar10plus") for config in chosen)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--only", "cifar11-*"], "--only 'cifar11-*' names no configuration"),
        (["--seeds", "0"], "seeds must be >= 1, got 0"),
    ],
)
def test_mistakes_end_with_2(words, message, capsys):
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_budget_is_over_at_its_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    over = loop.budget(0.5)
    now[0] = 129.0
    assert not over()
    now[0] = 130.0
    assert over() and loop.budget(0)()


@pytest.mark.parametrize(("asked", "code"), [(False, 0), (True, 130)])
def test_a_queue_that_is_stopped_goes_on_by_the_same_command(
    asked, code, tmp_path, capsys, monkeypatch
):
    """The budget ends, or somebody asks, before the first update."""

    def over():
        if asked:
            signal.raise_signal(signal.SIGTERM)
        return next(questions) > 0 and not asked

    questions = itertools.count()
    monkeypatch.setattr(loop, "budget", lambda _: over)
    words = ["reproduce", "--only", "digits-m4", "--seeds", "1", "--toy", "--devices", "1"]
    assert main([*words, "--out", str(tmp_path)]) == code
    assert "1 of 1 runs left; the same command continues" in capsys.readouterr().out
    assert steps_in(tmp_path / "toy" / run_name(SEEDS[0]) / "checkpoints") == {0}


@pytest.mark.slow
@pytest.mark.ci
def test_killed_queue_continues_to_the_same_bits(kept_programs, tmp_path):
    words = ["reproduce", "--only", "digits-m4", "--seeds", "2", "--toy", "--devices", "1"]
    words += ["--checkpoint-seconds", "0"]

    def command(out):
        environment = os.environ | kept_programs
        whole = [sys.executable, "-m", "experiments", *words, "--out", str(out)]
        return subprocess.Popen(
            whole, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    with command(tmp_path / "whole") as process:
        assert process.wait() == 0
    last = tmp_path / "broken" / "toy" / run_name(SEEDS[1]) / "metrics.jsonl"
    with command(tmp_path / "broken") as process:
        while not last.exists() or last.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert not (tmp_path / "broken" / "toy" / f"{run_name(SEEDS[1])}.json").exists()
    with command(tmp_path / "broken") as process:
        assert process.wait() == 0
    for config in SEEDS[:2]:
        whole, broken = (
            json.loads((tmp_path / out / "toy" / f"{run_name(config)}.json").read_text())
            for out in ("whole", "broken")
        )
        assert numbers(whole) == numbers(broken)


@pytest.mark.slow
def test_whole_mnist_row_at_toy_size(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{what}": values
        for split in ("train", "test")
        for what, values in {
            "images": rng.integers(0, 256, (64, 28, 28, 1), dtype=np.uint8),
            "labels": rng.integers(0, 10, 64),
        }.items()
    }
    np.savez(tmp_path / "mnist.npz", **arrays)
    words = ["reproduce", "--only", "mnist-*", "--seeds", "1", "--toy", "--data", str(tmp_path)]
    assert main([*words, "--out", str(tmp_path), "--devices", "1"]) == 0
    names = {result.load(file)["name"] for file in (tmp_path / "toy").glob("*/*.json")}
    losses = ("hinge", "softmax", "m2", "m3", "m4", "asoftmax", "cosface", "arcface")
    assert names == {f"mnist-{loss}" for loss in losses}
