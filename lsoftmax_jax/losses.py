"""The large-margin softmax: logits, the loss of each example, and a weighted sum of losses.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295; the annealing by λ is that of the
authors' released code.
"""

from typing import Any

import jax
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._core import run
from lsoftmax_jax._core.run import Statistics
from lsoftmax_jax._core.spec import ClassParallel, Pieces, Plan, Spec, prepare
from lsoftmax_jax.margins import Margin, check_margin
from lsoftmax_jax.schedule import SelfPaced


def lsoftmax_logits(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
) -> jax.Array:
    r"""Logits of the large-margin softmax: features @ kernel with the label's logit replaced.

    .. math::
        z_j = \|w_j\| \|x\| \cos\theta_j \;(j \ne y), \qquad
        z_y = \frac{\lambda \|w_y\| \|x\| \cos\theta_y + \|w_y\| \|x\| \psi(\theta_y)}{1+\lambda}

    Another margin puts its v(cos θ) in place of ψ. With unit columns ‖w‖ is 1, with a scale s
    ‖w‖‖x‖ is s. For training take a loss below, which keeps no (batch, classes) array of logits.

    The gradient is written by hand: two matrix products and no division by a sine, finite at every
    angle. Derivatives of any order exist in reverse mode, and `jax.hessian` works; JAX has no
    forward mode for functions with a hand-written gradient.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes), as in Flax's Dense; no bias.
      labels: (...,) integers in [0, classes). A label outside, -1 included, makes that row of
        logits and its gradient NaN. None gives the logits without a margin, for inference.
      margin: integer m >= 1, static; 1 gives the plain logits. Or one of `lsoftmax_jax.margins`.
      lam: annealing λ >= 0, scalar, may be traced and infinite; its gradient is the true one. A
        traced λ that is negative or NaN makes all target logits NaN. Or
        `lsoftmax_jax.self_paced()`, which computes λ from each example without a gradient.

    Returns:
      (..., classes) in the promoted dtype of `features` and `kernel`; angles, norms and sums are
      computed in float32 or better.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> logits = lsm.lsoftmax_logits(jnp.array([3.0, 4.0]), kernel, 0, margin=2, lam=0.0)
      >>> logits.round(2).tolist()
      [-1.399999976158142, 4.0]
    """
    if labels is not None:
        return run.margin_logits(*prepare(features, kernel, labels, margin=margin, lam=lam))
    margin = check_margin(margin)
    features, kernel = _checks.check_operands(features, kernel)
    if not isinstance(lam, SelfPaced):
        _checks.check_scalar("lam", lam)
    dtype = _checks.promoted(features, kernel)
    spec = Spec(margin, None, 0.0, kernel.shape[1], dtype, Pieces(), None)
    return run.inference_logits(spec, features, kernel)


def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> jax.Array:
    r"""Cross-entropy of the margin logits, one value an example, fused with its gradient.

    .. math:: \ell = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}, \qquad z = \text{lsoftmax\_logits}

    With `label_smoothing` e, the cross-entropy against Optax's smoothed labels: the formula above
    plus e (z_y - mean of all z).

    The result may be weighted, masked or averaged: its gradient is right for any cotangent. For a
    (weighted) sum over many classes `lsoftmax_loss_sum` is cheaper. Derivatives of any order exist
    in reverse mode, and `jax.hessian` works.

    With a `layout` the kernel's columns are split over a mesh axis. The call takes the whole
    arrays, as any function under `jax.jit` with a mesh does, and gives the same numbers. The kernel
    is never gathered, and no device sees the logits of another.

    Args:
      features: (..., D) floating point; with a layout their first axis lies on its batch axes.
      kernel: (D, classes); with a layout (D, columns), split over its class axis.
      labels: (...,) integers in [0, classes). Outside, -1 included, loss and gradient are NaN
        unless `where` masks the example.
      margin: integer m >= 1, static; 1 gives plain softmax. Or one of `lsoftmax_jax.margins`.
      lam: annealing λ >= 0, scalar, may be traced and infinite; its gradient is the true one. Or
        `lsoftmax_jax.self_paced()`, which computes λ from each example without a gradient.
      where: (...,) bool; False gives exactly zero loss and gradient, whatever the row holds.
      label_smoothing: e in [0, 1], a Python float.
      plan: in which pieces to compute, by default the fastest within 1 GiB, with a layout of each
        device.
      layout: how the head lies on a mesh, or None.

    Returns:
      (...,) float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.ones((2, 3)), jnp.eye(3)
      >>> lsm.lsoftmax_loss(features, kernel, jnp.array([0, 2]), margin=4, lam=5.0).round(3)
      Array([1.473, 1.473], dtype=float32)

      On all devices, the kernel filled up to a number of columns that they divide:

      >>> import jax
      >>> mesh = jax.make_mesh((1, jax.device_count()), ("data", "model"))
      >>> layout = lsm.ClassParallel("model", "data", mesh, classes=3)
      >>> filled = jnp.eye(3, layout.columns(3))
      >>> @jax.jit
      ... def loss(features, kernel, labels):
      ...     return lsm.lsoftmax_loss(
      ...         features, kernel, labels, margin=4, lam=5.0, layout=layout)
      >>> loss(features, filled, jnp.array([0, 2])).round(3).tolist()
      [1.473..., 1.473...]
    """
    options: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
    return run.losses(
        *prepare(features, kernel, labels, margin=margin, lam=lam, layout=layout, **options)
    )[0]


def lsoftmax_loss_and_statistics(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> tuple[jax.Array, Statistics]:
    """`lsoftmax_loss`, and the `Statistics` of the same pass.

    Args:
      features, kernel, labels, margin, lam, where, label_smoothing, plan, layout: as there.

    Returns:
      the loss (...,), and `Statistics`, through which no gradient flows.

    Raises:
      TypeError, ValueError: as `lsoftmax_loss`.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> loss, seen = lsm.lsoftmax_loss_and_statistics(
      ...     features, kernel, labels, margin=4, lam=lsm.self_paced())
      >>> seen.plain_logit.tolist(), seen.lam.tolist()
      ([1.0, 1.0], [inf, inf])
    """
    options: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
    return run.losses(
        *prepare(features, kernel, labels, margin=margin, lam=lam, layout=layout, **options)
    )


def lsoftmax_loss_sum(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> jax.Array:
    r"""The scalar sum of weights * `lsoftmax_loss`, its gradients computed in the forward pass.

    .. math:: L = \sum_i s_i \ell_i

    Under differentiation the forward pass computes the gradients of features and kernel, and the
    backward pass only scales them. So the one-shot and, without a layout, row blocks take three
    matrix products and keep no logits. Without differentiation the call computes the loss alone.
    With a layout a step takes at most 5 collectives.

    Args:
      weights: (...,) floating-point weights s of the examples, or None for ones; for a mean pass
        `jnp.full(labels.shape, 1 / labels.size)`. Their gradient is the loss of each example.
      features, kernel, labels, margin, lam, where, label_smoothing, plan, layout: as in
        `lsoftmax_loss`.

    Returns:
      scalar, float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> def mean(kernel):
      ...     weights = jnp.full(2, 0.5)
      ...     return lsm.lsoftmax_loss_sum(features, kernel, labels, weights, margin=4, lam=5.0)
      >>> loss, gradient = jax.value_and_grad(mean)(kernel)
      >>> round(float(loss), 3), gradient.shape
      (1.473, (3, 3))
    """
    options: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
    options |= {"weights": weights, "layout": layout}
    return run.loss_sum(
        *prepare(features, kernel, labels, margin=margin, lam=lam, one_pass=True, **options)
    )
