"""Head weights, margins and λ schedules from other frameworks, and back.

A class is a row of the weight in some frameworks and a column in others; here it is a column of
`kernel`. The functions read arrays, never pickles. They compute in NumPy on the host and keep the
dtype; `head.kernel[...] = kernel` puts the result into a head.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lsoftmax_jax._checks import check_real, check_scale, check_size
from lsoftmax_jax.margins import ArcFace, CosFace, LSoftmax, Margin, SphereFace
from lsoftmax_jax.schedule import LambdaPreset, annealed_lambda

# The axes of a kernel, of any size.
_KERNEL = {"in_features": None, "classes": None}
_CAFFE_MARGINS = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "QUADRUPLE": 4}


def kernel_from_rows(
    weight: Any, *, in_features: int | None = None, classes: int | None = None
) -> np.ndarray:
    """The kernel of a weight that holds a class in each row: its transpose.

    The authors' Caffe layer, `torch.nn.Linear` and insightface's ArcFace heads hold such weights.

    Args:
      weight: (classes, in_features) floating point, anything `np.asarray` takes; Caffe's old
        blobs (1, 1, classes, in_features) too.
      in_features: D, checked where given.
      classes: number of classes, checked where given.

    Returns:
      (in_features, classes), contiguous, in the dtype of `weight`.

    Raises:
      TypeError: `weight` is not floating point.
      ValueError: `weight` is no matrix of the sizes given. A square one fits either way round:
        only comparing a logit tells.

    Example:
      >>> import numpy as np
      >>> from lsoftmax_jax import interop
      >>> weight = np.zeros((10, 512), np.float32)
      >>> interop.kernel_from_rows(weight, in_features=512, classes=10).shape
      (512, 10)

    Source: `LayerSetUp` of `LargeMarginInnerProduct` in
    https://github.com/wy1iu/LargeMargin_Softmax_Loss;
    https://pytorch.org/docs/stable/generated/torch.nn.Linear; `PartialFC_V2` in
    https://github.com/deepinsight/insightface.
    """
    sizes = {"classes": classes, "in_features": in_features}
    return np.ascontiguousarray(_matrix("weight", weight, sizes, "kernel_from_columns").T)


def kernel_from_columns(
    weight: Any, *, in_features: int | None = None, classes: int | None = None
) -> np.ndarray:
    """The kernel of a weight that holds a class in each column: itself, checked.

    The losses of pytorch-metric-learning hold such a weight (`W`), and so does `LSoftmaxLinear` in
    the PyTorch ports of amirhfarzaneh and jihunchoi.

    Args:
      weight: (in_features, classes) floating point, anything `np.asarray` takes.
      in_features: D, checked where given.
      classes: number of classes, checked where given.

    Returns:
      (in_features, classes), contiguous, in the dtype of `weight`.

    Raises:
      TypeError: `weight` is not floating point.
      ValueError: `weight` is no matrix of the sizes given.

    Example:
      >>> import numpy as np
      >>> from lsoftmax_jax import interop
      >>> weight = np.zeros((512, 10), np.float32)
      >>> interop.kernel_from_columns(weight, in_features=512, classes=10).shape
      (512, 10)

    Source: `LargeMarginSoftmaxLoss` in
    https://github.com/KevinMusgrave/pytorch-metric-learning; `lsoftmax.py` in
    https://github.com/amirhfarzaneh/lsoftmax-pytorch and
    https://github.com/jihunchoi/lsoftmax-pytorch.
    """
    sizes = {"in_features": in_features, "classes": classes}
    return np.ascontiguousarray(_matrix("weight", weight, sizes, "kernel_from_rows"))


def kernel_to_rows(kernel: ArrayLike) -> np.ndarray:
    """The weight that holds a class in each row, for Caffe and `torch.nn.Linear`: the transpose.

    Args:
      kernel: (in_features, classes) floating point. The kernel of a
        head with a layout may have some more columns: pass `np.asarray(kernel)[:, :classes]`.

    Returns:
      (classes, in_features), contiguous, a copy: safetensors 0.8.0 saves the numbers of a
      transposed view in the wrong order, without an error.

    Raises:
      TypeError: `kernel` is not floating point.
      ValueError: `kernel` is no matrix.

    Example:
      >>> import jax.numpy as jnp
      >>> from lsoftmax_jax import interop
      >>> interop.kernel_to_rows(jnp.zeros((512, 10))).shape
      (10, 512)

    Source: see `kernel_from_rows`; https://github.com/safetensors/safetensors/issues/825.
    """
    return np.ascontiguousarray(_matrix("kernel", kernel, _KERNEL).T)


def from_metric_learning(
    loss: str, weight: Any, *, margin: Any, scale: float
) -> tuple[np.ndarray, Margin]:
    """Kernel and margin of a loss of pytorch-metric-learning.

    Args:
      loss: the class's name: ArcFaceLoss, CosFaceLoss, SphereFaceLoss or LargeMarginSoftmaxLoss.
      weight: the loss's `W`, (in_features, classes) floating point, anything `np.asarray` takes.
      margin: as the loss's constructor takes it: ArcFace's in degrees, by default 28.6, though the
        loss's attribute `margin` holds radians. An ArcFace margin below 2 degrees is refused:
        radians were meant.
      scale: as the loss's constructor takes it.

    Returns:
      (kernel, margin) of the same loss here. The scale of LargeMarginSoftmaxLoss is in the kernel.
      Where θ + margin exceeds π their ArcFace jumps down; ours is continuous.

    Raises:
      TypeError: `weight` is not floating point, or `margin` or `scale` not a number.
      ValueError: `loss` is none of the four, `weight` not a matrix, or a number out of range;
        SphereFaceLoss with another scale than 1, which belongs into the features here; a scale that
        takes the kernel beyond its dtype.

    Example:
      >>> import numpy as np
      >>> from lsoftmax_jax import interop
      >>> kernel, margin = interop.from_metric_learning(
      ...     "ArcFaceLoss", np.ones((512, 10), np.float32), margin=28.6, scale=64)
      >>> round(margin.margin, 3), margin.scale
      (0.499, 64.0)

    Source: https://kevinmusgrave.github.io/pytorch-metric-learning/losses/.
    """
    kernel, scale = kernel_from_columns(weight), check_scale(scale)
    if loss == "ArcFaceLoss":
        check_real("margin", margin, 0, 180)
        if 0 < margin < 2:
            raise ValueError(
                f"margin must be in degrees, as ArcFaceLoss takes it, got {margin}: for radians "
                f"pass math.degrees({margin})"
            )
        return kernel, ArcFace(math.radians(margin), scale=scale)
    if loss == "CosFaceLoss":
        return kernel, CosFace(margin, scale=scale)
    if loss == "SphereFaceLoss":
        if scale != 1:
            raise ValueError(
                f"scale must be 1 with SphereFaceLoss, got {scale}: multiply the features by it"
            )
        return kernel, SphereFace(check_size("margin", margin))
    if loss == "LargeMarginSoftmaxLoss":
        with np.errstate(over="ignore"):
            scaled = (kernel.astype(np.float64) * scale).astype(kernel.dtype)
        lost = ~np.isfinite(scaled) | (scaled == 0)
        if not np.array_equal(lost, ~np.isfinite(kernel) | (kernel == 0)):
            raise ValueError(f"scale must keep the kernel within {kernel.dtype}, got {scale}")
        return scaled, LSoftmax(check_size("margin", margin))
    raise ValueError(
        f"loss must be ArcFaceLoss, CosFaceLoss, SphereFaceLoss or LargeMarginSoftmaxLoss, "
        f"got {loss!r}"
    )


def from_insightface(
    weight: Any,
    *,
    s: float,
    m1: float,
    m2: float,
    m3: float,
    interclass_filtering_threshold: float = 0.0,
) -> tuple[np.ndarray, Margin]:
    """Kernel and margin of insightface's `CombinedMarginLoss`, as it computes them.

    With m1 = 1 and m3 = 0 it is ArcFace, since 2022 without a gradient through the margin. With
    m3 > 0 it is CosFace, and insightface ignores m1 and m2 without a word: so does this function.
    It refuses anything else. The papers' formula is `lsoftmax_jax.margins.Combined`.

    insightface clamps probabilities at 1e-30, so its loss of an example ends at 69.1; ours does not
    end.

    Args:
      weight: of its `PartialFC_V2`, (classes, in_features) floating point.
      s, m1, m2, m3: as there; `margin_list` of its configurations is (m1, m2, m3).
      interclass_filtering_threshold: must be 0: nothing here filters other classes.

    Returns:
      (kernel, margin) of the same loss here. Their ArcFace rises again where θ + m2 exceeds π; ours
      goes on falling.

    Raises:
      TypeError: `weight` is not floating point, or a setting not a number.
      ValueError: `weight` is not a matrix, or the settings are neither ArcFace's nor CosFace's.

    Example:
      >>> import numpy as np
      >>> from lsoftmax_jax import interop
      >>> _, margin = interop.from_insightface(
      ...     np.ones((10, 512), np.float32), s=64, m1=1.0, m2=0.5, m3=0.0)
      >>> margin
      ArcFace(margin=0.5, scale=64.0, easy=False, detach=True)

    Source: `CombinedMarginLoss` and `PartialFC_V2` in `recognition/arcface_torch` of
    https://github.com/deepinsight/insightface.
    """
    for name, value in (("m1", m1), ("m2", m2), ("m3", m3)):
        check_real(name, value, 0, math.inf)
    if interclass_filtering_threshold != 0:
        raise ValueError(
            f"interclass_filtering_threshold must be 0, got {interclass_filtering_threshold}: "
            f"other classes are never filtered here"
        )
    if not m3 > 0 and (m1, m3) != (1, 0):
        raise ValueError(
            f"m1 must be 1 and m3 0, or m3 > 0, as in insightface, got m1={m1} and m3={m3}; the "
            f"formula is lsoftmax_jax.margins.Combined(m1, m2, m3)"
        )
    scale = check_scale(s)
    margin = CosFace(m3, scale=scale) if m3 > 0 else ArcFace(m2, scale=scale, detach=True)
    return kernel_from_rows(weight), margin


def from_caffe(
    *,
    type: str = "SINGLE",
    base: float = 1.0,
    gamma: float = 0.0,
    power: float = 1.0,
    iteration: int = 0,
    lambda_min: float = 0.0,
) -> tuple[int, LambdaPreset]:
    r"""The margin and the λ schedule of a prototxt's `largemargin_inner_product_param`.

    .. math:: \lambda_t = \max(\lambda_{min},\; base \, (1 + \gamma t)^{-power}), \quad
        t = iteration + 1, iteration + 2, \ldots

    The first forward pass is `iteration` + 1, so a start later than 0 is the same schedule with
    another base and gamma:
    :math:`1 + \gamma (i + s + 1) = (1 + \gamma i) (1 + \frac{\gamma}{1 + \gamma i} (s + 1))`.

    Args:
      type: SINGLE, DOUBLE, TRIPLE or QUADRUPLE. The defaults are those of the authors'
        caffe.proto, by which λ stays at 1.
      base: λ at t = 0; `annealed_lambda` checks this and the other constants.
      gamma: how fast λ falls per forward pass.
      power: exponent.
      iteration: forward passes done before the first, >= 0.
      lambda_min: λ never falls below it.

    Returns:
      the margin, and the constants of the schedule, `annealed_lambda(*constants)`.

    Raises:
      TypeError, ValueError: `type` is none of the four, `iteration` no int >= 0, or
        `annealed_lambda` refuses a constant.

    Example:
      >>> import lsoftmax_jax as lsm
      >>> from lsoftmax_jax import interop
      >>> margin, constants = interop.from_caffe(
      ...     type="QUADRUPLE", base=1000, gamma=0.000025, power=35, iteration=0, lambda_min=0
      ... )
      >>> margin, constants == lsm.schedule.MNIST
      (4, True)

    Source: `LayerSetUp` and `Forward_cpu` of `LargeMarginInnerProduct` and caffe.proto in
    https://github.com/wy1iu/LargeMargin_Softmax_Loss.
    """
    if type not in _CAFFE_MARGINS:
        raise ValueError(f"type must be one of {', '.join(_CAFFE_MARGINS)}, got {type!r}")
    if isinstance(iteration, bool) or not isinstance(iteration, (int, np.integer)):
        raise TypeError(f"iteration must be an int >= 0, got {iteration!r}")
    if not 0 <= iteration < 2**31:
        raise ValueError(f"iteration must be in [0, 2**31), got {iteration!r:.80}")
    annealed_lambda(base, gamma, power, lambda_min)  # for its checks
    done = 1 + gamma * int(iteration)
    return _CAFFE_MARGINS[type], LambdaPreset(base * done**-power, gamma / done, power, lambda_min)


def read_safetensors(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """One tensor of a safetensors file.

    Args:
      path: the file.
      name: the tensor's name in it.

    Returns:
      the tensor as a NumPy array, in its dtype.

    Raises:
      ImportError: the package safetensors is not installed.
      FileNotFoundError: there is no such file.
      ValueError: the file is no safetensors file, or has no tensor of that name; the message
        lists those it has.

    Example:
      >>> import pathlib, tempfile, numpy as np
      >>> from lsoftmax_jax import interop
      >>> from safetensors.numpy import save_file
      >>> path = pathlib.Path(tempfile.mkdtemp(), "model.safetensors")
      >>> save_file({"fc.weight": np.zeros((10, 512), np.float32)}, path)
      >>> interop.read_safetensors(path, "fc.weight").shape
      (10, 512)

    Source: https://huggingface.co/docs/safetensors.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError("a safetensors file needs: pip install safetensors") from error
    if not os.path.exists(path):
        raise FileNotFoundError(f"path must be a safetensors file, got {path}: no such file")
    if not os.path.isfile(path):  # a named pipe would be waited for
        raise ValueError(f"path must be a safetensors file, got {path}: not a regular file")
    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            if name in names:
                return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, got {path}: {error}") from error
    except AttributeError as error:  # safetensors looks for the type of 8 bits and less in NumPy
        raise ValueError(
            f"name must be a tensor of a NumPy dtype, got {name!r}: {error}"
        ) from error
    raise ValueError(f"name must be one of the tensors of {path}: {', '.join(names)}; got {name!r}")


def _matrix(
    name: str, array: Any, sizes: Mapping[str, int | None], transposing: str = ""
) -> np.ndarray:
    """`array` as a matrix with the axes `sizes`, checked where a size is given."""
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a matrix, got a masked array: fill it first")
    try:
        matrix = np.asarray(array)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a matrix, got {type(array).__name__}: {error}") from error
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got dtype {matrix.dtype}")
    if math.prod(matrix.shape[:-2]) == 1:
        matrix = matrix.reshape(matrix.shape[-2:])
    for axis, size in sizes.items():
        if size is not None:
            check_size(axis, size)

    def fits(shape: tuple[int, ...]) -> bool:
        wanted = tuple(sizes.values())
        pairs = zip(wanted, shape, strict=True)
        return len(shape) == 2 and 0 not in shape and all(w in (None, n) for w, n in pairs)

    if fits(matrix.shape):
        return matrix
    wanted = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in sizes.items())
    hint = f"; {transposing} takes it" if transposing and fits(matrix.shape[::-1]) else ""
    raise ValueError(f"{name} must have shape ({wanted}), got {np.shape(array)}{hint}")
