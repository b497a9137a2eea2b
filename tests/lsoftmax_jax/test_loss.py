"""lsoftmax_loss and lsoftmax_loss_sum against the arccos oracle, in every plan."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import lsoftmax_jax as lsm
from lsoftmax_jax._plans import Pieces, pieces_of
from tests import oracle
from tests.oracle import as_arrays, assert_close

B, D, C = 7, 5, 4
RAGGED = (6, 8, 11)
MANY = (6, 8, 301)  # classes enough for the library to gather each label's column
LAMBDAS = [0.0, 5.0, 1e6, np.inf]
EPS = float(np.finfo(np.float32).eps)
STATIC = ("margin", "label_smoothing", "plan")
PLANS = {
    "one-shot": lsm.Plan(),
    "row blocks with a tail": lsm.Plan(row_block=4),
    "one row block for all": lsm.Plan(row_block=100),
    "class blocks, stored": lsm.Plan(class_block=3, keep_exponentials=True),
    "class blocks, recomputed": lsm.Plan(class_block=3, keep_exponentials=False),
    "one class at a time": lsm.Plan(class_block=1, keep_exponentials=True),
    "next to no memory": lsm.Plan(memory_budget=1),
    "nothing stored": lsm.Plan(keep_exponentials=False),
}


@functools.partial(jax.jit, static_argnames=STATIC)
def loss_and_pullback(features, kernel, labels, cotangent, lam, where=None, **static):
    def loss(features, kernel, lam):
        return lsm.lsoftmax_loss(features, kernel, labels, lam=lam, where=where, **static)

    value, pull = jax.vjp(loss, features, kernel, lam)
    return value, pull(cotangent)


@functools.partial(jax.jit, static_argnames=STATIC)
def sum_and_gradients(features, kernel, labels, weights, lam, where=None, **static):
    """The sum and its gradients by (features, kernel, lam, weights)."""

    def total(features, kernel, lam, weights):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights, lam=lam, where=where, **static
        )

    return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(features, kernel, lam, weights)


def assert_all_close(actual, wanted, tolerance):
    for one, other in zip(actual, wanted, strict=True):
        assert_close(one, other, tolerance)


def rounded(*tensors):
    """The oracle's view of the numbers the library was given."""
    return tuple(np.asarray(tensor, np.float64) for tensor in tensors)


def conditioning(features, kernel, labels, margin):
    """m^2 n + |Z|, in units of eps what float32 must lose of a loss."""
    norm = np.linalg.norm(features, axis=1) * np.linalg.norm(kernel[:, labels], axis=0)
    others = features @ kernel
    others[np.arange(len(labels)), labels] = -np.inf
    return margin**2 * norm + np.abs(np.log(np.sum(np.exp(others), axis=1)))


@pytest.mark.parametrize("margin", range(1, 9))
def test_values_and_random_cotangents(x64, margin):
    cotangent = np.random.default_rng(margin).standard_normal(B)
    for seed, lam in enumerate(LAMBDAS):
        problem = oracle.problem(10 * margin + seed, B, D, C, scale=2.0)
        loss, bars = loss_and_pullback(
            *as_arrays(problem, jnp.float64),
            jnp.asarray(cotangent),
            jnp.float64(lam),
            margin=margin,
        )
        assert_close(loss, oracle.loss(*problem, margin, lam), 1e-12)
        assert_all_close(bars, oracle.loss_pullback(*problem, cotangent, margin, lam), 1e-12)


def test_many_classes(x64):
    problem = oracle.problem(1, *MANY, scale=2.0)
    cotangent = np.random.default_rng(1).standard_normal(6)
    arguments = *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(0.3)
    loss, bars = loss_and_pullback(*arguments, margin=4)
    assert_close(loss, oracle.loss(*problem, 4, 0.3), 1e-12)
    assert_all_close(bars, oracle.loss_pullback(*problem, cotangent, 4, 0.3), 1e-12)


def test_margin_one_is_optax_cross_entropy(x64):
    problem = oracle.problem(1, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(B))

    @jax.jit
    def plain(features, kernel):
        return optax.softmax_cross_entropy_with_integer_labels(features @ kernel, labels)

    wanted, pull = jax.vjp(plain, features, kernel)
    for lam in (0.0, 5.0):
        loss, bars = loss_and_pullback(
            features, kernel, labels, cotangent, jnp.float64(lam), margin=1
        )
        assert_close(loss, wanted, 1e-14)
        assert_all_close(bars[:2], pull(cotangent), 1e-13)
        np.testing.assert_allclose(bars[2], 0, atol=1e-15)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_same_loss_and_gradients(x64, plan):
    problem = oracle.problem(2, *RAGGED)
    rng = np.random.default_rng(2)
    cotangent, where = rng.standard_normal(6), np.arange(6) != 3
    loss, bars = loss_and_pullback(
        *as_arrays(problem, jnp.float64),
        jnp.asarray(cotangent),
        jnp.float64(0.3),
        jnp.asarray(where),
        margin=4,
        label_smoothing=0.1,
        plan=PLANS[plan],
    )
    assert_close(loss, oracle.loss(*problem, 4, 0.3, where, 0.1), 1e-12)
    wanted = oracle.loss_pullback(*problem, cotangent, 4, 0.3, where, 0.1)
    assert_all_close(bars, wanted, 1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_of_the_sum(x64, plan):
    problem = oracle.problem(3, *MANY)
    weights, where = np.array([0.3, -1.2, 0.0, 2.0, 1.0, 0.1]), np.arange(6) != 3
    total, gradients = sum_and_gradients(
        *as_arrays(problem, jnp.float64),
        jnp.asarray(weights),
        jnp.float64(0.3),
        jnp.asarray(where),
        margin=3,
        label_smoothing=0.1,
        plan=PLANS[plan],
    )
    loss = oracle.loss(*problem, 3, 0.3, where, 0.1)
    wanted = oracle.loss_pullback(*problem, weights, 3, 0.3, where, 0.1)
    assert_close(total, weights @ loss, 1e-12)
    assert_all_close(gradients, (*wanted, loss), 1e-12)


def test_sum_without_weights_is_the_sum_and_scales_its_gradients(x64):
    problem = oracle.problem(4, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)

    @jax.jit
    def squared(features, kernel):
        return lsm.lsoftmax_loss_sum(features, kernel, labels, margin=4, lam=0.0) ** 2

    value, gradients = jax.value_and_grad(squared, argnums=(0, 1))(features, kernel)
    total = np.sum(oracle.loss(*problem, 4))
    wanted = oracle.loss_pullback(*problem, np.full(B, 2 * total), 4)
    assert_close(value, total**2, 1e-12)
    assert_all_close(gradients, wanted[:2], 1e-12)


def test_label_smoothing_is_optax_smoothing_of_the_margin_logits(x64):
    features, kernel, labels = as_arrays(oracle.problem(5, B, D, C), jnp.float64)
    cotangent = jnp.asarray(np.random.default_rng(5).standard_normal(B))

    @jax.jit
    def wanted(features, kernel, lam):
        logits = lsm.lsoftmax_logits(features, kernel, labels, margin=3, lam=lam)
        one_hot = jax.nn.one_hot(labels, C, dtype=jnp.float64)
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(one_hot, 0.2))

    value, pull = jax.vjp(wanted, features, kernel, jnp.float64(1))
    loss, bars = loss_and_pullback(
        features, kernel, labels, cotangent, jnp.float64(1), margin=3, label_smoothing=0.2
    )
    assert_close(loss, value, 1e-13)
    assert_all_close(bars, pull(cotangent), 1e-12)


def test_full_label_smoothing_forgets_the_label(x64):
    problem = oracle.problem(5, B, D, C)
    cotangent = np.ones(B)
    loss, bars = loss_and_pullback(
        *as_arrays(problem, jnp.float64),
        jnp.asarray(cotangent),
        jnp.float64(1),
        margin=3,
        label_smoothing=1.0,
    )
    assert_close(loss, oracle.loss(*problem, 3, 1.0, None, 1.0), 1e-13)
    assert_all_close(bars, oracle.loss_pullback(*problem, cotangent, 3, 1.0, None, 1.0), 1e-12)


def confident(margin):
    """Losses from 1 down to 1e-9: features near their columns, with growing norms."""
    rng = np.random.default_rng(margin)
    kernel = rng.standard_normal((D, C))
    kernel /= np.linalg.norm(kernel, axis=0)
    labels = np.arange(B) % C
    column = kernel[:, labels].T
    across = rng.standard_normal((B, D))
    across -= np.sum(across * column, axis=1, keepdims=True) * column
    direction = column + 0.3 / margin * across / np.linalg.norm(across, axis=1, keepdims=True)
    logits = oracle.logits(direction, kernel, labels, margin)
    target = logits[np.arange(B), labels]
    logits[np.arange(B), labels] = -np.inf
    norms = np.linspace(1, 21, B) / (target - np.max(logits, axis=1))
    return oracle.Problem(norms[:, None] * direction, kernel, labels)


@pytest.mark.parametrize("margin", [1, 2, 3, 4, 8])
def test_tiny_float32_losses_keep_their_digits(margin):
    features, kernel, labels = as_arrays(confident(margin), jnp.float32)
    given = (*rounded(features, kernel), np.asarray(labels))
    exact = oracle.exact_loss(*given, margin)
    assert np.min(exact) < 2e-9 and np.max(exact) > 0.1
    loss, bars = loss_and_pullback(
        features, kernel, labels, jnp.ones(B), jnp.float32(0), margin=margin
    )
    error = np.abs(np.asarray(loss, np.float64) - exact) / exact
    bound = 1e-5 + 8 * EPS * conditioning(*given, margin)
    np.testing.assert_array_less(error, bound)

    # A rounding of the cosine moves psi' by up to m^4 / 3 more.
    features_bar = oracle.exact_gradients(*given, np.ones(B), margin)[0]
    bound = bound + 8 * EPS * margin**4 / 3
    error = np.linalg.norm(np.asarray(bars[0], np.float64) - features_bar, axis=1)
    np.testing.assert_array_less(error, bound * np.linalg.norm(features_bar, axis=1))


@pytest.mark.parametrize("margin", [1, 4])
def test_tiny_float32_losses_of_the_sum(margin):
    """Each weight's gradient is the loss of its example, to the same digits."""
    features, kernel, labels = as_arrays(confident(margin), jnp.float32)
    given = (*rounded(features, kernel), np.asarray(labels))
    _, gradients = sum_and_gradients(
        features, kernel, labels, jnp.ones(B), jnp.float32(0), margin=margin
    )
    exact = oracle.exact_loss(*given, margin)
    error = np.abs(np.asarray(gradients[3], np.float64) - exact) / exact
    np.testing.assert_array_less(error, 1e-5 + 8 * EPS * conditioning(*given, margin))


def assert_norm_close(actual, wanted, tolerance):
    error = np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error <= tolerance, f"{error:.3g} is over {tolerance:.3g}"


@pytest.mark.parametrize(
    ("dtype", "plan", "classes"),
    [
        (jnp.float16, "one-shot", 11),
        (jnp.bfloat16, "one-shot", 11),
        (jnp.bfloat16, "one-shot", 301),
        (jnp.bfloat16, "class blocks, stored", 301),
    ],
)
def test_half_precision_operands(strict, dtype, plan, classes):
    problem = oracle.problem(6, 64, 16, classes)
    features, kernel, labels = as_arrays(problem, dtype)
    cotangent = np.linspace(0.5, 1.5, 64)
    loss, bars = loss_and_pullback(
        features,
        kernel,
        labels,
        jnp.asarray(cotangent, jnp.float32),
        jnp.float32(0.5),
        margin=4,
        plan=PLANS[plan],
    )
    given = (*rounded(features, kernel), problem.labels)
    assert loss.dtype == jnp.float32
    assert [bar.dtype for bar in bars] == [dtype, dtype, jnp.float32]
    np.testing.assert_allclose(loss, oracle.loss(*given, 4, 0.5), rtol=3e-3)
    for bar, wanted in zip(bars, oracle.loss_pullback(*given, cotangent, 4, 0.5), strict=True):
        assert_norm_close(bar, wanted, 3e-3)


@pytest.mark.parametrize(
    ("rule", "plan", "classes"),
    [
        (loss_and_pullback, "one-shot", 11),
        (loss_and_pullback, "class blocks, stored", 301),
        (sum_and_gradients, "one-shot", 301),
        (sum_and_gradients, "row blocks with a tail", 11),
    ],
)
def test_bfloat16_gradients_at_the_small_angles_of_a_trained_network(rule, plan, classes):
    """There alpha = m^2 and nearly all of it cancels: its rounding must cancel too."""
    rng = np.random.default_rng(6)
    _, kernel, labels = oracle.problem(6, 64, 16, classes)
    features = 0.5 * (kernel[:, labels].T + 0.05 * rng.standard_normal((64, 16)))
    features, kernel, _ = as_arrays((features, kernel, labels), jnp.bfloat16)
    arguments = features, kernel, jnp.asarray(labels), jnp.ones(64), jnp.float32(0)
    wanted = oracle.loss_pullback(*rounded(features, kernel), labels, np.ones(64), 4)
    bars = rule(*arguments, margin=4, plan=PLANS[plan])[1]
    assert_norm_close(bars[0], wanted[0], 3e-3)
    assert_norm_close(bars[1], wanted[1], 3e-3)


def test_tiny_bfloat16_losses_keep_their_digits(strict):
    features, kernel, labels = as_arrays(confident(3), jnp.bfloat16)
    given = (*rounded(features, kernel), np.asarray(labels))
    loss, _ = loss_and_pullback(features, kernel, labels, jnp.ones(B), jnp.float32(0), margin=3)
    exact = oracle.exact_loss(*given, 3)
    assert np.min(exact) < 1e-8
    np.testing.assert_allclose(loss, exact, rtol=3e-3)


@given(
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    shape_and_margin=st.sampled_from([((B, D, C), 2), (MANY, 4)]),
    scale=st.floats(0.01, 5),
    lam=st.floats(0, 100),
    seed=st.integers(0, 2**16),
)
def test_any_draw_agrees_with_the_oracle_on_the_same_rounded_inputs(
    dtype, shape_and_margin, scale, lam, seed
):
    shape, margin = shape_and_margin
    features, kernel, labels = as_arrays(oracle.problem(seed, *shape, scale), dtype)
    loss, bars = loss_and_pullback(
        features, kernel, labels, jnp.ones(shape[0]), jnp.float32(lam), margin=margin
    )
    given = (*rounded(features, kernel), np.asarray(labels))
    lam = float(np.float32(lam))
    exact = oracle.exact_loss(*given, margin, lam)
    single = dtype == jnp.float32
    lost = 8 * EPS * conditioning(*given, margin)
    bound = (1e-5 if single else 3e-3) + lost
    np.testing.assert_array_less(np.abs(np.asarray(loss, np.float64) - exact), bound * exact)
    # Two roundings to bfloat16, of G and of the result, are eps at most; 3e-3 is their average.
    bound = (1e-5 if single else float(jnp.finfo(dtype).eps)) + np.max(lost)
    wanted = oracle.loss_pullback(*given, np.ones(shape[0]), margin, lam)
    for bar, wanted_bar in zip(bars[:2], wanted, strict=False):
        assert_norm_close(bar, wanted_bar, bound + 8 * EPS * margin**4 / 3)


LOSS_AND_SUM_PLANS = [
    (loss_and_pullback, "one-shot"),
    (loss_and_pullback, "class blocks, recomputed"),
    (sum_and_gradients, "one-shot"),
    (sum_and_gradients, "row blocks with a tail"),
]


@pytest.mark.parametrize(("rule", "plan"), LOSS_AND_SUM_PLANS)
def test_a_masked_row_is_exactly_absent_whatever_it_holds(x64, rule, plan):
    problem = oracle.problem(7, *RAGGED)
    features, kernel, labels = as_arrays(problem, jnp.float64)
    where = np.arange(6) != 2
    loss = oracle.loss(*problem, 4, 0.5, where)
    bars = oracle.loss_pullback(*problem, np.ones(6), 4, 0.5, where)
    wanted = (loss, bars) if rule is loss_and_pullback else (np.sum(loss), (*bars, loss))
    for poison in (np.nan, np.inf, -np.inf):
        value, gradients = rule(
            features.at[2].set(poison),
            kernel,
            labels.at[2].set(-1),
            jnp.ones(6),
            jnp.float64(0.5),
            jnp.asarray(where),
            margin=4,
            plan=PLANS[plan],
        )
        of_row = [gradients[0][2]]
        of_row += [value[2]] if rule is loss_and_pullback else [gradients[3][2]]
        assert all(np.all(each == 0) for each in of_row)
        assert_close(value, wanted[0], 1e-12)
        assert_all_close(gradients, wanted[1], 1e-12)


def test_a_mask_of_nothing_gives_zero_and_a_mask_of_all_changes_nothing():
    features, kernel, labels = as_arrays(oracle.problem(8, B, D, C), jnp.float32)
    arguments = features, kernel, labels, jnp.ones(B), jnp.float32(0)
    loss, bars = loss_and_pullback(*arguments, jnp.zeros(B, bool), margin=4)
    chex.assert_trees_all_equal((loss, bars), jax.tree.map(jnp.zeros_like, (loss, bars)))
    everything = loss_and_pullback(*arguments, jnp.ones(B, bool), margin=4)
    chex.assert_trees_all_close(everything, loss_and_pullback(*arguments, margin=4), rtol=1e-6)


@pytest.mark.parametrize("shape", [RAGGED, MANY])
@pytest.mark.parametrize("plan", ["one-shot", "class blocks, stored"])
def test_a_label_outside_the_classes_gives_nan_for_its_row(plan, shape):
    features, kernel, labels = as_arrays(oracle.problem(9, *shape), jnp.float32)
    good = np.arange(6) != 2
    for wrong in (-1, shape[2], 2**30):
        arguments = features, kernel, labels.at[2].set(wrong), jnp.ones(6), jnp.float32(0)
        loss, bars = loss_and_pullback(*arguments, margin=4, plan=PLANS[plan])
        assert np.isnan(loss[2]) and np.all(np.isfinite(loss[good]))
        assert np.all(np.isnan(bars[0][2])) and np.all(np.isfinite(bars[0][good]))
        assert np.any(np.isnan(bars[1]))


@pytest.mark.parametrize("plan", ["one-shot", "row blocks with a tail"])
def test_a_label_outside_the_classes_makes_the_sum_nan(plan):
    features, kernel, labels = as_arrays(oracle.problem(9, *RAGGED), jnp.float32)
    good = np.arange(6) != 2
    for wrong in (-1, RAGGED[2]):
        arguments = features, kernel, labels.at[2].set(wrong), jnp.ones(6), jnp.float32(0)
        total, bars = sum_and_gradients(*arguments, margin=4, plan=PLANS[plan])
        assert np.isnan(total) and np.any(np.isnan(bars[1]))
        for by_row in (bars[0], bars[3]):
            assert np.all(np.isnan(by_row[2])) and np.all(np.isfinite(by_row[good]))


def test_a_nan_feature_gives_a_nan_loss_in_its_row_only():
    features, kernel, labels = as_arrays(oracle.problem(9, B, D, C), jnp.float32)
    loss, _ = loss_and_pullback(
        features.at[2, 0].set(np.nan), kernel, labels, jnp.ones(B), jnp.float32(0), margin=4
    )
    np.testing.assert_array_equal(np.isnan(loss), np.arange(B) == 2)


@pytest.mark.parametrize(
    ("plan", "label_smoothing"),
    [("one-shot", 0.0), ("one-shot", 0.1), ("one class at a time", 0.1)],
)
def test_one_class_gives_exactly_zero(plan, label_smoothing):
    features = jnp.asarray(oracle.problem(10, B, D, C).features, jnp.float32)
    kernel, labels = jnp.ones((D, 1)), jnp.zeros(B, jnp.int32)
    arguments = features, kernel, labels, jnp.ones(B), jnp.float32(0.5)
    static = {"margin": 4, "label_smoothing": label_smoothing, "plan": PLANS[plan]}
    for results in (
        loss_and_pullback(*arguments, **static),
        sum_and_gradients(*arguments, **static),
    ):
        chex.assert_trees_all_equal(results, jax.tree.map(jnp.zeros_like, results))


@pytest.mark.parametrize("plan", ["one-shot", "row blocks with a tail", "class blocks, stored"])
def test_empty_batch(plan):
    arguments = jnp.zeros((0, D)), jnp.ones((D, 11)), jnp.zeros(0, jnp.int32), jnp.zeros(0), 0.5
    loss, bars = loss_and_pullback(*arguments, margin=4, plan=PLANS[plan])
    chex.assert_shape([loss, *bars], [(0,), (0, D), (D, 11), ()])
    total, gradients = sum_and_gradients(*arguments, margin=4, plan=PLANS[plan])
    assert total == 0
    assert np.all(bars[1] == 0) and np.all(gradients[1] == 0)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_leading_batch_shapes(leading):
    rows = int(np.prod(leading))
    problem = oracle.problem(11, rows, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float32)
    cotangent, where = np.linspace(0.5, 1.5, rows), np.arange(rows) != 1
    loss, bars = loss_and_pullback(
        features.reshape(*leading, D),
        kernel,
        labels.reshape(leading),
        jnp.asarray(cotangent, jnp.float32).reshape(leading),
        jnp.float32(1),
        jnp.asarray(where).reshape(leading),
        margin=3,
    )
    chex.assert_shape([loss, bars[0]], [leading, (*leading, D)])
    assert_close(loss.reshape(rows), oracle.loss(*problem, 3, 1.0, where), 1e-5)
    wanted = oracle.loss_pullback(*problem, cotangent, 3, 1.0, where)
    assert_close(bars[0].reshape(rows, D), wanted[0], 1e-5)
    assert_all_close(bars[1:], wanted[1:], 1e-5)


@pytest.mark.parametrize(
    ("dtype", "plan", "classes"),
    [
        (jnp.float64, "one-shot", 5),
        (jnp.float32, "one-shot", 5),
        (jnp.float32, "row blocks with a tail", 301),
        (jnp.bfloat16, "class blocks, stored", 5),
    ],
)
def test_degenerate_inputs_give_finite_losses_and_gradients(dtype, plan, classes):
    static = {"margin": 4, "label_smoothing": 0.1, "plan": PLANS[plan]}
    with jax.enable_x64(dtype == jnp.float64):
        single = jnp.promote_types(dtype, jnp.float32)
        rows = as_arrays(oracle.extreme_problems(classes), dtype)
        ones = jnp.ones(rows[2].shape, single)
        for lam in LAMBDAS:
            lam = jnp.asarray(lam, single)
            for rule in (loss_and_pullback, sum_and_gradients):
                results = jax.vmap(lambda *a, rule=rule, lam=lam: rule(*a, lam, **static))(
                    *rows, ones
                )
                chex.assert_tree_all_finite(results)


@pytest.mark.parametrize("which", ["features", "kernel"])
def test_tiny_norms_give_the_uniform_loss(which):
    problem = oracle.problem(12, B, D, C)
    problem = problem._replace(**{which: 1e-20 * getattr(problem, which)})
    loss, _ = loss_and_pullback(
        *as_arrays(problem, jnp.float32), jnp.ones(B), jnp.float32(0), margin=4
    )
    np.testing.assert_allclose(loss, np.full(B, np.log(C)), rtol=1e-6)


@pytest.mark.parametrize("which", ["features", "kernel"])
def test_extreme_norms_are_right_and_not_only_finite(x64, which):
    cotangent = np.random.default_rng(1).standard_normal(B)
    for scale in (1e-20, 1e-3, 1e15):
        problem = oracle.problem(12, B, D, C)
        problem = problem._replace(**{which: scale * getattr(problem, which)})
        loss, bars = loss_and_pullback(
            *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.float64(0), margin=4
        )
        assert_close(loss, oracle.loss(*problem, 4), 1e-12)
        assert_all_close(bars, oracle.loss_pullback(*problem, cotangent, 4), 1e-12)


def test_lambda_never_retraces():
    features, kernel, labels = as_arrays(oracle.problem(0, B, D, C), jnp.float32)
    traces = []

    @jax.jit
    def both(lam):
        traces.append(lam)
        arguments = features, kernel, labels
        total = lsm.lsoftmax_loss_sum(*arguments, margin=4, lam=lam)
        return jnp.sum(lsm.lsoftmax_loss(*arguments, margin=4, lam=lam)), total

    results = [both(lam) for lam in (0.0, 5.0, 1e6, np.inf)]
    assert len(traces) == 1
    assert results[0][0] > results[1][0] > results[2][0]
    for per_example, total in results:
        np.testing.assert_allclose(per_example, total, rtol=1e-6)


def test_a_negative_or_nan_lambda_that_only_the_data_knows_is_not_trained_on():
    features, kernel, labels = as_arrays(oracle.problem(0, B, D, C), jnp.float32)
    for lam in (-0.5, np.nan):
        loss, _ = loss_and_pullback(
            features, kernel, labels, jnp.ones(B), jnp.float32(lam), margin=4
        )
        assert np.all(np.isnan(loss))


def test_vmap_over_problems_and_lambda(x64):
    problems = [oracle.problem(seed, B, D, C) for seed in (13, 14)]
    stacked = [np.stack(parts) for parts in zip(*problems, strict=True)]
    lams, weights = np.array([0.0, 5.0]), np.random.default_rng(0).standard_normal((2, B))
    arguments = *as_arrays(stacked, jnp.float64), jnp.asarray(weights), jnp.asarray(lams)
    loss, bars = jax.vmap(lambda *a: loss_and_pullback(*a, margin=3))(*arguments)
    total, gradients = jax.vmap(lambda *a: sum_and_gradients(*a, margin=3))(*arguments)
    for row, (problem, lam) in enumerate(zip(problems, lams, strict=True)):
        value = oracle.loss(*problem, 3, lam)
        wanted = oracle.loss_pullback(*problem, weights[row], 3, lam)
        assert_close(loss[row], value, 1e-12)
        assert_close(total[row], weights[row] @ value, 1e-12)
        assert_all_close([bar[row] for bar in bars], wanted, 1e-12)
        assert_all_close([bar[row] for bar in gradients], (*wanted, value), 1e-12)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
def test_remat_and_scan_over_microbatches(x64, rule):
    problem = oracle.problem(15, 6, D, C)

    @jax.jit
    def accumulated(features, kernel, labels):
        @jax.checkpoint
        def total(kernel, features, labels):
            return jnp.sum(rule(features, kernel, labels, margin=3, lam=0.0))

        def step(carry, microbatch):
            return carry + jax.grad(total)(kernel, *microbatch), None

        batches = features.reshape(3, 2, D), labels.reshape(3, 2)
        return jax.lax.scan(step, jnp.zeros_like(kernel), batches)[0]

    kernel_bar = accumulated(*as_arrays(problem, jnp.float64))
    assert_close(kernel_bar, oracle.loss_pullback(*problem, np.ones(6), 3)[1], 1e-12)


def test_second_order_in_reverse_mode(x64):
    features, kernel, labels = as_arrays(oracle.problem(16, 3, D, C), jnp.float64)

    @jax.jit
    def loss(features, kernel, lam):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=3, lam=lam, label_smoothing=0.1)

    check_grads(loss, (features, kernel, jnp.float64(0.7)), order=2, modes=["rev"])


@pytest.mark.parametrize(("rule", "plan"), LOSS_AND_SUM_PLANS)
def test_reverse_over_reverse_is_the_derivative_of_the_oracles_gradient(x64, rule, plan):
    problem = oracle.problem(17, *RAGGED)
    rng = np.random.default_rng(17)
    cotangent, direction = rng.standard_normal(6), rng.standard_normal((8, 11))

    @jax.jit
    def moved(features, kernel, labels, cotangent, direction):
        bars = rule(features, kernel, labels, cotangent, 0.5, margin=4, plan=PLANS[plan])[1]
        return jnp.vdot(direction, bars[1])

    hessian_vector = jax.jit(jax.grad(moved, argnums=(0, 1)))(
        *as_arrays(problem, jnp.float64), jnp.asarray(cotangent), jnp.asarray(direction)
    )
    up, down = (
        oracle.loss_pullback(*problem._replace(kernel=problem.kernel + h), cotangent, 4, 0.5)
        for h in (1e-6 * direction, -1e-6 * direction)
    )
    wanted = [(one - other) / 2e-6 for one, other in zip(up[:2], down[:2], strict=True)]
    assert_all_close(hessian_vector, wanted, 1e-7)


def test_statistics_are_what_the_loss_saw(x64):
    problem = oracle.problem(18, B, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float64)

    @jax.jit
    def loss(features, kernel, lam):
        value, seen = lsm.lsoftmax_loss_and_statistics(features, kernel, labels, margin=4, lam=lam)
        return jnp.sum(value), (value, seen)

    gradients, (value, seen) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        features, kernel, jnp.float64(0.5)
    )
    rows = np.arange(B)
    plain = problem.features @ problem.kernel
    theta = oracle.target_geometry(*problem)[-1]
    assert_close(value, oracle.loss(*problem, 4, 0.5), 1e-12)
    assert_close(seen.target_cosine, np.cos(theta), 1e-12)
    assert_close(seen.target_logit, oracle.logits(*problem, 4, 0.5)[rows, problem.labels], 1e-12)
    assert_close(seen.plain_logit, plain[rows, problem.labels], 1e-12)
    plain[rows, problem.labels] = -np.inf
    assert_close(seen.max_logit, np.max(plain, axis=1), 1e-12)
    assert_all_close(gradients, oracle.loss_pullback(*problem, np.ones(B), 4, 0.5)[:2], 1e-12)


def test_the_target_cosine_is_one_whose_angle_exists():
    """Of parallel features rounding pushes about every fourth cosine past 1."""
    kernel = np.random.default_rng(0).standard_normal((D, 64))
    features = np.concatenate([0.3 * kernel.T, -1.7 * kernel.T])
    operands = jnp.asarray(features, jnp.float32), jnp.asarray(kernel, jnp.float32)
    labels = jnp.concatenate([jnp.arange(64), jnp.arange(64)])
    _, seen = jax.jit(lambda *a: lsm.lsoftmax_loss_and_statistics(*a, margin=4, lam=0.0))(
        *operands, labels
    )
    np.testing.assert_allclose(seen.target_cosine, np.repeat([1.0, -1.0], 64), rtol=1e-6)
    assert np.max(np.abs(seen.target_cosine)) <= 1


@pytest.mark.parametrize("plan", ["row blocks with a tail", "class blocks, recomputed"])
def test_statistics_of_the_other_plans(plan):
    features, kernel, labels = as_arrays(oracle.problem(18, *RAGGED), jnp.float32)
    loss = functools.partial(
        jax.jit(lsm.lsoftmax_loss_and_statistics, static_argnames=STATIC),
        features,
        kernel,
        labels,
        margin=4,
        lam=0.0,
    )
    chex.assert_trees_all_close(loss(plan=PLANS[plan]), loss(), rtol=1e-5)


def large_arrays(residuals, size):
    return [leaf for leaf in jax.tree.leaves(residuals) if leaf.size >= size]


def test_the_loss_keeps_one_array_of_batch_by_classes_and_the_sum_none():
    operands = jnp.ones((64, 2)), jnp.ones((2, 128))
    labels = jnp.zeros(64, jnp.int32)

    def kept(rule, **plan):
        def residuals(features, kernel):
            return jax.vjp(
                lambda f, k: rule(f, k, labels, margin=4, lam=0.0, plan=lsm.Plan(**plan)),
                features,
                kernel,
            )[1]

        return large_arrays(jax.eval_shape(residuals, *operands), 64 * 32)

    assert [leaf.shape for leaf in kept(lsm.lsoftmax_loss)] == [(64, 128)]
    assert not kept(lsm.lsoftmax_loss, class_block=32, keep_exponentials=False)
    assert not kept(lsm.lsoftmax_loss, row_block=32)
    assert not kept(lsm.lsoftmax_loss, keep_exponentials=False)
    assert not kept(lsm.lsoftmax_loss_sum)
    assert not kept(lsm.lsoftmax_loss_sum, row_block=32)


def test_three_products_for_a_gradient_and_one_without():
    operands = jnp.ones((6, 5)), jnp.ones((5, 301)), jnp.zeros(6, jnp.int32)

    def mean(features, kernel, labels):
        return jnp.mean(lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=0.0))

    total = functools.partial(lsm.lsoftmax_loss_sum, margin=4, lam=0.0)
    for rule in (mean, total):
        # As traced: outside jit nothing removes a product whose result nobody wants.
        assert str(jax.make_jaxpr(rule)(*operands)).count(" dot_general[") == 1
        gradient = jax.jit(jax.grad(rule, argnums=(0, 1))).lower(*operands)
        assert gradient.compile().as_text().count(" dot(") == 3


OVER_BATCH, OVER_CLASSES = (P("devices"), P()), (P(), P(None, "devices"))


@pytest.mark.parametrize(
    ("specs", "plan"),
    [
        (OVER_BATCH, "one-shot"),
        (OVER_BATCH, "row blocks with a tail"),
        (OVER_CLASSES, "one-shot"),
    ],
    ids=str,
)
def test_four_devices_give_the_numbers_of_one(mesh, specs, plan):
    problem = oracle.problem(19, 8, D, 8)
    features, kernel, labels = as_arrays(problem, jnp.float32)
    weights = jnp.asarray(np.random.default_rng(19).standard_normal(8), jnp.float32)
    rows, columns = (NamedSharding(mesh, spec) for spec in specs)

    @functools.partial(jax.jit, static_argnums=(4, 5))
    def both(features, kernel, labels, weights, margin, plan):
        def total(features, kernel, weights):
            static = {"margin": margin, "lam": 1.0, "plan": PLANS[plan]}
            loss = lsm.lsoftmax_loss(features, kernel, labels, **static)
            total = lsm.lsoftmax_loss_sum(features, kernel, labels, weights, **static)
            return jnp.sum(weights * loss) + total, loss

        return jax.grad(total, argnums=(0, 1, 2), has_aux=True)(features, kernel, weights)

    bars, loss = both(
        *jax.device_put((features, kernel, labels, weights), (rows, columns, rows, rows)), 4, plan
    )
    wanted = oracle.loss_pullback(*problem, 2 * np.asarray(weights, np.float64), 4, 1.0)
    assert_close(loss, oracle.loss(*problem, 4, 1.0), 1e-5)
    assert_all_close(bars, (*wanted[:2], 2 * oracle.loss(*problem, 4, 1.0)), 1e-5)


def test_pmap_gives_the_numbers_of_one_device():
    problem = oracle.problem(20, 8, D, C)
    features, kernel, labels = as_arrays(problem, jnp.float32)

    def step(features, kernel, labels):
        def mean(features, kernel):
            loss = lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=0.0)
            total = lsm.lsoftmax_loss_sum(features, kernel, labels, margin=4, lam=0.0)
            return jnp.mean(loss) + total / loss.size

        value, (features_bar, kernel_bar) = jax.value_and_grad(mean, argnums=(0, 1))(
            features, kernel
        )
        return *jax.lax.pmean((value, kernel_bar), "devices"), features_bar

    devices = jax.devices()[:4]
    value, kernel_bar, features_bar = jax.pmap(
        step, "devices", in_axes=(0, None, 0), devices=devices
    )(features.reshape(4, 2, D), kernel, labels.reshape(4, 2))
    wanted = oracle.loss_pullback(*problem, np.full(8, 2 / 8), 4)
    assert_close(value, np.full(4, 2 * np.mean(oracle.loss(*problem, 4))), 1e-5)
    assert_close(kernel_bar[0], wanted[1], 1e-5)
    assert_close(features_bar.reshape(8, D) / 4, wanted[0], 1e-5)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
def test_gradient_inside_shard_map_sums_over_devices(mesh, rule):
    """As for any JAX function: a replicated kernel's cotangent is the sum over the devices."""
    problem = oracle.problem(21, 8, D, C)

    def gradients(features, kernel, labels):
        def total(features, kernel):
            return jnp.sum(rule(features, kernel, labels, margin=4, lam=0.0))

        return jax.grad(total, argnums=(0, 1))(features, kernel)

    sharded = jax.shard_map(
        gradients,
        mesh=mesh,
        in_specs=(P("devices"), P(), P("devices")),
        out_specs=(P("devices"), P()),
    )
    features, kernel, labels = as_arrays(problem, jnp.float32)
    rows = NamedSharding(mesh, P("devices"))
    bars = jax.jit(sharded)(
        jax.device_put(features, rows),
        jax.device_put(kernel, NamedSharding(mesh, P())),
        jax.device_put(labels, rows),
    )
    assert_all_close(bars, oracle.loss_pullback(*problem, np.ones(8), 4)[:2], 1e-5)


GOOD = {
    "features": np.ones((B, D), np.float32),
    "kernel": np.ones((D, C), np.float32),
    "labels": np.zeros(B, np.int32),
    "margin": 4,
    "lam": 0.0,
}
MISTAKES = [
    ("margin", 0, ValueError),
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
    ("kernel", np.ones(D, np.float32), ValueError),
    ("kernel", np.ones((D + 1, C), np.float32), ValueError),
    ("kernel", np.ones((D, 0), np.float32), ValueError),
    ("kernel", np.ones((D, C), np.int32), TypeError),
    ("features", np.ones((B, D), np.int32), TypeError),
    ("features", np.float32(1), ValueError),
    ("label_smoothing", -0.1, ValueError),
    ("label_smoothing", 1.1, ValueError),
    ("label_smoothing", float("nan"), ValueError),
    ("label_smoothing", "0.1", TypeError),
    ("labels", None, TypeError),
    ("where", np.ones(B + 1, bool), ValueError),
    ("where", np.ones((B, C), bool), ValueError),
    ("where", np.ones(B, np.int32), TypeError),
    ("where", np.ones(B, np.float32), TypeError),
    ("plan", {"row_block": 4}, TypeError),
]


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
@pytest.mark.parametrize(("argument", "value", "error"), MISTAKES)
def test_mistakes_are_named(rule, argument, value, error):
    with pytest.raises(error, match=argument):
        rule(**{**GOOD, argument: value})


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        (np.ones(B + 1, np.float32), ValueError),
        (np.float32(1), ValueError),
        (np.ones(B, np.int32), TypeError),
    ],
)
def test_weights_mistakes_are_named(weights, error):
    with pytest.raises(error, match="weights"):
        lsm.lsoftmax_loss_sum(**GOOD, weights=weights)


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("row_block", 0, ValueError),
        ("row_block", 2.0, TypeError),
        ("class_block", -1, ValueError),
        ("class_block", True, TypeError),
        ("memory_budget", -1, ValueError),
        ("memory_budget", "1 GB", TypeError),
        ("keep_exponentials", "yes", TypeError),
    ],
)
def test_mistakes_in_a_plan_are_named(argument, value, error):
    with pytest.raises(error, match=argument):
        lsm.Plan(**{argument: value})


def test_two_kinds_of_blocks_at_once_are_refused():
    with pytest.raises(ValueError, match="row_block and class_block"):
        lsm.Plan(row_block=2, class_block=2)


@pytest.mark.parametrize("rule", [lsm.lsoftmax_loss, lsm.lsoftmax_loss_sum])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_soft_labels_are_refused_in_words(rule, dtype):
    with pytest.raises((TypeError, ValueError), match="margin belongs to one class"):
        rule(**{**GOOD, "labels": np.ones((B, C), dtype)})


@pytest.mark.parametrize(
    ("plan", "summed", "pieces"),
    [
        (lsm.Plan(2**30, None, None, None), True, Pieces()),
        (lsm.Plan(2**30, None, None, True), False, Pieces()),
        (
            lsm.Plan(1024 * 10**5 * 3, None, None, None),
            True,
            Pieces(row_block=768, keep_exponentials=False),
        ),
        (lsm.Plan(1024 * 10**5 * 3, None, None, None), False, Pieces(None, 8192, False)),
        (lsm.Plan(2**22, None, None, None), True, Pieces(None, 512, False)),
        (lsm.Plan(2**22, None, None, True), True, Pieces(None, 512, True)),
        (lsm.Plan(2**30, None, None, False), True, Pieces(None, 8192, False)),
        (lsm.Plan(2**30, 300, None, None), True, Pieces(row_block=300, keep_exponentials=False)),
        (lsm.Plan(2**30, None, 10**6, None), False, Pieces(None, 10**5, True)),
    ],
)
def test_the_budget_chooses_the_plan(plan, summed, pieces):
    """For 1024 rows and 100,000 classes in float32, 410 MB of logits."""
    dtype = jnp.dtype(jnp.float32)
    assert pieces_of(plan, 1024, 10**5, dtype, rows_cost_no_more=summed) == pieces
