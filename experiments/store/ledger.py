"""A note of what a run has saved, written after each checkpoint, to notice a later loss or change.

A run without a checkpoint starts from zero. That is right after a kill before the first checkpoint,
and wrong where somebody removed the checkpoint. The note tells these apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.store import logs, results

NAME = "saved"  # without .json, because it is no result


def note(folder: Path, step: int, lines: int, digest: str) -> None:
    """Notes that the checkpoint of a step is whole, and which lines of the log belong to it."""
    results.save(folder / NAME, {"step": step, "lines": lines, "digest": digest})


def check(folder: Path, latest: int | None, lines: Sequence[dict[str, Any]]) -> None:
    """Compares the note with what is there.

    Args:
      folder: of the run.
      latest: the step of its last checkpoint; None if there is none.
      lines: of its log.

    Raises:
      ValueError: naming the folder or the log, if what was saved is lost or changed.
    """
    if (noted := _noted(folder)) is None:
        return
    step, cure = noted["step"], f"put it back, or remove {folder} to train from the start"
    if latest is None or latest < step:
        raise ValueError(f"{folder} has lost its checkpoint of step {step}; {cure}")
    there = [line for line in lines if line["step"] <= step]
    log, count = folder / "metrics.jsonl", noted["lines"]
    if len(there) < count:
        lost = count - len(there)
        raise ValueError(f"{log} has lost {lost} of its {count} lines up to step {step}; {cure}")
    if logs.digest(there) != noted["digest"]:
        raise ValueError(f"{log} is not as the run wrote it up to step {step}; {cure}")


def _noted(folder: Path) -> dict[str, Any] | None:
    """The note of a run's folder; None if nothing was saved yet."""
    if not (file := folder / NAME).exists():
        return None
    noted = results.load(file, ("step", "lines", "digest"))
    if not all(type(noted[name]) is int for name in ("step", "lines")):
        raise ValueError(f"{file} must hold numbers as step and lines, got {noted}")
    return noted
