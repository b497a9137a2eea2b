"""What holds for the repository as a whole."""

import ast
import graphlib
import importlib.metadata
import inspect
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import lsoftmax_jax
from lsoftmax_jax import interop, sampled, sharded, training

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    version = lsoftmax_jax.__version__
    assert importlib.metadata.version("lsoftmax-jax") == version
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)[1] == version


def imported(path: Path, package: str) -> set[str]:
    """The modules of a package that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith(f"{package}.")}


@pytest.mark.parametrize("package", ["lsoftmax_jax", "experiments"])
def test_imports_run_one_way(package):
    files = {f"{package}.{path.stem}": path for path in (ROOT / package).glob("*.py")}
    imports = {name: imported(path, package) & files.keys() for name, path in files.items()}
    assert any(imports.values())
    graphlib.TopologicalSorter(imports).prepare()  # raises CycleError, which names the cycle


def test_the_library_imports_no_experiment():
    for path in (ROOT / "lsoftmax_jax").rglob("*.py"):
        assert not imported(path, "experiments"), path.name


# Public to the heads, not to users.
OF_THE_HEADS = {sharded.placed_columns, sharded.real_logits}
FUNCTIONS = {
    function
    for module in (lsoftmax_jax, interop, sampled, sharded, training)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_") and module in (lsoftmax_jax, inspect.getmodule(function))
} - OF_THE_HEADS


@pytest.mark.parametrize("function", sorted(FUNCTIONS, key=str), ids=lambda f: f.__name__)
def test_docstrings_say_what_goes_in_what_comes_out_and_show_it(function):
    for part in ("\n    Args:\n", "\n    Returns:\n", "\n    Example:\n      >>> "):
        assert part in function.__doc__, part.strip()
    described = function.__doc__.partition("Args:")[2]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^      .*\b{name}\b", described, re.M), name


def test_constraints_pin_every_dependency_within_its_declared_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(
        Requirement, PROJECT["dependencies"] + extras["experiments"] + extras["test"]
    ):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_no_tracked_file_names_a_machine():
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    checkout = re.escape(f"{ROOT}/")
    machine = re.compile(
        rf"(?<![\w.])({checkout}|/(home|root|Users)/)|python[h]osted|pypi\.org/simple"
    )
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file():
            text = path.read_text(errors="ignore")
            found += [f"{name}: {match[0]}" for match in machine.finditer(text)]
    assert found == []
