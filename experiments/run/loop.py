"""The one training loop: every run, whatever its batches come from, advances through `train`.

Files of a run: ``RUN.json`` is its result, ``RUN/`` holds its last checkpoint, ``metrics.jsonl``,
TensorBoard events and its claim, which says what it trains. A run stopped at any point, even by
SIGKILL, continues from its checkpoint. On the same devices it ends in the bits of an unbroken run:
batches, λ and learning rate go by the step, and a checkpoint falls between the same dispatches.
(Seen on CPUs; a GPU's sums may come in another order unless XLA_FLAGS has
--xla_gpu_deterministic_ops=true.)
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.run.session import Session, Task, Values, result_file
from experiments.store import processes, results
from experiments.store.progress import Progress

Outcome = dict[str, Any]
Stop = Callable[[], bool]

INTERRUPTED = 130
RUNS = Path("runs")


class Place(NamedTuple):
    """Where runs train.

    Attributes:
      data: folder of NAME.npz or of TFDS; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      out: folder of the results.
      devices: how many to train on, the first ones; by default all.
      checkpoint_seconds: seconds between two checkpoints.
    """

    data: Path | None = None
    out: Path = RUNS
    devices: int | None = None
    checkpoint_seconds: float = 60.0


HERE = Place()

# A run ends after this many updates without a finite loss and gradient.
SKIPPED_LIMIT = 3

# No network here starts near this mean loss: a larger loss means that the run blew up.
BLOWN_UP = 1e4

ADVICE = """\
What to try, in this order: a higher λ (annealed: a larger --lam.base, a smaller --lam.gamma, or
--lam.minimum 5; with --pace lead: --strength 0.4); a start from the softmax run of the same data
(--init RUN); a smaller --learning-rate."""


CURE = """\
The margin shrinks the features to nothing, all classes alike. A higher λ is the cure: --pace
lead, which finds it, or, where λ is annealed, a floor under it (--lam.minimum 5)."""

TURNED = """\
The features turn away from the columns of their labels, where the margin hardly pulls. Let λ find
itself (--pace lead), or begin with the network of a softmax run (--init, --init-from)."""

# The margin takes no part in an update in which its share is below this one.
NO_PART = 0.01

IDLE = """\
So far this run trains the ordinary softmax: few images lead, so fit them first with more updates
(--steps); or try --strength 1, --pace schedule, or a smaller --margin."""


def train(
    task: Task, stop: Stop, *, dispatch: int, evaluations: int, checkpoint_seconds: float
) -> Outcome | None:
    """Trains a run to its end and writes its result; None if it was stopped.

    Args:
      task: what to train.
      stop: asked before every dispatch; when true, the run saves a checkpoint and ends.
      dispatch: updates in a dispatch.
      evaluations: points of the test curve; 0 for none.
      checkpoint_seconds: between two checkpoints.
    """
    if not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint-seconds must be >= 0, got {checkpoint_seconds}")
    processes.check_same(str(task.settings), "settings")
    steps = task.steps
    every = dispatch * -(-steps // (dispatch * max(evaluations, 1)))
    with ExitStack() as running:
        session, saved = Session(task, running), time.monotonic()
        shown_here = processes.is_first()
        with Progress(task.name, steps, "updates", session.step, shown_here) as progress:
            if session.step:
                progress.say(f"{task.name} continues at update {session.step}")
            while session.step < steps:
                if processes.agreed(stop()):
                    session.save()
                    at = session.step
                    progress.say(f"stopped at update {at}; the same command continues there")
                    return None
                first, before = session.step, session.skipped
                length = min(dispatch - first % dispatch, steps - first)
                values = session.advance(length)
                progress.advance(length, shown(values, task.batch * progress.rate))
                warn(session, values, first, progress)
                if diverged := divergence(values, first, before):
                    say_diverged(task.name, diverged, progress)
                    return session.finish(diverged)
                last = session.step == steps
                if evaluations and (last or session.step % every == 0):
                    session.test()
                due = last or time.monotonic() - saved > checkpoint_seconds
                if processes.agreed(due):
                    session.save()
                    saved = time.monotonic()
        outcome = session.finish()
        if outcome["diverged"]:
            say_diverged(task.name, outcome["diverged"], progress)
        return outcome


def warn(session: Session, values: Values, first: int, progress: Progress) -> None:
    """Names what is wrong in the updates from number ``first`` on: skipped, collapsing, idle."""
    name = session.task.name

    def seen(i: int) -> str:
        return numbers(of_update(values, first, i))

    for i in np.flatnonzero(values["skipped"]).tolist():
        progress.say(f"{name} skipped update {first + i}, which was not finite: {seen(i)}")
    collapsing = np.flatnonzero(values["collapsing"]).tolist()
    if collapsing and not session.collapsed:
        i, session.collapsed = collapsing[0], True
        cure = CURE if session.task.facts["config"].get("scale") is None else TURNED
        progress.say(f"warning: {name} is collapsing at update {first + i}: {seen(i)}\n{cure}")
    due = session.task.margin_from
    takes_part = values["share"].mean() >= NO_PART
    if due is not None and due <= first and not takes_part and not session.idle:
        session.idle = True
        progress.say(f"warning: {name}: the margin takes no part: {seen(-1)}\n{IDLE}")


def say_diverged(name: str, diverged: dict[str, Any], progress: Progress) -> None:
    progress.say(f"{name} diverged at update {diverged['step']}: {numbers(diverged)}\n{ADVICE}")


def divergence(values: Values, first: int, skipped: int) -> dict[str, float] | None:
    """The update, from number ``first`` on, that ends the run; ``skipped`` ones came before.

    It is one with a huge loss, or the last of `SKIPPED_LIMIT` skipped ones.
    """
    loss, wrong = values["loss"], values["skipped"] > 0
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
    loss, right, share = (values[name].mean() for name in ("loss", "error", "share"))
    return f"loss {loss:.3g}, {100 - right:.1f}% right, margin {share:.0%}, {speed:.0f}/s"


def finished(folder: Path, name: str) -> Outcome | None:
    """The result of a run that needs no more training; says so."""
    file = result_file(folder)
    if not file.exists():
        return None
    outcome = results.load_run(file, ("seconds", "curves"))
    print(f"{name} is {outcome['status']}; delete {file} and {folder} to train it again")
    return outcome


def budget(minutes: float) -> Stop:
    """Whether so many minutes from now are over."""
    if not minutes >= 0:
        raise ValueError(f"budget-minutes must be >= 0, got {minutes}")
    end = time.monotonic() + 60 * minutes
    return lambda: time.monotonic() >= end


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
