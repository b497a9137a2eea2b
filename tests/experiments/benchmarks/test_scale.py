"""`scale`: its formulas against compiled programs, and a head that learns its identities."""

import json

import jax
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.benchmarks import hlo, scale
from experiments.benchmarks.scale import Job
from experiments.benchmarks.targets import CHIPS
from experiments.run import loop

JOB = Job(classes=50_000, dim=64, batch=256, class_block=1024)
MESHES = {
    "one device": {},
    "model": {"model": 8},
    "model, stored": {"model": 8, "keep_exponentials": True},
    "data by model": {"data": 2, "model": 4},
    "data": {"data": 4},
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_formulas_equal_the_compiled_step(mesh):
    job = JOB._replace(**mesh)
    if jax.device_count() < job.devices:
        pytest.skip(f"needs {job.devices} devices")
    compiled = scale.lower_step(job, scale.make_mesh(job)).compile()
    expected = scale.forecast(job)
    found = scale.measured(job, compiled)
    assert found["state_bytes"] == expected.state_bytes
    if jax.__version_info__ >= (0, 10):  # older compilers take more; see CONTRIBUTING.md
        assert found["temporary_bytes"] == pytest.approx(expected.temporary_bytes, rel=0.1)
    assert found["sent_bytes"] == expected.sent_bytes
    assert len(hlo.collectives(compiled, job.devices)) <= len(expected.collectives) <= 5


def test_the_known_cost_of_ten_million_classes_over_eight():
    job = Job(10**7, 512, 8192, model=8, dtype="bf16", keep_exponentials=True)
    chip = CHIPS["h200"]._replace(tflops=790, bandwidth=1e9, link=1e9)
    assert 1e3 * scale.forecast(job).seconds(chip) == pytest.approx(39.8, abs=0.1)
    slow = chip._replace(link=1.0)
    assert scale.forecast(job).seconds(slow) > scale.forecast(job).seconds(chip)


def test_the_plan_of_devices_that_do_not_exist(capsys):
    plan = ["scale", "--plan", "--classes", "100000000", "--data", "8", "--model", "8"]
    assert main([*plan, "--batch", "8192"]) == 0
    shown = capsys.readouterr().out
    assert "100,000,000 classes" in shown and "8 x 8 devices" in shown
    assert "compiled" not in shown


def train(out, *flags):
    command = ["scale", "--classes", "1003", "--dim", "32", "--batch", "64", "--identities", "50"]
    command += ["--class-block", "128", "--steps", "30", "--out", str(out), *flags]
    assert main(command) == 0
    (file,) = out.glob("*.json")
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), "--model", "1")


def test_a_head_learns_its_identities(one_device):
    losses = one_device["losses"]
    assert losses[-1] < 0.2 * losses[0]
    assert one_device["accuracy"]["before"] < 0.1 and one_device["accuracy"]["after"] > 0.9
    assert one_device["peak_bytes"] > one_device["state_bytes"] > 0
    assert one_device["sent_bytes"] == 0 and one_device["seconds_per_step"] > 0


def test_a_start_that_ended_before_its_first_checkpoint(one_device, tmp_path, monkeypatch, capsys):
    """Its point of the test curve is there already, and stays the only one before training."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as amid:
        amid.setattr(loop.Group, "_advance", interrupted)
        command = ["scale", "--classes", "1003", "--dim", "32", "--batch", "64"]
        command += ["--identities", "50", "--class-block", "128", "--steps", "30"]
        assert main([*command, "--model", "1", "--out", str(tmp_path)]) == 130
    again = train(tmp_path, "--model", "1")
    assert again["curves"]["test"]["step"] == [0, 30]
    assert again["accuracy"] == one_device["accuracy"]


def test_several_devices_learn_the_same(one_device, tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    # The kernels differ in their filling and so in their random start.
    several = train(tmp_path, "--data", "2", "--model", "4")
    assert several["sent_bytes"] == several["sent_bytes_by_formula"] > 0
    assert several["accuracy"]["after"] > 0.9
    np.testing.assert_allclose(several["losses"][0], one_device["losses"][0], rtol=0.1)


MISTAKES = {
    "batch": (["--batch", "10", "--model", "8"], "batch"),
    "identities": (["--classes", "5", "--identities", "6"], "identities"),
    "devices": (["--model", "4096"], "JAX_NUM_CPU_DEVICES"),
    "rates": (["--plan", "--link", "0"], "link"),
    "data": (["--data", "0"], "data"),
    "one device": (["--model", "1", "--keep-exponentials"], "keep_exponentials"),
}


@pytest.mark.parametrize("flags, name", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message(flags, name, capsys):
    assert main(["scale", *flags]) == 2
    assert name in capsys.readouterr().err
