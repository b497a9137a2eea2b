"""Progress of long work: a bar in a terminal, a line now and then anywhere else."""

import sys
import time
from datetime import timedelta

from tqdm import tqdm

LINE_SECONDS = 30.0


class Progress:
    """What is done of a total, with the time to go; a context manager.

    Args:
      name: of the work.
      total: how much there is.
      unit: of it, in the plural.
      done: by earlier sessions.
      shown: whether this process speaks at all.
    """

    def __init__(self, name: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self._name, self._total, self._unit, self._done = name, total, unit, done
        only_in_a_terminal = None if shown else True
        self._bar = tqdm(
            desc=name, total=total, initial=done, unit=f" {unit}", disable=only_in_a_terminal
        )
        self._lines = shown and self._bar.disable
        self._begun = self._said = done, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    @property
    def rate(self) -> float:
        """Units a second, lately."""
        if not self._bar.disable:
            return self._bar.format_dict["rate"] or 0.0
        base, since = self._said if self._said[0] < self._done else self._begun
        return (self._done - base) / max(time.monotonic() - since, 1e-9)

    def advance(self, count: int, text: str = "") -> None:
        """So much more is done; the text stands beside it."""
        self._done += count
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(count)
        if self._lines and time.monotonic() - self._said[1] >= LINE_SECONDS:
            left = timedelta(seconds=round((self._total - self._done) / max(self.rate, 1e-9)))
            described = f"{self._done:,} of {self._total:,} {self._unit}, {text}, {left} to go"
            print(f"{self._name}: {described.replace(', , ', ', ')}", file=sys.stderr, flush=True)
            self._said = self._done, time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own, on the standard output."""
        tqdm.write(text)
        sys.stdout.flush()
