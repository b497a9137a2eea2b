"""Runs what the results lack, cheapest first, inside a budget of time."""

import fnmatch
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from experiments.paper import cells
from experiments.paper import networks as models
from experiments.paper.cells import CONFIGS, run_name
from experiments.paper.config import Config
from experiments.run import loop, train
from experiments.store import results as result
from experiments.store.files import InUse
from experiments.store.progress import hours


def reproduce(
    only: tuple[str, ...] = ("*",),
    seeds: int = 5,
    budget_minutes: float = math.inf,
    toy: bool = False,
    data: Path | None = None,
    out: Path = loop.RUNS,
    devices: int | None = None,
    checkpoint_seconds: float = 60.0,
) -> int:
    """Runs every missing configuration and seed, cheapest first; a run begun earlier goes on.

    A run that diverges is a result. The runs that fail are named at the end, and the exit code is
    then 1. A run that another process trains is left to it, so that the same command may be started
    several times.

    Args:
      only: names of configurations, such as 'cifar10-*'.
      seeds: how many seeds to train each configuration with, from 0 on.
      budget_minutes: stop before this many minutes are over; the same command continues.
      toy: shrink every run to seconds and write into the subfolder toy of --out.
      data: folder of NAME.npz or of TFDS; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      out: folder of the results.
      devices: how many to train on, the first ones; by default all.
      checkpoint_seconds: seconds between two checkpoints.
    """
    wanted, out = runs(only, seeds, toy), out / "toy" if toy else out
    return train_missing(wanted, out, budget_minutes, data, devices, checkpoint_seconds)


def train_missing(
    wanted: Sequence[Config],
    out: Path,
    budget_minutes: float,
    data: Path | None,
    devices: int | None,
    checkpoint_seconds: float,
) -> int:
    """Trains those of the wanted runs, in order, that out lacks; the exit code.

    The arguments are those of `reproduce`.
    """
    keep_compiled()
    with loop.interruptible() as asked:
        queue = Queue(wanted, out, Budget(60 * budget_minutes, asked))
        while config := queue.next_run():
            queue.train(config, data, devices, checkpoint_seconds)
        queue.print_summary()
        return loop.INTERRUPTED if asked() else 1 if queue.failed else 0


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
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update(option, str(cache / "lsoftmax_jax" / "compiled"))


class Budget:
    """When to stop: on request, or while there is still time for twice the longest dispatch so far.

    Args:
      seconds: from now to the deadline.
      asked: whether somebody asked to stop.
    """

    def __init__(self, seconds: float, asked: Callable[[], bool] = lambda: False) -> None:
        if not seconds >= 0:
            raise ValueError(f"budget-minutes must be >= 0, got {seconds / 60}")
        self._deadline = time.perf_counter() + seconds
        self._asked = asked
        self._questions, self._last, self._longest, self._ended = 0, 0.0, 0.0, False

    def allows(self, seconds: float) -> bool:
        """Whether there is time for a run whose first update comes after so many seconds."""
        self._questions = 0
        return not self._ended and self._deadline - time.perf_counter() > seconds

    def over(self) -> bool:
        """Asked before every dispatch of a run, to learn how long they take."""
        now = time.perf_counter()
        self._questions += 1
        if self._questions > 2:  # the first dispatch of a run compiles
            self._longest = max(self._longest, now - self._last)
        self._last = now
        self._ended = self._asked() or self._deadline - now <= 2 * self._longest
        return self._ended


class Queue:
    """Runs in order, what became of them, and how long the rest will take.

    Args:
      wanted: the runs, finished ones among them.
      out: folder of the results.
      budget: of time.
    """

    def __init__(self, wanted: Sequence[Config], out: Path, budget: Budget) -> None:
        self._wanted, self._out, self._budget = wanted, out, budget
        self._missing = [config for config in wanted if not train.is_done(config, out)]
        self._measured = finished_here(out)
        self.failed: dict[str, str] = {}
        self.in_use = 0
        self.diverged: list[str] = []

    def next_run(self) -> Config | None:
        """The next run; None if all are done or the time is up."""
        longest = max(map(startup, self._measured), default=0.0)
        return self._missing[0] if self._missing and self._budget.allows(longest) else None

    def train(
        self, config: Config, data: Path | None, devices: int | None, checkpoint_seconds: float
    ) -> None:
        """Trains a run and takes it off the queue, unless it was stopped."""
        self._print_progress(config)
        try:
            outcome = train.run(
                config,
                folder=data,
                out=self._out,
                devices=devices,
                checkpoint_seconds=checkpoint_seconds,
                stop=self._budget.over,
            )
        except InUse as error:
            print(f"left to another process: {error}")
            self.in_use += 1
        except Exception as error:  # whatever it is, the other runs go on
            message = str(error) or type(error).__name__
            if message not in self.failed.values():
                print(f"failed: {message}")
            self.failed[run_name(config)] = message
        else:
            if outcome is None:
                return
            if outcome["status"] == "diverged":
                self.diverged.append(run_name(config))
            else:
                self._measured.append(outcome)
        self._missing.remove(config)

    def print_summary(self) -> None:
        for name in self.diverged:
            print(f"diverged: {name}")
        for name, message in self.failed.items():
            print(f"failed: {name}: {message.splitlines()[0]}")
        count, left = len(self._wanted), len(self._missing) + self.in_use
        if left:
            print(f"{left} of {count} runs left; the same command continues")
        else:
            print(f"{count - len(self.failed)} of {count} runs are done: {self._out}")

    def _print_progress(self, config: Config) -> None:
        count, left = len(self._wanted), sum(map(work, self._missing))
        print(
            f"run {count - len(self._missing) + 1} of {count}: {run_name(config)}, "
            f"about {_shown(expected([config], self._measured))}; "
            f"{100 * (1 - left / sum(map(work, self._wanted))):.0f} % of all done, "
            f"about {_shown(expected(self._missing, self._measured))} to go",
            flush=True,
        )


def finished_here(out: Path) -> list[dict[str, Any]]:
    """Results of finished runs on a device as this process has, if they say what they took."""
    device, needed = result.provenance(1)["device"], {"wall", "setup", "compilation"}
    return [
        outcome
        for outcome in result.load_all(out)
        if outcome.get("status") == "finished"
        and outcome.get("kind", "run") == "run"
        and outcome.get("device") == device
        and needed <= outcome.get("seconds", {}).keys()
    ]


def startup(outcome: dict[str, Any]) -> float:
    """Seconds until a run's first update."""
    return outcome["seconds"]["setup"] + outcome["seconds"]["compilation"]


def expected(missing: Sequence[Config], measured: Sequence[dict[str, Any]]) -> float | None:
    """Seconds that runs will take, at the speed of their networks; None if nothing was measured."""
    if not measured:
        return None
    speeds = {}
    for outcome in measured:
        config = Config.from_json(outcome["config"])
        seconds = outcome["seconds"]["wall"] - startup(outcome)
        speeds[config.network] = work(config) / seconds
    slowest = min(speeds.values())
    updating = sum(work(config) / speeds.get(config.network, slowest) for config in missing)
    return updating + len(missing) * sum(map(startup, measured)) / len(measured)


def _shown(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else hours(seconds)
