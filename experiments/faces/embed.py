"""Embeddings of a folder of faces: features of each image and of its mirror image, side by side.

A file of embeddings is an `.npz` of `names` (images,), `person/image.jpg` each, and `embeddings`
(images, D) float32.
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
# normalised images (images, height, width, 3) -> features (images, D)
Features = Callable[[Floats], Floats]


class Embeddings(NamedTuple):
    """Names (images,), `person/image.jpg` each, and their embeddings (images, D)."""

    names: NDArray[np.str_]
    embeddings: Floats


def embed_faces(images: FaceImages, features: Features, batch_size: int) -> Embeddings:
    """The features of all images, batch by batch; broken ones are left out.

    Raises:
      ValueError: if all images are broken.
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
    """A trained run's features of images beside those of their mirror images, on all devices.

    Args:
      run: of train-faces.
      batch_size: the most images of a call; smaller batches are padded.

    Returns:
      the function, and its batch size, a multiple of the devices.
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
    """The images themselves, in grey: the floor that any learned feature should clear."""
    return images.mean(axis=-1).reshape(len(images), -1)


def save_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write the file of embeddings."""
    with replacing(path) as file:
        np.savez(file, **embeddings._asdict())


def load_embeddings(path: Path) -> Embeddings:
    """Read a file of embeddings.

    Raises:
      ValueError: if path is no such file, or the shapes of its arrays disagree.
    """
    embeddings = Embeddings(**read_npz(path, ("names", "embeddings")))
    names, rows = embeddings
    if names.ndim != 1 or rows.ndim != 2 or len(names) != len(rows):
        raise ValueError(
            f"{path}: expected names (images,) and embeddings (images, D); "
            f"got {names.shape} and {rows.shape}"
        )
    return embeddings


def embed(checkpoint: Path, faces: Path, out: Path, batch: int = 256) -> None:
    """Writes an embedding of every image in a folder of person/image.jpg: the features of the image
    beside those of its mirror image.

    Args:
      checkpoint: folder of a run of train-faces.
      faces: the folder of images.
      out: the .npz of names and embeddings.
      batch: images at a time, on all devices together.
    """
    run = load_run(checkpoint)
    images = FaceImages(list_faces(faces), run.recipe.size)
    embedded = embed_faces(images, *run_features(run, batch))
    save_embeddings(out, embedded)
    count, length = embedded.embeddings.shape
    print(f"{out}: {count} embeddings of {length}, {len(images.broken)} broken images skipped")
