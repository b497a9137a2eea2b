"""Margins: functions that replace the target's cosine, given as value and slope of that cosine.

An int m is the margin of the large-margin softmax, psi(theta). With c = cos(theta), cos(m theta) =
T_m(c), the Chebyshev polynomial of the first kind, and d cos(m theta) / dc = m U_{m-1}(c), that of
the second kind. Neither needs an arccos, whose slope is infinite at theta = 0 and pi.

The classes below are the margins of other losses. Any other object that has their method
`value_and_slope` and is hashable, as a frozen dataclass is, is a margin too.

Source: Deng et al., "ArcFace", CVPR 2019, https://arxiv.org/abs/1801.07698, whose section 2
compares these margins."""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lsoftmax_jax import _checks

# Longer recurrences stay loops, which bounds the compile time of any margin.
_UNROLLED_MARGIN = 16


def psi(cos_theta: ArrayLike, margin: int) -> jax.Array:
    r"""The margin function psi, elementwise, as a function of cos(theta).

    .. math::
        \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \qquad
        \theta \in [k\pi/m, (k+1)\pi/m], \quad k = 0 .. m-1

    computed as :math:`(-1)^k T_m(c) - 2k` with the Chebyshev polynomial :math:`T_m` of
    :math:`c = \cos\theta`. It falls in theta, from 1 at theta = 0 to 1 - 2m at theta = pi, and is
    continuously differentiable in c: the slope is 0 at the inner knots and m² at c = 1 and -1.

    It supports forward and reverse mode, to any order.

    Args:
      cos_theta: cosine of the angle, any shape, floating point. Values outside [-1, 1] are
        clipped but keep the slope of the end point: a cosine that rounding has pushed past 1
        still has its gradient. Half precision is computed in float32.
      margin: the integer m >= 1; 1 gives the plain cosine. Static.

    Returns:
      psi, shape and dtype of `cos_theta`.

    Raises:
      TypeError: `cos_theta` is not floating point, or `margin` is no Python int.
      ValueError: `margin` is below 1.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> [float(value) for value in lsm.psi(jnp.array([1.0, 0.0, -1.0]), margin=2)]
      [1.0, -1.0, -3.0]
    """
    margin = _checks.check_size("margin", margin)
    cos_theta = _checks.as_array("cos_theta", cos_theta, "a floating-point array")
    if not jnp.issubdtype(cos_theta.dtype, jnp.floating):
        raise TypeError(f"cos_theta must be floating point, got dtype {cos_theta.dtype}")
    wide = cos_theta.astype(_checks.at_least_f32(cos_theta.dtype))
    return _psi(wide, margin).astype(cos_theta.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _psi(cos_theta: jax.Array, margin: int) -> jax.Array:
    return psi_and_slope(cos_theta, margin)[0]


@_psi.defjvp
def _psi_jvp(
    margin: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    value, slope = psi_and_slope(primals[0], margin)
    return value, slope * tangents[0]


def psi_and_slope(cos_theta: jax.Array, margin: int) -> tuple[jax.Array, jax.Array]:
    """psi and d psi / d cos(theta) for `cos_theta` of at least float32."""
    c = jnp.clip(cos_theta, -1, 1)

    def recur(_: int, terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        t_last, t, u_last, u = terms
        return t, 2 * c * t - t_last, u, 2 * c * u - u_last

    one = jnp.ones_like(c)
    unroll = margin <= _UNROLLED_MARGIN
    _, t_m, _, u_m = jax.lax.fori_loop(1, margin, recur, (one, c, 0 * c, one), unroll=unroll)
    knots = np.cos(np.arange(1, margin) * np.pi / margin).astype(c.dtype)
    knots = knots.reshape((1,) * c.ndim + (margin - 1,))
    k = jnp.sum(c[..., None] < knots, axis=-1, dtype=jnp.int32)
    sign = (1 - 2 * (k % 2)).astype(c.dtype)
    return sign * t_m - (2 * k).astype(c.dtype), sign * margin * u_m


@runtime_checkable
class Margin(Protocol):
    """A margin: v, in place of the target's cosine c, and dv/dc, both of any shape."""

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]: ...


def value_and_slope(margin: int | Margin, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """v(c) and dv/dc for a cosine in [-1, 1] of at least float32."""
    if isinstance(margin, int):
        return psi_and_slope(cosine, margin)
    return margin.value_and_slope(cosine)


def check_margin(margin: int | Margin) -> int | Margin:
    if isinstance(margin, Margin) and not isinstance(margin, type):
        try:
            hash(margin)
        except TypeError as error:
            raise TypeError(
                f"margin must be hashable, as a frozen dataclass is, got {margin!r}"
            ) from error
        return margin
    if isinstance(margin, bool) or not isinstance(margin, (int, np.integer)):
        raise TypeError(
            f"margin must be a Python int >= 1 or one of lsoftmax_jax.margins, got {margin!r}"
        )
    return _checks.check_size("margin", int(margin))


@dataclass(frozen=True)
class Combined:
    r"""The combined margin: cos(m1 θ + m2) - m3 in place of cos θ.

    .. math:: v = \cos(m_1 \theta + m_2) - m_3, \qquad
        \frac{dv}{dc} = m_1 \frac{\sin(m_1 \theta + m_2)}{\sin\theta}

    Where m1 θ + m2 exceeds π, the cosine would rise again. There v is the plain cosine less a
    constant that makes v continuous, so v increases in c everywhere. With m2 > 0 the slope is
    infinite at θ = 0. It is cut off where sin θ is below the square root of the dtype's eps, which
    keeps the gradient, the slope times sin θ, finite.

    It needs a `scale` s, the length of features and columns: 64 for many classes, 8 to 10 for ten.

    Args:
      m1: factor of the angle, >= 1.
      m2: added to the angle, in radians, in [0, π).
      m3: taken off the cosine, >= 0.
      easy: leave the margin out where cos θ <= 0.
      detach: take slope 1 everywhere, as if the margin were a constant without a gradient, which
        insightface has done since 2022. False takes the true slope.

    Raises:
      TypeError, ValueError: a number is none or outside its range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> margin = lsm.margins.Combined(1.0, 0.3, 0.2)
      >>> value, slope = margin.value_and_slope(jnp.array([0.0, 1.0]))
      >>> value.round(3).tolist(), slope.round(3)[0].item()
      ([-0.496..., 0.755...], 0.955...)
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    easy: bool = False
    detach: bool = False
    needs_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_real("m1", self.m1, 1, math.inf)
        _checks.check_real("m2", self.m2, 0, math.pi)
        _checks.check_real("m3", self.m3, 0, math.inf)

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        square = (1 - cosine) * (1 + cosine)
        # The inner where keeps second derivatives finite, where the root's slope is infinite.
        sine = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        floor = math.sqrt(jnp.finfo(cosine.dtype).eps)
        if self.m1 == 1:
            # Addition formulas: exact where arccos is not, near θ = 0.
            raised = cosine * math.cos(self.m2) - sine * math.sin(self.m2)
            sine_raised = sine * math.cos(self.m2) + cosine * math.sin(self.m2)
        else:
            angle = self.m1 * jnp.arctan2(sine, cosine) + self.m2
            raised, sine_raised = jnp.cos(angle), jnp.sin(angle)
        slope = self.m1 * sine_raised / jnp.maximum(sine, floor)
        if self.m2 == 0:
            # m1 sin(m1 θ) / sin θ tends to m1² at θ = 0.
            slope = jnp.where(sine < floor, self.m1**2, slope)
        last = math.cos((math.pi - self.m2) / self.m1)
        goes_on = cosine < last
        value = jnp.where(goes_on, cosine - last - 1, raised) - self.m3
        slope = jnp.where(goes_on, 1, slope)
        if self.easy:
            value, slope = (
                jnp.where(cosine > 0, value, cosine),
                jnp.where(cosine > 0, slope, 1),
            )
        return value, jnp.ones_like(slope) if self.detach else slope


@dataclass(frozen=True)
class ArcFace:
    """The additive angular margin, cos(θ + m) in place of cos θ: `Combined` with m2 = m.

    Args:
      margin: m in radians, in [0, π); usually 0.5.
      easy, detach: as in `Combined`.

    Raises:
      TypeError, ValueError: `margin` is no number or outside its range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> lsm.margins.ArcFace(0.5).value_and_slope(jnp.float32(0.0))[0].round(4).item()
      -0.479...
    """

    margin: float = 0.5
    easy: bool = False
    detach: bool = False
    needs_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_real("margin", self.margin, 0, math.pi)

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        same = Combined(m2=self.margin, easy=self.easy, detach=self.detach)
        return same.value_and_slope(cosine)


@dataclass(frozen=True)
class CosFace:
    """The additive cosine margin of CosFace and AM-Softmax: cos θ - m in place of cos θ.

    It needs a `scale`, as `Combined` does.

    Args:
      margin: m >= 0; usually 0.35.

    Raises:
      TypeError, ValueError: `margin` is no number or below 0.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> lsm.margins.CosFace(0.35).value_and_slope(jnp.float32(1.0))[0].round(2).item()
      0.64...
    """

    margin: float = 0.35
    needs_scale: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_real("margin", self.margin, 0, math.inf)

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cosine - self.margin, jnp.ones_like(cosine)


@dataclass(frozen=True)
class SphereFace:
    """A-Softmax: psi of L-Softmax with kernel columns of unit length.

    Features keep their norm, unless `scale` gives all of them one length.

    Args:
      margin: the integer m >= 1; usually 4, with λ.

    Raises:
      TypeError, ValueError: `margin` is no int or below 1.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.array([3.0, 4.0]), jnp.array([[9.0, 0.0], [0.0, 1.0]])
      >>> lsm.lsoftmax_logits(
      ...     features, kernel, 1, margin=lsm.margins.SphereFace(1), lam=0.0).tolist()
      [3.0, 4.0]
    """

    margin: int = 4
    unit_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.check_size("margin", self.margin)

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return psi_and_slope(cosine, self.margin)
