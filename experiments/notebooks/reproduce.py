# %% [markdown]
# # A number of the paper, again
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/reproduce.ipynb)
#
# Every cell of the tables of [Liu et al., ICML 2016](https://arxiv.org/abs/1612.02295) has a named
# configuration. This notebook trains one, stops it, continues it, and reads what the run left: its
# result, the report, the curve. With an accelerator the run is the full one; a CPU takes a reduced
# one, which is not comparable with the paper and says so everywhere.

# %%
# In a clone there is nothing to install. Elsewhere, as in Colab, this cell fetches a clone and
# installs it; the runtime's JAX stays. If Colab asks for a restart, restart and run it again.
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

if find_spec("experiments") is None:
    clone = Path("lsoftmax_jax").absolute()
    if not clone.exists():
        url = "https://github.com/lsoftmax-jax/lsoftmax_jax"
        subprocess.run(["git", "clone", "--depth", "1", url, str(clone)], check=True)
    wanted = ["-e", f"{clone}[experiments]", f"jax=={version('jax')}"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], check=True)
    sys.path.insert(0, str(clone))

# %%
# %matplotlib inline
import itertools
import json
import platform
from dataclasses import replace

import flax
import jax
import matplotlib as mpl
from IPython.display import Markdown, display

import lsoftmax_jax as lsm
from experiments.paper import data
from experiments.paper.cells import CELLS, CONFIGS, changes_of, command_of, run_name
from experiments.paper.style import STYLE, mark_runs
from experiments.report import figures, tables
from experiments.report.outcomes import grouped, load_outcomes
from experiments.run import loop, train
from experiments.store import results as result
from experiments.store.checkpoints import steps_in

mpl.rcParams.update(STYLE | {"figure.dpi": 140})
OUT = Path("out") / "reproduce"  # results, checkpoints, logs
ON_ACCELERATOR = jax.default_backend() != "cpu"
print("devices:", jax.devices())
versions = {m.__name__: m.__version__ for m in (jax, flax, lsm)}
print("Python", platform.python_version(), versions)

# %% [markdown]
# ## The configuration
#
# `python -m experiments list` prints all of them; `CELL` may be any. MNIST and CIFAR are read where
# TFDS has prepared them; without, a run of the embedded digits takes the cell's place, and there is
# no number in the paper to compare it with.

# %%
CELL = "mnist-m4"
try:
    data.load(CONFIGS[CELL].dataset)
except FileNotFoundError:
    print(f"no data for {CELL} here, so embedded digits take its place;")
    print(f"python -m experiments train {CELL} says how to get it")
    CELL = "digits-m4"

if CELL == "digits-m4":
    config = replace(CONFIGS[CELL], steps=300)
elif ON_ACCELERATOR:
    config = CONFIGS[CELL]
else:
    config = replace(CONFIGS[CELL], steps=120, width=1 / 8, batch=64, examples=2_000)

print(CELLS[CELL].summary)
print("changed:", changes_of(config) or "nothing")
print(command_of(config))

# %% [markdown]
# ## Started, and stopped
#
# In your hands the stop is the notebook's stop button, Ctrl-C in a terminal, or the end of a
# machine's time; here it comes after twenty dispatches. The run saves a checkpoint and ends. A run
# that is killed continues from its last checkpoint, at most a minute old.

# %%
dispatches = itertools.count()
with loop.interruptible() as pressed:
    stopped = train.run(config, out=OUT, stop=lambda: pressed() or next(dispatches) == 20)
print("checkpoint at update", max(steps_in(OUT / run_name(config) / "checkpoints")))

# %% [markdown]
# ## Continued
#
# The same call. Batches, λ and learning rate go by the update's number, so the run ends, on the
# same devices, as one that was never stopped.

# %%
with loop.interruptible() as pressed:
    outcome = train.run(config, out=OUT, stop=pressed)

# %% [markdown]
# ## The result
#
# One JSON file a run: the configuration, the command that makes it again, commit, versions, device,
# seed, margin-free errors, curves, confusion matrices, angles, times.

# %%
saved = result.load(OUT / f"{run_name(config)}.json")
shown = ("command", "status", "reduced", "changes", "commit", "versions", "device", "seconds")
print(json.dumps({name: saved[name] for name in shown}, indent=1))
for split in ("train", "test"):
    print(f"{split} error, last iterate: {saved[split]['error']:.2f} %")

# %% [markdown]
# ## The report
#
# `python -m experiments report` prints this table and others, first of
# all data set by loss. Several seeds become mean ± standard deviation.

# %%
outcomes = load_outcomes(OUT)
Markdown(f"### {tables.ALL}\n\n{tables.sections(outcomes)[tables.ALL]}")

# %% [markdown]
# ## The curve
#
# Error against update, every update of training on the left. `python -m experiments figures` draws
# the paper's figures in this way.

# %%
groups = grouped(outcomes.runs)
figure = figures.draw_losses(groups)
mark_runs(figure, figures.how(groups), reduced=bool(changes_of(config)))
display(figure)

# %% [markdown]
# ## The whole row
#
# From a terminal, in the clone: every run of the row that the results lack, cheapest first, for as
# long as you allow. The same command continues.
#
#     python -m experiments reproduce --only 'mnist-*' --seeds 3 --budget-minutes 25
#
# [The tables so far](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/README.md).
# If a run diverges:
# [causes and fixes](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/diverging.md).
