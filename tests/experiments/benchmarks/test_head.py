"""`bench head`: its result, the arms that it refuses to time, and its numbers in the README."""

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from experiments.__main__ import main
from experiments.benchmarks import arms, head, peers
from experiments.benchmarks.arms import Arm, Shape
from lsoftmax_jax.margins import ArcFace, CosFace, NormFace, SphereFace
from tests import oracle

CLONE = Path(__file__).parents[3]
SHAPE = Shape(16, 8, 12)
COMMAND = ["bench", "head", "--repetitions", "2", "--class-block", "5", "--shapes"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    assert main([*COMMAND, *map(str, SHAPE), "--out", str(out)]) == 0
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def result(file):
    return json.loads(file.read_text())


def test_every_arm_is_measured(result):
    (entry,) = result["shapes"]
    timed = {row["arm"]: row for row in entry["arms"]}
    assert entry["shape"] == list(SHAPE)
    assert list(timed) == [arm.name for arm in arms.arms(SHAPE, 4, 5)]
    for row in timed.values():
        median, low, high = row["milliseconds"]
        assert 0 < low <= median <= high
    assert timed[arms.PLAIN]["ratio"] == [1, 1, 1]
    assert timed[arms.FUSED_SGD]["baseline"] == arms.PLAIN_SGD
    assert timed[arms.ONE_SHOT]["dots"] == timed[arms.HEAD]["dots"] == 3
    assert timed[arms.HEAD]["loss"] == pytest.approx(timed[arms.DEFAULT]["loss"], rel=1e-5)
    assert result["command"].endswith("--class-block 5 --repetitions 2")
    assert "--shapes 16 8 12 --dtype f32" in result["command"]
    assert result["config"]["repetitions"] == 2 and "date" in result and "commit" in result


def test_the_table_shows_every_row_and_no_target(result):
    (entry,) = result["shapes"]
    assert head.arms_table(entry, "f32").row_count == len(entry["arms"])
    assert "targets" not in entry


def test_shapes_are_appended_and_nothing_is_lost(file, capsys):
    first = json.loads(file.read_text())
    before = first["shapes"]
    words = [*COMMAND, "8", "8", "12", "--append", str(file)]
    assert main([*words, "--only", arms.FUSED_SGD]) == 0
    second = json.loads(file.read_text())
    after = second["shapes"]
    one, two = second["command"].split(" && ")
    assert one == first["command"] and "--shapes 8 8 12" in two
    assert after[:-1] == before and after[-1]["shape"] == [8, 8, 12]
    assert {row["arm"] for row in after[-1]["arms"]} == {arms.PLAIN_SGD, arms.FUSED_SGD}
    capsys.readouterr()
    saved = file.read_text()
    assert main([*words, "--margin", "3"]) == 2
    assert "holds another result" in capsys.readouterr().err and file.read_text() == saved


def test_an_arm_that_disagrees_is_not_timed():
    given = arms.problem(SHAPE, "f32", 0.0)
    right = Arm(arms.PLAIN, arms.gradients(arms.plain_loss), 1)

    def doubled(*operands):
        loss, dfeatures, dkernel = right.step(*operands)
        return loss, dfeatures, 2 * dkernel

    wrong = Arm("margin's loss", right.step, 4)
    with pytest.raises(ValueError, match="margin's loss computes something else: its loss is"):
        head.prepare([wrong], given, SHAPE, "f32")
    wrong = right._replace(name="doubled", step=doubled)
    with pytest.raises(ValueError, match="doubled computes something else: its length of dkernel"):
        head.prepare([right, wrong], given, SHAPE, "f32")


def test_exact_losses_are_the_oracles():
    given = arms.problem(SHAPE, "f32", 2.0)
    host = [jax.device_get(a) for a in given[:3]]
    losses = oracle.loss(*host, 4, 2.0)
    chex.assert_trees_all_close(arms.exact_loss(given, 4), losses.mean(), rtol=1e-6)


@pytest.mark.parametrize(
    "margin, changed",
    [
        (ArcFace(0.5, scale=9.0), lambda theta: np.cos(theta + 0.5)),
        (CosFace(0.3, scale=9.0), lambda theta: np.cos(theta) - 0.3),
        (NormFace(scale=9.0), np.cos),
        (SphereFace(2), lambda t: np.where(t < np.pi / 2, np.cos(2 * t), -np.cos(2 * t) - 2)),
    ],
    ids=lambda margin: type(margin).__name__,
)
def test_the_changed_cosines_are_the_papers(margin, changed):
    theta = np.linspace(0.1, 2.4, 7)
    found = arms.changed_cosine(np.cos(theta), margin)
    np.testing.assert_allclose(found, changed(theta), atol=1e-12)


def test_the_exact_paced_loss_is_the_librarys():
    # The features lie near their label's column, so that the margin takes part.
    kernel = jnp.eye(4)
    features, labels = 3 * kernel[:3] + 0.2, jnp.arange(3)
    given = arms.Problem(features, kernel, labels, jnp.full(3, 1 / 3), jnp.float32(0))
    ruled = lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=lsm.self_paced()).mean()
    assert arms.exact_loss(given, 4, True) == pytest.approx(float(ruled), rel=1e-5)
    assert float(ruled) > 1.01 * arms.exact_loss(given, 1)


MISTAKES = {
    "no class": (["--shapes", "4", "4", "0"], "shapes"),
    "margin": (["--margin", "0"], "margin"),
    "lam": (["--lam", "-1"], "lam"),
    "only": (["--only", "optax"], "no arm optax"),
    "python": (["--peers", "--peers-python", "no-such-python"], "peers_python"),
}


@pytest.mark.parametrize("flags, name", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(flags, name, tmp_path, capsys):
    assert main(["bench", "head", *flags, "--out", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err


def test_arms_that_are_named_leave_pytorch_out(tmp_path, monkeypatch):
    monkeypatch.setattr(head, "torch_versions", lambda python: {})
    monkeypatch.setattr(head, "torch_times", None)
    flags = [*map(str, SHAPE), "--only", arms.FUSED_SGD, "--peers", "--out", str(tmp_path)]
    assert main([*COMMAND, *flags]) == 0
    (file,) = tmp_path.iterdir()
    (entry,) = json.loads(file.read_text())["shapes"]
    assert [row["arm"] for row in entry["arms"]] == [arms.PLAIN_SGD, arms.FUSED_SGD]


def test_the_readme_shows_the_committed_results():
    readme = " ".join((CLONE / "README.md").read_text().split())
    results = CLONE / "experiments" / "results" / "bench"
    heads = max(results.glob("head-cpu-f32-*.json"))  # the last by date
    for entry in json.loads(heads.read_text())["shapes"]:
        found = {row["arm"]: row for row in entry["arms"]}
        shape = ", ".join(map(str, entry["shape"]))

        def numbers(arm, found=found):
            time, memory = (found[arm][name] for name in ("ratio", "memory_ratio"))
            return f"{time[0]:.2f} x | {memory:.{2 if memory > 0.005 else 3}f} x"

        if arms.HEAD not in found:  # a size with few arms
            assert f"| {shape}, `lsoftmax_sgd` | {numbers(arms.FUSED_SGD)} |" in readme
            continue
        pairs = (arms.HEAD, peers.LARGE_MARGIN), ("ArcFace", peers.ARCFACE)
        cells = (f"{numbers(a)} | {found[peer]['ratio'][0]:.1f} x" for a, peer in pairs)
        assert f"| {shape} | {' | '.join(cells)} |" in readme
    steps = max(results.glob("step-cpu-*.json"))
    ratios = {
        entry["configuration"]: f"{arm['ratio'][0]:.2f}"
        for entry in json.loads(steps.read_text())["configurations"]
        for arm in entry["arms"]
        if arm["arm"] == "margin"
    }
    for data in ("mnist", "cifar10", "cifar100"):
        assert f"{data.upper()} {ratios[f'{data}-m4']} x" in readme
