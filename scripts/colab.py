"""Runs the notebooks as Colab would: in what its runtime holds, the cell that installs included.

PYTHONPATH=. python scripts/colab.py               all of them; what came out into stacks/
PYTHONPATH=. python scripts/colab.py tour faces    two of them
PYTHONPATH=. python scripts/colab.py --table       what was run when, as a table

The repository that a notebook installs from is this clone, as it is committed. A notebook fails
where its installation changes a package that the runtime came with.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scripts.stacks import CLONE, PAGE, interpreter, versions

NOTEBOOKS = CLONE / "experiments" / "notebooks"
NAMES = ("tour", "devices", "reproduce", "faces")
RUNTIME = CLONE / "stacks" / "colab-runtime.txt"
RESULTS = CLONE / "stacks" / "notebooks.json"
PYTHON = "3.13"


def runtime(python: str, folder: Path) -> Path:
    """The folder of an environment with what Colab's runtime holds, made where there is none."""
    if not (folder / "complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        install = [str(folder / "bin" / "python"), "-m", "pip", "install", "-qq"]
        subprocess.run([*install, "-r", str(RUNTIME)], check=True)
        (folder / "complete").touch()
    return folder


def packages(python: Path) -> dict[str, str]:
    asked = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    return {package["name"]: package["version"] for package in json.loads(asked.stdout)}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """The packages that are no longer what they were.

    >>> changed({"jax": "0.7.2", "flax": "0.11.2"}, {"jax": "0.8.0", "flax": "0.11.2", "tyro": "1"})
    ['jax 0.7.2 became 0.8.0']
    """
    lost = {name: after.get(name, "nothing") for name in before if after.get(name) != before[name]}
    return [f"{name} {before[name]} became {version}" for name, version in lost.items()]


def run(name: str, came_with: Path, folder: Path) -> dict[str, Any]:
    """Executes a notebook in a copy of the runtime's environment, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    work = folder / "content"
    work.mkdir(parents=True)
    # Hard links: pip replaces a file, it does not write into one.
    shutil.copytree(
        came_with, folder / "python", symlinks=True, copy_function=os.link, dirs_exist_ok=True
    )
    inside = folder / "python" / "bin" / "python"
    before = packages(inside)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=CLONE, capture_output=True, text=True
    )
    url = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    here = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{CLONE}.insteadOf",
        "GIT_CONFIG_VALUE_0": url,
        "JAX_PLATFORMS": "cpu",
    }
    command = [str(inside), str(CLONE / "scripts" / "execute.py"), str(NOTEBOOKS / f"{name}.ipynb")]
    # The data of this machine's user are not Colab's.
    kept = {k: v for k, v in os.environ.items() if k not in ("LFW_DIR", "PYTHONPATH")}
    environment = kept | here | {"HOME": str(folder), "TFDS_DATA_DIR": str(folder)}
    executed = subprocess.run(command, cwd=work, env=environment, stdout=subprocess.PIPE)
    if executed.returncode:
        raise SystemExit(f"{name}: a cell failed")
    after = packages(inside)
    if moved := changed(before, after):
        raise SystemExit(f"{name}: the installation changed what was there: {', '.join(moved)}")
    return {
        "notebook": name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        **versions(inside),
        "installed": {name: after[name] for name in after if name not in before},
        **json.loads(executed.stdout),
    }


def record(outcome: dict[str, Any]) -> None:
    """Takes the place of the same notebook's earlier run, on the page too."""
    before = table()
    kept = json.loads(RESULTS.read_text())
    kept = [row for row in kept if row["notebook"] != outcome["notebook"]]
    kept = sorted([*kept, outcome], key=lambda row: NAMES.index(row["notebook"]))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(PAGE.read_text().replace(before, table()))


def table() -> str:
    """The recorded runs in Markdown."""
    lines = [
        "| notebook | python | jax | flax | installing, s | the rest, s | of processors, s | run |",
        "|---" * 8 + "|",
    ]
    for row in json.loads(RESULTS.read_text()):
        cells = [row["notebook"], row["python"], row["jax"], row["flax"]]
        cells += [str(row[key]) for key in ("installing", "seconds", "processor_seconds")]
        lines.append("| " + " | ".join([*cells, f"{row['date']}, {row['commit']}"]) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks as Colab would.")
    parser.add_argument("notebook", nargs="*", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--table", action="store_true", help="only print what was run when")
    parser.add_argument("--folder", type=Path, default=CLONE / ".venv-stacks")
    given = parser.parse_args()
    if given.table:
        print(table())
        return 0
    if unknown := set(given.notebook) - set(NAMES):
        parser.error(f"notebook must be of {list(NAMES)}, got {sorted(unknown)}")
    python = interpreter(PYTHON)
    if python is None:
        print(f"skipped, there is no Python {PYTHON} on this machine")
        return 0
    came_with = runtime(python, given.folder.absolute() / "colab-runtime")
    for name in given.notebook or NAMES:
        outcome = run(name, came_with, given.folder.absolute() / f"colab-{name}")
        print(f"{name}: {outcome}", flush=True)
        record(outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main())
