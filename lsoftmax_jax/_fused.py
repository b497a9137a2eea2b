"""The algebra of the loss and its gradient, fused.

For a row with target logit t and the logsumexp Z of the OTHER logits:

    loss = softplus(Z - t) = logsumexp(all) - t,    g = dloss/dt = -sigmoid(Z - t)

softplus keeps the digits of a small loss, which the difference of two large numbers has lost.
With G the gradient of the logits, G_j = -g exp(z_j - Z) for j != y and G_y = g alpha, the
gradients are the two matrix products of plain softmax, a scaled copy of features and a scaled
copy of the kernel (`Target` has alpha and beta):

    dfeatures = G kernel^T + diag(g beta |kernel_y| / |features|) features
    dkernel = features^T G + kernel diag(sum over a class's rows of g beta |features| / |kernel_y|)

`_plans` says in which pieces the (batch, classes) arrays exist; that never changes the numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsoftmax_jax._pace import BatchView, SelfPaced
from lsoftmax_jax.logits import Head, LabelTerms, Pull, Target, annealed_target, pulled_back


class Statistics(NamedTuple):
    """What a loss computed on its way, for each example; no gradient flows through it.

    `plain_logit > max_logit` says whether an example is classified correctly without the margin.
    Report its mean as the training accuracy.

    Attributes:
      target_cosine: cos(theta_y), (...,).
      target_logit: the label's logit with margin and annealing, (...,).
      plain_logit: the label's logit without margin, (...,).
      max_logit: the largest other logit, (...,).
      lam: the λ of the call, scalar.
    """

    target_cosine: jax.Array
    target_logit: jax.Array
    plain_logit: jax.Array
    max_logit: jax.Array
    lam: jax.Array


def like_statistics(of_rows: Any, of_all: Any) -> Any:
    """A tree like `Statistics` that says something of each field, such as how it is placed."""
    return Statistics(of_rows, of_rows, of_rows, of_rows, of_all)


class Setting(NamedTuple):
    """What of a call is static."""

    head: Head
    label_smoothing: float
    pace: SelfPaced | None  # computes λ in place of the one that is given
    classes: int  # of the whole head, of which a kernel may hold a shard


class Others(NamedTuple):
    """A row's logits but the target's, summarised; the lowest finite number and 0 without any."""

    peak: jax.Array  # the largest
    mass: jax.Array  # sum exp(z - peak)
    total: jax.Array  # sum z; 0 unless label smoothing asks for it
    moment: jax.Array  # sum exp(z - peak) (z - peak); 0 unless self-pacing asks for it

    @property
    def z(self) -> jax.Array:
        """Their logsumexp."""
        some = self.mass != 0
        return jnp.where(some, self.peak + jnp.log(jnp.where(some, self.mass, 1)), self.peak)

    @property
    def inverse_mass(self) -> jax.Array:
        some = self.mass != 0
        return jnp.where(some, 1 / jnp.where(some, self.mass, 1), 0)


def merge(one: Others, two: Others) -> Others:
    """The summary of two blocks of classes."""
    peak = jnp.maximum(one.peak, two.peak)

    def seen_from_peak(part: Others) -> tuple[jax.Array, jax.Array]:
        scale = jnp.exp(part.peak - peak)
        # Nothing may be infinitely far below; nothing times infinity is no number.
        shift = jnp.where(part.mass != 0, part.peak - peak, 0)
        return part.mass * scale, (part.moment + part.mass * shift) * scale

    (mass_one, moment_one), (mass_two, moment_two) = map(seen_from_peak, (one, two))
    return Others(peak, mass_one + mass_two, one.total + two.total, moment_one + moment_two)


def paced_target(
    setting: Setting,
    terms: LabelTerms,
    others: Others,
    lam: jax.Array,
    weights: jax.Array | None,
    axes: tuple[str, ...] = (),
) -> tuple[Target, jax.Array]:
    """The annealed target and its λ: the one given, or the one the batch shows.

    Args:
      weights: of the rows, for self-pacing; None counts all.
      axes: mapped axes over which the batch is split.
    """
    if setting.pace is not None:
        whole = annealed_target(setting.head, terms, jnp.zeros_like(lam))
        weights = jnp.ones_like(whole.plain) if weights is None else jnp.maximum(weights, 0)
        view = BatchView(
            plain=whole.plain,
            margin=whole.logit,
            z=others.z,
            mean=others.peak + others.moment * others.inverse_mass,
            weights=jnp.where(jnp.isnan(whole.plain), 0, weights),
        )
        lam = setting.pace.lam(view, axes).astype(lam.dtype)
    return annealed_target(setting.head, terms, lam), lam


def loss_of(setting: Setting, t: Target, others: Others) -> jax.Array:
    loss = jax.nn.softplus(others.z - t.logit)
    if setting.label_smoothing:
        mean = (t.logit + others.total) / setting.classes
        loss = loss + setting.label_smoothing * (t.logit - mean)
    return loss


def statistics_of(t: Target, others: Others, lam: jax.Array) -> Statistics:
    seen = Statistics(t.cosine, t.logit, t.plain, others.peak, lam)
    return jax.tree.map(jax.lax.stop_gradient, seen)


class LogitGradient(NamedTuple):
    """What the gradient of the logits is made of, one value a row."""

    peak: jax.Array  # of the other logits
    softmax: jax.Array  # times exp(z_j - peak): the gradient of the other logits
    uniform: jax.Array | None  # what label smoothing takes off every one of them
    target: Pull
    dlam: jax.Array


def logit_gradient(
    setting: Setting, t: Target, others: Others, cotangent: jax.Array, dtype: jnp.dtype
) -> LogitGradient:
    """From the cotangent of each row's loss, for matrix products in `dtype`."""
    smoothing, classes = setting.label_smoothing, setting.classes
    below = cotangent * jax.nn.sigmoid(others.z - t.logit)
    g = -below
    if smoothing:
        # Not smoothing - below, two numbers near 1 whose difference may be as small as 1 / classes.
        towards = jax.nn.sigmoid(t.logit - others.z) - 1 / classes
        g = cotangent * (smoothing * towards) + (1 - smoothing) * g
    uniform = cotangent * (smoothing / classes) if smoothing else None
    # Over the mass, not by exp(-z): z is a logarithm, whose rounding all classes would share.
    softmax = below * others.inverse_mass
    return LogitGradient(others.peak, softmax, uniform, pulled_back(g, t, dtype), g * t.dlam)
