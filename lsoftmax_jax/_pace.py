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

# Shares at which the mean force is computed; between them it is taken to be straight. Fine near 0,
# where large margins and wrong labels put the zero.
_GRID = np.linspace(0, 1, 17) ** 3


class BatchView(NamedTuple):
    """What the rule sees of a batch, one value a row."""

    plain: jax.Array  # u, the label's logit without margin
    margin: jax.Array  # v, the same with the whole margin
    z: jax.Array  # logsumexp of the other logits
    mean: jax.Array  # their mean under their own softmax
    weights: jax.Array  # >= 0, 0 for rows that do not count


@dataclass(frozen=True)
class SelfPaced:
    """A rule for λ that `lsoftmax_jax.self_paced` makes and the losses take as `lam`.

    Attributes:
      fraction: part of the largest share at which the batch's features do not shrink.
      power: exponent of the mean probability that plain softmax gives the labels.
      axis_name: mapped axes, as of `jax.pmap`, over which the batch is split.
    """

    fraction: float
    power: float
    axis_name: tuple[str, ...] = ()

    def lam(self, view: BatchView, axes: tuple[str, ...] = ()) -> jax.Array:
        """λ of a batch that is split over the mapped `axes` too; no gradient flows through it."""
        share = self._share(jax.tree.map(jax.lax.stop_gradient, view), axes)
        return jnp.where(share > 0, 1 / jnp.where(share > 0, share, 1) - 1, jnp.inf)

    def _share(self, view: BatchView, axes: tuple[str, ...]) -> jax.Array:
        grid = jnp.asarray(_GRID, view.plain.dtype)
        # A row of numbers each, whatever rank promotion the caller forbids.
        plain, margin, z, mean, weights = (column[None, :] for column in view)
        t = plain + grid[:, None] * (margin - plain)
        force = jax.nn.sigmoid(z - t) * (t - mean)
        probability = jax.nn.sigmoid(plain - z)
        rows = jnp.concatenate([force, probability, jnp.ones_like(probability)])
        # A row that does not count may hold anything.
        sums = jnp.sum(jnp.where(weights > 0, weights * rows, 0), axis=1)
        if axes := (*self.axis_name, *axes):
            sums = jax.lax.psum(sums, axes)
        force, probability, total = sums[:-2], sums[-2], sums[-1]
        likely = probability / jnp.where(total > 0, total, 1)
        return self.fraction * _last_zero(grid, force) * likely**self.power


def _last_zero(grid: jax.Array, force: jax.Array) -> jax.Array:
    """Where a function on a grid falls below 0 for good, by a line; 0 where it always is."""
    index = jnp.arange(grid.size)
    last = jnp.max(jnp.where(force >= 0, index, -1))
    before = jnp.clip(last, 0, grid.size - 2)
    above, below = force[before], force[before + 1]
    falls = above > below
    part = jnp.where(falls, above / jnp.where(falls, above - below, 1), 0)
    zero = grid[before] + jnp.clip(part, 0, 1) * (grid[before + 1] - grid[before])
    return jnp.where(last < 0, 0, jnp.where(last == grid.size - 1, 1, zero))
