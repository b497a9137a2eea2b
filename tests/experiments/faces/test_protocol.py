"""The verification protocol against independent loops."""

import doctest
import itertools

import chex
import numpy as np
import pytest

from experiments.faces import protocol as verify
from lsoftmax_jax.verification import roc

FOLDS, PAIRS, WIDTH = 4, 60, 6


@pytest.fixture(scope="module")
def pairs():
    """Overlapping classes with a large common mean, so that mean, PCA and thresholds matter."""
    rng = np.random.default_rng(3)
    people = rng.normal(size=(2, FOLDS * PAIRS, WIDTH)) * np.arange(1, WIDTH + 1)
    same = rng.permutation(np.arange(FOLDS * PAIRS) % 2 == 0)
    second = np.where(same[:, None], people[0] + 0.8 * people[1], people[1])
    return people[0] + 5, second + 5, same, np.repeat(np.arange(FOLDS), PAIRS)


def literal_protocol(first, second, same, fold, components):
    """Loops over pairs and thresholds; PCA from the eigenvectors of the scatter matrix."""
    accuracy, scores = [], np.zeros(len(same))
    for test in range(FOLDS):
        known = [row for side in (first, second) for row in side[fold != test]]
        mean = sum(known) / len(known)
        scatter = sum(np.outer(row - mean, row - mean) for row in known)
        basis = np.linalg.eigh(scatter)[1][:, ::-1][:, : components or WIDTH]
        for i in range(len(same)):
            left, right = (first[i] - mean) @ basis, (second[i] - mean) @ basis
            scores[i] = left @ right / np.sqrt((left @ left) * (right @ right))
        seen, seen_same = scores[fold != test], same[fold != test]
        candidates = sorted([-2, *seen, 2])
        candidates = [(a + b) / 2 for a, b in itertools.pairwise(candidates)]
        threshold = max(candidates, key=lambda c: (sum((seen >= c) == seen_same), c))
        accuracy.append(np.mean((scores[fold == test] >= threshold) == same[fold == test]))
        held_out = fold == test
        yield accuracy[-1], threshold, scores[held_out]


@pytest.mark.parametrize("components", [None, 3])
def test_verify_equals_the_literal_protocol(pairs, components):
    _, _, same, _ = pairs
    accuracy, threshold, scores = zip(*literal_protocol(*pairs, components), strict=True)
    result = verify.verify(*pairs, components=components)
    chex.assert_trees_all_close(result.fold_accuracy, np.array(accuracy), atol=1e-12)
    chex.assert_trees_all_close(result.fold_threshold, np.array(threshold), atol=1e-12)
    assert result.accuracy == pytest.approx(sum(accuracy) / FOLDS)
    spread = sum((a - sum(accuracy) / FOLDS) ** 2 for a in accuracy) / (FOLDS - 1)
    assert result.standard_error == pytest.approx(np.sqrt(spread / FOLDS))

    scores = np.concatenate(scores)
    wins = scores[same][:, None] > scores[~same]  # no ties among continuous scores
    assert result.roc.auc == pytest.approx(wins.mean())
    for rate in (0.01, 0.1):
        accepted = result.roc.tar_at(rate)
        allowed = int(rate * (~same).sum())
        strictest = np.sort(scores[~same])[::-1][allowed]
        assert accepted == pytest.approx(np.mean(scores[same] > strictest))
    gaps = [(abs(np.mean(scores[~same] >= t) - np.mean(scores[same] < t)), t) for t in scores]
    closest = min(gaps)[1]
    assert result.roc.eer == pytest.approx(np.mean(scores[~same] >= closest), abs=0.01)


def test_a_held_out_fold_changes_nothing_that_is_fitted(pairs):
    first, second, same, fold = pairs
    spoiled = np.where(fold[:, None] == 1, -first, first)
    before, after = (verify.verify(f, second, same, fold, components=3) for f in (first, spoiled))
    assert before.fold_threshold[1] == after.fold_threshold[1]
    assert before.fold_accuracy[1] != after.fold_accuracy[1]
    assert before.fold_threshold[0] != after.fold_threshold[0]


def test_examples_in_the_docstrings():
    assert doctest.testmod(verify).failed == 0


def test_one_fold_alone(pairs):
    every, one = verify.verify(*pairs), verify.verify(*pairs, tested=[2])
    assert one.fold_accuracy.tolist() == [every.fold_accuracy[2]]
    assert one.fold_threshold.tolist() == [every.fold_threshold[2]]
    assert np.isnan(one.standard_error)
    assert one.roc.auc != every.roc.auc
    with pytest.raises(ValueError, match=r"tested must be some of the folds \[0 1 2 3\]; got"):
        verify.verify(*pairs, tested=[4])


def test_random_embeddings_are_at_chance():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 2000, 16)).astype(np.float32)
    result = verify.verify(first, second, rng.random(2000) < 0.5, np.arange(2000) % 10)
    assert abs(result.accuracy - 0.5) < 0.05
    assert abs(result.roc.auc - 0.5) < 0.05
    assert abs(result.roc.eer - 0.5) < 0.05


def test_threshold_accepts_none_or_all_when_that_is_best():
    kinds = np.array([False, False, False, True])
    assert verify.best_threshold(roc([0.9, 0.5, 0.4, 0.1], kinds)) > 1
    assert verify.best_threshold(roc([0.9, 0.5, 0.4, 0.1], ~kinds[::-1])) < 0.1


@pytest.mark.parametrize("length", [2.0**-80, 2.0**80])
def test_very_short_and_very_long_embeddings_keep_their_direction(pairs, length):
    first, second, same, fold = pairs
    first, second = np.float32(first), np.float32(second)
    seen = verify.verify(first, second, same, fold)
    scaled = verify.verify(first * np.float32(length), second * np.float32(length), same, fold)
    assert scaled.accuracy == seen.accuracy > 0.6
    assert scaled.roc.auc == seen.roc.auc


def test_an_embedding_at_the_mean_scores_zero():
    first, second = np.array([[2.0, 1.0], [1.0, 0.0]]), np.array([[2.0, 3.0], [3.0, 0.0]])
    scores = verify.pair_scores(first, second, verify.fitted(np.concatenate([first, second])))
    assert scores[0] == 0.0  # the mean is (2, 1)
    assert scores[1] == pytest.approx(0.0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"second": np.ones((3, 2))}, "second must have first's shape"),
        ({"first": np.ones(4)}, r"first must be embeddings of shape \(pairs, D\)"),
        ({"first": np.full((4, 2), np.nan)}, r"first must be finite; 4 rows are not"),
        ({"fold": [0, 0, 0, 0]}, "fold must name at least two folds; got 1"),
        ({"fold": [0, 1]}, r"fold must have shape \(4,\)"),
        ({"same": [True]}, r"same must have shape \(4,\)"),
        ({"same": [True] * 4}, "same must hold True and False, got 2 True of 2"),
        ({"same": [True, True, True, False], "tested": [0]}, "same must hold True and False"),
        ({"components": 3}, r"components must be in 1..2; got 3"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    rng = np.random.default_rng(0)
    right = {"first": rng.normal(size=(4, 2)), "second": rng.normal(size=(4, 2))}
    right |= {"same": [True, False, True, False], "fold": [0, 0, 1, 1], "components": None}
    with pytest.raises(ValueError, match=message):
        verify.verify(**right | change)


def test_pairs_file(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text("2\t1\nAda\t1\t12\nAda\t3\tBob\t1\nCy\t1\t2\nCy\t1\tDi\t2\n")
    pairs = verify.read_pairs(path)
    assert pairs.first.tolist() == ["Ada/Ada_0001", "Ada/Ada_0003", "Cy/Cy_0001", "Cy/Cy_0001"]
    assert pairs.second.tolist() == ["Ada/Ada_0012", "Bob/Bob_0001", "Cy/Cy_0002", "Di/Di_0002"]
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.fold.tolist() == [0, 0, 1, 1]
    assert verify.people_of_fold(pairs, 1) == {"Cy", "Di"}
    with pytest.raises(ValueError, match=r"fold must be in 0..1; got 2"):
        verify.people_of_fold(pairs, 2)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "first line must be"),
        ("a\n", "first line must be"),
        ("300\n", r"expected 1 folds of 300 \+ 300 pairs; got 0 pairs"),
        ("0\n", r"expected 1 folds of 0 \+ 0 pairs"),
        ("2\t1\nAda\t1\t12\n", r"expected 2 folds of 1 \+ 1 pairs; got 1 pairs"),
        ("1\t1\nAda\t1\tBob\t2\nAda\t1\tBob\t2\n", "expected `name i j`; got 'Ada 1 Bob 2'"),
        ("1\t1\nAda\t1\t2\nAda\tone\tBob\t2\n", "expected `name i other j`; got 'Ada one Bob 2'"),
    ],
)
def test_a_pairs_file_that_does_not_fit_is_named(tmp_path, text, message):
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        verify.read_pairs(path)


def test_several_pairs_files_are_counted_through(tmp_path):
    whole, train, test = (tmp_path / name for name in ("pairs.txt", "train.txt", "test.txt"))
    train.write_text("1\nAda\t1\t12\nAda\t3\tBob\t1\n")
    test.write_text("1\nCy\t1\t2\nCy\t1\tDi\t2\n")
    whole.write_text("2\t1\nAda\t1\t12\nAda\t3\tBob\t1\nCy\t1\t2\nCy\t1\tDi\t2\n")
    for one, other in zip(verify.read_pairs(train, test), verify.read_pairs(whole), strict=True):
        assert one.tolist() == other.tolist()
    assert verify.read_pairs(test, whole).fold.tolist() == [0, 0, 1, 1, 2, 2]


def test_lfw_view_1(lfw_dir):
    view = verify.read_pairs(lfw_dir / "pairsDevTrain.txt", lfw_dir / "pairsDevTest.txt")
    assert np.bincount(view.fold).tolist() == [2200, 1000]
    assert verify.people_of_fold(view, 0).isdisjoint(verify.people_of_fold(view, 1))


def test_lfw_pairs(lfw_dir):
    pairs = verify.read_pairs(lfw_dir / "pairs.txt")
    assert pairs.same.sum() == 3000
    assert np.bincount(pairs.fold).tolist() == [600] * 10
    assert all((lfw_dir / f"{name}.jpg").exists() for name in {*pairs.first, *pairs.second})
    people = [verify.people_of_fold(pairs, fold) for fold in range(10)]
    assert len(frozenset.union(*people)) == sum(map(len, people))  # no person in two folds
