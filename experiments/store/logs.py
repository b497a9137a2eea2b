"""A run's log: JSON lines and TensorBoard events, cut back to the checkpoint on a resume."""

import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from experiments.store.files import naming, regular, replacing


@dataclass
class Seconds:
    """Where a run's time went, over all its sessions."""

    wall: float = 0.0
    setup: float = 0.0
    compilation: float = 0.0
    training: float = 0.0
    evaluation: float = 0.0

    @property
    def outside(self) -> float:
        """The part of the time in the training loop that neither trained nor evaluated."""
        loop = self.wall - self.setup - self.compilation
        return (loop - self.training - self.evaluation) / loop if loop > 0 else 0.0


class Log:
    """Appends lines to ``metrics.jsonl`` and scalars to ``events/``.

    Args:
      folder: of the run.
      step: the step the run continues at; lines of later steps are dropped.
      writes: whether files are written at all; of several processes only one may write.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True) -> None:
        self.lines = [line for line in read(folder) if line["step"] <= step]
        self._digest = hashlib.sha256(b"".join(map(_encode, self.lines)))
        self._writes, self._path = writes, folder / "metrics.jsonl"
        if writes:
            with replacing(self._path) as file:
                file.writelines(map(_encode, self.lines))
            self._file = self._path.open("ab")
            self._events = Events(folder / "events", step + 1)

    def close(self) -> None:
        if self._writes:
            with naming(self._path):
                self._file.close()
            self._events.close()

    @property
    def seconds(self) -> Seconds:
        """The time spent until the last line."""
        return Seconds(**self.lines[-1]["seconds"]) if self.lines else Seconds()

    @property
    def digest(self) -> str:
        """`digest` of all lines."""
        return self._digest.hexdigest()

    def write(self, kind: str, step: int, seconds: Seconds, **values: float) -> None:
        """One line of a kind, "train" or "test"; a value that is not finite becomes null."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        line = {"kind": kind, "step": step, **finite(rounded), "seconds": asdict(seconds)}
        self.lines.append(line)
        self._digest.update(_encode(line))
        if self._writes:
            with naming(self._path):
                self._file.write(_encode(line))
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
            self._writer = EventsWriter(str(folder / "events"))
            self._writer.write_event(Event(step=step, session_log=SessionLog(status="START")))

    def add(self, values: dict[str, float], step: int) -> None:
        """Scalars by name; those that are not finite are left out."""
        now = time.time()
        with naming(self._folder):
            for name, value in values.items():
                if math.isfinite(value):
                    summary = scalar(name, value)
                    self._writer.write_event(Event(wall_time=now, step=step, summary=summary))
            self._writer.flush()

    def close(self) -> None:
        with naming(self._folder):
            self._writer.close()


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity and no NaN: they become null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def digest(lines: Iterable[dict[str, Any]]) -> str:
    """A fingerprint of lines and their order."""
    return hashlib.sha256(b"".join(map(_encode, lines))).hexdigest()


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; none if there is no log.

    Raises:
      ValueError: naming the first line that no run writes there.
    """
    file = folder / "metrics.jsonl"
    if regular(file) is None:
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # after the last newline, at most a torn line
    found, last = [], {"train": 0, "test": 0}
    for number, line in enumerate(lines, 1):
        decoded = _decode(line)
        if decoded is None or not max(last.values()) <= decoded["step"] > last[decoded["kind"]]:
            raise ValueError(
                f"{file}, line {number}: expected a line of a run's log, of a step after those "
                f"before it, got {line[:40]!r}"
            )
        last[decoded["kind"]] = decoded["step"]
        found.append(decoded)
    return found


def _decode(line: bytes) -> dict[str, Any] | None:
    """A line of a log; None if it is something else."""
    try:
        decoded = json.loads(line)
        match decoded:
            case {"kind": "train" | "test", "step": int(), "seconds": dict(seconds), **values}:
                numbers = [*seconds.values(), *(v for v in values.values() if v is not None)]
                if asdict(Seconds()).keys() == seconds.keys() and all(map(is_number, numbers)):
                    return dict(decoded)
    except (ValueError, RecursionError):
        pass
    return None


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)
