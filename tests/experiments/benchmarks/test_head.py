"""`bench`: what it writes, what it refuses to time, and how it reads compiled programs."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import pytest

import oracle
from experiments.__main__ import main
from experiments.benchmarks import arms, head, hlo, peers, step
from experiments.benchmarks.arms import Arm, Shape
from experiments.benchmarks.head import Target

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
    for target in result["shapes"][0]["targets"]:
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

    with pytest.raises(ValueError, match="margin's loss computes something else: its loss is"):
        wrong = Arm("margin's loss", 3, "margin", right.step)
        head.prepare([wrong], given, SHAPE, "f32", 4)
    with pytest.raises(ValueError, match="doubled computes something else: its length of dkernel"):
        wrong = right._replace(name="doubled", step=doubled)
        head.prepare([right, wrong], given, SHAPE, "f32", 4)


def test_the_literal_loss_is_the_oracle():
    given = arms.problem(SHAPE, jnp.float32, 2.0)
    losses = oracle.loss(*(jax.device_get(a) for a in given[:3]), 4, 2.0)
    chex.assert_trees_all_close(arms.literal_loss(given, 4), losses.mean(), rtol=1e-6)


TEXT = """
%inside (p: f32[8,5]) -> f32[8,5] {
  %copy.8 = f32[8,5]{0,1} copy(%p)
  ROOT %pad.9 = f32[8,6]{1,0} pad(%copy.8, %zero), padding=0_0x0_1
}

%body (p: f32[4,8]) -> f32[4,8] {
  %dot.1 = f32[4,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}
}
ENTRY %main {
  %fused = f32[8,6]{1,0} fusion(%a), kind=kLoop, calls=%inside
  %copy.2 = f32[8,5]{0,1:T(8,128)} copy(%a)
  %copy.3 = f32[3]{0} copy(%b)
  ROOT %c = (bf16[16,4]{1,0}, u8[64]{0}) custom-call(%a), custom_call_target="__cublas$lt$matmul"
  %d = f32[4]{0} custom-call(%a), custom_call_target="topk"
  %g = bf16[8,6]{1,0} all-gather(%a), replica_groups=[2,4]<=[8], dimensions={0}
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %r = f32[6]{0} reduce-scatter(%a), replica_groups={{0,1},{2,3},{4,5},{6,7}}
  %t = f32[6]{0} all-reduce(%a), replica_groups=mesh['data'=2,'model'=4] {'model'}, dimensions={0}
  %u = f32[6]{0} all-reduce(%a), replica_groups=mesh['a'=2,'b'=3] {'a','b'}, to_apply=%sum
  %m = (f32[10]{0}, f32[]) all-reduce(%a, %b), replica_groups={}
  %n = f32[10]{0} all-reduce(%a), replica_groups={{0},{1}}
}
"""


@dataclasses.dataclass
class FakeCompiled:
    text: str

    def as_text(self):
        return self.text

    def memory_analysis(self):
        sizes = ("temp", "argument", "output", "alias")
        return type("Sizes", (), {f"{name}_size_in_bytes": 7 for name in sizes})


def test_facts_of_a_program():
    found = hlo.facts(FakeCompiled(TEXT), 40)
    assert found.dots == 2 and found.temporary_bytes == 7
    assert found.large_moves == {"copy": 1, "pad": 1}


def test_collectives_of_a_program():
    found = hlo.collectives(FakeCompiled(TEXT), 8)
    assert [(c.kind, c.size, c.devices) for c in found] == [
        ("all-gather", 96, 4),
        ("all-gather", 32, 4),
        ("reduce-scatter", 24, 2),
        ("all-reduce", 24, 4),
        ("all-reduce", 24, 6),
        ("all-reduce", 44, 8),
    ]
    assert [c.sent for c in found] == [72, 24, 24, 36, 40, 77]


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


def stand_in(loss):
    """What the peers' process would print, had it this loss of the large margin."""
    given = arms.problem(SHAPE, jnp.float32, 0.0)
    losses = {peers.SOFTMAX: arms.literal_loss(given, 1), peers.LARGE_MARGIN: loss}

    def printed(python, *arguments):
        if arguments == ("versions",):
            return json.dumps(dict.fromkeys(peers.PACKAGES, "1.0"))
        timed = {"loss": losses[arguments[-1]], "seconds": [0.1, 0.3], "growth_bytes": 5}
        return json.dumps(timed)

    return given, printed


def test_steps_are_timed_and_judged(tmp_path):
    flags = ["--configurations", "mnist-m4", "--batch", "4", "--width", "0.0625"]
    assert main(["bench", "step", *flags, "--repetitions", "2", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["command"].endswith(" ".join([*flags, "--repetitions", "2"]))
    (entry,) = found["configurations"]
    plain, no_margin, margin = entry["arms"]
    assert [row["arm"] for row in entry["arms"]] == [step.PLAIN, step.NO_MARGIN, step.MARGIN]
    assert plain["ratio"] == [1, 1, 1] and margin["loss"] > plain["loss"]
    assert no_margin["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert margin["memory_ratio"] == margin["temporary_bytes"] / plain["temporary_bytes"]
    for target, reached in zip(
        entry["targets"], (margin["ratio"][0], margin["memory_ratio"]), strict=True
    ):
        assert target["reached"] == reached and target["met"] == (reached <= 1.02)
    assert step.table(entry).row_count == 3


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
    entries = json.loads(steps.read_text())["configurations"]
    ratios = [f"{entry['targets'][0]['reached']:.2f}" for entry in entries]
    assert f"{ratios[0]}, {ratios[1]} and {ratios[2]} times as long" in readme


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    def run(arm, config):
        return SimpleNamespace(loss={step.PLAIN: 2.0, step.NO_MARGIN: 2.1, step.MARGIN: 3.0}[arm])

    monkeypatch.setattr(step, "prepare_arm", run)
    with pytest.raises(ValueError, match="m = 1 computes something else: its loss is 2.1"):
        step.prepare(None)


STEP_MISTAKES = {
    "unknown": (["--configurations", "mnist-m5"], "'mnist-m5'"),
    "none": (["--configurations"], "configurations must name at least one, got none"),
    "no margin": (["--configurations", "mnist-softmax"], "mnist-softmax has no margin"),
    "batch": (["--batch", "0"], "batch must be >= 1, got 0"),
    "repetitions": (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
}


@pytest.mark.parametrize("flags, message", STEP_MISTAKES.values(), ids=STEP_MISTAKES)
def test_a_mistake_with_steps_is_one_message(flags, message, tmp_path, capsys):
    assert main(["bench", "step", *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_peers_are_checked_and_timed_before_and_after(monkeypatch):
    exact = arms.literal_loss(arms.problem(SHAPE, jnp.float32, 0.0), 4)
    given, printed = stand_in(exact)
    monkeypatch.setattr(head, "_peer", printed)
    timed = head.peer_times(Path("python"), given, 4, 2)
    plain = SimpleNamespace(arm=Arm(arms.PLAIN, 3, "plain", None), seconds=[0.1])
    rows = head.peer_rows(timed, timed, [plain])
    assert [row["arm"] for row in rows] == [peers.SOFTMAX, peers.LARGE_MARGIN]
    assert rows[0]["milliseconds"] == [200, 100, 300] and rows[0]["ratio"] == [2, 1, 3]
    monkeypatch.setattr(head, "_peer", stand_in(1.1 * exact)[1])
    with pytest.raises(ValueError, match=f"{peers.LARGE_MARGIN} computes something else"):
        head.peer_times(Path("python"), given, 4, 2)


def test_torch_computes_the_same_loss():
    pytest.importorskip("pytorch_metric_learning")
    given = arms.problem(SHAPE, jnp.float32, 0.0)
    assert peers.LARGE_MARGIN in head.peer_times(Path(sys.executable), given, 4, 1)
