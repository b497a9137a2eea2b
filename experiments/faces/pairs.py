"""Pairs of images drawn from a folder of faces, in the format of LFW's view 2.

Each person is in one fold only, so a network that learned from some folds can be tested on the
others.
"""

from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np

from experiments.faces.images import Faces, list_faces
from experiments.store.files import replacing

Images = dict[str, list[int]]


def pairs(faces: Path, out: Path, folds: int = 10, each: int = 300, seed: int = 0) -> None:
    """Draws pairs of one person and pairs of two people from a folder of person/person_0001.jpg.

    Args:
      faces: folder of person/person_0001.jpg, or of insightface's train.rec and train.idx.
      out: the file to write, in the format of LFW's pairs.txt.
      folds: number of folds; no two folds share a person.
      each: number of pairs of one person in a fold; a fold has as many pairs of two people.
      seed: decides the draw.
    """
    for name, value in (("folds", folds), ("each", each)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    images, rng = numbered(list_faces(faces)), np.random.default_rng(seed)
    people = rng.permutation(list(images)).tolist()
    lines = [f"{folds}\t{each}"]
    for fold in range(folds):
        lines += fold_lines({person: images[person] for person in people[fold::folds]}, each, rng)
    with replacing(out) as file:
        file.write("\n".join([*lines, ""]).encode())
    print(f"{out}: {folds} folds of {each} + {each} pairs of {len(people)} people")


def numbered(faces: Faces) -> Images:
    """Finds the numbers of each person's images.

    Raises:
      ValueError: an image is not named as in LFW, or two images of a person have one number.
    """
    images: dict[str, dict[int, str]] = {person: {} for person in faces.people}
    for name, label in zip(faces.names, faces.labels, strict=True):
        person = faces.people[label]
        number = normalize("NFC", Path(name).stem).removeprefix(f"{person}_")
        if not number.isdecimal() or number != f"{int(number):04d}":
            raise ValueError(
                f"pairs names images as LFW does, {person}/{person}_0001.jpg; found {name}"
            )
        if twice := images[person].get(int(number)):
            raise ValueError(f"pairs names images by number; found {twice} and {name}")
        images[person][int(number)] = name
    return {person: list(numbers) for person, numbers in images.items()}


def fold_lines(images: Images, each: int, rng: np.random.Generator) -> list[str]:
    """Draws ``each`` lines `name i j`, then as many lines `name i other j`, no pair twice.

    Raises:
      ValueError: the fold's people have too few pairs.
    """
    counts = np.array([len(numbers) for numbers in images.values()])
    same = int((counts * (counts - 1) // 2).sum())
    different = int((counts.sum() ** 2 - (counts**2).sum()) // 2)
    if min(same, different) < each:
        raise ValueError(
            f"each must be at most the pairs of a fold's {len(images)} people, {same} of one "
            f"person and {different} of two; got {each}"
        )
    return [*_drawn(_same(images, rng), each), *_drawn(_different(images, rng), each)]


def _drawn(lines: Iterator[str], count: int) -> list[str]:
    """Takes the first ``count`` different lines of an endless stream."""
    seen: dict[str, None] = {}
    while len(seen) < count:
        seen[next(lines)] = None
    return list(seen)


def _same(images: Images, rng: np.random.Generator) -> Iterator[str]:
    several = [person for person, numbers in images.items() if len(numbers) > 1]
    while True:
        person = several[rng.integers(len(several))]
        i, j = sorted(rng.choice(images[person], 2, replace=False))
        yield f"{person}\t{i}\t{j}"


def _different(images: Images, rng: np.random.Generator) -> Iterator[str]:
    people = list(images)
    while True:
        one, other = (people[k] for k in sorted(rng.choice(len(people), 2, replace=False)))
        yield f"{one}\t{rng.choice(images[one])}\t{other}\t{rng.choice(images[other])}"
