"""The large-margin softmax head as a Flax NNX module.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsoftmax_jax import _checks, _head, sharded
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.sharded import ClassParallel

# What `nnx.get_partition_spec` reads; Flax 0.11 calls it otherwise.
_SHARDING = "out_sharding" if hasattr(nnx, "use_eager_sharding") else "sharding"
_KERNEL_INIT = initializers.lecun_normal()


class LSoftmaxDense(_head.HeadCalls, nnx.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    ``loss(features, labels)`` is the fused loss of each example. It paces itself unless it is given
    a λ. Called with features alone, the head gives the plain product features @ kernel. The one
    parameter is `kernel` (in_features, classes): a checkpoint of a bias-free `nnx.Linear` loads,
    and the trained head exports as a plain matrix product.

    Args:
      in_features: D, the length of a feature.
      classes: number of classes, >= 1.
      margin: integer m >= 1, by default the paper's largest, 4; 1 is plain softmax. Or one of
        `lsoftmax_jax.margins`.
      scale: s > 0, for features and kernel columns of unit length times s; None keeps their norms.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `nnx.Linear`'s by default.
      layout: the mesh axes to shard the classes and the batch over. The loss is then
        `lsoftmax_jax.sharded.lsoftmax_loss`. If the class axis does not divide the classes, the
        kernel has a few more columns, which take no part.
      rngs: source of the `params` key.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value, or a layout lacks its mesh.
        Calls raise what `lsoftmax_jax.lsoftmax_loss` raises.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from lsoftmax_jax.nnx import LSoftmaxDense
      >>> head = LSoftmaxDense(8, 10, margin=4, rngs=nnx.Rngs(0))
      >>> features, labels = jnp.ones((2, 8)), jnp.array([3, 7])
      >>> head.loss(features, labels).shape, head.loss(features, labels, lam=5.0).shape
      ((2,), (2,))
      >>> head(features).shape, head(features, labels, lam=5.0).shape
      ((2, 10), (2, 10))
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        margin: int | Margin = 4,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        layout: ClassParallel | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = _checks.check_size("in_features", in_features)
        self.classes, self.margin, self.scale = classes, margin, scale
        self.dtype, self.param_dtype, self.layout = dtype, param_dtype, layout
        _head.check_fields(self)
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be a flax.nnx.Rngs, got {rngs!r}")
        if layout is None:
            kernel = kernel_init(rngs.params(), (in_features, classes), param_dtype)
            self.kernel = nnx.Param(kernel)
            return
        shape = in_features, sharded.padded_columns(classes, layout)
        spec, mesh = (None, layout.class_axis), layout.mesh

        # Under jit, where no device ever holds more than its shard. Of a mesh that is given jit
        # must be told, and Flax 0.11 places no parameter.
        placed = NamedSharding(mesh, P(*spec)) if isinstance(mesh, Mesh) else P(*spec)

        @functools.partial(jax.jit, out_shardings=placed)
        def create(key: jax.Array) -> nnx.Param[jax.Array]:
            kernel = kernel_init(key, shape, param_dtype)
            metadata: dict[str, Any] = {_SHARDING: spec}
            return nnx.Param(kernel, mesh=mesh, **metadata)

        self.kernel = create(rngs.params())

    def _kernel_for(self, features: jax.Array) -> jax.Array:
        return self.kernel[...]
