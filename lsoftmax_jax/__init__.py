"""The large-margin softmax (Liu et al., ICML 2016) for JAX: exact, fused, at any size.

The functions below are pure. `lsoftmax_jax.nnx` and `lsoftmax_jax.linen` have the Flax heads,
`lsoftmax_jax.training` and `lsoftmax_jax.devices` the training steps, and `lsoftmax_jax.interop`
reads weights of other frameworks. Import these five by name: `lsoftmax_jax` itself imports no Flax.
"""

from lsoftmax_jax import margins, sampled, schedule, sharded, verification
from lsoftmax_jax._fused import Statistics
from lsoftmax_jax._pace import SelfPaced
from lsoftmax_jax._plans import Plan
from lsoftmax_jax.logits import lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss, lsoftmax_loss_and_statistics, lsoftmax_loss_sum
from lsoftmax_jax.margins import psi
from lsoftmax_jax.sampled import lsoftmax_sampled_loss, sample_classes
from lsoftmax_jax.schedule import annealed_lambda, margin_schedule, self_paced
from lsoftmax_jax.sgd import SgdStep, lsoftmax_sgd
from lsoftmax_jax.sharded import ClassParallel

__all__ = [
    "ClassParallel",
    "Plan",
    "SelfPaced",
    "SgdStep",
    "Statistics",
    "annealed_lambda",
    "lsoftmax_logits",
    "lsoftmax_loss",
    "lsoftmax_loss_and_statistics",
    "lsoftmax_loss_sum",
    "lsoftmax_sampled_loss",
    "lsoftmax_sgd",
    "margin_schedule",
    "margins",
    "psi",
    "sample_classes",
    "sampled",
    "schedule",
    "self_paced",
    "sharded",
    "verification",
]

__version__ = "0.1.0"
