"""Which arrays the losses keep for the backward pass, and how many products they compute."""

import functools

import jax
import jax.numpy as jnp

import lsoftmax_jax as lsm


def large_arrays(residuals, size):
    return [leaf for leaf in jax.tree.leaves(residuals) if leaf.size >= size]


def test_the_loss_keeps_one_array_of_batch_by_classes_and_the_sum_none():
    operands = jnp.ones((64, 2)), jnp.ones((2, 128))
    labels = jnp.zeros(64, jnp.int32)

    def kept(rule, **plan):
        def residuals(features, kernel):
            return jax.vjp(
                lambda f, k: rule(f, k, labels, margin=4, lam=0.0, plan=lsm.Plan(**plan)),
                features,
                kernel,
            )[1]

        return large_arrays(jax.eval_shape(residuals, *operands), 64 * 32)

    assert [leaf.shape for leaf in kept(lsm.lsoftmax_loss)] == [(64, 128)]
    assert not kept(lsm.lsoftmax_loss, class_block=32, keep_exponentials=False)
    assert not kept(lsm.lsoftmax_loss, row_block=32)
    assert not kept(lsm.lsoftmax_loss, keep_exponentials=False)
    assert not kept(lsm.lsoftmax_loss_sum)
    assert not kept(lsm.lsoftmax_loss_sum, row_block=32)


def test_three_products_for_a_gradient_and_one_without():
    operands = jnp.ones((6, 5)), jnp.ones((5, 301)), jnp.zeros(6, jnp.int32)

    def mean(features, kernel, labels):
        return jnp.mean(lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=0.0))

    total = functools.partial(lsm.lsoftmax_loss_sum, margin=4, lam=0.0)
    for rule in (mean, total):
        # Count in the traced program: outside jit nothing removes an unused product.
        assert str(jax.make_jaxpr(rule)(*operands)).count(" dot_general[") == 1
        gradient = jax.jit(jax.grad(rule, argnums=(0, 1))).lower(*operands)
        assert gradient.compile().as_text().count(" dot(") == 3
