"""Training on a folder of faces, and later uses of the run's folder."""

import itertools
import json
import shutil
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from PIL import Image

from experiments.__main__ import main
from experiments.faces import embed
from experiments.faces import recipe as faces_recipe
from experiments.faces import train as train_faces
from experiments.faces import verify as verify_faces
from experiments.faces.images import FaceImages, list_faces
from experiments.faces.recipe import FaceRecipe
from experiments.faces.train import load_run
from experiments.paper import networks as models
from experiments.paper.networks import Network, Stage
from experiments.run import loop
from experiments.store.checkpoints import Checkpoints
from lsoftmax_jax.devices import data_mesh
from lsoftmax_jax.schedule import LambdaPreset

TINY = Network((32, 32, 3), (Stage(4, 1, stride=2),), features=8)
RECIPE = FaceRecipe(
    size=(32, 32), lam=LambdaPreset(10.0, 0.5, 1.0, 1.0), steps=6, batch=8, drops=(4,)
)
PAIRS = "2\t2\nA\t1\t2\nA\t2\t3\nA\t1\tB\t1\nA\t2\tB\t2\nC\t1\t2\nC\t2\t3\nC\t1\tD\t1\nC\t2\tD\t2\n"


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    """A network of one convolution."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.NETWORKS, "lfw", TINY)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four people, each a colour with noise, and two folds of pairs: A and B, C and D."""
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
    """The folder of a finished run of six updates on A and B; the other fold is left out."""
    out = tmp_path_factory.mktemp("run")
    recipe = replace(RECIPE, left_out_fold=1)
    code = train_faces.train_faces(folder, out, recipe, (folder / "pairs.txt",), devices=1)
    assert code == 0
    return out


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def run_for(folder, out, updates=6, recipe=RECIPE, without="CD", **keywords):
    """Trains on two people for some updates; returns the outcome, or None if stopped."""
    images = FaceImages(list_faces(folder, without=without), recipe.size)
    keywords = {"init_from": None, "mesh": data_mesh()} | keywords
    task = train_faces.prepare(recipe, images, out, **keywords)
    asked = itertools.count()
    pace = {"dispatch": 1, "evaluations": 0, "checkpoint_seconds": 60.0}
    return loop.train(task, lambda: next(asked) == updates, **pace)


def positions(out):
    with Checkpoints(out / "checkpoints", writes=False) as saved:
        return saved.metadata(saved.latest_step()).custom_metadata["positions"]


def weights(out):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(load_run(out).model)))


def test_a_run_resumes_to_the_same_bits(folder, tmp_path):
    whole = run_for(folder, tmp_path / "whole")
    assert run_for(folder, tmp_path / "parts", 3) is None  # in the middle of an epoch
    parts = run_for(folder, tmp_path / "parts")
    chex.assert_trees_all_equal(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert parts["curves"] == whole["curves"]
    assert len(positions(tmp_path / "parts")) == 1
    (file,) = (tmp_path / "parts").glob("checkpoints/*/_CHECKPOINT_METADATA")
    of_two = json.loads(file.read_text())
    of_two["custom_metadata"]["positions"] *= 2
    file.write_text(json.dumps(of_two))
    with pytest.raises(ValueError, match="must continue on as many processes as before, 2"):
        run_for(folder, tmp_path / "parts")


def test_the_result_says_what_ran(folder, tmp_path):
    outcome = run_for(folder, tmp_path / "run")
    assert json.loads((tmp_path / "run.json").read_text()) == outcome
    assert outcome["status"] == "finished" and outcome["kind"] == "faces"
    assert outcome["ran"]["drops"] == [4] and outcome["ran"]["lam"]["base"] == 10.0
    assert outcome["data"]["people"] == 2 and outcome["broken_images"] == 0
    assert outcome["images_per_second"] > 0
    assert 0 < outcome["curves"]["train"]["target_angle"][0] < 180
    # In radians all angles would be below pi; a fresh network's features are far from the columns.
    assert outcome["curves"]["train"]["target_angle"][0] > 10


def test_a_run_on_faces_is_no_run_of_train(finished, capsys):
    assert main(["evaluate", finished.name, "--out", str(finished.parent)]) == 2
    assert "is no run of train; verify measures a run of train-faces" in capsys.readouterr().err


def test_the_margin_grows_and_the_training_loss_falls(finished):
    seen = lines(finished)
    lams = [10 / (1 + n / 2) for n in range(1, 7)]
    assert [line["share"] for line in seen] == pytest.approx([1 / (1 + lam) for lam in lams], 1e-5)
    assert seen[-1]["loss"] < seen[0]["loss"]


def test_another_recipe_or_folder_is_no_continuation(folder, finished):
    with pytest.raises(ValueError, match=r"holds another run .*margin 4 -> 2.*images \w+ -> \w+"):
        run_for(folder, finished, recipe=replace(RECIPE, margin=2), without="")


def test_a_result_without_its_folder_is_not_taken_for_another_run(
    folder, finished, tmp_path, capsys
):
    shutil.copy(finished.with_name(f"{finished.name}.json"), tmp_path / "run.json")
    words = ["train-faces", "--faces", str(folder), "--out", str(tmp_path / "run")]
    assert main([*words, "--size", "32", "32", "--steps", "6", "--batch", "8"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run.json'} holds the result of another run (config.lam" in said
    recipe = load_run(finished).recipe
    images = FaceImages(list_faces(folder, without="CD"), recipe.size)
    same, going_on = (
        train_faces.prepare(recipe, images, tmp_path / "run", init_from, data_mesh())
        for init_from in (None, finished)
    )
    train_faces.check_result(same, tmp_path / "run.json")
    with pytest.raises(ValueError, match=rf"another run \(init_from None -> {finished.name}\)"):
        train_faces.check_result(going_on, tmp_path / "run.json")
    assert not (tmp_path / "run").exists()


def test_an_image_that_changed_is_no_continuation(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "faces")
    assert run_for(tmp_path / "faces", tmp_path / "run", 2) is None
    other = Image.fromarray(np.zeros((36, 36, 3), np.uint8))
    other.save(tmp_path / "faces" / "A" / "A_0001.png")
    with pytest.raises(ValueError, match=r"holds another run .images"):
        run_for(tmp_path / "faces", tmp_path / "run")


def test_divergence_is_a_result(folder, tmp_path, capsys):
    words = ["train-faces", "--faces", str(folder), "--out", str(tmp_path / "run"), "--steps", "6"]
    words += ["--batch", "8", "--size", "32", "32", "--learning-rate", "1e30"]
    assert main(words) == 1
    outcome = json.loads((tmp_path / "run.json").read_text())
    assert outcome["status"] == "diverged" and 0 < outcome["diverged"]["step"] < 6
    assert "run diverged at update" in capsys.readouterr().out
    assert main(words) == 1  # it is not trained again


@pytest.mark.slow
@pytest.mark.ci
def test_fine_tuning_starts_from_another_run(folder, tmp_path):
    softmax = replace(RECIPE, margin=1)
    run_for(folder, tmp_path / "softmax", recipe=softmax)
    still = replace(RECIPE, learning_rate=0.0, steps=1)
    run_for(folder, tmp_path / "tuned", recipe=still, init_from=tmp_path / "softmax")
    tuned, before = weights(tmp_path / "tuned"), weights(tmp_path / "softmax")
    chex.assert_trees_all_equal(tuned["head"], before["head"])
    run_for(folder, tmp_path / "four", recipe=still, init_from=tmp_path / "softmax", without="")
    four = weights(tmp_path / "four")
    assert four["head"]["kernel"].shape[1] == 4
    chex.assert_trees_all_equal(four["full"]["layer"], before["full"]["layer"])
    wide = replace(still, width=2.0)
    with pytest.raises(ValueError, match=r"init_from: the network of .* is another"):
        run_for(folder, tmp_path / "wide", recipe=wide, init_from=tmp_path / "softmax")


def rates(recipe, losses):
    """The factor of the rate after each loss."""
    optimizer = optax.with_extra_args_support(recipe.optimizer)
    params = {"layer": {"kernel": jnp.ones(2)}}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    found = []
    for loss in losses:
        _, state = update(params, state, params, value=jnp.float32(loss))
        found.append(round(float(optax.tree.get(state, "scale")), 6))
    return found


def test_a_plateau_lowers_the_rate_once_the_loss_is_flat(monkeypatch):
    monkeypatch.setattr(faces_recipe, "PLATEAU_UPDATES", 1)
    flat = replace(RECIPE, schedule="plateau", patience=3, pace="none")
    losses = [5.0, 4.0, 3.99, 3.98, 3.0, 3.0, 3.0, 3.0, 3.0]
    assert rates(flat, losses) == [1, 1, 1, 1, 1, 1, 1, 0.1, 0.1]
    # λ is 6.7, 5, 4, 3.3, 2.9, 2.5, 2.2 and, from the eighth update on, 2: then the wait begins.
    high = replace(flat, pace="annealed", lam=LambdaPreset(10.0, 0.5, 1.0, 2.0))
    assert rates(high, [3.0] * 12) == [1] * 10 + [0.1, 0.1]


def test_a_plateau_compares_means(monkeypatch):
    monkeypatch.setattr(faces_recipe, "PLATEAU_UPDATES", 2)
    recipe = replace(RECIPE, schedule="plateau", patience=4, pace="none")
    assert rates(recipe, [1.0, 9.0] * 4) == [1, 1, 1, 1, 1, 0.1, 0.1, 0.1]


@pytest.mark.slow
@pytest.mark.ci
def test_a_plateau_goes_on_after_a_resume(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(faces_recipe, "PLATEAU_UPDATES", 2)
    recipe = replace(RECIPE, schedule="plateau", patience=2, learning_rate=1e-9, pace="none")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_for(folder, whole, 9, recipe)
    assert run_for(folder, parts, 5, recipe) is None
    run_for(folder, parts, 9, recipe)
    chex.assert_trees_all_equal(weights(parts), weights(whole))


def test_impossible_recipes_are_refused():
    with pytest.raises(ValueError, match="margin must be >= 1, got 0"):
        FaceRecipe(margin=0)
    with pytest.raises(ValueError, match="size must be at least 32 x 32"):
        FaceRecipe(size=(16, 96))
    with pytest.raises(ValueError, match="pairs"):
        train_faces.training_faces("anywhere", FaceRecipe(left_out_fold=1), ())


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
    "content",
    [
        *(b"", b"no zip", b"PK\x03\x04"),
        *("names only", "lengths", "pickled", "empty"),
        *("integers", "bytes", "text", "complex", "numbers as names", "bytes as names"),
    ],
)
def test_a_file_of_something_else_is_no_embeddings(tmp_path, content):
    path = tmp_path / "e.npz"
    arrays = {
        "names only": {"names": np.array(["a"])},
        "lengths": {"names": np.array(["a"]), "embeddings": np.ones((2, 3))},
        "pickled": {"names": np.array([{}], object), "embeddings": np.ones((1, 3))},
        "empty": {"names": np.array(["a"]), "embeddings": np.ones((1, 0))},
        "integers": {"names": np.array(["a"]), "embeddings": np.ones((1, 3), np.int8)},
        "bytes": {"names": np.array(["a"]), "embeddings": np.full((1, 3), b"1")},
        "text": {"names": np.array(["a"]), "embeddings": np.full((1, 3), "1")},
        "complex": {"names": np.array(["a"]), "embeddings": np.ones((1, 3), complex)},
        "numbers as names": {"names": np.array([1]), "embeddings": np.ones((1, 3))},
        "bytes as names": {"names": np.array([b"a"]), "embeddings": np.ones((1, 3))},
    }
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, allow_pickle=True, **arrays[content])
    with pytest.raises(ValueError, match=r"e.npz.*(must be an .npz of names|expected names)"):
        embed.load_embeddings(path)


def test_two_embeddings_of_one_name_are_refused(tmp_path):
    names = np.array(["A/A_0001.jpg", "B/B_0001.jpg", "A/A_0001.jpg"])
    np.savez(tmp_path / "e.npz", names=names, embeddings=np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match=r"e.npz: expected each name once; got A/A_0001.jpg twice"):
        embed.load_embeddings(tmp_path / "e.npz")


def test_verify_tests_only_folds_that_were_not_trained_on(folder, finished, tmp_path):
    out = tmp_path / "result.json"
    verify_faces.verify_faces(out, (folder / "pairs.txt",), faces=folder, checkpoint=finished)
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
    run_for(folder, of_both, 1, without="BD")
    with pytest.raises(ValueError, match="trained on people of every fold"):
        verify_faces.verify_faces(out, (folder / "pairs.txt",), faces=folder, checkpoint=of_both)


def test_verify_takes_embeddings_or_pixels(folder, tmp_path, capsys):
    pairs, pixels = (folder / "pairs.txt",), tmp_path / "pixels.json"
    verify_faces.verify_faces(pixels, pairs, faces=folder, pixels=True)
    by_pixels = json.loads(pixels.read_text())
    assert by_pixels["tested_folds"] == [0, 1]
    assert by_pixels["curve"]["false_accepts"][-1] == by_pixels["curve"]["true_accepts"][-1] == 1
    assert "TAR at FAR 0.001" in capsys.readouterr().out
    images = FaceImages(list_faces(folder), verify_faces.PIXELS)
    saved = embed.embed_faces(images, embed.grey_pixels, 4)
    embed.save_embeddings(tmp_path / "e.npz", saved)
    verify_faces.verify_faces(tmp_path / "e.json", pairs, embeddings=tmp_path / "e.npz")
    by_embeddings = json.loads((tmp_path / "e.json").read_text())
    assert by_embeddings["metrics"] == by_pixels["metrics"]
    for sources in ({}, {"pixels": True, "checkpoint": tmp_path}):
        with pytest.raises(ValueError, match="exactly one of"):
            verify_faces.verify_faces(tmp_path / "e.json", pairs, faces=folder, **sources)


def test_a_pair_of_a_missing_image_is_named(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "faces")
    (tmp_path / "faces" / "B" / "B_0002.png").unlink()
    files = ["--faces", str(tmp_path / "faces"), "--pairs", str(folder / "pairs.txt")]
    assert main(["verify", "--pixels", *files, "--out", str(tmp_path / "r.json")]) == 2
    assert "pairs name images that are missing or broken (1): B/B_0002" in capsys.readouterr().err
