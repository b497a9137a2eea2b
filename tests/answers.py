"""The library's losses with their gradients, in every plan.

Each shape compiles once, so tests that share a shape share the program.
"""

import functools

import jax
import numpy as np

import lsoftmax_jax as lsm
from tests import oracle
from tests.oracle import Gradients

B, D, C = 7, 5, 4
RAGGED = (6, 8, 11)
MANY = (6, 8, 301)  # with so many classes the library gathers each label's column
LAMBDAS = [0.0, 5.0, 1e6, np.inf]
EPS = float(np.finfo(np.float32).eps)
STATIC = ("margin", "label_smoothing", "plan")
PLANS = {
    "one-shot": lsm.Plan(),
    "row blocks with a tail": lsm.Plan(row_block=4),
    "one row block for all": lsm.Plan(row_block=100),
    "class blocks, stored": lsm.Plan(class_block=3, keep_exponentials=True),
    "class blocks, recomputed": lsm.Plan(class_block=3, keep_exponentials=False),
    "one class at a time": lsm.Plan(class_block=1, keep_exponentials=True),
    "next to no memory": lsm.Plan(memory_budget=1),
    "nothing stored": lsm.Plan(keep_exponentials=False),
}


@functools.partial(jax.jit, static_argnames=STATIC)
def loss_and_gradients(features, kernel, labels, cotangent, lam, where=None, **static):
    """The loss of each example, pulled back along a cotangent."""

    def loss(features, kernel, lam):
        return lsm.lsoftmax_loss(features, kernel, labels, lam=lam, where=where, **static)

    value, pull = jax.vjp(loss, features, kernel, lam)
    return value, Gradients(*pull(cotangent))


@functools.partial(jax.jit, static_argnames=STATIC)
def sum_and_gradients(features, kernel, labels, weights, lam, where=None, **static):
    """The weighted sum of the losses, and its gradients, also by the weights."""

    def total(features, kernel, lam, weights):
        return lsm.lsoftmax_loss_sum(
            features, kernel, labels, weights, lam=lam, where=where, **static
        )

    value, pull = jax.value_and_grad(total, argnums=(0, 1, 2, 3))(features, kernel, lam, weights)
    return value, Gradients(*pull)


LOSS_AND_SUM_PLANS = [
    (loss_and_gradients, "one-shot"),
    (loss_and_gradients, "class blocks, recomputed"),
    (sum_and_gradients, "one-shot"),
    (sum_and_gradients, "row blocks with a tail"),
]


def assert_gradients_close(actual: Gradients, wanted: Gradients, tolerance: float) -> None:
    """Compares each gradient in wanted that is not None."""
    for name, value in wanted._asdict().items():
        if value is not None:
            oracle.assert_close(getattr(actual, name), value, tolerance)


def assert_norm_close(actual, wanted, tolerance):
    error = np.linalg.norm(np.asarray(actual, np.float64) - wanted) / np.linalg.norm(wanted)
    assert error <= tolerance, f"{error:.3g} is over {tolerance:.3g}"


def rounded(*tensors):
    """Returns the library's operands as the oracle's float64 arrays."""
    return tuple(np.asarray(tensor, np.float64) for tensor in tensors)


def conditioning(features, kernel, labels, margin):
    """m^2 n + |Z|: what float32 must lose of a loss, in units of eps."""
    norm = np.linalg.norm(features, axis=1) * np.linalg.norm(kernel[:, labels], axis=0)
    others = features @ kernel
    others[np.arange(len(labels)), labels] = -np.inf
    return margin**2 * norm + np.abs(np.log(np.sum(np.exp(others), axis=1)))
