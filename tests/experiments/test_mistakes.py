"""Wrong command lines: each ends with exit code 2 and one line that names the mistake."""

import os
import re
import sys
import types
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.runtime_version import Domain, ValidateProtobufRuntimeVersion
from PIL import Image

from experiments.__main__ import BENCHMARKS, COMMANDS, main

DIGITS = ["train", "digits-m4", "--out", "{out}"]
FACES = ["train-faces", "--faces", "{good}/faces", "--out", "{out}/run", "--size", "32", "32"]
FACES += ["--width", "0.02", "--batch", "8"]
MNIST = ["train", "mnist-m4", "--out", "{out}", "--data"]
TUNE = ["tune", "digits-m4", "--pace", "annealed", "--out", "{out}"]
VERIFY = ["verify", "--out", "{out}/v.json"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with faces and data, good and damaged."""
    folder = tmp_path_factory.mktemp("good")
    for person in "AB":
        for number in range(1, 5):
            file = folder / "faces" / person / f"{person}_{number:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(file)
    (folder / "one" / "A").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "one" / "A" / "A_0001.png")
    (folder / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "flat" / "a.png")
    (folder / "pipes" / "A").mkdir(parents=True)
    os.mkfifo(folder / "pipes" / "A" / "A_0001.png")

    def arrays(count=12, size=28, classes=10):
        images = np.zeros((count, size, size, 1), np.uint8)
        labels = np.arange(count) % classes
        return {f"{s}_{w}": a for s in ("train", "test") for w, a in
                (("images", images), ("labels", labels))}  # fmt: skip

    def data(name, **changes):
        (folder / name).mkdir()
        np.savez(folder / name / "mnist.npz", **(arrays() | changes))
        return folder / name / "mnist.npz"

    whole = data("whole").read_bytes()
    for name, content in {
        "empty": b"",
        "text": b"train_images and so on\n",
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:400] + bytes(255 - b for b in whole[400:440]) + whole[440:],
        "zip": None,
    }.items():
        (folder / name).mkdir()
        if content is None:
            with zipfile.ZipFile(folder / name / "mnist.npz", "w") as archive:
                archive.writestr("readme.txt", "nothing")
        else:
            (folder / name / "mnist.npz").write_bytes(content)
    data("floats", train_images=np.zeros((12, 28, 28, 1)))
    data("small", test_images=np.zeros((12, 14, 14, 1), np.uint8))
    data("other", **arrays(size=14))
    data("few", train_labels=np.zeros(11, int))
    data("range", test_labels=np.full(12, 10))
    data("objects", train_labels=np.array([{}] * 12))
    (folder / "gap").mkdir()
    for number in (0, 2):
        np.savez(folder / "gap" / f"mnist.{number:02d}.npz", **arrays())
    (folder / "broken_tfds" / "mnist" / "3.0.1").mkdir(parents=True)
    (folder / "broken_tfds" / "mnist" / "3.0.1" / "dataset_info.json").write_text("{")

    for name, content in {
        "pairs.txt": "2\t1\nA\t1\t2\nA\t1\tB\t1\nB\t1\t2\nB\t3\tA\t3\n",
        "pairs_count.txt": "2\t2\nA\t1\t2\nA\t1\tB\t1\n",
        "pairs_word.txt": "2\t1\nA\tone\t2\nA\t1\tB\t1\nB\t1\t2\nB\t3\tA\t3\n",
        "pairs_head.txt": "hello\n",
        "pairs_empty.txt": "",
        "pairs_gone.txt": "2\t1\nA\t1\t9\nA\t1\tB\t1\nB\t1\t2\nB\t3\tA\t3\n",
        "landmarks.txt": "A/A_0001.png 1 2 3\n",
    }.items():
        (folder / name).write_text(content)
    (folder / "pairs_latin.txt").write_bytes("2\t1\nJosé\t1\t2\n".encode("latin-1"))
    (folder / "landmarks_latin.txt").write_bytes("é.png 1 2\n".encode("latin-1"))
    (folder / "embeddings.npz").write_text("names\n")
    (folder / "file").write_text("a file\n")
    foreign = {"empty": "{}", "list": "[]", "null": "null", "number": "3", "cut": '{"status": "fin'}
    foreign |= {"deep": 100_000 * "["}
    foreign |= {"nulls": '{"status": null, "seconds": null, "curves": null}'}
    foreign |= {"strange": '{"status": "lost", "seconds": {}, "curves": {}}'}
    for name, content in foreign.items():
        result = folder / f"foreign_{name}" / "digits-m4" / "seed0.json"
        result.parent.mkdir(parents=True)
        result.write_text(content)
        claim = folder / f"claims_{name}" / "digits-m4" / "seed0" / "claim"
        claim.parent.mkdir(parents=True)
        claim.write_text(content)
    for name, place in {
        "log": "digits-m4/seed0/metrics.jsonl",
        "claim": "digits-m4/seed0/claim",
        "result": "digits-m4/seed0.json",
        "data": "mnist.npz",
    }.items():
        pipe = folder / f"pipe_{name}" / place
        pipe.parent.mkdir(parents=True)
        os.mkfifo(pipe)
    log = folder / "log" / "digits-m4" / "seed0" / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("{}\n")
    return folder


MISTAKES = [
    # names and numbers of a configuration
    (["train", "mnist-m5", "--steps", "3"],
     "no configuration 'mnist-m5'; did you mean python -m experiments train mnist-m4 --steps 3 or"),
    (["train", "digits"], "no configuration 'digits'; did you mean .*train digits-m4.*; python -m"),
    (["tune", "cifar-m4"], "no configuration 'cifar-m4'; did you mean"),
    (["train", "zzz"], "no configuration 'zzz'"),
    (["train"], "train: name a configuration, such as mnist-m4; python -m experiments list"),
    (["trian", "mnist-m4"], "no command 'trian'; did you mean python -m experiments train mnist"),
    (["zzz"], "no command 'zzz'; python -m experiments --help prints all"),
    (["bench", "hed", "--margin", "2"],
     r"no benchmark 'hed'; did you mean python -m experiments bench head --margin 2\?"),
    ([*DIGITS, "--stepz", "3"], "--stepz"),
    ([*DIGITS, "--steps", "many"], "--steps"),
    ([*DIGITS, "--steps", "0"], "steps must be >= 1, got 0"),
    ([*DIGITS, "--steps", "1" + 29 * "0"], "--steps: must be an integer of at most 2147483647"),
    ([*DIGITS, "--margin", "1" + 29 * "0"], "margin must be at most 1000, got 1e\\+29"),
    ([*DIGITS, "--margin", "1000000000"], "margin must be at most 1000, got 1000000000"),
    ([*DIGITS, "--batch", "2147483648"], "--batch: must be an integer of at most 2147483647"),
    ([*DIGITS, "--batch", "-1"], "batch must be >= 1, got -1"),
    ([*DIGITS, "--batch", "100000"], "batch must be at most the 1297 training images"),
    ([*DIGITS, "--margin", "0"], "margin must be >= 1, got 0"),
    ([*DIGITS, "--margin", "2.5"], "margin must be an integer, got 2.5"),
    ([*DIGITS, "--seed", "-1"], "seed must be in 0..2147483647, got -1"),
    ([*DIGITS, "--seed", "1" + 19 * "0"], "--seed: must be an integer of at most 2147483647"),
    ([*DIGITS, "--width", "inf"], "width must be > 0 and finite, got inf"),
    ([*DIGITS, "--width", "0"], "width must be > 0 and finite, got 0"),
    ([*DIGITS, "--width", "nan"], "width must be > 0 and finite, got nan"),
    ([*DIGITS, "--learning-rate", "nan"], "learning_rate must be >= 0 and finite, got nan"),
    ([*DIGITS, "--learning-rate", "-1"], "learning_rate must be >= 0 and finite, got -1"),
    ([*DIGITS, "--weight-decay", "inf"], "weight_decay must be >= 0 and finite, got inf"),
    ([*DIGITS, "--bias-rate", "-2"], "bias_rate must be >= 0 and finite, got -2"),
    ([*DIGITS, "--momentum", "2"], r"momentum must be in \[0, 1\], got 2"),
    ([*DIGITS, "--momentum", "nan"], r"momentum must be in \[0, 1\], got nan"),
    ([*DIGITS, "--drops", "-5"], "drops must be >= 0"),
    ([*DIGITS, "--lam.base", "-1"], "lam.base must be >= 0 and finite, got -1"),
    ([*DIGITS, "--lam.gamma", "nan"], "lam.gamma must be >= 0 and finite, got nan"),
    ([*DIGITS, "--lam.minimum", "inf"], "lam.minimum must be >= 0 and finite, got inf"),
    ([*DIGITS, "--pace", "fast"], "--pace"),
    ([*DIGITS, "--lam.base", "77"], "lam must be left out with pace lead: only annealed uses it"),
    ([*DIGITS, "--pace", "none", "--strength", "1"], "strength must be left out with pace none"),
    ([*FACES, "--strength", "1"], "strength must be left out with pace annealed: only lead"),
    ([*DIGITS, "--dtype", "f8"], "--dtype"),
    ([*DIGITS, "--crop", "-1"], "crop must be >= 0, got -1"),
    ([*DIGITS, "--mean", "nan"], "mean must be finite, got nan"),
    ([*DIGITS, "--examples", "0"], "examples must be >= 1, got 0"),
    ([*DIGITS, "--devices", "0"], "devices must be >= 1"),
    ([*DIGITS, "--devices", "10000"], "devices must be at most"),
    ([*DIGITS, "--batch", "7"], "batch must divide over the"),
    ([*DIGITS, "--checkpoint-seconds", "nan"], "checkpoint-seconds must be >= 0, got nan"),
    ([*DIGITS, "--checkpoint-seconds", "-1"], "checkpoint-seconds must be >= 0, got -1"),
    ([*DIGITS, "--init", "absent/seed0"], "absent/seed0 has no checkpoint"),
    ([*DIGITS[:3], "{good}/file"], "{good}/file"),
    ([*DIGITS[:3], "/proc/nothing"], "/proc/nothing"),
    # processes
    ([*DIGITS, "--coordinator", "a:99999999", "--processes", "2", "--process", "0"],
     "coordinator must be HOST:PORT, port 1 to 65535"),
    ([*DIGITS, "--coordinator", "a:0", "--processes", "2", "--process", "0"],
     "coordinator must be HOST:PORT"),
    ([*DIGITS, "--coordinator", "a:b", "--processes", "2", "--process", "0"],
     "coordinator must be HOST:PORT"),
    ([*DIGITS, "--process", "0"], "belong together"),
    ([*DIGITS, "--cluster", "--heartbeat-seconds", "0"], "heartbeat-seconds must be >= 1"),
    # data
    ([*MNIST, "{out}"], "mnist is not in"),
    ([*MNIST, "{good}/empty"], "empty/mnist.npz .* no .npz, or cut off"),
    ([*MNIST, "{good}/text"], "text/mnist.npz .* no .npz, or cut off"),
    ([*MNIST, "{good}/cut"], "cut/mnist.npz .* no .npz, or cut off"),
    ([*MNIST, "{good}/flipped"], "flipped/mnist.npz .* cannot be read"),
    ([*MNIST, "{good}/zip"], "zip/mnist.npz lacks train_images"),
    ([*MNIST, "{good}/floats"], "train_images must be uint8"),
    ([*MNIST, "{good}/small"], "test_images must be of the size of train_images"),
    ([*MNIST, "{good}/other"], r"images must be \(28, 28, 1\)"),
    ([*MNIST, "{good}/few"], "train_labels must be 12 integers"),
    ([*MNIST, "{good}/range"], r"test_labels must be in 0\.\.9"),
    ([*MNIST, "{good}/objects"], "objects/mnist.npz .* Python objects"),
    ([*MNIST, "{good}/gap"], "gap lacks mnist.01.npz, though it has mnist.02.npz"),
    ([*MNIST, "{good}/whole"], "batch must be at most the 12 training images"),
    # files that are in the folder already
    *[(["train", "digits-m4", "--out", f"{{good}}/foreign_{name}"], "seed0.json must hold")
      for name in ("empty", "list", "null", "number", "cut", "nulls", "strange", "deep")],
    *[(["train", "digits-m4", "--out", f"{{good}}/claims_{name}"], "claim must hold")
      for name in ("empty", "list", "null", "number", "cut", "nulls", "strange", "deep")],
    (["train", "digits-m4", "--out", "{good}/log"], "has lost its checkpoint; put it back"),
    *[(["train", "digits-m4", "--out", f"{{good}}/pipe_{name}"],
       "must be a regular file, it is a named pipe")
      for name in ("log", "claim", "result")],
    ([*MNIST, "{good}/pipe_data"], "mnist.npz must be a regular file, it is a named pipe"),
    ([*VERIFY, "--pairs", "{good}/pipe_data/mnist.npz", "--pixels", "--faces", "{good}/faces"],
     "mnist.npz must be a regular file, it is a named pipe"),
    (["pairs", "--faces", "{good}/faces", "--out", "{good}/pipe_data/mnist.npz", "--folds", "1",
      "--each", "1"], "mnist.npz must be a regular file, it is a named pipe"),
    (["evaluate", "digits-m4/seed9", "--out", "{out}"], "no run in"),
    # queues
    (["reproduce", "--only", "zzz*", "--out", "{out}"], "'zzz.*' names no configuration"),
    (["reproduce", "--seeds", "0", "--out", "{out}"], "seeds must be >= 1, got 0"),
    (["reproduce", "--budget-minutes", "nan", "--out", "{out}"], "budget-minutes must be >= 0"),
    (["reproduce", "--budget-minutes", "-1", "--out", "{out}"], "budget-minutes must be >= 0"),
    (["tune", "digits-softmax", "--out", "{out}"], "has no margin"),
    (["tune", "digits-m4", "--out", "{out}"], "has pace lead: tune needs --pace annealed"),
    ([*TUNE, "--seeds", "0"], "seeds must be >= 1"),
    ([*TUNE, "--init", "digits-softmax/seed0"], "init: tune begins every run anew"),
    ([*TUNE, "--seed", "5"], "seed: tune trains seeds from 0 on; --seeds says how many"),
    ([*TUNE, "--lam.base", "10"], "lam.base: tune tries the values of --bases"),
    ([*TUNE, "--lam.minimum", "5"], "lam.minimum: tune tries the values of --minimums"),
    (["reproduce", "--only", "--out", "{out}"], "--only must name a configuration, got none"),
    (["campaign", "A", "--budget-minutes", "nan", "--out", "{out}"], "budget-minutes must be >= 0"),
    # faces
    ([*FACES, "--width", "-1"], "width must be > 0 and finite, got -1"),
    ([*FACES, "--width", "0"], "width must be > 0 and finite, got 0"),
    ([*FACES, "--drops", "-3"], "drops must be >= 0"),
    ([*FACES, "--batch", "100000"], "batch must be at most the 8 training images, got 100000"),
    ([*FACES, "--checkpoint-seconds", "nan"], "checkpoint-seconds must be >= 0"),
    ([*FACES, "--patience", "0"], "patience must be >= 1"),
    ([*FACES, "--size", "8", "8"], "size must be at least 32 x 32"),
    ([*FACES, "--faces", "{good}/one"], "at least two people to tell apart"),
    ([*FACES, "--faces", "{good}/flat"], "images directly in it, of no person"),
    ([*FACES, "--faces", "{good}/pipes"], "found no images"),
    ([*FACES, "--faces", "{good}/absent"], "absent is no folder"),
    ([*FACES, "--faces", "{good}/file"], "file is no folder"),
    ([*FACES, "--minimum-images", "9"], "minimum_images is 9"),
    ([*FACES, "--left-out-fold", "0"], "got no file of pairs"),
    ([*FACES, "--pairs", "{good}/pairs.txt"], "pairs without left_out_fold leave nobody out"),
    ([*FACES, "--left-out-fold", "7", "--pairs", "{good}/pairs.txt"], "fold must be in 0..1"),
    ([*FACES, "--init-from", "{good}/absent"], "no run in"),
    (["embed", "--checkpoint", "{good}/absent", "--faces", "{good}/faces", "--out", "{out}/e.npz"],
     "no run in"),
    ([*VERIFY, "--pairs", "{good}/pairs.txt"], "expected exactly one of"),
    ([*VERIFY, "--pairs", "{good}/pairs.txt", "--pixels"], "need --faces"),
    ([*VERIFY, "--pairs", "{good}/absent.txt", "--pixels"], "absent.txt"),
    ([*VERIFY, "--pairs", "{good}/pairs.txt", "--embeddings", "{good}/embeddings.npz"],
     "embeddings.npz must be an .npz of names, embeddings"),
    ([*VERIFY, "--pairs", "{good}/pairs.txt", "--embeddings", "{good}/absent.npz"], "absent.npz"),
    ([*VERIFY, "--pairs", "{good}/pairs.txt", "--embeddings", "{good}/absent.npz", "--faces",
      "{good}/faces"], "--embeddings needs no --faces"),
    *[([*VERIFY, "--pairs", f"{{good}}/pairs_{name}.txt", "--pixels", "--faces", "{good}/faces"],
       message)
      for name, message in {
          "count": "pairs_count.txt: expected 2 folds",
          "word": "pairs_word.txt: expected `name i j`",
          "head": "pairs_head.txt: the first line must be",
          "empty": "pairs_empty.txt: the first line must be",
          "latin": "pairs_latin.txt must be text in UTF-8",
          "gone": "pairs name images that are missing",
      }.items()],
    (["align", "--faces", "{good}/faces", "--landmarks", "{good}/landmarks.txt", "--out", "{out}"],
     "landmarks.txt, line 1"),
    (["align", "--faces", "{good}/faces", "--landmarks", "{good}/landmarks_latin.txt", "--out",
      "{out}"], "landmarks_latin.txt must be text in UTF-8"),
    (["pairs", "--faces", "{good}/faces", "--out", "{out}/p.txt", "--folds", "0"], "folds must be"),
    (["pairs", "--faces", "{good}/faces", "--out", "{out}/p.txt"], "each must be at most"),
    # benchmarks
    (["bench", "head", "--shapes", "8", "8", "0"], "shapes must be at least 1, got 0"),
    (["bench", "head", "--shapes", "8", "8", "2147483648"], "Error parsing --shapes"),
    (["bench", "head", "--lam", "nan"], "lam must be finite and >= 0, got nan"),
    (["bench", "head", "--margin", "0"], "margin must be at least 1, got 0"),
    (["bench", "head", "--repetitions", "0"], "repetitions must be at least 1, got 0"),
    (["bench", "head", "--only", "fastest"], "no arm fastest"),
    (["bench", "all", "--minutes", "nan"], "minutes must be > 0, got nan"),
    (["compile", "--shapes", "8", "0", "8"], "shapes must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"), MISTAKES, ids=[f"{i} {' '.join(w[-2:])}" for i, (w, _) in
                                         enumerate(MISTAKES)]
)  # fmt: skip
def test_mistake_is_named_in_a_line(words, message, good, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("EXPERIMENTS_TRACEBACK", raising=False)
    places = {"good": good, "out": tmp_path}
    words = [word.format(**places) for word in words]
    message = message.format(**places) if "{good}" in message else message
    try:
        code = main(words)
    except SystemExit as stop:  # raised by tyro
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2, said
    assert re.search(message, " ".join(said.split())), said  # tyro's box wraps lines
    assert "Traceback" not in said and "allow_pickle" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) <= 1 and "__tyro" not in said


def test_broken_tfds_data_are_named(good, tfds, tmp_path, capsys):
    words = [word.format(good=good, out=tmp_path) for word in [*MNIST, "{good}/broken_tfds"]]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"error: {good}/broken_tfds/mnist/3.0.1 cannot be read as TFDS data" in said


def test_protobuf_too_old_for_tfds_is_named(good, tmp_path, capsys, monkeypatch):
    class Made(types.ModuleType):
        """Fails like tensorflow-metadata's modules, generated for a future protobuf."""

        def __getattr__(self, name):
            if name == "__path__":
                raise AttributeError
            ValidateProtobufRuntimeVersion(Domain.PUBLIC, 99, 1, 0, "", "v0/schema.proto")

    place = "tensorflow_metadata.proto.v0"
    monkeypatch.setitem(sys.modules, "tensorflow_metadata", types.ModuleType("tensorflow_metadata"))
    monkeypatch.setitem(sys.modules, "tensorflow_metadata.proto", types.ModuleType("proto"))
    monkeypatch.setitem(sys.modules, place, Made(place))
    words = [word.format(good=good, out=tmp_path) for word in [*MNIST, "{good}/broken_tfds"]]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: TFDS cannot be imported: Detected incompatible Protobuf")
    assert f"gencode 99.1.0 runtime {version('protobuf')}. tensorflow-metadata" in said
    assert f"got {version('tensorflow-metadata')}: pip install 'tensorflow-metadata<1.21'" in said
    assert "Traceback" not in said


def test_as_many_mistakes_are_listed_as_the_documentation_says():
    assert len(MISTAKES) > 140


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_names_the_configurations_below_its_usage(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    usage, below = capsys.readouterr().out.split("\n", 1)
    assert usage.endswith("CONFIGURATION") and "mnist" not in usage
    assert "cifar10-m4" in below


@pytest.mark.parametrize("command", ["report", "bench step", "quickstart"])
def test_help_names_folders_of_the_clone_as_seen_from_it(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    said = capsys.readouterr().out
    assert "(default:" in said and str(Path.cwd()) not in said


def test_help_fits_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    benchmarks = [["bench", name] for name in BENCHMARKS]
    for words in ([], *([name] for name in COMMANDS), *benchmarks, ["train", "mnist-m4"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80, words


def test_help_in_the_narrowest_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "cifar10-m4" in capsys.readouterr().out
