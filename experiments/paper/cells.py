"""Every cell by the name of its configuration, and how a run departs from the one of its name.

The softmax baseline and L-Softmax differ in the one field ``margin``; hinge has ``hinge`` set.
Recipe ``paper`` is Table 1 with batch 256 and its learning rates; where the authors' released
prototxts differ, the same cell exists as ``released-...``.
"""

import shlex
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import tyro

from experiments.paper import cifar10, cifar100, digits, mnist
from experiments.paper.cell import Cell
from experiments.paper.config import Config
from lsoftmax_jax.schedule import LambdaPreset

_ALL = (*mnist.CELLS, *cifar10.CELLS, *cifar100.CELLS, *digits.CELLS)

CELLS: dict[str, Cell] = {cell.config.name: cell for cell in _ALL}
CONFIGS: dict[str, Config] = {name: cell.config for name, cell in CELLS.items()}

# The type of a command's argument: the name of a configuration, then flags that change it.
if TYPE_CHECKING:
    Named = Config
else:
    Named = tyro.extras.subcommand_type_from_defaults(
        CONFIGS,
        {name: cell.summary for name, cell in CELLS.items()},
        prefix_names=False,
    )


def changes_of(config: Config) -> dict[str, Any]:
    """The fields in which a run departs from the configuration of its name; none for a seed."""
    named = CONFIGS[config.name]
    there = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "seed"}
    return {name: value for name, value in there.items() if value != getattr(named, name)}


def run_name(config: Config) -> str:
    """Folder and name of a run's files: configuration, changes, seed."""
    words = [_word(name, value) for name, value in changes_of(config).items() if name != "lam"]
    constants = zip(LambdaPreset._fields, config.lam, CONFIGS[config.name].lam, strict=True)
    words += [f"{constant}{value:g}" for constant, value, named in constants if value != named]
    return f"{config.name}/{'-'.join([*words, f'seed{config.seed}'])}"


def command_of(config: Config) -> str:
    """The command that makes a run again."""
    words = ["python -m experiments train", config.name, *flags_of(config)]
    return " ".join([*words, f"--seed {config.seed}"])


def flags_of(config: Config) -> list[str]:
    """The flags that change the configuration of a run's name, without its seed."""
    return [flag for change in changes_of(config).items() for flag in _flags(*change)]


def toy(config: Config) -> Config:
    """The smallest run that passes through everything, for trying a cell on a laptop."""
    return replace(config, steps=8, batch=16, width=1 / 16, examples=64)


def _word(name: str, value: Any) -> str:
    """A change in a file's name."""
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    if name == "pace":
        return str(value).replace("-", "_")
    if isinstance(value, tuple):
        value = "_".join(f"{v:g}" for v in value)
    return f"{name}{value}".replace("/", "_")


def _flags(name: str, value: Any) -> list[str]:
    if isinstance(value, LambdaPreset):
        return [f"--{name}.{constant} {v}" for constant, v in value._asdict().items()]
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    values = value if isinstance(value, tuple) else (value,)
    return [f"--{flag} {shlex.join(map(str, values))}"]
