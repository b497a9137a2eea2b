"""Compares EER, AUC, TAR, rank 1 and angles with scikit-learn and with loops over pairs."""

import itertools
import tracemalloc
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

import lsoftmax_jax as lsm
from lsoftmax_jax import verification

# Nothing here compiles, so examples are cheap.
many = settings(max_examples=40)


def naive_eer(scores, same):
    """FAR where FAR + TAR = 1 on the line through the points of all thresholds, in fractions."""
    genuine, impostors = Fraction(sum(same)), Fraction(len(same) - sum(same))
    points = [(Fraction(0), Fraction(0))]
    for threshold in sorted(set(scores), reverse=True):
        accepted = [kind for score, kind in zip(scores, same, strict=True) if score >= threshold]
        points.append(((len(accepted) - sum(accepted)) / impostors, sum(accepted) / genuine))
    for (far, tar), (next_far, next_tar) in itertools.pairwise(points):
        before, after = far + tar - 1, next_far + next_tar - 1
        if before <= 0 <= after:
            return far + (next_far - far) * before / (before - after)
    raise AssertionError("the curve ends at FAR = TAR = 1")


def check(roc, scores, same):
    """Compares a ROC with scikit-learn's, and its numbers with loops over thresholds and pairs."""
    far, tar, thresholds = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(roc.far, far, rtol=1e-15)
    np.testing.assert_allclose(roc.tar, tar, rtol=1e-15)
    np.testing.assert_array_equal(roc.thresholds, thresholds)
    assert roc.genuine == sum(same) and roc.impostors == len(same) - sum(same)
    assert roc.auc == pytest.approx(roc_auc_score(same, scores), abs=1e-14)
    genuine, impostors = scores[same], scores[~same]
    wins, ties = (op(genuine[:, None], impostors) for op in (np.greater, np.equal))
    assert roc.auc == pytest.approx(np.mean(wins + 0.5 * ties), abs=1e-14)
    assert roc.eer == pytest.approx(float(naive_eer(scores.tolist(), same.tolist())), abs=1e-14)
    for allowed in (0.0, 0.01, 1 / 3, 0.5, 1.0):
        fitting = [t for t in [np.inf, *scores] if np.mean(impostors >= t) <= allowed]
        assert roc.tar_at(allowed) == np.mean(genuine >= min(fitting))
        assert roc.threshold_at(allowed) == min(fitting)


@st.composite
def scored_pairs(draw):
    """Scores with many ties or with few, and both kinds of pairs."""
    score = draw(st.sampled_from([st.integers(-3, 3), st.floats(-10, 10)]))
    scores = draw(st.lists(score.map(float), min_size=2, max_size=30))
    same = draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    first, second = draw(st.permutations(range(len(scores))))[:2]
    same[first], same[second] = True, False
    return np.array(scores), np.array(same)


@many
@given(scored_pairs())
def test_the_roc_of_scores(pairs):
    check(verification.roc(*pairs), *pairs)


def test_a_tie_is_half_accepted_on_the_line_of_the_curve():
    seen = verification.roc([1, 1], [True, False])
    assert (seen.eer, seen.auc, seen.tar_at(0.99), seen.threshold_at(0.99)) == (
        0.5,
        0.5,
        0.0,
        np.inf,
    )
    # The EER lies a third of the way along the tie of a genuine and an impostor pair.
    seen = verification.roc([4, 3, 2, 2, 1, 0], [True, False, True, False, False, False])
    assert seen.eer == pytest.approx(1 / 3, abs=1e-15)


def test_a_rate_of_false_accepts_that_occurs_is_allowed():
    scores = np.arange(300)[::-1]
    for accepted in range(1, 300):
        seen = verification.roc(np.append(scores, -1.0), np.append(np.zeros(300, bool), True))
        assert seen.threshold_at(accepted / 300) == 300 - accepted


# Vectors of four signs have length 2, and their cosines are exact: -1, -1/2, 0, 1/2 and 1.
SIGNS = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))


def naive_rank_1(cosines, classes, compared):
    """Rank 1 over the rows with compared pairs of both kinds; ``compared`` is symmetric."""
    results = []
    for row, seen in enumerate(compared):
        same = classes == classes[row]
        own, other = cosines[row, seen & same], cosines[row, seen & ~same]
        if len(own) and len(other):
            results.append(float(max(own) > max(other)) + 0.5 * float(max(own) == max(other)))
    return np.mean(results) if results else np.nan


@st.composite
def classed_signs(draw):
    """Vectors of signs with at least one genuine and one impostor pair."""
    rows = draw(st.lists(st.integers(0, 15), min_size=3, max_size=14))
    classes = draw(st.lists(st.integers(-2, 2), min_size=len(rows), max_size=len(rows)))
    classes[:3] = [7, 7, 8]
    order = draw(st.permutations(range(len(rows))))
    return SIGNS[rows][list(order)], np.array(classes)[list(order)]


@many
@given(classed_signs(), st.sampled_from([2, 5, 1024]))
def test_all_pairs_in_blocks_of_any_size(example, block):
    embeddings, classes = example
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "_BLOCK", block)
        seen = verification.verify(embeddings, classes)
    first, second = np.triu_indices(len(classes), 1)
    cosines = embeddings @ embeddings.T / 4
    check(seen.roc, cosines[first, second], (classes[:, None] == classes)[first, second])
    assert seen.rank_1 == naive_rank_1(cosines, classes, ~np.eye(len(classes), dtype=bool))


@many
@given(classed_signs(), st.data())
def test_given_pairs(example, data):
    embeddings, classes = example
    n = len(classes)
    every = list(itertools.permutations(range(n), 2))
    pairs = data.draw(st.lists(st.sampled_from(every), max_size=40))
    same = np.argsort(classes)[-3:]  # rows of classes 7, 7 and 8
    pairs = np.array([*pairs, (same[0], same[1]), (same[2], same[0])])
    seen = verification.verify(embeddings, classes, pairs)
    cosines = embeddings @ embeddings.T / 4
    check(seen.roc, cosines[*pairs.T], classes[pairs[:, 0]] == classes[pairs[:, 1]])
    compared = np.zeros((n, n), bool)
    compared[*pairs.T] = compared[*pairs.T[::-1]] = True
    np.testing.assert_equal(seen.rank_1, naive_rank_1(cosines, classes, compared))
    np.testing.assert_array_equal(verification.pair_cosines(embeddings, pairs), cosines[*pairs.T])


def test_all_pairs_given_one_by_one_are_all_pairs():
    rng = np.random.default_rng(0)
    embeddings, labels = SIGNS[rng.integers(0, 16, 1200)], rng.integers(0, 50, 1200)
    whole = verification.verify(embeddings, labels)
    listed = verification.verify(embeddings, labels, np.stack(np.triu_indices(1200, 1), axis=1))
    for one, other in zip(whole.roc, listed.roc, strict=True):
        np.testing.assert_array_equal(one, other)
    assert whole.rank_1 == listed.rank_1


def test_no_embedding_of_given_pairs_has_both_kinds():
    pairs = [[0, 1], [2, 3]]
    assert np.isnan(verification.verify(np.eye(4), [0, 0, 1, 2], pairs).rank_1)


@pytest.fixture(scope="module")
def people():
    """1,500 embeddings of 200 people, more than a block."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 200, 1500)
    embeddings = rng.normal(size=(200, 64))[labels] + 1.5 * rng.normal(size=(1500, 64))
    return embeddings.astype(np.float32), labels


def test_rounded_cosines_hardly_change_the_numbers(people):
    embeddings, labels = people
    seen = verification.verify(embeddings, labels)
    units = embeddings.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    first, second = np.triu_indices(len(labels), 1)
    cosines, same = (units @ units.T)[first, second], labels[first] == labels[second]
    rounded = verification.pair_cosines(embeddings, np.stack([first, second], axis=1))
    assert rounded.dtype == np.float32
    assert np.abs(rounded - cosines).max() < 2**-21 + 3e-7
    np.testing.assert_array_equal(rounded * 2.0**20, np.rint(rounded * 2.0**20))
    exact = verification.roc(cosines, same)
    assert 0.01 < exact.eer < 0.3
    assert seen.roc.eer == pytest.approx(exact.eer, abs=2e-6)
    assert seen.roc.auc == pytest.approx(exact.auc, abs=1e-8)
    # Rounding may move one genuine pair that lies within 1e-6 of an impostor pair.
    for far in (1e-4, 1e-3, 1e-2, 0.1):
        assert seen.roc.tar_at(far) == pytest.approx(exact.tar_at(far), abs=1.5 / exact.genuine)
    compared = ~np.eye(len(labels), dtype=bool)
    assert seen.rank_1 == naive_rank_1(units @ units.T, labels, compared)


def test_a_collapsed_network_is_at_chance(people):
    """Equal embeddings must tie, however their product is computed."""
    embeddings, labels = people
    seen = verification.verify(np.broadcast_to(embeddings[0], embeddings.shape), labels)
    assert (seen.roc.eer, seen.roc.auc, seen.rank_1) == (0.5, 0.5, 0.5)
    assert seen.roc.tar_at(0.5) == 0.0


@pytest.mark.parametrize("dtype", [str, object, np.dtypes.StringDType()])
def test_length_order_and_names_do_not_matter(people, dtype):
    embeddings, labels = people
    seen = verification.verify(embeddings, labels)
    lengths = np.float32(2.0) ** np.random.default_rng(2).integers(-120, 100, (len(labels), 1))
    order = np.random.default_rng(3).permutation(len(labels))
    names = np.array([f"person {label}" for label in labels], dtype)
    changed = verification.verify((embeddings * lengths)[order], names[order])
    assert changed.rank_1 == seen.rank_1
    assert changed.roc.auc == pytest.approx(seen.roc.auc, abs=1e-7)
    assert changed.roc.genuine == seen.roc.genuine


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_arrays_of_jax(dtype):
    pairs = jnp.array([[0, 1], [1, 2]])
    embeddings = jnp.array([[3, 4], [6, 8], [-4, 3]], dtype)
    labels = jnp.array([1, 1, 0])
    seen = verification.verify(embeddings, labels, pairs)
    assert seen.roc.thresholds.tolist() == [np.inf, 1.0, 0.0]
    assert lsm.verification.roc(jnp.array([0.5, 1.5], jnp.bfloat16), pairs[:, 0] == 0).auc == 0.0
    wide = lsm.verification.roc(np.array([0.5, 1.5], np.longdouble), [True, False])
    assert wide.thresholds.dtype == np.float64


def test_memory_does_not_grow_with_the_square(monkeypatch):
    """All steps would take 32 MB alone; with few steps the blocks' memory shows."""
    monkeypatch.setattr(verification, "_STEPS", 2**10)
    embeddings = np.random.default_rng(0).normal(size=(4096, 4)).astype(np.float32)
    tracemalloc.start()
    verification.verify(embeddings, np.arange(4096) // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 35e6 < 4096**2 * 4


def naive_angle(one, other):
    return np.arccos(np.clip(one @ other / np.linalg.norm(one) / np.linalg.norm(other), -1, 1))


@pytest.mark.parametrize("block", [3, 1024])
def test_angles(block, monkeypatch):
    monkeypatch.setattr(verification, "_BLOCK", block)
    rng = np.random.default_rng(4)
    embeddings, labels = rng.normal(size=(40, 6)), rng.permutation(np.arange(40) % 9 + 3)
    kernel = rng.normal(size=(6, 12))
    seen = verification.angles(embeddings, labels, kernel)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    centres = {label: unit[labels == label].mean(axis=0) for label in range(3, 12)}
    columns = [naive_angle(x, kernel[:, y]) for x, y in zip(embeddings, labels, strict=True)]
    np.testing.assert_allclose(seen.to_column, columns, atol=1e-6)
    within = [naive_angle(x, centres[y]) for x, y in zip(embeddings, labels.tolist(), strict=True)]
    np.testing.assert_allclose(seen.within, within, atol=1e-6)
    between = [
        min(naive_angle(centres[y], centres[z]) for z in centres if z != y) for y in sorted(centres)
    ]
    np.testing.assert_allclose(seen.between, between, atol=1e-6)
    assert verification.angles(embeddings, labels.astype(str)).to_column is None


def test_small_angles_keep_their_digits():
    tiny = 1e-5
    embeddings = np.array([[1, 0], [np.cos(tiny), np.sin(tiny)], [-1, 0], [-1, -3 * tiny]])
    seen = verification.angles(embeddings, [0, 1, 2, 3], np.tile([[1.0], [0.0]], 4))
    np.testing.assert_allclose(seen.to_column, [0, tiny, np.pi, np.pi - 3 * tiny], atol=2e-7)
    np.testing.assert_allclose(seen.between, [tiny, tiny, 3 * tiny, 3 * tiny], atol=2e-7)
    np.testing.assert_allclose(seen.within, 0, atol=1e-9)


def test_a_centre_of_length_zero_is_at_a_right_angle():
    embeddings = np.array([[0.6, 0.8], [-0.6, -0.8], [0.8, -0.6], [-0.8, 0.6], [1, 0]])
    seen = verification.angles(embeddings, [0, 0, 1, 1, 2])
    np.testing.assert_allclose(seen.within, [np.pi / 2] * 4 + [0])
    np.testing.assert_allclose(seen.between, [np.pi / 2] * 3)


E = np.eye(3, 4)
L = [0, 0, 1]
PAIRS = [[0, 1], [0, 2]]
BROKEN = np.array([[1.0, 0], [np.nan, 0], [np.inf, 1]])
ZERO = np.array([[1.0, 0], [0, 0], [0, 1]])
MASKED = np.ma.masked_array(E, E > 0)
WRONG = {
    "verify": [
        ((BROKEN, L), ValueError, "embeddings must be finite, got NaN or infinity in 2 of 3: 1, 2"),
        ((ZERO, L), ValueError, "embeddings must not be of length zero, got zeros in 1 of 3: 1"),
        ((E[0], L), ValueError, r"embeddings must have shape \(n, D >= 1\), got \(4,\)"),
        ((E[:, :0], L), ValueError, r"embeddings must have shape \(n, D >= 1\), got \(3, 0\)"),
        ((E * 1j, L), TypeError, r"embeddings must be real numbers \(n, D\), got dtype complex128"),
        ((MASKED, L), TypeError, r"embeddings must be real numbers .*, got a masked array"),
        ((None, L), TypeError, "embeddings must be real numbers .*, got None"),
        (([[1.0], [1.0, 2.0]], L), TypeError, "embeddings must be real numbers .*, got list"),
        ((E, [0, 1]), ValueError, r"labels must have shape \(3,\), got \(2,\)"),
        ((E, E), TypeError, "labels must be integers or strings .*, got dtype float64"),
        ((E, [[0], [0], [1]]), ValueError, r"labels must have shape \(n,\), got \(3, 1\)"),
        ((E, np.ma.masked_array(L)), TypeError, "labels must be .*, got a masked array"),
        ((E, [0, 1, 2]), ValueError, "genuine and impostor pairs, got 3 classes of 3 embeddings"),
        ((E, [5, 5, 5]), ValueError, "genuine and impostor pairs, got 1 classes of 3 embeddings"),
        ((E[:0], []), ValueError, "genuine and impostor pairs, got 0 classes of 0 embeddings"),
        ((E, L, [[0, 1], [2, 3]]), ValueError, r"in \[0, 3\), got \[2, 3\] as pair 1"),
        ((E, L, [[0, -1]]), ValueError, r"in \[0, 3\), got \[0, -1\] as pair 0"),
        ((E, L, [[0, 1], [2, 2]]), ValueError, r"of two rows each, got \[2, 2\] as pair 1"),
        ((E, L, [0, 1]), ValueError, r"pairs must have shape \(pairs, 2\), got \(2,\)"),
        ((E, L, [[0.0, 1.0]]), TypeError, "pairs must be integers .*, got dtype float64"),
        ((E, L, [[0, 1]]), ValueError, "pairs must hold .*, got 1 genuine pairs of 1"),
        ((E, L, [[0, 2], [2, 1]]), ValueError, "pairs must hold .*, got 0 genuine pairs of 2"),
        ((E, L, np.zeros((0, 2), int)), ValueError, "pairs must hold .*, got 0 genuine pairs of 0"),
    ],
    "pair_cosines": [
        ((ZERO, PAIRS), ValueError, "embeddings must not be of length zero"),
        ((E, [[0, 3]]), ValueError, r"pairs must be rows of embeddings in \[0, 3\)"),
    ],
    "roc": [
        (([0.5, np.nan], [True, False]), ValueError, "scores must be finite, .* in 1 of 2: 1"),
        (([[0.5]], [True]), ValueError, r"scores must have shape \(pairs,\), got \(1, 1\)"),
        (([0.5], [True, False]), ValueError, r"same must have the shape \(1,\) of scores"),
        (([0.5, 1], [1, 0]), TypeError, "same must be boolean, got dtype int64"),
        (([0.5, 1], [True, True]), ValueError, "same must hold True and False, got 2 True of 2"),
        (([0.5, 1], [False, False]), ValueError, "same must hold True and False, got 0 True of 2"),
        (([], np.zeros(0, bool)), ValueError, "same must hold True and False, got 0 True of 0"),
        ((["a"], [True]), TypeError, r"scores must be real numbers \(pairs,\), got dtype <U1"),
    ],
    "angles": [
        ((E, [0, 0, 0]), ValueError, "labels must hold at least two classes, got 1"),
        ((E, L, E), ValueError, r"kernel must have shape \(4, classes\), got \(3, 4\)"),
        ((E, L, E.T[:, :1]), ValueError, r"labels must be in \[0, 1\), .* of kernel, got 0 to 1"),
        ((E, [-1, 0, 1], E.T), ValueError, r"labels must be in \[0, 3\), .*, got -1 to 1"),
        ((E, ["a", "b", "b"], E.T), TypeError, "labels must be integers for a kernel"),
        ((E, [0, 2, 2], 0 * E.T), ValueError, "columns of kernel must not .* in 2 of 2: 0, 2"),
        ((ZERO, L), ValueError, "embeddings must not be of length zero"),
    ],
}


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [(function, *case) for function, cases in WRONG.items() for case in cases],
)
def test_wrong_arguments_are_named(function, arguments, error, message):
    with pytest.raises(error, match=message):
        getattr(verification, function)(*arguments)


@pytest.mark.parametrize("far", [-0.1, 1.5, np.nan])
def test_a_rate_outside_0_to_1_is_named(far):
    seen = verification.roc([1, 0], [True, False])
    for method in (seen.tar_at, seen.threshold_at):
        with pytest.raises(ValueError, match=r"far must be in \[0, 1\]"):
            method(far)


def test_under_jit_the_argument_is_named():
    with pytest.raises(TypeError, match="embeddings must be real numbers"):
        jax.jit(lambda e: verification.verify(e, L).roc.auc)(E)


def test_columns_without_a_label_may_be_zero():
    kernel = np.concatenate([E.T, np.zeros((4, 2))], axis=1)  # padded
    assert verification.angles(E, [0, 1, 2], kernel).to_column.tolist() == [0, 0, 0]
