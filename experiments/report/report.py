"""``report``: the tables of results in experiments/README.md, every number from a result's file."""

from pathlib import Path

from experiments.report.outcomes import RESULTS, load_outcomes
from experiments.report.tables import tables
from experiments.store.files import replacing

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- report: written by python -m experiments report -->"
END = "<!-- report: end -->"


def report(out: Path = RESULTS, readme: Path = README, check: bool = False) -> int:
    """Writes the tables of results into a README, between its two markers.

    Args:
      out: folder of the results.
      readme: the file.
      check: write nothing; exit with 1 if the tables are not those of the results.
    """
    before = readme.read_text()
    after = updated(before, tables(load_outcomes(out)))
    if before == after:
        print(f"{readme} is up to date")
        return 0
    if check:
        print(f"{readme} differs from the results in {out}; python -m experiments report writes it")
        return 1
    with replacing(readme) as file:
        file.write(after.encode())
    print(f"{readme} written")
    return 0


def updated(text: str, tables: str) -> str:
    """The text with other tables between its markers.

    Raises:
      ValueError: if it has no such markers.
    """
    start, end = text.find(BEGIN), text.find(END)
    if not 0 <= start < end:
        raise ValueError(f"the README must hold the lines {BEGIN} and {END}")
    return f"{text[:start]}{BEGIN}\n\n{tables}\n\n{text[end:]}"
