"""Faces of named people, listed by person and read as batches of (image - 127.5) / 128.

The faces are files `person/image.jpg` of a folder, or insightface's packed `train.rec` and
`train.idx`.

Grain streams the images as one endless sequence, in a new order each epoch. The seed alone decides
the sequence. Process p of n reads elements p, p + n, p + 2n, ..., so that n processes with batches
of b read the same images as one process with batches of n b. The iterator's state is small, and
resumes in the middle of an epoch.
"""

import io
import logging
import os
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex
from unicodedata import normalize

import grain
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from experiments.faces import recordio

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

# The errors of reading and decoding an image.
BROKEN = (OSError, ValueError)
# Decoding more than 89 million pixels takes a gigabyte, and no picture of a face needs so many.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# Threads beyond the number of cores would only wait for each other.
_READ = grain.ReadOptions(num_threads=min(16, os.cpu_count() or 1), prefetch_buffer_size=512)
# Python decodes bytes of a file name that are not UTF-8 to these characters.
_NOT_UTF8 = re.compile("[\ud800-\udfff]")

logger = logging.getLogger(__name__)


class Faces(NamedTuple):
    """Listed images, ordered by person.

    Attributes:
      root: the folder or file that holds them.
      names: (images,), each a `person/image.jpg`, as the file system writes it.
      labels: (images,), the index of each image's person in people.
      people: names in Unicode's composed form (NFC), as in pairs.
      read: returns the bytes of a named image file.
    """

    root: Path
    names: tuple[str, ...]
    labels: NDArray[np.int32]
    people: tuple[str, ...]
    read: Callable[[str], bytes]


def list_faces(
    root: str | Path, *, minimum_images: int = 1, without: Collection[str] = frozenset()
) -> Faces:
    """Lists the images of root's people.

    Args:
      root: folder of person/image.jpg, or of train.rec and train.idx.
      minimum_images: leave out people who have fewer images.
      without: names of people to leave out.

    Raises:
      ValueError: root is not a folder; no person's folder in root has images; a name is not UTF-8;
          root has nobody of without; or nobody is left.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"faces: expected a folder of person/image.jpg; {root} is no folder")
    if (root / recordio.RECORDS).exists():
        images, read = recordio.list_records(root)
    else:
        images, read = _images_of_people(root), lambda name: (root / name).read_bytes()
    if without and images.keys().isdisjoint(without):
        some = ", ".join(sorted(without)[:3])
        raise ValueError(f"faces: none of the people to leave out is in {root}: {some}, ...")
    kept = {
        person: names
        for person, names in images.items()
        if len(names) >= minimum_images and person not in without
    }
    if not kept:
        most = max(len(names) for names in images.values())
        raise ValueError(
            f"faces: nobody in {root} is left: minimum_images is {minimum_images}, the most images "
            f"of one person {most}, people left out by name {len(without)}"
        )
    counts = [len(names) for names in kept.values()]
    labels = np.repeat(np.arange(len(kept), dtype=np.int32), counts)
    return Faces(
        root, tuple(name for names in kept.values() for name in names), labels, tuple(kept), read
    )


def rows_of(wanted: Iterable[str], names: Iterable[str]) -> NDArray[np.intp]:
    """Finds the rows of wanted images among names, with or without extension, in any Unicode form.

    Raises:
      ValueError: no name fits an image, or two names fit it.

    >>> rows_of(["A/A_0002", "A/A_0001"], ["A/A_0001.jpg", "A/A_0002"])
    array([1, 0])
    """
    names, fitting = list(names), defaultdict[str, list[int]](list)
    for row, name in enumerate(names):
        composed = normalize("NFC", name)
        for key in {composed, os.path.splitext(composed)[0]}:
            fitting[key].append(row)
    asked = [normalize("NFC", name) for name in wanted]
    if missing := [name for name in dict.fromkeys(asked) if name not in fitting]:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"pairs name images that are missing or broken ({len(missing)}): {some}")
    for name in asked:
        if len(fitting[name]) > 1:
            twice = " and ".join(names[row] for row in fitting[name][:2])
            raise ValueError(f"pairs name {name}, which is there twice: {twice}")
    return np.array([fitting[name][0] for name in asked], np.intp)


def open_face(file: bytes) -> Image.Image:
    """Decodes an image file as upright RGB; an animation gives its first picture.

    16-bit values become 8-bit values, and white stays white. Transparent pixels become black, like
    the pixels outside an aligned face.

    Raises:
      ValueError: the file cannot be decoded, or holds 32-bit grey values, whose white is unknown.
    """
    try:
        with Image.open(io.BytesIO(file)) as image:
            orientation = _orientation(image)
            if image.mode.startswith("I;16"):
                # `convert` would cut off every value above 255.
                grey = np.round(np.asarray(image) / 257)
                face = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
            elif image.mode in ("I", "F"):
                raise ValueError("32-bit grey values; expected 8 or 16 bits a channel")
            elif image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                face = Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
            else:
                face = image.convert("RGB")
    except UnidentifiedImageError:  # its message is only an address in memory
        raise ValueError("cannot be read as an image") from None
    # A damaged file makes Pillow raise errors of many kinds.
    except Exception as error:
        raise ValueError(f"{error}" or type(error).__name__) from error
    # Keep the orientation alone: `exif_transpose` fails if another entry is damaged.
    face.info.clear()
    face.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(face)


def _orientation(image: Image.Image) -> int:
    """Returns the orientation in the EXIF block; upright if the block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    # A damaged block makes Pillow raise errors of many kinds.
    except Exception:
        return 1


def read_face(file: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decodes an image file as (height, width, 3): cuts out the centre and resizes it."""
    return np.asarray(ImageOps.fit(open_face(file), size[::-1], Image.Resampling.BILINEAR))


def normalise(batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the batch with its image as float32, (image - 127.5) / 128."""
    return batch | {"image": (batch["image"].astype(np.float32) - 127.5) / 128}


class FaceImages:
    """Grain's source: element i is image i with its label and index, or None for a broken image.

    Grain skips None. `broken` maps the names of the broken images met so far to the reasons.

    Raises:
      ValueError: reading an element shows that every image is broken.
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
            image = read_face(self.faces.read(name), self.size)
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
    """Streams this process's batches without end, shuffled and mirrored at random.

    A batch is `{"image": (batch_size, height, width, 3) f32, "label", "index": (batch_size,) i32}`.
    """
    stream = grain.MapDataset.source(images).seed(seed).shuffle().random_map(_mirror).repeat()
    mine = stream[process_index::process_count]
    return mine.to_iter_dataset(_READ).batch(batch_size, drop_remainder=True).map(normalise)


def ordered_batches(images: FaceImages, batch_size: int) -> grain.IterDataset[dict[str, Any]]:
    """Streams every image once, in order and not mirrored; the last batch may be smaller."""
    return grain.MapDataset.source(images).to_iter_dataset(_READ).batch(batch_size).map(normalise)


def _mirror(element: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return element | {"image": element["image"][:, ::-1]} if rng.random() < 0.5 else element


def _images_of_people(root: Path) -> dict[str, list[str]]:
    """Lists the names `person/image.jpg` in a folder, by person."""
    images, deeper = defaultdict[str, list[str]](list), list[str]()
    for person in sorted(root.iterdir()):
        if not person.is_dir() or person.name.startswith("."):
            continue
        entries = sorted(os.scandir(person), key=lambda entry: entry.name)
        if names := [f"{person.name}/{entry.name}" for entry in entries if _is_image(entry)]:
            images[normalize("NFC", person.name)] += names
        deeper += [entry.path for entry in entries if entry.is_dir() and _has_images(entry.path)]
    if not images:
        flat = sum(map(_is_image, os.scandir(root)))
        found = f"no images ({' '.join(sorted(IMAGE_SUFFIXES))})"
        if flat:
            found = f"{flat} images directly in it, of no person"
        elif deeper:
            found = f"images one folder deeper, in {deeper[0]}"
        raise ValueError(f"faces: expected person/image.jpg in {root}; found {found}")
    if deeper:
        logger.warning(
            "left out %d folders of images within people's folders, such as %s",
            len(deeper),
            deeper[0],
        )
    for names in images.values():
        for name in names:
            if _NOT_UTF8.search(name):
                raise ValueError(
                    f"faces: expected names in UTF-8 in {root}; rename {os.fsencode(name)!r}"
                )
    return images


def _has_images(folder: str) -> bool:
    return any([_is_image(entry) for entry in os.scandir(folder)])


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether entry is a regular file with an image's suffix: reading a named pipe never ends."""
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
