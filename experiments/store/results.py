"""A finished run's JSON file, and where its numbers came from."""

import json
import os
import platform
import subprocess
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

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
      ValueError: naming the file, if it holds no JSON object, or one without the keys.
    """
    try:
        saved = json.loads(read_text(file))
    except ValueError as error:
        raise ValueError(f"{file} must hold a result as JSON: {error}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{file} must hold a result, a JSON object, got {saved!r:.40}")
    if missing := [key for key in keys if saved.get(key) is None]:
        raise ValueError(f"{file} must hold a result with {', '.join(missing)}")
    return saved


def load_all(out: Path) -> list[dict[str, Any]]:
    """Every result in a folder and in the folders of its cells, with its ``file`` under it."""
    files = sorted([*out.glob("*.json"), *out.glob("*/*.json")])
    return [load(file) | {"file": file.relative_to(out).as_posix()} for file in files]


def provenance(devices: int) -> dict[str, Any]:
    """Commit, versions and hardware of a run on so many devices of all processes together."""
    packages = ("jax", "jaxlib", "flax", "optax")
    kind = jax.devices()[0].device_kind
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), "lsoftmax_jax": lsoftmax_jax.__version__}
        | {package: version(package) for package in packages},
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
