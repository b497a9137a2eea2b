"""Every loss in every surrounding gives the numbers of one device, or raises a clear error.

An entry is a weighted sum of losses, which does not depend on how the batch is split. A surrounding
calls an entry in its own way and returns (sum, gradient of features, gradient of the kernel). All
tests run with strict promotion of dtypes and ranks (conftest.py).
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax import export
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import linen, nnx
from lsoftmax_jax._core import spec
from lsoftmax_jax._core.mesh import varying_axes
from tests import oracle

BATCH, DIM, CLASSES, MARGIN, LAM = 8, 5, 8, 3, 0.5
STATIC = {"margin": MARGIN, "lam": LAM}
KEY = np.array([0, 7], np.uint32)
PACED = ("NNX head", "Linen head")  # at their default λ


# The entries.


def logits(features, kernel, labels, weights, layout):
    z = lsm.lsoftmax_logits(features, kernel, labels, **STATIC)
    target = jnp.sum(z * jax.nn.one_hot(labels, CLASSES, dtype=z.dtype), axis=-1)
    return jnp.sum(weights * (jax.nn.logsumexp(z, axis=-1) - target))


def loss(features, kernel, labels, weights, layout):
    losses = lsm.lsoftmax_loss(features, kernel, labels, layout=layout, **STATIC)
    return jnp.sum(weights * losses)


def statistics(features, kernel, labels, weights, layout):
    losses, seen = lsm.lsoftmax_loss_and_statistics(
        features, kernel, labels, layout=layout, **STATIC
    )
    # λ is a constant: no statistic has a gradient.
    return jnp.sum(weights * (losses + seen.lam - LAM))


def summed(features, kernel, labels, weights, layout):
    return lsm.lsoftmax_loss_sum(features, kernel, labels, weights, layout=layout, **STATIC)


def in_blocks_of_a_cpu(entry, features, kernel, labels, weights, layout):
    """As with very many classes; a block of 3 leaves a tail."""
    with mock.patch.multiple(spec, _MANY_CLASSES=1, _MANY_LOGITS=1, _CPU_BLOCK=3):
        assert spec.pieces_of(None, 1, 3, features.dtype, one_pass=True).cpu_block == 3
        return entry(features, kernel, labels, weights, layout)


def of_sample(rule, features, kernel, labels, layout, *weights):
    """All classes are drawn, so the sampled loss is the exact one."""
    sample = lsm.sample_classes(jnp.asarray(KEY), labels, CLASSES, CLASSES, layout=layout)
    columns = lsm.sampled.take_columns(kernel, sample, layout=layout)
    return rule(features, columns, sample, *weights, layout=layout, **STATIC)


def sampled(features, kernel, labels, weights, layout):
    losses = of_sample(lsm.lsoftmax_sampled_loss, features, kernel, labels, layout)
    return jnp.sum(weights * losses)


def sampled_statistics(features, kernel, labels, weights, layout):
    rule = lsm.lsoftmax_sampled_loss_and_statistics
    losses, seen = of_sample(rule, features, kernel, labels, layout)
    return jnp.sum(weights * (losses + seen.lam - LAM))


def sampled_sum(features, kernel, labels, weights, layout):
    rule = lsm.lsoftmax_sampled_loss_sum
    return of_sample(rule, features, kernel, labels, layout, weights)


def sgd(features, kernel, labels, weights, layout):
    zeros = jnp.zeros_like(kernel)
    keywords = {"learning_rate": 0.1, "layout": layout, **STATIC}
    return lsm.lsoftmax_sgd(features, kernel, zeros, labels, weights, **keywords)


def nnx_head(features, kernel, labels, weights, layout):
    head = nnx.LSoftmaxDense(
        DIM, CLASSES, margin=MARGIN, layout=layout,
        kernel_init=lambda *_: kernel[:, :CLASSES], rngs=flax_nnx.Rngs(0),
    )  # fmt: skip
    return jnp.sum(weights * head.loss(features, labels))


def linen_head(features, kernel, labels, weights, layout):
    head = linen.LSoftmaxDense(CLASSES, MARGIN, layout=layout)
    variables = {"params": {"kernel": kernel}}
    return head.apply(variables, features, labels, weights, method="loss_sum")


ENTRIES = {
    "logits": logits,
    "loss": loss,
    "statistics": statistics,
    "sum": summed,
    "loss, many classes": functools.partial(in_blocks_of_a_cpu, loss),
    "sum, many classes": functools.partial(in_blocks_of_a_cpu, summed),
    "sampled": sampled,
    "sampled statistics": sampled_statistics,
    "sampled sum": sampled_sum,
    "sgd": sgd,
    "NNX head": nnx_head,
    "Linen head": linen_head,
}
CLASS_PARALLEL = tuple(name for name in ENTRIES if name != "logits")


class Case(NamedTuple):
    """An entry on one device, or with its classes split."""

    entry: Callable[..., Any]
    split: bool

    def layout(self, mesh=None, axes="data"):
        mesh = make_mesh() if mesh is None else mesh
        return lsm.ClassParallel("model", axes, mesh) if self.split else None

    def answer(self, layout, around=lambda function: function):
        """arrays -> (sum, dfeatures, dkernel); `around` transforms what is differentiated."""
        total = functools.partial(self.entry, layout=layout)
        if self.entry is not sgd:
            return jax.value_and_grad(around(total), (0, 1))

        def of_step(*arrays):
            step = around(total)(*arrays)
            return step.loss, step.dfeatures, step.momentum  # the momentum is the gradient

        return of_step


# The surroundings.


def make_mesh(kinds=(AxisType.Auto, AxisType.Auto)):
    return jax.make_mesh((2, 2), ("data", "model"), kinds, devices=jax.devices()[:4])


def parts(array, count=2):
    return array.reshape(count, array.shape[0] // count, *array.shape[1:])


def eager(case, arrays):
    return case.answer(case.layout())(*arrays)


def jitted(case, arrays):
    return jax.jit(case.answer(case.layout()))(*arrays)


def vmapped(case, arrays):
    features, kernel, labels, weights = arrays
    mapped = jax.jit(jax.vmap(case.answer(case.layout()), (0, None, 0, 0)))
    total, (dfeatures, dkernel) = flat(
        mapped(parts(features), kernel, parts(labels), parts(weights))
    )
    return jnp.sum(total), (dfeatures.reshape(features.shape), jnp.sum(dkernel, axis=0))


def scanned(case, arrays):
    features, kernel, labels, weights = arrays
    answer = case.answer(case.layout())

    @jax.jit
    def run(features, kernel, labels, weights):
        def step(carry, rows):
            total, (dfeatures, dkernel) = flat(answer(rows[0], kernel, *rows[1:]))
            return (carry[0] + total, carry[1] + dkernel), dfeatures

        carry = jnp.zeros((), features.dtype), jnp.zeros_like(kernel)
        return jax.lax.scan(step, carry, (parts(features), parts(labels), parts(weights)))

    (total, dkernel), dfeatures = run(features, kernel, labels, weights)
    return total, (dfeatures.reshape(features.shape), dkernel)


def rematerialised(case, arrays):
    return jax.jit(case.answer(case.layout(), jax.checkpoint))(*arrays)


def leading_shape(case, arrays):
    return of_sequences(jax.jit(case.answer(case.layout())), arrays)


def of_sequences(answer, arrays, place=lambda arrays: arrays):
    """Calls answer with features (B, T, D)."""
    features, kernel, labels, weights = arrays
    sequences = place((parts(features, 4), kernel, parts(labels, 4), parts(weights, 4)))
    total, (dfeatures, dkernel) = flat(answer(*sequences))
    assert dfeatures.shape == (4, 2, DIM)
    return total, (np.asarray(dfeatures).reshape(features.shape), dkernel)


def pmapped(case, arrays):
    features, kernel, labels, weights = arrays
    answer = case.answer(case.layout())

    def local(*arrays):
        total, (dfeatures, dkernel) = flat(answer(*arrays))
        return jax.lax.psum((total, dkernel), "devices"), dfeatures

    mapped = jax.pmap(local, "devices", in_axes=(0, None, 0, 0), devices=jax.devices()[:2])
    (total, dkernel), dfeatures = mapped(parts(features), kernel, parts(labels), parts(weights))
    return total[0], (dfeatures.reshape(features.shape), dkernel[0])


def put(arrays, mesh, rows, columns):
    places = NamedSharding(mesh, rows), NamedSharding(mesh, columns)
    return jax.device_put(arrays, (places[0], places[1], places[0], places[0]))


def on_mesh(*kinds, axes=("data",)):
    def surrounding(case, arrays):
        mesh = make_mesh(kinds)
        columns = P(None, "model") if case.split else P()
        with jax.set_mesh(mesh):
            answer = jax.jit(case.answer(case.layout(mesh, axes)))
            return answer(*put(arrays, mesh, P(axes), columns))

    return surrounding


def split_sequences(*kinds):
    """Features (B, T, D) with T split over the axis "model"; the classes are not split."""

    def surrounding(case, arrays):
        mesh = make_mesh(kinds)
        with jax.set_mesh(mesh):
            answer = jax.jit(case.answer(case.layout(mesh)))
            rows = P("data", "model")
            return of_sequences(answer, arrays, lambda arrays: put(arrays, mesh, rows, P()))

    return surrounding


def shard_mapped(*manual, kind=AxisType.Auto):
    """Splits the rows over the manual axes; each device has the whole kernel."""

    def surrounding(case, arrays):
        mesh = make_mesh((kind, kind))
        layout = lsm.ClassParallel("model", (), mesh) if case.split else None
        answer = case.answer(layout)

        def local(*arrays):
            total, (dfeatures, dkernel) = flat(answer(*arrays))
            # JAX sums the gradient of a replicated kernel over devices; the fused step does not.
            left = tuple(varying_axes(dkernel))
            dkernel = jax.lax.psum(dkernel, left) if left else dkernel
            return jax.lax.psum(total, manual), dfeatures, dkernel

        rows, axes = P(manual), set(manual)
        specs = {"in_specs": (rows, P(), rows, rows), "out_specs": (P(), rows, P())}
        run = jax.jit(jax.shard_map(local, mesh=mesh, axis_names=axes, **specs))
        return run(*put(arrays, mesh, rows, P()))

    return surrounding


def nans_debugged(case, arrays):
    with jax.debug_nans(True):
        return jax.jit(case.answer(case.layout()))(*arrays)


def nans_debugged_op_by_op(case, arrays):
    """JAX calls a function this way after a NaN, to find the operation."""
    with jax.debug_nans(True), jax.disable_jit():
        return case.answer(case.layout())(*arrays)


def checkified(case, arrays):
    answer = checkify.checkify(case.answer(case.layout()), errors=checkify.float_checks)
    error, found = jax.jit(answer)(*arrays)
    error.throw()
    return found


def exported(case, arrays):
    """Exports with a symbolic batch, for a CPU and a TPU."""
    (batch,) = export.symbolic_shape("batch")
    shapes = [
        jax.ShapeDtypeStruct((batch if len(a) == BATCH else len(a), *a.shape[1:]), a.dtype)
        for a in arrays
    ]
    answer = jax.jit(case.answer(case.layout()))
    program = export.export(answer, platforms=("cpu", "tpu"))(*shapes)
    return export.deserialize(program.serialize()).call(*arrays)


SURROUNDINGS = {
    "eager": eager,
    "jit": jitted,
    "vmap": vmapped,
    "scan": scanned,
    "remat": rematerialised,
    "pmap": pmapped,
    "leading shape": leading_shape,
    "debug nans": nans_debugged,
    "debug nans, op by op": nans_debugged_op_by_op,
    "checkify": checkified,
    "Auto mesh": on_mesh(AxisType.Auto, AxisType.Auto),
    "Explicit mesh": on_mesh(AxisType.Explicit, AxisType.Explicit),
    "Explicit and Auto": on_mesh(AxisType.Explicit, AxisType.Auto),
    "Auto and Explicit": on_mesh(AxisType.Auto, AxisType.Explicit),
    "batch over two axes": on_mesh(AxisType.Explicit, AxisType.Explicit, axes=("data", "model")),
    "T split": split_sequences(AxisType.Auto, AxisType.Auto),
    "T split, Explicit": split_sequences(AxisType.Explicit, AxisType.Explicit),
    "shard_map": shard_mapped("data", "model"),
    "shard_map, one axis": shard_mapped("data"),
    "shard_map, Explicit": shard_mapped("data", "model", kind=AxisType.Explicit),
    "shard_map, one axis, Explicit": shard_mapped("data", kind=AxisType.Explicit),
    "export": exported,
}
MAPPED = {name for name in SURROUNDINGS if name == "pmap" or name.startswith("shard_map")}


def refusal(surrounding, name):
    """The error of an entry that cannot run in a surrounding; None if it can."""
    if name.endswith(", split") and surrounding in MAPPED:
        return "layout: .* already mapped"
    if name.endswith(", split") and surrounding == "export":
        return "(features|labels) must have a known (shape|size)"
    if name.startswith("sampled") and surrounding == "export":
        return "labels must have a known size"
    if name == "NNX head, split" and surrounding in ("Explicit and Auto", "Auto and Explicit"):
        return "Mesh must have all axes as Explicit or all axes as Auto"  # Flax's own
    return None


CASES = {name: Case(entry, False) for name, entry in ENTRIES.items()}
CASES |= {f"{name}, split": Case(ENTRIES[name], True) for name in CLASS_PARALLEL}
# Op by op, each operation on the devices is a program of its own.
LONG = [("debug nans, op by op", name) for name in ("sum, split", "logits")]
# By default one entry of each kind runs in every surrounding, and every entry runs under jit.
OFTEN = ("logits", "loss", "sum, split", "sampled sum", "sgd")


def each(names, surrounding=None):
    """Parameters of a test; those that do not run by default are marked as slow."""
    often = CASES if surrounding == "jit" else OFTEN

    def marks(name):
        if (surrounding, name) in LONG:
            return pytest.mark.slow, pytest.mark.ci
        return () if name in often else pytest.mark.slow

    return [
        pytest.param(*given, marks=marks(given[-1]))
        for name in names
        for given in [(name,) if surrounding is None else (surrounding, name)]
    ]


# The numbers.


def flat(answer):
    """Turns (total, dfeatures, dkernel) into (total, (dfeatures, dkernel))."""
    total, *gradients = answer
    return total, gradients if len(gradients) == 2 else gradients[0]


@functools.cache
def problem():
    """Features near their columns, so that most have a lead for `self_paced`."""
    rng = np.random.default_rng(3)
    kernel = rng.standard_normal((DIM, CLASSES))
    labels = np.array([0, 5, 2, 7, 1, 2, 6, 4])
    features = kernel[:, labels].T + 0.3 * rng.standard_normal((BATCH, DIM))
    features[1] *= -1
    return oracle.Problem(features, kernel, labels), rng.uniform(0.5, 1.5, BATCH)


def arrays_of(dtype):
    given, weights = problem()
    return *oracle.as_arrays(given, dtype), jnp.asarray(weights, dtype)


@functools.cache
def lambdas(paced):
    """λ of each row: LAM, or λ by the heads' default rule, which test_self_paced.py tests."""
    (features, kernel, labels), _ = problem()
    if not paced:
        return np.full(BATCH, LAM)
    here = np.arange(BATCH), labels
    logits, margin = features @ kernel, oracle.logits(features, kernel, labels, MARGIN)[here]
    plain = logits[here]
    logits[here] = -np.inf
    with jax.enable_x64(True):
        share = np.asarray(lsm.self_paced().share(plain, margin, logits.max(axis=1)))
    assert np.any(share > 0) and np.any(share == 0)
    with np.errstate(divide="ignore"):
        return 1 / share - 1


def numbers(given, paced):
    """(sum, dfeatures, dkernel) in float64, row by row."""
    weights, total, dfeatures = problem()[1], 0.0, np.zeros_like(given.features)
    dkernel = np.zeros_like(given.kernel)
    for row, lam in enumerate(lambdas(paced)):
        alone = given.features[[row]], given.kernel, given.labels[[row]]
        total += weights[row] * oracle.loss(*alone, MARGIN, lam)[0]
        pulled = oracle.loss_pullback(*alone, weights[[row]], MARGIN, lam)
        dfeatures[row] = pulled.features[0]
        dkernel += pulled.kernel
    return total, (dfeatures, dkernel)


def assert_numbers(answer, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(flat(answer)), jax.tree.leaves(wanted), strict=True):
        oracle.assert_close(one, other, tolerance)


# A bug of JAX 0.10: checkify allows no branch by platform inside a second jax.shard_map.
WITHOUT_SPLIT = {name: case for name, case in CASES.items() if not case.split}


@pytest.mark.parametrize(
    ("surrounding", "name"),
    [
        case
        for where in SURROUNDINGS
        for case in each(WITHOUT_SPLIT if where == "checkify" else CASES, where)
    ],
)
def test_every_loss_in_every_surrounding(surrounding, name):
    case = CASES[name]
    paced = name.removesuffix(", split") in PACED
    said = refusal(surrounding, name)
    if surrounding == "pmap" and case.split and not hasattr(jax.lax, "pcast"):
        pytest.skip(f"JAX {jax.__version__} does not show that jax.pmap maps; XLA refuses")
    with contextlib.nullcontext() if said is None else pytest.raises(ValueError, match=said):
        answer = SURROUNDINGS[surrounding](case, arrays_of(jnp.float32))
        assert_numbers(answer, numbers(problem()[0], paced), 1e-5)


@pytest.mark.parametrize("name", each(CASES))
def test_every_loss_in_float64(x64, name):
    paced = name.removesuffix(", split") in PACED
    answer = jitted(CASES[name], arrays_of(jnp.float64))
    assert_numbers(answer, numbers(problem()[0], paced), 1e-12)


@pytest.mark.parametrize("mode", ["reverse over reverse", "jax.hessian"])
@pytest.mark.parametrize("name", each(CASES))
def test_every_loss_twice_differentiated(x64, name, mode):
    case = CASES[name]
    given, _ = problem()
    direction = np.random.default_rng(5).standard_normal(given.kernel.shape)
    features, kernel, labels, weights = arrays_of(jnp.float64)

    def total(kernel):
        return case.entry(features, kernel, labels, weights, case.layout())

    if case.entry is sgd:
        with pytest.raises(TypeError, match="lsoftmax_sgd"):
            jax.grad(lambda kernel: total(kernel).loss)(kernel)
        return
    if mode == "jax.hessian":
        got = jnp.tensordot(jax.jit(jax.hessian(total))(kernel), direction, 2)
    else:
        along = jax.grad(lambda kernel: jnp.vdot(jax.grad(total)(kernel), direction))
        got = jax.jit(along)(kernel)
    paced = name.removesuffix(", split") in PACED
    up, down = (
        numbers(given._replace(kernel=given.kernel + step * direction), paced)[1][1]
        for step in (1e-6, -1e-6)
    )
    oracle.assert_close(got, (up - down) / 2e-6, 1e-7)
