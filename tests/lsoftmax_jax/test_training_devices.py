"""The step under pmap, shard_map and vmap gives the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import training
from lsoftmax_jax.nnx import LSoftmaxDense
from steps import (
    BATCH,
    LAM,
    OPTIMIZER,
    WIDTH,
    Headed,
    Line,
    Small,
    assert_close,
    images_and_labels,
    mesh_of,
    stacked,
)

pytestmark = pytest.mark.lax  # Optax's schedules multiply floats by integer steps

DEVICES = 4
HINGE = optax.losses.multiclass_hinge_loss


def over_shard_map(step, check_vma):
    """The step on four devices, with a replicated state and a split batch."""
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P(), "check_vma": check_vma}
    return jax.jit(jax.shard_map(step, mesh=mesh_of(DEVICES), **specs))


def over_pmap(step):
    """The same under pmap; checks that the devices' results are equal, and returns one result."""
    mapped = jax.pmap(step, "data", in_axes=(None, 0, 0), devices=jax.devices()[:DEVICES])

    def run(state, *batch):
        parts = jax.tree.map(lambda array: array.reshape(DEVICES, -1, *array.shape[1:]), batch)
        results = mapped(state, *parts)
        # Reading a row on the host compiles nothing.
        rows = jax.device_get(data_of(results))
        for i in range(1, DEVICES):
            assert_close(at(i, rows), at(0, rows))
        return at(0, results)

    return run


def data_of(tree):
    """Replaces random keys by their numbers."""
    keyed = jax.dtypes.prng_key
    return jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, keyed) else leaf, tree
    )


def at(row, tree):
    return jax.tree.map(lambda array: array[row], tree)


OVER_DEVICES = {
    "shard_map": lambda step: over_shard_map(step, True),
    "shard_map, unchecked": lambda step: over_shard_map(step, False),
    "pmap": over_pmap,
}


@pytest.fixture(params=OVER_DEVICES.values(), ids=OVER_DEVICES)
def over_devices(request):
    return request.param


class Normed(Line):
    """A Line with batch normalisation."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    def __call__(self, rows):
        return super().__call__(rows) + self.norm(self.layer(rows))


@functools.cache
def normed():
    return training.create(Normed(nnx.Rngs(0)), OPTIMIZER)


def two_updates(wrap, lam, loss, axis_name):
    graphdef, reached = normed()
    step = training.train_step(graphdef, OPTIMIZER, lam, loss=loss, axis_name=axis_name)
    run, seen = wrap(step), []
    for _ in range(2):
        reached, metrics = run(reached, *images_and_labels(BATCH, WIDTH))
        seen.append(metrics)
    return reached, seen


@functools.cache
def two_updates_of_one_device(lam, loss):
    return two_updates(jax.jit, lam, loss, None)


@pytest.mark.parametrize(
    ("lam", "loss"),
    [(LAM, None), (None, None), (lsm.self_paced(), None), (LAM, HINGE)],
    ids=["schedule", "the head's rule", "self-paced", "own loss"],
)
def test_devices_give_one_devices_numbers(over_devices, lam, loss):
    found = two_updates(over_devices, lam, loss, "data")
    assert_close(found, two_updates_of_one_device(lam, loss))


def test_evaluation_on_devices_gives_one_devices_numbers(over_devices):
    graphdef, state = normed()
    batch = images_and_labels(BATCH, WIDTH)
    sums = over_devices(training.eval_step(graphdef, axis_name="data"))(state, *batch)
    assert_close(sums, jax.jit(training.eval_step(graphdef))(state, *batch))


def test_a_convolution_under_pmap_gives_one_devices_numbers():
    graphdef, state = training.create(Small(nnx.Rngs(0)), OPTIMIZER)
    batch = images_and_labels(BATCH, 4, 4, 1)
    step = over_pmap(training.train_step(graphdef, OPTIMIZER, LAM, axis_name="data"))
    single = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
    assert_close(step(state, *batch), single(state, *batch))


def test_the_step_sums_over_an_axis_of_vmap():
    graphdef, state = normed()
    images, labels = images_and_labels(BATCH, WIDTH)
    step = training.train_step(graphdef, OPTIMIZER, LAM, axis_name="data")
    mapped = jax.jit(jax.vmap(step, (None, 0, 0), axis_name="data"))
    after = mapped(state, images.reshape(2, -1, WIDTH), labels.reshape(2, -1))
    single = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))(state, images, labels)
    assert_close(after, stacked([single] * 2))


class Watching(Headed):
    """Keeps the mean of its rows, and counts its calls."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.mean, self.calls = nnx.Variable(jnp.zeros(3)), nnx.Variable(jnp.zeros((), int))

    def __call__(self, rows):
        self.mean[...], self.calls[...] = jnp.mean(rows, axis=0), self.calls[...] + 1
        return rows


def test_statistics_of_the_models_own_are_averaged(over_devices):
    graphdef, state = training.create(Watching(nnx.Rngs(0)), OPTIMIZER)
    rows, labels = images_and_labels(BATCH, 3)
    step = training.train_step(graphdef, OPTIMIZER, LAM, axis_name="data")
    after, _ = over_devices(step)(state, rows, labels)
    np.testing.assert_allclose(after.other["mean"], rows.mean(axis=0), rtol=1e-5)
    assert after.other["calls"] == 1


COLUMNS = 4096


class Dropping(nnx.Module):
    """Drops half of many ones, and keeps their mean over all rows as a batch statistic."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(COLUMNS, momentum=0.0, use_scale=False, use_bias=False, rngs=rngs)
        self.head = lsm.nnx.LSoftmaxDense(COLUMNS, 2, rngs=rngs)

    def __call__(self, rows):
        return self.norm(self.dropout(jnp.broadcast_to(rows, (len(rows), COLUMNS))))


def test_every_device_draws_its_own_dropout(over_devices):
    """Each mean is that of four coins that show 0 or 2; a shared mask would give only 0 or 2."""
    graphdef, state = training.create(Dropping(nnx.Rngs(0)), optax.sgd(0.1))
    step = training.train_step(graphdef, optax.sgd(0.1), LAM, axis_name="data")
    run, means = over_devices(step), []
    batch = np.ones((DEVICES, 1), np.float32), np.zeros(DEVICES, np.int32)
    reached = state
    for _ in range(2):
        reached, metrics = run(reached, *batch)
        means.append(np.asarray(reached.other["norm"]["mean"]))
        assert not metrics.skipped
    for mean in means:
        found = [np.mean(np.isclose(mean, value)) for value in (0, 0.5, 1, 1.5, 2)]
        np.testing.assert_allclose(found, np.array([1, 4, 6, 4, 1]) / 16, atol=0.03)
    assert np.mean(means[0] == means[1]) < 0.5
    # The random streams stay the same on every device, and advance.
    before, after = (data_of(tree.other["dropout"]["rngs"]) for tree in (state, reached))
    np.testing.assert_array_equal(after["key"], before["key"])
    assert after["count"] == before["count"] + 2


def test_seeds_train_together():
    states = [training.create(Normed(nnx.Rngs(seed)), OPTIMIZER) for seed in (0, 1)]
    graphdef, batch = states[0][0], images_and_labels(BATCH, WIDTH)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    together = jax.jit(jax.vmap(step, (0, None, None)))(stacked([s for _, s in states]), *batch)
    alone = [jax.jit(step)(state, *batch) for _, state in states]
    assert_close(together, stacked(alone))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_jitted_step_of_a_large_split_kernel_gives_one_devices_numbers(kind):
    """From 2**16 numbers on the columns' lengths come from a loop that Explicit axes refuse."""

    class Many(nnx.Module):
        def __init__(self, layout):
            self.head = LSoftmaxDense(66, 1001, layout=layout, rngs=nnx.Rngs(0))

        def __call__(self, rows):
            return rows

    rows, labels = images_and_labels(BATCH, 66)
    optimizer, metrics = optax.sgd(0.1), []
    for layout, mesh in (
        (None, mesh_of(1, 1)),
        (lsm.ClassParallel("model", "data"), mesh_of(2, 2, kind=kind)),
    ):
        with jax.set_mesh(mesh):
            graphdef, state = training.create(Many(layout), optimizer)
            batch = jax.device_put((rows, labels), NamedSharding(mesh, P("data")))
            metrics.append(jax.jit(training.train_step(graphdef, optimizer))(state, *batch)[1])
    assert_close(*metrics)
