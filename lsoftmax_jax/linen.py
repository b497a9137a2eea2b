"""The large-margin softmax head as a Flax Linen module.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax.sharding import PartitionSpec as P

from lsoftmax_jax import _head, sharded
from lsoftmax_jax._placement import given_or_set, resharded
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.sharded import ClassParallel


class LSoftmaxDense(_head.HeadCalls, linen.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    It is the Linen twin of `lsoftmax_jax.nnx.LSoftmaxDense`, with the same parameter `kernel`
    (D, classes) and the same numbers. The features give the kernel its first axis, so a checkpoint
    of a bias-free `linen.Dense` loads.

    Attributes:
      classes: number of classes, >= 1.
      margin: integer m >= 1, by default the paper's largest, 4; 1 is plain softmax. Or one of
        `lsoftmax_jax.margins`.
      scale: s > 0, for features and kernel columns of unit length times s; None keeps their norms.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `linen.Dense`'s by default.
      layout: the mesh axes to shard the classes and the batch over. The kernel is then created
        with `linen.with_partitioning`, and the loss is `lsoftmax_jax.sharded.lsoftmax_loss`. If the
        class axis does not divide the classes, the kernel has a few more columns, which take no
        part.

    Raises:
      TypeError, ValueError: an argument has the wrong type or value, or a layout lacks its mesh.
        Calls raise what `lsoftmax_jax.lsoftmax_loss` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lsoftmax_jax.linen import LSoftmaxDense
      >>> head = LSoftmaxDense(10, margin=4)
      >>> features, labels = jnp.ones((2, 8)), jnp.array([3, 7])
      >>> params = head.init(jax.random.key(0), features)
      >>> head.apply(params, features, labels, method="loss").shape
      (2,)
      >>> head.apply(params, features, labels, lam=5.0).shape
      (2, 10)
    """

    classes: int
    margin: int | Margin = 4
    scale: float | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: linen.initializers.Initializer = linen.initializers.lecun_normal()
    layout: ClassParallel | None = None

    def setup(self) -> None:
        _head.check_fields(self)

    @linen.compact
    def _kernel_for(self, features: jax.Array) -> jax.Array:
        if (there := self._stored()) is not None and there.shape[0] != features.shape[-1]:
            return there  # the functions name both shapes
        columns, init = self.classes, self.kernel_init
        if (layout := self.layout) is not None:
            columns = sharded.padded_columns(self.classes, layout)
            mesh, spec = given_or_set(layout.mesh), (None, layout.class_axis)

            def placed(*arguments: Any) -> jax.Array:
                return resharded(self.kernel_init(*arguments), mesh, P(*spec))

            init = linen.with_partitioning(placed, spec)
        shape = features.shape[-1], columns
        return self.param("kernel", init, shape, self.param_dtype)

    def _stored(self) -> jax.Array | None:
        if not self.has_variable("params", "kernel"):
            return None
        stored: jax.Array = linen.meta.unbox(self.get_variable("params", "kernel"))
        return stored
