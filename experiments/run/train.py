"""Trains one configuration, several seeds at once if wanted: resumable, logged, measured.

Files under ``out``: ``RUN.json`` is a finished run's result; ``runs/RUN/`` holds its checkpoints,
``metrics.jsonl`` and TensorBoard events. A run stopped at any point, even by SIGKILL, continues
from its checkpoint and ends, on the same devices, in the same bits as an unbroken one: batches, λ
and learning rate go by the step, and a checkpoint falls between the same dispatches. (Seen on CPUs;
a GPU's sums may come in another order unless XLA_FLAGS has --xla_gpu_deterministic_ops=true.) Seeds
that train together differ from seeds alone by rounding only.
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.paper.cells import run_name
from experiments.paper.config import Config
from experiments.run.program import build, load, means, measures
from experiments.run.session import Group, Session, Shared
from experiments.store import processes
from experiments.store import results as result
from experiments.store.checkpoints import Checkpoints, steps_in
from lsoftmax_jax import annealed_lambda, training
from lsoftmax_jax.devices import data_mesh

RESULTS = Path(__file__).parents[1] / "results"

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


def evaluate_run(
    place: Path, folder: Path | None, devices: int | None
) -> tuple[int, dict[str, Any]]:
    """The step of a run's last checkpoint, and its `measures`."""
    if not (place / "config.json").exists():
        raise FileNotFoundError(f"no run in {place}")
    config = Config.from_json(result.load(place / "config.json"))
    mesh = data_mesh(devices)
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


def run(config: Config, **options: Any) -> dict[str, Any] | None:
    """Trains a configuration, or continues it, and writes its result.

    Args:
      config: what to train.
      options: those of `run_seeds`.

    Returns:
      What the result's file holds; None if the run was stopped.
    """
    outcomes = run_seeds([config], **options)
    return None if outcomes is None else outcomes[0]


def run_seeds(
    configs: Sequence[Config],
    *,
    folder: Path | None = None,
    out: Path = RESULTS,
    devices: int | None = None,
    dispatch: int | None = None,
    evaluations: int | None = None,
    checkpoint_seconds: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Trains several seeds of one configuration in one program, or continues them.

    Args:
      configs: differ in the seed alone; finished ones are left alone, and the others have a
        checkpoint of the same step or none at all.
      folder: where the data is, see `data.load`.
      out: folder of the results.
      devices: train on the first so many; all by default.
      dispatch: updates in one dispatch; by default 100 on an accelerator, 1 on a CPU.
      evaluations: points of the test curve; by default 36 on an accelerator, 6 on a CPU.
      checkpoint_seconds: time between two checkpoints.
      stop: asked before every dispatch; when true, each run saves a checkpoint and ends.

    Returns:
      What the results' files hold, in the order of configs; None if the runs were stopped.
    """
    files = {config: out / f"{run_name(config)}.json" for config in configs}
    missing = [config for config, file in files.items() if not file.exists()]
    for config in configs:
        if config not in missing:
            print(f"{run_name(config)} is finished; delete {files[config]} to train it again")
    if missing:
        if processes.is_first():
            warn_if_lam_stays(missing[0])
        processes.check_same(str(missing), "configuration")
        mesh = data_mesh(devices)
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        pace = Pace(
            dispatch=dispatch or (1 if on_cpu else 100),
            evaluations=evaluations or (6 if on_cpu else 36),
            checkpoint_seconds=checkpoint_seconds,
        )
        with ExitStack() as running:
            shared = Shared.of(missing[0], folder, mesh)
            # With two checkpoints each, a kill amid the runs' saves leaves a step that all have.
            kept, step = (1, None) if len(missing) == 1 else (2, common_step(missing, out))
            sessions = [
                running.enter_context(Session(config, shared, out, pace.dispatch, kept, step))
                for config in missing
            ]
            if not _train(Group(sessions, shared), pace, stop):
                return None
    return [result.load(file) for file in files.values()]


class Pace(NamedTuple):
    """How often something happens: updates in a dispatch, points of the test curve, checkpoints."""

    dispatch: int
    evaluations: int
    checkpoint_seconds: float


def _train(group: Group, pace: Pace, stop: Callable[[], bool]) -> bool:
    """Trains runs to their end and writes their results; False if they were stopped."""
    steps = group.sessions[0].config.steps
    every = pace.dispatch * -(-steps // (pace.dispatch * pace.evaluations))
    saved = time.perf_counter()
    with _bar(group) as bar:
        while group.sessions and group.step < steps:
            if processes.agreed(stop()):
                for session in group.sessions:
                    session.save()
                bar.write(f"stopped at step {group.step}; the same command continues there")
                return False
            _advance(group, bar)
            last = not group.sessions or group.step == steps
            if last or group.step % every == 0:
                for session in group.sessions:
                    session.test()
            due = time.perf_counter() - saved > pace.checkpoint_seconds
            if last or processes.agreed(due):
                for session in group.sessions:
                    session.save()
                saved = time.perf_counter()
    for session in group.sessions:
        session.finish(None, group.seeds)
    return True


def _advance(group: Group, bar: Any) -> None:
    """One dispatch, after which a diverged run is recorded and leaves."""
    first, seeds = group.step, group.seeds
    seen = group.advance()
    _show(bar, seen, group.sessions[0].config)
    for session, metrics in zip(tuple(group.sessions), seen, strict=True):
        if diverged := divergence(metrics, first):
            bar.write(f"{run_name(session.config)} {diverged}")
            session.finish(diverged._asdict(), seeds)
            group.sessions.remove(session)


def checkpointed_steps(config: Config, out: Path) -> set[int]:
    """The steps a run can continue at; 0 if it has no checkpoint."""
    return steps_in(out / "runs" / run_name(config) / "checkpoints") or {0}


def common_step(configs: Sequence[Config], out: Path) -> int:
    """The latest step that runs can continue at together.

    Raises:
      ValueError: if there is none.
    """
    steps = set.intersection(*(checkpointed_steps(config, out) for config in configs))
    if not steps:
        raise ValueError(
            f"{configs[0].name}: these seeds stopped at different steps, so they cannot go on "
            "together; train them one by one"
        )
    return max(steps)


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


def _bar(group: Group) -> Any:
    config, others = group.sessions[0].config, len(group.sessions) - 1
    name = run_name(config) + (f" and {others} more" if others else "")
    return tqdm(
        total=config.steps,
        initial=group.step,
        desc=name,
        unit=" steps",
        disable=not processes.is_first(),
    )


def _show(bar: Any, metrics: list[training.StepMetrics], config: Config) -> None:
    seen = means(metrics[0])
    speed = len(metrics) * config.batch * (bar.format_dict["rate"] or 0)
    lam = f"λ {seen['lam']:.3g}, " if config.margin > 1 else ""  # without a margin it does nothing
    bar.set_postfix_str(
        f"loss {seen['loss']:.3g}, accuracy {100 - seen['error']:.1f} %, {lam}{speed:.0f} images/s",
        refresh=False,
    )
    bar.update(len(metrics[0].lam))
