"""Runs in this process: state, log and checkpoints of each, and how several advance as one."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from numpy.typing import NDArray

from experiments.paper import data
from experiments.paper import networks as models
from experiments.paper.cells import changes_of, command_of, run_name
from experiments.paper.config import Config
from experiments.run.program import Program, averages, build, evaluate, load, means, measures
from experiments.store import processes
from experiments.store import results as result
from experiments.store.checkpoints import Checkpoints
from experiments.store.logs import Log, Seconds, finite
from lsoftmax_jax import devices, training


class Clock:
    """Where the time of runs goes, over all their sessions."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds = Seconds()

    def add(self, earlier: Seconds) -> None:
        """The time of earlier sessions."""
        self._started -= earlier.wall
        for name, value in asdict(earlier).items():
            setattr(self._seconds, name, getattr(self._seconds, name) + value)

    @contextmanager
    def spent(self, name: str) -> Iterator[None]:
        """Adds what a block takes to one of the entries."""
        begun = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begun
        setattr(self._seconds, name, getattr(self._seconds, name) + elapsed)

    def read(self) -> Seconds:
        self._seconds.wall = time.perf_counter() - self._started
        return self._seconds


class Shared(NamedTuple):
    """What the seeds of a configuration have in common in one process.

    Attributes:
      dataset: on the host.
      train: its training split, in the memory of the mesh's devices.
      program: the configuration's functions.
      mesh: trains on its devices.
      clock: of all of them.
    """

    dataset: data.Dataset
    train: data.Split
    program: Program
    mesh: Mesh
    clock: Clock

    @staticmethod
    def of(config: Config, folder: Path | None, mesh: Mesh) -> "Shared":
        clock = Clock()
        with clock.spent("setup"):
            dataset = load(config, folder)
            program = build(config, dataset.train, mesh)
            processes.check_same(dataset.fingerprint, "data")
            train = data.Split(*devices.put(tuple(dataset.train), mesh, P()))
        return Shared(dataset, train, program, mesh, clock)


class Session:
    """One seed's run in this process: its state, log and checkpoints; a context manager.

    Args:
      config: what to train.
      shared: what it has in common with other seeds.
      out: folder of the results.
      dispatch: updates in one dispatch.
      kept: how many checkpoints to keep.
      step: that of the checkpoint to continue at, by default the newest; later ones are deleted.
    """

    def __init__(
        self,
        config: Config,
        shared: Shared,
        out: Path,
        dispatch: int,
        kept: int = 1,
        step: int | None = None,
    ) -> None:
        self.config, self.dispatch = config, dispatch
        self._shared, self._out = shared, out
        place = out / "runs" / run_name(config)
        with shared.clock.spent("setup"):
            self.feed = data.Feed(
                config.seed,
                shared.train,
                shared.program.mean,
                shared.mesh,
                size=config.batch,
                steps=dispatch,
            )
            _claim(place, config)
            self._checkpoints = Checkpoints(place / "checkpoints", kept)
            if step is not None:
                self._checkpoints.rewind(step)
            self.state = self._first_state()
            self.step = int(self.state.step)
            self.log = Log(place, self.step, writes=processes.is_first())

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        self._checkpoints.close()

    def advanced(self, state: training.State, metrics: training.StepMetrics) -> None:
        """Takes in the updates of one dispatch."""
        self.state, self.step = state, self.step + len(metrics.lam)
        self._write("train", **means(metrics))

    def test(self) -> None:
        """Adds a point to the test curve."""
        with self._shared.clock.spent("evaluation"):
            sums, _, _ = self._evaluate(self._shared.dataset.test)
        self._write("test", **averages(sums))

    def warm_up(self) -> None:
        """Compiles the evaluation."""
        with self._shared.clock.spent("compilation"):
            self._evaluate(self._shared.dataset.test.rows(slice(1)))

    def save(self) -> None:
        self._checkpoints.save(self.state)

    def finish(self, diverged: dict[str, Any] | None, together: Sequence[int]) -> None:
        """Measures the last iterate and writes the result.

        Args:
          diverged: what is known about a divergence.
          together: the seeds that trained in one program.
        """
        config, shared = self.config, self._shared
        measured = {}
        if diverged is None:
            with shared.clock.spent("evaluation"):
                measured = measures(shared.program, self.state, shared.dataset, shared.mesh)
        seconds = shared.clock.read()
        outcome = {
            "name": config.name,
            "seed": config.seed,
            "status": "diverged" if diverged else "finished",
            "diverged": diverged and finite(diverged),
            "reduced": bool(changes_of(config)),
            "changes": {name: config.to_json()[name] for name in changes_of(config)},
            "command": command_of(config),
            "config": config.to_json(),
            "data": {"name": config.dataset, "fingerprint": shared.dataset.fingerprint},
            **result.provenance(shared.mesh.size),
            "parameters": models.parameter_count(config.built_network, config.classes),
            "together": list(together),
            "seconds": asdict(seconds),
            "images_per_second": len(together) * self.step * config.batch / seconds.training,
            "outside_step": seconds.outside,
            **measured,
            "curves": {kind: self.log.curve(kind) for kind in ("train", "test")},
        }
        if processes.is_first():
            result.save(self._out / f"{run_name(config)}.json", outcome)
        processes.wait("result")

    def _first_state(self) -> training.State:
        """That of the checkpoint, else that of the run to start from, else a fresh one."""
        create, init = self._shared.program.create, self.config.init
        mesh = self._shared.mesh
        state = self._checkpoints.latest(jax.eval_shape(create, 0), mesh)
        if state is not None:
            return state
        fresh = jax.jit(create, out_shardings=NamedSharding(mesh, P()))(self.config.seed)
        return fresh if init is None else warm_start(fresh, self._out / "runs" / init, mesh)

    def _evaluate(self, split: data.Split) -> tuple[training.Sums, NDArray, NDArray]:
        return evaluate(self._shared.program, self.state, split, self._shared.mesh)

    def _write(self, kind: str, **values: float) -> None:
        self.log.write(kind, self.step, self._shared.clock.read(), **values)


class Group:
    """Sessions of one configuration, at the same step, that advance in one program.

    Args:
      sessions: one a seed.
      shared: what they have in common.
    """

    def __init__(self, sessions: Sequence[Session], shared: Shared) -> None:
        self.sessions = list(sessions)
        self._shared = shared
        self._compiled: dict[tuple[int, int], Any] = {}
        shared.clock.add(self.sessions[0].log.seconds)
        self.sessions[0].warm_up()

    @property
    def step(self) -> int:
        return self.sessions[0].step

    @property
    def seeds(self) -> list[int]:
        return [session.config.seed for session in self.sessions]

    def advance(self) -> list[training.StepMetrics]:
        """One dispatch; returns each run's metrics, one entry an update, on the host."""
        first, clock = self.sessions[0], self._shared.clock
        length = min(first.dispatch - first.step % first.dispatch, first.config.steps - first.step)
        states = [session.state for session in self.sessions]
        sources = [session.feed(session.step) for session in self.sessions]
        shape = len(states), length
        if shape not in self._compiled:
            with clock.spent("compilation"):
                lowered = self._shared.program.updates.lower(states, sources, length)
                self._compiled[shape] = lowered.compile()
        with clock.spent("training"):
            states, metrics = jax.block_until_ready(self._compiled[shape](states, sources))
        seen = jax.device_get(metrics)
        for session, state, of_session in zip(self.sessions, states, seen, strict=True):
            session.advanced(state, of_session)
        return seen


def warm_start(fresh: training.State, place: Path, mesh: Mesh) -> training.State:
    """``fresh`` with the parameters and batch statistics of another run's last checkpoint."""
    with Checkpoints(place / "checkpoints") as checkpoints:
        source = checkpoints.latest(fresh, mesh)
    if source is None:
        raise FileNotFoundError(f"--init: {place} has no checkpoint; train that run first")
    return fresh._replace(params=source.params, other=source.other)


def _claim(place: Path, config: Config) -> None:
    """Notes in a run's folder what is trained there; refuses a folder of something else."""
    file = place / "config.json"
    if not file.exists():
        if processes.is_first():
            result.save(file, config.to_json())
    elif result.load(file) != config.to_json():
        raise ValueError(f"{place} belongs to another state of this configuration; remove it")
