# %% [markdown]
# # A tour of lsoftmax_jax
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/tour.ipynb)
#
# The large-margin softmax loss ([Liu et al., ICML 2016](https://arxiv.org/abs/1612.02295)) asks
# more of a classifier than softmax does: the angle between a feature and its class's column of the
# last layer must be smaller, by a factor m, than would be enough to win. This notebook puts the
# loss into a Flax NNX model and a Linen one, trains the same network with softmax and with
# L-Softmax, and draws what the margin m and the constant λ do.
#
# Every cell uses the library alone and can be copied. On a CPU all of them take a minute.

# %%
# Where the library is installed there is nothing to do. Elsewhere, as in Colab, pip fetches it; the
# runtime's JAX and Flax stay as they are.
import subprocess
import sys
from importlib.util import find_spec

if find_spec("lsoftmax_jax") is None:
    url = "https://github.com/lsoftmax-jax/lsoftmax_jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"git+{url}"], check=True)

# %%
# %matplotlib inline
import platform

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits

import lsoftmax_jax as lsm
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.nnx import LSoftmaxDense

print("devices:", jax.devices())
versions = {m.__name__: m.__version__ for m in (jax, flax, lsm)}
print("Python", platform.python_version(), versions)

# %% [markdown]
# Scikit-learn's embedded digits: 1,797 real scans of 8 x 8 pixels, a quarter of them kept for the
# test.

# %%
digits = load_digits()
order = np.random.default_rng(0).permutation(len(digits.target))
pixels = (digits.data[order] / 8 - 1).astype(np.float32)
images, labels = jnp.asarray(pixels), jnp.asarray(digits.target[order])
test_images, images = images[:450], images[450:]
test_labels, labels = labels[:450], labels[450:]
print("training:", images.shape, "test:", test_images.shape)

# %% [markdown]
# ## The loss
#
# A feature, a label and the kernel of the last layer; no bias. `margin` is m, an integer. `lam` is
# λ: infinity is plain softmax, 0 the full margin.

# %%
features = jnp.array([[2.0, 0.5], [0.3, 1.5]])
for lam in (jnp.inf, 5.0, 0.0):
    loss = lsm.lsoftmax_loss(features, jnp.eye(2, 3), jnp.array([0, 1]), margin=4, lam=lam)
    print(f"λ = {lam}:", loss)

# %% [markdown]
# ## In a Flax NNX model
#
# The head takes the place of the last layer, a bias-free `nnx.Linear`; the model returns features.
# `model.head.loss(features, labels)` is the loss in training. The head chooses λ for each example
# from the example's lead over the nearest other class, so an example that is wrong has no margin.
# `model.head(features)` is a plain matrix product, so inference does not change. A feature has two
# numbers here, to be drawn.


# %%
class Network(nnx.Module):
    def __init__(self, margin, rngs):
        self.first = nnx.Linear(64, 128, rngs=rngs)
        self.second = nnx.Linear(128, 128, rngs=rngs)
        self.feature = nnx.Linear(128, 2, rngs=rngs)
        self.head = LSoftmaxDense(2, 10, margin=margin, rngs=rngs)

    def __call__(self, images):
        return self.feature(nnx.relu(self.second(nnx.relu(self.first(images)))))


@nnx.jit
def update(model, optimizer, images, labels):
    def mean_loss(model):
        loss, seen = model.head.loss_and_statistics(model(images), labels)
        return loss.mean(), seen

    (loss, seen), gradients = nnx.value_and_grad(mean_loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    angle = jnp.degrees(jnp.arccos(jnp.clip(seen.target_cosine, -1, 1)))
    return {"loss": loss, "angle": angle.mean(), "share": jnp.mean(1 / (1 + seen.lam))}


# %% [markdown]
# ## Training with both losses
#
# Network, data, seed and learning rate are the same; the two runs differ in m alone.

# %%
BATCH, EPOCHS = 64, 20
models, curves = {}, {}
for title, margin in (("softmax", 1), ("L-Softmax, m = 4", 4)):
    model = Network(margin, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    shuffles, seen = np.random.default_rng(1), []
    for _ in range(EPOCHS):
        epoch = shuffles.permutation(len(labels))
        for rows in epoch[: len(epoch) // BATCH * BATCH].reshape(-1, BATCH):
            seen.append(update(model, optimizer, images[rows], labels[rows]))
    models[title] = model
    curves[title] = {name: np.array([float(s[name]) for s in seen]) for name in seen[0]}


# %%
def tested(model):
    """Error of the test images in percent, mean angle to the label's column in degrees."""
    features = model(test_images)
    _, seen = model.head.loss_and_statistics(features, test_labels)
    error = 100 * float(jnp.mean(seen.plain_logit <= seen.max_logit))
    return error, float(jnp.degrees(jnp.arccos(jnp.clip(seen.target_cosine, -1, 1))).mean())


results = {title: tested(model) for title, model in models.items()}
for title, (error, angle) in results.items():
    print(f"{title:17} test error {error:.1f} %, angle to the label's column {angle:.1f} degrees")

# %% [markdown]
# The features of the test images: every dot is an image, every line the direction of a column of
# the head's kernel. With the margin the classes are narrower. Whether this helps to compare classes
# that training never sees is another question, which the guide answers. One seed shows the angles;
# it does not settle which error is lower.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 5))
for axis, (title, model) in zip(axes, models.items(), strict=True):
    points = np.asarray(model(test_images))
    reach = np.quantile(np.linalg.norm(points, axis=1), 0.99)
    columns = np.asarray(model.head.kernel[...])
    for x, y in (reach * columns / np.linalg.norm(columns, axis=0)).T:
        axis.plot([0, x], [0, y], color="0.8", zorder=0)
    axis.scatter(*points.T, c=np.asarray(test_labels), cmap="tab10", s=6)
    axis.set(title=title, aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
plt.show()

# %% [markdown]
# The same runs, update by update: the angle, and the share of the margin, 1 / (1 + λ). The loss
# of L-Softmax asks for more, so its value is not comparable with that of softmax; error and angle
# are.

# %%
figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
for title, curve in curves.items():
    axes[0].plot(curve["angle"], label=title)
axes[1].plot(curves["L-Softmax, m = 4"]["share"], color="C1")
axes[0].set(xlabel="update", ylabel="angle, degrees")
axes[1].set(xlabel="update", ylabel="share of the margin", ylim=(0, 1))
axes[0].legend()
plt.show()

# %% [markdown]
# ## In a Flax Linen model
#
# `lsoftmax_jax.linen.LSoftmaxDense` has the same parameter, `kernel`, and gives the same numbers.


# %%
class LinenNetwork(linen.Module):
    def setup(self):
        self.first, self.feature = linen.Dense(128), linen.Dense(64)
        self.head = LinenHead(classes=10, margin=4)

    def __call__(self, images):
        return self.head(self.features(images))

    def features(self, images):
        return self.feature(linen.relu(self.first(images)))

    def loss(self, images, labels):
        return self.head.loss(self.features(images), labels).mean()


network = LinenNetwork()
params = network.init(jax.random.key(0), images)
adam = optax.adam(3e-3)
state = adam.init(params)


@jax.jit
def linen_update(params, state):
    loss, gradients = jax.value_and_grad(network.apply)(params, images, labels, method="loss")
    updates, state = adam.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss


linen_losses = []
for _ in range(20):
    params, state, loss = linen_update(params, state)
    linen_losses.append(float(loss))
print("loss of twenty updates:", np.round(linen_losses, 2))

# %% [markdown]
# ## What the margin does
#
# The logit of a class is |w||x| cos θ, w its column, x the feature. For the label's class L-Softmax
# replaces cos θ by ψ(θ), which is cos mθ until θ = 180° / m and goes on falling from there. Never
# above cos θ, it asks for a smaller angle. On the right, what λ does: the label's logit is
# (λ |w||x| cos θ + |w||x| ψ(θ)) / (1 + λ). As λ falls, the curve goes from cos θ to ψ.
# [How it works](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/how-it-works.md).
# [Choosing m and λ](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/margin-and-lambda.md).

# %%
theta = np.linspace(0, 180, 400)
cosine = jnp.cos(jnp.radians(theta))
figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
for margin in (1, 2, 3, 4):
    axes[0].plot(theta, lsm.psi(cosine, margin), label=f"m = {margin}")
for lam in (100.0, 5.0, 1.0, 0.0):
    mixed = (lam * cosine + lsm.psi(cosine, 4)) / (1 + lam)
    axes[1].plot(theta, mixed, label=f"m = 4, λ = {lam:g}")
for axis in axes:
    axis.set(xlabel="θ, degrees")
    axis.legend()
axes[0].set(ylabel="what stands for cos θ")
plt.show()

# %% [markdown]
# ## The accuracy to report
#
# A margin logit is lower by design. Its argmax calls images wrong that the model gets right, so
# report the margin-free accuracy: the argmax of the plain logits, which is what inference uses.
# `loss_and_statistics` returns what it needs beside the loss.

# %%
model = models["L-Softmax, m = 4"]
features = model(images)
_, seen = model.head.loss_and_statistics(features, labels)
with_labels = jnp.argmax(model.head(features, labels, 0.0), axis=-1)
margin_free = float(jnp.mean(seen.plain_logit > seen.max_logit))
with_margin = float(jnp.mean(with_labels == labels))
print(f"training images, margin-free accuracy:   {100 * margin_free:.1f} %")
print(f"training images, argmax with the margin: {100 * with_margin:.1f} %")

# %% [markdown]
# ## From here
#
# - [When training diverges](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/diverging.md)
# - [Fine-tuning a softmax model](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/fine-tuning.md)
# - [Inference and export](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/export.md)
# - [Training on all devices](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/devices.ipynb)
# - [Reproducing a number of the paper](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/reproduce.ipynb)
# - [Verifying faces](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/faces.ipynb)
