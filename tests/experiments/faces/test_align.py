"""Five-point alignment against a transform by hand."""

import unicodedata

import chex
import numpy as np
import pytest
from PIL import Image

from experiments.faces import align
from experiments.faces import images as faces

ANGLE, SCALE, SHIFT = 0.3, 1.7, np.array([80.0, 25.0])
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])


def elsewhere(points):
    """The position of a template point in the picture."""
    return SCALE * points @ TURN.T + SHIFT


def picture(size=(300, 320)):
    """A smooth picture whose value at (x, y) is known, drawn in the template's coordinates."""
    columns, rows = np.meshgrid(np.arange(size[1]), np.arange(size[0]))
    placed = (np.stack([columns, rows], axis=-1) - SHIFT) @ TURN / SCALE
    return np.repeat(shade(placed)[..., None], 3, axis=-1).round().astype(np.uint8)


def shade(points):
    return 128 + 60 * np.sin(points[..., 0] / 15) + 60 * np.cos(points[..., 1] / 20)


@pytest.mark.parametrize("size, width, columns", [("112x96", 96, 0), ("112x112", 112, 8)])
def test_a_turned_scaled_shifted_face_comes_back(size, width, columns):
    aligned = align.align_face(picture(), elsewhere(align.TEMPLATE), size)
    chex.assert_shape(aligned, (112, width, 3))
    chex.assert_type(aligned, np.uint8)
    grid = np.stack(np.meshgrid(np.arange(width) - columns, np.arange(112)), axis=-1)
    chex.assert_trees_all_close(aligned[..., 0].astype(float), shade(grid), atol=2.5)


def test_landmarks_off_the_template_are_fitted_in_least_squares():
    noise = np.array([[1.0, 0], [-1, 0], [0, 0], [0, 0], [0, 0]])  # along the eyes: scale only
    landmarks = align.TEMPLATE + noise
    aligned = align.align_face(picture(), landmarks, "112x96")
    centred = landmarks - landmarks.mean(0), align.TEMPLATE - align.TEMPLATE.mean(0)
    first, second = (points @ [1, 1j] for points in centred)
    turn = np.vdot(first, second) / np.vdot(first, first)  # the least-squares complex factor
    grid = np.stack(np.meshgrid(np.arange(96), np.arange(112)), axis=-1)
    source = ((grid - align.TEMPLATE.mean(0)) @ [1, 1j]) / turn + landmarks.mean(0) @ [1, 1j]
    placed = (np.stack([source.real, source.imag], axis=-1) - SHIFT) @ TURN / SCALE
    inside = (source.real > 1) & (source.imag > 1)
    difference = aligned[..., 0].astype(float) - shade(placed)
    assert np.abs(difference[inside]).max() < 2.5


@pytest.mark.parametrize("landmarks", [np.ones((5, 2)), np.ones((4, 2))])
def test_impossible_landmarks_are_refused(landmarks):
    with pytest.raises(ValueError, match="landmarks must"):
        align.align_face(picture(), landmarks, "112x96")


@pytest.mark.parametrize("line", ["a/b.jpg 1 2 3", "a/b.jpg " + "nan " * 10, "1 2 " * 5])
def test_a_line_that_does_not_fit_is_named(tmp_path, line):
    path = tmp_path / "landmarks.txt"
    path.write_text(f"ok/fine.jpg {'1.5 ' * 10}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"landmarks.txt, line 3: expected `person/image.jpg` and"):
        align.read_landmarks(path)


def test_landmarks_given_twice_are_refused(tmp_path):
    path = tmp_path / "landmarks.txt"
    path.write_text("a/b.jpg " + "1 " * 10 + "\na/b.jpg " + "2 " * 10)
    with pytest.raises(ValueError, match=r"line 2: expected each image once; got a/b.jpg again"):
        align.read_landmarks(path)


def test_names_match_in_any_form_of_unicode_and_after_a_byte_order_mark(tmp_path, capsys):
    composed, parts = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    (tmp_path / "in" / parts).mkdir(parents=True)
    Image.fromarray(picture()).save(tmp_path / "in" / parts / "1.png")
    points = " ".join(str(value) for value in elsewhere(align.TEMPLATE).ravel())
    landmarks = tmp_path / "landmarks.txt"
    landmarks.write_text(f"{composed}/1.png {points}\n", encoding="utf-8-sig")
    align.align(tmp_path / "in", landmarks, tmp_path / "out")
    assert "1 images aligned" in capsys.readouterr().out
    assert (tmp_path / "out" / parts / "1.png").exists()


def test_a_folder_is_aligned_and_resumed(tmp_path, caplog, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    for name in ("Ada/a.png", "Ada/b c.jpg", "Bob/broken.jpg", "Bob/unknown.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture()).save(folder / name)
    (folder / "Bob/broken.jpg").write_bytes(b"no image")
    points = " ".join(str(value) for value in elsewhere(align.TEMPLATE).ravel())
    (tmp_path / "landmarks.txt").write_text(
        "".join(f"{n} {points}\n" for n in ("Ada/a.png", "Ada/b c.jpg", "Bob/broken.jpg", "no.jpg"))
    )
    arguments = folder, tmp_path / "landmarks.txt", out, "112x96"
    align.align(*arguments)
    assert "2 images aligned" in capsys.readouterr().out
    for skipped in ("Bob/broken.jpg: cannot", "Bob/unknown.jpg: no landmarks", "no.jpg: no such"):
        assert skipped in caplog.text
    expected = align.align_face(picture(), elsewhere(align.TEMPLATE), "112x96")
    chex.assert_trees_all_equal(
        faces.read_face((out / "Ada/a.png").read_bytes(), (112, 96)), expected
    )
    with Image.open(out / "Ada/b c.jpg") as image:
        assert image.size == (96, 112)
    assert sorted(path.name for path in out.rglob("*.*")) == ["a.png", "b c.jpg"]

    Image.fromarray(np.zeros_like(expected)).save(out / "Ada/a.png")
    align.align(*arguments)
    assert not faces.read_face((out / "Ada/a.png").read_bytes(), (112, 96)).any()
    assert "0 images aligned" in capsys.readouterr().out.splitlines()[-1]
