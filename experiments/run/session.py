"""One run in this process: what it is made of, its folder, its state, log and checkpoints."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from experiments.store import checkpoints, claims, files, logs, processes, results
from lsoftmax_jax.training import State

Values = dict[str, NDArray[np.float32]]
"""Numbers of updates by name, (updates,) each."""


# How a line of the log summarises several updates; other values are means.
OF_A_LINE: dict[str, Callable[[NDArray[np.float32]], Any]] = {
    "skipped": np.sum,
    "margin_idle": np.min,
    "collapsing": np.max,
}


class Source(Protocol):
    """Where a run's batches come from."""

    def feed(self, step: int) -> Any:
        """The operands of the updates from this step on."""

    def position(self) -> Any:
        """The position as JSON; None if the step alone decides it."""

    def restore(self, position: Any) -> None:
        """Goes where it stood."""


class Clock:
    """Where the time of a run goes, over all its sessions."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._spent = dict.fromkeys(("setup", "compilation", "training", "evaluation"), 0.0)

    def add(self, earlier: dict[str, float]) -> None:
        """The time of earlier sessions, as `read`."""
        self._started -= earlier["wall"]
        for name in self._spent:
            self._spent[name] += earlier[name]

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Adds what a block takes to one of the entries."""
        begun = time.perf_counter()
        yield
        self._spent[name] += time.perf_counter() - begun

    def read(self) -> dict[str, float]:
        """Seconds by entry, and of all as ``wall``."""
        return {"wall": time.perf_counter() - self._started, **self._spent}


class Task(NamedTuple):
    """What a run is made of.

    Attributes:
      name: for people.
      folder: of its files; FOLDER.json beside it is its result.
      settings: all that decides its numbers, and nothing else; as JSON.
      facts: what its result says of it.
      steps: its updates.
      batch: examples of an update.
      mesh: its devices train.
      clock: of its time.
      source: of its batches.
      like: its state, abstract, with where its arrays lie.
      create: () -> its first state.
      compile: (state, feed, length) -> compiled (state, feed) -> (state, metrics).
      values: metrics, fetched -> `Values`, with "loss" among them.
      test: state -> a point of its test curve.
      measure: state -> what its result says of the last iterate.
      margin_from: the update from which on the margin is expected to take part; None: nobody
        expects it, or its schedule was judged before.
    """

    name: str
    folder: Path
    settings: dict[str, Any]
    facts: dict[str, Any]
    steps: int
    batch: int
    mesh: Mesh
    clock: Clock
    source: Source
    like: State
    create: Callable[[], State]
    compile: Callable[[State, Any, int], Any]
    values: Callable[[Any], Values]
    test: Callable[[State], dict[str, float]]
    measure: Callable[[State], dict[str, Any]]
    margin_from: int | None = None


class Session:
    """A task's run in this process.

    Args:
      task: what to train.
      running: closes, at its end, what the session opens.
    """

    def __init__(self, task: Task, running: ExitStack) -> None:
        self.task, first = task, processes.is_first()
        if first:
            running.callback(files.locked(task.folder).release)
        # Not at the end: somebody may commit while the run trains.
        self._provenance = results.provenance(task.mesh.size)
        with task.clock.spent("setup"):
            claims.claim(task.folder, task.settings, task.mesh.size, writes=first)
            saved = checkpoints.Checkpoints(task.folder / "checkpoints")
            self._checkpoints = running.enter_context(saved)
            self.state, mark = self._restored()
            self.step = int(self.state.step)
            self.log = logs.Log(task.folder, self.step, mark, writes=first)
            running.callback(self.log.close)
            # From now on, a log without a checkpoint shows that the checkpoint was lost.
            self.save()
        if self.log.lines:
            task.clock.add(self.log.lines[-1]["seconds"])
        self.skipped = int(sum(line.get("skipped") or 0 for line in self.log.lines))
        self.collapsed = any(line.get("collapsing") for line in self.log.lines)
        self.idle = False
        self._compiled: dict[int, Any] = {}

    def advance(self, length: int) -> Values:
        """Makes updates in one dispatch, writes a line of their means, and returns what they saw.

        Of updates that were skipped the line has the number, of a collapse whether it was seen.
        """
        task, feed = self.task, self.task.source.feed(self.step)
        if length not in self._compiled:
            with task.clock.spent("compilation"):
                self._compiled[length] = task.compile(self.state, feed, length)
        with task.clock.spent("training"):
            done = jax.block_until_ready(self._compiled[length](self.state, feed))
        self.state, self.step = done[0], self.step + length
        values = task.values(jax.device_get(done[1]))
        line = {name: float(OF_A_LINE.get(name, np.mean)(seen)) for name, seen in values.items()}
        self._write("train", **line)
        self.skipped += int(line.get("skipped", 0))
        return values

    def test(self) -> None:
        """Adds a point to the test curve."""
        with self.task.clock.spent("evaluation"):
            point = self.task.test(self.state)
        self._write("test", **point)

    def save(self) -> None:
        """A checkpoint, with where the source stands and which log belongs to it."""
        positions = processes.gathered(self.task.source.position())
        self._checkpoints.add(self.state, {"log": self.log.mark(), "positions": positions})

    def finish(self, diverged: dict[str, Any] | None = None) -> dict[str, Any]:
        """Measures the last iterate; writes the result and returns it.

        Without finite parameters, or without finite measures, the run has diverged too.

        Args:
          diverged: what is known about a divergence.
        """
        measured: dict[str, Any] = {}
        if diverged is None:
            with self.task.clock.spent("evaluation"), np.errstate(all="ignore"):
                finite = bool(are_finite((self.state.params, self.state.other)))
                if finite:
                    measured = self.task.measure(self.state)
                floats = [x for x in jax.tree.leaves(measured) if isinstance(x, float)]
                if not finite or not np.isfinite(floats).all():
                    diverged, measured = {"step": self.step, **self._last_line()}, {}
        seconds = self.task.clock.read()
        in_loop = seconds["wall"] - seconds["setup"] - seconds["compilation"]
        outside = in_loop - seconds["training"] - seconds["evaluation"]
        outcome = {
            **self.task.facts,
            "status": "diverged" if diverged else "finished",
            "diverged": diverged and logs.finite(diverged),
            "skipped": self.skipped,
            **self._provenance,
            "seconds": seconds,
            "images_per_second": self.step * self.task.batch / seconds["training"],
            "outside_step": outside / in_loop if in_loop > 0 else 0.0,
            **measured,
            "curves": {kind: self.log.curve(kind) for kind in ("train", "test")},
        }
        if processes.is_first():
            results.save(result_file(self.task.folder), outcome)
        processes.wait("result")
        return outcome

    def _last_line(self) -> dict[str, float]:
        """What the last line of training says, without its kind, step and time."""
        line = [line for line in self.log.lines if line["kind"] == "train"][-1]
        kept = {n: v for n, v in line.items() if n not in ("kind", "step", "seconds")}
        return {name: math.nan if value is None else value for name, value in kept.items()}

    def _write(self, kind: str, **values: float) -> None:
        self.log.write(kind, self.step, self.task.clock.read(), **values)

    def _restored(self) -> tuple[State, logs.Mark]:
        """The state to go on from and the mark of its log; the source goes where it stood."""
        task, found = self.task, self._checkpoints.latest(self.task.like)
        again = f"remove {task.folder} to train from the start"
        if found is None:
            log = files.regular(task.folder / "metrics.jsonl")
            if log and log.st_size:
                raise ValueError(f"{task.folder} has lost its checkpoint; put it back, or {again}")
            return task.create(), logs.START
        state, note = found
        if not note:
            raise ValueError(
                f"{task.folder} is a run of an earlier version; end it there, or {again}"
            )
        if task.source.position() is not None:
            positions = note["positions"]
            if len(positions) != jax.process_count():
                raise ValueError(
                    f"{task.folder} must continue on as many processes as before, {len(positions)}"
                )
            task.source.restore(positions[jax.process_index()])
        return state, note["log"]


@jax.jit
def are_finite(tree: Any) -> jax.Array:
    """Whether all floating-point numbers of a tree of arrays are finite."""
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in floating]).all()


def result_file(folder: Path) -> Path:
    """Of the run in a folder."""
    return folder.with_name(f"{folder.name}.json")
