"""The fused losses of the large-margin softmax: of each example, and their weighted sum."""

import functools
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import arguments
from lsoftmax_jax.algebra import (
    Columns,
    Plan,
    Row,
    Setting,
    Statistics,
    add_along,
    block_gradients,
    gradient_row,
    gradients,
    loss_and_z,
    scan_rows,
    statistics_of,
    summarise,
    zeros_like_rows,
)
from lsoftmax_jax.logits import target_of

DEFAULT_MEMORY_BUDGET = 2**30  # bytes
# Row blocks below this many rows starve the matrix units; class blocks win there.
_FEWEST_ROWS = 704
# A block of classes this wide keeps them busy; wider only costs memory.
_FEWEST_CLASSES, _MOST_CLASSES = 512, 8192


@overload
def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int,
    lam: ArrayLike = ...,
    where: ArrayLike | None = ...,
    label_smoothing: float = ...,
    statistics: Literal[False] = ...,
    memory_budget: int = ...,
    row_block: int | None = ...,
    class_block: int | None = ...,
    keep_exponentials: bool | None = ...,
) -> jax.Array: ...
@overload
def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int,
    lam: ArrayLike = ...,
    where: ArrayLike | None = ...,
    label_smoothing: float = ...,
    statistics: Literal[True],
    memory_budget: int = ...,
    row_block: int | None = ...,
    class_block: int | None = ...,
    keep_exponentials: bool | None = ...,
) -> tuple[jax.Array, Statistics]: ...
def lsoftmax_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    margin: int,
    lam: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    statistics: bool = False,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    row_block: int | None = None,
    class_block: int | None = None,
    keep_exponentials: bool | None = None,
) -> jax.Array | tuple[jax.Array, Statistics]:
    r"""Cross-entropy of the margin logits, one value an example, fused with its gradient.

    .. math:: \ell = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}, \qquad z = \text{lsoftmax\_logits}

    With `label_smoothing` e, the cross-entropy against Optax's smoothed labels:
    softplus(Z - t) + e (t - (t + sum of the other logits) / classes).

    Any cotangent per example is honoured, so the result may be weighted, masked or averaged. If
    only a (weighted) sum is needed, `lsoftmax_loss_sum` is cheaper for many classes. Reverse mode
    works to any order; for a Hessian take reverse over reverse.

    The plan is chosen from `memory_budget`, or forced by `row_block` or `class_block`:

    - one-shot: one (batch, classes) array of exponentials kept for the backward pass;
    - class blocks: the same cut into pieces, so that only the kept array is large, or, without
      `keep_exponentials`, nothing is: the backward pass computes the logits again;
    - row blocks: nothing kept, `row_block` rows of logits at a time.

    Args:
      features: (..., D) floating point.
      kernel: (D, classes).
      labels: (...,) integers in [0, classes). Outside, -1 included, loss and gradient are NaN
        unless `where` masks the example.
      margin: integer m >= 1, static; 1 gives plain softmax.
      lam: annealing λ >= 0, scalar, may be traced and infinite; its gradient is the true one.
      where: (...,) bool; False gives exactly zero loss and gradient, whatever the row holds.
      label_smoothing: e in [0, 1], a Python float.
      statistics: also return `Statistics`.
      memory_budget: bytes that (batch, classes) temporaries may take.
      row_block: rows at a time; forces row blocks.
      class_block: classes at a time; forces class blocks, `classes` itself being the one-shot.
      keep_exponentials: whether the backward pass reuses the forward's exponentials (three matrix
        products, batch x classes kept, in the operands' dtype where in blocks) or computes them
        again (four); None decides by the budget.

    Returns:
      (...,) float32, or float64 for float64 operands; with `statistics` a pair.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel = jnp.ones((2, 3)), jnp.eye(3)
      >>> lsm.lsoftmax_loss(features, kernel, jnp.array([0, 2]), margin=4, lam=5.0).round(3)
      Array([1.473, 1.473], dtype=float32)

    Source: Liu et al., ICML 2016.
    """
    call = Call.checked(features, kernel, labels, margin, lam, where, label_smoothing)
    knobs = Knobs(memory_budget, row_block, class_block, keep_exponentials).checked()
    plan = knobs.plan(*call.size, call.head.kernel.dtype, rows_cost_no_more=False)
    core = functools.partial(per_example, call.setting(plan))
    loss, seen = arguments.place(core, "batch", (*call.head[:3], call.lam))
    loss = call.mask(loss.reshape(call.head.batch_shape))
    if not statistics:
        return loss
    return loss, jax.tree.map(lambda value: value.reshape(call.head.batch_shape), seen)


def lsoftmax_loss_sum(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    weights: ArrayLike | None = None,
    *,
    margin: int,
    lam: ArrayLike = 0.0,
    where: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    row_block: int | None = None,
    class_block: int | None = None,
    keep_exponentials: bool | None = None,
) -> jax.Array:
    r"""The scalar sum of weights * `lsoftmax_loss`, its gradients computed in the forward pass.

    .. math:: L = \sum_i s_i \ell_i

    Under differentiation the forward pass computes the gradients of features and kernel as it
    goes and the backward pass only scales them: three matrix products and no kept logits in the
    one-shot and row-block plans. Called without differentiation it computes the loss alone.

    Args:
      weights: (...,) floating-point weights s of the examples, or None for ones; for a mean pass
        `jnp.full(labels.shape, 1 / labels.size)`. Their gradient is the loss of each example.
      features, kernel, labels, margin, lam, where, label_smoothing: as in `lsoftmax_loss`.
      memory_budget, row_block, class_block, keep_exponentials: as there, but row blocks need three
        matrix products and not four.

    Returns:
      scalar, float32, or float64 for float64 operands.

    Raises:
      TypeError, ValueError: an argument has the wrong type, shape or value; the message names it.

    Example:
      >>> import jax, jax.numpy as jnp, lsoftmax_jax as lsm
      >>> features, kernel, labels = jnp.ones((2, 3)), jnp.eye(3), jnp.array([0, 2])
      >>> mean = lambda w: lsm.lsoftmax_loss_sum(features, w, labels, jnp.full(2, 0.5), margin=4)
      >>> loss, gradient = jax.value_and_grad(mean)(kernel)
      >>> round(float(loss), 3), gradient.shape
      (3.832, (3, 3))

    Source: Liu et al., ICML 2016.
    """
    call = Call.checked(features, kernel, labels, margin, lam, where, label_smoothing)
    knobs = Knobs(memory_budget, row_block, class_block, keep_exponentials).checked()
    plan = knobs.plan(*call.size, call.head.kernel.dtype, rows_cost_no_more=True)
    weights = check_weights(weights, call.head.batch_shape, call.lam.dtype)
    weights = call.mask(weights).reshape(call.head.labels.shape)
    core = functools.partial(_sum, call.setting(plan))
    return arguments.place(core, "scalar", (*call.head[:3], call.lam, weights))


class Call(NamedTuple):
    """The checked arguments of a loss."""

    head: arguments.Head
    margin: int
    lam: jax.Array
    where: jax.Array | None
    label_smoothing: float
    classes: int

    @classmethod
    def checked(
        cls,
        features: ArrayLike,
        kernel: ArrayLike,
        labels: ArrayLike,
        margin: int,
        lam: ArrayLike,
        where: ArrayLike | None,
        label_smoothing: float,
        classes: int | None = None,
    ) -> "Call":
        margin = arguments.check_size("margin", margin)
        label_smoothing = arguments.check_fraction("label_smoothing", label_smoothing)
        features, kernel = arguments.check_features(features, kernel)
        dtype = arguments.promoted(features, kernel)
        lam = arguments.check_lam(lam, arguments.at_least_f32(dtype))
        where = arguments.check_mask(where, features.shape[:-1])
        if where is not None:
            # A masked row may hold NaN, which zero times its gradient would not silence.
            features = jnp.where(where[..., None], features, 0)
        classes = kernel.shape[1] if classes is None else classes
        head = arguments.flatten(features.astype(dtype), kernel.astype(dtype), labels, classes)
        if where is not None:
            head = head._replace(labels=jnp.where(where.reshape(-1), head.labels, 0))
        return cls(head, margin, lam, where, label_smoothing, classes)

    @property
    def size(self) -> tuple[int, int]:
        return self.head.features.shape[0], self.head.kernel.shape[1]

    def setting(self, plan: Plan) -> Setting:
        return Setting(self.margin, self.label_smoothing, plan, self.classes)

    def mask(self, values: jax.Array) -> jax.Array:
        return values if self.where is None else jnp.where(self.where, values, 0)


class Knobs(NamedTuple):
    """What the caller says about the plan."""

    memory_budget: int
    row_block: int | None
    class_block: int | None
    keep_exponentials: bool | None

    def checked(self) -> "Knobs":
        arguments.check_size("memory_budget", self.memory_budget)
        for name in ("row_block", "class_block"):
            if getattr(self, name) is not None:
                arguments.check_size(name, getattr(self, name))
        if self.row_block is not None and self.class_block is not None:
            raise ValueError(
                f"row_block and class_block exclude each other, "
                f"got {self.row_block} and {self.class_block}"
            )
        if not (self.keep_exponentials is None or isinstance(self.keep_exponentials, bool)):
            raise TypeError(
                f"keep_exponentials must be True, False or None, got {self.keep_exponentials!r}"
            )
        if self.row_block is not None and self.keep_exponentials:
            raise ValueError("row_block keeps no exponentials, got keep_exponentials=True")
        return self

    def plan(self, batch: int, classes: int, dtype: jnp.dtype, *, rows_cost_no_more: bool) -> Plan:
        """The fastest plan within the budget, as far as the caller leaves it open."""
        if self.row_block is not None:
            return Plan(row_block=min(self.row_block, max(batch, 1)), keep_exponentials=False)
        cells, wide = batch * classes, max(dtype.itemsize, 4)
        keep, block = self.keep_exponentials, self.class_block
        if block is None and keep is not False:
            rows = self.memory_budget // (wide * classes)
            if batch <= rows:
                return Plan()
            if keep is None and rows_cost_no_more and rows >= _FEWEST_ROWS:
                return Plan(row_block=rows // 64 * 64, keep_exponentials=False)
        if keep is None:
            keep = dtype.itemsize * cells <= self.memory_budget
        if block is None:
            # A block's logits and exponentials exist at once.
            affordable = self.memory_budget // (2 * wide * max(batch, 1)) // 128 * 128
            block = max(min(affordable, _MOST_CLASSES), _FEWEST_CLASSES)
        return Plan(class_block=min(block, classes), keep_exponentials=keep)


def check_weights(
    weights: ArrayLike | None, batch_shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
    if weights is None:
        return jnp.ones(batch_shape, dtype)
    weights = jnp.asarray(weights)
    if weights.shape != batch_shape:
        raise ValueError(f"weights must have the batch shape {batch_shape}, got {weights.shape}")
    if not jnp.issubdtype(weights.dtype, jnp.floating):
        raise TypeError(f"weights must be floating point, got dtype {weights.dtype}")
    return weights.astype(dtype)


# The loss of each example.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_example(
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    offset: jax.Array | None = None,
) -> tuple[jax.Array, Statistics]:
    """The core of `lsoftmax_loss`; no gradient for the `offset` of `Columns`."""
    return _per_example_fwd(setting, features, kernel, labels, lam, offset)[0]


def _per_example_fwd(
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    offset: jax.Array | None,
) -> tuple[tuple[jax.Array, Statistics], Any]:
    t = target_of(features, kernel, labels, lam, setting.margin)
    columns = Columns(kernel, offset)
    others, kept = summarise(setting, features, columns, labels)
    loss, z = loss_and_z(setting, t, others)
    return (loss, statistics_of(t, others)), (features, columns, labels, t, z, kept)


def _per_example_bwd(
    setting: Setting, residuals: Any, cotangents: tuple[jax.Array, Statistics]
) -> tuple[jax.Array, jax.Array, None, jax.Array, None]:
    features, columns, labels, t, z, kept = residuals
    row = gradient_row(setting, t, z, cotangents[0], features.dtype)
    dfeatures, dkernel = gradients(setting, features, columns, labels, row, kept)
    return dfeatures.astype(features.dtype), dkernel, None, jnp.sum(row.dlam), None


per_example.defvjp(_per_example_fwd, _per_example_bwd)


# The weighted sum, its gradients computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    # Not _sum_fwd(...)[0], which would pay for the gradients.
    return jnp.sum(weights * per_example(setting, features, kernel, labels, lam)[0])


def _sum_fwd(
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    lam: jax.Array,
    weights: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    def block(setting: Setting, rows: Any) -> tuple[jax.Array, Row, Any]:
        features, labels, t, weights = rows
        others, kept = summarise(setting, features, Columns(kernel), labels)
        loss, z = loss_and_z(setting, t, others)
        return loss, gradient_row(setting, t, z, weights, features.dtype), kept

    t = target_of(features, kernel, labels, lam, setting.margin)
    rows = features, labels, t, weights
    if setting.plan.row_block is None:
        loss, row, kept = block(setting, rows)
        dfeatures, dkernel = gradients(setting, features, Columns(kernel), labels, row, kept)
    else:

        def step(dkernel: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
            loss, row, kept = block(setting._replace(plan=Plan()), rows)
            dfeatures, change = block_gradients(rows[0], Columns(kernel), rows[1], row, kept)
            return dkernel + change, (loss, row, dfeatures)

        zeros = zeros_like_rows(kernel.shape, t.logit)
        dkernel, (loss, row, dfeatures) = scan_rows(step, zeros, setting.plan.row_block, rows)
        dfeatures, dkernel = add_along(features, kernel, labels, row, dfeatures, dkernel)
    dfeatures = dfeatures.astype(features.dtype)
    return jnp.sum(weights * loss), (dfeatures, dkernel, jnp.sum(row.dlam), loss)


def _sum_bwd(
    setting: Setting, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    return scaled_gradients(residuals, cotangent)


def scaled_gradients(
    gradients: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array | None, ...]:
    """What a sum's backward pass returns from (dfeatures, dkernel, dlam, dweights)."""
    dfeatures, dkernel, dlam, dweights = (
        (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)
        for gradient in gradients
    )
    return dfeatures, dkernel, None, dlam, dweights


_sum.defvjp(_sum_fwd, _sum_bwd)
