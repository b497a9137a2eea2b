"""Head weights and λ schedules from other frameworks, and back.

Frameworks differ in whether a class is a row or a column of the weight; here it is a column of
`kernel`. What is read is an array, never a pickle. All of it is NumPy on the host, in the dtype
that came: `head.kernel[...] = kernel` puts it into a head.
"""

import math
import os
from collections.abc import Mapping
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lsoftmax_jax._checks import at_least_f32
from lsoftmax_jax.schedule import LambdaPreset, annealed_lambda

# The axes of a kernel, of any size.
_KERNEL = {"in_features": None, "classes": None}
_CAFFE_MARGINS = {"SINGLE": 1, "DOUBLE": 2, "TRIPLE": 3, "QUADRUPLE": 4}


def kernel_from_rows(
    weight: Any, *, in_features: int | None = None, classes: int | None = None
) -> np.ndarray:
    """The kernel of a weight that holds a class in each row: its transpose.

    So do the authors' Caffe layer, `torch.nn.Linear` and the ArcFace heads of insightface.

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

    So do the losses of pytorch-metric-learning (`W`), and `LSoftmaxLinear` in the PyTorch ports
    of amirhfarzaneh and jihunchoi.

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
      kernel: (in_features, classes) floating point. Of a head with `class_axis` pass
        `kernel[:, :classes]`: its kernel may have some more columns.

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


def cosine_kernel(kernel: ArrayLike, scale: float = 1.0) -> np.ndarray:
    r"""The kernel of a head that normalises its weight: columns of length `scale`.

    .. math::
        \hat w_j = scale \, w_j / \|w_j\|, \qquad
        (x / \|x\|) \cdot \hat w_j = scale \, \cos\theta_j

    With features divided by their norm, the plain logits are those of ArcFace, CosFace and
    normalised softmax; with features as they are, those of SphereFace. Exact for inference only:
    their margins are others, and the columns do not keep their length in training here.

    Args:
      kernel: (in_features, classes) floating point.
      scale: the head's s, > 0.

    Returns:
      (in_features, classes), in the dtype of `kernel`, norms computed in float32 or better. A
      column of zeros stays one.

    Raises:
      TypeError: `kernel` is not floating point.
      ValueError: `kernel` is no matrix, or `scale` is not finite and > 0.

    Example:
      >>> import numpy as np
      >>> from lsoftmax_jax import interop
      >>> interop.cosine_kernel(np.array([[3.0, 0.0], [4.0, 2.0]]), scale=64.0).round(1).tolist()
      [[38.4, 0.0], [51.2, 64.0]]

    Source: `PartialFC_V2` in https://github.com/deepinsight/insightface; `CosineSimilarity` in
    https://github.com/KevinMusgrave/pytorch-metric-learning.
    """
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a real number > 0, got {scale!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be finite and > 0, got {scale}")
    columns = _matrix("kernel", kernel, _KERNEL)
    wide = columns.astype(at_least_f32(columns.dtype))
    norms = np.linalg.norm(wide, axis=0)
    return (wide * (scale / np.where(norms > 0, norms, 1))).astype(columns.dtype)


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
      TypeError, ValueError: `type` is none of the four, `iteration` no int >= 0, or a constant
        none for `annealed_lambda`.

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
    if isinstance(iteration, bool) or not isinstance(iteration, int):
        raise TypeError(f"iteration must be an int >= 0, got {iteration!r}")
    if iteration < 0:
        raise ValueError(f"iteration must be >= 0, got {iteration}")
    annealed_lambda(base, gamma, power, lambda_min)  # for its checks
    done = 1 + gamma * iteration
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
    try:
        with safe_open(path, framework="numpy") as file:
            if name in file.keys():
                return file.get_tensor(name)
            names = ", ".join(sorted(file.keys()))
    except SafetensorError as error:
        raise ValueError(f"path must be a safetensors file, got {path}: {error}") from error
    raise ValueError(f"name must be one of the tensors of {path}: {names}; got {name!r}")


def _matrix(
    name: str, array: Any, sizes: Mapping[str, int | None], transposing: str = ""
) -> np.ndarray:
    """`array` as a matrix with the axes `sizes`, checked where a size is given."""
    try:
        matrix = np.asarray(array)
    except ValueError as error:
        raise TypeError(f"{name} must be a matrix, got a ragged list: {error}") from error
    if not jnp.issubdtype(matrix.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got dtype {matrix.dtype}")
    if math.prod(matrix.shape[:-2]) == 1:
        matrix = matrix.reshape(matrix.shape[-2:])

    def fits(shape: tuple[int, ...]) -> bool:
        wanted = tuple(sizes.values())
        return len(shape) == 2 and all(w in (None, n) for w, n in zip(wanted, shape, strict=True))

    if fits(matrix.shape):
        return matrix
    wanted = ", ".join(axis if size is None else f"{axis}={size}" for axis, size in sizes.items())
    hint = f"; {transposing} takes it" if transposing and fits(matrix.shape[::-1]) else ""
    raise ValueError(f"{name} must have shape ({wanted}), got {np.shape(array)}{hint}")
