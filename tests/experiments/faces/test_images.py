"""Folders of faces in Grain: listed images, skipped images, and the order of the stream."""

import itertools
import os
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import ExifTags, Image

from experiments.faces import images as faces

SIZE = (28, 24)


def write_face(path, seed, size=(30, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ada has 5 images, Bob 3 (one grey, one PNG) and Cy 1; other files are not faces."""
    for i in range(5):
        write_face(tmp_path / "Ada" / f"Ada_{i + 1:04d}.jpg", i)
    write_face(tmp_path / "Bob" / "Bob_0001.JPG", 10)
    write_face(tmp_path / "Bob" / "Bob_0002.png", 11, size=(64, 40))
    write_face(tmp_path / "Bob" / "Bob_0003.jpg", 12, mode="L")
    write_face(tmp_path / "Cy" / "Cy_0001.jpg", 20)
    (tmp_path / "Nobody").mkdir()
    (tmp_path / "pairs.txt").write_text("1\t1\n")
    (tmp_path / "Ada" / "notes.txt").write_text("no image")
    (tmp_path / "Ada" / "._Ada_0001.jpg").write_bytes(b"another system's file")
    return tmp_path


def test_a_folder_is_listed_in_order(folder):
    listed = faces.list_faces(folder)
    assert listed.people == ("Ada", "Bob", "Cy")
    assert listed.labels.tolist() == [0] * 5 + [1] * 3 + [2]
    assert listed.names[4:6] == ("Ada/Ada_0005.jpg", "Bob/Bob_0001.JPG")


def test_people_are_left_out_by_count_and_by_name(folder):
    listed = faces.list_faces(folder, minimum_images=3, without={"Ada"})
    assert listed.people == ("Bob",)
    assert listed.labels.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="minimum_images is 6, the most images of one person 5"):
        faces.list_faces(folder, minimum_images=6)


def test_a_folder_without_people_is_an_error_that_says_so(tmp_path):
    with pytest.raises(ValueError, match="missing is no folder"):
        faces.list_faces(tmp_path / "missing")
    with pytest.raises(ValueError, match="found no images"):
        faces.list_faces(tmp_path)
    write_face(tmp_path / "Ada_0001.jpg", 0)
    with pytest.raises(ValueError, match="found 1 images directly in it, of no person"):
        faces.list_faces(tmp_path)


def test_a_face_is_the_centre_at_the_size_asked_for(tmp_path):
    wide = np.zeros((40, 80, 3), np.uint8)
    wide[:, 20:60] = 200  # the square at the centre
    Image.fromarray(wide).save(tmp_path / "wide.png")
    square = faces.read_face((tmp_path / "wide.png").read_bytes(), (20, 20))
    assert (square[:, 1:-1] == 200).all()
    face = faces.read_face((tmp_path / "wide.png").read_bytes(), (20, 40))
    assert face.shape == (20, 40, 3) and face[:, 0].max() == 0


def test_batches_are_normalised_mirrored_at_random_and_shuffled(folder):
    listed = faces.list_faces(folder)
    images = faces.FaceImages(listed, SIZE)
    plain = next(iter(faces.ordered_batches(images, 9)))
    chex.assert_shape(plain["image"], (9, *SIZE, 3))
    chex.assert_type(plain["image"], np.float32)
    first = np.asarray(faces.read_face((folder / listed.names[0]).read_bytes(), SIZE), np.float64)
    chex.assert_trees_all_close(plain["image"][0], (first - 127.5) / 128, atol=1e-6)
    assert plain["index"].tolist() == list(range(9))

    epochs = list(itertools.islice(faces.training_batches(images, 9, seed=0), 4))
    assert all(sorted(epoch["index"]) == list(range(9)) for epoch in epochs)
    assert len({tuple(epoch["index"]) for epoch in epochs}) == 4
    mirrored = [
        (image == plain["image"][index, :, ::-1]).all()
        for epoch in epochs
        for image, index in zip(epoch["image"], epoch["index"], strict=True)
    ]
    same = [
        (image == plain["image"][index]).all()
        for epoch in epochs
        for image, index in zip(epoch["image"], epoch["index"], strict=True)
    ]
    assert all(np.array(mirrored) ^ np.array(same))
    assert 5 < sum(mirrored) < 31
    for epoch in epochs:
        assert (epoch["label"] == listed.labels[epoch["index"]]).all()


def test_processes_share_one_stream(folder):
    images = faces.FaceImages(faces.list_faces(folder), SIZE)
    alone = faces.training_batches(images, 4, seed=7)
    shards = [
        faces.training_batches(images, 2, seed=7, process_index=i, process_count=2) for i in (0, 1)
    ]
    for whole, even, odd in itertools.islice(zip(alone, *shards, strict=True), 8):
        for key in ("image", "label", "index"):
            together = np.stack([even[key], odd[key]], axis=1).reshape(whole[key].shape)
            chex.assert_trees_all_equal(together, whole[key])


def test_the_stream_resumes_in_the_middle_of_an_epoch(folder):
    images = faces.FaceImages(faces.list_faces(folder), SIZE)
    stream = iter(faces.training_batches(images, 2, seed=1))
    for _ in range(6):  # 12 images of epochs of 9
        next(stream)
    state = stream.get_state()
    expected = [next(stream) for _ in range(6)]
    resumed = iter(faces.training_batches(images, 2, seed=1))
    resumed.set_state(state)
    chex.assert_trees_all_equal([next(resumed) for _ in range(6)], expected)


def test_broken_images_are_named_counted_and_skipped(folder, caplog):
    (folder / "Ada" / "Ada_0002.jpg").write_bytes(b"no jpeg")
    whole = (folder / "Bob" / "Bob_0003.jpg").read_bytes()
    (folder / "Bob" / "Bob_0003.jpg").write_bytes(whole[: len(whole) // 2])
    images = faces.FaceImages(faces.list_faces(folder), SIZE)
    stream = iter(faces.training_batches(images, 7, seed=0))
    for _ in range(4):
        assert set(next(stream)["index"]) == set(range(9)) - {1, 7}
    assert set(images.broken) == {"Ada/Ada_0002.jpg", "Bob/Bob_0003.jpg"}
    assert len(caplog.records) == 2
    assert "Ada/Ada_0002.jpg" in caplog.text and "(2 so far)" in caplog.text
    assert next(iter(faces.ordered_batches(images, 9)))["index"].tolist() == [0, 2, 3, 4, 5, 6, 8]


def test_a_folder_of_broken_images_ends(tmp_path):
    for i in range(3):
        (tmp_path / "Ada").mkdir(exist_ok=True)
        (tmp_path / "Ada" / f"{i}.jpg").write_bytes(b"no jpeg")
    images = faces.FaceImages(faces.list_faces(tmp_path), SIZE)
    with pytest.raises(ValueError, match=r"all 3 images in .* are broken"):
        next(iter(faces.training_batches(images, 2, seed=0)))


def test_lfw_folder(lfw_dir):
    listed = faces.list_faces(lfw_dir)
    assert (len(listed.names), len(listed.people)) == (13233, 5749)
    at_least = {n: faces.list_faces(lfw_dir, minimum_images=n) for n in (2, 4, 10)}
    assert {n: (len(f.people), len(f.names)) for n, f in at_least.items()} == {
        2: (1680, 9164),
        4: (610, 6733),
        10: (158, 4324),
    }


@pytest.mark.slow
@pytest.mark.ci
def test_an_image_of_144_million_pixels_is_skipped(tmp_path):
    """Runs in a process of its own, without pytest's filter of warnings."""
    write_face(tmp_path / "Ada" / "Ada_0001.png", 0)
    Image.new("1", (12_000, 12_000)).save(tmp_path / "Ada" / "Ada_0002.png")
    script = (
        "import sys\n"
        "from experiments.faces import images\n"
        "read = images.FaceImages(images.list_faces(sys.argv[1]), (28, 24))\n"
        "print([read[i] is None for i in range(2)], *read.broken)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split("\n")[0] == "[False, True] Ada/Ada_0002.png"
    assert "skipped broken image Ada/Ada_0002.png" in done.stderr


def grey16():
    """16-bit values that 8 bits hold exactly: 257 k, for k = 0, 1, ..., 255, 0, 1, ..."""
    return Image.fromarray((257 * (np.arange(28 * 24).reshape(28, 24) % 256)).astype(np.uint16))


def half_transparent(mode):
    """A picture with opaque red on the left and transparent green on the right."""
    pixels = np.zeros((28, 24, 4), np.uint8)
    pixels[:, :12], pixels[:, 12:] = (255, 0, 0, 255), (0, 255, 0, 0)
    return Image.fromarray(pixels).quantize() if mode == "P" else Image.fromarray(pixels)


COLOUR = (200, 50, 100)
ONE_COLOUR = Image.new("RGB", (24, 28), COLOUR)
RAMP = np.arange(28 * 24).reshape(28, 24, 1) % 256 * np.ones(3, int)
HALF_RED = np.zeros((28, 24, 3), int) + np.where(np.arange(24)[:, None] < 12, (255, 0, 0), 0)


@pytest.mark.parametrize(
    "picture, kept, expected, tolerance",
    [
        pytest.param(grey16(), {"format": "PNG"}, RAMP, 0, id="16-bit grey"),
        pytest.param(half_transparent("P"), {"format": "PNG"}, HALF_RED, 0, id="palette, alpha"),
        pytest.param(half_transparent("RGBA"), {"format": "PNG"}, HALF_RED, 0, id="alpha"),
        pytest.param(ONE_COLOUR.convert("CMYK"), {"format": "JPEG"}, COLOUR, 4, id="CMYK"),
        pytest.param(ONE_COLOUR.convert("RGBA"), {"format": "BMP"}, COLOUR, 0, id="32-bit BMP"),
        pytest.param(
            ONE_COLOUR,
            {"format": "WEBP", "save_all": True, "lossless": True}
            | {"append_images": [Image.new("RGB", (24, 28))]},
            COLOUR,
            0,
            id="animated",
        ),
    ],
)
def test_every_kind_of_picture_keeps_its_colours(tmp_path, picture, kept, expected, tolerance):
    (tmp_path / "Ada").mkdir()
    picture.save(tmp_path / "Ada" / "1.png", **kept)
    read = faces.FaceImages(faces.list_faces(tmp_path), SIZE)[0]["image"].astype(int)
    assert np.abs(read - expected).max() <= tolerance


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_whose_white_is_unknown_are_named(tmp_path, caplog, dtype):
    write_face(tmp_path / "Ada" / "1.png", 0)
    Image.fromarray(np.full((28, 24), 0.5, dtype)).save(tmp_path / "Ada" / "2.png", format="TIFF")
    images = faces.FaceImages(faces.list_faces(tmp_path), SIZE)
    assert images[0] is not None and images[1] is None
    assert "Ada/2.png" in caplog.text and "32-bit grey values" in caplog.text


def exif(orientation):
    block = Image.Exif()
    block[ExifTags.Base.Orientation] = orientation
    block[ExifTags.Base.XResolution] = 72.0
    block[ExifTags.Base.Make] = "the maker of the camera"
    return block.tobytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_picture_is_turned_upright_whatever_else_its_exif_block_holds(tmp_path, suffix):
    """Random bytes in the block cause no error; the picture is turned or left as it is."""
    pixels = np.zeros((24, 28, 3), np.uint8)
    pixels[:, :14] = 250  # bright on the left, which orientation 6 turns to the top
    turned, file = exif(6), tmp_path / "face"
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True}
    rng, ups = np.random.default_rng(0), set()
    for attempt in range(200):
        block = bytearray(turned)
        if attempt:
            for at in rng.integers(6, len(block), rng.integers(1, 8)):
                block[at] = rng.integers(256)
        kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
        Image.fromarray(pixels).save(file, kind, exif=bytes(block), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow warns of each kind of damage once
            face = np.asarray(faces.open_face(file.read_bytes()))
        if attempt == 0:
            assert face.shape == (28, 24, 3)
            assert face[:12].min() > 240 and face[16:].max() < 10
        ups.add(face.shape)
    assert ups == {(28, 24, 3), (24, 28, 3)}


def test_the_orientation_counts_also_where_another_entry_is_damaged(tmp_path):
    """The resolution (entry 282) is text here, and Pillow cannot write such a block again."""
    damaged = exif(6).replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    assert damaged != exif(6)
    pixels = np.zeros((24, 28, 3), np.uint8)
    pixels[:, :14] = 250
    (tmp_path / "Ada").mkdir()
    Image.fromarray(pixels).save(tmp_path / "Ada" / "1.jpg", exif=damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        face = faces.FaceImages(faces.list_faces(tmp_path), SIZE)[0]["image"]
    assert face[:12].min() > 240 and face[16:].max() < 10


def test_folders_of_hidden_and_deeper_images_and_names_in_two_forms(tmp_path, caplog):
    composed, parts = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    write_face(tmp_path / parts / "1.png", 0)
    write_face(tmp_path / composed / "2.png", 1)
    write_face(tmp_path / ".cache" / "3.png", 2)
    write_face(tmp_path / "Ada" / "4.png", 3)
    write_face(tmp_path / "Ada" / "holiday" / "5.png", 4)
    listed = faces.list_faces(tmp_path)
    assert listed.people == ("Ada", composed)
    assert sorted(listed.names) == sorted(["Ada/4.png", f"{parts}/1.png", f"{composed}/2.png"])
    assert listed.labels.tolist() == [0, 1, 1]
    assert all(listed.read(name) == (tmp_path / name).read_bytes() for name in listed.names)
    assert (
        f"left out 1 folders of images within people's folders, such as {tmp_path}" in caplog.text
    )
    assert faces.list_faces(tmp_path, without={composed}).people == ("Ada",)


def test_a_folder_too_far_up_is_told_from_an_empty_one(tmp_path):
    write_face(tmp_path / "lfw" / "Ada" / "1.png", 0)
    with pytest.raises(ValueError, match=r"found images one folder deeper, in .*lfw/Ada$"):
        faces.list_faces(tmp_path)
    (tmp_path / "other" / "Ada").mkdir(parents=True)
    (tmp_path / "other" / "Ada" / "0001").write_bytes(b"no suffix")
    with pytest.raises(ValueError, match=r"found no images \(.bmp .jpeg .jpg .png .webp\)"):
        faces.list_faces(tmp_path / "other")


@pytest.mark.parametrize("name", [b"Jos\xe9/1.png", b"Ada/Jos\xe9.png"])
def test_a_name_that_is_not_utf8_is_named(tmp_path, name):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    try:
        file.parent.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    write_face(tmp_path / "plain.png", 0)
    (tmp_path / "plain.png").rename(file)
    with pytest.raises(ValueError, match=r"expected names in UTF-8 in .*; rename b'.*Jos\\xe9"):
        faces.list_faces(tmp_path)


def test_leaving_out_people_of_another_folder_is_a_mistake(folder):
    with pytest.raises(ValueError, match=r"none of the people to leave out is in .*: Eve"):
        faces.list_faces(folder, without={"Eve"})


def test_images_are_found_without_extension_and_in_any_form_of_unicode():
    composed, parts = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    names = ["A/A_0001.jpg", "Mr. X/Mr. X_0001", f"{parts}/{parts}_0001.png", "A/A_0001"]
    wanted = [f"{composed}/{composed}_0001", "Mr. X/Mr. X_0001"]
    assert faces.rows_of(wanted, names).tolist() == [2, 1]
    assert faces.rows_of([f"{parts}/{parts}_0001"], names).tolist() == [2]
    with pytest.raises(ValueError, match=r"missing or broken \(2\): B/B_0001, A/A_0002"):
        faces.rows_of(["B/B_0001", "A/A_0001", "A/A_0002", "B/B_0001"], names)
    for twice in (["A/A_0001.png"], ["A/A_0001"]):
        with pytest.raises(ValueError, match=f"A/A_0001, which is there twice: .* and {twice[0]}"):
            faces.rows_of(["A/A_0001"], ["A/A_0001.jpg", *twice])
