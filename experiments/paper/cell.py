"""A cell of the paper's tables and figures: its place, the reported number, its configuration."""

from typing import Literal, NamedTuple

from experiments.paper.config import Config

Standing = Literal["confirmed", "recalled"]


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
