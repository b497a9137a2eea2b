"""The margin logits, and the three matrix products that every head here is made of."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import arguments
from lsoftmax_jax.margin import Target, target

# Up to here a product at full precision costs less than gathering each label's column.
_FEW_CLASSES = 256


def lsoftmax_logits(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | None,
    *,
    margin: int,
    lam: ArrayLike = 0.0,
) -> jax.Array:
    r"""Logits of the large-margin softmax: features @ kernel with the label's logit replaced.

    .. math::
        z_j = \|w_j\| \|x\| \cos\theta_j \;(j \ne y), \qquad
        z_y = \frac{\lambda \|w_y\| \|x\| \cos\theta_y + \|w_y\| \|x\| \psi(\theta_y)}{1+\lambda}

    The gradient is written by hand (two matrix products, no division by a sine, finite at every
    angle); reverse mode works to any order. JAX has no forward mode for such functions: take
    reverse over reverse, as in `jax.jacrev(jax.grad(f))`, for a Hessian.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes), as in Flax's Dense; no bias.
      labels: (...,) integers in [0, classes). A label outside, -1 included, makes that row of
        logits and its gradient NaN. None gives the plain product, for inference.
      margin: integer m >= 1, static; 1 gives the plain logits.
      lam: annealing λ >= 0, scalar, may be traced and infinite; its gradient is the true one.
        A traced λ that is negative or NaN makes all target logits NaN.

    Returns:
      (..., classes) in the promoted dtype of `features` and `kernel`; angles, norms and sums are
      computed in float32 or better.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> kernel = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> lsm.lsoftmax_logits(jnp.array([3.0, 4.0]), kernel, 0, margin=2).round(2).tolist()
      [-1.399999976158142, 4.0]

    Source: Liu et al., ICML 2016; the annealing is that of the authors' released code.
    """
    margin = arguments.check_size("margin", margin)
    features, kernel = arguments.check_features(features, kernel)
    dtype = arguments.promoted(features, kernel)
    lam = arguments.check_lam(lam, arguments.at_least_f32(dtype))
    features, kernel = features.astype(dtype), kernel.astype(dtype)
    if labels is None:
        return features @ kernel
    head = arguments.flatten(features, kernel, labels, kernel.shape[1])
    core = functools.partial(_logits, margin)
    logits = arguments.place(core, "logits", (*head[:3], lam))
    return logits.reshape(*head.batch_shape, kernel.shape[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(
    margin: int, features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array
) -> jax.Array:
    return _logits_fwd(margin, features, kernel, labels, lam)[0]


def _logits_fwd(
    margin: int, features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, Target]]:
    t = target_of(features, kernel, labels, lam, margin)
    plain = product(features, kernel)
    logits = jnp.where(hits(labels, plain.shape[1]), t.logit[:, None], plain)
    logits = jnp.where(labels[:, None] >= 0, logits, jnp.nan).astype(features.dtype)
    return logits, (features, kernel, labels, t)


def _logits_bwd(
    margin: int,
    residuals: tuple[jax.Array, jax.Array, jax.Array, Target],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    features, kernel, labels, t = residuals
    hit = hits(labels, kernel.shape[1])
    g = jnp.sum(jnp.where(hit, cotangent, 0), axis=1, dtype=t.alpha.dtype)
    g = jnp.where(labels >= 0, g, jnp.nan)
    pull = pull_target(g, t, features.dtype)
    grad = jnp.where(hit, pull.at_target[:, None], cotangent.astype(g.dtype))
    grad = jnp.where(labels[:, None] >= 0, grad, jnp.nan).astype(features.dtype)
    dfeatures = features_gradient(grad, kernel) + along_rows(pull.row, features)
    sums = column_sums(pull.column, labels, kernel.shape[1])
    dkernel = kernel_gradient(features, grad) + along_columns(sums, kernel)
    dlam = jnp.sum(g * t.lam)
    return dfeatures.astype(features.dtype), dkernel.astype(kernel.dtype), None, dlam


_logits.defvjp(_logits_fwd, _logits_bwd)


def target_of(
    features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array, margin: int
) -> Target:
    """The target of every row, NaN where the label is -1, in the dtype of lam.

    Never from logits of the default precision: bfloat16 or TF32, which that is on TPU and GPU,
    would put a cosine on the wrong side of a knot. With few classes the logits have full
    precision; the compiler finds them computed once.
    """
    dtype = lam.dtype
    if kernel.shape[1] <= _FEW_CLASSES:
        logits = product(features, kernel)
        hit = hits(labels, kernel.shape[1])
        u = jnp.sum(jnp.where(hit, logits, 0), axis=1)
        squares = jnp.sum(kernel.astype(dtype) ** 2, axis=0)
        b = jnp.sum(jnp.where(hit, squares[None, :], 0), axis=1)
    else:
        columns = jnp.take(kernel, labels, axis=1, mode="clip").T.astype(dtype)
        u = jnp.sum(features.astype(dtype) * columns, axis=1)
        b = jnp.sum(columns**2, axis=1)
    u = jnp.where(labels >= 0, u, jnp.nan)
    return target(u, jnp.sum(features.astype(dtype) ** 2, axis=1), b, lam, margin)


class Pull(NamedTuple):
    """A cotangent g of the target logit, pulled back: one value a row."""

    at_target: jax.Array  # the gradient of the plain logit at the label, for the two products
    row: jax.Array  # times features, a part of dfeatures
    column: jax.Array  # times the label's column, a part of dkernel


def pull_target(g: jax.Array, t: Target, dtype: jnp.dtype) -> Pull:
    """`Pull` for matrix products with operands of `dtype`.

    At small angles alpha is near m² and `row` takes most of it back. Half precision would round
    the one and not the other, so what rounding takes off `at_target` is given back along features
    and kernel; what stays lost is smaller by the sine of the angle.
    """
    exact = g * t.alpha
    if dtype == exact.dtype:
        return Pull(exact, g * t.row, g * t.column)
    # A cast there and back the compiler may drop.
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(exact, info.nexp, info.nmant)
    lost = exact - rounded
    return Pull(rounded, g * t.row + lost * t.shadow_row, g * t.column + lost * t.shadow_column)


def hits(labels: jax.Array, classes: int) -> jax.Array:
    """(batch, classes), true at each row's label: compared with an iota, nothing gathered."""
    shape = labels.shape[0], classes
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) == labels[:, None]


def product(features: jax.Array, kernel: jax.Array) -> jax.Array:
    """features @ kernel, accumulated in float32 or better; see `target_of` for the precision."""
    precision = jax.lax.Precision.HIGHEST if kernel.shape[1] <= _FEW_CLASSES else None
    return _contract(features, 1, kernel, 0, precision)


def features_gradient(grad: jax.Array, kernel: jax.Array) -> jax.Array:
    """grad @ kernel.T for grad (batch, classes) in the operands' dtype."""
    return _contract(grad, 1, kernel, 1)


def kernel_gradient(features: jax.Array, grad: jax.Array) -> jax.Array:
    """features.T @ grad."""
    return _contract(features, 0, grad, 0)


def along_rows(scale: jax.Array, features: jax.Array) -> jax.Array:
    return scale[:, None] * features.astype(scale.dtype)


def along_columns(scale: jax.Array, kernel: jax.Array) -> jax.Array:
    return scale[None, :] * kernel.astype(scale.dtype)


def column_sums(values: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """(classes,): the sum of each row's value into its label's column.

    Scalars are scattered, not rows of D values, which is the slow path on GPU.
    """
    # A negative index would wrap to the last class.
    index = jnp.where(labels >= 0, labels, classes)
    return jnp.zeros(classes, values.dtype).at[index].add(values, mode="drop")


def _contract(
    lhs: jax.Array,
    lhs_axis: int,
    rhs: jax.Array,
    rhs_axis: int,
    precision: jax.lax.Precision | None = None,
) -> jax.Array:
    dtype = arguments.at_least_f32(lhs.dtype)
    axes = (((lhs_axis,), (rhs_axis,)), ((), ()))
    return jax.lax.dot_general(lhs, rhs, axes, precision, preferred_element_type=dtype)
