"""The heading of a benchmark's result, and the earlier result that it continues."""

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.store.results import load, provenance

OUT = Path("runs") / "bench"


def heading(kind: str, command: str, devices: int = 1) -> dict[str, Any]:
    """What was run, when, and on which hardware."""
    return {
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **provenance(devices),
    }


def stamped(name: str) -> str:
    """The name of a new file: results of other minutes stay."""
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M}.json"


def repeating(benchmark: str, **flags: Any) -> str:
    """The command that repeats a benchmark, without flags that are None."""
    words = ["python -m experiments bench", benchmark]
    for name, value in flags.items():
        if value is not None:
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def earlier(file: Path, result: dict[str, Any], same: Collection[str], holds: str) -> Any:
    """The saved result that this one goes on from; None if there is none or it is of another run.

    Args:
      file: of the result.
      result: as far as it is known before anything is measured.
      same: what both must have alike.
      holds: what the saved one must have.
    """
    if not file.exists():
        return None
    saved = load(file, (holds, "versions"))
    return saved if all(saved.get(key) == result[key] for key in same) else None


def appended(file: Path, result: dict[str, Any], same: Collection[str], holds: str) -> list[Any]:
    """The entries that a saved result of the same commit and versions has; none if there is none.

    Raises:
      ValueError: if the file holds another result, which must not be lost.
    """
    alike = ("kind", "commit", "versions", "device", *same)
    saved = earlier(file, result, alike, holds)
    if saved is None and file.exists():
        raise ValueError(f"{file} holds another result; name another file, or move this one")
    return list(saved[holds]) if saved else []
