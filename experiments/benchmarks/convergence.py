"""Which λ trains, and which helps: `python -m experiments bench convergence`.

Small networks on scikit-learn's digits and on drawn identities, every way to choose λ with the same
ten seeds. A run has collapsed if its test error is more than 20 points above softmax's mean in the
same setting.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from numpy.typing import NDArray

import lsoftmax_jax as lsm
from experiments.benchmarks.records import OUT, earlier, heading
from experiments.benchmarks.tables import markdown
from experiments.store.progress import Progress
from experiments.store.results import save
from lsoftmax_jax import schedule
from lsoftmax_jax.linen import LSoftmaxDense
from lsoftmax_jax.margins import ArcFace, CosFace, Margin, NormFace, SphereFace
from lsoftmax_jax.schedule import SelfPaced

SEEDS = 10
COLLAPSED = 20.0  # a run is collapsed from so many points above softmax's mean error
RELEASED_STEPS = 18_000  # the released constants are for runs of so many updates


class Policy(NamedTuple):
    """A way to choose λ: a rule of the library, or λ of every update of a run of so many."""

    name: str
    lam: SelfPaced | Callable[[int], jax.Array]
    margin: int | Margin = 4
    decay: float = 5e-4  # used by bench open-set alone

    def over(self, steps: int) -> SelfPaced | jax.Array:
        """What `trained` is given for a run of so many updates."""
        return self.lam if isinstance(self.lam, SelfPaced) else self.lam(steps)


def scheduled(steps: int, share: float | None = None) -> jax.Array:
    return lsm.margin_schedule(steps, share=share)(np.arange(steps))


def released(steps: int, minimum: float = 0.0) -> jax.Array:
    """The released schedule for MNIST, stretched to a run of so many updates."""
    gamma = schedule.MNIST.gamma * RELEASED_STEPS / steps
    preset = schedule.MNIST._replace(gamma=gamma, minimum=minimum)
    return lsm.annealed_lambda(*preset)(np.arange(steps))


def constant(lam: float) -> Callable[[int], jax.Array]:
    return lambda steps: jnp.full(steps, lam)


# Softmax is λ = infinity, so that one program trains it and every schedule.
SOFTMAX = Policy("softmax", constant(jnp.inf))
DEFAULT = Policy("self_paced()", lsm.self_paced())
POLICIES = (
    SOFTMAX,
    DEFAULT,
    DEFAULT._replace(margin=2),
    DEFAULT._replace(margin=8),
    Policy("self_paced(0.4)", lsm.self_paced(0.4)),
    Policy("self_paced(1.0)", lsm.self_paced(1.0)),
    Policy("margin_schedule(steps)", scheduled),
    Policy("annealed_lambda, released, stretched", released),
    Policy("λ = 5", constant(5.0)),
    Policy("λ = 0", constant(0.0)),
)
# The margins with a scale, which is large enough for 500 classes. "Slope 1": the detached gradient.
SCALE = 16.0
COSFACE, ARCFACE = CosFace(0.35, scale=SCALE), ArcFace(0.5, scale=SCALE)
SPHEREFACE = SphereFace(4, scale=SCALE)
SCALED = (
    SOFTMAX,
    Policy("NormFace", constant(0.0), NormFace(scale=SCALE)),
    Policy("CosFace, λ = 0", constant(0.0), COSFACE),
    Policy("CosFace, self-paced", DEFAULT.lam, COSFACE),
    Policy("ArcFace, λ = 0", constant(0.0), ARCFACE),
    Policy("ArcFace, self-paced", DEFAULT.lam, ARCFACE),
    Policy("ArcFace, λ falls to 0", partial(scheduled, share=1.0), ARCFACE),
    Policy("ArcFace, slope 1, λ = 0", constant(0.0), ArcFace(0.5, scale=SCALE, detach=True)),
    Policy("SphereFace, λ = 0", constant(0.0), SPHEREFACE),
    Policy("SphereFace, self-paced", DEFAULT.lam, SPHEREFACE),
)

OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": partial(optax.adamw, weight_decay=0.05),
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
}


class Data(NamedTuple):
    """A task: digits as they are or spoilt, or identities drawn around random points."""

    noise: float = 0.0  # the part of training labels that is redrawn
    rarest: float = 1.0  # what is left of the rarest class; the others lie between
    identities: int = 0  # 0: digits
    dim: int = 0
    spread: float = 0.0


class Setting(NamedTuple):
    """A task, a network and how it is trained."""

    name: str
    data: Data = Data()
    convolutional: bool = False
    feature: int = 32
    relu: bool = True  # on the feature
    batch: int = 128
    optimizer: Literal["adam", "adamw", "sgd", "momentum"] = "adam"
    rate: float = 3e-3
    cosine: bool = False
    steps: int = 300
    apart: bool = False  # no rule for λ was chosen by this setting
    masked: int = 0  # rows of every batch that do not count; they have wrong labels
    batch_norm: bool = False  # of the feature, without a scale and a bias of its own


class Split(NamedTuple):
    train: tuple[NDArray, NDArray]
    test: tuple[NDArray, NDArray]
    classes: int


MOMENTUM: dict[str, Any] = {"optimizer": "momentum", "rate": 0.1}
# The default rule and its constants were chosen by seven of TUNED_ON. The form of the rule, with
# constants near the final ones, was then tried on six of APART: label noise 10 % and 40 % with SGD,
# 500 identities, the batch of 8 with Adam, the 2-D feature with SGD, and AdamW. The last two of
# APART were added when the rule stood.
TUNED_ON = (
    Setting("ReLU feature"),
    Setting("linear feature", relu=False),
    Setting("plain SGD", optimizer="sgd", rate=0.1, steps=1000),
    Setting("batch of 8", batch=8, optimizer="momentum", rate=0.02, steps=1000),
    Setting("2-D feature, Adam", feature=2, relu=False, steps=600),
    Setting("2-D feature, longer", feature=2, relu=False, cosine=True, steps=2000),
    Setting("4-D ReLU feature", feature=4, optimizer="adamw", steps=800),
    Setting("40 % label noise", Data(noise=0.4), steps=600),
    Setting("imbalance 1:10", Data(rarest=0.1), steps=600),
    Setting("imbalance 1:50", Data(rarest=0.02), steps=500, **MOMENTUM),
    Setting(
        "200 identities", Data(identities=200, dim=8, spread=0.5), feature=16, relu=False, steps=600
    ),
    Setting(
        "100 identities, overfitted",
        Data(identities=100, dim=16, spread=0.7),
        steps=800,
        **MOMENTUM,
    ),
)
APART = (
    Setting("10 % label noise", Data(noise=0.1), steps=1000),
    Setting("40 % label noise, SGD", Data(noise=0.4), relu=False, steps=600, **MOMENTUM),
    Setting(
        "500 identities, hardly learnt",
        Data(identities=500, dim=8, spread=0.5),
        feature=8,
        relu=False,
        steps=300,
    ),
    Setting("batch of 32, cosine", batch=32, cosine=True, steps=600),
    Setting("batch of 32, plain SGD", batch=32, relu=False, optimizer="sgd", rate=0.1, steps=1500),
    Setting("batch of 8, Adam", batch=8, rate=1e-3, steps=1500),
    Setting("batch of 512", batch=512, steps=200, **MOMENTUM),
    Setting("2-D feature, SGD", feature=2, relu=False, cosine=True, steps=800, **MOMENTUM),
    Setting("AdamW", optimizer="adamw", steps=800),
    Setting("CNN, Adam", convolutional=True, batch=64, steps=300),
    Setting(
        "CNN, SGD",
        convolutional=True,
        batch=32,
        cosine=True,
        steps=600,
        **MOMENTUM | {"rate": 0.05},
    ),
    Setting("150 updates", relu=False, steps=150),
    Setting("3,000 updates", batch=64, cosine=True, steps=3000),
    Setting("half of every batch masked", batch=64, masked=32, steps=600),
    Setting("20 % label noise", Data(noise=0.2), steps=1000),
    Setting("40 % label noise, CNN", Data(noise=0.4), convolutional=True, batch=64, steps=1000),
)
SETTINGS = TUNED_ON + tuple(setting._replace(apart=True) for setting in APART)
QUICK = (Setting("ReLU feature", batch=32, steps=40),)


def bench(
    scaled: bool = False,
    batch_norm: bool = False,
    quick: bool = False,
    again: bool = False,
    out: Path = OUT,
) -> None:
    """Trains every setting with every way to choose λ; prints tables.

    An interrupted benchmark continues with the setting at which it stopped.

    Args:
      scaled: train the margins with a scale in place of L-Softmax.
      batch_norm: normalise the features over the batch, without a scale and a bias of its own.
      quick: run one short setting with two seeds, to see that it works.
      again: start over even if there is a result.
      out: folder of the result.
    """
    settings, seeds = (QUICK, 2) if quick else (SETTINGS, SEEDS)
    policies = SCALED if scaled else POLICIES
    settings = tuple(setting._replace(batch_norm=batch_norm) for setting in settings)
    asked = {"scaled": scaled, "batch-norm": batch_norm, "quick": quick}
    flags = [name for name, given in asked.items() if given]
    file = out / f"{'-'.join(['convergence', *flags, jax.default_backend()])}.json"
    command = " --".join(["python -m experiments bench convergence", *flags])
    result = heading("bench convergence", command) | {"seeds": seeds}
    kept: dict[str, dict[str, Any]] = {}
    # Other versions of JAX may give other numbers: those are measured anew.
    if not again and (saved := earlier(file, result, ("versions", "seeds"), "settings")):
        result |= {key: saved[key] for key in ("date", "commit", "device")}
        kept = {entry["setting"]["name"]: entry for entry in saved["settings"]}
    done: list[dict[str, Any]] = []
    with Progress("bench convergence", len(settings) * len(policies), "policies") as progress:
        for setting in settings:
            entry = kept.get(setting.name)
            if entry and [run["policy"] for run in entry["runs"]] == [p.name for p in policies]:
                progress.advance(len(policies), f"{setting.name}: kept")
            else:
                advance = partial(progress.advance, 1, setting.name)
                entry = measure(setting, policies, seeds, advance)
            done.append(entry)
            # Those that come later stay in the file while one before them is measured.
            kept[setting.name] = entry
            known = [kept[of.name] for of in settings if of.name in kept]
            save(file, result | {"settings": known})
            # A process may map only so many pieces of memory, and every program keeps some.
            jax.clear_caches()
    print(f"{summary_table(done)}\n\n{settings_table(done)}\n\n{rarest_table(done)}\n")
    print(f"{file} written")


def measure(
    setting: Setting,
    policies: Sequence[Policy],
    seeds: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """The numbers that each way to choose λ reaches, one for each seed."""
    begun, split, runs = time.perf_counter(), split_of(setting.data), []
    keys = jax.random.split(jax.random.key(1), seeds)
    for policy in policies:
        lam = policy.over(setting.steps)
        params, shares = trained(setting, split.classes, policy.margin, split.train, lam, keys)
        labels = split.test[1]
        answers = features_and_answers(setting, policy.margin, params, split)[1]
        wrong = 100.0 * np.asarray(answers != labels)
        numbers = {
            "errors": wrong.mean(axis=1),  # on the test rows, %
            "rarest": wrong[:, labels >= split.classes - 3].mean(axis=1),  # of the last classes
            "shares": shares,
        }
        rounded = {name: np.round(of, 4).tolist() for name, of in numbers.items()}
        margin = policy.margin if isinstance(policy.margin, int) else str(policy.margin)
        runs.append({"policy": policy.name, "margin": margin} | rounded)
        advance()
    return {
        "setting": setting._asdict(),
        "seconds": round(time.perf_counter() - begun, 1),
        "load": round(os.getloadavg()[0], 1),
        "runs": runs,
    }


# Training.


class Network(linen.Module):
    """A multilayer perceptron or a small convolutional network under our head."""

    setting: Setting
    classes: int
    margin: int | Margin

    def setup(self) -> None:
        if self.setting.convolutional:
            self.lower: Any = [linen.Conv(filters, (3, 3), 2) for filters in (8, 16)]
        else:
            self.lower = [linen.Dense(128)]
        self.last = linen.Dense(self.setting.feature)
        self.head = LSoftmaxDense(self.classes, margin=self.margin)

    def features(self, inputs: jax.Array, seen: jax.Array | None = None) -> jax.Array:
        """Features; batch normalisation takes its statistics from `seen`, by default `inputs`."""
        x = self.unnormalised(inputs)
        if not self.setting.batch_norm:
            return x
        like = x if seen is None else self.unnormalised(seen)
        mean, variance = like.mean(axis=0, keepdims=True), like.var(axis=0, keepdims=True)
        return jax.nn.standardize(x, 0, mean, variance)

    def unnormalised(self, inputs: jax.Array) -> jax.Array:
        x = inputs.reshape(-1, 8, 8, 1) if self.setting.convolutional else inputs
        for layer in self.lower:
            x = linen.relu(layer(x))
        x = self.last(x.reshape(len(x), -1))
        return linen.relu(x) if self.setting.relu else x

    def __call__(
        self, inputs: jax.Array, seen: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Features, and logits without a margin."""
        features = self.features(inputs, seen)
        return features, self.head(features)

    def loss(
        self, inputs: jax.Array, labels: jax.Array, lam: jax.Array | SelfPaced
    ) -> tuple[jax.Array, jax.Array]:
        """The mean loss, and the mean share of the margin."""
        features, counts = self.features(inputs), None
        if self.setting.masked:
            counts = jnp.arange(self.setting.batch) >= self.setting.masked
            labels = jnp.where(counts, labels, (labels + 1) % self.classes)
        loss, seen = self.head.loss_and_statistics(features, labels, lam, where=counts)
        share = jnp.broadcast_to(1 / (1 + seen.lam), loss.shape)
        return loss.mean(where=counts), share.mean(where=counts)


# Most programs run briefly: on a CPU, compiling with fewer optimizations halves the whole time.
QUICKLY = {"xla_backend_optimization_level": "1"}


@partial(
    jax.jit,
    static_argnames=("setting", "classes", "margin"),
    compiler_options=QUICKLY,
)
def trained(
    setting: Setting,
    classes: int,
    margin: int | Margin,
    train: tuple[jax.Array, jax.Array],
    lam: SelfPaced | jax.Array,
    keys: jax.Array,
) -> tuple[Any, jax.Array]:
    """Trains a network for every key.

    Args:
      setting, classes, margin: what is trained.
      train: inputs (rows, D) and labels (rows,).
      lam: a rule, or (steps,) λ of every update.
      keys: (seeds,), which draw parameters and batches.

    Returns:
      parameters and the share of the margin, the mean over the examples of all updates, with a
      leading axis of seeds.
    """
    network, (inputs, labels) = Network(setting, classes, margin), train
    rate, steps = setting.rate, setting.steps
    decreasing = optax.cosine_decay_schedule(rate, steps) if setting.cosine else rate
    optimizer = OPTIMIZERS[setting.optimizer](decreasing)

    def run(key: jax.Array) -> tuple[Any, jax.Array]:
        def update(carry: Any, at: Any) -> tuple[Any, jax.Array]:
            (params, state), (rows, lam) = carry, at
            seen = inputs[rows], labels[rows], lam
            grads, share = jax.grad(network.apply, has_aux=True)(params, *seen, method="loss")
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), share

        first, second = jax.random.split(key)
        params = network.init(first, inputs[:1])
        rows = jax.random.randint(second, (steps, setting.batch), 0, len(inputs))
        (params, _), shares = jax.lax.scan(update, (params, optimizer.init(params)), (rows, lam))
        return params, shares.mean()

    # Seeds train one after the other: on a CPU that is faster than under vmap.
    return jax.lax.map(run, keys)


def features_and_answers(
    setting: Setting, margin: int | Margin, params: Any, split: Split
) -> tuple[jax.Array, jax.Array]:
    """Test features (seeds, rows, D), and the classes that the heads answer (seeds, rows)."""
    return _answers(setting, split.classes, margin, params, split.test[0], split.train[0])


@partial(jax.jit, static_argnames=("setting", "classes", "margin"), compiler_options=QUICKLY)
def _answers(
    setting: Setting,
    classes: int,
    margin: int | Margin,
    params: Any,
    inputs: jax.Array,
    seen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    network = Network(setting, classes, margin)

    def of(params: Any) -> Any:
        found: Any = network.apply(params, inputs, seen)
        features, logits = found
        return features, logits.argmax(axis=-1)

    return jax.vmap(of)(params)


def split_of(data: Data) -> Split:
    """Training and test rows, the same in every call; only training rows are spoilt."""
    # scikit-learn takes seconds to import, for which no other command should wait.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    rng = np.random.default_rng(0)
    if data.identities:
        centres = rng.normal(size=(data.identities, data.dim))

        def drawn(each: int) -> tuple[NDArray, NDArray]:
            labels = np.repeat(np.arange(data.identities), each)
            around = data.spread * rng.normal(size=(len(labels), data.dim))
            return (centres[labels] + around).astype(np.float32), labels

        return Split(drawn(40), drawn(10), data.identities)
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    inputs, test_inputs, labels, test_labels = train_test_split(
        images, labels, test_size=0.3, random_state=0, stratify=labels
    )
    kept = rng.random(len(labels)) < data.rarest ** (labels / 9)
    inputs, labels = inputs[kept], labels[kept]
    redrawn = rng.random(len(labels)) < data.noise
    labels = np.where(redrawn, rng.integers(0, 10, len(labels)), labels)
    return Split((inputs, labels), (test_inputs, test_labels), 10)


# Tables. Arrays are (settings, policies, seeds); softmax is the first policy.


def array(entries: list[dict[str, Any]], number: str = "errors") -> NDArray:
    return np.array([[run[number] for run in entry["runs"]] for entry in entries])


def collapsed(errors: NDArray) -> NDArray:
    """The number of collapsed runs, (settings, policies)."""
    softmax = errors[:, :1].mean(axis=2, keepdims=True)
    return np.sum(errors > softmax + COLLAPSED, axis=2)


def above_softmax(errors: NDArray) -> NDArray:
    """Mean error in points above softmax's, (settings, policies)."""
    means = errors.mean(axis=2)
    return (means - means[:, :1]).round(6)


def titles(entries: list[dict[str, Any]]) -> list[str]:
    """Titles of the policies in Markdown."""
    named = [(run["policy"], run["margin"]) for run in entries[0]["runs"]]
    several = {name for name, m in named if isinstance(m, int) and m != DEFAULT.margin}
    return [
        (f"`{name}`" if "(" in name else name) + (f", m = {margin}" if name in several else "")
        for name, margin in named
    ]


def summary_table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row a way to choose λ, over all settings."""
    errors, shares = array(entries), array(entries, "shares").mean(axis=(0, 2))
    lost, above, runs = collapsed(errors).sum(axis=0), above_softmax(errors), errors[:, 0].size
    rows = [
        [
            title,
            f"{lost[i]} of {runs:,}",
            f"{errors[:, i].mean():.2f}",
            f"{np.sum(above[:, i] <= 0)} of {len(errors)}" if i else "",
            f"{above[:, i].max():.2f}" if i else "",
            f"{shares[i]:.3f}",
        ]
        for i, title in enumerate(titles(entries))
    ]
    header = ["λ", "collapsed runs", "mean test error, %", "no worse than softmax"]
    return markdown([*header, "most above softmax", "mean share"], rows)


def settings_table(entries: list[dict[str, Any]]) -> str:
    """Markdown: a row a setting; softmax's mean error and what the others add to it.

    Collapsed runs stand in parentheses. The last column is the share of the default, if the
    default was run.
    """
    errors, shares = array(entries), array(entries, "shares").mean(axis=2)
    lost, above = collapsed(errors), above_softmax(errors)
    named = [(run["policy"], run["margin"]) for run in entries[0]["runs"]]
    default = [i for i, of in enumerate(named) if of == (DEFAULT.name, DEFAULT.margin)]
    rows = []
    for i, entry in enumerate(entries):
        cells = [f"{errors[i, 0].mean():.2f}", *(f"{points:+.2f}" for points in above[i, 1:])]
        cells = [f"{cell} ({n})" if n else cell for cell, n in zip(cells, lost[i], strict=True)]
        star = "" if entry["setting"]["apart"] else " *"
        share = [f"{of:.3f}" for of in shares[i, default]]
        rows.append([entry["setting"]["name"] + star, *cells, *share])
    header = ["setting", "softmax, %", *titles(entries)[1:], *["share" for _ in default]]
    return markdown(header, rows)


def rarest_table(entries: list[dict[str, Any]]) -> str:
    """Markdown: the error of the three rarest classes, where classes are not even."""
    uneven = [entry for entry in entries if Data(*entry["setting"]["data"]).rarest < 1]
    rarest = [array([entry], "rarest")[0].mean(axis=1) for entry in uneven]
    rows = [
        [entry["setting"]["name"], *(f"{error:.1f}" for error in errors)]
        for entry, errors in zip(uneven, rarest, strict=True)
    ]
    return markdown(["rarest three classes, error in %", *titles(entries)], rows)
