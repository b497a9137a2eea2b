"""The largest head that chips train which are not here: `python -m experiments compile`."""

import bisect
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from experiments.benchmarks import arms, hlo, tables
from experiments.benchmarks.arms import Shape
from experiments.benchmarks.records import earlier, heading
from experiments.benchmarks.tables import amount
from experiments.benchmarks.targets import Target, compilers
from experiments.store.claims import command_line
from experiments.store.results import save

BATCH, DIM, DTYPE = 4096, 512, "bf16"
STATE = 2 + 4  # bytes of a number of the kernel, and of its momentum
WAYS = {"plain": arms.PLAIN_SGD, "ours": arms.FUSED_SGD}


def largest(on: Target, out: Path) -> None:
    """Searches, prints a table and writes a file."""
    file = out / f"{on.name.replace(':', '-')}-largest.json"
    tables.show(table(search(on, file)))
    print(f"{file} written")


def search(on: Target, file: Path) -> list[dict[str, Any]]:
    """The largest heads of a target's one chip and of all its chips, with the classes over them.

    Every size that was tried stands in the file, which is written after each: a stopped search
    goes on where it was, if commit and versions are the same. Plain softmax is tried on one chip.
    """
    chips = len(on.devices)
    result = heading("largest head", command_line(), chips) | {
        "compilers": compilers(),
        "device": "none: compiled, not run",
        "target": on.name,
        "memory_bytes": on.chip.memory,
        "config": {"batch": BATCH, "dim": DIM, "dtype": DTYPE},
    }
    saved = earlier(file, result, ("commit", "versions", "compilers", "config"), "tried")
    tried: list[dict[str, Any]] = saved["tried"] if saved else []
    rows: list[dict[str, Any]] = []

    def fits(classes: int, model: int, way: str) -> bool:
        key = {"data": 1, "model": model, "way": way, "classes": classes}
        for entry in tried:
            if entry.items() >= key.items():
                return entry["refused"] is None
        needed = refused(on, Shape(BATCH, DIM, classes), model, way)
        says = "fits" if needed is None else f"does not fit: {needed}"
        print(f"{on.name}, {way}, chips {model}: {classes:,} classes: {says}", flush=True)
        tried.append(key | {"refused": needed})
        save(file, result | {"largest": rows, "tried": tried})
        return tried[-1]["refused"] is None

    for model in sorted({1, chips}):
        bound = on.chip.memory * model // (DIM * STATE)
        row = {"data": 1, "model": model, "bound": bound, "plain": None}
        for way in WAYS if model == 1 else ("ours",):
            row[way] = bisected(functools.partial(fits, model=model, way=way), bound)
        rows.append(row)
        save(file, result | {"largest": rows, "tried": tried})
    return rows


def refused(on: Target, shape: Shape, model: int, way: str) -> str | None:
    """The memory that a step would need, and that there is; None if the step fits."""
    mesh = on.mesh((1, model), ("data", "model"))
    layout = arms.on_mesh(mesh, shape.classes) if model > 1 else None
    filled = shape if layout is None else shape._replace(classes=layout.columns(shape.classes))
    (arm,) = (arm for arm in arms.arms(filled, layout=layout) if arm.name == WAYS[way])
    lowered = arm.lower(*arms.placed_on(mesh, arms.abstract(filled, DTYPE), arm))
    compiled = on.compile(lowered)
    if isinstance(compiled, str):
        return compiled
    needed = hlo.facts(compiled, sys.maxsize).needed_bytes
    return f"{amount(needed)} of {amount(on.chip.memory)}" if needed > on.chip.memory else None


def bisected(fits: Callable[[int], bool], bound: int) -> int:
    """The most classes that fit, in hundredths of a bound; 0 if not one hundredth does."""
    sizes = [bound * percent // 100 for percent in range(101)]
    return sizes[bisect.bisect(sizes, False, 1, key=lambda size: not fits(size)) - 1]


def table(rows: list[dict[str, Any]]) -> Table:
    """The largest heads of plain softmax and of this library, on one chip and on all."""
    title = f"largest head, {DIM} features, batch {BATCH}, {DTYPE}; compiled, not run"
    view = tables.table(title, ["chips"], ["state alone", "plain softmax", "ours", "ours, share"])
    for row in rows:
        sizes = (
            "" if row[name] is None else f"{row[name]:,}" for name in ("bound", "plain", "ours")
        )
        share = f"{100 * row['ours'] / row['bound']:.0f} %"
        view.add_row(str(row["model"]), *sizes, share)
    return view
