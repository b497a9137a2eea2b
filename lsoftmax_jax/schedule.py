"""Schedules of the annealing λ: the formula of the authors' released code and its constants."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


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

    Source: the loss layer of the authors' released Caffe code; `lsoftmax_jax.schedule` has its
    constants for MNIST, CIFAR10 and CIFAR10+.
    """
    constants = {"base": base, "gamma": gamma, "power": power, "minimum": minimum}
    for name, value in constants.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a real number, got {value!r}")
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")

    def schedule(step: ArrayLike) -> jax.Array:
        updates = jnp.asarray(step).astype(jnp.float32) + 1
        # Not base * (1 + gamma t)**-power: 1 + gamma t loses gamma's digits in float32.
        return jnp.maximum(base * jnp.exp(-power * jnp.log1p(gamma * updates)), minimum)

    return schedule
