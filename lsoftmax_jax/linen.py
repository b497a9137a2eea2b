"""The large-margin softmax head as a Flax Linen module."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from lsoftmax_jax import sharded
from lsoftmax_jax.arguments import check_labels, check_size, check_whole
from lsoftmax_jax.logits import lsoftmax_logits
from lsoftmax_jax.loss import lsoftmax_loss


class LSoftmaxDense(linen.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    The Linen twin of `lsoftmax_jax.nnx.LSoftmaxDense`: same parameter `kernel` (D, classes), same
    numbers. The kernel's first axis is taken from the features, so that a checkpoint of a
    bias-free `linen.Dense` loads.

    Attributes:
      classes: number of classes, >= 1.
      margin: integer m >= 1, by default the paper's largest, 4; 1 is plain softmax.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `linen.Dense`'s by default.
      class_axis: mesh axis to shard the classes over; the kernel is then created with
        `linen.with_partitioning`, and `loss` is `lsoftmax_jax.sharded.lsoftmax_loss`. Where the
        axis does not divide the classes the kernel has some more columns, which take no part.
      batch_axes: mesh axes of the batch, see there; only with `class_axis`, as `mesh`.
      mesh: the mesh, by default that of `jax.set_mesh`.

    Raises:
      TypeError, ValueError: a margin that is no integer >= 1, or mesh axes of the batch without one
        of the classes; in calls, as the functions.

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

    Source: Liu et al., ICML 2016.
    """

    classes: int
    margin: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: linen.initializers.Initializer = linen.initializers.lecun_normal()
    class_axis: str | None = None
    batch_axes: str | tuple[str, ...] = ()
    mesh: Mesh | AbstractMesh | None = None

    def setup(self) -> None:
        check_size("classes", self.classes)
        check_size("margin", self.margin)
        if self.class_axis is None:
            check_whole(self.batch_axes, self.mesh)

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

    @linen.compact
    def _operands(self, features: ArrayLike) -> tuple[jax.Array, jax.Array]:
        features = jnp.asarray(features)
        columns, init = self.classes, self.kernel_init
        if (axis := self.class_axis) is not None:
            columns = sharded.padded_columns(self.classes, axis, self.mesh)

            def placed(*arguments: Any) -> jax.Array:
                return sharded.placed_columns(self.kernel_init(*arguments), axis, self.mesh)

            init = linen.with_partitioning(placed, (None, axis))
        shape = features.shape[-1], columns
        kernel = self.param("kernel", init, shape, self.param_dtype)
        if self.dtype is None:
            return features, kernel
        return features.astype(self.dtype), kernel.astype(self.dtype)
