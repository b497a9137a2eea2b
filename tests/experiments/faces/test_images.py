"""Folders of faces through Grain: what is listed, what is skipped, and the order of the stream."""

import itertools
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image

from experiments.faces import images as faces

SIZE = (28, 24)


def write_face(path, seed, size=(30, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Ada 5 images, Bob 3 (one grey, one PNG), Cy 1, and files that are no faces."""
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
    square = faces.read_face(tmp_path / "wide.png", (20, 20))
    assert (square[:, 1:-1] == 200).all()
    face = faces.read_face(tmp_path / "wide.png", (20, 40))
    assert face.shape == (20, 40, 3) and face[:, 0].max() == 0


def test_batches_are_normalised_mirrored_at_random_and_shuffled(folder):
    listed = faces.list_faces(folder)
    images = faces.FaceImages(listed, SIZE)
    plain = next(iter(faces.ordered_batches(images, 9)))
    chex.assert_shape(plain["image"], (9, *SIZE, 3))
    chex.assert_type(plain["image"], np.float32)
    first = np.asarray(faces.read_face(folder / listed.names[0], SIZE), np.float64)
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


def test_an_image_of_144_million_pixels_is_skipped(tmp_path):
    """In a process of its own, whose warnings are not pytest's."""
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
