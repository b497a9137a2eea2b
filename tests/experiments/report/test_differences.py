"""Every difference has its interval, over seeds or over test images."""

import base64
import math
import zlib

import numpy as np
import pytest

from experiments.report import differences
from experiments.report.outcomes import grouped
from made_up import run_of


def groups_of(*runs):
    return grouped([run | {"file": f"r{number}.json"} for number, run in enumerate(runs)])


def seeds_of(name, errors, **changes):
    return [run_of(name, seed, error, **changes) for seed, error in enumerate(errors)]


SOFTMAX, MARGIN = (2.0, 4.0, 6.0), (1.0, 3.5, 4.5)
# 97.5 % of Student's t: with 2 degrees of freedom, and with Welch's 3.954 for these two samples.
T2, T_WELCH = 4.302653, 2.788


def test_up_to_200_updates_seeds_are_pairs():
    softmax, margin = groups_of(
        *seeds_of("mnist-softmax", SOFTMAX, steps=200), *seeds_of("mnist-m2", MARGIN, steps=200)
    )
    found = differences.difference(margin, softmax)
    half = T2 * np.std([-1, -0.5, -1.5], ddof=1) / math.sqrt(3)
    assert found[:3] == pytest.approx((-1, -1 - half, -1 + half))
    assert found.over == "3 seeds, paired" and str(found) == "-1.00 [-2.24, 0.24]"


def test_longer_runs_are_compared_without_pairs():
    softmax, margin = groups_of(
        *seeds_of("mnist-softmax", SOFTMAX, steps=201), *seeds_of("mnist-m2", MARGIN, steps=201)
    )
    found = differences.difference(margin, softmax)
    half = T_WELCH * math.sqrt((np.var(SOFTMAX, ddof=1) + np.var(MARGIN, ddof=1)) / 3)
    assert found[:3] == pytest.approx((-1, -1 - half, -1 + half), rel=1e-3)
    assert found.over == "3 and 3 seeds"


def test_other_seeds_are_no_pairs():
    softmax, margin = groups_of(
        *seeds_of("mnist-softmax", SOFTMAX[:2], steps=200), *seeds_of("mnist-m2", MARGIN, steps=200)
    )
    assert differences.difference(margin, softmax).over == "3 and 2 seeds"


def test_one_seed_is_compared_with_the_same_seed():
    softmax, margin = groups_of(
        *seeds_of("mnist-softmax", SOFTMAX, steps=200), run_of("mnist-m2", 2, 5.0, steps=200)
    )
    assert differences.difference(margin, softmax)[0] == pytest.approx(5.0 - SOFTMAX[2])
    softmax, margin = groups_of(
        *seeds_of("mnist-softmax", SOFTMAX, steps=200), run_of("mnist-m2", 7, 5.0, steps=200)
    )
    assert differences.difference(margin, softmax).over == "test images, different seeds"


def test_one_seed_has_an_interval_over_images():
    runs = [run_of("mnist-softmax", 0, 12.0), run_of("mnist-m4", 0, 10.0)]
    for run in runs:
        run["test"]["count"] = 10_000
    softmax, margin = groups_of(*runs)
    found = differences.difference(margin, softmax)
    half = 1.96 * math.sqrt((12 * 88 + 10 * 90) / 10_000)
    assert found[:3] == pytest.approx((-2, -2 - half, -2 + half))
    assert found.over == "test images, one seed"


TRUTH = np.arange(100) % 10


def predicting(name, wrong, truth=TRUTH):
    """A run that gets some of a hundred images wrong, with labels packed as in a result."""
    predicted = truth.copy()
    predicted[wrong] = (predicted[wrong] + 1) % 10

    def packed(labels):
        return base64.b64encode(zlib.compress(labels.astype("<u2").tobytes())).decode()

    run = run_of(name, 0, float(len(wrong)))
    run["test"]["count"] = 100
    labels = {"labels": packed(predicted), "truth": packed(truth), "count": 100}
    return run | {"predictions": labels}


def test_two_networks_image_by_image():
    softmax = predicting("mnist-softmax", list(range(12)))
    margin = predicting("mnist-m4", [0, 1, 2, 50, 51])
    # Only one network gets 11 images wrong; in 2 of them it is the margin: (1 + 11 + 55) / 2^10.
    assert differences.mcnemar(margin, softmax) == (2, 9, pytest.approx(67 / 1024))
    assert differences.mcnemar(softmax, softmax) == (0, 0, 1.0)
    one, other = groups_of(softmax, margin)
    found = differences.difference(other, one)
    half = 1.96 * math.sqrt((0.11 - 0.07**2) / 100) * 100
    assert found[:3] == pytest.approx((-7, -7 - half, -7 + half))
    assert found.over == "test images, paired, one seed"


def test_results_without_labels_are_not_compared_image_by_image():
    with_labels, without = predicting("mnist-softmax", [0]), run_of("mnist-m4", 0, 1.0)
    assert differences.mcnemar(without, with_labels) is None
    assert differences.mcnemar(with_labels, without) is None


def test_images_in_another_order_are_refused():
    one, other = predicting("mnist-softmax", [0]), predicting("mnist-m4", [0], TRUTH[::-1])
    with pytest.raises(ValueError, match="other images, or in another order"):
        differences.mcnemar(one, other)


def test_a_margin_is_compared_with_softmax_tuned_alike_or_the_only_one():
    plain, tuned, margin, at_rate, other = groups_of(
        run_of("mnist-softmax", 0, 3.0, steps=8),
        run_of("mnist-softmax", 0, 2.0, steps=8, learning_rate=0.05),
        run_of("mnist-m2", 0, 1.5, steps=8, lam={"minimum": 5.0}),
        run_of("mnist-m2", 0, 1.5, steps=8, learning_rate=0.05, weight_decay=0.001),
        run_of("mnist-m2", 0, 1.5, steps=9),
    )
    everything = [plain, tuned, margin, at_rate, other]
    assert differences.softmax_beside(margin, everything) is plain
    assert differences.softmax_beside(at_rate, everything) is None
    assert differences.softmax_beside(margin, [tuned, margin]) is tuned
    assert differences.softmax_beside(other, everything) is None
    assert differences.softmax_beside(plain, everything) is None


def test_runs_on_different_data_are_not_compared():
    softmax, margin = groups_of(
        run_of("mnist-softmax", 0, 1.0),
        run_of("mnist-m4", 0, 1.0) | {"data": {"fingerprint": "other"}},
    )
    with pytest.raises(ValueError, match="different data"):
        differences.difference(margin, softmax)
