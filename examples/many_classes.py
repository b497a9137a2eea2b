"""A head with 100,000 classes that never stores the gradient of its kernel.

    pip install .   # in a clone: nothing is published yet
    python examples/many_classes.py

Each class is a random centre, and each example is a centre with noise. `lsoftmax_sgd` computes the
loss, the features' gradient and the kernel's SGD update in blocks of classes. The script prints,
after half a minute on two CPU cores:

    100,000 classes of 128 features: kernel 51 MB, temporary memory of a step 9 MB
    step   0: loss 11.51, accuracy   0 %
    step  10: loss 10.11, accuracy 100 %
    step  20: loss  6.76, accuracy 100 %
"""

import functools

import jax
import jax.numpy as jnp

import lsoftmax_jax as lsm

CLASSES, DIM, BATCH, STEPS = 100_000, 128, 256, 21
SEEN = 64  # classes with examples, few enough for so few steps; all classes compete


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(
    kernel: jax.Array, momentum: jax.Array, centres: jax.Array, key: jax.Array
) -> lsm.SgdStep:
    which, noise = jax.random.split(key)
    labels = jax.random.randint(which, (BATCH,), 0, SEEN)
    features = centres[labels] + 0.3 * jax.random.normal(noise, (BATCH, DIM))
    return lsm.lsoftmax_sgd(
        features,
        kernel,
        momentum,
        labels,
        jnp.full(BATCH, 1 / BATCH),
        margin=2,
        lam=lsm.self_paced(),
        learning_rate=0.02,
        decay=0.9,
    )


def main(steps: int = STEPS) -> list[float]:
    """Trains, and prints some of the steps; returns the accuracy of every step."""
    keys = jax.random.split(jax.random.key(0), steps + 2)
    kernel = 0.01 * jax.random.normal(keys[-1], (DIM, CLASSES))
    centres, momentum = jax.random.normal(keys[-2], (SEEN, DIM)), jnp.zeros_like(kernel)
    compiled = update.lower(kernel, momentum, centres, keys[0]).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes / 1e6
    print(
        f"{CLASSES:,} classes of {DIM} features: kernel {kernel.nbytes / 1e6:.0f} MB, "
        f"temporary memory of a step {temporary:.0f} MB"
    )
    accuracies = []
    for number in range(steps):
        step = compiled(kernel, momentum, centres, keys[number])
        kernel, momentum, seen = step.kernel, step.momentum, step.statistics
        # A network would begin its backward pass with step.dfeatures.
        accuracies.append(float(jnp.mean(seen.plain_logit > seen.max_logit)))
        if number % 10 == 0:
            print(f"step {number:3}: loss {step.loss:5.2f}, accuracy {100 * accuracies[-1]:3.0f} %")
    return accuracies


if __name__ == "__main__":
    main()
