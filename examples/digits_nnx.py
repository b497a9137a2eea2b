"""Handwritten digits with Flax NNX: softmax and L-Softmax differ in the head's two lines.

    pip install . scikit-learn   # in a clone: nothing is published yet
    python examples/digits_nnx.py

It prints the mean error of five seeds on 540 test digits, after half a minute on two CPU cores:

    softmax              test error 1.93 %
    L-Softmax, m = 4     test error 1.74 %

This is one setting; `python -m experiments bench convergence` measures many.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from lsoftmax_jax.nnx import LSoftmaxDense

STEPS, BATCH, SEEDS = 1000, 128, 5


class Network(nnx.Module):
    def __init__(self, margin: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 32, rngs=rngs)
        self.head = LSoftmaxDense(32, 10, margin=margin, rngs=rngs)  # was nnx.Linear, no bias

    def __call__(self, images: jax.Array) -> jax.Array:
        return nnx.relu(self.second(nnx.relu(self.first(images))))


@nnx.jit
def update(model: Network, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> None:
    def mean_loss(model: Network) -> jax.Array:
        return model.head.loss(model(images), labels).mean()  # was Optax's cross-entropy

    optimizer.update(model, nnx.grad(mean_loss)(model))


def test_error(margin: int, seed: int) -> float:
    """Trains a network; returns the error on the test digits in %."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(
        (images / 16).astype(np.float32), labels, test_size=0.3, random_state=0, stratify=labels
    )
    images, test_images, labels, test_labels = map(jnp.asarray, split)
    model = Network(margin, nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = rng.integers(len(images), size=BATCH)
        update(model, optimizer, images[rows], labels[rows])
    logits = model.head(model(test_images))  # without labels: features @ kernel
    return float(100 * jnp.mean(jnp.argmax(logits, axis=-1) != test_labels))


if __name__ == "__main__":
    for title, margin in {"softmax": 1, "L-Softmax, m = 4": 4}.items():
        errors = [test_error(margin, seed) for seed in range(SEEDS)]
        print(f"{title:20} test error {np.mean(errors):.2f} %")
