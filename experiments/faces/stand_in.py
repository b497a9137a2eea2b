"""Handwritten digits in place of faces: a folder that the face commands can read.

The images are scikit-learn's scans; the ten "people" are the digits. A measurement on digits shows
that the commands work; it says nothing about faces.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from experiments.store.files import replacing

PEOPLE = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_digits(folder: Path, images: int = 60, size: int = 32) -> None:
    """Writes folder/zero/zero_0001.png and so on.

    Args:
      folder: created if missing.
      images: number of scans of each digit, at most 174.
      size: height and width of an image.
    """
    # scikit-learn takes seconds to import, for which no other command should wait.
    from sklearn.datasets import load_digits

    digits = load_digits()
    for digit, person in enumerate(PEOPLE):
        scans = digits.images[digits.target == digit][:images]
        for number, scan in enumerate(scans, start=1):
            pixels = Image.fromarray((scan * 15).astype(np.uint8)).convert("RGB")
            with replacing(folder / person / f"{person}_{number:04d}.png") as file:
                pixels.resize((size, size), Image.Resampling.BILINEAR).save(file, format="PNG")
