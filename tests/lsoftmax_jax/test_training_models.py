"""Models that tie or freeze parameters, sow values, or drop features."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import training
from steps import (
    BATCH,
    CLASSES,
    LAM,
    OPTIMIZER,
    WIDTH,
    Line,
    assert_close,
    images_and_labels,
    mesh_of,
)

pytestmark = pytest.mark.lax  # Optax's schedules multiply floats by integer steps

ROWS, LABELS = images_and_labels(BATCH, WIDTH)


class Tied(Line):
    """The head's kernel is also an embedding; the name "embedding" sorts before "head"."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.embedding = self.head.kernel

    def __call__(self, rows):
        return super().__call__(rows) + self.embedding[...][:, 0]


def test_a_kernel_tied_to_an_embedding_is_trained_by_both():
    graphdef, state = training.create(Tied(nnx.Rngs(0)), optax.sgd(0.1))
    assert "head" not in state.params

    def mean(params):
        layer, kernel = params["layer"], params["embedding"]
        features = nnx.relu(ROWS @ layer["kernel"] + layer["bias"]) + kernel[:, 0]
        return lsm.lsoftmax_loss(features, kernel, LABELS, margin=4, lam=2.0).mean()

    step = training.train_step(graphdef, optax.sgd(0.1), lambda step: 2.0)
    after, metrics = jax.jit(step)(state, ROWS, LABELS)
    grads = jax.jit(jax.grad(mean))(state.params)
    assert_close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))
    norms = np.linalg.norm(state.params["embedding"], axis=0)
    np.testing.assert_allclose(metrics.kernel_norm, norms.mean(), rtol=1e-6)


class Frozen(nnx.Variable):
    """A variable that no optimizer sees."""


def test_a_frozen_kernel_stays():
    model = Line(nnx.Rngs(0))
    model.head.kernel = Frozen(model.head.kernel[...])
    graphdef, state = training.create(model, OPTIMIZER)
    after, metrics = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))(state, ROWS, LABELS)
    kernel = state.other["head"]["kernel"]
    chex.assert_trees_all_equal(after.other, state.other)
    assert np.any(after.params["layer"]["kernel"] != state.params["layer"]["kernel"])
    norms = np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(metrics.kernel_norm, norms.mean(), rtol=1e-6)


class Sowing(Line):
    def __call__(self, rows):
        features = super().__call__(rows)
        self.sow(nnx.Intermediate, "features", features)
        return features


# Flax deprecates `sow` in favour of `nnx.capture`.
SOWS = pytest.mark.filterwarnings("ignore:.*Module.sow:DeprecationWarning")


@SOWS
@pytest.mark.parametrize("called", [False, True], ids=["fresh", "called before"])
def test_a_model_may_sow(called):
    sowing, ended = Sowing(nnx.Rngs(0)), []
    if called:
        sowing(ROWS)
    for model in (sowing, Line(nnx.Rngs(0))):
        graphdef, state = training.create(model, OPTIMIZER)
        step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
        for _ in range(2):
            state, metrics = step(state, ROWS, LABELS)
        ended.append((state, metrics))
    assert_close(*ended)


@SOWS
def test_create_leaves_the_model_to_the_caller():
    """The model keeps its sown values, and a donating step does not take the model's memory."""
    model = Sowing(nnx.Rngs(0))
    features = model(ROWS)
    graphdef, state = training.create(model, OPTIMIZER)
    step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM), donate_argnums=0)
    step(state, ROWS, LABELS)
    assert state.params["head"]["kernel"].is_deleted()
    (sown,) = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Intermediate)))
    assert_close(sown, features)
    assert_close(model(ROWS), features)


class Dropping(Line):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, rows):
        return self.dropout(super().__call__(rows))


def test_dropout_goes_on_from_step_to_step():
    """Training on one device drops features; evaluation drops none."""
    graphdef, state = training.create(Dropping(nnx.Rngs(0)), optax.sgd(0.0))
    step = jax.jit(training.train_step(graphdef, optax.sgd(0.0), LAM))
    norms = []
    for _ in range(2):
        state, metrics = step(state, ROWS, LABELS)
        norms.append(float(metrics.sums.feature_norm))
    assert norms[0] != norms[1] and int(state.other["dropout"]["rngs"]["count"]) == 2
    features, logits = training.embed_step(graphdef)(state, ROWS)
    assert_close(features, nnx.relu(Line(nnx.Rngs(0)).layer(jnp.asarray(ROWS))))
    assert logits.shape == (BATCH, CLASSES)


class TwoViews(Line):
    """Batch normalisation over two views of every row, an axis of the model's own."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm = nnx.BatchNorm(WIDTH, axis_name="views", rngs=rngs)

    def __call__(self, rows, where=None):
        graphdef, state = nnx.split(self.norm)

        def normalised(view, state):
            norm = nnx.merge(graphdef, state)
            return norm(view), nnx.to_pure_dict(nnx.state(norm))

        views, state = jnp.stack([rows, 3 * rows + 1]), nnx.to_pure_dict(state)
        over_views = jax.vmap(normalised, (0, None), axis_name="views")
        outputs, states = over_views(views, state)
        nnx.update(self.norm, jax.tree.map(lambda of_views: of_views[0], states))
        return super().__call__(outputs.mean(axis=0))


def test_batch_normalisation_keeps_an_axis_of_its_own():
    model = TwoViews(nnx.Rngs(0))
    graphdef, state = training.create(model, OPTIMIZER)

    @nnx.jit  # which changes the statistics of the model
    def losses(model):
        kernel = model.head.kernel[...]
        return lsm.lsoftmax_loss(model(ROWS), kernel, LABELS, margin=4, lam=LAM(0))

    loss = losses(model)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    after, metrics = jax.jit(step)(state, ROWS, LABELS)
    assert_close(metrics.sums.loss, loss.sum())
    assert_close(after.other["norm"]["mean"], nnx.to_pure_dict(nnx.state(model.norm))["mean"])


def test_batch_normalisation_of_another_axis_is_refused():
    graphdef, state = training.create(TwoViews(nnx.Rngs(0)), OPTIMIZER)
    step = training.train_step(graphdef, OPTIMIZER, LAM, axis_name="data")
    specs = P(), P("data"), P("data")
    step = jax.jit(jax.shard_map(step, mesh=mesh_of(2), in_specs=specs, out_specs=P()))
    with pytest.raises(ValueError, match=r"axis_name must be .*'views', got 'data'"):
        step(state, ROWS, LABELS)


class Unmasked(Line):
    def __call__(self, rows):
        return super().__call__(rows)


def test_a_model_that_takes_no_mask_is_named():
    graphdef, state = training.create(Unmasked(nnx.Rngs(0)), OPTIMIZER)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    with pytest.raises(TypeError, match="model must take `where`"):
        step(state, ROWS, LABELS, np.arange(BATCH) < 3)


class Late(Line):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.last = nnx.Cache(None)

    def __call__(self, rows, where=None):
        self.last = nnx.Cache(rows)
        return super().__call__(rows)


def test_a_variable_that_a_call_makes_is_named():
    graphdef, state = training.create(Late(nnx.Rngs(0)), OPTIMIZER)
    step = jax.jit(training.train_step(graphdef, OPTIMIZER, LAM))
    with pytest.raises(TypeError, match="model must keep its variable 'last'"):
        step(state, ROWS, LABELS)
