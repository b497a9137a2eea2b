"""The guide's figures, drawn by the library itself, each for a light and a dark page."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_digits

import lsoftmax_jax as lsm
from experiments.report.features import features_figure
from experiments.report.outcomes import RESULTS
from experiments.store import results
from experiments.store.files import replacing
from lsoftmax_jax import schedule, training
from lsoftmax_jax.nnx import LSoftmaxDense

# After Okabe and Ito, those that stand out from white and from black; lines differ in dashes too.
COLORS = ("#0072B2", "#C98500", "#009E73", "#CC79A7", "#D55E00")
DASHES: Sequence[Any] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)), (0, (4, 1)))
INKS = {"light": "#1f2328", "dark": "#e6e6e6"}

# Shares of the margin, 1 / (1 + λ).


def style(ink: str) -> dict[Any, Any]:
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return dict.fromkeys(inked, ink) | {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "font.size": 11,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.fonttype": "path",
        "svg.hashsalt": "docs",  # the same figure gives the same bytes
    }


def write(folder: Path) -> None:
    """NAME-light.svg and NAME-dark.svg of every figure."""
    for name, draw in FIGURES.items():
        for page, ink in INKS.items():
            with rc_context(style(ink)), replacing(folder / f"{name}-{page}.svg") as file:
                draw().savefig(file, format="svg", metadata={"Date": None})


def lines(panel: Axes, across: NDArray, curves: dict[str, Any]) -> None:
    """One line a curve; the label is its key."""
    for (label, values), color, dashes in zip(curves.items(), COLORS, DASHES, strict=False):
        panel.plot(across, values, color=color, linestyle=dashes, label=label)


def psi_by_angle() -> Figure:
    """psi for several margins."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.add_subplot(xlabel="angle θ, degrees", ylabel="ψ(θ)", xlim=(0, 180))
    degrees = np.linspace(0, 180, 721)
    cosine = jnp.cos(jnp.radians(degrees))
    curves = {f"m = {m}" + " (cos θ)" * (m == 1): lsm.psi(cosine, m) for m in (1, 2, 3, 4, 6)}
    lines(panel, degrees, curves)
    panel.set_xticks(range(0, 181, 30))
    panel.legend()
    return figure


def psi_and_slope() -> Figure:
    """psi and its derivative against the cosine: finite to the ends, zero at the inner knots."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    cosine = jnp.linspace(-1, 1, 801)
    margins = (1, 2, 3, 4)

    def slope(margin: int) -> jax.Array:
        return jax.jvp(lambda c: lsm.psi(c, margin), (cosine,), (jnp.ones_like(cosine),))[1]

    lines(left, np.asarray(cosine), {f"m = {m}": lsm.psi(cosine, m) for m in margins})
    lines(right, np.asarray(cosine), {f"m = {m}": slope(m) for m in margins})
    left.set(xlabel="cos θ", title="ψ")
    right.set(xlabel="cos θ", title="dψ / d cos θ", ylim=(0, 16.5))
    left.legend()
    return figure


def margins_and_slopes() -> Figure:
    """Value and slope of each margin against the angle; ArcFace's slope has no bound at 0."""
    figure = Figure(figsize=(8.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    degrees = np.linspace(0, 180, 721)[1:]
    cosine = jnp.cos(jnp.radians(degrees))
    named: dict[str, lsm.margins.Margin] = {
        "cos θ (softmax)": lsm.margins.NormFace(scale=1.0),
        "L-Softmax, SphereFace, m = 2": lsm.margins.SphereFace(2),
        "CosFace, m = 0.35": lsm.margins.CosFace(0.35, scale=1.0),
        "ArcFace, m = 0.5": lsm.margins.ArcFace(0.5, scale=1.0),
        "Combined, 1.2, 0.3, 0.2": lsm.margins.Combined(1.2, 0.3, 0.2, scale=1.0),
    }
    both = {name: margin.value_and_slope(cosine) for name, margin in named.items()}
    lines(left, degrees, {name: value for name, (value, _) in both.items()})
    lines(right, degrees, {name: slope for name, (_, slope) in both.items()})
    left.set(xlabel="angle θ, degrees", title="v, in place of cos θ", xlim=(0, 180))
    right.set(xlabel="angle θ, degrees", title="dv / d cos θ", xlim=(0, 180), ylim=(0, 6))
    for panel in (left, right):
        panel.set_xticks(range(0, 181, 30))
    left.legend(loc="lower left", fontsize=9)
    return figure


def annealed_target() -> Figure:
    """The target logit between plain and full margin, for a feature and a column of length 1."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    panel = figure.add_subplot(xlabel="angle θ, degrees", ylabel="target logit", xlim=(0, 180))
    degrees = np.linspace(0, 180, 361)
    radians = np.radians(degrees)
    features = np.stack([np.cos(radians), np.sin(radians)], axis=-1).astype(np.float32)
    kernel, labels = jnp.array([[1.0], [0.0]]), np.zeros(len(degrees), int)

    def target(lam: float) -> jax.Array:
        return lsm.lsoftmax_logits(features, kernel, labels, margin=4, lam=lam)[:, 0]

    named = {"λ = ∞ (softmax)": np.inf, "λ = 20": 20.0, "λ = 5": 5.0, "λ = 1": 1.0}
    curves = {label: target(lam) for label, lam in (named | {"λ = 0 (full margin)": 0.0}).items()}
    lines(panel, degrees, curves)
    panel.set_xticks(range(0, 181, 30))
    panel.legend()
    return figure


def presets() -> Figure:
    """λ of the released constants, step by step."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    panel = figure.add_subplot(xlabel="update", ylabel="λ", yscale="log", ylim=(1e-2, 1.5e3))
    steps = np.arange(0, 18_001, 50)
    named = {
        "MNIST, m = 4": schedule.MNIST,
        "CIFAR10, m = 2": schedule.CIFAR10,
        "CIFAR10+, m = 2": schedule.CIFAR10_PLUS,
        "CIFAR10+ with minimum 5": schedule.CIFAR10_PLUS._replace(minimum=5.0),
    }
    lines(panel, steps, {name: lsm.annealed_lambda(*p)(steps) for name, p in named.items()})
    panel.set_xlim(0, steps[-1])
    panel.legend()
    return figure


def regions() -> Figure:
    """Two classes in the plane: where each is ahead when its own label carries the margin."""
    figure = Figure(figsize=(8.6, 2.0), layout="constrained")
    angles = np.radians([125, 55])
    kernel = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    for panel, margin in zip(figure.subplots(1, 3), (1, 2, 4), strict=True):
        draw_regions(panel, kernel, margin)
        panel.set_title("softmax (m = 1)" if margin == 1 else f"m = {margin}")
    return figure


def draw_regions(panel: Axes, kernel: NDArray, margin: int) -> None:
    across, up = np.linspace(-1.15, 1.15, 231), np.linspace(0, 1.25, 126)
    features = np.stack(np.meshgrid(across, up), axis=-1).astype(np.float32)
    for label, color in enumerate((COLORS[0], COLORS[4])):
        labels = np.full(features.shape[:-1], label)
        logits = lsm.lsoftmax_logits(features, kernel, labels, margin=margin, lam=0.0)
        lead = np.asarray(logits[..., label] - logits[..., 1 - label])
        panel.contourf(across, up, lead, levels=(0, np.inf), colors=[color], alpha=0.25)
        panel.contour(across, up, lead, levels=(0,), colors=[color], linewidths=1.5)
        x, y = kernel[:, label]
        arrow = {"arrowstyle": "-|>", "color": color, "linewidth": 1.8}
        panel.annotate("", (x, y), (0, 0), arrowprops=arrow)
        panel.text(1.13 * x, 1.13 * y, f"$w_{label + 1}$", ha="center", va="center")
    panel.set(aspect="equal", xticks=(), yticks=())
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)


class Small(nnx.Module):
    """A network for 64 pixels, as the guide's page on divergence has it."""

    def __init__(self, rngs: nnx.Rngs):
        self.one, self.two = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)
        self.head = LSoftmaxDense(16, 10, margin=4, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.two(nnx.relu(self.one(images)))


def digits() -> tuple[jax.Array, jax.Array]:
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:512] / 16, jnp.float32), jnp.asarray(labels[:512])


def trained(
    lam: training.Schedule | lsm.SelfPaced, steps: int
) -> tuple[nnx.GraphDef[Any], training.State, training.StepMetrics]:
    """The network after so many updates on the same 512 digits, and the metrics of each."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    graphdef, state = training.create(Small(nnx.Rngs(0)), optimizer)
    step, (images, labels) = training.train_step(graphdef, optimizer, lam), digits()
    return graphdef, *jax.jit(
        lambda state: jax.lax.scan(lambda s, _: step(s, images, labels), state, length=steps)
    )(state)


@cache
def paced(steps: int) -> dict[str, training.StepMetrics]:
    """What runs that differ in λ alone saw."""
    released = schedule.MNIST._replace(gamma=schedule.MNIST.gamma * 18_000 / steps)
    named: dict[str, training.Schedule | lsm.SelfPaced] = {
        "self-paced": lsm.self_paced(),
        "margin_schedule": lsm.margin_schedule(steps),
        "released, stretched": lsm.annealed_lambda(*released),
        "λ = 0": lambda _: jnp.float32(0),
    }
    return {name: trained(lam, steps)[2] for name, lam in named.items()}


def collapse() -> Figure:
    """Runs that differ in λ alone: lengths of features, and how many labels are right."""
    figure = Figure(figsize=(8.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = 300
    metrics = paced(steps)

    def mean(of: str) -> dict[str, NDArray]:
        return {
            name: np.asarray(getattr(seen.sums, of) / seen.sums.examples)
            for name, seen in metrics.items()
        }

    lines(left, np.arange(steps), mean("feature_norm"))
    accuracies = {name: 100 * part for name, part in mean("correct").items()}
    lines(right, np.arange(steps), accuracies)
    left.set(xlabel="update", title="mean length of the features", yscale="log", xlim=(0, steps))
    right.set(xlabel="update", title="right without margin, %", ylim=(0, 102), xlim=(0, steps))
    left.legend()
    return figure


def features() -> Figure:
    """The picture of `make quickstart`, from the committed results."""
    return features_figure(results.load(RESULTS / "quickstart" / "quickstart.json")["features"])


FIGURES: dict[str, Callable[[], Figure]] = {
    "features": features,
    "psi": psi_by_angle,
    "slope": psi_and_slope,
    "margins": margins_and_slopes,
    "annealed": annealed_target,
    "presets": presets,
    "regions": regions,
    "collapse": collapse,
}
