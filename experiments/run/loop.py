"""The one training loop: every run, whatever its batches come from, advances through `train`.

Files of a run: ``RUN.json`` is its result, ``RUN/`` holds its checkpoints, ``metrics.jsonl``,
TensorBoard events and, where the step does not say it, where its source stood. A run stopped at any
point, even by SIGKILL, continues from its checkpoint and ends, on the same devices, in the bits of
an unbroken one: batches, λ and learning rate go by the step, and a checkpoint falls between the
same dispatches. (Seen on CPUs; a GPU's sums may come in another order unless XLA_FLAGS has
--xla_gpu_deterministic_ops=true.) Seeds that train together differ from seeds alone by rounding
only.
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

from experiments.run.session import Session, Shared, Task, Values, result_file
from experiments.store import processes, results
from experiments.store.checkpoints import steps_in
from experiments.store.progress import Progress
from lsoftmax_jax.training import State

Outcome = dict[str, Any]
Stop = Callable[[], bool]

INTERRUPTED = 130
RUNS = Path("runs")

# The last of so many updates without a finite loss and gradient ends a run.
SKIPPED_LIMIT = 3

# No start of these networks comes near this mean loss, so it means that they blew up.
BLOWN_UP = 1e4

ADVICE = """\
What to try, in this order: a larger or slower falling λ (--lam.base, --lam.gamma), or a floor
under it (--lam.minimum 5); a start from the softmax run of the same data (--init RUN); a smaller
--learning-rate."""


CURE = """\
The margin shrinks the features to nothing, all classes alike. A higher λ is the cure: --pace
self-paced, which finds it, or a floor under it (--lam.minimum 5)."""


class Pace(NamedTuple):
    """How often something happens.

    Attributes:
      dispatch: updates in a dispatch.
      evaluations: points of the test curve; 0 for none.
      checkpoint_seconds: between two checkpoints.
      starts_tested: the test curve has a point before the first update too.
      keeps_last: the last state is a checkpoint.
    """

    dispatch: int
    evaluations: int
    checkpoint_seconds: float = 60.0
    starts_tested: bool = False
    keeps_last: bool = True


def train(tasks: Sequence[Task], shared: Shared, pace: Pace, stop: Stop) -> list[Outcome] | None:
    """Trains runs as one to their end and writes their results; None if they were stopped.

    Args:
      tasks: runs that have a checkpoint of the same step, or none at all.
      shared: what they have in common.
      pace: of the whole.
      stop: asked before every dispatch; when true, each run saves a checkpoint and ends.
    """
    if not pace.checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint-seconds must be >= 0, got {pace.checkpoint_seconds}")
    processes.check_same(str([task.settings for task in tasks]), "settings")
    # With two checkpoints each, a kill amid the runs' saves leaves a step that all have.
    alone = len(tasks) == 1
    kept, step = (1, None) if alone else (2, common_step([task.folder for task in tasks]))
    with ExitStack() as running:
        sessions = [Session(task, shared, running, kept, step) for task in tasks]
        ended = Group(sessions, shared, pace).train(stop)
        return [session.outcome for session in sessions] if ended else None


class Group:
    """Sessions at the same step that advance in one program.

    Args:
      sessions: one a run.
      shared: what they have in common.
      pace: of the whole.
    """

    def __init__(self, sessions: Sequence[Session], shared: Shared, pace: Pace) -> None:
        self.sessions, self._shared, self._pace = sessions, shared, pace
        self._compiled: dict[tuple[int, int], Any] = {}
        shared.clock.add(self.sessions[0].log.seconds)

    @property
    def step(self) -> int:
        return self.sessions[0].step

    @property
    def seeds(self) -> list[int]:
        return [session.task.facts["seed"] for session in self.sessions]

    def train(self, stop: Stop) -> bool:
        """Whether every session came to its outcome; false if they were stopped."""
        steps, pace, saved = self._shared.steps, self._pace, time.monotonic()
        every = pace.dispatch * -(-steps // (pace.dispatch * max(pace.evaluations, 1)))
        title, others = self.sessions[0].task.name, len(self.sessions) - 1
        title += f" and {others} more" if others else ""
        if pace.starts_tested and self.step == 0:
            # A start that ended before its first checkpoint has left this point in the log.
            self._each(lambda session: None if session.log.lines else session.test())
        with Progress(title, steps, "updates", self.step, processes.is_first()) as progress:
            while self.sessions and self.step < steps:
                if processes.agreed(stop()):
                    self._each(Session.save)
                    progress.say(f"stopped at step {self.step}; the same command continues there")
                    return False
                self._advance(progress)
                last = not self.sessions or self.step == steps
                if pace.evaluations and (last or self.step % every == 0):
                    self._each(Session.test)
                due = time.monotonic() - saved > pace.checkpoint_seconds
                if (last and pace.keeps_last) or (not last and processes.agreed(due)):
                    self._each(Session.save)
                    saved = time.monotonic()
        self._each(lambda session: session.finish(None, self.seeds))
        return True

    def _each(self, does: Callable[[Session], None]) -> None:
        for session in self.sessions:
            does(session)

    def _advance(self, progress: Progress) -> None:
        """One dispatch."""
        shared, dispatch = self._shared, self._pace.dispatch
        length = min(dispatch - self.step % dispatch, shared.steps - self.step)
        states = [session.state for session in self.sessions]
        feeds = [session.task.source.feed(self.step) for session in self.sessions]
        shape = len(states), length
        if shape not in self._compiled:
            with shared.clock.spent("compilation"):
                self._compiled[shape] = shared.compile(states, feeds, length)
        with shared.clock.spent("training"):
            states, metrics = jax.block_until_ready(self._compiled[shape](states, feeds))
        seen = [shared.values(of_one) for of_one in jax.device_get(metrics)]
        progress.advance(length, shown(seen[0], len(seen) * shared.batch * progress.rate))
        for session, state, values in zip(self.sessions, states, seen, strict=True):
            self._look(session, state, values, progress)
        self.sessions = [session for session in self.sessions if not session.outcome]

    def _look(self, session: Session, state: State, values: Values, progress: Progress) -> None:
        """The one place that judges what updates saw: a run that diverged ends with that result."""
        name, first = session.task.name, session.step
        diverged = divergence(values, first, session.skipped)
        session.advanced(state, values)
        for i in np.flatnonzero(values.get("skipped", 0)).tolist():
            seen = numbers(of_update(values, first, i))
            progress.say(f"{name} skipped update {first + i}, which was not finite: {seen}")
        for i in np.flatnonzero(values.get("collapsing", 0)).tolist():
            if not session.collapsed:
                seen = numbers(of_update(values, first, i))
                progress.say(f"warning: {name} is collapsing at step {first + i}: {seen}\n{CURE}")
            session.collapsed = True
        if diverged:
            seen = numbers(diverged)
            progress.say(f"{name} diverged at step {diverged['step']}: {seen}\n{ADVICE}")
            session.finish(diverged, self.seeds)


def divergence(values: Values, first: int, skipped: int = 0) -> dict[str, float] | None:
    """The update, from number ``first`` on, that ends the run; ``skipped`` ones came before.

    It is one with a huge loss, or the last of `SKIPPED_LIMIT` skipped ones; where a source skips
    none, the first without a finite loss and gradient.
    """
    loss = values["loss"]
    wrong = ~(np.isfinite(loss) & np.isfinite(values.get("grad_norm", loss)))
    if "skipped" in values:
        wrong = values["skipped"] > 0
        wrong &= skipped + np.cumsum(wrong) >= SKIPPED_LIMIT
    wrong |= np.isfinite(loss) & (loss >= BLOWN_UP)
    return of_update(values, first, int(np.argmax(wrong))) if wrong.any() else None


def of_update(values: Values, first: int, i: int) -> dict[str, float]:
    """What update number i after ``first`` saw."""
    return {"step": first + i} | {name: float(value[i]) for name, value in values.items()}


def numbers(seen: dict[str, float]) -> str:
    """What an update saw, for people."""
    titles = {
        "loss": "loss",
        "share": "margin share",
        "feature_norm": "|features|",
        "kernel_norm": "|kernel|",
    }
    return ", ".join(f"{title} {seen[name]:.4g}" for name, title in titles.items() if name in seen)


def shown(values: Values, speed: float) -> str:
    """What updates saw, for the progress."""
    words = [f"loss {values['loss'].mean():.3g}"]
    if "error" in values:
        words.append(f"accuracy {100 - values['error'].mean():.1f} %")
    if "share" in values:
        words.append(f"margin {100 * values['share'][-1]:.3g} %")
    return ", ".join([*words, f"{speed:.0f} examples/s"])


def finished(folder: Path, name: str) -> Outcome | None:
    """The result of a run that needs no more training; says so."""
    file = result_file(folder)
    if not file.exists():
        return None
    print(f"{name} is finished; delete {file} to train it again")
    outcome = results.load(file, ("status", "seconds", "curves"))
    if outcome["status"] not in ("finished", "diverged"):
        raise ValueError(f"{file} must hold a result, its status is {outcome['status']!r}")
    return outcome


def checkpointed_steps(folder: Path) -> set[int]:
    """The steps the run in a folder can continue at; 0 if it has no checkpoint."""
    return steps_in(folder / "checkpoints") or {0}


def common_step(folders: Sequence[Path]) -> int:
    """The latest step that runs can continue at together.

    Raises:
      ValueError: if there is none.
    """
    steps = set.intersection(*map(checkpointed_steps, folders))
    if not steps:
        raise ValueError(
            f"{folders[0].name}: these seeds stopped at different steps, so they cannot go on "
            "together; train them one by one"
        )
    return max(steps)


def exit_code(outcome: Outcome | None) -> int:
    """0 for a finished run, 1 for a diverged one, 130 for one that was stopped."""
    return INTERRUPTED if outcome is None else int(outcome["status"] == "diverged")


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Makes the first Ctrl-C or SIGTERM a request to stop; a second one ends at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this dispatch", file=sys.stderr)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
