"""insightface's training folders, written from the description of the format."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.faces import recordio
from experiments.faces.images import FaceImages, list_faces
from experiments.faces.train import fingerprint

MAGIC = bytes.fromhex("0a23d7ce")
LABELS = [0, 0, 0, 1, 1, 2]


def picture(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (36, 36, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def packed(label, file, flag=0, key=0):
    """MXNet's IRHeader and the file; a flag is the number of labels."""
    if not flag:
        return struct.pack("<IfQQ", 0, label, key, 0) + file
    return struct.pack("<IfQQ", flag, 0.0, key, 0) + np.array(label, "<f4").tobytes() + file


def record(data):
    """A record without the magic word in its data, padded to a multiple of four bytes."""
    return MAGIC + struct.pack("<I", len(data)) + data + bytes(-len(data) % 4)


def write(folder, records):
    """Writes {key: data} as train.rec, train.idx and property."""
    folder.mkdir(parents=True, exist_ok=True)
    rec, idx = b"", ""
    for key, data in records.items():
        idx += f"{key}\t{len(rec)}\n"
        rec += data if data.startswith(MAGIC) else record(data)
    (folder / "train.rec").write_bytes(rec)
    (folder / "train.idx").write_text(idx)
    (folder / "property").write_text("3,36,36")


def as_insightface(labels, flag=0):
    """Record 0 with the number of images, the images, and a record for each person."""
    images = {
        key: packed([label, 0.0] if flag else label, picture(key), flag, key)
        for key, label in enumerate(labels, start=1)
    }
    count = len(images) + 1
    people = {count + person: packed([0.0, 0.0], b"", 2) for person in set(labels)}
    return {0: packed([count, count + len(people)], b"", 2)} | images | people


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "casia", as_insightface(LABELS))
    return tmp_path / "casia"


@pytest.mark.parametrize("flag", [0, 2])
def test_a_packed_folder_is_a_folder_of_people(tmp_path, flag):
    write(tmp_path, as_insightface(LABELS, flag))
    listed = list_faces(tmp_path)
    assert listed.people == ("0", "1", "2") and listed.labels.tolist() == LABELS
    assert listed.names[0] == "0/0_0001.jpg" and listed.names[3] == "1/1_0004.jpg"
    for key, name in enumerate(listed.names, start=1):
        assert listed.read(name) == picture(key)
    assert list_faces(tmp_path, minimum_images=2, without={"0"}).names == listed.names[3:5]
    image = FaceImages(listed, (36, 36))[4]["image"]
    assert (image == np.asarray(Image.open(io.BytesIO(picture(5))))).all()


def test_without_record_0_every_record_is_an_image_in_any_order(tmp_path):
    write(tmp_path, {7: packed(10, b"ten"), 3: packed(2, b"two"), 12345: packed(2, b"more")})
    listed = list_faces(tmp_path)
    assert listed.people == ("2", "10")
    assert listed.names == ("2/2_0003.jpg", "2/2_12345.jpg", "10/10_0007.jpg")
    assert [listed.read(name) for name in listed.names] == [b"two", b"more", b"ten"]


def test_a_record_that_holds_the_magic_word_lies_in_parts(tmp_path):
    """The writer drops an aligned magic word and splits there; elsewhere the word stays."""
    begin = packed(5, b"abcd")
    middle, end = b"....", b"x" + MAGIC + b"yz"
    parts = [(1, begin), (2, middle), (2, b""), (3, end)]
    data = b""
    for part, content in parts:
        data += MAGIC + struct.pack("<I", part << 29 | len(content)) + content
    data += bytes(-len(end) % 4)
    write(tmp_path, {1: data, 2: packed(5, b"next")})
    listed = list_faces(tmp_path)
    joined = b"abcd" + MAGIC + middle + MAGIC + MAGIC + end
    assert [listed.read(name) for name in listed.names] == [joined, b"next"]
    (tmp_path / "train.rec").write_bytes((tmp_path / "train.rec").read_bytes()[:48])
    with pytest.raises(ValueError, match="no whole record begins at byte 0"):
        recordio.read_record(tmp_path / "train.rec", 0)


def test_commands_take_a_packed_folder(folder, tmp_path, capsys):
    pairs, out = tmp_path / "pairs.txt", tmp_path / "result.json"
    words = ["--faces", str(folder), "--out"]
    assert main(["pairs", *words, str(pairs), "--folds", "1", "--each", "2"]) == 0
    pairs.write_text(pairs.read_text().replace("1\t2\n", "2\n", 1))
    verify = ["verify", "--pixels", *words, str(out), "--pairs", str(pairs), str(pairs)]
    assert main(verify) == 0
    assert json.loads(out.read_text())["pairs"] == 8
    before = fingerprint(list_faces(folder))
    rec = bytearray((folder / "train.rec").read_bytes())
    rec[-200] ^= 1  # within the last image
    (folder / "train.rec").write_bytes(rec)
    assert fingerprint(list_faces(folder)) != before


def cut(folder):
    rec = (folder / "train.rec").read_bytes()
    (folder / "train.rec").write_bytes(rec[: len(rec) // 8 * 4])


def spoil(at, value):
    def change(folder):
        rec = bytearray((folder / "train.rec").read_bytes())
        rec[at : at + len(value)] = value
        (folder / "train.rec").write_bytes(rec)

    return change


FIRST = 40  # where record 1 begins: 8 bytes, a header of 24, two labels


def index(change):
    def write_index(folder):
        (folder / "train.idx").write_text(change((folder / "train.idx").read_text()))

    return write_index


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "train.idx").unlink(), "train.idx is no file"),
        (lambda folder: (folder / "train.rec").write_bytes(b""), "is it cut off"),
        (cut, "is it cut off"),
        (spoil(FIRST, b"jpeg"), f"no whole record begins at byte {FIRST}"),
        (spoil(FIRST + 4, b"\xff\xff\xff\x1f"), f"no whole record begins at byte {FIRST}"),
        (spoil(FIRST + 8, b"\xff\xff\xff\xff"), f"no whole record begins at byte {FIRST}"),
        (spoil(FIRST + 12, struct.pack("<f", 0.5)), "labels that are whole numbers"),
        (spoil(FIRST + 12, struct.pack("<f", -1)), "labels that are whole numbers"),
        (spoil(FIRST + 12, struct.pack("<f", np.nan)), "labels that are whole numbers"),
        (spoil(32, struct.pack("<f", 100)), "expected 99 images, as record 0 says; got 9"),
        (spoil(32, struct.pack("<f", np.inf)), "expected inf images, as record 0 says; got 9"),
        (index(lambda text: ""), "expected every key once; got 0 lines"),
        (index(lambda text: text.replace("\n3\t", "\n2\t")), "expected every key once"),
        (index(lambda text: text.replace("\n3\t", "\n3\t1")), "train.rec"),
        (index(lambda text: text.replace("\n1\t40", "\n1\t41")), "multiples of 4"),
        (index(lambda text: text.replace("\n1\t40", "\n1\t-4")), "is it cut off"),
        (index(lambda text: text.replace("\n2\t", "\ntwo\t")), "lines of a key and a place"),
        (index(lambda text: text + "9"), "lines of a key and a place"),
        (index(lambda text: text + f"9\t{2**63}"), "lines of a key and a place"),
        (spoil(32, struct.pack("<f", 1)), "record 0 says that there are no images"),
        (index(lambda text: "".join(text.splitlines(True)[:4])), "expected 6 images"),
    ],
)
def test_damage_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        list_faces(folder)
