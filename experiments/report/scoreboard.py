"""``list``: every cell with the paper's number, ours, and what ran beside it."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from experiments.paper.cells import CELLS
from experiments.report.outcomes import Group, full_runs, grouped, load_outcomes
from experiments.report.tables import LFW, TRAIN_FACES, marked

LEGEND = (
    "r: recalled, no public source has the paper's number. The others stand in the authors' code "
    "and README, issue threads or reviews. ours: mean ± standard deviation of the last iterate's "
    "test error (number of seeds). changed run: the longest ones, not comparable with the paper. "
    "LFW's numbers are accuracies.\n"
    "A blank is filled by python -m experiments train CONFIGURATION, one of LFW by "
    f"python -m experiments {TRAIN_FACES.format('M')}."
)


def scoreboard(out: Path | None = None) -> None:
    """Prints every cell: the paper's number, ours, and the longest changed runs.

    Args:
      out: folder of the results. By default experiments/results, and runs, where train writes.
    """
    table = Table(title="the paper's cells, test error in %", box=SIMPLE_HEAD)
    for header in ("configuration", "paper", "ours"):
        table.add_column(header, no_wrap=True)
    table.add_column("changed run")
    for row in rows(grouped(load_outcomes(out).runs)):
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:  # in a pipe a row is one line, for grep
        console = Console(width=Console(width=1000).measure(table).maximum)
    console.print(table)
    console.print(LEGEND, highlight=False)


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table's rows: cells, each with its longest changed runs one below the other, then LFW."""
    found = []
    full = full_runs(groups)
    for name, cell in CELLS.items():
        changed = [group for group in groups if group.name == name and group.changes]
        longest = max((group.of("steps") for group in changed), default=0)
        beside = [
            ", ".join(filter(None, [group.entry, group.reduced_by()]))
            for group in changed
            if group.of("steps") == longest
        ]
        first, *others = beside or [""]
        paper = marked(cell.reported, cell.standing, " r")
        found.append([name, paper, full[name].error, first])
        found += [[name, "", "", other] for other in others]
    for loss, _, accuracy, standing in LFW:
        found.append([f"LFW, {loss}", marked(accuracy, standing, " r"), "", ""])
    return found
