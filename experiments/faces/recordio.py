"""The training folders of insightface, `train.rec` and `train.idx`: MXNet's indexed RecordIO.

A line of `train.idx` holds a record's key, a tab, and the record's place in `train.rec`. A record
is a magic word, a word whose lower 29 bits are the length of the data, the data, and zeros up to a
multiple of 4 bytes. Where the data contains the magic word at a multiple of 4 bytes, the writer
drops this word and splits the data into several records. The upper 3 bits of the second word say
which part a record holds: 0 whole, 1 first, 2 in between, 3 last.

The data of an image is a header (flag, label, id, id), as many float32 labels as the flag says, and
the image file. The first label is the number of the person. Record 0 may be a header alone. Its
first label is then one more than the number of images, the images are records 1, 2, ..., and this
module ignores all later records.

Source: https://github.com/dmlc/dmlc-core/blob/main/src/recordio.cc; `MXFaceDataset` of
https://github.com/deepinsight/insightface for record 0.
"""

import struct
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from experiments.store.files import read_text

RECORDS, INDEX = "train.rec", "train.idx"
MAGIC_WORD = 0xCED7230A
MAGIC = struct.pack("<I", MAGIC_WORD)
LENGTH_BITS = 29
HEADER = struct.Struct("<IfQQ")

Integers = NDArray[np.int64]


def list_records(folder: Path) -> tuple[dict[str, list[str]], Callable[[str], bytes]]:
    """Lists the images of each person under names like LFW's: `7/7_0123.jpg` is record 123.

    Returns:
      the names by person, and a function that reads a named image file.

    Raises:
      ValueError: a file is missing, damaged, cut off, or not a regular file.
    """
    path = folder / RECORDS
    for file in (path, folder / INDEX):
        if not file.is_file():
            raise ValueError(f"faces: expected {RECORDS} beside {INDEX}; {file} is no file")
    keys, places, people = _indexed(path, folder / INDEX)
    names = defaultdict[str, list[str]](list)
    for row in np.lexsort((keys, people)):
        person = f"{people[row]}"
        names[person].append(f"{person}/{person}_{keys[row]:04d}.jpg")

    def read(name: str) -> bytes:
        key = int(Path(name).stem.rpartition("_")[2])
        return read_image(path, int(places[np.searchsorted(keys, key)]))

    return names, read


def read_image(path: Path, place: int) -> bytes:
    """Reads the image file of the record that begins at place.

    Raises:
      ValueError: no whole record begins there.
    """
    record = read_record(path, place)
    (labels,) = struct.unpack_from("<I", record)
    return record[HEADER.size + 4 * labels :]


def read_record(path: Path, place: int) -> bytes:
    """Reads the data of the record that begins at place.

    Raises:
      ValueError: no whole record begins there.
    """
    parts = []
    with path.open("rb") as file:
        file.seek(place)
        while True:
            begin = file.read(8)
            (word,) = struct.unpack("<I", begin[4:].ljust(4, b"\0"))
            part, length = word >> LENGTH_BITS, word % (1 << LENGTH_BITS)
            parts.append(file.read(length))
            if begin[:4] != MAGIC or len(parts[-1]) < length:
                raise ValueError(f"no whole record begins at byte {place} of {path}")
            if part in (0, 3):
                return MAGIC.join(parts)
            file.seek(-length % 4, 1)


def _indexed(path: Path, index: Path) -> tuple[Integers, Integers, Integers]:
    """Reads the key, place and person of each image, sorted by key."""
    try:
        keys, places = np.array(read_text(index).split(), np.int64).reshape(-1, 2).T
    except (ValueError, OverflowError) as error:  # a number of more than 64 bits
        raise ValueError(f"{index}: expected lines of a key and a place; {error}") from error
    order = np.argsort(keys)
    keys, places = keys[order], places[order]
    if len(np.unique(keys)) < len(keys) or not len(keys):
        raise ValueError(f"{index}: expected every key once; got {len(keys)} lines")
    size = path.stat().st_size
    if size % 4 or (places < 0).any() or (places > size - 8 - HEADER.size).any():
        raise ValueError(f"{path}: the records of {index} are not all in it; is it cut off?")
    if (places % 4).any():
        raise ValueError(f"{index}: expected places that are multiples of 4")
    words, at = np.memmap(path, np.dtype("<u4"), "r"), places // 4
    length = words[at + 1].astype(np.int64) % (1 << LENGTH_BITS)
    flag = words[at + 2].astype(np.int64)
    content = length - HEADER.size - 4 * flag
    whole = (words[at] == MAGIC_WORD) & (content >= 0) & (places + 8 + length <= size)
    if not whole.all():
        raise ValueError(f"{path}: no whole record begins at byte {places[~whole][0]}")
    labels = words[np.where(flag > 0, at + 2 + HEADER.size // 4, at + 3)].view(np.float32)
    images = np.ones(len(keys), bool)
    if keys[0] == 0 and content[0] == 0:
        images = (keys > 0) & (keys < labels[0])
        if images.sum() != labels[0] - 1:
            expected = f"{labels[0] - 1:.0f} images, as record 0 says"
            raise ValueError(f"{index}: expected {expected}; got {images.sum()}")
        if not images.any():
            raise ValueError(f"{path}: record 0 says that there are no images")
    keys, places, labels = keys[images], places[images], labels[images]
    if not np.all((labels >= 0) & (labels == np.floor(labels)) & (labels < 2**31)):
        raise ValueError(f"{path}: expected labels that are whole numbers from 0 on")
    return keys, places, labels.astype(np.int64)
