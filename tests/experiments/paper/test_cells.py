"""The lab notebook has every cell, and a run's name gives its changes."""

import json
import shlex
from dataclasses import asdict, replace

import pytest
import tyro

import lsoftmax_jax as lsm
from experiments.__main__ import COMMANDS
from experiments.paper.cells import CELLS, CONFIGS, Named, changes_of, command_of, run_name, toy
from experiments.paper.config import Config
from lsoftmax_jax.schedule import LambdaPreset

LABELS = {"name"}


def differences(left, right):
    left, right = asdict(CONFIGS[left]), asdict(CONFIGS[right])
    return {name for name in left if left[name] != right[name]} - LABELS


def test_every_cell_has_a_configuration():
    tables = {
        f"{data}-{loss}"
        for data in ("mnist", "cifar10", "cifar10plus", "cifar100")
        for loss in ("hinge", "softmax", "m2", "m3", "m4")
    }
    released = {f"released-{name}" for name in tables if not name.startswith("cifar100")}
    figures = {f"fig2-m{m}" for m in (1, 2, 3, 4)} | {f"fig7-{n}" for n in (32, 64, 96, 128)}
    beyond = {f"{d}-{f}" for d in ("mnist", "cifar10") for f in ("asoftmax", "cosface", "arcface")}
    digits = {"digits-softmax", "digits-m4"}
    assert tables | released | figures | beyond | digits == CONFIGS.keys()


@pytest.mark.parametrize("data", ["mnist", "cifar10", "cifar10plus", "cifar100", "released-mnist"])
def test_baselines_differ_in_one_field(data):
    for margin in (2, 3, 4):
        assert differences(f"{data}-softmax", f"{data}-m{margin}") == {"margin"}
    assert differences(f"{data}-softmax", f"{data}-hinge") == {"hinge"}
    assert differences("digits-softmax", "digits-m4") == {"margin"}


def test_papers_numbers():
    assert CELLS["mnist-m4"][-2:] == (0.31, "confirmed")
    assert CELLS["cifar10plus-m3"][-2:] == (5.94, "recalled")
    assert CELLS["released-cifar10-hinge"].reported == 9.91
    assert CELLS["cifar100-softmax"].reported == 32.74


def test_steps_stretch_both_schedules():
    full = CONFIGS["mnist-m4"]
    short = replace(full, steps=180)
    assert full.stretched_drops == (12_000, 15_000) and full.stretched_lam == full.lam
    assert short.stretched_drops == (120, 150)
    for part in (0.1, 0.5, 1):
        ours = lsm.annealed_lambda(*short.stretched_lam)(round(180 * part) - 1)
        theirs = lsm.annealed_lambda(*full.stretched_lam)(round(18_000 * part) - 1)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-4)


def test_a_seed_is_the_same_recipe_and_anything_else_is_not():
    config = CONFIGS["cifar10-m2"]
    assert not changes_of(replace(config, seed=3))
    assert run_name(replace(config, seed=3)) == "cifar10-m2/seed3"
    reduced = replace(config, width=0.25, steps=200)
    assert changes_of(reduced) == {"width": 0.25, "steps": 200}
    assert run_name(reduced) == "cifar10-m2/steps200-width0.25-seed0"
    annealed = replace(config, lam=config.lam._replace(gamma=5e-05, minimum=5.0), mirror=True)
    assert run_name(annealed) == "cifar10-m2/mirror-gamma5e-05-minimum5-seed0"
    warm = replace(config, init="cifar10-softmax/seed0", pace="self-paced")
    assert run_name(warm) == "cifar10-m2/self_paced-initcifar10-softmax_seed0-seed0"


CHANGED = [
    CONFIGS["mnist-m4"],
    replace(CONFIGS["mnist-m4"], steps=200, width=0.25, seed=2),
    replace(CONFIGS["cifar10plus-m2"], mirror=False, validation=True, drops=(1, 2), dtype="bf16"),
    replace(
        CONFIGS["cifar100-hinge"], lam=LambdaPreset(1, 2e-5, 3, 4), init="cifar100-softmax/seed0"
    ),
    toy(CONFIGS["released-mnist-m3"]),
]


@pytest.mark.parametrize("config", CHANGED, ids=lambda config: run_name(config))
def test_command_makes_the_same_configuration(config):
    words = command_of(config).split()
    assert words[:4] == ["python", "-m", "experiments", "train"] and "train" in COMMANDS
    parsed = tyro.cli(tyro.conf.OmitSubcommandPrefixes[Named], args=words[4:])
    assert parsed == config


@pytest.mark.parametrize("config", CHANGED, ids=lambda config: run_name(config))
def test_json_round_trip(config):
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name, least", [("mnist-m2", 1.5), ("mnist-m3", 2.75), ("mnist-m4", 4.0)])
def test_a_schedule_ends_where_its_margin_wants(name, least):
    config = replace(CONFIGS[name], pace="schedule")
    assert float(config.lam_policy(config.steps)) == pytest.approx(least)


def test_a_word_with_a_space_stays_one_word():
    config = replace(CONFIGS["mnist-m4"], init="my runs/seed0")
    assert shlex.split(command_of(config))[-4:] == ["--init", "my runs/seed0", "--seed", "0"]


def test_a_margin_of_one_is_plain_softmax_in_l_softmax_alone():
    arcface = CONFIGS["mnist-arcface"]
    assert replace(arcface, margin=1.0).has_margin and not CONFIGS["mnist-softmax"].has_margin
    plain = arcface.without_margin()
    softmax = CONFIGS["mnist-softmax"]
    assert replace(plain, name=softmax.name, pace=softmax.pace) == softmax
    with pytest.raises(ValueError, match="scale must be given"):
        replace(arcface, scale=None)


@pytest.mark.parametrize("field", ["steps", "batch", "margin", "width", "examples"])
def test_nonsense_is_refused(field):
    with pytest.raises(ValueError, match=field):
        replace(CONFIGS["mnist-m4"], **{field: 0})


def test_every_configuration_is_written_for_its_own_steps():
    for name, config in CONFIGS.items():
        assert config.stretch == 1 and config.name == name


def test_the_annealing_and_the_drops_that_ran_are_recorded():
    short = replace(CONFIGS["mnist-m4"], steps=180)
    assert short.ran == {
        "pace": "annealed",
        "lam": {"base": 1000.0, "gamma": pytest.approx(2.5e-3), "power": 35.0, "minimum": 0.0},
        "drops": [120, 150],
    }


@pytest.mark.parametrize("name", ["mnist-cosface", "mnist-arcface", "cifar10-cosface"])
def test_a_margin_with_a_scale_takes_its_whole_margin_from_the_start(name):
    policy = CONFIGS[name].lam_policy
    assert [float(policy(step)) for step in (0, 17_999)] == [0.0, 0.0]
