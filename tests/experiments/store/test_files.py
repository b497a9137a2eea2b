"""Files are complete or absent, folders have one owner, and lost files are noticed."""

import errno
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.store import claims, files
from experiments.store.checkpoints import Checkpoints
from experiments.store.claims import claim
from experiments.store.files import locked, replacing
from experiments.store.logs import Log
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


@pytest.fixture
def deadline():
    """Ends a test that would wait for ever, for example on a named pipe."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def write(file, content=b"new"):
    with replacing(file) as unfinished:
        unfinished.write(content)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, there):
    target, link = tmp_path / "real" / "README.md", tmp_path / "link.md"
    target.parent.mkdir()
    (tmp_path / "middle.md").symlink_to("real/README.md")
    link.symlink_to("middle.md")
    if there:
        target.write_text("old")
    write(link)
    assert link.is_symlink() and (tmp_path / "middle.md").is_symlink()
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o755])
def test_the_mode_stays(tmp_path, mode):
    file = tmp_path / "result.json"
    file.write_text("old")
    file.chmod(mode)
    write(file)
    assert file.read_bytes() == b"new" and stat.S_IMODE(file.stat().st_mode) == mode


def test_a_file_that_may_not_be_written_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    file.write_text("old")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anything
    with pytest.raises(PermissionError, match=r"result.json may not be written"):
        write(file)
    assert file.read_text() == "old"


def something_else(kind, file):
    match kind:
        case "a named pipe":
            os.mkfifo(file)
        case "a folder":
            file.mkdir()
        case "a socket":
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(file))


@pytest.mark.usefixtures("deadline")
@pytest.mark.parametrize("through", ["itself", "a link"])
@pytest.mark.parametrize("kind", ["a named pipe", "a folder", "a socket"])
def test_only_regular_files_are_replaced_or_read(kind, through, tmp_path):
    file = link = tmp_path / "it"
    something_else(kind, file)
    if through == "a link":
        link = tmp_path / "link"
        link.symlink_to(file)
    before = file.lstat().st_mode
    message = f"{link} must be a regular file, it is {kind}"
    for use in (write, files.read_text, lambda path: files.read_npz(path, ["x"])):
        with pytest.raises(ValueError, match=message):
            use(link)
    assert file.lstat().st_mode == before


@pytest.mark.usefixtures("deadline")
def test_a_log_or_a_checkpoint_of_pipes_is_refused(run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics.jsonl must be a regular file"):
        Log(run, 0)
    os.mkfifo(run / "checkpoints" / "4" / "more")
    with (
        Checkpoints(run / "checkpoints", writes=False) as checkpoints,
        pytest.raises(ValueError, match=r"step 4 cannot be read: .*more must be a regular file"),
    ):
        checkpoints.latest(state(0))


def test_what_a_process_of_another_host_is_writing_stays(tmp_path):
    theirs = tmp_path / f".result.json.{10**9}"  # a number that no process has here
    theirs.write_text("half a res")
    write(tmp_path / "result.json")
    assert theirs.exists()


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
def test_a_file_that_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a.npz must be an .npz of x; it is no .npz"):
        files.read_npz(tmp_path / "a.npz", ["x"])


def test_damage_anywhere_in_an_npz_is_named_or_harmless(tmp_path):
    """A flip of every 7th byte gives the right numbers, or an error that names the file."""
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
    """A folder with the log of six steps and the checkpoint of step 4."""
    log = Log(tmp_path, 0)
    for step in range(1, 7):
        log.write("train", step, {}, loss=1.0)
        if step == 4:
            with Checkpoints(tmp_path / "checkpoints") as checkpoints:
                checkpoints.add(state(4), {"log": log.mark()})
    log.close()
    return tmp_path


def continued(run):
    """The log, where its checkpoint was saved."""
    with Checkpoints(run / "checkpoints", writes=False) as checkpoints:
        found, note = checkpoints.latest(state(0))
    log = Log(run, int(found.step), note["log"])
    log.close()
    return log


def test_a_log_goes_on_where_its_checkpoint_was_saved(run):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st')  # torn by a kill
    assert [line["step"] for line in continued(run).lines] == [1, 2, 3, 4]
    assert (run / "metrics.jsonl").read_bytes().count(b"\n") == 4
    assert [line["step"] for line in continued(run).lines] == [1, 2, 3, 4]


CHANGES = {
    "doubled": lambda lines: [lines[0], *lines],
    "reordered": lambda lines: [lines[1], lines[0], *lines[2:]],
    "changed": lambda lines: [lines[0].replace(b"1.0", b"2.0", 1), *lines[1:]],
    "other bytes": lambda lines: [b"\0" * len(line) for line in lines],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_log_is_refused(run, change):
    file = run / "metrics.jsonl"
    file.write_bytes(b"".join(CHANGES[change](file.read_bytes().splitlines(keepends=True))))
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"metrics.jsonl is not as the run wrote it up to step 4;"):
        continued(run)
    assert file.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 3])
def test_a_cut_log_is_refused(run, kept):
    file = run / "metrics.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:kept]))
    with pytest.raises(ValueError, match=r"metrics.jsonl has lost some of its lines up to step 4;"):
        continued(run)


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


def test_leftovers_of_a_killed_checkpoint_are_removed(run):
    left = run / "checkpoints" / "5.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("")
    with Checkpoints(run / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 4
    assert not left.exists()


def test_reading_a_checkpoint_warns_of_nothing(run, caplog):
    with Checkpoints(run / "checkpoints", writes=False) as checkpoints:
        assert int(checkpoints.latest(state(0))[0].step) == 4
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


NO_ROOM = """
import resource, sys
from pathlib import Path
from experiments.store.logs import Events
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
events = Events(Path(sys.argv[1]) / "events", 1)
try:
    for step in range(1000):
        events.add({"train/loss": 1.0}, step)
except OSError as error:
    print(error)
try:
    events.close()
except OSError as error:
    print(error)
"""


def test_events_that_find_no_room_are_named(tmp_path):
    """A full disk gives neither a thread's traceback nor an endless wait."""
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = f"[Errno 27] File too large: '{tmp_path / 'events'}'"
    assert set(done.stdout.splitlines()) == {said}, done.stdout + done.stderr
    assert done.stderr == "" and done.returncode == 0


def test_reading_checkpoints_writes_nothing(tmp_path):
    with Checkpoints(tmp_path / "absent", writes=False) as checkpoints:
        assert checkpoints.latest(state(0)) is None
    assert not (tmp_path / "absent").exists()
