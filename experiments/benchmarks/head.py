"""Times and measures the head beside other libraries: `python -m experiments bench head`.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from experiments.benchmarks import arms as every
from experiments.benchmarks import hlo, rounds, tables
from experiments.benchmarks import peers as torch
from experiments.benchmarks.arms import Arm, Problem, Shape
from experiments.benchmarks.records import OUT, appended, heading, repeating, stamped
from experiments.benchmarks.rounds import TOLERANCE, Run, check, quartiles, take_times
from experiments.store.progress import tracked
from experiments.store.results import load, save

SHAPES = ((256, 256, 10), (256, 512, 100), (512, 512, 10575), (512, 256, 102400))
WARM_UP = 3
# With more logits NumPy would need minutes: there the arms are compared only with each other.
EXACT_LOGITS = 2**28


def bench(
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    dtype: Literal["f32", "bf16"] = "f32",
    margin: int = 4,
    lam: float = 0.0,
    class_block: int = 1024,
    repetitions: int = 20,
    only: tuple[str, ...] = (),
    peers: bool = False,
    peers_python: Path = Path(sys.executable),
    append: Path | None = None,
    out: Path = OUT,
) -> None:
    """Times the head in every way that this library has, and what one would take instead.

    Optax's softmax is the baseline.

    Args:
      shapes: three numbers a shape: batch, feature length and classes.
      dtype: dtype of features and kernel.
      margin: m of the arms that have one.
      lam: λ of the arms that are given one. PyTorch's large margin has no λ and runs only at 0.
      class_block: classes at a time, in the arms that compute in blocks.
      repetitions: timed rounds; fewer than 20 are for trying out.
      only: names of arms, such as lsoftmax_sgd; all others but their baseline are left out, PyTorch
        too.
      peers: also time tokamax, PyTorch and pytorch-metric-learning where they are installed.
      peers_python: the Python that may have torch and pytorch-metric-learning.
      append: a result to add the shapes to, if it is of the same commit, versions and settings.
      out: folder of the result, if it is a new one.
    """
    smallest = {"shapes": min(map(min, shapes), default=0), "class_block": class_block}
    smallest |= {"repetitions": repetitions, "margin": margin}
    for name, value in smallest.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= lam < math.inf:
        raise ValueError(f"lam must be finite and >= 0, got {lam}")
    sizes = [Shape(*shape) for shape in shapes]
    chosen = {shape: choose(shape, margin, class_block, only, peers) for shape in sizes}
    config = {"dtype": dtype, "margin": margin, "lam": lam}
    config |= {"class_block": class_block, "repetitions": repetitions}
    # A result holds no path of this machine.
    flags: dict[str, Any] = {"only": only or None, "peers_python": "PYTHON" if peers else None}
    command = repeating("head", shapes=tuple(itertools.chain(*shapes)), **config, **flags)
    result = heading("bench head", command + (" --peers" if peers else "")) | {"config": config}
    if peers:
        result |= {"peer_versions": torch_versions(peers_python)}
    file = append or out / stamped(f"head-{jax.default_backend()}-{dtype}")
    measured: list[dict[str, Any]] = appended(file, result, ("config",), "shapes")
    if measured:
        saved = load(file)
        commands = dict.fromkeys([*saved["command"].split(" && "), result["command"]])
        result = saved | result | {"command": " && ".join(commands)}
    half = -(-repetitions // 2)
    for shape, listed in chosen.items():
        given = every.problem(shape, dtype, lam)
        busy = os.getloadavg()[0]
        in_torch = peers and not only
        before = torch_times(peers_python, given, margin, half) if in_torch else {}
        runs = prepare(listed, given, shape, dtype)
        take_times(runs.values(), repetitions, str(shape))
        after = torch_times(peers_python, given, margin, half) if in_torch else {}
        rows = [summary(arm, runs) for arm in listed if arm.name in runs]
        rows += torch_rows(before, after, runs)
        measured.append({"shape": shape, "load": [busy, os.getloadavg()[0]], "arms": rows})
        # Saved after each shape: an interrupted benchmark keeps what it has.
        save(file, result | {"shapes": measured})
        tables.show(arms_table(measured[-1], dtype), 132)
    print(f"{file} written")


def choose(
    shape: Shape, margin: int, class_block: int, only: Sequence[str], peers: bool
) -> list[Arm]:
    """The arms of a shape.

    Raises:
      ValueError: if a name of `only` is of no arm.
    """
    listed = [*every.arms(shape, margin, class_block), *(every.peers() if peers else ())]
    if not only:
        return listed
    if missing := sorted({*only} - {arm.name for arm in listed}):
        names = ", ".join(arm.name for arm in listed)
        raise ValueError(f"only: no arm {', '.join(missing)} at {shape}; there are {names}")
    wanted = {*only} | {baseline(arm) for arm in listed if arm.name in only}
    return [arm for arm in listed if arm.name in wanted]


def baseline(arm: Arm) -> str:
    """Plain softmax, with the update if the arm has one."""
    return every.PLAIN if arm.start is None else every.PLAIN_SGD


# Preparing.


def prepare(listed: list[Arm], given: Problem, shape: Shape, dtype: str) -> dict[str, Run]:
    """Compiles, compares and warms up the arms; one that does not fit the memory is left out.

    Raises:
      ValueError: naming an arm whose loss is not exact, or whose gradients are not those of the
        arms before it.
    """
    runs: dict[str, Run] = {}
    exact: dict[Any, Any] = {}
    lengths: dict[Any, float] = {}
    for arm in tracked(listed, len(listed), f"{shape} compile", "arms"):
        try:
            runs[arm.name], length = prepare_arm(arm, given, shape)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            print(f"{arm.name} at {shape} does not fit the memory", file=sys.stderr)
            continue
        if arm.margin is None:
            continue
        computed = arm.margin, arm.paced
        loss: Any = runs[arm.name].loss
        if computed not in exact and shape.batch * shape.classes <= EXACT_LOGITS:
            exact[computed] = every.exact_loss(given, *computed)
        check(arm.name, "loss", loss, exact.setdefault(computed, loss), TOLERANCE[dtype])
        for part, value in length.items():
            first = lengths.setdefault((computed, part), value)
            check(arm.name, f"length of {part}", value, first, TOLERANCE[dtype])
    return runs


def prepare_arm(arm: Arm, given: Problem, shape: Shape) -> tuple[Run, dict[str, float]]:
    """An arm's run, and the lengths of its gradients."""
    features, kernel, *rest = given
    # The step donates its state, so each arm needs a copy.
    state = kernel if arm.start is None else jax.tree.map(jnp.copy, arm.start(kernel))
    compiled = arm.lower(features, state, *rest).compile()

    def call() -> Any:
        nonlocal state
        outputs = compiled(features, state, *rest)
        if arm.start is not None:
            state = outputs[2]
        return outputs

    loss, dfeatures, out = call()
    length = {"dfeatures": norm(dfeatures)} | ({} if arm.start else {"dkernel": norm(out)})
    facts = hlo.facts(compiled, shape.dim * shape.classes)
    run = Run(call, facts, None if arm.margin is None else float(loss))
    run.warm_up(WARM_UP)
    return run, length


def norm(array: jax.Array) -> float:
    return float(jnp.linalg.norm(array.astype(jnp.float32)))


def summary(arm: Arm, runs: dict[str, Run]) -> dict[str, Any]:
    """An arm's row of the result."""
    beside = baseline(arm) if baseline(arm) in runs else arm.name
    names = {"arm": arm.name, "baseline": beside, "products": arm.products}
    return names | runs[arm.name].row(runs[beside])


# PyTorch.


def torch_versions(python: Path) -> dict[str, str]:
    return dict(json.loads(_run_torch(python, "versions")))


def torch_times(
    python: Path, given: Problem, margin: int, repetitions: int
) -> dict[str, dict[str, Any]]:
    """Loss, seconds and growth of each of its losses, in float32 and without annealing."""
    versions = torch_versions(python)
    alike = given.kernel.dtype == jnp.float32 and not given.lam and jax.default_backend() == "cpu"
    if not versions or not alike:
        return {}
    computed: dict[str, every.Margin] = {torch.SOFTMAX: 1, torch.LARGE_MARGIN: margin}
    computed |= {name: every.FAMILY[family] for name, family in torch.FAMILY.items()}
    timed = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "operands.npz"
        features, kernel, labels = (np.asarray(array) for array in given[:3])
        np.savez(file, features=features, kernel=kernel, labels=labels)
        for name in torch.arms(versions):
            found = json.loads(_run_torch(python, str(file), str(margin), str(repetitions), name))
            exact = every.exact_loss(given, computed[name])
            check(name, "loss", found["loss"], exact, TOLERANCE["f32"])
            timed[name] = found
    return timed


def torch_rows(
    before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]], runs: dict[str, Run]
) -> list[dict[str, Any]]:
    """Rows of what was timed before and after ours; a ratio to the baseline's median."""
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


def _run_torch(python: Path, *arguments: str) -> str:
    """The output of the program `peers` under that Python."""
    try:
        done = subprocess.run(
            [python, torch.__file__, *arguments], capture_output=True, text=True, check=True
        )
    except OSError as error:
        raise ValueError(f"peers_python must be a Python, got {python}: {error}") from error
    except subprocess.CalledProcessError as error:
        raise ValueError(f"the peers failed under {python}: {error.stderr[-2000:]}") from error
    return done.stdout


def arms_table(entry: dict[str, Any], dtype: str) -> Table:
    title = f"batch, features, classes {Shape(*entry['shape'])}, {dtype}; median (quartiles)"
    caption = "MB: temporary memory; * growth of the process, gradients included"
    return rounds.table(title, entry["arms"], caption)
