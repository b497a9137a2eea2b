"""The fused loss of the large-margin softmax: one algebra, several plans.

For a row with target logit t and the logsumexp Z of the OTHER logits:

    loss = softplus(Z - t) = logsumexp(all) - t,    g = dloss/dt = -sigmoid(Z - t)

softplus keeps the digits of a small loss, which the difference of two large numbers has lost.
With G the gradient of the logits, G_j = -g exp(z_j - Z) for j != y and G_y = g alpha, the
gradients are the two matrix products of plain softmax, a scaled copy of features and a scaled
copy of the kernel (`Target` has alpha, row and column):

    dfeatures = G kernel^T + diag(g row) features
    dkernel = features^T G + kernel diag(sum over the rows of each class of g column)

A plan says in which pieces the (batch, classes) arrays exist; it never changes the numbers.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lsoftmax_jax import arguments
from lsoftmax_jax.logits import (
    Pull,
    along_columns,
    along_rows,
    column_sums,
    features_gradient,
    hits,
    kernel_gradient,
    product,
    pull_target,
    target_of,
)
from lsoftmax_jax.margin import Target

DEFAULT_MEMORY_BUDGET = 2**30  # bytes
# Row blocks below this many rows starve the matrix units; class blocks win there.
_FEWEST_ROWS = 704
_FEWEST_CLASSES = 512

Carry = TypeVar("Carry")


class Statistics(NamedTuple):
    """What the loss saw of each row, at no second pass; no gradients flow through it.

    `plain_logit > max_logit` is the margin-free hit, the one to report as training accuracy.
    """

    target_cosine: jax.Array  # cos(theta_y)
    target_logit: jax.Array  # with margin and annealing
    plain_logit: jax.Array  # features . kernel_y
    max_logit: jax.Array  # the largest other logit


class Plan(NamedTuple):
    """In which pieces the (batch, classes) arrays exist. Static."""

    row_block: int | None = None  # rows at a time, all classes
    class_block: int | None = None  # classes at a time, all rows
    keep_exponentials: bool = True  # for the backward pass; otherwise it recomputes the logits


class Setting(NamedTuple):
    margin: int
    label_smoothing: float
    plan: Plan
    classes: int  # of the whole head, of which a kernel may hold a shard


class Others(NamedTuple):
    """A row's logits but the target's, summarised: sum exp(z - peak), sum z."""

    peak: jax.Array  # the largest; the lowest finite number where there is none
    mass: jax.Array
    total: jax.Array  # 0 unless label smoothing asks for it


class Row(NamedTuple):
    """What the gradient of a row's logits is made of."""

    z: jax.Array  # logsumexp of the other logits
    others: jax.Array  # the weight of exp(z_j - z) in the other logits' gradient
    uniform: jax.Array  # what label smoothing takes off every one of them
    target: Pull
    dlam: jax.Array


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
    call = _Call.checked(features, kernel, labels, margin, lam, where, label_smoothing)
    plan = call.plan(memory_budget, row_block, class_block, keep_exponentials, summed=False)
    core = functools.partial(_loss, call.setting(plan))
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
      weights: (...,) real weights s of the examples, or None for ones; for a mean pass
        `jnp.full(labels.shape, 1 / labels.size)`. Their gradient is the loss of each example.
      features, kernel, labels, margin, lam, where, label_smoothing, memory_budget, row_block,
        class_block, keep_exponentials: as in `lsoftmax_loss`; row blocks need three matrix
        products here and not four.

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
    call = _Call.checked(features, kernel, labels, margin, lam, where, label_smoothing)
    plan = call.plan(memory_budget, row_block, class_block, keep_exponentials, summed=True)
    weights = _check_weights(weights, call.head.batch_shape, call.lam.dtype)
    weights = call.mask(weights).reshape(call.head.labels.shape)
    core = functools.partial(_sum, call.setting(plan))
    return arguments.place(core, "scalar", (*call.head[:3], call.lam, weights))


class _Call(NamedTuple):
    """The checked arguments of a loss."""

    head: arguments.Head
    margin: int
    lam: jax.Array
    where: jax.Array | None
    label_smoothing: float

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
    ) -> "_Call":
        margin = arguments.check_margin(margin)
        label_smoothing = arguments.check_fraction("label_smoothing", label_smoothing)
        features, kernel = arguments.check_features(features, kernel)
        dtype = arguments.promoted(features, kernel)
        lam = arguments.check_lam(lam, arguments.at_least_f32(dtype))
        where = arguments.check_mask(where, features.shape[:-1])
        if where is not None:
            # A masked row may hold NaN, which zero times its gradient would not silence.
            features = jnp.where(where[..., None], features, 0)
        head = arguments.flatten(features.astype(dtype), kernel.astype(dtype), labels)
        if where is not None:
            head = head._replace(labels=jnp.where(where.reshape(-1), head.labels, 0))
        return cls(head, margin, lam, where, label_smoothing)

    def setting(self, plan: Plan) -> Setting:
        return Setting(self.margin, self.label_smoothing, plan, self.head.kernel.shape[1])

    def mask(self, values: jax.Array) -> jax.Array:
        return values if self.where is None else jnp.where(self.where, values, 0)

    def plan(
        self,
        budget: int,
        row_block: int | None,
        class_block: int | None,
        keep: bool | None,
        summed: bool,
    ) -> Plan:
        """The fastest plan within the budget, as far as the caller leaves it open."""
        _check_knobs(budget, row_block, class_block, keep)
        (batch, _), (_, classes) = self.head.features.shape, self.head.kernel.shape
        itemsize = self.head.kernel.dtype.itemsize
        cells = batch * classes
        fits = max(itemsize, 4) * cells <= budget
        affordable = budget // max(itemsize, 4)
        if row_block is not None:
            return Plan(row_block=min(row_block, max(batch, 1)), keep_exponentials=False)
        if class_block is None and fits and keep is not False:
            return Plan()
        rows = affordable // classes
        if class_block is None and summed and keep is None and rows >= _FEWEST_ROWS:
            return Plan(row_block=rows // 64 * 64, keep_exponentials=False)
        if class_block is None:
            # A block's logits and exponentials exist at once.
            columns = affordable // (2 * max(batch, 1)) // 128 * 128
            class_block = max(min(columns, 8192), _FEWEST_CLASSES)
        if keep is None:
            keep = itemsize * cells <= budget
        return Plan(class_block=min(class_block, classes), keep_exponentials=keep)


def _check_knobs(
    budget: int, row_block: int | None, class_block: int | None, keep: bool | None
) -> None:
    counts = {"memory_budget": budget, "row_block": row_block, "class_block": class_block}
    for name, value in counts.items():
        if name != "memory_budget" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a Python int, got {value!r}")
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if row_block is not None and class_block is not None:
        raise ValueError(
            f"row_block and class_block exclude each other, got {row_block} and {class_block}"
        )
    if not (keep is None or isinstance(keep, bool)):
        raise TypeError(f"keep_exponentials must be True, False or None, got {keep!r}")
    if row_block is not None and keep:
        raise ValueError("row_block keeps no exponentials, got keep_exponentials=True")


def _check_weights(
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
def _loss(
    setting: Setting, features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array
) -> tuple[jax.Array, Statistics]:
    return _loss_fwd(setting, features, kernel, labels, lam)[0]


def _loss_fwd(
    setting: Setting, features: jax.Array, kernel: jax.Array, labels: jax.Array, lam: jax.Array
) -> tuple[tuple[jax.Array, Statistics], Any]:
    t = target_of(features, kernel, labels, lam, setting.margin)
    others, kept = summarise(setting, features, kernel, labels)
    loss, z = loss_and_z(setting, t, others)
    residuals = features, kernel, labels, t, z, kept
    return (loss, statistics_of(t, others)), residuals


def _loss_bwd(
    setting: Setting, residuals: Any, cotangents: tuple[jax.Array, Statistics]
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    features, kernel, labels, t, z, kept = residuals
    row = gradient_row(setting, t, z, cotangents[0], features.dtype)
    dfeatures, dkernel = gradients(setting, features, kernel, labels, row, kept)
    return dfeatures, dkernel, None, jnp.sum(row.dlam)


_loss.defvjp(_loss_fwd, _loss_bwd)


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
    return jnp.sum(weights * _loss(setting, features, kernel, labels, lam)[0])


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
        others, kept = summarise(setting, features, kernel, labels)
        loss, z = loss_and_z(setting, t, others)
        return loss, gradient_row(setting, t, z, weights, features.dtype), kept

    t = target_of(features, kernel, labels, lam, setting.margin)
    rows = features, labels, t, weights
    if setting.plan.row_block is None:
        loss, row, kept = block(setting, rows)
        dfeatures, dkernel = gradients(setting, features, kernel, labels, row, kept)
    else:

        def step(dkernel: jax.Array, rows: Any) -> tuple[jax.Array, Any]:
            loss, row, kept = block(setting._replace(plan=Plan()), rows)
            dfeatures, change = block_gradients(setting, rows[0], kernel, rows[1], row, kept)
            return dkernel + change, (loss, row, dfeatures)

        zeros = _zeros(kernel.shape, t.logit)
        dkernel, (loss, row, dfeatures) = _scan_rows(step, zeros, setting.plan.row_block, rows)
        dfeatures, dkernel = _finish(features, kernel, labels, row, dfeatures, dkernel)
    return jnp.sum(weights * loss), (dfeatures, dkernel, jnp.sum(row.dlam), loss)


def _sum_bwd(
    setting: Setting, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array, jax.Array]:
    dfeatures, dkernel, dlam, loss = (
        (cotangent * gradient.astype(cotangent.dtype)).astype(gradient.dtype)
        for gradient in residuals
    )
    return dfeatures, dkernel, None, dlam, loss


_sum.defvjp(_sum_fwd, _sum_bwd)


# The algebra: a row's other logits, its loss, its gradient.


def summarise(
    setting: Setting, features: jax.Array, kernel: jax.Array, labels: jax.Array
) -> tuple[Others, Any]:
    """Every row's other logits over the whole kernel, and what the plan keeps for `gradients`."""
    plan, totals = setting.plan, setting.label_smoothing > 0

    def block(start: Any, features: jax.Array, columns: jax.Array, labels: jax.Array) -> Any:
        logits = product(features, columns)
        return _summary(logits, hits(labels - start, columns.shape[1]), totals)

    if plan.row_block is not None:
        _, others = _scan_rows(
            lambda _, rows: (None, block(0, rows[0], kernel, rows[1])[0]),
            None,
            plan.row_block,
            (features, labels),
        )
        return others, None
    if plan.class_block is None:
        others, exponentials = block(0, features, kernel, labels)
        return others, (exponentials, others.peak)

    def step(others: Others, start: Any, columns: jax.Array, _: None) -> tuple[Others, Any]:
        more, exponentials = block(start, features, columns, labels)
        kept = (exponentials.astype(features.dtype), more.peak) if plan.keep_exponentials else None
        return merge(others, more), kept

    none = _zeros(labels.shape, product(features[:, :0], kernel[:0, :0]))
    nothing = Others(none + jnp.finfo(none.dtype).min, none, none)
    return _scan_classes(step, nothing, kernel, plan.class_block, (None, None))


def _summary(logits: jax.Array, hit: jax.Array, totals: bool) -> tuple[Others, jax.Array]:
    """The other logits of a block, and exp(z - peak), 0 at the target."""
    others = jnp.where(hit, -jnp.inf, logits)
    # The lowest finite number rather than -inf where there is no other class: no inf - inf.
    lowest = jnp.finfo(logits.dtype).min
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(others, axis=1), lowest))
    exponentials = jnp.exp(others - peak[:, None])
    total = jnp.sum(jnp.where(hit, 0, logits), axis=1) if totals else jnp.zeros_like(peak)
    return Others(peak, jnp.sum(exponentials, axis=1), total), exponentials


def merge(one: Others, two: Others) -> Others:
    peak = jnp.maximum(one.peak, two.peak)
    mass = one.mass * jnp.exp(one.peak - peak) + two.mass * jnp.exp(two.peak - peak)
    return Others(peak, mass, one.total + two.total)


def loss_and_z(setting: Setting, t: Target, others: Others) -> tuple[jax.Array, jax.Array]:
    """The loss and the logsumexp of the other logits, the lowest finite number without any."""
    some = others.mass != 0
    z = jnp.where(some, others.peak + jnp.log(jnp.where(some, others.mass, 1)), others.peak)
    loss = jax.nn.softplus(z - t.logit)
    if setting.label_smoothing:
        mean = (t.logit + others.total) / setting.classes
        loss = loss + setting.label_smoothing * (t.logit - mean)
    return loss, z


def statistics_of(t: Target, others: Others) -> Statistics:
    seen = Statistics(t.cosine, t.logit, t.plain, others.peak)
    return jax.tree.map(jax.lax.stop_gradient, seen)


def gradient_row(
    setting: Setting, t: Target, z: jax.Array, weight: jax.Array, dtype: jnp.dtype
) -> Row:
    """From the cotangent `weight` of the row's loss, for matrix products in `dtype`."""
    smoothing, classes = setting.label_smoothing, setting.classes
    others = weight * jax.nn.sigmoid(z - t.logit)
    g = weight * (smoothing * (1 - 1 / classes)) - others
    return Row(z, others, weight * (smoothing / classes), pull_target(g, t, dtype), g * t.lam)


def gradients(
    setting: Setting,
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    row: Row,
    kept: Any,
) -> tuple[jax.Array, jax.Array]:
    """dfeatures and dkernel, in the operands' dtype, by the plan."""
    plan = setting.plan
    if plan.row_block is not None:

        def row_step(dkernel: jax.Array, rows: Any) -> tuple[jax.Array, jax.Array]:
            features, labels, row = rows
            dfeatures, change = block_gradients(setting, features, kernel, labels, row, None)
            return dkernel + change, dfeatures

        dkernel, dfeatures = _scan_rows(
            row_step, _zeros(kernel.shape, row.z), plan.row_block, (features, labels, row)
        )
        return _finish(features, kernel, labels, row, dfeatures, dkernel)
    if plan.class_block is None:
        dfeatures, dkernel = block_gradients(setting, features, kernel, labels, row, kept)
        return _finish(features, kernel, labels, row, dfeatures, dkernel)
    sums = column_sums(row.target.column, labels, kernel.shape[1])

    def class_step(carry: Any, start: Any, columns: jax.Array, kept: Any) -> tuple[Any, None]:
        dfeatures, dkernel = carry
        change, dcolumns = block_gradients(setting, features, columns, labels - start, row, kept)
        mine = jax.lax.dynamic_slice_in_dim(sums, start, columns.shape[1])
        dcolumns = (dcolumns + along_columns(mine, columns)).astype(kernel.dtype)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, dcolumns, start, axis=1)
        return (dfeatures + change, dkernel), None

    carry = along_rows(row.target.row, features), _zeros(kernel.shape, row.z).astype(kernel.dtype)
    (dfeatures, dkernel), _ = _scan_classes(class_step, carry, kernel, plan.class_block, kept)
    return dfeatures.astype(features.dtype), dkernel


def block_gradients(
    setting: Setting,
    features: jax.Array,
    columns: jax.Array,
    labels: jax.Array,
    row: Row,
    kept: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """The two products with the logits' gradient, for the block of classes in `columns`.

    Labels count from the block's first class. What was kept is (exp(z - peak), peak) with
    another peak for each block; without, the logits are computed again.
    """
    hit = hits(labels, columns.shape[1])
    if kept is None:
        others = jnp.where(hit, -jnp.inf, product(features, columns))
        exponentials, scale = jnp.exp(others - row.z[:, None]), row.others
    else:
        exponentials, scale = kept[0], row.others * jnp.exp(kept[1] - row.z)
    grad = exponentials.astype(scale.dtype) * scale[:, None]
    if setting.label_smoothing:
        grad = grad - row.uniform[:, None]
    grad = jnp.where(hit, row.target.at_target[:, None], grad).astype(features.dtype)
    return features_gradient(grad, columns), kernel_gradient(features, grad)


def _finish(
    features: jax.Array,
    kernel: jax.Array,
    labels: jax.Array,
    row: Row,
    dfeatures: jax.Array,
    dkernel: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Adds what the target's norm and angle contribute along features and kernel."""
    dfeatures = dfeatures + along_rows(row.target.row, features)
    sums = column_sums(row.target.column, labels, kernel.shape[1])
    dkernel = dkernel + along_columns(sums, kernel)
    return dfeatures.astype(features.dtype), dkernel.astype(kernel.dtype)


# Loops over blocks of rows and of classes; a ragged tail is a block of its own, nothing is padded.


def _scan_rows(
    step: Callable[[Carry, Any], tuple[Carry, Any]], carry: Carry, block: int, rows: Any
) -> tuple[Carry, Any]:
    """Like `lax.scan(step, carry, rows)` with `block` rows a step."""
    count = jax.tree.leaves(rows)[0].shape[0]
    whole = count // block * block
    pieces = jax.tree.map(lambda r: r[:whole].reshape(-1, block, *r.shape[1:]), rows)
    carry, outputs = jax.lax.scan(step, carry, pieces)
    outputs = jax.tree.map(lambda r: r.reshape(whole, *r.shape[2:]), outputs)
    if whole < count:
        carry, last = step(carry, jax.tree.map(lambda r: r[whole:], rows))
        outputs = jax.tree.map(lambda *parts: jnp.concatenate(parts), outputs, last)
    return carry, outputs


def _scan_classes(
    step: Callable[[Carry, Any, jax.Array, Any], tuple[Carry, Any]],
    carry: Carry,
    kernel: jax.Array,
    block: int,
    kept: tuple[Any, Any],
) -> tuple[Carry, tuple[Any, Any]]:
    """step(carry, first class, columns, kept of the block) -> (carry, kept), block by block.

    What is kept is a pair: of the full blocks, stacked, and of the tail.
    """
    count = kernel.shape[1] // block

    def body(carry: Carry, piece: Any) -> tuple[Carry, Any]:
        index, kept = piece
        columns = jax.lax.dynamic_slice_in_dim(kernel, index * block, block, axis=1)
        return step(carry, index * block, columns, kept)

    carry, stacked = jax.lax.scan(body, carry, (jnp.arange(count, dtype=jnp.int32), kept[0]))
    tail = None
    if count * block < kernel.shape[1]:
        carry, tail = step(carry, count * block, kernel[:, count * block :], kept[1])
    return carry, (stacked, tail)


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Zeros of the dtype of `like`, varying over devices as it does inside `jax.shard_map`."""
    return arguments.vary_over(jnp.zeros(shape, like.dtype), arguments.varying_axes(like))
