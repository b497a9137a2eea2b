"""Sampled classes on a mesh: each device draws, reads and writes only its own columns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from tests import oracle
from tests.lsoftmax_jax.test_sharded import COLLECTIVE

BATCH, DIM, CLASSES = 16, 5, 43
STATIC = {"margin": 4, "lam": 2.0}
MESHES = {
    "one axis": ((8,), ("model",), ("model",)),
    "data by model": ((2, 4), ("data", "model"), ("data",)),
    "features over both": ((2, 4), ("data", "model"), ("data", "model")),
}


@pytest.fixture(params=MESHES.values(), ids=MESHES)
def layout(request):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, {jax.devices()[0].platform} has {jax.device_count()}")
    shape, names, axes = request.param
    mesh = jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape))
    return lsm.ClassParallel("model", axes, mesh, CLASSES)


def placed(layout, dtype):
    features, kernel, labels = oracle.problem(3, BATCH, DIM, CLASSES)
    filled = np.full((DIM, layout.columns(CLASSES)), 7.0)
    filled[:, :CLASSES] = kernel
    rows, columns = P(layout.batch_axes), P(None, "model")
    arrays = (features, dtype, rows), (filled, dtype, columns), (labels, jnp.int32, rows)
    return [
        jax.device_put(jnp.asarray(array, kind), NamedSharding(layout.mesh, spec))
        for array, kind, spec in arrays
    ]


def test_all_classes_drawn_is_the_exact_class_parallel_loss(x64, layout):
    features, kernel, labels = placed(layout, jnp.float64)
    count = kernel.shape[1]
    whole = lsm.ClassParallel("model", layout.batch_axes, layout.mesh)

    @jax.jit
    def both(features, kernel, labels):
        sample = lsm.sample_classes(jax.random.key(0), labels, count, count, layout=whole)

        def drawn(features, kernel):
            columns = lsm.sampled.take_columns(kernel, sample, layout=whole)
            return lsm.lsoftmax_sampled_loss_sum(features, columns, sample, layout=whole, **STATIC)

        def exact(features, kernel):
            return lsm.lsoftmax_loss_sum(features, kernel, labels, layout=whole, **STATIC)

        return [jax.value_and_grad(rule, (0, 1))(features, kernel) for rule in (drawn, exact)]

    drawn, exact = both(features, kernel, labels)
    for one, other in zip(jax.tree.leaves(drawn), jax.tree.leaves(exact), strict=True):
        oracle.assert_close(one, other, 1e-12)


def test_no_column_leaves_its_device_and_only_drawn_ones_change(layout):
    _, kernel, labels = placed(layout, jnp.float32)

    def update(kernel, labels):
        sample = lsm.sample_classes(jax.random.key(0), labels, CLASSES, 16, layout=layout)
        columns = lsm.sampled.take_columns(kernel, sample, layout=layout)
        return sample, lsm.sampled.put_columns(kernel, sample, columns + 1, layout=layout)

    lowered = jax.jit(update).lower(kernel, labels)
    compiled = lowered.compile()
    moved = [shape for shape, _ in COLLECTIVE.findall(compiled.as_text())]
    assert not any("f32[" in shape for shape in moved), moved
    sample, changed = compiled(kernel, labels)
    drawn = np.unique(np.asarray(sample.ids))
    drawn = drawn[drawn < CLASSES]
    assert set(np.asarray(labels).tolist()) <= set(drawn.tolist())
    wanted = np.array(kernel)
    wanted[:, drawn] += 1
    np.testing.assert_array_equal(changed, wanted)


def test_few_collectives_of_the_sampled_sum(layout):
    features, kernel, labels = placed(layout, jnp.float32)
    sample = jax.jit(
        lambda labels: lsm.sample_classes(jax.random.key(0), labels, CLASSES, 16, layout=layout)
    )(labels)
    columns = lsm.sampled.take_columns(kernel, sample, layout=layout)

    @jax.jit
    def total(features, columns, sample):
        def rule(features, columns):
            return lsm.lsoftmax_sampled_loss_sum(features, columns, sample, layout=layout, **STATIC)

        return jax.value_and_grad(rule, (0, 1))(features, columns)

    split = NamedSharding(layout.mesh, P(layout.batch_axes))
    sample = sample._replace(labels=jax.device_put(sample.labels, split))
    text = total.lower(features, columns, sample).compile().as_text()
    found = COLLECTIVE.findall(text)
    assert 0 < len(found) <= 5, found


def test_a_kernel_with_more_columns_than_the_layout_asks_for_is_refused(layout):
    kernel = jnp.ones((DIM, layout.columns(CLASSES) + 8))
    sample = lsm.sample_classes(jax.random.key(0), jnp.arange(4), CLASSES, 8, layout=layout)
    with pytest.raises(ValueError, match=r"kernel must have .* columns for 43 classes"):
        lsm.sampled.take_columns(kernel, sample, layout=layout)
