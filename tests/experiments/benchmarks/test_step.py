"""`bench step`: whole training steps, timed."""

import json
from types import SimpleNamespace

import pytest

from experiments.__main__ import main
from experiments.benchmarks import step
from experiments.paper.cells import CONFIGS


@pytest.mark.slow
@pytest.mark.ci
def test_steps_are_timed(tmp_path):
    flags = ["--configurations", "mnist-m4", "--batch", "4", "--width", "0.0625"]
    assert main(["bench", "step", *flags, "--repetitions", "2", "--out", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert found["command"].endswith(" ".join([*flags, "--repetitions", "2"]))
    (entry,) = found["configurations"]
    timed = {arm["arm"]: arm for arm in entry["arms"]}
    assert timed.keys() == {step.PLAIN, step.NO_MARGIN, step.MARGIN, step.DEFAULT}
    plain, no_margin, margin = timed[step.PLAIN], timed[step.NO_MARGIN], timed[step.MARGIN]
    assert plain["ratio"] == [1, 1, 1] and margin["loss"] > plain["loss"]
    assert no_margin["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert margin["memory_ratio"] == margin["temporary_bytes"] / plain["temporary_bytes"]
    # The default λ comes from the lead: infinite or below 10. The schedule begins near 1000.
    default = timed[step.DEFAULT]["loss"]
    assert default >= plain["loss"] * (1 - 1e-5) and default != margin["loss"]
    assert step.table(entry).row_count == 4 and "targets" not in entry


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    def run(arm, config):
        return SimpleNamespace(loss={step.PLAIN: 2.0, step.NO_MARGIN: 2.1}.get(arm, 3.0))

    monkeypatch.setattr(step, "prepare_arm", run)
    with pytest.raises(ValueError, match=r"m = 1 computes something else: its loss is 2.1"):
        step.prepare(CONFIGS["mnist-m4"])


def test_a_margin_shows_in_the_loss_where_it_must(monkeypatch):
    monkeypatch.setattr(step, "prepare_arm", lambda arm, config: SimpleNamespace(loss=2.0))
    with pytest.raises(ValueError, match=r"must make the loss larger than 2.0, got 2.0"):
        step.prepare(CONFIGS["mnist-m4"])
    for of_another_length_or_pace in ("mnist-arcface", "digits-m4"):
        assert step.MARGIN in step.prepare(CONFIGS[of_another_length_or_pace])


MISTAKES = {
    "unknown": (["--configurations", "mnist-m5"], "'mnist-m5'"),
    "none": (["--configurations"], "configurations must name at least one, got none"),
    "no margin": (["--configurations", "mnist-softmax"], "mnist-softmax has no margin"),
    "batch": (["--batch", "0"], "batch must be >= 1, got 0"),
    "repetitions": (["--repetitions", "0"], "repetitions must be at least 1, got 0"),
}


@pytest.mark.parametrize("flags, message", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(flags, message, tmp_path, capsys):
    assert main(["bench", "step", *flags, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
