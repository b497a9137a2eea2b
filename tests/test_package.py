"""Properties of the whole repository."""

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
from lsoftmax_jax import devices, interop, reference, sampled, training, verification

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_one_version_everywhere():
    version = lsoftmax_jax.__version__
    assert importlib.metadata.version("lsoftmax-jax") == version
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1] == version
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[:2] == ["Unreleased", version]


# A file of the library imports files of earlier lines only, and no other file of its own line.
ORDER = (
    {"reference", "_checks"},
    {"margins", "schedule", "verification"},
    {"_core", "_core.spec"},
    {"_core.mesh"},
    {"_core.tiles"},
    {"_core.target"},
    {"_core.blocks"},
    {"_core.run"},
    {"losses", "sampled", "sgd"},
    {"_calls"},
    {"nnx", "linen"},
    {"training"},
    {"devices"},
    {"interop"},
)
# The rooms (folders) of the experiments, and the rooms that each may import.
ROOMS = {
    "store": set(),
    "paper": {"store"},
    "run": {"store", "paper"},
    "faces": {"store", "paper", "run"},
    "benchmarks": {"store", "paper", "run", "faces"},
    "report": {"store", "paper", "run", "faces", "benchmarks"},
}
# These files may import every room.
OUTSIDE = {"quickstart", "__main__", "notebooks"}
FLAX = {"nnx", "linen", "training"}


def modules(package: str) -> dict[str, Path]:
    """The files of a package by dotted name."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path) -> set[str]:
    """The modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return names


MODULES = {name: path for p in ("lsoftmax_jax", "experiments") for name, path in modules(p).items()}
IMPORTS = {name: imported(path) for name, path in MODULES.items()}


def room(module: str) -> str:
    """The folder or file directly under the package that holds a module."""
    return module.split(".")[1]


def test_imports_make_no_circle():
    inside = {name: names & MODULES.keys() - {name} for name, names in IMPORTS.items()}
    assert len(inside) > 50 and any(inside.values())
    graphlib.TopologicalSorter(inside).prepare()  # a CycleError names the cycle


def test_the_library_is_imported_in_its_order():
    level = {f"lsoftmax_jax.{name}": number for number, line in enumerate(ORDER) for name in line}
    files = {name for name in MODULES if name.startswith("lsoftmax_jax.")}
    assert files == level.keys()
    for name in files:
        for other in IMPORTS[name] & files:
            assert level[other] < level[name], f"{name} imports {other}"
        assert not any(n.startswith("experiments") for n in IMPORTS[name]), name
        assert "lsoftmax_jax" not in IMPORTS[name], f"{name} imports the root package"


def test_a_room_knows_only_the_rooms_it_may():
    files = {name for name in MODULES if name.startswith("experiments.")}
    assert {room(name) for name in files} == ROOMS.keys() | OUTSIDE
    for name in files:
        if room(name) in ROOMS:
            known = {room(other) for other in IMPORTS[name] & files}
            assert known <= ROOMS[room(name)] | {room(name)}, f"{name} imports {known}"


PRIVATE = re.compile(r"lsoftmax_jax\.(?:\w+\.)*_[a-z]")


@pytest.mark.parametrize("folder", ["experiments", "docs", "scripts", "examples"])
def test_nobody_outside_imports_a_private_file(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not [name for name in imported(path) if PRIVATE.match(name)], path


def test_flax_is_imported_by_its_modules_alone():
    for name, names in IMPORTS.items():
        if name.startswith("lsoftmax_jax.") and any(n.split(".")[0] == "flax" for n in names):
            assert room(name) in FLAX, name


FUNCTIONS = {
    function
    for module in (lsoftmax_jax, devices, interop, reference, sampled, training, verification)
    for name, function in inspect.getmembers(module, inspect.isfunction)
    if not name.startswith("_") and module in (lsoftmax_jax, inspect.getmodule(function))
}


@pytest.mark.parametrize("function", sorted(FUNCTIONS, key=str), ids=lambda f: f.__name__)
def test_docstrings_have_arguments_results_and_an_example(function):
    # Python before 3.13 keeps the indentation of docstrings.
    text = inspect.cleandoc(function.__doc__)
    for part in ("\nArgs:\n", "\nReturns:\n", "\nExample:\n  >>> "):
        assert part in text, part.strip()
    described = text.partition("Args:")[2]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^  .*\b{name}\b", described, re.M), name


@pytest.mark.parametrize("pins", ["constraints.txt", "stacks/colab.txt", "stacks/newest.txt"])
def test_constraints_pin_every_dependency_within_its_declared_range(pins):
    lines = (ROOT / pins).read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    pinned = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    extras = PROJECT["optional-dependencies"]
    tested = [line for extra in ("experiments", "core", "test") for line in extras[extra]]
    for requirement in map(Requirement, PROJECT["dependencies"] + tested):
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_every_requirement_has_one_lower_bound():
    """`nox -s lowest` installs exactly these versions."""
    bounds: dict[str, str] = {}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, sum(extras.values(), PROJECT["dependencies"])):
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            continue
        (bound,) = requirement.specifier
        assert bound.operator == ">=", requirement
        # Compiling for a device that is absent needs a newer JAX than the library does.
        if requirement.name != "jax":
            assert bounds.setdefault(requirement.name, bound.version) == bound.version, requirement
    assert len(bounds) > 30


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
