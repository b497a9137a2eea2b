# %% [markdown]
# # A tour of lsoftmax_jax
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/tour.ipynb)
#
# The large-margin softmax loss ([Liu et al., ICML 2016](https://arxiv.org/abs/1612.02295)) asks
# more of a classifier than softmax does: the angle between a feature and its class's column of the
# last layer must be smaller, by a factor m, than would be enough to win. This notebook puts the
# loss into a Flax NNX model and a Linen one, trains the same network with softmax and with
# L-Softmax, and draws what the margin m and the annealing constant λ do.
#
# On a CPU it takes about a minute. It uses a GPU or TPU where the runtime has one.

# %%
# In a clone there is nothing to install. Elsewhere, as in Colab, this fetches one; the runtime's
# JAX stays if it is new enough. Should Colab ask for a restart, restart and run this again.
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("experiments") is None:
    clone = Path("lsoftmax_jax").absolute()
    if not clone.exists():
        url = "https://github.com/lsoftmax-jax/lsoftmax_jax"
        subprocess.run(["git", "clone", "--depth", "1", url, str(clone)], check=True)
    subprocess.run([sys.executable, str(clone / "scripts" / "install.py")], check=True)
    sys.path.insert(0, str(clone))

# %%
# %matplotlib inline
from dataclasses import replace

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from flax.nnx import bridge

import lsoftmax_jax as lsm
import lsoftmax_jax.linen
from experiments import quickstart
from experiments.paper import data
from experiments.paper import networks as models
from experiments.paper.cells import CONFIGS
from experiments.report import figures, pictures
from experiments.report.features import features_figure
from experiments.report.style import STYLE
from experiments.run import train

mpl.rcParams.update(STYLE | {"figure.dpi": 140})
OUT = Path("out") / "tour"  # results, checkpoints, logs
ON_ACCELERATOR = jax.default_backend() != "cpu"
print(jax.devices())

# %% [markdown]
# MNIST is trained on where it is prepared and there is an accelerator; a CPU takes scikit-learn's
# embedded digits, 1,797 real scans of 8 x 8 pixels. Set `DATA` yourself to choose.

# %%
DATA = "digits"
if ON_ACCELERATOR:
    try:
        data.load("mnist")
        DATA = "mnist"
    except FileNotFoundError as missing:
        print(missing)

if DATA == "mnist":  # the network and batches of the paper's Fig. 2, fewer updates
    RUNS = {
        "softmax": replace(CONFIGS["fig2-m1"], steps=3_000),
        "L-Softmax, m = 4": replace(CONFIGS["fig2-m4"], steps=3_000),
    }
else:
    RUNS = {title: replace(config, steps=300) for title, config in quickstart.RUNS.items()}
print("data:", DATA)

# %% [markdown]
# ## The loss
#
# A feature, a label and the kernel of the last layer; no bias. `margin` is m, an integer. `lam` is
# λ: infinity is plain softmax, 0 the full margin.

# %%
features = jnp.array([[2.0, 0.5], [0.3, 1.5]])
kernel = jnp.eye(2, 3)
labels = jnp.array([0, 1])
for lam in (jnp.inf, 5.0, 0.0):
    print(f"λ = {lam}:", lsm.lsoftmax_loss(features, kernel, labels, margin=4, lam=lam))

# %% [markdown]
# ## In a Flax NNX model
#
# The head, `LSoftmaxDense`, takes the place of the last bias-free `nnx.Linear`. With labels it
# knows the margin; without, it is a plain matrix product, so inference changes in nothing. The
# networks in `experiments.paper.networks` carry it as `model.head`.

# %%
digits = data.load("digits").train
images = data.centred(digits.images[:128], digits.images.mean(axis=0))
labels = jnp.asarray(digits.labels[:128])

network = models.NETWORKS["digits-2d"]
model = models.ConvNet(network, classes=10, margin=4, rngs=nnx.Rngs(0))
print("kernel:", model.head.kernel.shape)


@nnx.jit
def loss_and_logits(model, images, labels, lam):
    features = model(images)
    return model.head.loss(features, labels, lam).mean(), model.head(features)


loss, logits = loss_and_logits(model, images, labels, 5.0)
print("mean loss:", loss, "logits at inference:", logits.shape)

# %% [markdown]
# ## In a Flax Linen model
#
# `lsoftmax_jax.linen.LSoftmaxDense` has the same parameter, `kernel`, and gives the same numbers.
# Here the network above comes to Linen through Flax's bridge.

# %%
linen_network = bridge.to_linen(models.ConvNet, network, 10, margin=4)
linen_head = lsoftmax_jax.linen.LSoftmaxDense(classes=10, margin=4)
variables = linen_network.init(jax.random.key(0), images)
params, statistics = variables["params"], variables["batch_stats"]


@jax.value_and_grad
def mean_loss(params, lam):
    features, _ = linen_network.apply(
        {"params": params, "batch_stats": statistics}, images, mutable=["batch_stats"]
    )
    head_params = {"params": params["head"]}
    return linen_head.apply(head_params, features, labels, lam, method="loss").mean()


optimizer = optax.adam(0.003)
state = optimizer.init(params)


@jax.jit
def update(params, state):
    loss, gradients = mean_loss(params, 5.0)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, loss


linen_losses = []
for _ in range(20):
    params, state, loss = update(params, state)
    linen_losses.append(float(loss))
print("loss of twenty updates:", np.round(linen_losses, 2))

# %% [markdown]
# ## Training with both losses
#
# Network, data and seed are the same; the two runs differ in m alone. λ starts at 1000 and falls:
# the margin comes in slowly, because training from scratch at full margin is apt to fail. The
# accuracy shown is margin-free. A run that was stopped continues where it was.
# [When training diverges](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/diverging.md).

# %%
outcomes = {}
for title, config in RUNS.items():
    outcome = train.run(config, out=OUT)
    if outcome["status"] == "finished":
        outcomes[title] = outcome

# %%
tested = {title: outcome["test"] for title, outcome in outcomes.items()}
quickstart.table(tested)

# %% [markdown]
# The features of the test images. The network's feature has two numbers, so nothing is projected:
# every dot is an image, every line the direction of a kernel column. With the margin the classes
# are narrower, and narrow classes are what face verification and nearest-neighbour search want.
# One seed shows the angles; it does not settle which error is lower.

# %%
features_figure(tested)

# %% [markdown]
# The same runs, update by update. The loss of L-Softmax goes up when the margin comes in: it asks
# for more. Its value is not comparable with that of softmax; error and angle are.

# %%
pictures.training(outcomes)

# %% [markdown]
# ## What the margin does
#
# The logit of a class is |w||x| cos θ, w its column, x the feature. For the label's class L-Softmax
# replaces cos θ by ψ(θ), which is cos mθ until θ = 180° / m and goes on falling from there. Never
# above cos θ, it asks for a smaller angle. [How it works](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/how-it-works.md).

# %%
figures.draw_psi({})

# %% [markdown]
# ## What λ does
#
# The label's logit is (λ |w||x| cos θ + |w||x| ψ(θ)) / (1 + λ). From left to right, λ falls and
# each curve goes from cos θ to ψ. [Choosing m and λ](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/margin-and-lambda.md).

# %%
pictures.targets()

# %% [markdown]
# Two classes in the plane, arrows their columns. Coloured: where a class is ahead although its own
# logit has the margin. White: where neither is, and training goes on. Dashed: the boundary of
# softmax, which also decides at inference.

# %%
pictures.regions()

# %% [markdown]
# ## The accuracy to report
#
# A margin logit is lower by design. Its argmax calls images wrong that the model gets right, so
# report the margin-free accuracy: the argmax of the plain logits, which is what inference uses.
# `lsoftmax_loss(..., statistics=True)` returns what it needs beside the loss.

# %%
trained = outcomes["L-Softmax, m = 4"]["train"]
features, labels = jnp.array(trained["points"]), jnp.array(trained["labels"])
kernel = jnp.array(trained["kernel"])
_, seen = lsm.lsoftmax_loss(features, kernel, labels, margin=4, statistics=True)
margin_logits = lsm.lsoftmax_logits(features, kernel, labels, margin=4)
margin_free = float(jnp.mean(seen.plain_logit > seen.max_logit))
with_margin = float(jnp.mean(jnp.argmax(margin_logits, axis=-1) == labels))
print(f"training images, margin-free accuracy:   {100 * margin_free:.1f} %")
print(f"training images, argmax with the margin: {100 * with_margin:.1f} %")

# %% [markdown]
# ## From here
#
# - [Fine-tuning a softmax model](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/fine-tuning.md)
# - [Inference and export](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/export.md)
# - [Training on all devices](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/devices.ipynb)
# - [Reproducing a number of the paper](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/reproduce.ipynb)
# - [Verifying faces](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/faces.ipynb)
