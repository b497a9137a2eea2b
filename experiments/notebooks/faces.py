# %% [markdown]
# # Verifying faces
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/notebooks/faces.ipynb)
#
# Are two images of one person? A network is trained to tell some people apart, with L-Softmax, and
# its features then compare people it has never seen, as in the protocol of
# [LFW](https://vis-www.cs.umass.edu/lfw/). Bring your own folder of `person/person_0001.jpg`.

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
import os
import platform

import flax
import jax
import matplotlib as mpl

import lsoftmax_jax as lsm
from experiments.faces import embed, stand_in
from experiments.faces.images import FaceImages, list_faces
from experiments.faces.pairs import pairs
from experiments.faces.protocol import people_of_fold, read_pairs
from experiments.faces.recipe import FaceRecipe
from experiments.faces.train import load_run, train_faces
from experiments.faces.verify import verify_faces
from experiments.paper.style import STYLE
from experiments.report.neighbours import neighbours
from experiments.report.roc import roc_figure
from experiments.store import results as result
from lsoftmax_jax.schedule import LambdaPreset

mpl.rcParams.update(STYLE | {"figure.dpi": 140})
OUT = Path("out") / "faces"  # the run, embeddings, results
ON_ACCELERATOR = jax.default_backend() != "cpu"
print("devices:", jax.devices())
versions = {m.__name__: m.__version__ for m in (jax, flax, lsm)}
print("Python", platform.python_version(), versions)

# %% [markdown]
# ## The folder
#
# Set `FACES` to yours. Without one, and without LFW in `LFW_DIR`, ten handwritten digits play ten
# people, so that the notebook runs anywhere: what is measured then says nothing about faces.
#
# Pairs come from the folder's `pairs.txt`, in LFW's format, or are drawn at random. They lie in
# folds that share no person; everybody in fold `LEFT_OUT` stays out of training and is tested.

# %%
FACES = Path(os.environ.get("LFW_DIR", OUT / "digits"))
LEFT_OUT = 2

if FACES == OUT / "digits":
    print("no faces here: handwritten digits take their place")
    stand_in.write_digits(FACES, images=170)
PAIRS = FACES / "pairs.txt"
if not PAIRS.exists():
    PAIRS = OUT / "pairs.txt"
    pairs(FACES, PAIRS, folds=3)

listed = list_faces(FACES)
print(f"{FACES}: {len(listed.people):,} people, {len(listed.names):,} images")

# %% [markdown]
# ## Training
#
# `train-faces` on the command line. On an accelerator this is the paper's network at full width and
# size, with fewer updates; a CPU takes a small one for a minute. λ has a minimum: without one the
# features collapse in so short a run. The run continues where it was stopped.

# %%
if ON_ACCELERATOR:
    recipe = FaceRecipe(
        steps=5_000,
        drops=(3_500, 4_500),
        lam=LambdaPreset(base=1000.0, gamma=0.08, power=1.0, minimum=30.0),
        minimum_images=4,
        left_out_fold=LEFT_OUT,
    )
else:
    recipe = FaceRecipe(
        size=(48, 40),
        width=1 / 8,
        steps=200,
        batch=32,
        learning_rate=0.05,
        drops=(140, 180),
        lam=LambdaPreset(base=1000.0, gamma=0.3, power=1.0, minimum=20.0),
        minimum_images=10,
        left_out_fold=LEFT_OUT,
    )
RUN = OUT / "run"
finished = train_faces(FACES, RUN, recipe, (PAIRS,)) == 0

# %% [markdown]
# ## Verification
#
# Two images count as one person where the cosine of their features is above a threshold, chosen on
# the folds that are not tested. Beside the network stand the raw pixels, small and grey: the floor
# that a learned feature should clear, and a minute of training may not.

# %%
verify_faces(OUT / "network.json", (PAIRS,), faces=FACES, checkpoint=RUN)
verify_faces(OUT / "pixels.json", (PAIRS,), faces=FACES, pixels=True)

# %% [markdown]
# The pixels learned nothing, so all folds test them. True accepts at a rate of false accepts, TAR
# at FAR, is what a door or a phone is judged by.

# %%
verified = {name: result.load(OUT / f"{name}.json") for name in ("network", "pixels")}
for name, outcome in verified.items():
    for far, tar in outcome["metrics"]["tar_at_far"].items():
        print(f"{name}: TAR {100 * tar:.1f} % at FAR {far}, {outcome['pairs']:,} pairs")

# %%
roc_figure(verified)

# %% [markdown]
# ## Embeddings
#
# `embed` on the command line writes them for a folder. Here those of the people left out, who were
# not trained on: on the left an image, beside it the nearest others, with the cosine; green where
# it is the same person.

# %%
unseen = people_of_fold(read_pairs(PAIRS), LEFT_OUT)
faces = list_faces(FACES, minimum_images=4, without=set(listed.people) - unseen)
run = load_run(RUN)
embedded = embed.embed_faces(FaceImages(faces, recipe.size), *embed.run_features(run, 256))
embed.save_embeddings(OUT / "embeddings.npz", embedded)
print(embedded.embeddings.shape)

# %%
neighbours(faces, embedded)

# %% [markdown]
# ## From here
#
# - Faces that are aligned are verified better: `python -m experiments align --help`.
# - [What has been run on LFW so far](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/experiments/README.md),
#   and what that does not show.
# - [The trained network in another program](https://github.com/lsoftmax-jax/lsoftmax_jax/blob/main/docs/guide/export.md)
