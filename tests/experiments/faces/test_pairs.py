"""Pairs drawn from a folder: LFW's format, no person in two folds, no pair twice."""

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.faces import stand_in
from experiments.faces.images import list_faces
from experiments.faces.protocol import people_of_fold, read_pairs


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    stand_in.write_digits(folder, images=4)
    return folder


def test_digits_are_a_folder_of_people(digits):
    listed = list_faces(digits)
    assert set(listed.people) == set(stand_in.PEOPLE) and len(listed.names) == 40
    with Image.open(digits / "one" / "one_0002.png") as image:
        assert image.size == (32, 32) and image.mode == "RGB"
        assert np.asarray(image).max() > 200


def test_pairs_are_lfws_and_folds_share_nobody(digits, tmp_path):
    file = tmp_path / "pairs.txt"
    command = ["pairs", "--faces", str(digits), "--folds", "3", "--each", "12", "--out", str(file)]
    assert main(command) == 0
    drawn = read_pairs(file)
    people = [people_of_fold(drawn, fold) for fold in range(3)]
    assert sum(map(len, people)) == len(frozenset.union(*people)) == 10
    sides = list(zip(drawn.first.tolist(), drawn.second.tolist(), strict=True))
    assert len({frozenset(pair) for pair in sides}) == len(sides) == 72
    for (first, second), same in zip(sides, drawn.same.tolist(), strict=True):
        assert first != second
        assert (first.split("/")[0] == second.split("/")[0]) == same
        assert (digits / f"{first}.png").exists() and (digits / f"{second}.png").exists()
    before = file.read_bytes()
    assert main(command) == 0
    assert file.read_bytes() == before
    assert main([*command, "--seed", "1"]) == 0
    assert file.read_bytes() != before


def test_too_few_pairs_and_other_names_are_said(digits, tmp_path, capsys):
    command = ["pairs", "--faces", str(digits), "--out", str(tmp_path / "pairs.txt")]
    assert main([*command, "--folds", "5", "--each", "13"]) == 2
    said = capsys.readouterr().err
    assert "a fold's 2 people, 12 of one person and 16 of two; got 13" in said
    (tmp_path / "Ada").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "Ada" / "holiday.png")
    assert main(["pairs", "--faces", str(tmp_path), "--out", str(tmp_path / "p.txt")]) == 2
    assert "Ada/Ada_0001.jpg; found Ada/holiday.png" in capsys.readouterr().err
