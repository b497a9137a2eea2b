"""Trains a face network on any folder of `person/image.jpg`: streamed, logged, resumable.

A run's folder holds `run.json` (what decides its numbers), `metrics.jsonl`, the latest checkpoint
and, beside it in `place/`, where the stream of images and the learning rate stood. A stopped run
continues in the middle of an epoch and, on the same devices, ends in the same numbers.
"""

import hashlib
import json
import math
import shlex
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from experiments.faces.images import FaceImages, Faces, list_faces, training_batches
from experiments.faces.protocol import people_of_fold, read_pairs
from experiments.paper.networks import NETWORKS, ConvNet
from experiments.run.train import interruptible
from experiments.store.checkpoints import Checkpoints
from experiments.store.files import replacing
from experiments.store.logs import Log, Seconds
from experiments.store.results import load, provenance, save
from lsoftmax_jax import annealed_lambda, devices, training
from lsoftmax_jax.schedule import LambdaPreset

LOG_UPDATES = 20
# A smaller λ changes the loss too little to hide where it stays.
NO_LAM = 0.01
ADVICE = "try a higher --lam.minimum, a slower --lam.gamma or a lower --learning-rate"


@dataclass(frozen=True)
class FaceRecipe:
    """All that decides a run's numbers besides the images."""

    network: Literal["lfw", "sphere20"] = "lfw"
    """The paper's network of Table 1, or one after the authors' SphereFace-20."""
    size: tuple[int, int] = (112, 96)
    """Height and width of the images: 112 96, 112 112, or smaller for a trial."""
    width: float = 1.0
    """Multiplies every layer's filters and features."""
    dtype: Literal["f32", "bf16"] = "f32"
    """Of the activations; parameters, batch statistics and head are always float32."""
    margin: int = 4
    """m of the L-Softmax; 1 is the ordinary softmax."""
    lam: LambdaPreset = LambdaPreset(base=1000.0, gamma=0.12, power=1.0, minimum=5.0)
    """λ at update t is max(minimum, base (1 + gamma t)^-power)."""
    steps: int = 28_000
    """Updates."""
    batch: int = 256
    """Images an update sees, on all devices together."""
    learning_rate: float = 0.1
    schedule: Literal["steps", "plateau"] = "steps"
    """Divide the learning rate by ten after the updates in drops, or when the loss stays."""
    drops: tuple[int, ...] = (16_000, 24_000)
    """Updates after which schedule steps divides the learning rate."""
    patience: int = 2_000
    """Updates without a lower loss after which schedule plateau does, once λ is low."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    """On kernels, the head's included; never on biases, batch normalisation or PReLU slopes."""
    minimum_images: int = 1
    """Leave out people with fewer images."""
    left_out_fold: int | None = None
    """Leave out everybody in this fold of the pairs (0 is the first), to be tested on it."""
    seed: int = 0
    """Draws weights, shuffles and mirrors."""

    def __post_init__(self) -> None:
        for name in ("margin", "steps", "batch", "patience", "minimum_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if min(self.size) < 32:
            raise ValueError(f"size must be at least 32 x 32, got {self.size}")

    def model(self, classes: int) -> ConvNet:
        """The network with fresh weights and a head for so many people."""
        row = replace(NETWORKS[self.network], image=(*self.size, 3)).scaled(self.width)
        dtype = jnp.bfloat16 if self.dtype == "bf16" else jnp.float32
        return ConvNet(row, classes, margin=self.margin, dtype=dtype, rngs=nnx.Rngs(self.seed))

    def optimizer(self) -> optax.GradientTransformation:
        """SGD with momentum whose learning rate is part of its state, for the loop to set."""

        def is_kernel(params: Any) -> Any:
            return jax.tree.map_with_path(lambda path, _: path[-1].key == "kernel", params)

        def sgd(learning_rate: float) -> optax.GradientTransformation:
            decay = optax.add_decayed_weights(self.weight_decay, is_kernel)
            return optax.chain(decay, optax.sgd(learning_rate, momentum=self.momentum))

        return optax.inject_hyperparams(sgd)(learning_rate=self.learning_rate)


class Plateau(NamedTuple):
    """The lowest loss so far, the update that reached it or made the last drop, and the drops."""

    loss: float = math.inf
    step: int = 0
    drops: int = 0

    def after(self, step: int, loss: float, patience: int) -> "Plateau":
        """With a loss seen at a step; one counts as lower by one percent."""
        if loss < 0.99 * self.loss:
            return self._replace(loss=loss, step=step)
        if step - self.step >= patience:
            return self._replace(step=step, drops=self.drops + 1)
        return self


class FaceRun:
    """A run in its folder, begun or continued: the network, its place in the images, the log.

    Args:
      recipe: decides the numbers.
      faces: what to train on.
      out: the run's folder.

    Raises:
      ValueError: if out holds another run, or the batch does not divide over the devices.
    """

    def __init__(self, recipe: FaceRecipe, faces: Faces, out: Path) -> None:
        mesh = devices.data_mesh()
        if recipe.batch % mesh.size:
            raise ValueError(f"batch must divide over {mesh.size} devices, got {recipe.batch}")
        _claim(out / "run.json", recipe, faces)
        self.recipe, self.out = recipe, out
        self.images = FaceImages(faces, recipe.size)
        optimizer = recipe.optimizer()
        graphdef, state = training.create(recipe.model(len(faces.people)), optimizer)
        # Through the host: placed and typed as every later state, the first one compiles no extra.
        self.state = jax.device_put(jax.tree.map(np.asarray, state), NamedSharding(mesh, P()))
        step = training.train_step(graphdef, optimizer, annealed_lambda(*recipe.lam))
        self._compiled = devices.compile_step(step, mesh)
        self._rows = NamedSharding(mesh, P(devices.DATA_AXIS))
        self._stream = iter(
            training_batches(
                self.images,
                recipe.batch // jax.process_count(),
                seed=recipe.seed,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
        )
        self.plateau, self._sums = Plateau(), _no_sums()
        self._checkpoints = Checkpoints(out / "checkpoints")
        if (restored := self._checkpoints.latest(self.state, mesh)) is not None:
            self.state = restored
            self._restore_place(int(restored.step))
        self.step = int(self.state.step)
        first = jax.process_index() == 0
        self._log = Log(out if first else out / f"process-{jax.process_index()}", self.step)
        self._before = self._log.seconds
        self._started = self._line_started = time.perf_counter()

    def __enter__(self) -> "FaceRun":
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpoints.close()
        self._log.close()

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        passed = sum(self.step >= drop for drop in self.recipe.drops)
        drops = passed if self.recipe.schedule == "steps" else self.plateau.drops
        return self.recipe.learning_rate * 0.1**drops

    def update(self) -> dict[str, float] | None:
        """One update; what the last LOG_UPDATES saw, on average, if a line of the log is due."""
        batch, rate = next(self._stream), self.learning_rate
        images, labels = (
            jax.make_array_from_process_local_data(self._rows, batch[key])
            for key in ("image", "label")
        )
        self.state, metrics = self._compiled(_at_rate(self.state, rate), images, labels)
        self._sums = jax.tree.map(jnp.add, self._sums, metrics.sums)
        self.step += 1
        if self.step % LOG_UPDATES and self.step != self.recipe.steps:
            return None
        seen = self._means() | {
            "kernel_norm": float(metrics.kernel_norm),
            "grad_norm": float(metrics.grad_norm),
            "lam": float(metrics.lam),
            "learning_rate": rate,
        }
        self._log.write("train", self.step, self._seconds(), **seen)
        if not math.isfinite(seen["loss"]):
            raise ValueError(f"training diverged by update {self.step}; {ADVICE}")
        lowest = math.isclose(seen["lam"], self.recipe.lam.minimum, rel_tol=1e-6)
        if lowest or seen["lam"] < NO_LAM:
            self.plateau = self.plateau.after(self.step, seen["loss"], self.recipe.patience)
        self._sums = _no_sums()
        return seen

    def save(self) -> None:
        """A checkpoint of this update; its place first, so that none is without one."""
        place = {
            "stream": self._stream.get_state(),
            "sums": [float(value) for value in self._sums],
            "plateau": self.plateau,
        }
        with replacing(self._place(self.step)) as file:
            file.write(json.dumps(place).encode())
        self._checkpoints.save(self.state)
        for old in self._place(self.step).parent.glob(f"*.{jax.process_index()}.json"):
            if old != self._place(self.step):
                old.unlink()

    def _means(self) -> dict[str, float]:
        """Of the updates since the last line, and how fast they were."""
        sums = {name: float(value) for name, value in self._sums._asdict().items()}
        images = sums.pop("examples")
        means = {name: value / images for name, value in sums.items()}
        means["accuracy"] = means.pop("correct")
        now = time.perf_counter()
        means["images_per_second"] = images / (now - self._line_started)
        self._line_started = now
        return means

    def _seconds(self) -> Seconds:
        spent = time.perf_counter() - self._started
        return replace(self._before, wall=self._before.wall + spent)

    def _restore_place(self, step: int) -> None:
        file = self._place(step)
        if not file.exists():
            raise ValueError(f"{file} is missing: continue on as many processes as before")
        place = json.loads(file.read_text())
        self._stream.set_state(place["stream"])
        self._sums = training.Sums(*map(jnp.float32, place["sums"]))
        self.plateau = Plateau(*place["plateau"])

    def _place(self, step: int) -> Path:
        return self.out / "place" / f"{step}.{jax.process_index()}.json"


def train_faces(
    faces: Path,
    out: Path,
    recipe: Annotated[FaceRecipe, tyro.conf.arg(name="")],
    pairs: Path | None = None,
    checkpoint_updates: int = 200,
) -> int:
    """Trains a face network on a folder of person/image.jpg, or continues to.

    Args:
      faces: the folder.
      out: folder of the run; where it holds this run already, training continues.
      recipe: decides the run's numbers.
      pairs: file of pairs, whose folds --left-out-fold counts.
      checkpoint_updates: updates between two checkpoints.
    """
    listed = training_faces(faces, recipe, pairs)
    with (
        FaceRun(recipe, listed, out) as run,
        interruptible() as stop,
        tqdm(total=recipe.steps, initial=run.step, unit=" updates") as progress,
    ):
        # several processes would not stop at the same update: they end and continue by checkpoint
        alone = jax.process_count() == 1
        while run.step < recipe.steps and not (alone and stop()):
            if seen := run.update():
                shown = {name: f"{seen[name]:.4g}" for name in ("loss", "accuracy", "lam")}
                progress.set_postfix(shown | {"images/s": f"{seen['images_per_second']:.0f}"})
            progress.update()
            if run.step % checkpoint_updates == 0:
                run.save()
        run.save()
    finished = run.step == recipe.steps
    print(
        f"{out}: {run.step} of {recipe.steps} updates on {len(listed.people)} people, "
        f"{len(run.images.broken)} broken images skipped"
        + ("" if finished else "; the same command continues")
    )
    return 0 if finished else 130


def training_faces(folder: Path, recipe: FaceRecipe, pairs: Path | None) -> Faces:
    """The faces to train on: without people of few images and those of the fold left out."""
    left_out: frozenset[str] = frozenset()
    if recipe.left_out_fold is not None:
        if pairs is None:
            raise ValueError("left_out_fold counts the folds of pairs; got no file of pairs")
        left_out = people_of_fold(read_pairs(pairs), recipe.left_out_fold)
    return list_faces(folder, minimum_images=recipe.minimum_images, without=left_out)


class TrainedRun(NamedTuple):
    """A run's recipe, where and how it was begun, its people, and its network at inference."""

    recipe: FaceRecipe
    begun: dict[str, Any]
    step: int
    people: frozenset[str]
    model: ConvNet


def load_run(out: Path) -> TrainedRun:
    """What a run's folder holds, with the weights of its latest checkpoint.

    Raises:
      ValueError: if the folder holds no run or no checkpoint yet.
    """
    if not (out / "run.json").exists():
        raise ValueError(f"{out} is no run of train-faces: it has no run.json")
    saved = load(out / "run.json")
    recipe = FaceRecipe(
        **saved["recipe"]
        | {name: tuple(saved["recipe"][name]) for name in ("size", "drops")}
        | {"lam": LambdaPreset(**saved["recipe"]["lam"])}
    )
    graphdef, like = training.create(recipe.model(len(saved["people"])), recipe.optimizer())
    with Checkpoints(out / "checkpoints") as checkpoints:
        state = checkpoints.latest(like, devices.data_mesh())
    if state is None:
        raise ValueError(f"{out} holds no checkpoint yet; train-faces writes them")
    model = training.restore_model(graphdef, state)
    people = frozenset(saved["people"])
    return TrainedRun(recipe, saved["begun"], int(state.step), people, model)


def command_line() -> str:
    """The command of this process, as typed."""
    return shlex.join(["python", "-m", "experiments", *sys.argv[1:]])


def _claim(file: Path, recipe: FaceRecipe, faces: Faces) -> None:
    """Writes what decides the run's numbers, or checks that it is what is there."""
    images = hashlib.sha256("\n".join(faces.names).encode()).hexdigest()
    settings = asdict(recipe) | {"lam": recipe.lam._asdict()}
    wanted = json.loads(json.dumps({"recipe": settings, "images": images, "people": faces.people}))
    if not file.exists():
        begun = {"command": command_line(), **provenance(jax.device_count())}
        return save(file, wanted | {"begun": begun})
    there = load(file)
    changed = [
        f"{name} {there['recipe'][name]} -> {value}"
        for name, value in wanted["recipe"].items()
        if there["recipe"][name] != value
    ]
    changed += ["other images"] * (there["images"] != wanted["images"])
    if changed:
        raise ValueError(f"{file.parent} holds another run ({', '.join(changed)}); choose another")


def _at_rate(state: training.State, rate: float) -> training.State:
    hyperparams = state.opt_state.hyperparams | {"learning_rate": np.float32(rate)}
    return state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))


def _no_sums() -> training.Sums:
    return training.Sums(*[jnp.float32(0)] * len(training.Sums._fields))
