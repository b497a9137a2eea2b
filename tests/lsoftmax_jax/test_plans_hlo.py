"""The cost of every plan, read from the compiled program; nothing runs, so load has no effect."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import ArcFace, SphereFace
from tests import hlo

SOME, MANY = (512, 512, 10575), (512, 256, 102400)
BLOCK = 1024
RULES = {"λ given": 5.0, "self-paced": lsm.self_paced()}


def operands(shape, dtype=jnp.float32):
    batch, dim, classes = shape
    return (
        jax.ShapeDtypeStruct((batch, dim), dtype),
        jax.ShapeDtypeStruct((dim, classes), dtype),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )


gated = pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older compilers take more memory"
)


def plain(features, kernel, labels):
    logits = features @ kernel
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def summed(features, kernel, labels, **keywords):
    weights = jnp.full(labels.shape, 1 / labels.size)
    return lsm.lsoftmax_loss_sum(features, kernel, labels, weights, **keywords)


def each(features, kernel, labels, **keywords):
    return lsm.lsoftmax_loss(features, kernel, labels, **keywords).mean()


def logits(features, kernel, labels, **keywords):
    return jnp.sum(lsm.lsoftmax_logits(features, kernel, labels, **keywords) ** 2)


@functools.cache
def facts(loss, shape, plan=None, margin=4, lam=5.0):
    """Facts of the compiled loss and gradients."""
    if loss is not plain:
        loss = functools.partial(loss, margin=margin, lam=lam, plan=plan)
    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands(shape)).compile()
    return hlo.facts(compiled, shape[1] * shape[2])


@gated
@pytest.mark.parametrize("loss", [summed, each])
@pytest.mark.parametrize("rule", RULES)
def test_the_one_shot_keeps_one_array_where_autodiff_keeps_two(loss, rule):
    theirs, ours = facts(plain, SOME), facts(loss, SOME, lam=RULES[rule])
    assert ours.temporary_bytes <= 0.51 * theirs.temporary_bytes
    assert ours.dots == 3 and ours.large_moves == []


RECOMPUTED = lsm.Plan(class_block=BLOCK, keep_exponentials=False)
STORED = lsm.Plan(class_block=BLOCK, keep_exponentials=True)


@gated
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "plan, share, dots",
    [(RECOMPUTED, 0.01, 4), (STORED, 0.52, 3), (lsm.Plan(row_block=128), 0.39, 3)],
    ids=["recomputed", "stored", "row blocks"],
)
def test_blocks_at_many_classes(plan, share, dots, rule):
    theirs, ours = facts(plain, MANY), facts(summed, MANY, plan, lam=RULES[rule])
    assert ours.temporary_bytes <= share * theirs.temporary_bytes
    assert ours.dots == dots and ours.large_moves == []


@gated
@pytest.mark.parametrize("loss", [summed, each])
def test_a_cpu_computes_many_classes_in_blocks_and_keeps_one_array(loss):
    ours = facts(loss, MANY)
    assert ours.temporary_bytes <= 0.52 * facts(plain, MANY).temporary_bytes
    assert ours.dots == 3 and ours.large_moves == []


@pytest.mark.parametrize("loss", [summed, each])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_only_a_cpu_computes_many_classes_in_blocks(loss, platform):
    step = jax.value_and_grad(functools.partial(loss, margin=4, lam=5.0), (0, 1))
    traced = jax.jit(step).trace(*operands(MANY))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    products = re.findall(r"stablehlo.dot_general .*-> tensor<(\w+)>", program)
    classes = f"{BLOCK}" if platform == "cpu" else f"{MANY[2]}"
    assert products == [f"512x{classes}xf32", "512x256xf32", f"256x{classes}xf32"]


@gated
@pytest.mark.parametrize("plan", [lsm.Plan(2**22), lsm.Plan(row_block=1024)], ids=str)
@pytest.mark.parametrize("loss", [summed, each])
@pytest.mark.parametrize("classes", [150, 300])
def test_blocks_of_few_classes_and_many_rows(loss, classes, plan):
    """Up to 256 classes, the label's logit was once read from the logits of all rows."""
    ours = facts(loss, (65536, 16, classes), plan)
    assert ours.temporary_bytes <= 0.6 * 4 * 65536 * classes


def test_sgd_inside_the_head_has_no_gradient_of_the_kernel_and_copies_nothing():
    features, kernel, labels = operands(MANY)
    step = functools.partial(
        lsm.lsoftmax_sgd, margin=4, lam=5.0, learning_rate=0.1, plan=lsm.Plan(class_block=BLOCK)
    )
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(features, kernel, kernel, labels)
    ours = hlo.facts(compiled.compile(), MANY[1] * MANY[2])
    assert ours.temporary_bytes <= 8e6
    assert ours.reused_bytes == 2 * 4 * MANY[1] * MANY[2]
    assert ours.dots == 4 and ours.large_moves == []


@gated
@pytest.mark.parametrize(
    "margin", [ArcFace(0.5, scale=64.0), SphereFace(4), SphereFace(4, scale=64.0)], ids=str
)
def test_the_kernel_is_not_copied_to_be_normalised(margin):
    # Removing the component along the columns needs one more array, the gradient of a block of
    # columns. The one-shot changes the gradient of the kernel in place.
    shape = 256, 128, 8192
    for share, plan in ((0.13, RECOMPUTED), (0.13, STORED), (0.05, lsm.Plan(2**40))):
        kept, ours = facts(summed, shape, plan), facts(summed, shape, plan, margin)
        assert ours.dots == kept.dots and ours.large_moves == []
        assert ours.temporary_bytes - kept.temporary_bytes <= share * 4 * 128 * 8192


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older compilers fuse no product")
@pytest.mark.parametrize("loss", [summed, each, logits])
def test_no_product_is_fused_with_the_sum_that_reads_it(loss):
    """Such a product takes half as long again on a CPU; XLA fused one of ArcFace's."""
    step = jax.value_and_grad(
        functools.partial(loss, margin=ArcFace(0.5, scale=64.0), lam=0.0), (0, 1)
    )
    text = jax.jit(step).lower(*operands((256, 128, 8192))).compile().as_text()
    bodies = [body for _, body in hlo.BODY.findall(text)]
    assert any(" dot(" in body for body in bodies)
    assert not any(" dot(" in body and " reduce(" in body for body in bodies)


@gated
def test_few_classes_keep_no_further_array():
    shape = 256, 512, 100
    theirs, ours = facts(plain, shape), facts(summed, shape)
    assert ours.temporary_bytes - theirs.temporary_bytes < 0.5 * 4 * 256 * 100
    assert ours.dots == 3 and ours.large_moves == []


@gated
@pytest.mark.parametrize("loss", [lsm.lsoftmax_loss_sum, lsm.lsoftmax_loss])
def test_without_gradients_only_the_logits_are_computed(loss):
    features, kernel, labels = operands(SOME)
    compiled = (
        jax.jit(functools.partial(loss, margin=4, lam=0.0))
        .lower(features, kernel, labels)
        .compile()
    )
    found = hlo.facts(compiled, SOME[1] * SOME[2])
    assert found.dots == 1 and found.large_moves == []
    # The logits, and a few arrays of the features' size: three with JAX 0.10.0, one with 0.10.2.
    assert found.temporary_bytes <= 4 * SOME[0] * (SOME[2] + 4 * SOME[1])


@pytest.mark.parametrize("loss", [lsm.lsoftmax_loss_sum, lsm.lsoftmax_loss, lsm.lsoftmax_logits])
@pytest.mark.parametrize("classes, precision", [(256, "HIGHEST"), (257, "DEFAULT")])
def test_few_classes_multiply_at_full_precision(loss, classes, precision):
    # On a TPU the default precision rounds float32 to bfloat16.
    features, kernel, labels = operands((8, 16, classes))

    def total(features, kernel, labels):
        return loss(features, kernel, labels, margin=4, lam=0.0).sum()

    text = jax.jit(jax.grad(total, (0, 1))).lower(features, kernel, labels).as_text()
    found = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", text)
    # The gradient may not need the logits themselves.
    assert len(found) >= 2 and set(found) == {(precision, precision)}


def gradient_text(margin, classes, platform):
    features, kernel, labels = operands((7, 16, classes))
    loss = functools.partial(lsm.lsoftmax_loss_sum, margin=margin, lam=0.0)
    gradients = jax.jit(jax.grad(loss, (0, 1)))
    return gradients.trace(features, kernel, labels).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform, passes", [("cpu", 0), ("cuda", 1), ("tpu", 1)])
def test_the_largest_logit_takes_no_pass_of_its_own_on_a_cpu(platform, passes):
    # On a CPU, clamping every logit made the one-shot a fifth slower at 102,400 classes.
    text = gradient_text(4, 300, platform)
    assert len(re.findall(r"stablehlo\.maximum %.*: tensor<7x300xf32>", text)) == passes


@pytest.mark.parametrize("margin, roots", [(1, 0), (4, 2)])
def test_plain_softmax_computes_no_norm(margin, roots):
    assert gradient_text(margin, 10, "cpu").count("stablehlo.sqrt") == roots


@pytest.mark.parametrize("class_block", [None, BLOCK])
def test_plain_softmax_has_no_terms_of_norms(class_block):
    """With m = 1 the gradients are products alone: nothing is added to them."""

    def additions(margin):
        plan = None if class_block is None else lsm.Plan(class_block=class_block)
        loss = functools.partial(each, margin=margin, lam=5.0, plan=plan)
        batch, dim, classes = shape = (384, 512, 10575)
        text = jax.jit(jax.grad(loss, (0, 1))).lower(*operands(shape)).as_text()
        added = re.findall(r"stablehlo\.add .*: tensor<(\w+)>", text)
        kernels = {f"{dim}x{columns}xf32" for columns in (classes, class_block)}
        # A loop over classes adds to the features' gradient, block by block.
        features = {f"{batch}x{dim}xf32"} if class_block is None else set()
        return [shape for shape in added if shape in kernels | features]

    assert additions(1) == [] and additions(2) != []


def test_a_cpu_reads_what_it_needs_at_the_label():
    """Two arrays of (batch, classes) are selected from: the other logits, and the gradient."""
    loss = functools.partial(summed, margin=4, lam=5.0)
    lowered = jax.jit(jax.grad(loss, (0, 1))).trace(*operands((384, 512, 100)))
    selected = re.compile(r"stablehlo\.select .*tensor<384x100xf32>")
    counts = {
        platform: len(selected.findall(lowered.lower(lowering_platforms=(platform,)).as_text()))
        for platform in ("cpu", "tpu")
    }
    assert counts["cpu"] == 2 < counts["tpu"]
