"""What every plan takes, read off the compiled program; nothing runs, so load does not matter."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import lsoftmax_jax as lsm
from experiments.benchmarks import arms, hlo
from experiments.benchmarks.arms import Shape

SOME, MANY = Shape(512, 512, 10575), Shape(512, 256, 102400)
BLOCK = 1024


def operands(shape, dtype=jnp.float32):
    return (
        jax.ShapeDtypeStruct((shape.batch, shape.dim), dtype),
        jax.ShapeDtypeStruct((shape.dim, shape.classes), dtype),
        jax.ShapeDtypeStruct((shape.batch,), jnp.int32),
        jax.ShapeDtypeStruct((shape.batch,), jnp.float32),
        jax.ShapeDtypeStruct((), jnp.float32),
    )


gated = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older compilers take more memory; see CONTRIBUTING.md"
)


@functools.cache
def facts(name, shape):
    arm = next(arm for arm in arms.arms(shape, 4, BLOCK) if arm.name == name)
    features, kernel, *rest = operands(shape)
    state = jax.eval_shape(arm.start, kernel)
    step = jax.jit(arm.step, donate_argnums=(1,) if arm.updates else ())
    return hlo.facts(step.lower(features, state, *rest).compile(), shape.dim * shape.classes)


@gated
@pytest.mark.parametrize("name", [arms.ONE_SHOT, "lsoftmax_loss, one-shot"])
def test_the_one_shot_keeps_one_array_where_autodiff_keeps_two(name):
    plain, ours = facts(arms.PLAIN, SOME), facts(name, SOME)
    assert ours.temporary_bytes <= 0.51 * plain.temporary_bytes
    assert ours.dots == 3 and ours.large_moves == {}


@gated
@pytest.mark.parametrize(
    "name, share, dots",
    [(arms.RECOMPUTED, 0.01, 4), (arms.STORED, 0.52, 3), ("loss_sum, row blocks", 0.39, 3)],
)
def test_blocks_at_many_classes(name, share, dots):
    plain, ours = facts(arms.PLAIN, MANY), facts(name, MANY)
    assert ours.temporary_bytes <= share * plain.temporary_bytes
    assert ours.dots == dots and ours.large_moves == {}


def test_sgd_inside_the_head_has_no_gradient_of_the_kernel_and_copies_nothing():
    ours = facts(arms.FUSED_SGD, MANY)
    assert ours.temporary_bytes <= 8e6
    assert ours.reused_bytes == 2 * 4 * MANY.dim * MANY.classes
    assert ours.dots == 4 and ours.large_moves == {}


def test_few_classes_keep_no_further_array():
    shape = Shape(256, 512, 100)
    plain, ours = facts(arms.PLAIN, shape), facts(arms.ONE_SHOT, shape)
    assert ours.temporary_bytes - plain.temporary_bytes < 0.5 * 4 * shape.batch * shape.classes
    assert ours.dots == 3 and ours.large_moves == {}


@gated
@pytest.mark.parametrize("loss", [lsm.lsoftmax_loss_sum, lsm.lsoftmax_loss])
def test_without_gradients_only_the_logits_are_computed(loss):
    features, kernel, labels, *_ = operands(SOME)
    compiled = (
        jax.jit(functools.partial(loss, margin=4, lam=0.0))
        .lower(features, kernel, labels)
        .compile()
    )
    found = hlo.facts(compiled, SOME.dim * SOME.classes)
    assert found.dots == 1 and found.large_moves == {}
    # The logits, and a few arrays of the features' size: three with JAX 0.10.0, one with 0.10.2.
    assert found.temporary_bytes <= 4 * SOME.batch * (SOME.classes + 4 * SOME.dim)


@pytest.mark.parametrize("loss", [lsm.lsoftmax_loss_sum, lsm.lsoftmax_loss, lsm.lsoftmax_logits])
@pytest.mark.parametrize("classes, precision", [(256, "HIGHEST"), (257, "DEFAULT")])
def test_few_classes_multiply_at_full_precision(loss, classes, precision):
    # On a TPU the default rounds float32 to bfloat16.
    features, kernel, labels, *_ = operands(Shape(8, 16, classes))

    def total(features, kernel, labels):
        return loss(features, kernel, labels, margin=4, lam=0.0).sum()

    text = jax.jit(jax.grad(total, (0, 1))).lower(features, kernel, labels).as_text()
    found = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", text)
    # The logits themselves may not be needed.
    assert len(found) >= 2 and set(found) == {(precision, precision)}


def gradient_text(margin, classes, platform):
    features, kernel, labels, *_ = operands(Shape(7, 16, classes))
    loss = functools.partial(lsm.lsoftmax_loss_sum, margin=margin, lam=0.0)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    return gradients.trace(features, kernel, labels).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform, passes", [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_the_largest_logit_takes_no_pass_of_its_own_on_a_cpu(platform, passes):
    # Clamping every logit made the one-shot a fifth slower there at 102,400 classes.
    text = gradient_text(4, 300, platform)
    assert len(re.findall(r"stablehlo\.maximum %.*: tensor<7x300xf32>", text)) == passes


@pytest.mark.parametrize("margin, roots", [(1, 0), (4, 2)])
def test_plain_softmax_computes_no_norm(margin, roots):
    assert gradient_text(margin, 10, "cpu").count("stablehlo.sqrt") == roots
