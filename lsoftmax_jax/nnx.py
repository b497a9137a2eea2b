"""The large-margin softmax head as a Flax NNX module.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295.
"""

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import initializers
from flax.nnx.variablelib import VariableMetadata
from jax.typing import ArrayLike

from lsoftmax_jax import _calls, _checks
from lsoftmax_jax._core.run import Statistics
from lsoftmax_jax._core.spec import ClassParallel, Layout, Plan
from lsoftmax_jax.losses import lsoftmax_loss, lsoftmax_loss_and_statistics, lsoftmax_loss_sum
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.schedule import SelfPaced

# What `nnx.get_partition_spec` reads; Flax 0.11 has another name for it.
_SHARDING = "out_sharding" if hasattr(nnx, "use_eager_sharding") else "sharding"
_KERNEL_INIT = initializers.lecun_normal()


class LSoftmaxDense(nnx.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    ``loss(features, labels)`` is the fused loss of each example. Called with features alone, the
    head gives logits without a margin; with an integer margin these are features @ kernel, and the
    head exports as a plain matrix product. The one parameter is `kernel` (in_features, classes): a
    checkpoint of a bias-free `nnx.Linear` loads.

    Args:
      in_features: D, the length of a feature.
      classes: number of classes, >= 1; also readable as `out_features`.
      margin: integer m >= 1, by default the paper's largest, 4; 1 is plain softmax. Or one of
        `lsoftmax_jax.margins`.
      lam: λ of every call that is not given its own: a number >= 0, or a rule that
        `lsoftmax_jax.self_paced` makes. None is ``self_paced()``, or 0 if the margin has a scale
        and is not `SphereFace`.
      dtype: features and kernel are cast to it for the computation; None promotes them. Sums,
        norms and angles are float32 or better whatever the dtype, so there is no
        `preferred_element_type`. For the precision of the products set
        `jax.default_matmul_precision`; up to 256 classes they are at full precision
        in training.
      param_dtype: dtype of the kernel.
      kernel_init: initializer of the kernel, `nnx.Linear`'s by default.
      kernel_metadata: metadata of the `nnx.Param`, as for `nnx.Linear`.
      layout: the mesh axes to shard the classes and the batch over. If the class axis does not
        divide the classes, the kernel has a few more columns, which take no part.
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
        lam: float | SelfPaced | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        layout: ClassParallel | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.in_features = _checks.check_size("in_features", in_features)
        self.classes, self.margin, self.lam = classes, margin, _calls.known_lam(lam)
        self.dtype, self.param_dtype = dtype, param_dtype
        self.layout = layout = _calls.layout_of(layout, classes)
        _calls.check_settings(self)
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be a flax.nnx.Rngs, got {rngs!r}")
        key = rngs.params()
        if layout is None:
            kernel = kernel_init(key, (in_features, classes), param_dtype)
            self.kernel = nnx.Param(kernel, **kernel_metadata)
            return

        def init(*arguments: Any) -> jax.Array:
            made: Any = kernel_init(*arguments)
            # Drop the box of nnx.with_partitioning: the layout decides.
            return made.raw_value if isinstance(made, VariableMetadata) else made

        create = _calls.sharded_kernel(layout, init, in_features, classes, param_dtype)
        metadata = {**kernel_metadata, _SHARDING: (None, layout.class_axis)}
        self.kernel = nnx.Param(create(key), mesh=Layout.of(layout).mesh, **metadata)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _show_signature(cls)

    @property
    def out_features(self) -> int:
        return self.classes

    def __call__(
        self,
        features: ArrayLike,
        labels: ArrayLike | None = None,
        lam: ArrayLike | SelfPaced | None = None,
    ) -> jax.Array:
        """Logits of a batch.

        Args:
          features: (..., D) floating point.
          labels: (...,) integers in [0, classes), or None for inference.
          lam: λ >= 0 or a rule; None is the head's.

        Returns:
          (..., classes): the logits without a margin; with labels those with the margin,
          `lsoftmax_jax.lsoftmax_logits`.
        """
        return _calls.logits(self, features, self.kernel[...], labels, lam)

    def loss(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        lam: ArrayLike | SelfPaced | None = None,
        *,
        where: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        plan: Plan | None = None,
    ) -> jax.Array:
        """The fused loss of each example, `lsoftmax_jax.lsoftmax_loss`.

        Args:
          features: (..., D) floating point.
          labels: (...,) integers in [0, classes).
          lam: λ >= 0 or a rule; None is the head's.
          where: (...,) bool; False gives exactly zero loss and gradient.
          label_smoothing: in [0, 1].
          plan: in which pieces to compute.

        Returns:
          (...,) float32, or float64 for float64 operands.
        """
        options: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
        features, kernel, settings = _calls.call_of(self, features, self.kernel[...], lam)
        return lsoftmax_loss(features, kernel, labels, **options, **settings)

    def loss_and_statistics(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        lam: ArrayLike | SelfPaced | None = None,
        *,
        where: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        plan: Plan | None = None,
    ) -> tuple[jax.Array, Statistics]:
        """`loss`, and the `lsoftmax_jax.Statistics` of the same pass."""
        options: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
        features, kernel, settings = _calls.call_of(self, features, self.kernel[...], lam)
        return lsoftmax_loss_and_statistics(features, kernel, labels, **options, **settings)

    def loss_sum(
        self,
        features: ArrayLike,
        labels: ArrayLike,
        weights: ArrayLike | None = None,
        lam: ArrayLike | SelfPaced | None = None,
        *,
        where: ArrayLike | None = None,
        label_smoothing: float = 0.0,
        plan: Plan | None = None,
    ) -> jax.Array:
        """The scalar sum of weights * loss, `lsoftmax_jax.lsoftmax_loss_sum`.

        Args:
          weights: (...,) floating point, or None for ones.
          features, labels, lam, where, label_smoothing, plan: as in `loss`.
        """
        options: Any = {"where": where, "label_smoothing": label_smoothing, "plan": plan}
        features, kernel, settings = _calls.call_of(self, features, self.kernel[...], lam)
        return lsoftmax_loss_sum(features, kernel, labels, weights, **options, **settings)


def _show_signature(head: Any) -> None:
    """NNX's metaclass hides the signature from help() and the documentation."""
    parameters = list(inspect.signature(head.__init__).parameters.values())[1:]
    head.__signature__ = inspect.Signature(parameters)


_show_signature(LSoftmaxDense)
