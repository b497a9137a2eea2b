"""Compares the class-parallel losses on eight devices with the oracle; counts collectives."""

import dataclasses
import functools
import re
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import linen, nnx
from lsoftmax_jax._core.mesh import first_columns
from tests import oracle

BATCH, DIM, CLASSES, COLUMNS = 16, 5, 43, 48
MARGIN, LAM = 4, 2.0


class Layout(NamedTuple):
    shape: tuple[int, ...]
    names: tuple[str, ...]
    class_axis: str
    batch_axes: tuple[str, ...]
    collectives: int  # in the loss sum with its gradients


LAYOUTS = {
    "one axis": Layout((8,), ("model",), "model", ("model",), 3),
    "replicated features": Layout((8,), ("model",), "model", (), 2),
    "data by model": Layout((2, 4), ("data", "model"), "model", ("data",), 4),
    "features over both": Layout((2, 4), ("data", "model"), "model", ("data", "model"), 5),
    "features over both, crossed": Layout((2, 4), ("data", "model"), "model", ("model", "data"), 5),
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, {jax.devices()[0].platform} has {jax.device_count()}")
    return LAYOUTS[request.param]


def make_mesh(layout, axis_type=AxisType.Auto):
    return jax.make_mesh(layout.shape, layout.names, (axis_type,) * len(layout.shape))


def keywords(layout, mesh):
    parallel = lsm.ClassParallel(layout.class_axis, layout.batch_axes, mesh, CLASSES)
    return {"layout": parallel, "margin": MARGIN}


def placed(layout, mesh, dtype):
    """Places features, the kernel padded to COLUMNS, labels and cotangent on their devices."""
    features, kernel, labels = oracle.problem(3, BATCH, DIM, CLASSES)
    filled = np.full((DIM, COLUMNS), 7.0)
    filled[:, :CLASSES] = kernel
    cotangent = np.random.default_rng(4).standard_normal(BATCH)
    rows, columns = P(layout.batch_axes or None), P(None, layout.class_axis)
    arrays = (
        (jnp.asarray(features, dtype), rows),
        (jnp.asarray(filled, dtype), columns),
        (jnp.asarray(labels, jnp.int32), rows),
        (jnp.asarray(cotangent, np.promote_types(dtype, np.float32)), rows),
    )
    return [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in arrays]


def wanted(features, kernel, labels, cotangent, **static):
    arrays = np.asarray(features, np.float64), np.asarray(kernel, np.float64)[:, :CLASSES]
    loss = oracle.loss(*arrays, np.asarray(labels), MARGIN, LAM, **static)
    pulled = oracle.loss_pullback(
        *arrays, np.asarray(labels), np.asarray(cotangent, np.float64), MARGIN, LAM, **static
    )
    return loss, pulled


def assert_pulled(actual, pulled, tolerance):
    dfeatures, dkernel, *dlam = (np.asarray(gradient) for gradient in actual)
    oracle.assert_close(dfeatures, pulled.features, tolerance)
    oracle.assert_close(dkernel[:, :CLASSES], pulled.kernel, tolerance)
    assert not np.any(dkernel[:, CLASSES:])
    for value in dlam:
        oracle.assert_close(value, pulled.lam, tolerance)


PLANS = {
    "one-shot": lsm.Plan(),
    "class blocks": lsm.Plan(class_block=5, keep_exponentials=False),
    "kept class blocks": lsm.Plan(class_block=5, keep_exponentials=True),
    "row blocks": lsm.Plan(row_block=3),
}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_per_example_losses_and_gradients(x64, layout, axis_type):
    mesh = make_mesh(layout, axis_type)
    features, kernel, labels, cotangent = placed(layout, mesh, jnp.float64)

    @jax.jit
    def run(features, kernel, labels, lam, cotangent):
        loss, pull = jax.vjp(
            lambda *arrays: lsm.lsoftmax_loss(
                *arrays[:2], labels, lam=arrays[2], label_smoothing=0.1, **keywords(layout, mesh)
            ),
            features,
            kernel,
            lam,
        )
        return loss, pull(cotangent)

    with jax.set_mesh(mesh):
        loss, pulled = run(features, kernel, labels, jnp.float64(LAM), cotangent)
    exact = wanted(features, kernel, labels, cotangent, label_smoothing=0.1)
    oracle.assert_close(loss, exact[0], 1e-12)
    assert_pulled(pulled, exact[1], 1e-12)


@functools.partial(jax.jit, static_argnames=("layout", "mesh", "plan"))
def sum_and_gradients(features, kernel, labels, lam, weights, layout, mesh, plan=None):
    def total(features, kernel, lam):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights, lam=lam, plan=plan, **keywords(layout, mesh)
        )

    return jax.value_and_grad(total, (0, 1, 2))(features, kernel, lam)


# Blocks are cut within a device, so each plan runs where devices hold all rows, some, and some that
# others gather.
IN_BLOCKS = ("replicated features", "data by model", "features over both")


@pytest.mark.parametrize(
    ("layout", "plan"),
    [
        *((layout, "one-shot") for layout in LAYOUTS),
        *((layout, plan) for layout in IN_BLOCKS for plan in PLANS if plan != "one-shot"),
    ],
    indirect=["layout"],
)
def test_the_sum_by_every_plan(x64, layout, plan):
    mesh = make_mesh(layout)
    arrays = placed(layout, mesh, jnp.float64)
    features, kernel, labels, weights = arrays
    total, gradients = sum_and_gradients(
        features, kernel, labels, jnp.float64(LAM), weights, layout, mesh, PLANS[plan]
    )
    loss, pulled = wanted(*arrays)
    oracle.assert_close(total, np.sum(loss * np.asarray(weights)), 1e-12)
    assert_pulled(gradients, pulled, 1e-12)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sums_without_weights(x64, layout, axis_type):
    mesh = make_mesh(layout, axis_type)
    features, kernel, labels, _ = placed(layout, mesh, jnp.float64)
    ones = np.ones(BATCH)
    loss, pulled = wanted(features, kernel, labels, ones)
    with jax.set_mesh(mesh):
        total, gradients = sum_and_gradients(
            features, kernel, labels, jnp.float64(LAM), None, layout, mesh
        )
        done = jax.jit(
            lambda *arrays: lsm.lsoftmax_sgd(
                *arrays, lam=LAM, learning_rate=1.0, decay=0.0, **keywords(layout, mesh)
            )
        )(features, kernel, jnp.zeros_like(kernel), labels)
    oracle.assert_close(total, np.sum(loss), 1e-12)
    assert_pulled(gradients, pulled, 1e-12)
    oracle.assert_close(done.loss, np.sum(loss), 1e-12)
    assert_pulled((done.dfeatures, done.momentum), pulled, 1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_narrower_operands(dtype, layout):
    mesh = make_mesh(layout)
    arrays = placed(layout, mesh, dtype)
    features, kernel, labels, weights = arrays
    total, gradients = sum_and_gradients(
        features, kernel, labels, jnp.float32(LAM), weights, layout, mesh
    )
    assert gradients[0].dtype == gradients[1].dtype == dtype
    loss, pulled = wanted(*arrays)
    tolerance = 1e-5 if dtype == jnp.float32 else 6e-3
    oracle.assert_close(total, np.sum(loss * np.asarray(weights)), tolerance)
    assert_pulled(gradients[:2], pulled, tolerance)


COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_few_collectives_and_no_gathered_logits(layout, axis_type):
    mesh = make_mesh(layout, axis_type)
    features, kernel, labels, weights = placed(layout, mesh, jnp.float32)
    with jax.set_mesh(mesh):
        lowered = sum_and_gradients.lower(
            features, kernel, labels, jnp.float32(LAM), weights, layout, mesh
        )
    found = COLLECTIVE.findall(lowered.compile().as_text())
    assert 0 < len(found) <= layout.collectives <= 5, found
    groups = BATCH // (2 if "data" in layout.batch_axes else 1)
    shard = COLUMNS // mesh.shape["model"]
    for shape, _ in found:
        sizes = [tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", shape)]
        assert (groups, COLUMNS) not in sizes and (groups, shard) not in sizes, shape


def test_every_device_holds_only_its_columns(layout):
    mesh = make_mesh(layout)
    features, kernel, labels, weights = placed(layout, mesh, jnp.float32)
    _, gradients = sum_and_gradients(
        features, kernel, labels, jnp.float32(LAM), weights, layout, mesh
    )
    width = COLUMNS // mesh.shape["model"]
    assert {shard.data.shape for shard in gradients[1].addressable_shards} == {(DIM, width)}


def test_masks_statistics_and_invalid_labels(layout):
    mesh = make_mesh(layout)
    features, kernel, labels, _ = placed(layout, mesh, jnp.float32)
    labels = labels.at[2].set(CLASSES).at[3].set(-1)  # a padding column is not a class
    features = features.at[5].set(jnp.nan)
    where = jnp.ones(BATCH, bool).at[5].set(False).at[3].set(False)
    static = {"lam": LAM, "where": where}

    @jax.jit
    def both(features, kernel, labels):
        split = lsm.lsoftmax_loss_and_statistics(
            features, kernel, labels, **keywords(layout, mesh), **static
        )
        return split, lsm.lsoftmax_loss_and_statistics(
            features, kernel[:, :CLASSES], labels, margin=MARGIN, **static
        )

    (loss, seen), (plain, plain_seen) = both(features, kernel, labels)
    assert jnp.isnan(loss[2]) and loss[5] == loss[3] == 0
    chex.assert_trees_all_close(loss, plain, rtol=1e-5)
    real = np.delete(np.arange(BATCH), [2, 3, 5])
    assert np.all(np.asarray(seen.lam) == LAM)
    for one, other in zip(seen, plain_seen, strict=True):
        chex.assert_trees_all_close(one[real], other[real], rtol=1e-5)


def test_second_order(x64):
    layout = LAYOUTS["features over both"]
    mesh = make_mesh(layout)
    features, kernel, labels, cotangent = placed(layout, mesh, jnp.float64)

    def square(loss, classes):
        def of(features):
            gradient = jax.grad(lambda f: jnp.sum(cotangent * loss(f, kernel[:, :classes])))(
                features
            )
            return jnp.sum(gradient**2)

        return jax.jit(jax.grad(of))(features)

    split = square(
        lambda f, k: lsm.lsoftmax_loss(f, k, labels, lam=LAM, **keywords(layout, mesh)),
        COLUMNS,
    )
    whole = square(lambda f, k: lsm.lsoftmax_loss(f, k, labels, lam=LAM, margin=MARGIN), CLASSES)
    oracle.assert_close(split, whole, 1e-11)


def skip_where_explicit_axes_need_jit(axis_type):
    if axis_type is AxisType.Explicit and not hasattr(jax.lax, "pcast"):
        pytest.skip(f"Explicit axes outside jax.jit need a newer JAX than {jax.__version__}")


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_flax_heads_on_a_mesh(axis_type):
    skip_where_explicit_axes_need_jit(axis_type)
    layout = LAYOUTS["data by model"]
    mesh = make_mesh(layout, axis_type)
    features, _, labels, _ = placed(layout, mesh, jnp.float32)
    parallel = lsm.ClassParallel("model", "data")
    with jax.set_mesh(mesh):
        head = nnx.LSoftmaxDense(
            DIM, CLASSES, margin=MARGIN, layout=parallel, rngs=flax_nnx.Rngs(0)
        )
        kernel = head.kernel[...]
        assert kernel.shape == (DIM, 44)
        assert {shard.data.shape for shard in kernel.addressable_shards} == {(DIM, 11)}
        loss, gradient = flax_nnx.jit(
            flax_nnx.value_and_grad(lambda head: jnp.sum(head.loss(features, labels, LAM)))
        )(head)
        logits = flax_nnx.jit(lambda head: head(features, labels, LAM))(head)
        twin = linen.LSoftmaxDense(CLASSES, MARGIN, layout=parallel)
        params = {"params": {"kernel": kernel}}
        linen_loss = jax.jit(
            lambda params: twin.apply(params, features, labels, LAM, method=twin.loss)
        )(params)
        spec = flax_linen.get_partition_spec(jax.eval_shape(twin.init, jax.random.key(0), features))
    real = np.asarray(kernel)[:, :CLASSES]
    plain = jnp.asarray(np.asarray(features)), jnp.asarray(real), jnp.asarray(np.asarray(labels))
    whole, dkernel = jax.value_and_grad(
        lambda kernel: jnp.sum(
            lsm.lsoftmax_loss(plain[0], kernel, plain[2], margin=MARGIN, lam=LAM)
        )
    )(plain[1])
    assert spec["params"]["kernel"] == P(None, "model")
    np.testing.assert_allclose(loss, whole, rtol=1e-5)
    np.testing.assert_allclose(np.sum(np.asarray(linen_loss)), whole, rtol=1e-5)
    oracle.assert_close(np.asarray(gradient["kernel"][...])[:, :CLASSES], dkernel, 1e-5)
    exact = lsm.lsoftmax_logits(*plain, margin=MARGIN, lam=LAM)
    oracle.assert_close(logits, exact, 1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_the_flax_heads_on_a_mesh_that_is_given_and_not_set(axis_type):
    skip_where_explicit_axes_need_jit(axis_type)
    layout = LAYOUTS["data by model"]
    mesh = make_mesh(layout, axis_type)
    features, _, labels, _ = placed(layout, mesh, jnp.float32)
    parallel = lsm.ClassParallel("model", "data", mesh)
    head = nnx.LSoftmaxDense(DIM, CLASSES, margin=MARGIN, layout=parallel, rngs=flax_nnx.Rngs(0))
    kernel = head.kernel[...]
    assert kernel.sharding.spec == P(None, "model")
    twin = linen.LSoftmaxDense(CLASSES, MARGIN, layout=parallel)
    assert twin.init(jax.random.key(0), features)["params"]["kernel"].value.shape == kernel.shape
    params = {"params": {"kernel": kernel}}
    twins = jax.jit(lambda p: twin.apply(p, features, labels, LAM, method=twin.loss))(params)
    oracle.assert_close(jax.jit(lambda f: head.loss(f, labels, LAM))(features), twins, 1e-6)
    plain = np.asarray(features), np.asarray(kernel)[:, :CLASSES], np.asarray(labels)
    oracle.assert_close(twins, lsm.lsoftmax_loss(*plain, margin=MARGIN, lam=LAM), 1e-5)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_head_takes_the_types_of_the_axes_from_the_context(axis_type):
    layout = LAYOUTS["data by model"]
    other = AxisType.Explicit if axis_type is AxisType.Auto else AxisType.Auto
    parallel = lsm.ClassParallel("model", "data", make_mesh(layout, other))
    with jax.set_mesh(make_mesh(layout, axis_type)):
        head = nnx.LSoftmaxDense(DIM, CLASSES, layout=parallel, rngs=flax_nnx.Rngs(0))
        kernel = head.kernel[...]
        assert kernel.sharding.spec == P(None, "model")
        assert kernel.sharding.mesh.axis_types == (axis_type, axis_type)


def test_the_kernel_is_created_under_jit_where_no_device_holds_it_whole():
    layout = LAYOUTS["data by model"]
    mesh = make_mesh(layout)
    traced = []

    def init(key, shape, dtype):
        traced.append(isinstance(key, jax.core.Tracer))
        return jnp.zeros(shape, dtype)

    parallel = lsm.ClassParallel("model", "data", mesh)
    rngs = flax_nnx.Rngs(0)
    nnx.LSoftmaxDense(DIM, CLASSES, layout=parallel, kernel_init=init, rngs=rngs)
    assert traced == [True]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("kind", ["nnx", "linen", "linen, under jit"])
def test_a_kernel_is_made_in_shards_with_zeros_where_no_class_is(kind, axis_type):
    """The real columns are those of a head on one device, whatever the number of shards."""
    if kind == "linen" and axis_type is AxisType.Explicit and not hasattr(jax.lax, "pcast"):
        pytest.skip("JAX before 0.8 allows Explicit axes inside jax.jit only")
    layout = LAYOUTS["one axis"]
    mesh = make_mesh(layout, axis_type)
    parallel, features = lsm.ClassParallel("model", "model", mesh), jnp.ones((BATCH, DIM))
    with jax.set_mesh(mesh):
        if kind == "nnx":
            head = nnx.LSoftmaxDense(DIM, CLASSES, layout=parallel, rngs=flax_nnx.Rngs(0))
            kernel = head.kernel[...]
        else:
            head = linen.LSoftmaxDense(CLASSES, layout=parallel)
            init = jax.jit(head.init) if "jit" in kind else head.init
            boxed = init(jax.random.key(0), features)["params"]["kernel"]
            kernel = flax_linen.meta.unbox(boxed)
    assert kernel.sharding.spec == P(None, "model")
    assert kernel.addressable_shards[0].data.shape == (DIM, COLUMNS // 8)
    if kind == "nnx":
        alone = nnx.LSoftmaxDense(DIM, CLASSES, rngs=flax_nnx.Rngs(0)).kernel[...]
    else:
        alone = linen.LSoftmaxDense(CLASSES).init(jax.random.key(0), features)["params"]["kernel"]
    np.testing.assert_allclose(np.asarray(kernel)[:, :CLASSES], alone, rtol=1e-5)
    assert not np.any(np.asarray(kernel)[:, CLASSES:])


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_layout_of_a_head_knows_its_classes(kind):
    """Given to a loss with the head's kernel, no column that fills it up counts as a class."""
    layout = LAYOUTS["data by model"]
    mesh = make_mesh(layout)
    parallel = lsm.ClassParallel("model", "data", mesh)

    def head_of(layout):
        if kind == "linen":
            return linen.LSoftmaxDense(CLASSES, layout=layout)
        return nnx.LSoftmaxDense(DIM, CLASSES, layout=layout, rngs=flax_nnx.Rngs(0))

    head = head_of(parallel)
    features, kernel, labels, _ = placed(layout, mesh, jnp.float32)
    got, alone = (
        lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=LAM, layout=each)
        for each in (head.layout, keywords(layout, mesh)["layout"])
    )
    np.testing.assert_array_equal(got, alone)
    head_of(head.layout)
    with pytest.raises(ValueError, match=r"layout: classes must be the head's 43 or None, got 42"):
        head_of(dataclasses.replace(parallel, classes=42))


MISTAKES = {
    "axis": ({"class_axis": "models"}, ValueError, "class_axis"),
    "batch axis": ({"batch_axes": "rows"}, ValueError, "batch_axes"),
    "too many classes": ({"classes": COLUMNS + 1}, ValueError, "classes"),
    "no classes": ({"classes": 0}, ValueError, "classes"),
}


@pytest.mark.parametrize("change, error, name", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_named(change, error, name):
    layout = LAYOUTS["data by model"]
    mesh = make_mesh(layout)
    features, kernel, labels, _ = placed(layout, mesh, jnp.float32)
    parallel = keywords(layout, mesh)["layout"]

    def loss():
        changed = dataclasses.replace(parallel, **change)
        lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=LAM, layout=changed)

    with pytest.raises(error, match=name):
        loss()


def test_columns_names_its_mistakes():
    mesh = jax.sharding.AbstractMesh((8,), ("model",))
    with pytest.raises(ValueError, match=r"class_axis must be axes of the mesh.*got 'models'"):
        lsm.ClassParallel("models", mesh=mesh).columns(10)
    with pytest.raises(ValueError, match=r"classes must be .*got 0"):
        lsm.ClassParallel("model", mesh=mesh).columns(0)


def test_sizes_that_the_mesh_does_not_divide_are_named():
    layout = LAYOUTS["data by model"]
    mesh = make_mesh(layout)
    features, kernel, labels, _ = (np.asarray(a) for a in placed(layout, mesh, jnp.float32))
    parallel = keywords(layout, mesh)["layout"]

    def loss(features, kernel, labels, **change):
        changed = dataclasses.replace(parallel, **change)
        lsm.lsoftmax_loss(features, kernel, labels, margin=MARGIN, lam=LAM, layout=changed)

    with pytest.raises(ValueError, match=r"kernel must have a multiple of 4 columns.*classes=43"):
        loss(features, kernel[:, :CLASSES], labels, classes=None)
    with pytest.raises(ValueError, match="features must have a multiple of 2 rows"):
        loss(features[:15], kernel, labels[:15])
    with pytest.raises(ValueError, match="mesh must be given"):
        loss(features, kernel, labels, mesh=None)
    with pytest.raises(ValueError, match="features must have rows"):
        loss(features[0], kernel, labels[0])
    both = {"batch_axes": ("data", "model")}
    with pytest.raises(ValueError, match=r"multiple of 8 rows, at least 8,.*got shape \(0, 5\)"):
        loss(features[:0], kernel, labels[:0], **both)
    sample = lsm.sample_classes(jax.random.key(0), labels, COLUMNS, 7)
    with pytest.raises(ValueError, match=r"columns must have a multiple of 4.*draw the sample"):
        lsm.lsoftmax_sampled_loss(
            features, kernel[:, :23], sample, margin=MARGIN, lam=LAM, layout=parallel
        )


def test_logits_of_a_split_batch_stay_split_without_the_filling():
    mesh = jax.make_mesh(
        (2, 2), ("data", "model"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4]
    )
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("data", "model"))
        logits = jax.device_put(jnp.arange(24.0).reshape(4, 6), place)
        for count in (4, 5):  # equal to the number of rows, and not equal
            # Older versions of JAX allow Explicit axes inside jax.jit only.
            first = jax.jit(first_columns, static_argnums=1)(logits, count)
            assert jax.typeof(first).sharding.spec == P("data", None)
            np.testing.assert_array_equal(first, np.arange(24.0).reshape(4, 6)[:, :count])
