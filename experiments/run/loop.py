"""The one training loop: every run, whatever its batches come from, advances through `train`.

Files of a run: ``RUN.json`` is its result, ``RUN/`` holds its checkpoints, ``metrics.jsonl``,
TensorBoard events and, where the step does not say it, the position of its source. A run stopped
at any point, even by SIGKILL, continues from its checkpoint. On the same devices it ends in the
bits of an unbroken run: batches, λ and learning rate go by the step, and a checkpoint falls
between the same dispatches. (Seen on CPUs; a GPU's sums may come in another order unless XLA_FLAGS
has --xla_gpu_deterministic_ops=true.) Seeds that train together differ from seeds alone by rounding
only.
"""

import math
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

# A run ends after this many updates without a finite loss and gradient.
SKIPPED_LIMIT = 3

# No network here starts near this mean loss: a larger loss means that the run blew up.
BLOWN_UP = 1e4

ADVICE = """\
What to try, in this order: a larger or slower falling λ (--lam.base, --lam.gamma), or a floor
under it (--lam.minimum 5); a start from the softmax run of the same data (--init RUN); a smaller
--learning-rate."""


CURE = """\
The margin shrinks the features to nothing, all classes alike. A higher λ is the cure: --pace
lead, which finds it, or a floor under it (--lam.minimum 5)."""

TURNED = """\
The features turn away from the columns of their labels, where the margin hardly pulls. Let λ find
itself (--pace lead), or begin with the network of a softmax run (--init, --init-from)."""

# The margin takes no part in an update in which its share is below this one.
NO_PART = 0.01

IDLE = """\
So far this run trains the ordinary softmax: few images lead, so fit them first with more updates
(--steps); or try --strength 1, --pace schedule, or a smaller --margin."""


class Pace(NamedTuple):
    """How often something happens.

    Attributes:
      dispatch: updates in a dispatch.
      evaluations: points of the test curve; 0 for none.
      checkpoint_seconds: between two checkpoints.
    """

    dispatch: int
    evaluations: int
    checkpoint_seconds: float = 60.0


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
    # A kill may come between the saves of a group. With two checkpoints each, all runs still
    # share a step.
    alone, seeds = len(tasks) == 1, [task.facts["seed"] for task in tasks]
    kept, step = (1, None) if alone else (2, common_step([task.folder for task in tasks]))
    with ExitStack() as running:
        sessions = [Session(task, shared, running, kept, step, seeds) for task in tasks]
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

    def train(self, stop: Stop) -> bool:
        """Trains to the end of every session; false if the sessions were stopped."""
        steps, pace, saved = self._shared.steps, self._pace, time.monotonic()
        every = pace.dispatch * -(-steps // (pace.dispatch * max(pace.evaluations, 1)))
        title, others = self.sessions[0].task.name, len(self.sessions) - 1
        title += f" and {others} more" if others else ""
        if others and self.step == 0:
            # After a kill between the first saves, all runs must still share a step.
            self._each(Session.save)
        with Progress(title, steps, "updates", self.step, processes.is_first()) as progress:
            if self.step:
                progress.say(f"{title} continues at update {self.step}")
            while self.sessions and self.step < steps:
                if processes.agreed(stop()):
                    self._each(Session.save)
                    progress.say(f"stopped at update {self.step}; the same command continues there")
                    return False
                ended = self._advance(progress)
                last = not self.sessions or self.step == steps
                if pace.evaluations and (last or self.step % every == 0):
                    self._each(Session.test)
                # The others are saved without the runs that ended: after a kill they go on alone.
                due = bool(ended) or time.monotonic() - saved > pace.checkpoint_seconds
                if last or processes.agreed(due):
                    self._each(Session.save)
                    saved = time.monotonic()
                for session, diverged in ended:
                    session.finish(diverged)
        for session in self.sessions:
            session.finish()
            if diverged := session.outcome["diverged"]:
                say_diverged(session.task.name, diverged, progress)
        return True

    def _each(self, does: Callable[[Session], None]) -> None:
        for session in self.sessions:
            does(session)

    def _advance(self, progress: Progress) -> list[tuple[Session, dict[str, float]]]:
        """Makes one dispatch. Sessions that diverged leave the group and are returned."""
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
        ended = [
            (session, diverged)
            for session, state, values in zip(self.sessions, states, seen, strict=True)
            if (diverged := self._look(session, state, values, progress))
        ]
        left = [session for session, _ in ended]
        self.sessions = [session for session in self.sessions if session not in left]
        return ended

    def _look(
        self, session: Session, state: State, values: Values, progress: Progress
    ) -> dict[str, float] | None:
        """The one place that judges what updates saw; the update at which the run diverged."""
        name, first = session.task.name, session.step
        diverged = divergence(values, first, session.skipped)
        session.advanced(state, values, len(self.sessions))

        def seen(i: int) -> str:
            return numbers(of_update(values, first, i))

        for i in np.flatnonzero(values.get("skipped", 0)).tolist():
            progress.say(f"{name} skipped update {first + i}, which was not finite: {seen(i)}")
        collapsing = np.flatnonzero(values.get("collapsing", 0)).tolist()
        if collapsing and not session.collapsed:
            i, session.collapsed = collapsing[0], True
            cure = CURE if session.task.facts["config"].get("scale") is None else TURNED
            progress.say(f"warning: {name} is collapsing at update {first + i}: {seen(i)}\n{cure}")
        due = session.task.margin_from
        takes_part = values.get("share", np.ones(1)).mean() >= NO_PART
        if due is not None and due <= first and not takes_part and not session.idle:
            session.idle = True
            progress.say(f"warning: {name}: the margin takes no part: {seen(-1)}\n{IDLE}")
        if diverged:
            say_diverged(name, diverged, progress)
        return diverged


def say_diverged(name: str, diverged: dict[str, Any], progress: Progress) -> None:
    progress.say(f"{name} diverged at update {diverged['step']}: {numbers(diverged)}\n{ADVICE}")


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
    """The numbers of update i after ``first``."""
    seen = {name: float(value[i]) for name, value in values.items()}
    return {"step": first + i} | seen


TITLES = {
    "loss": "loss {:.4g}",
    "share": "margin {:.3%}",
    "feature_norm": "|features| {:.4g}",
    "kernel_norm": "|kernel| {:.4g}",
}


def numbers(seen: dict[str, Any]) -> str:
    """The numbers of an update in words; null stands for a number that is not finite."""
    known = {name: math.nan if value is None else value for name, value in seen.items()}
    return ", ".join(title.format(known[name]) for name, title in TITLES.items() if name in known)


def shown(values: Values, speed: float) -> str:
    """The numbers of some updates, for the progress bar."""
    words = [f"loss {values['loss'].mean():.3g}"]
    if "error" in values:
        words.append(f"{100 - values['error'].mean():.1f}% right")
    if "share" in values:
        words.append(f"margin {values['share'].mean():.0%}")
    return ", ".join([*words, f"{speed:.0f}/s"])


def finished(folder: Path, name: str) -> Outcome | None:
    """The result of a run that needs no more training; says so."""
    file = result_file(folder)
    if not file.exists():
        return None
    outcome = results.load_run(file, ("seconds", "curves"))
    print(f"{name} is {outcome['status']}; delete {file} and {folder} to train it again")
    return outcome


def common_steps(folders: Sequence[Path]) -> set[int]:
    """The steps that runs can continue at together.

    Runs without a checkpoint start at 0, together with others that have none or that of step 0.
    """
    found = [steps_in(folder / "checkpoints") for folder in folders]
    if all(found):
        return set.intersection(*found)
    return {0} if set.union(*found) <= {0} else set()


def common_step(folders: Sequence[Path]) -> int:
    """The latest of `common_steps`.

    Raises:
      ValueError: if there is none.
    """
    steps = common_steps(folders)
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
    """Makes the first Ctrl-C, SIGTERM or closing of the terminal a request to stop.

    The second ends at once. Later ones are ignored, so that what is being closed is closed. What
    began with nohup goes on when its terminal is closed.
    """
    asked = 0

    def ask(number: int, _: object) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            print("\nstopping after this dispatch", file=sys.stderr)
        if asked == 2:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    closed = getattr(signal, "SIGHUP", None)  # Windows has none
    if closed is not None and signal.getsignal(closed) is not signal.SIG_IGN:
        numbers.append(closed)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked > 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
