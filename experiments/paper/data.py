"""Small image data sets, whole on the device: sources, shuffling, augmentation.

A data set comes from a TFDS folder, from a ``.npz`` file (whole, or cut along the first axis into
pieces), or is scikit-learn's embedded digits. Its images stay uint8 in device memory; which rows
make up a batch and how they are augmented depends on nothing but a key and the step's number, so a
resumed run sees the batches that an unbroken one would have seen.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from experiments.store.files import in_home, read_npz, regular, replacing, user_cache
from experiments.store.progress import tracked

CLASSES = {"mnist": 10, "cifar10": 10, "cifar100": 100, "digits": 10}
VALIDATION = 5000

_SPLITS = ("train", "test")
_KEYS = tuple(f"{split}_{what}" for split in _SPLITS for what in ("images", "labels"))

MISSING = """\
{name} is not in {folder}
looked for {name}.npz, {name}.00.npz, {name}.01.npz, ... and {name}/VERSION/dataset_info.json
Two ways to get it:
  1. TFDS (needs network, and TensorFlow this once):
       pip install -e '.[prepare]'
       python -c "import tensorflow_datasets as tfds; \
tfds.builder('{name}', file_format='array_record').download_and_prepare()"
     TFDS_DATA_DIR names another folder than ~/tensorflow_datasets, here and there.
  2. Your own arrays, in a folder named by --data: numpy.savez('{name}.npz', train_images=...,
     train_labels=..., test_images=..., test_labels=...), images uint8 (count, height, width,
     channels)."""


class Split(NamedTuple):
    """images (count, height, width, channels) uint8, labels (count,) int32."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]

    def rows(self, rows: slice) -> "Split":
        return Split(self.images[rows], self.labels[rows])


class Dataset(NamedTuple):
    """A training and a test split, and a fingerprint of every byte that was read."""

    train: Split
    test: Split
    fingerprint: str

    def with_validation(self) -> "Dataset":
        """Holds the last training images out, in place of the test split.

        They are 5,000, or a tenth of them where that is less.
        """
        count = min(VALIDATION, len(self.train.labels) // 10)
        if count == 0:
            raise ValueError(
                f"validation needs at least 10 training images, got {len(self.train.labels)}"
            )
        held = self.train.rows(slice(-count, None))
        return self._replace(train=self.train.rows(slice(-count)), test=held)

    def first(self, count: int) -> "Dataset":
        """The first ``count`` images of each split."""
        rows = slice(count)
        return self._replace(train=self.train.rows(rows), test=self.test.rows(rows))


def load(name: str, folder: Path | None = None) -> Dataset:
    """Reads a data set.

    Args:
      name: mnist, cifar10, cifar100 or digits (embedded, needs no folder).
      folder: where the ``.npz`` or the TFDS folders are; by default ``TFDS_DATA_DIR`` or
        ``~/tensorflow_datasets``.

    Raises:
      FileNotFoundError: naming the folder looked in and the two ways to get the data.
      ValueError: if what is there is not such a data set.
      ImportError: if TFDS does not work with the protobuf that is installed; it names the remedy.
    """
    if name == "digits":
        return _dataset(name, _digits())
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    folder = in_home(folder or default, "give --data, or set TFDS_DATA_DIR")
    whole = folder / f"{name}.npz"
    if files := [whole] if whole.exists() else _pieces(folder, name):
        return _dataset(name, _from_npz(files))
    if prepared := [info.parent for info in folder.glob(f"{name}/*/dataset_info.json")]:
        return _dataset(name, _from_tfds(max(prepared, key=_version)))
    raise FileNotFoundError(MISSING.format(name=name, folder=folder.absolute()))


def _version(folder: Path) -> tuple[list[int], str]:
    """The numbers of a folder that TFDS names after a version: 10.0.0 comes after 3.0.1."""
    return [int(number) for number in re.findall(r"\d+", folder.name)], folder.name


def _pieces(folder: Path, name: str) -> list[Path]:
    """NAME.00.npz, NAME.01.npz, ...; none may be missing between."""
    there = sorted(folder.glob(f"{name}.[0-9][0-9].npz"))
    wanted = [folder / f"{name}.{number:02d}.npz" for number in range(len(there))]
    if missing := [file.name for file in wanted if file not in there]:
        raise ValueError(f"{folder} lacks {missing[0]}, though it has {there[-1].name}")
    return there


Arrays = dict[str, NDArray]


def _dataset(name: str, arrays: Arrays) -> Dataset:
    """The arrays of both splits, checked."""
    splits, digest = {}, hashlib.sha256()
    for split in _SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{name}: {split}_images must be uint8 (count, height, width, channels), "
                f"got {images.dtype} {images.shape}"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{name}: {split}_labels must be {len(images)} integers, "
                f"got {labels.dtype} {labels.shape}"
            )
        if len(labels) == 0 or not 0 <= labels.min() <= labels.max() < CLASSES[name]:
            raise ValueError(f"{name}: {split}_labels must be in 0..{CLASSES[name] - 1}")
        digest.update(images.tobytes())
        digest.update(labels.tobytes())
        splits[split] = Split(images, labels.astype(np.int32))
    train, test = (split.images.shape[1:] for split in splits.values())
    if train != test:
        raise ValueError(
            f"{name}: test_images must be of the size of train_images, {train}, got {test}"
        )
    return Dataset(**splits, fingerprint=digest.hexdigest()[:16])


def _digits() -> Arrays:
    # scikit-learn takes seconds to import, for which no other command should wait.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * 15).astype(np.uint8)[..., None]
    arrays = train_test_split(
        images, digits.target, test_size=500, stratify=digits.target, random_state=0
    )
    names = ("train_images", "test_images", "train_labels", "test_labels")
    return dict(zip(names, arrays, strict=True))


def _from_npz(files: list[Path]) -> Arrays:
    pieces: dict[str, list[NDArray]] = {key: [] for key in _KEYS}
    for file in files:
        for key, array in read_npz(file, _KEYS).items():
            shapes = {a.shape[1:] for a in [*pieces[key], array]}
            if array.ndim == 0 or len(shapes) > 1:
                raise ValueError(f"{file}: {key} must have the shape of the other pieces, {shapes}")
            pieces[key].append(array)
    return {key: np.concatenate(arrays) for key, arrays in pieces.items()}


def _from_tfds(folder: Path) -> Arrays:
    """A prepared TFDS folder, decoded once and kept as arrays in the user's cache folder."""
    identity = hashlib.sha256(str(folder.resolve()).encode())
    for file in sorted(folder.iterdir()):
        if not file.is_dir():
            regular(file)
        identity.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
    kept = user_cache() / f"{folder.parent.name}-{identity.hexdigest()[:16]}.npz"
    if kept.exists():
        return _from_npz([kept])
    try:
        arrays = _decoded(folder)
    except ImportError:
        raise
    except Exception as error:  # TFDS and array_record raise errors of many kinds
        if str(error).startswith(str(folder)):
            raise
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ValueError(f"{folder} cannot be read as TFDS data: {reason:.300}") from error
    with replacing(kept) as unfinished:
        np.savez(unfinished, allow_pickle=False, **arrays)
    return arrays


def _decoded(folder: Path) -> Arrays:
    tfds = import_tfds()
    builder = tfds.builder_from_directory(str(folder))
    if builder.info.file_format is not tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{folder} holds {builder.info.file_format.value}, which only TensorFlow reads; "
            f"prepare {folder.parent.name} again with file_format='array_record'"
        )
    arrays: Arrays = {}
    for split in _SPLITS:
        source, work = builder.as_data_source(split=split), f"decode {folder.parent.name} {split}"
        examples = tracked(source, len(source), work, "images")
        images, labels = zip(*((e["image"], e["label"]) for e in examples), strict=True)
        arrays |= {f"{split}_images": np.stack(images), f"{split}_labels": np.asarray(labels)}
    return arrays


def import_tfds() -> Any:
    """TFDS; half a second that only an undecoded data set pays.

    What keeps it from being imported TFDS logs, and is then an empty module. On Colab's CPU and GPU
    runtimes that is the protobuf there: tensorflow-metadata 1.21 asks for a newer one when it is
    imported, not when it is installed.
    """
    from google.protobuf.runtime_version import VersionError

    try:
        from tensorflow_metadata.proto.v0 import schema_pb2  # noqa: F401 (TFDS imports it first)
    except VersionError as error:
        reason, found = str(error).partition(". ")[0], version("tensorflow-metadata")
        raise ImportError(
            f"TFDS cannot be imported: {reason}. tensorflow-metadata must be made for the protobuf "
            f"that is installed, got {found}: pip install 'tensorflow-metadata<1.21', "
            "then start Python again"
        ) from error
    import tensorflow_datasets as tfds

    return tfds


class OnDevice(NamedTuple):
    """The arrays that batches are made from.

    Attributes:
      key: draws the augmentation.
      order: the rows of consecutive epochs, end to end, from `epoch_orders`.
      first: the position in the endless stream of rows where ``order`` begins.
      images, labels: the whole training split.
      mean: subtracted from the images; a scalar or (height, width, channels).
    """

    key: jax.Array
    order: jax.Array
    first: jax.Array
    images: jax.Array
    labels: jax.Array
    mean: jax.Array


def epoch_orders(key: jax.Array, epoch: jax.Array, epochs: int, count: int) -> jax.Array:
    """``epochs`` independent shuffles of ``count`` rows, end to end, from number ``epoch`` on."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, epoch + jnp.arange(epochs))
    return jax.vmap(jax.random.permutation, (0, None))(keys, count).reshape(-1)


class ArrayBatches:
    """Puts a training split on the devices of a mesh and keeps the order of the current epochs.

    Args:
      seed: draws shuffles and augmentation.
      train: the split.
      mean: subtracted from the images.
      size: of a batch.
      steps: the most that are asked for at once.
    """

    def __init__(
        self, seed: int, train: Split, mean: NDArray, mesh: Mesh, *, size: int, steps: int
    ) -> None:
        self._order_key, self._key = jax.random.split(jax.random.key(seed))
        self._shared = jax.device_put((*train, mean), NamedSharding(mesh, P()))
        self._count, self._size = len(train.labels), size
        self._epochs = (self._count + steps * size - 2) // self._count + 1
        self._orders = jax.jit(epoch_orders, static_argnums=(2, 3))
        self._epoch, self._order = -1, jnp.zeros(0, jnp.int32)

    def feed(self, step: int) -> OnDevice:
        """What the batches of ``step`` and those after it are made from."""
        epoch = step * self._size // self._count
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self._orders(self._order_key, epoch, self._epochs, self._count)
        first = jnp.int32(epoch * self._count)
        return OnDevice(self._key, self._order, first, *self._shared)

    def position(self) -> None:
        """The step says where it stands."""

    def restore(self, position: None) -> None: ...


def batch(
    step: jax.Array, data: OnDevice, *, size: int, crop: int, mirror: bool
) -> tuple[jax.Array, jax.Array]:
    """Images (size, height, width, channels) float32 and labels (size,) of a step.

    Batches follow the stream of rows across the ends of epochs, so that every epoch shows every
    image once and no batch is ragged.
    """
    start = step * size - data.first
    rows = jax.lax.dynamic_slice(data.order, (start,), (size,))
    images = centred(data.images[rows], data.mean)
    return augmented(jax.random.fold_in(data.key, step), images, crop, mirror), data.labels[rows]


def centred(images: jax.Array, mean: jax.Array) -> jax.Array:
    """images - mean, float32; the scale of 0 to 255 stays, batch normalisation takes it away."""
    return images.astype(jnp.float32) - mean


def augmented(key: jax.Array, images: jax.Array, crop: int, mirror: bool) -> jax.Array:
    """Pads by ``crop`` zeros, cuts out the old size at random; mirrors half of the images."""
    crop_key, mirror_key = jax.random.split(key)
    if crop:
        corners = jax.random.randint(crop_key, (len(images), 2), 0, 2 * crop + 1)
        padded = jnp.pad(images, ((0, 0), (crop, crop), (crop, crop), (0, 0)))
        images = jax.vmap(
            lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
        )(padded, corners)
    if mirror:
        flip = jax.random.bernoulli(mirror_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
    return images


def padded_batches(split: Split, size: int) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """(images, labels, where) of a split in order, the last batch filled up and masked."""
    for start in range(0, len(split.labels), size):
        images, labels = split.rows(slice(start, start + size))
        spare = size - len(labels)
        where = np.arange(size) < len(labels)
        yield np.pad(images, ((0, spare), *[(0, 0)] * 3)), np.pad(labels, (0, spare)), where
