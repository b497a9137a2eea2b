"""Compares losses on LFW's view 2, where each fold is tested by networks that never saw its people.

    python -m experiments compare-faces --faces lfw --pairs lfw/pairs.txt

In each fold one softmax network is trained. The arms go on from this network, each with its own
loss and all for equally many updates, so that `softmax-going-on` is what a margin must beat. The
order is seed by seed and fold by fold. A seed of which a fold is missing is not committed.

This was written on 2026-11-30, before the first run on view 2. View 1 chose, by the EER over all
pairs of its test people, the weight decay of 0.002 before 0.0005, and ArcFace before NormFace and
CosFace, each with scale 16; results/lfw has these runs. Updates, width and size of the images are
those of the runs of 2026-11-27, which view 1 chose too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.faces.recipe import FaceRecipe
from experiments.faces.train import train_faces
from experiments.faces.verify import verify_faces
from experiments.run.loop import RUNS
from lsoftmax_jax.schedule import LambdaPreset

PROTOCOL = "LFW view 2, unrestricted, no outside data"
SOFTMAX = FaceRecipe(
    margin=1,
    size=(48, 40),
    minimum_images=4,
    width=0.25,
    batch=64,
    steps=1_200,
    learning_rate=0.05,
    drops=(800, 1_000),
    weight_decay=0.002,
)
GOING_ON: dict[str, Any] = {"steps": 300, "learning_rate": 0.01, "drops": (200,)}
# λ reaches its minimum after half of the updates.
ARMS: dict[str, dict[str, Any]] = {
    "softmax-going-on": {},
    "m4-minimum10": {"margin": 4, "lam": LambdaPreset(1000.0, 0.66, 1.0, 10.0)},
    "m4-minimum20": {"margin": 4, "lam": LambdaPreset(1000.0, 0.327, 1.0, 20.0)},
    "m4-lead": {"margin": 4, "pace": "lead"},
    "arcface": {"family": "arcface", "margin": 0.5, "scale": 16.0, "pace": "none"},
}


def recipes(seed: int, fold: int) -> dict[str, FaceRecipe]:
    """The recipes of a fold by name: softmax, then the arms that go on from softmax."""
    first = replace(SOFTMAX, seed=seed, left_out_fold=fold)
    return {"softmax": first} | {
        name: replace(first, **GOING_ON | changes) for name, changes in ARMS.items()
    }


def compare_faces(
    faces: Path,
    pairs: Path,
    folds: tuple[int, ...] = tuple(range(10)),
    seed: int = 0,
    out: Path = RUNS / "lfw",
) -> int:
    """Trains and verifies softmax and every arm in each fold; a stopped comparison continues.

    Two commands with other folds may run side by side, each on a core of its own.

    Args:
      faces: LFW's folder of person/image.jpg.
      pairs: its pairs.txt.
      folds: which folds to leave out, one after the other; 0 is the first.
      seed: of all runs.
      out: folder of the verifications; its folder trained holds the runs.
    """
    for fold in folds:
        trained = [out / "trained" / f"seed{seed}-fold{fold}-{n}" for n in recipes(seed, fold)]
        for run, recipe in zip(trained, recipes(seed, fold).values(), strict=True):
            verified = out / f"{run.name}.json"
            if verified.exists():
                continue
            begun = None if run == trained[0] else trained[0]
            if code := train_faces(faces, run, recipe, pairs=(pairs,), init_from=begun):
                return code
            verify_faces(verified, pairs=(pairs,), faces=faces, checkpoint=run, protocol=PROTOCOL)
    return 0
