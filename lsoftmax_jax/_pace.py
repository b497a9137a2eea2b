"""The λ that a batch shows: how much of the margin its features bear before they shrink.

Every logit is homogeneous of degree one in the features, so for a row with target logit t and
softmax q over its margin logits z

    <x, dloss/dx> = E_q[z] - t = -(1 - q_y) (t - M),    q_y = sigmoid(t - Z),

with Z the logsumexp of the other logits and M their mean under their own softmax. While the mean of
this over the batch is negative, longer features lower the loss. A margin lowers t; once it lowers
it too far, features shrink, and at length 0 all classes are alike. With the margin at a share s the
target is t(s) = u + s (v - u), from the plain logit u to the full margin's v.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Shares at which the mean force is computed; between them it is taken to be straight.
_GRID = 33


class BatchView(NamedTuple):
    """What the rule sees of a batch, one value a row."""

    plain: jax.Array  # u, the label's logit without margin
    margin: jax.Array  # v, the same with the whole margin
    z: jax.Array  # logsumexp of the other logits
    mean: jax.Array  # their mean under their own softmax
    correct: jax.Array  # whether u is the largest logit
    weights: jax.Array  # >= 0, 0 for rows that do not count


@dataclass(frozen=True)
class SelfPaced:
    """A rule for λ, made by `lsoftmax_jax.self_paced`; the losses take it as `lam`.

    Attributes:
      fraction: of the share at which the batch's features stop growing.
      accuracy: the batch's margin-free accuracy at which the margin comes in.
      power: how gently it does.
      axis_name: mapped axes, as of `jax.pmap`, over which the batch is split.
    """

    fraction: float
    accuracy: float
    power: float
    axis_name: tuple[str, ...] = ()

    def lam(self, view: BatchView, axes: tuple[str, ...] = ()) -> jax.Array:
        """λ of a batch that is split over the mapped `axes` too; no gradient flows through it."""
        view = jax.tree.map(jax.lax.stop_gradient, view)
        share = self._share(view, axes)
        return jnp.where(share > 0, 1 / jnp.where(share > 0, share, 1) - 1, jnp.inf)

    def _share(self, view: BatchView, axes: tuple[str, ...]) -> jax.Array:
        grid = np.linspace(0, 1, _GRID).astype(view.plain.dtype)
        t = view.plain + grid[:, None] * (view.margin - view.plain)
        force = jax.nn.sigmoid(view.z - t) * (t - view.mean)
        counts = view.weights > 0
        # A row that does not count may hold anything.
        force = jnp.sum(jnp.where(counts, view.weights * force, 0), axis=1)
        correct = jnp.sum(jnp.where(counts & view.correct, view.weights, 0))
        sums = jnp.concatenate([force, jnp.stack([correct, jnp.sum(view.weights)])])
        if axes := (*self.axis_name, *axes):
            sums = jax.lax.psum(sums, axes)
        force, correct, total = sums[:-2], sums[-2], sums[-1]
        accuracy = correct / jnp.where(total > 0, total, 1)
        above = jnp.clip((accuracy - self.accuracy) / (1 - self.accuracy), 0, 1)
        return self.fraction * _first_zero(grid, force) * above**self.power


def _first_zero(grid: np.ndarray, force: jax.Array) -> jax.Array:
    """Where a function on a grid first falls below 0, by lines; the last point if it never does."""
    positive = force[:-1] > 0
    before = jnp.cumprod(positive.astype(force.dtype))
    falls = positive & (force[1:] <= 0)
    part = jnp.where(falls, force[:-1] / jnp.where(falls, force[:-1] - force[1:], 1), 1)
    # Each step counts whole while the force is positive, in part where it falls to 0.
    return jnp.sum(jnp.diff(grid) * before * part)
