"""The losses in 80 bits, and the unit of every number: what rounding may take off it.

For a row x_i with label y, the angle theta_ij between x_i and the column w_j, and s = 1 / (1 + λ),

    z_ij = n_ij cos(theta_ij),    z_iy = n_iy ((1 - s) cos(theta_iy) + s v(theta_iy))

where n_ij is the product of the lengths of x_i and w_j, or of what the margin puts in their place.
Everything is computed from the angles; no formula is shared with the library. Arrays have a row for
each example and a column for each class; those of a label alone have one entry a row.
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
    logits: Any
    logits_unit: Any  # a row


class Target(NamedTuple):
    """The labels' cosines with the margin; an entry a row."""

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
    here, classes, fine = (np.arange(len(x)), labels), w.shape[1], rounding.fine
    rows, lengths = directions(x, 1)
    columns, heights = directions(w, 0)
    # In the logits a row has the length `size`, a column the length `height`.
    scaled = margin.scale is not None
    unit = margin.unit_columns or scaled
    size = np.full_like(lengths, margin.scale) if scaled else lengths
    height = np.ones_like(heights) if unit else heights
    x_in_logits, w_in_logits = size * rows if scaled else x, columns if unit else w
    plain, norms = x_in_logits @ w_in_logits, size * height

    t = target_of(np.clip(rows @ columns, -1, 1)[here], margin, lam)
    logits = plain.copy()
    logits[here] = norms[here] * t.blend
    p = np.exp(logits - logsumexp(logits)[:, None])
    others = np.ones(logits.shape, bool)
    others[here] = False
    rest = np.sum(p, axis=1, where=others)  # 1 - p[here] without a difference
    z = np.stack([logsumexp(np.delete(logits, j, axis=1)) for j in range(classes)], axis=1)
    # softplus(Z - t): the difference of two large numbers has no digits left.
    missed = np.logaddexp(Wide(0), z[here] - logits[here])
    loss = missed + smoothing * np.mean(logits[here][:, None] - logits, axis=1)
    g = p - smoothing / Wide(classes)
    g[here] = g[here] - (1 - smoothing) if smoothing else -rest

    g = g * where[:, None]
    factors = g.copy()
    factors[here] *= t.alpha
    pull = np.where(others, 0, (g[here] * t.along)[:, None])
    dx = factors @ w_in_logits.T + np.sum(pull * height, axis=1, keepdims=True) * rows
    dw = x_in_logits.T @ factors + np.sum(pull * size, axis=0) * columns
    # Where a length is fixed, the part of the gradient along it has no effect.
    if scaled:
        dx = divided(size * across(dx, rows, 1), lengths)
    if unit:
        dw = divided(across(dw, columns, 0), heights)

    largest = norms.max(axis=1, initial=0)
    shaken = fine * largest * conditioning(t, rounding)
    far = np.exp(np.minimum(FAR * shaken, Wide(700)))
    loss_unit = fine * loss + smoothing * shaken
    loss_unit += shaken * np.minimum(1, rest * far + (smoothing > 0))
    size_of_g = p + smoothing / classes
    size_of_g[here] = smoothing * (p[here] + 1 / Wide(classes)) + (1 - smoothing) * rest
    of_target = sizes_at_target(t, rounding)
    coarse, sums = (np.where(others, 1, of[:, None]) for of in of_target)
    terms = size_of_g * (rounding.eps * coarse + fine * sums) + rounding.tiny
    shifts = np.where(others, 1, (1 + abs(t.alpha) + abs(t.along))[:, None])
    terms += moved(logits - z, shaken[:, None]) * shifts
    terms *= where[:, None]
    by_row = divided(size, lengths) if scaled else height
    by_column = divided(size, heights) if unit else size
    return Numbers(
        loss=np.sum(loss, where=where),
        loss_unit=np.sum(loss_unit, where=where),
        dx=dx,
        dx_unit=np.sum(terms * by_row, axis=1),
        dw=dw,
        dw_unit=np.sum(terms * by_column, axis=0),
        logits=plain,
        logits_unit=rounding.eps * largest,
    )


def target_of(cosine: Any, margin: Any, lam: float) -> Target:
    polynomial = isinstance(margin, (lsm.margins.LSoftmax, SphereFace))
    theta = np.arccos(cosine)
    return Target(
        1 / (1 + Wide(lam)),
        np.sin(theta),
        cosine,
        *value_and_slope(margin, theta),
        margin.margin if polynomial else 1,
    )


def value_and_slope(margin: Any, theta: Any) -> tuple[Any, Any]:
    """v and dv / d cos(theta) at angles; an angular margin's slope is bounded near angle 0."""
    cosine, sine = np.cos(theta), np.sin(theta)
    if isinstance(margin, (lsm.margins.LSoftmax, SphereFace)):
        m = margin.margin
        k = np.minimum(np.floor(m * theta / PI), m - 1)
        sign = 1 - 2 * (k % 2)
        slope = np.where(sine > 1e-9, m * np.sin(m * theta) / np.maximum(sine, 1e-9), m**2)
        return sign * np.cos(m * theta) - 2 * k, np.where(sine > 1e-9, sign, 1) * slope
    if isinstance(margin, (NormFace, CosFace)):
        return cosine - Wide(getattr(margin, "margin", 0)), np.ones_like(theta)
    m1, m2, m3 = (
        (margin.m1, margin.m2, margin.m3) if isinstance(margin, Combined) else (1, margin.margin, 0)
    )
    angle, last = m1 * theta + m2, (PI - m2) / m1
    value = np.where(angle > PI, cosine - np.cos(last) - 1, np.cos(angle)) - m3
    return value, np.where(angle > PI, 1, m1 * np.sin(angle) / np.maximum(sine, Wide(1e-12)))


def conditioning(t: Target, rounding: Rounding) -> Any:
    """How many roundings of a cosine the label's logit has.

    The recurrence of T_m gathers at most m roundings of U_j <= min(m, 1 / sin theta).
    """
    m = Wide(t.polynomial)
    curved = np.minimum(m, 1 / np.maximum(t.sine, rounding.fine))
    return 1 + t.share * (abs(t.slope) + m * curved)


def sizes_at_target(t: Target, rounding: Rounding) -> tuple[Any, Any]:
    """How much larger the units of the label's gradient are than those of another logit's.

    First what the operands' dtype rounds, the factors of the products; then what float32 rounds.
    """
    m, fine = Wide(t.polynomial), rounding.fine
    # An unbounded slope, and the derivative of this slope, magnify the rounding of the cosine.
    steep = 1 / np.maximum(t.sine, np.sqrt(fine)) if m == 1 else np.ones_like(t.sine)
    steep = np.where(abs(t.slope) > 1, steep, 1)
    # The second derivative of T_m, about m² / sin² and at most m⁴, magnifies it too.
    curved = np.minimum(1 / np.maximum(t.sine, fine), m)
    coarse = (1 - t.share) + t.share * (1 + 2 * abs(t.slope) + abs(t.value))
    return coarse, (1 + t.share * m**2 * curved**2) * steep**2


def moved(leads: Any, shaken: Any) -> Any:
    """How far logits that are off by `shaken` move each probability.

    Args:
      leads: of each logit over the logsumexp of the others.
    """
    odds = np.exp(-np.maximum(np.abs(leads) - FAR * shaken, 0))
    return np.minimum(shaken, 1) * odds / (1 + odds) ** 2


def directions(array: Any, axis: int) -> tuple[Any, Any]:
    """The vectors along an axis at length 1, and their lengths; a vector of length 0 stays."""
    lengths = np.sqrt(np.sum(array**2, axis=axis, keepdims=True))
    return divided(array, lengths), lengths


def across(array: Any, unit: Any, axis: int) -> Any:
    """The vectors along an axis without their parts along unit vectors."""
    return array - unit * np.sum(unit * array, axis=axis, keepdims=True)


def logsumexp(logits: Any) -> Any:
    return np.logaddexp.reduce(logits, axis=1)


def divided(array: Any, length: Any) -> Any:
    """array / length, 0 where the length is."""
    return np.where(length > 0, array / np.where(length > 0, length, 1), 0)
