"""Embeddings of faces: features of each image and of its mirror image, side by side.

A file of embeddings is an `.npz` with `names` (images,), each a `person/image.jpg`, and
floating-point `embeddings` (images, D).
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from experiments.faces.images import FaceImages, list_faces, ordered_batches
from experiments.faces.train import TrainedRun, load_run
from experiments.store.files import read_npz, replacing
from experiments.store.progress import Progress
from lsoftmax_jax.devices import DATA_AXIS, data_mesh

Floats = NDArray[np.float32]
# Computes features (images, D) from normalised images (images, height, width, 3).
Features = Callable[[Floats], Floats]


class Embeddings(NamedTuple):
    """Names (images,), each a `person/image.jpg`, and their embeddings (images, D)."""

    names: NDArray[np.str_]
    embeddings: Floats


def embed_faces(images: FaceImages, features: Features, batch_size: int) -> Embeddings:
    """Computes the features of all images, batch by batch, and leaves broken images out.

    Raises:
      ValueError: all images are broken.
    """
    names: list[str] = []
    rows: list[Floats] = []
    with Progress("embed", len(images), "images") as progress:
        for batch in ordered_batches(images, batch_size):
            names += [images.faces.names[index] for index in batch["index"]]
            rows.append(features(batch["image"]))
            progress.advance(len(batch["index"]))
    return Embeddings(np.array(names), np.concatenate(rows))


def run_features(run: TrainedRun, batch_size: int) -> tuple[Features, int]:
    """Makes the function that computes a trained run's features, on all devices.

    Args:
      run: a run of train-faces.
      batch_size: the largest number of images in a call; smaller batches are padded.

    Returns:
      the function, which joins the features of each image and of its mirror image, and the batch
      size, rounded up to a multiple of the number of devices.
    """
    mesh = data_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    graphdef, arrays = nnx.split(run.model)
    replicated, split = jax.NamedSharding(mesh, jax.P()), jax.NamedSharding(mesh, jax.P(DATA_AXIS))

    def both(arrays: nnx.State, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, arrays)
        return jnp.concatenate([model(images), model(images[:, :, ::-1])], axis=-1)

    compiled = jax.jit(both, in_shardings=(replicated, split), out_shardings=replicated)

    def features(images: Floats) -> Floats:
        padded = np.pad(images, ((0, batch_size - len(images)), (0, 0), (0, 0), (0, 0)))
        return np.asarray(compiled(arrays, padded), np.float32)[: len(images)]

    return features, batch_size


def grey_pixels(images: Floats) -> Floats:
    """Returns grey pixels as features: learned features should do better."""
    return images.mean(axis=-1).reshape(len(images), -1)


def save_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Writes a file of embeddings."""
    with replacing(path) as file:
        np.savez(file, **embeddings._asdict())


def load_embeddings(path: Path) -> Embeddings:
    """Reads a file of embeddings.

    Raises:
      ValueError: path is not a file of embeddings; a name is not text or occurs twice; the
          embeddings are not floating point; or the shapes disagree.
    """
    names, rows = embeddings = Embeddings(**read_npz(path, ("names", "embeddings")))
    if names.ndim != 1 or rows.ndim != 2 or len(names) != len(rows) or not rows.size:
        raise ValueError(
            f"{path}: expected names (images,) and embeddings (images, D); "
            f"got {names.shape} and {rows.shape}"
        )
    if names.dtype.kind != "U" or rows.dtype.kind != "f":
        raise ValueError(
            f"{path}: expected names of text, as names.astype(str), and embeddings of floating "
            f"point, as embeddings.astype(np.float32); got {names.dtype} and {rows.dtype}"
        )
    each, counts = np.unique(names, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"{path}: expected each name once; got {each[counts > 1][0]} twice")
    return embeddings


def embed(checkpoint: Path, faces: Path, out: Path, batch: int = 256) -> None:
    """Writes an embedding of every image: its features beside those of its mirror image.

    Args:
      checkpoint: folder of a run of train-faces.
      faces: folder of person/image.jpg, or of insightface's train.rec and train.idx.
      out: the .npz of names and embeddings.
      batch: images at a time, on all devices together.
    """
    run = load_run(checkpoint)
    images = FaceImages(list_faces(faces), run.recipe.size)
    embedded = embed_faces(images, *run_features(run, batch))
    save_embeddings(out, embedded)
    count, length = embedded.embeddings.shape
    print(f"{out}: {count} embeddings of {length}, {len(images.broken)} broken images skipped")
