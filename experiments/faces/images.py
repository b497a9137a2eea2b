"""Folders of faces, `person/image.jpg`, as batches of (image - 127.5) / 128 through Grain.

The stream of examples is one endless sequence, shuffled anew each epoch and decided by the seed
alone; process p of n reads elements p, p + n, p + 2n, ... of it, so that n processes with batches
of b read together what one process reads with batches of n b. Its iterator's state is small and
resumes in the middle of an epoch.
"""

import logging
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import grain
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

# what Pillow raises for a file it cannot decode
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
# A face of more than 89 million pixels is none, and takes a gigabyte to decode.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# more threads than cores only wait for each other to decode
_READ = grain.ReadOptions(num_threads=min(16, os.cpu_count() or 1), prefetch_buffer_size=512)

logger = logging.getLogger(__name__)


class Faces(NamedTuple):
    """A listed folder: names (`person/image.jpg`, sorted) and labels (images,), into people."""

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int32]
    people: tuple[str, ...]


def list_faces(
    root: str | Path, *, minimum_images: int = 1, without: Collection[str] = frozenset()
) -> Faces:
    """The images of root's people, fewer than minimum_images or named in without left out.

    Raises:
      ValueError: if root is no folder, is empty, holds images but no people's folders, or
          nobody is left.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"faces: expected a folder of person/image.jpg; {root} is no folder")
    images = {
        person.name: sorted(entry.name for entry in os.scandir(person) if _is_image(entry))
        for person in sorted(root.iterdir())
        if person.is_dir()
    }
    if not any(images.values()):
        flat = sum(map(_is_image, os.scandir(root)))
        found = f"{flat} images directly in it, of no person" if flat else "no images"
        raise ValueError(f"faces: expected person/image.jpg in {root}; found {found}")
    kept = {
        person: files
        for person, files in images.items()
        if len(files) >= max(minimum_images, 1) and person not in without
    }
    if not kept:
        most = max(len(files) for files in images.values())
        raise ValueError(
            f"faces: nobody in {root} is left: minimum_images is {minimum_images}, the most images "
            f"of one person {most}, people left out by name {len(without)}"
        )
    names = tuple(f"{person}/{file}" for person, files in kept.items() for file in files)
    counts = [len(files) for files in kept.values()]
    return Faces(root, names, np.repeat(np.arange(len(kept), dtype=np.int32), counts), tuple(kept))


def open_face(path: Path) -> Image.Image:
    """The image as RGB, upright; one of BROKEN is raised if it cannot be decoded."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def read_face(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The image as (height, width, 3): its largest centre of that shape, resized to size."""
    return np.asarray(ImageOps.fit(open_face(path), size[::-1], Image.Resampling.BILINEAR))


def normalise(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with its image uint8 -> f32, (image - 127.5) / 128."""
    return batch | {"image": (batch["image"].astype(np.float32) - 127.5) / 128}


class FaceImages:
    """Grain's source: element i is image i with its label and index, or None if it is broken.

    Grain skips None. `broken` maps the names of the broken images met so far to the reason.

    Raises:
      ValueError: from an element, once every image has turned out to be broken.
    """

    def __init__(self, faces: Faces, size: tuple[int, int]) -> None:
        self.faces = faces
        self.size = size
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.faces.names)

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any] | None:
        index = index.__index__()
        name = self.faces.names[index]
        try:
            image = read_face(self.faces.root / name, self.size)
        except BROKEN as error:
            if name not in self.broken:
                self.broken[name] = str(error)
                logger.warning(
                    "skipped broken image %s (%d so far): %s", name, len(self.broken), error
                )
            if len(self.broken) == len(self):
                message = f"faces: all {len(self)} images in {self.faces.root} are broken"
                raise ValueError(message) from None
            return None
        return {"image": image, "label": self.faces.labels[index], "index": np.int32(index)}


def training_batches(
    images: FaceImages, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.IterDataset[dict[str, Any]]:
    """Endless shuffled, randomly mirrored batches of this process.

    A batch is `{"image": (batch_size, height, width, 3) f32, "label", "index": (batch_size,) i32}`.
    """
    stream = grain.MapDataset.source(images).seed(seed).shuffle().random_map(_mirror).repeat()
    mine = stream[process_index::process_count]
    return mine.to_iter_dataset(_READ).batch(batch_size, drop_remainder=True).map(normalise)


def ordered_batches(images: FaceImages, batch_size: int) -> grain.IterDataset[dict[str, Any]]:
    """Every image once, in order and unmirrored, in batches of which the last may be smaller."""
    return grain.MapDataset.source(images).to_iter_dataset(_READ).batch(batch_size).map(normalise)


def _mirror(element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return element | {"image": element["image"][:, ::-1]} if rng.random() < 0.5 else element


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file is called as an image; a named pipe, which never ends, is no file."""
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
