"""Compares losses and gradients at random arguments with an independent 80-bit reference.

    python scripts/fuzz.py [SECONDS] [SEED] [RESULT.json]

Most cases call a loss and the inference logits, on one device or on a mesh of Auto or Explicit
axes; float16 has a loss scale up to 2**15. The other cases make a training step in `jax.shard_map`,
with dropout. A tenth of the steps have an unknown label, and must change nothing.

The norms of either the features or the columns go from 1e-30 to 1e30, in float16 from 0.1 to 30.
Between 1e-20 and 1e15 the numbers must be right. Outside this range the script reports how often
the numbers are wrong.

The unit of an error is what the dtype must lose: eps times the sum of the lengths of the terms,
with a factor for the conditioning of the margin and of the softmax (`Reference`). Each loss, each
row of the features' gradient and of the logits, and each column of the kernel's gradient has its
own unit. A case fails above 4 units.

The script also plants faults in its results. The power of the fuzz is the share of these faults
that are noticed; below 95 % the script fails.
"""

import functools
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from experiments.store.results import save
from lsoftmax_jax import training
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, NormFace, SphereFace
from lsoftmax_jax.nnx import LSoftmaxDense

CLAIMED = (1e-20, 1e15)
ALLOWED = 4
POWER = 0.95
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
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float64": 2.0**-52, "float16": 2.0**-11}
# Intermediate numbers below these sizes round to zero, like factors below the least normal number.
# In float16 the logits' gradient ends at 2**-30 of the largest cotangent. Gradients, and the
# exponentials that class blocks keep, end at 2**-24.
TINY = {"float64": np.finfo("float64").tiny, "float16": 2.0**-30}
KEPT_TINY = 2.0**-24
Wide = np.longdouble
PI = np.arccos(Wide(-1))


def value_and_slope(margin: Any, theta: Any) -> tuple[Any, Any]:
    """v and dv / d cos(theta) at an angle; an angular margin's slope is bounded near angle 0."""
    sine = np.sin(theta)
    if isinstance(margin, (lsm.margins.LSoftmax, SphereFace)):
        m = margin.margin
        k = min(int(m * theta / PI), m - 1)
        sign = -1 if k % 2 else 1
        slope = sign * m * np.sin(m * theta) / sine if sine > 1e-9 else Wide(m) ** 2
        return sign * np.cos(m * theta) - 2 * k, slope
    if isinstance(margin, (NormFace, CosFace)):
        return np.cos(theta) - Wide(getattr(margin, "margin", 0)), Wide(1)
    m1, m2, m3 = (
        (margin.m1, margin.m2, margin.m3) if isinstance(margin, Combined) else (1, margin.margin, 0)
    )
    angle = m1 * theta + m2
    if angle > PI:
        return np.cos(theta) - np.cos((PI - m2) / m1) - 1 - m3, Wide(1)
    return np.cos(angle) - m3, m1 * np.sin(angle) / max(sine, Wide(1e-12))


class Reference(NamedTuple):
    """Exact losses, gradients of their sum and inference logits, and the unit of each of them."""

    loss: Any
    loss_unit: Any
    dx: Any
    dx_unit: Any
    dw: Any
    dw_unit: Any
    logits: Any
    logits_unit: Any


def reference(
    x: Any,
    w: Any,
    labels: Any,
    where: Any,
    margin: Any,
    lam: float,
    e: float,
    dtype: str,
    tiny: float,
) -> Reference:
    """Computes `Reference` in 80 bits, row by row.

    Args:
      where: the rows that count for loss and gradients.
      e: label smoothing.
      dtype: dtype of the operands; sums and angles are float32 or better.
      tiny: the size below which the gradient of a logit rounds to zero.
    """
    classes, share, eps = w.shape[1], 1 / (1 + Wide(lam)), EPS[dtype]
    fine = min(eps, EPS["float32"])
    m = (
        getattr(margin, "margin", 1)
        if isinstance(margin, (lsm.margins.LSoftmax, SphereFace))
        else 1
    )
    losses, units, plain, plain_unit = [], [], np.zeros((len(x), classes), Wide), []
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    dx_unit, dw_unit = np.zeros(len(x), Wide), np.zeros(classes, Wide)
    lengths = np.sqrt(np.sum(w**2, axis=0))
    directions = np.divide(w, lengths, out=np.zeros_like(w), where=lengths > 0)
    kept, scale = not margin.unit_columns and margin.scale is None, margin.scale
    columns = w if kept else directions  # the columns in the logits
    for i, y in enumerate(labels):
        a = np.sqrt(np.sum(x[i] ** 2))
        ux = x[i] / a if a > 0 else np.zeros_like(x[i])
        cosines = np.clip(ux @ directions, -1, 1)
        size = a if scale is None else Wide(scale)
        row = x[i] if scale is None else size * ux
        norms = size * (lengths if kept else np.ones(classes, Wide))
        logits = row @ columns
        plain[i] = logits
        plain_unit.append(eps * norms.max(initial=0))
        if not where[i]:
            continue
        theta = np.arccos(cosines[y])
        value, slope = value_and_slope(margin, theta)
        logits[y] = (1 - share) * norms[y] * cosines[y] + share * norms[y] * value
        others = np.arange(classes) != y
        alpha, along = 1 + share * (slope - 1), share * (value - slope * cosines[y])
        # An unbounded slope, and the derivative of this slope, magnify the rounding of the cosine.
        steep = 1 / max(np.sin(theta), np.sqrt(fine)) if abs(slope) > 1 and m == 1 else Wide(1)
        # The second derivative of T_m, about m² / sin² and at most m⁴, magnifies it too.
        curved = min(1 / max(np.sin(theta), fine), Wide(m))
        bend = (1 + share * m**2 * curved**2) * steep**2
        top = logits.max()
        z = top + np.log(np.sum(np.exp(logits - top)))
        p = np.exp(logits - z)
        rest = np.sum(p[others])
        # The recurrence of T_m gathers at most m roundings of U_j <= min(m, 1 / sin theta).
        rounded = 1 + share * (abs(slope) + m * min(Wide(m), 1 / max(np.sin(theta), fine)))
        # How far the rounding of the logits can move each probability.
        shaken = fine * norms.max(initial=0) * rounded
        odds = np.maximum(np.abs(logits - z_without(logits, z)) - 4 * ALLOWED * shaken, 0)
        moved = np.minimum(shaken, 1) * np.exp(-odds) / (1 + np.exp(-odds)) ** 2
        wanted = np.full(classes, e / Wide(classes))
        wanted[y] += 1 - e
        # z - t as a softplus: the difference of two large numbers has no digits left.
        below = z_without(logits, z)[y] - logits[y]
        missed = np.logaddexp(Wide(0), below)
        losses.append((1 - e) * missed + e * (missed + np.mean(logits[y] - logits)))
        spread = norms.max(initial=0) * rounded
        units.append(fine * (losses[-1] + e * spread) + shaken * min(1, rest * np.exp(
            min(4 * ALLOWED * shaken, Wide(700))) + (e > 0)))  # fmt: skip
        g = p - wanted
        if not e:
            g[y] = -rest
        size_of_g = p + e / classes
        size_of_g[y] = e * (p[y] + 1 / Wide(classes)) + (1 - e) * rest
        # Gradients by row and by column; the part along a fixed length is removed below.
        by_row, by_column = g[others] @ columns[:, others].T, np.outer(row, g[others])
        by_row = by_row + g[y] * (alpha * columns[:, y] + along * norms[y] / (size or 1) * ux)
        dw_i = np.zeros_like(w)
        dw_i[:, others] = by_column
        dw_i[:, y] = g[y] * (alpha * row + along * size * directions[:, y])
        if scale is not None:
            by_row = (by_row - ux * (ux @ by_row)) * (size / a if a > 0 else 0)
        if not kept:
            dw_i -= directions * np.sum(directions * dw_i, axis=0)
            dw_i = np.divide(dw_i, lengths, out=np.zeros_like(w), where=lengths > 0)
        dx[i] = by_row
        dw += dw_i
        # Lengths of the terms: float32 rounds the sums, and the dtype rounds the operands.
        target = alpha_size(share, slope, value) * size_of_g[y]
        terms = np.where(others, size_of_g, target)
        terms = eps * terms + fine * np.where(others, size_of_g, bend * size_of_g[y]) + moved * (
            np.where(others, 1, 1 + abs(alpha) + abs(along)))  # fmt: skip
        terms = terms + tiny
        by_x = lengths if kept else np.ones(classes, Wide)
        if scale is not None:
            by_x = np.full(classes, size / a if a > 0 else 0, Wide)
        dx_unit[i] = np.sum(terms * by_x)
        by_w = np.divide(size, lengths, out=np.zeros(classes, Wide), where=lengths > 0)
        dw_unit += terms * (np.full(classes, size) if kept else by_w)
    loss_unit = np.sum(units) if units else Wide(0)
    logits_unit = np.array(plain_unit, Wide)
    return Reference(np.sum(losses), loss_unit, dx, dx_unit, dw, dw_unit, plain, logits_unit)


def alpha_size(share: Any, slope: Any, value: Any) -> Any:
    return (1 - share) + share * (1 + 2 * abs(slope) + abs(value))


def z_without(logits: Any, z: Any) -> Any:
    """For each class, the logsumexp of the other logits."""
    found = np.full(len(logits), -np.inf, Wide)
    for j in range(len(logits)):
        rest = np.delete(logits, j)
        if rest.size:
            found[j] = rest.max() + np.log(np.sum(np.exp(rest - rest.max())))
    return found


def units(found: Any, exact: Reference, dtype: str, scale: float = 1.0) -> float:
    """The largest error, in units of what the dtype must lose."""
    value, dx, dw, logits = (np.asarray(array, np.float64).astype(Wide) for array in found)
    pairs = [
        (abs(value - exact.loss), exact.loss_unit),
        (np.abs(dx - exact.dx).max(axis=1, initial=0), exact.dx_unit),
        (np.abs(dw - exact.dw).max(axis=0, initial=0), exact.dw_unit),
        (np.abs(logits - exact.logits).max(axis=1, initial=0), exact.logits_unit),
    ]
    least_unit = lost(dtype, scale)
    return float(max(np.max(error / (unit + least_unit), initial=0) for error, unit in pairs))


def lost(dtype: str, scale: float) -> float:
    """The size below which a gradient in this dtype is lost."""
    return 2.0**-24 / scale if dtype == "float16" else least(dtype)


def least(dtype: str) -> float:
    return float(TINY.get(dtype, np.finfo("float32").tiny))


Fault = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any, Any]]
# The planted faults; a fault of one row or column changes the one with the largest gradient.
FAULTS: dict[str, Fault] = {
    "a loss off by 1 %": lambda loss, dx, dw, z: (loss * 1.01, dx, dw, z),
    "no gradient of the features": lambda loss, dx, dw, z: (loss, dx * 0, dw, z),
    "no gradient of the kernel": lambda loss, dx, dw, z: (loss, dx, dw * 0, z),
    "gradients of two devices": lambda loss, dx, dw, z: (loss, dx * 2, dw * 2, z),
    "a row with the wrong sign": lambda loss, dx, dw, z: (
        loss, np.where(rows(dx) == np.abs(dx).max(axis=1).argmax(), -dx, dx), dw, z
    ),
    "a column of half the size": lambda loss, dx, dw, z: (
        loss, dx, np.where(np.arange(dw.shape[1]) == np.abs(dw).max(axis=0).argmax(), dw / 2, dw), z
    ),
    "logits of half the size": lambda loss, dx, dw, z: (loss, dx, dw, z / 2),
}  # fmt: skip


def rows(dx: Any) -> Any:
    return np.arange(len(dx))[:, None]


STATIC = ("margin", "smoothing", "plan", "total", "mesh")


@functools.partial(jax.jit, static_argnames=STATIC)
def computed(x: Any, w: Any, labels: Any, where: Any, lam: Any, scale: Any, **static: Any) -> Any:
    """The loss times `scale`, the gradients of this product, and the inference logits."""
    classes, mesh, margin = w.shape[1], static["mesh"], static["margin"]
    keywords = {"margin": margin, "lam": lam, "where": where, "plan": static["plan"]}
    keywords["label_smoothing"] = static["smoothing"]
    filled = w
    if mesh is not None:
        keywords["layout"] = lsm.ClassParallel("model", mesh=mesh, classes=classes)
        filled = jnp.pad(w, ((0, 0), (0, -classes % mesh.size)))
    rule: Any = lsm.lsoftmax_loss_sum if static["total"] else lsm.lsoftmax_loss
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


@functools.partial(jax.jit, static_argnames=("margin", "devices"))
def stepped(
    x: Any, w: Any, labels: Any, where: Any, lam: Any, *, margin: Any, devices: int
) -> tuple[Any, Any, Any]:
    """Loss, gradients and logits of a training step; dropout factors; whether it was skipped."""
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
    dx, dw = (array.astype("float32" if array.dtype.itemsize < 4 else array.dtype) * count
              for array in (grads["x"], grads["head"]["kernel"]))  # fmt: skip
    kept = after.other["kept"] * devices
    logits = lsm.lsoftmax_logits(x * kept, w, None, margin=margin, lam=lam)
    return (seen.sums.loss, dx, dw, logits), kept, seen.skipped


def drawn(rng: np.random.Generator, shape: tuple[int, int, int], margin: Any, dtype: str) -> Any:
    """Draws a case's arguments in its dtype; some lie at a knot, some are opposite, some zero."""
    batch, length, classes = shape
    x, w = rng.normal(size=(batch, length)), rng.normal(size=(length, classes))
    labels = rng.integers(0, classes, batch)
    if length > 1 and rng.random() < 0.3:
        m = max(1, int(getattr(margin, "margin", 1)))
        x[0, :], w[:, labels[0]] = 0, 0
        angle = np.pi * rng.integers(0, m + 1) / m
        x[0, 0], w[:2, labels[0]] = 1, [np.cos(angle), np.sin(angle)]
    norm = 10 ** (rng.uniform(-1, 1.5) if dtype == "float16" else rng.uniform(-30, 30))
    if rng.random() < 0.5:
        x *= norm / np.linalg.norm(x, axis=1, keepdims=True).max()
    else:
        w *= norm / np.linalg.norm(w, axis=0).max()
    if rng.random() < 0.05:
        x[0] = 0
    kind = jnp.dtype(dtype)
    return x.astype(kind), w.astype(kind), labels.astype(np.int32), norm


def mesh_of(choose: random.Random) -> Any:
    """None, or a mesh of two or four devices for the classes, with an Auto or Explicit axis."""
    if (shards := choose.choice([1, 1, 2, 4])) == 1:
        return None
    kind = choose.choice([AxisType.Auto, AxisType.Explicit])
    return jax.make_mesh((shards,), ("model",), (kind,), devices=jax.devices()[:shards])


def fuzz(
    seconds: float = 60.0, seed: int = 0, result: Path | None = None, rounds: int = 2**31
) -> int:
    """Tries rounds of 40 cases until the seconds or rounds are over; returns 1 for a failure."""
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    end, worst = time.monotonic() + seconds, dict.fromkeys(EPS, 0.0)
    count: Counter[tuple[str, str]] = Counter()
    planted: Counter[tuple[str, bool]] = Counter()
    while time.monotonic() < end and (rounds := rounds - 1) >= 0:
        shape, margin = choose.choice(SHAPES), choose.choice(MARGINS)
        dtype, smoothing = choose.choice(list(EPS)), choose.choice([0.0, 0.0, 0.1, 1.0])
        static: dict[str, Any] = {"margin": margin}
        if step := choose.random() < 0.25:
            static["devices"] = choose.choice([n for n in (1, 2, 4) if shape[0] % n == 0])
            smoothing = 0.0
        else:
            static |= {"smoothing": smoothing, "plan": choose.choice(PLANS)}
            static |= {"total": choose.random() < 0.5, "mesh": mesh_of(choose)}
        mesh = static.get("mesh")
        for _ in range(40):
            x, w, labels, norm = drawn(rng, shape, margin, dtype)
            lam = float(choose.choice([0.0, 0.1, 1.0, 10.0, 1e6]))
            where, scale, kept = rng.random(shape[0]) < 0.9, 1.0, np.ones(x.shape)
            unknown = step and rng.random() < 0.1
            if unknown:
                labels[0], where[0] = -1, True
            if step:
                with jax.enable_x64(dtype == "float64"):
                    found, kept, skipped = jax.device_get(
                        stepped(x, w, labels, where, lam, **static)
                    )
                count[dtype, "steps"] += 1
            if unknown:
                if not skipped or np.any(found[1]) or np.any(found[2]):
                    count[dtype, "failed"] += 1
                    print(f"an unknown label is trained on: {dtype} {shape} {static}")
                continue
            wide, columns = (array.astype(np.float64).astype(Wide) for array in (x * kept, w))
            in_blocks = dtype == "float16" and getattr(static.get("plan"), "class_block", None)
            tiny = KEPT_TINY if in_blocks else least(dtype)
            exact = reference(wide, columns, labels, where, margin, lam, smoothing, dtype, tiny)
            if step:
                # A step's sums are float32; half of the features are dropped, the others doubled.
                exact = exact._replace(
                    loss_unit=exact.loss_unit + EPS["float32"] * exact.loss,
                    dx=exact.dx * kept,
                    dx_unit=exact.dx_unit * 2,
                )
            else:
                if dtype == "float16":  # the scaled gradients must stay below 65504
                    peak = max(np.abs(exact.dx).max(initial=0), np.abs(exact.dw).max(initial=0))
                    room = 2.0 ** np.floor(np.log2(3e4 / max(float(peak), 1e-9)))
                    scale = min(choose.choice([1.0, 2.0**8, 2.0**15]), room)
                set_mesh = nullcontext() if mesh is None else jax.set_mesh(mesh)
                with jax.enable_x64(dtype == "float64"), set_mesh:
                    found = jax.device_get(computed(x, w, labels, where, lam, scale, **static))
            value, dx, dw, logits = (np.asarray(array, np.float64) for array in found)
            found = value / scale, dx / scale, dw[:, : shape[2]] / scale, logits
            error = units(found, exact, dtype, scale)
            inside = CLAIMED[0] <= norm <= CLAIMED[1]
            count[dtype, "cases" if inside else "cases_beyond"] += 1
            count[dtype, "sharded"] += mesh is not None
            if not inside:
                count[dtype, "not_right_beyond"] += not error <= ALLOWED
                continue
            worst[dtype] = max(worst[dtype], error) if error == error else error
            if not error <= ALLOWED:
                count[dtype, "failed"] += 1
                print(f"{error:.3g} units: {dtype} {shape} norm {norm:.3g} λ {lam} {static}")
            seen = 1e3 * lost(dtype, scale)
            if min(np.abs(a).max(initial=0) for a in (exact.loss, exact.dx, exact.dw)) > seen:
                name = choose.choice(list(FAULTS))
                wrong = FAULTS[name](*found)
                planted[name, not units(wrong, exact, dtype, scale) <= ALLOWED] += 1
    found_of = {name: (planted[name, True], planted[name, False]) for name in FAULTS}
    power = sum(yes for yes, _ in found_of.values()) / max(1, sum(planted.values()))
    for dtype in EPS:
        print(
            f"{dtype}: {count[dtype, 'cases']} cases within the claim, worst {worst[dtype]:.3g} "
            f"units; {count[dtype, 'not_right_beyond']} of {count[dtype, 'cases_beyond']} beyond "
            f"the claim are not right"
        )
    for name, (yes, no) in found_of.items():
        print(f"planted, {name}: noticed in {yes} of {yes + no} cases")
    print(f"{100 * power:.1f} % of the planted faults are noticed")
    if result is not None:
        kinds = ("cases", "failed", "cases_beyond", "not_right_beyond", "sharded", "steps")
        dtypes = {d: {k: count[d, k] for k in kinds} | {"worst": worst[d]} for d in EPS}
        facts = {"kind": "fuzz", "seed": seed, "seconds": seconds, "allowed": ALLOWED}
        facts |= {"power": power, "planted": {n: {"noticed": y, "not": o} for n, (y, o) in
                  found_of.items()}}  # fmt: skip
        save(result, facts | {"load": os.getloadavg()[0], "dtypes": dtypes})
    failed = sum(count[dtype, "failed"] for dtype in EPS)
    return int(failed > 0 or power < POWER)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)
    given = sys.argv[1:]
    sys.exit(
        fuzz(
            float(given[0]) if given else 60.0,
            int(given[1]) if given[1:] else 0,
            Path(given[2]) if given[2:] else None,
        )
    )
