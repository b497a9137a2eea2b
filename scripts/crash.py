"""Kills runs and continues them; each must end with the same bits as an unbroken run.

    python -m scripts.crash [--kills KILLS] [--seed SEED] [--result RESULT.json]

Half of the kills come at a random time. The others come at a numbered file-system event under the
run's folder: an open, rename, removal or new folder, as Python's audit hooks see it. Each source of
images gets an equal share of the kills, and so does a network with dropout that skips two updates
because they are not finite. A run is killed several times before it may finish.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tyro
from flax import nnx

from experiments.__main__ import main
from experiments.faces.stand_in import write_digits
from experiments.paper import networks
from experiments.store.results import save
from lsoftmax_jax import training

COMMON = ["--steps", "12", "--checkpoint-seconds", "0"]
IN_MEMORY = ["train", "digits-m4", "--batch", "16", "--width", "0.125"]
SOURCES = {
    "images in memory": IN_MEMORY,
    "dropout and skipped updates": ["skipping", *IN_MEMORY],
    "streamed faces": ["train-faces", "--batch", "16", "--width", "0.02", "--size", "32", "32"],
}
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
KILLS_A_RUN = 5


class Dropping(networks.ConvNet):
    def __init__(self, *arguments: Any, rngs: nnx.Rngs, **keywords: Any) -> None:
        super().__init__(*arguments, rngs=rngs, **keywords)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, *batch: Any, **keywords: Any) -> jax.Array:
        return self.dropout(super().__call__(*batch, **keywords))


def skip_and_drop() -> None:
    """Gives this process's network dropout, and a λ of NaN at two updates."""
    train_step = training.train_step

    def skipping(graphdef: Any, optimizer: Any, *_: Any, **keywords: Any) -> Any:
        def lam(step: jax.Array) -> jax.Array:
            return jnp.where((step == 4) | (step == 7), jnp.nan, 5.0)

        return train_step(graphdef, optimizer, lam, **keywords)

    networks.ConvNet, training.train_step = Dropping, skipping  # type: ignore[misc]  # in this process alone


def started(words: list[str], out: Path, cache: Path, event: int | None = None) -> int:
    """Starts a process that trains; it kills itself at the file-system event of this number."""
    if (child := os.fork()) != 0:
        return child
    seen = 0

    def hook(name: str, arguments: tuple) -> None:
        nonlocal seen
        if name in EVENTS and str(arguments[0]).startswith(str(out)):
            seen += 1
            (out.parent / "last").write_text(f"{seen} {name} {Path(str(arguments[0])).name}")
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    silent = os.open(out.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(silent, 1), os.dup2(silent, 2)
    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.addaudithook(hook)
    if words[0] == "skipping":
        skip_and_drop()
        words = words[1:]
    os._exit(main([*words, *COMMON, "--out", str(out)]))


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(out: Path) -> tuple:
    """The curves, measures and bits of the last checkpoint, which must not depend on kills."""
    (folder,) = (log.parent for log in out.rglob("metrics.jsonl"))
    result = json.loads(folder.with_name(f"{folder.name}.json").read_text())
    numbers = result["status"], result["curves"], result.get("test"), result.get("accuracy")
    with ocp.CheckpointManager(folder / "checkpoints") as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore())
    leaves, tree = jax.tree.flatten(state)
    # NumPy cannot hold a random key.
    keyed = jax.dtypes.prng_key
    leaves = [
        jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, keyed) else leaf for leaf in leaves
    ]
    return numbers, str(tree), [np.asarray(leaf).tobytes() for leaf in leaves]


def attack(words: list[str], kills: int, rng: random.Random, folder: Path) -> tuple[Counter, int]:
    """Kills runs; returns where the kills hit, and how many runs ended differently."""
    if words[0] == "train-faces":
        write_digits(folder / "faces", images=8)
        words = [*words, "--faces", str(folder / "faces")]
    hit: Counter[str] = Counter()
    wrong, events, seconds = 0, 0, 0.0
    for attempt in ("compiled", "whole"):
        whole = folder / attempt / "run"
        whole.mkdir(parents=True)
        begun = time.monotonic()
        code = ended(started(words, whole, folder / "cache"))
        assert code == 0, (folder / attempt / "said").read_text()[-2000:]
        seconds = time.monotonic() - begun
        events = int((folder / attempt / "last").read_text().split()[0])
    expected = in_child(outcome, whole)
    while (done := sum(hit.values())) < kills:
        place = folder / "broken" / "run"
        place.mkdir(parents=True)
        for number in range(min(KILLS_A_RUN, kills - done)):
            # After each kill less of the run is left.
            left = 1 - number / KILLS_A_RUN
            if rng.random() < 0.5:
                child = started(
                    words, place, folder / "cache", 1 + int(rng.random() * events * left)
                )
                where = "event"
            else:
                child = started(words, place, folder / "cache")
                time.sleep(rng.random() * seconds * left)
                os.kill(child, signal.SIGKILL)
                where = "time"
            if ended(child) == -signal.SIGKILL:
                last = folder / "broken" / "last"
                at = last.read_text().split()[1:] if last.exists() else ["before any"]
                hit[" ".join(at) if where == "event" else "random time"] += 1
        code = ended(started(words, place, folder / "cache"))
        if code != 0 or in_child(outcome, place) != expected:
            wrong += 1
            print(f"exit {code}:", (folder / "broken" / "said").read_text()[-2000:])
        shutil.rmtree(folder / "broken")
    return hit, wrong


def in_child(function: Callable[[Path], Any], argument: Path) -> Any:
    """A function's value from a child: this process could not fork after JAX has started."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        return child.submit(function, argument).result()


def crash(kills: int = 30, seed: int = 0, result: Path | None = None) -> int:
    rng, found = random.Random(seed), {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, words) in enumerate(SOURCES.items()):
            share = (kills + number) // len(SOURCES)
            place = Path(folder).resolve() / str(number)
            place.mkdir()
            hit, wrong = attack(words, share, rng, place)
            found[name] = {"kills": sum(hit.values()), "different": wrong, "at": dict(hit)}
            print(f"{name}: {sum(hit.values())} kills, {wrong} runs ended differently", flush=True)
    if result is not None:
        load = os.getloadavg()[0]
        save(result, {"kind": "crash", "seed": seed, "load": load, "sources": found})
    return any(of_one["different"] for of_one in found.values())


if __name__ == "__main__":
    sys.exit(tyro.cli(crash))
