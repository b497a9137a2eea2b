"""The large-margin softmax head as a Flax NNX module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.typing import ArrayLike

from lsoftmax_jax.arguments import check_size
from lsoftmax_jax.logits import lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss

_KERNEL_INIT = initializers.lecun_normal()


class LSoftmaxDense(nnx.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    With labels it gives the margin logits of `lsoftmax_jax.lsoftmax_logits`, without labels the
    plain product, features @ kernel; `loss` gives the fused per-example loss. The one parameter
    is `kernel` (in_features, classes), so a checkpoint of a bias-free `nnx.Linear` loads, and the
    trained head exports as a plain matrix product.

    Args:
      in_features: D, the length of a feature.
      classes: number of classes, >= 1.
      margin: integer m >= 1; 1 is plain softmax.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `nnx.Linear`'s by default.
      rngs: source of the `params` key.

    Raises:
      TypeError, ValueError: a margin that is no integer >= 1; in calls, as the functions.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> head = LSoftmaxDense(8, 10, margin=4, rngs=nnx.Rngs(0))
      >>> features, labels = jnp.ones((2, 8)), jnp.array([3, 7])
      >>> head(features).shape, head(features, labels, lam=5.0).shape
      ((2, 10), (2, 10))
      >>> head.loss(features, labels, lam=5.0).shape
      (2,)
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        margin: int = 4,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = check_size("in_features", in_features)
        self.classes = check_size("classes", classes)
        self.margin = check_size("margin", margin)
        self.dtype = dtype
        self.kernel = nnx.Param(kernel_init(rngs.params(), (in_features, classes), param_dtype))

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

    def _operands(self, features: ArrayLike) -> tuple[jax.Array, jax.Array]:
        features, kernel = jnp.asarray(features), self.kernel[...]
        if self.dtype is None:
            return features, kernel
        return features.astype(self.dtype), kernel.astype(self.dtype)
