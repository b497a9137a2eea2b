"""Trains, or only plans, a head of any number of classes: `python -m experiments scale`.

The examples are synthetic identities: every class has a random centre, every example is its
class's centre with noise, both made from random keys when needed, so that nothing but the head
takes memory. One device runs `lsoftmax_sgd`, where the kernel's gradient never exists; several
run the class-parallel loss, features split over all of them as a backbone would leave them.
"""

import bisect
import functools
import itertools
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled, Lowered
from rich.table import Table

import lsoftmax_jax as lsm
from experiments.benchmarks import hlo, peers, tables, targets
from experiments.benchmarks.arms import DECAY, DTYPES, MOMENTUM
from experiments.benchmarks.hlo import Collective
from experiments.benchmarks.records import earlier, heading
from experiments.benchmarks.tables import amount
from experiments.run import loop
from experiments.run.session import Clock, Shared, Task, result_file
from experiments.store.claims import command_line
from experiments.store.logs import Log
from experiments.store.results import save
from lsoftmax_jax.training import State

AXES = ("data", "model")
ROWS, COLUMNS = P(AXES), P(None, "model")
NOISE = 0.5
# What the class-parallel loss exchanges of every row: the label's logit and its column's length,
# the other logits' peak and sum.
EXCHANGED = 4


class Job(NamedTuple):
    """A head, its batch, and the mesh it is trained on.

    Args:
      classes: number of classes of the head.
      dim: length of a feature.
      batch: examples a step, on all devices together.
      data: size of the mesh axis that shares the batch.
      model: size of the mesh axis that shares the classes.
      dtype: dtype of features and kernel. bf16 rounds small updates away and is for measuring only.
      margin: margin of the loss.
      lam: λ of the loss, the same in every step.
      learning_rate: rate of SGD with momentum on the mean loss.
      class_block: classes at a time.
      keep_exponentials: on several devices, save one of four matrix products and take more memory.
      identities: how many classes occur, spread over all; by default every class.
    """

    classes: int = 1_000_000
    dim: int = 512
    batch: int = 4096
    data: int = 1
    model: tyro.conf.Suppress[int] = 1
    dtype: Literal["f32", "bf16"] = "f32"
    margin: int = 4
    lam: float = 5.0
    learning_rate: float = 1.0
    class_block: int = 4096
    keep_exponentials: bool = False
    identities: int | None = None

    @property
    def devices(self) -> int:
        return self.data * self.model

    @property
    def rows(self) -> int:
        """Rows that a device computes with."""
        return self.batch // self.data

    @property
    def columns(self) -> int:
        """Columns of the kernel that a device holds."""
        return -(-self.classes // self.model)

    @property
    def itemsize(self) -> int:
        return jnp.dtype(DTYPES[self.dtype]).itemsize

    def check(self) -> None:
        """Raises ValueError, naming what cannot be."""
        for name in ("classes", "dim", "batch", "data", "model", "margin", "class_block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("lam", "learning_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")
        if self.batch % self.devices:
            raise ValueError(f"batch must divide over the {self.devices} devices, got {self.batch}")
        if not 1 <= (self.identities or self.classes) <= self.classes:
            raise ValueError(
                f"identities must be from 1 to the {self.classes} classes, got {self.identities}"
            )
        if self.keep_exponentials and self.devices == 1:
            raise ValueError("keep_exponentials needs several devices; one computes them again")


class Forecast(NamedTuple):
    """What a step costs each device, by formula."""

    state_bytes: int
    temporary_bytes: int
    flops: int
    traffic_bytes: int
    collectives: list[Collective]

    @property
    def sent_bytes(self) -> float:
        return sum(collective.sent for collective in self.collectives)

    def seconds(self, chip: targets.Chip) -> float:
        """Products and memory overlap, communication does not."""
        products = self.flops / (1e12 * chip.tflops)
        memory = self.traffic_bytes / (1e9 * chip.bandwidth)
        return max(products, memory) + self.sent_bytes / (1e9 * chip.link)


def forecast(job: Job) -> Forecast:
    shard, cells, gathered = job.dim * job.columns, job.rows * job.columns, job.rows * job.dim
    size, block = job.itemsize, min(job.class_block, job.columns)
    tail = job.columns % block
    # The logits are written and read in float32, their gradient is written and read twice.
    products, reads, visits = 4, 3, 2 * 4 + 2 * 4 + 3 * size
    update = (2 if job.devices == 1 else 4) * size + 2 * 4
    temporary = 4 * (job.rows * (block + tail) + job.dim * block + gathered + job.columns)
    if job.devices > 1:
        temporary += size * (shard + gathered)
    if job.data > 1:
        # Summed over the devices the gradient has memory of its own.
        temporary = max(temporary, 2 * size * shard)
    if job.keep_exponentials:
        temporary += size * cells
        products, reads, visits = 3, 2, 2 * 4 + 2 * size + 3 * size
    return Forecast(
        state_bytes=(size + 4) * shard,
        temporary_bytes=temporary,
        flops=products * 2 * job.rows * shard,
        traffic_bytes=(reads * size + update) * shard + visits * cells,
        collectives=collectives(job),
    )


def collectives(job: Job) -> list[Collective]:
    """Those of a step: gather the rows, exchange sums, and bring the gradients together."""
    # Labels and weights travel with the features, as words of their size.
    words = job.dim + 2 * (4 // job.itemsize)
    listed = [
        Collective("all-gather", job.rows * words * job.itemsize, job.model),
        Collective("all-gather", job.model * EXCHANGED * job.rows * 4, job.model),
        Collective("reduce-scatter", job.rows // job.model * job.dim * 4, job.model),
        Collective("all-reduce", job.dim * job.columns * job.itemsize, job.data),
        Collective("all-reduce", 2 * 4, job.data),
    ]
    return [collective for collective in listed if collective.devices > 1]


# The programs.


def make_mesh(job: Job) -> Mesh:
    if job.devices > jax.device_count():
        raise ValueError(
            f"data x model must be at most the {jax.device_count()} devices, "
            f"got {job.data} x {job.model}; JAX_NUM_CPU_DEVICES={job.devices} makes CPU devices"
        )
    devices = jax.devices()[: job.devices]
    return jax.make_mesh((job.data, job.model), AXES, (AxisType.Auto,) * 2, devices=devices)


def create(job: Job, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = jax.random.normal(key, (job.dim, job.columns * job.model), DTYPES[job.dtype])
    return kernel * jnp.asarray(job.dim**-0.5, kernel.dtype), jnp.zeros(kernel.shape, jnp.float32)


def batch(job: Job, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Step number's examples: their classes' centres with noise."""
    which, noise = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
    identities = job.identities or job.classes
    apart = job.classes // identities
    labels = apart * jax.random.randint(which, (job.batch,), 0, identities)

    def centre(label: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(jax.random.key(2), label), (job.dim,))

    features = jax.vmap(centre)(labels)
    features = features + NOISE * jax.random.normal(noise, (job.batch, job.dim))
    return features.astype(DTYPES[job.dtype]), labels


def class_parallel_loss(job: Job, mesh: Mesh) -> Callable[..., jax.Array]:
    """(features, kernel, labels) -> the mean loss."""
    layout = lsm.ClassParallel("model", AXES, mesh, job.classes)
    plan = lsm.Plan(class_block=job.class_block, keep_exponentials=job.keep_exponentials)
    options: dict[str, Any] = {"margin": job.margin, "lam": job.lam, "layout": layout, "plan": plan}

    def mean(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        weights = jnp.full(job.batch, 1 / job.batch)
        return lsm.lsoftmax_loss_sum(features, kernel, labels, weights, **options)

    return mean


def plain_loss(features: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """What one would write without this library; on several devices the compiler places it."""
    logits = (features @ kernel).astype(jnp.float32)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def one_device_step(job: Job) -> Callable[..., Any]:
    options: dict[str, Any] = {"margin": job.margin, "lam": job.lam}
    options |= {"plan": lsm.Plan(class_block=job.class_block)}
    options |= {"learning_rate": job.learning_rate, "decay": MOMENTUM, "weight_decay": DECAY}

    def step(features: Any, kernel: Any, momentum: Any, labels: Any) -> tuple[jax.Array, ...]:
        weights = jnp.full(job.batch, 1 / job.batch)
        return lsm.lsoftmax_sgd(features, kernel, momentum, labels, weights, **options)[:4]

    return step


def sgd_step(job: Job, loss: Callable[..., jax.Array]) -> Callable[..., Any]:
    def step(features: Any, kernel: Any, momentum: Any, labels: Any) -> tuple[jax.Array, ...]:
        value, (dfeatures, dkernel) = jax.value_and_grad(loss, (0, 1))(features, kernel, labels)
        wide = kernel.astype(jnp.float32)
        gradient = dkernel.astype(jnp.float32) + DECAY * wide
        momentum = MOMENTUM * momentum + gradient
        kernel = (wide - job.learning_rate * momentum).astype(kernel.dtype)
        return value, dfeatures, kernel, momentum

    return step


def lower_step(job: Job, mesh: Mesh, *, plain: bool = False) -> Lowered:
    """(features, kernel, momentum, labels) -> (loss, dfeatures, kernel, momentum), ahead of time.

    Without any array: the mesh may be of chips that are not here.
    """
    if plain:
        step = sgd_step(job, plain_loss)
    elif job.devices > 1:
        step = sgd_step(job, class_parallel_loss(job, mesh))
    else:
        step = one_device_step(job)
    rows, columns, whole = (NamedSharding(mesh, spec) for spec in (ROWS, COLUMNS, P()))
    jitted = jax.jit(
        step,
        in_shardings=(rows, columns, columns, rows),
        out_shardings=(whole, rows, columns, columns),
        donate_argnums=(1, 2),
    )
    return jitted.lower(*abstract(job))


def abstract(job: Job) -> tuple[Any, Any, Any, Any]:
    """Shapes and dtypes of features, kernel, momentum and labels."""
    features, labels = jax.eval_shape(functools.partial(batch, job), 0)
    kernel, momentum = jax.eval_shape(functools.partial(create, job), jax.random.key(0))
    return features, kernel, momentum, labels


def accuracy(
    job: Job, mesh: Mesh, features: jax.Array, kernel: jax.Array, labels: jax.Array
) -> jax.Array:
    """The margin-free accuracy, in blocks of classes and without gradients."""
    layout = lsm.ClassParallel("model", AXES, mesh, job.classes)
    plan = lsm.Plan(class_block=job.class_block, keep_exponentials=False)
    _, seen = lsm.lsoftmax_loss_and_statistics(
        features, kernel, labels, margin=1, lam=0.0, layout=layout, plan=plan
    )
    return jnp.mean(seen.plain_logit > seen.max_logit, dtype=jnp.float32)


def chips_mesh(on: targets.Target, job: Job) -> Mesh:
    return on.mesh((job.data, job.model), AXES)


def compiled_for(on: targets.Target, job: Job, *, plain: bool = False) -> Compiled | str:
    """The step for chips that are not here, or how much of their memory it would have needed."""
    compiled = on.compile(lower_step(job, chips_mesh(on, job), plain=plain))
    if not isinstance(compiled, str):
        needed = hlo.facts(compiled, sys.maxsize).needed_bytes
        if needed > on.chip.memory:
            return f"{amount(needed)} of {amount(on.chip.memory)}"
    return compiled


def largest_head(fits: Callable[[int], bool], bound: int) -> int:
    """The most classes that fit, in hundredths of a bound; 0 if not one hundredth does."""
    sizes = [bound * percent // 100 for percent in range(101)]
    return sizes[bisect.bisect(sizes, False, 1, key=lambda size: not fits(size)) - 1]


def largest_heads(on: targets.Target, job: Job, file: Path) -> list[dict[str, Any]]:
    """The largest heads of a target's one chip and of all that the job names.

    Every size that was tried stands in the file, which is written after each: a stopped search
    goes on where it was, if commit and versions are the same.
    """
    result = heading("largest head", command_line(), job.devices) | {
        "compilers": targets.compilers(),
        "device": "none: compiled, not run",
        "target": on.name,
        "memory_bytes": on.chip.memory,
        "config": job._asdict(),
    }
    saved = earlier(file, result, ("commit", "versions", "compilers", "config"), "tried")
    tried: list[dict[str, Any]] = saved["tried"] if saved else []
    rows: list[dict[str, Any]] = []

    def fits(classes: int, data: int, model: int, way: str) -> bool:
        key = {"data": data, "model": model, "way": way, "classes": classes}
        for entry in tried:
            if entry.items() >= key.items():
                return entry["refused"] is None
        this = job._replace(classes=classes, data=data, model=model)
        found = compiled_for(on, this, plain=way == "plain")
        tried.append(key | {"refused": found if isinstance(found, str) else None})
        save(file, result | {"largest": rows, "tried": tried})
        return tried[-1]["refused"] is None

    for data, model in dict.fromkeys([(1, 1), (job.data, job.model)]):
        bound = on.chip.memory * model // (job.dim * (job.itemsize + 4))
        row = {"data": data, "model": model, "bound": bound}
        for way in ("plain", "ours"):
            this_way = functools.partial(fits, data=data, model=model, way=way)
            row[way] = largest_head(this_way, bound)
        rows.append(row)
        save(file, result | {"largest": rows, "tried": tried})
    return rows


# The command.


USUAL = Job()


def scale(
    job: Annotated[Job, tyro.conf.arg(name="")] = USUAL,
    steps: int = 10,
    model: int | None = None,
    plan: bool = False,
    target: str | None = None,
    largest: bool = False,
    tflops: float | None = None,
    bandwidth: float | None = None,
    link: float | None = None,
    out: Path = loop.RUNS,
    checkpoint_seconds: float = math.inf,
) -> int:
    """Trains a head of very many classes on synthetic identities, or says what it would take.

    Args:
      job: what is trained, all but the size of one mesh axis.
      steps: updates.
      model: size of the mesh axis that shares the classes; by default all devices that are left.
      plan: only say what a step takes on data x model devices, which need not exist.
      target: for the plan, chips to compile for, such as v5e:16x16 or h100, which need not exist;
        by default the rates are an H200's and nothing is compiled for it.
      largest: with a target, only find the largest head of one chip and of all, in hundredths of
        what kernel and momentum alone would allow; half an hour, and a result in `out`.
      tflops: for the plan, 1e12 operations a second of a device; by default its maker's figure.
      bandwidth: for the plan, 1e9 bytes a second of its memory; by default its maker's figure.
      link: for the plan, 1e9 bytes a second to the other devices; by default its maker's figure.
      out: folder of the result. A run that is stopped leaves its state there and continues.
      checkpoint_seconds: seconds between two checkpoints; by default only a stop writes one.
    """
    if job.data < 1 or steps < 1:
        raise ValueError(f"data and steps must be >= 1, got {job.data} and {steps}")
    if (target or largest) and not (target and plan):
        raise ValueError("target and largest must come with plan, and largest with a target")
    on = targets.target(target) if target else None
    devices = len(on.devices) if on else jax.device_count()
    job = job._replace(model=max(devices // job.data, 1) if model is None else model)
    job.check()
    chip = on.chip if on else targets.CHIPS["h200"]
    given: dict[str, Any] = {"tflops": tflops, "bandwidth": bandwidth, "link": link}
    chip = chip._replace(**{name: rate for name, rate in given.items() if rate is not None})
    if min(rates := (chip.tflops, chip.bandwidth, chip.link)) <= 0:
        raise ValueError(f"tflops, bandwidth and link must be > 0, got {rates}")
    if on and job.devices > devices:
        raise ValueError(f"data x model must be at most the {devices} chips of {on.name}")
    if not plan:
        return train(job, steps, out, checkpoint_seconds)
    if on and largest:
        file = out / f"{on.name.replace(':', '-')}-largest.json"
        tables.show(largest_table(largest_heads(on, job, file), job))
        print(f"{file} written")
        return 0
    compiled: Compiled | str | None = None
    if on:
        compiled = compiled_for(on, job)
    elif job.devices <= devices:
        compiled = lower_step(job, make_mesh(job)).compile()
    tables.show(plan_table(job, chip, on.name if on else "h200", compiled))
    return 0


def train(job: Job, steps: int, out: Path, checkpoint_seconds: float) -> int:
    mesh, clock = make_mesh(job), Clock()
    rows, columns, whole = (NamedSharding(mesh, spec) for spec in (ROWS, COLUMNS, P()))
    with clock.spent("compilation"):
        step = lower_step(job, mesh).compile()

    def state_of(step: Any, kernel: Any, momentum: Any) -> State:
        return State(step, {"head": {"kernel": kernel}}, {}, momentum)

    @functools.partial(jax.jit, out_shardings=state_of(whole, columns, columns))
    def first_state(key: jax.Array) -> State:
        return state_of(jnp.zeros((), jnp.int32), *create(job, key))

    examples = jax.jit(functools.partial(batch, job), out_shardings=(rows, rows))
    share = jax.jit(functools.partial(accuracy, job, mesh))
    key = jax.random.key(0)

    def updates(states: Any, feeds: Any) -> Any:
        (state,), ((features, labels),) = states, feeds
        kernel = state.params["head"]["kernel"]
        loss, _, kernel, momentum = step(features, kernel, state.opt_state, labels)
        return [state_of(state.step + 1, kernel, momentum)], [{"loss": loss.reshape(1)}]

    def test(state: State) -> dict[str, float]:
        features, labels = examples(steps)  # that no update sees
        return {"accuracy": float(share(features, state.params["head"]["kernel"], labels))}

    def measure(state: State, log: Log) -> dict[str, Any]:
        lines = [line for line in log.lines if line["kind"] == "train"]
        spent = [0.0, *(line["seconds"]["training"] for line in lines)]
        before, after = (line["accuracy"] for line in log.lines if line["kind"] == "test")
        return {
            "load": os.getloadavg()[0],
            "seconds_per_step": statistics.median(b - a for a, b in itertools.pairwise(spent)),
            "losses": [line["loss"] for line in lines],
            "accuracy": {"before": before, "after": after},
            "peak_bytes": peak_bytes(job.devices),
            **measured(job, step),
        }

    settings, name = job._asdict() | {"steps": steps}, run_name(job, steps)
    facts = {"name": name, "seed": 0, "config": settings}
    task = Task(
        name=name,
        folder=out / name,
        settings=settings,
        facts=heading("scale", command_line(), job.devices) | facts,
        source=Identities(examples),
        like=jax.eval_shape(first_state, key),
        create=lambda: first_state(key),
        test=test,
        measure=measure,
    )
    shared = Shared(steps, job.batch, mesh, clock, lambda *_: updates, lambda seen: seen)
    # The state may be as large as the machine's memory: it is written when asked for.
    pace = loop.Pace(1, 1, checkpoint_seconds, starts_tested=True, keeps_last=False)
    with loop.interruptible() as stop:
        done = loop.finished(task.folder, name)
        trained = [done] if done else loop.train([task], shared, pace, stop)
    outcome = trained[0] if trained else None
    if outcome and outcome["status"] == "finished":
        tables.show(result_table(job, outcome))
        print(f"{result_file(task.folder)} written")
    return loop.exit_code(outcome)


class Identities(NamedTuple):
    """The source of batches: step number -> (features, labels), made on the devices."""

    feed: Callable[[int], Any]

    def position(self) -> None:
        """The step says where it stands."""

    def restore(self, position: None) -> None: ...


def run_name(job: Job, steps: int) -> str:
    """Names the run's files: backend, classes, and what is not the default."""
    usual = USUAL._replace(classes=job.classes)._asdict() | {"steps": 10}
    this = job._asdict() | {"steps": steps}
    changed = [f"{name}{value}" for name, value in this.items() if value != usual[name]]
    return "-".join(["scale", jax.default_backend(), str(job.classes), *changed])


def measured(job: Job, step: Compiled) -> dict[str, Any]:
    """What the compiled step says of itself, beside the formulas."""
    facts, expected = hlo.facts(step, job.dim * job.columns), forecast(job)
    found = {
        "state_bytes": facts.reused_bytes,
        "temporary_bytes": facts.temporary_bytes,
        "sent_bytes": sum(c.sent for c in hlo.collectives(step, job.devices)),
    }
    by_formula = {f"{name}_by_formula": getattr(expected, name) for name in (*found, "flops")}
    return found | by_formula


def peak_bytes(devices: int) -> int:
    """The most that one device held; on a CPU what the whole process held."""
    stats = [device.memory_stats() for device in jax.devices()[:devices]]
    if all(stats):
        return max(each["peak_bytes_in_use"] for each in stats)
    return peers.peak_bytes()


# The tables.


def result_table(job: Job, result: dict[str, Any]) -> Table:
    view = tables.table(described(job), ["", ""])
    seconds, losses = result["seconds_per_step"], result["losses"]
    before, after = (f"{100 * result['accuracy'][key]:.2f} %" for key in ("before", "after"))
    sent, by_formula = (amount(result[key]) for key in ("sent_bytes", "sent_bytes_by_formula"))
    whole = "process" if jax.default_backend() == "cpu" else "device"
    rows = {
        "steps/s": f"{1 / seconds:.4g} ({seconds:.4g} s a step, median)",
        "examples/s": f"{job.batch / seconds:.4g}",
        "matrix products, a device": amount(result["flops_by_formula"] / seconds, "FLOP/s"),
        "loss": f"{losses[0]:.4f} to {losses[-1]:.4f}",
        "margin-free accuracy, unseen examples": f"{before} to {after}",
        f"peak memory of the {whole}": amount(result["peak_bytes"]),
        "kernel and momentum, a device": amount(result["state_bytes"]),
        "temporary memory of the step, a device": amount(result["temporary_bytes"]),
        "sent a step and device": f"{sent} (by formula {by_formula})",
    }
    for row in rows.items():
        view.add_row(*row)
    return view


def plan_table(job: Job, chip: targets.Chip, name: str, step: Compiled | str | None) -> Table:
    """The forecast, and beside it what the compiled step says where it could be compiled."""
    refused = f"\ndoes not fit when compiled: {step}" if isinstance(step, str) else ""
    found = {} if step is None or isinstance(step, str) else measured(job, step)
    expected = forecast(job)
    view = tables.table(
        described(job),
        ["of each device"],
        ["by formula", "compiled"] if found else ["by formula"],
        caption=f"{chip.tflops:g} TFLOP/s, {chip.bandwidth:g} GB/s of memory, {chip.link:g} GB/s "
        f"between\n{name}, {chip.source}{refused}",
    )
    alone = expected.flops / (1e12 * chip.tflops)
    rows = [
        ("kernel and momentum", amount(expected.state_bytes), "state_bytes"),
        ("temporary memory", amount(expected.temporary_bytes), "temporary_bytes"),
        ("products", amount(expected.flops, "FLOP"), ""),
        ("memory traffic", amount(expected.traffic_bytes), ""),
        *((f"  {c.kind} of {c.devices}", amount(c.sent), "") for c in expected.collectives),
        ("sent, all collectives", amount(expected.sent_bytes), "sent_bytes"),
        ("step, products alone", f"{1e3 * alone:.4g} ms", ""),
        ("step, predicted", f"{1e3 * expected.seconds(chip):.4g} ms", ""),
    ]
    for words, value, key in rows:
        view.add_row(words, value, *([amount(found[key]) if key else ""] if found else []))
    return view


def largest_table(rows: list[dict[str, Any]], job: Job) -> Table:
    """The largest heads of plain softmax and of this library, on one chip and on all."""
    title = f"largest head, {job.dim} features, batch {job.batch}, {job.dtype}; compiled, not run"
    view = tables.table(title, ["chips"], ["state alone", "plain softmax", "ours", "ours, share"])
    for row in rows:
        sizes = (f"{row[name]:,}" for name in ("bound", "plain", "ours"))
        share = f"{100 * row['ours'] / row['bound']:.0f} %"
        view.add_row(f"{row['data']} x {row['model']}", *sizes, share)
    return view


def described(job: Job) -> str:
    return (
        f"{job.classes:,} classes, {job.dim} features, batch {job.batch}, {job.dtype}, "
        f"{job.data} x {job.model} devices"
    )
