"""Compiles the heads and steps for TPUs and GPUs: `python -m experiments compile`.

Nothing runs and no accelerator is needed. A table for people, a JSON with everything.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered
from rich.table import Table

from experiments.benchmarks import arms as every
from experiments.benchmarks import hlo, notebooks, tables
from experiments.benchmarks.arms import Arm, Shape
from experiments.benchmarks.largest import largest
from experiments.benchmarks.records import earlier, heading
from experiments.benchmarks.tables import amount
from experiments.benchmarks.targets import Target, compilers, placed, target
from experiments.faces.recipe import FaceRecipe
from experiments.paper.cells import CONFIGS
from experiments.paper.config import Config
from experiments.run.program import network_state
from experiments.store.claims import command_line
from experiments.store.progress import tracked
from experiments.store.results import save
from lsoftmax_jax import devices, training

OUT = Path("runs") / "compiled"
# Heads of the paper's size, of a face recogniser, and of 1e5 and 1e6 identities.
SIZES = (
    (Shape(256, 256, 10), "f32"),
    (Shape(512, 512, 10575), "bf16"),
    (Shape(512, 256, 102400), "bf16"),
    (Shape(4096, 512, 1_000_000), "bf16"),
)
ARMS = (
    every.PLAIN,
    every.DEFAULT,
    every.ONE_SHOT,
    "loss_sum, row blocks",
    every.RECOMPUTED,
    every.STORED,
    *every.FAMILY,
    every.ARCFACE_BLOCKS,
    every.PLAIN_SGD,
    every.FUSED_SGD,
    every.SAMPLED,
)
# Heads whose classes are sharded over all chips of a slice.
SHARDED = tuple(Shape(8192, 512, classes) for classes in (10**6, 10**7, 10**8))
NETWORKS = ("mnist", "cifar10plus", "cifar100")
UPDATES = 100
PEOPLE = 10_575  # of CASIA-WebFace


class Case(NamedTuple):
    """One program for one target."""

    name: str
    size: str
    lower: Callable[[], Lowered]
    devices: int = 1
    elements: int = 0  # of the kernel on a device: moves of at least as many are listed
    flops: int = 0  # of a head's products, on a device

    @property
    def title(self) -> str:
        return f"{self.name} {self.size}"


def compile_(
    targets: tuple[str, ...] = ("v5e:2x4", "v6e:2x4"),
    shapes: tuple[tuple[int, int, int], ...] = (),
    dtype: Literal["f32", "bf16"] = "bf16",
    heads: bool = True,
    steps: bool = True,
    only: str = "",
    largest_head: bool = False,
    out: Path = OUT,
) -> None:
    """Compiles heads and training steps for TPUs and GPUs that are not here, and reports.

    A program of the same commit and the same versions is not compiled again: what was stopped
    goes on, and a slice finds the programs of its one chip done.

    Args:
      targets: such as v5e:2x4, v5e:16x16, v6e:16x16, v5p:2x2x1, h100, h200, a100, b200.
      shapes: heads of your own, three numbers each: batch, feature length and classes. They take
        the place of the usual heads, and steps are left out.
      dtype: of features and kernel of your own heads.
      heads: compile the heads.
      steps: compile whole steps of the paper's networks; for a TPU one to six minutes each.
      only: a part of a name; only such cases are compiled.
      largest_head: only find the largest head of 512 features that one chip trains, and all of
        them; half an hour a target.
      out: folder of the results, two files a chip and two a slice.
    """
    if shapes and min(map(min, shapes)) < 1:
        raise ValueError(f"shapes must be at least 1, got {shapes}")
    named = [target(name) for name in targets]
    if largest_head:
        for on in named:
            largest(on, out)
        return
    own = tuple((Shape(*shape), dtype) for shape in shapes)
    wanted = {"heads": heads, "steps": steps and not own}
    parts = [part for on in named for part in parts_of(on, own) if wanted[part.kind]]
    if not any(only in case.title for part in parts for case in part.cases):
        raise ValueError(f"only: no program has {only!r} in its name or size")
    for part in parts:
        compile_part(part, only, out)


class Part(NamedTuple):
    """The programs of a file."""

    on: Target
    name: str  # of a chip, or of a slice
    kind: str  # heads or steps
    cases: list[Case]


def parts_of(on: Target, own: tuple[tuple[Shape, str], ...] = ()) -> Iterator[Part]:
    chip = on.name.partition(":")[0]
    yield Part(on, chip, "heads", [*head_cases(on, own or SIZES)])
    yield Part(on, chip, "steps", [*step_cases(on)])
    if len(on.devices) > 1:
        sharded = own or tuple((shape, "bf16") for shape in SHARDED)
        yield Part(on, on.name, "heads", [*slice_head_cases(on, sharded)])
        yield Part(on, on.name, "steps", [*slice_step_cases(on)])


def compile_part(part: Part, only: str, out: Path) -> None:
    """Compiles what is not done yet, prints the part's table and writes its file."""
    on, file = part.on, out / f"{part.name.replace(':', '-')}-{part.kind}.json"
    result = heading(f"compile {part.kind}", command_line()) | {
        "compilers": compilers(),
        "device": "none: compiled, not run",
        "target": part.name,
        "chip": on.chip._asdict() | {"config": " ".join(on.chip.config.split())},
    }
    saved = earlier(file, result, ("versions", "compilers"), "programs")
    rows = {f"{row['name']} {row['size']}": row for row in saved["programs"]} if saved else {}
    asked, commit = [case for case in part.cases if only in case.title], result["commit"]
    # A program of the same commit is done, if the clone had no changes then or now.
    clean = commit is not None and not commit.endswith("-changed")
    done = {title for title, row in rows.items() if clean and row["commit"] == commit}
    chosen = [case for case in asked if case.title not in done]
    for case in tracked(chosen, len(chosen), f"{part.name} {part.kind}", "programs"):
        rows[case.title] = compiled_row(on, case) | {"commit": commit}
        # Saved after each program: an interrupted run goes on where it stopped.
        first = [case.title for case in part.cases if case.title in rows]
        programs = [rows[title] for title in dict.fromkeys([*first, *rows])]
        save(file, result | {"programs": programs})
    if asked:
        tables.show(table(part.name, [rows[case.title] for case in asked]), 132)
        print(f"{file} {'written' if chosen else 'was complete'}")


# One program.


def compiled_row(on: Target, case: Case) -> dict[str, Any]:
    """A program's row: what it takes, or by how much it does not fit."""
    begun = time.perf_counter()
    row = {"name": case.name, "size": case.size, "devices": case.devices}
    compiled = on.compile(case.lower())
    if isinstance(compiled, str):
        return row | {"fits": False, "refused": compiled}
    facts = hlo.facts(compiled, case.elements or sys.maxsize)
    text = compiled.as_text() or ""
    found = hlo.collectives(compiled, case.devices)
    counted: Any = compiled.cost_analysis() or {}  # a loop's body once; a GPU's compiler does not
    sent = sum(c.sent for c in found)
    # The time of products and communication at the maker's rates, one after the other.
    least = case.flops / on.chip.tflops / 1e12 + sent / on.chip.link / 1e9
    return row | {
        # A TPU's compiler refuses what does not fit; a GPU's compiles it all the same.
        "fits": facts.needed_bytes <= on.chip.memory,
        **facts._asdict(),
        "kernels": hlo.kernels(text),
        "float64": "f64[" in text,
        "collectives": [c._asdict() for c in found],
        "sent_bytes": sent,
        "least_milliseconds": round(1e3 * least, 4) if case.flops else None,
        "flops": counted.get("flops"),
        "compile_seconds": round(time.perf_counter() - begun, 1),
    }


# Heads.


def head_cases(on: Target, sizes: Iterable[tuple[Shape, str]] = SIZES) -> Iterator[Case]:
    for shape, dtype in sizes:
        for arm in every.arms(shape):
            if arm.name in ARMS:
                lower = partial(lower_arm, on, arm, shape, dtype)
                elements = shape.dim * shape.classes
                flops = 2 * shape.batch * elements * arm.products * (arm.name != every.SAMPLED)
                yield Case(arm.name, f"{shape} {dtype}", lower, 1, elements, flops)


def slice_head_cases(on: Target, sizes: Iterable[tuple[Shape, str]]) -> Iterator[Case]:
    """Heads over all chips of a slice: the classes over all of them, or with a data axis."""
    chips = len(on.devices)
    for shape, dtype in sizes:
        for data in (1, 2) if chips < 64 else (1, 4, 16):
            mesh = on.mesh((data, chips // data), ("data", "model"))
            layout = every.on_mesh(mesh, shape.classes)
            filled = shape._replace(classes=layout.columns(shape.classes))
            elements = shape.dim * filled.classes // (chips // data)
            for arm in every.arms(filled, layout=layout):
                size = f"{shape} {dtype}, {data} x {chips // data}"
                flops = 2 * shape.batch // data * elements * arm.products
                lower = partial(lower_on_mesh, mesh, arm, filled, dtype)
                yield Case(f"class-parallel {arm.name}", size, lower, chips, elements, flops)


def lower_arm(on: Target, arm: Arm, shape: Shape, dtype: str) -> Lowered:
    """An arm's step for one chip."""
    given = every.abstract(shape, dtype)
    state = jax.eval_shape(arm.first_state, given.kernel)
    return arm.lower(*placed(given._replace(kernel=state), on.one))


def lower_on_mesh(mesh: Mesh, arm: Arm, shape: Shape, dtype: str) -> Lowered:
    """An arm's step for the chips of a mesh."""
    return arm.lower(*every.placed_on(mesh, every.abstract(shape, dtype), arm))


# Whole steps.


def step_cases(on: Target) -> Iterator[Case]:
    for network in NETWORKS:
        for dtype in ("f32", "bf16"):
            for kind in ("softmax", "m4"):
                config = replace(CONFIGS[f"{network}-{kind}"], dtype=dtype)
                yield _step(on, _of(config), "training step", _train)
    large, small = _of(CONFIGS["cifar100-m4"]), _of(CONFIGS["mnist-m4"])
    yield _step(on, large, "evaluation", _evaluate)
    yield _step(on, large, "features and logits", _embed)
    yield _step(on, small, f"{UPDATES} updates in one dispatch", _repeat)
    yield _step(on, _of(CONFIGS["digits-m4"]), "quickstart's training step", _train)
    # The steps of notebook reproduce are those of mnist-m4 and digits-m4 above.
    faces = Network(FaceRecipe(), FaceRecipe().network, PEOPLE)
    yield _step(on, faces, "training step of notebook faces", _train)
    yield _step(on, faces, "features of notebook faces", _embed)
    for notebook, lower in (("tour", notebooks.lower_tour), ("devices", notebooks.lower_devices)):
        yield Case(f"training step of notebook {notebook}", notebooks.SIZE, partial(lower, on))


def slice_step_cases(on: Target) -> Iterator[Case]:
    """A step over all chips of a slice, by `jit` over a mesh and by `pmap`, 32 images a chip."""
    chips = len(on.devices)
    network = _of(replace(CONFIGS["mnist-m4"], dtype="bf16", batch=32 * chips))
    yield _step(on, network, "data-parallel step", _data_parallel, chips)
    yield _step(on, network, "pmap's step", _pmap, chips)
    sharded = partial(notebooks.lower_sharded, on)
    yield Case("notebook devices, classes sharded", notebooks.SIZE, sharded, chips)


class Network(NamedTuple):
    """A recipe's network, and what its steps take, abstract."""

    recipe: Config | FaceRecipe
    name: str
    classes: int

    @property
    def parts(self) -> tuple[Any, Any]:
        """Its structure and its state."""
        graphdef, create = network_state(self.recipe, self.recipe.built_network, self.classes)
        return graphdef, jax.eval_shape(create, 0)

    @property
    def batch(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Images and labels."""
        rows = self.recipe.batch
        images = jax.ShapeDtypeStruct((rows, *self.recipe.built_network.image), jnp.float32)
        return images, jax.ShapeDtypeStruct((rows,), jnp.int32)

    def train_step(self, axis_name: str | None = None) -> tuple[training.TrainStep, Any]:
        """The step and the state that it takes."""
        recipe, (graphdef, state) = self.recipe, self.parts
        lam = recipe.lam_policy
        return training.train_step(graphdef, recipe.optimizer, lam, axis_name=axis_name), state


def _of(config: Config) -> Network:
    return Network(config, config.name, config.classes)


def _step(
    on: Target, network: Network, name: str, lower: Callable[..., Lowered], chips: int = 1
) -> Case:
    recipe = network.recipe
    size = f"{network.name}, batch {recipe.batch}, {recipe.dtype}"
    return Case(name, size, lambda: lower(on, network), chips)


def _train(on: Target, network: Network) -> Lowered:
    step, state = network.train_step()
    return on.lower(step, state, *network.batch, donate_argnums=0)


def _evaluate(on: Target, network: Network) -> Lowered:
    graphdef, state = network.parts
    return on.lower(training.eval_step(graphdef), state, *network.batch)


def _embed(on: Target, network: Network) -> Lowered:
    graphdef, state = network.parts
    return on.lower(training.embed_step(graphdef), state, network.batch[0])


def _repeat(on: Target, network: Network) -> Lowered:
    step, state = network.train_step()
    mesh = on.mesh((1,), (devices.DATA_AXIS,))
    many = devices.repeat(step, lambda step, data: data, mesh)
    whole = NamedSharding(mesh, P())
    return many.lower(placed(state, whole), placed(network.batch, whole), UPDATES)


def _data_parallel(on: Target, network: Network) -> Lowered:
    step, state = network.train_step()
    mesh = on.mesh((len(on.devices),), (devices.DATA_AXIS,))
    return devices.compile_step(step, mesh).lower(state, *network.batch)


def _pmap(on: Target, network: Network) -> Lowered:
    step, state = network.train_step(axis_name=devices.DATA_AXIS)
    mapped = jax.pmap(step, devices.DATA_AXIS, devices=on.devices, donate_argnums=0)
    chips, recipe = len(on.devices), network.recipe
    of_one = network._replace(recipe=replace(recipe, batch=recipe.batch // chips))

    def on_each(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((chips, *array.shape), array.dtype)

    return mapped.lower(*jax.tree.map(on_each, (state, *of_one.batch)))


# The table.


def table(target: str, rows: list[dict[str, Any]]) -> Table:
    view = tables.table(
        f"{target}, each device; compiled, not run",
        ["program", "size"],
        ["arguments", "temporary", "kernels", "sent", "least ms"],
        "collectives, large moves",
        caption="kernels, sent: of a loop once; least: products and sending, by the maker's rates",
    )
    for row in rows:
        if "refused" in row:
            view.add_row(row["name"], row["size"], "does not fit:", row["refused"])
            continue
        kinds = Counter(collective["kind"] for collective in row["collectives"])
        moves = {f"large {name}": count for name, count in row["large_moves"].items()}
        view.add_row(
            row["name"],
            row["size"],
            amount(row["argument_bytes"]),
            amount(row["temporary_bytes"]) + ("" if row["fits"] else ", too large"),
            str(row["kernels"]),
            amount(row["sent_bytes"]) if row["devices"] > 1 else "",
            f"{row['least_milliseconds']:.3g}" if row.get("least_milliseconds") else "",
            ", ".join(f"{count} {name}" for name, count in (kinds | moves).items()),
        )
    return view
