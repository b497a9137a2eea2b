"""`bench head`: what it writes, what it refuses to time, what README shows of it."""

import json

import chex
import jax
import jax.numpy as jnp
import pytest

from experiments.__main__ import main
from experiments.benchmarks import arms, head, peers
from experiments.benchmarks.arms import Arm, Shape
from experiments.benchmarks.head import Target
from tests import oracle

SHAPE = Shape(16, 8, 12)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    shape = [str(size) for size in SHAPE]
    command = ["bench", "head", "--shapes", *shape, "--repetitions", "2", "--class-block", "5"]
    assert main([*command, "--out", str(out)]) == 0
    (file,) = out.iterdir()
    return json.loads(file.read_text())


def test_every_arm_is_measured(result):
    (entry,) = result["shapes"]
    timed = {row["arm"]: row for row in entry["arms"]}
    assert entry["shape"] == list(SHAPE)
    assert timed.keys() >= {arm.name for arm in arms.arms(SHAPE, 4, 5)}
    for row in timed.values():
        median, low, high = row["milliseconds"]
        assert 0 < low <= median <= high
    assert timed[arms.PLAIN]["ratio"] == [1, 1, 1]
    assert timed[arms.FUSED_SGD]["baseline"] == arms.PLAIN_SGD
    assert timed[arms.ONE_SHOT]["dots"] == 3
    assert result["command"].endswith("--class-block 5 --repetitions 2")
    assert "--shapes 16 8 12 --dtype f32" in result["command"]
    assert result["config"]["repetitions"] == 2 and "date" in result and "commit" in result


def test_targets_are_judged_where_both_arms_ran(result):
    (entry,) = result["shapes"]
    for target in entry["targets"]:
        if target["reached"] is None:
            assert target["met"] is None and target["against"] == peers.LARGE_MARGIN
        else:
            assert target["met"] == (target["reached"] <= target["limit"])


def test_both_tables_show_every_row(result):
    (entry,) = result["shapes"]
    assert head.arms_table(entry, "f32").row_count == len(entry["arms"])
    assert head.targets_table(entry).row_count == len(entry["targets"])


ROWS = [
    {"arm": "a", "baseline": "b", "milliseconds": [3.0], "ratio": [0.5], "temporary_bytes": 100}
    | {"output_bytes": 20},
    {"arm": "b", "baseline": "b", "milliseconds": [4.0], "ratio": [1.0], "temporary_bytes": 400},
    {"arm": "torch", "baseline": "b", "milliseconds": [12.0], "growth_bytes": 600},
]
JUDGED = {
    "by rounds": (Target("a", "time", 0.5, "b"), 0.5, True),
    "by medians": (Target("a", "time", 0.2, "torch"), 0.25, False),
    "memory": (Target("a", "memory", 0.25, "b"), 0.25, True),
    "memory with outputs": (Target("a", "memory", 0.1, "torch"), 0.2, False),
    "extra arrays": (Target("b", "extra", 0.5, "a"), 300 / (4 * 5 * 10), False),
    "not there": (Target("c", "time", 1.0, "b"), None, None),
}


@pytest.mark.parametrize("target, reached, met", JUDGED.values(), ids=JUDGED)
def test_judge(target, reached, met):
    judged = head.judge(target, Shape(5, 1, 10), ROWS)
    assert (judged["reached"], judged["met"]) == (reached, met)


def test_an_arm_that_disagrees_is_not_timed():
    given = arms.problem(SHAPE, jnp.float32, 0.0)
    right = Arm(arms.PLAIN, 3, "plain", arms.gradients(arms.plain_loss))

    def doubled(*operands):
        loss, dfeatures, dkernel = right.step(*operands)
        return loss, dfeatures, 2 * dkernel

    wrong = Arm("margin's loss", 3, "margin", right.step)
    with pytest.raises(ValueError, match="margin's loss computes something else: its loss is"):
        head.prepare([wrong], given, SHAPE, "f32", 4)
    wrong = right._replace(name="doubled", step=doubled)
    with pytest.raises(ValueError, match="doubled computes something else: its length of dkernel"):
        head.prepare([right, wrong], given, SHAPE, "f32", 4)


def test_the_literal_loss_is_the_oracle():
    given = arms.problem(SHAPE, jnp.float32, 2.0)
    losses = oracle.loss(*(jax.device_get(a) for a in given[:3]), 4, 2.0)
    chex.assert_trees_all_close(arms.literal_loss(given, 4), losses.mean(), rtol=1e-6)


MISTAKES = {
    "no class": (["--shapes", "4", "4", "0"], "shapes"),
    "margin": (["--margin", "0"], "margin"),
    "lam": (["--lam", "-1"], "lam"),
    "python": (["--peers-python", "no-such-python"], "peers_python"),
}


@pytest.mark.parametrize("flags, name", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(flags, name, tmp_path, capsys):
    assert main(["bench", "head", *flags, "--out", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err


def test_the_readme_shows_the_committed_results():
    readme = " ".join((head.OUT.parents[2] / "README.md").read_text().split())
    (heads,) = head.OUT.glob("head-cpu-f32-*.json")
    for entry in json.loads(heads.read_text())["shapes"]:
        found = {row["arm"]: row for row in entry["arms"]}
        ours, torch = found[arms.ONE_SHOT], found[peers.LARGE_MARGIN]
        shape = ", ".join(map(str, entry["shape"]))
        numbers = f"{ours['ratio'][0]:.2f} x | {ours['memory_ratio']:.2f} x"
        assert f"| {shape} | {numbers} | {torch['ratio'][0]:.1f} x |" in readme
        if entry["shape"][2] > 30_000:
            blocks = found[arms.RECOMPUTED]
            numbers = f"{blocks['ratio'][0]:.2f} x | {blocks['memory_ratio']:.2f} x"
            assert f"| {shape}, blocks of 1024 classes | {numbers} | |" in readme
    (steps,) = head.OUT.glob("step-cpu-*.json")
    ratios = {
        entry["configuration"]: f"{target['reached']:.2f}"
        for entry in json.loads(steps.read_text())["configurations"]
        for target in entry["targets"]
        if target["measure"] == "time"
    }
    mnist, cifar10, cifar100 = (ratios[f"{data}-m4"] for data in ("mnist", "cifar10", "cifar100"))
    assert f"{mnist}, {cifar10} and {cifar100} times as long" in readme
