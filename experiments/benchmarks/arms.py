"""What `bench head` times: the same head, written in all the ways one might."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Lowered

import lsoftmax_jax as lsm

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
RATE, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4
UNLIMITED = 2**60


class Shape(NamedTuple):
    batch: int
    dim: int
    classes: int

    def __str__(self) -> str:
        return f"({self.batch}, {self.dim}, {self.classes})"


class Problem(NamedTuple):
    """One head's operands. The weights make the loss a mean."""

    features: jax.Array
    kernel: jax.Array
    labels: jax.Array
    weights: jax.Array
    lam: jax.Array


Loss = Callable[[Problem], jax.Array]
Step = Callable[..., tuple[jax.Array, jax.Array, Any]]


class Arm(NamedTuple):
    """One way to compute a step.

    `step(features, state, labels, weights, lam)` gives the loss, the features' gradient, and the
    kernel's gradient, the state being the kernel; or, if it `updates`, the next state, which takes
    the memory of the last one.
    """

    name: str
    products: int  # of batch x dim x classes multiply-adds
    loss: Literal["none", "plain", "margin", "arcface"]
    step: Step
    updates: bool = False
    start: Callable[[jax.Array], Any] = lambda kernel: kernel

    def lower(self, features: Any, state: Any, *rest: Any) -> Lowered:
        """The step's program, for arrays or for shapes of them."""
        donated = (1,) if self.updates else ()
        return jax.jit(self.step, donate_argnums=donated).lower(features, state, *rest)


PLAIN = "optax softmax"
PLAIN_SGD = "optax softmax, optax SGD"
THREE, FOUR = "3 bare products", "4 bare products"
ONE_SHOT = "loss_sum, one-shot"
RECOMPUTED = "loss_sum, class blocks"
STORED = "loss_sum, class blocks, stored"
FUSED_SGD = "lsoftmax_sgd"
LITERAL = "literal arccos"
ARCFACE = "ArcFace, loss_sum, one-shot"
ARCFACE_BLOCKS = "ArcFace, loss_sum, class blocks"
# Of the arms named after it.
ARCFACE_MARGIN, ARCFACE_SCALE = 0.5, 64.0


def problem(shape: Shape, dtype: jnp.dtype, lam: float) -> Problem:
    """Features of unit scale and a kernel of the usual initialisation."""
    rng = np.random.default_rng(0)
    features: Any = rng.standard_normal((shape.batch, shape.dim), np.float32)
    kernel: Any = rng.standard_normal((shape.dim, shape.classes), np.float32)
    kernel *= np.float32(shape.dim**-0.5)
    labels = jnp.asarray(rng.integers(shape.classes, size=shape.batch), jnp.int32)
    weights = jnp.full(shape.batch, 1 / shape.batch, jnp.float32)
    features, kernel = (jnp.asarray(array, dtype) for array in (features, kernel))
    return Problem(features, kernel, labels, weights, jnp.float32(lam))


def arms(shape: Shape, margin: int, class_block: int) -> list[Arm]:
    """All arms for a shape, the baseline first; blocks only where they make sense."""

    def loss_sum(margin: Any, **plan: Any) -> Loss:
        options = {"margin": margin, "plan": lsm.Plan(**plan)}
        return lambda given: lsm.lsoftmax_loss_sum(*given[:4], lam=given.lam, **options)

    def per_example(given: Problem) -> jax.Array:
        plan = lsm.Plan(memory_budget=UNLIMITED)
        losses = lsm.lsoftmax_loss(*given[:3], margin=margin, lam=given.lam, plan=plan)
        return jnp.sum(given.weights * losses)

    def logits(given: Problem) -> jax.Array:
        return cross_entropy(lsm.lsoftmax_logits(*given[:3], margin=margin, lam=given.lam), given)

    def literal(given: Problem) -> jax.Array:
        return cross_entropy(literal_logits(given, margin), given)

    def literal_scan(given: Problem) -> jax.Array:
        @jax.checkpoint
        def body(total: Any, rows: Any) -> tuple[Any, None]:
            features, labels, weights = rows
            of_rows = given._replace(features=features, labels=labels, weights=weights)
            return total + literal(of_rows), None

        rows = given.features, given.labels, given.weights
        pieces = jax.tree.map(lambda r: r.reshape(-1, rows_at_once, *r.shape[1:]), rows)
        return jax.lax.scan(body, jnp.float32(0), pieces)[0]

    def fused_sgd(features: Any, state: Any, labels: Any, weights: Any, lam: Any) -> Any:
        options: dict[str, Any] = {
            "margin": margin,
            "lam": lam,
            "plan": lsm.Plan(class_block=class_block),
        }
        options |= {"learning_rate": RATE, "decay": MOMENTUM, "weight_decay": DECAY}
        kernel, momentum = state
        done = lsm.lsoftmax_sgd(features, kernel, momentum, labels, weights, **options)
        return done.loss, done.dfeatures, (done.kernel, done.momentum)

    one_shot = loss_sum(margin, memory_budget=UNLIMITED)
    margin_of_arcface = lsm.margins.ArcFace(ARCFACE_MARGIN, scale=ARCFACE_SCALE)
    arcface = functools.partial(loss_sum, margin_of_arcface)
    rows_at_once = shape.batch // next(pieces for pieces in (4, 2, 1) if shape.batch % pieces == 0)
    listed = [
        Arm(PLAIN, 3, "plain", gradients(plain_loss)),
        Arm(THREE, 3, "none", three_products),
        Arm(FOUR, 4, "none", four_products),
        Arm("loss_sum, m = 1", 3, "plain", gradients(loss_sum(1, memory_budget=UNLIMITED))),
        Arm("lsoftmax_loss, one-shot", 3, "margin", gradients(per_example)),
        Arm(ONE_SHOT, 3, "margin", gradients(one_shot)),
    ]
    if shape.classes >= 2 * class_block:
        by_rows = loss_sum(margin, row_block=rows_at_once)
        blocks = {"class_block": class_block, "keep_exponentials": False}
        stored = blocks | {"keep_exponentials": True}
        listed += [
            Arm("loss_sum, row blocks", 3, "margin", gradients(by_rows)),
            Arm(RECOMPUTED, 4, "margin", gradients(loss_sum(margin, **blocks))),
            Arm(STORED, 3, "margin", gradients(loss_sum(margin, **stored))),
            Arm(ARCFACE_BLOCKS, 4, "arcface", gradients(arcface(**blocks))),
        ]
    listed += [
        Arm("lsoftmax_logits, optax", 3, "margin", gradients(logits)),
        Arm(LITERAL, 3, "margin", gradients(literal)),
        Arm("literal, scan, checkpoint", 4, "margin", gradients(literal_scan)),
        Arm(ARCFACE, 3, "arcface", gradients(arcface(memory_budget=UNLIMITED))),
        Arm("literal ArcFace", 3, "arcface", gradients(literal_arcface)),
        Arm(PLAIN_SGD, 3, "plain", with_sgd(plain_loss), True, sgd_state),
        Arm(f"{ONE_SHOT}, optax SGD", 3, "margin", with_sgd(one_shot), True, sgd_state),
        Arm(FUSED_SGD, 4, "margin", fused_sgd, True, lambda k: (jnp.copy(k), jnp.zeros_like(k))),
    ]
    return listed


def gradients(loss: Loss) -> Step:
    def step(features: Any, kernel: Any, *rest: Any) -> tuple[jax.Array, jax.Array, Any]:
        def of(features: Any, kernel: Any) -> jax.Array:
            return loss(Problem(features, kernel, *rest))

        value, (dfeatures, dkernel) = jax.value_and_grad(of, (0, 1))(features, kernel)
        return value, dfeatures, dkernel

    return step


def with_sgd(loss: Loss) -> Step:
    def step(features: Any, state: Any, *rest: Any) -> tuple[jax.Array, jax.Array, Any]:
        kernel, state = state
        value, dfeatures, dkernel = gradients(loss)(features, kernel, *rest)
        updates, state = sgd().update(dkernel, state, kernel)
        return value, dfeatures, (optax.apply_updates(kernel, updates), state)

    return step


def sgd() -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=MOMENTUM))


def sgd_state(kernel: jax.Array) -> Any:
    return jnp.copy(kernel), sgd().init(kernel)


def cross_entropy(logits: jax.Array, given: Problem) -> jax.Array:
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, given.labels)
    return jnp.sum(given.weights * losses)


def plain_loss(given: Problem) -> jax.Array:
    return cross_entropy(given.features @ given.kernel, given)


def literal_logits(given: Problem, margin: int) -> jax.Array:
    """The paper's formula as it is usually written: every cosine, an arccos, a scatter."""
    features, kernel, labels, _, lam = given
    rows = jnp.arange(features.shape[0])
    plain = (features @ kernel).astype(jnp.float32)
    feature_norm = jnp.linalg.norm(features.astype(jnp.float32), axis=1)
    kernel_norm = jnp.linalg.norm(kernel.astype(jnp.float32), axis=0)
    cosine = plain / (feature_norm[:, None] * kernel_norm[None, :])
    theta = jnp.arccos(jnp.clip(cosine[rows, labels], -1 + 1e-7, 1 - 1e-7))
    k = jax.lax.stop_gradient(jnp.floor(margin * theta / jnp.pi))
    psi = (-1.0) ** k * jnp.cos(margin * theta) - 2 * k
    large = feature_norm * kernel_norm[labels] * psi
    target = (lam * plain[rows, labels] + large) / (1 + lam)
    return plain.at[rows, labels].set(target)


def literal_arcface(given: Problem) -> jax.Array:
    """As it is usually written: both normalised, the addition formula, a scatter."""
    features, kernel, labels, _, lam = given
    rows = jnp.arange(features.shape[0])
    wide = features.astype(jnp.float32), kernel.astype(jnp.float32)
    unit = wide[0] / jnp.linalg.norm(wide[0], axis=1, keepdims=True)
    columns = wide[1] / jnp.linalg.norm(wide[1], axis=0, keepdims=True)
    cosine = (unit.astype(features.dtype) @ columns.astype(kernel.dtype)).astype(jnp.float32)
    own = jnp.clip(cosine[rows, labels], -1 + 1e-7, 1 - 1e-7)
    m = ARCFACE_MARGIN
    raised = own * np.cos(m) - jnp.sqrt(1 - own**2) * np.sin(m)
    target = (lam * own + raised) / (1 + lam)
    return cross_entropy(ARCFACE_SCALE * cosine.at[rows, labels].set(target), given)


def three_products(features: Any, kernel: Any, *_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least that exact gradients can cost: the products alone."""
    z = features @ kernel
    return z[0, 0], z @ kernel.T, features.T @ z


def four_products(features: Any, kernel: Any, *_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the logits are not kept: another product of that size."""
    # Of other rows, or the compiler would find the two logits equal.
    again = features[::-1]
    z = again @ kernel
    return jnp.max(features @ kernel), z @ kernel.T, again.T @ z


def literal_loss(given: Problem, margin: int | None) -> float:
    """The paper's formula in NumPy and float64, a few rows at a time; without margin ArcFace's."""
    features, kernel = (np.asarray(a.astype(jnp.float32), np.float64) for a in given[:2])
    labels, lam = np.asarray(given.labels), float(given.lam)
    losses = []
    for start in range(0, len(labels), 64):
        rows, y = features[start : start + 64], labels[start : start + 64]
        z, here = rows @ kernel, (np.arange(len(y)), y)
        norms = np.linalg.norm(rows, axis=1)[:, None] * np.linalg.norm(kernel, axis=0)
        cosine = np.clip((z / norms)[here], -1, 1)
        theta = np.arccos(cosine)
        if margin is None:
            z *= ARCFACE_SCALE / norms
            large = ARCFACE_SCALE * (lam * cosine + np.cos(theta + ARCFACE_MARGIN))
        else:
            k = np.clip(np.floor(margin * theta / np.pi), 0, margin - 1)
            psi = (-1.0) ** k * np.cos(margin * theta) - 2 * k
            large = norms[here] * (lam * cosine + psi)
        z[here] = large / (1 + lam)
        losses.append(np.logaddexp.reduce(z, axis=1) - z[here])
    return float(np.concatenate(losses) @ np.asarray(given.weights, np.float64))
