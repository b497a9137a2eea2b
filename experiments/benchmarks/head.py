"""Times and measures the head against other libraries: `python -m experiments bench head`.

One process; the arms are compiled ahead of time, their losses and gradients compared, then timed
in turn, in a new random order each round, so that whatever else the machine does meets all alike.
A ratio is the median over the rounds of the ratio to the same round's baseline.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.stages import Compiled
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from experiments.benchmarks import arms as every
from experiments.benchmarks import hlo, peers
from experiments.benchmarks.arms import Arm, Problem, Shape
from experiments.store.results import provenance, save

OUT = Path(__file__).parent.parent / "results" / "bench"
SHAPES = ((256, 256, 10), (256, 512, 100), (512, 512, 10575), (512, 256, 102400))
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
WARM_UP = 3
# A shorter sample would time the clock and the dispatch.
SHORTEST_SAMPLE = 2e-3
# How far losses and lengths of gradients may be apart, relative to the first.
TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}


def bench(
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    dtype: Literal["f32", "bf16"] = "f32",
    margin: int = 4,
    lam: float = 0.0,
    class_block: int = 1024,
    repetitions: int = 20,
    peers_python: Path = Path(sys.executable),
    out: Path = OUT,
) -> None:
    """Times the head: every plan, Optax's softmax, the literal formula, and PyTorch if it is there.

    Args:
      shapes: three numbers a shape: batch, feature length and classes.
      dtype: dtype of features and kernel.
      margin: margin of the arms that have one.
      lam: λ of the arms with a margin. PyTorch's arm has no λ and runs only if this is 0.
      class_block: classes at a time, in the arms that compute in blocks.
      repetitions: timed rounds; fewer than 20 are for trying out.
      peers_python: a Python; if it has torch and pytorch-metric-learning, they are timed too.
      out: folder of the result.
    """
    smallest = {
        "shapes": min(map(min, shapes), default=0),
        "class_block": class_block,
        "repetitions": repetitions,
        "margin": margin,
    }
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be finite and >= 0, got {lam}")
    begun, console = datetime.now(UTC), Console(width=max(Console().width, 132))
    place = f"head-{jax.default_backend()}-{dtype}-{begun:%Y%m%d-%H%M}.json"
    config = {
        "dtype": dtype,
        "margin": margin,
        "lam": lam,
        "class_block": class_block,
        "repetitions": repetitions,
    }
    result = {
        "kind": "bench head",
        "date": begun.isoformat(timespec="seconds"),
        "command": f"python -m experiments bench head{written(shapes, config)}",
        **provenance(1),
        "peer_versions": peer_versions(peers_python),
        "config": config,
    }
    measured: list[dict[str, Any]] = []
    half = -(-repetitions // 2)
    for shape in map(Shape._make, shapes):
        given = every.problem(shape, DTYPES[dtype], lam)
        load = os.getloadavg()[0]
        before = peer_times(peers_python, given, margin, half)
        runs = prepare(every.arms(shape, margin, class_block), given, shape, dtype, margin)
        take_times(runs, given, repetitions, str(shape))
        after = peer_times(peers_python, given, margin, half)
        rows = [summary(run, runs) for run in runs] + peer_rows(before, after, runs)
        measured.append(
            {
                "shape": shape,
                "load": [load, os.getloadavg()[0]],
                "arms": rows,
                "targets": [judge(target, shape, rows) for target in targets(shape, dtype)],
            }
        )
        # Appended shape by shape: an interrupted benchmark keeps what it has.
        save(out / place, result | {"shapes": measured})
        console.print(arms_table(measured[-1], dtype))
        console.print(targets_table(measured[-1]))
    print(f"{out / place} written")


def written(shapes: tuple[tuple[int, int, int], ...], config: dict[str, Any]) -> str:
    """The flags that repeat a benchmark, without the folders of one machine."""
    sizes = " ".join(str(size) for shape in shapes for size in shape)
    flags = {"shapes": sizes} | config
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in flags.items())


# Preparing and timing.


@dataclass
class Run:
    """A compiled arm and what it did."""

    arm: Arm
    compiled: Compiled
    facts: hlo.Facts
    state: Any
    loss: float | None = None
    calls: int = 1  # in a sample
    seconds: list[float] = field(default_factory=list)  # of a call, one a round


def prepare(listed: list[Arm], given: Problem, shape: Shape, dtype: str, margin: int) -> list[Run]:
    """Compiles, compares and warms up the arms; one that does not fit the memory is left out.

    Raises:
      ValueError: naming an arm whose loss or gradients are not those of the arms before it.
    """
    runs: list[Run] = []
    lengths: dict[tuple[str, str], float] = {}
    margins = {"plain": 1, "margin": margin, "arcface": None}
    exact = {loss: every.literal_loss(given, m) for loss, m in margins.items()}
    for arm in tqdm(listed, f"{shape} compile", unit=" arms", leave=False):
        try:
            run, length = prepare_arm(arm, given, shape)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{arm.name} at {shape} does not fit the memory", file=sys.stderr)
            continue
        runs.append(run)
        if arm.loss == "none":
            continue
        check(arm.name, "loss", run.loss, exact[arm.loss], TOLERANCE[dtype])
        for part, value in length.items():
            first = lengths.setdefault((arm.loss, part), value)
            check(arm.name, f"length of {part}", value, first, TOLERANCE[dtype])
    return runs


def prepare_arm(arm: Arm, given: Problem, shape: Shape) -> tuple[Run, dict[str, float]]:
    features, kernel, *rest = given
    state = arm.start(kernel)
    step = jax.jit(arm.step, donate_argnums=(1,) if arm.updates else ())
    compiled = step.lower(features, state, *rest).compile()
    run = Run(arm, compiled, hlo.facts(compiled, shape.dim * shape.classes), state)
    loss, dfeatures, out = call(run, given)
    run.loss = float(loss) if arm.loss != "none" else None
    length = {"dfeatures": norm(dfeatures)}
    if not arm.updates:
        length["dkernel"] = norm(out)
    for _ in range(WARM_UP):
        seconds = sample(run, given)
    run.calls = max(1, math.ceil(SHORTEST_SAMPLE / seconds))
    return run, length


def call(run: Run, given: Problem) -> Any:
    features, _, *rest = given
    outputs = run.compiled(features, run.state, *rest)
    if run.arm.updates:
        run.state = outputs[2]
    return outputs


def sample(run: Run, given: Problem) -> float:
    begun = time.perf_counter()
    for _ in range(run.calls):
        outputs = call(run, given)
    jax.block_until_ready(outputs)
    return (time.perf_counter() - begun) / run.calls


def take_times(runs: list[Run], given: Problem, repetitions: int, title: str) -> None:
    order = np.random.default_rng(0)
    with tqdm(total=repetitions * len(runs), desc=f"{title} time", unit=" samples") as progress:
        for _ in range(repetitions):
            for index in order.permutation(len(runs)):
                runs[index].seconds.append(sample(runs[index], given))
                progress.update()


def norm(array: jax.Array) -> float:
    return float(jnp.linalg.norm(array.astype(jnp.float32)))


def check(name: str, what: str, value: float | None, wanted: float, tolerance: float) -> None:
    if value is None or not abs(value - wanted) <= tolerance * abs(wanted):
        raise ValueError(
            f"{name} computes something else: its {what} is {value}, expected {wanted} "
            f"within a share of {tolerance}"
        )


# What was measured.


def summary(run: Run, runs: list[Run]) -> dict[str, Any]:
    """An arm's row of the result; ratios are to plain softmax, with the update if it has one."""
    name = every.PLAIN_SGD if run.arm.updates else every.PLAIN
    baseline = next((other for other in runs if other.arm.name == name), run)
    ratios = np.array(run.seconds) / np.array(baseline.seconds)
    return {
        "arm": run.arm.name,
        "baseline": baseline.arm.name,
        "products": run.arm.products,
        "milliseconds": quartiles(1e3 * np.array(run.seconds)),
        "ratio": quartiles(ratios),
        "loss": run.loss,
        "memory_ratio": run.facts.temporary_bytes / max(baseline.facts.temporary_bytes, 1),
        **run.facts._asdict(),
    }


def quartiles(values: Any) -> list[float]:
    """The median, then the quartiles around it."""
    return [float(f"{value:.4g}") for value in np.percentile(values, (50, 25, 75))]


def median(quartiles: list[float]) -> float:
    middle, *_ = quartiles
    return middle


# The targets, from the table of the design.


class Target(NamedTuple):
    """A limit on an arm: the ratio of its time or memory to another's.

    "extra" is its temporary memory beyond the other's, in float32 arrays of batch x classes; "MB"
    is its own.
    """

    arm: str
    measure: Literal["time", "memory", "extra", "MB"]
    limit: float
    against: str = every.PLAIN


def targets(shape: Shape, dtype: str) -> list[Target]:
    """What is asked of a shape on this platform: of a CPU, which emulates bfloat16, in float32."""
    many, torch = shape.classes > 30_000, peers.LARGE_MARGIN
    if jax.default_backend() != "cpu":
        listed = [
            Target(every.STORED, "time", 1.25, every.THREE),
            Target(every.RECOMPUTED, "time", 1.25, every.FOUR),
            Target(every.RECOMPUTED, "MB", 300, every.FOUR),
        ]
        return listed if many else []
    if dtype != "f32":
        return []
    if shape.classes <= 1000:
        # By how much a torch process grows says nothing here.
        return [
            Target(every.ONE_SHOT, "time", 1.15 if shape.classes <= 32 else 1.03),
            Target(every.ONE_SHOT, "time", 1 / 5, torch),
            Target(every.ONE_SHOT, "extra", 0.99),
        ]
    listed = [
        Target(every.ONE_SHOT, "time", 0.95 if many else 0.9),
        Target(every.ONE_SHOT, "time", 1 / 4 if many else 1 / 2.5, torch),
        Target(every.ONE_SHOT, "memory", 0.51),
        Target(every.ONE_SHOT, "memory", 1 / 5, torch),
    ]
    if many:
        listed += [Target(every.RECOMPUTED, "time", 1), Target(every.RECOMPUTED, "memory", 0.01)]
    return listed


def judge(target: Target, shape: Shape, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The target and what was reached; nothing where one of the two arms did not run."""
    found = {row["arm"]: row for row in rows}
    one, other = found.get(target.arm), found.get(target.against)
    reached = None
    if one and other:
        reached = float(f"{reached_by(target.measure, shape, one, other):.4g}")
    met = None if reached is None else reached <= target.limit
    return {**target._asdict(), "reached": reached, "met": met}


def reached_by(measure: str, shape: Shape, one: dict[str, Any], other: dict[str, Any]) -> float:
    if measure == "time":
        # A ratio to the baseline is taken round by round.
        if one["baseline"] == other["arm"]:
            return median(one["ratio"])
        return median(one["milliseconds"]) / median(other["milliseconds"])
    if measure == "extra":
        more = one["temporary_bytes"] - other["temporary_bytes"]
        return more / (4 * shape.batch * shape.classes)
    if measure == "MB":
        return one["temporary_bytes"] / 1e6
    if "growth_bytes" in other:
        return (one["temporary_bytes"] + one["output_bytes"]) / max(other["growth_bytes"], 1)
    return one["temporary_bytes"] / other["temporary_bytes"]


# Peers.


def peer_versions(python: Path) -> dict[str, str]:
    return json.loads(_peer(python, "versions"))


def peer_times(
    python: Path, given: Problem, margin: int, repetitions: int
) -> dict[str, dict[str, Any]]:
    """Loss, seconds and growth of each peer that is installed, in float32 and without annealing."""
    versions = peer_versions(python)
    if not versions or given.lam or given.kernel.dtype != jnp.float32:
        return {}
    if jax.default_backend() != "cpu":
        return {}
    names = [peers.SOFTMAX]
    if peers.LARGE_MARGIN in versions:
        names.append(peers.LARGE_MARGIN)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "operands.npz"
        features, kernel, labels = (np.asarray(array) for array in given[:3])
        np.savez(file, features=features, kernel=kernel, labels=labels)
        arguments = str(file), str(margin), str(repetitions)
        timed = {name: json.loads(_peer(python, *arguments, name)) for name in names}
    for name, peer in timed.items():
        wanted = every.literal_loss(given, margin if name == peers.LARGE_MARGIN else 1)
        check(name, "loss", peer["loss"], wanted, TOLERANCE["f32"])
    return timed


def peer_rows(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], runs: list[Run]
) -> list[dict[str, Any]]:
    """Rows of the peers, timed before and after; a ratio to the baseline's median."""
    plain = np.median(next(run.seconds for run in runs if run.arm.name == every.PLAIN))
    rows = []
    for name in before:
        seconds = np.array(before[name]["seconds"] + after[name]["seconds"])
        row = {
            "arm": name,
            "baseline": every.PLAIN,
            "milliseconds": quartiles(1e3 * seconds),
            "ratio": quartiles(seconds / plain),
            "milliseconds_before": quartiles(1e3 * np.array(before[name]["seconds"])),
            "milliseconds_after": quartiles(1e3 * np.array(after[name]["seconds"])),
            "loss": before[name]["loss"],
            "growth_bytes": before[name]["growth_bytes"],
        }
        rows.append(row)
    return rows


def _peer(python: Path, *arguments: str) -> str:
    """What the peers' program prints when that Python runs it."""
    try:
        done = subprocess.run(
            [python, peers.__file__, *arguments], capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise ValueError(f"peers_python must be a Python, got {python}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"the peers failed under {python}: {error.stderr[-2000:]}") from error
    return done.stdout


# The tables.


def arms_table(entry: dict[str, Any], dtype: str) -> Table:
    title = f"batch, features, classes {Shape(*entry['shape'])}, {dtype}; median (quartiles)"
    view = Table(title=title)
    view.add_column("arm", no_wrap=True)
    for header in ("ms", "ratio to plain", "MB", "to plain", "dots"):
        view.add_column(header, justify="right", no_wrap=True)
    view.add_column("large moves")
    for row in entry["arms"]:
        grown = "growth_bytes" in row
        size = row["growth_bytes" if grown else "temporary_bytes"] / 1e6
        view.add_row(
            row["arm"],
            spread(row["milliseconds"]),
            spread(row["ratio"]),
            f"{size:.3g}{'*' if grown else ''}",
            "" if grown else f"{row['memory_ratio']:.3g}",
            "" if grown else str(row["dots"]),
            "" if grown else ", ".join(f"{n} {name}" for name, n in row["large_moves"].items()),
        )
    view.caption = "MB: temporary memory; * growth of the process, gradients included"
    return view


def targets_table(entry: dict[str, Any]) -> Table:
    view = Table("arm", "measure", "against", title=f"targets at {Shape(*entry['shape'])}")
    for header in ("target", "reached"):
        view.add_column(header, justify="right")
    view.add_column("")
    for target in entry["targets"]:
        reached = target["reached"]
        view.add_row(
            target["arm"],
            target["measure"],
            target["against"],
            f"<= {target['limit']:.3g}",
            "" if reached is None else f"{reached:.3g}",
            {True: "met", False: "not met", None: "not measured"}[target["met"]],
        )
    return view


def spread(values: list[float]) -> str:
    median, low, high = (f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values)
    return f"{median} ({low} to {high})"
