"""`bench convergence`: its tables against tables by hand, and a short run."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from experiments.__main__ import main
from experiments.benchmarks import convergence
from experiments.benchmarks.convergence import DEFAULT, POLICIES, SOFTMAX, Data, Setting
from experiments.store.results import load

BENCH = Path(__file__).parents[3] / "experiments" / "results" / "bench"
PLAIN = Data()
SCALED_FEW = ("softmax", "CosFace, λ = 0", "ArcFace, self-paced")


def entry(name, softmax, paced, apart=True, data=PLAIN):
    """The entry of a setting in a result, with two policies."""
    runs = [
        {"policy": policy.name, "margin": 4, "errors": of, "rarest": of, "shares": [share] * 2}
        for policy, of, share in ((SOFTMAX, softmax, 0.0), (DEFAULT, paced, 0.25))
    ]
    return {"setting": Setting(name, data, apart=apart)._asdict(), "runs": runs}


ENTRIES = [
    entry("a", [2, 4], [2, 24]),  # 24 is more than 20 above 3
    entry("b", [10, 20], [9, 12], data=Data(noise=0.4)),
    entry("c", [50, 50], [49.5, 49.5], apart=False, data=Data(rarest=0.1)),
]


def test_tables_by_hand():
    assert convergence.summary_table(ENTRIES).splitlines()[2:] == [
        "| softmax | 0 of 6 | 22.67 |  |  | 0.000 |",
        "| `self_paced()` | 1 of 6 | 24.33 | 2 of 3 | 10.00 | 0.250 |",
    ]
    assert convergence.settings_table(ENTRIES).splitlines()[2:] == [
        "| a | 3.00 | +10.00 (1) | 0.250 |",
        "| b | 15.00 | -4.50 | 0.250 |",
        "| c * | 50.00 | -0.50 | 0.250 |",
    ]
    assert convergence.rarest_table(ENTRIES).splitlines()[2:] == ["| c | 50.0 | 49.5 |"]


def test_spoilt_digits():
    plain, noisy = convergence.split_of(Data()), convergence.split_of(Data(noise=0.4))
    rare = convergence.split_of(Data(rarest=0.1))
    assert np.mean(plain.train[1] != noisy.train[1]) == pytest.approx(0.36, abs=0.04)
    counts = np.bincount(rare.train[1]) / np.bincount(plain.train[1])
    assert counts[0] == 1 and counts[9] == pytest.approx(0.1, abs=0.05)
    for split in (noisy, rare):
        np.testing.assert_array_equal(split.test[0], plain.test[0])
        np.testing.assert_array_equal(split.test[1], plain.test[1])


def test_training_and_test_have_the_same_identities():
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


def test_released_constants_end_at_the_whole_margin_unless_a_minimum_is_given():
    lams = convergence.released(500)
    assert lams.shape == (500,) and lams[0] > 900 and lams[-1] < 0.1
    assert convergence.released(500, minimum=5.0)[-1] == 5


@pytest.mark.slow
@pytest.mark.ci
def test_every_policy_has_its_own_runs():
    setting = Setting("few updates", steps=60)
    split, keys = convergence.split_of(setting.data), jax.random.split(jax.random.key(0), 2)

    def errors_and_shares(margin, lam):
        params, shares = convergence.trained(setting, 10, margin, split.train, lam, keys)
        features, answers = convergence.features_and_answers(setting, margin, params, split)
        assert features.shape == (2, 540, 32)
        return 100 * np.mean(answers != split.test[1], axis=1), shares

    (softmax, none), (whole, all_of_it) = (
        errors_and_shares(4, jnp.full(60, lam)) for lam in (np.inf, 0.0)
    )
    assert (softmax < 20).all() and (whole > 60).all()
    assert (none == 0).all() and (all_of_it == 1).all()
    # Softmax is a head with λ = infinity here; a head without a margin gives the same numbers.
    np.testing.assert_allclose(errors_and_shares(1, jnp.full(60, 7.0))[0], softmax, atol=0.4)
    paced, shares = errors_and_shares(4, lsm.self_paced(1.0))
    assert (paced < 20).all() and (shares > 0).all() and (shares < 0.36).all()


def test_a_margin_with_a_scale_answers_by_the_angle():
    """With columns of very different lengths, the largest product is not the smallest angle."""
    setting, inputs = Setting("no update", feature=3), np.ones((5, 64), np.float32)
    split = convergence.Split((inputs, np.zeros(5)), (inputs, np.zeros(5)), 4)
    network = convergence.Network(setting, 4, convergence.COSFACE)
    params = jax.vmap(network.init, (0, None))(jax.random.split(jax.random.key(0), 1), inputs)
    kernel = params["params"]["head"]["kernel"] * jnp.array([1.0, 100.0, 0.01, 1.0])
    params["params"]["head"]["kernel"] = kernel
    answers = []
    for margin in (4, convergence.COSFACE):
        features, found = convergence.features_and_answers(setting, margin, params, split)
        answers.append(found[0].tolist())
    products = np.asarray(features[0] @ kernel[0])
    cosines = products / np.linalg.norm(kernel[0], axis=0)
    assert answers == [products.argmax(axis=1).tolist(), cosines.argmax(axis=1).tolist()]
    assert answers[0] != answers[1]


def test_batch_norm_takes_the_statistics_of_the_training_images():
    setting = Setting("no update", feature=3, batch_norm=True)
    split, network = convergence.split_of(PLAIN), convergence.Network(setting, 10, 4)
    params = jax.vmap(network.init, (0, None))(
        jax.random.split(jax.random.key(0), 1), np.ones((2, 64))
    )

    def features(test):
        return convergence.features_and_answers(setting, 4, params, split._replace(test=test))[0][0]

    np.testing.assert_allclose(features(split.train).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(features(split.train).std(axis=0), 1, atol=1e-2)
    # One image alone has no statistics of its own.
    alone = features((split.test[0][:1], split.test[1][:1]))
    np.testing.assert_allclose(alone[0], features(split.test)[0], rtol=1e-5)
    plain = convergence.features_and_answers(setting._replace(batch_norm=False), 4, params, split)
    assert (np.asarray(plain[0]) >= 0).all() and (np.asarray(features(split.test)) < 0).any()


def test_the_rarest_classes_are_the_last_three(monkeypatch):
    """A network that always answers 7 is right about a third of the three rarest classes."""
    setting = Setting("always seven", steps=1)
    labels = convergence.split_of(setting.data).test[1]

    def sevens(setting, margin, params, split):
        return None, np.full((2, len(split.test[0])), 7)

    monkeypatch.setattr(convergence, "features_and_answers", sevens)
    monkeypatch.setattr(convergence, "trained", lambda *_: (None, np.zeros(2)))
    run = convergence.measure(setting, [SOFTMAX], 2)["runs"][0]
    rare = labels[labels >= 7]
    assert run["rarest"] == pytest.approx([100 * np.mean(rare != 7)] * 2, abs=1e-3)
    assert run["errors"] == pytest.approx([100 * np.mean(labels != 7)] * 2, abs=1e-3)


def test_a_short_run_writes_its_tables(tmp_path, capsys, monkeypatch):
    few = POLICIES[:3]  # each policy compiles a program of its own
    monkeypatch.setattr(convergence, "POLICIES", few)
    assert main(["bench", "convergence", "--quick", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "| `self_paced()`, m = 4 | 0 of 2 |" in shown and "| setting | softmax, % |" in shown
    (file,) = tmp_path.iterdir()
    (entry,) = json.loads(file.read_text())["settings"]
    assert [(run["policy"], run["margin"]) for run in entry["runs"]] == [
        (policy.name, policy.margin) for policy in few
    ]
    assert all(len(run["errors"]) == len(run["shares"]) == 2 for run in entry["runs"])
    assert not convergence.trained._cache_size()


@pytest.mark.slow
@pytest.mark.ci
def test_a_short_run_of_the_margins_with_a_scale(tmp_path, capsys, monkeypatch):
    few = [policy for policy in convergence.SCALED if policy.name in SCALED_FEW]
    monkeypatch.setattr(convergence, "SCALED", few)
    words = ["bench", "convergence", "--scaled", "--batch-norm", "--quick"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "| CosFace, λ = 0 | 0 of 2 |" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    result = json.loads(file.read_text())
    assert file.name == "convergence-scaled-batch-norm-quick-cpu.json"
    assert result["command"] == f"python -m experiments {' '.join(words)}"
    runs = result["settings"][0]["runs"]
    assert result["settings"][0]["setting"]["batch_norm"]
    assert [run["policy"] for run in runs] == list(SCALED_FEW)
    shares = {run["policy"]: np.mean(run["shares"]) for run in runs}
    assert shares["CosFace, λ = 0"] == 1 and 0 < shares["ArcFace, self-paced"] < 0.29
    assert "CosFace(margin=0.35, scale=16.0)" in {run["margin"] for run in runs}


def test_an_interrupted_run_continues(tmp_path, capsys, monkeypatch):
    measured = []

    def measure(setting, *_):
        measured.append(setting.name)
        return entry(setting.name, [2, 2], [1, 1])

    monkeypatch.setattr(convergence, "SETTINGS", tuple(Setting(name, apart=True) for name in "ab"))
    monkeypatch.setattr(convergence, "POLICIES", (SOFTMAX, DEFAULT))
    monkeypatch.setattr(convergence, "measure", measure)
    convergence.bench(out=tmp_path)
    assert measured == ["a", "b"]
    measured.clear()
    (file,) = tmp_path.iterdir()
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"settings": whole["settings"][:1]}))
    convergence.bench(out=tmp_path)
    assert measured == ["b"]
    assert json.loads(file.read_text()) == whole
    convergence.bench(again=True, out=tmp_path)
    assert measured == ["b", "a", "b"]


def test_an_interrupt_keeps_the_settings_that_come_later(tmp_path, monkeypatch):
    def measure(setting, *_):
        if setting.name == "new":
            raise KeyboardInterrupt
        return entry(setting.name, [2, 2], [1, 1])

    settings = [Setting(name, apart=True) for name in ("a", "new", "b")]
    monkeypatch.setattr(convergence, "POLICIES", (SOFTMAX, DEFAULT))
    monkeypatch.setattr(convergence, "measure", measure)
    monkeypatch.setattr(convergence, "SETTINGS", (settings[0], settings[2]))
    convergence.bench(out=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    monkeypatch.setattr(convergence, "SETTINGS", tuple(settings))
    with pytest.raises(KeyboardInterrupt):
        convergence.bench(out=tmp_path)
    assert file.read_text() == whole


@pytest.mark.parametrize(
    ("flags", "policies"),
    [
        ("", POLICIES),
        ("-batch-norm", POLICIES),
        ("-scaled", convergence.SCALED),
        ("-scaled-batch-norm", convergence.SCALED),
    ],
)
def test_the_committed_results_have_the_settings_of_the_code(flags, policies):
    entries = load(BENCH / f"convergence{flags}-cpu.json")["settings"]
    for found in entries:
        assert [run["policy"] for run in found["runs"]] == [policy.name for policy in policies]
    names = [(setting.name, setting.apart) for setting in convergence.SETTINGS]
    assert [(e["setting"]["name"], e["setting"]["apart"]) for e in entries] == names
