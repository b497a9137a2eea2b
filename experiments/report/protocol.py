"""The reduced runs that two CPU cores carry, in their order; FINDINGS.md has the reasons."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

from experiments.paper.cells import CONFIGS, command_of
from experiments.report.outcomes import Group

WIDTH, BATCH = 0.25, 128
SAFE = {"pace": "self-paced"}
BEYOND = ("asoftmax", "cosface", "arcface")


class Wanted(NamedTuple):
    """Runs of one configuration with seeds from 0 on.

    Attributes:
      own: of this loss alone; a tuned λ or learning rate comes on top.
    """

    name: str
    seeds: int
    steps: int
    width: float = WIDTH
    own: Mapping[str, Any] = MappingProxyType({})

    @property
    def reduction(self) -> dict[str, Any]:
        changes = {"steps": self.steps, "batch": BATCH, "width": self.width}
        return {n: v for n, v in changes.items() if v != getattr(CONFIGS[self.name], n)}

    def command(self, seed: int) -> str:
        return command_of(replace(CONFIGS[self.name], **self.reduction, **self.own, seed=seed))

    def done(self, groups: Sequence[Group]) -> set[int]:
        """The seeds that finished, with whatever λ constants and learning rate."""
        pace = self.own.get("pace")
        return {
            outcome["seed"]
            for group in groups
            if group.name == self.name
            and group.reduction == self.reduction
            and group.own.get("pace") == pace
            for outcome in group.runs
        }


WANTED = (
    *(Wanted(f"mnist-{loss}", 3, 2_000) for loss in ("hinge", "softmax", "m2", "m3", "m4")),
    Wanted("mnist-m4", 3, 2_000, own=SAFE),
    *(Wanted(f"cifar10-{loss}", 3, 3_000) for loss in ("softmax", "m2")),
    Wanted("cifar10-m4", 3, 3_000, own=SAFE),
    Wanted("cifar10plus-softmax", 3, 3_000),
    Wanted("cifar10plus-m4", 3, 3_000, own=SAFE),
    # 12, 16, 24 and 32 filters.
    Wanted("fig7-32", 1, 1_500, width=0.375),
    *(Wanted(f"fig7-{filters}", 1, 1_500) for filters in (64, 96, 128)),
    *(Wanted(f"cifar100-{loss}", 1, 2_500) for loss in ("softmax", "m2")),
    Wanted("cifar100-m4", 1, 2_500, own=SAFE),
    *(Wanted(f"mnist-{loss}", 3, 2_000, own=SAFE) for loss in BEYOND),
    *(Wanted(f"cifar10-{loss}", 3, 3_000, own=SAFE) for loss in BEYOND),
)


def left(groups: Sequence[Group]) -> list[str]:
    """The commands of the runs that are missing, in the order of the protocol."""
    return [
        wanted.command(seed)
        for wanted in WANTED
        for seed in range(wanted.seeds)
        if seed not in wanted.done(groups)
    ]
