"""A step of the head with its SGD update inside, so that the kernel's gradient never exists."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lsoftmax_jax import _checks
from lsoftmax_jax._core import mesh, run
from lsoftmax_jax._core.blocks import (
    block_gradients,
    columns_with_norms,
    features_with_norms,
    label_sums,
    slice_columns,
    sums_from,
    with_part,
)
from lsoftmax_jax._core.mesh import anywhere, resharded, zeros_like_rows
from lsoftmax_jax._core.run import Statistics
from lsoftmax_jax._core.spec import Arrays, ClassParallel, Pieces, Plan, Spec, pieces_of, prepare
from lsoftmax_jax._core.target import view
from lsoftmax_jax._core.tiles import as_stored
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.schedule import SelfPaced

# Classes at a time unless a plan says otherwise: a wider block only costs memory.
_CLASSES = 4096


class SgdStep(NamedTuple):
    """What a step of `lsoftmax_sgd` gives back.

    Attributes:
      loss: scalar, the weighted sum of the losses before the update.
      dfeatures: its gradient by the features, in their dtype, for the backward pass of the rest of
        the model.
      kernel: after the update.
      momentum: after the update.
      statistics: of each example before the update; `plain_logit > max_logit` is the margin-free
        classification. Under `jax.jit` unused statistics cost nothing.
    """

    loss: jax.Array
    dfeatures: jax.Array
    kernel: jax.Array
    momentum: jax.Array
    statistics: Statistics


def lsoftmax_sgd(
    features: ArrayLike,
    kernel: jax.Array,
    momentum: jax.Array,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int | Margin,
    lam: ArrayLike | SelfPaced,
    learning_rate: ArrayLike,
    decay: ArrayLike = 0.9,
    weight_decay: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    plan: Plan | None = None,
    layout: ClassParallel | None = None,
) -> SgdStep:
    r"""Loss, gradient of the features, and the kernel after one step of SGD with momentum.

    .. math::
        v \leftarrow \mu v + \partial L / \partial W + \omega W, \qquad W \leftarrow W - \eta v,
        \qquad L = \sum_i s_i \ell_i

    This is the update of `optax.chain(optax.add_decayed_weights(ω), optax.sgd(η, momentum=μ))`. The
    kernel's gradient is computed and used some classes at a time. Besides its arguments a step
    needs about 8 x batch x block bytes, and no gradient of D x classes numbers. Donate `kernel` and
    `momentum` to the jitted step to update them in place.

    It cannot be differentiated: chain `dfeatures` into the rest of the model by `jax.vjp`. Under
    `jax.pmap` or `jax.shard_map` every device would update its kernel by its own rows alone: give
    the whole batch, on a mesh.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes).
      momentum: v, as `kernel`; zeros at the start.
      labels: (...,) integers in [0, classes). An unmasked label outside makes loss, kernel and
        momentum NaN.
      weights: (...,) floating-point weights s, or None for ones.
      margin: integer m >= 1, static, or one of `lsoftmax_jax.margins`.
      learning_rate: η >= 0, may be traced.
      decay: μ in [0, 1], the momentum's decay, may be traced.
      weight_decay: ω >= 0, may be traced.
      lam, where, label_smoothing, layout: as in `lsoftmax_jax.lsoftmax_loss`. With a layout the
        momentum is split as the kernel, and only weight decay changes the columns that fill it up.
      plan: its `class_block` says how many classes at a time, by default 4096 or what its
        `memory_budget` allows.

    Returns:
      `SgdStep`; kernel and momentum in their own dtypes, the update computed in float32 or better.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> step = lsm.lsoftmax_sgd(
      ...     features, kernel, jnp.zeros_like(kernel), labels, jnp.full(2, 0.5),
      ...     margin=4, lam=5.0, learning_rate=0.1)
      >>> step.loss.round(3).item(), step.dfeatures.shape, step.kernel.shape
      (1.473..., (2, 3), (3, 3))
    """
    spec, arrays = prepare(
        features,
        kernel,
        labels,
        margin=margin,
        lam=lam,
        where=where,
        weights=weights,
        label_smoothing=label_smoothing,
        layout=layout,
    )
    spec = spec._replace(pieces=_pieces(plan, spec, arrays))
    momentum = _checks.as_array("momentum", momentum, "an array like kernel")
    if momentum.shape != arrays.kernel.shape:
        raise ValueError(
            f"momentum must have the kernel's shape {arrays.kernel.shape}, got {momentum.shape}"
        )
    _checks.check_floating("momentum", momentum)
    rates = Rates(
        _checks.check_scalar("learning_rate", learning_rate),
        _checks.check_scalar("decay", decay, most=1),
        _checks.check_scalar("weight_decay", weight_decay),
    )
    return _step(spec, arrays, momentum, rates)


class Rates(NamedTuple):
    """The scalars of the update."""

    learning_rate: Any
    decay: Any
    weight_decay: Any


def _pieces(plan: Plan | None, spec: Spec, arrays: Arrays) -> Pieces:
    if isinstance(plan, Plan) and (plan.row_block is not None or plan.keep_exponentials):
        raise ValueError(f"plan must be one of class blocks without kept exponentials, got {plan}")
    columns, rows = arrays.kernel.shape[1], math.prod(arrays.labels.shape)
    if not isinstance(rows, int):  # a symbol of jax.export
        rows = 1
    if spec.layout is not None:
        columns, rows = columns // spec.layout.shards, rows // spec.layout.data_shards
    if plan is None or isinstance(plan, Plan):
        plan = dataclasses.replace(plan or Plan(), keep_exponentials=False)
    pieces = pieces_of(plan, rows, columns, spec.dtype, one_pass=False)
    if plan.class_block is not None:
        return pieces
    return pieces._replace(class_block=min(pieces.class_block or columns, _CLASSES))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _updated(spec: Spec, arrays: Arrays, momentum: jax.Array, rates: Rates) -> SgdStep:
    layout = spec.layout

    def core(operands: tuple[Any, ...]) -> SgdStep:
        features, kernel, arrays, momentum, rates = operands
        dtype = _checks.at_least_f32(spec.dtype)
        weights = run.weights_of(spec, arrays)
        arrays = run.cleaned(spec, arrays._replace(weights=weights))
        rates = Rates(
            _checks.in_range(rates.learning_rate, dtype),
            _checks.in_range(rates.decay, dtype, most=1),
            _checks.in_range(rates.weight_decay, dtype),
        )
        local: Callable[..., SgdStep] = functools.partial(_local, spec)
        if layout is not None:
            rows, columns = layout.rows, layout.columns
            in_specs = mesh.splits(layout), columns, columns, P()
            out_specs = SgdStep(*cast(Any, (P(), rows, columns, columns, rows)))
            local = mesh.on_devices(layout, local, in_specs, out_specs)
        step = local(arrays, kernel, momentum, rates)
        # jax.vjp of the rest of the model takes no other dtype.
        return step._replace(dfeatures=step.dfeatures.astype(features.dtype))

    if layout is not None:
        momentum = resharded(momentum, layout.mesh, layout.columns)
        arrays = mesh.placed(layout, arrays)
        return core((arrays.features, arrays.kernel, arrays, momentum, rates))
    out_like = SgdStep(*cast(Any, ("scalar", "features", "kernel", "kernel", "batch")))
    return anywhere(core, out_like, (arrays.features, arrays.kernel, arrays, momentum, rates))


@_updated.defjvp
def _refuse(spec: Spec, primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "lsoftmax_sgd cannot be differentiated: chain its dfeatures into the rest of the model by "
        "jax.vjp, or differentiate lsoftmax_loss_sum"
    )


_step = jax.jit(_updated, static_argnums=0, inline=True)


def _local(
    spec: Spec, arrays: Arrays, kernel: jax.Array, momentum: jax.Array, rates: Rates
) -> SgdStep:
    """The step of one device.

    Args:
      arrays: with the kernel in the dtype of the products.
      kernel: as it is stored.
    """
    layout, shape, block = spec.layout, arrays.labels.shape, spec.pieces.class_block
    assert block is not None
    arrays = mesh.all_rows(layout, run.flat(arrays))
    found = run.forward(spec, arrays, *view(spec, arrays))
    rows, columns = found.rows, found.columns
    weights, factor = run.fit_for_products(spec.dtype, arrays.weights, rows, columns)
    gradient = run.row_gradient(spec, arrays, found, weights)
    sums = label_sums(gradient.target.along_column, rows.labels, kernel.shape[1])
    eta, mu, omega = rates

    def update(start: Any, width: int, carry: Any) -> Any:
        # XLA copies kernel and momentum in the loop unless they are read from the carry and
        # written in this order: features' gradient, momentum, kernel (test_plans_hlo).
        dfeatures, kernel, momentum = carry
        kernel, momentum = (as_stored(array, rows.labels.shape[0]) for array in (kernel, momentum))
        own = slice_columns(columns._replace(kernel=kernel), start, width)
        here = own._replace(kernel=own.kernel.astype(spec.dtype))
        shifted = rows._replace(labels=rows.labels - start)
        change, dkernel = block_gradients(shifted, here, gradient, None)
        along = sums_from(sums, start, width)
        dkernel = columns_with_norms(own, along, dkernel)
        dkernel = mesh.over_data(layout, run.times(factor, dkernel))
        dkernel = dkernel + omega * own.kernel.astype(omega.dtype)
        velocity = mu * _block(momentum, start, width).astype(mu.dtype) + dkernel
        # Without the barrier XLA of JAX 0.12 copies kernel and momentum for the tail.
        momentum = jax.lax.optimization_barrier(with_part(momentum, velocity, start, axis=1))
        velocity = _block(momentum, start, width).astype(eta.dtype)
        changed = _block(kernel, start, width).astype(eta.dtype) - eta * velocity
        return dfeatures + change, with_part(kernel, changed, start, axis=1), momentum

    carry = zeros_like_rows(rows.features.shape, gradient.softmax), kernel, momentum
    count = kernel.shape[1] // block
    carry = jax.lax.fori_loop(0, count, lambda j, carry: update(j * block, block, carry), carry)
    if tail := kernel.shape[1] - count * block:
        carry = update(count * block, tail, carry)
    dfeatures, kernel, momentum = carry
    dfeatures = features_with_norms(rows, gradient.target, dfeatures)
    dfeatures = mesh.sum_of_features(layout, run.times(factor, dfeatures)).astype(spec.dtype)
    loss = mesh.over_data(layout, jnp.sum(arrays.weights * found.loss))
    seen = mesh.own_rows(layout, run.statistics_of(found))
    seen = jax.tree.map(lambda array: array.reshape(shape), seen)
    dfeatures = dfeatures.reshape(*shape, dfeatures.shape[-1])
    return SgdStep(loss, dfeatures, kernel, momentum, seen)


def _block(array: jax.Array, start: Any, width: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, start, width, axis=1)
