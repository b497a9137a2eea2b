"""A step with numbers that are not finite, and with a caller's mistakes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lsoftmax_jax as lsm
from lsoftmax_jax import training
from steps import (
    BATCH,
    CLASSES,
    LAM,
    OPTIMIZER,
    WIDTH,
    Headed,
    Line,
    assert_close,
    images_and_labels,
)

pytestmark = pytest.mark.lax  # Optax's schedules multiply floats by integer steps

CROSS_ENTROPY = optax.softmax_cross_entropy_with_integer_labels
ROWS, LABELS = images_and_labels(BATCH, WIDTH)
WHERE = np.arange(BATCH) < 5


def update(optimizer, *batch, model=Line, lam=LAM, **keywords):
    """The state before and after an update, and its metrics."""
    graphdef, state = training.create(model(nnx.Rngs(0)), optimizer)
    step = jax.jit(training.train_step(graphdef, optimizer, lam, **keywords))
    return state, *step(state, *batch)


def assert_skipped(state, kept, metrics):
    assert metrics.skipped and int(kept.step) == int(state.step) + 1
    chex.assert_trees_all_equal(kept._replace(step=state.step), state)


def least_likely(model, feature):
    """The least likely class by a model that is a head alone."""
    return np.argmin(model(nnx.Rngs(0)).head(feature), axis=-1)


# Numbers that are not finite.


@pytest.mark.parametrize("loss", [None, CROSS_ENTROPY], ids=["head", "own"])
def test_a_batch_with_nan_changes_nothing_but_the_step(loss):
    unknown = np.where(np.arange(BATCH) == 2, -1, LABELS)
    images = np.where(np.arange(BATCH)[:, None] == 2, np.float32(np.nan), ROWS)
    assert_skipped(*update(OPTIMIZER, ROWS, unknown, loss=loss))
    assert_skipped(*update(OPTIMIZER, images, LABELS, loss=loss))
    assert not update(OPTIMIZER, ROWS, LABELS, loss=loss)[2].skipped


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(float("nan")), optax.adam(lambda step: jnp.inf), optax.adam(1e-3, eps=0.0)],
    ids=["NaN rate", "infinite rate", "no epsilon"],
)
def test_an_update_that_is_not_finite_changes_nothing_but_the_step(optimizer):
    """The loss and its gradient are finite: a batch of padding has a zero gradient."""
    assert_skipped(*update(optimizer, ROWS, LABELS, np.zeros(BATCH, bool)))


def test_a_half_precision_kernel_outlives_adam():
    """Adam's epsilon and squares vanish in float16, so its update is 0 / 0."""

    def half(rngs):
        return Headed(rngs, param_dtype=jnp.float16)

    features = np.float32([[1e-4, 0, 0]])
    assert_skipped(*update(optax.adam(1e-3), features, np.zeros(1, int), model=half))


def test_an_optimizer_state_that_would_overflow_is_kept():
    """Adam squares a gradient of 1e30: no parameter with such a state would ever move again."""
    feature = np.float32([[1e30, 0, 0]])
    label = least_likely(Headed, feature)
    state, kept, metrics = update(optax.adam(1e-3), feature, label, model=Headed)
    assert np.isfinite(metrics.sums.loss) and metrics.sums.loss > 1e29
    assert_skipped(state, kept, metrics)


def test_a_state_that_begins_at_infinity_is_allowed():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state, after, metrics = update(optimizer, ROWS, LABELS)
    assert any(np.isinf(leaf).any() for leaf in jax.tree.leaves(state.opt_state))
    assert not metrics.skipped and optax.tree.get(after.opt_state, "best_value") < 10


def test_a_large_half_precision_gradient_is_applied():
    """The sum of its squares overflows float16."""

    def half(rngs):
        return Headed(rngs, margin=1, param_dtype=jnp.float16)

    feature = np.float16([[600, 0, 0]])
    label = least_likely(half, feature)
    state, after, metrics = update(optax.sgd(1e-3), feature, label, model=half)
    logits = np.float64(feature) @ np.asarray(state.params["head"]["kernel"], np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    wanted = 600 * np.linalg.norm(probabilities - np.eye(CLASSES)[label])
    assert wanted > 600 and not metrics.skipped
    np.testing.assert_allclose(metrics.grad_norm, wanted, rtol=2e-2)
    assert np.any(after.params["head"]["kernel"] != state.params["head"]["kernel"])


def test_a_float64_gradient_keeps_its_digits(x64):
    def double(rngs):
        return Headed(rngs, param_dtype=jnp.float64)

    features, labels = images_and_labels(3, 3)
    state, after, metrics = update(
        optax.sgd(1.0), np.float64(features), labels, model=double, lam=lambda step: 1.0
    )

    def mean(kernel):
        return lsm.lsoftmax_loss(np.float64(features), kernel, labels, margin=4, lam=1.0).mean()

    kernel = state.params["head"]["kernel"]
    gradient = jax.jit(jax.grad(mean))(kernel)
    np.testing.assert_allclose(kernel - after.params["head"]["kernel"], gradient, atol=1e-14)
    np.testing.assert_allclose(metrics.grad_norm, np.linalg.norm(gradient), rtol=1e-14)


# Padding.


@pytest.mark.parametrize("loss", [None, CROSS_ENTROPY], ids=["head", "own"])
def test_padding_may_hold_anything(loss):
    images = np.where(WHERE[:, None], ROWS, np.float32(np.nan))
    labels = np.where(WHERE, LABELS, -1)
    padded = update(OPTIMIZER, images, labels, WHERE, loss=loss)
    assert_close(padded, update(OPTIMIZER, ROWS[:5], LABELS[:5], loss=loss))
    assert not padded[2].skipped
    graphdef, state = training.create(Line(nnx.Rngs(0)), OPTIMIZER)
    evaluate = jax.jit(training.eval_step(graphdef, loss=loss))
    assert_close(evaluate(state, images, labels, WHERE), evaluate(state, ROWS[:5], LABELS[:5]))


def test_a_batch_of_padding_alone_is_a_step_without_gradient():
    state, kept, metrics = update(OPTIMIZER, ROWS, LABELS, np.zeros(BATCH, bool))
    assert not metrics.skipped and metrics.sums.examples == 0
    chex.assert_trees_all_equal(kept.params, state.params)


# Mistakes.


@pytest.mark.parametrize(
    ("loss", "error", "got"),
    [
        (lambda logits, labels: CROSS_ENTROPY(logits, labels).mean(), ValueError, r"shape \(\)"),
        (lambda logits, labels: CROSS_ENTROPY(logits, labels)[:, None], ValueError, r"\(8, 1\)"),
        (lambda logits, labels: logits, ValueError, r"shape \(8, 5\)"),
        (lambda logits, labels: labels, TypeError, "dtype int32"),
        (lambda logits, labels: jnp.argmax(logits, -1) == labels, TypeError, "dtype bool"),
        (lambda logits, labels: (CROSS_ENTROPY(logits, labels), logits), TypeError, "tuple"),
        (lambda logits, labels: None, TypeError, "NoneType"),
    ],
    ids=["scalar", "(B, 1)", "(B, C)", "integers", "Booleans", "tuple", "None"],
)
def test_a_loss_without_a_number_for_each_example_is_refused(loss, error, got):
    graphdef, state = training.create(Line(nnx.Rngs(0)), OPTIMIZER)
    message = rf"loss must give one floating-point number an example, shape \(8,\), got .*{got}"
    with pytest.raises(error, match=message):
        training.train_step(graphdef, OPTIMIZER, LAM, loss=loss)(state, ROWS, LABELS)
    with pytest.raises(error, match=message):
        training.eval_step(graphdef, loss=loss)(state, ROWS, LABELS)


def test_a_loss_in_half_precision_is_summed_in_single():
    def loss(logits, labels):
        return jnp.full(labels.shape, 40_000, jnp.float16)

    graphdef, state = training.create(Line(nnx.Rngs(0)), OPTIMIZER)
    sums = jax.jit(training.eval_step(graphdef, loss=loss))(state, ROWS, LABELS)
    np.testing.assert_allclose(sums.loss, 40_000 * BATCH)


@pytest.mark.parametrize("lam", [5.0, "self-paced"])
def test_a_lam_that_is_no_schedule_is_refused_in_words(lam):
    graphdef, _ = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    with pytest.raises(TypeError, match=r"lam must be a schedule step -> λ, self_paced\(\) or No"):
        training.train_step(graphdef, OPTIMIZER, lam)


@pytest.mark.parametrize("other", [optax.sgd(0.1), optax.adam(0.1)], ids=["sgd", "adam"])
def test_the_state_of_another_optimizer(other):
    graphdef, state = training.create(Headed(nnx.Rngs(0)), other)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    with pytest.raises(ValueError, match=r"state.opt_state must be a state of this optimizer"):
        jax.jit(step)(state, *images_and_labels(4, 3))


def test_the_optimizer_state_of_other_parameters():
    graphdef, state = training.create(Line(nnx.Rngs(0)), optax.adam(0.1))
    _, other = training.create(Line(nnx.Rngs(0), features=3), optax.adam(0.1))
    step = training.train_step(graphdef, optax.adam(0.1), LAM)
    with pytest.raises(ValueError, match=r"of this optimizer for these parameters"):
        jax.jit(step)(state._replace(opt_state=other.opt_state), ROWS, LABELS)


def test_other_objects_than_states_are_refused():
    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    with pytest.raises(TypeError, match="state must be a State, as `create` makes it, got dict"):
        step(state._asdict(), *images_and_labels(4, 3))


def test_a_state_whose_memory_was_reused():
    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    state.params["head"]["kernel"].delete()
    batch = images_and_labels(4, 3)
    named = r"got a deleted state\.params\['head'\]\['kernel'\]"
    for step in (
        training.train_step(graphdef, OPTIMIZER, LAM),
        training.eval_step(graphdef),
        lambda state, images, labels: training.embed_step(graphdef)(state, images),
    ):
        with pytest.raises(ValueError, match=named):
            step(state, *batch)


@pytest.mark.parametrize("head", [None, nnx.Linear(WIDTH, CLASSES, rngs=nnx.Rngs(0))])
def test_a_model_without_a_large_margin_head(head):
    model = nnx.Sequential(nnx.relu)
    model.head = head
    graphdef, state = training.create(model, OPTIMIZER)
    got = "none" if head is None else "a Linear"
    with pytest.raises(TypeError, match=f"model must have a large-margin head .* has {got}"):
        training.train_step(graphdef, OPTIMIZER, LAM)(state, ROWS, LABELS)


# Optimizers that need more than the gradient.


@pytest.mark.parametrize(
    "optimizer",
    [optax.polyak_sgd(), optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))],
    ids=["polyak", "plateau"],
)
def test_an_optimizer_may_use_the_loss(optimizer):
    state, after, metrics = update(optimizer, ROWS, LABELS, lam=lambda step: 1.0)

    @jax.jit
    def by_hand(params):
        def mean(params):
            layer, kernel = params["layer"], params["head"]["kernel"]
            features = nnx.relu(ROWS @ layer["kernel"] + layer["bias"])
            return lsm.lsoftmax_loss(features, kernel, LABELS, margin=4, lam=1.0).mean()

        value, grads = jax.value_and_grad(mean)(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params, value=value)
        return optax.apply_updates(params, updates)

    assert_close(after.params, by_hand(state.params))
    assert not metrics.skipped


def test_an_optimizer_of_other_parameters_is_refused_in_words():
    lookahead = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    graphdef, state = training.create(Line(nnx.Rngs(0)), lookahead)
    with pytest.raises(TypeError, match=r"optimizer must want no more than .*'fast'"):
        training.train_step(graphdef, lookahead, LAM)(state, ROWS, LABELS)


def test_a_fault_in_an_optimizer_is_shown_as_it_is():
    def update_fn(updates, state, params=None):
        return updates.absent, state

    faulty = optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)
    with pytest.raises(AttributeError, match="absent"):
        update(faulty, ROWS, LABELS)


def test_an_optimizer_that_needs_more_is_refused_in_words():
    with pytest.raises(TypeError, match=r"optimizer must want no more than .*'value_fn'"):
        update(optax.lbfgs(), ROWS, LABELS)
