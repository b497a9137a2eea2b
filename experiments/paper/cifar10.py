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
_W = replace(_P, margin=4)

_PLAIN = Column("Table 3, CIFAR10", (9.91, 9.05, 7.73, 7.66, 7.58), ("m2", "m4"))
_PLUS = Column("Table 3, CIFAR10+", (6.96, 6.50, 6.01, 5.94, 5.92), ())

CELLS = (
    *_PLAIN.cells(
        RUN,
        replace(_S, name="cifar10-hinge", hinge=True),
        _S,
        replace(_S, name="cifar10-m2", margin=2),
        replace(_S, name="cifar10-m3", margin=3),
        replace(_S, name="cifar10-m4", margin=4),
    ),
    *_PLUS.cells(
        RUN,
        replace(_P, name="cifar10plus-hinge", hinge=True),
        _P,
        replace(_P, name="cifar10plus-m2", margin=2),
        replace(_P, name="cifar10plus-m3", margin=3),
        replace(_P, name="cifar10plus-m4", margin=4),
    ),
    *_PLAIN.cells(
        UNKNOWN,
        replace(_R, name="released-cifar10-hinge", hinge=True),
        _R,
        replace(_R, name="released-cifar10-m2", margin=2),
        replace(_R, name="released-cifar10-m3", margin=3),
        replace(_R, name="released-cifar10-m4", margin=4),
    ),
    *_PLUS.cells(
        UNKNOWN,
        replace(_RP, name="released-cifar10plus-hinge", hinge=True),
        _RP,
        replace(_RP, name="released-cifar10plus-m2", margin=2),
        replace(_RP, name="released-cifar10plus-m3", margin=3),
        replace(_RP, name="released-cifar10plus-m4", margin=4),
    ),
    *beyond(
        "CIFAR10",
        UNKNOWN,
        replace(_S, name="cifar10-asoftmax", family="a-softmax", margin=4),
        replace(_S, name="cifar10-cosface", family="cosface", margin=0.35, scale=8.0),
        replace(_S, name="cifar10-arcface", family="arcface", margin=0.5, scale=8.0),
    ),
    Cell("Fig. 7, 32 filters", None, None, UNKNOWN, replace(_W, name="fig7-32", network="fig7-32")),
    Cell("Fig. 7, 64 filters", None, None, UNKNOWN, replace(_W, name="fig7-64", network="fig7-64")),
    Cell("Fig. 7, 96 filters", None, None, UNKNOWN, replace(_W, name="fig7-96", network="fig7-96")),
    Cell(
        "Fig. 7, 128 filters", None, None, UNKNOWN, replace(_W, name="fig7-128", network="fig7-128")
    ),
)
