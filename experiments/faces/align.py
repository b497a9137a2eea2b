"""Five-point alignment of faces to the standard template.

A least-squares similarity transform (rotation, one scale, shift) maps a face's five landmarks to
the template's. The aligned face is the original image after that transform.
"""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Literal
from unicodedata import normalize

import numpy as np
import skimage  # loads its parts when they are first used
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from tqdm.contrib.concurrent import thread_map

from experiments.faces.images import BROKEN, list_faces, open_face
from experiments.store.files import read_text, replacing

# The template of the authors' SphereFace: (x, y) in 112 x 96 pixels of the left and right eye, the
# nose, the left and right corner of the mouth. Left means the left side of the picture.
# A picture of 112 x 112 has eight more columns on either side.
TEMPLATE = np.array(
    [
        [30.2946, 51.6963],
        [65.5318, 51.5014],
        [48.0252, 71.7366],
        [33.5493, 92.3655],
        [62.7299, 92.2041],
    ]
)
WIDTHS = {"112x96": 96, "112x112": 112}

Size = Literal["112x96", "112x112"]

logger = logging.getLogger(__name__)


def align_face(image: NDArray[np.uint8], landmarks: ArrayLike, size: Size) -> NDArray[np.uint8]:
    """Aligns the face in image to the template.

    Args:
      image: (H, W, 3).
      landmarks: (5, 2), x and y of the five points in image, in the template's order.
      size: height and width of the aligned face.

    Returns:
      (112, 96 or 112, 3), black where image has no pixels.

    Raises:
      ValueError: landmarks have another shape, or no similarity fits them.
    """
    landmarks = np.asarray(landmarks, np.float64)
    if landmarks.shape != TEMPLATE.shape:
        raise ValueError(f"landmarks must have shape (5, 2); got {landmarks.shape}")
    width = WIDTHS[size]
    template = TEMPLATE + [(width - 96) / 2, 0]
    similarity = skimage.transform.estimate_transform("similarity", landmarks, template)
    # scikit-image 0.25 returns NaN where later versions return False.
    if not similarity or np.isnan(similarity.params).any():
        raise ValueError(f"landmarks must be five points of a face; got {landmarks.tolist()}")
    aligned = skimage.transform.warp(
        image, similarity.inverse, output_shape=(112, width), preserve_range=True
    )
    return np.round(aligned).astype(np.uint8)


def read_landmarks(path: Path) -> dict[str, NDArray[np.float64]]:
    """Reads landmarks (5, 2) by image, from lines `person/image.jpg x1 y1 ... x5 y5`.

    The names are in Unicode's composed form (NFC).

    Raises:
      ValueError: a line is not a name and ten finite numbers, or it repeats an earlier name.
    """
    landmarks: dict[str, NDArray[np.float64]] = {}
    # Some editors begin a file with a byte-order mark.
    text = normalize("NFC", read_text(path).removeprefix("\ufeff"))
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            name, *numbers = line.strip().rsplit(maxsplit=10)
            if name in landmarks:
                raise ValueError(
                    f"{path}, line {number}: expected each image once; got {name} again"
                )
            with suppress(ValueError):
                points = np.array(numbers, np.float64).reshape(5, 2)
                if np.isfinite(points).all():
                    landmarks[name] = points
                    continue
            expected = "`person/image.jpg` and ten numbers"
            raise ValueError(f"{path}, line {number}: expected {expected}; got {line!r}")
    return landmarks


def align(faces: Path, landmarks: Path, out: Path, size: Size = "112x96") -> None:
    """Aligns a folder of faces by five landmarks. Skips images that are already in --out.

    Args:
      faces: folder of person/image.jpg, or of insightface's train.rec and train.idx.
      landmarks: file of lines `person/image.jpg x1 y1 ... x5 y5`, for left eye, right eye, nose,
        left and right corner of the mouth. Left means the left side of the picture.
      out: folder for the aligned images, which keep their names.
      size: height and width of the aligned images.
    """
    points, listed = read_landmarks(landmarks), list_faces(faces)
    keys = {name: normalize("NFC", name) for name in listed.names}
    known = [name for name in listed.names if keys[name] in points]
    todo = [name for name in known if not (out / name).exists()]

    def attempt(name: str) -> str | None:
        """Aligns an image; returns the reason if the alignment fails."""
        try:
            aligned = align_face(np.asarray(open_face(listed.read(name))), points[keys[name]], size)
        except BROKEN as error:
            return str(error)
        kind = Image.registered_extensions()[Path(name).suffix.lower()]
        with replacing(out / name) as file:
            Image.fromarray(aligned).save(file, kind, quality=95)
        return None

    reasons = thread_map(attempt, todo, max_workers=os.cpu_count(), desc="align", unit=" images")
    skipped = {name: reason for name, reason in zip(todo, reasons, strict=True) if reason}
    aligned = len(todo) - len(skipped)
    skipped |= {name: "no landmarks" for name, key in keys.items() if key not in points}
    skipped |= dict.fromkeys(sorted(points.keys() - set(keys.values())), "no such image")
    for name, reason in skipped.items():
        logger.warning("skipped %s: %s", name, reason)
    print(
        f"{aligned} images aligned into {out}, {len(known) - len(todo)} were there already, "
        f"{len(skipped)} skipped"
    )
