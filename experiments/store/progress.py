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
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=name, unit=f" {unit}")
        self._lines = shown and self._bar is None
        self._said, self._said_at = done, time.monotonic()
        self._begun, self._begun_at = done, self._said_at

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def rate(self) -> float:
        """Units a second, lately."""
        if self._bar is not None:
            return self._bar.format_dict["rate"] or 0.0
        base, since = (self._said, self._said_at)
        if base == self._done:
            base, since = self._begun, self._begun_at
        return (self._done - base) / max(time.monotonic() - since, 1e-9)

    def advance(self, count: int, text: str = "") -> None:
        """So much more is done; the text stands beside it."""
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif self._lines and time.monotonic() - self._said_at >= LINE_SECONDS:
            left = timedelta(seconds=round((self._total - self._done) / max(self.rate, 1e-9)))
            described = f"{self._done:,} of {self._total:,} {self._unit}, {text}, {left} to go"
            print(f"{self._name}: {described.replace(', , ', ', ')}", file=sys.stderr, flush=True)
            self._said, self._said_at = self._done, time.monotonic()

    def say(self, text: str) -> None:
        """A line of its own, on the standard output."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
