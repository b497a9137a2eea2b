"""One update and one evaluation on one device."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lsoftmax_jax as lsm
from lsoftmax_jax import devices, training
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, NormFace, SphereFace
from lsoftmax_jax.nnx import LSoftmaxDense
from steps import (
    BATCH,
    CLASSES,
    LAM,
    OPTIMIZER,
    WIDTH,
    Headed,
    Line,
    Small,
    assert_close,
    images_and_labels,
    stacked,
)

pytestmark = pytest.mark.lax  # Optax's schedules multiply floats by integer steps


@pytest.fixture(scope="module")
def graphdef_and_state():
    return training.create(Small(nnx.Rngs(0)), OPTIMIZER)


@pytest.fixture(scope="module")
def examples():
    return images_and_labels(BATCH, 4, 4, 1)


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
    return state, stacked(metrics)


def test_one_update_equals_the_written_out_update(graphdef_and_state, examples, train):
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
                share=BATCH / (1 + LAM(0)),
            ),
            share=1 / (1 + LAM(0)),
            kernel_norm=jnp.linalg.norm(kernel, axis=0).mean(),
            grad_norm=optax.tree.norm(grads),
            skipped=jnp.bool_(False),
            margin_idle=jnp.bool_(False),
            collapsing=jnp.bool_(False),
        ),
    )
    assert_close(updated.other["norm"]["mean"], 0.1 * batch_mean)


def test_lam_and_learning_rate_go_by_the_step(single):
    state, metrics = single
    assert int(state.step) == 3
    chex.assert_trees_all_close(metrics.share, jnp.stack([1 / (1 + LAM(i)) for i in range(3)]))


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
    assert_close(ours.sums._replace(loss=0, share=0), plain.sums._replace(loss=0, share=0))
    assert ours.share == ours.sums.share == 0 and not ours.margin_idle


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bad", [-1, CLASSES, 2**32 + 1])
def test_a_label_outside_the_classes_is_no_class_of_another_loss(bad, masked):
    """The loss alone would give a number; JAX would cut 2**32 + 1 to class 1."""

    def one_hot(logits, labels):
        return optax.softmax_cross_entropy(logits, jax.nn.one_hot(labels, CLASSES))

    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    images, labels = jnp.ones((2, 3)), np.array([0, bad])
    where = np.ones(2, bool) if masked else None
    sums = training.eval_step(graphdef, loss=one_hot)(state, images, labels, where)
    step = training.train_step(graphdef, OPTIMIZER, LAM, loss=one_hot)
    assert np.isnan(sums.loss) and step(state, images, labels, where)[1].skipped


def test_labels_may_be_a_list_of_traced_numbers():
    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    images, labels, evaluate = jnp.ones((2, 3)), [0, 1], training.eval_step(graphdef)
    wanted = evaluate(state, images, np.array(labels))
    assert_close(jax.jit(evaluate)(state, images, labels), wanted)


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="Flax 0.11 has one mode")
def test_tree_mode_of_nnx(graphdef_and_state, examples, single):
    with nnx.set_graph_mode(False):
        graphdef, state = training.create(Small(nnx.Rngs(0)), OPTIMIZER)
        step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
        for _ in range(3):
            state, _ = step(state, *examples)
    assert_close(state, single[0])


def trained(lam, noise):
    """Makes 100 updates on one batch in which each class lies around its own axis."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, CLASSES, 64)
    images = np.eye(CLASSES, WIDTH, dtype=np.float32)[labels]
    images += noise * rng.standard_normal(images.shape).astype(np.float32)
    optimizer = optax.adam(3e-2)
    graphdef, state = training.create(Line(nnx.Rngs(0), features=16), optimizer)
    step = training.train_step(graphdef, optimizer, lam)
    many = devices.repeat(step, lambda step, data: data, devices.data_mesh(1), loop=True)
    return many(state, (images, labels), 100)


@pytest.mark.parametrize("lam", [None, lsm.self_paced()], ids=["the head's rule", "self-paced"])
def test_a_self_paced_run_learns_and_is_reported_healthy(lam):
    _, metrics = trained(lam, 0.1)
    assert metrics.sums.correct[-1] == 64
    assert metrics.share[0] < 1 / 11 < metrics.share[-1] <= 0.5
    assert not np.any(metrics.collapsing) and not np.any(metrics.skipped)
    assert not metrics.margin_idle[-1]


def test_a_collapse_is_reported_while_it_happens():
    """Without annealing m = 4 shrinks the features; plain softmax learns the same batch."""
    _, metrics = trained(lambda step: jnp.float32(0.0), 1.0)
    assert metrics.sums.correct[-1] < 32
    assert np.sum(metrics.collapsing) > 10 and not metrics.collapsing[0]
    assert not np.any(metrics.margin_idle)
    _, plain = trained(lambda step: jnp.float32(jnp.inf), 1.0)
    assert plain.sums.correct[-1] > 60 and not np.any(plain.collapsing)
    assert np.all(plain.margin_idle) and not np.any(plain.share)


class Pooled(nnx.Module):
    """Every token sees the mean of the real tokens."""

    def __init__(self, rngs):
        self.head = LSoftmaxDense(3, CLASSES, rngs=rngs)

    def __call__(self, tokens, where=None):
        mask = None if where is None else where[..., None]
        return tokens + jnp.mean(tokens, axis=1, keepdims=True, where=mask)


def test_evaluation_gives_the_mask_to_the_model_as_training_does():
    graphdef, state = training.create(Pooled(nnx.Rngs(0)), OPTIMIZER)
    tokens, _ = images_and_labels(2, 4, 3)
    labels, where = np.arange(8).reshape(2, 4) % CLASSES, np.ones((2, 4), bool)
    tail = (0, 0), (0, 6)
    padded = np.pad(tokens, (*tail, (0, 0))), np.pad(labels, tail), np.pad(where, tail)
    evaluate = training.eval_step(graphdef)
    assert_close(evaluate(state, *padded), evaluate(state, tokens, labels))


def test_the_gradients_norm_counts_imaginary_parts():
    class Filtered(nnx.Module):
        def __init__(self, rngs):
            self.filter = nnx.Param(jnp.array([1 + 2j, 0.5 - 1j, 2j], jnp.complex64))
            self.head = LSoftmaxDense(3, CLASSES, rngs=rngs)

        def __call__(self, rows):
            return jnp.fft.ifft(jnp.fft.fft(rows) * self.filter[...]).real

    graphdef, state = training.create(Filtered(nnx.Rngs(0)), optax.sgd(0.1))
    batch = images_and_labels(BATCH, 3)
    _, metrics = jax.jit(training.train_step(graphdef, optax.sgd(0.1)))(state, *batch)

    def loss(params):
        model = nnx.merge(graphdef, params, state.other)
        return model.head.loss(model(batch[0]), batch[1]).mean()

    assert_close(metrics.grad_norm, optax.tree.norm(jax.grad(loss)(state.params)))


@pytest.mark.parametrize(
    "margin",
    [SphereFace(1), NormFace(scale=8.0), CosFace(0.0, scale=8.0), ArcFace(0.0, scale=8.0),
     Combined(1, 0, 0, scale=8.0, detach=True)],
    ids=lambda margin: type(margin).__name__,
)  # fmt: skip
def test_a_margin_that_changes_no_cosine_is_none(margin):
    graphdef, state = training.create(Headed(nnx.Rngs(0), margin=margin, lam=98.0), OPTIMIZER)
    _, metrics = jax.jit(training.train_step(graphdef, OPTIMIZER))(state, *images_and_labels(4, 3))
    assert metrics.share == 0 and not metrics.margin_idle


@pytest.mark.parametrize(("lam", "idle"), [(98.0, False), (100.0, True)])
def test_the_margin_is_idle_below_a_share_of_a_hundredth(lam, idle):
    for margin, expected in ((4, idle), (1, False)):
        graphdef, state = training.create(Headed(nnx.Rngs(0), margin=margin), OPTIMIZER)
        step = training.train_step(graphdef, OPTIMIZER, lambda step: lam)
        _, metrics = jax.jit(step)(state, *images_and_labels(4, 3))
        assert bool(metrics.margin_idle) == expected
        np.testing.assert_allclose(metrics.share, (margin != 1) / (1 + lam), rtol=1e-6)


def test_the_share_of_a_padded_batch_is_the_mean_over_its_examples():
    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    step = jax.jit(training.train_step(graphdef, OPTIMIZER, lambda step: 3.0))
    _, metrics = step(state, *images_and_labels(4, 3), jnp.arange(4) < 3)
    np.testing.assert_allclose(metrics.share, 0.25, rtol=1e-6)
    np.testing.assert_allclose(metrics.sums.share, 0.75, rtol=1e-6)


class Pair(Line):
    """A Line whose input comes in two halves."""

    def __call__(self, halves):
        return super().__call__(jnp.concatenate([halves["left"], halves["right"]], axis=-1))


def test_the_mean_is_over_the_labels_however_the_images_come():
    images, labels = images_and_labels(BATCH, WIDTH)
    halves = {"left": images[:, :2], "right": images[:, 2:]}
    seen = []
    for model, given in ((Line, images), (Pair, halves)):
        graphdef, state = training.create(model(nnx.Rngs(0)), OPTIMIZER)
        seen.append(jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))(state, given, labels))
    assert_close(seen[1], seen[0])


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_the_mean_is_over_the_labels_of_sequences(masked):
    images, labels = images_and_labels(BATCH, WIDTH)
    where = (np.arange(BATCH) % 3 > 0,) if masked else ()
    graphdef, state = training.create(Line(nnx.Rngs(0)), OPTIMIZER)
    step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
    rows = step(state, images, labels, *where)
    sequences = (
        array.reshape(2, BATCH // 2, *array.shape[1:]) for array in (images, labels, *where)
    )
    assert_close(step(state, *sequences), rows)


def test_the_kernel_norm_is_over_the_real_classes():
    """A sharded kernel may have padding columns."""
    mesh = jax.make_mesh((1, 3), ("data", "model"), devices=jax.devices()[:3])
    layout = lsm.ClassParallel("model", "data", mesh)
    with jax.set_mesh(mesh):
        graphdef, state = training.create(Headed(nnx.Rngs(0), layout=layout), OPTIMIZER)
        placed = state.params["head"]["kernel"]
        kernel = np.array(placed)
        kernel[:, CLASSES:] = 9.0
        state.params["head"]["kernel"] = jax.device_put(kernel, placed.sharding)
        step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
        _, metrics = step(state, *images_and_labels(4, 3))
    assert kernel.shape == (3, 6)
    wanted = np.linalg.norm(kernel[:, :CLASSES], axis=0).mean()
    np.testing.assert_allclose(metrics.kernel_norm, wanted, rtol=1e-6)


def test_a_feature_without_length_is_at_a_right_angle_to_its_column():
    model = nnx.Sequential(nnx.relu)
    model.head = LSoftmaxDense(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = training.create(model, optax.sgd(0.1))
    loss = optax.softmax_cross_entropy_with_integer_labels
    sums = jax.jit(training.eval_step(graphdef, loss=loss))(state, jnp.zeros((2, 3)), jnp.arange(2))
    np.testing.assert_allclose(sums.target_angle, 2 * math.pi / 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "length", "share", "collapsing"),
    [
        (math.log(2), 0.04, 1, True),
        (0.99 * math.log(2), 0.04, 1, True),
        (0.97 * math.log(2), 0.04, 1, False),  # better than guessing
        (math.log(2), 0.06, 1, False),  # logits of 0.12
        (math.log(2), 0.04, 1 / 99, True),
        (math.log(2), 0.04, 1 / 101, False),  # plain softmax except for a hundredth
    ],
)
def test_what_counts_as_a_collapse(loss, length, share, collapsing):
    """4 examples of 2 classes, whose columns have length 2."""
    head = LSoftmaxDense(3, 2, rngs=nnx.Rngs(0))
    sums = training.Sums(*map(jnp.float32, (4, 4 * loss, 2, 6.0, 4 * length, 4 * share)))
    assert bool(training._collapsing(head, sums, jnp.float32(2))) == collapsing


@pytest.mark.parametrize(
    ("degrees", "share", "turned"),
    [(119, 1, False), (121, 1, True), (150, 1 / 99, True), (150, 1 / 101, False)],
)
def test_features_that_turn_away_from_their_columns_are_reported(degrees, share, turned):
    """Of a margin with a scale: 4 examples of 2 classes, whose loss and lengths do not matter."""
    head = LSoftmaxDense(3, 2, margin=ArcFace(0.5, scale=16.0), rngs=nnx.Rngs(0))
    angles = 4 * math.radians(degrees)
    sums = training.Sums(*map(jnp.float32, (4, 0.1, 2, angles, 40.0, 4 * share)))
    assert bool(training._collapsing(head, sums, jnp.float32(2))) == turned


@pytest.mark.parametrize(
    ("head", "collapsing"),
    [
        ({"margin": 4}, True),
        ({"margin": SphereFace(4, scale=16.0)}, False),
        ({"margin": ArcFace(0.5, scale=64.0)}, False),
        ({"margin": SphereFace(4)}, True),
    ],
    ids=["features", "unit features", "arcface", "unit columns"],
)
def test_only_features_whose_length_matters_can_collapse(head, collapsing):
    """The features have almost no length; the loss is that of guessing, or is replaced by it."""
    model = Headed(nnx.Rngs(0), **head)
    features, labels = images_and_labels(BATCH, 3)
    graphdef, state = training.create(model, OPTIMIZER)
    guessing = math.log(CLASSES) * BATCH
    step = jax.jit(training.train_step(graphdef, OPTIMIZER, lambda step: 0.0))
    _, metrics = step(state, 1e-3 * features, labels)
    found = training._collapsing(model.head, metrics.sums._replace(loss=guessing), jnp.float32(9e3))
    assert bool(metrics.collapsing) == collapsing
    assert bool(found) == (collapsing and "SphereFace" in str(head))
