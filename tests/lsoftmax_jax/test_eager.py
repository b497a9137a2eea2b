"""Eager calls: the second equal call traces and compiles nothing, and memory does not grow."""

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx as flax_nnx

import lsoftmax_jax as lsm
from lsoftmax_jax import linen, nnx
from tests import oracle
from tests.answers import B, C, D

FEATURES, KERNEL, LABELS = oracle.as_arrays(oracle.problem(0, B, D, C), jnp.float32)
STATIC = {"margin": 20, "lam": 0.5}  # a margin so large that its recurrence is a loop
SAMPLE = lsm.sample_classes(jax.random.key(0), LABELS, C, 2)
COLUMNS = lsm.sampled.take_columns(KERNEL, SAMPLE)
WEIGHTS, ZEROS = jnp.ones(B), jnp.zeros_like(KERNEL)
HEAD = nnx.LSoftmaxDense(D, C, rngs=flax_nnx.Rngs(0))
TWIN = linen.LSoftmaxDense(C).bind({"params": {"kernel": KERNEL}})
ARC_FACE = lsm.margins.ArcFace(0.3, scale=8.0)
SCHEDULES = lsm.margin_schedule(100), lsm.annealed_lambda(*lsm.schedule.MNIST)

CALLS: dict[str, Callable[[], Any]] = {
    "psi": lambda: lsm.psi(KERNEL / 9, 20),
    "value_and_slope": lambda: lsm.margins.LSoftmax(4).value_and_slope(KERNEL / 9),
    "lsoftmax_logits": lambda: lsm.lsoftmax_logits(FEATURES, KERNEL, LABELS, **STATIC),
    "logits for inference": lambda: lsm.lsoftmax_logits(FEATURES, KERNEL, None, **STATIC),
    "lsoftmax_loss": lambda: lsm.lsoftmax_loss(FEATURES, KERNEL, LABELS, **STATIC),
    "a margin of one's own": lambda: lsm.lsoftmax_loss(
        FEATURES, KERNEL, LABELS, margin=ARC_FACE, lam=0.0
    ),
    "lsoftmax_loss_and_statistics": lambda: lsm.lsoftmax_loss_and_statistics(
        FEATURES, KERNEL, LABELS, **STATIC
    ),
    "lsoftmax_loss_sum": lambda: lsm.lsoftmax_loss_sum(FEATURES, KERNEL, LABELS, **STATIC),
    "its gradient": lambda: jax.value_and_grad(lsm.lsoftmax_loss_sum, (0, 1))(
        FEATURES, KERNEL, LABELS, WEIGHTS, **STATIC
    ),
    "sample_classes": lambda: lsm.sample_classes(jax.random.key(0), LABELS, C, 2),
    "take_columns": lambda: lsm.sampled.take_columns(KERNEL, SAMPLE),
    "put_columns": lambda: lsm.sampled.put_columns(KERNEL, SAMPLE, COLUMNS),
    "lsoftmax_sampled_loss": lambda: lsm.lsoftmax_sampled_loss(FEATURES, COLUMNS, SAMPLE, **STATIC),
    "lsoftmax_sampled_loss_and_statistics": lambda: lsm.lsoftmax_sampled_loss_and_statistics(
        FEATURES, COLUMNS, SAMPLE, **STATIC
    ),
    "lsoftmax_sampled_loss_sum": lambda: lsm.lsoftmax_sampled_loss_sum(
        FEATURES, COLUMNS, SAMPLE, **STATIC
    ),
    "lsoftmax_sgd": lambda: lsm.lsoftmax_sgd(
        FEATURES, KERNEL, ZEROS, LABELS, learning_rate=0.1, **STATIC
    ),
    "margin_schedule": lambda: SCHEDULES[0](7),
    "annealed_lambda": lambda: SCHEDULES[1](7),
    "NNX head": lambda: HEAD(FEATURES, LABELS),
    "its loss": lambda: HEAD.loss(FEATURES, LABELS),
    "its loss_and_statistics": lambda: HEAD.loss_and_statistics(FEATURES, LABELS),
    "its loss_sum": lambda: HEAD.loss_sum(FEATURES, LABELS),
    "Linen head": lambda: TWIN(FEATURES, LABELS),
    "the twin's loss": lambda: TWIN.loss(FEATURES, LABELS),
    "the twin's loss_and_statistics": lambda: TWIN.loss_and_statistics(FEATURES, LABELS),
    "the twin's loss_sum": lambda: TWIN.loss_sum(FEATURES, LABELS),
}
# Names that make a rule or a layout, or that are not functions of arrays.
NOT_CALLED = {"self_paced", "ClassParallel", "Plan", "SelfPaced", "SgdStep", "Statistics"}


def test_every_public_function_is_called():
    public = {name for name in lsm.__all__ if callable(getattr(lsm, name))}
    assert public - NOT_CALLED <= set(CALLS)


SEEN: list[str] = []


@pytest.fixture(scope="module")
def listener():
    """Listens until the process ends: older versions of JAX cannot remove a listener."""

    def listen(name: str, *_: Any, **__: Any) -> None:
        if name.startswith("/jax/core/compile/"):
            SEEN.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)


@pytest.fixture(scope="module")
def frozen():
    """Lets the tests' collections look at new objects only, not at all that JAX keeps."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def compilations(listener):
    """The names of JAX's tracing and compilation events, as they happen."""
    SEEN.clear()
    return SEEN


@pytest.mark.usefixtures("frozen")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_equal_call_compiles_nothing_and_keeps_nothing(compilations, call):
    jax.block_until_ready(call())
    compilations.clear()
    sizes = []
    tracemalloc.start()
    for _ in range(2):
        for _ in range(5):
            jax.block_until_ready(call())
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert compilations == []
    # JAX's own caches first take a few hundred bytes a call; a program takes a hundred times more.
    assert sizes[1] - sizes[0] < 5 * 4096


def test_the_fixture_sees_a_compilation(compilations):
    jax.jit(lambda x: x + 1)(FEATURES)
    assert any("backend_compile" in name for name in compilations)
