"""How λ is chosen: by what the batch shows, or by the step.

Source: `annealed_lambda` is the formula of the loss layer in the authors' released Caffe code,
https://github.com/wy1iu/LargeMargin_Softmax_Loss.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._pace import SelfPaced


class LambdaPreset(NamedTuple):
    """Constants of `annealed_lambda`; `annealed_lambda(*preset)` is the schedule."""

    base: float
    gamma: float
    power: float
    minimum: float = 0.0


#: As released for MNIST with margin 4.
MNIST = LambdaPreset(base=1000.0, gamma=2.5e-5, power=35.0)
#: As released for CIFAR10 with margin 2.
CIFAR10 = LambdaPreset(base=1000.0, gamma=2e-5, power=45.0)
#: As released for CIFAR10 with augmentation and margin 2.
CIFAR10_PLUS = LambdaPreset(base=1000.0, gamma=1e-5, power=45.0)


def annealed_lambda(
    base: float, gamma: float, power: float, minimum: float = 0.0
) -> Callable[[ArrayLike], jax.Array]:
    r"""The released code's schedule of λ, as a function of the step like Optax's schedules.

    .. math:: \lambda(s) = \max(\lambda_{min},\; base \, (1 + \gamma (s + 1))^{-power})

    Step 0 is the first update. The authors count iterations from 1, hence s + 1.

    It is here for the released constants, which are for about 18,000 updates and end at λ = 0. In a
    shorter run λ stays so large that the loss is softmax. With `gamma` stretched to the length of
    the run, the last updates have nearly the whole margin: features can shrink to length 0, and the
    run is lost. `margin_schedule` and `self_paced` use only a part of the margin; a `minimum` of 5
    makes this schedule do so too.

    Args:
      base: λ before the first step, >= 0; 0 turns annealing off.
      gamma: how fast λ falls per step, >= 0.
      power: exponent, >= 0.
      minimum: λ never falls below it, >= 0.

    Returns:
      schedule(step) -> float32 scalar; `step` an integer, traced or not.

    Raises:
      TypeError: a constant is not a real number.
      ValueError: a constant is negative or not finite.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> lam = lsm.annealed_lambda(base=1000.0, gamma=2.5e-5, power=35.0)
      >>> float(lam(0)) < 1000.0, round(float(lam(10_000)), 2)
      (True, 0.41)

    `lsoftmax_jax.schedule` has the released constants for MNIST, CIFAR10 and CIFAR10+.
    """
    base = _checks.check_real("base", base, 0, math.inf)
    gamma = _checks.check_real("gamma", gamma, 0, math.inf)
    power = _checks.check_real("power", power, 0, math.inf)
    minimum = _checks.check_real("minimum", minimum, 0, math.inf)

    def schedule(step: ArrayLike) -> jax.Array:
        updates = _checks.as_array("step", step, "a number").astype(jnp.float32) + 1
        # Not base * (1 + gamma t)**-power: 1 + gamma t loses gamma's digits in float32.
        return jnp.maximum(base * jnp.exp(-power * jnp.log1p(gamma * updates)), minimum)

    return schedule


def margin_schedule(
    steps: int,
    *,
    margin: int = 4,
    share: float | None = None,
    start: float = 0.1,
    end: float = 0.7,
) -> Callable[[ArrayLike], jax.Array]:
    r"""λ for a run of `steps` updates: softmax first, then a part of the margin, by a smooth ramp.

    The margin's share of the target logit rises from 0 at `start` to `share` at `end`, both
    fractions of the run, and stays:

    .. math:: \frac{1}{1+\lambda(s)} = share \cdot p^2 (3 - 2p), \qquad
        p = \mathrm{clip}\left(\frac{s / steps - start}{end - start},\, 0,\, 1\right)

    It is for runs whose λ must be known beforehand; `self_paced` needs no number of steps. λ ends
    at 1 / share - 1. A larger margin trains only at a smaller share. At half of margin 8, and at
    the whole of any margin, features shrink to length 0.

    Args:
      steps: updates of the run, >= 1.
      margin: of the loss that takes this λ, here only for the default of `share`.
      share: the largest share of the margin, in [0, 1]; 0 is softmax. By default 0.8 / margin and
        at most a half: λ ends at 1.5 with margin 2, at 4 with 4, at 9 with 8.
      start: the fraction of the run before which λ is infinite, in [0, 1].
      end: the fraction after which λ no longer falls, in [0, 1] and above `start`.

    Returns:
      schedule(step) -> float32 scalar, infinite at first; `step` an integer, traced or not, counted
      from 0. Steps past the end have the last λ.

    Raises:
      TypeError: `steps` or `margin` is no Python int, or another argument no real number.
      ValueError: an argument is outside its range, or `start` is not below `end`.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> lam = lsm.margin_schedule(2000)
      >>> [round(float(lam(step)), 1) for step in (0, 500, 800, 1400, 2000)]
      [inf, 31.0, 9.0, 4.0, 4.0]
    """
    steps, margin = _checks.check_size("steps", steps), _checks.check_size("margin", margin)
    largest = min(0.5, 0.8 / margin) if share is None else _checks.check_fraction("share", share)
    start, end = _checks.check_fraction("start", start), _checks.check_fraction("end", end)
    if start >= end:
        raise ValueError(f"start must be below end, got start {start} and end {end}")

    def schedule(step: ArrayLike) -> jax.Array:
        done = _checks.as_array("step", step, "a number").astype(jnp.float32) / steps
        part = jnp.clip((done - start) / (end - start), 0, 1)
        now = largest * part * part * (3 - 2 * part)
        return 1 / now - 1  # infinite where now is 0

    return schedule


def self_paced(
    *,
    fraction: float = 0.5,
    power: float = 4.0,
    axis_name: str | tuple[str, ...] | None = None,
) -> SelfPaced:
    r"""λ from what the batch shows, without a schedule, a number of steps or any state.

    Pass the result as `lam` to any loss; a head without `lam` uses ``self_paced()``. In each call

    .. math:: \frac{1}{1+\lambda} = fraction \cdot s^* \cdot \bar q^{\,power}

    Here s* is the largest share of the margin in [0, 1] at which the mean radial force on the
    batch's features, -<x, d loss / dx>, is not negative. Beyond s* features shrink, and a run whose
    features reach length 0 has collapsed. The force at a share s is :math:`\sigma(Z - t)(t - M)`
    with :math:`t = u + s(v - u)`: u is the label's plain logit, v its logit under the whole margin,
    Z the logsumexp of the other logits and M their mean under their own softmax. The factor q̄ is
    the batch's mean of :math:`\sigma(u - Z)`, the probability that plain softmax gives the label.
    It is small at the start and again in a collapse, where the margin so lets go.

    λ is at least 1 / fraction - 1. It is infinite, which is plain softmax, if no share keeps the
    force from being negative. No gradient flows through λ. Masked examples do not count.

    Args:
      fraction: how much of s* to use, in [0, 1].
      power: exponent of q̄, >= 0.
      axis_name: the mapped axes over which a batch is split under `jax.pmap` or `jax.shard_map`,
        like a batch normalisation's. Under `jax.jit` on a mesh the batch is whole by itself.

    Returns:
      a frozen, hashable value, to be passed as `lam`; it holds no arrays.

    Raises:
      TypeError, ValueError: a number is none, or outside its range.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = 9 * jnp.eye(3), jnp.eye(3)
      >>> loss, seen = lsm.lsoftmax_loss_and_statistics(
      ...     features, kernel, jnp.array([0, 1, 2]), margin=2, lam=lsm.self_paced())
      >>> round(float(seen.lam), 2)
      1.0
    """
    fraction = _checks.check_fraction("fraction", fraction)
    power = _checks.check_real("power", power, 0, math.inf)
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be a name, names or None, got {axis_name!r}")
    return SelfPaced(fraction, power, tuple(names))
