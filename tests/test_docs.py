"""The documentation builds without a warning, its links work, its reference is complete.

The guide's examples are doctests of their own; see testpaths in pyproject.toml.
"""

import ast
import importlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from sphinx.util.inventory import InventoryFile

import lsoftmax_jax
from experiments.__main__ import COMMANDS, main
from experiments.report import tables
from experiments.report.outcomes import RESULTS, load_outcomes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lsoftmax_jax"
GUIDE = sorted((ROOT / "docs" / "guide").glob("*.md"))
# Files that only the package imports; __init__ has their public names.
INNER = {"losses", "sgd"}
# Names for the package's other files alone.
INNER_NAMES = {
    "lsoftmax_jax.devices.RepeatedStep",
    "lsoftmax_jax.margins.OURS",
    "lsoftmax_jax.margins.check_margin",
    "lsoftmax_jax.margins.psi_and_slope",
    "lsoftmax_jax.margins.value_and_slope",
    "lsoftmax_jax.training.IDLE_SHARE",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built with every warning an error."""
    site = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", site],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return site


class Page(HTMLParser):
    """The links of a page, the files it loads, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loads: set[str] = set()
        self.places: set[str] = set()
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.places.add(value)
            elif name in ("href", "src"):
                (self.links if tag == "a" else self.loads).add(value)


def dead_links(file: Path, pages: dict[Path, Page]) -> set[str]:
    """The links and loaded files of a page that this site does not have."""
    dead = {url for url in pages[file].loads if urlsplit(url).netloc}  # from another site
    for url in pages[file].links | pages[file].loads:
        parts = urlsplit(url)
        if parts.scheme or parts.netloc:
            continue  # `make linkcheck` checks these
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        place = unquote(parts.fragment)
        if not target.exists() or (place and place not in pages[target].places):
            dead.add(url)
    return dead


@pytest.mark.slow
@pytest.mark.ci
def test_every_link_inside_the_site_leads_somewhere(site):
    pages = {file.resolve(): Page(file) for file in site.rglob("*.html")}
    assert len(pages) > 20
    dead = {file.relative_to(site.resolve()).as_posix(): dead_links(file, pages) for file in pages}
    assert {page: links for page, links in dead.items() if links} == {}


@pytest.mark.slow
@pytest.mark.ci
def test_a_page_with_formulas_loads_mathjax(site):
    loads = Page(site / "guide" / "how-it-works.html").loads
    assert [url for url in loads if "mathjax" in url.lower()]


@pytest.mark.slow
@pytest.mark.ci
def test_numbers_are_those_of_the_newest_result(site, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    measured = importlib.import_module("measured")
    sentence = measured.million_classes()
    page = (site / "guide" / "many-classes.html").read_text()
    assert sentence in page
    for year, milliseconds in ((2024, 8600), (2030, 17400), (2025, 9600)):
        arms = [
            {"arm": name, "milliseconds": [milliseconds], "ratio": [0.5], "temporary_bytes": 2e7}
            for name in ("lsoftmax_sgd", "optax softmax, optax SGD")
        ]
        shapes = [{"shape": measured.MILLION_CLASSES, "arms": arms}]
        changed = {"date": f"{year}-01-01T00:00:00+00:00", "shapes": shapes}
        (tmp_path / f"head-cpu-f32-{year}.json").write_text(json.dumps(changed))
    monkeypatch.setattr(measured, "BENCH", tmp_path)
    assert "An update took 17.4 s" in measured.million_classes()


def test_the_guides_tables_are_means_of_the_committed_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    measured = importlib.import_module("measured")
    run = {name: [1.0, 2.0, 6.0] for name in measured.UNSEEN_NUMBERS}
    unseen = [run | {"task": "lfw", "policy": "softmax", "split": split} for split in (0, 1)]
    unseen[1]["eer"] = [9.0]
    drawn = {"margin": "m", "classes": 0.1, "corrected": False, "eer": 2.0}
    sampled = [drawn | {"seed": seed, "error": error} for seed, error in ((0, 4.0), (1, 5.0))]
    small = {"data": "mnist", "wrong": 0.4, "part": "all", "policy": "default", "train": 1.0}
    small = [small | {"test": test, "share": [0.1, 0.2]} for test in (3.0, 4.0)]
    for name, runs in (("open-set-cpu", unseen), ("partial_fc", sampled), ("small_cnn", small)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"runs": runs}))
    monkeypatch.setattr(measured, "BENCH", tmp_path)
    monkeypatch.setattr(measured, "EXAMPLES", tmp_path)
    assert "| softmax | 3.0 | 4.5 | 3.0 |" in measured.unseen()
    assert "seeds: 2" in measured.partial_fc()
    assert "| 10 %, uncorrected | 4.50 | 2.00 |" in measured.partial_fc()
    row = "| MNIST, all, 40 % wrong labels | default | 1.0 | 3.5 | 3.0, 4.0 | 0.200 |"
    assert row in measured.small_cnn()


@pytest.mark.slow
@pytest.mark.ci
def test_recorded_runs_of_stacks_and_notebooks_are_on_the_site(site, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    measured = importlib.import_module("measured")
    page = (site / "stacks.html").read_text()
    for file in ("results.json", "notebooks.json"):
        runs = json.loads((ROOT / "stacks" / file).read_text())
        assert all(f"{run['date']}, {run['commit']}</p>" in page for run in runs)
    runs = json.loads((ROOT / "stacks/results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps([runs[0] | {"passed": 98765}]))
    monkeypatch.setattr(measured, "STACKS", tmp_path)
    assert measured.stacks().count(" 98765 | ") == 1


def test_a_notebooks_outputs_are_on_its_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    notebook_pages = importlib.import_module("notebook_pages")
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("# Title\n\n[![Open in Colab](badge.svg)](notebook.ipynb)"),
        nbformat.v4.new_code_cell("print(1 + 1)"),
    ]
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("stream", text="2\n"),
        nbformat.v4.new_output("execute_result", {"text/plain": "[\x1b[1;36m3\x1b[0m]"}),
        nbformat.v4.new_output("display_data", {"text/markdown": "| a |", "text/plain": "no"}),
        nbformat.v4.new_output("display_data", {"image/png": "NDI=", "text/plain": "no"}),
    ]
    nbformat.write(notebook, tmp_path / "some.ipynb")
    monkeypatch.setattr(notebook_pages, "NOTEBOOKS", tmp_path)
    notebook_pages.write(tmp_path / "pages")
    assert (tmp_path / "pages" / "some.md").read_text().split("\n\n") == [
        "# Title",
        "[Open in Colab](notebook.ipynb)",
        "```python\nprint(1 + 1)\n```",
        "```text\n2\n```",
        "```text\n[3]\n```",
        "| a |",
        "![What the cell above draws](some-0.png)\n",
    ]
    assert (tmp_path / "pages" / "some-0.png").read_bytes() == b"42"


@pytest.fixture(scope="module")
def documented(site):
    """The names in the reference."""
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


@pytest.mark.slow
@pytest.mark.ci
def test_the_site_builds_and_its_reference_is_complete(documented):
    public = {f"lsoftmax_jax.{name}" for name in lsoftmax_jax.__all__}
    for path in PACKAGE.glob("*.py"):
        if not path.stem.startswith("_") and path.stem not in INNER:
            module = f"lsoftmax_jax.{path.stem}"
            public |= {module} | {f"{module}.{name}" for name in names(path)}
    exported = {name.rpartition(".")[2] for name in public if name.count(".") == 1}
    # The reference has these under the shorter name.
    public -= {
        name for name in public if name.count(".") == 2 and name.rpartition(".")[2] in exported
    }
    assert public - documented == INNER_NAMES


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_guide_pages_have_examples_and_no_dashes(page):
    text = page.read_text()
    assert ">>> " in text or page.stem == "accelerators"  # its commands need a compiler for TPUs
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


def test_the_readme_quotes_the_report():
    """`report --check` compares the tables with the results (tests/experiments/report)."""
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    scoreboard = tables.tables(load_outcomes(RESULTS))
    section = readme.split("## The paper, re-run")[1].split("\n## ")[0]
    cells = re.findall(r"[\d.]+ (?:_r_ )?/ [\d.]+ (?:± [\d.]+ )?\(\d\)", section)
    assert len(cells) == 6  # the cells that have a full run
    shown = set(re.findall(r"-?\d+\.\d+", scoreboard))
    assert all(cell in scoreboard for cell in cells)
    assert set(re.findall(r"-?\d+\.\d+", section)) <= shown
