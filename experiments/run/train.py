"""Trains one configuration on small images."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.paper import data
from experiments.paper import measures as measure
from experiments.paper import networks as models
from experiments.paper.cells import CONFIGS, changes_of, command_of, run_name
from experiments.paper.config import Config
from experiments.paper.measures import TITLES
from experiments.run import loop
from experiments.run.program import Program, averages, compiled, per_update
from experiments.run.session import Clock, Task
from experiments.store import processes, results
from experiments.store.checkpoints import last_state
from experiments.store.claims import claimed, differing
from experiments.store.progress import Progress
from lsoftmax_jax import SelfPaced, training
from lsoftmax_jax.devices import data_mesh, put


def run(
    config: Config,
    *,
    data: Path | None = None,
    out: Path = loop.RUNS,
    devices: int | None = None,
    dispatch: int | None = None,
    evaluations: int | None = None,
    checkpoint_seconds: float = 60.0,
    stop: loop.Stop = lambda: False,
) -> loop.Outcome | None:
    """Trains a configuration, or continues it, and writes its result.

    Args:
      config: what to train.
      data: where the data is, see `data.load`.
      out: folder of the results.
      devices: how many to train on, the first ones; by default all.
      dispatch: updates in one dispatch; by default 100 on an accelerator, 1 on a CPU.
      evaluations: points of the test curve; by default 36 on an accelerator, 6 on a CPU.
      checkpoint_seconds: seconds between two checkpoints.
      stop: asked before every dispatch; when true, the run saves a checkpoint and ends.

    Returns:
      What the result's file holds; None if the run was stopped.
    """
    name = run_name(config)
    config.check_flags(CONFIGS[config.name])
    if is_done(config, out):
        return loop.finished(out / name, name)
    if processes.is_first():
        warn_if_lam_stays(config)
    mesh = data_mesh(devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    updates, points = (1, 6) if on_cpu else (100, 36)
    dispatch = dispatch or updates
    return loop.train(
        prepare(config, data, out, mesh, dispatch),
        stop,
        dispatch=dispatch,
        evaluations=points if evaluations is None else evaluations,
        checkpoint_seconds=checkpoint_seconds,
    )


def prepare(config: Config, folder: Path | None, out: Path, mesh: Mesh, dispatch: int) -> Task:
    """What a run is made of: its data on the devices, its functions, its facts."""
    clock = Clock()
    with clock.spent("setup"):
        program = Program(config, folder, mesh)
        dataset = program.dataset
        processes.check_same(dataset.fingerprint, "data")
        train = data.Split(*put(tuple(dataset.train), mesh, jax.P()))
    name, saved, changes = run_name(config), config.to_json(), changes_of(config)
    facts = {
        "name": config.name,
        "seed": config.seed,
        "reduced": bool(changes),
        "changes": {field: saved[field] for field in changes},
        "command": command_of(config),
        "config": saved,
        "ran": config.ran,
        "data": {"name": config.dataset, "fingerprint": dataset.fingerprint},
        "parameters": models.parameter_count(config.built_network, config.classes),
    }

    def compile(state: training.State, feed: data.OnDevice, length: int) -> Any:
        # Compile the evaluation too: its first call would count as time of evaluation.
        program.evaluate(state, dataset.test.rows(slice(1)))
        return compiled(program.updates.lower(state, feed, length))

    return Task(
        name=name,
        folder=out / name,
        settings={"config": saved, "data": dataset.fingerprint},
        facts=facts,
        steps=config.steps,
        batch=config.batch,
        mesh=mesh,
        clock=clock,
        source=data.ArrayBatches(
            config.seed, train, program.mean, mesh, size=config.batch, steps=dispatch
        ),
        like=program.like,
        create=partial(first_state, config, program, out),
        compile=compile,
        values=per_update,
        test=lambda state: averages(program.evaluate(state, dataset.test)[0]),
        measure=partial(measures, program),
        margin_from=config.steps // 10 if margin_is_paced(config) else None,
    )


def is_done(config: Config, out: Path) -> bool:
    """Whether a folder has the result of a configuration.

    Raises:
      ValueError: naming the file, if it holds the result of another run, or not all of one.
    """
    if not (file := out / f"{run_name(config)}.json").exists():
        return False
    check_result(config, file)
    return True


def check_result(config: Config, file: Path) -> None:
    """Raises ValueError if a file is not the whole result of a configuration."""
    outcome = results.load_run(file, ("config", "reduced", "device"))
    splits: tuple[str, ...] = ()
    if outcome["status"] == "finished":
        splits = "train", "test"
        results.load_run(file, (*splits, "images_per_second", "outside_step"))
    try:
        there = Config.from_json(outcome["config"]).to_json()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} must hold the configuration of its run: {error}") from error
    wrong = differing(there, config.to_json())
    wrong += [f"no {s} {t}" for s in splits for t in TITLES.values() if t not in outcome[s]]
    if wrong:
        raise ValueError(f"{file} must hold the result of this run, not {', '.join(wrong)}")


def measures(program: Program, state: training.State) -> dict[str, Any]:
    """Everything `measure` knows about both splits, their margin-free loss; the test labels."""
    kernel, found = np.asarray(state.params["head"]["kernel"]), dict[str, Any]()
    splits = {"train": program.dataset.train, "test": program.dataset.test}
    total = sum(len(split.labels) for split in splits.values())
    with Progress("measuring", total, "images", shown=processes.is_first()) as progress:
        for name, split in splits.items():
            sums, features, logits = program.evaluate(state, split, progress)
            loss = {"loss": float(averages(sums)["loss"])}
            found[name] = loss | measure.measures(features, logits, split.labels, kernel)
    predicted = np.argmax(logits, axis=-1)
    return found | {"predictions": results.packed_labels(predicted, split.labels)}


def margin_is_paced(config: Config) -> bool:
    """Whether the batch decides how much of the margin takes part, and no schedule."""
    return config.has_margin and isinstance(config.lam_policy, SelfPaced)


def first_state(config: Config, program: Program, out: Path) -> training.State:
    """A fresh state, with the weights and statistics of the run to start from, if there is one."""
    fresh = program.create(config.seed)
    if config.init is None:
        return fresh
    source = last_state(out / config.init, fresh, "--init: ")
    return fresh._replace(params=source.params, other=source.other)


def evaluate_run(run: Path, folder: Path | None, devices: int | None) -> tuple[int, dict[str, Any]]:
    """The step of a run's last checkpoint, and its `measures` of both splits.

    Args:
      run: the folder of its files.
      folder: where the data is.
      devices: how many to compute on, the first ones; by default all.
    """
    settings = claimed(run)["settings"]
    if "config" not in settings:
        raise ValueError(f"{run} is no run of train; verify measures a run of train-faces")
    config = Config.from_json(settings["config"])
    program = Program(config, folder, data_mesh(devices))
    if program.dataset.fingerprint != settings["data"]:
        raise ValueError(f"{run} saw other data than {config.dataset} of the folder that was given")
    state = last_state(run, program.like)
    found = measures(program, state)
    return int(state.step), {split: found[split] for split in ("train", "test")}


def warn_if_lam_stays(config: Config) -> None:
    """Says so when the margin hardly acts even at the last update."""
    policy = config.lam_policy
    if isinstance(policy, SelfPaced):
        return  # the run itself warns, after a tenth of its updates
    lam = float(policy(jnp.int32(config.steps - 1)))
    if config.has_margin and lam > max(9.0, config.lam.minimum):
        print(
            f"warning: λ is still {lam:.3g} at the last update, so the margin weighs no more than "
            f"1 / (1 + λ) = {1 / (1 + lam):.2g}; raise --lam.gamma or --lam.power",
            file=sys.stderr,
        )
