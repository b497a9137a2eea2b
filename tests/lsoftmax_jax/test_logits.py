"""lsoftmax_logits against the arccos oracle, pulled back along random cotangents."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import lsoftmax_jax as lsm
from tests import oracle
from tests.answers import LAMBDAS, MANY, B, C, D, assert_gradients_close
from tests.oracle import Gradients, as_arrays, assert_close


@functools.partial(jax.jit, static_argnames="margin")
def logits_of(features, kernel, labels, lam, margin):
    return lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=lam)


@functools.partial(jax.jit, static_argnames="margin")
def logits_and_pullback(features, kernel, labels, cotangent, lam, margin):
    def logits(features, kernel, lam):
        return lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=lam)

    value, pull = jax.vjp(logits, features, kernel, lam)
    return value, Gradients(*pull(cotangent))


def test_the_two_oracles_agree():
    problem = oracle.problem(3, B, D, C)
    cotangent = np.random.default_rng(0).standard_normal(B)
    for margin, lam, smoothing in [(1, 0.0, 0.1), (3, 5.0, 0.0), (8, 0.0, 0.1)]:
        by_hand = oracle.loss_pullback(*problem, cotangent, margin, lam, None, smoothing)
        exact = oracle.exact_gradients(*problem, cotangent, margin, lam, smoothing)
        assert_gradients_close(by_hand, exact, 1e-13)
        loss = oracle.exact_loss(*problem, margin, lam, smoothing)
        assert_close(oracle.loss(*problem, margin, lam, None, smoothing), loss, 1e-14)


@pytest.mark.parametrize("margin", range(1, 9))
def test_values_and_random_cotangents(x64, margin):
    cotangent = np.random.default_rng(margin).standard_normal((B, C))
    for seed, lam in enumerate(LAMBDAS):
        problem = oracle.problem(10 * margin + seed, B, D, C, scale=3.0)
        value, pulled = logits_and_pullback(
            *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(lam), margin
        )
        chex.assert_tree_all_finite((value, pulled))
        assert_close(value, oracle.logits(*problem, margin, lam), 1e-12)
        wanted = oracle.logits_pullback(*problem, cotangent, margin, lam)
        assert_gradients_close(pulled, wanted, 1e-12)


def test_many_classes(x64):
    problem = oracle.problem(1, *MANY, scale=3.0)
    cotangent = np.random.default_rng(1).standard_normal((6, 301))
    value, pulled = logits_and_pullback(
        *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(0.3), 4
    )
    assert_close(value, oracle.logits(*problem, 4, 0.3), 1e-12)
    wanted = oracle.logits_pullback(*problem, cotangent, 4, 0.3)
    assert_gradients_close(pulled, wanted, 1e-12)


def test_other_logits_are_the_plain_product(x64):
    problem = oracle.problem(0, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    logits = np.asarray(logits_of(features, kernel, labels, 0.0, 4))
    plain = problem.features @ problem.kernel
    other = np.arange(C) != problem.labels[:, None]
    np.testing.assert_allclose(logits[other], plain[other], rtol=1e-13, atol=1e-14)
    assert np.all(logits[~other] < plain[~other])


def test_without_labels_it_is_the_plain_product(x64):
    problem = oracle.problem(0, B, D, C)
    features, kernel, _ = as_arrays(problem, jnp.float64)
    cotangent = jnp.asarray(np.random.default_rng(0).standard_normal((B, C)))
    logits, pulled = logits_and_pullback(features, kernel, None, cotangent, jnp.float64(5), 4)
    assert_close(logits, problem.features @ problem.kernel, 1e-15)
    assert_close(pulled.features, cotangent @ problem.kernel.T, 1e-15)
    assert_close(pulled.kernel, problem.features.T @ cotangent, 1e-15)
    assert pulled.lam == 0


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_leading_batch_shapes(leading):
    rows = int(np.prod(leading))
    problem = oracle.problem(1, rows, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float32)
    shaped = features.reshape(*leading, D), kernel, labels.reshape(leading)
    logits, pulled = logits_and_pullback(*shaped, jnp.ones((*leading, C)), jnp.float32(1), 3)
    chex.assert_shape(logits, (*leading, C))
    chex.assert_equal_shape([pulled.features, shaped[0]])
    assert_close(logits.reshape(rows, C), oracle.logits(*problem, 3, 1.0), 1e-5)
    wanted = oracle.logits_pullback(*problem, np.ones((rows, C)), 3, 1.0)
    assert_close(pulled.features.reshape(rows, D), wanted.features, 1e-5)
    assert_close(pulled.kernel, wanted.kernel, 1e-5)
    plain = logits_of(shaped[0], kernel, None, 0.0, 3)
    chex.assert_shape(plain, (*leading, C))


def test_empty_batch():
    features, kernel, labels = jnp.zeros((0, D)), jnp.ones((D, C)), jnp.zeros(0, jnp.int32)
    logits, pulled = logits_and_pullback(features, kernel, labels, jnp.ones((0, C)), 0.0, 4)
    chex.assert_shape(logits, (0, C))
    chex.assert_shape(pulled.features, (0, D))
    assert_close(pulled.kernel, np.zeros((D, C)), 0.0)


def test_lambda_never_retraces():
    features, kernel, labels = as_arrays(oracle.problem(0, B, D, C), jnp.float32)
    traces = []

    @jax.jit
    def logits(lam):
        traces.append(lam)
        return lsm.lsoftmax_logits(features, kernel, labels, margin=4, lam=lam)

    results = [logits(lam) for lam in (0.0, 5.0, 1e6, np.inf)]
    assert len(traces) == 1
    assert not np.allclose(results[0], results[1])


@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_margin_one_is_plain_whatever_lambda(lam):
    features, kernel, labels = as_arrays(oracle.problem(2, B, D, C), jnp.float32)
    logits = logits_of(features, kernel, labels, lam, 1)
    np.testing.assert_allclose(logits, features @ kernel, rtol=1e-5, atol=1e-5)


def test_large_lambda_tends_to_plain(x64):
    problem = oracle.problem(2, B, D, C)
    plain = problem.features @ problem.kernel
    cotangent = np.random.default_rng(0).standard_normal((B, C))
    tensors = *as_arrays(problem, jnp.float64), jnp.asarray(cotangent)
    far = [np.asarray(logits_and_pullback(*tensors, jnp.float64(lam), 4)[0]) for lam in (1e3, 1e6)]
    limit, pulled = logits_and_pullback(*tensors, jnp.float64(np.inf), 4)
    distance = [np.max(np.abs(logits - plain)) for logits in far]
    assert 0 < distance[1] < 1.1e-3 * distance[0] < 0.1
    assert_close(limit, plain, 1e-14)
    assert_close(pulled.features, cotangent @ problem.kernel.T, 1e-13)
    assert_close(pulled.kernel, problem.features.T @ cotangent, 1e-13)
    assert pulled.lam == 0


@pytest.mark.parametrize("lam", [np.inf, 1e30])
def test_plain_at_infinity_in_float32(lam):
    features, kernel, labels = as_arrays(oracle.problem(2, B, D, C), jnp.float32)
    logits, pulled = logits_and_pullback(
        features, kernel, labels, jnp.ones((B, C)), jnp.float32(lam), 4
    )
    assert_close(logits, features @ kernel, 1e-6)
    assert_close(pulled.features, jnp.ones((B, C)) @ kernel.T, 1e-5)
    assert_close(pulled.kernel, features.T @ jnp.ones((B, C)), 1e-5)
    assert np.isfinite(pulled.lam)


def test_an_integer_beyond_every_float_is_infinite():
    arrays = as_arrays(oracle.problem(2, B, D, C), jnp.float32)
    huge, infinite = (lsm.lsoftmax_logits(*arrays, margin=4, lam=lam) for lam in (10**400, np.inf))
    np.testing.assert_array_equal(huge, infinite)


def test_vmap_over_features_labels_and_lambda(x64):
    problems = [oracle.problem(seed, B, D, C) for seed in (4, 5)]
    stacked = [np.stack(parts) for parts in zip(*problems, strict=True)]
    lams = np.array([0.0, 5.0])
    logits, pulled = jax.vmap(lambda *a: logits_and_pullback(*a, 3))(
        *as_arrays(stacked, jnp.float64), jnp.ones((2, B, C)), jnp.asarray(lams)
    )
    for row, (problem, lam) in enumerate(zip(problems, lams, strict=True)):
        assert_close(logits[row], oracle.logits(*problem, 3, lam), 1e-12)
        wanted = oracle.logits_pullback(*problem, np.ones((B, C)), 3, lam)
        of_row = jax.tree.map(lambda bar, row=row: bar[row], pulled)
        assert_gradients_close(of_row, wanted, 1e-12)


def test_remat_and_scan_over_microbatches(x64):
    problem = oracle.problem(6, 6, D, C)
    cotangent = np.random.default_rng(6).standard_normal((6, C))

    @jax.jit
    def accumulated(features, kernel, labels, cotangent):
        @jax.checkpoint
        def weighted(kernel, features, labels, cotangent):
            logits = lsm.lsoftmax_logits(features, kernel, labels, margin=3, lam=0.0)
            return jnp.vdot(cotangent, logits)

        def step(total, microbatch):
            return total + jax.grad(weighted)(kernel, *microbatch), None

        batches = features.reshape(3, 2, D), labels.reshape(3, 2), cotangent.reshape(3, 2, C)
        return jax.lax.scan(step, jnp.zeros_like(kernel), batches)[0]

    kernel_bar = accumulated(*as_arrays(problem, jnp.float64), jnp.asarray(cotangent))
    assert_close(kernel_bar, oracle.logits_pullback(*problem, cotangent, 3).kernel, 1e-12)


def test_second_order_in_reverse_mode(x64):
    features, kernel, labels = as_arrays(oracle.problem(7, 3, D, C), jnp.float64)

    @jax.jit
    def logits(features, kernel, lam):
        return lsm.lsoftmax_logits(features, kernel, labels, margin=3, lam=lam)

    check_grads(logits, (features, kernel, jnp.float64(0.7)), order=2, modes=["rev"])


def test_reverse_over_reverse_is_the_derivative_of_the_oracles_gradient(x64):
    problem = oracle.problem(8, B, D, C)
    rng = np.random.default_rng(8)
    cotangent, direction = rng.standard_normal((B, C)), rng.standard_normal((D, C))
    features, kernel, labels = as_arrays(problem, jnp.float64)

    def moved(kernel):
        pulled = logits_and_pullback(features, kernel, labels, cotangent, jnp.float64(0.5), 4)[1]
        return jnp.vdot(jnp.asarray(direction), pulled.kernel)

    hessian_vector = jax.grad(moved)(kernel)
    step = 1e-6 * direction
    up, down = (
        oracle.logits_pullback(
            problem.features, problem.kernel + h, problem.labels, cotangent, 4, 0.5
        )
        for h in (step, -step)
    )
    assert_close(hessian_vector, (up.kernel - down.kernel) / 2e-6, 1e-7)


PROMOTED = [
    (jnp.float32, jnp.float32, jnp.float32),
    (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    (jnp.float16, jnp.float16, jnp.float16),
    (jnp.bfloat16, jnp.float32, jnp.float32),
    (jnp.bfloat16, jnp.float16, jnp.float32),
]


@pytest.mark.parametrize(("features_dtype", "kernel_dtype", "logits_dtype"), PROMOTED)
def test_dtypes_are_kept_under_strict_promotion(features_dtype, kernel_dtype, logits_dtype):
    problem = oracle.problem(9, B, D, C)
    features = jnp.asarray(problem.features, features_dtype)
    kernel = jnp.asarray(problem.kernel, kernel_dtype)
    labels = jnp.asarray(problem.labels, jnp.uint8)
    cotangent = np.random.default_rng(9).standard_normal((B, C))
    cotangent = jnp.asarray(cotangent, jnp.bfloat16).astype(logits_dtype)
    logits, pulled = logits_and_pullback(features, kernel, labels, cotangent, jnp.float32(0.5), 4)
    assert logits.dtype == logits_dtype
    assert pulled.features.dtype == features_dtype and pulled.kernel.dtype == kernel_dtype
    assert pulled.lam.dtype == jnp.float32
    rounded = [np.asarray(a, np.float64) for a in (features, kernel)]
    eps = float(jnp.finfo(logits_dtype).eps)
    wanted = oracle.logits(*rounded, problem.labels, 4, 0.5)
    error = np.abs(np.asarray(logits, np.float64) - wanted)
    norms = np.linalg.norm(rounded[0], axis=1)[:, None] * np.linalg.norm(rounded[1], axis=0)
    # The result is rounded once; the computation is in float32.
    np.testing.assert_array_less(error, eps * np.abs(wanted) + 8 * 1.2e-7 * 16 * norms)
    wanted_pulled = oracle.logits_pullback(
        *rounded, problem.labels, np.asarray(cotangent, np.float64), 4, 0.5
    )
    for name in ("features", "kernel", "lam"):
        bar = getattr(pulled, name)
        tolerance = 1e-5 + float(jnp.finfo(bar.dtype).eps)
        assert_close(bar, getattr(wanted_pulled, name), tolerance)


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    shape_and_margin=st.sampled_from([((B, D, C), 2), (MANY, 4)]),
    scale=st.floats(0.01, 10),
    lam=st.floats(0, 100),
    seed=st.integers(0, 2**16),
)
def test_any_draw_agrees_with_the_oracle_on_the_same_rounded_inputs(
    dtype, shape_and_margin, scale, lam, seed
):
    shape, margin = shape_and_margin
    features, kernel, labels = as_arrays(oracle.problem(seed, *shape, scale), dtype)
    cotangent = jnp.ones((shape[0], shape[2]), dtype)
    logits, _ = logits_and_pullback(features, kernel, labels, cotangent, jnp.float32(lam), margin)
    rounded = np.asarray(features, np.float64), np.asarray(kernel, np.float64), np.asarray(labels)
    wanted = oracle.logits(*rounded, margin, float(np.float32(lam)))
    norms = np.linalg.norm(rounded[0], axis=1)[:, None] * np.linalg.norm(rounded[1], axis=0)
    bound = float(jnp.finfo(dtype).eps) * np.abs(wanted) + 8 * 1.2e-7 * margin**2 * norms
    np.testing.assert_array_less(np.abs(np.asarray(logits, np.float64) - wanted), bound + 1e-30)


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_gradients_where_theta_is_exactly_zero_or_pi(x64, margin):
    """At theta = 0 the target logit is |w||x| to first order, at pi it is (1 - 2m)|w||x|."""
    kernel = np.array([[2.0, 0.0], [0.0, 1.0]])
    features = np.array([[3.0, 0.0], [-3.0, 0.0]])
    cotangent = np.array([[1.0, 0.0], [1.0, 0.0]])
    logits, pulled = logits_and_pullback(
        *as_arrays((features, kernel, [0, 0]), jnp.float64), cotangent, jnp.float64(0), margin
    )
    end = 2.0 * margin - 1
    assert_close(logits[:, 0], [6.0, -6.0 * end], 1e-14)
    assert_close(pulled.features, [[2.0, 0.0], [2.0 * end, 0.0]], 1e-13)
    assert_close(pulled.kernel, [[3.0 - 3.0 * end, 0.0], [0.0, 0.0]], 1e-13)


@pytest.mark.parametrize(
    ("dtype", "margin", "classes"),
    [
        (jnp.float64, 4, 5),
        (jnp.float32, 1, 5),
        (jnp.float32, 4, 5),
        (jnp.float32, 4, MANY[2]),
        (jnp.bfloat16, 4, 5),
    ],
)
def test_degenerate_inputs_give_finite_logits_and_gradients(dtype, margin, classes):
    with jax.enable_x64(dtype == jnp.float64):
        features, kernel, labels = as_arrays(oracle.extreme_problems(classes), dtype)
        rows = features, kernel, labels, jnp.ones((*labels.shape, classes), dtype)
        for lam in LAMBDAS:
            lam = jnp.asarray(lam, np.promote_types(dtype, np.float32))
            results = jax.vmap(lambda *a, lam=lam: logits_and_pullback(*a, lam, margin))(*rows)
            chex.assert_tree_all_finite(results)


@pytest.mark.parametrize("which", ["features", "kernel"])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_norms_are_right_and_not_only_finite(x64, which, scale):
    features, kernel, labels = oracle.problem(11, B, D, C)
    problem = (
        (features * scale, kernel, labels)
        if which == "features"
        else (features, kernel * scale, labels)
    )
    cotangent = np.random.default_rng(1).standard_normal((B, C))
    logits, pulled = logits_and_pullback(
        *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(2), 4
    )
    assert_close(logits, oracle.logits(*problem, 4, 2.0), 1e-12)
    wanted = oracle.logits_pullback(*problem, cotangent, 4, 2.0)
    assert_gradients_close(pulled, wanted, 1e-12)


@pytest.mark.parametrize("shape", [(B, D, C), MANY])
def test_a_label_outside_the_classes_makes_its_row_nan_and_no_other(shape):
    features, kernel, labels = as_arrays(oracle.problem(12, *shape), jnp.float32)
    cotangent = jnp.ones((shape[0], shape[2]))
    good = np.arange(shape[0]) != 2
    for wrong in (-1, shape[2], 2**30):
        logits, pulled = logits_and_pullback(
            features, kernel, labels.at[2].set(wrong), cotangent, jnp.float32(0), 4
        )
        assert np.all(np.isnan(logits[2]))
        assert np.all(np.isnan(pulled.features[2]))
        assert np.all(np.isfinite(logits[good])) and np.all(np.isfinite(pulled.features[good]))
        assert np.any(np.isnan(pulled.kernel))


@pytest.mark.parametrize("labels_dtype", [jnp.int8, jnp.uint16])
def test_narrow_label_dtypes_do_not_wrap(labels_dtype):
    """300 classes do not fit int8: a wrapped comparison would find a label twice or never."""
    rng = np.random.default_rng(0)
    features, kernel = rng.standard_normal((2, 3)), rng.standard_normal((3, 300))
    labels = np.array([44, 100])
    arrays = jnp.asarray(features, jnp.float32), jnp.asarray(kernel, jnp.float32)
    logits = logits_of(*arrays, jnp.asarray(labels, labels_dtype), 0.0, 3)
    assert_close(logits, oracle.logits(features, kernel, labels, 3), 1e-5)


def test_batch_over_four_devices(mesh):
    problem = oracle.problem(13, 8, D, C)
    cotangent = np.random.default_rng(13).standard_normal((8, C))
    features, kernel, labels = as_arrays(problem, jnp.float32)
    rows, everywhere = NamedSharding(mesh, P("devices")), NamedSharding(mesh, P())
    logits, pulled = logits_and_pullback(
        jax.device_put(features, rows),
        jax.device_put(kernel, everywhere),
        jax.device_put(labels, rows),
        jax.device_put(jnp.asarray(cotangent, jnp.float32), rows),
        jax.device_put(jnp.float32(1), everywhere),
        4,
    )
    assert_close(logits, oracle.logits(*problem, 4, 1.0), 1e-5)
    wanted = oracle.logits_pullback(*problem, cotangent, 4, 1.0)
    assert_gradients_close(pulled, wanted, 1e-5)


GOOD = {
    "features": np.ones((B, D), np.float32),
    "kernel": np.ones((D, C), np.float32),
    "labels": np.zeros(B, np.int32),
    "margin": 4,
    "lam": 0.0,
}
MISTAKES = [
    ("margin", 0, ValueError),
    ("margin", -2, ValueError),
    ("margin", 2.5, TypeError),
    ("margin", True, TypeError),
    ("margin", "4", TypeError),
    ("lam", -1.0, ValueError),
    ("lam", float("nan"), ValueError),
    ("lam", np.zeros(3, np.float32), ValueError),
    ("lam", "5", TypeError),
    ("labels", np.zeros(B, np.float32), TypeError),
    ("labels", np.zeros(B, bool), TypeError),
    ("labels", np.zeros(B + 1, np.int32), ValueError),
    ("labels", np.zeros((B, 1), np.int32), ValueError),
    ("labels", np.zeros((), np.int32), ValueError),
    ("kernel", np.ones(D, np.float32), ValueError),
    ("kernel", np.ones((1, D, C), np.float32), ValueError),
    ("kernel", np.ones((D + 1, C), np.float32), ValueError),
    ("kernel", np.ones((D, 0), np.float32), ValueError),
    ("kernel", np.ones((D, C), np.int32), TypeError),
    ("features", np.ones((B, D), np.int32), TypeError),
    ("features", np.ones((B, D), np.complex64), TypeError),
    ("features", np.float32(1), ValueError),
]


@pytest.mark.parametrize(("argument", "value", "error"), MISTAKES)
def test_mistakes_are_named(argument, value, error):
    with pytest.raises(error, match=argument):
        lsm.lsoftmax_logits(**{**GOOD, argument: value})


def test_soft_labels_are_refused_in_words():
    with pytest.raises((TypeError, ValueError), match="one class"):
        lsm.lsoftmax_logits(**{**GOOD, "labels": np.full((B, C), 1 / C, np.float32)})


def test_logits_of_sharded_columns_stay_sharded():
    mesh = jax.make_mesh(
        (4,), ("model",), (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4]
    )
    problem = oracle.problem(1, 3, 5, 8)
    with jax.set_mesh(mesh):
        features, kernel, labels = as_arrays(problem, jnp.float32)
        kernel = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))
        logits = lsm.lsoftmax_logits(features, kernel, labels, margin=3, lam=0.5)
        assert jax.typeof(logits).sharding.spec == P(None, "model")
