"""Runs what the results lack, cheapest first, inside a budget of time."""

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from experiments.paper import cells
from experiments.paper import networks as models
from experiments.paper.cells import CONFIGS, run_name
from experiments.paper.config import Config
from experiments.run import loop, train
from experiments.store import results as result
from experiments.store.files import InUse, user_cache
from experiments.store.progress import hours


def reproduce(
    only: tuple[str, ...] = ("*",),
    seeds: int = 5,
    budget_minutes: float = math.inf,
    toy: bool = False,
    place: Annotated[loop.Place, tyro.conf.arg(name="")] = loop.HERE,
) -> int:
    """Runs every missing configuration and seed, cheapest first; a run begun earlier goes on.

    A run that diverges is a result. The runs that fail are named at the end, and the exit code is
    then 1. A run that another process trains is left to it, so that the same command may be started
    several times.

    Args:
      only: names of configurations, such as 'cifar10-*'.
      seeds: how many seeds to train each configuration with, from 0 on.
      budget_minutes: stop when so many minutes are over; the same command continues.
      toy: shrink every run to seconds and write into the subfolder toy of --out.
    """
    place = place._replace(out=place.out / "toy") if toy else place
    return train_missing(runs(only, seeds, toy), place, budget_minutes)


def train_missing(wanted: Sequence[Config], place: loop.Place, budget_minutes: float) -> int:
    """Trains those of the wanted runs, in order, that out lacks; the exit code.

    The arguments are those of `reproduce`.
    """
    keep_compiled()
    out, over = place.out, loop.budget(budget_minutes)
    missing = [config for config in wanted if not train.is_done(config, out)]
    measured = finished_here([config for config in wanted if config not in missing], out)
    diverged, failed, in_use = list[str](), dict[str, str](), 0
    with loop.interruptible() as asked:
        while missing and not asked() and not over():
            config, name = missing[0], run_name(missing[0])
            print(turn(wanted, missing, measured), flush=True)
            try:
                outcome = train.run(config, **place._asdict(), stop=lambda: asked() or over())
                if outcome is None:
                    break
                if outcome["status"] == "diverged":
                    diverged.append(name)
                else:
                    measured.append(outcome)
            except InUse as error:
                print(f"left to another process: {error}")
                in_use += 1
            except Exception as error:  # whatever it is, the other runs go on
                message = str(error) or type(error).__name__
                if message not in failed.values():
                    print(f"failed: {message}")
                failed[name] = message
            missing.pop(0)
        for name in diverged:
            print(f"diverged: {name}")
        for name, message in failed.items():
            print(f"failed: {name}: {message.splitlines()[0]}")
        if left := len(missing) + in_use:
            print(f"{left} of {len(wanted)} runs left; the same command continues")
        else:
            print(f"{len(wanted) - len(failed)} of {len(wanted)} runs are done: {out}")
        return loop.INTERRUPTED if asked() else int(bool(failed))


def runs(only: Sequence[str], seeds: int, toy: bool) -> list[Config]:
    """The runs of all configurations that a pattern names, cheapest first.

    Raises:
      ValueError: if a pattern names none.
    """
    named: set[str] = set()
    if not only:
        raise ValueError("--only must name a configuration, got none")
    for pattern in only:
        if not (names := fnmatch.filter(CONFIGS, pattern)):
            raise ValueError(
                f"--only {pattern!r} names no configuration; python -m experiments list prints them"
            )
        named.update(names)
    found = [cells.toy(c) if toy else c for name, c in CONFIGS.items() if name in named]
    return [run for config in sorted(found, key=work) for run in of_seeds(config, seeds)]


def of_seeds(config: Config, seeds: int) -> list[Config]:
    """A configuration with so many seeds, from 0 on; ValueError if there are none."""
    if seeds < 1:
        raise ValueError(f"seeds must be >= 1, got {seeds}")
    return [replace(config, seed=seed) for seed in range(seeds)]


def work(config: Config) -> float:
    """Multiply-adds of a run's forward passes, the measure of its cost."""
    per_image = models.multiply_adds(config.built_network, config.classes)
    return float(per_image) * config.batch * config.steps


def keep_compiled() -> None:
    """Lets runs of one configuration share its compiled programs, unless JAX was told where."""
    option = "jax_compilation_cache_dir"
    if getattr(jax.config, option) is None:
        jax.config.update(option, str(user_cache() / "compiled"))


def finished_here(done: Sequence[Config], out: Path) -> list[dict[str, Any]]:
    """Results of those runs that finished on a device as this process has."""
    device = result.provenance(1)["device"]
    outcomes = [result.load(out / f"{run_name(config)}.json") for config in done]
    return [
        outcome
        for outcome in outcomes
        if outcome["status"] == "finished"
        and outcome["device"] == device
        and "wall" in outcome.get("seconds", {})
    ]


def turn(
    wanted: Sequence[Config], missing: Sequence[Config], measured: Sequence[dict[str, Any]]
) -> str:
    """Which run comes next, how much is done, and how long the rest will take."""
    count, left = len(wanted), sum(map(work, missing))
    return (
        f"run {count - len(missing) + 1} of {count}: {run_name(missing[0])}, "
        f"about {expected(missing[:1], measured)}; "
        f"{100 * (1 - left / sum(map(work, wanted))):.0f} % of all done, "
        f"about {expected(missing, measured)} to go"
    )


def expected(missing: Sequence[Config], measured: Sequence[dict[str, Any]]) -> str:
    """The time that runs will take, if they go as fast as the measured ones of their networks."""
    paces = {}  # seconds a multiply-add
    for outcome in measured:
        config = Config.from_json(outcome["config"])
        paces[config.network] = outcome["seconds"]["wall"] / work(config)
    if not paces:
        return "an unknown time"
    slowest = max(paces.values())
    return hours(sum(work(config) * paces.get(config.network, slowest) for config in missing))
