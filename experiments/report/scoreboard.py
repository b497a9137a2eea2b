"""``list``: every cell with the paper's number, ours, and the command that fills a blank."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.paper.cells import CELLS
from experiments.report.outcomes import RESULTS, Group, full_runs, grouped, load_outcomes
from experiments.report.tables import LFW, TRAIN_FACES

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
    width = Console(width=1000).measure(table).maximum
    console = Console(width=max(Console().width, width))
    console.print(table)
    console.print(LEGEND)


def rows(groups: Sequence[Group]) -> list[list[str]]:
    """The table's rows: cells, then LFW."""
    found = []
    full = full_runs(groups)
    longest = {group.name: group for group in groups if group.changes}  # the last of each name
    for name, cell in CELLS.items():
        paper = "" if cell.reported is None else f"{cell.reported:.2f} {cell.standing}"
        ours = full[name].error
        reduced = longest.get(name)
        beside = f"{reduced.error}: {reduced.reduced_by()}" if reduced else ""
        found.append([name, cell.where, paper, ours, beside, "" if ours else f"train {name}"])
    for loss, margin, accuracy, standing in LFW:
        paper = f"{accuracy:.2f} {standing}"
        found.append(["", f"LFW, {loss}", paper, "", "", TRAIN_FACES.format(margin)])
    return found
