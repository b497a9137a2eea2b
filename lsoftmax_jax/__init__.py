"""The large-margin softmax (Liu et al., ICML 2016) for JAX: exact, fused, at any size.

`reference` is the loss as the paper writes it, on one page. The functions below compute the same
numbers at any size; they are pure. `lsoftmax_jax.nnx` and `lsoftmax_jax.linen` have the Flax heads,
`lsoftmax_jax.training` and `lsoftmax_jax.devices` the training steps, and `lsoftmax_jax.interop`
reads weights of other frameworks. Import these five by name: `lsoftmax_jax` itself imports no Flax.
"""

from lsoftmax_jax import margins, reference, sampled, schedule, verification
from lsoftmax_jax._core.run import Statistics
from lsoftmax_jax._core.spec import ClassParallel, Plan
from lsoftmax_jax.losses import (
    lsoftmax_logits,
    lsoftmax_loss,
    lsoftmax_loss_and_statistics,
    lsoftmax_loss_sum,
)
from lsoftmax_jax.margins import psi
from lsoftmax_jax.sampled import (
    lsoftmax_sampled_loss,
    lsoftmax_sampled_loss_and_statistics,
    lsoftmax_sampled_loss_sum,
    sample_classes,
)
from lsoftmax_jax.schedule import SelfPaced, annealed_lambda, margin_schedule, self_paced
from lsoftmax_jax.sgd import SgdStep, lsoftmax_sgd

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
    "lsoftmax_sampled_loss_and_statistics",
    "lsoftmax_sampled_loss_sum",
    "lsoftmax_sgd",
    "margin_schedule",
    "margins",
    "psi",
    "reference",
    "sample_classes",
    "sampled",
    "schedule",
    "self_paced",
    "verification",
]

__version__ = "0.1.0"
