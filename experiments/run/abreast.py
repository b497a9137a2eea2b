"""The runs of a campaign's batch, several processes at once."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from experiments.paper.campaign import BATCHES
from experiments.paper.cells import command_of, run_name
from experiments.paper.config import Config
from experiments.run import loop, train
from experiments.store import logs
from experiments.store.progress import Progress

if TYPE_CHECKING:
    Batch = str
else:
    Batch = Literal[tuple(BATCHES)]
# Processes that share a GPU must not each reserve three quarters of its memory, JAX's default.
MEMORY = "XLA_PYTHON_CLIENT_MEM_FRACTION"
# On a CPU each update takes its temporary memory anew: tens of thousands of page faults, unless the
# C library asks Linux for pages of 2 MB.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def campaign(
    batch: Annotated[Batch, tyro.conf.Positional],
    processes: int = 1,
    budget_minutes: float = math.inf,
    pin: bool = False,
    data: Path | None = None,
    out: Path = loop.RUNS,
) -> int:
    """Trains the missing runs of a batch, in its order; a run begun earlier goes on.

    What a run prints is in a file RUN.log beside its result. The exit code is 1 if a run failed.

    Args:
      batch: of experiments/paper/campaign.py, which says what each asks.
      processes: how many runs to train at once, each in a process of its own.
      budget_minutes: stop the runs when so many minutes are over; the same command continues.
      pin: give each process one CPU core of its own.
      data: folder of NAME.npz or of TFDS; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      out: folder of the results.
    """
    if not 1 <= processes <= (os.cpu_count() or 1):
        raise ValueError(f"processes must be in 1..{os.cpu_count()}, got {processes}")
    cores = cores_of(processes) if pin else []
    wanted, over = BATCHES[batch], loop.budget(budget_minutes)
    waiting = [config for config in wanted if not train.is_done(config, out)]
    running: dict[int, tuple[Config, subprocess.Popen[bytes]]] = {}
    failed, stopped = [], False
    made = {run_name(config): config.steps for config in wanted}
    total = sum(made.values())
    made |= {run_name(config): logs.last_step(out / run_name(config)) for config in waiting}
    with (
        loop.interruptible() as asked,
        Progress(f"campaign {batch}", total, "updates", sum(made.values())) as progress,
    ):
        try:
            while running or (waiting and not stopped):
                if not stopped and (asked() or over()):
                    stopped = True
                    for _, process in running.values():
                        process.terminate()
                before = sum(made.values())
                for core, (config, process) in list(running.items()):
                    ended = process.poll() is not None
                    made[run_name(config)] = logs.last_step(out / run_name(config))
                    if ended:
                        del running[core]
                        # A run that was only starting, or had already ended, dies of the signal.
                        fine = (0, loop.INTERRUPTED, *((-signal.SIGTERM,) if stopped else ()))
                        failed += [] if process.returncode in fine else [config]
                        progress.say(f"{run_name(config)}: exit code {process.returncode}")
                for core in range(processes):
                    if core not in running and waiting and not stopped:
                        config = waiting.pop(0)
                        running[core] = config, _begun(config, out, data, processes)
                        if pin:
                            os.sched_setaffinity(running[core][1].pid, {cores[core]})
                at_work = f"{len(running)} of {len(wanted)} runs at work"
                progress.advance(sum(made.values()) - before, at_work)
                time.sleep(0.2)
        finally:
            for _, process in running.values():
                process.terminate()
        left = sum(not (out / f"{run_name(c)}.json").exists() for c in wanted)
        print(f"{left} of {len(wanted)} runs left" if left else f"all runs are done: {out}")
        for config in failed:
            print(f"failed or diverged: {out / run_name(config)}.log says why")
        return loop.INTERRUPTED if asked() else int(bool(failed))


def cores_of(processes: int) -> list[int]:
    """Cores of this process, one for each of so many.

    Raises:
      ValueError: there are fewer, or the system cannot say.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("pin: this system gives a process no core of its own")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < processes:
        raise ValueError(f"pin: expected {processes} cores for this process, got {len(cores)}")
    return cores


def _begun(
    config: Config, out: Path, data: Path | None, processes: int
) -> "subprocess.Popen[bytes]":
    log = out / f"{run_name(config)}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *shlex.split(command_of(config))[1:], "--out", str(out)]
    environment = HUGE_PAGES | {MEMORY: f"{0.84 / processes:.2f}"} | os.environ
    with log.open("ab") as file:
        return subprocess.Popen(
            command + (["--data", str(data)] if data else []),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process, which asks the others to stop
        )
