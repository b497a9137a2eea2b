# %% [markdown]
# # All devices of the runtime
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/devices.ipynb)
#
# The same training step on one device, under `pmap`, under `jit` over a mesh, and with the classes
# of the head sharded, all giving the same numbers. It uses the GPUs or TPU cores of the runtime; a
# CPU plays four devices, which shows what happens and says nothing about speed. Every cell uses the
# library alone and can be copied.

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
import re

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import lsoftmax_jax as lsm
from lsoftmax_jax import devices, training
from lsoftmax_jax.nnx import LSoftmaxDense

jax.config.update("jax_num_cpu_devices", 4)  # before JAX starts; GPUs and TPUs are left alone
DEVICES = jax.device_count()
print("devices:", jax.devices())
versions = {m.__name__: m.__version__ for m in (jax, flax, lsm)}
print("Python", platform.python_version(), versions)

# %% [markdown]
# ## Data, model, step
#
# Scikit-learn's embedded digits, a small network with a feature of 64 numbers, and the library's
# training step, a pure function of arrays: (state, images, labels) -> (state, metrics). λ comes
# from a schedule, a function of `state.step`.


# %%
BATCH, UPDATES = 64, 30
digits = load_digits()
images = (digits.data / 8 - 1).astype(np.float32)
epochs = np.arange(BATCH * UPDATES).reshape(UPDATES, BATCH) % len(images)
batches = [(images[rows], digits.target[rows].astype(np.int32)) for rows in epochs]


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(64, 128, rngs=rngs), nnx.BatchNorm(128, rngs=rngs)
        self.feature = nnx.Linear(128, 64, rngs=rngs)
        self.head = LSoftmaxDense(64, 10, margin=4, rngs=rngs)

    def __call__(self, images):
        return self.feature(nnx.relu(self.norm(self.first(images))))


def train(step, state, batches):
    """The loss of every update, and the last state."""
    losses = []
    for batch in batches:
        state, metrics = step(state, *batch)
        losses.append(np.ravel(metrics.sums.loss / metrics.sums.examples)[0])
    return np.array(losses), state


optimizer = optax.sgd(0.05)
lam = lsm.annealed_lambda(base=100.0, gamma=0.05, power=4.0, minimum=10.0)
graphdef, first = training.create(Network(nnx.Rngs(0)), optimizer)
step = training.train_step(graphdef, optimizer, lam)
losses = {}

# %% [markdown]
# ## One device

# %%
losses["one device"], _ = train(jax.jit(step), first, batches)

# %% [markdown]
# ## Data-parallel with `pmap`
#
# Every device holds the whole state and sees its part of the batch. The step sums over the axis
# that `axis_name` names; batch normalisation spans the whole batch.

# %%
per_device = training.train_step(graphdef, optimizer, lam, axis_name="data")
pmapped = jax.pmap(per_device, axis_name="data")
copies = jax.tree.map(lambda array: jnp.stack([array] * DEVICES), first)
parts = [(x.reshape(DEVICES, -1, *x.shape[1:]), y.reshape(DEVICES, -1)) for x, y in batches]
losses["pmap"], _ = train(pmapped, copies, parts)

# %% [markdown]
# ## Data-parallel with `jit` over a mesh
#
# The step is the one of one device, written for the whole batch; the mesh says where arrays lie.
# This is how `python -m experiments train` runs, on one host or [many](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/many-devices.md).

# %%
mesh = devices.data_mesh()
over_mesh = devices.compile_step(step, mesh, donate=False)
losses["jit over a mesh"], _ = train(over_mesh, first, batches)

labels = devices.put(batches[0][1], mesh, P(devices.DATA_AXIS))
print("a batch of labels:")
jax.debug.visualize_array_sharding(labels, use_color=False)

# %% [markdown]
# ## Class-parallel
#
# With many classes the head outgrows one device. A layout shards its kernel over a mesh axis:
# each device computes the logits of its own classes, and no device ever sees all of them. Swap the
# head, keep the rest. [More on many classes](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/many-classes.md).

# %%
MODEL_AXIS = 2 if DEVICES % 2 == 0 else 1
shape = DEVICES // MODEL_AXIS, MODEL_AXIS
mesh = jax.make_mesh(shape, ("data", "model"), (AxisType.Auto, AxisType.Auto))

model = Network(nnx.Rngs(0))
whole = np.asarray(model.head.kernel[...])
layout = lsm.ClassParallel("model", "data", mesh)
model.head = LSoftmaxDense(64, 10, margin=4, layout=layout, rngs=nnx.Rngs(0))
model.head.kernel[...] = jax.device_put(whole, NamedSharding(mesh, P(None, "model")))
class_graphdef, class_first = training.create(model, optimizer)
class_step = jax.jit(training.train_step(class_graphdef, optimizer, lam))

placed = [devices.put(batch, mesh, P("data")) for batch in batches]
losses["classes sharded"], class_last = train(class_step, class_first, placed)

print("the head's kernel, (features, classes), after training:")
jax.debug.visualize_array_sharding(class_last.params["head"]["kernel"], use_color=False)

# %% [markdown]
# ## The same numbers
#
# Sums over devices are rounded in another order, and training amplifies rounding; nothing else
# differs.

# %%
apart = {
    name: np.abs(values / losses["one device"] - 1).max()
    for name, values in losses.items()
    if name != "one device"
}
for name, difference in apart.items():
    print(
        f"{name}: the loss of {UPDATES} updates within {difference:.1e} of one device's, relative"
    )

# %%
figure, axis = plt.subplots(figsize=(8, 4))
for (name, values), style in zip(losses.items(), ("-", "--", "-.", ":"), strict=True):
    axis.plot(values, style, label=name)
axis.set(xlabel="update", ylabel="loss")
axis.legend()
plt.show()

# %% [markdown]
# ## What the devices say to each other
#
# Read off the compiled program: a class-parallel loss with all its gradients, 10,000 classes,
# features of 512 numbers, batch 1024. The logits would be 1024 x 10,000 numbers; a handful a row
# travel instead, and the gradients. (Nothing is run here, so this works for sizes that the runtime
# could not hold.)

# %%
ROWS, FEATURES, CLASSES = 1024, 512, 10_000


def loss_sum(features, kernel, labels):
    return lsm.lsoftmax_loss_sum(features, kernel, labels, margin=4, lam=0.0, layout=layout)


def described(shape, dtype, spec):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


compiled = (
    jax.jit(jax.value_and_grad(loss_sum, argnums=(0, 1)))
    .lower(
        described((ROWS, FEATURES), jnp.float32, P("data")),
        described((FEATURES, CLASSES), jnp.float32, P(None, "model")),
        described((ROWS,), jnp.int32, P("data")),
    )
    .compile()
)
found = r"= (.+?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
collectives = [(kind, shape) for shape, kind in re.findall(found, compiled.as_text())]
for kind, shape in collectives:
    print(kind, "of", re.sub(r"\{.*?\}", "", shape))
print(f"the logits, never sent: {4 * ROWS * CLASSES / 1e6:.1f} MB")

# %% [markdown]
# ## From here
#
# - `python -m experiments compile --targets v5e:2x4 --shapes 256 512 1000000` compiles
#   class-parallel steps of that size for chips that are not here: their memory, what they send.
# - [Many devices and many hosts](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/many-devices.md)
# - [Reproducing a number of the paper](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/reproduce.ipynb)
