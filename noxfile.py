"""Checks that need an environment of their own: `uvx nox --list` names them.

`uvx nox -s "core(colab)" -- tests/lsoftmax_jax/test_margins.py` runs some tests in one of them.
Environments stay in .nox/. A session whose Python is missing is skipped, and nox says so.
"""

import json
import os
import shutil
import sqlite3
import subprocess
import time
import tomllib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_venv = "yes"
nox.options.sessions = []

CLONE = Path(__file__).resolve().parent
STACKS = [
    nox.param("3.13", "stacks/colab.txt", id="colab"),
    nox.param("3.11", "constraints.txt", id="pinned"),
    nox.param("3.12", "stacks/newest.txt", id="newest"),
    nox.param("3.13", "stacks/newest.txt", id="newest-3.13"),
]
NOTEBOOKS = sorted(path.stem for path in (CLONE / "experiments" / "notebooks").glob("*.ipynb"))


@nox.session
@nox.parametrize("python, pins", STACKS)
def tests(session: nox.Session, pins: str) -> None:
    """All tests on a stack. A run without arguments is recorded in stacks/results.json."""
    session.install("--constraint", pins, "--editable", ".[test]")
    counts = Path(session.create_tmp()) / "counts.xml"
    began = time.monotonic()
    session.run(*PYTEST, f"--junitxml={counts}", *session.posargs, success_codes=[0, 1])
    suite = next(ElementTree.parse(counts).iter("testsuite")).attrib
    failed = int(suite["failures"]) + int(suite["errors"])
    skipped = int(suite["skipped"])
    if not session.posargs:
        counted = {
            "tests": "all",
            "passed": int(suite["tests"]) - failed - skipped,
            "failed": failed,
            "skipped": skipped,
            "seconds": round(time.monotonic() - began),
        }
        record("results.json", "stack", session.name.removeprefix("tests")[1:-1], session, counted)
    if failed:
        session.error(f"{failed} tests failed")


PYTEST = ["pytest", "-n", "2", "--dist", "worksteal"]


@nox.session
@nox.parametrize("python, pins", STACKS)
def core(session: nox.Session, pins: str) -> None:
    """The library's own tests and doctests on a stack."""
    session.install("--constraint", pins, "--editable", ".[core]")
    session.run(*PYTEST, *(session.posargs or ["lsoftmax_jax", "tests/lsoftmax_jax"]))


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """All tests on the lowest versions that pyproject.toml declares."""
    session.install("--resolution", "lowest-direct", "--editable", ".[test]")
    session.run(*PYTEST, *session.posargs)


@nox.session(python="3.11")
def aot(session: nox.Session) -> None:
    """What XLA's compiler for TPUs makes of heads and steps; no TPU is needed."""
    session.install("--constraint", "constraints.txt", "--editable", ".[aot-tpu,core,experiments]")
    files = ["tests/experiments/benchmarks/test_compiled.py"]
    session.run("pytest", "-m", "aot", *(session.posargs or files))


@nox.session(python="3.11")
def gpu(session: nox.Session) -> None:
    """What XLA's compiler for GPUs makes of the heads: 5.6 GB to install, no GPU is needed."""
    session.install("--constraint", "constraints.txt", "--editable", ".[aot-gpu,experiments]")
    targets = session.posargs or ["--targets", "h100", "h200", "a100", "b200", "--no-steps"]
    session.run("python", "-m", "experiments", "compile", *targets)


@nox.session(python="3.11")
def parity(session: nox.Session) -> None:
    """Loss, gradients and weights beside those of PyTorch and Keras; the figures are a result."""
    # PyTorch asks for an older mpmath than constraints.txt has.
    session.install("--editable", ".[core,experiments,peers]")
    figures = "experiments/results/parity/pytorch-metric-learning.json"
    files = ["tests/lsoftmax_jax/test_peers.py", "tests/lsoftmax_jax/test_keras.py"]
    session.run("pytest", *(session.posargs or files), env={"PARITY_JSON": figures})


@nox.session(python="3.11")
def notebooks(session: nox.Session) -> None:
    """Executes the notebooks and keeps their outputs, which the documentation shows."""
    session.install("--constraint", "constraints.txt", "--editable", ".[test]")
    outputs = {}
    for name in session.posargs or NOTEBOOKS:
        outputs[f"{name}.ipynb"] = made = json.loads(execute(session, name, {}).read_text())
        for cell in made["cells"]:
            cell["metadata"].pop("execution", None)  # times of this machine
            if "outputs" in cell:  # a slow machine says on stderr how far it is
                cell["outputs"] = [o for o in cell["outputs"] if o.get("name") != "stderr"]
    # Not before the last has run: what they print of the clone's commit would say "changed".
    for file, made in outputs.items():
        text = json.dumps(made, indent=1, ensure_ascii=False)
        (CLONE / "experiments" / "notebooks" / file).write_text(f"{text}\n")


@nox.session(python="3.13", venv_params=["--seed"])
@nox.parametrize("name", NOTEBOOKS, ids=NOTEBOOKS)
def colab(session: nox.Session, name: str) -> None:
    """A notebook in what Colab's CPU runtime holds, from the cell that installs on.

    That cell installs this clone's last commit. It must not change a package of the runtime. The
    run is recorded in stacks/notebooks.json.
    """
    session.install("--requirement", "stacks/colab-runtime.txt")
    # The environment may hold this package from an earlier run.
    session.run("uv", "pip", "uninstall", "--quiet", "lsoftmax-jax", external=True)
    before = packages(session)
    address = tomllib.loads(Path("pyproject.toml").read_text())["project"]["urls"]["Repository"]
    here = {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{CLONE}.insteadOf",
        "GIT_CONFIG_VALUE_0": address,
    }
    executed = execute(session, name, here)
    after = packages(session)
    if changed := sorted(before.items() - after.items()):
        session.error(f"the notebook's installation changed {changed}")
    cells = json.loads(executed.read_text())["cells"]
    times = [cell["metadata"]["execution"] for cell in cells if cell["cell_type"] == "code"]
    begun = [datetime.fromisoformat(time["iopub.status.busy"]) for time in times]
    ended = datetime.fromisoformat(times[-1]["iopub.status.idle"])
    outcome = {
        "installed": {name: after[name] for name in after if name not in before},
        "installing": round((begun[1] - begun[0]).total_seconds()),
        "seconds": round((ended - begun[1]).total_seconds()),
    }
    record("notebooks.json", "notebook", name, session, outcome)


@nox.session(python="3.11")
def mutation(session: nox.Session) -> None:
    """Mutants of the last commit, in random order: `-- 3600` stops after as many seconds.

    A further run of the same commit continues. cosmic-ray.toml says what is changed and tested.
    """
    (seconds,) = session.posargs or ["3600"]
    commit = str(session.run("git", "rev-parse", "HEAD", external=True, silent=True)).strip()
    clone = Path(session.create_tmp()) / commit
    if not clone.exists():
        session.run("git", "clone", "--quiet", str(CLONE), str(clone), external=True)
    session.install("cosmic-ray>=8.4.6", "--constraint", "constraints.txt", "-e", f"{clone}[core]")
    session.chdir(clone)
    # A run that was stopped may have left its mutant in place.
    session.run("git", "checkout", "--quiet", "--", "lsoftmax_jax", external=True)
    mutants = "mutants.sqlite"
    if not Path(mutants).exists():
        session.run("cosmic-ray", "baseline", "cosmic-ray.toml")
        session.run("cosmic-ray", "init", "cosmic-ray.toml", mutants)
        session.run("cr-filter-operators", mutants, "cosmic-ray.toml")
    command = ["cosmic-ray", "exec", "cosmic-ray.toml", mutants]
    stopped = 124
    session.run("timeout", seconds, *command, external=True, success_codes=[0, stopped])
    session.run("cr-report", "--no-show-output", "--show-diff", "--surviving-only", mutants)
    # cr-rate would count the mutants that were left out as noticed ones.
    query = (
        "SELECT COUNT(*), SUM(test_outcome = 'SURVIVED') FROM work_results WHERE test_outcome > ''"
    )
    tried, survived = sqlite3.connect(mutants).execute(query).fetchone()
    session.log(f"{survived or 0} of {tried} mutants survived")


@nox.session(python=["3.11", "3.12"])
def pins(session: nox.Session) -> None:
    """Renews constraints.txt (Python 3.11) and stacks/newest.txt (3.12)."""
    file = {"3.11": "constraints.txt", "3.12": "stacks/newest.txt"}[str(session.python)]
    resolve = ["uv", "pip", "compile", "--quiet", "--upgrade", "--no-annotate", "--no-header"]
    session.run(*resolve, "--extra", "test", "pyproject.toml", "-o", file, external=True)


def packages(session: nox.Session) -> dict[str, str]:
    """The versions of an environment by package."""
    command = ["uv", "pip", "list", "--format", "json"]
    listed = session.run(*command, external=True, silent=True, stderr=subprocess.DEVNULL)
    return {package["name"]: package["version"] for package in json.loads(str(listed))}


def execute(session: nox.Session, name: str, environment: dict[str, str]) -> Path:
    """Executes a copy of a notebook in an empty folder; the copy has the outputs."""
    folder = Path(session.create_tmp()) / "content"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    copy = folder / f"{name}.ipynb"
    shutil.copy(CLONE / "experiments" / "notebooks" / copy.name, copy)
    # The notebook must not see data or settings of this machine's user.
    clean = {"HOME": str(folder), "TFDS_DATA_DIR": str(folder), "LFW_DIR": None, "PYTHONPATH": None}
    environment = {"JAX_PLATFORMS": "cpu", **clean, **environment}
    session.run("jupyter", "execute", "--inplace", "--timeout=900", str(copy), env=environment)
    return copy


def record(file: str, key: str, name: str, session: nox.Session, outcome: dict[str, Any]) -> None:
    """Replaces a row of a file in stacks/ by a new outcome, with its versions, date and commit."""
    path = CLONE / "stacks" / file
    rows = json.loads(path.read_text())
    commit = str(session.run("git", "rev-parse", "--short", "HEAD", external=True, silent=True))
    versions = packages(session)
    python = str(session.run("python", "--version", silent=True)).split()[-1]
    row = {
        key: name,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit.strip(),
        "load": round(os.getloadavg()[0], 1),
        "python": python,
        **{package: versions[package] for package in ("jax", "flax", "optax")},
        **outcome,
    }
    names = [row[key] for row in rows]
    place = names.index(name) if name in names else len(rows)
    rows[place : place + 1] = [row]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(rows, indent=1) + "\n")
    partial.replace(path)
