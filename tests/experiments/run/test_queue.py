"""The queue makes the missing runs in order; its results do not depend on interruptions."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.paper.cells import CONFIGS, run_name, toy
from experiments.run import loop, queue, train
from experiments.run.queue import Budget, Queue
from experiments.store import ledger, logs
from experiments.store import results as result
from experiments.store.checkpoints import Checkpoints, steps_in

pytestmark = pytest.mark.usefixtures("shared_programs")

SEEDS = [replace(toy(CONFIGS["digits-m4"]), seed=seed) for seed in range(3)]
OPTIONS = {"devices": 1, "evaluations": 2}
ROOT = Path(__file__).parents[3]


def numbers(outcome):
    """The numbers that must not depend on interruptions."""
    return {key: outcome[key] for key in ("train", "test", "curves", "config", "data")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two seeds trained together."""
    out = tmp_path_factory.mktemp("pair")
    try:
        return out, train.run_seeds(SEEDS[:2], out=out, **OPTIONS)
    except ValueError as error:
        if jax.__version_info__ < (0, 8) and "several seeds in one program" in str(error):
            pytest.skip(str(error))
        raise


def test_seeds_together_equal_seeds_alone_up_to_rounding(pair, tmp_path):
    alone = train.run(SEEDS[1], out=tmp_path, **OPTIONS)
    together = pair[1][1]
    assert together["together"] == [0, 1] and alone["together"] == [1]
    assert together["curves"]["train"]["step"] == alone["curves"]["train"]["step"]
    for curve in ("loss", "feature_norm"):
        np.testing.assert_allclose(
            together["curves"]["train"][curve], alone["curves"]["train"][curve], rtol=1e-4
        )
    np.testing.assert_allclose(together["test"]["kernel"], alone["test"]["kernel"], atol=2e-3)
    assert pair[1][0]["test"] != together["test"]


def test_together_continues_to_the_same_bits(pair, tmp_path):
    asked = itertools.count()
    keywords = {"out": tmp_path, "checkpoint_seconds": 0.0, **OPTIONS}
    assert train.run_seeds(SEEDS[:2], stop=lambda: next(asked) == 5, **keywords) is None
    # A kill between the saves leaves the runs with different newest checkpoints.
    folders = [tmp_path / run_name(config) / "checkpoints" for config in SEEDS[:2]]
    assert [steps_in(folder) for folder in folders] == [{4, 5}] * 2
    ledger.rewound(folders[1].parent, 4, logs.read(folders[1].parent))
    with Checkpoints(folders[1], kept=2) as checkpoints:
        checkpoints.rewind(4)
    assert loop.common_step([folder.parent for folder in folders]) == 4
    outcomes = train.run_seeds(SEEDS[:2], out=tmp_path, **OPTIONS)
    assert list(map(numbers, outcomes)) == list(map(numbers, pair[1]))


class Killed(BaseException):
    """Stands for SIGKILL: no code handles this exception."""


def killed_at(monkeypatch, owner, name, call):
    """Raises Killed at the numbered call of a method."""
    method, calls = getattr(owner, name), itertools.count()

    def killed(*arguments):
        if next(calls) == call:
            raise Killed
        return method(*arguments)

    monkeypatch.setattr(owner, name, killed)


def train_two(out):
    """Trains the first two of three seeds; the third must not join them."""
    waiting = Queue(SEEDS, out, Budget(math.inf))
    while group := waiting.next_group(2):
        if SEEDS[2] in group:
            assert group == [SEEDS[2]]
            return
        waiting.train(group, checkpoint_seconds=0.0, **OPTIONS)


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(loop.Session, "save", call) for call in range(4)]
    + [(loop.Session, "finish", call) for call in range(2)],
)
def test_a_kill_amid_saves_or_results_keeps_the_group(
    pair, tmp_path, monkeypatch, owner, name, call
):
    """Two of three seeds train together; a kill must not change which two."""
    with monkeypatch.context() as patch:
        killed_at(patch, owner, name, call)
        with pytest.raises(Killed):
            train_two(tmp_path)
    train_two(tmp_path)
    for config, whole in zip(SEEDS, pair[1], strict=False):
        outcome = result.load(tmp_path / f"{run_name(config)}.json")
        assert numbers(outcome) == numbers(whole)
        assert outcome["together"] == [0, 1]


@pytest.mark.usefixtures("pair")  # which skips where JAX cannot train seeds together
def test_a_kill_after_a_seed_diverged_keeps_the_group(tmp_path, monkeypatch):
    """Seed 1 diverges in the third update; the kill comes right before or after its result."""
    whole = tmp_path / "whole"

    def diverging(patch):
        look, seeds = loop.Group._look, []

        def remembering(group, session, *rest):
            seeds.append(session.task.facts["seed"])
            return look(group, session, *rest)

        def divergence(values, first, skipped=0):
            return {"step": 2, "loss": math.nan} if (seeds[-1], first) == (1, 2) else None

        patch.setattr(loop.Group, "_look", remembering)
        patch.setattr(loop, "divergence", divergence)

    with monkeypatch.context() as patch:
        diverging(patch)
        train_two(whole)
    for call in range(2):
        out = tmp_path / str(call)
        with monkeypatch.context() as patch:
            diverging(patch)
            killed_at(patch, loop.Session, "finish", call)
            with pytest.raises(Killed):
                train_two(out)
        with monkeypatch.context() as patch:
            diverging(patch)
            train_two(out)
        for config in SEEDS[:2]:
            one, other = (result.load(o / f"{run_name(config)}.json") for o in (whole, out))
            assert one["status"] == other["status"] and one["curves"] == other["curves"]
            assert one["together"] == other["together"] and one.get("test") == other.get("test")


def test_diverged_seed_leaves_the_others_alone(pair, tmp_path, monkeypatch):
    diverged = {"step": 2, "loss": math.nan, "share": 0.5}
    asked = itertools.count()
    monkeypatch.setattr(loop, "divergence", lambda *_: diverged if next(asked) == 5 else None)
    first, second = train.run_seeds(SEEDS[:2], out=tmp_path, **OPTIONS)
    assert first["status"] == "finished" and second["status"] == "diverged"
    assert len(second["curves"]["train"]["step"]) == 3
    np.testing.assert_allclose(
        first["curves"]["train"]["loss"], pair[1][0]["curves"]["train"]["loss"], rtol=1e-4
    )


def test_groups_are_seeds_of_one_configuration_that_can_go_on_together(tmp_path, monkeypatch):
    other = replace(SEEDS[0], name="digits-softmax", margin=1)
    steps = {run_name(SEEDS[0]): {4, 6}, run_name(SEEDS[1]): {8}, run_name(SEEDS[2]): {2, 4}}
    monkeypatch.setattr(
        loop,
        "steps_in",
        lambda folder: steps.get(str(folder.parent.relative_to(tmp_path)), set()),
    )
    waiting = Queue([*SEEDS, other], tmp_path, Budget(math.inf))
    assert waiting.next_group(1) == SEEDS[:1]
    assert waiting.next_group(2) == waiting.next_group(5) == [SEEDS[0], SEEDS[2]]
    with pytest.raises(ValueError, match="stopped at different steps"):
        loop.common_step([tmp_path / run_name(config) for config in SEEDS[:2]])
    # A run that has begun does not wait for one that has not, except at step 0.
    for begun, together in (({0}, 3), ({0, 4}, 1), ({4}, 1), (set(), 3)):
        steps.clear()
        steps[run_name(SEEDS[0])] = begun
        assert waiting.next_group(3) == SEEDS[:together]


def test_reproduce_runs_what_is_missing(pair, tmp_path, capsys, monkeypatch):
    words = ["reproduce", "--only", "digits-m*", "--seeds", "2", "--toy", "--devices", "1"]
    words += ["--together", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "run 1 of 2: digits-m4/steps8" in said and "2 of 2 runs are done" in said
    for config in SEEDS[:2]:
        outcome = result.load(tmp_path / "toy" / f"{run_name(config)}.json")
        assert outcome["reduced"] and outcome["seed"] == config.seed
    monkeypatch.setattr(train, "run_seeds", None)
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
    def run_seeds(group, out, **_):
        if group[0].seed == 0:
            raise RuntimeError("out of memory\nand more")
        outcome = {"status": "diverged" if group[0].seed == 1 else "finished"}
        outcome |= {"seconds": {"wall": 9.0, "setup": 1.0, "compilation": 2.0}}
        return [outcome | {"config": group[0].to_json(), "together": [2]}]

    monkeypatch.setattr(train, "run_seeds", run_seeds)
    words = ["reproduce", "--only", "digits-m4", "fig2-m1", "--seeds", "3", "--out", str(tmp_path)]
    assert main(words) == 1
    said = capsys.readouterr().out
    assert "failed: digits-m4/seed0: out of memory\n" in said
    assert "failed: fig2-m1/seed0: out of memory\n" in said
    assert "diverged: digits-m4/seed1" in said and "4 of 6 runs are done" in said
    assert said.index("run 1 of 6: digits-m4/seed0") < said.index("run 4 of 6: fig2-m1/seed0")
    assert "run 3 of 6: digits-m4/seed2, about an unknown time" in said
    cost = queue.work(CONFIGS["fig2-m1"]) / queue.work(CONFIGS["digits-m4"])
    assert f"about {queue._shown(3 * (6 * cost + 3))} to go" in said


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
        (["--together", "0"], "together must be >= 1, got 0"),
    ],
)
def test_mistakes_end_with_2(words, message, capsys):
    assert main(["reproduce", *words]) == 2
    assert message in capsys.readouterr().err


def test_budget_stops_before_its_end(monkeypatch):
    times = iter([0, 1, 1, 21, 23, 24, 24])
    monkeypatch.setattr(queue.time, "perf_counter", lambda: next(times))
    budget = Budget(27)
    assert budget.allows(25)
    # Compiling took 20 and a dispatch 2: at 23 there is no time for two more dispatches.
    assert [budget.over() for _ in range(3)] == [False, False, True]
    assert not budget.allows(0)
    assert not Budget(9).allows(9)


def test_a_run_of_faces_beside_the_runs_is_left_alone(tmp_path):
    """`train-faces` writes into runs too, under any name, and has no configuration of ours."""
    device = result.provenance(1)["device"]
    seconds = {"wall": 3.0, "setup": 1.0, "compilation": 1.0}
    faces = {"kind": "faces", "status": "finished", "seed": 0, "device": device}
    result.save(tmp_path / "arc-seed5.json", faces | {"seconds": seconds, "config": {}})
    assert queue.finished_here(tmp_path) == []


def test_request_to_stop_ends_the_queue(tmp_path):
    asked = []
    budget = Budget(math.inf, lambda: bool(asked))
    waiting = Queue(SEEDS[:1], tmp_path, budget)
    group = waiting.next_group(1)
    asked.append("stop")
    waiting.train(group, **OPTIONS)
    assert waiting.next_group(1) == [] and not list(tmp_path.rglob("*seed*.json"))
    assert steps_in(tmp_path / run_name(SEEDS[0]) / "checkpoints") == {0}


@pytest.mark.slow
@pytest.mark.parametrize("together", [1, pytest.param(2, marks=pytest.mark.ci)])
def test_killed_queue_continues_to_the_same_bits(together, kept_programs, tmp_path):
    words = ["reproduce", "--only", "digits-m4", "--seeds", "2", "--toy", "--devices", "1"]
    words += ["--together", str(together), "--checkpoint-seconds", "0"]

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
