"""The large-margin softmax as the paper writes it: read this first.

Plain `jax.numpy`, differentiated by JAX: no custom rule, no plan, no mesh, no annealing rule. The
losses of this library compute the same numbers; their tests compare with this page and with a
60-digit oracle, and `python -m experiments bench head` times it beside them.

It is not for training. The slope of arccos is infinite at theta = 0 and pi, so gradients there are
not finite; a small loss loses its digits in the difference of two logarithms; and autodiff keeps
several (batch, classes) arrays.

Source: Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016,
https://arxiv.org/abs/1612.02295, equations 4 to 6, with the annealing of the authors' released
code.
"""

import jax
import jax.numpy as jnp


def psi(theta: jax.Array, margin: int) -> jax.Array:
    r"""psi(theta) = (-1)^k cos(m theta) - 2k for theta in [k pi / m, (k + 1) pi / m].

    Args:
      theta: angles in [0, pi], any shape.
      margin: the integer m >= 1.

    Returns:
      as `theta`; it falls from 1 at theta = 0 to 1 - 2m at theta = pi.

    Example:
      >>> from lsoftmax_jax import reference
      >>> reference.psi(jnp.array([0.0, jnp.pi / 2]), 2).round(3).tolist()
      [1.0, -1.0]
    """
    k = jnp.clip(jnp.floor(jax.lax.stop_gradient(theta) * margin / jnp.pi), 0, margin - 1)
    return (-1) ** k * jnp.cos(margin * theta) - 2 * k


def logits(
    features: jax.Array, kernel: jax.Array, labels: jax.Array, margin: int, lam: float
) -> jax.Array:
    r"""The logits, with the annealed margin at the label.

    .. math::
        f_j = \|W_j\| \|x\| \cos\theta_j \;(j \ne y), \qquad
        f_y = \frac{\lambda \|W_y\| \|x\| \cos\theta_y + \|W_y\| \|x\| \psi(\theta_y)}{1 + \lambda}

    Args:
      features: x, (batch, D).
      kernel: W, (D, classes).
      labels: y, (batch,) integers in [0, classes).
      margin: the integer m >= 1.
      lam: λ >= 0, finite.

    Returns:
      f, (batch, classes).

    Example:
      >>> from lsoftmax_jax import reference
      >>> features, kernel = jnp.array([[3.0, 4.0]]), jnp.eye(2)
      >>> reference.logits(features, kernel, jnp.array([0]), 2, 0.0).round(2).tolist()
      [[-1.39..., 4.0]]
    """
    length = jnp.linalg.norm(features, axis=1)[:, None] * jnp.linalg.norm(kernel, axis=0)[None, :]
    cosine = jnp.clip(features @ kernel / length, -1, 1)
    margins = length * psi(jnp.arccos(cosine), margin)
    target = (lam * length * cosine + margins) / (1 + lam)
    is_label = labels[:, None] == jnp.arange(kernel.shape[1])[None, :]
    return jnp.where(is_label, target, length * cosine)


def loss(
    features: jax.Array, kernel: jax.Array, labels: jax.Array, margin: int, lam: float
) -> jax.Array:
    r"""The loss of each example, L = -log(exp(f_y) / sum_j exp(f_j)).

    Args:
      features, kernel, labels, margin, lam: as in `logits`.

    Returns:
      (batch,).

    Example:
      >>> from lsoftmax_jax import reference
      >>> features, kernel = jnp.array([[3.0, 4.0]]), jnp.eye(2)
      >>> reference.loss(features, kernel, jnp.array([0]), 2, 0.0).round(2).tolist()
      [5.4...]
    """
    f = logits(features, kernel, labels, margin, lam)
    target = jnp.take_along_axis(f, labels[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(f, axis=1) - target
