"""Sources agree, batches depend on seed and step alone, augmentation only moves images."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import data
from lsoftmax_jax.devices import data_mesh

SIZE, COUNT = 4, 10


def arrays(count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"{split}_{what}": array
        for split in ("train", "test")
        for what, array in (
            ("images", rng.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)),
            ("labels", rng.integers(0, 10, count)),
        )
    }


@pytest.fixture
def split():
    images = np.arange(COUNT, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 3, 3, 1), np.uint8)
    return data.Split(images, np.arange(COUNT, dtype=np.int32))


def test_digits_are_embedded():
    digits = data.load("digits")
    assert digits.train.images.shape == (1297, 8, 8, 1) and digits.train.images.dtype == np.uint8
    assert len(digits.test.labels) == 500 and set(digits.test.labels) == set(range(10))


def test_npz_whole_and_in_pieces(tmp_path):
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    whole.mkdir(), pieces.mkdir()
    np.savez(whole / "mnist.npz", **arrays())
    for i in range(3):
        rows = {key: np.array_split(array, 3)[i] for key, array in arrays().items()}
        np.savez(pieces / f"mnist.{i:02d}.npz", **rows)
    left, right = data.load("mnist", whole), data.load("mnist", pieces)
    assert left.fingerprint == right.fingerprint
    np.testing.assert_array_equal(left.train.images, arrays()["train_images"])
    np.testing.assert_array_equal(right.test.labels, arrays()["test_labels"])
    np.savez(whole / "mnist.npz", **arrays(seed=1))
    assert data.load("mnist", whole).fingerprint != left.fingerprint


def test_missing_data_names_the_folder_and_two_ways(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        data.load("cifar10")
    for part in (str(tmp_path), "download_and_prepare", "TFDS_DATA_DIR", "cifar10.npz", "--data"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((COUNT, 28, 28, 1))}, "train_images must be uint8"),
        ({"test_images": np.zeros((COUNT, 28, 28), np.uint8)}, "test_images must be uint8"),
        ({"test_labels": np.zeros(COUNT - 1, int)}, "test_labels must be 10 integers"),
        ({"train_labels": np.full(COUNT, 10)}, "train_labels must be in 0..9"),
        ({"train_labels": np.array([{}] * COUNT)}, "it holds Python objects"),
    ],
)
def test_other_arrays_are_refused(change, message, tmp_path):
    np.savez(tmp_path / "mnist.npz", **(arrays() | change))
    with pytest.raises(ValueError, match=message):
        data.load("mnist", tmp_path)


def test_absent_array_is_named(tmp_path):
    rest = arrays()
    del rest["test_labels"]
    np.savez(tmp_path / "mnist.npz", **rest)
    with pytest.raises(ValueError, match="lacks test_labels"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("versions", [("3.0.1", "10.0.0"), ("9.2.0", "9.10.0"), ("old", "1.0.0")])
def test_the_newest_tfds_version_is_read(versions, tmp_path, monkeypatch):
    for version in versions:
        (tmp_path / "mnist" / version).mkdir(parents=True)
        (tmp_path / "mnist" / version / "dataset_info.json").write_text("{}")
    monkeypatch.setattr(data, "_from_tfds", lambda folder: arrays() | {"read": folder.name})
    read = []
    monkeypatch.setattr(data, "_dataset", lambda name, found: read.append(found["read"]))
    data.load("mnist", tmp_path)
    assert read == [versions[1]]


def test_a_tfds_folder_of_pipes_is_refused(tmp_path):
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "dataset_info.json")
    with pytest.raises(ValueError, match=r"dataset_info.json must be a regular file"):
        data.load("mnist", tmp_path)


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
    for name in ("HOME", "TFDS_DATA_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 9)
    with pytest.raises(ValueError, match="no home folder; give --data, or set TFDS_DATA_DIR"):
        data.load("mnist")
    with pytest.raises(ValueError, match="no home folder; set XDG_CACHE_HOME"):
        data.user_cache()


@pytest.mark.slow
def test_tfds_is_decoded_once(tfds_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    decoded = data.load("mnist", tfds_dir)
    assert decoded.train.images.shape == (60000, 28, 28, 1)
    assert len(list((tmp_path / "lsoftmax_jax").iterdir())) == 1
    monkeypatch.setattr(data, "_decoded", None)
    assert data.load("mnist", tfds_dir).fingerprint == decoded.fingerprint


@pytest.mark.parametrize("count, held", [(60_000, 5000), (50_000, 5000), (1297, 129)])
def test_validation_is_held_out_of_training(count, held):
    train = data.Split(np.zeros((count, 1, 1, 1), np.uint8), np.arange(count, dtype=np.int32))
    split = data.Dataset(train, train.rows(slice(3)), "").with_validation()
    np.testing.assert_array_equal(split.train.labels, np.arange(count - held))
    np.testing.assert_array_equal(split.test.labels, np.arange(count - held, count))
    with pytest.raises(ValueError, match="at least 10 training images, got 9"):
        data.Dataset(train.rows(slice(9)), train, "").with_validation()


def labels_of(feed, steps):
    """The labels of some steps, with one call of the feed for each step."""
    batch = jax.jit(lambda step, source: data.batch(step, source, size=SIZE, crop=0, mirror=False))
    return np.stack([batch(jnp.int32(step), feed.feed(step))[1] for step in steps])


def make_feed(split, seed=0, steps=1):
    mean = np.float32(0)
    return data.ArrayBatches(seed, split, mean, data_mesh(1), size=SIZE, steps=steps)


def test_every_epoch_shows_every_image_once(split):
    stream = labels_of(make_feed(split), range(10)).reshape(4, COUNT)
    for epoch in stream:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in stream}) == 4


def test_batches_depend_on_seed_and_step_alone(split):
    unbroken = labels_of(make_feed(split), range(10))
    np.testing.assert_array_equal(labels_of(make_feed(split), range(7, 10)), unbroken[7:])
    assert (labels_of(make_feed(split, seed=1), range(10)) != unbroken).any()


def test_one_feed_serves_all_steps_of_a_dispatch(split):
    feed = make_feed(split, steps=5)
    source = feed.feed(5)
    batches = [
        data.batch(jnp.int32(s), source, size=SIZE, crop=0, mirror=False) for s in range(5, 10)
    ]
    unbroken = labels_of(make_feed(split), range(5, 10))
    np.testing.assert_array_equal(np.stack([labels for _, labels in batches]), unbroken)
    for images, labels in batches:
        np.testing.assert_array_equal(images[:, 1, 1, 0], labels)


def test_augmentation_shifts_and_mirrors():
    images = np.arange(1, 10, dtype=np.float32).reshape(1, 3, 3, 1).repeat(200, axis=0)
    augmented = np.asarray(
        jax.jit(data.augmented, static_argnums=(2, 3))(jax.random.key(0), images, 1, True)
    )
    padded = np.pad(images[0], ((1, 1), (1, 1), (0, 0)))
    shifts = [padded[i : i + 3, j : j + 3] for i in range(3) for j in range(3)]
    allowed = {a.tobytes() for s in shifts for a in (s, np.ascontiguousarray(s[:, ::-1]))}
    seen = {image.tobytes() for image in augmented}
    assert seen == allowed  # all 18, each expected 11 times


def test_mean_is_subtracted_before_the_padding():
    images = np.full((1, 3, 3, 1), 7, np.uint8)
    centred = data.centred(images, jnp.float32(5.0))
    corners = jax.jit(data.augmented, static_argnums=(2, 3))(jax.random.key(0), centred, 3, False)
    assert set(np.unique(corners)) <= {0.0, 2.0}


def test_padded_batches_are_the_split(split):
    batches = list(data.padded_batches(split, SIZE))
    assert [where.tolist() for *_, where in batches] == [
        [True] * 4,
        [True] * 4,
        [True] * 2 + [False] * 2,
    ]
    kept = np.concatenate([labels[where] for _, labels, where in batches])
    np.testing.assert_array_equal(kept, split.labels)
