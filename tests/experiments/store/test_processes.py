"""Processes over loopback give the numbers of one, stop together, and end when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.paper.cells import CONFIGS, command_of, run_name
from experiments.run import train
from experiments.store import processes
from experiments.store.checkpoints import steps_in
from experiments.store.logs import Log
from experiments.store.processes import Meeting
from lsoftmax_jax import devices

ROOT = Path(__file__).parents[3]
CONFIG = replace(CONFIGS["digits-m4"], steps=24, batch=16, width=1 / 8, examples=100)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "host:1"], "belong together, got coordinator host:1, processes None"),
        (["--processes", "2", "--process", "0"], "belong together, got coordinator None"),
        (["--cluster", "--process", "1"], "--cluster finds coordinator"),
        (["--cluster", "--heartbeat-seconds", "0"], "heartbeat-seconds must be >= 1, got 0"),
        (
            ["--coordinator", "host", "--processes", "2", "--process", "0"],
            "coordinator must be HOST:PORT, port 1 to 65535, got 'host'",
        ),
        (
            ["--coordinator", "host:1", "--processes", "2", "--process", "2"],
            "process must be in 0..1, got 2",
        ),
    ],
)
def test_half_a_meeting_is_refused(flags, message, tmp_path, capsys):
    assert main(["train", "digits-m4", "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_no_cluster_is_refused(monkeypatch):
    def nothing(*_, **keywords):
        assert keywords["heartbeat_timeout_seconds"] == keywords["shutdown_timeout_seconds"] == 7
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nothing)
    with (
        pytest.raises(ValueError, match=r"--cluster found none .coordinator_address"),
        processes.joined(Meeting(cluster=True, heartbeat_seconds=7)),
    ):
        pass


def test_a_port_in_use_is_refused_before_anybody_waits(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as used:
        where = f"127.0.0.1:{used.getsockname()[1]}"
        words = ["--coordinator", where, "--processes", "2", "--process", "0"]
        assert main(["train", "digits-m4", "--out", str(tmp_path), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: coordinator must have a free port, {where} cannot be bound")
    assert "waiting" not in said


def test_devices_must_reach_into_every_process(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="devices must reach into all 2 processes, got 1 of"):
        devices.data_mesh(1)


def test_processes_must_have_the_same_data(monkeypatch):
    processes.check_same("mine", "data")
    gather = processes.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda mine: np.stack([mine, mine + 1]))
    with pytest.raises(ValueError, match="all processes need the same data"):
        processes.check_same("mine", "data")


def test_values_of_several_lengths_are_gathered(monkeypatch):
    assert processes.gathered({"next": 3, "losses": [0.5]}) == [{"next": 3, "losses": [0.5]}]
    texts = np.frombuffer(b"12\0\0" + b"1234", np.uint8).reshape(2, 4)
    of_two = iter([np.int32([2, 4]), texts])
    gather = processes.multihost_utils
    monkeypatch.setattr(gather, "process_allgather", lambda mine: next(of_two))
    assert processes.gathered(12) == [12, 1234]


def test_other_processes_write_no_log(tmp_path):
    log = Log(tmp_path / "run", 0, writes=False)
    log.write("train", 1, {"wall": 1.0}, loss=2.0)
    log.close()
    assert log.curve("train") == {"step": [1], "loss": [2.0]} and not (tmp_path / "run").exists()


@contextmanager
def pair(out, environment):
    """Two processes with two devices each that train CONFIG; killed at the end if necessary."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*command_of(CONFIG).split()[1:], "--out", str(out), "--checkpoint-seconds", "0"]
    words += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--heartbeat-seconds", "10"]
    both = [
        subprocess.Popen(
            [sys.executable, *words, "--process", str(process)],
            cwd=ROOT,
            env=os.environ | environment | {"JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def until_step(step, out, both):
    log = out / run_name(CONFIG) / "metrics.jsonl"
    while not log.exists() or log.read_bytes().count(b"\n") < step:
        assert [process.poll() for process in both] == [None, None]
        time.sleep(0.01)


def assert_numbers_of_one(outcome, one):
    """Compares up to float32 rounding, which grows over some steps."""
    for kind in ("train", "test"):
        assert outcome["curves"][kind]["step"] == one["curves"][kind]["step"]
        for name in ("loss", "feature_norm"):
            np.testing.assert_allclose(
                outcome["curves"][kind][name], one["curves"][kind][name], rtol=1e-3
            )
        np.testing.assert_allclose(outcome[kind]["loss"], one[kind]["loss"], rtol=1e-3)
    np.testing.assert_allclose(outcome["test"]["kernel"], one["test"]["kernel"], atol=2e-3)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same run in this process, on as many devices as the two processes have together."""
    return train.run(CONFIG, out=tmp_path_factory.mktemp("one"), devices=4)


@pytest.mark.slow
@pytest.mark.ci
def test_two_processes_stop_together_and_end_with_the_numbers_of_one(one, kept_programs, tmp_path):
    with pair(tmp_path, kept_programs) as both:
        until_step(3, tmp_path, both)
        both[1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [130, 130], said
    assert "stopping after this dispatch" in said[1][1]
    (stopped,) = steps_in(tmp_path / run_name(CONFIG) / "checkpoints")
    assert f"stopped at update {stopped};" in said[0][0]
    assert "stopped" not in said[1][0]

    with pair(tmp_path, kept_programs) as both:
        said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "last iterate" in said[0][0]
    assert "last iterate" not in said[1][0]
    outcome = json.loads((tmp_path / f"{run_name(CONFIG)}.json").read_text())
    assert (outcome["processes"], outcome["devices"]) == (2, 4)
    assert (one["processes"], one["devices"]) == (1, 4)
    assert_numbers_of_one(outcome, one)
    assert len(list((tmp_path / run_name(CONFIG) / "events").iterdir())) == 2  # one per start


# Not in CI: `make crash-test` runs it.
@pytest.mark.slow
def test_a_lost_process_ends_the_other_and_the_run_goes_on_elsewhere(one, kept_programs, tmp_path):
    with pair(tmp_path, kept_programs) as both:
        until_step(3, tmp_path, both)
        both[1].kill()
        _, said = both[0].communicate(timeout=60)
    assert both[0].returncode not in (0, 2)
    assert "most likely because another one ended" in said or "another task died" in said
    assert not (tmp_path / f"{run_name(CONFIG)}.json").exists()
    assert min(steps_in(tmp_path / run_name(CONFIG) / "checkpoints")) >= 1
    outcome = train.run(CONFIG, out=tmp_path, devices=1)
    assert (outcome["processes"], outcome["devices"]) == (1, 1)
    assert_numbers_of_one(outcome, one)
