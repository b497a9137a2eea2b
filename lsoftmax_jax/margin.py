"""psi(theta) of the large-margin softmax and the annealed target logit.

Everything here is a function of cos(theta): with c = cos(theta), cos(m theta) = T_m(c), the
Chebyshev polynomial of the first kind, and d cos(m theta) / dc = m U_{m-1}(c), the one of the
second kind. No arccos, so no infinite slope at theta = 0 and pi.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lsoftmax_jax.arguments import at_least_f32, check_size

# Longer recurrences stay loops, which bounds the compile time of any margin.
_UNROLLED_MARGIN = 16


def psi(cos_theta: ArrayLike, margin: int) -> jax.Array:
    r"""The margin function psi, elementwise, as a function of cos(theta).

    .. math::
        \psi(\theta) = (-1)^k \cos(m\theta) - 2k, \qquad
        \theta \in [k\pi/m, (k+1)\pi/m], \quad k = 0 .. m-1

    computed as :math:`(-1)^k T_m(c) - 2k` with the Chebyshev polynomial :math:`T_m` of
    :math:`c = \cos\theta`. Decreasing in theta, from 1 at theta = 0 to 1 - 2m at theta = pi, and
    continuously differentiable in c: the slope is 0 at the inner knots and m² at c = 1 and -1.

    Forward and reverse mode are both supported, to any order.

    Args:
      cos_theta: cosine of the angle, any shape, floating point. Values outside [-1, 1] are
        clipped, keeping the slope of the end point, so that a cosine that rounding has pushed
        past 1 still has its gradient. Half precision is computed in float32.
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

    Source: Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016.
    """
    margin = check_size("margin", margin)
    cos_theta = jnp.asarray(cos_theta)
    if not jnp.issubdtype(cos_theta.dtype, jnp.floating):
        raise TypeError(f"cos_theta must be floating point, got dtype {cos_theta.dtype}")
    inside = cos_theta.astype(at_least_f32(cos_theta.dtype))
    return _psi(inside, margin).astype(cos_theta.dtype)


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


class Target(NamedTuple):
    """The annealed target logit t and its partial derivatives, one value a row.

    dt/dfeatures = alpha kernel_y + row features, dt/dkernel_y = alpha features + column kernel_y.
    """

    logit: jax.Array
    alpha: jax.Array
    row: jax.Array
    column: jax.Array
    lam: jax.Array  # dt/dlam
    cosine: jax.Array
    plain: jax.Array  # u = features . kernel_y, the logit without margin
    shadow_row: jax.Array  # u / |features|²: features times it is kernel_y's part along features
    shadow_column: jax.Array  # u / |kernel_y|²


def target(u: jax.Array, a: jax.Array, b: jax.Array, lam: jax.Array, margin: int) -> Target:
    """t = (lam u + n psi(u / n)) / (1 + lam), n = sqrt(a b), and what its gradient needs.

    Args:
      u: features . kernel_y, at least float32, as all arguments.
      a: |features|².
      b: |kernel_y|².
      lam: scalar >= 0; infinity gives the plain logit.
      margin: static integer >= 1.

    Without a direction (a or b zero, or too small for its square to be a normal number) the
    cosine counts as 0.
    """
    root_a, inverse_a = _root(a)
    root_b, inverse_b = _root(b)
    cosine = jnp.clip(u * inverse_a * inverse_b, -1, 1)
    shadows = cosine * root_b * inverse_a, cosine * root_a * inverse_b
    if margin == 1:
        zero = jnp.zeros_like(u)
        return Target(u, jnp.ones_like(u), zero, zero, zero, cosine, u, *shadows)
    value, slope = psi_and_slope(cosine, margin)
    # t = u + gap / (1 + lam) rather than the quotient of the formula also serves lam = infinity.
    share = 1 / (1 + lam)
    gap = root_a * root_b * value - u
    h = (value - cosine * slope) * share
    return Target(
        logit=u + gap * share,
        alpha=1 + (slope - 1) * share,
        row=h * root_b * inverse_a,
        column=h * root_a * inverse_b,
        lam=-gap * share**2,
        cosine=cosine,
        plain=u,
        shadow_row=shadows[0],
        shadow_column=shadows[1],
    )


def _root(square: jax.Array) -> tuple[jax.Array, jax.Array]:
    """sqrt and 1/sqrt, both 0 where `square` is not a positive normal number.

    Separate roots of a and b: their product or quotient would under- or overflow.
    """
    normal = square > jnp.finfo(square.dtype).tiny
    root = jnp.sqrt(jnp.where(normal, square, 1))
    # A NaN must stay one.
    zero = jnp.where(jnp.isnan(square), square, 0)
    return jnp.where(normal, root, zero), jnp.where(normal, 1 / root, zero)
