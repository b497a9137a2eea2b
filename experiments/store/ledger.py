"""What a run has saved, noted after each checkpoint, so that what gets lost later is noticed.

A run without a checkpoint starts from zero: right after a kill before the first one, wrong where
somebody removed it. The note tells these apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.store import results

NAME = "saved"  # no .json: it is no result


def note(folder: Path, step: int, lines: int) -> None:
    """A checkpoint of a step is whole, and so many lines of the log go with it."""
    results.save(folder / NAME, {"step": step, "lines": lines})


def check(folder: Path, latest: int | None, lines: Sequence[dict[str, Any]]) -> None:
    """Compares the note with what is there.

    Args:
      folder: of the run.
      latest: the step of its last checkpoint; None if there is none.
      lines: of its log.

    Raises:
      ValueError: naming the folder or the log, if what was saved is there no more.
    """
    if not (folder / NAME).exists():
        return
    noted = results.load(folder / NAME, ("step", "lines"))
    step, cure = noted["step"], f"put it back, or remove {folder} to train from the start"
    if latest is None or latest < step:
        raise ValueError(f"{folder} has lost its checkpoint of step {step}; {cure}")
    there = sum(line["step"] <= step for line in lines)
    if there < noted["lines"]:
        raise ValueError(
            f"{folder / 'metrics.jsonl'} has lost {noted['lines'] - there} of its "
            f"{noted['lines']} lines up to step {step}; {cure}"
        )


def rewound(folder: Path, step: int, lines: Sequence[dict[str, Any]]) -> None:
    """Notes that the run goes back to a step, before later checkpoints are deleted."""
    if (folder / NAME).exists() and results.load(folder / NAME, ("step",))["step"] > step:
        note(folder, step, sum(line["step"] <= step for line in lines))
