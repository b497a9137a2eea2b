"""Partial FC: how much accuracy it costs if every device samples its own classes.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python examples/partial_fc.py

Every device draws 10, 20 or 50 % of its classes beside those of the labels, or takes all. 42 runs
print the error on 2,000 identities and the EER of 300 unseen ones: docs/guide/many-classes.md.
"""

import itertools
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lsoftmax_jax as lsm
from lsoftmax_jax.margins import CosFace, LSoftmax, Margin
from lsoftmax_jax.nnx import LSoftmaxDense

TRAINED, UNSEEN, EACH, HELD, SEEDS = 2000, 300, 24, 4, 3
STEPS, BATCH, RATE = 1500, 256, 0.1
MARGINS = (LSoftmax(4), CosFace(0.35, scale=32.0))


def identities(rng: np.random.Generator) -> Any:
    """Noisy points around random centres, seen through a fixed network: (people, EACH, 64)."""
    first, second = rng.normal(size=(24, 96)) / 24**0.5, rng.normal(size=(96, 64)) / 96**0.5
    centres = rng.normal(size=(TRAINED + UNSEEN, 1, 24))
    points = centres + 0.8 * rng.normal(size=(len(centres), EACH, 24))
    inputs = np.tanh(1.5 * points @ first) @ second
    inputs += 0.05 * rng.normal(size=inputs.shape)
    return jnp.asarray(inputs / inputs.std(), jnp.float32)


class Network(nnx.Module):
    def __init__(self, margin: Margin, layout: lsm.ClassParallel, rngs: nnx.Rngs) -> None:
        norms = [nnx.BatchNorm(size, momentum=0.9, rngs=rngs) for size in (256, 64)]
        self.body = nnx.Sequential(
            *(nnx.Linear(64, 256, rngs=rngs), norms[0], nnx.relu),
            *(nnx.Linear(256, 64, rngs=rngs), norms[1]),
        )
        self.head = LSoftmaxDense(64, TRAINED, margin=margin, layout=layout, rngs=rngs)

    def losses(self, inputs: Any, labels: Any, key: Any, share: float, corrected: bool) -> Any:
        features, head = self.body(inputs), self.head
        if share == 1:
            return head.loss(features, labels)
        drawn = {"negatives": int(share * TRAINED), "corrected": corrected}
        sample = lsm.sample_classes(key, labels, TRAINED, **drawn, layout=head.layout)
        columns = lsm.sampled.take_columns(head.kernel[...], sample, layout=head.layout)
        # The head's own default: a margin with a scale needs no annealing.
        lam = lsm.self_paced() if head.margin.scale is None else 0.0
        settings = {"margin": head.margin, "lam": lam, "layout": head.layout}
        return lsm.lsoftmax_sampled_loss(features, columns, sample, **settings)


@partial(nnx.jit, static_argnames=("share", "corrected"))
def update(
    model: Network, optimizer: nnx.Optimizer, inputs: Any, key: Any, share: float, corrected: bool
) -> Any:
    which, example, drawn = jax.random.split(key, 3)
    labels = jax.random.randint(which, (BATCH,), 0, TRAINED)
    batch = inputs[labels, jax.random.randint(example, (BATCH,), HELD, EACH)]

    def mean(model: Network) -> Any:
        return model.losses(batch, labels, drawn, share, corrected).mean()

    optimizer.update(model, nnx.grad(mean)(model))
    return model.head.kernel[...].sum()


def train(margin: Margin, share: float, corrected: bool, seed: int) -> dict[str, float]:
    inputs = identities(np.random.default_rng(seed))
    mesh = jax.make_mesh((jax.device_count(),), ("model",))
    model = Network(margin, lsm.ClassParallel("model", mesh=mesh), nnx.Rngs(seed))
    rate = optax.piecewise_constant_schedule(RATE, {STEPS // 2: 0.1, 5 * STEPS // 6: 0.1})
    rule = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9))
    optimizer = nnx.Optimizer(model, rule, wrt=nnx.Param)
    for key in jax.random.split(jax.random.key(seed), STEPS):
        seen = update(model, optimizer, inputs, key, share, corrected)
        seen.block_until_ready()  # CPU devices may hang with many updates in flight
    model.eval()
    embed = nnx.jit(lambda model, x: model.body(x))
    held = embed(model, inputs[:TRAINED, :HELD].reshape(-1, 64))
    wrong = model.head(held).argmax(axis=-1) != np.repeat(np.arange(TRAINED), HELD)
    unseen = np.asarray(embed(model, inputs[TRAINED:].reshape(-1, 64)))
    pairs = lsm.verification.verify(unseen, np.repeat(np.arange(UNSEEN), EACH))
    return {"error": round(100 * float(wrong.mean()), 2), "eer": round(100 * pairs.roc.eer, 3)}


if __name__ == "__main__":
    arms = [(1.0, True), *itertools.product((0.1, 0.2, 0.5), (True, False))]
    for seed, margin, (share, corrected) in itertools.product(range(SEEDS), MARGINS, arms):
        facts = {"margin": repr(margin), "seed": seed, "classes": share, "corrected": corrected}
        print(json.dumps(facts | train(margin, share, corrected, seed)), flush=True)
