"""A note of what a folder trains, compared with what a later session would train there."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.store import results
from experiments.store.checkpoints import steps_in

NAME = "claim"  # without .json, because it is no result


def claim(folder: Path, settings: dict[str, Any], devices: int, writes: bool) -> None:
    """Notes the settings in a folder, or compares them with those that are there.

    Args:
      folder: of a run.
      settings: all that decides the run's numbers, and nothing else; as JSON.
      devices: how many train it, for the record of how it began.
      writes: whether this process may write.

    Raises:
      ValueError: naming the folder and what differs, if something else is trained there; or if
        it holds checkpoints of unknown origin.
    """
    wanted = json.loads(json.dumps(settings))
    if not (folder / NAME).exists():
        if steps_in(folder / "checkpoints"):
            raise ValueError(
                f"{folder} holds checkpoints, and its {NAME}, which says of what, is lost; put it "
                "back, or remove the folder"
            )
        if writes:
            begun = {"command": command_line(), **results.provenance(devices)}
            results.save(folder / NAME, {"settings": wanted, "begun": begun})
    elif differences := differing(claimed(folder)["settings"], wanted):
        raise ValueError(
            f"{folder} holds another run ({', '.join(differences)}); choose another folder, or "
            "remove this one"
        )


def claimed(folder: Path) -> dict[str, Any]:
    """A run's ``settings``, and how it was ``begun``.

    Raises:
      FileNotFoundError: if the folder holds no run.
    """
    if not (folder / NAME).exists():
        raise FileNotFoundError(f"no run in {folder}")
    there = results.load(folder / NAME, ("settings", "begun"))
    if not all(isinstance(there[name], dict) for name in ("settings", "begun")):
        raise ValueError(f"{folder / NAME} must hold the settings of a run and how it was begun")
    return there


def differing(there: Any, wanted: Any, name: str = "") -> list[str]:
    """The differences of two settings, each as NAME old -> new."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        return [
            difference
            for key in [*there, *(key for key in wanted if key not in there)]
            for difference in differing(there.get(key), wanted.get(key), f"{name}.{key}".strip("."))
        ]
    if there == wanted:
        return []
    short = all(len(str(value)) < 60 for value in (there, wanted))
    return [f"{name} {there} -> {wanted}" if short else f"other {name}"]


def command_line() -> str:
    """The command of this process, as typed."""
    return shlex.join(["python", "-m", "experiments", *sys.argv[1:]])
