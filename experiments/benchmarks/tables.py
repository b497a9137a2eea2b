"""Tables for people, and the numbers in them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table


def table(
    title: str, left: Sequence[str], right: Sequence[str] = (), *last: str, caption: str = ""
) -> Table:
    """An empty table: columns of words, columns of numbers, more columns of words."""
    numbers = (Column(header, justify="right", no_wrap=True) for header in right)
    first = Column(left[0], no_wrap=True)
    return Table(first, *left[1:], *numbers, *last, title=title, caption=caption or None)


def show(view: Table, width: int = 100) -> None:
    """Prints a table at least so wide: piped, a console takes itself for 80 characters wide."""
    Console(width=max(Console().width, width)).print(view)


def markdown(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], numbers: int | None = None
) -> str:
    """A table whose last so many columns, by default all but the first, are aligned right."""
    numbers = len(headers) - 1 if numbers is None else numbers
    rules = ["---"] * (len(headers) - numbers) + ["--:"] * numbers
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (headers, rules, *rows))


def amount(value: float, unit: str = "B") -> str:
    """1234567 bytes as "1.235 MB"."""
    power = min(int(math.log10(value) // 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"


def spread(values: list[float]) -> str:
    """A median and its quartiles."""
    median, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values)
    return f"{median} ({low} to {high})"
