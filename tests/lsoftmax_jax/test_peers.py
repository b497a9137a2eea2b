"""Compares loss, gradients and weights with PyTorch's: pytorch-metric-learning and torch.nn.

`nox -s parity` installs PyTorch and runs this file, which writes its measurements to PARITY_JSON.
"""

import functools
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lsoftmax_jax as lsm
from lsoftmax_jax import interop
from tests import oracle

NEEDED = "needs PyTorch: nox -s parity"
torch = pytest.importorskip("torch", reason=NEEDED)
losses = pytest.importorskip("pytorch_metric_learning.losses", reason=NEEDED)

# pytorch-metric-learning passes tensors to SciPy instead of integers.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")

MARGINS = range(1, 6)


class Answer(NamedTuple):
    """The mean loss of a batch and its gradients."""

    loss: Any
    features: Any
    kernel: Any


@pytest.fixture(scope="module")
def figures() -> Iterator[dict[str, Any]]:
    """The measurements of the tests, by name."""
    measured: dict[str, Any] = {}
    yield measured
    if path := os.environ.get("PARITY_JSON"):
        packages = ("torch", "pytorch-metric-learning", "numpy")
        versions = {"peers": {package: version(package) for package in packages}}
        # Imported here: the library's own tests run without the packages of the experiments.
        from experiments.store import results as result

        result.save(Path(path), {"kind": "parity"} | result.provenance(1) | versions | measured)


class Annealed(losses.LargeMarginSoftmaxLoss):
    """Their large-margin loss with the λ that it lacks."""

    lam = 0.0

    def modify_cosine_of_target_classes(self, cosine):
        psi = super().modify_cosine_of_target_classes(cosine)
        return (self.lam * cosine + psi) / (1 + self.lam)


def theirs(problem, margin, scale=1.0, lam=0.0, dtype=torch.float64) -> Answer:
    features, kernel, labels = problem
    loss = Annealed(kernel.shape[1], kernel.shape[0], margin=margin, scale=scale)
    loss.lam = lam
    loss.W = torch.nn.Parameter(torch.tensor(kernel, dtype=dtype))
    features = torch.tensor(features, dtype=dtype, requires_grad=True)
    value = loss(features, torch.tensor(labels))
    value.backward()
    return Answer(value.item(), features.grad.numpy(), loss.W.grad.numpy())


@functools.partial(jax.jit, static_argnames="margin")
def our_loss(features, kernel, labels, margin, scale, lam):
    def mean(features, kernel):
        return lsm.lsoftmax_loss(features, scale * kernel, labels, margin=margin, lam=lam).mean()

    loss, gradients = jax.value_and_grad(mean, (0, 1))(features, kernel)
    return Answer(loss, *gradients)


def ours(problem, margin, scale=1.0, lam=0.0, dtype=jnp.float64) -> Answer:
    features, kernel, labels = oracle.as_arrays(problem, dtype)
    return our_loss(features, kernel, labels, margin, jnp.asarray(scale, dtype), lam)


def errors(got: Answer, wanted: Answer) -> Answer:
    """The largest error of each part, relative to the part's largest entry."""
    wide = ([np.asarray(part, np.float64) for part in answer] for answer in (got, wanted))
    pairs = zip(*wide, strict=True)
    return Answer(*(float(np.max(np.abs(g - w)) / np.max(np.abs(w))) for g, w in pairs))


def worst(several: list[Answer]) -> Answer:
    return Answer(*(max(part) for part in zip(*several, strict=True)))


def in_float32(problem):
    """The problem, rounded to numbers that float32 holds."""
    return oracle.Problem(*(a.astype("f4").astype("f8") for a in problem[:2]), problem.labels)


def one_example(theta, norm=1.0):
    """Three classes in the plane and one feature of the first, whose column is the first axis."""
    kernel = np.array([[1.0, -0.6, 0.0], [0.0, 0.8, -1.0]])
    features = norm * np.array([[np.cos(theta), np.sin(theta)]])
    return in_float32(oracle.Problem(features, kernel, np.array([0])))


def exact(problem, margin) -> Answer:
    return Answer(
        oracle.exact_loss(*problem, margin)[0],
        *oracle.exact_gradients(*problem, np.ones(1), margin)[:2],  # without λ and weights
    )


@pytest.mark.parametrize("margin", MARGINS)
def test_same_values_and_gradients(x64, figures, margin):
    found = []
    for norm in (1e-3, 1.0, 1e3):
        problem = oracle.problem(seed=7, batch=64, dim=16, classes=10, scale=norm)
        for scale in (0.25, 1.0, 4.0, 64.0):
            for lam in (0.0, 5.0):
                arguments = problem, margin, scale, lam
                found.append(errors(ours(*arguments), theirs(*arguments)))
    error = worst(found)
    figures[f"float64 m={margin}"] = error._asdict()
    assert max(error) < 2e-13


@pytest.mark.parametrize("margin", MARGINS)
def test_float32_errors_are_small_in_both(x64, figures, margin):
    problem = in_float32(oracle.problem(seed=7, batch=64, dim=16, classes=10))
    wanted = ours(problem, margin)
    our_error = errors(ours(problem, margin, dtype=jnp.float32), wanted)
    their_error = errors(theirs(problem, margin, dtype=torch.float32), wanted)
    figures[f"float32 m={margin}"] = {
        "ours": our_error._asdict(),
        "theirs": their_error._asdict(),
    }
    assert max(our_error) < 2e-6 and max(their_error) < 2e-6


def test_small_losses_keep_their_digits_here_and_vanish_in_the_peer(figures):
    for norm in (10, 15, 20):
        problem = one_example(theta=0.02, norm=norm)
        wanted = exact(problem, margin=4)
        our_answer = ours(problem, margin=4, dtype=jnp.float32)
        their_answer = theirs(problem, margin=4, dtype=torch.float32)
        our_error, their_error = errors(our_answer, wanted), errors(their_answer, wanted)
        figures[f"float32 small loss, norm {norm}"] = {
            "exact": wanted.loss,
            "ours": float(our_answer.loss),
            "theirs": their_answer.loss,
            "error of our feature gradient": our_error.features,
            "error of their feature gradient": their_error.features,
        }
        assert max(our_error) < 5e-5
    assert wanted.loss > 1e-9 and their_answer.loss == 0.0 and their_error.features > 0.9


def test_gradient_across_the_column_near_pi(figures):
    """If float32's cosine is -1, the peer's k is m, one more than the largest k."""
    problem = one_example(theta=np.pi - 1e-4)
    across = {
        "exact": float(exact(problem, margin=4).kernel[1, 0]),
        "ours": float(ours(problem, margin=4, dtype=jnp.float32).kernel[1, 0]),
        "theirs": float(theirs(problem, margin=4, dtype=torch.float32).kernel[1, 0]),
    }
    figures["float32 gradient across the column at theta = pi - 1e-4"] = across
    np.testing.assert_allclose(across["ours"], across["exact"], rtol=1e-4)
    np.testing.assert_allclose(across["theirs"], -across["exact"], rtol=1e-4)


def test_a_zero_feature_has_a_gradient_here(x64):
    kernel = one_example(0.0).kernel
    problem = oracle.Problem(np.zeros((1, 2)), kernel, np.array([0]))
    plain = torch.zeros((1, 2), dtype=torch.float64, requires_grad=True)
    logits = plain @ torch.tensor(kernel)
    torch.nn.functional.cross_entropy(logits, torch.tensor([0])).backward()
    np.testing.assert_allclose(ours(problem, margin=1).features, plain.grad.numpy())
    assert np.any(plain.grad.numpy())
    assert not np.any(theirs(problem, margin=1).features)


# (margin, scale) as the constructors take them; ArcFace's margin is in degrees.
KINDS = {
    "ArcFaceLoss": [(28.6, 64.0), (28.6, 8.0), (0.0, 16.0)],
    "CosFaceLoss": [(0.35, 64.0), (0.2, 8.0), (0.0, 16.0)],
    "SphereFaceLoss": [(4, 1), (2, 1), (1, 1)],
    "LargeMarginSoftmaxLoss": [(4, 1.0), (3, 2.0)],
}


def below_pi(problem, degrees):
    """Drops the rows where theta + margin exceeds pi."""
    theta = oracle.target_geometry(*problem)[3]
    kept = theta + np.radians(degrees) < np.pi
    return oracle.Problem(problem.features[kept], problem.kernel, problem.labels[kept])


def both_answers(kind, margin, scale, problem, dtype="float64") -> tuple[Answer, Answer]:
    """Our answer with weights and settings that interop makes from theirs, and their answer."""
    features, kernel, labels = problem
    peer = getattr(losses, kind)(kernel.shape[1], kernel.shape[0], margin=margin, scale=scale)
    peer.W = torch.nn.Parameter(torch.tensor(kernel, dtype=getattr(torch, dtype)))
    rows = torch.tensor(features, dtype=getattr(torch, dtype), requires_grad=True)
    value = peer(rows, torch.tensor(labels))
    value.backward()
    weight, margin = interop.from_metric_learning(kind, peer.W.detach(), margin=margin, scale=scale)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def mean(features, kernel):
        return lsm.lsoftmax_loss(features, kernel, labels, margin=margin, lam=0.0).mean()

    value_here, gradients = mean(jnp.asarray(features, dtype), jnp.asarray(weight, dtype))
    # interop multiplies the kernel of LargeMarginSoftmaxLoss by the scale.
    factor = scale if kind == "LargeMarginSoftmaxLoss" else 1
    ours = Answer(value_here, gradients[0], factor * gradients[1])
    return ours, Answer(value.item(), rows.grad.numpy(), peer.W.grad.numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_the_four_losses(x64, figures, kind):
    found, single = [], []
    for margin, scale in KINDS[kind]:
        problem = oracle.problem(seed=7, batch=64, dim=16, classes=10)
        if kind == "ArcFaceLoss":
            problem = below_pi(problem, margin)
        wanted, exact = both_answers(kind, margin, scale, problem)
        found.append(errors(wanted, exact))
        answers = both_answers(kind, margin, scale, in_float32(problem), "float32")
        wanted, _ = both_answers(kind, margin, scale, in_float32(problem))
        single.append([errors(answer, wanted) for answer in answers])
    figures[f"float64 {kind}"] = worst(found)._asdict()
    for name, several in zip(("ours", "theirs"), zip(*single, strict=True), strict=True):
        figures.setdefault(f"float32 {kind}", {})[name] = worst(several)._asdict()
    assert max(worst(found)) < 1e-12
    assert max(worst([ours for ours, _ in single])) < 1e-4


def test_arcface_beyond_pi_jumps_in_the_peer_and_not_here(x64, figures):
    """Compares the target's logit on both sides of theta + margin = pi, at scale 1."""
    margin, step = 28.6, 1e-6
    radians = np.radians(margin)
    there = losses.ArcFaceLoss(2, 2, margin=margin, scale=1)
    cosines = np.cos(np.pi - radians + np.array([-step, step]))
    theirs = there.modify_cosine_of_target_classes(torch.tensor(cosines)).numpy()
    ours = np.asarray(
        lsm.margins.ArcFace(radians, scale=1.0).value_and_slope(jnp.asarray(cosines))[0]
    )
    figures["ArcFaceLoss at theta + margin = pi"] = {
        "ours": ours.tolist(),
        "theirs": theirs.tolist(),
    }
    np.testing.assert_allclose(ours, [-1, -1], atol=1e-5)
    cosine = np.cos(np.pi - radians)
    np.testing.assert_allclose(theirs, [-1, cosine - radians * np.sin(radians)], atol=1e-5)


def test_plain_logits_of_each_kind(x64):
    features, weight, _ = oracle.problem(seed=5, batch=6, dim=5, classes=4)
    for kind, settings in KINDS.items():
        margin, scale = settings[0]
        peer = getattr(losses, kind)(num_classes=4, embedding_size=5, margin=margin, scale=scale)
        peer.W = torch.nn.Parameter(torch.tensor(weight))
        kernel, margin = interop.from_metric_learning(
            kind, peer.W.detach(), margin=margin, scale=scale
        )
        logits = lsm.lsoftmax_logits(features, kernel, None, margin=margin, lam=0.0)
        wanted = peer.get_logits(torch.tensor(features)).detach().numpy()
        np.testing.assert_allclose(logits, wanted, rtol=1e-12, atol=1e-12, err_msg=kind)


def test_linear_there_and_back():
    linear = torch.nn.Linear(5, 4, bias=False)
    kernel = interop.kernel_from_rows(linear.weight.detach(), in_features=5, classes=4)
    features = np.random.default_rng(0).standard_normal((3, 5)).astype("f4")
    wanted = linear(torch.tensor(features)).detach().numpy()
    np.testing.assert_allclose(
        lsm.lsoftmax_logits(features, kernel, None, margin=4, lam=0.0), wanted, rtol=1e-5, atol=1e-6
    )
    back = torch.nn.Linear(5, 4, bias=False)
    back.load_state_dict({"weight": torch.tensor(interop.kernel_to_rows(kernel))})
    assert torch.equal(back.weight, linear.weight)


def test_both_train_to_the_same_kernel(x64, figures):
    features, kernel, labels = oracle.problem(seed=11, batch=32, dim=8, classes=4)
    peer = losses.LargeMarginSoftmaxLoss(4, 8, margin=4)
    peer.W = torch.nn.Parameter(torch.tensor(kernel))
    sgd = torch.optim.SGD(peer.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(20):
        sgd.zero_grad()
        peer(torch.tensor(features), torch.tensor(labels)).backward()
        sgd.step()

    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))

    @jax.jit
    def step(kernel, state):
        gradient = jax.grad(
            lambda k: lsm.lsoftmax_loss(features, k, labels, margin=4, lam=0.0).mean()
        )
        change, state = optimizer.update(gradient(kernel), state, kernel)
        return optax.apply_updates(kernel, change), state

    trained = jnp.asarray(kernel)
    state = optimizer.init(trained)
    for _ in range(20):
        trained, state = step(trained, state)
    wanted = peer.W.detach().numpy()
    assert np.max(np.abs(wanted - kernel)) > 0.1
    error = float(np.max(np.abs(trained - wanted)))
    figures["float64 kernel after 20 SGD steps, m=4"] = error
    assert error < 1e-10
