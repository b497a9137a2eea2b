"""Frozen features of images: random patches of the data as filters, pooled over quarters, whitened.

Source: Coates and Ng, "Learning feature representations with k-means", 2012, without the k-means.
"""

from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from experiments.faces.images import list_faces, open_face

PATCH, FILTERS, THRESHOLD = 6, 160, 0.5
CHUNK = 250  # images whose patches are in memory at once


def frozen(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features (count, 8 * FILTERS) of images (count, height, width, channels)."""
    rng = np.random.default_rng(0)
    some = images[rng.integers(0, len(images), 4000)]
    patches = np.concatenate([_patches(some[i : i + CHUNK], 3) for i in range(0, 4000, CHUNK)])
    patches = patches.reshape(-1, patches.shape[-1])
    patches = patches[rng.integers(0, len(patches), 40_000)]
    mean = patches.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov((patches - mean).T))
    whitening = (vectors / np.sqrt(values + 0.1)) @ vectors.T
    filters = (patches[rng.integers(0, len(patches), FILTERS)] - mean) @ whitening
    filters /= np.linalg.norm(filters, axis=1, keepdims=True)
    weights = (whitening @ filters.T).astype(np.float32)
    parts = range(0, len(images), CHUNK)
    return np.concatenate([_pooled(images[i : i + CHUNK], mean, weights) for i in parts])


def _patches(images: NDArray[np.uint8], stride: int) -> NDArray[np.float32]:
    """Patches (count, rows, columns, numbers), each of mean 0 and about unit variance."""
    view = np.lib.stride_tricks.sliding_window_view(images, (PATCH, PATCH), axis=(1, 2))
    view = view[:, ::stride, ::stride]
    patches = view.reshape(*view.shape[:3], -1).astype(np.float32)
    patches -= patches.mean(axis=-1, keepdims=True)
    return patches / np.sqrt(np.mean(patches**2, axis=-1, keepdims=True) + 10)


def _pooled(
    images: NDArray[np.uint8], mean: NDArray[np.float32], weights: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What each filter answers above a threshold, of either sign, in the mean of each quarter."""
    answers = (_patches(images, 2) - mean) @ weights
    over = [np.maximum(sign * answers - THRESHOLD, 0) for sign in (1, -1)]
    answers = np.concatenate(over, axis=-1)
    halves = np.array_split(answers, 2, axis=1)
    quarters = [quarter for half in halves for quarter in np.array_split(half, 2, axis=2)]
    return np.concatenate([quarter.mean(axis=(1, 2)) for quarter in quarters], axis=-1)


def whitened(
    features: NDArray[np.float32], fit: NDArray[np.float32], size: int, floor: float
) -> NDArray[np.float32]:
    """The first principal components, each divided by its standard deviation.

    Args:
      features: (count, D).
      fit: (rows, D), the rows that decide components and deviations.
      size: number of components.
      floor: added to the variances, in units of the mean variance: weak components stay weak.
    """
    mean, deviation = fit.mean(axis=0), fit.std(axis=0) + 1e-3
    scaled = (fit - mean) / deviation
    values, vectors = np.linalg.eigh(scaled.T @ scaled / len(scaled))
    values, vectors = values[::-1][:size], vectors[:, ::-1][:, :size]
    components = vectors / np.sqrt(values + floor * values.mean())
    return (((features - mean) / deviation) @ components).astype(np.float32)


def grey_faces(folder: Path, fewest: int, most: int) -> tuple[NDArray[np.uint8], NDArray]:
    """The grey middle, 48 x 40, of images of all people with enough of them, and labels.

    Args:
      folder: of person/image.jpg.
      fewest, most: people with fewer images are left out, images beyond the most too.
    """
    listed, taken = list_faces(folder, minimum_images=fewest), Counter[int]()
    images, labels = [], []
    for name, label in zip(listed.names, listed.labels.tolist(), strict=True):
        taken[label] += 1
        if taken[label] <= most:
            face = open_face(listed.read(name)).convert("L")
            left, top = (face.width - 80) // 2, (face.height - 96) // 2
            face = face.crop((left, top, left + 80, top + 96))
            images.append(np.asarray(face.resize((40, 48), Image.Resampling.BILINEAR)))
            labels.append(label)
    return np.stack(images)[..., None], np.array(labels)
