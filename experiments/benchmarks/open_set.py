"""What a margin does for classes that training never sees: `python -m experiments bench open-set`.

A small network learns some of the classes of a task. Its error is that of the same classes in new
examples; verification takes all pairs of examples of the other classes.
"""

import operator
import os
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

import lsoftmax_jax as lsm
from experiments.benchmarks.convergence import Policy, constant, released, scheduled
from experiments.benchmarks.frozen import frozen, grey_faces, whitened
from experiments.benchmarks.records import OUT, earlier, heading
from experiments.benchmarks.tables import markdown
from experiments.paper.data import load
from experiments.paper.style import LOSSES, STYLE, write
from experiments.store.progress import Progress
from experiments.store.results import save
from lsoftmax_jax import verification
from lsoftmax_jax.linen import LSoftmaxDense
from lsoftmax_jax.margins import ArcFace, CosFace, Margin, NormFace
from lsoftmax_jax.schedule import SelfPaced

SEEDS = 3  # a split
BATCH, RATE = 128, 0.1

Name = Literal["digits", "identities", "lfw", "cifar100"]


class Task(NamedTuple):
    """How examples are divided, and what is trained on them."""

    title: str
    trained: int  # classes; the others are unseen
    held: int  # examples a trained class, for its error
    pairs: int  # at most so many examples an unseen class, for all pairs
    splits: int  # how often other classes are drawn
    steps: int
    feature: int
    hidden: int = 0  # units of a first layer, 0 for none
    dropout: float = 0.0  # of the inputs
    whitening: tuple[int, float] | None = None  # components and floor


TASKS: dict[str, Task] = {
    "digits": Task("digits, 7 of 10 classes", 7, 54, 174, 6, 800, 64, 256),
    "identities": Task("drawn identities, 200 of 300", 200, 10, 15, 3, 800, 64, 256),
    "lfw": Task("LFW, 400 of 610 people", 400, 1, 10, 3, 800, 128, 0, 0.5, (400, 1.0)),
    "cifar100": Task(
        "CIFAR100, 50 of 100 classes", 50, 100, 50, 3, 1500, 64, 256, 0.0, (256, 0.05)
    ),
}


# Softmax has two weight decays because the rule has two strengths.
POLICIES = (
    Policy("softmax", constant(jnp.inf)),
    Policy("softmax, decay 0.002", constant(jnp.inf), decay=2e-3),
    Policy("self_paced()", lsm.self_paced()),
    Policy("self_paced(1.0)", lsm.self_paced(1.0)),
    Policy("margin_schedule(steps)", scheduled),
    Policy("released, minimum 5", partial(released, minimum=5.0)),
    Policy("released, minimum 10", partial(released, minimum=10.0)),
    Policy("released, minimum 20", partial(released, minimum=20.0)),
    Policy("NormFace(scale=16)", constant(0.0), NormFace(scale=16.0)),
    Policy("CosFace(0.35, scale=16)", constant(0.0), CosFace(0.35, scale=16.0)),
    Policy("CosFace(0.35, scale=32)", constant(0.0), CosFace(0.35, scale=32.0)),
    Policy("ArcFace(0.5, scale=16)", constant(0.0), ArcFace(0.5, scale=16.0)),
    Policy("ArcFace(0.5, scale=32)", constant(0.0), ArcFace(0.5, scale=32.0)),
)


class Split(NamedTuple):
    """Inputs (rows, D) and labels (rows,) of classes that are trained, twice, and of others."""

    train: tuple[NDArray, NDArray]
    test: tuple[NDArray, NDArray]
    unseen: tuple[NDArray, NDArray]


def bench(
    tasks: tuple[Name, ...] = ("digits", "identities"),
    data: Path | None = None,
    faces: Path | None = None,
    quick: bool = False,
    again: bool = False,
    out: Path = OUT,
) -> None:
    """Trains every task with every margin; prints a table, draws a picture.

    An interrupted benchmark continues where it stopped. A task that is added later joins the same
    result.

    Args:
      tasks: digits and identities need no data, lfw needs --faces and cifar100 --data.
      data: folder of CIFAR100, as cifar100.npz or of TFDS; by default TFDS_DATA_DIR or
        ~/tensorflow_datasets.
      faces: folder of LFW, person/image.jpg.
      quick: run one split of a few updates with two policies, to see that it works.
      again: start over even if there is a result.
      out: folder of the result and the picture.
    """
    if "lfw" in tasks and faces is None:
        raise ValueError("open-set: lfw needs --faces, a folder of person/image.jpg")
    file = out / f"open-set{'-quick' * quick}-{jax.default_backend()}.json"
    words = ["python -m experiments bench open-set --tasks", *tasks, *["--quick"] * quick]
    result = heading("bench open-set", " ".join(words))
    runs: list[dict[str, Any]] = []
    # Other versions may give other numbers, another commit does not.
    if not again and (saved := earlier(file, result, ("versions",), "runs")):
        result |= {key: saved[key] for key in ("date", "commit", "device")}
        runs = saved["runs"]
    done = {(run["task"], run["split"], run["policy"]) for run in runs}
    policies, seeds = (POLICIES[:3:2], 2) if quick else (POLICIES, SEEDS)
    for name in tasks:
        task = TASKS[name]._replace(splits=1, steps=20) if quick else TASKS[name]
        title, count = f"bench open-set, {name}", task.splits * len(policies)
        left = [
            (number, policy)
            for number in range(task.splits)
            for policy in policies
            if (name, number, policy.name) not in done
        ]
        pool = pool_of(name, data, faces) if left else None
        with Progress(title, count, "policies", count - len(left)) as progress:
            for number, policy in left:
                assert pool is not None
                found = measure(task, split_of(pool, task, number), policy, seeds)
                runs.append({"task": name, "split": number, "policy": policy.name} | found)
                save(file, result | {"runs": runs})
                progress.advance(1, f"split {number + 1}, {policy.name}")
    print(results_table(runs))
    print(f"{file} and {draw(runs, file.with_suffix('.png'))} written")


# Data.


def pool_of(name: Name, data: Path | None, faces: Path | None) -> tuple[NDArray, NDArray]:
    """Inputs and labels of all classes of a task."""
    if name == "digits":
        # scikit-learn takes seconds to import, for which no other command should wait.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        rows = np.concatenate([np.flatnonzero(labels == digit)[:174] for digit in range(10)])
        return (images[rows] / 16).astype(np.float32), labels[rows]
    if name == "identities":
        return identities(np.random.default_rng(0), TASKS[name].trained + 100, 30)
    if name == "cifar100":
        images, labels = load("cifar100", data).train
    else:
        assert faces is not None
        images, labels = grey_faces(faces, 4, 40)
    return frozen(images), labels


def identities(rng: np.random.Generator, people: int, each: int) -> tuple[NDArray, NDArray]:
    """Points around drawn centres, through a fixed network, with some noise."""
    first, second = rng.normal(size=(24, 96)) / np.sqrt(24), rng.normal(size=(96, 64)) / np.sqrt(96)
    labels = np.repeat(np.arange(people), each)
    points = rng.normal(size=(people, 24))[labels] + 0.8 * rng.normal(size=(len(labels), 24))
    inputs = np.tanh(1.5 * points @ first) @ second + 0.05 * rng.normal(size=(len(labels), 64))
    return (inputs / inputs.std()).astype(np.float32), labels


def split_of(pool: tuple[NDArray, NDArray], task: Task, number: int) -> Split:
    """The classes of a number, the same in every call; trained labels count from 0."""
    rng, (inputs, labels) = np.random.default_rng(number), pool
    order = rng.permutation(np.unique(labels))
    rows = [rng.permutation(np.flatnonzero(labels == label)) for label in order]
    train = [of[task.held :] for of in rows[: task.trained]]
    test = [of[: task.held] for of in rows[: task.trained]]
    unseen = [of[: task.pairs] for of in rows[task.trained :]]
    if task.whitening is not None:
        inputs = whitened(inputs, inputs[np.concatenate(train)], *task.whitening)

    def part(lists: list[NDArray]) -> tuple[NDArray, NDArray]:
        sizes = [len(of) for of in lists]
        return inputs[np.concatenate(lists)], np.repeat(np.arange(len(lists)), sizes)

    return Split(part(train), part(test), part(unseen))


# Training.


class Network(linen.Module):
    """One or two layers with batch normalisation, under our head."""

    classes: int
    margin: int | Margin
    feature: int
    hidden: int

    def setup(self) -> None:
        self.first, self.last = linen.Dense(max(self.hidden, 1)), linen.Dense(self.feature)
        # Without momentum the statistics are of the last batch, which is the whole training set.
        self.norms = [linen.BatchNorm(momentum=0.0) for _ in range(2)]
        self.slope = linen.PReLU()
        self.head = LSoftmaxDense(self.classes, margin=self.margin)

    def features(self, inputs: jax.Array, train: bool = False) -> jax.Array:
        x = inputs
        if self.hidden:
            x = linen.relu(self.norms[0](self.first(x), use_running_average=not train))
        return self.slope(self.norms[1](self.last(x), use_running_average=not train))

    def features_and_logits(
        self, inputs: jax.Array, train: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        features = self.features(inputs, train)
        return features, self.head(features)

    def loss(
        self, inputs: jax.Array, labels: jax.Array, lam: jax.Array | SelfPaced
    ) -> tuple[jax.Array, jax.Array]:
        """The mean loss, and the mean share of the margin."""
        features = self.features(inputs, train=True)
        losses, seen = self.head.loss_and_statistics(features, labels, lam)
        return losses.mean(), (1 / (1 + seen.lam)).mean()


class Trained(NamedTuple):
    """What measuring needs of a network, with a leading axis of seeds."""

    kernel: jax.Array  # (D, classes), the head's
    features: list[jax.Array]  # (rows, D) of training, test and unseen examples
    classes: list[jax.Array]  # (rows,), the head's answers
    share: jax.Array  # 1 / (1 + λ), mean over all updates


@partial(jax.jit, static_argnames=("task", "margin"))
def trained(
    task: Task,
    margin: int | Margin,
    split: Split,
    lam: SelfPaced | jax.Array,
    decay: jax.Array,
    keys: jax.Array,
) -> Trained:
    """Trains a network for every key.

    Args:
      task, margin: what is trained.
      split: the examples.
      lam: a rule, or (steps,) λ of every update.
      decay: weight decay of kernels.
      keys: (seeds,), which draw parameters, batches and dropout.
    """
    network = Network(task.trained, margin, task.feature, task.hidden)
    inputs, labels = split.train
    third = task.steps // 3
    rates = optax.piecewise_constant_schedule(RATE, {2 * third: 0.1, 5 * third // 2: 0.1})
    optimizer = optax.chain(
        optax.add_decayed_weights(decay, lambda params: jax.tree.map(lambda a: a.ndim > 1, params)),
        optax.sgd(rates, momentum=0.9),
    )

    def run(key: jax.Array) -> Trained:
        first, second = jax.random.split(key)
        variables = network.init(first, inputs[:2], method="features_and_logits")
        stats = variables["batch_stats"]

        def mean_loss(params: Any, key: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
            drawn, dropped = jax.random.split(key)
            rows = jax.random.randint(drawn, (BATCH,), 0, len(labels))
            keep = jax.random.bernoulli(dropped, 1 - task.dropout, (BATCH, inputs.shape[1]))
            batch = inputs[rows] * keep / (1 - task.dropout)
            seen, _ = network.apply(
                {"params": params, "batch_stats": stats},
                batch,
                labels[rows],
                lam,
                method="loss",
                mutable=["batch_stats"],
            )
            return seen

        def update(carry: Any, at: Any) -> tuple[Any, jax.Array]:
            params, state = carry
            grads, share = jax.grad(mean_loss, has_aux=True)(params, *at)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), share

        params = variables["params"]
        each = jax.random.split(second, task.steps), lam
        (params, _), shares = jax.lax.scan(update, (params, optimizer.init(params)), each)
        variables = {"params": params, "batch_stats": stats}
        whole: Any = network.apply(
            variables, inputs, True, method="features_and_logits", mutable=["batch_stats"]
        )[1]
        features, answers = [], []
        for rows, _ in split:
            # Flax types what a method returns as if it might have changed a collection.
            found: Any = network.apply(variables | whole, rows, method="features_and_logits")
            features.append(found[0])
            answers.append(found[1].argmax(axis=-1))
        return Trained(params["head"]["kernel"], features, answers, shares.mean())

    return jax.lax.map(run, keys)


def measure(task: Task, split: Split, policy: Policy, seeds: int) -> dict[str, Any]:
    """Errors, rates and shares in %, angles in degrees, one number a seed."""
    begun = time.perf_counter()
    keys = jax.random.split(jax.random.key(0), seeds)
    lam, decay = policy.over(task.steps), jnp.float32(policy.decay)
    networks = trained(task, policy.margin, split, lam, decay, keys)
    found = [
        numbers(jax.tree.map(operator.itemgetter(seed), networks), split) for seed in range(seeds)
    ]
    return {
        **{name: [round(of[name], 4) for of in found] for name in found[0]},
        "seconds": round(time.perf_counter() - begun, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def numbers(network: Trained, split: Split) -> dict[str, float]:
    """What one network reaches: for trained classes in new examples, and for unseen ones."""
    _, test, unseen = map(np.asarray, network.features)
    wrong = [answers != part[1] for answers, part in zip(network.classes[:2], split, strict=False)]
    pairs = verification.verify(unseen, split.unseen[1])
    known = verification.angles(test, split.test[1], network.kernel)
    others = verification.angles(unseen, split.unseen[1])
    assert known.to_column is not None
    rates: dict[str, Any] = {
        "train_error": wrong[0].mean(),
        "error": wrong[1].mean(),
        "eer": pairs.roc.eer,
        "auc": pairs.roc.auc,
        "tar_at_1e-2": pairs.roc.tar_at(1e-2),
        "tar_at_1e-3": pairs.roc.tar_at(1e-3),
        "rank_1": pairs.rank_1,
        "share": network.share,
    }
    angles = {"to_column": known.to_column, "within": others.within, "between": others.between}
    return {name: 100 * float(rate) for name, rate in rates.items()} | {
        name: float(np.degrees(angle.mean())) for name, angle in angles.items()
    }


# What it comes to.


def over(runs: list[dict[str, Any]], task: str, policy: str, number: str) -> NDArray:
    """A number of a task's policy, of every split and seed."""
    chosen = [run[number] for run in runs if (run["task"], run["policy"]) == (task, policy)]
    return np.concatenate(chosen)


COLUMNS = {
    "error": "error, %",
    "eer": "EER, %",
    "auc": "AUC, %",
    "tar_at_1e-2": "TAR at FAR 1e-2",
    "tar_at_1e-3": "at 1e-3",
    "rank_1": "rank 1, %",
    "to_column": "to column, °",
    "within": "within, °",
    "between": "between, °",
    "share": "share, %",
}


def results_table(runs: list[dict[str, Any]], columns: Mapping[str, str] = COLUMNS) -> str:
    """Markdown: a table a task, a row a policy, means over splits and seeds.

    Args:
      runs: of a result.
      columns: the title of each number.
    """
    tables = []
    for task in TASKS:
        policies = dict.fromkeys(run["policy"] for run in runs if run["task"] == task)
        rows = [
            [shown(policy), *(f"{over(runs, task, policy, of).mean():.1f}" for of in columns)]
            for policy in policies
        ]
        if rows:
            tables.append(markdown([TASKS[task].title, *columns.values()], rows))
    return "\n\n".join(tables)


def shown(policy: str) -> str:
    return f"`{policy}`" if "(" in policy else policy


def draw(runs: list[dict[str, Any]], file: Path) -> Path:
    """Writes the picture: EER of unseen classes against error of trained ones, a point a policy."""
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    policies = dict.fromkeys(run["policy"] for run in runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.4 * len(tasks), 4.2), layout="constrained")
        for panel, task in zip(
            figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True
        ):
            for number, policy in enumerate(policies):
                if any((run["task"], run["policy"]) == (task, policy) for run in runs):
                    error, eer = (over(runs, task, policy, of) for of in ("error", "eer"))
                    # All other policies are L-Softmax.
                    loss = next((of for of in LOSSES if of in policy.lower()), "m4")
                    look = {"marker": "osD^v<>P*Xph8"[number], "color": LOSSES[loss].color}
                    label = policy if task == tasks[0] else None
                    panel.plot(error.mean(), eer.mean(), linestyle="", label=label, **look)
            panel.set(title=TASKS[task].title, xlabel="error of trained classes, %")
            panel.margins(0.1)
        figure.axes[0].set_ylabel("EER of unseen classes, %")
        figure.legend(loc="outside lower center", ncols=max(1, len(tasks)))
        count = {task: len(over(runs, task, "softmax", "eer")) for task in tasks}
        figure.suptitle(
            "means of " + ", ".join(f"{count[task]} networks ({task})" for task in tasks),
            fontsize=8,
        )
        write(figure, file)
    return file
