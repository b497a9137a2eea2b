"""``list``: every cell with the paper's number, ours, and the command that fills a blank."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.paper.cells import CELLS
from experiments.report.outcomes import (
    RESULTS,
    Group,
    counted,
    errors,
    grouped,
    load_outcomes,
    words,
)
from experiments.report.tables import LFW

LEGEND = """\
confirmed: the paper's number stands in a public source, the authors' code and README, issue
threads or reviews; recalled: its text was not at hand, and no such source has the number.
ours: mean ± standard deviation of the last iterate's test error (number of seeds); beside it the
longest reduced run, which is not comparable with the paper. LFW's numbers are accuracies.
Every command goes after python -m experiments; CONFIGURATION --help of train shows its fields."""


def scoreboard(out: Path = RESULTS) -> None:
    """Prints every cell: the paper's number, ours, and the command that fills a blank.

    Args:
      out: folder of the results.
    """
    table = Table(title="the paper's cells, test error in %")
    for header in ("configuration", "cell", "paper", "ours", "reduced run", "a blank's command"):
        table.add_column(header, no_wrap=True)
    for row in rows(grouped(load_outcomes(out).runs)):
        table.add_row(*row)
    # In a pipe a console takes itself for 80 characters wide, and would break lines.
    unlimited = Console(width=1000)
    width = unlimited.measure(table).maximum
    console = Console(width=max(Console().width, width))
    console.print(table)
    console.print(LEGEND)


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table's rows: cells, then LFW."""
    found = []
    for name, cell in CELLS.items():
        here = [group for group in groups if group.name == name]
        full = [group for group in here if not group.changes]
        reduced = [group for group in here if group.changes]
        paper = "" if cell.reported is None else f"{cell.reported:.2f} {cell.standing}"
        ours = counted(errors(full[0].runs, "test")) if full else ""
        command = "" if full else f"train {name}"
        found.append([name, cell.where, paper, ours, _longest(reduced), command])
    for loss, (accuracy, standing) in LFW.items():
        margin = 1 if loss == "softmax" else int(loss[1:])
        command = f"train-faces --faces FACES --margin {margin} --out RUN"
        found.append(["", f"LFW, {loss}", f"{accuracy:.2f} {standing}", "", "", command])
    return found


def _longest(groups: Sequence[Group]) -> str:
    """The error of the reduced runs with the most updates, and how they are reduced."""
    if not groups:
        return ""
    group = groups[-1]
    return f"{counted(errors(group.runs, 'test'))}: {words(group.reduction)}"
