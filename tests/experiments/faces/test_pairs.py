"""Pairs drawn from a folder have LFW's format, no person in two folds, and no pair twice."""

import shutil
import unicodedata

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


def test_pairs_have_lfws_format_and_folds_share_nobody(digits, tmp_path):
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


def test_too_few_pairs_and_other_names_are_refused(digits, tmp_path, capsys):
    command = ["pairs", "--faces", str(digits), "--out", str(tmp_path / "pairs.txt")]
    assert main([*command, "--folds", "5", "--each", "13"]) == 2
    said = capsys.readouterr().err
    assert "a fold's 2 people, 12 of one person and 16 of two; got 13" in said
    (tmp_path / "Ada").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "Ada" / "holiday.png")
    assert main(["pairs", "--faces", str(tmp_path), "--out", str(tmp_path / "p.txt")]) == 2
    assert "Ada/Ada_0001.jpg; found Ada/holiday.png" in capsys.readouterr().err


def test_two_images_of_one_number_are_refused(digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "faces")
    shutil.copy(tmp_path / "faces/one/one_0001.png", tmp_path / "faces/one/one_0001.jpg")
    command = ["pairs", "--faces", str(tmp_path / "faces"), "--folds", "2", "--each", "2"]
    assert main([*command, "--out", str(tmp_path / "pairs.txt")]) == 2
    assert "found one/one_0001.jpg and one/one_0001.png" in capsys.readouterr().err
    assert not (tmp_path / "pairs.txt").exists()
    (tmp_path / "faces/one/one_0001.jpg").rename(tmp_path / "faces/one/one_²²²².jpg")
    assert main([*command, "--out", str(tmp_path / "pairs.txt")]) == 2
    assert "found one/one_²²²².jpg" in capsys.readouterr().err


def test_a_folder_and_pairs_may_write_a_name_in_two_forms(digits, tmp_path):
    """macOS returns decomposed folder names; editors and this command write composed names."""
    composed, parts = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    for person, other in ((parts, "one"), ("Ada", "two")):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for file in (digits / other).iterdir():
            name = file.name.replace(other, person)
            shutil.copy(file, tmp_path / "faces" / person / name)
    listed = list_faces(tmp_path / "faces")
    assert len(listed.names) == 8 and listed.people == ("Ada", composed)
    for form in (composed, parts):
        text = f"1\n{form}\t1\t2\n{form}\t1\tAda\t1\n"
        (tmp_path / "pairs.txt").write_text(text, encoding="utf-8-sig")
        read = read_pairs(tmp_path / "pairs.txt")
        assert people_of_fold(read, 0) == {"Ada", composed}
        left = list_faces(tmp_path / "faces", without=people_of_fold(read, 0) - {"Ada"})
        assert left.people == ("Ada",)
        verify = ["verify", "--pixels", "--faces", str(tmp_path / "faces")]
        verify += ["--pairs", *[str(tmp_path / "pairs.txt")] * 2]
        assert main([*verify, "--out", str(tmp_path / "result.json")]) == 0
    command = ["pairs", "--faces", str(tmp_path / "faces"), "--folds", "1", "--each", "3"]
    assert main([*command, "--out", str(tmp_path / "drawn.txt")]) == 0
    assert people_of_fold(read_pairs(tmp_path / "drawn.txt"), 0) == {"Ada", composed}


@pytest.mark.parametrize(
    "lines, message",
    [
        ("Ada\t1\t1\nAda\t1\tBob\t2\n", "expected `name i j`; got 'Ada 1 1', not two images of"),
        ("Ada\t1\t01\nAda\t1\tBob\t2\n", "expected `name i j`; got 'Ada 1 01', not two images of"),
        ("Ada\t1\t2\nAda\t1\tAda\t2\n", "`name i other j`; got 'Ada 1 Ada 2', not images of two"),
        ("Ada\t1\t²\nAda\t1\tBob\t2\n", "expected `name i j`; got 'Ada 1 ²'"),
    ],
)
def test_a_pair_of_one_image_or_of_one_person_for_two_is_named(tmp_path, lines, message):
    (tmp_path / "pairs.txt").write_text(f"1\n{lines}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"pairs.txt: .*{message}"):
        read_pairs(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_text("²\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the first line must be"):
        read_pairs(tmp_path / "pairs.txt")
