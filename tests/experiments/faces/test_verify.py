"""All pairs of the people in a fold, against loops over the pairs."""

import json

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.faces import embed, verify
from experiments.faces.images import list_faces
from experiments.faces.protocol import read_pairs

PAIRS = "2\t2\nA\t1\t2\nA\t2\t3\nA\t1\tB\t1\nA\t2\tB\t2\nC\t1\t2\nC\t2\t3\nC\t1\tD\t1\nC\t2\tD\t2\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five people with five images each; pairs of A and B, and of C and D. E is in no pair."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for person in "ABCDE":
        (folder / person).mkdir()
        ground = rng.uniform(60, 190, (6, 6, 3)).repeat(6, axis=0).repeat(6, axis=1)
        for i in range(5):
            pixels = np.clip(ground + rng.normal(0, 50, (36, 36, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / person / f"{person}_{i + 1:04d}.png")
    (folder / "pairs.txt").write_text(PAIRS)
    return folder


@pytest.fixture(scope="module")
def embeddings(folder):
    """Short, noisy embeddings, so that genuine and impostor pairs overlap."""
    names = np.array(list_faces(folder).names)
    people = np.random.default_rng(1).normal(size=(5, 3)).repeat(5, axis=0)
    noise = np.random.default_rng(2).normal(size=(25, 3))
    return embed.Embeddings(names, (2 * people + noise + 2).astype(np.float32))


def literal(embeddings, people, others):
    """Counts of pairs, wins of genuine over impostor pairs, and right nearest neighbours."""
    rows = {name.split(".")[0]: row for name, row in zip(*embeddings, strict=True)}
    # The other fold has the pairs (1, 2), (2, 3) of one person and (1, 1), (2, 2) of two people.
    one, two = others
    fitted = [f"{one}_{i:04d}" for i in (1, 2, 2, 3, 1, 2)] + [f"{two}_{i:04d}" for i in (1, 2)]
    mean = np.mean([rows[f"{name[0]}/{name}"] for name in fitted], axis=0, dtype=np.float64)
    images = [(name[0], row - mean) for name, row in rows.items() if name[0] in people]

    def cosine(one, other):
        return one @ other / np.sqrt((one @ one) * (other @ other))

    seen = [(cosine(a, b), x == y) for i, (x, a) in enumerate(images) for y, b in images[i + 1 :]]
    genuine = [score for score, same in seen if same]
    impostors = [score for score, same in seen if not same]
    nearest = [
        max((cosine(a, b), x == y) for j, (y, b) in enumerate(images) if j != i)[1]
        for i, (x, a) in enumerate(images)
    ]
    wins = np.mean([one > other for one in genuine for other in impostors])
    return len(genuine), len(impostors), wins, np.mean(nearest)


def test_all_pairs_of_a_folds_people(folder, embeddings):
    pairs = read_pairs(folder / "pairs.txt")
    seen = verify.all_pairs(pairs, embeddings, [0, 1])
    for fold, people, others in zip(seen, ("AB", "CD"), ("CD", "AB"), strict=True):
        genuine, impostors, wins, rank_1 = literal(embeddings, people, others)
        assert (fold.roc.genuine, fold.roc.impostors) == (genuine, impostors) == (20, 25)
        assert fold.roc.auc == pytest.approx(wins, abs=1e-12) and 0 < wins < 1
        assert fold.rank_1 == pytest.approx(rank_1)
    (alone,) = verify.all_pairs(pairs, embeddings, [1])
    assert alone.roc.auc == seen[1].roc.auc
    with pytest.raises(ValueError, match=r"components must be in 1..3; got 4"):
        verify.all_pairs(pairs, embeddings, [0], components=4)


def test_the_result_has_all_pairs(folder, embeddings, tmp_path, capsys):
    embed.save_embeddings(tmp_path / "e.npz", embeddings)
    out = tmp_path / "r.json"
    words = ["verify", "--pairs", str(folder / "pairs.txt"), "--out", str(out)]
    assert main([*words, "--embeddings", str(tmp_path / "e.npz")]) == 0
    result = json.loads(out.read_text())
    folds = [literal(embeddings, *people) for people in (("AB", "CD"), ("CD", "AB"))]
    seen = result["all_pairs"]
    assert (seen["genuine"], seen["impostors"]) == (40, 50)
    assert seen["metrics"]["auc"] == pytest.approx(np.mean([fold[2] for fold in folds]))
    assert seen["metrics"]["rank_1"] == pytest.approx(np.mean([fold[3] for fold in folds]))
    assert seen["metrics"].keys() - result["metrics"].keys() == {"rank_1"}
    assert seen["metrics"]["tar_at_far"].keys() == {"0.001", "0.01"}
    assert seen["curve"]["false_accepts"] == result["curve"]["false_accepts"]
    assert seen["curve"]["true_accepts"][-1] == 1.0
    printed = capsys.readouterr().out
    assert "8 listed pairs" in printed and "all 90 pairs" in printed and "rank 1" in printed


def test_the_result_of_a_training_is_not_overwritten(folder, tmp_path, capsys):
    out = tmp_path / "run.json"
    out.write_text('{"kind": "faces", "status": "finished"}')
    words = ["verify", "--pairs", str(folder / "pairs.txt"), "--out", str(out)]
    assert main([*words, "--pixels", "--faces", str(folder)]) == 2
    assert f"{out} holds another result; name another file" in capsys.readouterr().err
    assert json.loads(out.read_text()) == {"kind": "faces", "status": "finished"}


def test_the_images_that_are_embedded(folder):
    pairs, faces = read_pairs(folder / "pairs.txt"), list_faces(folder)
    alone = verify.needed(pairs, faces, [0])
    named = [name for name in faces.names if name[0] in "CD" and name[-5] in "123"]
    named.remove("D/D_0003.png")
    assert [name for name in alone.names if name[0] not in "AB"] == named
    assert sum(name[0] in "AB" for name in alone.names) == 10
    assert [faces.people[label] for label in alone.labels] == [name[0] for name in alone.names]
    assert len(verify.needed(pairs, faces, [0, 1]).names) == 20
