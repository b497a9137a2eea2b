"""Wrong calls of the library: each ends in one error that names the argument."""

import dataclasses
import inspect
import re
import types
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.sharding import AbstractMesh

import lsoftmax_jax as lsm
from lsoftmax_jax import devices, interop, margins, sampled, training
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.nnx import LSoftmaxDense

B, D, C = 4, 3, 5
NAN = float("nan")
F = np.ones((B, D), np.float32)
K = np.ones((D, C), np.float32)
L = np.zeros(B, np.int32)


class NoScale:
    """A margin without the attributes `scale` and `unit_columns`."""

    def value_and_slope(self, cosine):
        return cosine, jnp.ones_like(cosine)


@dataclasses.dataclass(frozen=True)
class Own(NoScale):
    """A user's margin that returns something wrong."""

    wrong: Callable
    scale: float | None = None
    unit_columns: bool = False

    def value_and_slope(self, cosine):
        return self.wrong(cosine)


MESH = jax.make_mesh((1,), ("model",), devices=jax.devices()[:1])
LAYOUT = lsm.ClassParallel("model", mesh=MESH)
GOOD = {"features": F, "kernel": K, "labels": L, "margin": 4, "lam": 1.0}
SCHEDULE = lsm.margin_schedule(10)


def paced(step):
    return SCHEDULE(step)


def sampled_loss(features, kernel, labels, **keywords):
    sample = lsm.sample_classes(jax.random.key(0), L, C, 2)
    columns = sampled.take_columns(jnp.asarray(K), sample)
    return lsm.lsoftmax_sampled_loss(
        features, columns if kernel is K else kernel, sample, **keywords
    )


def nnx_head(features, kernel, labels, margin, lam, **keywords):
    head = LSoftmaxDense(D, C, margin=margin, rngs=nnx.Rngs(0))
    return head.loss(features, labels, lam, **keywords)


def linen_head(features, kernel, labels, margin, lam, **keywords):
    head = LinenHead(C, margin=margin)
    variables = head.init(jax.random.key(0), F)
    return head.apply(variables, features, labels, lam, method="loss", **keywords)


ZEROS = jnp.zeros_like(jnp.asarray(K))
LOSSES = {
    "logits": lsm.lsoftmax_logits,
    "loss": lsm.lsoftmax_loss,
    "statistics": lsm.lsoftmax_loss_and_statistics,
    "sum": lsm.lsoftmax_loss_sum,
    "sharded": partial(lsm.lsoftmax_loss, layout=LAYOUT),
    "sharded sum": partial(lsm.lsoftmax_loss_sum, layout=LAYOUT),
    "sgd": partial(lsm.lsoftmax_sgd, momentum=ZEROS, learning_rate=0.1),
    "sharded sgd": partial(lsm.lsoftmax_sgd, momentum=ZEROS, learning_rate=0.1, layout=LAYOUT),
    "sampled": sampled_loss,
    "nnx": nnx_head,
    "linen": linen_head,
}

# (argument, value, message): arguments of every loss, with values that every loss must refuse.
SHARED = [
    ("features", None, "features must be a floating-point array"),
    ("features", "x", "features must be a floating-point array"),
    ("features", paced, "features must be a floating-point array"),
    ("features", [[1.0], [1.0, 2.0]], "features must be a floating-point array"),
    ("features", {"x": F}, "features must be a floating-point array"),
    ("features", F.astype(np.int32), "features must be floating point"),
    ("features", F.astype(np.complex64), "features must be floating point"),
    ("features", np.ones((B, D + 1), np.float32), "features .* agree in D"),
    ("labels", None, "labels must be"),
    ("labels", "ab", "labels must be"),
    ("labels", paced, "labels must be"),
    ("labels", [[0], [1, 2]], "labels must be"),
    ("labels", np.zeros(B, np.float32), "labels must be"),
    ("labels", np.zeros(B, bool), "labels must be"),
    ("labels", np.zeros(B + 1, np.int32), "labels must"),
    ("labels", np.eye(B, C, dtype=np.float32), "margin belongs to one class"),
    ("margin", 0, "margin must be"),
    ("margin", 2.0, "margin must be"),
    ("margin", True, "margin must be"),
    ("margin", None, "margin must be"),
    ("margin", margins.ArcFace, "margin must be"),
    ("lam", -1.0, "lam must be >= 0"),
    ("lam", np.array(-1.0), "lam must be >= 0"),
    ("lam", np.float32("nan"), "lam must be >= 0"),
    ("lam", jnp.ones(2), "lam must be a scalar"),
    ("lam", "5", "lam must be a real scalar"),
    ("lam", True, "lam must be a real scalar"),
    ("lam", paced, re.escape("pass schedule(step), not the schedule")),
    ("where", np.ones(B, np.int32), "where must be"),
    ("where", np.ones(B + 1, bool), "where must have the batch shape"),
    ("where", np.ones(B - 1, bool), "where must have the batch shape"),
    ("where", "all", "where must be"),
    ("label_smoothing", 1.5, "label_smoothing must be"),
    ("label_smoothing", "0.1", "label_smoothing must be"),
    ("features", np.ma.masked_array(F, F > 0), "features .*masked array"),
    ("features", F.astype("float8_e4m3fn"), "features .*16 bits"),
    ("labels", np.ma.masked_array(L, L == 0), "labels .*masked array"),
    ("labels", L.astype("m8[s]"), "labels must be integers, got dtype timedelta"),
    ("margin", NoScale(), "margin must have the attribute scale"),
    ("margin", Own(wrong=lambda c: (c[..., None], c)), "margin must give a value of shape"),
    ("margin", Own(wrong=lambda c: (c, jnp.ones(1))), "margin must give a slope of shape"),
    ("margin", Own(wrong=lambda c: (c, 1.0)), "margin must give a slope"),
    ("margin", Own(wrong=lambda c: (c.astype("bfloat16"), c)), "margin must give a value .*dtype"),
    ("margin", Own(wrong=lambda c: None), r"margin must give \(value, slope\)"),
    ("margin", Own(wrong=lambda c: {"value": c}), r"margin must give \(value, slope\)"),
    ("margin", Own(wrong=lambda c: (-c, -jnp.ones_like(c))), "not fall in the cosine"),
    ("margin", Own(wrong=lambda c: "ab"), r"margin must give \(value, slope\)"),
    ("margin", Own(wrong=lambda c: ("a", "b")), "margin must give a value .*got str"),
    ("margin", Own(wrong=lambda c: (jnp.log(c), jnp.ones_like(c))), "margin must be finite"),
    ("margin", types.SimpleNamespace(value_and_slope=3), "margin must be a Python int"),
    ("plan", {"row_block": 4}, "plan must be"),
    ("kernel", None, "kernel must be"),
    ("kernel", np.ones((D, 0), np.float32), "kernel must have shape"),
    ("kernel", np.ones(D, np.float32), "kernel must have shape"),
]
# Arguments that a function does not take, or takes in another place.
ELSEWHERE = {
    "logits": {"where", "label_smoothing", "plan", "labels"},
    "sampled": {"labels"},
    "nnx": {"kernel"},
    "linen": {"kernel"},
}


def model_without_head():
    return nnx.Linear(D, C, rngs=nnx.Rngs(0))


def model():
    model = nnx.Sequential(nnx.relu)
    model.head = LSoftmaxDense(D, C, margin=2, rngs=nnx.Rngs(0))
    return model


def step(lam=None, made=model, features=F, labels=L, where=None, **keywords):
    graphdef, state = training.create(made(), optax.sgd(0.1))
    lam = lsm.self_paced() if lam is None else lam
    update = training.train_step(graphdef, optax.sgd(0.1), lam, **keywords)
    return update(state, features, labels, where)


def compiled(mesh, batch=B):
    graphdef, state = training.create(model(), optax.sgd(0.1))
    update = devices.compile_step(
        training.train_step(graphdef, optax.sgd(0.1), lsm.self_paced()), mesh
    )
    return update(state, jnp.ones((batch, D)), jnp.zeros(batch, jnp.int32))


def repeated(made):
    """One update on what a function of the step makes."""
    graphdef, state = training.create(model(), optax.sgd(0.1))
    step = training.train_step(graphdef, optax.sgd(0.1), lsm.self_paced())
    return devices.repeat(step, lambda step, data: data, devices.data_mesh(1))(state, made, 1)


def put(columns):
    sample = lsm.sample_classes(jax.random.key(0), L, C, 2)
    return sampled.put_columns(jnp.asarray(K), sample, columns)


def sgd(**keywords):
    return lsm.lsoftmax_sgd(**{**GOOD, "momentum": ZEROS, "learning_rate": 0.1, **keywords})


def sample(key=None, labels=L, classes=C, negatives=2, **keywords):
    key = jax.random.key(0) if key is None else key
    return lsm.sample_classes(key, labels, classes, negatives, **keywords)


def sharded(**keywords):
    return lsm.lsoftmax_loss(**{**GOOD, "layout": LAYOUT, **keywords})


def seven_columns_in_a_head_of_five():
    head = LSoftmaxDense(D, C, rngs=nnx.Rngs(0))
    head.kernel = nnx.Param(jnp.ones((D, 7)))
    head.loss(F, L)


def eight_columns_on_a_mesh_of_one():
    head = LSoftmaxDense(D, C, layout=lsm.ClassParallel("model", mesh=MESH), rngs=nnx.Rngs(0))
    head.kernel = nnx.Param(jnp.ones((D, 8)))
    head.loss(F, L)


def stacked_heads():
    keys = jax.random.split(jax.random.key(0), 2)
    return nnx.vmap(lambda key: LSoftmaxDense(D, C, rngs=nnx.Rngs(key)))(keys)


def gone(array=F):
    array = jnp.array(array)
    array.delete()
    return array


class Dial(NoScale):
    """A user's margin with a changing field, compared by identity."""

    scale, unit_columns = None, False

    def __init__(self, moved, scale=None):
        self.moved, self.scale = moved, scale

    def value_and_slope(self, cosine):
        return cosine - self.moved, jnp.ones_like(cosine)


@dataclasses.dataclass(frozen=True)
class FrozenDial(Dial):
    """The same margin compared by value, which a traced number does not allow."""

    moved: jax.Array


def turned(dial, transform=jax.jit):
    return transform(lambda m: lsm.lsoftmax_loss_sum(F, K, L, margin=dial(m), lam=1.0))(0.5)


def huge(function):
    """Calls function with the shape of a huge kernel, without its memory."""
    kernel = jax.ShapeDtypeStruct((D, 2**31), jnp.bfloat16)
    return lambda: jax.eval_shape(lambda kernel: function(kernel=kernel), kernel)


FOUR = AbstractMesh((4,), ("model",))

OTHERS = [
    # one function each
    ("cos_theta must be", lambda: lsm.psi(None, 2)),
    ("cos_theta must be", lambda: lsm.psi("x", 2)),
    ("cos_theta must be floating point", lambda: lsm.psi(np.ones(2, np.int32), 2)),
    ("margin must be", lambda: lsm.psi(np.float32(0.5), 2.5)),
    ("margin must be", lambda: lsm.psi(np.float32(0.5), margins.ArcFace(0.5, scale=8.0))),
    ("learning_rate must be", lambda: sgd(learning_rate=True)),
    ("learning_rate must be", lambda: sgd(learning_rate=NAN)),
    ("learning_rate must be", lambda: sgd(learning_rate=-1)),
    ("learning_rate must be", lambda: sgd(learning_rate=np.array(-1.0))),
    ("learning_rate must be", lambda: sgd(learning_rate=None)),
    (
        re.escape("learning_rate must be a real scalar: pass schedule(step)"),
        lambda: sgd(learning_rate=optax.constant_schedule(0.1)),
    ),
    ("learning_rate must be a scalar", lambda: sgd(learning_rate=np.ones(2, np.float32))),
    (r"decay must be in \[0, 1\]", lambda: sgd(decay=2)),
    (r"decay must be in \[0, 1\]", lambda: sgd(decay=np.float32(1.5))),
    ("decay must be", lambda: sgd(decay=-0.1)),
    ("decay must be", lambda: sgd(decay="0.9")),
    ("weight_decay must be", lambda: sgd(weight_decay=-1e-4)),
    ("weight_decay must be", lambda: sgd(weight_decay=NAN)),
    ("momentum must be", lambda: sgd(momentum=None)),
    ("momentum must have the kernel's shape", lambda: sgd(momentum=0.9)),
    ("momentum must have the kernel's shape", lambda: sgd(momentum=ZEROS[:, :1])),
    ("momentum must be floating point", lambda: sgd(momentum=ZEROS.astype(int))),
    ("class_block must be", lambda: sgd(plan=lsm.Plan(class_block=0))),
    ("plan must be one of class blocks", lambda: sgd(plan=lsm.Plan(row_block=2))),
    ("layout must be", lambda: sgd(layout="model")),
    ("weights must", lambda: sgd(weights=np.ones(B, np.int32))),
    ("weights must", lambda: lsm.lsoftmax_loss_sum(**GOOD, weights="mean")),
    ("weights must", lambda: lsm.lsoftmax_loss_sum(**GOOD, weights=np.float32(1))),
    ("weights must", lambda: lsm.lsoftmax_loss_sum(**GOOD, weights=np.ones((B, 1), np.float32))),
    # plans
    ("row_block must be", lambda: lsm.Plan(row_block=0)),
    ("row_block must be", lambda: lsm.Plan(row_block="4")),
    ("class_block must be", lambda: lsm.Plan(class_block=True)),
    ("class_block must be", lambda: lsm.Plan(class_block=2.5)),
    ("memory_budget must be", lambda: lsm.Plan(memory_budget=0)),
    ("memory_budget must be", lambda: lsm.Plan(memory_budget="1GB")),
    ("memory_budget must be", lambda: lsm.Plan(memory_budget=1e9)),
    ("keep_exponentials must be", lambda: lsm.Plan(keep_exponentials="no")),
    ("row_block and class_block", lambda: lsm.Plan(row_block=2, class_block=2)),
    ("row_block keeps no exponentials", lambda: lsm.Plan(row_block=2, keep_exponentials=True)),
    # schedules
    ("base must be", lambda: lsm.annealed_lambda(-1, 0.1, 1)),
    ("base must be", lambda: lsm.annealed_lambda("1000", 0.1, 1)),
    ("gamma must be", lambda: lsm.annealed_lambda(1000, NAN, 1)),
    ("power must be", lambda: lsm.annealed_lambda(1000, 0.1, float("inf"))),
    ("minimum must be", lambda: lsm.annealed_lambda(1000, 0.1, 1, True)),
    ("steps must be", lambda: lsm.margin_schedule(0)),
    ("steps must be", lambda: lsm.margin_schedule(1e3)),
    ("steps must be", lambda: lsm.margin_schedule(None)),
    ("margin must be", lambda: lsm.margin_schedule(10, margin=0)),
    ("share must be", lambda: lsm.margin_schedule(10, share=1.5)),
    ("share must be", lambda: lsm.margin_schedule(10, share="half")),
    ("start must be", lambda: lsm.margin_schedule(10, start=-0.1)),
    ("start must be below end", lambda: lsm.margin_schedule(10, start=0.7, end=0.7)),
    ("end must be", lambda: lsm.margin_schedule(10, end=70)),
    ("strength must be", lambda: lsm.self_paced(2)),
    ("strength must be", lambda: lsm.self_paced(None)),
    ("strength must be", lambda: lsm.SelfPaced(7.0)),
    ("base must be", lambda: lsm.annealed_lambda(1e39, 0.1, 1)),
    ("step must be", lambda: lsm.margin_schedule(10)(NAN)),
    ("step must be", lambda: lsm.margin_schedule(10)(True)),
    ("step must be", lambda: lsm.margin_schedule(10)(1.5)),
    ("step must be", lambda: lsm.annealed_lambda(1000, 0.1, 1)(1j)),
    ("step must be", lambda: lsm.annealed_lambda(1000, 0.1, 1)(-1)),
    ("step must be", lambda: lsm.margin_schedule(10)(None)),
    ("step must be", lambda: lsm.annealed_lambda(1000, 0.1, 1)("3")),
    # margins
    ("margin must be", lambda: margins.ArcFace(-0.5, scale=8.0)),
    ("margin must be", lambda: margins.ArcFace(28.6, scale=8.0)),  # degrees
    ("margin must be", lambda: margins.ArcFace("0.5", scale=8.0)),
    ("margin must be", lambda: margins.ArcFace(NAN, scale=8.0)),
    ("margin must be", lambda: margins.CosFace(-0.35, scale=8.0)),
    ("margin must be", lambda: margins.CosFace(None, scale=8.0)),
    ("margin must be", lambda: margins.SphereFace(0)),
    ("margin must be", lambda: margins.SphereFace(2.5)),
    ("m1 must be", lambda: margins.Combined(0.5, 0.0, 0.0, scale=8.0)),
    ("m2 must be", lambda: margins.Combined(1.0, -1.0, 0.0, scale=8.0)),
    ("m3 must be", lambda: margins.Combined(1.0, 0.0, True, scale=8.0)),
    ("scale", lambda: margins.ArcFace(0.5)),
    ("scale must be", lambda: margins.CosFace(0.35, scale=1e39)),
    ("scale must be", lambda: margins.NormFace(scale=0.0)),
    ("scale must be", lambda: margins.SphereFace(4, scale=NAN)),
    ("margin must be", lambda: margins.CosFace(1e39, scale=8.0)),
    ("margin must be at most 4096", lambda: margins.LSoftmax(10**9)),
    ("margin must be at most 4096", lambda: lsm.psi(np.float32(0.5), 10**9)),
    ("easy must be True or False", lambda: margins.ArcFace(scale=8.0, easy="no")),
    ("detach must be True or False", lambda: margins.ArcFace(scale=8.0, detach=1)),
    ("corrected must be True or False", lambda: sample(corrected=None)),
    # a sample of the classes
    ("key must be", lambda: sample(key=0)),
    ("key must be", lambda: sample(key="0")),
    ("key must be", lambda: sample(key=np.ones(2, np.float32))),
    ("key must be", lambda: sample(key=np.zeros(3, np.uint32))),
    ("key must be one key", lambda: sample(key=jax.random.split(jax.random.key(0), 3))),
    ("labels must be", lambda: sample(labels=None)),
    ("labels must be", lambda: sample(labels=np.ones(B, np.float32))),
    ("labels must be", lambda: sample(labels=[[0], [1, 2]])),
    ("classes must be", lambda: sample(classes=0)),
    ("classes must be", lambda: sample(classes=5.0)),
    ("negatives must be", lambda: sample(negatives=0)),
    ("negatives must be at most", lambda: sample(negatives=C + 1)),
    ("columns must have shape", lambda: put(jnp.ones((D, 1)))),
    ("columns must have shape", lambda: put(jnp.ones((1, B + 2)))),
    ("columns must have shape", lambda: put(jnp.float32(1))),
    ("columns must be", lambda: put(None)),
    ("columns must be", lambda: put("x")),
    ("sample must be", lambda: sampled.put_columns(jnp.asarray(K), L, jnp.ones((D, B)))),
    ("sample must be", lambda: sampled.take_columns(jnp.asarray(K), L)),
    ("kernel must be", lambda: sampled.take_columns(None, sample())),
    ("kernel must have shape", lambda: sampled.take_columns(jnp.ones(D), sample())),
    ("kernel must have shape", lambda: sampled.take_columns(jnp.ones((D, 2, 3)), sample())),
    ("sample must be", lambda: lsm.lsoftmax_sampled_loss(F, K, L, margin=2, lam=1.0)),
    (
        "columns must have shape .*, one for each id of the sample",
        lambda: lsm.lsoftmax_sampled_loss(F, K[:, :3], sample(), margin=2, lam=1.0),
    ),
    (
        "sample .* features",
        lambda: lsm.lsoftmax_sampled_loss(
            F[:2], np.ones((D, B + 2), np.float32), sample(), margin=2, lam=1.0
        ),
    ),
    # a mesh
    ("layout must be", lambda: sharded(layout="model")),
    ("mesh must be", lambda: sharded(layout=lsm.ClassParallel("model"))),
    ("mesh must be", lambda: sharded(layout=lsm.ClassParallel("model", mesh="here"))),
    ("class_axis must be", lambda: sharded(layout=lsm.ClassParallel("rows", mesh=MESH))),
    ("batch_axes must be", lambda: sharded(layout=lsm.ClassParallel("model", "data", mesh=MESH))),
    ("class_axis must name", lambda: lsm.ClassParallel(None)),
    ("class_axis must name", lambda: lsm.ClassParallel(0)),
    ("batch_axes must name", lambda: lsm.ClassParallel("model", (0,))),
    ("batch_axes must name", lambda: lsm.ClassParallel("model", None)),
    ("classes must be", lambda: lsm.ClassParallel("model", classes=0)),
    ("classes must be", lambda: lsm.ClassParallel("model", classes="5")),
    ("classes must be", lambda: sharded(layout=lsm.ClassParallel("model", mesh=MESH, classes=9))),
    ("kernel must have", lambda: sharded(layout=lsm.ClassParallel("model", mesh=FOUR))),
    ("classes must be", lambda: LAYOUT.columns(0)),
    ("batch_axes must name each axis once", lambda: lsm.ClassParallel("model", ("a", "a"))),
    # heads
    ("in_features must be", lambda: LSoftmaxDense(0, C, rngs=nnx.Rngs(0))),
    ("in_features must be", lambda: LSoftmaxDense(3.0, C, rngs=nnx.Rngs(0))),
    ("classes must be", lambda: LSoftmaxDense(D, -1, rngs=nnx.Rngs(0))),
    ("classes must be", lambda: LSoftmaxDense(D, None, rngs=nnx.Rngs(0))),
    ("margin must be", lambda: LSoftmaxDense(D, C, margin=0, rngs=nnx.Rngs(0))),
    ("lam must be", lambda: LSoftmaxDense(D, C, lam=-1.0, rngs=nnx.Rngs(0))),
    ("lam must be", lambda: LSoftmaxDense(D, C, lam=SCHEDULE, rngs=nnx.Rngs(0))),
    ("lam must be", lambda: LinenHead(C, lam="5").init(jax.random.key(0), F)),
    ("kernel of the head must have shape", seven_columns_in_a_head_of_five),
    ("variables must hold the parameter 'kernel'", lambda: LinenHead(C).apply({}, F)),
    (
        "kernel of the head must have shape",
        lambda: LinenHead(C).apply({"params": {"kernel": np.ones((D, 7), np.float32)}}, F),
    ),
    (
        "variables must hold the parameter 'kernel'",
        lambda: LinenHead(C).apply({"params": {"weight": K}}, F),
    ),
    (
        r"kernel of the head .* got \(2, \d, \d\): call heads that nnx.vmap made in nnx.vmap too",
        lambda: stacked_heads()(F),
    ),
    ("cut the kernel of another mesh to the classes", eight_columns_on_a_mesh_of_one),
    # classes that int32 cannot count
    ("classes must be at most", lambda: LSoftmaxDense(D, 2**31, rngs=nnx.Rngs(0))),
    ("classes must be at most", lambda: LinenHead(2**31).init(jax.random.key(0), F)),
    ("classes must be at most", lambda: sample(classes=2**31)),
    ("classes must be at most", lambda: lsm.ClassParallel("model", classes=2**31)),
    ("columns must be at most", lambda: lsm.ClassParallel("model", mesh=FOUR).columns(2**31 - 1)),
    *(
        ("kernel must have fewer than 2", huge(partial(rule, **{**GOOD, "kernel": None})))
        for name, rule in LOSSES.items()
        if name not in ("sampled", "nnx", "linen")
    ),
    ("kernel must have fewer than 2", huge(lambda kernel: sampled.take_columns(kernel, sample()))),
    # traced values that must be static
    ("to change the margin in training, use lam", lambda: turned(Dial)),
    ("to change the margin in training, use lam", lambda: turned(Dial, jax.grad)),
    ("to change the margin in training, use lam", lambda: turned(FrozenDial)),
    ("margin must be .* got a traced float32", lambda: turned(lambda m: m)),
    (
        "to change the margin in training, use lam",
        lambda: turned(lambda m: Dial(0.1, m)),
    ),
    ("scale must be .* got a traced float32", lambda: turned(lambda m: margins.NormFace(scale=m))),
    (
        "corrected must be True or False, got a traced bool",
        lambda: jax.jit(lambda flag: sample(corrected=flag))(True),
    ),
    (
        "negatives must be a Python int .* got a traced int32",
        lambda: jax.jit(lambda count: sample(negatives=count))(2),
    ),
    # donated or deleted arrays
    ("features .* donated or deleted", lambda: lsm.lsoftmax_loss(gone(), K, L, margin=2, lam=1.0)),
    (
        "kernel .* donated or deleted",
        lambda: LinenHead(C).apply({"params": {"kernel": gone(K)}}, F),
    ),
    (
        "kernel .* donated or deleted",
        lambda: LinenHead(C, dtype="bfloat16").apply({"params": {"kernel": gone(K)}}, F),
    ),
    ("key .* donated or deleted", lambda: sample(key=gone(jax.random.PRNGKey(0)))),
    (
        "sample.ids .* donated or deleted",
        lambda: sampled.take_columns(jnp.asarray(K), sample()._replace(ids=gone(L))),
    ),
    ("kernel must be a matrix, got .*deleted", lambda: interop.kernel_to_rows(gone(K))),
    ("layout must be", lambda: LSoftmaxDense(D, C, layout="model", rngs=nnx.Rngs(0))),
    ("rngs must be", lambda: LSoftmaxDense(D, C, rngs=0)),
    ("dtype must be", lambda: LSoftmaxDense(D, C, dtype="floaty", rngs=nnx.Rngs(0))),
    ("dtype must be", lambda: LSoftmaxDense(D, C, dtype=int, rngs=nnx.Rngs(0))),
    ("param_dtype must be", lambda: LSoftmaxDense(D, C, param_dtype=int, rngs=nnx.Rngs(0))),
    (
        "param_dtype must be .* 16 bits or more, got 'float4_e2m1fn'",
        lambda: LSoftmaxDense(D, C, param_dtype="float4_e2m1fn", rngs=nnx.Rngs(0)),
    ),
    ("labels must be given with lam", lambda: LSoftmaxDense(D, C, rngs=nnx.Rngs(0))(F, lam=1.0)),
    ("features must", lambda: LSoftmaxDense(D, C, rngs=nnx.Rngs(0))(None)),
    (
        "features .* agree",
        lambda: LSoftmaxDense(D, C, rngs=nnx.Rngs(0))(np.ones((B, 7), np.float32)),
    ),
    ("classes must be", lambda: LinenHead(0).init(jax.random.key(0), F)),
    ("margin must be", lambda: LinenHead(C, margin=1.5).init(jax.random.key(0), F)),
    ("layout must be", lambda: LinenHead(C, layout=3).init(jax.random.key(0), F)),
    ("features must", lambda: LinenHead(C).init(jax.random.key(0), None)),
    # training
    ("lam must be a schedule", lambda: step(lam=5.0)),
    ("lam must be a schedule", lambda: step(lam="self-paced")),
    ("lam must be >= 0, got -1", lambda: step(lam=lambda step: -1.0)),
    ("lam must be >= 0, got nan", lambda: step(lam=lambda step: NAN)),
    ("lam must be a real scalar", lambda: step(lam=lambda step: None)),
    ("lam must be a scalar", lambda: step(lam=lambda step: jnp.ones(3))),
    ("head", lambda: step(made=model_without_head)),
    ("labels must", lambda: step(labels=np.zeros(B + 1, np.int32))),
    ("labels must", lambda: step(labels=None)),
    ("where must", lambda: step(where=np.ones(B, np.int32))),
    ("model must be", lambda: training.create(None, optax.sgd(0.1))),
    ("model must be", lambda: training.create(linen.Dense(3), optax.sgd(0.1))),
    ("optimizer must be", lambda: training.create(model(), None)),
    ("optimizer must be", lambda: training.create(model(), 0.1)),
    (
        "optimizer must be",
        lambda: training.train_step(
            training.create(model(), optax.sgd(1))[0], 0.1, lsm.self_paced()
        ),
    ),
    ("loss must be", lambda: step(loss="hinge")),
    ("graphdef must be", lambda: training.train_step(model(), optax.sgd(0.1), lsm.self_paced())),
    ("graphdef must be", lambda: training.eval_step(model())),
    # devices
    ("devices must be", lambda: devices.data_mesh(0)),
    ("devices must be", lambda: devices.data_mesh(10_000)),
    ("devices must be", lambda: devices.data_mesh("2")),
    ("devices must be", lambda: devices.data_mesh(True)),
    ("mesh must be", lambda: devices.repeat(None, None, None)),
    ("mesh must be", lambda: devices.compile_step(lambda: None, None)),
    ("labels", lambda: compiled(devices.data_mesh(), batch=jax.device_count() + 1)),
    (r"batch must return two parts, .*, got 3", lambda: repeated((F, L, L))),
    (r"batch must return two parts, .*, got 1", lambda: repeated(F)),
    # weights of other libraries
    (
        "loss must be",
        lambda: interop.from_metric_learning("ArcFace", np.ones((D, C)), margin=28.6, scale=64),
    ),
    ("weight must be", lambda: interop.kernel_from_rows(None)),
    ("weight must be", lambda: interop.kernel_from_rows("w")),
    ("weight must be floating point", lambda: interop.kernel_from_rows(np.ones((2, 2), np.int32))),
    ("weight must have shape", lambda: interop.kernel_from_rows(np.ones(3, np.float32))),
    ("weight must have shape", lambda: interop.kernel_from_rows(K, in_features=7)),
    ("weight must have shape", lambda: interop.kernel_from_columns(K, classes=7)),
    ("kernel must be", lambda: interop.kernel_to_rows(None)),
    (
        "weight must be",
        lambda: interop.from_metric_learning("CosFaceLoss", None, margin=0, scale=1),
    ),
    ("scale must be", lambda: interop.from_metric_learning("CosFaceLoss", K, margin=0, scale=0)),
    ("margin must be", lambda: interop.from_metric_learning("CosFaceLoss", K, margin="", scale=1)),
    ("m1 must be", lambda: interop.from_insightface(K, s=64, m1="1", m2=0.5, m3=0.0)),
    ("scale must be", lambda: interop.from_insightface(K, s="64", m1=1, m2=0.5, m3=0.0)),
    ("type must be", lambda: interop.from_caffe(type="QUINTUPLE")),
    ("type must be", lambda: interop.from_caffe(type=4)),
    ("iteration must be", lambda: interop.from_caffe(iteration=-1)),
    ("iteration must be", lambda: interop.from_caffe(iteration=10**400)),
    ("iteration must be", lambda: interop.from_caffe(iteration="0")),
    ("base must be", lambda: interop.from_caffe(base=-1.0)),
    ("gamma must be", lambda: interop.from_caffe(gamma="0.1")),
]


def assert_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        jax.block_until_ready(call())
    # The message must be short, and must not be one of Python's or JAX's internal errors.
    text = str(caught.value)
    assert len(text) < 600 and "Tracer" not in text and "has no attribute" not in text


@pytest.mark.parametrize(("argument", "value", "message"), SHARED)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_names_what_it_refuses(name, argument, value, message):
    if argument in ELSEWHERE.get(name, ()):
        pytest.skip(f"{name} takes no {argument}")
    if name == "sampled" and argument == "kernel":
        message = message.replace("kernel", "columns")
    assert_named(lambda: LOSSES[name](**{**GOOD, argument: value}), message)


@pytest.mark.parametrize(
    ("message", "call"), OTHERS, ids=[f"{i} {message}" for i, (message, _) in enumerate(OTHERS)]
)
def test_bad_call_is_named(message, call):
    assert_named(call, message)


MODULES = devices, interop, margins, sampled, training
# Operands, and the argument of a function that has only one.
BY_PLACE = {"weights", "minimum", "devices", "strength", "lam"}


def test_what_has_a_default_must_be_named():
    public = [*vars(lsm).values(), *(f for module in MODULES for f in vars(module).values())]
    home = [lsm.__name__, *(module.__name__ for module in MODULES)]
    named = 0
    for function in filter(inspect.isfunction, public):
        exported = getattr(lsm, function.__name__, None) is function
        if exported or (function.__module__ in home and function.__name__[0] != "_"):
            for parameter in inspect.signature(function).parameters.values():
                if parameter.default is not parameter.empty and parameter.name not in BY_PLACE:
                    assert parameter.kind is parameter.KEYWORD_ONLY, (function, parameter)
                    named += 1
    assert named > 40


def test_as_many_mistakes_are_listed_as_the_documentation_says():
    assert len(SHARED) > 50
    assert len(LOSSES) == 11
    assert len(OTHERS) > 200
