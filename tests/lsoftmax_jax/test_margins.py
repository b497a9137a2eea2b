"""psi and its derivative against arccos at 60 digits."""

import functools

import chex
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lsoftmax_jax as lsm
from tests import oracle

MARGINS = [1, 2, 3, 4, 5, 6, 7, 8, 16, 33]
EPS = np.finfo(np.float64).eps
ANGLES = 64


@functools.partial(jax.jit, static_argnames="margin")
def value_and_slopes(cosine, margin):
    """psi, its slope by reverse mode and its slope by forward mode."""
    value, pull = jax.vjp(lambda c: lsm.psi(c, margin), cosine)
    _, forward = jax.jvp(lambda c: lsm.psi(c, margin), (cosine,), (jnp.ones_like(cosine),))
    return value, pull(jnp.ones_like(value))[0], forward


@functools.partial(jax.jit, static_argnames="margin")
def value(cosine, margin):
    return lsm.psi(cosine, margin)


def knots(margin):
    return np.cos(np.arange(1, margin) * np.pi / margin)


def padded(cosines):
    """Gives all margins and draws one length: each new length compiles for a second."""
    return np.resize(np.asarray(cosines, np.float64), ANGLES)


@pytest.mark.parametrize("margin", MARGINS)
def test_psi_and_slope_are_the_literal_formula(x64, margin):
    rng = np.random.default_rng(margin)
    inside = np.concatenate([np.cos(rng.uniform(0, np.pi, ANGLES - margin)), knots(margin)])
    cosines = padded(inside)
    psi, reverse, forward = value_and_slopes(jnp.asarray(cosines), margin)
    wanted = np.array([float(oracle.exact_psi(c, margin)) for c in cosines])
    slope = np.array([float(oracle.exact_psi_slope(c, margin)) for c in cosines])
    assert psi.dtype == jnp.float64
    # One rounding of c costs at most the slopes of psi and psi', which are m^2 and m^4 / 3.
    np.testing.assert_allclose(psi, wanted, rtol=0, atol=8 * EPS * margin**2)
    np.testing.assert_allclose(reverse, slope, rtol=0, atol=8 * EPS * margin**4)
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=0)


@pytest.mark.parametrize("margin", MARGINS)
def test_end_points_and_beyond_them_by_rounding(x64, margin):
    ends = padded([1.0, -1.0, np.nextafter(1, 2), np.nextafter(-1, -2), 1 + 1e-12, -1 - 1e-12])
    psi, reverse, forward = value_and_slopes(jnp.asarray(ends), margin)
    np.testing.assert_allclose(psi, np.where(ends > 0, 1.0, 1.0 - 2 * margin), rtol=1e-9)
    np.testing.assert_allclose(reverse, np.full(ANGLES, float(margin**2)), rtol=1e-9)
    np.testing.assert_allclose(forward, reverse, rtol=0, atol=0)


@pytest.mark.parametrize("margin", [2, 3, 4, 8])
def test_slope_vanishes_at_the_knots_from_both_sides(x64, margin):
    step = 1e-9
    at = knots(margin)
    _, slope, _ = value_and_slopes(jnp.asarray(padded([*at, *(at - step), *(at + step)])), margin)
    assert np.max(np.abs(slope)) <= margin**4 * step


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 8, 33])
def test_psi_decreases_in_theta_and_is_continuous_with_its_slope(x64, margin):
    cosines = np.linspace(-1, 1, 4001)
    psi, slope, _ = map(np.asarray, value_and_slopes(jnp.asarray(cosines), margin))
    spacing, rounding = cosines[1] - cosines[0], 32 * EPS * margin**4
    assert np.all(np.diff(psi) >= -rounding)
    assert np.all(np.diff(psi)[np.abs(slope[1:]) > margin**4 * spacing] > 0)
    assert np.all(slope >= -rounding)
    assert np.all(np.abs(np.diff(psi)) <= margin**2 * spacing + rounding)
    bend = margin**2 * max(margin**2 - 1, 1) / 3
    assert np.all(np.abs(np.diff(slope)) <= bend * spacing + rounding)


@pytest.mark.parametrize("margin", [1, 3, 4])
def test_second_derivative_in_reverse_mode(x64, margin):
    cosines = np.cos((np.arange(9) + 0.37) * np.pi / 9)
    bend = jax.vmap(jax.grad(jax.grad(lambda c: lsm.psi(c, margin))))(jnp.asarray(cosines))
    with mpmath.workdps(oracle.DIGITS):
        step = mpmath.mpf(oracle.STEP)
        wanted = [
            (
                oracle.exact_psi(mpmath.mpf(c) + step, margin)
                - 2 * oracle.exact_psi(c, margin)
                + oracle.exact_psi(mpmath.mpf(c) - step, margin)
            )
            / step**2
            for c in cosines
        ]
    np.testing.assert_allclose(bend, np.array(wanted, float), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("margin", [1, 2, 4, 17])
def test_second_derivative_at_the_end_points(x64, margin):
    """T_m'' is m² (m² - 1) / 3 at 1; psi is odd around the middle, but for a constant."""
    bend = jax.vmap(jax.grad(jax.grad(lambda c: lsm.psi(c, margin))))(jnp.array([1.0, -1.0]))
    wanted = margin**2 * (margin**2 - 1) / 3
    np.testing.assert_allclose(bend, [wanted, -wanted], rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    angles=st.lists(st.floats(0, np.pi), min_size=1, max_size=ANGLES),
    margin=st.sampled_from([1, 3, 4]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_low_precision_computes_in_float32_and_keeps_its_dtype(angles, margin, dtype):
    cosines = jnp.asarray(padded(np.cos(angles)), dtype)
    with jax.numpy_dtype_promotion("strict"):
        psi = value(cosines, margin)
    wanted = np.array([float(oracle.exact_psi(c, margin)) for c in np.asarray(cosines, float)])
    single = 8 * float(jnp.finfo(jnp.float32).eps) * margin**2
    rounding = float(jnp.finfo(dtype).eps) * np.abs(wanted)
    assert psi.dtype == dtype
    np.testing.assert_array_less(np.abs(np.asarray(psi, float) - wanted), single + rounding)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_cotangents_keep_the_dtype_and_the_slope_is_computed_in_float32(dtype):
    margin = 4
    cosines = jnp.asarray(np.cos(np.linspace(0.15, 3.0, ANGLES)), dtype)
    _, reverse, forward = value_and_slopes(cosines, margin)
    assert reverse.dtype == forward.dtype == dtype
    wanted = [float(oracle.exact_psi_slope(c, margin)) for c in np.asarray(cosines, float)]
    tolerance = 8 * 1.2e-7 * margin**4 + float(jnp.finfo(dtype).eps) * np.abs(wanted)
    np.testing.assert_array_less(np.abs(np.asarray(reverse, float) - wanted), tolerance)


def test_any_shape_scalars_and_vmap(x64):
    cosines = np.cos(np.linspace(0.1, 3.0, 6)).reshape(2, 3)
    grid = value(jnp.asarray(cosines), 3)
    chex.assert_trees_all_close(np.asarray(grid), oracle.psi(cosines, 3), rtol=1e-12)
    rows = jax.vmap(lambda c: value(c, 3))(jnp.asarray(cosines))
    chex.assert_trees_all_close(rows, grid, rtol=1e-15)
    np.testing.assert_allclose(value(0.5, 2), -0.5, rtol=1e-12)
    assert value(0.5, 2).shape == ()
    assert value(jnp.zeros((0, 3)), 4).shape == (0, 3)


def test_nan_stays_nan():
    assert np.all(np.isnan(value(jnp.full(ANGLES, np.nan, jnp.float32), 4)))


@pytest.mark.parametrize("margin", [0, -1, 2.5, 4.0, True, "4", None])
def test_a_margin_that_is_no_positive_int_is_refused(margin):
    with pytest.raises((TypeError, ValueError), match="margin") as caught:
        lsm.psi(0.5, margin)
    assert repr(margin) in str(caught.value)


@pytest.mark.parametrize("cosine", [np.arange(3), np.array([True]), np.ones(2, np.complex64)])
def test_cosines_that_are_no_real_floats_are_refused(cosine):
    with pytest.raises(TypeError, match="cos_theta"):
        lsm.psi(cosine, 4)
