"""A cell of the paper's tables and figures: its place, the reported number, its configuration."""

from typing import Literal, NamedTuple

from experiments.paper.config import Config

Standing = Literal["confirmed", "recalled"]

LOSSES = ("hinge", "softmax", "m2", "m3", "m4")


class Cell(NamedTuple):
    """One number or curve of the paper.

    Attributes:
      where: the table or figure, and the column.
      reported: the paper's error in %; None where it is only drawn.
      standing: how sure we are of it: confirmed in a public source, or recalled.
      time: what the run takes, on which hardware; an aim is a target that nobody has measured.
      config: trains it.
    """

    where: str
    reported: float | None
    standing: Standing | None
    time: str
    config: Config

    @property
    def summary(self) -> str:
        """One line for a help text."""
        paper = "" if self.reported is None else f": paper {self.reported} % ({self.standing})"
        return f"{self.where}{paper}; time {self.time}"


def beyond(data: str, time: str, *configs: Config) -> list[Cell]:
    """Cells that are not in the paper: other margins on its data."""
    return [Cell(f"beyond the paper: {data}, {c.family}", None, None, time, c) for c in configs]


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

    def cells(self, time: str, *configs: Config) -> list[Cell]:
        """Its cells, trained by configurations in the order of `LOSSES`."""
        found = []
        for loss, error, config in zip(LOSSES, self.errors, configs, strict=True):
            standing: Standing = "confirmed" if loss in self.confirmed else "recalled"
            found.append(Cell(f"{self.where}, {loss}", error, standing, time, config))
        return found
