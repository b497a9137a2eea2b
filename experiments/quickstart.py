"""The first run: softmax beside L-Softmax on scikit-learn's digits, a table and a picture.

Both train the same small network, whose feature has two numbers, on 1,297 real scans that come with
scikit-learn, and are tested on 500 others; they differ in the margin alone.
"""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from rich.console import Console

from experiments.paper.cells import CONFIGS
from experiments.paper.measures import table
from experiments.report.features import features_figure
from experiments.report.style import STYLE, write
from experiments.run import loop, train

OUT = Path(__file__).parent.parent / "quickstart"
RUNS = {"softmax": CONFIGS["digits-softmax"], "L-Softmax, m = 4": CONFIGS["digits-m4"]}


def run(out: Path = OUT, stop: loop.Stop = lambda: False) -> int:
    """Trains both, or what is left of them; prints the table, draws the picture.

    Returns:
      the exit code: 0, or why there is no picture.
    """
    outcomes = {}
    for title, config in RUNS.items():
        outcome = train.run(config, out=out, stop=stop)
        if outcome is None or outcome["status"] != "finished":
            return loop.exit_code(outcome)
        outcomes[title] = outcome["test"]
    picture = draw(outcomes, out / "features.png")
    console = Console()
    count = f"{next(iter(outcomes.values()))['count']:,} test digits"
    console.print(table("The same network with two losses", outcomes, count, ".2f"))
    console.print(f"picture: {picture}", soft_wrap=True)
    return 0


@rc_context(STYLE)
def draw(outcomes: dict[str, dict[str, Any]], file: Path) -> Path:
    """Writes the picture as PNG."""
    write(features_figure(outcomes), file)
    return file
