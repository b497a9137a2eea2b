"""A run resumes to the same bits, records its numbers, and stops when it must."""

import itertools
import json
import signal
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from experiments.__main__ import main
from experiments.paper import data
from experiments.paper.cells import CELLS, CONFIGS, command_of, run_name, toy
from experiments.paper.networks import NETWORKS
from experiments.run import loop, session, train
from experiments.store import progress
from experiments.store import results as result
from experiments.store.claims import claim
from experiments.store.logs import Log
from lsoftmax_jax.schedule import LambdaPreset

pytestmark = pytest.mark.usefixtures("shared_programs")

CONFIG = replace(
    CONFIGS["digits-m4"],
    pace="annealed",
    lam=LambdaPreset(base=1000.0, gamma=0.005, power=8.0),
    steps=12,
    batch=16,
    width=1 / 8,
    examples=100,
)


def run(out, config=CONFIG, **keywords):
    return train.run(config, out=out, **({"devices": 1, "evaluations": 3} | keywords))


def numbers(outcome):
    """The numbers that must not depend on interruptions."""
    return {key: outcome[key] for key in ("train", "test", "curves", "config", "data")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken")
    return out, run(out)


def test_result_says_everything(unbroken):
    out, outcome = unbroken
    file = out / f"{run_name(CONFIG)}.json"
    assert json.loads(file.read_text(), parse_constant=pytest.fail) == outcome
    assert outcome["status"] == "finished" and outcome["reduced"]
    lam = {"base": 1000.0, "gamma": 0.005, "power": 8.0, "minimum": 0.0}
    sizes = {"steps": 12, "batch": 16, "width": 0.125, "examples": 100}
    assert outcome["changes"] == {"pace": "annealed", "lam": lam} | sizes
    assert outcome["command"] == command_of(CONFIG)
    assert outcome["ran"] == {
        "pace": "annealed",
        "lam": lam | {"gamma": 0.005 * 500 / 12},
        "drops": [8, 10],
    }
    assert outcome["versions"]["jax"] == jax.__version__ and outcome["device"].startswith("cpu")
    assert outcome["images_per_second"] > 0 and 0 < outcome["outside_step"] < 1
    assert outcome["curves"]["train"]["step"] == list(range(1, 13))
    assert outcome["curves"]["test"]["step"] == [4, 8, 12]
    share = outcome["curves"]["train"]["share"]
    assert share == sorted(share) and share[0] < 0.01 < 0.5 < share[-1]
    assert "lam" not in outcome["curves"]["train"]
    predicted, true = result.labels_of(outcome)
    digits = data.load("digits").first(100).test
    np.testing.assert_array_equal(true, digits.labels)
    assert 100 * np.mean(predicted != digits.labels) == pytest.approx(outcome["test"]["error"])
    found = confusion_matrix(digits.labels, predicted, labels=np.arange(10))
    assert found.tolist() == outcome["test"]["confusion"]
    assert outcome["curves"]["train"]["margin_idle"] == [float(value < 0.01) for value in share]
    for split in ("train", "test"):
        confusion = np.array(outcome[split]["confusion"])
        assert confusion.sum() == outcome[split]["count"] == 100
        assert 100 - np.trace(confusion) == pytest.approx(outcome[split]["error"])
    assert outcome["curves"]["test"]["error"][-1] == pytest.approx(
        outcome["test"]["error"], abs=1e-3
    )
    assert list((out / run_name(CONFIG) / "events").iterdir())


def test_stopped_run_continues_to_the_same_bits(unbroken, tmp_path):
    asked = itertools.count()
    assert run(tmp_path, stop=lambda: next(asked) == 5) is None
    assert not (tmp_path / f"{run_name(CONFIG)}.json").exists()
    assert numbers(run(tmp_path)) == numbers(unbroken[1])


def test_broken_run_continues_from_its_checkpoint_to_the_same_bits(unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        steps, advance = itertools.count(), session.Session.advance

        def broken(broken_session, length):
            if next(steps) == 7:
                raise KeyboardInterrupt
            return advance(broken_session, length)

        # The run saves after step 1 only, so that the log is ahead of the checkpoint.
        clock = itertools.chain([0.0], itertools.repeat(100.0))
        patch.setattr(session.Session, "advance", broken)
        patch.setattr(loop, "time", FakeTime(clock))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    log = tmp_path / run_name(CONFIG) / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"kind": "train", "st')  # torn by the kill
    assert numbers(run(tmp_path)) == numbers(unbroken[1])


def test_finished_run_is_not_trained_again(unbroken, monkeypatch, capsys):
    out, outcome = unbroken
    monkeypatch.setattr(loop, "Session", None)
    assert run(out) == outcome
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "its seed is 1"),
        ({"test": None}, "a result of a run, its test is None"),
        ({"test": {"error": -5.0}}, "its test is"),
        ({"test": {"error": 5.0}}, "no test loss, no test target_angle"),
        ({"config": CONFIG.to_json() | {"seed": 1}}, "the result of this run, not seed 1 -> 0"),
        ({"config": CONFIG.to_json() | {"steps": 13}}, "not steps 13 -> 12"),
        ({"config": {"name": 3}}, "the configuration of its run"),
        ({"images_per_second": None}, "a result with images_per_second"),
    ],
)
def test_the_result_of_another_run_is_refused(changes, message, unbroken, tmp_path, capsys):
    file = tmp_path / f"{run_name(CONFIG)}.json"
    result.save(file, unbroken[1] | changes)
    with pytest.raises(ValueError, match=rf"seed0.json must hold .*{message}"):
        run(tmp_path)
    assert "is finished" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.ci
def test_devices_and_dispatches_change_rounding_only(unbroken, tmp_path):
    spread = run(tmp_path, devices=4, dispatch=2)  # a CPU compiles each update of a dispatch
    assert spread["devices"] == 4
    loss = spread["curves"]["train"]["loss"]
    whole = np.reshape(unbroken[1]["curves"]["train"]["loss"], (6, 2)).mean(axis=1)
    np.testing.assert_allclose(loss, whole, rtol=1e-3)
    chex.assert_trees_all_close(spread["test"]["kernel"], unbroken[1]["test"]["kernel"], rtol=0.02)


def test_evaluate_measures_the_checkpoint(unbroken, monkeypatch, capsys):
    out, outcome = unbroken
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    step, measured = train.evaluate_run(out / run_name(CONFIG), None, 1)
    assert step == 12 and measured == {"train": outcome["train"], "test": outcome["test"]}
    said = capsys.readouterr().err
    assert "measuring: 100 of 200 images" in said and "measuring: 200 of 200 images" in said
    with pytest.raises(FileNotFoundError, match="no run in"):
        train.evaluate_run(out / "runs" / "absent", None, 1)
    settings = {"config": outcome["config"], "data": "of another day"}
    monkeypatch.setattr(train, "claimed", lambda _: {"settings": settings})
    with pytest.raises(ValueError, match="saw other data than digits"):
        train.evaluate_run(out / run_name(CONFIG), None, 1)


def test_warm_start_takes_weights_and_statistics(unbroken, tmp_path):
    out, outcome = unbroken
    config = replace(CONFIG, init=run_name(CONFIG), steps=1, learning_rate=0.0)
    warm = run(out, config)
    assert warm["reduced"] and f"--init {run_name(CONFIG)}" in warm["command"]
    assert warm["test"]["kernel"] == outcome["test"]["kernel"]
    assert warm["curves"]["train"]["step"] == [1]
    with pytest.raises(FileNotFoundError, match="--init"):
        run(tmp_path, config)


def test_diverged_run_is_recorded(tmp_path, capsys):
    config = replace(CONFIG, learning_rate=1e9, lam=LambdaPreset(0, 0, 0))
    outcome = run(tmp_path, config)
    assert outcome["status"] == "diverged" and "test" not in outcome
    assert 0 < outcome["diverged"]["step"] < 12 and outcome["diverged"]["share"] == 1
    assert result.load(tmp_path / f"{run_name(config)}.json") == outcome
    said = capsys.readouterr()
    for part in (
        "diverged at update",
        "margin 100.000%",
        "|features|",
        "|kernel|",
        "--lam.base",
        "--init",
    ):
        assert part in said.out + said.err


def test_warns_when_lam_never_falls(capsys):
    train.warn_if_lam_stays(replace(CONFIG, lam=LambdaPreset(1000, 1e-9, 1)))
    assert "λ is still 1e+03 at the last update" in capsys.readouterr().err
    train.warn_if_lam_stays(CONFIG)
    train.warn_if_lam_stays(replace(CONFIG, margin=1, lam=LambdaPreset(1000, 1e-9, 1)))
    assert capsys.readouterr().err == ""


def test_named_configurations_let_lam_fall(capsys):
    for config in CONFIGS.values():
        train.warn_if_lam_stays(config)
    assert capsys.readouterr().err == ""


def test_optimizer_is_the_recipe():
    config = replace(CONFIGS["released-mnist-m2"], steps=30, learning_rate=0.5, drops=(1000,))
    ones = {"kernel": jnp.ones(2), "bias": jnp.ones(2)}
    params = {"layer": ones, "norm": ones | {"scale": jnp.ones(2)}, "slope": jnp.ones(2)}
    grads = jax.tree.map(lambda leaf: 0.1 * leaf, params)
    sgd = config.optimizer
    state = sgd.init(params)
    first, state = sgd.update(grads, state, params)
    second, _ = sgd.update(grads, state, params)
    decayed = 0.1 + config.weight_decay
    for updates, scale in ((first, 0.5), (second, 0.05 * 1.9)):
        chex.assert_trees_all_close(
            updates,
            {
                "layer": {
                    "kernel": -scale * decayed * jnp.ones(2),
                    "bias": -0.2 * scale * jnp.ones(2),
                },
                "norm": {
                    "kernel": -scale * decayed * jnp.ones(2),
                    "bias": -0.1 * scale * jnp.ones(2),
                    "scale": -0.1 * scale * jnp.ones(2),
                },
                "slope": -0.1 * scale * jnp.ones(2),
            },
            rtol=1e-5,
        )


def test_batch_must_divide_over_the_devices(tmp_path):
    with pytest.raises(ValueError, match="batch must divide over the 3 devices, got 16"):
        run(tmp_path, devices=3)


def test_folder_of_another_configuration_is_refused(tmp_path):
    other = {"config": CONFIG.to_json() | {"momentum": 0.5}, "data": "other images"}
    claim(tmp_path / run_name(CONFIG), other, 1, writes=True)
    message = "holds another run .config.momentum 0.5 -> 0.9, data other images -> [0-9a-f]+"
    with pytest.raises(ValueError, match=message):
        run(tmp_path)


def test_a_claim_contains_no_prose(tmp_path, monkeypatch):
    """A half-finished run continues after an edit of its cell's words."""
    asked = itertools.count()
    assert run(tmp_path, stop=lambda: next(asked) == 2) is None
    claims = result.load(tmp_path / run_name(CONFIG) / "claim")
    cell = CELLS[CONFIG.name]
    assert claims["settings"]["config"] == CONFIG.to_json()
    for words in (cell.where, cell.time):
        assert words not in json.dumps(claims["settings"])
    edited = cell._replace(where="Table 9", reported=1.0, standing="recalled", time="a year")
    monkeypatch.setitem(CELLS, CONFIG.name, edited)
    assert run(tmp_path)["status"] == "finished"


def test_the_commit_is_that_of_the_start(tmp_path, monkeypatch):
    commits = (f"commit {number}" for number in itertools.count())
    monkeypatch.setattr(result, "_commit", lambda: next(commits))
    assert run(tmp_path)["commit"] == "commit 0"
    claims = result.load(tmp_path / run_name(CONFIG) / "claim")
    assert claims["begun"]["commit"] == "commit 1" and next(commits) == "commit 2"


def test_first_interrupt_asks_and_the_second_ends():
    before = signal.getsignal(signal.SIGINT)  # ignored in a background job of a shell
    with loop.interruptible() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # while the run closes its files
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("nohup", [False, True])
def test_closing_the_terminal_asks_unless_it_is_ignored(nohup):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:
        with loop.interruptible() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop() is not nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_log_thins_curves_and_writes_null_for_nan(tmp_path):
    log = Log(tmp_path, 0)
    for step in range(1, 11):
        log.write("train", step, {"wall": step}, loss=float("nan") if step == 10 else step)
    mark = log.mark()
    log.close()
    assert log.curve("train", points=4) == {"step": [1, 4, 7, 10], "loss": [1, 4, 7, None]}
    again = Log(tmp_path, 10, mark, writes=False)
    assert (
        len(again.lines) == 10
        and again.lines[-1]["seconds"] == {"wall": 10}
        and again.curve("test") == {}
    )


def test_command_line_mistakes_end_with_2(tmp_path, capsys, monkeypatch):
    assert main(["train", "mnist-m4", "--data", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    for words in (["train", "mnist-m4", "--stepz", "3"], ["trian"]):
        try:
            code = main(words)
        except SystemExit as end:  # raised by the command-line library
            code = end.code
        assert code == 2
    monkeypatch.setenv("EXPERIMENTS_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["train", "mnist-m4", "--data", str(tmp_path)])


def cells():
    """Every configuration; CI runs one network of each data set."""
    sampled = {"mnist-m4", "cifar100-m3", "released-cifar10plus-hinge"}
    for name, config in CONFIGS.items():
        yield pytest.param(config, id=name, marks=[pytest.mark.ci] if name in sampled else [])


@pytest.mark.slow
@pytest.mark.parametrize("config", list(cells()))
def test_cell_runs_at_toy_size(config, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        shape = (64, *NETWORKS[config.network].image)
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, config.classes, 64)
    np.savez(tmp_path / f"{config.dataset}.npz", **arrays)
    dtype = "bf16" if config.margin == 3 else "f32"
    outcome = run(tmp_path, replace(toy(config), dtype=dtype), data=tmp_path)
    assert outcome["status"] == "finished"


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.usefixtures("compiled_as_for_users")
def test_released_mnist_recipe_trains(tfds_dir, tmp_path):
    small = {"steps": 240, "batch": 64, "width": 1 / 8, "examples": 6000}
    config = replace(CONFIGS["released-mnist-m4"], **small)
    outcome = run(tmp_path, config, data=tfds_dir, evaluations=1)
    assert outcome["test"]["error"] < 10


class FakeTime:
    """A clock that shows given times."""

    def __init__(self, times):
        self._times = times

    def monotonic(self):
        return next(self._times)
