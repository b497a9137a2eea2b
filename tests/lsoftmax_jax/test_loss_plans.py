"""Every plan gives the same numbers, and a memory budget chooses the expected plan."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from lsoftmax_jax._core.spec import Pieces, pieces_of
from tests import oracle
from tests.answers import (
    MANY,
    PLANS,
    RAGGED,
    STATIC,
    assert_gradients_close,
    loss_and_gradients,
    sum_and_gradients,
)
from tests.oracle import as_arrays, assert_close


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_the_same_loss_and_gradients(x64, plan):
    problem = oracle.problem(2, *RAGGED)
    rng = np.random.default_rng(2)
    cotangent, where = rng.standard_normal(6), np.arange(6) != 3
    loss, pulled = loss_and_gradients(
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
    assert_gradients_close(pulled, wanted, 1e-12)


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
    assert_gradients_close(gradients, wanted._replace(weights=loss), 1e-12)


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


@pytest.mark.parametrize(
    ("plan", "summed", "pieces"),
    [
        (lsm.Plan(2**30, None, None, None), True, Pieces(cpu_block=1024)),
        (lsm.Plan(2**30, None, None, True), False, Pieces(cpu_block=1024)),
        (
            lsm.Plan(1024 * 10**5 * 3, None, None, None),
            True,
            Pieces(row_block=768, keep_exponentials=False),
        ),
        (lsm.Plan(1024 * 10**5 * 3, None, None, None), False, Pieces(None, 8192, False)),
        (lsm.Plan(2**22, None, None, None), True, Pieces(None, 512, False)),
        # The budget holds two float32 arrays of 1024 rows by 1023 classes: 7 blocks of 128 fit.
        (lsm.Plan(2**13 * 1023, None, None, None), True, Pieces(None, 896, False)),
        (lsm.Plan(2**22, None, None, True), True, Pieces(None, 512, True)),
        (lsm.Plan(2**30, None, None, False), True, Pieces(None, 8192, False)),
        (lsm.Plan(2**30, 300, None, None), True, Pieces(row_block=300, keep_exponentials=False)),
        (lsm.Plan(2**30, None, 10**6, None), False, Pieces(None, 10**5, True)),
    ],
)
def test_the_budget_chooses_the_plan(plan, summed, pieces):
    """For 1024 rows and 100,000 classes in float32, 410 MB of logits."""
    dtype = jnp.dtype(jnp.float32)
    assert pieces_of(plan, 1024, 10**5, dtype, one_pass=summed) == pieces


@pytest.mark.parametrize(
    ("batch", "classes", "dtype", "block"),
    [
        (512, 2**14, "float32", 1024),
        (512, 2**14, "float64", 1024),
        (512, 2**14, "bfloat16", None),
        (511, 2**14, "float32", None),
        (1024, 2**14 - 1, "float32", None),
    ],
)
def test_a_cpu_takes_blocks_of_many_classes(batch, classes, dtype, block):
    found = pieces_of(None, batch, classes, jnp.dtype(dtype), one_pass=True)
    assert found == Pieces(cpu_block=block)


@pytest.mark.parametrize(
    ("classes", "summed", "pieces"),
    [
        (150, False, Pieces(row_block=6976, keep_exponentials=False)),
        (300, False, Pieces(row_block=3456, keep_exponentials=False)),
        (300, True, Pieces(row_block=3456, keep_exponentials=False)),
        (10**4, False, Pieces(None, 512, False)),  # row blocks would be too small
    ],
)
def test_the_budget_holds_where_rows_are_many(classes, summed, pieces):
    """512 classes are the smallest block, here 268 MB, of a budget of 4 MiB."""
    found = pieces_of(lsm.Plan(2**22), 65536, classes, jnp.dtype(jnp.float32), one_pass=summed)
    assert found == pieces
