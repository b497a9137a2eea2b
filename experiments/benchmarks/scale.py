"""Trains, or only plans, a head of any number of classes: `python -m experiments scale`.

The examples are synthetic identities: every class has a random centre, every example is its
class's centre with noise, both made from random keys when needed, so that nothing but the head
takes memory. One device runs `lsoftmax_sgd`, where the kernel's gradient never exists; several
run the class-parallel loss, features split over all of them as a backbone would leave them.
"""

import functools
import itertools
import math
import os
import resource
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled, Lowered
from rich.console import Console
from rich.table import Table

import lsoftmax_jax as lsm
from experiments.benchmarks import hlo, targets
from experiments.benchmarks.hlo import Collective
from experiments.run import loop
from experiments.run.session import Clock, Shared, Task, result_file
from experiments.store.claims import command_line
from experiments.store.logs import Log
from experiments.store.results import load, provenance, save
from lsoftmax_jax.training import State

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
AXES = ("data", "model")
ROWS, COLUMNS = P(AXES), P(None, "model")
MOMENTUM, DECAY = 0.9, 5e-4
NOISE = 0.5
# What the class-parallel loss exchanges of every row: the label's logit and its column's length,
# the other logits' peak and sum.
EXCHANGED = 4


class Job(NamedTuple):
    """A head, its batch, and the mesh it is trained on."""

    classes: int
    dim: int
    batch: int
    data: int = 1
    model: int = 1
    dtype: str = "f32"
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
    def kernel_shape(self) -> tuple[int, int]:
        return self.dim, self.columns * self.model

    @property
    def itemsize(self) -> int:
        return jnp.dtype(DTYPES[self.dtype]).itemsize

    @property
    def products(self) -> int:
        return 3 if self.keep_exponentials else 4

    def checked(self) -> "Job":
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
        return self


class Rates(NamedTuple):
    """What a device does in a second."""

    tflops: float  # 1e12 multiplications and additions
    bandwidth: float  # 1e9 bytes from and to its memory
    link: float  # 1e9 bytes to other devices


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

    def seconds(self, rates: Rates) -> float:
        """Products and memory overlap, communication does not."""
        products = self.flops / (1e12 * rates.tflops)
        memory = self.traffic_bytes / (1e9 * rates.bandwidth)
        return max(products, memory) + self.sent_bytes / (1e9 * rates.link)


def forecast(job: Job) -> Forecast:
    shard, cells, gathered = job.dim * job.columns, job.rows * job.columns, job.rows * job.dim
    block = min(job.class_block, job.columns)
    tail = job.columns % block
    blocks = 4 * (job.rows * (block + tail) + job.dim * block + gathered + job.columns)
    size = job.itemsize
    if job.devices == 1:
        temporary, update = blocks, 2 * size + 2 * 4
    else:
        gradient = size * shard
        temporary = gradient + blocks + size * gathered
        if job.data > 1:
            # Summed over the devices it has memory of its own.
            temporary = max(temporary, 2 * gradient)
        update = 4 * size + 2 * 4
    # The logits are written and read in float32, their gradient is written and read twice.
    reads, visits = 3, 2 * 4 + 2 * 4 + 3 * size
    if job.keep_exponentials:
        temporary += size * cells
        reads, visits = 2, 2 * 4 + 2 * size + 3 * size
    return Forecast(
        state_bytes=(size + 4) * shard,
        temporary_bytes=temporary,
        flops=job.products * 2 * job.rows * shard,
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


class Programs(NamedTuple):
    """A job's functions, compiled when called.

    create: key -> (kernel, momentum).  batch: number -> (features, labels).
    step: (features, kernel, momentum, labels) -> (loss, dfeatures, kernel, momentum).
    accuracy: (features, kernel, labels) -> share of rows whose plain logit is the largest.
    """

    create: Any
    batch: Any
    step: Any
    accuracy: Any


def programs(job: Job, mesh: Mesh, *, plain: bool = False) -> Programs:
    rows, columns, whole = (NamedSharding(mesh, spec) for spec in (ROWS, COLUMNS, P()))
    sharded = job.devices > 1
    step = class_parallel_step(job, mesh) if sharded else one_device_step(job)
    step = plain_step(job) if plain else step
    return Programs(
        create=jax.jit(functools.partial(create, job), out_shardings=(columns, columns)),
        batch=jax.jit(functools.partial(batch, job), out_shardings=(rows, rows)),
        step=jax.jit(
            step,
            in_shardings=(rows, columns, columns, rows),
            out_shardings=(whole, rows, columns, columns),
            donate_argnums=(1, 2),
        ),
        accuracy=jax.jit(functools.partial(accuracy, job, mesh if sharded else None)),
    )


def make_mesh(job: Job) -> Mesh:
    if job.devices > jax.device_count():
        raise ValueError(
            f"data x model must be at most the {jax.device_count()} devices, "
            f"got {job.data} x {job.model}; JAX_NUM_CPU_DEVICES={job.devices} makes CPU devices"
        )
    return jax.make_mesh(
        (job.data, job.model),
        AXES,
        (AxisType.Auto,) * 2,
        devices=jax.devices()[: job.devices],
    )


def create(job: Job, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = jax.random.normal(key, job.kernel_shape, DTYPES[job.dtype])
    momentum = jnp.zeros(job.kernel_shape, jnp.float32)
    return kernel * jnp.asarray(job.dim**-0.5, kernel.dtype), momentum


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


def one_device_step(job: Job) -> Callable[..., Any]:
    def step(features: Any, kernel: Any, momentum: Any, labels: Any) -> tuple[jax.Array, ...]:
        done = lsm.lsoftmax_sgd(
            features,
            kernel,
            momentum,
            labels,
            jnp.full(job.batch, 1 / job.batch),
            margin=job.margin,
            lam=job.lam,
            learning_rate=job.learning_rate,
            decay=MOMENTUM,
            weight_decay=DECAY,
            class_block=job.class_block,
        )
        return done[:4]

    return step


def class_parallel_step(job: Job, mesh: Mesh) -> Callable[..., Any]:
    def step(features: Any, kernel: Any, momentum: Any, labels: Any) -> Any:
        def mean(features: jax.Array, kernel: jax.Array) -> jax.Array:
            return lsm.sharded.lsoftmax_loss_sum(
                features,
                kernel,
                labels,
                jnp.full(job.batch, 1 / job.batch),
                margin=job.margin,
                lam=job.lam,
                layout=lsm.ClassParallel("model", AXES, mesh, job.classes),
                plan=lsm.Plan(class_block=job.class_block, keep_exponentials=job.keep_exponentials),
            )

        loss, (dfeatures, dkernel) = jax.value_and_grad(mean, (0, 1))(features, kernel)
        gradient = dkernel.astype(momentum.dtype) + DECAY * kernel.astype(momentum.dtype)
        momentum = MOMENTUM * momentum + gradient
        kernel = (kernel.astype(momentum.dtype) - job.learning_rate * momentum).astype(kernel.dtype)
        return loss, dfeatures, kernel, momentum

    return step


def accuracy(
    job: Job, mesh: Mesh | None, features: jax.Array, kernel: jax.Array, labels: jax.Array
) -> jax.Array:
    """The margin-free accuracy, in blocks of classes and without gradients."""
    plan = lsm.Plan(class_block=job.class_block, keep_exponentials=False)
    head = features, kernel, labels
    if mesh is None:
        _, seen = lsm.lsoftmax_loss_and_statistics(*head, margin=1, lam=0.0, plan=plan)
    else:
        layout = lsm.ClassParallel("model", AXES, mesh, job.classes)
        _, seen = lsm.sharded.lsoftmax_loss_and_statistics(
            *head, margin=1, lam=0.0, layout=layout, plan=plan
        )
    return jnp.mean(seen.plain_logit > seen.max_logit, dtype=jnp.float32)


def lower_step(job: Job, step: Any) -> Lowered:
    """The step, ahead of time and without any array."""
    dtype = DTYPES[job.dtype]
    return step.lower(
        jax.ShapeDtypeStruct((job.batch, job.dim), dtype),
        jax.ShapeDtypeStruct(job.kernel_shape, dtype),
        jax.ShapeDtypeStruct(job.kernel_shape, jnp.float32),
        jax.ShapeDtypeStruct((job.batch,), jnp.int32),
    )


def compile_step(job: Job, step: Any) -> Compiled:
    return lower_step(job, step).compile()


def compiled_for(on: targets.Target, job: Job, step: Any) -> Compiled | str:
    """The step for chips that are not here, or how much of their memory it would have needed."""
    try:
        compiled = on.compile(lower_step(job, step))
    except targets.TooLarge as error:
        return str(error)
    needed = hlo.facts(compiled, sys.maxsize).needed_bytes
    if needed > on.chip.memory:
        return f"{amount(needed, 'B')} of {amount(on.chip.memory, 'B')}"
    return compiled


def plain_step(job: Job) -> Callable[..., Any]:
    """What one would write without this library; on several devices the compiler places it."""

    def step(features: Any, kernel: Any, momentum: Any, labels: Any) -> Any:
        def mean(features: jax.Array, kernel: jax.Array) -> jax.Array:
            logits = (features @ kernel).astype(jnp.float32)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        loss, (dfeatures, dkernel) = jax.value_and_grad(mean, (0, 1))(features, kernel)
        gradient = dkernel.astype(jnp.float32) + DECAY * kernel.astype(jnp.float32)
        momentum = MOMENTUM * momentum + gradient
        kernel = (kernel.astype(jnp.float32) - job.learning_rate * momentum).astype(kernel.dtype)
        return loss, dfeatures, kernel, momentum

    return step


def largest_head(fits: Callable[[int], bool], bound: int) -> int:
    """The most classes that fit, in hundredths of a bound; 0 if not one hundredth does."""
    low, high = 0, 101
    while high - low > 1:
        middle = (low + high) // 2
        if fits(bound * middle // 100):
            low = middle
        else:
            high = middle
    return bound * low // 100


def largest_heads(on: targets.Target, job: Job, file: Path) -> list[dict[str, Any]]:
    """The largest heads of a target's one chip and of all that the job names.

    Every size that was tried stands in the file, which is written after each: a stopped search
    goes on where it was, if commit and versions are the same.
    """
    facts = {
        "kind": "largest head",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        **provenance(job.devices),
        "compilers": targets.compilers(),
        "device": "none: compiled, not run",
        "target": on.name,
        "memory_bytes": on.chip.memory,
        "config": job._asdict(),
    }
    same = ("commit", "versions", "compilers", "config")
    saved = load(file) if file.exists() else {}
    tried = saved["tried"] if saved and all(saved[k] == facts[k] for k in same) else []
    rows: list[dict[str, Any]] = []

    def fits(classes: int, data: int, model: int, way: str) -> bool:
        key = {"data": data, "model": model, "way": way, "classes": classes}
        for entry in tried:
            if entry.items() >= key.items():
                return entry["refused"] is None
        this = job._replace(classes=classes, data=data, model=model)
        step = programs(this, on.mesh((data, model), AXES), plain=way == "plain").step
        found = compiled_for(on, this, step)
        tried.append(key | {"refused": found if isinstance(found, str) else None})
        save(file, facts | {"largest": rows, "tried": tried})
        return tried[-1]["refused"] is None

    for data, model in dict.fromkeys([(1, 1), (job.data, job.model)]):
        bound = on.chip.memory * model // (job.dim * (job.itemsize + 4))
        row = {"data": data, "model": model, "bound": bound}
        for way in ("plain", "ours"):
            this_way = functools.partial(fits, data=data, model=model, way=way)
            row[way] = largest_head(this_way, bound)
        rows.append(row)
        save(file, facts | {"largest": rows, "tried": tried})
    return rows


# The command.


def scale(
    classes: int = 1_000_000,
    dim: int = 512,
    batch: int = 4096,
    steps: int = 10,
    identities: int | None = None,
    margin: int = 4,
    lam: float = 5.0,
    learning_rate: float = 1.0,
    dtype: Literal["f32", "bf16"] = "f32",
    data: int = 1,
    model: int | None = None,
    class_block: int = 4096,
    keep_exponentials: bool = False,
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
      classes: number of classes of the head.
      dim: length of a feature.
      batch: examples a step, on all devices together.
      steps: updates.
      identities: how many classes occur, spread over all; by default every class.
      margin: margin of the loss.
      lam: λ of the loss, the same in every step.
      learning_rate: rate of SGD with momentum on the mean loss.
      dtype: dtype of features and kernel. bf16 rounds small updates away and is for measuring only.
      data: size of the mesh axis that shares the batch.
      model: size of the mesh axis that shares the classes; by default all devices that are left.
      class_block: classes at a time.
      keep_exponentials: on several devices, save one of four matrix products and take more memory.
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
    if data < 1 or steps < 1:
        raise ValueError(f"data and steps must be >= 1, got {data} and {steps}")
    if (target or largest) and not (target and plan):
        raise ValueError("target and largest must come with plan, and largest with a target")
    on = targets.target(target) if target else None
    devices = len(on.devices) if on else jax.device_count()
    model = max(devices // data, 1) if model is None else model
    job = Job(
        classes,
        dim,
        batch,
        data,
        model,
        dtype,
        margin,
        lam,
        learning_rate,
        class_block,
        keep_exponentials,
        identities,
    ).checked()
    chip = on.chip if on else targets.CHIPS["h200"]
    given = ((tflops, chip.tflops), (bandwidth, chip.bandwidth), (link, chip.link))
    rates = Rates(*(default if rate is None else rate for rate, default in given))
    if min(rates) <= 0:
        raise ValueError(f"tflops, bandwidth and link must be > 0, got {tuple(rates)}")
    if on and job.devices > devices:
        raise ValueError(f"data x model must be at most the {devices} chips of {on.name}")
    if on and largest:
        file = out / f"{on.name.replace(':', '-')}-largest.json"
        console().print(largest_table(largest_heads(on, job, file), job))
        print(f"{file} written")
    elif plan:
        compiled: Compiled | str | None = None
        if on:
            compiled = compiled_for(on, job, programs(job, on.mesh((data, model), AXES)).step)
        elif job.devices <= jax.device_count():
            compiled = compile_step(job, programs(job, make_mesh(job)).step)
        source = f"{on.name if on else 'h200'}, {chip.source}"
        console().print(plan_table(job, rates, source, compiled))
    if plan:
        return 0
    return train(job, steps, out, checkpoint_seconds)


def train(job: Job, steps: int, out: Path, checkpoint_seconds: float) -> int:
    mesh, clock = make_mesh(job), Clock()
    run = programs(job, mesh)
    columns, whole = (NamedSharding(mesh, spec) for spec in (COLUMNS, P()))
    with clock.spent("compilation"):
        step = compile_step(job, run.step)

    def state_of(step: Any, kernel: Any, momentum: Any) -> State:
        return State(step, {"head": {"kernel": kernel}}, {}, momentum)

    def create() -> State:
        return state_of(jnp.zeros((), jnp.int32, device=whole), *run.create(jax.random.key(0)))

    def compile(states: Any, feeds: Any, length: int) -> Any:
        def updates(states: Any, feeds: Any) -> Any:
            (state,), ((features, labels),) = states, feeds
            kernel = state.params["head"]["kernel"]
            loss, _, kernel, momentum = step(features, kernel, state.opt_state, labels)
            return [state_of(state.step + 1, kernel, momentum)], [{"loss": loss.reshape(1)}]

        return updates

    def test(state: State) -> dict[str, float]:
        features, labels = run.batch(steps)  # that no update sees
        return {"accuracy": float(run.accuracy(features, state.params["head"]["kernel"], labels))}

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

    kernel, momentum = (
        jax.ShapeDtypeStruct(job.kernel_shape, dtype, sharding=columns)
        for dtype in (DTYPES[job.dtype], jnp.float32)
    )
    settings = job._asdict() | {"steps": steps}
    name = run_name(job, steps)
    task = Task(
        name=name,
        folder=out / name,
        settings=settings,
        facts={
            "kind": "scale",
            "name": name,
            "seed": 0,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "config": settings,
        },
        source=Identities(run.batch),
        like=state_of(jax.ShapeDtypeStruct((), jnp.int32, sharding=whole), kernel, momentum),
        create=create,
        test=test,
        measure=measure,
    )
    shared = Shared(steps, job.batch, mesh, clock, compile, lambda seen: seen)
    # The state may be as large as the machine's memory: it is written when asked for.
    pace = loop.Pace(1, 1, checkpoint_seconds, starts_tested=True, keeps_last=False)
    with loop.interruptible() as stop:
        done = loop.finished(task.folder, name)
        trained = [done] if done else loop.train([task], shared, pace, stop)
    outcome = trained[0] if trained else None
    if outcome and outcome["status"] == "finished":
        console().print(result_table(job, outcome))
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
    usual = Job(job.classes, dim=512, batch=4096)
    short = job._asdict() | {"steps": steps}
    plain = usual._asdict() | {"steps": 10}
    changed = [f"{name}{value}" for name, value in short.items() if value != plain[name]]
    return "-".join(["scale", jax.default_backend(), str(job.classes), *changed])


def measured(job: Job, step: Compiled) -> dict[str, Any]:
    """What the compiled step says of itself, beside the formulas."""
    facts = hlo.facts(step, job.dim * job.columns)
    expected = forecast(job)
    return {
        "state_bytes": facts.reused_bytes,
        "state_bytes_by_formula": expected.state_bytes,
        "temporary_bytes": facts.temporary_bytes,
        "temporary_bytes_by_formula": expected.temporary_bytes,
        "sent_bytes": sum(c.sent for c in hlo.collectives(step, job.devices)),
        "sent_bytes_by_formula": expected.sent_bytes,
        "flops_by_formula": expected.flops,
    }


def peak_bytes(devices: int) -> int:
    """The most that one device held; on a CPU what the whole process held."""
    stats = [device.memory_stats() for device in jax.devices()[:devices]]
    if all(stats):
        return max(each["peak_bytes_in_use"] for each in stats)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# The tables.


def result_table(job: Job, result: dict[str, Any]) -> Table:
    view = Table("", "", title=described(job))
    seconds = result["seconds_per_step"]
    accuracy = result["accuracy"]
    whole = "process" if jax.default_backend() == "cpu" else "device"
    view.add_row("steps/s", f"{1 / seconds:.4g} ({seconds:.4g} s a step, median)")
    view.add_row("examples/s", f"{job.batch / seconds:.4g}")
    rate = result["flops_by_formula"] / seconds
    view.add_row("matrix products, a device", f"{amount(rate, 'FLOP/s')}")
    view.add_row("loss", f"{result['losses'][0]:.4f} to {result['losses'][-1]:.4f}")
    view.add_row(
        "margin-free accuracy, unseen examples",
        f"{100 * accuracy['before']:.2f} % to {100 * accuracy['after']:.2f} %",
    )
    view.add_row(f"peak memory of the {whole}", amount(result["peak_bytes"], "B"))
    view.add_row("kernel and momentum, a device", amount(result["state_bytes"], "B"))
    view.add_row("temporary memory of the step, a device", amount(result["temporary_bytes"], "B"))
    view.add_row(
        "sent a step and device",
        f"{amount(result['sent_bytes'], 'B')} "
        f"(by formula {amount(result['sent_bytes_by_formula'], 'B')})",
    )
    return view


def plan_table(job: Job, rates: Rates, source: str, step: Compiled | str | None) -> Table:
    """The forecast, and beside it what the compiled step says where it could be compiled."""
    compiled = None if isinstance(step, str) else step
    expected = forecast(job)
    view = Table("of each device", title=described(job))
    view.add_column("by formula", justify="right")
    found = measured(job, compiled) if compiled else {}
    if compiled:
        view.add_column("compiled", justify="right")

    def row(name: str, value: str, key: str | None = None) -> None:
        view.add_row(name, value, *([amount(found[key], "B") if key else ""] if compiled else []))

    row("kernel and momentum", amount(expected.state_bytes, "B"), "state_bytes")
    row("temporary memory", amount(expected.temporary_bytes, "B"), "temporary_bytes")
    row("products", f"{amount(expected.flops, 'FLOP')}")
    row("memory traffic", amount(expected.traffic_bytes, "B"))
    for collective in expected.collectives:
        row(f"  {collective.kind} of {collective.devices}", amount(collective.sent, "B"))
    row("sent, all collectives", amount(expected.sent_bytes, "B"), "sent_bytes")
    row("step, products alone", f"{1e3 * expected.flops / (1e12 * rates.tflops):.4g} ms")
    row("step, predicted", f"{1e3 * expected.seconds(rates):.4g} ms")
    view.caption = (
        f"{rates.tflops:g} TFLOP/s, {rates.bandwidth:g} GB/s of memory, {rates.link:g} GB/s between"
        f"\n{source}"
    )
    if isinstance(step, str):
        view.caption += f"\ndoes not fit when compiled: {step}"
    return view


def largest_table(rows: list[dict[str, Any]], job: Job) -> Table:
    """The largest heads of plain softmax and of this library, on one chip and on all."""
    title = f"largest head, {job.dim} features, batch {job.batch}, {job.dtype}; compiled, not run"
    view = Table("chips", title=title)
    for header in ("state alone", "plain softmax", "ours", "ours, share"):
        view.add_column(header, justify="right", no_wrap=True)
    for row in rows:
        sizes = (f"{row[name]:,}" for name in ("bound", "plain", "ours"))
        share = f"{100 * row['ours'] / row['bound']:.0f} %"
        view.add_row(f"{row['data']} x {row['model']}", *sizes, share)
    return view


def console() -> Console:
    # Piped, a console takes itself for 80 characters wide.
    return Console(width=max(Console().width, 100))


def described(job: Job) -> str:
    return (
        f"{job.classes:,} classes, {job.dim} features, batch {job.batch}, {job.dtype}, "
        f"{job.data} x {job.model} devices"
    )


def amount(value: float, unit: str) -> str:
    """1234567 bytes as "1.235 MB"."""
    power = min(int(math.log10(value) // 3), 5) if value >= 1 else 0
    return f"{value / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}{unit}"
