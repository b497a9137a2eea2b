"""Each example runs, with fewer steps than for the numbers in its docstring."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RESULTS = EXAMPLES.parent / "experiments" / "results" / "examples"
NAMES = {
    *("digits_linen", "digits_nnx", "faces_arcface", "fine_tune"),
    *("many_classes", "partial_fc", "small_cnn"),
}


@pytest.fixture
def example(request):
    """The module of an example, loaded as its own file."""
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[request.param] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[request.param]


def named(name):
    return pytest.mark.parametrize("example", [name], indirect=True)


def test_every_example_stands_alone_in_a_hundred_lines():
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == NAMES
    for file in files:
        text = file.read_text()
        assert len(text.splitlines()) < 100, file.name
        assert "experiments" not in [
            line.split()[1] for line in text.splitlines() if "import" in line
        ]
        assert f"examples/{file.name}" in text, "the docstring must say how to run the example"


@pytest.mark.parametrize("example", ["digits_nnx", "digits_linen"], indirect=True)
def test_digits_train_at_the_first_try(example, monkeypatch):
    monkeypatch.setattr(example, "STEPS", 150)
    # Guessing has an error of 90 %, and so has a collapsed run.
    assert example.test_error(margin=4, seed=0) < 10


@named("many_classes")
def test_many_classes_are_told_apart(example, monkeypatch):
    monkeypatch.setattr(example, "CLASSES", 5000)
    accuracies = example.main(steps=8)
    assert accuracies[0] < 0.1 and accuracies[-1] > 0.9


@pytest.mark.slow
@pytest.mark.ci
@named("partial_fc")
def test_a_sample_of_the_classes_learns_what_all_classes_learn(example, monkeypatch):
    monkeypatch.setattr(example, "TRAINED", 80)
    monkeypatch.setattr(example, "UNSEEN", 20)
    monkeypatch.setattr(example, "STEPS", 60)
    whole, half = (example.train(example.MARGINS[0], share, True, 0) for share in (1.0, 0.5))
    # Guessing has an error of 98.8 % and an EER of 50 %.
    assert max(whole["error"], half["error"]) < 40
    assert max(whole["eer"], half["eer"]) < 30


@named("fine_tune")
def test_the_softmax_checkpoint_goes_on_with_a_margin(example):
    before, softmax, margin = example.main(steps=200, more=50)
    assert max(before, softmax, margin) < 15


@named("faces_arcface")
@pytest.mark.parametrize("bits", [8, 16])
def test_a_picture_of_8_or_16_bits_is_read_alike(example, tmp_path, bits):
    levels = np.arange(32 * 32).reshape(32, 32) % 256
    pixels = (257 * levels).astype(np.uint16) if bits == 16 else levels.astype(np.uint8)
    (tmp_path / "Ada").mkdir()
    Image.fromarray(pixels).save(tmp_path / "Ada" / "1.png")
    os.mkfifo(tmp_path / "Ada" / "2.png")  # reading this pipe would wait for ever
    images, people = example.faces(tmp_path)
    np.testing.assert_allclose(images[0, ..., 0], levels / 255 - 0.5, atol=1e-6)
    assert people.tolist() == [0]
    (tmp_path / "Ada" / "2.png").unlink()
    for other in (Image.new("RGBA", (32, 32)), Image.new("F", (32, 32))):
        other.save(tmp_path / "Ada" / "2.png", "PNG" if other.mode == "RGBA" else "TIFF")
        with pytest.raises(ValueError, match=rf"2.png: expected opaque .*, got {other.mode}"):
            example.faces(tmp_path)


@named("faces_arcface")
def test_faces_of_people_never_seen_are_told_apart(example, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for person in range(12):
        face = rng.integers(0, 256, (8, 8))
        (tmp_path / f"person{person}").mkdir()
        for number in range(6):
            noisy = np.clip(face + rng.normal(0, 20, face.shape), 0, 255).astype(np.uint8)
            image = Image.fromarray(noisy).resize((40, 40), Image.Resampling.NEAREST)
            image.save(tmp_path / f"person{person}" / f"{number}.jpg")
    _, after = example.main(tmp_path, steps=60)
    assert after > 0.9
    assert "never seen" in capsys.readouterr().out


@named("small_cnn")
def test_the_small_cnns_numbers_are_those_of_the_committed_runs(example):
    files = RESULTS.glob("small_cnn*.json")
    runs = [run for file in files for run in json.loads(file.read_text())["runs"]]
    whole, mirrored = example.PARTS

    def mean(*kind):
        names = ("data", "wrong", "part", "policy")
        return np.mean([run["test"] for run in runs if tuple(run[n] for n in names) == kind])

    means = [
        mean(*setting, policy)
        for setting in (("cifar10", 0, whole), ("cifar10", 0, mirrored), ("mnist", 0.4, whole))
        for policy in ("softmax", "default", "schedule")
    ]
    told = re.findall(r"\d\d\.\d", example.__doc__)
    assert told == [f"{mean:.1f}" for mean in means]
    readme = " ".join((EXAMPLES.parent / "README.md").read_text().split())
    assert f"from {told[6]} to {told[7]} % error" in readme


@pytest.mark.slow
@pytest.mark.ci
@named("small_cnn")
def test_a_small_cnn_learns_in_spite_of_wrong_labels(example, tmp_path, monkeypatch, capsys):
    """Each class is a level of grey; a third of the training labels are wrong."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 600)
    images = np.clip(25 * labels[:, None, None, None] + rng.normal(0, 3, (600, 16, 16, 1)), 0, 255)
    arrays = {"images": images.astype(np.uint8), "labels": labels}
    both = {f"{split}_{name}": of for split in ("train", "test") for name, of in arrays.items()}
    np.savez(tmp_path / "grey.npz", **both)
    data = example.load(tmp_path / "grey.npz", 500, 1 / 3)
    assert np.mean(data[0][1] != labels[:500]) == pytest.approx(1 / 3, abs=0.05)
    np.testing.assert_array_equal(data[1][1], labels)
    monkeypatch.setattr(example, "STEPS", 100)
    run = example.train(data, True, "default", 0)
    assert run["test"] < 40 and run["train"] > 20
    assert 0 <= run["share"][0] < run["share"][-1] < 0.3
    assert "default, update 100: share 0.0" in capsys.readouterr().err
