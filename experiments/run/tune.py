"""Finds λ's schedule for a configuration on a validation split; the test images are never seen.

The split is the end of the training images: 5,000 of them, or a tenth where that is less. Every
candidate trains on the others. The winner has the lowest mean validation error over the seeds, of
equals the first of the grid; a candidate that diverged with any seed cannot win.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Column, Table

from experiments.paper.cells import CONFIGS, Named, command_of, run_name
from experiments.paper.config import Config
from experiments.run import loop
from experiments.run.queue import of_seeds, train_missing
from experiments.store import results as result
from lsoftmax_jax.devices import data_mesh
from lsoftmax_jax.schedule import LambdaPreset


def grid(
    preset: LambdaPreset,
    bases: Sequence[float],
    gammas: Sequence[float],
    powers: Sequence[float],
    minimums: Sequence[float],
) -> list[LambdaPreset]:
    """All schedules made of these constants, each once.

    Args:
      preset: its gamma and power are multiplied by those of the grid.
      bases: λ at the start; 0 is no annealing, whatever the other constants.
      gammas: how many times as fast as the preset λ falls.
      powers: how many times the preset's power.
      minimums: what λ never falls below.
    """
    schedules = [
        LambdaPreset(0.0, 0.0, 0.0, minimum)
        if base == 0
        else LambdaPreset(base, gamma * preset.gamma, power * preset.power, minimum)
        for base, gamma, power, minimum in product(bases, gammas, powers, minimums)
    ]
    return list(dict.fromkeys(schedules))


def tune(
    config: Named,
    bases: tuple[float, ...] = (1000.0,),
    gammas: tuple[float, ...] = (0.5, 1.0, 2.0),
    powers: tuple[float, ...] = (1.0,),
    minimums: tuple[float, ...] = (0.0, 5.0),
    seeds: int = 1,
    budget_minutes: float = math.inf,
    place: Annotated[loop.Place, tyro.conf.arg(name="")] = loop.HERE,
) -> int:
    """Trains a configuration with every λ of a grid; names the best on a validation split.

    The results are in the subfolder tune of --out.

    Args:
      config: the configuration; flags change it.
      bases: values of λ at the start; 0 turns annealing off.
      gammas: factors of the configured gamma; with 2, λ falls twice as fast.
      powers: factors of the configured power.
      minimums: values that λ does not fall below.
      seeds: how many seeds to train each candidate with, from 0 on.
      budget_minutes: stop when so many minutes are over; the same command continues.
    """
    if not config.has_margin:
        raise ValueError(f"{config.name} has no margin, so that λ changes nothing")
    if config.pace != "annealed":
        raise ValueError(f"{config.name} has pace {config.pace}: tune needs --pace annealed")
    if config.init is not None:
        raise ValueError("init: tune begins every run anew")
    named = CONFIGS[config.name]
    if config.seed != named.seed:
        raise ValueError("seed: tune trains seeds from 0 on; --seeds says how many")
    for constant, flag in (("base", "--bases"), ("minimum", "--minimums")):
        if getattr(config.lam, constant) != getattr(named.lam, constant):
            raise ValueError(f"lam.{constant}: tune tries the values of {flag}")
    out = place.out / "tune"
    candidates = [
        of_seeds(replace(config, lam=lam, validation=True), seeds)
        for lam in grid(config.lam, bases, gammas, powers, minimums)
    ]
    wanted = [run for runs in candidates for run in runs]
    code = train_missing(wanted, place._replace(out=out), budget_minutes)
    found = summary(config, [judged(runs, out) for runs in candidates])
    found |= result.provenance(data_mesh(place.devices).size)
    file = out / f"{run_name(replace(config, seed=0)).removesuffix('seed0')}tuned.json"
    result.save(file, found)
    Console().print(table(found))
    if found["best"]:
        print(f"best: {command_of(replace(config, lam=LambdaPreset(**found['best'])))}")
    print(f"{file} written")
    return code or int(found["best"] is None)


def judged(runs: Sequence[Config], out: Path) -> dict[str, Any]:
    """A candidate's λ and what its runs, one a seed, came to on the validation split."""
    files = [out / f"{run_name(run)}.json" for run in runs]
    outcomes = [result.load(file) for file in files if file.exists()]
    errors = [o["test"]["error"] for o in outcomes if o["status"] == "finished"]
    complete = len(errors) == len(runs)
    return {
        "lam": runs[0].lam._asdict(),
        "validation_error": statistics.mean(errors) if complete else None,
        "validation_errors": errors,
        "diverged": sum(outcome["status"] == "diverged" for outcome in outcomes),
        "missing": len(runs) - len(outcomes),
        "commands": [command_of(run) for run in runs],
    }


def summary(config: Config, candidates: list[dict[str, Any]]) -> dict[str, Any]:
    """What the tuning's file holds; ``best`` is the λ of the lowest error, if any run ended."""
    ended = [c for c in candidates if c["validation_error"] is not None]
    best = min(ended, key=lambda candidate: candidate["validation_error"], default=None)
    return {
        "kind": "tuning",
        "name": config.name,
        "config": config.to_json(),
        "best": best and best["lam"],
        "complete": not any(candidate["missing"] for candidate in candidates),
        "candidates": candidates,
    }


def table(found: dict[str, Any]) -> Table:
    """Candidates in the order of the grid; the best is marked."""
    headers = (*LambdaPreset._fields, "error", "seeds", "diverged")
    columns = (Column(header, justify="right") for header in headers)
    shown = Table(*columns, title=f"{found['name']}, validation error, %")
    for candidate in found["candidates"]:
        error, lam = candidate["validation_error"], candidate["lam"]
        shown.add_row(
            *(f"{constant:g}" for constant in lam.values()),
            "" if error is None else f"{error:.3f}",
            str(len(candidate["validation_errors"])),
            str(candidate["diverged"] or ""),
            style="bold green" if lam == found["best"] else "",
        )
    return shown
