"""The runs that are wanted next, batch by batch, each batch in its order.

    python -m experiments campaign A --processes 7 --budget-minutes 9

A batch is written down before its first run. Nothing in a later batch or a figure is chosen from
the test errors of an earlier batch. A batch that runs out of time continues by the same command.

Batches A, B and C want an accelerator: 39, 41 and 28 million images. They ask how much of the
distance between our 12.14 % and the paper's 9.05 % on CIFAR10 mirroring and the released recipe
explain, and what m = 4 gains there. The last runs of a batch are for the library's own λ.

The others are for CPU cores, one run a core. ``recipe`` asks what augmentation is worth: 10,000
images, 6,000 updates of 128, a quarter of the width; about 43 minutes of a core each. ``narrow``
runs the complete schedule on networks of a quarter of the width: MNIST, about 1.7 hours of a core
each, then CIFAR10 mirrored, about 2.1 hours.

``paced`` asks whether the library's own λ takes part on data that is hard: softmax and m = 4 on
CIFAR10, 2,000 updates, about 15 minutes of a core each.

``scaled`` asks what CosFace and ArcFace do as the guide says they are used, with λ = 0, beside
softmax and m = 4 with the library's own λ, all on CPU cores: MNIST, 1,500 updates, about 6 minutes
of a core each, then CIFAR10 beside the runs of ``paced``. Before it, ``scales`` tries two scales
for each of the two margins on the validation split, as many tries as every other loss had.

All go on as long as the cores are free, seed by seed, so that at any stop all arms have the same
seeds but for the last round. A seed that not all arms have is not committed.
"""

from dataclasses import replace
from typing import Any

from experiments.paper.cells import CONFIGS
from experiments.paper.config import Config

Changes = dict[str, Any]


def _runs(names: str, *seeds: int, **changes: Any) -> list[Config]:
    return [replace(CONFIGS[n], seed=seed, **changes) for seed in seeds for n in names.split()]


MIRRORED = {"mirror": True}
PACED = {"pace": "lead"}
SHORT = {"examples": 10_000, "steps": 6_000, "batch": 128, "width": 0.25}
NARROW = {"batch": 128, "width": 0.25}
AUGMENTATIONS: tuple[Changes, ...] = ({}, MIRRORED, {"mirror": True, "crop": 4})
# softmax, and m = 4 with the released λ and with the library's own.
ARMS: tuple[tuple[str, Changes], ...] = (("softmax", {}), ("m4", {}), ("m4", PACED))
# Without tuning: softmax, and the library's own λ. With a scale, which is tuned.
UNTUNED: tuple[tuple[str, Changes], ...] = (ARMS[0], ARMS[2])
SCALED: tuple[tuple[str, Changes], ...] = (("cosface", {}), ("arcface", {}))
# With the scale that had the lower validation error: 8, the configuration's, but for one.
SCALED_CIFAR10: tuple[tuple[str, Changes], ...] = (SCALED[0], ("arcface", {"scale": 16.0}))
# The updates of short runs by data set.
SHORTER = {"mnist": 1_500, "cifar10": 2_000}


BATCHES: dict[str, list[Config]] = {
    "A": [
        *_runs("cifar10-softmax cifar10-m2 cifar10-m4", 0, **MIRRORED),
        *_runs("cifar10-softmax cifar10-m4", 1),
        *_runs("released-cifar10-softmax released-cifar10-m2", 0),
        *_runs("cifar10-m4", 0, **MIRRORED, **PACED),
        *_runs("released-cifar10-softmax", 0, mirror=False),
    ],
    "B": [
        *_runs("cifar10-softmax cifar10-m4", 1, 2, **MIRRORED),
        *_runs("cifar10-softmax cifar10-m4", 2),
        *_runs("released-cifar10-m4", 0),
        *_runs("cifar10-m4", 1, 2, **MIRRORED, **PACED),
    ],
    # On CIFAR100 the λ of m = 4 falls to 5.
    "C": [
        *_runs("cifar10plus-softmax cifar10plus-m4 cifar100-softmax cifar100-m4", 0),
        *_runs("cifar10plus-m4 cifar100-m4", 0, **PACED),
    ],
    "recipe": [
        run
        for seed in range(3)
        for augmentation in AUGMENTATIONS
        for loss, pace in (ARMS[0], ARMS[2])
        for run in _runs(f"cifar10-{loss}", seed, **SHORT, **augmentation, **pace)
    ],
    "narrow": [
        run
        for data, recipe in (("mnist", {}), ("cifar10", MIRRORED))
        for seed in range(3)
        for loss, pace in ARMS
        for run in _runs(f"{data}-{loss}", seed, **NARROW, **recipe, **pace)
    ],
    "paced": [
        run
        for seed in range(3)
        for loss, pace in UNTUNED
        for run in _runs(f"cifar10-{loss}", seed, **NARROW, steps=SHORTER["cifar10"], **pace)
    ],
    "scales": [
        run
        for data, steps in SHORTER.items()
        for loss, _ in SCALED
        for scale in (8.0, 16.0)
        for run in _runs(f"{data}-{loss}", 0, **NARROW, steps=steps, scale=scale, validation=True)
    ],
    "scaled": [
        run
        for data, arms in (("mnist", UNTUNED + SCALED), ("cifar10", SCALED_CIFAR10))
        for seed in range(3)
        for loss, changes in arms
        for run in _runs(f"{data}-{loss}", seed, **NARROW, steps=SHORTER[data], **changes)
    ],
}
