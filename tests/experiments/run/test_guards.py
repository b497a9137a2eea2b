"""Other data, lost files and updates that are not finite are noticed."""

import hashlib
import itertools
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.paper.cells import CONFIGS, run_name
from experiments.run import loop, train
from experiments.store.files import locked
from lsoftmax_jax import devices

pytestmark = pytest.mark.usefixtures("shared_programs")

CONFIG = replace(CONFIGS["mnist-m4"], steps=8, batch=8, width=1 / 16, examples=16)
FLAGS = ["--steps", "8", "--batch", "8", "--width", "0.0625", "--examples", "16", "--devices", "1"]


def write(folder, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        f"{split}_{what}": array
        for split in ("train", "test")
        for what, array in (
            ("images", rng.integers(0, 256, (16, 28, 28, 1), dtype=np.uint8)),
            ("labels", rng.integers(0, 10, 16)),
        )
    }
    np.savez(folder / "mnist.npz", **arrays)


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory):
    """A run stopped at step 4."""
    out = tmp_path_factory.mktemp("stopped")
    write(out)
    asked = itertools.count()
    keywords = {"devices": 1, "dispatch": 1, "evaluations": 0, "checkpoint_seconds": 0.0}

    def stop():
        return next(asked) == 4

    assert train.run(CONFIG, data=out, out=out, stop=stop, **keywords) is None
    return out


@pytest.fixture
def stopped(stopped_once, tmp_path):
    shutil.copytree(stopped_once, tmp_path / "out")
    return tmp_path / "out"


NO_NOTE = {"custom_metadata": {}}


def metadata(out):
    """The file in which Orbax keeps a checkpoint's note."""
    return out / run_name(CONFIG) / "checkpoints" / "4" / "_CHECKPOINT_METADATA"


def test_a_run_says_where_it_continues(stopped, capsys):
    words = ["train", "mnist-m4", *FLAGS, "--data", str(stopped), "--out", str(stopped)]
    assert main(words) == 0
    assert f"{run_name(CONFIG)} continues at update 4\n" in capsys.readouterr().out


def go_on(out, capsys):
    code = main(["train", "mnist-m4", *FLAGS, "--data", str(out), "--out", str(out)])
    return code, capsys.readouterr().err


def refused(out, capsys, message):
    before = {f: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}
    code, said = go_on(out, capsys)
    assert code == 2 and message in said
    after = {f: f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}
    assert {f for f in before if f.name != "lock"} <= set(after)
    assert all(after[f] == content for f, content in before.items() if f in after)


def test_a_run_does_not_continue_on_other_data(stopped, capsys):
    write(stopped, seed=1)
    refused(stopped, capsys, "holds another run (data ")


def test_a_run_with_a_lost_checkpoint_does_not_start_again(stopped, capsys):
    shutil.rmtree(stopped / run_name(CONFIG) / "checkpoints")
    refused(stopped, capsys, "has lost its checkpoint; put it back, or remove")


def test_a_checkpoint_of_an_earlier_version_is_no_new_run(stopped, capsys):
    metadata(stopped).write_text(json.dumps(json.loads(metadata(stopped).read_text()) | NO_NOTE))
    refused(stopped, capsys, "is a run of an earlier version; end it there, or remove")


@pytest.mark.parametrize("kept", [0, 2])
def test_a_cut_log_is_noticed(stopped, capsys, kept):
    log = stopped / run_name(CONFIG) / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:kept]))
    refused(stopped, capsys, "metrics.jsonl has lost")


def doubled(lines):
    return [*lines[:3], *lines[2:]]


def reordered(lines):
    return [lines[0], lines[2], lines[1], *lines[3:]]


def changed(lines):
    return [lines[0].replace(b'"loss": ', b'"loss": 1'), *lines[1:]]


@pytest.mark.parametrize("change", [doubled, reordered, changed])
def test_a_changed_log_is_noticed(stopped, capsys, change):
    log = stopped / run_name(CONFIG) / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(change(lines)))
    refused(stopped, capsys, "metrics.jsonl")


def test_a_lost_claim_is_noticed(stopped, capsys):
    (stopped / run_name(CONFIG) / "claim").unlink()
    refused(stopped, capsys, "its claim, which says of what, is lost")


def test_a_run_has_one_process(stopped, capsys):
    lock = locked(stopped / run_name(CONFIG))
    refused(stopped, capsys, "is in use by another process")
    lock.release()
    assert go_on(stopped, capsys)[0] == 0
    assert json.loads((stopped / f"{run_name(CONFIG)}.json").read_text())["skipped"] == 0


def test_the_note_follows_the_checkpoint(stopped):
    noted = json.loads(metadata(stopped).read_text())["custom_metadata"]
    log = (stopped / run_name(CONFIG) / "metrics.jsonl").read_bytes()
    mark = [len(log), hashlib.sha256(log).hexdigest()]
    assert noted == {"log": mark, "positions": [None]}


class Spoiled:
    """Batches whose images at some steps are not finite."""

    def __init__(self, source, steps):
        self._source, self._steps = source, steps
        self.position, self.restore = source.position, source.restore

    def feed(self, step):
        fed = self._source.feed(step)
        spoiled = jnp.full_like(fed.mean, jnp.nan)
        return fed._replace(mean=spoiled) if step in self._steps else fed


def spoil(monkeypatch, steps, kind=Spoiled):
    prepare = train.prepare

    def spoiled(*arguments):
        task = prepare(*arguments)
        return task._replace(source=kind(task.source, steps))

    monkeypatch.setattr(train, "prepare", spoiled)


class Interrupted(Spoiled):
    """Batches that press Ctrl-C `times` times at some steps."""

    times = 1

    def feed(self, step):
        for _ in range(self.times if step in self._steps else 0):
            signal.raise_signal(signal.SIGINT)
        return self._source.feed(step)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupts_before_training_starts(stopped, capsys, monkeypatch, times):
    prepare = train.prepare

    def interrupted(*arguments):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return prepare(*arguments)

    monkeypatch.setattr(train, "prepare", interrupted)
    code, said = go_on(stopped, capsys)
    assert code == 130 and "stopping after this dispatch" in said
    assert ("interrupted; the same command continues" in said) == (times == 2)
    assert "Traceback" not in said
    monkeypatch.setattr(train, "prepare", prepare)
    assert go_on(stopped, capsys)[0] == 0


def test_two_quick_interrupts_amid_training(stopped, capsys, monkeypatch):
    monkeypatch.setattr(Interrupted, "times", 2)
    with monkeypatch.context() as amid:
        spoil(amid, {6}, Interrupted)
        code, said = go_on(stopped, capsys)
    assert code == 130
    assert said.splitlines()[-1].startswith("interrupted; the same command continues")
    assert go_on(stopped, capsys)[0] == 0
    outcome = json.loads((stopped / f"{run_name(CONFIG)}.json").read_text())
    assert outcome["status"] == "finished" and outcome["skipped"] == 0


def run(out, **keywords):
    keywords |= {"devices": 1, "dispatch": 1, "evaluations": 0}
    return train.run(CONFIG, data=out, out=out, **keywords)


def test_updates_that_are_not_finite_are_skipped_and_named(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    spoil(monkeypatch, {2, 5})
    outcome = run(tmp_path)
    assert outcome["status"] == "finished" and outcome["skipped"] == 2
    assert outcome["curves"]["train"]["skipped"] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert outcome["curves"]["train"]["loss"][2] is None
    assert np.isfinite(outcome["test"]["loss"])
    said = capsys.readouterr().out
    for part in ("skipped update 2,", "skipped update 5,", "loss nan", "margin ", "|kernel| "):
        assert part in said


def test_the_last_allowed_skipped_update_ends_the_run(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    spoil(monkeypatch, {1, 3, 6})
    outcome = run(tmp_path)
    assert outcome["status"] == "diverged" and outcome["diverged"]["step"] == 6
    assert outcome["skipped"] == loop.SKIPPED_LIMIT == 3
    assert "diverged at update 6" in capsys.readouterr().out


def test_skipped_updates_of_earlier_sessions_count(tmp_path, monkeypatch):
    write(tmp_path)
    spoil(monkeypatch, {1, 2, 5})
    asked = itertools.count()
    assert run(tmp_path, stop=lambda: next(asked) == 4) is None
    outcome = run(tmp_path)
    assert outcome["status"] == "diverged" and outcome["diverged"]["step"] == 5


def test_a_margin_that_takes_no_part_is_reported_once(tmp_path, monkeypatch, capsys):
    write(tmp_path)
    prepare = train.prepare

    def idle(*arguments):
        task = prepare(*arguments)

        def values(metrics):
            return task.values(metrics) | {"share": np.float32([1 / 201])}

        return task._replace(margin_from=3, values=values)

    monkeypatch.setattr(train, "prepare", idle)
    outcome = run(tmp_path)
    assert outcome["curves"]["train"]["share"] == [0.00497512] * 8
    assert "lam" not in outcome["curves"]["train"]
    said = capsys.readouterr().out
    assert said.count("the margin takes no part") == 1
    assert "margin 0.498%" in said and "--pace schedule" in said


def test_the_margin_is_expected_after_a_tenth_of_a_paced_run():
    folder, mesh, steps = None, devices.data_mesh(1), 200
    for name, pace, wanted in (
        ("digits-m4", "lead", 20),
        ("digits-m4", "schedule", None),
        ("digits-softmax", "lead", None),
    ):
        config = replace(CONFIGS[name], pace=pace, steps=steps, batch=16, width=1 / 8)
        task = train.prepare(config, folder, Path("runs"), mesh, 1)
        assert task.margin_from == wanted


@pytest.mark.filterwarnings("error")
def test_a_run_whose_last_iterate_is_not_finite_has_diverged(tmp_path, capsys):
    """The last update is finite, but the loss with the new parameters is not."""
    write(tmp_path)
    config = replace(CONFIG, steps=1, learning_rate=1e30, drops=())
    words = ["train", "mnist-m4", *FLAGS, "--steps", "1", "--learning-rate", "1e30", "--drops"]
    assert main([*words, "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "diverged at update 1: loss" in said.out and "error" not in said.err
    outcome = json.loads((tmp_path / f"{run_name(config)}.json").read_text())
    assert outcome["status"] == "diverged" and outcome["diverged"]["step"] == 1
    assert "test" not in outcome
    json.dumps(outcome, allow_nan=False)


@pytest.mark.parametrize(
    ("scale", "cure"),
    [
        (None, ("A higher λ is the cure", "--lam.minimum")),
        (8.0, ("turn away from the columns", "--pace lead", "--init")),
    ],
)
def test_a_collapse_is_reported_once(scale, cure, tmp_path, monkeypatch, capsys):
    write(tmp_path)
    prepare = train.prepare

    def collapsing(*arguments):
        task = prepare(*arguments)
        task.facts["config"]["scale"] = scale
        steps = itertools.count()

        def values(metrics):
            return task.values(metrics) | {"collapsing": np.float32([next(steps) >= 3])}

        return task._replace(values=values)

    monkeypatch.setattr(train, "prepare", collapsing)
    outcome = run(tmp_path)
    assert outcome["curves"]["train"]["collapsing"] == [0, 0, 0, 1, 1, 1, 1, 1]
    said = capsys.readouterr().out
    assert said.count("is collapsing at update") == 1
    for part in ("is collapsing at update 3: loss", *cure):
        assert part in said
