"""``report``: the tables of results, every number from a result's file."""

from pathlib import Path

from experiments.report.outcomes import RESULTS, load_outcomes
from experiments.report.tables import tables
from experiments.store.files import read_text, replacing

README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- report: written by python -m experiments report -->"
END = "<!-- report: end -->"


def report(out: Path = RESULTS, readme: Path | None = None, check: bool = False) -> int:
    """Prints the tables of results, or writes them into the README that --readme names.

    Args:
      out: folder of the results; runs for those of train.
      readme: write the tables into this file, between its two markers, such as
        experiments/README.md.
      check: write nothing; exit with 1 if the tables in the README, by default
        experiments/README.md, are not those of the results.
    """
    found = tables(load_outcomes(out))
    if readme is None and not check:
        print(found)
        return 0
    readme = readme or README
    before = read_text(readme)
    after = updated(before, found)
    if before == after:
        print(f"{readme} is up to date")
        return 0
    if check:
        print(
            f"{readme} differs from the results in {out}; "
            f"python -m experiments report --out {out} --readme {readme} writes it"
        )
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
