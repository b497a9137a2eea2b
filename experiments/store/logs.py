"""A run's log: JSON lines and TensorBoard events, cut back to the checkpoint on a resume."""

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from experiments.store.files import naming, replacing


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
      step: the step the run continues at; lines of a later one are dropped.
      writes: whether files are written at all; of several processes only one may.
    """

    def __init__(self, folder: Path, step: int, writes: bool = True) -> None:
        self.lines = [line for line in read(folder) if line["step"] <= step]
        self._writes, self._path = writes, folder / "metrics.jsonl"
        if writes:
            with replacing(self._path) as file:
                file.writelines(map(_encode, self.lines))
            self._file = self._path.open("ab")
            self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def close(self) -> None:
        if self._writes:
            self._file.close()
            self._events.close()

    @property
    def seconds(self) -> Seconds:
        """The time spent until the last line."""
        return Seconds(**self.lines[-1]["seconds"]) if self.lines else Seconds()

    def write(self, kind: str, step: int, seconds: Seconds, **values: float) -> None:
        """One line of a kind, "train" or "test"; a value that is not finite becomes null."""
        rounded = {name: float(f"{value:.6g}") for name, value in values.items()}
        line = {"kind": kind, "step": step, **finite(rounded), "seconds": asdict(seconds)}
        self.lines.append(line)
        if self._writes:
            with naming(self._path):
                self._file.write(_encode(line))
                self._file.flush()
            with naming(Path(self._events.logdir)):
                for name, value in values.items():
                    if math.isfinite(value):
                        self._events.add_scalar(f"{kind}/{name}", value, step)

    def curve(self, kind: str, points: int = 200) -> dict[str, list[Any]]:
        """Lists by name of every value of a kind, thinned to about so many points."""
        lines = [line for line in self.lines if line["kind"] == kind]
        if not lines:
            return {}
        every = math.ceil(len(lines) / points)
        kept = [*lines[:-1:every], lines[-1]]
        names = [name for name in lines[0] if name not in ("kind", "seconds")]
        return {name: [line[name] for line in kept] for name in names}


def finite(values: dict[str, float]) -> dict[str, float | None]:
    """JSON knows no infinity and no NaN: they become null."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line).encode() + b"\n"


def read(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's log; none if there is no log.

    Raises:
      ValueError: naming the line that is none of a log.
    """
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    *lines, _ = file.read_bytes().split(b"\n")  # after the last newline, at most a torn line
    return [_decode(file, number, line) for number, line in enumerate(lines, 1)]


def _decode(file: Path, number: int, line: bytes) -> dict[str, Any]:
    with suppress(ValueError, AttributeError):
        decoded = json.loads(line)
        if {"kind", "step", "seconds"} <= decoded.keys():
            return dict(decoded)
    raise ValueError(f"{file}, line {number}: expected a line of a run's log, got {line[:40]!r}")
