"""Times a whole training step of the paper's networks: `python -m experiments bench step`.

Optax's softmax cross-entropy on the plain logits, our loss without a margin, with it, and with it
under the default rule for λ. The steps are compiled ahead of time, their first losses compared,
then timed in turn.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.table import Table

from experiments.benchmarks import hlo, rounds, tables
from experiments.benchmarks.records import OUT, heading, repeating, stamped
from experiments.benchmarks.rounds import TOLERANCE, Run, check, take_times
from experiments.paper.cells import CONFIGS
from experiments.paper.config import Config
from experiments.run.program import network_state
from experiments.store.progress import tracked
from experiments.store.results import save
from lsoftmax_jax import training

PLAIN, NO_MARGIN, MARGIN = "optax softmax", "m = 1", "margin"
DEFAULT = "margin, default λ"
WARM_UP = 2


def bench(
    configurations: tuple[str, ...] = ("mnist-m4", "cifar10-m4", "cifar100-m4"),
    batch: int | None = None,
    width: float = 1.0,
    repetitions: int = 20,
    out: Path = OUT,
) -> None:
    """Times training steps with a margin beside those of plain softmax.

    Args:
      configurations: names that `list` shows, with a margin. The images are random.
      batch: images a step, by default as the configuration says; take fewer on CPUs.
      width: multiplies every layer's filters and features.
      repetitions: timed rounds; fewer than 20 are for trying out.
      out: folder of the result.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1, got {repetitions}")
    if not configurations:
        raise ValueError("configurations must name at least one, got none")
    configs = [chosen(name, batch, width) for name in configurations]
    file = out / stamped(f"step-{jax.default_backend()}")
    command = repeating(
        "step", configurations=configurations, batch=batch, width=width, repetitions=repetitions
    )
    result = heading("bench step", command)
    measured: list[dict[str, Any]] = []
    for config in configs:
        runs = prepare(config)
        take_times(runs.values(), repetitions, config.name)
        measured.append(summary(config, runs))
        # Saved after each one: an interrupted benchmark keeps what it has.
        save(file, result | {"configurations": measured})
        tables.show(table(measured[-1]))
    print(f"{file} written")


def chosen(name: str, batch: int | None, width: float) -> Config:
    """The configuration of this name, which must have a margin."""
    if name not in CONFIGS:
        raise ValueError(
            f"configurations: there is no {name!r}; python -m experiments list prints them"
        )
    config = CONFIGS[name]
    if not config.has_margin:
        raise ValueError(f"configurations: {name} has no margin to compare softmax with")
    return replace(config, batch=config.batch if batch is None else batch, width=width)


def prepare(config: Config) -> dict[str, Run]:
    """Compiles the arms and compares their losses.

    Raises:
      ValueError: if an arm computes something else.
    """
    listed = [PLAIN, NO_MARGIN, MARGIN]
    if config.scale is None:  # with a scale the default is λ = 0, which MARGIN times
        listed.append(DEFAULT)
    shown = tracked(listed, len(listed), f"{config.name} compile", "arms")
    runs = {arm: prepare_arm(arm, config) for arm in shown}
    losses: dict[str, Any] = {arm: run.loss for arm, run in runs.items()}
    plain, margin = losses[PLAIN], losses[MARGIN]
    check(NO_MARGIN, "loss", losses[NO_MARGIN], plain, TOLERANCE["f32"])
    # With a scale all logits change. With the pace lead the margin takes no part at first.
    least = plain if config.scale is None and config.pace == "annealed" else 0
    if not margin > least:
        raise ValueError(f"a margin must make the loss larger than {least}, got {margin}")
    return runs


def prepare_arm(arm: str, config: Config) -> Run:
    """An arm's run; what its images show does not change the time."""
    if arm in (PLAIN, NO_MARGIN):
        config = config.without_margin()
    elif arm == DEFAULT:
        config = replace(config, pace="lead")
    rng, network = np.random.default_rng(0), config.built_network
    images = rng.standard_normal((config.batch, *network.image), np.float32)
    operands = jnp.asarray(images), jnp.asarray(rng.integers(config.classes, size=config.batch))
    loss = optax.softmax_cross_entropy_with_integer_labels if arm == PLAIN else None
    graphdef, create = network_state(config, network, config.classes)
    step = training.train_step(graphdef, config.optimizer, config.lam_policy, loss=loss)
    state: Any = create(config.seed)
    compiled = jax.jit(step, donate_argnums=0).lower(state, *operands).compile()

    def call() -> tuple[training.State, training.StepMetrics]:
        nonlocal state
        state, metrics = compiled(state, *operands)
        return state, metrics

    sums = call()[1].sums
    run = Run(call, hlo.facts(compiled, images.size), float(sums.loss / sums.examples))
    run.warm_up(WARM_UP)
    return run


def summary(config: Config, runs: dict[str, Run]) -> dict[str, Any]:
    """A configuration's part of the result; ratios are taken round by round."""
    return {
        "configuration": config.name,
        "batch": config.batch,
        "width": config.width,
        "arms": [{"arm": arm} | run.row(runs[PLAIN]) for arm, run in runs.items()],
    }


def table(entry: dict[str, Any]) -> Table:
    size = f"batch {entry['batch']}, width {entry['width']:g}"
    title = f"{entry['configuration']}, {size}; median (quartiles)"
    return rounds.table(title, entry["arms"], "MB: temporary memory")
