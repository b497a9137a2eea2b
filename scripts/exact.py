"""The losses in 80 bits, and the unit of every number: what rounding may take off it.

For a row x with label y, the angle theta_j between x and the column w_j, and s = 1 / (1 + λ),

    z_j = n_j cos(theta_j),    z_y = n_y ((1 - s) cos(theta_y) + s v(theta_y))

where n_j is the product of the lengths of x and w_j, or of what the margin puts in their place.
Everything is computed row by row from the angles; no formula is shared with the library.
"""

from typing import Any, NamedTuple

import numpy as np

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import Combined, CosFace, NormFace, SphereFace

EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float64": 2.0**-52, "float16": 2.0**-11}
# An error of at most so many units is right.
ALLOWED = 4
# Logits may be off by so many of their own units before their effect is counted.
FAR = 4 * ALLOWED
Wide = np.longdouble
PI = np.arccos(Wide(-1))


class Rounding(NamedTuple):
    """How a computation rounds."""

    eps: float  # of the dtype of the operands
    tiny: float  # the size below which the gradient of a logit rounds to zero

    @property
    def fine(self) -> float:
        """Of sums and angles, which are float32 or better."""
        return min(self.eps, EPS["float32"])


class Numbers(NamedTuple):
    """The loss, its gradients and the logits without a margin, each with its unit beside it."""

    loss: Any
    loss_unit: Any
    dx: Any
    dx_unit: Any  # a row
    dw: Any
    dw_unit: Any  # a column
    logits: Any = None
    logits_unit: Any = None  # a row


class Columns(NamedTuple):
    """The columns of the kernel."""

    length: Any
    direction: Any
    in_logits: Any  # as they are, or of length 1
    unit: bool

    @property
    def classes(self) -> int:
        return len(self.length)

    @property
    def length_in_logits(self) -> Any:
        return np.ones(self.classes, Wide) if self.unit else self.length


class Row(NamedTuple):
    """A row of the features."""

    length: Any
    direction: Any
    size: Any  # its length in the logits
    cosines: Any  # with all columns
    norms: Any  # n_j
    logits: Any  # without a margin

    @property
    def in_logits(self) -> Any:
        return self.size * self.direction


class Target(NamedTuple):
    """The label of a row, with the margin."""

    label: int
    share: Any  # s
    sine: Any
    cosine: Any
    value: Any  # v
    slope: Any  # dv / d cos(theta)
    polynomial: int  # m of a margin that is a polynomial in the cosine, else 1

    @property
    def blend(self) -> Any:
        return (1 - self.share) * self.cosine + self.share * self.value

    @property
    def alpha(self) -> Any:
        """d blend / d cos(theta)."""
        return 1 + self.share * (self.slope - 1)

    @property
    def along(self) -> Any:
        """What the length of x alone moves: blend - alpha cos(theta)."""
        return self.share * (self.value - self.slope * self.cosine)


def numbers(
    x: Any,
    w: Any,
    labels: Any,
    where: Any,
    margin: Any,
    lam: float,
    smoothing: float,
    rounding: Rounding,
) -> Numbers:
    """The sum of the losses of the rows that count, its gradients, and the logits of all rows."""
    columns = columns_of(w, margin)
    rows = [row_of(row, columns, margin) for row in x]
    dx, dx_unit = np.zeros_like(x), np.zeros(len(x), Wide)
    parts = {
        i: part_of(row, target_of(row, y, margin, lam), columns, margin, smoothing, rounding)
        for i, (row, y) in enumerate(zip(rows, labels, strict=True))
        if where[i]
    }
    for i, part in parts.items():
        dx[i], dx_unit[i] = part.dx, part.dx_unit
    return Numbers(
        loss=sum((part.loss for part in parts.values()), Wide(0)),
        loss_unit=sum((part.loss_unit for part in parts.values()), Wide(0)),
        dx=dx,
        dx_unit=dx_unit,
        dw=sum((part.dw for part in parts.values()), np.zeros_like(w)),
        dw_unit=sum((part.dw_unit for part in parts.values()), np.zeros(columns.classes, Wide)),
        logits=np.array([row.logits for row in rows]),
        logits_unit=np.array([rounding.eps * row.norms.max(initial=0) for row in rows], Wide),
    )


def columns_of(w: Any, margin: Any) -> Columns:
    unit = margin.unit_columns or margin.scale is not None
    length = np.sqrt(np.sum(w**2, axis=0))
    direction = divided(w, length)
    return Columns(length, direction, direction if unit else w, unit)


def row_of(x: Any, columns: Columns, margin: Any) -> Row:
    length = np.sqrt(np.sum(x**2))
    direction = divided(x, length)
    size = length if margin.scale is None else Wide(margin.scale)
    in_logits = x if margin.scale is None else size * direction
    cosines = np.clip(direction @ columns.direction, -1, 1)
    norms = size * columns.length_in_logits
    return Row(length, direction, size, cosines, norms, in_logits @ columns.in_logits)


def target_of(row: Row, label: int, margin: Any, lam: float) -> Target:
    polynomial = isinstance(margin, (lsm.margins.LSoftmax, SphereFace))
    theta = np.arccos(row.cosines[label])
    return Target(
        label,
        1 / (1 + Wide(lam)),
        np.sin(theta),
        row.cosines[label],
        *value_and_slope(margin, theta),
        margin.margin if polynomial else 1,
    )


def value_and_slope(margin: Any, theta: Any) -> tuple[Any, Any]:
    """v and dv / d cos(theta) at an angle; an angular margin's slope is bounded near angle 0."""
    sine = np.sin(theta)
    if isinstance(margin, (lsm.margins.LSoftmax, SphereFace)):
        m = margin.margin
        k = min(int(m * theta / PI), m - 1)
        sign = -1 if k % 2 else 1
        slope = sign * m * np.sin(m * theta) / sine if sine > 1e-9 else Wide(m) ** 2
        return sign * np.cos(m * theta) - 2 * k, slope
    if isinstance(margin, (NormFace, CosFace)):
        return np.cos(theta) - Wide(getattr(margin, "margin", 0)), Wide(1)
    m1, m2, m3 = (
        (margin.m1, margin.m2, margin.m3) if isinstance(margin, Combined) else (1, margin.margin, 0)
    )
    angle = m1 * theta + m2
    if angle > PI:
        return np.cos(theta) - np.cos((PI - m2) / m1) - 1 - m3, Wide(1)
    return np.cos(angle) - m3, m1 * np.sin(angle) / max(sine, Wide(1e-12))


def part_of(
    row: Row, t: Target, columns: Columns, margin: Any, smoothing: float, rounding: Rounding
) -> Numbers:
    """What a row adds to the loss and the gradients."""
    y, classes = t.label, columns.classes
    logits = row.logits.copy()
    logits[y] = row.norms[y] * t.blend
    p = np.exp(logits - np.logaddexp.reduce(logits))
    others = np.arange(classes) != y
    rest = np.sum(p[others])  # 1 - p[y] without a difference
    z = np.array([np.logaddexp.reduce(logits[np.arange(classes) != j]) for j in range(classes)])
    # softplus(Z - t): the difference of two large numbers has no digits left.
    missed = np.logaddexp(Wide(0), z[y] - logits[y])
    loss = missed + smoothing * np.mean(logits[y] - logits)
    g = p - smoothing / Wide(classes)
    g[y] = g[y] - (1 - smoothing) if smoothing else -rest
    dx, dw = gradients_of(row, t, columns, margin, g)

    shaken = rounding.fine * row.norms.max(initial=0) * conditioning(t, rounding)
    far = np.exp(min(FAR * shaken, Wide(700)))
    loss_unit = rounding.fine * loss + smoothing * shaken
    loss_unit += shaken * min(1, rest * far + (smoothing > 0))
    size_of_g = p + smoothing / classes
    size_of_g[y] = smoothing * (p[y] + 1 / Wide(classes)) + (1 - smoothing) * rest
    terms = sizes_of_terms(t, size_of_g, rounding)
    terms += moved(logits - z, shaken) * np.where(others, 1, 1 + abs(t.alpha) + abs(t.along))
    by_row = columns.length_in_logits
    if margin.scale is not None:
        by_row = np.full(classes, divided(row.size, row.length))
    by_column = divided(row.size, columns.length) if columns.unit else np.full(classes, row.size)
    return Numbers(loss, loss_unit, dx, np.sum(terms * by_row), dw, terms * by_column)


def gradients_of(row: Row, t: Target, columns: Columns, margin: Any, g: Any) -> tuple[Any, Any]:
    """Of x and w, from the gradient g of the logits."""
    y, factors = t.label, g.copy()
    factors[y] *= t.alpha
    dx = columns.in_logits @ factors + g[y] * t.along * columns.length_in_logits[y] * row.direction
    dw = np.outer(row.in_logits, factors)
    dw[:, y] += g[y] * t.along * row.size * columns.direction[:, y]
    # Where a length is fixed, the part of the gradient along it has no effect.
    if margin.scale is not None:
        dx = (dx - row.direction * (row.direction @ dx)) * divided(row.size, row.length)
    if columns.unit:
        dw = dw - columns.direction * np.sum(columns.direction * dw, axis=0)
        dw = divided(dw, columns.length)
    return dx, dw


def conditioning(t: Target, rounding: Rounding) -> Any:
    """How many roundings of a cosine the label's logit has.

    The recurrence of T_m gathers at most m roundings of U_j <= min(m, 1 / sin theta).
    """
    m = Wide(t.polynomial)
    return 1 + t.share * (abs(t.slope) + m * min(m, 1 / max(t.sine, rounding.fine)))


def sizes_of_terms(t: Target, size_of_g: Any, rounding: Rounding) -> Any:
    """The unit of each logit's gradient, times the length of what the gradient is multiplied with.

    The dtype rounds the operands of the products, float32 the rest.
    """
    y, m, fine = t.label, Wide(t.polynomial), rounding.fine
    # An unbounded slope, and the derivative of this slope, magnify the rounding of the cosine.
    steep = 1 / max(t.sine, np.sqrt(fine)) if abs(t.slope) > 1 and m == 1 else Wide(1)
    # The second derivative of T_m, about m² / sin² and at most m⁴, magnifies it too.
    curved = min(1 / max(t.sine, fine), m)
    coarse, sums = size_of_g.copy(), size_of_g.copy()
    coarse[y] *= (1 - t.share) + t.share * (1 + 2 * abs(t.slope) + abs(t.value))
    sums[y] *= (1 + t.share * m**2 * curved**2) * steep**2
    return rounding.eps * coarse + fine * sums + rounding.tiny


def moved(leads: Any, shaken: Any) -> Any:
    """How far logits that are off by `shaken` move each probability.

    Args:
      leads: of each logit over the logsumexp of the others.
    """
    odds = np.exp(-np.maximum(np.abs(leads) - FAR * shaken, 0))
    return np.minimum(shaken, 1) * odds / (1 + odds) ** 2


def divided(array: Any, length: Any) -> Any:
    """array / length, 0 where the length is."""
    return np.where(length > 0, array / np.where(length > 0, length, 1), 0)
