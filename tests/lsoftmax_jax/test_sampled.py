"""Sampled classes: the sample, its uniformity, and its loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from scipy import stats

import lsoftmax_jax as lsm
from lsoftmax_jax import sampled
from steps import mesh_of
from tests import oracle

BATCH, DIM, CLASSES = 7, 5, 11

draw = jax.jit(lsm.sample_classes, static_argnums=(2, 3))


def test_a_sample_is_the_labels_and_distinct_others():
    classes, negatives = 10_007, 500
    labels = jnp.array([5, 17, 5, 10_006, 0])
    sample = draw(jax.random.key(3), labels, classes, negatives)
    ids = np.asarray(sample.ids)
    real = ids[ids < classes]
    assert len(set(real)) == len(real)
    assert set(np.asarray(labels).tolist()) <= set(real.tolist())
    np.testing.assert_array_equal(ids[np.asarray(sample.labels)], labels)
    np.testing.assert_array_equal(np.isneginf(sample.offset), ids == classes)
    drawn = ids[5:]
    wanted = np.log((classes - 4) / np.sum(drawn < classes))
    np.testing.assert_allclose(sample.offset[5:][drawn < classes], wanted, rtol=1e-6)
    assert not np.any(np.asarray(sample.offset)[:5][ids[:5] < classes])


def test_drawing_all_classes_draws_each_once():
    sample = draw(jax.random.key(0), jnp.array([3]), 5000, 5000)
    np.testing.assert_array_equal(np.sort(sample.ids), [*range(5000), 5000])


@pytest.mark.parametrize("classes", [50, 6000], ids=["shuffled", "Feistel network"])
def test_the_draw_is_uniform(classes):
    """Chi-squared tests of how often a class is drawn, is first, is last, and follows another."""
    negatives, keys = 20, 30_000
    labels = jnp.zeros(0, jnp.int32)
    ids_of = jax.vmap(lambda key: lsm.sample_classes(key, labels, classes, negatives).ids)
    ids = np.asarray(jax.jit(ids_of)(jax.random.split(jax.random.key(7), keys)))

    def surprise(counts, variance_share=1.0):
        expected = counts.sum() / counts.size
        statistic = np.sum((counts - expected) ** 2) / (expected * variance_share)
        return stats.chi2.sf(statistic, counts.size - 1)

    # A draw contains a class at most once, which lowers the variance.
    counts = np.bincount(ids.ravel(), minlength=classes)
    assert surprise(counts, (classes - negatives) / (classes - 1)) > 1e-3
    assert surprise(np.bincount(ids[:, 0], minlength=classes)) > 1e-3
    assert surprise(np.bincount(ids[:, -1], minlength=classes)) > 1e-3
    follows = (ids[:, 1] - ids[:, 0]) % classes
    assert surprise(np.bincount(follows, minlength=classes)[1:]) > 1e-3


def sampled_loss(columns, features, sample):
    return jnp.sum(lsm.lsoftmax_sampled_loss(features, columns, sample, margin=3, lam=1.0))


def test_all_classes_drawn_is_the_exact_loss_and_gradient(x64):
    features, kernel, labels = oracle.as_arrays(oracle.problem(1, BATCH, DIM, CLASSES), jnp.float64)
    sample = draw(jax.random.key(0), labels, CLASSES, CLASSES)
    columns = lsm.sampled.take_columns(kernel, sample)
    pulled_back = jax.jit(jax.value_and_grad(sampled_loss, (0, 1)))
    loss, (dcolumns, dfeatures) = pulled_back(columns, features, sample)
    arrays = [np.asarray(array) for array in (features, kernel, labels)]
    pulled = oracle.loss_pullback(*arrays, np.ones(BATCH), 3, 1.0)
    oracle.assert_close(loss, np.sum(oracle.loss(*arrays, 3, 1.0)), 1e-12)
    oracle.assert_close(dfeatures, pulled.features, 1e-12)
    dkernel = lsm.sampled.put_columns(jnp.zeros_like(kernel), sample, dcolumns)
    oracle.assert_close(dkernel, pulled.kernel, 1e-12)


def test_the_sum_of_exponentials_is_unbiased(x64):
    """exp(loss) - 1 is linear in the sum of the others' exponentials, so the means must agree."""
    features, kernel, labels = oracle.as_arrays(oracle.problem(5, 3, 4, 40), jnp.float64)

    @jax.jit
    @jax.vmap
    def odds(key):
        sample = lsm.sample_classes(key, labels, 40, 8)
        columns = lsm.sampled.take_columns(kernel, sample)
        return jnp.expm1(lsm.lsoftmax_sampled_loss(features, columns, sample, margin=2, lam=0.0))

    drawn = np.asarray(odds(jax.random.split(jax.random.key(1), 20_000)))
    exact = np.expm1(oracle.loss(*[np.asarray(a) for a in (features, kernel, labels)], 2))
    error = drawn.std(axis=0) / np.sqrt(len(drawn))
    assert np.all(np.abs(drawn.mean(axis=0) - exact) < 4 * error)
    assert np.all(error < 0.05 * exact)


def test_only_drawn_columns_and_their_optimiser_state_change():
    features, kernel, labels = oracle.as_arrays(oracle.problem(1, 4, DIM, 200), jnp.float32)
    optimizer = optax.sgd(0.1, momentum=0.9)
    trace = jnp.full_like(kernel, 0.5)
    sample = draw(jax.random.key(2), labels, 200, 10)
    columns, drawn_trace = (lsm.sampled.take_columns(a, sample) for a in (kernel, trace))
    gradient = jax.jit(jax.grad(sampled_loss))(columns, features, sample)
    state = optax.tree.set(optimizer.init(columns), trace=drawn_trace)
    updates, state = optimizer.update(gradient, state, columns)
    changed = lsm.sampled.put_columns(kernel, sample, optax.apply_updates(columns, updates))
    new_trace = lsm.sampled.put_columns(trace, sample, optax.tree.get(state, "trace"))
    drawn = np.unique(np.asarray(sample.ids))
    drawn = drawn[drawn < 200]
    rest = np.setdiff1d(np.arange(200), drawn)
    np.testing.assert_array_equal(changed[:, rest], kernel[:, rest])
    np.testing.assert_array_equal(new_trace[:, rest], trace[:, rest])
    assert np.all(np.any(np.asarray(changed[:, drawn] != kernel[:, drawn]), axis=0))


def test_a_class_that_a_device_does_not_hold_is_nan():
    """A sample drawn for whole arrays, or for shards of another width, has classes elsewhere."""
    mesh = jax.make_mesh((4,), ("model",), (AxisType.Auto,), devices=jax.devices()[:4])
    layout, labels = lsm.ClassParallel("model", mesh=mesh), jnp.array([9, 8, 5, 0])
    kernel = jnp.ones((DIM, 16))
    for sample in (
        lsm.sample_classes(jax.random.key(0), labels, 10, 8),
        lsm.sample_classes(jax.random.key(0), labels, 10, 8, layout=layout),  # shards of 3
    ):
        columns = lsm.sampled.take_columns(kernel, sample, layout=layout)
        assert np.isnan(columns[0, np.asarray(sample.labels)]).any()
    more = lsm.sample_classes(jax.random.key(0), labels, 10, 8)
    assert np.isnan(lsm.sampled.take_columns(kernel[:, :9], more)).any(axis=0).sum() == 1


def test_invalid_labels_give_nan_unless_masked():
    features, kernel, labels = oracle.as_arrays(oracle.problem(1, BATCH, DIM, 50), jnp.float32)
    labels = labels.at[0].set(-1).at[1].set(50)
    sample = draw(jax.random.key(0), labels, 50, 10)
    columns = lsm.sampled.take_columns(kernel, sample)
    where = jnp.ones(BATCH, bool).at[1].set(False)
    sampled_loss = jax.jit(partial(lsm.lsoftmax_sampled_loss, margin=3, lam=0.0))
    loss = sampled_loss(features, columns, sample, where=where)
    assert np.isnan(loss[0]) and loss[1] == 0 and np.all(np.isfinite(loss[2:]))


def test_the_loss_of_each_example_has_the_plan_of_the_exact_loss():
    """Row blocks, which a sum computes once, would cost a fourth product here."""
    plan = lsm.Plan(memory_budget=2**22)
    features, kernel, labels = jnp.ones((2048, 4)), jnp.ones((4, 1024)), jnp.zeros(2048, int)
    sample = lsm.sample_classes(jax.random.key(0), labels[:7], 1024, 1017)
    sample = sample._replace(labels=labels)
    keywords = {"margin": 3, "lam": 0.0, "plan": plan}

    def lowered(loss, *arguments):
        text = jax.jit(partial(loss, **keywords)).lower(*arguments).as_text()
        return text.count("stablehlo.while"), text.count("1024x4x")

    exact = lowered(lsm.lsoftmax_loss, features, kernel, labels)
    assert lowered(lsm.lsoftmax_sampled_loss, features, kernel, sample) == exact
    summed = lowered(lsm.lsoftmax_loss_sum, features, kernel, labels)
    assert lowered(lsm.lsoftmax_sampled_loss_sum, features, kernel, sample) == summed


def test_a_kernel_in_shards_wants_its_layout():
    """On Explicit axes JAX would refuse the indices in words of its own."""
    mesh = mesh_of(2, kind=AxisType.Explicit)
    sample = lsm.sample_classes(jax.random.key(0), jnp.zeros(3, int), 4, 2)

    def taken(kernel):
        return lsm.sampled.take_columns(jax.sharding.reshard(kernel, P(None, "data")), sample)

    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"layout must be given .*4@data"):
        jax.jit(taken)(jnp.ones((2, 4)))


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        ((jnp.zeros(3, int), 10, 11), ValueError, "negatives"),
        ((jnp.zeros(3, int), 10, 0), ValueError, "negatives"),
        ((jnp.zeros(3, int), 0, 1), ValueError, "classes"),
        ((jnp.zeros(3), 10, 1), TypeError, "labels"),
    ],
)
def test_mistakes_are_named(arguments, error, name):
    with pytest.raises(error, match=name):
        lsm.sample_classes(jax.random.key(0), *arguments)


def test_the_permutation_of_many_classes_is_a_feistel_network_of_murmurs():
    """Bit for bit: the same key draws the same classes in every version."""
    classes, key = 6000, jax.random.key(5)
    keys = [int(k) for k in jax.random.bits(key, (sampled._ROUNDS,), jnp.uint32)]

    def murmur(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    def image(x):
        left, right = divmod(x, 2**7)  # 6000 < 2^14
        for k in keys:
            left, right = right, left ^ murmur(right ^ k) % 2**7
        x = left * 2**7 + right
        return x if x < classes else image(x)

    wanted = [image(x) for x in range(40)]
    assert murmur(1) == 0x514E28B7  # the published finaliser's
    np.testing.assert_array_equal(sampled._permuted(key, classes, 40), wanted)
