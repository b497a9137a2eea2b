"""Trains a face network on any folder of `person/image.jpg`, streamed from the disk.

A checkpoint holds the position of the image stream, so a stopped run continues in the middle of an
epoch.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from jax.sharding import Mesh
from jax.stages import Compiled

from experiments.faces.images import FaceImages, Faces, list_faces, training_batches
from experiments.faces.protocol import people_of_fold, read_pairs
from experiments.faces.recipe import FaceRecipe
from experiments.paper import networks as models
from experiments.run import loop
from experiments.run.program import check_batch, compiled, network_state, per_update
from experiments.run.session import Clock, Task, Values, result_file
from experiments.store import processes, results
from experiments.store.checkpoints import last_state
from experiments.store.claims import claim, claimed, differing
from lsoftmax_jax import training
from lsoftmax_jax.devices import DATA_AXIS, compile_step, data_mesh

# Updates in one dispatch on an accelerator; on a CPU a dispatch is one update.
DISPATCH = 20


class FaceBatches:
    """Streams this process's batches to the devices of a mesh.

    Args:
      recipe: decides the numbers.
      images: the images to train on.
      mesh: has a "data" axis.
    """

    def __init__(self, recipe: FaceRecipe, images: FaceImages, mesh: Mesh) -> None:
        self._recipe = recipe
        self._rows = jax.NamedSharding(mesh, jax.P(DATA_AXIS))
        process, count = jax.process_index(), jax.process_count()
        size = recipe.batch // count
        self._stream = iter(training_batches(images, size, recipe.seed, process, count))

    @property
    def like(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        """Images and labels of an update, abstract, with where they lie."""
        recipe, of_rows = self._recipe, partial(jax.ShapeDtypeStruct, sharding=self._rows)
        images = of_rows((recipe.batch, *recipe.built_network.image), np.float32)
        return images, of_rows((recipe.batch,), np.int32)

    def feed(self, step: int) -> "FaceBatches":
        return self

    def __next__(self) -> tuple[jax.Array, jax.Array]:
        """Returns images and labels of the next update, of all processes together."""
        batch = next(self._stream)
        local = batch["image"], batch["label"]
        return jax.make_array_from_process_local_data((self._rows, self._rows), local)

    def position(self) -> dict[str, Any]:
        return {"stream": self._stream.get_state()}

    def restore(self, position: dict[str, Any]) -> None:
        self._stream.set_state(position["stream"])


def train_faces(
    faces: Path,
    out: Path,
    recipe: Annotated[FaceRecipe, tyro.conf.arg(name="")],
    pairs: tuple[Path, ...] = (),
    init_from: Path | None = None,
    devices: int | None = None,
    checkpoint_seconds: float = 60.0,
    meeting: Annotated[processes.Meeting, tyro.conf.arg(name="")] = processes.ALONE,
) -> int:
    """Trains a face network on a folder of person/image.jpg, or continues such a run.

    On several hosts, run the same command in every process, as `train --help` shows. A run must
    continue on as many processes as it began on.

    Args:
      faces: folder of person/image.jpg, or of insightface's train.rec and train.idx, the usual form
        of CASIA-WebFace.
      out: folder of the run; an unfinished run continues. The result is OUT.json beside the folder.
      recipe: decides the run's numbers.
      pairs: files of pairs of faces, as for `verify`; --left-out-fold names one of their folds.
      init_from: folder of another run, such as a softmax run; start from its weights.
      devices: train on this many devices, the first ones; by default on all.
      checkpoint_seconds: seconds between two checkpoints.
    """
    recipe.check_flags(FaceRecipe())
    with processes.joined(meeting), loop.interruptible() as stop:
        listed, mesh = training_faces(faces, recipe, pairs), data_mesh(devices)
        check_batch(recipe.batch, mesh, len(listed.names))
        images = FaceImages(listed, recipe.size)
        task = prepare(recipe, images, out, init_from, mesh)
        if not out.exists():
            check_result(task, result_file(out))
        claim(out, task.settings, mesh.size, writes=processes.is_first())
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        outcome = loop.finished(out, str(out)) or loop.train(
            task,
            stop,
            dispatch=1 if on_cpu else DISPATCH,
            evaluations=0,
            checkpoint_seconds=checkpoint_seconds,
        )
        print(f"{len(listed.people)} people, {len(images.broken)} broken images skipped: {out}")
        return loop.exit_code(outcome)


def check_result(task: Task, file: Path) -> None:
    """Raises ValueError if a result whose folder is gone is of another run."""
    if not file.exists():
        return
    there, names = results.load_run(file, ("config",)), ("config", "init_from")
    if wrong := differing({n: there.get(n) for n in names}, {n: task.facts[n] for n in names}):
        raise ValueError(f"{file} holds the result of another run ({', '.join(wrong)})")


def prepare(
    recipe: FaceRecipe, images: FaceImages, out: Path, init_from: Path | None, mesh: Mesh
) -> Task:
    """Makes the task of a run on faces."""
    faces, clock = images.faces, Clock()
    people, init = list(faces.people), init_from and init_from.name
    with clock.spent("setup"):
        graphdef, create = network_state(recipe, recipe.built_network, len(people), mesh)
        step = training.train_step(graphdef, recipe.optimizer, recipe.lam_policy)
        source = FaceBatches(recipe, images, mesh)
        seen, like = fingerprint(faces), jax.eval_shape(create, recipe.seed)

    def first_state() -> training.State:
        fresh = create(recipe.seed)
        return fresh if init_from is None else warm_start(graphdef, fresh, init_from, mesh)

    @cache
    def program() -> Compiled:
        return compiled(compile_step(step, mesh).lower(like, *source.like))

    def updates(
        update: Compiled, length: int, state: training.State, batches: FaceBatches
    ) -> tuple[training.State, list[training.StepMetrics]]:
        metrics = []
        for _ in range(length):
            state, of_one = update(state, *next(batches), None)
            metrics.append(of_one)
        return state, metrics

    def values(metrics: list[training.StepMetrics]) -> Values:
        return per_update(jax.tree.map(lambda *entries: np.stack(entries), *metrics))

    saved = recipe.to_json()
    facts = {
        "kind": "faces",
        "name": out.name,
        "seed": recipe.seed,
        "config": saved,
        "ran": recipe.ran,
        "data": {"name": faces.root.name, "fingerprint": seen, "people": len(people)},
        "parameters": models.parameter_count(recipe.built_network, len(people)),
        "init_from": init,
    }
    return Task(
        name=out.name,
        folder=out,
        settings={"recipe": saved, "images": seen, "people": people, "init_from": init},
        facts=facts,
        steps=recipe.steps,
        batch=recipe.batch,
        mesh=mesh,
        clock=clock,
        source=source,
        like=like,
        create=first_state,
        compile=lambda state, feed, length: partial(updates, program(), length),
        values=values,
        test=lambda state: {},
        measure=lambda state: {"broken_images": len(images.broken)},
    )


def fingerprint(faces: Faces) -> str:
    """Hashes the names and all bytes of the images."""

    def of_image(name: str) -> bytes:
        return hashlib.sha256(faces.read(name)).digest()

    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for name, of_one in zip(faces.names, threads.map(of_image, faces.names), strict=True):
            digest.update(name.encode() + b"\n" + of_one)
    return digest.hexdigest()[:16]


def training_faces(folder: Path, recipe: FaceRecipe, pairs: tuple[Path, ...]) -> Faces:
    """Lists the faces to train on, without people of few images and of the left-out fold."""
    left_out: frozenset[str] = frozenset()
    if recipe.left_out_fold is not None:
        if not pairs:
            raise ValueError("left_out_fold counts the folds of pairs; got no file of pairs")
        left_out = people_of_fold(read_pairs(*pairs), recipe.left_out_fold)
    elif pairs:
        raise ValueError("pairs without left_out_fold leave nobody out: name the fold, or no pairs")
    faces = list_faces(folder, minimum_images=recipe.minimum_images, without=left_out)
    if len(faces.people) < 2:
        raise ValueError(f"faces: expected at least two people to tell apart, {folder} has one")
    return faces


def warm_start(graphdef: Any, fresh: training.State, run: Path, mesh: Mesh) -> training.State:
    """Returns a fresh state with the weights and statistics of another run on faces.

    The head is taken too if both runs have equally many people.
    """
    model, begun = load_run(run, mesh).model, training.restore_model(graphdef, fresh)
    if model.head.kernel.shape != begun.head.kernel.shape:
        model.head = begun.head
    _, state = training.create(model, optax.identity())
    shapes = [jax.tree.map(np.shape, tree.params) for tree in (state, fresh)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"init_from: the network of {run} is another than this recipe's")
    return fresh._replace(params=state.params, other=state.other)


class TrainedRun(NamedTuple):
    """A run's recipe, how it was begun, its people, its last state, and its inference network."""

    recipe: FaceRecipe
    begun: dict[str, Any]
    people: frozenset[str]
    state: training.State
    model: models.ConvNet


def load_run(run: Path, mesh: Mesh | None = None) -> TrainedRun:
    """Loads a run's folder, and its latest checkpoint onto a mesh, by default of all devices.

    Raises:
      FileNotFoundError: the folder holds no run or no checkpoint yet.
    """
    there = claimed(run)
    settings = there["settings"]
    if "recipe" not in settings:
        raise ValueError(f"{run} is no run of train-faces")
    recipe, people = FaceRecipe.from_json(settings["recipe"]), frozenset(settings["people"])
    network, mesh = recipe.built_network, mesh or data_mesh()
    graphdef, create = network_state(recipe, network, len(people), mesh)
    state = last_state(run, jax.eval_shape(create, 0))
    model = training.restore_model(graphdef, state)
    begun = there["begun"] | {"init_from": settings["init_from"]}
    return TrainedRun(recipe, begun, people, state, model)
