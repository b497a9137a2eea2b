"""The runs that are wanted next, batch by batch, each batch in its order.

    python -m experiments campaign A --processes 7 --budget-minutes 9

A batch is written down before its first run. Nothing in a later batch or a figure is chosen from
the test errors of an earlier batch. A batch that runs out of time continues by the same command.

Batches A, B and C want an accelerator: 39, 41 and 28 million images. They ask how much of the
distance between our 12.14 % and the paper's 9.05 % on CIFAR10 mirroring and the released recipe
explain, and what m = 4 gains there. The last runs of a batch are for the library's own λ.

The others are for CPU cores, one run a core. ``fits`` asks what the library's λ gains where the
network fits its training images, and ``recipe``, beside it, what augmentation is worth: 10,000
images of CIFAR10, 6,000 updates of 128, a quarter of the width; about 50 minutes of a core each.
Both were one batch until the pair of ``fits`` with seed 0 was known. Then its seeds 1 and 2 were
put before all else, and ``decays`` was written: it asks whether softmax gets the same from a
larger weight decay. Three decays are tried on the validation split. If the best one is not that
of ``fits``, it will be trained with three seeds. Seeds 3 to 5 of ``fits`` were added when the
first three were known: the interval of their difference, 2.5 points, includes zero. ``narrow``
runs the complete schedule on networks of a quarter of the width: MNIST, about 1.7 hours of a core
each, then CIFAR10 mirrored, about 2.1 hours.

``paced`` asks whether the library's own λ takes part on data that is hard: softmax and m = 4 on
CIFAR10, 2,000 updates, about 15 minutes of a core each.

``scaled`` asks what CosFace and ArcFace do as the guide says they are used, with λ = 0, beside
softmax and m = 4 with the library's own λ, all on CPU cores: MNIST, 1,500 updates, about 6 minutes
of a core each, then CIFAR10 beside the runs of ``paced``. Before it, ``scales`` tries two scales
for each of the two margins on the validation split, as many tries as every other loss had.

``cures`` asks whether the library's λ keeps ArcFace's features from turning away from their columns
on CIFAR10, as they did in ``scaled``. It was written when two seeds of ``scaled`` were known.

All go on as long as the cores are free, seed by seed, so that at any stop all arms have the same
seeds but for the last round. A seed that not all arms have is not committed; of ``recipe`` every
pair of softmax and the library's λ is, in their order.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.paper.cells import CONFIGS
from experiments.paper.config import Config

# Losses, each with its own changes, that are trained side by side.
Arms = Sequence[tuple[str, dict[str, Any]]]


def _runs(names: str, *seeds: int, **changes: Any) -> list[Config]:
    return [replace(CONFIGS[n], seed=seed, **changes) for seed in seeds for n in names.split()]


def _rounds(data: str, arms: Arms, seeds: int, **shared: Any) -> list[Config]:
    """All arms with seed 0, then all with seed 1, and so on."""
    return [
        replace(CONFIGS[f"{data}-{loss}"], seed=seed, **shared | changes)
        for seed in range(seeds)
        for loss, changes in arms
    ]


MIRRORED = {"mirror": True}
PACED = {"pace": "lead"}
SHORT = {"examples": 10_000, "steps": 6_000, "batch": 128, "width": 0.25}
NARROW = {"batch": 128, "width": 0.25}
SHORT_MNIST, SHORT_CIFAR10 = NARROW | {"steps": 1_500}, NARROW | {"steps": 2_000}

# softmax, and m = 4 with the released λ and with the library's own.
ARMS: Arms = (("softmax", {}), ("m4", {}), ("m4", PACED))
# Without tuning: softmax, and the library's own λ. With a scale, which is tuned.
UNTUNED: Arms = (ARMS[0], ARMS[2])
SCALED: Arms = (("cosface", {}), ("arcface", {}))
# With the scale that had the lower validation error: 8, the configuration's, but for one.
SCALED_CIFAR10: Arms = (SCALED[0], ("arcface", {"scale": 16.0}))
SCALES: Arms = [(loss, {"scale": scale}) for loss, _ in SCALED for scale in (8.0, 16.0)]
DECAYS: Arms = [("softmax", {"weight_decay": decay}) for decay in (5e-4, 2e-3, 5e-3)]
AUGMENTED: Arms = [
    (loss, augmentation | pace)
    for augmentation in (MIRRORED, {"mirror": True, "crop": 4})
    for loss, pace in UNTUNED
]


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
    "fits": _rounds("cifar10", UNTUNED, 6, **SHORT),
    "decays": _rounds("cifar10", DECAYS, 1, **SHORT, validation=True),
    "recipe": _rounds("cifar10", AUGMENTED, 3, **SHORT),
    "narrow": [
        *_rounds("mnist", ARMS, 3, **NARROW),
        *_rounds("cifar10", ARMS, 3, **NARROW, **MIRRORED),
    ],
    "paced": _rounds("cifar10", UNTUNED, 3, **SHORT_CIFAR10),
    "scales": [
        *_rounds("mnist", SCALES, 1, **SHORT_MNIST, validation=True),
        *_rounds("cifar10", SCALES, 1, **SHORT_CIFAR10, validation=True),
    ],
    "scaled": [
        *_rounds("mnist", (*UNTUNED, *SCALED), 3, **SHORT_MNIST),
        *_rounds("cifar10", SCALED_CIFAR10, 3, **SHORT_CIFAR10),
    ],
    "cures": _rounds("cifar10", [("arcface", {"scale": 16.0, **PACED})], 3, **SHORT_CIFAR10),
}
