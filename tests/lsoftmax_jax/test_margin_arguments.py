"""A user's own margin, the defaults of the margins, and refused arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, NormFace, SphereFace
from tests import oracle
from tests.margin_cases import (
    BATCH,
    CLASSES,
    DIM,
    SCALE,
    Case,
    assert_all_close,
    given,
    loss_and_gradients,
    oracle_unit,
    value_and_pullback,
)


@dataclasses.dataclass(frozen=True)
class Quadratic:
    """A user's margin without base class or registration."""

    bend: float
    scale: float | None = None
    unit_columns: bool = False

    def value_and_slope(self, cosine):
        return cosine - self.bend * (1 - cosine) ** 2, 1 + 2 * self.bend * (1 - cosine)


@pytest.mark.parametrize("scale", [None, SCALE], ids=["norms kept", "scaled"])
def test_a_users_own_margin(x64, scale):
    problem = oracle.problem(3, BATCH, DIM, CLASSES)
    *arguments, _ = given(problem)
    rows = jnp.arange(BATCH), arguments[2]

    def literal(features, kernel):
        cosine = oracle_unit(features, 1) @ oracle_unit(kernel, 0)
        lengths = jnp.outer(jnp.linalg.norm(features, axis=1), jnp.linalg.norm(kernel, axis=0))
        value = cosine.at[rows].add(-0.2 * (1 - cosine[rows]) ** 2)
        z = (lengths if scale is None else scale) * value
        return optax.softmax_cross_entropy_with_integer_labels(z, arguments[2])

    value, wanted = value_and_pullback(literal, *arguments[:2], arguments[3])
    run = jax.jit(functools.partial(loss_and_gradients, Case(Quadratic(0.2, scale), {})))
    got, bars = run(*arguments, jnp.float64(0))
    oracle.assert_close(got, value, 1e-12)
    assert_all_close(bars[:2], wanted, 1e-12)


TWO, HALF = np.float64(2.0), np.float64(0.5)
OF_NUMPY = {
    "SphereFace": {"margin": SphereFace(np.int64(4), scale=TWO)},
    "NormFace": {"margin": NormFace(scale=TWO)},
    "a user's own": {"margin": Quadratic(0.2, scale=TWO)},
    "CosFace": {"margin": CosFace(HALF, scale=TWO)},
    "Combined": {"margin": Combined(TWO, HALF, HALF, scale=TWO, easy=np.True_)},
    "ArcFace": {"margin": ArcFace(HALF, scale=TWO, detach=np.True_)},
    "self_paced": {"lam": lsm.self_paced(HALF)},
}


@pytest.mark.parametrize("name", OF_NUMPY)
def test_numbers_of_numpy_keep_float32(x64, name):
    """NumPy's float64 would win over float32 operands where JAX has 64 bits."""
    settings = {"margin": 4, "lam": 0.5} | OF_NUMPY[name]
    plan = lsm.Plan(class_block=2, keep_exponentials=np.False_)
    features, kernel = jnp.ones((2, 3), jnp.float32), jnp.eye(3, dtype=jnp.float32)
    assert lsm.lsoftmax_loss(features, kernel, [0, 2], plan=plan, **settings).dtype == jnp.float32


def test_a_plan_of_numpys_numbers_is_the_same_plan():
    plan = lsm.Plan(np.int64(2**30), None, np.int32(8), np.False_)
    assert plan.keep_exponentials is False and type(plan.class_block) is int


def test_the_dtype_of_a_users_own_margin_is_named(x64):
    class Wide(Quadratic):
        def value_and_slope(self, cosine):
            return cosine.astype(jnp.float64), jnp.ones_like(cosine)

    with pytest.raises(TypeError, match=r"got shape \(33,\) and dtype float64"):
        lsm.lsoftmax_loss(jnp.ones((2, 3)), jnp.eye(3), [0, 2], margin=Wide(0.2), lam=0.0)


def test_a_setting_that_takes_no_part_in_the_comparison_is_named():
    class Bent(CosFace):
        """Equal to every other, whatever its `bend`: jit would take one for another."""

        def __init__(self, bend):
            super().__init__(0.2, scale=SCALE)
            object.__setattr__(self, "bend", bend)

    @dataclasses.dataclass(frozen=True)
    class Noted(Quadratic):
        note: float = dataclasses.field(default=0.0, compare=False)

    for margin, name in ((Bent(0.1), "bend"), (Noted(0.1), "note")):
        with pytest.raises(TypeError, match=rf"whose {name} takes no part: declare it"):
            lsm.lsoftmax_loss(jnp.ones((2, 3)), jnp.eye(3), [0, 2], margin=margin, lam=0.0)


def test_a_margin_derived_from_ours_is_taken():
    @dataclasses.dataclass(frozen=True)
    class Softer(CosFace):
        bend: float = 1.0

        @functools.cached_property
        def less(self):
            return self.margin * self.bend

        def value_and_slope(self, cosine):
            return cosine - self.less, jnp.ones_like(cosine)

    run = jax.jit(functools.partial(lsm.lsoftmax_loss, lam=0.0), static_argnames="margin")
    arguments = jnp.eye(3), jnp.eye(3), jnp.arange(3)
    for bend in (0.5, 1.0):
        margin = Softer(0.4, scale=SCALE, bend=bend)
        for _ in range(2):  # the second time `less` is in the instance
            got = run(*arguments, margin=margin)
        same = run(*arguments, margin=CosFace(0.4 * bend, scale=SCALE))
        oracle.assert_close(got, same, 1e-6)


def test_the_usual_margin_is_the_default():
    assert ArcFace(scale=SCALE) == ArcFace(0.5, scale=SCALE)
    assert CosFace(scale=SCALE) == CosFace(0.35, scale=SCALE)
    assert SphereFace() == SphereFace(4)
    assert Combined(scale=SCALE) == Combined(1.0, 0.0, 0.0, scale=SCALE)


@pytest.mark.parametrize("scale", [None, 0, -1.0, np.nan, np.inf, 1e39, "x", True])
def test_scales_out_of_range_are_named(scale):
    for margin in (ArcFace, CosFace, Combined, NormFace):
        with pytest.raises((TypeError, ValueError), match="scale"):
            margin(scale=scale)
        with pytest.raises(TypeError, match="scale"):
            margin()


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (
            lambda: ArcFace(np.pi, scale=1.0),
            ValueError,
            r"margin must be in \[0, 3.142\) radians, got 3.14",
        ),
        (lambda: ArcFace(-0.1, scale=1.0), ValueError, "margin"),
        (lambda: ArcFace("x", scale=1.0), TypeError, "margin"),
        (lambda: CosFace(np.nan, scale=1.0), ValueError, "margin"),
        (lambda: Combined(m1=0.9, scale=1.0), ValueError, "m1"),
        (lambda: Combined(m2=28.6, scale=1.0), ValueError, "m2"),
        (lambda: Combined(m3=-0.1, scale=1.0), ValueError, "m3"),
        (lambda: Combined(m3=np.inf, scale=1.0), ValueError, "m3"),
        (lambda: SphereFace(1.5), TypeError, "margin"),
        (lambda: SphereFace(0), ValueError, "margin"),
    ],
)
def test_arguments_of_margins_out_of_range_are_named(call, error, name):
    with pytest.raises(error, match=name):
        call()


@dataclasses.dataclass
class Unhashable:
    scale: float | None = None
    unit_columns: bool = False

    def value_and_slope(self, cosine):
        return cosine, jnp.ones_like(cosine)


class Mutable:
    """Equal only to itself: a changed setting would not be seen."""

    scale, unit_columns = None, False

    def value_and_slope(self, cosine):
        return cosine, jnp.ones_like(cosine)


@pytest.mark.parametrize(
    "margin", [ArcFace, 0.5, "ArcFace", None, Unhashable(), Mutable()], ids=lambda m: str(m)[:20]
)
def test_other_objects_than_margins_are_refused(margin):
    with pytest.raises(TypeError, match=r"margin must (be|compare by)"):
        lsm.lsoftmax_loss(jnp.ones((2, 3)), jnp.eye(3), [0, 2], margin=margin, lam=0.0)
