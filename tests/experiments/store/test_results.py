"""The origin that a result records, and files that cannot be results."""

import base64
import json
import subprocess
import zlib

import numpy as np
import pytest

from experiments.store import results


def test_a_changed_file_marks_the_commit_and_a_result_does_not(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return said.stdout.strip()

    monkeypatch.delenv("EXPERIMENTS_COMMIT", raising=False)

    def commit():
        return results.provenance(1)["commit"]

    code = tmp_path / "experiments" / "store" / "results.py"
    saved = tmp_path / "experiments" / "results" / "bench" / "one.json"
    for file in (code, saved):
        file.parent.mkdir(parents=True)
        file.write_text("1")
    monkeypatch.setattr(results, "__file__", str(code))
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    assert commit() == first
    saved.write_text("2")
    assert commit() == first
    code.write_text("2")
    assert commit() == f"{first}-changed"


def test_a_copy_takes_the_commit_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPERIMENTS_COMMIT", "0123abc")
    assert results.provenance(1)["commit"] == "0123abc"
    monkeypatch.delenv("EXPERIMENTS_COMMIT")
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert results.provenance(1)["commit"] is None


def test_a_result_names_the_flags_of_the_compiler(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert results.provenance(1)["xla_flags"] == "--xla_cpu_enable_fast_math=false"


RUN = {
    "status": "finished",
    "seed": 0,
    "seconds": {"wall": 1.0},
    "train": {"error": 0.0},
    "test": {"error": 12.5, "target_angle": 40.0, "confusion": [[1, 0], [0, 1]]},
    "curves": {},
}


def folder_with(tmp_path, content):
    file = tmp_path / "digits-m4" / "seed0.json"
    file.parent.mkdir()
    file.write_text(content)
    return file


def test_a_result_is_read_as_it_is(tmp_path):
    file = folder_with(tmp_path, json.dumps(RUN))
    assert results.load_run(file) == RUN
    assert results.load_all(tmp_path) == [RUN | {"file": "digits-m4/seed0.json"}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test": {"error": -5}}, "its test is"),
        ({"test": {"error": 101}}, "its test is"),
        ({"test": {"error": "5"}}, "its test is"),
        ({"test": {"error": True}}, "its test is"),
        ({"test": {"error": float("nan")}}, "as JSON: JSON has no NaN"),
        ({"test": {"error": 5, "target_angle": float("inf")}}, "as JSON: JSON has no Infinity"),
        ({"test": None}, "its test is None"),
        ({"test": []}, r"its test is \[\]"),
        ({"train": {}}, r"its train is \{\}"),
        ({"seed": 1}, "its seed is 1"),
        ({"seed": "0"}, "its seed is '0'"),
        ({"seed": 0.0}, "its seed is 0.0"),
        ({"status": "lost"}, "its status is 'lost'"),
        ({"status": []}, r"its status is \[\]"),
        ({"seconds": {"wall": None}}, "its seconds is"),
        ({"curves": None}, "its curves is None"),
    ],
)
def test_an_impossible_result_is_refused(changes, message, tmp_path):
    file = folder_with(tmp_path, json.dumps(RUN | changes))
    for read in (lambda: results.load_run(file), lambda: results.load_all(tmp_path)):
        with pytest.raises(ValueError, match=rf"seed0.json must hold a result.* {message}"):
            read()


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "1e999"])
def test_json_that_cannot_be_read_is_named(content, tmp_path):
    with pytest.raises(ValueError, match=r"seed0.json must hold a result"):
        results.load(folder_with(tmp_path, content))


def test_predicted_labels_come_back(tmp_path):
    labels = np.random.default_rng(0).integers(0, 100, 10_000)
    saved = {"predictions": results.packed_labels(labels, labels[::-1])}
    assert len(json.dumps(saved)) < 40_000
    results.save(tmp_path / "a.json", saved)
    found, true = results.labels_of(results.load(tmp_path / "a.json"))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, labels)
    np.testing.assert_array_equal(true, labels[::-1])
    # Other programs read this format: base64 of zlib of little-endian uint16.
    raw = zlib.decompress(base64.b64decode(saved["predictions"]["labels"]))
    assert raw[:2] == int(labels[0]).to_bytes(2, "little") and len(raw) == 20_000
    assert results.labels_of({}) is None


@pytest.mark.parametrize(
    "packed",
    [
        [],
        results.packed_labels([1, 2], [1, 2]) | {"labels": ""},
        results.packed_labels([1, 2], [1, 2]) | {"labels": "!"},
        results.packed_labels([1, 2], [1, 2]) | {"truth": None},
        results.packed_labels([1, 2], [1, 2, 3]),
        {"labels": results.packed_labels([1, 2], [1, 2])["labels"]},
    ],
)
def test_damaged_predictions_are_refused(packed):
    with pytest.raises(ValueError, match="predictions must be"):
        results.labels_of({"predictions": packed})
