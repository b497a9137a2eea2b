"""A finished run's JSON file, and where its numbers came from."""

import base64
import json
import math
import os
import platform
import re
import subprocess
import zlib
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

import lsoftmax_jax
from experiments.store.files import read_text, replacing


def save(file: Path, result: dict[str, Any]) -> None:
    """Writes a result, one key a line; the file is whole or not there."""
    lines = ",\n".join(
        f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in result.items()
    )
    with replacing(file) as unfinished:
        unfinished.write(f"{{\n{lines}\n}}\n".encode())


def load(file: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """The result in a file.

    Args:
      file: of a result.
      keys: that it must have, not null.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file, if it holds no JSON object, or one without the keys.
    """
    try:
        saved = json.loads(read_text(file), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} must hold a result as JSON: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} must hold a result, a JSON object, got {saved!r:.40}")
    if missing := [key for key in keys if saved.get(key) is None]:
        raise ValueError(f"{file} must hold a result with {', '.join(missing)}")
    return saved


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def load_run(file: Path, keys: Collection[str] = ()) -> dict[str, Any]:
    """The result of a run, as `load`.

    Raises:
      ValueError: naming the file, also if what it says of the run cannot be: another status or
        seed, an error that is no percentage, a time that is no number.
    """
    return _checked(file, load(file, ("status", "seed", *keys)))


def _checked(file: Path, run: dict[str, Any]) -> dict[str, Any]:
    named, splits = re.search(r"seed(\d+)$", file.stem), ("train", "test")
    wrong = {
        "status": run["status"] not in ("finished", "diverged"),
        "seed": type(run.get("seed")) is not int
        or bool(named and run.get("kind", "run") == "run" and int(named[1]) != run["seed"]),
        "seconds": not _are_numbers(run.get("seconds", {})),
        "curves": not isinstance(run.get("curves", {}), dict),
        **{split: split in run and not _is_measured(run[split]) for split in splits},
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ValueError(f"{file} must hold a result of a run, its {name} is {run.get(name)!r:.60}")
    return run


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def _are_numbers(found: Any) -> bool:
    return isinstance(found, dict) and all(map(is_number, found.values()))


def _is_measured(split: Any) -> bool:
    """Whether a split's measures have an error in percent, and nothing that is not finite."""
    if not isinstance(split, dict) or not is_number(split.get("error")):
        return False
    numbers = {n: v for n, v in split.items() if not isinstance(v, list)}
    return _are_numbers(numbers) and 0 <= split["error"] <= 100


def load_all(out: Path) -> list[dict[str, Any]]:
    """Every result in a folder and in the folders of its cells, with its ``file`` under it."""
    files = sorted([*out.glob("*.json"), *out.glob("*/*.json")])
    found = []
    for file in files:
        saved = load(file)
        if "status" in saved:  # only results of runs have it
            _checked(file, saved)
        found.append(saved | {"file": file.relative_to(out).as_posix()})
    return found


def packed_labels(predicted: ArrayLike, true: ArrayLike) -> dict[str, str]:
    """A result's ``predictions``: labels as base64 of zlib of little-endian uint16."""
    named = {"labels": np.asarray(predicted), "truth": np.asarray(true)}
    packed = {n: zlib.compress(of.astype("<u2").tobytes(), 9) for n, of in named.items()}
    return {name: base64.b64encode(of).decode() for name, of in packed.items()}


def labels_of(result: dict[str, Any]) -> tuple[NDArray[np.uint16], NDArray[np.uint16]] | None:
    """Predicted and true labels of the test images, in the images' order; None in older results.

    Raises:
      ValueError: the result's ``predictions`` are damaged.
    """
    packed = result.get("predictions")
    if packed is None:
        return None
    try:
        predicted, true = (
            np.frombuffer(zlib.decompress(base64.b64decode(packed[name])), "<u2")
            for name in ("labels", "truth")
        )
    except (ValueError, TypeError, KeyError, zlib.error) as error:
        raise ValueError(f"predictions must be packed labels: {error}") from error
    if len(predicted) != len(true):
        raise ValueError(f"predictions must be pairs, got {len(predicted)} for {len(true)} labels")
    return predicted, true


def provenance(devices: int) -> dict[str, Any]:
    """Commit, versions, XLA_FLAGS and hardware of a run on so many devices of all processes."""
    packages = ("jax", "jaxlib", "flax", "optax")
    kind = jax.devices()[0].device_kind
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "lsoftmax_jax": lsoftmax_jax.__version__}
        | {package: version(package) for package in packages},
        # A compiler's flags change the last bits of every number, and the times.
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": f"{kind}, {os.cpu_count()} cores" if kind == "cpu" else kind,
        "devices": devices,
        "processes": jax.process_count(),
    }


def _commit() -> str | None:
    """The clone's commit, with a mark if tracked files differ from it; None outside a clone.

    Results are no part of what ran: a run of many writes the first before it begins the second.
    A copy on another machine is told its commit by ``EXPERIMENTS_COMMIT``.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    if told := os.environ.get("EXPERIMENTS_COMMIT"):
        return told
    try:
        code = ":(top)", ":(top,exclude)experiments/results"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
