"""Each notebook holds the cells of its script, and runs from top to bottom in a fresh kernel."""

import ast
import base64
import inspect
import io
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import jupytext.cli
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = ("tour", "devices", "reproduce", "faces")
URL = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
BLOB = f"{URL}/blob/main/"
# These notebooks use the library alone, so that every cell can be copied.
ALONE = ("tour", "devices")
PAPER = ("reproduce", "faces")
each = pytest.mark.parametrize("name", NAMES)


def badge(name: str) -> str:
    """The Markdown of a notebook's Colab badge."""
    place = BLOB.removeprefix("https://github.com")
    colab = "https://colab.research.google.com"
    image = f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
    return f"{image}({colab}/github{place}experiments/notebooks/{name}.ipynb)"


def test_the_folder_holds_pairs():
    for suffix in (".py", ".ipynb"):
        assert {file.stem for file in FOLDER.glob(f"*{suffix}")} == set(NAMES)


@each
def test_notebook_has_the_cells_of_its_script(name):
    script = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    cells, expected = (
        [(cell.cell_type, cell.source) for cell in made.cells] for made in (notebook, script)
    )
    assert cells == expected, "make notebooks"
    errors = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert errors == []


def test_jupytext_pairs_a_notebook_with_its_script(monkeypatch, capsys):
    """With this pairing, Jupyter writes both files when it saves one of them."""
    monkeypatch.chdir(FOLDER)
    jupytext.cli.jupytext(["--paired-paths", "tour.ipynb"])
    assert capsys.readouterr().out.split() == ["tour.py"]


@each
def test_notebook_begins_with_badge_and_installation(name):
    title, installation = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent").cells[:2]
    assert title.source.splitlines()[2] == badge(name)
    first = ALONE[0] if name in ALONE else PAPER[0]
    expected = jupytext.read(FOLDER / f"{first}.py", fmt="py:percent").cells[1].source
    assert installation.source == expected
    assert f'"{URL}"' in installation.source
    assert ("git+" in installation.source) == (name in ALONE)
    assert badge(name) in (ROOT / "experiments" / "README.md").read_text()


@each
def test_links_into_the_repository_lead_somewhere(name):
    script = (FOLDER / f"{name}.py").read_text()
    links = re.findall(re.escape(BLOB) + r"([^)\s#]+)", script)
    assert links and all((ROOT / link).exists() for link in links), links
    elsewhere = re.sub(re.escape(URL), "", script)
    assert "github.com/" not in elsewhere


@pytest.mark.parametrize("name", ALONE)
def test_cells_to_copy_need_the_library_alone(name):
    nodes = list(ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())))
    packages = {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    packages |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert "lsoftmax_jax" in packages
    assert not {package for package in packages if package.startswith("experiments")}


@pytest.mark.parametrize("name", PAPER)
def test_a_notebook_of_the_paper_defines_no_model_and_no_loss(name):
    layers = {"Module", "Conv", "Linear", "Dense", "Sequential"}
    losses = {"psi", "exp", "logsumexp", "log_softmax", "softmax_cross_entropy"}
    nodes = list(ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())))
    assert not any(isinstance(node, ast.ClassDef) for node in nodes)
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not used & (layers | losses)


@each
def test_what_a_notebook_takes_from_this_clone_exists(name):
    """CI runs few notebooks, which take a minute each. This test notices a renamed function."""
    nodes = list(ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())))
    taken: dict[str, Any] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            line = ast.unparse(node)
            if "lsoftmax_jax" in line or "experiments" in line:
                exec(line, taken)
    missing = [
        f"{node.value.id}.{node.attr}"
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if inspect.ismodule(found := taken.get(node.value.id)) and not hasattr(found, node.attr)
    ]
    assert len(taken) > 1 and missing == []


# The notebook's kernel evaluates its question after the last cell; the tests read the value.
QUESTIONS = {
    "tour": """{
        "error": {title: error for title, (error, _) in results.items()},
        "angle": {title: angle for title, (_, angle) in results.items()},
        "share": float(curves["L-Softmax, m = 4"]["share"][-1]),
        "accuracy": [margin_free, with_margin],
        "linen": linen_losses,
    }""",
    "devices": """{
        "devices": DEVICES,
        "losses": {name: values.tolist() for name, values in losses.items()},
        "kernel": str(class_last.params["head"]["kernel"].sharding.spec),
        "collectives": collectives,
    }""",
    "reproduce": """{
        "stopped": stopped is None,
        "name": run_name(config),
        "steps": config.steps,
        "reduced": saved["reduced"],
        "error": saved["test"]["error"],
    }""",
    "faces": """{
        "faces": str(FACES),
        "auc": {name: outcome["metrics"]["auc"] for name, outcome in verified.items()},
        "tested": verified["network"]["tested_folds"],
        "embeddings": embedded.embeddings.shape,
        "seen": sorted(unseen & run.people),
    }""",
}


class Executed:
    """A notebook after its execution: printed text, pictures, and the answer to its question."""

    def __init__(self, name: str, folder: Path) -> None:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        question = f"print(__import__('json').dumps({QUESTIONS[name]}))"
        notebook.cells.append(nbformat.v4.new_code_cell(question, id="question"))
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
        *cells, asked = (cell for cell in notebook.cells if cell.cell_type == "code")
        outputs = [output for cell in cells for output in cell.outputs]
        self.printed = "".join(output.get("text", "") for output in outputs)
        self.pictures = [
            Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
            for output in outputs
            if "image/png" in output.get("data", {})
        ]
        self.tables = [
            output["data"]["text/markdown"]
            for output in outputs
            if "text/markdown" in output.get("data", {})
        ]
        self.answer: dict[str, Any] = json.loads(asked.outputs[0]["text"])


def executed(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, pictures: int) -> Executed:
    """Runs a notebook in an empty folder, with the checks that all notebooks share."""
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # on an accelerator the notebooks train larger runs
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
    notebook = Executed(name, folder)
    assert "Warning" not in notebook.printed
    assert re.search(rf"devices: .*\nPython 3[\d.]+ .*'jax': '{jax.__version__}'", notebook.printed)
    assert [file.name for file in folder.iterdir()] in ([], ["out"])
    assert len(notebook.pictures) == pictures
    for picture in notebook.pictures:
        assert picture.width > 600 and picture.height > 300
        assert np.asarray(picture.convert("L")).std() > 10, "an empty picture"
    return notebook


@pytest.mark.slow
@pytest.mark.ci
def test_tour(tmp_path, monkeypatch):
    seen = executed("tour", tmp_path, monkeypatch, pictures=3).answer
    softmax, large = "softmax", "L-Softmax, m = 4"
    assert seen["error"].keys() == {softmax, large}
    assert max(seen["error"].values()) < 25  # ten classes, features in the plane
    assert seen["angle"][large] < 0.75 * seen["angle"][softmax]
    assert 0.01 < seen["share"] <= 0.5  # the margin takes part; the rule's share is at most a half
    margin_free, with_margin = seen["accuracy"]
    assert margin_free > 0.85 and with_margin <= margin_free
    assert seen["linen"][-1] < 0.5 * seen["linen"][0]


@pytest.mark.slow
def test_devices(tmp_path, monkeypatch):
    seen = executed("devices", tmp_path, monkeypatch, pictures=1).answer
    assert seen["devices"] == 4
    one, *others = (np.array(values) for values in seen["losses"].values())
    assert len(others) == 3
    assert one[-1] < 0.5 * one[0]
    for losses in others:
        np.testing.assert_allclose(losses, one, rtol=1e-2)
        np.testing.assert_allclose(losses[:10], one[:10], rtol=1e-5)
    assert "model" in seen["kernel"]
    assert 0 < len(seen["collectives"]) <= 5
    logits = 1024 * 10_000
    arrays = [
        size for _, shape in seen["collectives"] for size in re.findall(r"\[([\d,]+)\]", shape)
    ]
    assert all(math.prod(map(int, size.split(","))) < logits / 2 for size in arrays)


@pytest.mark.slow
def test_reproduce(tmp_path, monkeypatch):
    notebook = executed("reproduce", tmp_path, monkeypatch, pictures=1)
    seen = notebook.answer
    assert seen["stopped"] and seen["reduced"]
    assert "stopped at update 20; the same command continues there" in notebook.printed
    out = tmp_path / "out" / "reproduce"
    log = out / seen["name"] / "metrics.jsonl"
    lines = map(json.loads, log.read_text().splitlines())
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, seen["steps"] + 1))
    assert seen["error"] < 50  # ten classes
    assert f"{seen['error']:.2f}" in notebook.tables[0]
    assert json.loads((out / f"{seen['name']}.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_faces(tmp_path, monkeypatch):
    notebook = executed("faces", tmp_path, monkeypatch, pictures=2)
    seen = notebook.answer
    stand_in = seen["faces"].startswith("out")
    assert ("handwritten digits take their place" in notebook.printed) == stand_in
    assert seen["auc"]["network"] > 0.6 and seen["auc"]["pixels"] > 0.6
    assert seen["tested"] == [2] and seen["seen"] == []
    count, length = seen["embeddings"]
    assert count > 50 and length == 128
    assert (tmp_path / "out" / "faces" / "embeddings.npz").exists()
    assert "TAR" in notebook.printed
