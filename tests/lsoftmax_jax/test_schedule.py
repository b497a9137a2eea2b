"""Schedules of λ: the released code's formula with t counted from 1, and the ramp of the share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lsoftmax_jax as lsm
from lsoftmax_jax import schedule


@settings(max_examples=50, deadline=None)
@given(
    base=st.floats(0, 1e4),
    gamma=st.floats(0, 1e-2),
    power=st.floats(0, 50),
    minimum=st.floats(0, 10),
    step=st.integers(0, 10**6),
)
def test_formula(base, gamma, power, minimum, step):
    lam = lsm.annealed_lambda(base, gamma, power, minimum)(step)
    wanted = max(minimum, base * (1 + gamma * (step + 1)) ** -power)
    np.testing.assert_allclose(lam, wanted, rtol=2e-5, atol=1e-30)


def test_first_update_counts_as_one():
    np.testing.assert_allclose(lsm.annealed_lambda(8.0, 1.0, 3.0)(0), 1.0, rtol=1e-6)
    np.testing.assert_allclose(lsm.annealed_lambda(27.0, 1.0, 3.0)(1), 1.0, rtol=1e-6)


def test_constants_may_be_numpy_numbers(x64):
    for kind in (np.float32, np.float64, np.int32):
        lam = lsm.annealed_lambda(kind(8), kind(1), kind(3))(0)
        np.testing.assert_allclose(lam, 1.0, rtol=1e-6)
        assert lam.dtype == np.float32


def test_small_gammas_keep_their_digits_in_float32():
    for step in (0, 99, 999):
        lam = lsm.annealed_lambda(1000.0, 2.5e-5, 35.0)(step)
        np.testing.assert_allclose(lam, 1000 * (1 + 2.5e-5 * (step + 1)) ** -35, rtol=5e-7)


def test_minimum_defaults_to_zero_and_base_zero_turns_annealing_off():
    assert 0 <= lsm.annealed_lambda(1000.0, 1.0, 35.0)(10**6) < 1e-30
    assert lsm.annealed_lambda(0.0, 1e-5, 35.0)(0) == 0.0
    assert lsm.annealed_lambda(1000.0, 1.0, 35.0, minimum=5.0)(10**6) == 5.0


def test_traced_step_gives_the_same_float32_scalar_and_traces_once():
    lam_of = lsm.annealed_lambda(1000.0, 2.5e-5, 35.0, 2.0)
    traces = []

    @jax.jit
    def traced(step):
        traces.append(step)
        return lam_of(step)

    for step in (0, 17, 6000, 30000):
        lam = traced(jnp.int32(step))
        assert lam.shape == () and lam.dtype == jnp.float32
        np.testing.assert_allclose(lam, lam_of(step), rtol=1e-5)
    assert len(traces) == 1


def test_traced_step_under_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        lam = jax.jit(lsm.annealed_lambda(1000.0, 2.5e-5, 35.0))(jnp.int32(99))
    np.testing.assert_allclose(lam, 1000 * (1 + 2.5e-5 * 100) ** -35, rtol=1e-5)


def test_presets_of_the_released_code():
    assert tuple(schedule.MNIST) == (1000.0, 2.5e-5, 35.0, 0.0)
    assert tuple(schedule.CIFAR10) == (1000.0, 2e-5, 45.0, 0.0)
    assert tuple(schedule.CIFAR10_PLUS) == (1000.0, 1e-5, 45.0, 0.0)
    lam = lsm.annealed_lambda(**schedule.MNIST._asdict())(999)
    np.testing.assert_allclose(lam, 1000 * 1.025**-35, rtol=1e-5)


@pytest.mark.parametrize("argument", ["base", "gamma", "power", "minimum"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_negative_or_nan_constants_are_refused(argument, value):
    constants = {"base": 1000.0, "gamma": 1e-5, "power": 35.0, "minimum": 0.0, argument: value}
    with pytest.raises(ValueError, match=argument):
        lsm.annealed_lambda(**constants)


@pytest.mark.parametrize("argument", ["base", "gamma", "power", "minimum"])
def test_constants_that_are_no_numbers_are_refused(argument):
    constants = {"base": 1000.0, "gamma": 1e-5, "power": 35.0, "minimum": 0.0, argument: "1"}
    with pytest.raises(TypeError, match=argument):
        lsm.annealed_lambda(**constants)


@settings(max_examples=50, deadline=None)
@given(
    steps=st.integers(1, 10**5),
    share=st.floats(0.01, 1),
    ends=st.tuples(st.integers(0, 100), st.integers(0, 100)).filter(lambda ends: ends[0] < ends[1]),
    at=st.floats(0, 1.2),
)
def test_ramp_of_the_share(steps, share, ends, at):
    start, end = ends[0] / 100, ends[1] / 100
    step = round(at * steps)
    lam = float(lsm.margin_schedule(steps, share=share, start=start, end=end)(step))
    # The smoothstep is the cubic with these values and slopes 0 at both ends.
    ramp = np.poly1d(np.linalg.solve([[1, 1], [3, 2]], [1, 0]).tolist() + [0, 0])
    wanted = share * ramp(np.clip((step / steps - start) / (end - start), 0, 1))
    np.testing.assert_allclose(1 / (1 + lam), wanted, rtol=1e-4, atol=2e-6)


def test_ramp_starts_as_softmax_and_keeps_its_last_share():
    lam = lsm.margin_schedule(1000)
    assert lam(0) == lam(100) == jnp.inf and lam(101) < jnp.inf
    np.testing.assert_allclose([lam(700), lam(999), lam(5000)], 4.0, rtol=1e-5)
    falling = np.array([lam(step) for step in range(101, 701, 20)])
    assert (np.diff(falling) < 0).all()
    assert lsm.margin_schedule(10, share=0)(10) == jnp.inf


def test_the_larger_the_margin_the_smaller_its_largest_share():
    last = [lsm.margin_schedule(100, margin=margin)(100) for margin in (1, 2, 4, 8)]
    np.testing.assert_allclose(last, [1.0, 1.5, 4.0, 9.0], rtol=1e-5)


def test_ramp_of_a_traced_step_is_the_same_float32_scalar_under_strict_promotion():
    lam_of = lsm.margin_schedule(300, share=0.5)
    with jax.numpy_dtype_promotion("strict"):
        for step in (0, 31, 299):
            lam = jax.jit(lam_of)(jnp.int32(step))
            assert lam.shape == () and lam.dtype == jnp.float32
            np.testing.assert_allclose(lam, lam_of(step), rtol=1e-5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be >= 1, got 0"),
        ({"steps": 10.0}, TypeError, "steps must be a Python int"),
        ({"margin": 0}, ValueError, "margin must be >= 1, got 0"),
        ({"share": 1.5}, ValueError, "share must be in"),
        ({"share": "half"}, TypeError, "share must be a Python float"),
        ({"start": -0.1}, ValueError, "start must be in"),
        ({"end": float("nan")}, ValueError, "end must be in"),
        ({"start": 0.7}, ValueError, "start must be below end, got start 0.7 and end 0.7"),
    ],
)
def test_impossible_ramps_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        lsm.margin_schedule(**{"steps": 100} | changed)


@pytest.mark.parametrize("step", [-1, 2**31, np.int64(2**32), np.array([0, 2**31])], ids=str)
@pytest.mark.parametrize("lam", [lsm.annealed_lambda(1.0, 0.1, 1.0), lsm.margin_schedule(10)])
def test_steps_beyond_their_dtype_are_refused(lam, step):
    """JAX would cut them to 32 bits: 2**32 would be the first step."""
    with pytest.raises((TypeError, ValueError), match="step must be an integer >= 0"):
        lam(step)
