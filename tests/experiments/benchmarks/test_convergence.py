"""`bench convergence`: its sums against numbers made by hand, and a short run of it."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.benchmarks import convergence
from experiments.benchmarks.convergence import Data, Setting
from experiments.store.results import load


def entry(name, softmax, apart=True, **policies):
    runs = [{"policy": "softmax", "margin": 1, "errors": softmax}]
    runs += [{"policy": p, "margin": m, "errors": e} for p, of in policies.items() for m, e in of]
    return {"setting": Setting(name, apart=apart)._asdict(), "runs": runs}


ENTRIES = [
    entry("a", [2, 4], self_paced=[(2, [1, 3]), (8, [2, 24])], margin_schedule=[(2, [3, 3])]),
    entry("b", [10, 10], self_paced=[(2, [9, 12]), (8, [10, 9])], margin_schedule=[(2, [31, 9])]),
]


def test_outcomes_by_hand():
    paced = convergence.outcome(ENTRIES, "self_paced", [2, 8])
    assert paced[:2] == (8, 1)  # 24 is more than 20 above 3
    assert paced.error == pytest.approx((2 + 13 + 10.5 + 9.5) / 4)
    assert (paced.settings, paced.no_worse, paced.worst) == (4, 2, 10)
    ramp = convergence.outcome(ENTRIES, "margin_schedule", [2])
    assert ramp == (4, 1, pytest.approx(11.5), 2, 1, 10)


def test_targets_are_of_the_settings_set_apart():
    spoilt = entry("c", [1], apart=False, self_paced=[(2, [90])], margin_schedule=[(2, [90])])
    found = convergence.targets([*ENTRIES, spoilt])
    assert found == convergence.targets(ENTRIES)
    assert [(target["reached"], target["met"]) for target in found] == [
        (1, False), (0.5, False), (0.5, False), (1, False), (0.5, False), (10, False)
    ]  # fmt: skip
    good = entry("d", [5], self_paced=[(2, [5])], margin_schedule=[(4, [4])])
    assert all(target["met"] for target in convergence.targets([good]))


def test_spoilt_digits():
    plain, noisy = convergence.split_of(Data()), convergence.split_of(Data(noise=0.4))
    rare = convergence.split_of(Data(rarest=0.1))
    assert np.mean(plain.train[1] != noisy.train[1]) == pytest.approx(0.36, abs=0.04)
    counts = np.bincount(rare.train[1]) / np.bincount(plain.train[1])
    assert counts[0] == 1 and counts[9] == pytest.approx(0.1, abs=0.05)
    for split in (noisy, rare):
        np.testing.assert_array_equal(split.test[0], plain.test[0])
        np.testing.assert_array_equal(split.test[1], plain.test[1])


def test_identities_are_the_same_in_training_and_test():
    inputs, labels = (split := convergence.split_of(Data(identities=7, dim=3, spread=0.01))).train
    centres = np.stack([inputs[labels == label].mean(axis=0) for label in range(split.classes)])
    distances = np.linalg.norm(split.test[0][:, None] - centres, axis=-1)
    np.testing.assert_array_equal(distances.argmin(axis=1), split.test[1])


def test_networks():
    for setting in convergence.SETTINGS:
        network = convergence.Network(setting, 7, 4)
        params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((3, 64)))
        assert params["params"]["head"]["kernel"].shape == (setting.feature, 7)
        kinds = {name.split("_")[0] for name in params["params"]}
        assert kinds == {"lower", "last", "head"}, kinds


def test_every_lam_has_its_own_runs():
    setting = Setting("few updates", steps=60)
    split = convergence.split_of(setting.data)
    lams = jnp.stack([jnp.full(60, jnp.inf), jnp.zeros(60)])
    start = convergence.start_of(setting, split, 2)
    found = convergence.errors(setting, split, start, 4, lams)
    assert found.shape == (2, 2)
    assert (found[0] < 20).all() and (found[1] > 60).all()  # softmax learns, λ = 0 collapses
    np.testing.assert_allclose(convergence.errors(setting, split, start, 1, lams[:1]), found[:1])


def test_a_short_run_writes_its_tables(tmp_path, capsys):
    assert main(["bench", "convergence", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| `self_paced()` | 4 | 0 of 2 |" in shown and "points above softmax" in shown
    (file,) = tmp_path.iterdir()
    (entry,) = json.loads(file.read_text())["settings"]
    policies = [run["policy"] for run in entry["runs"]]
    ramps = ["margin_schedule", "released", "λ = 0", "λ = 5", "λ = 20"]
    assert policies == ["softmax", "self_paced", *ramps]
    assert all(len(run["errors"]) == 2 for run in entry["runs"])


def test_an_interrupted_run_continues(tmp_path, capsys, monkeypatch):
    measured = []

    def measure(setting, *_):
        measured.append(setting.name)
        policies = {"self_paced": [(4, [1])], "margin_schedule": [(4, [1])]}
        return entry(setting.name, [2], **policies)

    settings = tuple(Setting(name, apart=True) for name in "ab")
    monkeypatch.setattr(convergence, "SETTINGS", settings)
    monkeypatch.setattr(convergence, "measure", measure)
    assert main(["bench", "convergence", "--out", str(tmp_path)]) == 0
    assert measured == ["a", "b"]
    measured.clear()
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"settings": whole["settings"][:1]}))
    assert main(["bench", "convergence", "--out", str(tmp_path)]) == 0
    assert measured == ["b"]
    assert json.loads(file.read_text()) == whole
    assert main(["bench", "convergence", "--again", "--out", str(tmp_path)]) == 0
    assert measured == ["b", "a", "b"]


def test_the_guide_has_the_tables_of_the_committed_result():
    root = Path(__file__).parents[3]
    entries = load(root / "experiments/results/bench/convergence-cpu.json")["settings"]
    assert [convergence.setting_of(entry) for entry in entries] == list(convergence.SETTINGS)
    guide = (root / "docs/guide/margin-and-lambda.md").read_text()
    assert convergence.summary_table(entries) in guide
    assert convergence.settings_table(entries) in guide
