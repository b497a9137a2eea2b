"""The large-margin softmax (Liu et al., ICML 2016) for JAX: exact, fused, at any size.

The functions below are pure. Imported by themselves: `lsoftmax_jax.nnx` and `lsoftmax_jax.linen`,
Flax modules over them; `lsoftmax_jax.training`, training steps; `lsoftmax_jax.interop`, weights
from elsewhere. Importing `lsoftmax_jax` imports no Flax.
"""

from lsoftmax_jax import sampled, sharded
from lsoftmax_jax.algebra import Statistics
from lsoftmax_jax.logits import lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss, lsoftmax_loss_sum
from lsoftmax_jax.margin import psi
from lsoftmax_jax.sampled import lsoftmax_sampled_loss, sample_classes
from lsoftmax_jax.schedule import annealed_lambda
from lsoftmax_jax.sgd import SgdStep, lsoftmax_sgd

__all__ = [
    "Statistics",
    "SgdStep",
    "annealed_lambda",
    "lsoftmax_logits",
    "lsoftmax_loss",
    "lsoftmax_loss_sum",
    "lsoftmax_sampled_loss",
    "lsoftmax_sgd",
    "psi",
    "sample_classes",
    "sampled",
    "sharded",
]

__version__ = "0.1.0"
