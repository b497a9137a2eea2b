"""How far the test errors of two losses are apart, with a 95 % interval beside every difference."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import scipy  # loads its parts when they are first used
from numpy.typing import ArrayLike, NDArray

from experiments.paper.cells import CONFIGS
from experiments.report.outcomes import Group, Outcome, check_same_data
from experiments.store import results

# Runs of one seed start from the same weights and see the same batches. After 200 updates their
# errors still have a correlation of 0.64 to 0.99 between losses. After 1,000 and more the
# correlation has no sign, and pairing only costs degrees of freedom. This limit was chosen when the
# runs were known, and FINDINGS says what depends on it.
PAIRED_UP_TO = 200


class Difference(NamedTuple):
    """A difference in points of test error.

    Attributes:
      points: ours less theirs.
      low, high: the 95 % interval.
      over: what the interval is over: seeds, in pairs or not, or the test images of one seed.
    """

    points: float
    low: float
    high: float
    over: str

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.points:.2f}"
        return f"{self.points:.2f} [{self.low:.2f}, {self.high:.2f}]"


def difference(ours: Group, theirs: Group) -> Difference:
    """The difference of the mean test errors of two groups.

    With two seeds or more on both sides the interval is Student's t over seeds: paired up to 200
    updates, Welch's elsewhere. With one seed it is over the test images, and says nothing about
    other seeds; it uses the predicted labels where both results hold them.

    Raises:
      ValueError: the groups saw different data.
    """
    check_same_data([*ours.runs, *theirs.runs])
    first, second = ours.errors("test"), theirs.errors("test")
    if min(len(first), len(second)) == 1:
        with_seed = {run["seed"]: run for run in theirs.runs}
        both = [run for run in ours.runs if run["seed"] in with_seed]
        if both:
            return over_images(both[0], with_seed[both[0]["seed"]])
        found = over_images(ours.runs[0], theirs.runs[0])
        return found._replace(over=found.over.replace("one seed", "different seeds"))
    seeds = [[run["seed"] for run in group.runs] for group in (ours, theirs)]
    if ours.of("steps") <= PAIRED_UP_TO and seeds[0] == seeds[1]:
        return paired(first, second, f"{len(first)} seeds, paired")
    low, high = scipy.stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    over = f"{len(first)} and {len(second)} seeds"
    return Difference(float(np.mean(first) - np.mean(second)), low, high, over)


def paired(first: ArrayLike, second: ArrayLike, over: str) -> Difference:
    """The mean difference of pairs, with Student's t."""
    low, high = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    return Difference(float(np.mean(np.subtract(first, second))), low, high, over)


def over_images(ours: Outcome, theirs: Outcome) -> Difference:
    """The difference of two runs, with a normal interval over the test images."""
    points = ours["test"]["error"] - theirs["test"]["error"]
    images = ours["test"].get("count", 0)
    if wrong := both_wrong(ours, theirs):
        variance = float(np.var(100.0 * wrong[0] - 100.0 * wrong[1]))
        over = "test images, paired, one seed"
    else:
        rates = [run["test"]["error"] for run in (ours, theirs)]
        variance = sum(rate * (100 - rate) for rate in rates)
        over = "test images, one seed"
    half = 1.96 * math.sqrt(variance / images) if images else math.nan
    return Difference(points, points - half, points + half, over)


def both_wrong(ours: Outcome, theirs: Outcome) -> tuple[NDArray, NDArray] | None:
    """Which test images each run got wrong; None if a result does not hold its labels.

    Raises:
      ValueError: the runs were tested on other images, or in another order.
    """
    first, second = map(results.labels_of, (ours, theirs))
    if first is None or second is None:
        return None
    if not np.array_equal(first[1], second[1]):
        files = f"{ours.get('file')}, {theirs.get('file')}"
        raise ValueError(f"these runs were tested on other images, or in another order: {files}")
    return first[0] != first[1], second[0] != second[1]


def mcnemar(ours: Outcome, theirs: Outcome) -> tuple[int, int, float] | None:
    """McNemar's exact test of two networks, image by image.

    Returns:
      The images that ours alone gets wrong, those that theirs alone gets wrong, and the p-value
      that both are equally likely. None if a result does not hold its labels.
    """
    if (wrong := both_wrong(ours, theirs)) is None:
        return None
    alone = [int(np.sum(a & ~b)) for a, b in (wrong, wrong[::-1])]
    p = scipy.stats.binomtest(alone[0], sum(alone)).pvalue if sum(alone) else 1.0
    return alone[0], alone[1], float(p)


def softmax_beside(group: Group, groups: Sequence[Group]) -> Group | None:
    """The runs that differ from a group in the margin alone and have none.

    Those with the same learning rate and weight decay come first. Otherwise softmax must have been
    run in one way, the tuned one.
    """
    plain = replace(CONFIGS[group.name].without_margin(), hinge=False)
    alike = [g for g in groups if g.name != group.name and g.reduction == group.reduction]
    # Without a margin no λ changes a run, so what decides λ may differ.
    named = [(g, CONFIGS[g.name]) for g in alike]
    beside = [g for g, of in named if replace(plain, name=of.name, pace=of.pace) == of]
    same = [
        g for g in beside if all(g.of(n) == group.of(n) for n in ("learning_rate", "weight_decay"))
    ]
    return same[0] if same else beside[0] if len(beside) == 1 else None
