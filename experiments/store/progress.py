"""Progress of long work: a bar in a terminal, a line now and then anywhere else."""

import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

LINE_SECONDS = 30.0
# The columns of counts, time, text and a short bar; of 80 columns 10 are left for the name.
BESIDE_NAME = 70


class Progress:
    """How much of the work is done, with the time to go; a context manager.

    Args:
      name: of the work.
      total: how much there is to do.
      unit: of the work, in the plural.
      done: by earlier sessions.
      shown: whether this process speaks at all.
      leave: whether the bar stays in the terminal at the end.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        done: int = 0,
        shown: bool = True,
        leave: bool = True,
    ) -> None:
        self._name, self._total, self._unit, self._done = name, total, unit, done
        self._bar = tqdm(
            desc=shortened(name, max(shutil.get_terminal_size().columns - BESIDE_NAME, 8)),
            total=total,
            initial=done,
            leave=leave,
            dynamic_ncols=True,
            bar_format="{desc} {bar} {n_fmt}/{total_fmt} {remaining}{postfix}",
            disable=None if shown else True,  # None: shown in a terminal alone
        )
        self._lines = shown and self._bar.disable
        self._begun: tuple[int, float] | None = None
        self._said = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.close()

    @property
    def rate(self) -> float:
        """Units a second since the first call of `advance`, before which a run compiles."""
        if self._begun is None:
            return 0.0
        done, since = self._begun
        return (self._done - done) / max(time.monotonic() - since, 1e-9)

    def advance(self, count: int, text: str = "") -> None:
        """Advances by `count` and shows `text`. A terminal that is gone does not end the work."""
        self._done += count
        now = time.monotonic()
        self._begun = self._begun or (self._done, now)
        with suppress(OSError):
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
            if self._lines and now - self._said >= LINE_SECONDS:
                counts, left = f"{self._done:,} of {self._total:,} {self._unit}", ""
                if self.rate > 0:
                    left = f"{hours((self._total - self._done) / self.rate)} to go"
                said = ", ".join(filter(None, (counts, text, left)))
                print(f"{self._name}: {said}", file=sys.stderr, flush=True)
                self._said = now

    def say(self, text: str) -> None:
        """A line of its own, on the standard output; as `advance`, it does not end the work."""
        with suppress(OSError):
            tqdm.write(text)
            sys.stdout.flush()


def tracked(items: Iterable[T], total: int, name: str, unit: str) -> Iterator[T]:
    """The items, with their progress; a bar goes when the last item is done."""
    with Progress(name, total, unit, leave=False) as progress:
        for item in items:
            yield item
            progress.advance(1)


def hours(seconds: float) -> str:
    """Hours, minutes and seconds, as 49:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def shortened(name: str, width: int) -> str:
    """A name of at most so many characters, without its middle if need be."""
    if len(name) <= width:
        return name
    return f"{name[: width // 2]}…{name[width // 2 + 1 - width :]}"
