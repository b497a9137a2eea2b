"""The heads do what users of `nnx.Linear` and `nn.Dense` expect of a layer."""

import copy
import inspect
import pickle  # noqa: TID251  (only what this file has pickled itself)
import pydoc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from flax.errors import NameInUseError

import lsoftmax_jax as lsm
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.nnx import LSoftmaxDense as NnxHead
from tests.answers import B, C, D

FEATURES, LABELS = jnp.ones((B, D)), jnp.arange(B) % C


class Network(linen.Module):
    """A network with a head that has its own name."""

    @linen.compact
    def __call__(self, features, labels=None):
        head = LinenHead(C, name="head")
        return head(features) if labels is None else head.loss(features, labels)


NETWORK = Network()
VARIABLES = {"params": {"head": {"kernel": jnp.ones((D, C))}}}


def test_linen_captures_what_the_head_gives():
    logits, state = NETWORK.apply(VARIABLES, FEATURES, capture_intermediates=True)
    (captured,) = state["intermediates"]["head"]["__call__"]
    np.testing.assert_array_equal(captured, logits)

    def is_loss(module, name):
        return name == "loss"

    loss, state = NETWORK.apply(VARIABLES, FEATURES, LABELS, capture_intermediates=is_loss)
    np.testing.assert_array_equal(state["intermediates"]["head"]["loss"][0], loss)


def test_linen_interceptors_see_the_heads_methods():
    seen = []

    def intercept(call, args, kwargs, context):
        seen.append((type(context.module).__name__, context.method_name))
        return call(*args, **kwargs)

    with linen.intercept_methods(intercept):
        NETWORK.apply(VARIABLES, FEATURES, LABELS)
    assert ("LSoftmaxDense", "loss") in seen


@pytest.mark.lax
def test_linen_tabulates_the_head_under_its_own_name():
    table = NETWORK.tabulate(jax.random.key(0), FEATURES, console_kwargs={"width": 200})
    table = re.sub(r"\x1b\[[\d;]*m", "", table)
    assert "LSoftmaxDense" in table and f"float32[{D},{C}]" in table
    assert "_kernel_for" not in table


def test_the_program_names_the_head():
    lowered = jax.jit(NETWORK.apply).lower(VARIABLES, FEATURES, LABELS)
    assert "Network/head.loss/" in lowered.as_text(debug_info=True)


@pytest.mark.parametrize("head", [NnxHead, LinenHead], ids=["nnx", "linen"])
def test_help_shows_the_real_signature(head):
    names = list(inspect.signature(head).parameters)
    assert {"classes", "margin", "lam", "dtype", "param_dtype", "kernel_init", "layout"} <= {*names}
    assert "args" not in names and "kwargs" not in names
    # Python 3.13 writes a long signature over several lines.
    words = pydoc.plain(pydoc.render_doc(head)).replace("|", " ").split()
    text = " ".join(words).replace("( ", "(")
    assert f"LSoftmaxDense({', '.join(names[:2])}" in text.replace(": int", "")


def test_a_subclass_shows_its_own_signature():
    class People(NnxHead):
        def __init__(self, dim, people, *, rngs):
            super().__init__(dim, people, margin=2, rngs=rngs)

    assert list(inspect.signature(People).parameters) == ["dim", "people", "rngs"]
    assert People(D, C, rngs=nnx.Rngs(0)).classes == C


def test_out_features_is_the_number_of_classes():
    assert NnxHead(D, C, rngs=nnx.Rngs(0)).out_features == LinenHead(C).out_features == C


def test_kernel_metadata_reaches_the_parameter():
    head = NnxHead(D, C, kernel_metadata={"frozen": True}, rngs=nnx.Rngs(0))
    assert head.kernel.get_metadata()["frozen"] is True


def test_a_rule_is_a_static_argument_of_nnx_jit():
    head = NnxHead(D, C, rngs=nnx.Rngs(0))

    @nnx.jit
    def loss(head, features, labels, lam):
        return head.loss(features, labels, lam)

    rule = lsm.self_paced(0.3)
    np.testing.assert_array_equal(
        loss(head, FEATURES, LABELS, rule), head.loss(FEATURES, LABELS, rule)
    )
    assert jax.tree.leaves(rule) == []


def test_a_layout_takes_an_initialiser_with_partitioning():
    mesh = jax.make_mesh((4,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "other"))
    layout = lsm.ClassParallel("model", mesh=mesh)
    head = NnxHead(D, C, kernel_init=init, layout=layout, rngs=nnx.Rngs(0))
    assert head.kernel[...].sharding.spec == jax.sharding.PartitionSpec(None, "model")
    plain = NnxHead(D, C, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(head.kernel[...], plain.kernel[...])


@pytest.mark.parametrize(
    "value",
    [lsm.margin_schedule(10), lsm.annealed_lambda(*lsm.schedule.MNIST), lsm.self_paced(0.3),
     lsm.margins.ArcFace(0.3, scale=8.0), lsm.ClassParallel("model", "data"), lsm.Plan(row_block=3),
     LinenHead(C, lam=2.0)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_settings_survive_pickling(value):
    again = pickle.loads(pickle.dumps(value))
    if callable(value) and not isinstance(value, linen.Module):
        assert again(7) == value(7)
    else:
        assert again == value


def test_an_nnx_head_survives_pickling():
    head = NnxHead(D, C, lam=2.0, rngs=nnx.Rngs(0))
    again = pickle.loads(pickle.dumps(head))
    np.testing.assert_array_equal(again.loss(FEATURES, LABELS), head.loss(FEATURES, LABELS))


@pytest.mark.parametrize("kind", ["layout", "NNX head", "Linen head"])
def test_the_devices_of_a_mesh_are_not_pickled(kind):
    mesh = jax.make_mesh((4,), ("model",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    layout = lsm.ClassParallel("model", mesh=mesh)
    value = {
        "layout": layout,
        "NNX head": NnxHead(D, C, layout=layout, rngs=nnx.Rngs(0)),
        "Linen head": LinenHead(C, layout=layout),
    }[kind]
    with pytest.raises(TypeError, match="layout cannot be pickled with the devices of its mesh"):
        pickle.dumps(value)
    # A teacher's moving average needs a copy. JAX 0.7.2 cannot copy the mesh in an NNX kernel.
    copied_by = nnx.clone if kind == "NNX head" and jax.__version_info__ < (0, 8) else copy.deepcopy
    again = copied_by(value)
    assert getattr(again, "layout", again) == getattr(value, "layout", layout)
    assert copy.copy(layout) is layout


@pytest.mark.parametrize("method", [None, "loss"])
@pytest.mark.parametrize("first", ["head", "dense"])
def test_linen_modules_of_one_scope_do_not_share_a_kernel_unseen(first, method):
    """Flax's own modules raise so too: one kernel would be trained by both."""

    class Both(linen.Module):
        def setup(self):
            self.dense, self.head = linen.Dense(C, use_bias=False), LinenHead(C)
            linen.share_scope(self, self.dense)
            linen.share_scope(self, self.head)

        def __call__(self, features):
            parts = [self.dense, self.head if method is None else self.loss]
            return [part(features) for part in (parts if first == "dense" else parts[::-1])]

        def loss(self, features):
            return self.head.loss(features, LABELS)

    with pytest.raises(NameInUseError, match="kernel"):
        Both().init(jax.random.key(0), FEATURES)


def test_a_linen_head_in_a_shared_scope_keeps_its_kernel():
    class Above(linen.Module):
        def setup(self):
            self.head = LinenHead(C)
            linen.share_scope(self, self.head)

        def __call__(self, features):
            return self.head(features), self.head.loss(features, LABELS)

    variables = Above().init(jax.random.key(0), FEATURES)
    assert list(variables["params"]) == ["kernel"]
    _, losses = Above().apply(variables, FEATURES)
    np.testing.assert_array_equal(
        losses, LinenHead(C).apply(variables, FEATURES, LABELS, method="loss")
    )


@pytest.mark.parametrize("lam", [np.float32(2), jnp.float32(2)], ids=["NumPy", "JAX"])
def test_a_linen_head_with_an_array_as_lam_has_a_hash(lam):
    head = LinenHead(C, lam=lam)
    assert head == LinenHead(C, lam=2.0) and hash(head) == hash(LinenHead(C, lam=2.0))
    traced = jax.jit(lambda lam: LinenHead(C, lam=lam).init_with_output(
        jax.random.key(0), FEATURES, LABELS, method="loss"))  # fmt: skip
    given = LinenHead(C).init_with_output(
        jax.random.key(0), FEATURES, LABELS, 2.0, method="loss")  # fmt: skip
    np.testing.assert_allclose(traced(lam)[0], given[0], rtol=1e-6)
