"""The large-margin softmax head as a Flax NNX module."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from lsoftmax_jax import sharded
from lsoftmax_jax.arguments import check_labels, check_size, check_whole
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
      margin: integer m >= 1, by default the paper's largest, 4; 1 is plain softmax.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `nnx.Linear`'s by default.
      class_axis: mesh axis to shard the classes over; `loss` is then
        `lsoftmax_jax.sharded.lsoftmax_loss`, and where the axis does not divide the classes the
        kernel has some more columns, which take no part.
      batch_axes: mesh axes of the batch, see there; only with `class_axis`, as `mesh`.
      mesh: the mesh, by default that of `jax.set_mesh`.
      rngs: source of the `params` key.

    Raises:
      TypeError, ValueError: a margin that is no integer >= 1, or mesh axes of the batch without one
        of the classes; in calls, as the functions.

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

    Source: Liu et al., ICML 2016.
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
        class_axis: str | None = None,
        batch_axes: str | tuple[str, ...] = (),
        mesh: Mesh | AbstractMesh | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = check_size("in_features", in_features)
        self.classes = check_size("classes", classes)
        self.margin = check_size("margin", margin)
        self.dtype = dtype
        self.class_axis, self.batch_axes, self.mesh = class_axis, batch_axes, mesh
        if class_axis is None:
            check_whole(batch_axes, mesh)
            kernel = kernel_init(rngs.params(), (in_features, classes), param_dtype)
            self.kernel = nnx.Param(kernel)
            return
        shape = in_features, sharded.padded_columns(classes, class_axis, mesh)

        # Under jit, where no device ever holds more than its shard. An Explicit mesh that is not
        # set by jax.set_mesh is not enough for jit to know the devices.
        placed = NamedSharding(mesh, P(None, class_axis)) if isinstance(mesh, Mesh) else None

        @functools.partial(jax.jit, out_shardings=placed)
        def create(key: jax.Array) -> nnx.Param[jax.Array]:
            kernel = kernel_init(key, shape, param_dtype)
            return nnx.Param(kernel, out_sharding=(None, class_axis), mesh=mesh)

        self.kernel = create(rngs.params())

    def __call__(
        self, features: ArrayLike, labels: ArrayLike | None = None, lam: ArrayLike = 0.0
    ) -> jax.Array:
        """Logits (..., classes): with labels those with margin, without the plain ones."""
        features, kernel = self._operands(features)
        if labels is not None and kernel.shape[1] > self.classes:
            labels = check_labels(labels, features.shape[:-1], self.classes)
        logits = lsoftmax_logits(features, kernel, labels, margin=self.margin, lam=lam)
        return sharded.real_logits(logits, self.classes)

    def loss(
        self, features: ArrayLike, labels: ArrayLike, lam: ArrayLike = 0.0, **options: Any
    ) -> Any:
        """The fused per-example loss; `options` are `lsoftmax_jax.lsoftmax_loss`'s keywords."""
        features, kernel = self._operands(features)
        options = {"margin": self.margin, "lam": lam, **options}
        if self.class_axis is None:
            return lsoftmax_loss(features, kernel, labels, **options)
        return sharded.lsoftmax_loss(
            features,
            kernel,
            labels,
            classes=self.classes,
            class_axis=self.class_axis,
            batch_axes=self.batch_axes,
            mesh=self.mesh,
            **options,
        )

    def _operands(self, features: ArrayLike) -> tuple[jax.Array, jax.Array]:
        features, kernel = jnp.asarray(features), self.kernel[...]
        if self.dtype is None:
            return features, kernel
        return features.astype(self.dtype), kernel.astype(self.dtype)
