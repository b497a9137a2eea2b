"""The large-margin softmax head as a Flax Linen module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import ArrayLike

from lsoftmax_jax.arguments import check_size
from lsoftmax_jax.logits import lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss


class LSoftmaxDense(linen.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    The Linen twin of `lsoftmax_jax.nnx.LSoftmaxDense`: same parameter `kernel` (D, classes), same
    numbers. The kernel's first axis is taken from the features, so that a checkpoint of a
    bias-free `linen.Dense` loads.

    Attributes:
      classes: number of classes, >= 1.
      margin: integer m >= 1; 1 is plain softmax.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `linen.Dense`'s by default.

    Raises:
      TypeError, ValueError: a margin that is no integer >= 1; in calls, as the functions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lsoftmax_jax.linen import LSoftmaxDense
      >>> head = LSoftmaxDense(10, margin=4)
      >>> features, labels = jnp.ones((2, 8)), jnp.array([3, 7])
      >>> params = head.init(jax.random.key(0), features)
      >>> head.apply(params, features, labels, lam=5.0).shape
      (2, 10)
      >>> head.apply(params, features, labels, lam=5.0, method=head.loss).shape
      (2,)
    """

    classes: int
    margin: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: linen.initializers.Initializer = linen.initializers.lecun_normal()

    def setup(self) -> None:
        check_size("classes", self.classes)
        check_size("margin", self.margin)

    def __call__(
        self, features: ArrayLike, labels: ArrayLike | None = None, lam: ArrayLike = 0.0
    ) -> jax.Array:
        """Logits (..., classes): with labels those with margin, without the plain ones."""
        features, kernel = self._operands(features)
        return lsoftmax_logits(features, kernel, labels, margin=self.margin, lam=lam)

    def loss(
        self, features: ArrayLike, labels: ArrayLike, lam: ArrayLike = 0.0, **options: Any
    ) -> Any:
        """`lsoftmax_jax.lsoftmax_loss` of this head; `options` are its keyword arguments."""
        features, kernel = self._operands(features)
        return lsoftmax_loss(features, kernel, labels, margin=self.margin, lam=lam, **options)

    @linen.compact
    def _operands(self, features: ArrayLike) -> tuple[jax.Array, jax.Array]:
        features = jnp.asarray(features)
        shape = features.shape[-1], self.classes
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        if self.dtype is None:
            return features, kernel
        return features.astype(self.dtype), kernel.astype(self.dtype)
