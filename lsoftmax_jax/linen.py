"""The large-margin softmax head as a Flax Linen module.

Source: Liu et al., ICML 2016, https://arxiv.org/abs/1612.02295.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.errors import NameInUseError
from jax.typing import ArrayLike

from lsoftmax_jax import _calls, _checks
from lsoftmax_jax._core.run import Statistics
from lsoftmax_jax._core.spec import ClassParallel, Plan
from lsoftmax_jax.losses import lsoftmax_loss, lsoftmax_loss_and_statistics, lsoftmax_loss_sum
from lsoftmax_jax.margins import Margin
from lsoftmax_jax.schedule import SelfPaced


def _lecun_normal(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Flax's own initializer as a module-level function, so that a head can be pickled."""
    return linen.initializers.lecun_normal()(key, shape, dtype)


class LSoftmaxDense(linen.Module):
    """The last layer of a classifier: a bias-free Dense that knows the margin in training.

    It is the Linen twin of `lsoftmax_jax.nnx.LSoftmaxDense`, with the same parameter `kernel`
    (D, classes) and the same numbers. The features give the kernel its first axis, so a checkpoint
    of a bias-free `linen.Dense` loads.

    Attributes:
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
      kernel_init: initializer of the kernel, `linen.Dense`'s by default.
      layout: the mesh axes to shard the classes and the batch over. The kernel is then created
        with `linen.with_partitioning`. If the class axis does not divide the classes, the kernel
        has a few more columns, which take no part.

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
    lam: float | SelfPaced | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: linen.initializers.Initializer = _lecun_normal
    layout: ClassParallel | None = None

    @property
    def out_features(self) -> int:
        return self.classes

    def __post_init__(self) -> None:
        self.layout = _calls.layout_of(self.layout, self.classes)
        if not isinstance(self.lam, jax.core.Tracer):
            self.lam = _calls.known_lam(self.lam)  # an array has no hash
        _calls.check_settings(self)
        super().__post_init__()

    @linen.compact
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
        return _calls.logits(self, features, self._kernel_for(features), labels, lam)

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
        features, kernel, settings = _calls.call_of(self, features, self._kernel_for(features), lam)
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
        features, kernel, settings = _calls.call_of(self, features, self._kernel_for(features), lam)
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
        features, kernel, settings = _calls.call_of(self, features, self._kernel_for(features), lam)
        return lsoftmax_loss_sum(features, kernel, labels, weights, **options, **settings)

    @linen.compact
    def _kernel_for(self, features: ArrayLike) -> jax.Array:
        scope = self.scope
        if self.has_variable("params", "kernel"):
            # In a scope shared by linen.share_scope another module may have made it.
            made_here = getattr(self, "_made_in", None) is scope
            if scope is not None and scope.name_reserved("kernel", "params") and not made_here:
                raise NameInUseError("param", "kernel", type(self).__name__)
            # D is not checked here: the losses name both shapes if they differ.
            stored: jax.Array = linen.meta.unbox(self.get_variable("params", "kernel"))
            return stored
        if scope is not None and not self.is_mutable_collection("params"):
            raise ValueError(
                f"variables must hold the parameter 'kernel' of shape (D, {self.classes}) for this "
                f"head, got none: call init, or load a checkpoint of this model"
            )
        length = _checks.check_features(features).shape[-1]
        kernel: Any = self.param("kernel", *self._initializer(length))
        _checks.keep(self, _made_in=scope)
        return kernel

    def _initializer(self, length: int) -> tuple[Any, ...]:
        """A function from a key, and its other arguments."""
        if (layout := self.layout) is None:
            return self.kernel_init, (length, self.classes), self.param_dtype

        def init(*arguments: Any) -> jax.Array:
            # A box of linen.with_partitioning is opened: the layout decides.
            made: jax.Array = linen.meta.unbox(self.kernel_init(*arguments))
            return made

        create = _calls.sharded_kernel(layout, init, length, self.classes, self.param_dtype)
        return (linen.with_partitioning(create, (None, layout.class_axis)),)
