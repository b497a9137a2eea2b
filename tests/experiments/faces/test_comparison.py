"""Losses on LFW go on from one softmax network, equally long, and each fold is verified once."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from experiments.__main__ import main
from experiments.faces import comparison
from experiments.paper import networks as models
from experiments.paper.networks import Network, Stage
from experiments.report.outcomes import load_outcomes, went_on
from experiments.run.loop import INTERRUPTED
from experiments.store import results

TINY = Network((32, 32, 3), (Stage(4, 1, stride=2),), features=8)
PAIRS = "2\t2\nA\t1\t2\nA\t2\t3\nA\t1\tB\t1\nA\t2\tB\t2\nC\t1\t2\nC\t2\t3\nC\t1\tD\t1\nC\t2\tD\t2\n"


def test_every_arm_goes_on_for_as_many_updates_and_differs_from_softmax_in_its_loss_alone():
    first, *arms = comparison.recipes(seed=2, fold=3).values()
    assert {(r.seed, r.left_out_fold) for r in (first, *arms)} == {(2, 3)}
    going_on = arms[0]
    assert going_on.without_margin() == going_on and going_on.steps == 300
    for arm in arms:
        plain = replace(arm, family="l-softmax", margin=1, scale=None)
        assert replace(plain, pace="annealed", lam=going_on.lam) == going_on
    for minimum in (10, 20):
        policy = comparison.recipes(0, 0)[f"m4-minimum{minimum}"].lam_policy
        assert float(policy(130)) > minimum and float(policy(150)) == minimum


@pytest.fixture
def lfw(tmp_path, monkeypatch):
    """Four people of four images, two folds of pairs; a tiny network and two updates."""
    folder, rng = tmp_path / "lfw", np.random.default_rng(0)
    for person in "ABCD":
        (folder / person).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (36, 36, 3), np.uint8)
            Image.fromarray(pixels).save(folder / person / f"{person}_{i + 1:04d}.png")
    (folder / "pairs.txt").write_text(PAIRS)
    monkeypatch.setitem(models.NETWORKS, "lfw", TINY)
    small = {"size": (32, 32), "minimum_images": 1, "width": 1.0, "batch": 8, "steps": 2}
    monkeypatch.setattr(comparison, "SOFTMAX", replace(comparison.SOFTMAX, **small))
    monkeypatch.setitem(comparison.GOING_ON, "steps", 1)
    for name in ("m4-minimum10", "m4-minimum20", "m4-lead"):
        monkeypatch.delitem(comparison.ARMS, name)
    return folder


@pytest.mark.slow
@pytest.mark.ci
def test_all_folds_are_verified_and_a_second_command_has_nothing_to_do(
    lfw, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    command = ["compare-faces", "--faces", lfw, "--pairs", lfw / "pairs.txt", "--folds", 0, 1]
    command = [*map(str, command), "--out", str(out)]
    assert main(command) == 0
    assert {file.name for file in out.glob("*.json")} == {
        f"seed0-fold{fold}-{name}.json"
        for fold in (0, 1)
        for name in ("softmax", "softmax-going-on", "arcface")
    }
    arms = load_outcomes(out).verifications
    assert [arm["tested_folds"] for arm in arms] == 3 * [[0, 1]]
    assert sorted(map(went_on, arms)) == [False, True, True]
    assert all(len(arm["all_pairs"]["fold_eer"]) == 2 for arm in arms)
    arcface = results.load(out / "seed0-fold1-arcface.json")
    assert arcface["training"]["init_from"] == "seed0-fold1-softmax"
    assert arcface["config"]["family"] == "arcface" and arcface["config"]["pace"] == "none"
    monkeypatch.setattr(comparison, "train_faces", None)
    assert main(command) == 0


def test_a_stopped_run_ends_the_comparison_without_a_verification(lfw, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "train_faces", lambda *_, **__: INTERRUPTED)
    out = tmp_path / "out"
    assert comparison.compare_faces(lfw, lfw / "pairs.txt", (0,), out=out) == INTERRUPTED
    assert not list(tmp_path.rglob("out/*.json"))
