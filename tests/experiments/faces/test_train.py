"""Training on a folder of faces, and what its run's folder is then good for."""

import json
import shutil
from dataclasses import replace

import chex
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from experiments.__main__ import main
from experiments.faces import embed
from experiments.faces import train as train_faces
from experiments.faces import verify as verify_faces
from experiments.faces.images import FaceImages, list_faces
from experiments.faces.train import FaceRecipe, FaceRun, Plateau, load_run
from experiments.paper import networks as models
from experiments.paper.networks import Network, Stage
from lsoftmax_jax.schedule import LambdaPreset

TINY = Network((32, 32, 3), (Stage(4, 1, stride=2),), features=8)
RECIPE = FaceRecipe(
    size=(32, 32), lam=LambdaPreset(10.0, 0.5, 1.0, 1.0), steps=6, batch=8, drops=(4,)
)
PAIRS = "2\t2\nA\t1\t2\nA\t2\t3\nA\t1\tB\t1\nA\t2\tB\t2\nC\t1\t2\nC\t2\t3\nC\t1\tD\t1\nC\t2\tD\t2\n"


@pytest.fixture(scope="module", autouse=True)
def tiny_network(tmp_path_factory):
    """A network of one convolution; what all runs of this file compile alike is compiled once."""
    cache = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in cache}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, "lfw", TINY)
        patch.setattr(train_faces, "LOG_UPDATES", 2)
        for name, value in cache.items():
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four people, each a colour with noise, and pairs of two folds: A and B, C and D."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person, colour in zip("ABCD", np.eye(4, 3) * 90 + 80, strict=True):
        (folder / person).mkdir()
        for i in range(4):
            pixels = (colour + rng.uniform(-60, 60, (36, 36, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / person / f"{person}_{i + 1:04d}.png")
    (folder / "pairs.txt").write_text(PAIRS)
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """The folder of a run of all six updates on A and B: the other fold was left out."""
    out = tmp_path_factory.mktemp("run")
    recipe = replace(RECIPE, left_out_fold=1)
    code = train_faces.train_faces(folder, out, recipe, folder / "pairs.txt")
    assert code == 0
    return out


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run_for(folder, out, updates, without=frozenset("CD")):
    """One session on two people; the weights after it."""
    with FaceRun(RECIPE, list_faces(folder, without=without), out) as run:
        for _ in range(updates):
            run.update()
        run.save()
        return jax.tree.map(np.asarray, run.state.params)


def test_a_run_resumes_to_the_same_bits(folder, tmp_path):
    whole = run_for(folder, tmp_path / "whole", 6)
    run_for(folder, tmp_path / "parts", 3)  # in the middle of an epoch and of a line of the log
    parts = run_for(folder, tmp_path / "parts", 3)
    chex.assert_trees_all_equal(parts, whole)
    for key in ("step", "loss", "accuracy", "lam", "learning_rate"):
        expected = [line[key] for line in lines(tmp_path / "whole")]
        assert [line[key] for line in lines(tmp_path / "parts")] == expected
    assert [line["learning_rate"] for line in lines(tmp_path / "parts")] == [
        pytest.approx(rate) for rate in (0.1, 0.1, 0.01)
    ]
    assert len(list((tmp_path / "parts" / "place").iterdir())) == 1


def test_λ_and_the_training_loss_fall(finished):
    seen = lines(finished)
    assert [line["lam"] for line in seen] == [
        pytest.approx(10 / (1 + n / 2), rel=1e-5) for n in (2, 4, 6)
    ]
    assert seen[-1]["loss"] < seen[0]["loss"]


def test_another_recipe_or_folder_is_no_continuation(folder, finished):
    with pytest.raises(ValueError, match="holds another run .*margin 4 -> 2.*other images"):
        FaceRun(replace(RECIPE, margin=2), list_faces(folder), finished)


def test_divergence_is_said(folder, tmp_path):
    recipe = replace(RECIPE, learning_rate=1e30)
    with (
        FaceRun(recipe, list_faces(folder, without="CD"), tmp_path) as run,
        pytest.raises(ValueError, match="diverged by update [246]; try a higher --lam.minimum"),
    ):
        for _ in range(6):
            run.update()


def test_plateau_drops_once_the_loss_stays():
    plateau = Plateau()
    for step, loss in enumerate([5.0, 4.0, 3.99, 3.98, 3.0, 3.0, 3.0, 3.0, 3.0], start=1):
        plateau = plateau.after(step, loss, patience=3)
        assert plateau.drops == (1 if step >= 8 else 0)
    assert plateau == Plateau(loss=3.0, step=8, drops=1)


def test_a_plateau_lowers_the_rate_also_after_a_resume(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_faces, "NO_LAM", 100.0)
    recipe = replace(RECIPE, schedule="plateau", patience=2, learning_rate=1e-9)
    two = list_faces(folder, without="CD")
    with FaceRun(recipe, two, tmp_path) as run:
        for _ in range(5):
            run.update()
        assert run.learning_rate == pytest.approx(1e-10)
        run.save()
    with FaceRun(recipe, two, tmp_path) as run:
        assert run.learning_rate == pytest.approx(1e-10)


def test_recipes_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="margin must be >= 1, got 0"):
        FaceRecipe(margin=0)
    with pytest.raises(ValueError, match="size must be at least 32 x 32"):
        FaceRecipe(size=(16, 96))
    with pytest.raises(ValueError, match="pairs"):
        train_faces.training_faces("anywhere", FaceRecipe(left_out_fold=1), None)


def test_embeddings_are_the_features_beside_the_mirrored_ones(folder, finished, tmp_path):
    (folder / "D" / "D_0005.png").write_bytes(b"no image")
    embed.embed(finished, folder, tmp_path / "e.npz", batch=3)  # smaller than the eight devices
    (folder / "D" / "D_0005.png").unlink()
    names, embeddings = embed.load_embeddings(tmp_path / "e.npz")
    assert names.tolist() == list(list_faces(folder).names)
    chex.assert_shape(embeddings, (16, 16))
    run = load_run(finished)
    images = np.stack([FaceImages(list_faces(folder), (32, 32))[i]["image"] for i in range(16)])
    images = (images.astype(np.float32) - 127.5) / 128
    chex.assert_trees_all_close(embeddings[:, :8], np.asarray(run.model(images)), atol=1e-5)
    mirrored = np.asarray(run.model(images[:, :, ::-1]))
    chex.assert_trees_all_close(embeddings[:, 8:], mirrored, atol=1e-5)


@pytest.mark.parametrize(
    "content", [b"", b"no zip", b"PK\x03\x04", "names only", "lengths", "pickled"]
)
def test_a_file_of_something_else_is_no_embeddings(tmp_path, content):
    path = tmp_path / "e.npz"
    arrays = {
        "names only": {"names": np.array(["a"])},
        "lengths": {"names": np.array(["a"]), "embeddings": np.ones((2, 3))},
        "pickled": {"names": np.array([{}], object), "embeddings": np.ones((1, 3))},
    }
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, allow_pickle=True, **arrays[content])
    with pytest.raises(ValueError, match=r"e.npz: expected"):
        embed.load_embeddings(path)


def test_verify_tests_only_folds_that_were_not_trained_on(folder, finished, tmp_path):
    out = tmp_path / "result.json"
    verify_faces.verify_faces(folder / "pairs.txt", out, faces=folder, checkpoint=finished)
    result = json.loads(out.read_text())
    assert result["tested_folds"] == [1]
    assert result["pairs"] == 4
    assert result["people_trained_on"] == 2
    assert result["config"]["margin"] == 4
    assert result["training"]["updates"] == 6
    assert {"commit", "versions", "device", "command"} <= result["training"].keys()
    assert result["metrics"]["standard_error"] is None
    assert len(result["metrics"]["fold_accuracy"]) == 1
    assert {"commit", "versions", "device", "command", "seed"} <= result.keys()
    of_both = tmp_path / "of both folds"
    run_for(folder, of_both, 1, without=frozenset("BD"))
    with pytest.raises(ValueError, match="trained on people of every fold"):
        verify_faces.verify_faces(folder / "pairs.txt", out, faces=folder, checkpoint=of_both)


def test_verify_takes_embeddings_or_pixels(folder, tmp_path, capsys):
    pairs, pixels = folder / "pairs.txt", tmp_path / "pixels.json"
    verify_faces.verify_faces(pairs, pixels, faces=folder, pixels=True)
    by_pixels = json.loads(pixels.read_text())
    assert by_pixels["tested_folds"] == [0, 1]
    assert by_pixels["curve"]["false_accepts"][-1] == by_pixels["curve"]["true_accepts"][-1] == 1
    assert "TAR at FAR 0.001" in capsys.readouterr().out
    images = FaceImages(list_faces(folder), verify_faces.PIXELS)
    saved = embed.embed_faces(images, embed.grey_pixels, 4)
    embed.save_embeddings(tmp_path / "e.npz", saved)
    verify_faces.verify_faces(pairs, tmp_path / "e.json", embeddings=tmp_path / "e.npz")
    by_embeddings = json.loads((tmp_path / "e.json").read_text())
    assert by_embeddings["metrics"] == by_pixels["metrics"]
    for sources in ({}, {"pixels": True, "checkpoint": tmp_path}):
        with pytest.raises(ValueError, match="exactly one of"):
            verify_faces.verify_faces(pairs, tmp_path / "e.json", faces=folder, **sources)


def test_a_pair_of_a_missing_image_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "faces")
    (tmp_path / "faces" / "B" / "B_0002.png").unlink()
    files = ["--faces", str(tmp_path / "faces"), "--pairs", str(folder / "pairs.txt")]
    assert main(["verify", "--pixels", *files, "--out", str(tmp_path / "r.json")]) == 2
    assert "pairs name images that are missing or broken (1): B/B_0002" in capsys.readouterr().err
