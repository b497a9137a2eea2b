"""Trains one configuration: resumable, logged, measured, its result one JSON file.

Files under ``out``: ``RUN.json`` is a finished run's result; ``runs/RUN/`` holds its checkpoint,
``metrics.jsonl`` and TensorBoard events. A run stopped at any point, even by SIGKILL, continues
from its checkpoint and ends, on the same devices, in the same bits as an unbroken one: batches, λ
and learning rate go by the step, and a checkpoint falls between the same dispatches. (XLA promises
the same bits on a GPU only with XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray
from tqdm import tqdm

from experiments import data, models, result
from experiments.checkpoint import Checkpoints
from experiments.configs import Config
from experiments.log import Log, finite
from experiments.program import averages, build, evaluate, load, means, measures
from lsoftmax_jax import annealed_lambda, training

RESULTS = Path(__file__).parent / "results"

# No start of these networks comes near this mean loss, so it means that they blew up.
BLOWN_UP = 1e4

ADVICE = """\
What to try, in this order: a larger or slower falling λ (--lam.base, --lam.gamma), or a floor
under it (--lam.minimum 5); a start from the softmax run of the same data (--init RUN); a smaller
--learning-rate."""


class Diverged(NamedTuple):
    """The first update whose loss or gradient was not finite, or whose loss blew up."""

    step: int
    loss: float
    lam: float
    feature_norm: float
    kernel_norm: float

    def __str__(self) -> str:
        return (
            f"diverged at step {self.step}: loss {self.loss:.4g}, λ {self.lam:.4g}, "
            f"|features| {self.feature_norm:.4g}, |kernel| {self.kernel_norm:.4g}\n{ADVICE}"
        )


def divergence(metrics: training.StepMetrics, first: int) -> Diverged | None:
    """Looks at the updates from number ``first`` on."""
    loss = metrics.sums.loss / metrics.sums.examples
    good = np.isfinite(loss) & np.isfinite(metrics.grad_norm) & (loss < BLOWN_UP)
    if good.all():
        return None
    i = int(np.argmin(good))
    return Diverged(
        step=first + i,
        loss=float(loss[i]),
        lam=float(metrics.lam[i]),
        feature_norm=float(metrics.sums.feature_norm[i] / metrics.sums.examples[i]),
        kernel_norm=float(metrics.kernel_norm[i]),
    )


def warm_start(fresh: training.State, place: Path, mesh: Mesh) -> training.State:
    """``fresh`` with the parameters and batch statistics of another run's last checkpoint."""
    with Checkpoints(place / "checkpoints") as checkpoints:
        source = checkpoints.latest(fresh, mesh)
    if source is None:
        raise FileNotFoundError(f"--init: {place} has no checkpoint; train that run first")
    return fresh._replace(params=source.params, other=source.other)


class Session:
    """A run in this process: its state, log, checkpoints and clock; a context manager.

    Args:
      config: what to train.
      folder: where the data is.
      out: folder of the results.
      mesh: trains on its devices.
      dispatch: updates in one dispatch.
    """

    def __init__(
        self, config: Config, folder: Path | None, out: Path, mesh: Mesh, dispatch: int
    ) -> None:
        started = time.perf_counter()
        self.config, self.dispatch = config, dispatch
        self._mesh, self._out = mesh, out
        self._dataset = load(config, folder)
        train = self._dataset.train
        self._program = build(config, train, mesh)
        self._feed = data.Feed(
            config.seed, train, self._program.mean, mesh, size=config.batch, steps=dispatch
        )
        place = out / "runs" / config.run_name
        _claim(place, config)
        self._checkpoints = Checkpoints(place / "checkpoints")
        self._state = self._first_state()
        self.step = int(self._state.step)
        self._log = Log(place, self.step)
        self._seconds = self._log.seconds
        self._started = started - self._seconds.wall
        self._compiled: dict[int, Any] = {}
        self._seconds.setup += time.perf_counter() - started
        with self._spent("compilation"):
            self._evaluate(self._dataset.test.rows(slice(1)))

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._checkpoints.close()

    def advance(self) -> training.StepMetrics:
        """One dispatch; returns its metrics, one entry an update, on the host."""
        length = min(self.dispatch - self.step % self.dispatch, self.config.steps - self.step)
        source = self._feed(self.step)
        if length not in self._compiled:
            with self._spent("compilation"):
                lowered = self._program.updates.lower(self._state, source, length)
                self._compiled[length] = lowered.compile()
        with self._spent("training"):
            self._state, metrics = jax.block_until_ready(
                self._compiled[length](self._state, source)
            )
        self.step += length
        metrics = jax.device_get(metrics)
        self._write("train", **means(metrics))
        return metrics

    def test(self) -> None:
        """Adds a point to the test curve."""
        with self._spent("evaluation"):
            sums, _, _ = self._evaluate(self._dataset.test)
        self._write("test", **averages(sums))

    def save(self) -> None:
        self._checkpoints.save(self._state)

    def outcome(self, diverged: Diverged | None) -> dict[str, Any]:
        """Measures the last iterate and gathers what the result's file holds."""
        config, seconds = self.config, self._seconds
        measured = {}
        if diverged is None:
            with self._spent("evaluation"):
                measured = measures(self._program, self._state, self._dataset, self._mesh)
        seconds.wall = time.perf_counter() - self._started
        return {
            "name": config.name,
            "seed": config.seed,
            "status": "diverged" if diverged else "finished",
            "diverged": diverged and finite(diverged._asdict()),
            "reduced": config.reduced,
            "changes": {name: config.to_json()[name] for name in config.changes},
            "command": config.command,
            "config": config.to_json(),
            "data": {"name": config.dataset, "fingerprint": self._dataset.fingerprint},
            **result.provenance(self._mesh.size),
            "parameters": models.parameter_count(config.built_network, config.classes),
            "seconds": asdict(seconds),
            "images_per_second": self.step * config.batch / seconds.training,
            "outside_step": seconds.outside,
            **measured,
            "curves": {kind: self._log.curve(kind) for kind in ("train", "test")},
        }

    def _first_state(self) -> training.State:
        """That of the checkpoint, else that of the run to start from, else a fresh one."""
        create, init = self._program.create, self.config.init
        state = self._checkpoints.latest(jax.eval_shape(create, 0), self._mesh)
        if state is not None:
            return state
        fresh = jax.jit(create)(self.config.seed)
        return fresh if init is None else warm_start(fresh, self._out / "runs" / init, self._mesh)

    def _evaluate(self, split: data.Split) -> tuple[training.Sums, NDArray, NDArray]:
        return evaluate(self._program, self._state, split, self._mesh)

    def _write(self, kind: str, **values: float) -> None:
        self._seconds.wall = time.perf_counter() - self._started
        self._log.write(kind, self.step, self._seconds, **values)

    @contextmanager
    def _spent(self, name: str) -> Iterator[None]:
        """Adds what a block takes to one of the clock's entries."""
        begun = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begun
        setattr(self._seconds, name, getattr(self._seconds, name) + elapsed)


def _claim(place: Path, config: Config) -> None:
    """Notes in a run's folder what is trained there; refuses a folder of something else."""
    file = place / "config.json"
    if not file.exists():
        result.save(file, config.to_json())
    elif result.load(file) != config.to_json():
        raise ValueError(f"{place} belongs to another state of this configuration; remove it")


def evaluate_run(
    place: Path, folder: Path | None, devices: int | None
) -> tuple[int, dict[str, Any]]:
    """The step of a run's last checkpoint, and its `measures`."""
    if not (place / "config.json").exists():
        raise FileNotFoundError(f"no run in {place}")
    config = Config.from_json(result.load(place / "config.json"))
    mesh = training.data_mesh(devices)
    dataset = load(config, folder)
    program = build(config, dataset.train, mesh)
    with Checkpoints(place / "checkpoints") as checkpoints:
        state = checkpoints.latest(jax.eval_shape(program.create, 0), mesh)
    if state is None:
        raise FileNotFoundError(f"{place} has no checkpoint yet")
    return int(state.step), measures(program, state, dataset, mesh)


def warn_if_lam_stays(config: Config) -> None:
    """Says so when the margin hardly acts even at the last update."""
    lam = float(annealed_lambda(*config.stretched_lam)(config.steps - 1))
    if config.margin > 1 and lam > max(9.0, config.lam.minimum):
        print(
            f"warning: λ is still {lam:.3g} at the last update, so the margin weighs no more than "
            f"1 / (1 + λ) = {1 / (1 + lam):.2g}; raise --lam.gamma or --lam.power",
            file=sys.stderr,
        )


def run(
    config: Config,
    *,
    folder: Path | None = None,
    out: Path = RESULTS,
    devices: int | None = None,
    dispatch: int | None = None,
    evaluations: int | None = None,
    checkpoint_seconds: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains a configuration, or continues it, and writes its result.

    Args:
      config: what to train.
      folder: where the data is, see `data.load`.
      out: folder of the results.
      devices: train on the first so many; all by default.
      dispatch: updates in one dispatch; by default 100 on an accelerator, 1 on a CPU.
      evaluations: points of the test curve; by default 36 on an accelerator, 6 on a CPU.
      checkpoint_seconds: time between two checkpoints.
      stop: asked after every dispatch; when true, the run saves a checkpoint and ends.

    Returns:
      What the result's file holds; None if the run was stopped.
    """
    file = out / f"{config.run_name}.json"
    if file.exists():
        print(f"{config.run_name} is finished; delete {file} to train it again")
        return result.load(file)
    warn_if_lam_stays(config)
    mesh = training.data_mesh(devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dispatch = dispatch or (1 if on_cpu else 100)
    every = dispatch * -(-config.steps // (dispatch * (evaluations or (6 if on_cpu else 36))))
    diverged, saved = None, time.perf_counter()
    with Session(config, folder, out, mesh, dispatch) as session, _bar(session) as bar:
        while session.step < config.steps:
            if stop():
                session.save()
                bar.write(f"stopped at step {session.step}; the same command continues there")
                return None
            first = session.step
            metrics = session.advance()
            _show(bar, metrics, config.batch)
            diverged = divergence(metrics, first)
            if diverged:
                bar.write(f"{config.run_name} {diverged}")
                break
            if session.step % every == 0 or session.step == config.steps:
                session.test()
            if session.step == config.steps or time.perf_counter() - saved > checkpoint_seconds:
                session.save()
                saved = time.perf_counter()
        outcome = session.outcome(diverged)
    result.save(file, outcome)
    return outcome


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C or SIGTERM a request to stop, for `run`; a second one ends at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this dispatch", file=sys.stderr)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _bar(session: Session) -> Any:
    config = session.config
    return tqdm(total=config.steps, initial=session.step, desc=config.run_name, unit=" steps")


def _show(bar: Any, metrics: training.StepMetrics, batch: int) -> None:
    seen = means(metrics)
    bar.set_postfix_str(
        f"loss {seen['loss']:.3g}, accuracy {100 - seen['error']:.1f} %, λ {seen['lam']:.3g}, "
        f"{batch * (bar.format_dict['rate'] or 0):.0f} images/s",
        refresh=False,
    )
    bar.update(len(metrics.lam))
