"""The arms of `bench head` and `compile`: one head, computed in all the ways one might."""

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered
from numpy.typing import NDArray

import lsoftmax_jax as lsm
from experiments.benchmarks.targets import placed
from lsoftmax_jax.margins import ArcFace, CosFace, NormFace, SphereFace
from lsoftmax_jax.nnx import LSoftmaxDense

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
RATE, MOMENTUM, DECAY = 1e-3, 0.9, 5e-4
UNLIMITED = 2**60
NEGATIVES = 16_384

PLAIN = "optax softmax"
PLAIN_SGD = "optax softmax, optax SGD"
HEAD = "head.loss(...).mean()"
DEFAULT = "loss_sum, default λ"
ONE_SHOT = "loss_sum, one-shot"
RECOMPUTED = "loss_sum, class blocks"
STORED = "loss_sum, class blocks, stored"
ARCFACE_BLOCKS = "ArcFace, class blocks"
FUSED_SGD = "lsoftmax_sgd"
SAMPLED = f"sampled, {NEGATIVES:,} others"
TOKAMAX = "tokamax softmax"
FOUR = "4 bare products"
# The papers' settings. PyTorch's losses are timed with the same ones.
FAMILY: dict[str, lsm.margins.Margin] = {
    "ArcFace": ArcFace(0.5, scale=64.0),
    "CosFace": CosFace(0.35, scale=64.0),
    "SphereFace": SphereFace(4),
    "NormFace": NormFace(scale=16.0),
}
# What most users run, and what they would run without this library.
MAIN = (PLAIN, HEAD, DEFAULT, ONE_SHOT, "ArcFace", RECOMPUTED, PLAIN_SGD, FUSED_SGD)


class Shape(NamedTuple):
    batch: int
    dim: int
    classes: int

    def __str__(self) -> str:
        return f"({self.batch}, {self.dim}, {self.classes})"


class Problem(NamedTuple):
    """One head's operands. The weights make the loss a mean."""

    features: Any
    kernel: Any
    labels: Any
    weights: Any
    lam: Any


Margin = int | lsm.margins.Margin
Loss = Callable[[Problem], jax.Array]
# (features, state, labels, weights, lam) -> loss, the features' gradient, and the kernel's gradient
# or the next state.
Step = Callable[..., tuple[jax.Array, jax.Array, Any]]


class Arm(NamedTuple):
    """One way to compute a step; what it computes is known from its margin and rule alone."""

    name: str
    step: Step
    margin: Margin | None = None  # None: the arm computes no exact loss
    products: int = 3  # of batch x dim x classes multiply-adds
    paced: bool = False  # λ comes from the default rule, not from the problem
    # For an arm that updates: kernel -> first state. Each state is donated to the next step.
    start: Callable[[Any], Any] | None = None

    def first_state(self, kernel: Any) -> Any:
        return kernel if self.start is None else self.start(kernel)

    def lower(self, *operands: Any) -> Lowered:
        """The step's program, for arrays or for shapes of them."""
        donated = () if self.start is None else (1,)
        return jax.jit(self.step, donate_argnums=donated).lower(*operands)


def problem(shape: Shape, dtype: str, lam: float) -> Problem:
    """Features of unit scale and a kernel of the usual initialisation."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((shape.batch, shape.dim), np.float32)
    kernel = rng.standard_normal((shape.dim, shape.classes), np.float32)
    kernel *= np.float32(shape.dim**-0.5)
    labels = jnp.asarray(rng.integers(shape.classes, size=shape.batch), jnp.int32)
    weights = jnp.full(shape.batch, 1 / shape.batch, jnp.float32)
    numbers = DTYPES[dtype]
    given = jnp.asarray(features, numbers), jnp.asarray(kernel, numbers)
    return Problem(*given, labels, weights, jnp.float32(lam))


def abstract(shape: Shape, dtype: str) -> Problem:
    """The shapes and dtypes of `problem`."""
    numbers, array = DTYPES[dtype], jax.ShapeDtypeStruct
    batch, dim, classes = shape
    given = array((batch, dim), numbers), array((dim, classes), numbers)
    rows = array((batch,), jnp.int32), array((batch,), jnp.float32)
    return Problem(*given, *rows, array((), jnp.float32))


def arms(
    shape: Shape, margin: int = 4, class_block: int = 4096, layout: lsm.ClassParallel | None = None
) -> Iterator[Arm]:
    """All arms for a shape, the baseline first; blocks only where there are at least two.

    Args:
      layout: of the arms of this library that a mesh can have; all others are left out.
    """

    def loss_sum(margin: Margin, lam: Any = None, **plan: Any) -> Loss:
        def loss(given: Problem) -> jax.Array:
            options: dict[str, Any] = {"margin": margin, "plan": lsm.Plan(**plan)}
            options |= {"lam": given.lam if lam is None else lam, "layout": layout}
            return lsm.lsoftmax_loss_sum(*given[:4], **options)

        return loss

    def fused_sgd(features: Any, state: Any, labels: Any, weights: Any, lam: Any) -> Any:
        kernel, momentum = state
        options: dict[str, Any] = {"learning_rate": RATE, "decay": MOMENTUM, "weight_decay": DECAY}
        options |= {"margin": margin, "lam": lam, "plan": lsm.Plan(class_block=class_block)}
        options |= {"layout": layout}
        done = lsm.lsoftmax_sgd(features, kernel, momentum, labels, weights, **options)
        return done.loss, done.dfeatures, (done.kernel, done.momentum)

    in_blocks: dict[str, Any] = {"class_block": class_block, "keep_exponentials": False}
    recomputed = Arm(RECOMPUTED, gradients(loss_sum(margin, **in_blocks)), margin, 4)
    sgd_in_blocks = Arm(FUSED_SGD, fused_sgd, margin, 4, start=with_momentum)
    if layout is not None:
        yield from (recomputed, sgd_in_blocks)
        return
    one_shot = loss_sum(margin, memory_budget=UNLIMITED)
    paced = loss_sum(margin, lsm.self_paced(), memory_budget=UNLIMITED)
    yield Arm(PLAIN, gradients(plain_loss), 1)
    yield Arm(HEAD, gradients(head_loss(shape, margin)), margin, paced=True)
    yield Arm(DEFAULT, gradients(paced), margin, paced=True)
    yield Arm(ONE_SHOT, gradients(one_shot), margin)
    yield Arm("loss_sum, m = 1", gradients(loss_sum(1, memory_budget=UNLIMITED)), 1)
    for name, member in FAMILY.items():
        yield Arm(name, gradients(loss_sum(member, 0.0, memory_budget=UNLIMITED)), member)
    if shape.classes >= 2 * class_block:
        rows = max(shape.batch // 4, 1)
        yield Arm("loss_sum, row blocks", gradients(loss_sum(margin, row_block=rows)), margin)
        yield recomputed
        kept = loss_sum(margin, class_block=class_block, keep_exponentials=True)
        yield Arm(STORED, gradients(kept), margin)
        arcface = FAMILY["ArcFace"]
        by_classes = gradients(loss_sum(arcface, 0.0, **in_blocks))
        yield Arm(ARCFACE_BLOCKS, by_classes, arcface, 4)
    yield Arm("lsoftmax_logits, optax", gradients(logits_loss(margin)), margin)
    yield Arm("reference.py", gradients(reference_loss(margin)), margin)
    yield Arm("3 bare products", three_products)
    yield Arm(FOUR, four_products, products=4)
    yield Arm(PLAIN_SGD, with_sgd(plain_loss), 1, start=with_sgd_state)
    yield Arm(f"{ONE_SHOT}, optax SGD", with_sgd(one_shot), margin, start=with_sgd_state)
    yield sgd_in_blocks
    if shape.classes > 2 * NEGATIVES:
        yield Arm(SAMPLED, sampled_sgd(shape, margin), start=lambda kernel: kernel)


def peers() -> Iterator[Arm]:
    """Arms of other libraries for JAX, where these are installed."""
    if find_spec("tokamax") is not None:
        yield Arm(TOKAMAX, gradients(tokamax_loss), 1)


def on_mesh(mesh: Any, classes: int) -> lsm.ClassParallel:
    """The classes over the axis "model", the rows over all devices, as a backbone leaves them."""
    return lsm.ClassParallel("model", ("data", "model"), mesh, classes)


def placed_on(mesh: Any, given: Problem, arm: Arm) -> Problem:
    """Abstract operands of an arm, with its first state, where `on_mesh` puts them."""
    rows, columns, whole = (
        NamedSharding(mesh, spec) for spec in (P(("data", "model")), P(None, "model"), P())
    )
    state = jax.eval_shape(arm.first_state, given.kernel)
    features, _, labels, weights, lam = given
    features, labels, weights = placed((features, labels, weights), rows)
    return Problem(features, placed(state, columns), labels, weights, placed(lam, whole))


# Steps.


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
    momentum = optax.sgd(RATE, momentum=MOMENTUM, accumulator_dtype=jnp.float32)
    return optax.chain(optax.add_decayed_weights(DECAY), momentum)


def with_sgd_state(kernel: jax.Array) -> Any:
    return jnp.copy(kernel), sgd().init(kernel)


def with_momentum(kernel: jax.Array) -> Any:
    return jnp.copy(kernel), jnp.zeros(kernel.shape, jnp.float32)


def sampled_sgd(shape: Shape, margin: int) -> Step:
    """Draws classes, takes their columns, changes them and puts them back; without momentum."""

    def step(features: Any, kernel: Any, labels: Any, weights: Any, lam: Any) -> Any:
        sample = lsm.sample_classes(jax.random.key(0), labels, shape.classes, NEGATIVES)

        def loss(features: Any, columns: Any) -> jax.Array:
            return lsm.lsoftmax_sampled_loss_sum(
                features, columns, sample, weights, margin=margin, lam=lam
            )

        columns = lsm.sampled.take_columns(kernel, sample)
        value, (dfeatures, dcolumns) = jax.value_and_grad(loss, (0, 1))(features, columns)
        changed = columns - jnp.asarray(RATE, columns.dtype) * dcolumns
        return value, dfeatures, lsm.sampled.put_columns(kernel, sample, changed)

    return step


def three_products(features: Any, kernel: Any, *_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The least that exact gradients can cost: the products alone."""
    z = features @ kernel
    return z[0, 0], z @ kernel.T, features.T @ z


def four_products(features: Any, kernel: Any, *_: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The products of a head that does not keep the logits: one more than `three_products`."""
    # The second product takes other rows: the compiler would merge two equal products.
    again = features[::-1]
    z = again @ kernel
    return jnp.max(features @ kernel), z @ kernel.T, again.T @ z


# Losses.


def cross_entropy(logits: jax.Array, given: Problem) -> jax.Array:
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, given.labels)
    return jnp.sum(given.weights * losses)


def plain_loss(given: Problem) -> jax.Array:
    return cross_entropy(given.features @ given.kernel, given)


def tokamax_loss(given: Problem) -> jax.Array:
    import tokamax  # type: ignore[import-not-found]  # not installed with this project

    loss: jax.Array = tokamax.linear_softmax_cross_entropy_loss(
        given.features, given.labels, given.kernel, reduction="mean"
    )
    return loss


def logits_loss(margin: int) -> Loss:
    def loss(given: Problem) -> jax.Array:
        logits = lsm.lsoftmax_logits(*given[:3], margin=margin, lam=given.lam)
        return cross_entropy(logits, given)

    return loss


def reference_loss(margin: int) -> Loss:
    """The paper's page, in float32."""

    def loss(given: Problem) -> jax.Array:
        features, kernel = (array.astype(jnp.float32) for array in given[:2])
        losses = lsm.reference.loss(features, kernel, given.labels, margin, given.lam)
        return jnp.sum(given.weights * losses)

    return loss


def head_loss(shape: Shape, margin: int) -> Loss:
    """README's line: the Flax head with the default rule for λ."""

    def create() -> LSoftmaxDense:
        return LSoftmaxDense(shape.dim, shape.classes, margin=margin, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(create))

    def loss(given: Problem) -> jax.Array:
        head = nnx.merge(graphdef, jax.tree.map(lambda _: given.kernel, state))
        return head.loss(given.features, given.labels).mean()

    return loss


# The exact loss, which every arm is compared with.


def exact_loss(given: Problem, margin: Margin, paced: bool = False) -> float:
    """The papers' formulas in NumPy and float64, a few rows at a time.

    Args:
      paced: with λ of `self_paced()`, not of the problem.
    """
    features, kernel = (np.asarray(a.astype(jnp.float32), np.float64) for a in given[:2])
    labels = np.asarray(given.labels)
    if isinstance(margin, (ArcFace, CosFace, SphereFace, NormFace)):
        kernel /= np.linalg.norm(kernel, axis=0)
        if margin.scale is not None:
            features *= margin.scale / np.linalg.norm(features, axis=1, keepdims=True)
    lengths, losses = np.linalg.norm(kernel, axis=0), []
    for start in range(0, len(labels), 64):
        rows, y = features[start : start + 64], labels[start : start + 64]
        z, here = rows @ kernel, (np.arange(len(y)), y)
        length, plain = np.linalg.norm(rows, axis=1) * lengths[y], z[here]
        large = length * changed_cosine(np.clip(plain / length, -1, 1), margin)
        z[here] = -np.inf
        share = 1 / (1 + (0 if margin in FAMILY.values() else float(given.lam)))
        if paced:
            # Where the margin changes nothing, the share does not matter.
            lead, lost = plain - z.max(axis=1), np.maximum(plain - large, 1e-30)
            share = 0.9 * 0.8 * np.clip(lead / lost, 0, 0.4)
        target = plain + share * (large - plain)
        z[here] = target
        losses.append(np.logaddexp.reduce(z, axis=1) - target)
    return float(np.concatenate(losses) @ np.asarray(given.weights, np.float64))


def changed_cosine(cosine: NDArray[Any], margin: Margin) -> NDArray[Any]:
    """The value that a margin puts in place of the target's cosine."""
    theta = np.arccos(cosine)
    match margin:
        case ArcFace():
            return np.asarray(np.cos(theta + margin.margin))
        case CosFace():
            return cosine - margin.margin
        case NormFace():
            return cosine
    m = margin.margin if isinstance(margin, SphereFace) else margin
    assert isinstance(m, int)
    k = np.clip(np.floor(m * theta / np.pi), 0, m - 1)
    return np.asarray((-1.0) ** k * np.cos(m * theta) - 2 * k)
