"""How λ is chosen: from each example, or by the step. The margin has the share 1 / (1 + λ).

Source: `annealed_lambda` is the formula of the loss layer in the authors' released Caffe code,
https://github.com/wy1iu/LargeMargin_Softmax_Loss.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lsoftmax_jax import _checks

# If the margin took the whole lead, the target would stay at its rival: no loss could fall.
_PART_OF_LEAD = 0.9
# A few easy classes would otherwise get nearly the whole margin, at the expense of rare ones.
_LARGEST_LEAD = 0.4


@jax.tree_util.register_static
@dataclass(frozen=True)
class SelfPaced:
    """The rule for λ that `self_paced` makes and every loss takes as `lam`.

    Attributes:
      strength: how much of an example's lead the margin may take, in [0, 1].
    """

    strength: float = 0.8

    def __post_init__(self) -> None:
        _checks.keep(self, strength=_checks.check_fraction("strength", self.strength))

    def share(self, plain: jax.Array, whole: jax.Array, rival: jax.Array) -> jax.Array:
        """The share 1 / (1 + λ) of each example, without a gradient.

        Args:
          plain: (batch,) u, the target logit without a margin.
          whole: (batch,) v <= u, the target logit with the whole margin.
          rival: (batch,) the largest other logit.
        """
        plain, whole, rival = map(jax.lax.stop_gradient, (plain, whole, rival))
        gap = plain - whole
        some = gap > 0  # False for NaN too: a label outside [0, classes)
        lead = jnp.where(some, plain - rival, 0) / jnp.where(some, gap, 1)
        return _PART_OF_LEAD * self.strength * jnp.clip(lead, 0, _LARGEST_LEAD)


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

    It is here for the released constants, for 18,000 to 30,000 updates, at whose end λ is near 0.
    In a shorter run λ stays so large that the loss is softmax. With `gamma` stretched to the length
    of the run, the last updates have nearly the whole margin: features can shrink to length 0, and
    the run is lost. `margin_schedule` and `self_paced` use only a part of the margin; a
    `minimum` of 5 makes this schedule do so too.

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
    base = _checks.check_real("base", base, 0, _checks.LARGEST)
    gamma = _checks.check_real("gamma", gamma, 0, _checks.LARGEST)
    power = _checks.check_real("power", power, 0, _checks.LARGEST)
    minimum = _checks.check_real("minimum", minimum, 0, _checks.LARGEST)

    return functools.partial(_annealed, base, gamma, power, minimum)


def _annealed(
    base: float, gamma: float, power: float, minimum: float, step: ArrayLike
) -> jax.Array:
    updates = _step(step) + 1
    # Not base * (1 + gamma t)**-power: 1 + gamma t loses gamma's digits in float32.
    return jnp.maximum(base * jnp.exp(-power * jnp.log1p(gamma * updates)), minimum)


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
    the whole of any margin, features can shrink to length 0.

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

    return functools.partial(_ramp, steps, largest, start, end)


def _ramp(steps: int, largest: float, start: float, end: float, step: ArrayLike) -> jax.Array:
    part = jnp.clip((_step(step) / steps - start) / (end - start), 0, 1)
    share = largest * part * part * (3 - 2 * part)
    return 1 / share - 1  # infinite where the share is 0


def _step(step: ArrayLike) -> jax.Array:
    """A step, an integer >= 0 of any shape, as float32."""
    array = _checks.as_array("step", step, "an integer >= 0")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"step must be an integer >= 0, got dtype {array.dtype}")
    if not isinstance(step, jax.Array) and np.size(step):
        least, most = int(np.min(step)), int(np.max(step))
        if least < 0 or most > jnp.iinfo(array.dtype).max:
            raise ValueError(f"step must be an integer >= 0 of dtype {array.dtype}, got {step}")
    return array.astype(jnp.float32)


def self_paced(strength: float = 0.8) -> SelfPaced:
    r"""λ from each example's own lead, without a schedule, a number of steps or any state.

    Pass the result as `lam` to any loss. A head without `lam` uses ``self_paced()``, unless its
    margin has a scale: such a head, but for `SphereFace`, uses λ = 0. For each example

    .. math:: \frac{1}{1+\lambda} = 0.9 \cdot strength \cdot
        \mathrm{clip}\left(\frac{u - \max_{j \ne y} z_j}{u - v},\, 0,\, 0.4\right)

    where u is the target's plain logit, v the target logit under the whole margin and z the plain
    logits. The margin takes a part of what the example is ahead of its nearest other class: an
    example that is classified correctly stays so, and one that is not has no margin (λ is infinite,
    which is plain softmax). The bound keeps easy classes from taking nearly the whole margin. Where
    the margin takes nothing, u = v, as for a feature along its column, λ is infinite too.

    The rule reads one example only: batches, microbatches, `jax.vmap` and devices cannot change λ.
    No gradient flows through λ.

    Args:
      strength: more is more margin, in [0, 1]; 0 is softmax.

    Returns:
      a frozen, hashable value, to be passed as `lam`; it holds no arrays, and is a static pytree.

    Raises:
      TypeError, ValueError: `strength` is not a number in [0, 1].

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.array([[2.0, 1.7], [1.0, 2.0]]), jnp.eye(2)
      >>> loss, seen = lsm.lsoftmax_loss_and_statistics(
      ...     features, kernel, jnp.array([0, 0]), margin=2, lam=lsm.self_paced(1.0))
      >>> [round(float(lam), 2) for lam in seen.lam]
      [4.84, inf]
    """
    return SelfPaced(strength)
