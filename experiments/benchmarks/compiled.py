"""What compilers make of the heads and steps for TPUs and GPUs: `python -m experiments compile`.

Nothing runs and no accelerator is needed. A table for people, a JSON with everything.
"""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered
from rich.table import Table
from tqdm import tqdm

import lsoftmax_jax as lsm
from experiments.benchmarks import arms as every
from experiments.benchmarks import hlo, notebooks, scale, tables
from experiments.benchmarks.arms import Shape
from experiments.benchmarks.records import earlier, heading
from experiments.benchmarks.tables import amount
from experiments.benchmarks.targets import Target, compilers, placed, target
from experiments.faces.recipe import FaceRecipe
from experiments.paper.cells import CONFIGS
from experiments.paper.config import Config
from experiments.run.program import network_state
from experiments.store.claims import command_line
from experiments.store.results import save
from lsoftmax_jax import devices, training

OUT = Path(__file__).parents[1] / "results" / "compiled"
# A head of the paper, of a face recogniser, of 1e5 and 1e6 identities.
SIZES = (
    (Shape(256, 256, 10), "f32"),
    (Shape(512, 512, 10575), "bf16"),
    (Shape(512, 256, 102400), "bf16"),
    (Shape(4096, 512, 1_000_000), "bf16"),
)
ARMS = (
    every.PLAIN,
    every.ONE_SHOT,
    "loss_sum, row blocks",
    every.RECOMPUTED,
    every.STORED,
    every.ARCFACE,
    every.ARCFACE_BLOCKS,
    every.PLAIN_SGD,
    every.FUSED_SGD,
)
MARGIN, BLOCK, NEGATIVES = 4, 4096, 16_384
SHARDED_CLASSES, SHARDED_BATCH = (1_000_000, 10_000_000, 100_000_000), 8192
NETWORKS = ("mnist", "cifar10plus", "cifar100")
UPDATES = 100
PEOPLE = 10_575  # of CASIA-WebFace


class Case(NamedTuple):
    """One program for one target."""

    name: str
    size: str
    lower: Callable[[], Lowered]
    devices: int = 1
    elements: int = 0  # of the kernel on a device: moves of so many are listed

    @property
    def title(self) -> str:
        return f"{self.name} {self.size}"


def compile_(
    targets: tuple[str, ...] = ("v5e:2x4", "v6e:2x4"),
    heads: bool = True,
    steps: bool = True,
    only: str = "",
    out: Path = OUT,
) -> None:
    """Compiles heads and training steps for TPUs and GPUs that are not here, and reports.

    A program of the same commit and the same versions is not compiled again: what was stopped
    goes on, and a slice finds the programs of its one chip done.

    Args:
      targets: such as v5e:2x4, v5e:16x16, v6e:16x16, v5p:2x2x1, h100, h200, a100, b200.
      heads: compile the heads.
      steps: compile whole steps of the paper's networks; for a TPU one to six minutes each.
      only: a part of a name; only such cases are compiled.
      out: folder of the results, two files a chip and two a slice.
    """
    wanted = {"heads": heads, "steps": steps}
    parts = [part for name in targets for part in parts_of(target(name)) if wanted[part.kind]]
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


def parts_of(on: Target) -> Iterator[Part]:
    chip = on.name.partition(":")[0]
    yield Part(on, chip, "heads", [*head_cases(on)])
    yield Part(on, chip, "steps", [*step_cases(on)])
    if len(on.devices) > 1:
        yield Part(on, on.name, "heads", [*slice_head_cases(on)])
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
    # What is of a commit, without changes to it, is done.
    clean = commit is not None and not commit.endswith("-changed")
    done = {title for title, row in rows.items() if clean and row["commit"] == commit}
    chosen = [case for case in asked if case.title not in done]
    for case in tqdm(chosen, f"{part.name} {part.kind}", unit=" programs", leave=False):
        rows[case.title] = compiled_row(on, case) | {"commit": commit}
        # Written one by one: an interrupted run goes on where it was.
        programs = [rows[case.title] for case in part.cases if case.title in rows]
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
    return row | {
        # A TPU's compiler has refused what does not fit; a GPU's only counts.
        "fits": facts.needed_bytes <= on.chip.memory,
        **facts._asdict(),
        "kernels": hlo.kernels(text),
        "float64": "f64[" in text,
        "collectives": [c._asdict() for c in found],
        "sent_bytes": sum(c.sent for c in found),
        "flops": counted.get("flops"),
        "compile_seconds": round(time.perf_counter() - begun, 1),
    }


# Heads.


def head_cases(on: Target) -> Iterator[Case]:
    for shape, dtype in SIZES:
        for arm in every.arms(shape, MARGIN, BLOCK):
            if arm.name in ARMS:
                lower = partial(lower_arm, on, arm, shape, dtype)
                yield Case(arm.name, f"{shape} {dtype}", lower, 1, shape.dim * shape.classes)
    shape, name = Shape(4096, 512, 1_000_000), f"sampled, {NEGATIVES:,} others"
    lower = partial(lower_sampled, on, shape)
    yield Case(name, f"{shape} bf16", lower, 1, shape.dim * shape.classes)


def slice_head_cases(on: Target) -> Iterator[Case]:
    """Heads over all chips of a slice: the classes over all of them, or with a data axis."""
    chips = len(on.devices)
    for classes, data in itertools.product(SHARDED_CLASSES, (1, 2) if chips < 64 else (1, 4, 16)):
        job = scale.Job(classes, 512, SHARDED_BATCH, data, chips // data, "bf16")
        size = f"{Shape(job.batch, job.dim, classes)} bf16, {data} x {job.model}"
        held = job.devices, job.dim * job.columns
        yield Case("class-parallel step", size, partial(lower_job, on, job), *held)
        if data in (2, 16):
            yield Case("class-parallel gradients", size, partial(lower_gradients, on, job), *held)


def lower_arm(on: Target, arm: every.Arm, shape: Shape, dtype: str) -> Lowered:
    given = operands(shape, dtype)
    state = jax.eval_shape(arm.start, given.kernel)
    return arm.lower(*placed(given._replace(kernel=state), on.one))


def operands(shape: Shape, dtype: str) -> every.Problem:
    """Those of `arms.problem`, abstract."""
    numbers = every.DTYPES[dtype]
    abstract: Any = jax.ShapeDtypeStruct
    return every.Problem(
        abstract((shape.batch, shape.dim), numbers),
        abstract((shape.dim, shape.classes), numbers),
        abstract((shape.batch,), jnp.int32),
        abstract((shape.batch,), jnp.float32),
        abstract((), jnp.float32),
    )


def lower_sampled(on: Target, shape: Shape) -> Lowered:
    """A step of the sampled loss: draw, take the columns, their gradient, put them back."""

    def step(key: Any, features: Any, kernel: Any, labels: Any) -> Any:
        sample = lsm.sample_classes(key, labels, shape.classes, NEGATIVES)

        def mean(features: Any, columns: Any) -> jax.Array:
            loss = lsm.lsoftmax_sampled_loss(features, columns, sample, margin=MARGIN, lam=5.0)
            return jnp.mean(loss)

        columns = lsm.sampled.take_columns(kernel, sample)
        loss, (dfeatures, dcolumns) = jax.value_and_grad(mean, (0, 1))(features, columns)
        changed = columns - jnp.asarray(0.1, columns.dtype) * dcolumns
        return loss, dfeatures, lsm.sampled.put_columns(kernel, sample, changed)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return on.lower(step, key, *operands(shape, "bf16")[:3], donate_argnums=2)


def lower_gradients(on: Target, job: scale.Job) -> Lowered:
    """The class-parallel loss and its gradients, without an update."""
    mesh = scale.chips_mesh(on, job)
    loss, (features, kernel, _, labels) = scale.class_parallel_loss(job, mesh), scale.abstract(job)
    rows, columns = (NamedSharding(mesh, spec) for spec in (scale.ROWS, scale.COLUMNS))
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)), in_shardings=(rows, columns, rows))
    return gradients.lower(features, kernel, labels)


def lower_job(on: Target, job: scale.Job) -> Lowered:
    """The step of `scale`, on one chip or on a slice."""
    return scale.lower_step(job, scale.chips_mesh(on, job))


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
    # Those of notebook reproduce are mnist-m4 and digits-m4, above.
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
        ["arguments", "temporary", "kernels", "sent"],
        "collectives, large moves",
        caption="kernels: a loop's count once",
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
            ", ".join(f"{count} {name}" for name, count in (kinds | moves).items()),
        )
    return view
