"""A cell of the paper's tables and figures: its place, the reported number, its configuration."""

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from experiments.paper.config import Config

Standing = Literal["confirmed", "recalled"]

# The fields in which a loss's configuration differs from softmax's.
LOSSES: dict[str, dict[str, Any]] = {
    "hinge": {"hinge": True},
    "softmax": {},
    "m2": {"margin": 2},
    "m3": {"margin": 3},
    "m4": {"margin": 4},
}
BEYOND: dict[str, dict[str, Any]] = {
    "asoftmax": {"family": "a-softmax", "margin": 4},
    "cosface": {"family": "cosface", "margin": 0.35, "scale": 8.0, "pace": "none"},
    "arcface": {"family": "arcface", "margin": 0.5, "scale": 8.0, "pace": "none"},
}


class Cell(NamedTuple):
    """One number or curve of the paper.

    Attributes:
      where: the table or figure, and the column.
      time: what the run takes, on which hardware; an aim is a target that nobody has measured.
      config: trains it.
      reported: the paper's error in %; None where it is only drawn, or not in the paper.
      standing: how sure we are of it: confirmed in a public source, or recalled.
    """

    where: str
    time: str
    config: Config
    reported: float | None = None
    standing: Standing | None = None

    @property
    def summary(self) -> str:
        """One line for a help text."""
        paper = "" if self.reported is None else f": paper {self.reported} % ({self.standing})"
        return f"{self.where}{paper}; time {self.time}"


class Column(NamedTuple):
    """A data set in the paper's tables.

    Attributes:
      where: the table and the data set.
      errors: the paper's, in the order of `LOSSES`.
      confirmed: the losses whose error is confirmed; the others are recalled.
    """

    where: str
    errors: tuple[float, ...]
    confirmed: tuple[str, ...]

    def cells(self, time: str, base: Config) -> list[Cell]:
        """The row of five losses; the base is softmax's, named DATA-softmax."""
        found = []
        for (loss, changes), error in zip(LOSSES.items(), self.errors, strict=True):
            standing: Standing = "confirmed" if loss in self.confirmed else "recalled"
            config = _of_loss(base, loss, changes)
            found.append(Cell(f"{self.where}, {loss}", time, config, error, standing))
        return found


def beyond(where: str, time: str, base: Config) -> list[Cell]:
    """Cells that are not in the paper: other margins on its data."""
    return [
        Cell(f"beyond the paper: {where}, {loss}", time, _of_loss(base, loss, changes))
        for loss, changes in BEYOND.items()
    ]


def _of_loss(base: Config, loss: str, changes: dict[str, Any]) -> Config:
    return replace(base, name=f"{base.name.removesuffix('-softmax')}-{loss}", **changes)
