"""Margins: functions that replace the target's cosine, given as value and slope of the cosine.

A `Margin` is one frozen object. An int m >= 1 stands for `LSoftmax(m)`, the margin of the
large-margin softmax. With c = cos(theta), cos(m theta) = T_m(c) is the Chebyshev polynomial of the
first kind, and its slope in c is m U_{m-1}(c), of the second kind. Neither needs an arccos, whose
slope is infinite at theta = 0 and pi.

Source: Deng et al., "ArcFace", CVPR 2019, https://arxiv.org/abs/1801.07698, whose section 2
compares these margins.
"""

import functools
import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lsoftmax_jax import _checks

# A loop bounds the compile time of a longer recurrence.
_UNROLLED = 16
# psi compares each cosine with m - 1 knots, where its pieces meet.
_LARGEST = 4096


def psi(cos_theta: ArrayLike, margin: int) -> jax.Array:
    r"""The margin function psi, elementwise, as a function of cos(theta).

    .. math::
        \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \qquad
        \theta \in [k\pi/m, (k+1)\pi/m], \quad k = 0 .. m-1

    computed as :math:`(-1)^k T_m(c) - 2k` with the Chebyshev polynomial :math:`T_m` of
    :math:`c = \cos\theta`. psi falls in theta, from 1 at theta = 0 to 1 - 2m at theta = pi, and is
    continuously differentiable in c: the slope is 0 at the inner knots, where theta = k pi / m, and
    m² at c = 1 and -1.

    psi supports forward and reverse mode, to any order.

    Args:
      cos_theta: cosine of the angle, any shape, floating point. Values outside [-1, 1] are
        clipped but keep the slope of the end point: a cosine that rounding has pushed past 1
        still has its gradient. Half precision is computed in float32.
      margin: the integer m in [1, 4096]; 1 gives the plain cosine. Static.

    Returns:
      psi, shape and dtype of `cos_theta`.

    Raises:
      TypeError: `cos_theta` is not floating point, or `margin` is not a Python int.
      ValueError: `margin` is outside its range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> [float(value) for value in lsm.psi(jnp.array([1.0, 0.0, -1.0]), margin=2)]
      [1.0, -1.0, -3.0]
    """
    margin = _checks.check_size("margin", margin, _LARGEST)
    cos_theta = _checks.as_array("cos_theta", cos_theta, "a floating-point array")
    _checks.check_floating("cos_theta", cos_theta)
    return _psi_of(cos_theta, margin)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _psi_of(cos_theta: jax.Array, margin: int) -> jax.Array:
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
    # Not jnp.clip, whose derivative is a half at c = 1 and -1.
    c = jnp.where(jnp.abs(cos_theta) > 1, jnp.sign(cos_theta), cos_theta)

    def recur(_: int, terms: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        t_last, t, u_last, u = terms
        return t, 2 * c * t - t_last, u, 2 * c * u - u_last

    one = jnp.ones_like(c)
    terms: tuple[jax.Array, ...] = one, c, 0 * c, one
    if margin <= _UNROLLED:
        for step in range(1, margin):
            terms = recur(step, terms)
    else:
        terms = jax.lax.fori_loop(1, margin, recur, terms)
    _, t_m, _, u_m = terms
    knots = np.cos(np.arange(1, margin) * np.pi / margin).astype(c.dtype)
    knots = knots.reshape((1,) * c.ndim + (margin - 1,))
    k = jnp.sum(c[..., None] < knots, axis=-1, dtype=jnp.int32)
    sign = (1 - 2 * (k % 2)).astype(c.dtype)
    return sign * t_m - (2 * k).astype(c.dtype), sign * margin * u_m


@runtime_checkable
class Margin(Protocol):
    """What a loss asks of a margin. A margin of one's own is a frozen dataclass with these three.

    Attributes:
      scale: s > 0, a Python float: features and kernel columns have unit length, and their product
        is multiplied by s. None keeps the features' norms.
      unit_columns: whether the kernel's columns have unit length. A scale implies it.
    """

    @property
    def scale(self) -> float | None: ...

    @property
    def unit_columns(self) -> bool: ...

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        """v, in place of the target's cosine c, and dv/dc >= 0, for c in [-1, 1].

        Args:
          cosine: any shape, float32 or float64.

        Returns:
          two arrays of the shape and dtype of `cosine`.
        """
        ...


@dataclass(frozen=True)
class LSoftmax:
    """The margin of the large-margin softmax, psi: norms of features and columns are kept.

    Args:
      margin: the integer m >= 1, with λ; 1 is plain softmax.

    Raises:
      TypeError, ValueError: `margin` is not an int in [1, 4096].

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> lsm.margins.LSoftmax(2).value_and_slope(jnp.float32(0.0))[0].item()
      -1.0

    Source: https://arxiv.org/abs/1612.02295.
    """

    margin: int = 4
    scale: ClassVar[None] = None
    unit_columns: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.keep(self, margin=_checks.check_size("margin", self.margin, _LARGEST))

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return psi_and_slope(cosine, self.margin)


@dataclass(frozen=True)
class SphereFace:
    """A-Softmax: psi of L-Softmax with kernel columns of unit length.

    Args:
      margin: the integer m >= 1; usually 4, with λ.
      scale: s > 0 gives all features the length s; None keeps their norms.

    Raises:
      TypeError, ValueError: `margin` is not an int in [1, 4096], or `scale` out of range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.array([3.0, 4.0]), jnp.array([[9.0, 0.0], [0.0, 1.0]])
      >>> lsm.lsoftmax_logits(
      ...     features, kernel, 1, margin=lsm.margins.SphereFace(1), lam=0.0).tolist()
      [3.0, 4.0]

    Source: https://arxiv.org/abs/1704.08063.
    """

    margin: int = 4
    scale: float | None = field(default=None, kw_only=True)
    unit_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.keep(self, margin=_checks.check_size("margin", self.margin, _LARGEST))
        if self.scale is not None:
            _checks.keep(self, scale=_checks.check_scale(self.scale))

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return psi_and_slope(cosine, self.margin)


@dataclass(frozen=True)
class NormFace:
    """Softmax over the cosines times s, without a margin.

    Args:
      scale: s > 0; 16 for hundreds of classes, more for more.

    Raises:
      TypeError, ValueError: `scale` is not a number, or out of range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.array([3.0, 4.0]), jnp.array([[9.0, 0.0], [0.0, 1.0]])
      >>> margin = lsm.margins.NormFace(scale=10.0)
      >>> lsm.lsoftmax_logits(features, kernel, 1, margin=margin, lam=0.0).round(3).tolist()
      [6.0, 8.0]

    Source: https://arxiv.org/abs/1704.06369.
    """

    scale: float = field(kw_only=True)
    unit_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.keep(self, scale=_checks.check_scale(self.scale))

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cosine, jnp.ones_like(cosine)


@dataclass(frozen=True)
class CosFace:
    """The additive cosine margin of CosFace and AM-Softmax: cos θ - m in place of cos θ.

    Args:
      margin: m >= 0; usually 0.35.
      scale: s > 0; 64 for many classes, 8 to 10 for ten.

    Raises:
      TypeError, ValueError: an argument is not a number, or out of range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> margin = lsm.margins.CosFace(0.35, scale=64.0)
      >>> margin.value_and_slope(jnp.float32(1.0))[0].round(2).item()
      0.64...

    Source: https://arxiv.org/abs/1801.09414.
    """

    margin: float = 0.35
    scale: float = field(kw_only=True)
    unit_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        margin = _checks.check_real("margin", self.margin, 0, _checks.LARGEST)
        _checks.keep(self, margin=margin, scale=_checks.check_scale(self.scale))

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return cosine - self.margin, jnp.ones_like(cosine)


@dataclass(frozen=True)
class Combined:
    r"""The combined margin: cos(m1 θ + m2) - m3 in place of cos θ.

    .. math:: v = \cos(m_1 \theta + m_2) - m_3, \qquad
        \frac{dv}{dc} = m_1 \frac{\sin(m_1 \theta + m_2)}{\sin\theta}

    Where m1 θ + m2 exceeds π, the cosine would rise again. There v is the plain cosine less a
    constant that makes v continuous, so v increases in c everywhere. With m2 > 0 the slope is
    infinite at θ = 0. The slope is cut off where sin θ is below the square root of the dtype's eps,
    which keeps the gradient, the slope times sin θ, finite.

    Args:
      m1: factor of the angle, >= 1.
      m2: added to the angle, in radians, in [0, π).
      m3: subtracted from the cosine, >= 0.
      scale: s > 0; 64 for many classes, 8 to 10 for ten.
      easy: leave the margin out where cos θ <= 0.
      detach: take slope 1 everywhere, as if the margin were a constant without a gradient, which
        insightface has done since 2022. False takes the true slope.

    Raises:
      TypeError, ValueError: an argument is not a number, or out of range; a flag is not a Boolean.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> margin = lsm.margins.Combined(1.0, 0.3, 0.2, scale=64.0)
      >>> value, slope = margin.value_and_slope(jnp.array([0.0, 1.0]))
      >>> value.round(3).tolist(), slope.round(3)[0].item()
      ([-0.496..., 0.755...], 0.955...)
    """

    m1: float = 1.0
    m2: float = 0.0
    m3: float = 0.0
    scale: float = field(kw_only=True)
    easy: bool = field(default=False, kw_only=True)
    detach: bool = field(default=False, kw_only=True)
    unit_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.keep(
            self,
            m1=_checks.check_real("m1", self.m1, 1, _checks.LARGEST),
            m2=_checks.check_real("m2", self.m2, 0, math.pi),
            m3=_checks.check_real("m3", self.m3, 0, _checks.LARGEST),
            scale=_checks.check_scale(self.scale),
            easy=_checks.check_flag("easy", self.easy),
            detach=_checks.check_flag("detach", self.detach),
        )

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        square = (1 - cosine) * (1 + cosine)
        # The inner where keeps second derivatives finite, where the root's slope is infinite.
        sine = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        floor = math.sqrt(jnp.finfo(cosine.dtype).eps)
        if self.m1 == 1:
            # The addition formulas are exact near θ = 0, where arccos is not.
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
        beyond = cosine < last
        value = jnp.where(beyond, cosine - last - 1, raised) - self.m3
        slope = jnp.where(beyond, 1, slope)
        if self.easy:
            value = jnp.where(cosine > 0, value, cosine)
            slope = jnp.where(cosine > 0, slope, 1)
        return value, jnp.ones_like(slope) if self.detach else slope


@dataclass(frozen=True)
class ArcFace:
    """The additive angular margin, cos(θ + m) in place of cos θ: `Combined` with m2 = m.

    Its slope is below 1 at large angles. From new weights this can turn features away from their
    columns: end the network with batch normalisation, or take a λ, such as `self_paced()`.

    Args:
      margin: m in radians, in [0, π); usually 0.5.
      scale: s > 0; 64 for many classes, 8 to 10 for ten.
      easy, detach: as in `Combined`.

    Raises:
      TypeError, ValueError: an argument is not a number, or out of range; a flag is not a Boolean.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> margin = lsm.margins.ArcFace(0.5, scale=64.0)
      >>> margin.value_and_slope(jnp.float32(0.0))[0].round(4).item()
      -0.479...
    """

    margin: float = 0.5
    scale: float = field(kw_only=True)
    easy: bool = field(default=False, kw_only=True)
    detach: bool = field(default=False, kw_only=True)
    unit_columns: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _checks.keep(self, margin=_checks.check_real("margin", self.margin, 0, math.pi, "radians"))
        checked = self._combined()
        _checks.keep(self, scale=checked.scale, easy=checked.easy, detach=checked.detach)

    def _combined(self) -> Combined:
        return Combined(m2=self.margin, scale=self.scale, easy=self.easy, detach=self.detach)

    def value_and_slope(self, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._combined().value_and_slope(cosine)


OURS = (LSoftmax, SphereFace, NormFace, CosFace, Combined, ArcFace)


def check_margin(margin: int | Margin) -> Margin:
    """`margin` as a `Margin`; an int m becomes `LSoftmax(m)`."""
    if type(margin) in OURS:
        return margin  # type: ignore[return-value]  # mypy does not narrow by type(...) in
    if isinstance(margin, (int, np.integer)) and not isinstance(margin, bool):
        return LSoftmax(int(margin))
    if isinstance(margin, (bool, type)) or not callable(getattr(margin, "value_and_slope", None)):
        raise TypeError(
            f"margin must be a Python int >= 1 or one of lsoftmax_jax.margins, got "
            f"{_checks.shown(margin)}"
        )
    for name in ("scale", "unit_columns"):
        if not hasattr(margin, name):
            raise TypeError(f"margin must have the attribute {name}, got {margin!r:.80}")
    if type(margin).__hash__ is object.__hash__:
        # Compared by identity, a margin could change after JAX has compiled it.
        raise _is_no_setting(margin)
    try:
        hash(margin)
    except TypeError as error:
        raise _is_no_setting(margin) from error
    _check_compared(margin)
    _try_once(margin)  # type: ignore[arg-type]  # hash() has just been tried
    return margin


def _is_no_setting(margin: Any) -> TypeError:
    return TypeError(
        f"margin must compare by its settings and hold no arrays, as a frozen dataclass of Python "
        f"numbers does, got a {type(margin).__name__}; to change the margin in training, use lam"
    )


def _check_compared(margin: Any) -> None:
    """Refuses a dataclass with settings that do not compare: jit would take one for another."""
    if not is_dataclass(margin):
        return
    compared = {each.name for each in fields(margin) if each.compare}
    for name in getattr(margin, "__dict__", {}):
        cached = isinstance(getattr(type(margin), name, None), functools.cached_property)
        if name not in compared and not cached:
            raise TypeError(
                f"margin must compare by its settings, got a {type(margin).__name__} whose {name} "
                f"takes no part: declare it as a field, and decorate this class as a dataclass too"
            )


@functools.lru_cache(maxsize=256)
def _try_once(margin: Any) -> None:
    """Tries a margin of the caller's own on a few cosines."""
    _checks.check_flag("margin.unit_columns", margin.unit_columns)
    if margin.scale is not None:
        _checks.check_scale(margin.scale)
    with jax.ensure_compile_time_eval():
        value, slope = value_and_slope(margin, jnp.linspace(-1, 1, 33, dtype=jnp.float32))
        if isinstance(value, jax.core.Tracer) or isinstance(slope, jax.core.Tracer):
            raise _is_no_setting(margin)
        least = float(jnp.min(slope)) if jnp.all(jnp.isfinite(value)) else math.nan
    if not least >= 0:
        raise ValueError(
            f"margin must be finite and not fall in the cosine, got {margin!r:.80} with the least "
            f"slope {least:.3g}"
        )


def value_and_slope(margin: Margin, cosine: jax.Array) -> tuple[jax.Array, jax.Array]:
    """v(c) and dv/dc for a cosine in [-1, 1] of at least float32, checked."""
    found: Any = margin.value_and_slope(cosine)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise TypeError(f"margin must give (value, slope), got {found!r:.80} from {margin!r:.80}")
    for name, array in zip(("value", "slope"), found, strict=True):
        kind = getattr(array, "shape", None), getattr(array, "dtype", None)
        if kind != (cosine.shape, cosine.dtype):
            unknown = any(part is None for part in kind)  # None == dtype("float64") in NumPy
            got = type(array).__name__ if unknown else f"shape {kind[0]} and dtype {kind[1]}"
            raise TypeError(
                f"margin must give a {name} of shape {cosine.shape} and dtype {cosine.dtype}, as "
                f"its cosine has, got {got} from {margin!r:.80}"
            )
    return found[0], found[1]
