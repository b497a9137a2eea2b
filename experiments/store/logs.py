"""A run's log: JSON lines and TensorBoard events, cut back to the checkpoint on a resume."""

import hashlib
import json
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from experiments.store.files import naming, regular

Mark = tuple[int, str]
"""The size of a log in bytes, and their SHA-256."""
LAST_BYTES = 2**14  # many times a line
START: Mark = 0, hashlib.sha256().hexdigest()


class Log:
    """Appends lines to ``metrics.jsonl`` and scalars to ``events/``.

    Args:
      folder: of the run.
      step: the step the run continues at.
      mark: `mark` of the log at that step; what was written later is dropped.
      writes: whether files are written at all; of several processes only one may write.

    Raises:
      ValueError: naming the log, if it is shorter than at the mark, or another one.
    """

    def __init__(self, folder: Path, step: int, mark: Mark = START, writes: bool = True) -> None:
        self._writes, self._path = writes, folder / "metrics.jsonl"
        there = self._path.read_bytes() if regular(self._path) else b""
        self._size, digest = mark
        kept = there[: self._size]
        self._digest = hashlib.sha256(kept)
        cure = f"up to step {step}; put it back, or remove {folder} to train from the start"
        if len(kept) < self._size:
            raise ValueError(f"{self._path} has lost some of its lines {cure}")
        if self._digest.hexdigest() != digest:
            raise ValueError(f"{self._path} is not as the run wrote it {cure}")
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in kept.splitlines()]
        if writes:
            self._file = self._path.open("ab")
            self._file.truncate(self._size)
            self._events = Events(folder / "events", step + 1)

    def close(self) -> None:
        if self._writes:
            with naming(self._path):
                self._file.close()
            self._events.close()

    def mark(self) -> Mark:
        """The size and the digest of what is written so far, and is on the disk from now on."""
        if self._writes:
            with naming(self._path):
                os.fsync(self._file.fileno())
        return self._size, self._digest.hexdigest()

    def write(self, kind: str, step: int, seconds: dict[str, float], **values: float) -> None:
        """One line of a kind, "train" or "test"; a value that is not finite becomes null."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        line = {"kind": kind, "step": step, **finite(rounded), "seconds": seconds}
        written = json.dumps(line).encode() + b"\n"
        self.lines.append(line)
        self._digest.update(written)
        self._size += len(written)
        if self._writes:
            with naming(self._path):
                self._file.write(written)
                self._file.flush()
            self._events.add({f"{kind}/{name}": value for name, value in values.items()}, step)

    def curve(self, kind: str, points: int = 200) -> dict[str, list[Any]]:
        """Lists by name of every value of a kind, thinned to about so many points."""
        lines = [line for line in self.lines if line["kind"] == kind]
        if not lines:
            return {}
        every = math.ceil(len(lines) / points)
        kept = [*lines[:-1:every], lines[-1]]
        # Older logs say how many seeds advanced in one program.
        names = [name for name in lines[0] if name not in ("kind", "seconds", "together")]
        return {name: [line[name] for line in kept] for name in names}


def last_step(folder: Path) -> int:
    """The step of the last line in the log of a run that may be at work.

    It is 0 if there is none, or a damaged log, which the run itself refuses.
    """
    path = folder / "metrics.jsonl"
    try:
        if not (found := regular(path)):
            return 0
        with path.open("rb") as file:
            file.seek(max(0, found.st_size - LAST_BYTES))
            # What follows the last newline is still being written.
            whole = file.read().rpartition(b"\n")[0]
        return int(json.loads(whole.splitlines()[-1])["step"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


class Events:
    """TensorBoard's events of one session.

    tensorboardX's own SummaryWriter writes from a thread. On a full disk that thread ends, and the
    next scalars wait for it for ever (test_events_that_find_no_room_are_named).

    Args:
      folder: of the events; every session adds a file.
      step: TensorBoard hides what earlier sessions wrote from this step on.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        with naming(folder):
            name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
            self._file = RecordWriter(str(folder / name))
            self._write(file_version="brain.Event:2")
            self._write(step=step, session_log=SessionLog(status="START"))

    def add(self, values: dict[str, float], step: int) -> None:
        """Scalars by name; those that are not finite are left out."""
        with naming(self._folder):
            for name, value in values.items():
                if math.isfinite(value):
                    self._write(step=step, summary=scalar(name, value))
            self._file.flush()

    def _write(self, **event: Any) -> None:
        self._file.write(Event(wall_time=time.time(), **event).SerializeToString())

    def close(self) -> None:
        # Not EventsWriter, which leaves the file open on a full disk: Python 3.13 then says so.
        with naming(self._folder):
            try:
                self._file.flush()
            finally:
                self._file.close()


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity and no NaN: they become null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
