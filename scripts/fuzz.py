"""Losses and gradients at random arguments beside an 80-bit reference that shares no code.

    python scripts/fuzz.py [SECONDS] [SEED] [RESULT.json]

Norms of the features or of the columns, one of the two at a time, go from 1e-30 to 1e30: between
1e-20 and 1e15 numbers must be right, beyond it where there is a number it is reported how often it
is not. Errors are in units of eps (1 + m²) (1 + |x| |w|), what the dtype must lose, relative to the
longest gradient that the loss can have. Half of the cases have the classes sharded over two or four
fake CPU devices.
"""

import functools
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lsoftmax_jax as lsm
from experiments.store.results import save

CLAIMED = (1e-20, 1e15)
ALLOWED = 16
MARGINS = [1, 2, 3, 4, 5, 8, 16, 33, 64]
SHAPES = [(1, 1, 1), (3, 2, 2), (5, 8, 10), (4, 16, 33), (2, 64, 5)]
PLANS = {
    "one-shot": None,
    "rows": lsm.Plan(row_block=2),
    "classes": lsm.Plan(class_block=3),
    "classes, kept": lsm.Plan(class_block=4, keep_exponentials=True),
}
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float64": 2.0**-52}
Wide = np.longdouble


def reference(x: Any, w: Any, labels: Any, margin: int, lam: float, smoothing: float) -> Any:
    """Loss, gradients of its sum and |x| |w| of the label; all in 80 bits, angle by angle."""
    losses, dx, dw, products = [], np.zeros_like(x), np.zeros_like(w), []
    classes, share = w.shape[1], 1 / (1 + Wide(lam))
    for i, y in enumerate(labels):
        a, b = np.sqrt(np.sum(x[i] ** 2)), np.sqrt(np.sum(w[:, y] ** 2))
        logits, n = x[i] @ w, a * b
        cosine = np.clip(logits[y] / n, -1, 1) if n > 0 else Wide(0)
        theta = np.arccos(cosine)
        k = min(int(margin * theta / np.arccos(Wide(-1))), margin - 1)
        sign = -1 if k % 2 else 1
        psi = sign * np.cos(margin * theta) - 2 * k
        sine = np.sin(theta)
        slope = sign * margin * np.sin(margin * theta) / sine if sine > 1e-9 else Wide(margin) ** 2
        ux, uw = (x[i] / a if a > 0 else x[i]), (w[:, y] / b if b > 0 else w[:, y])
        # d(n psi(u / n)) = slope du + (psi - slope cosine) dn
        along = psi - slope * cosine
        tx = (1 - share) * w[:, y] + share * (slope * w[:, y] + along * b * ux)
        tw = (1 - share) * x[i] + share * (slope * x[i] + along * a * uw)
        logits[y] = (1 - share) * logits[y] + share * n * psi
        top = logits.max()
        z = top + np.log(np.sum(np.exp(logits - top)))
        wanted = np.full(classes, smoothing / Wide(classes))
        wanted[y] += 1 - smoothing
        losses.append(np.sum(wanted * (z - logits)))
        g = np.exp(logits - z) - wanted
        others = np.arange(classes) != y
        dx[i] = w[:, others] @ g[others] + g[y] * tx
        dw[:, others] += np.outer(x[i], g[others])
        dw[:, y] += g[y] * tw
        products.append(n)
    return np.array(losses), dx, dw, np.array(products)


@functools.partial(jax.jit, static_argnames=("margin", "smoothing", "plan", "total", "shards"))
def computed(x: Any, w: Any, labels: Any, where: Any, lam: Any, **static: Any) -> Any:
    total, shards, (_, classes) = static.pop("total"), static.pop("shards"), w.shape
    keywords = {"margin": static["margin"], "lam": lam, "where": where, "plan": static["plan"]}
    keywords["label_smoothing"] = static["smoothing"]
    rules: Any = lsm
    if shards > 1:
        mesh = jax.make_mesh((shards,), ("model",), devices=jax.devices()[:shards])
        rules, w = lsm.sharded, jnp.pad(w, ((0, 0), (0, -classes % shards)))
        keywords["layout"] = lsm.ClassParallel("model", mesh=mesh, classes=classes)
    rule = rules.lsoftmax_loss_sum if total else rules.lsoftmax_loss
    loss, (dx, dw) = jax.value_and_grad(
        lambda x, w: jnp.sum(rule(x, w, labels, **keywords)), (0, 1)
    )(x, w)
    return loss, (dx, dw[:, :classes])


def drawn(rng: np.random.Generator, shape: tuple[int, int, int], margin: int, dtype: str) -> Any:
    """Arguments of a case, in its dtype; some at a knot, some opposite, some zero."""
    batch, length, classes = shape
    x, w = rng.normal(size=(batch, length)), rng.normal(size=(length, classes))
    labels = rng.integers(0, classes, batch)
    if length > 1 and rng.random() < 0.3:
        x[0, :], w[:, labels[0]] = 0, 0
        angle = np.pi * rng.integers(0, margin + 1) / margin
        x[0, 0], w[:2, labels[0]] = 1, [np.cos(angle), np.sin(angle)]
    norm = 10 ** rng.uniform(-30, 30)
    if rng.random() < 0.5:
        x *= norm / np.linalg.norm(x, axis=1, keepdims=True).max()
    else:
        w *= norm / np.linalg.norm(w, axis=0).max()
    if rng.random() < 0.05:
        x[0] = 0
    kind = jnp.dtype(dtype)
    return x.astype(kind), w.astype(kind), labels.astype(np.int32), norm


def fuzz(seconds: float = 60.0, seed: int = 0, result: Path | None = None) -> int:
    rng, choose = np.random.default_rng(seed), random.Random(seed)
    end, worst = time.monotonic() + seconds, dict.fromkeys(EPS, 0.0)
    count: Counter[tuple[str, bool]] = Counter()
    sharded = 0
    odd: Counter[tuple[str, bool]] = Counter()
    failed = 0
    while time.monotonic() < end:
        shape, margin = choose.choice(SHAPES), choose.choice(MARGINS)
        dtype, plan = choose.choice(list(EPS)), choose.choice(list(PLANS))
        smoothing, total = choose.choice([0.0, 0.0, 0.1, 1.0]), choose.random() < 0.5
        static: dict[str, Any] = {
            "margin": margin,
            "smoothing": smoothing,
            "plan": PLANS[plan],
            "total": total,
        }
        static["shards"] = choose.choice([1, 1, 2, 4])
        for _ in range(40):
            x, w, labels, norm = drawn(rng, shape, margin, dtype)
            lam = float(choose.choice([0.0, 0.1, 1.0, 10.0, 1e6]))
            where = rng.random(shape[0]) < 0.9
            with jax.enable_x64(dtype == "float64"):
                value, (dx, dw) = jax.device_get(computed(x, w, labels, where, lam, **static))
            wide = [array.astype(np.float64).astype(Wide) for array in (x, w)]
            loss, rx, rw, n = reference(wide[0][where], wide[1], labels[where], margin, lam,
                                        smoothing)  # fmt: skip
            exact = np.zeros_like(wide[0])
            exact[where] = rx
            allowed = EPS[dtype] * (1 + margin**2) * (1 + n.max(initial=0))
            longest = np.linalg.norm(wide[1].astype(float), axis=0).max()
            furthest = np.linalg.norm(wide[0].astype(float), axis=1).sum()
            errors = [
                abs(float(value) - float(loss.sum())) / (1 + abs(float(loss.sum()))),
                float(np.abs(dx.astype(np.float64) - exact).max()) / (longest or 1),
                float(np.abs(dw.astype(np.float64) - rw).max()) / (furthest or 1),
            ]
            error = float(np.max(errors)) / float(allowed)
            inside = CLAIMED[0] <= norm <= CLAIMED[1]
            count[dtype, inside] += 1
            sharded += static["shards"] > 1
            if inside and not error <= worst[dtype]:
                worst[dtype] = error
            if not error <= ALLOWED:
                odd[dtype, inside] += 1
                failed += inside
                if inside and failed <= 5:
                    print(f"{error:.3g} units: {dtype} {shape} norm {norm:.3g} λ {lam} {static}")
    for dtype in EPS:
        print(
            f"{dtype}: {count[dtype, True]} cases within the claim, worst {worst[dtype]:.3g} units "
            f"of what the dtype must lose; {odd[dtype, False]} of {count[dtype, False]} beyond "
            "the claim are not right"
        )
    if result is not None:
        found = {
            dtype: {
                "cases": count[dtype, True],
                "worst": worst[dtype],
                "failed": odd[dtype, True],
                "cases_beyond": count[dtype, False],
                "not_right_beyond": odd[dtype, False],
            }
            for dtype in EPS
        }
        facts = {"kind": "fuzz", "seed": seed, "seconds": seconds, "allowed": ALLOWED}
        save(result, facts | {"sharded": sharded, "load": os.getloadavg()[0], "dtypes": found})
    return int(failed > 0)


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
