"""Files are whole or not there, folders have one owner, and what was saved is missed."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.store import claims, files, ledger, logs
from experiments.store.checkpoints import Checkpoints
from experiments.store.claims import claim
from experiments.store.files import locked, replacing
from experiments.store.logs import Log, Seconds
from lsoftmax_jax.training import State

ROOT = Path(__file__).parents[3]


def test_nothing_is_written_through_a_link(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "result.json"
    victim.write_text("keep me")
    (tmp_path / f".result.json.{os.getpid()}").symlink_to(victim)
    with replacing(file) as unfinished:
        unfinished.write(b"new")
    assert victim.read_text() == "keep me" and file.read_bytes() == b"new"
    assert not file.is_symlink()


def test_leftovers_of_killed_processes_go(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", "pass"])
    killed.wait()
    left = tmp_path / f".metrics.jsonl.{killed.pid}"
    left.write_text("half a lo")
    mine = tmp_path / f".metrics.jsonl.{os.getppid()}"
    mine.write_text("of a process that lives")
    with replacing(tmp_path / "metrics.jsonl") as file:
        file.write(b"{}\n")
    assert not left.exists() and mine.exists()


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")

    def half_written():
        with replacing(file) as unfinished:
            unfinished.write(b"ne")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device.*result.json"):
        half_written()
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_folder_has_one_owner_until_it_is_killed(tmp_path):
    holds = (
        "import sys, time; from pathlib import Path; from experiments.store.files import locked; "
        "lock = locked(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by another process"):
            locked(tmp_path)
        other.send_signal(signal.SIGKILL)
    locked(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"PK", b"text", bytes(1000)])
def test_a_file_of_something_else_is_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npz must be an .npz of x; it is no .npz"):
        files.read_npz(tmp_path / "a.npz", ["x"])


def test_damage_anywhere_in_an_npz_is_named_or_harmless(tmp_path):
    """Every 7th byte flipped: the right numbers, or one error that names the file."""
    file, x = tmp_path / "a.npz", np.arange(12.0)
    np.savez(file, x=x)
    whole, refused = file.read_bytes(), []
    for at in range(0, len(whole), 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            np.testing.assert_array_equal(files.read_npz(file, ["x"])["x"], x)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(message.startswith(str(file)) for message in refused)


def state(step):
    return State(jnp.int32(step), {"w": jnp.ones(2)}, {}, ())


@pytest.fixture
def run(tmp_path):
    """A folder with the log and the checkpoint of step 4."""
    log = Log(tmp_path, 0)
    for step in range(1, 7):
        log.write("train", step, Seconds(), loss=1.0)
        if step == 4:
            with Checkpoints(tmp_path / "checkpoints") as checkpoints:
                checkpoints.add(state(4))
            ledger.note(tmp_path, 4, len(log.lines))
    log.close()
    return tmp_path


def test_all_there_is_right(run):
    ledger.check(run, 4, logs.read(run))
    ledger.check(run, 6, logs.read(run))  # killed between a checkpoint and its note


@pytest.mark.parametrize("latest", [None, 2])
def test_a_lost_checkpoint_is_refused(run, latest):
    with pytest.raises(ValueError, match="has lost its checkpoint of step 4; put it back"):
        ledger.check(run, latest, logs.read(run))


@pytest.mark.parametrize("kept", [0, 3])
def test_a_cut_log_is_refused(run, kept):
    file = run / "metrics.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:kept]))
    with pytest.raises(ValueError, match=f"metrics.jsonl has lost {4 - kept} of its 4 lines"):
        ledger.check(run, 4, logs.read(run))


def test_going_back_is_noted(run):
    ledger.rewound(run, 2, logs.read(run))
    ledger.check(run, 2, logs.read(run)[:2])


def test_checkpoints_without_a_claim_are_refused(run):
    with pytest.raises(ValueError, match="holds checkpoints, and its claim"):
        claim(run, {"a": 1}, 1, writes=True)
    assert not (run / claims.NAME).exists()


def test_a_damaged_checkpoint_is_named(run):
    for file in (run / "checkpoints" / "4").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with (
        Checkpoints(run / "checkpoints", writes=False) as checkpoints,
        pytest.raises(ValueError, match="the checkpoint of step 4 cannot be read"),
    ):
        checkpoints.latest(state(0))


def test_who_reads_checkpoints_writes_nothing(tmp_path):
    with Checkpoints(tmp_path / "absent", writes=False) as checkpoints:
        assert checkpoints.latest(state(0)) is None
    assert not (tmp_path / "absent").exists()
