"""The paper's formula, literally: arccos, k = floor(m theta / pi), logsumexp.

The formula is written twice: in float64 NumPy, with gradients by the chain rule through theta, and
in mpmath with 60 digits, with gradients by central differences. Neither shares code or algebra with
the library. This file also makes test problems and compares results.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import mpmath
import numpy as np

DIGITS = 60
STEP = "1e-20"


class Problem(NamedTuple):
    """One classification problem in float64."""

    features: np.ndarray
    kernel: np.ndarray
    labels: np.ndarray


class Gradients(NamedTuple):
    """Gradients by the arguments of a loss; only a sum has weights."""

    features: Any
    kernel: Any
    lam: Any = None
    weights: Any = None


def problem(seed: int, batch: int, dim: int, classes: int, scale: float = 1.0) -> Problem:
    """Target angles spread evenly over (0, pi), so that every k of every margin occurs."""
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((dim, classes))
    labels = rng.integers(classes, size=batch)
    column = kernel[:, labels].T
    along = column / np.linalg.norm(column, axis=1, keepdims=True)
    across = rng.standard_normal((batch, dim))
    across -= np.sum(across * along, axis=1, keepdims=True) * along
    across /= np.linalg.norm(across, axis=1, keepdims=True)
    theta = np.pi * (rng.permutation(batch)[:, None] + 0.37) / batch
    norm = scale * rng.uniform(0.5, 2.0, size=(batch, 1))
    return Problem(norm * (np.cos(theta) * along + np.sin(theta) * across), kernel, labels)


# (feature, scale of the kernel); the target's column points along the first axis.
EXTREMES = {
    "zero feature row": ([0.0, 0.0], 1.0),
    "zero kernel": ([0.5, 0.8], 0.0),
    "all zero": ([0.0, 0.0], 0.0),
    "theta zero": ([1.0, 0.0], 1.0),
    "theta pi": ([-1.0, 0.0], 1.0),
    "knot of even margins": ([0.0, 1.0], 1.0),
    "knot of margin 4": ([1.0, 1.0], 1.0),
    "nearly parallel": ([1.0, 1e-4], 1.0),
    "cosine over 1 by rounding": ([0.1, 0.0], 3.3),
    "tiny features": ([1e-20, 2e-20], 1.0),
    "huge features": ([1e15, -2e15], 1.0),
    "huge features along the column": ([1e15, 0.0], 1.0),
    "tiny kernel": ([-0.4, 0.9], 1e-20),
    "huge kernel": ([-0.4, 0.9], 1e15),
    "huge kernel along the feature": ([1.0, 0.0], 1e15),
}


def extreme_problems(classes: int) -> Problem:
    """One example for each of EXTREMES, stacked along a first axis for vmap."""
    features = np.array([[feature] for feature, _ in EXTREMES.values()])
    scales = np.array([scale for _, scale in EXTREMES.values()])
    angles = 2 * np.pi * np.arange(classes) / classes
    kernel = scales[:, None, None] * np.array([np.cos(angles), np.sin(angles)])
    return Problem(features, kernel, np.zeros((len(EXTREMES), 1), int))


def as_arrays(problem, dtype):
    features, kernel, labels = problem
    return jnp.asarray(features, dtype), jnp.asarray(kernel, dtype), jnp.asarray(labels, jnp.int32)


def assert_close(actual, wanted, tolerance):
    """Bounds the largest difference, relative to the largest wanted entry."""
    actual, wanted = np.asarray(actual, np.float64), np.asarray(wanted, np.float64)
    assert actual.shape == wanted.shape
    assert np.max(np.abs(actual - wanted), initial=0) <= tolerance * np.max(
        np.abs(wanted), initial=0
    )


def psi_of_theta(theta, margin):
    k = np.clip(np.floor(margin * theta / np.pi), 0, margin - 1)
    return (-1.0) ** k * np.cos(margin * theta) - 2 * k


def psi_slope_of_theta(theta, margin):
    k = np.clip(np.floor(margin * theta / np.pi), 0, margin - 1)
    return -((-1.0) ** k) * margin * np.sin(margin * theta)


def psi(cosine, margin):
    return psi_of_theta(np.arccos(np.clip(cosine, -1, 1)), margin)


def target_weights(lam):
    """Weights of cos(theta) and psi(theta) in the annealed target; (1, 0) for λ = infinity."""
    margin_weight = 1.0 / (1.0 + lam)
    return 1.0 - margin_weight, margin_weight


def target_geometry(features, kernel, labels):
    column = kernel[:, labels].T
    feature_norm = np.sqrt(np.sum(features**2, axis=1))
    column_norm = np.sqrt(np.sum(column**2, axis=1))
    cosine = np.sum(features * column, axis=1) / (feature_norm * column_norm)
    return column, feature_norm, column_norm, np.arccos(np.clip(cosine, -1, 1))


def logits(features, kernel, labels, margin, lam=0.0):
    _, feature_norm, column_norm, theta = target_geometry(features, kernel, labels)
    plain, large = target_weights(lam)
    result = features @ kernel
    blend = plain * np.cos(theta) + large * psi_of_theta(theta, margin)
    result[np.arange(len(labels)), labels] = feature_norm * column_norm * blend
    return result


def logits_pullback(features, kernel, labels, cotangent, margin, lam=0.0):
    """Cotangents of (features, kernel, lam) for a cotangent of the logits."""
    rows = np.arange(len(labels))
    column, feature_norm, column_norm, theta = target_geometry(features, kernel, labels)
    plain, large = target_weights(lam)
    norm = feature_norm * column_norm
    blend = plain * np.cos(theta) + large * psi_of_theta(theta, margin)
    slope = -plain * np.sin(theta) + large * psi_slope_of_theta(theta, margin)

    unit_feature = features / feature_norm[:, None]
    unit_column = column / column_norm[:, None]
    turn = -1 / np.sin(theta)[:, None]
    cosine = np.cos(theta)[:, None]
    theta_by_feature = turn * (unit_column - cosine * unit_feature) / feature_norm[:, None]
    theta_by_column = turn * (unit_feature - cosine * unit_column) / column_norm[:, None]
    by_feature = (column_norm * blend)[:, None] * unit_feature
    by_feature += (norm * slope)[:, None] * theta_by_feature
    by_column = (feature_norm * blend)[:, None] * unit_column
    by_column += (norm * slope)[:, None] * theta_by_column
    by_lam = norm * (np.cos(theta) - psi_of_theta(theta, margin)) * large**2

    target = cotangent[rows, labels]
    others = np.array(cotangent)
    others[rows, labels] = 0.0
    features_bar = others @ kernel.T + target[:, None] * by_feature
    kernel_bar = features.T @ others
    for row, label in enumerate(labels):
        kernel_bar[:, label] += target[row] * by_column[row]
    return Gradients(features_bar, kernel_bar, np.sum(target * by_lam))


# Margins of the angle: columns have length 1, features their own length or the length `scale`.


def combined_of_theta(theta, m1=1.0, m2=0.0, m3=0.0, easy=False):
    """cos(m1 theta + m2) - m3 and its derivative by theta."""
    angle, last = m1 * theta + m2, (np.pi - m2) / m1
    beyond = angle > np.pi
    value = np.where(beyond, np.cos(theta) - np.cos(last) - 1, np.cos(angle)) - m3
    slope = np.where(beyond, -np.sin(theta), -m1 * np.sin(angle))
    if easy:
        value = np.where(theta < np.pi / 2, value, np.cos(theta))
        slope = np.where(theta < np.pi / 2, slope, -np.sin(theta))
    return value, slope


def unit(array, axis):
    length = np.sqrt(np.sum(array**2, axis=axis, keepdims=True))
    return array / length, length


def angular(features, kernel, labels, of_theta, scale, lam):
    """Logits, their slopes by the angles, the angles, the target's slope by lam, and lengths."""
    (rows, norms), (columns, _) = unit(features, 1), unit(kernel, 0)
    length = norms if scale is None else np.full_like(norms, scale)
    theta = np.arccos(np.clip(rows @ columns, -1, 1))
    logits, slopes = length * np.cos(theta), -length * np.sin(theta)
    here = np.arange(len(labels)), labels
    (value, slope), (plain, large) = of_theta(theta[here]), target_weights(lam)
    by_lam = length[:, 0] * (np.cos(theta[here]) - value) * large**2
    logits[here] = length[:, 0] * (plain * np.cos(theta[here]) + large * value)
    slopes[here] = length[:, 0] * (-plain * np.sin(theta[here]) + large * slope)
    return logits, slopes, theta, by_lam, length


def angular_loss(features, kernel, labels, of_theta, scale, lam=0.0, label_smoothing=0.0):
    scores = angular(features, kernel, labels, of_theta, scale, lam)[0]
    wanted = smoothed_labels(labels, kernel.shape[1], label_smoothing)
    return -np.sum(wanted * log_probabilities(scores), axis=1)


def angular_pullback(
    features, kernel, labels, cotangent, of_theta, scale, lam=0.0, label_smoothing=0.0
):
    """Cotangents of (features, kernel, lam) for a per-example cotangent of the loss."""
    scores, slopes, theta, by_lam, length = angular(features, kernel, labels, of_theta, scale, lam)
    wanted = smoothed_labels(labels, kernel.shape[1], label_smoothing)
    scores_bar = cotangent[:, None] * (np.exp(log_probabilities(scores)) - wanted)
    (rows, norms), (columns, column_norms) = unit(features, 1), unit(kernel, 0)
    cosine_bar = scores_bar * slopes / -np.sin(theta)
    rows_bar, columns_bar = cosine_bar @ columns.T, rows.T @ cosine_bar
    features_bar = (rows_bar - rows * np.sum(rows * rows_bar, axis=1, keepdims=True)) / norms
    if scale is None:
        features_bar += rows * np.sum(scores_bar * scores / length, axis=1, keepdims=True)
    kernel_bar = columns_bar - columns * np.sum(columns * columns_bar, axis=0, keepdims=True)
    lam_bar = np.sum(scores_bar[np.arange(len(labels)), labels] * by_lam)
    return features_bar, kernel_bar / column_norms, lam_bar


def log_probabilities(scores):
    shifted = scores - np.max(scores, axis=1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True))


def smoothed_labels(labels, classes, label_smoothing):
    return (1 - label_smoothing) * np.eye(classes)[labels] + label_smoothing / classes


def loss(features, kernel, labels, margin, lam=0.0, where=None, label_smoothing=0.0):
    kept = np.ones(len(labels), bool) if where is None else where
    scores = logits(features[kept], kernel, labels[kept], margin, lam)
    wanted = smoothed_labels(labels[kept], kernel.shape[1], label_smoothing)
    result = np.zeros(len(labels))
    result[kept] = -np.sum(wanted * log_probabilities(scores), axis=1)
    return result


def loss_pullback(
    features, kernel, labels, cotangent, margin, lam=0.0, where=None, label_smoothing=0.0
):
    """Cotangents of (features, kernel, lam) for a per-example cotangent of the loss."""
    kept = np.ones(len(labels), bool) if where is None else where
    rows = (features[kept], kernel, labels[kept])
    probabilities = np.exp(log_probabilities(logits(*rows, margin, lam)))
    wanted = smoothed_labels(labels[kept], kernel.shape[1], label_smoothing)
    logits_bar = cotangent[kept][:, None] * (probabilities - wanted)
    pulled = logits_pullback(*rows, logits_bar, margin, lam)
    features_bar = np.zeros_like(features)
    features_bar[kept] = pulled.features
    return pulled._replace(features=features_bar)


def exact(array):
    """The exact numbers of an array of any float dtype, as an object array of mpf."""
    return np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(array, np.float64))


def exact_psi(cosine, margin):
    with mpmath.workdps(DIGITS):
        theta = mpmath.acos(max(-1, min(1, mpmath.mpf(cosine))))
        k = min(int(mpmath.floor(margin * theta / mpmath.pi)), margin - 1)
        return (-1) ** k * mpmath.cos(margin * theta) - 2 * k


def exact_psi_slope(cosine, margin):
    """d psi / d cos(theta), by a central difference at 60 digits."""
    with mpmath.workdps(DIGITS):
        centre, step = mpmath.mpf(cosine), mpmath.mpf(STEP)
        return (exact_psi(centre + step, margin) - exact_psi(centre - step, margin)) / (2 * step)


def exact_combined(cosine, m1=1, m2=0, m3=0, easy=False):
    with mpmath.workdps(DIGITS):
        c, m1, m2, m3 = map(mpmath.mpf, (cosine, m1, m2, m3))
        if easy and c <= 0:
            return c
        angle = m1 * mpmath.acos(c) + m2
        if angle > mpmath.pi:
            return c - mpmath.cos((mpmath.pi - m2) / m1) - 1 - m3
        return mpmath.cos(angle) - m3


def exact_combined_slope(cosine, **margin):
    """The derivative by the cosine; near 1 the curve bends, so the step is far below 1 - cosine."""
    with mpmath.workdps(DIGITS):
        centre, step = mpmath.mpf(cosine), mpmath.mpf("1e-28")
        ends = (exact_combined(centre + h, **margin) for h in (step, -step))
        return (next(ends) - next(ends)) / (2 * step)


def exact_row_loss(feature, kernel, label, margin, lam=0.0, label_smoothing=0.0):
    """The loss of one example as an mpf, from object arrays of mpf."""
    with mpmath.workdps(DIGITS):
        scores = list(feature @ kernel)
        norm = mpmath.sqrt(feature @ feature) * mpmath.sqrt(kernel[:, label] @ kernel[:, label])
        cosine = scores[label] / norm
        large = 1 / (1 + mpmath.mpf(lam))
        scores[label] = norm * ((1 - large) * cosine + large * exact_psi(cosine, margin))
        normaliser = mpmath.log(mpmath.fsum(mpmath.exp(score) for score in scores))
        smoothing = mpmath.mpf(label_smoothing)
        result = (1 - smoothing) * (normaliser - scores[label])
        return result + smoothing * mpmath.fsum(normaliser - z for z in scores) / len(scores)


def exact_loss(features, kernel, labels, margin, lam=0.0, label_smoothing=0.0):
    """Per-example losses, exact to the last digit of float64, however small."""
    features, kernel = exact(features), exact(kernel)
    rows = zip(features, labels, strict=True)
    arguments = (margin, lam, label_smoothing)
    return np.array([float(exact_row_loss(row, kernel, y, *arguments)) for row, y in rows])


def exact_gradients(features, kernel, labels, cotangent, margin, lam=0.0, label_smoothing=0.0):
    """Cotangents of (features, kernel, lam), by central differences at 60 digits."""
    features, kernel, cotangent = exact(features), exact(kernel), exact(cotangent)

    def total(features, kernel, lam):
        rows = zip(cotangent, features, labels, strict=True)
        arguments = (margin, lam, label_smoothing)
        return mpmath.fsum(s * exact_row_loss(row, kernel, y, *arguments) for s, row, y in rows)

    def difference(moved):
        step = mpmath.mpf(STEP)
        return float((total(*moved(step)) - total(*moved(-step))) / (2 * step))

    with mpmath.workdps(DIGITS):
        lam = mpmath.mpf(lam)
        features_bar, kernel_bar = np.zeros(features.shape), np.zeros(kernel.shape)
        for index in np.ndindex(features.shape):
            features_bar[index] = difference(
                lambda h, i=index: (nudged(features, i, h), kernel, lam)
            )
        for index in np.ndindex(kernel.shape):
            kernel_bar[index] = difference(lambda h, i=index: (features, nudged(kernel, i, h), lam))
        lam_bar = difference(lambda h: (features, kernel, lam + h))
        return Gradients(features_bar, kernel_bar, lam_bar)


def nudged(array, index, step):
    result = array.copy()
    result[index] = result[index] + step
    return result
