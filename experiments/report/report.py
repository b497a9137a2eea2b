"""``report``: the tables of results, every number from a result's file.

The READMEs have the matrices, and docs/runs.md has the runs one by one.
"""

import re
from pathlib import Path

from experiments.report import front
from experiments.report.outcomes import RESULTS, grouped, load_outcomes
from experiments.report.tables import CHANGED, FULL, tables
from experiments.store.files import read_text, replacing

README = Path(__file__).parents[1] / "README.md"
FRONT = Path(__file__).parents[2] / "README.md"
BEGIN = "<!-- report: written by python -m experiments report -->"
END = "<!-- report: end -->"
# The clone's README has several tables: each marker there names one.
PARTS = re.compile(
    r"(<!-- report(?:, (?P<name>\w+))?: written by python -m experiments report -->)"
    rf".*?{re.escape(END)}",
    re.DOTALL,
)


def report(out: Path | None = None, readme: Path | None = None, check: bool = False) -> int:
    """Prints all tables of results, or writes the tables of a README into it.

    Args:
      out: folder of the results. By default experiments/results, and to print also runs, where
        train writes.
      readme: write the tables into this file, between its markers: README.md or
        experiments/README.md.
      check: write nothing; exit with 1 if the tables in the README, by default in both, are not
        those of the results.
    """
    if readme is None and not check:
        print(tables(load_outcomes(out)))
        return 0
    out, code = out or RESULTS, 0
    outcomes = load_outcomes(out)
    found = {"": tables(outcomes, FULL, CHANGED)} | front.tables(
        out / "bench", grouped(outcomes.runs)
    )
    for page in [README, FRONT] if readme is None else [readme]:
        before = read_text(page)
        after = updated(before, found)
        if before == after:
            print(f"{page} is up to date")
        elif check:
            print(
                f"{page} differs from the results in {out}; "
                f"python -m experiments report --out {out} --readme {page} writes it"
            )
            code = 1
        else:
            with replacing(page) as file:
                file.write(after.encode())
            print(f"{page} written")
    return code


def updated(text: str, found: dict[str, str]) -> str:
    """The text with other tables between its markers.

    Raises:
      ValueError: if it has no markers, or one of a table that is not there.
    """

    def written(part: re.Match[str]) -> str:
        name = part["name"] or ""
        if name not in found:
            raise ValueError(f"the README has a marker of no table, {name!r}")
        between = "\n" if name else "\n\n"
        return between.join(filter(None, [part[1], found[name], END]))

    changed, count = PARTS.subn(written, text)
    if count == 0:
        raise ValueError(f"the README must hold the lines {BEGIN} and {END}")
    return changed
