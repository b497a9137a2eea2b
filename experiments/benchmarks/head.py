"""Times and measures the head against other libraries: `python -m experiments bench head`.

One process; the arms are compiled ahead of time, their losses and gradients compared, then timed
in turn.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from tqdm import tqdm

from experiments.benchmarks import arms as every
from experiments.benchmarks import hlo, peers, rounds, tables
from experiments.benchmarks.arms import Arm, Problem, Shape
from experiments.benchmarks.records import OUT, heading, repeating, stamped
from experiments.benchmarks.rounds import TOLERANCE, Run, check, quartiles, take_times
from experiments.store.results import save

SHAPES = ((256, 256, 10), (256, 512, 100), (512, 512, 10575), (512, 256, 102400))
WARM_UP = 3


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
    smallest = {"shapes": min(map(min, shapes), default=0), "class_block": class_block}
    smallest |= {"repetitions": repetitions, "margin": margin}
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be finite and >= 0, got {lam}")
    file = out / stamped(f"head-{jax.default_backend()}-{dtype}")
    config = {"dtype": dtype, "margin": margin, "lam": lam}
    config |= {"class_block": class_block, "repetitions": repetitions}
    command = repeating("head", shapes=tuple(itertools.chain(*shapes)), **config)
    versions = {"peer_versions": peer_versions(peers_python)}
    result = heading("bench head", command) | versions | {"config": config}
    measured: list[dict[str, Any]] = []
    half = -(-repetitions // 2)
    for shape in map(Shape._make, shapes):
        given = every.problem(shape, every.DTYPES[dtype], lam)
        load = os.getloadavg()[0]
        before = peer_times(peers_python, given, margin, half)
        listed = every.arms(shape, margin, class_block)
        runs = prepare(listed, given, shape, dtype, margin)
        take_times(runs.values(), repetitions, str(shape))
        after = peer_times(peers_python, given, margin, half)
        rows = [summary(arm, runs) for arm in listed if arm.name in runs]
        rows += peer_rows(before, after, runs)
        judged = [judge(target, shape, rows) for target in targets(shape, dtype)]
        loads = [load, os.getloadavg()[0]]
        measured.append({"shape": shape, "load": loads, "arms": rows, "targets": judged})
        # Appended shape by shape: an interrupted benchmark keeps what it has.
        save(file, result | {"shapes": measured})
        tables.show(arms_table(measured[-1], dtype), 132)
        tables.show(targets_table(measured[-1]), 132)
    print(f"{file} written")


# Preparing.


def prepare(
    listed: list[Arm], given: Problem, shape: Shape, dtype: str, margin: int
) -> dict[str, Run]:
    """Compiles, compares and warms up the arms; one that does not fit the memory is left out.

    Raises:
      ValueError: naming an arm whose loss or gradients are not those of the arms before it.
    """
    runs: dict[str, Run] = {}
    lengths: dict[tuple[str, str], float] = {}
    margins = {"plain": 1, "margin": margin, "arcface": None}
    exact = {loss: every.literal_loss(given, m) for loss, m in margins.items()}
    for arm in tqdm(listed, f"{shape} compile", unit=" arms", leave=False):
        try:
            runs[arm.name], length = prepare_arm(arm, given, shape)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{arm.name} at {shape} does not fit the memory", file=sys.stderr)
            continue
        if arm.loss == "none":
            continue
        check(arm.name, "loss", runs[arm.name].loss, exact[arm.loss], TOLERANCE[dtype])
        for part, value in length.items():
            first = lengths.setdefault((arm.loss, part), value)
            check(arm.name, f"length of {part}", value, first, TOLERANCE[dtype])
    return runs


def prepare_arm(arm: Arm, given: Problem, shape: Shape) -> tuple[Run, dict[str, float]]:
    """An arm's run, and the lengths of its gradients."""
    features, kernel, *rest = given
    state = arm.start(kernel)
    compiled = arm.lower(features, state, *rest).compile()

    def call() -> Any:
        nonlocal state
        outputs = compiled(features, state, *rest)
        if arm.updates:
            state = outputs[2]
        return outputs

    loss, dfeatures, out = call()
    length = {"dfeatures": norm(dfeatures)} | ({} if arm.updates else {"dkernel": norm(out)})
    facts = hlo.facts(compiled, shape.dim * shape.classes)
    run = Run(call, facts, None if arm.loss == "none" else float(loss))
    run.warm_up(WARM_UP)
    return run, length


def norm(array: jax.Array) -> float:
    return float(jnp.linalg.norm(array.astype(jnp.float32)))


# What was measured.


def summary(arm: Arm, runs: dict[str, Run]) -> dict[str, Any]:
    """An arm's row of the result; ratios are to plain softmax, with the update if it has one."""
    baseline = every.PLAIN_SGD if arm.updates else every.PLAIN
    if baseline not in runs:
        baseline = arm.name
    return {
        "arm": arm.name,
        "baseline": baseline,
        "products": arm.products,
        **runs[arm.name].row(runs[baseline]),
    }


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
    reached = met = None
    if one and other:
        reached = float(f"{reached_by(target.measure, shape, one, other):.4g}")
        met = reached <= target.limit
    return {**target._asdict(), "reached": reached, "met": met}


def reached_by(measure: str, shape: Shape, one: dict[str, Any], other: dict[str, Any]) -> float:
    if measure == "time":
        # A ratio to the baseline is taken round by round.
        if one["baseline"] == other["arm"]:
            return one["ratio"][0]
        return one["milliseconds"][0] / other["milliseconds"][0]
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
    alike = given.kernel.dtype == jnp.float32 and not given.lam and jax.default_backend() == "cpu"
    if not versions or not alike:
        return {}
    margins = {peers.SOFTMAX: 1}
    if peers.LARGE_MARGIN in versions:
        margins[peers.LARGE_MARGIN] = margin
    timed = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "operands.npz"
        features, kernel, labels = (np.asarray(array) for array in given[:3])
        np.savez(file, features=features, kernel=kernel, labels=labels)
        for name, of in margins.items():
            timed[name] = json.loads(_peer(python, str(file), str(margin), str(repetitions), name))
            wanted = every.literal_loss(given, of)
            check(name, "loss", timed[name]["loss"], wanted, TOLERANCE["f32"])
    return timed


def peer_rows(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], runs: dict[str, Run]
) -> list[dict[str, Any]]:
    """Rows of the peers, timed before and after; a ratio to the baseline's median."""
    rows = []
    for name, first in before.items():
        early, late = (1e3 * np.array(times[name]["seconds"]) for times in (before, after))
        both = np.concatenate([early, late])
        plain = 1e3 * np.median(runs[every.PLAIN].seconds)
        row = {
            "arm": name,
            "baseline": every.PLAIN,
            "milliseconds": quartiles(both),
            "ratio": quartiles(both / plain),
            "milliseconds_before": quartiles(early),
            "milliseconds_after": quartiles(late),
            "loss": first["loss"],
            "growth_bytes": first["growth_bytes"],
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
    caption = "MB: temporary memory; * growth of the process, gradients included"
    return rounds.table(title, entry["arms"], caption)


def targets_table(entry: dict[str, Any]) -> Table:
    title = f"targets at {Shape(*entry['shape'])}"
    view = tables.table(title, ["arm", "measure", "against"], ["target", "reached"], "")
    for target in entry["targets"]:
        reached = "" if target["reached"] is None else f"{target['reached']:.3g}"
        words = (target[key] for key in ("arm", "measure", "against"))
        view.add_row(*words, f"<= {target['limit']:.3g}", reached, tables.verdict(target["met"]))
    return view
