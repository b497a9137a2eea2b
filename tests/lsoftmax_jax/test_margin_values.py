"""Compares the margins' functions of the cosine with their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsoftmax_jax.margins import ArcFace, Combined
from tests import oracle
from tests.margin_cases import CASES, every_angular


def value_and_slope(margin, cosines):
    return jax.jit(margin.value_and_slope)(cosines)


def kinks(m):
    """The angles at which the value has a corner."""
    last = (np.pi - m.get("m2", 0.0)) / m.get("m1", 1.0)
    return [last, np.pi / 2] if m.get("easy") else [last]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@every_angular
def test_value_and_slope_are_the_formula_at_60_digits(x64, case, dtype):
    eps = float(np.finfo(dtype).eps)
    ends = np.geomspace(4 * np.sqrt(eps), 0.1, 12)
    angles = np.concatenate([ends, np.linspace(0.11, 3.03, 40), np.pi - ends])
    angles = angles[np.min(np.abs(angles[:, None] - kinks(case.m)), axis=1) > 1e-3]
    cosines = np.cos(angles).astype(dtype)
    wide = cosines.astype(np.float64)
    value, slope = map(np.asarray, value_and_slope(case.margin, jnp.asarray(cosines)))
    wanted = np.array([float(oracle.exact_combined(c, **case.m)) for c in wide])
    exact = np.array([float(oracle.exact_combined_slope(c, **case.m)) for c in wide])
    assert value.dtype == slope.dtype == dtype
    np.testing.assert_allclose(value, wanted, rtol=0, atol=8 * eps)
    # Near pi the slope is a small difference, whose rounding is divided by the sine.
    rounding = 8 * eps * (1 + 1 / np.sqrt(1 - wide**2))
    assert np.all(np.abs(slope - exact) <= rounding + 8 * eps * np.abs(exact))


@every_angular
def test_the_value_increases_with_the_cosine_and_only_easy_jumps(x64, case):
    cosines = np.linspace(-1, 1, 20001)
    value, slope = map(np.asarray, value_and_slope(case.margin, jnp.asarray(cosines)))
    steps, spacing = np.diff(value), cosines[1] - cosines[0]
    assert np.all(slope >= 0) and np.all(np.isfinite(slope))
    straddles = np.flatnonzero((cosines[:-1] <= 0) & (cosines[1:] > 0))
    if case.m.get("easy"):
        assert np.delete(steps, straddles).min() >= 0
        np.testing.assert_allclose(steps[straddles], -np.sin(case.m["m2"]), atol=2 * spacing)
        return
    assert np.all(steps > 0)
    # The value is like a square root at the end, with a first step of sqrt(2 spacing).
    assert np.max(steps) <= 1.3 * np.sqrt(2 * spacing)
    at_pi = np.cos((np.pi - case.m.get("m2", 0)) / case.m.get("m1", 1))
    np.testing.assert_allclose(value[0], -2 - at_pi - case.m.get("m3", 0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_slope_at_angle_zero_is_bounded(x64, dtype):
    floor = np.sqrt(np.finfo(dtype).eps)
    ends = jnp.asarray([1.0, 1 - np.finfo(dtype).epsneg, -1.0], dtype)
    value, slope = value_and_slope(ArcFace(0.5, scale=1.0), ends)
    np.testing.assert_allclose(value[0], np.cos(0.5), rtol=1e-6)
    assert np.all(np.asarray(slope[:2]) <= 1.01 * np.sin(0.5) / floor) and slope[2] == 1
    _, slope = value_and_slope(Combined(m1=1.5, scale=1.0), ends)
    np.testing.assert_allclose(slope, [1.5**2, 1.5**2, 1], rtol=1e-6)


def test_nan_stays_nan():
    for case in CASES.values():
        assert np.isnan(value_and_slope(case.margin, jnp.float32(np.nan))[0])
