"""CIFAR10 without and with augmentation (CIFAR10+): Table 3 and Fig. 7.

    python -m experiments train cifar10plus-m4
    python -m experiments reproduce --only 'cifar10*' 'fig7-*' --seeds 5

Table 3's error in %, c confirmed, the others recalled:

    =========  ======  =======  ======  ====  ======
    data       hinge   softmax  m2      m3    m4
    =========  ======  =======  ======  ====  ======
    CIFAR10    9.91    9.05     7.73 c  7.66  7.58 c
    CIFAR10+   6.96    6.50     6.01    5.94  5.92
    =========  ======  =======  ======  ====  ======

CIFAR10+ pads by 4 pixels, crops and mirrors; λ is as released for each. ``released-...`` is the
authors' prototxt: another network, batch 128, biases at twice the rate, CIFAR10 mirrored too.
Fig. 7 draws CIFAR10+ with m = 4 and 32 to 128 filters a convolution, without numbers.
``cifar10-asoftmax``, ``-cosface`` and ``-arcface`` have margins that the paper does not know;
nobody has trained them in full.

Time: 6.5 minutes a run on an H200 that six other runs shared; alone nobody has measured it. Softmax
and m4 on CIFAR10 have been trained in full, and stay above the paper's errors, as third parties do,
who report 10.5 where the paper has 7.73. Nobody has trained CIFAR10+ in full.
"""

from dataclasses import replace

from experiments.paper.cell import Cell, Column, beyond
from experiments.paper.config import Config
from lsoftmax_jax.schedule import CIFAR10, CIFAR10_PLUS

RUN, UNKNOWN = "6.5 min, an H200 shared by 7 runs", "not measured"

_S = Config(name="cifar10-softmax", dataset="cifar10", network="cifar10", lam=CIFAR10)
_P = replace(_S, name="cifar10plus-softmax", lam=CIFAR10_PLUS, crop=4, mirror=True)
_R = replace(
    _S,
    name="released-cifar10-softmax",
    network="released-cifar10",
    batch=128,
    steps=30_000,
    written_for=30_000,
    drops=(5_000, 7_500),
    bias_rate=2.0,
    mirror=True,
)
_RP = replace(
    _R, name="released-cifar10plus-softmax", lam=CIFAR10_PLUS, drops=(8_000, 12_000), crop=4
)

_PLAIN = Column("Table 3, CIFAR10", (9.91, 9.05, 7.73, 7.66, 7.58), ("m2", "m4"))
_PLUS = Column("Table 3, CIFAR10+", (6.96, 6.50, 6.01, 5.94, 5.92), ())

CELLS = (
    *_PLAIN.cells(RUN, _S),
    *_PLUS.cells(RUN, _P),
    *_PLAIN.cells(UNKNOWN, _R),
    *_PLUS.cells(UNKNOWN, _RP),
    *beyond("CIFAR10", UNKNOWN, _S),
    *(
        Cell(
            f"Fig. 7, {filters} filters",
            UNKNOWN,
            replace(_P, name=f"fig7-{filters}", network=f"fig7-{filters}", margin=4),
        )
        for filters in (32, 64, 96, 128)
    ),
)
