"""Runs the tests on the stacks that the library is declared for, each in an environment of its own.

python scripts/stacks.py                  every test on every stack; stacks/ and CONTRIBUTING.md
                                          keep what came out
python scripts/stacks.py --core colab     the tests of the library alone, on one stack
python scripts/stacks.py --core --brief   without those that no version of JAX decides
python scripts/stacks.py --table          what was run when, as a table

A stack whose Python is missing is skipped, and said to be.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

CLONE = Path(__file__).resolve().parents[1]
RESULTS = CLONE / "stacks" / "results.json"
PAGE = CLONE / "CONTRIBUTING.md"
# With its doctests; what it needs is the extra `core`.
CORE = ["lsoftmax_jax", "tests/lsoftmax_jax"]
# Of these, what formulas, the words of an error or types decide, and no version of JAX: CI runs
# them on the pinned one alone. Placement, transforms, training, export, memory, precision, dtypes
# and the values of the loss stay.
SETTLED = [
    f"tests/lsoftmax_jax/test_{name}.py"
    for name in (
        "bad_calls",
        "loss_degenerate",
        "loss_mistakes",
        "margin_family",
        "margins",
        "schedule",
        "typing",
    )
]


class Stack(NamedTuple):
    python: str
    pins: str  # a constraints file


STACKS = {
    "colab": Stack("3.13", "stacks/colab.txt"),
    "pinned": Stack("3.11", "constraints.txt"),
    "newest": Stack("3.12", "stacks/newest.txt"),
    "newest-3.13": Stack("3.13", "stacks/newest.txt"),
}


def interpreter(version: str) -> str | None:
    """A Python of that version: on the path, or among pyenv's; None where there is none."""
    found = [shutil.which(f"python{version}"), sys.executable]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    question = "import sys; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, found):
        # A shim of pyenv's is there for a version that is not switched on.
        asked = subprocess.run(
            [python, "-c", question], capture_output=True, text=True, check=False
        )
        if asked.stdout.strip() == version:
            return python
    return None


def install(python: str, folder: Path, extra: str, pins: str) -> Path:
    """The interpreter of an environment with the clone, the extra and the stack's versions."""
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    # uv, where it is on the path, takes seconds for what pip takes minutes for.
    uv = shutil.which("uv")
    if uv is not None:
        installer = [uv, "pip", "install", "-q", "--python", str(inside)]
    else:
        installer = [str(inside), "-m", "pip", "install", "-qq"]
    wanted = ["--constraint", pins, "--editable", f".[{extra}]"]
    subprocess.run([*installer, *wanted], cwd=CLONE, check=True)
    return inside


def versions(python: Path) -> dict[str, str]:
    question = (
        "import importlib.metadata as m, json, platform; "
        "print(json.dumps({'python': platform.python_version()}"
        " | {n: m.version(n) for n in ('jax', 'flax', 'optax')}))"
    )
    asked = subprocess.run([str(python), "-c", question], capture_output=True, check=True)
    return dict(json.loads(asked.stdout))


def run(name: str, inside: Path, folder: Path, core: bool, arguments: list[str]) -> dict[str, Any]:
    """Runs the tests on a stack that is installed, and counts."""
    counted = folder / f"{name}.xml"
    # Of an earlier run.
    counted.unlink(missing_ok=True)
    began = time.monotonic()
    command = [str(inside), "-m", "pytest", "-n", "2", "--dist", "worksteal"]
    command += [f"--junitxml={counted}", *arguments]
    subprocess.run([*command, *(CORE if core else [])], cwd=CLONE, check=False)
    seconds = round(time.monotonic() - began)
    if not counted.exists():
        raise SystemExit(f"{name}: pytest did not get as far as running tests")
    suite = next(ElementTree.parse(counted).iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=CLONE, capture_output=True, text=True
    )
    return {
        "stack": name,
        "tests": "the library's" if core else "all",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.stdout.strip() or None,
        **versions(inside),
        "passed": int(suite["tests"]) - failed - skipped,
        "failed": failed,
        "skipped": skipped,
        "seconds": seconds,
    }


def record(outcome: dict[str, Any]) -> None:
    """Takes the place of the same stack's earlier run of the same tests, on the page too."""
    before = table()
    kept = json.loads(RESULTS.read_text())
    same = ("stack", "tests")
    kept = [row for row in kept if any(row[key] != outcome[key] for key in same)]
    order = list(STACKS)
    kept = sorted([*kept, outcome], key=lambda row: (order.index(row["stack"]), row["tests"]))
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    PAGE.write_text(PAGE.read_text().replace(before, table()))


def table() -> str:
    """The recorded runs in Markdown."""
    shown = ("stack", "python", "jax", "flax", "tests", "passed", "failed", "skipped", "seconds")
    rows = json.loads(RESULTS.read_text())
    lines = ["| " + " | ".join((*shown, "run")) + " |", "|---" * (len(shown) + 1) + "|"]
    for row in rows:
        cells = [str(row[key]) for key in shown] + [f"{row['date']}, {row['commit']}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests on the declared stacks.")
    parser.add_argument("stack", nargs="*", help=f"of {', '.join(STACKS)}; all by default")
    parser.add_argument("--core", action="store_true", help="the tests of the library alone")
    parser.add_argument("--brief", action="store_true", help="not those no version of JAX decides")
    parser.add_argument("--install", action="store_true", help="make the environments, run nothing")
    parser.add_argument("--table", action="store_true", help="only print what was run when")
    parser.add_argument("--no-record", action="store_true", help="leave stacks/results.json alone")
    parser.add_argument("--folder", type=Path, default=CLONE / ".venv-stacks")
    parser.add_argument("--pytest", default="", help="further arguments, in one string")
    given = parser.parse_args()
    if given.table:
        print(table())
        return 0
    unknown = set(given.stack) - set(STACKS)
    if unknown:
        parser.error(f"stack must be of {list(STACKS)}, got {sorted(unknown)}")
    arguments = given.pytest.split()
    if given.brief:
        arguments += [f"--ignore={file}" for file in SETTLED]
    failed = 0
    for name in given.stack or STACKS:
        version = STACKS[name].python
        python = interpreter(version)
        if python is None:
            print(f"{name}: skipped, there is no Python {version} on this machine", flush=True)
            continue
        print(f"{name}: Python {version}, {STACKS[name].pins}", flush=True)
        extra = "core" if given.core else "test"
        inside = install(python, given.folder / name, extra, STACKS[name].pins)
        if given.install:
            continue
        outcome = run(name, inside, given.folder, given.core, arguments)
        print(f"{name}: {outcome}", flush=True)
        failed += outcome["failed"]
        if not (given.no_record or arguments):
            record(outcome)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
