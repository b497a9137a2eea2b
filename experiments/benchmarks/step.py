"""Times a whole training step of the paper's networks: `python -m experiments bench step`.

Three arms: Optax's softmax cross-entropy on the plain logits, our loss without a margin, our loss
with it. They are compiled ahead of time, their first losses compared, then timed in turn, in a new
random order each round.
"""

import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments.benchmarks.head import OUT, TOLERANCE, check, median, quartiles, spread
from experiments.paper import networks as models
from experiments.paper.cells import CONFIGS
from experiments.paper.config import Config
from experiments.store.results import provenance, save
from lsoftmax_jax import annealed_lambda, training

PLAIN, NO_MARGIN, MARGIN = "optax softmax", "m = 1", "margin"
# Of a step's time and temporary memory with the margin, to those of plain softmax.
LIMIT = 1.02
WARM_UP = 2


class Run(NamedTuple):
    """A compiled step, and the state it starts from."""

    arm: str
    compiled: Compiled
    state: training.State
    loss: float  # of the first update
    temporary_bytes: int


def bench(
    configurations: tuple[str, ...] = ("mnist-m4", "cifar10-m4", "cifar100-m4"),
    batch: int | None = None,
    width: float = 1.0,
    repetitions: int = 20,
    out: Path = OUT,
) -> None:
    """Times training steps with a margin against those of plain softmax.

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
    begun, console = datetime.now(UTC), Console(width=max(Console().width, 100))
    file = out / f"step-{jax.default_backend()}-{begun:%Y%m%d-%H%M}.json"
    command = f"python -m experiments bench step --configurations {' '.join(configurations)}"
    flags = "" if batch is None else f" --batch {batch}"
    result = {
        "kind": "bench step",
        "date": begun.isoformat(timespec="seconds"),
        "command": f"{command}{flags} --width {width} --repetitions {repetitions}",
        **provenance(1),
    }
    measured: list[dict[str, Any]] = []
    for config in configs:
        runs = prepare(config)
        seconds = take_times(config, runs, repetitions)
        measured.append(summary(config, runs, seconds))
        # Appended one by one: an interrupted benchmark keeps what it has.
        save(file, result | {"configurations": measured})
        console.print(table(measured[-1]))
    print(f"{file} written")


def chosen(name: str, batch: int | None, width: float) -> Config:
    """The configuration of this name, which must have a margin."""
    if name not in CONFIGS:
        raise ValueError(f"configurations: there is no {name!r}; list prints them")
    config = CONFIGS[name]
    if config.margin == 1:
        raise ValueError(f"configurations: {name} has no margin to compare softmax with")
    return replace(config, batch=config.batch if batch is None else batch, width=width)


def prepare(config: Config) -> list[Run]:
    """Compiles the arms and compares their losses.

    Raises:
      ValueError: if an arm computes something else.
    """
    runs = [prepare_arm(arm, config) for arm in (PLAIN, NO_MARGIN, MARGIN)]
    plain, no_margin, margin = (run.loss for run in runs)
    check(NO_MARGIN, "loss", no_margin, plain, TOLERANCE["f32"])
    if not margin > plain:
        raise ValueError(f"a margin must make the loss larger than {plain}, got {margin}")
    return runs


def prepare_arm(arm: str, config: Config) -> Run:
    network, optimizer = config.built_network, config.optimizer
    model = models.ConvNet(
        network,
        config.classes,
        margin=config.margin if arm == MARGIN else 1,
        rngs=nnx.Rngs(0),
    )
    graphdef, state = training.create(model, optimizer)
    step = training.train_step(
        graphdef,
        optimizer,
        annealed_lambda(*config.lam),
        loss=optax.softmax_cross_entropy_with_integer_labels if arm == PLAIN else None,
    )
    operands = batch_of(config)
    compiled = jax.jit(step, donate_argnums=0).lower(state, *operands).compile()
    memory: Any = compiled.memory_analysis()
    state, metrics = compiled(state, *operands)
    loss = float(metrics.sums.loss / metrics.sums.examples)
    return Run(arm, compiled, state, loss, memory.temp_size_in_bytes)


def batch_of(config: Config) -> tuple[jax.Array, jax.Array]:
    """Images and labels; what they show does not change the time."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((config.batch, *config.built_network.image), np.float32)
    return jnp.asarray(images), jnp.asarray(rng.integers(config.classes, size=config.batch))


def take_times(config: Config, runs: list[Run], repetitions: int) -> dict[str, list[float]]:
    """Seconds of every arm in every round, after a warm-up that is thrown away."""
    order, operands = np.random.default_rng(0), batch_of(config)
    states = {run.arm: run.state for run in runs}
    seconds: dict[str, list[float]] = {run.arm: [] for run in runs}
    rounds = WARM_UP + repetitions
    with tqdm(total=rounds * len(runs), desc=config.name, unit=" steps") as progress:
        for _ in range(rounds):
            for index in order.permutation(len(runs)):
                run = runs[index]
                begun = time.perf_counter()
                states[run.arm], _ = jax.block_until_ready(run.compiled(states[run.arm], *operands))
                seconds[run.arm].append(time.perf_counter() - begun)
                progress.update()
    return {arm: taken[WARM_UP:] for arm, taken in seconds.items()}


def summary(config: Config, runs: list[Run], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A configuration's part of the result; ratios are taken round by round."""
    plain, memory = np.array(seconds[PLAIN]), {run.arm: run.temporary_bytes for run in runs}
    arms: dict[str, dict[str, Any]] = {
        run.arm: {
            "arm": run.arm,
            "milliseconds": quartiles(1e3 * np.array(seconds[run.arm])),
            "ratio": quartiles(np.array(seconds[run.arm]) / plain),
            "loss": run.loss,
            "temporary_bytes": run.temporary_bytes,
            "memory_ratio": run.temporary_bytes / memory[PLAIN],
        }
        for run in runs
    }
    margin = arms[MARGIN]
    reached = {"time": median(margin["ratio"]), "memory": margin["memory_ratio"]}
    return {
        "configuration": config.name,
        "batch": config.batch,
        "width": config.width,
        "arms": list(arms.values()),
        "targets": [
            {"measure": measure, "limit": LIMIT, "reached": ratio, "met": ratio <= LIMIT}
            for measure, ratio in reached.items()
        ],
    }


def table(entry: dict[str, Any]) -> Table:
    met = ", ".join(
        f"{target['measure']} {'met' if target['met'] else 'not met'}"
        for target in entry["targets"]
    )
    size = f"batch {entry['batch']}, width {entry['width']:g}"
    view = Table(
        title=f"{entry['configuration']}, {size}; median (quartiles)",
        caption=f"target of the margin, <= {LIMIT} of plain: {met}",
    )
    view.add_column("arm", no_wrap=True)
    for header in ("ms", "ratio to plain", "MB", "to plain"):
        view.add_column(header, justify="right", no_wrap=True)
    for row in entry["arms"]:
        view.add_row(
            row["arm"],
            spread(row["milliseconds"]),
            spread(row["ratio"]),
            f"{row['temporary_bytes'] / 1e6:.3g}",
            f"{row['memory_ratio']:.4g}",
        )
    return view
