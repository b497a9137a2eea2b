"""One named configuration for every cell of the paper's tables and figures: the lab notebook.

A configuration holds everything that decides a run's numbers and nothing else. The softmax baseline
and L-Softmax differ in the one field ``margin``; hinge has ``hinge`` set instead. Recipe ``paper``
is Table 1 with batch 256 and its learning rates; where the authors' released prototxts differ, the
same cell exists as ``released-...``. ``python -m experiments list`` prints them all.

What the paper leaves open is our choice in ``paper``: pooling rounds down; λ as released for the
same data set (CIFAR100: CIFAR10+'s with minimum 5); no augmentation on CIFAR100; the training
images' mean image is what is subtracted; Fig. 2's learning rate is 0.01.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import tyro
from tyro.conf import Suppress

from experiments.paper.data import CLASSES
from experiments.paper.networks import NETWORKS, Network
from lsoftmax_jax.schedule import CIFAR10, CIFAR10_PLUS, MNIST, LambdaPreset

Standing = Literal["confirmed", "recalled"]
Loss = Literal["hinge", "softmax", "m2", "m3", "m4"]
LOSSES: tuple[Loss, ...] = get_args(Loss)


@dataclass(frozen=True)
class Config:
    """One training run.

    ``drops`` and ``lam`` are written for the configuration's own number of steps. A run of other
    ``steps`` stretches both: the learning rate drops at the same fractions of the run, and λ falls
    through the same values.
    """

    name: Suppress[str]
    cell: Suppress[str]
    """The table or figure it belongs to."""
    reported: Suppress[float | None]
    """The paper's error in %."""
    standing: Suppress[Standing | None]
    """How sure we are of that number: confirmed in a public source, or recalled."""
    time: Suppress[str]
    """What the run takes, on which hardware."""

    dataset: Suppress[str]
    network: Suppress[str]
    """A row of models.NETWORKS."""
    hinge: Suppress[bool] = False
    """Multiclass hinge loss in place of the large-margin softmax."""

    seed: int = 0
    """Draws weights, shuffles and augmentation; another seed is the same recipe."""
    margin: int = 1
    """m of the L-Softmax; 1 is the ordinary softmax."""
    lam: LambdaPreset = LambdaPreset(0, 0, 0)
    """λ at update t is max(minimum, base (1 + gamma t)^-power); base 0 is no annealing."""
    steps: int = 18_000
    """Updates."""
    batch: int = 256
    """Images an update sees, on all devices together."""
    width: float = 1.0
    """Multiplies every layer's filters and features."""
    dtype: Literal["f32", "bf16"] = "f32"
    """Of the activations; parameters, batch statistics and head are always float32."""

    learning_rate: float = 0.1
    drops: tuple[int, ...] = (12_000, 15_000)
    """Updates after which the learning rate is divided by ten."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On kernels, the head's included; never on biases, batch normalisation or PReLU slopes."""
    bias_rate: float = 1.0
    """Multiplies the learning rate of biases."""

    mean: float | None = None
    """Subtracted from the images; by default the training images' mean image."""
    crop: int = 0
    """Pad by so many pixels, cut the old size out at random."""
    mirror: bool = False
    """Mirror half of the images."""
    examples: int | None = None
    """Use only the first so many images of each split."""
    validation: bool = False
    """Hold the last 5,000 training images out, or a tenth where that is less; test on those."""
    init: str | None = None
    """Start from the weights of this run, such as mnist-softmax-seed0 in the same --out."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "margin"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.width <= 0:
            raise ValueError(f"width must be > 0, got {self.width}")
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples must be >= 1, got {self.examples}")

    @property
    def classes(self) -> int:
        return CLASSES[self.dataset]

    @property
    def built_network(self) -> Network:
        """The network at this run's width."""
        return NETWORKS[self.network].scaled(self.width)

    @property
    def summary(self) -> str:
        """One line for a help text."""
        paper = "" if self.reported is None else f": paper {self.reported} % ({self.standing})"
        return f"{self.cell}{paper}; time {self.time}"

    @property
    def changes(self) -> dict[str, Any]:
        """The fields in which this run departs from the configuration of its name."""
        named = CONFIGS[self.name]
        names = [field.name for field in fields(self) if field.name != "seed"]
        return {n: getattr(self, n) for n in names if getattr(self, n) != getattr(named, n)}

    @property
    def reduced(self) -> bool:
        """Whether this run is another than its name stands for."""
        return bool(self.changes)

    @property
    def stretch(self) -> float:
        """This run's steps over those that ``drops`` and ``lam`` are written for."""
        return self.steps / CONFIGS[self.name].steps

    @property
    def stretched_drops(self) -> tuple[int, ...]:
        return tuple(round(drop * self.stretch) for drop in self.drops)

    @property
    def stretched_lam(self) -> LambdaPreset:
        return self.lam._replace(gamma=self.lam.gamma / self.stretch)

    @property
    def run_name(self) -> str:
        """Names the run's files: configuration, changes, seed."""
        changes = [f"{name}{_short(value)}" for name, value in self.changes.items()]
        return "-".join([self.name, *changes, f"seed{self.seed}"])

    @property
    def command(self) -> str:
        """The command that makes this run again."""
        words = ["python -m experiments train", self.name]
        for name, value in self.changes.items():
            words += _flags(name, value)
        return " ".join([*words, f"--seed {self.seed}"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"lam": self.lam._asdict(), "drops": list(self.drops)}

    @staticmethod
    def from_json(saved: dict[str, Any]) -> "Config":
        lam, drops = LambdaPreset(**saved["lam"]), tuple(saved["drops"])
        return Config(**(saved | {"lam": lam, "drops": drops}))


def _short(value: Any) -> str:
    return "_".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def _flags(name: str, value: Any) -> list[str]:
    if isinstance(value, LambdaPreset):
        return [f"--{name}.{constant} {v}" for constant, v in value._asdict().items()]
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"]


def toy(config: Config) -> Config:
    """The smallest run that passes through everything, for trying a cell on a laptop."""
    return replace(config, steps=8, batch=16, width=1 / 16, examples=64)


_C: Standing = "confirmed"
_R: Standing = "recalled"
# What the paper reports, error in %, in the order of LOSSES.
_REPORTED: dict[str, tuple[tuple[float, Standing], ...]] = {
    "mnist": ((0.47, _R), (0.40, _C), (0.32, _C), (0.31, _C), (0.31, _C)),
    "cifar10": ((9.91, _R), (9.05, _R), (7.73, _C), (7.66, _R), (7.58, _C)),
    "cifar10plus": ((6.96, _R), (6.50, _R), (6.01, _R), (5.94, _R), (5.92, _R)),
    "cifar100": ((32.90, _R), (32.74, _R), (29.95, _R), (29.87, _R), (29.53, _C)),
}
_CELLS = {
    "mnist": "Table 2, MNIST",
    "cifar10": "Table 3, CIFAR10",
    "cifar10plus": "Table 3, CIFAR10+",
    "cifar100": "Table 4, CIFAR100",
}
# Aims; none has been measured.
_TIMES = {
    "mnist": "aim: 1.5 min, H200",
    "cifar10": "aim: 4 min, H200",
    "cifar10plus": "aim: 4 min, H200",
    "cifar100": "aim: 6 min, H200",
}

_PAPER: dict[str, dict[str, Any]] = {
    "mnist": {"dataset": "mnist", "network": "mnist", "lam": MNIST},
    "cifar10": {"dataset": "cifar10", "network": "cifar10", "lam": CIFAR10},
    "cifar10plus": {
        "dataset": "cifar10",
        "network": "cifar10",
        "lam": CIFAR10_PLUS,
        "crop": 4,
        "mirror": True,
    },
    "cifar100": {
        "dataset": "cifar100",
        "network": "cifar100",
        "lam": CIFAR10_PLUS._replace(minimum=5.0),
    },
}
_RELEASED: dict[str, dict[str, Any]] = {
    "mnist": {"network": "released-mnist", "drops": (5_000, 7_500, 10_000), "mean": 127.5},
    "cifar10": {"network": "released-cifar10", "drops": (5_000, 7_500), "mirror": True},
    "cifar10plus": {"network": "released-cifar10", "drops": (8_000, 12_000)},
}
_LOSS_FIELDS: dict[Loss, dict[str, Any]] = {
    "hinge": {"hinge": True},
    "softmax": {"margin": 1},
    "m2": {"margin": 2},
    "m3": {"margin": 3},
    "m4": {"margin": 4},
}


def _table_cells() -> list[Config]:
    released = {
        data: _PAPER[data] | {"batch": 128, "steps": 30_000, "bias_rate": 2.0} | options
        for data, options in _RELEASED.items()
    }
    configs = []
    for prefix, recipe in (("", _PAPER), ("released-", released)):
        for data, options in recipe.items():
            for loss, (error, standing) in zip(LOSSES, _REPORTED[data], strict=True):
                configs.append(
                    Config(
                        name=f"{prefix}{data}-{loss}",
                        cell=f"{_CELLS[data]}, {loss}",
                        reported=error,
                        standing=standing,
                        time="not measured" if prefix else _TIMES[data],
                        **(options | _LOSS_FIELDS[loss]),
                    )
                )
    return configs


def _figure_cells() -> list[Config]:
    # Fig. 2 prints each panel's test accuracy: 98.45, 98.96, 99.22, 99.34. Its network has nothing
    # behind the linear layer that holds the features' length; at 0.1 it diverges within 20 updates,
    # without a margin too.
    planes = [
        Config(
            name=f"fig2-m{margin}",
            cell=f"Fig. 2, m = {margin}",
            reported=error,
            standing=_C,
            time="not measured",
            **(_PAPER["mnist"] | {"network": "mnist-2d", "margin": margin, "learning_rate": 0.01}),
        )
        for margin, error in ((1, 1.55), (2, 1.04), (3, 0.78), (4, 0.66))
    ]
    widths = [
        Config(
            name=f"fig7-{filters}",
            cell=f"Fig. 7, {filters} filters",
            reported=None,
            standing=None,
            time="not measured",
            **(_PAPER["cifar10plus"] | {"network": f"fig7-{filters}", "margin": 4}),
        )
        for filters in (32, 64, 96, 128)
    ]
    return planes + widths


def _first_run() -> list[Config]:
    softmax = Config(
        name="digits-softmax",
        cell="quickstart",
        reported=None,
        standing=None,
        time="30 s, two CPU cores",
        dataset="digits",
        network="digits-2d",
        lam=LambdaPreset(base=1000.0, gamma=0.005, power=8.0),
        steps=500,
        batch=128,
        learning_rate=0.02,
        drops=(350, 430),
        weight_decay=0.02,
    )
    return [softmax, replace(softmax, name="digits-m4", margin=4)]


CONFIGS: dict[str, Config] = {
    config.name: config for config in [*_table_cells(), *_figure_cells(), *_first_run()]
}

# The type of a command's argument: the name of a configuration, then flags that change it.
if TYPE_CHECKING:
    Named = Config
else:
    Named = tyro.extras.subcommand_type_from_defaults(
        CONFIGS,
        {name: config.summary for name, config in CONFIGS.items()},
        prefix_names=False,
    )
