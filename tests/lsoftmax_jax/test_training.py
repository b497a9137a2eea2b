"""Steps on one device, on meshes, under pmap and under vmap give the same numbers."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import lsoftmax_jax as lsm
from lsoftmax_jax import devices, training
from lsoftmax_jax.nnx import LSoftmaxDense

pytestmark = pytest.mark.lax  # Optax's schedules multiply floats by integer steps

LAM = lsm.annealed_lambda(10.0, 0.1, 2.0)
OPTIMIZER = optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 0.1}), momentum=0.9)
CLASSES, BATCH = 5, 8


class Small(nnx.Module):
    """One convolution, batch normalisation, the head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)
        self.head = LSoftmaxDense(64, CLASSES, margin=3, rngs=rngs)

    def __call__(self, images: jax.Array, where: jax.Array | None = None) -> jax.Array:
        mask = None if where is None else where[:, None, None, None]
        outputs = nnx.relu(self.norm(self.conv(images), mask=mask))
        return outputs.reshape(len(images), -1)


@pytest.fixture(scope="module")
def graphdef_and_state():
    return training.create(Small(nnx.Rngs(0)), OPTIMIZER)


@pytest.fixture(scope="module")
def examples():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, 4, 4, 1)).astype(np.float32)
    return images, rng.integers(0, CLASSES, BATCH)


@pytest.fixture(scope="module")
def train(graphdef_and_state):
    """The step on one device; each argument shape is compiled once for all tests."""
    step = training.train_step(graphdef_and_state[0], OPTIMIZER, LAM)
    return jax.jit(chex.assert_max_traces(step, n=2))


@pytest.fixture(scope="module")
def single(graphdef_and_state, examples, train):
    """Three updates on one device, and their metrics."""
    _, state = graphdef_and_state
    metrics = []
    for _ in range(3):
        state, seen = train(state, *examples)
        metrics.append(seen)
    return state, jax.tree.map(lambda *rows: jnp.stack(rows), *metrics)


def assert_close(left, right):
    chex.assert_trees_all_close(jax.device_get(left), jax.device_get(right), rtol=2e-4, atol=2e-5)


def test_one_update_is_the_written_out_one(graphdef_and_state, examples, train):
    graphdef, state = graphdef_and_state
    images, labels = examples

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def mean_loss(params):
        model = nnx.merge(graphdef, params, state.other)
        features, kernel = model(images), params["head"]["kernel"]
        logits = lsm.lsoftmax_logits(features, kernel, labels, margin=3, lam=LAM(0))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (features, model.conv(images).mean((0, 1, 2)))

    (loss, (features, batch_mean)), grads = mean_loss(state.params)
    updated, metrics = train(state, *examples)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads)
    assert_close(updated.params, expected)
    kernel = state.params["head"]["kernel"]
    hits = jnp.argmax(features @ kernel, axis=-1) == labels
    cosine = optax.losses.cosine_similarity(features, kernel.T[labels])
    assert_close(
        metrics,
        training.StepMetrics(
            sums=training.Sums(
                examples=jnp.float32(BATCH),
                loss=loss * BATCH,
                correct=hits.sum(dtype=jnp.float32),
                target_angle=jnp.arccos(cosine).sum(),
                feature_norm=jnp.linalg.norm(features, axis=-1).sum(),
            ),
            lam=LAM(0),
            kernel_norm=jnp.linalg.norm(kernel, axis=0).mean(),
            grad_norm=optax.tree.norm(grads),
            skipped=jnp.bool_(False),
            collapsing=jnp.bool_(False),
        ),
    )
    assert_close(updated.other["norm"]["mean"], 0.1 * batch_mean)


def test_lam_and_learning_rate_go_by_the_step(single):
    state, metrics = single
    assert int(state.step) == 3
    chex.assert_trees_all_close(metrics.lam, jnp.stack([LAM(i) for i in range(3)]))


@pytest.mark.parametrize(
    ("kind", "current"),
    [(AxisType.Auto, False), (AxisType.Explicit, False), (AxisType.Explicit, True)],
    ids=["auto", "explicit", "explicit, set"],
)
def test_mesh_is_one_device(kind, current, graphdef_and_state, examples, single):
    graphdef, state = graphdef_and_state
    mesh = jax.make_mesh((4,), ("data",), (kind,), devices=jax.devices()[:4])
    step = devices.compile_step(training.train_step(graphdef, OPTIMIZER, LAM), mesh)

    def run():
        many = devices.repeat(
            training.train_step(graphdef, OPTIMIZER, LAM), lambda step, data: data, mesh, loop=True
        )
        ours = jax.tree.map(jnp.copy, state)
        for _ in range(3):
            ours, _ = step(ours, *examples)
        return ours, many(jax.tree.map(jnp.copy, state), examples, 3)

    if current:
        with jax.set_mesh(mesh):
            ours, repeated = run()
    else:
        ours, repeated = run()
    assert_close(ours, single[0])
    assert_close(repeated, single)
    assert repeated[0].params["head"]["kernel"].sharding.is_fully_replicated


def test_updates_in_a_row_are_those_in_a_loop(graphdef_and_state, examples, single):
    graphdef, state = graphdef_and_state
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    many = devices.repeat(step, lambda step, data: data, devices.data_mesh(1), loop=False)
    assert_close(many(jax.tree.map(jnp.copy, state), examples, 3), single)


def test_updates_in_a_row_are_a_loop_but_on_a_cpu(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    many = devices.repeat(step, lambda step, data: data, devices.data_mesh(1))
    text = many.lower(state, examples, 3).as_text()
    assert ("stablehlo.while" in text) == (jax.default_backend() != "cpu")


def test_pmap_is_one_device(graphdef_and_state, examples, single):
    graphdef, state = graphdef_and_state
    step = jax.pmap(
        training.train_step(graphdef, OPTIMIZER, LAM, axis_name="data"),
        axis_name="data",
        devices=jax.devices()[:4],
    )
    ours = jax.tree.map(lambda array: jnp.broadcast_to(array, (4, *array.shape)), state)
    batch = jax.tree.map(lambda array: array.reshape(4, -1, *array.shape[1:]), examples)
    for _ in range(3):
        ours, metrics = step(ours, *batch)
    assert_close(ours, jax.tree.map(lambda array: np.stack([array] * 4), single[0]))
    assert_close(jax.tree.map(lambda m: m[0], metrics), jax.tree.map(lambda m: m[-1], single[1]))


def test_seeds_train_together(graphdef_and_state, examples, train):
    graphdef, _ = graphdef_and_state
    states = [training.create(Small(nnx.Rngs(seed)), OPTIMIZER)[1] for seed in (0, 1)]
    step = jax.jit(jax.vmap(training.train_step(graphdef, OPTIMIZER, LAM), (0, None, None)))
    together = step(jax.tree.map(lambda *arrays: np.stack(arrays), *states), *examples)
    alone = [train(state, *examples) for state in states]
    assert_close(together, jax.tree.map(lambda *arrays: np.stack(arrays), *alone))


def test_ragged_batch_is_the_batch_without_its_padding(graphdef_and_state, examples, train):
    graphdef, state = graphdef_and_state
    images, labels = examples
    where, mesh = np.arange(BATCH) < 5, devices.data_mesh(4)
    step, evaluate = training.train_step(graphdef, OPTIMIZER, LAM), training.eval_step(graphdef)
    padded = devices.compile_step(step, mesh, donate=False)(state, images, labels, where)
    assert_close(padded, train(state, images[:5], labels[:5]))
    evaluated = devices.compile_step(evaluate, mesh, donate=False)(state, images, labels, where)
    assert_close(evaluated, jax.jit(evaluate)(state, images[:5], labels[:5]))


def test_evaluation_is_margin_free_and_uses_running_statistics(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    images, labels = examples
    model = training.restore_model(graphdef, state)
    logits = model.head(model(images))
    sums = jax.jit(training.eval_step(graphdef))(state, images, labels)
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    assert_close(sums.loss, plain.sum())
    assert_close(sums.correct, (jnp.argmax(logits, axis=-1) == labels).sum(dtype=jnp.float32))


def test_another_loss_takes_the_heads_place(graphdef_and_state, examples, train):
    graphdef, state = graphdef_and_state
    hinge = optax.losses.multiclass_hinge_loss
    step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM, loss=hinge))
    (_, ours), (_, plain) = step(state, *examples), train(state, *examples)
    model = nnx.merge(graphdef, state.params, state.other)
    logits = model.head(model(examples[0]))
    assert_close(ours.sums.loss, hinge(logits, examples[1]).sum())
    assert_close(ours.sums._replace(loss=0), plain.sums._replace(loss=0))


def test_state_is_donated(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    step = devices.compile_step(training.train_step(graphdef, OPTIMIZER, LAM), devices.data_mesh(1))
    ours = jax.tree.map(jnp.copy, state)
    step(ours, *examples)
    assert ours.params["head"]["kernel"].is_deleted()


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="Flax 0.11 has one mode")
def test_tree_mode_of_nnx(graphdef_and_state, examples, single):
    with nnx.set_graph_mode(False):
        graphdef, state = training.create(Small(nnx.Rngs(0)), OPTIMIZER)
        step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
        for _ in range(3):
            state, _ = step(state, *examples)
    assert_close(state, single[0])


@pytest.mark.parametrize("count", [0, 99])
def test_a_mesh_of_devices_that_are_not_there(count):
    with pytest.raises(ValueError, match=f"devices must be 1 to {jax.device_count()}, got"):
        devices.data_mesh(count)


class Line(nnx.Module):
    """Nothing but a layer and the head."""

    def __init__(self, margin: int, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(CLASSES, 16, rngs=rngs)
        self.head = LSoftmaxDense(16, CLASSES, margin=margin, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return nnx.relu(self.layer(images))


def trained(lam, noise):
    """100 updates on one batch, each class around its own axis."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, 64)
    images = np.eye(CLASSES, dtype=np.float32)[labels]
    images += noise * rng.standard_normal(images.shape).astype(np.float32)
    optimizer = optax.adam(3e-2)
    graphdef, state = training.create(Line(4, nnx.Rngs(0)), optimizer)
    step = training.train_step(graphdef, optimizer, lam)
    many = devices.repeat(step, lambda step, data: data, devices.data_mesh(1), loop=True)
    return many(state, (images, labels), 100)


def test_a_self_paced_run_learns_and_is_told_healthy():
    _, metrics = trained(lsm.self_paced(), 0.1)
    assert metrics.sums.correct[-1] == 64
    assert metrics.lam[0] > 10 > metrics.lam[-1] >= 1
    assert not np.any(metrics.collapsing) and not np.any(metrics.skipped)


def test_a_collapse_is_told_while_it_happens():
    """Without annealing m = 4 shrinks the features; plain softmax learns the same batch."""
    _, metrics = trained(lambda step: jnp.float32(0.0), 1.0)
    assert metrics.sums.correct[-1] < 32
    assert np.sum(metrics.collapsing) > 10 and not metrics.collapsing[0]
    _, plain = trained(lambda step: jnp.float32(jnp.inf), 1.0)
    assert plain.sums.correct[-1] > 60 and not np.any(plain.collapsing)


def test_a_batch_that_is_no_number_changes_nothing_but_the_step(
    graphdef_and_state, examples, train
):
    _, state = graphdef_and_state
    images, labels = examples
    for bad in (
        (images.copy(), np.where(np.arange(BATCH) == 2, -1, labels)),
        (np.where(np.arange(BATCH)[:, None, None, None] == 2, np.float32(np.nan), images), labels),
    ):
        kept, metrics = train(state, *bad)
        assert metrics.skipped and int(kept.step) == int(state.step) + 1
        chex.assert_trees_all_equal(kept._replace(step=state.step), state)
    assert not train(state, images, labels)[1].skipped


class Headed(nnx.Module):
    """The head alone."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.head = LSoftmaxDense(3, CLASSES, rngs=rngs)

    def __call__(self, rows: jax.Array, where: jax.Array | None = None) -> jax.Array:
        return rows


def test_a_batch_of_padding_alone_is_a_step_without_gradient():
    graphdef, state = training.create(Headed(nnx.Rngs(0)), optax.sgd(0.1))
    step = jax.jit(training.train_step(graphdef, optax.sgd(0.1), LAM))
    kept, metrics = step(state, jnp.ones((2, 3)), jnp.zeros(2, int), jnp.zeros(2, bool))
    assert not metrics.skipped and metrics.sums.examples == 0
    chex.assert_trees_all_equal(kept.params, state.params)


def test_a_feature_without_length_is_at_a_right_angle_to_its_column():
    model = nnx.Sequential(nnx.relu)
    model.head = LSoftmaxDense(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = training.create(model, optax.sgd(0.1))
    loss = optax.softmax_cross_entropy_with_integer_labels
    sums = jax.jit(training.eval_step(graphdef, loss=loss))(state, jnp.zeros((2, 3)), jnp.arange(2))
    np.testing.assert_allclose(sums.target_angle, 2 * math.pi / 2, rtol=1e-6)


@pytest.mark.parametrize("lam", [5.0, None, "self-paced"])
def test_a_lam_that_is_no_schedule_is_refused_in_words(graphdef_and_state, lam):
    with pytest.raises(TypeError, match=r"lam must be a schedule step -> λ or self_paced\(\)"):
        training.train_step(graphdef_and_state[0], OPTIMIZER, lam)


@pytest.mark.parametrize(
    ("loss", "length", "lam", "collapsing"),
    [
        (math.log(2), 0.04, 0.0, True),
        (0.99 * math.log(2), 0.04, 0.0, True),
        (0.97 * math.log(2), 0.04, 0.0, False),  # better than guessing
        (math.log(2), 0.06, 0.0, False),  # logits of 0.12
        (math.log(2), 0.04, 98.0, True),
        (math.log(2), 0.04, 100.0, False),  # plain softmax, but for a hundredth
    ],
)
def test_what_counts_as_a_collapse(loss, length, lam, collapsing):
    """Of 4 examples in 2 classes, whose columns have length 2."""
    sums = training.Sums(*map(jnp.float32, (4, 4 * loss, 2, 6.0, 4 * length)))
    found = training._collapsing(sums, jnp.float32(lam), jnp.float32(2), 2)
    assert bool(found) == collapsing
