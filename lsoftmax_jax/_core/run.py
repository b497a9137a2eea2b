"""The losses on any device and mesh, each with a hand-written gradient.

Two custom rules serve all losses, on one device and on many: one for the loss of each example, one
for a weighted sum. A third serves the logits. Each jitted function takes the static `Spec` first,
so an eager call compiles once for its shapes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsoftmax_jax import _checks
from lsoftmax_jax._core import mesh
from lsoftmax_jax._core.blocks import (
    LogitGradient,
    Others,
    block_gradients,
    columns_with_norms,
    exchanged,
    features_with_norms,
    gradients,
    label_sums,
    logit_gradient,
    loss_of,
    plain_logits,
    products,
    scan_rows,
    stored_dtype,
    summarise,
    with_norms,
)
from lsoftmax_jax._core.mesh import anywhere, placed, vary_over, varying_axes, zeros_like_rows
from lsoftmax_jax._core.spec import Arrays, Pieces, Spec
from lsoftmax_jax._core.target import (
    Columns,
    LabelTerms,
    Rows,
    Target,
    columns_of,
    is_label,
    pulled_back,
    rows_of,
    target_of,
    view,
)


class Statistics(NamedTuple):
    """What a loss computed on its way, for each example; no gradient flows through it.

    `plain_logit > max_logit` says whether an example is classified correctly without the margin.
    Report its mean over the unmasked examples as the training accuracy.

    Attributes:
      target_cosine: cos(theta_y), (...,).
      target_logit: the label's logit with margin and annealing, (...,).
      plain_logit: the label's logit without margin, (...,).
      max_logit: the largest other logit, (...,).
      lam: λ of the example, (...,); 1 / (1 + λ) is the margin's share.
    """

    target_cosine: jax.Array
    target_logit: jax.Array
    plain_logit: jax.Array
    max_logit: jax.Array
    lam: jax.Array


@functools.partial(jax.jit, static_argnums=0, inline=True)
def losses(spec: Spec, arrays: Arrays) -> tuple[jax.Array, Statistics]:
    """The loss of each example, and the statistics."""

    def core(arrays: Arrays) -> tuple[jax.Array, Statistics]:
        where = arrays.where
        loss, seen = _losses(spec, cleaned(spec, arrays))
        return loss if where is None else jnp.where(where, loss, 0), seen

    if spec.layout is not None:
        return core(placed(spec.layout, arrays))
    return anywhere(core, "batch", arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def loss_sum(spec: Spec, arrays: Arrays) -> jax.Array:
    """The weighted sum of the losses."""

    def core(arrays: Arrays) -> jax.Array:
        return _sum(spec, cleaned(spec, arrays._replace(weights=weights_of(spec, arrays))))

    if spec.layout is not None:
        return core(placed(spec.layout, arrays))
    return anywhere(core, "scalar", arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def margin_logits(spec: Spec, arrays: Arrays) -> jax.Array:
    """The logits of each example, with the margin at the label."""

    def core(arrays: Arrays) -> jax.Array:
        shape = arrays.labels.shape
        arrays = flat(cleaned(spec, arrays))
        return _logits(spec, arrays).reshape(*shape, arrays.kernel.shape[1])

    return anywhere(core, "logits", arrays)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def inference_logits(spec: Spec, features: jax.Array, kernel: jax.Array) -> jax.Array:
    """The logits of each example without a label."""
    if not spec.unit_columns:
        return features.astype(spec.dtype) @ kernel.astype(spec.dtype)

    # The product is accumulated and scaled in float32: float16 ends at 65504 and 6e-8.
    def core(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        features, kernel = (array.astype(spec.dtype) for array in arrays)
        shape = features.shape[:-1]
        features = features.reshape(math.prod(shape), features.shape[-1])
        rows = rows_of(spec, features, jnp.zeros(math.prod(shape), jnp.int32))
        logits = plain_logits(rows, columns_of(spec, kernel))
        return logits.astype(spec.dtype).reshape(*shape, kernel.shape[1])

    return anywhere(core, "logits", (features, kernel))


def weights_of(spec: Spec, arrays: Arrays) -> jax.Array:
    """The weight of each example in a sum, 0 where it is masked."""
    dtype, weights = _checks.at_least_f32(spec.dtype), arrays.weights
    if weights is None:
        weights = jnp.ones(arrays.labels.shape, dtype)
        if (layout := spec.layout) is None:
            weights = vary_over(weights, varying_axes(arrays.features))
        else:
            weights = mesh.resharded(weights, layout.mesh, layout.rows)
    weights = weights.astype(dtype)
    return weights if arrays.where is None else jnp.where(arrays.where, weights, 0)


def cleaned(spec: Spec, arrays: Arrays) -> Arrays:
    """The arrays as the rules compute with them: one dtype, labels -1 outside, masked rows 0."""
    features, where = arrays.features.astype(spec.dtype), arrays.where
    labels = _checks.known_labels(arrays.labels, spec.classes)
    if where is not None:
        # A masked row may hold NaN, which a factor of zero would not remove from the gradient.
        features = jnp.where(where[..., None], features, 0)
        labels = jnp.where(where, labels, 0)
    wide = _checks.at_least_f32(spec.dtype)
    offset = None if arrays.offset is None else arrays.offset.astype(wide)
    return arrays._replace(
        features=features,
        kernel=arrays.kernel.astype(spec.dtype),
        labels=labels,
        lam=_checks.in_range(arrays.lam, wide),
        where=None,
        offset=offset,
        # Sampled columns stand for several classes each; see `Sample.offset`.
        classes=jnp.sum(jnp.exp(offset)) if offset is not None and spec.label_smoothing else None,
    )


# What both rules share, on one device or on each device of a mesh.


def flat(arrays: Arrays) -> Arrays:
    """With one batch axis."""
    shape = arrays.labels.shape
    if len(shape) == 1:
        return arrays
    rows = math.prod(shape)
    # Not reshape(-1, D): an empty batch has no -1 to infer.
    return arrays._replace(
        features=arrays.features.reshape(rows, arrays.features.shape[-1]),
        labels=arrays.labels.reshape(rows),
        weights=None if arrays.weights is None else arrays.weights.reshape(rows),
    )


class Pass(NamedTuple):
    """What a forward pass found: one row of each array is one example."""

    loss: Any
    t: Target
    others: Others
    rows: Rows
    columns: Columns
    kept: Any


def forward(spec: Spec, arrays: Arrays, rows: Rows, columns: Columns, terms: LabelTerms) -> Pass:
    """The pass over the rows, columns and terms of `view`."""
    others, kept = summarise(spec, rows, columns)
    terms, others = exchanged(spec, arrays.labels, terms, others)
    t = target_of(spec, terms, arrays.lam, others.peak)
    return Pass(loss_of(spec, t, others, classes_of(spec, arrays)), t, others, rows, columns, kept)


def statistics_of(found: Pass) -> Statistics:
    t = found.t
    seen = Statistics(t.cosine, t.logit, t.plain, found.others.peak, t.lam)
    return jax.tree.map(jax.lax.stop_gradient, seen)


def classes_of(spec: Spec, arrays: Arrays) -> Any:
    return spec.classes if arrays.classes is None else arrays.classes


def _backward(
    spec: Spec, arrays: Arrays, found: Pass, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of features and kernel, and of λ, from the cotangent of each row's loss."""
    cotangent, factor = fit_for_products(spec.dtype, cotangent, found.rows, found.columns)
    gradient = row_gradient(spec, arrays, found, cotangent)
    dfeatures, dkernel = gradients(spec.pieces, found.rows, found.columns, gradient, found.kept)
    dlam = jnp.zeros_like(arrays.lam) if gradient.dlam is None else jnp.sum(gradient.dlam)
    # Each device has its own factor.
    dfeatures = mesh.sum_of_features(spec.layout, times(factor, dfeatures))
    return dfeatures, times(factor, dkernel), times(factor, dlam)


def row_gradient(spec: Spec, arrays: Arrays, found: Pass, cotangent: jax.Array) -> LogitGradient:
    classes = classes_of(spec, arrays)
    gradient = logit_gradient(spec, found.t, found.others, classes, cotangent)
    along = gradient.target.along_feature
    if spec.layout is None or along is None:
        return gradient
    # The device that holds the row's class adds the term along the features, once.
    along = jnp.where(found.rows.labels >= 0, along, 0)
    return gradient._replace(target=gradient.target._replace(along_feature=along))


def fit_for_products(
    dtype: jnp.dtype, cotangent: jax.Array, rows: Rows, columns: Columns
) -> tuple[jax.Array, jax.Array | None]:
    """The cotangent divided by a power of two that suits float16, and that power.

    The logits' gradient is cast to float16 for the products, times the lengths that `products` puts
    into it. Whatever the caller's loss scale and these lengths, its largest entry then lies well
    inside the range of float16. Small entries stay above 6e-8 unless a row or a column is thousands
    of times shorter than the others.
    """
    if dtype != jnp.float16:
        return cotangent, None
    cotangent = cotangent.astype(jnp.float32)
    over_classes = tuple(range(1, cotangent.ndim))  # the logits' cotangent has one number a class
    entries = jnp.max(jnp.abs(cotangent), axis=over_classes, initial=0)
    largest = jnp.max(entries if rows.scale is None else entries * rows.scale, initial=0)
    if (lengths := columns.inverse_norm) is not None:
        if columns.offset is not None:
            # A column that only fills up the last shard may be short.
            lengths = jnp.where(columns.offset > -jnp.inf, lengths, 0)
        largest = largest * jnp.max(lengths, initial=0)
    some = (largest > 0) & (largest < jnp.inf)
    # Times 2**6: a slope of m² up to 256 stays below 65504.
    factor = jnp.where(some, jnp.exp2(jnp.floor(jnp.log2(jnp.where(some, largest, 1))) - 6), 1)
    return cotangent / factor, factor


def times(factor: jax.Array | None, array: jax.Array) -> jax.Array:
    return array if factor is None else array * factor


# The loss of each example. The gradient of `Arrays` is an `Arrays`: labels and offset have none.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(spec: Spec, arrays: Arrays) -> tuple[jax.Array, Statistics]:
    return _losses_fwd(spec, arrays)[0]


def _losses_fwd(spec: Spec, arrays: Arrays) -> tuple[tuple[jax.Array, Statistics], Any]:
    layout = spec.layout

    def local(arrays: Arrays) -> Any:
        shape = arrays.labels.shape
        arrays = mesh.all_rows(layout, flat(arrays))
        found = forward(spec, arrays, *view(spec, arrays))
        outputs = mesh.own_rows(layout, (found.loss, statistics_of(found)))
        outputs = jax.tree.map(lambda array: array.reshape(shape), outputs)
        # The residuals hold the kernel already, and the backward pass needs no loss.
        found = found._replace(loss=None, columns=found.columns._replace(kernel=None))
        return outputs, mesh.stacked(layout, found)

    if layout is not None:
        out_specs = layout.rows, layout.own
        local = mesh.on_devices(layout, local, (mesh.splits(layout),), out_specs)
    outputs, found = local(arrays)
    return outputs, (arrays._replace(features=None, weights=None), found)


def _losses_bwd(
    spec: Spec, residuals: Any, cotangents: tuple[jax.Array, Statistics]
) -> tuple[Arrays]:
    layout, (arrays, found) = spec.layout, residuals

    def local(arrays: Arrays, found: Pass, cotangent: jax.Array) -> Any:
        found = mesh.unstacked(layout, found)
        found = found._replace(columns=found.columns._replace(kernel=arrays.kernel))
        shape = cotangent.shape
        cotangent = mesh.all_cotangents(layout, cotangent.reshape(math.prod(shape)))
        dfeatures, dkernel, dlam = _backward(spec, arrays, found, cotangent)
        dfeatures = dfeatures.astype(spec.dtype).reshape(*shape, dfeatures.shape[-1])
        dkernel, dlam = mesh.over_data(layout, (dkernel, dlam))
        return dfeatures, dkernel.astype(spec.dtype), dlam

    if layout is not None:
        in_specs = mesh.splits(layout), layout.own, layout.rows
        out_specs = layout.rows, layout.columns, P()
        local = mesh.on_devices(layout, local, in_specs, out_specs)
    dfeatures, dkernel, dlam = local(arrays, found, cotangents[0])
    return (Arrays(dfeatures, dkernel, None, dlam),)


_losses.defvjp(_losses_fwd, _losses_bwd)


# The weighted sum, its gradients computed in the forward pass.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(spec: Spec, arrays: Arrays) -> jax.Array:
    # Not _sum_fwd(...)[0], which would compute the gradients too.
    return jnp.sum(arrays.weights * _losses(spec, arrays._replace(weights=None))[0])


def _sum_fwd(spec: Spec, arrays: Arrays) -> tuple[jax.Array, Any]:
    layout = spec.layout

    def local(arrays: Arrays) -> Any:
        shape = arrays.labels.shape
        arrays = mesh.all_rows(layout, flat(arrays))
        if spec.pieces.row_block is not None and layout is None:
            losses, dfeatures, dkernel, dlam = _one_pass(spec, arrays)
        else:
            found = forward(spec, arrays, *view(spec, arrays))
            dfeatures, dkernel, dlam = _backward(spec, arrays, found, arrays.weights)
            losses = found.loss
        total, dlam, dkernel = mesh.over_data(
            layout, (jnp.sum(arrays.weights * losses), dlam, dkernel)
        )
        losses = mesh.own_rows(layout, losses).reshape(shape)
        dfeatures = dfeatures.astype(stored_dtype(spec.dtype))
        dfeatures = dfeatures.reshape(*shape, dfeatures.shape[-1])
        return total, dfeatures, dkernel, dlam, losses

    if layout is not None:
        out_specs = P(), layout.rows, layout.columns, P(), layout.rows
        local = mesh.on_devices(layout, local, (mesh.splits(layout),), out_specs)
    total, dfeatures, dkernel, dlam, losses = local(arrays)
    return total, Arrays(dfeatures, dkernel, None, dlam, weights=losses)


def _one_pass(spec: Spec, arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(losses, dfeatures, dkernel, dλ), the logits of a block of rows computed once."""
    rows, columns, terms = view(spec, arrays)
    weights, factor = fit_for_products(spec.dtype, arrays.weights, rows, columns)
    size: Any = spec.pieces.row_block
    one_shot = spec._replace(pieces=Pieces())

    def step(dkernel: jax.Array, block: Any) -> tuple[jax.Array, Any]:
        rows, terms, weights = block
        found = forward(one_shot, arrays, rows, columns, terms)
        gradient = row_gradient(spec, arrays, found, weights)
        dfeatures, change = block_gradients(rows, columns, gradient, found.kept)
        return dkernel + change, (found.loss, gradient, dfeatures)

    zeros = zeros_like_rows(columns.kernel.shape, weights)
    dkernel, (losses, gradient, dfeatures) = scan_rows(step, zeros, size, (rows, terms, weights))
    dfeatures, dkernel = with_norms(rows, columns, gradient, dfeatures, dkernel)
    dlam = jnp.zeros_like(arrays.lam) if gradient.dlam is None else jnp.sum(gradient.dlam)
    return losses, *(times(factor, array) for array in (dfeatures, dkernel, dlam))


def _sum_bwd(spec: Spec, gradient: Arrays, cotangent: jax.Array) -> tuple[Arrays]:
    def scaled(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return (cotangent * array.astype(cotangent.dtype)).astype(dtype)

    return (
        gradient._replace(
            features=scaled(gradient.features, spec.dtype),
            kernel=scaled(gradient.kernel, spec.dtype),
            lam=scaled(gradient.lam, cotangent.dtype),
            weights=scaled(gradient.weights, cotangent.dtype),
        ),
    )


_sum.defvjp(_sum_fwd, _sum_bwd)


# The logits.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logits(spec: Spec, arrays: Arrays) -> jax.Array:
    return _logits_fwd(spec, arrays)[0]


def _logits_fwd(spec: Spec, arrays: Arrays) -> tuple[jax.Array, Any]:
    labels = arrays.labels
    rows, columns, terms = view(spec, arrays)
    plain = plain_logits(rows, columns)
    at_label = is_label(labels, plain.shape[1])
    lowest = jnp.finfo(plain.dtype).min
    rival = None
    if spec.rule is not None:
        rival = jnp.max(jnp.where(at_label, lowest, plain)[:, : spec.classes], axis=1)
    t = target_of(spec, terms, arrays.lam, rival)
    logits = jnp.where(at_label, t.logit[:, None], plain)
    logits = _checks.nan_unless(labels[:, None] >= 0, logits).astype(spec.dtype)
    return logits, (arrays.lam, rows, columns, t)


def _logits_bwd(spec: Spec, residuals: Any, cotangent: jax.Array) -> tuple[Arrays]:
    lam, rows, columns, t = residuals
    labels, width = rows.labels, columns.kernel.shape[1]
    at_label = is_label(labels, width)
    cotangent, factor = fit_for_products(spec.dtype, cotangent, rows, columns)
    g = jnp.sum(jnp.where(at_label, cotangent, 0), axis=1, dtype=t.alpha.dtype)
    g = _checks.nan_unless(labels >= 0, g)
    pull = pulled_back(g, t, spec.dtype)
    grad = jnp.where(at_label, pull.plain[:, None], cotangent.astype(g.dtype))
    grad = _checks.nan_unless(labels[:, None] >= 0, grad)
    dfeatures, dkernel = products(rows, columns, grad)
    sums = label_sums(pull.along_column, labels, width)
    dfeatures = features_with_norms(rows, pull, dfeatures, width)
    dkernel = columns_with_norms(columns, sums, dkernel)
    dlam = jnp.zeros_like(lam) if t.dlam is None else times(factor, jnp.sum(g * t.dlam))
    dfeatures, dkernel = (times(factor, array).astype(spec.dtype) for array in (dfeatures, dkernel))
    return (Arrays(dfeatures, dkernel, None, dlam),)


_logits.defvjp(_logits_fwd, _logits_bwd)
