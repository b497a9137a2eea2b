"""psi(theta) of the large-margin softmax, its value and slope as functions of the cosine.

With c = cos(theta), cos(m theta) = T_m(c), the Chebyshev polynomial of the first kind, and
d cos(m theta) / dc = m U_{m-1}(c), the one of the second kind. No arccos, so no infinite slope at
theta = 0 and pi.

Source: Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016,
https://arxiv.org/abs/1612.02295.
"""

import functools

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
