"""Compiled programs timed in turn, so that whatever else the machine does meets all alike.

Every round calls all of them, in a new random order. A ratio is the median over the rounds of the
ratio to the same round's baseline.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from rich.table import Table

from experiments.benchmarks import hlo, tables
from experiments.store.progress import tracked

# Largest relative difference of losses and of the gradients' lengths between two arms.
TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}
# In shorter samples the clock and the dispatch take a large part of the time.
SHORTEST_SAMPLE = 2e-3


@dataclass
class Run:
    """A compiled arm and what it did."""

    call: Callable[[], Any]  # keeps its state from call to call; gives all outputs
    facts: hlo.Facts
    loss: float | None
    calls: int = 1  # in a sample
    seconds: list[float] = field(default_factory=list)  # of a call, one a round

    def sample(self) -> float:
        begun = time.perf_counter()
        for _ in range(self.calls):
            outputs = self.call()
        jax.block_until_ready(outputs)
        return (time.perf_counter() - begun) / self.calls

    def warm_up(self, samples: int) -> None:
        """Samples that are thrown away; the last one says how many calls a sample needs."""
        for _ in range(samples):
            seconds = self.sample()
        self.calls = max(1, math.ceil(SHORTEST_SAMPLE / seconds))

    def row(self, baseline: "Run") -> dict[str, Any]:
        """A row of a result: what was measured, beside a baseline."""
        seconds = np.array(self.seconds)
        return {
            "milliseconds": quartiles(1e3 * seconds),
            "ratio": quartiles(seconds / np.array(baseline.seconds)),
            "loss": self.loss,
            "memory_ratio": self.facts.temporary_bytes / max(baseline.facts.temporary_bytes, 1),
            **self.facts._asdict(),
        }


def take_times(runs: Collection[Run], repetitions: int, title: str) -> None:
    order, listed = np.random.default_rng(0), list(runs)
    samples = (
        listed[index] for _ in range(repetitions) for index in order.permutation(len(listed))
    )
    for run in tracked(samples, repetitions * len(listed), f"{title} time", "samples"):
        run.seconds.append(run.sample())


def check(name: str, what: str, value: float | None, wanted: float, tolerance: float) -> None:
    """Raises ValueError if an arm computes something else than the others."""
    if value is None or not abs(value - wanted) <= tolerance * abs(wanted):
        raise ValueError(
            f"{name} computes something else: its {what} is {value}, expected {wanted} "
            f"within a share of {tolerance}"
        )


def quartiles(values: Any) -> list[float]:
    """The median, then the quartiles around it."""
    return [float(f"{value:.4g}") for value in np.percentile(values, (50, 25, 75))]


def table(title: str, rows: list[dict[str, Any]], caption: str) -> Table:
    """Rows of arms; of a process that was timed elsewhere only its growth is known."""
    headers = ["ms", "ratio to plain", "MB", "to plain", "dots"]
    view = tables.table(title, ["arm"], headers, "large moves", caption=caption)
    for row in rows:
        cells = [row["arm"], tables.spread(row["milliseconds"]), tables.spread(row["ratio"])]
        if "growth_bytes" in row:
            cells.append(f"{row['growth_bytes'] / 1e6:.3g}*")
        else:
            moves = ", ".join(f"{n} {name}" for name, n in row["large_moves"].items())
            size, ratio = row["temporary_bytes"] / 1e6, row["memory_ratio"]
            cells += [f"{size:.3g}", f"{ratio:.4g}", str(row["dots"]), moves]
        view.add_row(*cells)
    return view
