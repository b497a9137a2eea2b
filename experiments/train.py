"""Trains one configuration: resumable, logged, measured, its result one JSON file.

Files under ``out``: ``RUN.json`` is a finished run's result; ``runs/RUN/`` holds its checkpoint,
``metrics.jsonl`` and TensorBoard events. A run stopped at any point, even by SIGKILL, continues
from its checkpoint and ends, on the same devices, in the same bits as an unbroken one: batches, λ
and learning rate go by the step, and a checkpoint falls between the same dispatches. (XLA promises
the same bits on a GPU only with XLA_FLAGS=--xla_gpu_deterministic_ops=true.)
"""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from numpy.typing import NDArray
from tqdm import tqdm

from experiments import data, measure, models, result
from experiments.checkpoint import Checkpoints
from experiments.configs import Config
from experiments.log import Log, finite
from lsoftmax_jax import annealed_lambda, training

RESULTS = Path(__file__).parent / "results"

# No start of these networks comes near this mean loss, so it means that they blew up.
BLOWN_UP = 1e4

ADVICE = """\
What to try, in this order: a larger or slower falling λ (--lam.base, --lam.gamma), or a floor
under it (--lam.minimum 5); a start from the softmax run of the same data (--init RUN); a smaller
--learning-rate."""


class Program(NamedTuple):
    """A configuration's functions, the same for all its seeds.

    Attributes:
      create: seed -> a fresh `training.State`; may be vmapped.
      updates: (state, `data.OnDevice`, length) -> (state, metrics), from `training.repeat`.
      examine: (state, images, labels, where) -> (sums, (features, plain logits)).
      mean: subtracted from the images.
    """

    create: Callable[[Any], training.State]
    updates: Any
    examine: Any
    mean: NDArray[np.float32]


def optimizer(config: Config) -> optax.GradientTransformation:
    """SGD with momentum, decay on kernels, and a rate of their own for the layers' biases."""

    def is_kernel(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def is_layer_bias(params: Any) -> Any:
        return jax.tree.map_with_path(
            lambda path, _: path[-1].key == "bias" and path[-2].key != "norm", params
        )

    rate = optax.piecewise_constant_schedule(
        config.learning_rate, dict.fromkeys(config.stretched_drops, 0.1)
    )
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay, is_kernel),
        optax.masked(optax.scale(config.bias_rate), is_layer_bias),
        optax.sgd(rate, momentum=config.momentum),
    )


def build(config: Config, train: data.Split, mesh: Mesh) -> Program:
    """The configuration's functions for a training split, compiled for a mesh when called."""
    network, sgd = config.built_network, optimizer(config)
    if train.images.shape[1:] != network.image:
        raise ValueError(
            f"{config.dataset}: images must be {network.image}, got {train.images.shape[1:]}"
        )
    if config.batch % mesh.size:
        raise ValueError(
            f"batch must divide over the {mesh.size} devices, got {config.batch}; see --devices"
        )
    dtype = jnp.bfloat16 if config.dtype == "bf16" else jnp.float32
    mean = np.asarray(
        train.images.mean(axis=0, dtype=np.float64) if config.mean is None else config.mean,
        np.float32,
    )

    def model(seed: Any) -> models.ConvNet:
        rngs = nnx.Rngs(jax.random.key(seed))
        return models.ConvNet(network, config.classes, margin=config.margin, dtype=dtype, rngs=rngs)

    graphdef = nnx.graphdef(nnx.eval_shape(lambda: model(0)))
    loss = optax.losses.multiclass_hinge_loss if config.hinge else None
    step = training.train_step(graphdef, sgd, annealed_lambda(*config.stretched_lam), loss=loss)
    batch = partial(data.batch, size=config.batch, crop=config.crop, mirror=config.mirror)
    evaluate, embed = training.eval_step(graphdef, loss=loss), training.embed_step(graphdef)

    def examine(state: Any, images: Any, labels: Any, where: Any = None) -> Any:
        images = data.centred(images, jnp.asarray(mean))
        return evaluate(state, images, labels, where), embed(state, images)

    return Program(
        create=lambda seed: training.create(model(seed), sgd)[1],
        updates=training.repeat(step, batch, mesh),
        examine=training.compile_step(examine, mesh, donate=False),
        mean=mean,
    )


def load(config: Config, folder: Path | None) -> data.Dataset:
    """The configuration's training split, and what it is tested on."""
    dataset = data.load(config.dataset, folder)
    if config.validation:
        dataset = dataset.with_validation()
    return dataset if config.examples is None else dataset.first(config.examples)


def evaluate(
    program: Program, state: training.State, split: data.Split, mesh: Mesh
) -> tuple[training.Sums, NDArray, NDArray]:
    """Sums, features and plain logits of a whole split."""
    size = mesh.size * -(-500 // mesh.size)
    batches = [program.examine(state, *rows) for rows in data.padded_batches(split, size)]
    sums = jax.tree.map(lambda *parts: np.sum(jax.device_get(parts)), *[b[0] for b in batches])
    features, logits = (
        np.concatenate(jax.device_get(parts))[: len(split.labels)]
        for parts in zip(*[b[1] for b in batches], strict=True)
    )
    return sums, features, logits


def measures(
    program: Program, state: training.State, dataset: data.Dataset, mesh: Mesh
) -> dict[str, Any]:
    """Everything `measure` knows about both splits, and their margin-free loss."""
    kernel = np.asarray(state.params["head"]["kernel"])
    measured = {}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        sums, features, logits = evaluate(program, state, split, mesh)
        loss = {"loss": averages(sums)["loss"]}
        measured[name] = loss | measure.measures(features, logits, split.labels, kernel)
    return measured


def averages(sums: training.Sums) -> dict[str, float]:
    """Means over the examples, error in %, angle in degrees."""
    count = sums.examples
    return {
        "loss": float(sums.loss / count),
        "error": float(100 * (1 - sums.correct / count)),
        "target_angle": float(np.degrees(sums.target_angle / count)),
        "feature_norm": float(sums.feature_norm / count),
    }


def means(metrics: training.StepMetrics) -> dict[str, float]:
    """A dispatch's updates in one line: means, λ of the last one."""
    return averages(jax.tree.map(np.sum, metrics.sums)) | {
        "lam": float(metrics.lam[-1]),
        "kernel_norm": float(np.mean(metrics.kernel_norm)),
        "grad_norm": float(np.mean(metrics.grad_norm)),
    }


class Diverged(NamedTuple):
    """The first update whose loss or gradient was not finite, or whose loss blew up."""

    step: int
    loss: float
    lam: float
    feature_norm: float
    kernel_norm: float

    def __str__(self) -> str:
        return (
            f"diverged at step {self.step}: loss {self.loss:.4g}, λ {self.lam:.4g}, "
            f"|features| {self.feature_norm:.4g}, |kernel| {self.kernel_norm:.4g}\n{ADVICE}"
        )


def divergence(metrics: training.StepMetrics, first: int) -> Diverged | None:
    """Looks at the updates from number ``first`` on."""
    loss = metrics.sums.loss / metrics.sums.examples
    good = np.isfinite(loss) & np.isfinite(metrics.grad_norm) & (loss < BLOWN_UP)
    if good.all():
        return None
    i = int(np.argmin(good))
    return Diverged(
        step=first + i,
        loss=float(loss[i]),
        lam=float(metrics.lam[i]),
        feature_norm=float(metrics.sums.feature_norm[i] / metrics.sums.examples[i]),
        kernel_norm=float(metrics.kernel_norm[i]),
    )


def warm_start(fresh: training.State, place: Path, mesh: Mesh) -> training.State:
    """``fresh`` with the parameters and batch statistics of another run's last checkpoint."""
    with Checkpoints(place / "checkpoints") as checkpoints:
        source = checkpoints.latest(fresh, mesh)
    if source is None:
        raise FileNotFoundError(f"--init: {place} has no checkpoint; train that run first")
    return fresh._replace(params=source.params, other=source.other)


class Session:
    """A run in this process: its state, log, checkpoints and clock; a context manager.

    Args:
      config: what to train.
      folder: where the data is.
      out: folder of the results.
      mesh: trains on its devices.
      dispatch: updates in one dispatch.
    """

    def __init__(
        self, config: Config, folder: Path | None, out: Path, mesh: Mesh, dispatch: int
    ) -> None:
        started = time.perf_counter()
        self.config, self.dispatch = config, dispatch
        self._mesh, self._out = mesh, out
        self._dataset = load(config, folder)
        train = self._dataset.train
        self._program = build(config, train, mesh)
        self._feed = data.Feed(
            config.seed, train, self._program.mean, mesh, size=config.batch, steps=dispatch
        )
        place = out / "runs" / config.run_name
        _claim(place, config)
        self._checkpoints = Checkpoints(place / "checkpoints")
        self._state = self._first_state()
        self.step = int(self._state.step)
        self._log = Log(place, self.step)
        self._seconds = self._log.seconds
        self._started = started - self._seconds.wall
        self._compiled: dict[int, Any] = {}
        self._seconds.setup += time.perf_counter() - started
        with self._spent("compilation"):
            self._evaluate(self._dataset.test.rows(slice(1)))

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()
        self._checkpoints.close()

    def advance(self) -> training.StepMetrics:
        """One dispatch; returns its metrics, one entry an update, on the host."""
        length = min(self.dispatch - self.step % self.dispatch, self.config.steps - self.step)
        source = self._feed(self.step)
        if length not in self._compiled:
            with self._spent("compilation"):
                lowered = self._program.updates.lower(self._state, source, length)
                self._compiled[length] = lowered.compile()
        with self._spent("training"):
            self._state, metrics = jax.block_until_ready(
                self._compiled[length](self._state, source)
            )
        self.step += length
        metrics = jax.device_get(metrics)
        self._write("train", **means(metrics))
        return metrics

    def test(self) -> None:
        """Adds a point to the test curve."""
        with self._spent("evaluation"):
            sums, _, _ = self._evaluate(self._dataset.test)
        self._write("test", **averages(sums))

    def save(self) -> None:
        self._checkpoints.save(self._state)

    def outcome(self, diverged: Diverged | None) -> dict[str, Any]:
        """Measures the last iterate and gathers what the result's file holds."""
        config, seconds = self.config, self._seconds
        measured = {}
        if diverged is None:
            with self._spent("evaluation"):
                measured = measures(self._program, self._state, self._dataset, self._mesh)
        seconds.wall = time.perf_counter() - self._started
        return {
            "name": config.name,
            "seed": config.seed,
            "status": "diverged" if diverged else "finished",
            "diverged": diverged and finite(diverged._asdict()),
            "reduced": config.reduced,
            "changes": {name: config.to_json()[name] for name in config.changes},
            "command": config.command,
            "config": config.to_json(),
            "data": {"name": config.dataset, "fingerprint": self._dataset.fingerprint},
            **result.provenance(self._mesh.size),
            "parameters": models.parameter_count(config.built_network, config.classes),
            "seconds": asdict(seconds),
            "images_per_second": self.step * config.batch / seconds.training,
            "outside_step": seconds.outside,
            **measured,
            "curves": {kind: self._log.curve(kind) for kind in ("train", "test")},
        }

    def _first_state(self) -> training.State:
        """That of the checkpoint, else that of the run to start from, else a fresh one."""
        create, init = self._program.create, self.config.init
        state = self._checkpoints.latest(jax.eval_shape(create, 0), self._mesh)
        if state is not None:
            return state
        fresh = jax.jit(create)(self.config.seed)
        return fresh if init is None else warm_start(fresh, self._out / "runs" / init, self._mesh)

    def _evaluate(self, split: data.Split) -> tuple[training.Sums, NDArray, NDArray]:
        return evaluate(self._program, self._state, split, self._mesh)

    def _write(self, kind: str, **values: float) -> None:
        self._seconds.wall = time.perf_counter() - self._started
        self._log.write(kind, self.step, self._seconds, **values)

    @contextmanager
    def _spent(self, name: str) -> Iterator[None]:
        """Adds what a block takes to one of the clock's entries."""
        begun = time.perf_counter()
        yield
        elapsed = time.perf_counter() - begun
        setattr(self._seconds, name, getattr(self._seconds, name) + elapsed)


def _claim(place: Path, config: Config) -> None:
    """Notes in a run's folder what is trained there; refuses a folder of something else."""
    file = place / "config.json"
    if not file.exists():
        result.save(file, config.to_json())
    elif result.load(file) != config.to_json():
        raise ValueError(f"{place} belongs to another state of this configuration; remove it")


def evaluate_run(
    place: Path, folder: Path | None, devices: int | None
) -> tuple[int, dict[str, Any]]:
    """The step of a run's last checkpoint, and its `measures`."""
    if not (place / "config.json").exists():
        raise FileNotFoundError(f"no run in {place}")
    config = Config.from_json(result.load(place / "config.json"))
    mesh = training.data_mesh(devices)
    dataset = load(config, folder)
    program = build(config, dataset.train, mesh)
    with Checkpoints(place / "checkpoints") as checkpoints:
        state = checkpoints.latest(jax.eval_shape(program.create, 0), mesh)
    if state is None:
        raise FileNotFoundError(f"{place} has no checkpoint yet")
    return int(state.step), measures(program, state, dataset, mesh)


def warn_if_lam_stays(config: Config) -> None:
    """Says so when the margin hardly acts even at the last update."""
    lam = float(annealed_lambda(*config.stretched_lam)(config.steps - 1))
    if config.margin > 1 and lam > max(9.0, config.lam.minimum):
        print(
            f"warning: λ is still {lam:.3g} at the last update, so the margin weighs no more than "
            f"1 / (1 + λ) = {1 / (1 + lam):.2g}; raise --lam.gamma or --lam.power",
            file=sys.stderr,
        )


def run(
    config: Config,
    *,
    folder: Path | None = None,
    out: Path = RESULTS,
    devices: int | None = None,
    dispatch: int | None = None,
    evaluations: int | None = None,
    checkpoint_seconds: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Trains a configuration, or continues it, and writes its result.

    Args:
      config: what to train.
      folder: where the data is, see `data.load`.
      out: folder of the results.
      devices: train on the first so many; all by default.
      dispatch: updates in one dispatch; by default 100 on an accelerator, 1 on a CPU.
      evaluations: points of the test curve; by default 36 on an accelerator, 6 on a CPU.
      checkpoint_seconds: time between two checkpoints.
      stop: asked after every dispatch; when true, the run saves a checkpoint and ends.

    Returns:
      What the result's file holds; None if the run was stopped.
    """
    file = out / f"{config.run_name}.json"
    if file.exists():
        print(f"{config.run_name} is finished; delete {file} to train it again")
        return result.load(file)
    warn_if_lam_stays(config)
    mesh = training.data_mesh(devices)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    dispatch = dispatch or (1 if on_cpu else 100)
    every = dispatch * -(-config.steps // (dispatch * (evaluations or (6 if on_cpu else 36))))
    diverged, saved = None, time.perf_counter()
    with Session(config, folder, out, mesh, dispatch) as session, _bar(session) as bar:
        while session.step < config.steps:
            if stop():
                session.save()
                bar.write(f"stopped at step {session.step}; the same command continues there")
                return None
            first = session.step
            metrics = session.advance()
            _show(bar, metrics, config.batch)
            diverged = divergence(metrics, first)
            if diverged:
                bar.write(f"{config.run_name} {diverged}")
                break
            if session.step % every == 0 or session.step == config.steps:
                session.test()
            if session.step == config.steps or time.perf_counter() - saved > checkpoint_seconds:
                session.save()
                saved = time.perf_counter()
        outcome = session.outcome(diverged)
    result.save(file, outcome)
    return outcome


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Makes the first Ctrl-C or SIGTERM a request to stop, for `run`; a second one ends at once."""
    asked = False

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("\nstopping after this dispatch", file=sys.stderr)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, ask) for number in numbers]
    try:
        yield lambda: asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _bar(session: Session) -> Any:
    config = session.config
    return tqdm(total=config.steps, initial=session.step, desc=config.run_name, unit=" steps")


def _show(bar: Any, metrics: training.StepMetrics, batch: int) -> None:
    seen = means(metrics)
    bar.set_postfix_str(
        f"loss {seen['loss']:.3g}, accuracy {100 - seen['error']:.1f} %, λ {seen['lam']:.3g}, "
        f"{batch * (bar.format_dict['rate'] or 0):.0f} images/s",
        refresh=False,
    )
    bar.update(len(metrics.lam))
