"""The large-margin softmax (Liu et al., ICML 2016) for JAX: exact, fused, at any size.

`psi`, `lsoftmax_logits`, `lsoftmax_loss` and `lsoftmax_loss_sum` are pure functions;
`lsoftmax_jax.nnx` and `lsoftmax_jax.linen` wrap them as Flax modules, `lsoftmax_jax.training`
has jitted training steps. Importing `lsoftmax_jax` imports no Flax.
"""

from lsoftmax_jax import sampled as sampled
from lsoftmax_jax import sharded as sharded
from lsoftmax_jax.algebra import Statistics as Statistics
from lsoftmax_jax.logits import lsoftmax_logits as lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss as lsoftmax_loss
from lsoftmax_jax.loss import lsoftmax_loss_sum as lsoftmax_loss_sum
from lsoftmax_jax.margin import psi as psi
from lsoftmax_jax.sampled import lsoftmax_sampled_loss as lsoftmax_sampled_loss
from lsoftmax_jax.sampled import sample_classes as sample_classes
from lsoftmax_jax.schedule import annealed_lambda as annealed_lambda
from lsoftmax_jax.sgd import SgdStep as SgdStep
from lsoftmax_jax.sgd import lsoftmax_sgd as lsoftmax_sgd

__version__ = "0.1.0"
