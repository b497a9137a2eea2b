"""A killed and continued run ends with the bits of an unbroken run, for every source."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import chex
import orbax.checkpoint as ocp
import pytest

from experiments.faces.stand_in import write_digits

ROOT = Path(__file__).parents[3]
STEPS = "12"
# The patterns are as shallow as possible: a checkpoint's folders change while they are listed.
LOGS = {"train": "*/*/metrics.jsonl", "train-faces": "metrics.jsonl"}
SOURCES = {
    "images in memory": ["train", "digits-m4", "--batch", "16", "--width", "0.125"],
    "streamed faces": ["train-faces", "--batch", "16", "--width", "0.02", "--size", "32", "32"],
}


def start(words, out, environment):
    """Starts a process that trains, with a checkpoint after every update."""
    command = [sys.executable, "-m", "experiments", *words, "--steps", STEPS, "--out", str(out)]
    return subprocess.Popen(
        [*command, "--checkpoint-seconds", "0"],
        cwd=ROOT,
        env=os.environ | environment | {"JAX_NUM_CPU_DEVICES": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def the(found):
    (only,) = found
    return only


def outcome_of(out, logs):
    """The curves and the last checkpoint, which must not depend on interruptions."""
    folder = the(out.glob(logs)).parent
    outcome = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    return outcome["status"], outcome["curves"], outcome.get("test"), state


# For images in memory, CI kills a queue of runs instead, in test_queue.py.
@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [pytest.param(s, marks=[pytest.mark.ci] * (s != "images in memory")) for s in SOURCES],
)
def test_killed_run_continues_to_the_same_bits(source, kept_programs, tmp_path):
    words, logs = SOURCES[source], LOGS[SOURCES[source][0]]
    if words[0] == "train-faces":
        write_digits(tmp_path / "faces", images=8)
        words = [*words, "--faces", str(tmp_path / "faces")]
    outs = [tmp_path / "whole" / "run", tmp_path / "broken" / "run"]
    with start(words, outs[0], kept_programs) as process:
        assert process.wait() == 0, process.stderr.read()
    with start(words, outs[1], kept_programs) as process:
        while sum(log.read_bytes().count(b"\n") for log in outs[1].glob(logs)) < 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.kill()
    folder = the(outs[1].glob(logs)).parent
    assert not folder.with_name(f"{folder.name}.json").exists()
    with start(words, outs[1], kept_programs) as process:
        assert process.wait() == 0, process.stderr.read()
    whole, broken = (outcome_of(out, logs) for out in outs)
    assert whole[0] == "finished" and len(whole[1]["train"]["loss"]) == int(STEPS)
    assert broken[:3] == whole[:3]
    chex.assert_trees_all_equal(broken[3], whole[3])
