"""Compares losses and gradients at random arguments with an independent 80-bit reference.

    python -m scripts.fuzz [--seconds SECONDS] [--seed SEED] [--result RESULT.json]

Most cases call a loss and the inference logits, on one device or on a mesh of Auto or Explicit
axes; float16 has a loss scale up to 2**15. The other cases make a training step in `jax.shard_map`,
with dropout. A tenth of the steps have an unknown label, and must change nothing.

The norms of either the features or the columns go from 1e-30 to 1e30, in float16 from 0.1 to 30.
Between 1e-20 and 1e15 the numbers must be right. Outside this range the script reports how often
the numbers are wrong.

The unit of an error is what the dtype must lose: eps times the sum of the lengths of the terms,
with a factor for the conditioning of the margin and of the softmax (exact.py). Each loss, each
row of the features' gradient and of the logits, and each column of the kernel's gradient has its
own unit. A case fails above 4 units.

The script also plants faults in its results. The power of the fuzz is the share of these faults
that are noticed; below 95 % the script fails.
"""

import functools
import json
import os
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from experiments.store.results import save
from lsoftmax_jax import training
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, NormFace, SphereFace
from lsoftmax_jax.nnx import LSoftmaxDense
from scripts import exact
from scripts.exact import ALLOWED, EPS, Numbers, Rounding, Wide

CLAIMED = (1e-20, 1e15)
POWER = 0.95
CASES = 40  # of a program
SHAPES = [(1, 1, 1), (3, 2, 2), (5, 8, 10), (4, 16, 33), (2, 64, 5)]
MARGINS = [
    *(lsm.margins.LSoftmax(m) for m in (1, 2, 3, 4, 5, 8, 16, 33, 64)),
    *(SphereFace(4), SphereFace(3, scale=16.0), NormFace(scale=16.0), CosFace(0.35, scale=30.0)),
    *(ArcFace(0.5, scale=16.0), Combined(1.2, 0.3, 0.2, scale=8.0)),
]
PLANS = [
    None,
    lsm.Plan(row_block=2),
    lsm.Plan(class_block=3),
    lsm.Plan(class_block=4, keep_exponentials=True),
]
# Intermediate numbers below these sizes round to zero, like factors below the least normal number.
# In float16 the logits' gradient ends at 2**-30 of the largest cotangent. Gradients, and the
# exponentials that class blocks keep, end at 2**-24.
TINY = {"float64": np.finfo("float64").tiny, "float16": 2.0**-30}
TINY_IN_FLOAT16 = 2.0**-24


# What is computed.


class Program(NamedTuple):
    """What is compiled once: a loss, or a training step on so many devices."""

    shape: tuple[int, int, int]  # batch, D, classes
    margin: Any
    dtype: str
    devices: int = 0  # of a step; 0: a loss
    smoothing: float = 0.0
    plan: lsm.Plan | None = None
    total: bool = False  # a sum, or one loss an example
    mesh: Any = None

    @property
    def is_step(self) -> bool:
        return self.devices > 0

    @property
    def least(self) -> float:
        return float(TINY.get(self.dtype, np.finfo("float32").tiny))

    @property
    def rounding(self) -> Rounding:
        in_blocks = self.plan is not None and self.plan.class_block is not None
        kept = self.dtype == "float16" and in_blocks
        return Rounding(EPS[self.dtype], TINY_IN_FLOAT16 if kept else self.least)


class Case(NamedTuple):
    """The arguments of one call."""

    x: Any
    w: Any
    labels: Any
    where: Any
    lam: float
    norm: float  # the largest of the features or of the columns


def program_of(choose: random.Random, dtype: str) -> Program:
    shape, margin = choose.choice(SHAPES), choose.choice(MARGINS)
    smoothing = choose.choice([0.0, 0.0, 0.1, 1.0])
    if choose.random() < 0.25:
        devices = choose.choice([n for n in (1, 2, 4) if shape[0] % n == 0])
        return Program(shape, margin, dtype, devices)
    plan, total = choose.choice(PLANS), choose.random() < 0.5
    return Program(shape, margin, dtype, 0, smoothing, plan, total, mesh_of(choose))


def mesh_of(choose: random.Random) -> Any:
    """None, or a mesh of two or four devices for the classes, with an Auto or Explicit axis."""
    if (shards := choose.choice([1, 1, 2, 4])) == 1:
        return None
    kind = choose.choice([AxisType.Auto, AxisType.Explicit])
    return jax.make_mesh((shards,), ("model",), (kind,), devices=jax.devices()[:shards])


def case_of(program: Program, rng: np.random.Generator, choose: random.Random) -> Case:
    """Draws arguments; some angles lie at a knot, some rows are opposite to a column, some zero."""
    (batch, length, classes), dtype = program.shape, jnp.dtype(program.dtype)
    x, w = rng.normal(size=(batch, length)), rng.normal(size=(length, classes))
    labels = rng.integers(0, classes, batch)
    if length > 1 and rng.random() < 0.3:
        m = max(1, int(getattr(program.margin, "margin", 1)))
        x[0, :], w[:, labels[0]] = 0, 0
        angle = np.pi * rng.integers(0, m + 1) / m
        x[0, 0], w[:2, labels[0]] = 1, [np.cos(angle), np.sin(angle)]
    norm = 10 ** (rng.uniform(-1, 1.5) if dtype == jnp.float16 else rng.uniform(-30, 30))
    if rng.random() < 0.5:
        x *= norm / np.linalg.norm(x, axis=1, keepdims=True).max()
    else:
        w *= norm / np.linalg.norm(w, axis=0).max()
    if rng.random() < 0.05:
        x[0] = 0
    x, w, labels = x.astype(dtype), w.astype(dtype), labels.astype(np.int32)
    lam = float(choose.choice([0.0, 0.1, 1.0, 10.0, 1e6]))
    return Case(x, w, labels, rng.random(batch) < 0.9, lam, norm)


@functools.partial(jax.jit, static_argnums=0)
def computed(
    program: Program, x: Any, w: Any, labels: Any, where: Any, lam: Any, scale: Any
) -> tuple[Any, Any, Any, Any]:
    """The loss times `scale`, the gradients of this product, and the inference logits."""
    classes, mesh, margin = w.shape[1], program.mesh, program.margin
    keywords = {"margin": margin, "lam": lam, "where": where, "plan": program.plan}
    keywords["label_smoothing"] = program.smoothing
    filled = w
    if mesh is not None:
        keywords["layout"] = lsm.ClassParallel("model", mesh=mesh, classes=classes)
        filled = jnp.pad(w, ((0, 0), (0, -classes % mesh.size)))
    rule: Any = lsm.lsoftmax_loss_sum if program.total else lsm.lsoftmax_loss
    loss, (dx, dw) = jax.value_and_grad(
        lambda x, w: scale * jnp.sum(rule(x, w, labels, **keywords)), (0, 1)
    )(x, filled)
    return loss, dx, dw, lsm.lsoftmax_logits(x, w, None, margin=margin, lam=lam)


class Rows(nnx.Module):
    """A model whose features are parameters; dropout drops half of them."""

    def __init__(self, x: Any, w: Any, margin: Any) -> None:
        (_, length), classes = x.shape, w.shape[1]
        self.x, self.kept = nnx.Param(x), nnx.Variable(jnp.zeros_like(x))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))
        self.head = LSoftmaxDense(
            length, classes, margin=margin, kernel_init=lambda *_: w, rngs=nnx.Rngs(0)
        )

    def __call__(self, rows: Any, where: Any = None) -> Any:
        kept = self.dropout(jnp.ones_like(self.x[...][rows]))
        self.kept[...] = jnp.zeros_like(self.x[...]).at[rows].set(kept)
        return self.x[...][rows] * kept


@functools.partial(jax.jit, static_argnums=0)
def stepped(
    program: Program, x: Any, w: Any, labels: Any, where: Any, lam: Any
) -> tuple[Any, Any, Any]:
    """Loss, gradients and logits of a training step; dropout factors; whether it was skipped."""
    margin, devices = program.margin, program.devices
    # This optimizer keeps the gradient in its state.
    optimizer = optax.trace(decay=0.0)
    graphdef, state = training.create(Rows(x, w, margin), optimizer)
    step = training.train_step(graphdef, optimizer, lambda _: lam, axis_name="data")
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    split = P("data")
    over_devices = jax.shard_map(
        step, mesh=mesh, in_specs=(P(), split, split, split), out_specs=P()
    )
    after, seen = over_devices(state, jnp.arange(len(x)), labels, where)
    grads, count = after.opt_state.trace, jnp.maximum(seen.sums.examples, 1)

    def of_sum(grad: jax.Array) -> jax.Array:
        return count * grad.astype("float32" if grad.dtype.itemsize < 4 else grad.dtype)

    kept = after.other["kept"] * devices
    logits = lsm.lsoftmax_logits(x * kept, w, None, margin=margin, lam=lam)
    found = seen.sums.loss, of_sum(grads["x"]), of_sum(grads["head"]["kernel"]), logits
    return found, kept, seen.skipped


# Whether the numbers are right.


def units(found: Any, expected: Numbers, lost: float) -> float:
    """The largest error, in units of what the dtype must lose; gradients below `lost` are lost."""
    value, dx, dw, logits = (np.asarray(array, np.float64).astype(Wide) for array in found)
    pairs = [
        (abs(value - expected.loss), expected.loss_unit),
        (np.abs(dx - expected.dx).max(axis=1, initial=0), expected.dx_unit),
        (np.abs(dw - expected.dw).max(axis=0, initial=0), expected.dw_unit),
        (np.abs(logits - expected.logits).max(axis=1, initial=0), expected.logits_unit),
    ]
    return float(max(np.max(error / (unit + lost), initial=0) for error, unit in pairs))


def spoiled(gradient: Any, axis: int, factor: float) -> Any:
    """The gradient with its largest row (axis 1) or column (axis 0) times a factor."""
    sizes = np.abs(gradient).max(axis=axis, keepdims=True)
    return np.where(sizes == sizes.max(), factor * gradient, gradient)


# The planted faults.
FAULTS: dict[str, Callable[[Any, Any, Any, Any], tuple[Any, Any, Any, Any]]] = {
    "a loss off by 1 %": lambda loss, dx, dw, z: (loss * 1.01, dx, dw, z),
    "no gradient of the features": lambda loss, dx, dw, z: (loss, dx * 0, dw, z),
    "no gradient of the kernel": lambda loss, dx, dw, z: (loss, dx, dw * 0, z),
    "gradients of two devices": lambda loss, dx, dw, z: (loss, dx * 2, dw * 2, z),
    "a row with the wrong sign": lambda loss, dx, dw, z: (loss, spoiled(dx, 1, -1), dw, z),
    "a column of half the size": lambda loss, dx, dw, z: (loss, dx, spoiled(dw, 0, 0.5), z),
    "logits of half the size": lambda loss, dx, dw, z: (loss, dx, dw, z / 2),
}


KINDS = ("cases", "failed", "cases_beyond", "not_right_beyond", "sharded", "steps")


class Tried(NamedTuple):
    """A case as it was computed, what was found, what is right, and the loss scale."""

    case: Case
    found: tuple[Any, Any, Any, Any]
    expected: Numbers
    scale: float = 1.0


def try_step(
    program: Program, case: Case, rng: np.random.Generator, seen: dict[str, Any]
) -> Tried | None:
    """A training step, beside the features after dropout; nothing to judge for an unknown label."""
    x, w, labels, where, lam, _ = case
    if unknown := rng.random() < 0.1:
        labels[0], where[0] = -1, True
    found, kept, skipped = jax.device_get(stepped(program, x, w, labels, where, lam))
    seen["steps"] += 1
    if unknown:
        if not skipped or np.any(found[1]) or np.any(found[2]):
            seen["failed"] += 1
            print(f"an unknown label is trained on: {program}")
        return None
    # Half of the features are dropped, the others doubled.
    longest = np.linalg.norm(np.float64(x * kept), axis=1).max()
    norm = max(case.norm, longest) if case.norm > 1 else case.norm
    case = case._replace(x=x * kept, norm=norm)
    expected = expected_of(program, case)
    return Tried(
        case,
        found,
        expected._replace(
            loss_unit=expected.loss_unit + EPS["float32"] * expected.loss,  # its sums are float32
            dx=expected.dx * kept,
            dx_unit=expected.dx_unit * 2,
        ),
    )


def try_loss(program: Program, case: Case, choose: random.Random) -> Tried:
    x, w, labels, where, lam, _ = case
    expected, scale = expected_of(program, case), 1.0
    if program.dtype == "float16":  # the scaled gradients must stay below 65504
        peak = max(np.abs(of).max(initial=0) for of in (expected.dx, expected.dw))
        room = 2.0 ** np.floor(np.log2(3e4 / max(float(peak), 1e-9)))
        scale = min(choose.choice([1.0, 2.0**8, 2.0**15]), room)
    with nullcontext() if program.mesh is None else jax.set_mesh(program.mesh):
        loss, dx, dw, logits = jax.device_get(computed(program, x, w, labels, where, lam, scale))
    # On a mesh the kernel was filled up.
    loss, dx, dw = (np.asarray(of, np.float64) / scale for of in (loss, dx, dw[:, : w.shape[1]]))
    return Tried(case, (loss, dx, dw, logits), expected, scale)


def expected_of(program: Program, case: Case) -> Numbers:
    x, w = (array.astype(np.float64).astype(Wide) for array in (case.x, case.w))
    named = case.labels, case.where, program.margin, case.lam, program.smoothing, program.rounding
    return exact.numbers(x, w, *named)


def judge(program: Program, tried: Tried, choose: random.Random, facts: dict[str, Any]) -> None:
    """Counts a case, and whether a fault planted in it is noticed."""
    case, found, expected, scale = tried
    seen = facts["dtypes"][program.dtype]
    lost = TINY_IN_FLOAT16 / scale if program.dtype == "float16" else program.least
    error, inside = units(found, expected, lost), CLAIMED[0] <= case.norm <= CLAIMED[1]
    seen["cases" if inside else "cases_beyond"] += 1
    seen["sharded"] += program.mesh is not None
    if not inside:
        seen["not_right_beyond"] += not error <= ALLOWED
        return
    seen["worst"] = max(seen["worst"], error) if error == error else error
    if not error <= ALLOWED:
        seen["failed"] += 1
        print(f"{error:.3g} units: norm {case.norm:.3g} λ {case.lam} {program}")
    sizes = (np.abs(of).max(initial=0) for of in (expected.loss, expected.dx, expected.dw))
    if min(sizes) > 1e3 * lost:
        name = choose.choice(list(FAULTS))
        wrong = FAULTS[name](*(np.asarray(array, np.float64) for array in found))
        noticed = not units(wrong, expected, lost) <= ALLOWED
        facts["planted"][name]["noticed" if noticed else "not"] += 1


def fuzz(
    seconds: float = 60.0, seed: int = 0, result: Path | None = None, rounds: int = 2**31
) -> int:
    """Tries a program a round until the seconds or rounds are over; returns 1 for a failure."""
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    end = time.monotonic() + seconds
    planted = {name: {"noticed": 0, "not": 0} for name in FAULTS}
    dtypes = {dtype: dict.fromkeys(KINDS, 0) | {"worst": 0.0} for dtype in EPS}
    facts: dict[str, Any] = {"power": 0.0, "planted": planted, "dtypes": dtypes}
    for dtype in islice(cycle(EPS), rounds):
        if time.monotonic() > end:
            break
        program = program_of(choose, dtype)
        for _ in range(CASES):
            case = case_of(program, rng, choose)
            with jax.enable_x64(dtype == "float64"):
                if program.is_step:
                    tried = try_step(program, case, rng, dtypes[dtype])
                else:
                    tried = try_loss(program, case, choose)
            if tried is not None:
                judge(program, tried, choose, facts)
    noticed = sum(of_one["noticed"] for of_one in planted.values())
    facts["power"] = noticed / max(1, sum(sum(of_one.values()) for of_one in planted.values()))
    print(json.dumps(facts, indent=1))
    if result is not None:
        heading = {"kind": "fuzz", "seed": seed, "seconds": seconds, "allowed": ALLOWED}
        save(result, heading | facts | {"load": os.getloadavg()[0]})
    failed = any(seen["failed"] for seen in dtypes.values())
    return int(failed or facts["power"] < POWER)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    sys.exit(tyro.cli(fuzz))
