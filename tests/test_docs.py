"""The documentation builds without a warning, and the reference has every public name.

The guide's examples are doctests of their own; see testpaths in pyproject.toml.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import lsoftmax_jax
from experiments.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lsoftmax_jax"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
# What only the package itself imports; the public names of these are those of __init__.
INNER = {"logits", "loss", "sgd"}


@pytest.fixture(scope="module")
def documented(tmp_path_factory):
    """The names of the reference, of a site built with every warning an error."""
    site = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {name for kind, names in inventory.data.items() if kind != "std:label" for name in names}


def names(path: Path) -> set[str]:
    """The public names that a module defines."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_the_site_builds_and_its_reference_is_complete(documented):
    public = {f"lsoftmax_jax.{name}" for name in lsoftmax_jax.__all__}
    for path in PACKAGE.glob("*.py"):
        if not path.stem.startswith("_") and path.stem not in INNER:
            module = f"lsoftmax_jax.{path.stem}"
            public |= {module} | {f"{module}.{name}" for name in names(path)}
    exported = {name.rpartition(".")[2] for name in public if name.count(".") == 1}
    # Found under the shorter name.
    public -= {
        name for name in public if name.count(".") == 2 and name.rpartition(".")[2] in exported
    }
    assert public - documented == set()


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_guide_pages_have_examples_and_no_dashes(page):
    text = page.read_text()
    assert ">>> " in text
    assert not re.search("[\N{EM DASH}\N{EN DASH}]", text)


def written_commands() -> dict[str, set[str]]:
    """The flags that README and guide write after each command of the experiments."""
    found: dict[str, set[str]] = {}
    for page in [ROOT / "README.md", *GUIDE]:
        for command, rest in re.findall(
            r"python -m experiments ((?:bench )?[a-z-]+)([^`\n&)]*)", page.read_text()
        ):
            found.setdefault(command, set()).update(re.findall(r"--[a-z.-]+", rest))
    return found


@pytest.mark.parametrize(("command", "flags"), written_commands().items())
def test_written_commands_exist(command, flags, capsys, monkeypatch):
    assert command.split()[0] in COMMANDS
    monkeypatch.setenv("COLUMNS", "300")
    configuration = ["mnist-m4"] if command in ("train", "tune") else []
    with pytest.raises(SystemExit):
        main([*command.split(), *configuration, "--help"])
    known = set(re.findall(r"--[a-z.-]+", capsys.readouterr().out))
    assert flags <= known
