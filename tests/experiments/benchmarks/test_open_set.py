"""`bench open-set`: its division of examples, its numbers by hand, and a short run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from experiments.__main__ import main
from experiments.benchmarks import frozen, open_set
from experiments.benchmarks.open_set import POLICIES, TASKS, Trained
from experiments.store.results import load

POOL = np.arange(60, dtype=np.float32)[:, None] * np.ones(4, np.float32), np.repeat([3, 5, 8], 20)
TASK = TASKS["digits"]._replace(trained=2, held=5, pairs=7)


def test_every_example_is_in_one_part_only():
    split = open_set.split_of(POOL, TASK, 0)
    rows = [part[0][:, 0] for part in split]
    assert [len(of) for of in rows] == [30, 10, 7]
    assert len(np.unique(np.concatenate(rows))) == 47
    names = {
        label: POOL[1][int(row)]
        for part in split[:2]
        for row, label in zip(part[0][:, 0], part[1], strict=True)
    }
    assert names.keys() == {0, 1} and split.unseen[1].tolist() == [0] * 7
    assert POOL[1][split.unseen[0][0, 0].astype(int)] not in names.values()
    for part in (split.train, split.test):
        for row, label in zip(part[0][:, 0], part[1], strict=True):
            assert POOL[1][int(row)] == names[label]


def test_another_split_trains_other_classes():
    firsts = [open_set.split_of(POOL, TASK, number).unseen[0][0, 0] // 20 for number in range(8)]
    assert len(set(firsts)) == 3


def test_whitened_features_have_unit_covariance_where_they_were_fitted():
    rng = np.random.default_rng(0)
    fit = (rng.normal(size=(500, 6)) @ rng.normal(size=(6, 6)) + 3).astype(np.float32)
    white = frozen.whitened(fit, fit, 4, 0.0)
    np.testing.assert_allclose(np.cov(white.T), np.eye(4), atol=0.01)
    floored = frozen.whitened(fit, fit, 4, 1.0).var(axis=0)
    assert (np.diff(floored) < 0).all() and (floored < 1).all()


def test_frozen_features_see_where_a_pattern_is():
    """One image differs in its upper left quarter; only the features of this quarter differ."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (300, 24, 24, 1), dtype=np.uint8)
    before = frozen.frozen(images)
    assert before.shape == (300, 8 * frozen.FILTERS) and before.min() >= 0
    other = images.copy()
    other[0, :6, :6] = 0
    # Filters are drawn from all images, so compare only the pooling, with fixed filters.
    mean, weights = rng.normal(size=36).astype(np.float32), np.eye(36, dtype=np.float32)
    first, second = (
        frozen._pooled(of[:1], mean, weights)[0].reshape(4, -1) for of in (images, other)
    )
    assert (first != second).any(axis=1).tolist() == [True, False, False, False]


def test_faces_are_cut_from_the_middle(tmp_path):
    for person, count in {"Ada": 3, "Bob": 2}.items():
        (tmp_path / person).mkdir()
        for number in range(count):
            picture = np.zeros((128, 128, 3), np.uint8)
            picture[16:112, 24:104] = 200
            Image.fromarray(picture).save(tmp_path / person / f"{number}.png")
    images, labels = frozen.grey_faces(tmp_path, 3, 2)
    assert images.shape == (2, 48, 40, 1) and labels.tolist() == [0, 0]
    assert (images == 200).all()


def test_numbers_by_hand():
    """Two unseen classes on two axes; one of four test answers is wrong."""
    axes = np.eye(2, dtype=np.float32)
    split = open_set.Split(
        (axes, np.array([0, 1])),
        (np.repeat(axes, 2, axis=0), np.array([0, 0, 1, 1])),
        (np.repeat(axes, 2, axis=0), np.array([0, 0, 1, 1])),
    )
    features = [jnp.asarray(part[0]) for part in split]
    answers = [jnp.array([0, 1]), jnp.array([0, 0, 1, 0]), jnp.zeros(4)]
    kernel = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    found = open_set.numbers(Trained(kernel, features, answers, jnp.float32(0.5)), split)
    assert (found["train_error"], found["error"], found["share"]) == (0, 25, 50)
    assert (found["eer"], found["auc"], found["rank_1"], found["tar_at_1e-3"]) == (0, 100, 100, 100)
    assert found["to_column"] == pytest.approx(22.5, abs=1e-3)
    assert (found["within"], found["between"]) == pytest.approx((0, 90), abs=1e-3)


def run(policy, error, eer):
    columns = {name: 2 * [0.0] for name in open_set.COLUMNS}
    return {"task": "digits", "split": 0, "policy": policy} | columns | {"error": error, "eer": eer}


def test_the_table_has_means_over_splits_and_seeds():
    runs = [run("softmax", [4.0, 2.0], [10.0, 10.0]), run("self_paced()", [2.0, 2.0], [9.0, 10.0])]
    assert "| `self_paced()` | 2.0 | 9.5 |" in open_set.results_table(runs)


def test_a_short_run_continues_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", TASKS["digits"]._replace(hidden=8, feature=4))
    assert main(["bench", "open-set", "--tasks", "digits", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert TASKS["digits"].title in shown and "`self_paced()`" in shown
    file = tmp_path / "open-set-quick-cpu.json"
    whole = load(file)
    assert [run["policy"] for run in whole["runs"]] == [POLICIES[0].name, POLICIES[2].name]
    assert all(len(run["eer"]) == 2 for run in whole["runs"])
    assert imread(file.with_suffix(".png")).shape[0] > 100
    file.write_text(json.dumps(whole | {"runs": whole["runs"][:1]}))
    measured = []

    def measure(task, split, policy, seeds):
        measured.append(policy.name)
        return {name: whole["runs"][1][name] for name in open_set.COLUMNS}

    monkeypatch.setattr(open_set, "measure", measure)
    open_set.bench(("digits",), quick=True, out=tmp_path)
    assert measured == ["self_paced()"]


def test_weight_decay_and_lam_reach_the_training():
    """A weight decay shortens the kernel; λ = 3 gives a share of 0.25."""
    task = TASKS["identities"]._replace(trained=5, steps=30, hidden=0, feature=8)
    split = open_set.split_of(open_set.identities(np.random.default_rng(0), 8, 30), task, 0)
    keys = jax.random.split(jax.random.key(0), 2)

    def length(margin, lam, decay):
        lams, decay = jnp.full(30, lam), jnp.float32(decay)
        found = open_set.trained(task, margin, split, lams, decay, keys)
        return float(jnp.linalg.norm(found.kernel)), float(found.share.mean())

    assert length(4, jnp.inf, 0.1)[0] < 0.9 * length(4, jnp.inf, 0.0)[0]
    assert length(4, 3.0, 0.0)[1] == pytest.approx(0.25)


def test_lfw_needs_its_folder(tmp_path):
    with pytest.raises(ValueError, match="lfw needs --faces"):
        open_set.bench(("lfw",), out=tmp_path)
