"""insightface's test sets: files of Python 2 and 3 are read, others refused without unpickling."""

import io
import json
import os
import pickle  # noqa: TID251, the files are made here
import struct

import numpy as np
import pytest
from PIL import Image
from sklearn.model_selection import KFold

from experiments.__main__ import main
from experiments.faces.bins import parsed, read_bin


def face(seed, noise=0):
    """A coarse picture of the seed, with noise."""
    coarse = np.random.default_rng(seed).integers(40, 216, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    pixels = coarse + np.random.default_rng(noise).integers(-20, 20, (32, 32, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def python_2(images, same):
    """Pickles as Python 2 would with protocol 2, where strings are bytes; opcodes by hand."""
    lists = b"]q\x00("
    for image in images:
        short = len(image) < 256
        lists += b"U" + bytes([len(image)]) if short else b"T" + struct.pack("<i", len(image))
        lists += image + b"r" + struct.pack("<I", len(lists))
    lists += b"e]q\x01("
    lists += b"".join(b"\x88" if one_person else b"\x89" for one_person in same)
    return b"\x80\x02" + lists + b"e\x86q\x02."


WRITERS = {
    "2": python_2,
    **{f"3, {p}": lambda *lists, p=p: pickle.dumps(lists, protocol=p) for p in (3, 4, 5)},
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_python_writes_is_read(tmp_path, write):
    images = [b"\xff\xd8 first", b"", bytes(range(256)) * 300, b"\x80.\xe9"]
    path = tmp_path / "lfw.bin"
    path.write_bytes(write(images, [True, False]))
    assert parsed(path) == (images, [True, False])


def test_an_object_may_occur_twice(tmp_path):
    image = b"the same bytes"
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(([image] * 2100, [True, False, True] * 350)))
    assert parsed(tmp_path / "lfw.bin") == ([image] * 2100, [True, False, True] * 350)


def test_pairs_are_neighbours_and_folds_are_kfolds(tmp_path):
    path = tmp_path / "cfp_fp.bin"
    same = [i % 3 == 0 for i in range(34)]
    path.write_bytes(pickle.dumps(([b"%d" % i for i in range(68)], same)))
    faces, pairs = read_bin(path)
    assert pairs.same.tolist() == same
    assert [faces.read(name) for name in pairs.first] == [b"%d" % i for i in range(0, 68, 2)]
    assert [faces.read(name) for name in pairs.second] == [b"%d" % i for i in range(1, 68, 2)]
    for fold, (_, tested) in enumerate(KFold(10).split(np.arange(34))):
        assert np.flatnonzero(pairs.fold == fold).tolist() == tested.tolist()


def test_verify_takes_a_bin(tmp_path, capsys):
    """Two pictures of one person differ only by noise, so pixels decide every pair."""
    images, same = [], []
    for pair in range(20):
        images += [face(pair, 1), face(pair if pair % 2 else 100 + pair, 2)]
        same.append(bool(pair % 2))
    path, out = tmp_path / "lfw.bin", tmp_path / "result.json"
    path.write_bytes(python_2(images, same))
    command = ["verify", "--pixels", "--bin", str(path), "--out", str(out)]
    assert main(command) == 0
    result = json.loads(out.read_text())
    assert result["pairs"] == 20 and result["tested_folds"] == list(range(10))
    assert result["metrics"]["accuracy"] == 1 and result["metrics"]["auc"] == 1
    for more in (["--pairs", "p.txt"], ["--faces", "folder"]):
        assert main([*command, *more]) == 2
    assert "exactly one of --pairs and --bin" in capsys.readouterr().err
    images[6] = b"no image"
    path.write_bytes(python_2(images, same))
    assert main(command) == 2
    assert "missing or broken (1): lfw.bin/00006" in capsys.readouterr().err


class Attack:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "owned"),)


LISTS = [b"a", b"b"], [True]


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_refused_and_not_created(tmp_path, protocol):
    path = tmp_path / "lfw.bin"
    for value in (Attack(tmp_path), ([b"a", Attack(tmp_path)], [True])):
        path.write_bytes(pickle.dumps(value, protocol=protocol))
        with pytest.raises(
            ValueError, match=r"lfw.bin must be a pickle of .*something else, \w+ at"
        ):
            parsed(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "value",
    [
        *((), [], b"", True, [[]], ([], []), ([b"a"], [True]), ([b"a", b"b"], [True, True])),
        *((LISTS[0], [1]), (["a", "b"], [True]), LISTS[0], (*LISTS, []), ({}, [True])),
        *(([[b"a"], b"b"], [True]), (LISTS[0], [np.True_]), ([np.zeros(3), b"b"], [True])),
        ([bytearray(b"a"), b"b"], [True]),
    ],
)
def test_other_values_are_refused(tmp_path, value):
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match=r"lfw.bin must be a pickle of \(images, same\)"):
        parsed(tmp_path / "lfw.bin")


def test_damage_gives_no_other_error(tmp_path):
    """Every prefix, and random changes of bytes, give valid lists or a ValueError."""
    path, rng = tmp_path / "lfw.bin", np.random.default_rng(0)
    for whole in (pickle.dumps(LISTS), python_2(*LISTS)):
        files = [whole[:length] for length in range(len(whole))]
        for _ in range(1500):
            changed = bytearray(whole)
            for at in rng.integers(len(whole), size=rng.integers(1, 4)):
                changed[at] = rng.integers(256)
            files.append(bytes(changed))
        refused = 0
        for file in files:
            path.write_bytes(file)
            try:
                images, same = parsed(path)
            except ValueError as error:
                refused += str(error).startswith(str(path))
            else:
                assert len(images) == 2 * len(same) and set(map(type, images)) == {bytes}
                refused += 1
        assert refused == len(files)


def test_a_list_within_itself_and_a_named_pipe_are_refused(tmp_path):
    within = []
    within.append(within)
    (tmp_path / "lfw.bin").write_bytes(pickle.dumps((within, [True])))
    with pytest.raises(ValueError, match="two lists"):
        parsed(tmp_path / "lfw.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(ValueError, match=r"pipe.bin must be .* no regular file"):
        parsed(tmp_path / "pipe.bin")
    with pytest.raises(FileNotFoundError):
        parsed(tmp_path / "absent.bin")
