"""The margins besides L-Softmax with the oracle's arguments, and losses to compare."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import ArcFace, Combined, CosFace, SphereFace
from tests import oracle

SCALE = 12.0
BATCH, DIM, CLASSES = 16, 6, 11


class Case(NamedTuple):
    """A margin and its arguments for the oracle."""

    margin: Any
    m: dict[str, Any]

    @property
    def scale(self):
        return self.margin.scale

    def of_theta(self, theta):
        if isinstance(self.margin, SphereFace):
            m = self.margin.margin
            return oracle.psi_of_theta(theta, m), oracle.psi_slope_of_theta(theta, m)
        return oracle.combined_of_theta(theta, **self.m)


CASES = {
    "ArcFace": Case(ArcFace(0.5, scale=SCALE), {"m2": 0.5}),
    "ArcFace, easy": Case(ArcFace(0.3, easy=True, scale=SCALE), {"m2": 0.3, "easy": True}),
    "ArcFace, wide": Case(ArcFace(2.0, scale=SCALE), {"m2": 2.0}),
    "CosFace": Case(CosFace(0.35, scale=SCALE), {"m3": 0.35}),
    "Combined": Case(Combined(1.2, 0.3, 0.2, scale=SCALE), {"m1": 1.2, "m2": 0.3, "m3": 0.2}),
    "Combined, m1 = 2": Case(Combined(2.0, scale=SCALE), {"m1": 2.0}),
    "SphereFace": Case(SphereFace(4), {}),
    "SphereFace, scaled": Case(SphereFace(3, scale=SCALE), {}),
}
ANGULAR = {name: case for name, case in CASES.items() if case.m}
# One margin of each kind, for tests where all margins would cost too much.
KINDS = {name: CASES[name] for name in ("ArcFace", "Combined", "SphereFace")}
PLANS = {
    "one-shot": lsm.Plan(),
    "row blocks": lsm.Plan(row_block=5),
    "class blocks, stored": lsm.Plan(class_block=4, keep_exponentials=True),
    "class blocks, recomputed": lsm.Plan(class_block=4, keep_exponentials=False),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_kind = pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
every_angular = pytest.mark.parametrize("case", ANGULAR.values(), ids=ANGULAR)


def loss_and_gradients(case, features, kernel, labels, cotangent, lam, **keywords):
    def loss(features, kernel, lam):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=case.margin, lam=lam, **keywords)

    value, pull = jax.vjp(loss, features, kernel, lam)
    return value, pull(cotangent)


def sum_and_gradients(case, features, kernel, labels, weights, lam, **keywords):
    def total(features, kernel, lam):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights,
            margin=case.margin, lam=lam, **keywords,
        )  # fmt: skip

    return jax.value_and_grad(total, (0, 1, 2))(features, kernel, lam)


def wanted_of(case, problem, cotangent, lam, label_smoothing=0.0):
    rest = case.of_theta, case.scale, lam, label_smoothing
    loss = oracle.angular_loss(*problem, *rest)
    return loss, oracle.angular_pullback(*problem, cotangent, *rest)


def assert_all_close(actual, wanted, tolerance):
    for one, other in zip(actual, wanted, strict=True):
        oracle.assert_close(one, other, tolerance)


def at_least_f32(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def given(problem, dtype=jnp.float64):
    cotangent = np.random.default_rng(9).standard_normal(len(problem.labels))
    wide = at_least_f32(dtype)
    return *oracle.as_arrays(problem, dtype), jnp.asarray(cotangent, wide), cotangent


def value_and_pullback(loss, features, kernel, cotangent):
    @jax.jit
    def run(*operands):
        value, pull = jax.vjp(loss, *operands)
        return value, pull(cotangent)

    return run(features, kernel)


def oracle_unit(array, axis):
    return array / jnp.sqrt(jnp.sum(array**2, axis=axis, keepdims=True))
