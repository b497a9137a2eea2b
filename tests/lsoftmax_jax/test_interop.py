"""lsoftmax_jax.interop: each layout is compared with its original layer, written out in NumPy."""

import functools
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lsoftmax_jax as lsm
from lsoftmax_jax import interop
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.margins import ArcFace, CosFace, LSoftmax, SphereFace
from lsoftmax_jax.nnx import LSoftmaxDense
from tests import oracle

FEATURES, KERNEL, LABELS = oracle.problem(seed=3, batch=12, dim=5, classes=4)
ROWS = np.stack([KERNEL[:, j] for j in range(4)])


def caffe_logits(features, weight, labels, kind, lam):
    """The authors' layer: signs of cosines for k, and 1e-9 added to the product of the norms."""
    logits = features @ weight.T
    rows = np.arange(len(labels))
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(weight[labels], axis=1) + 1e-9
    c = logits[rows, labels] / norms
    sign = np.sign(c)
    if kind == "SINGLE":
        return logits
    if kind == "DOUBLE":
        psi = 2 * sign * c**2 - 1
    elif kind == "TRIPLE":
        half = np.sign(np.abs(c) - 0.5)
        psi = half * (4 * c**3 - 3 * c) + sign * (1 + half) - 2
    else:
        eighth = sign * np.sign(2 * c**2 - 1)
        psi = eighth * (8 * c**4 - 8 * c**2 + 1) + 2 * sign + eighth - 3
    logits[rows, labels] = (lam * logits[rows, labels] + norms * psi) / (1 + lam)
    return logits


@pytest.mark.parametrize("kind", ["SINGLE", "DOUBLE", "TRIPLE", "QUADRUPLE"])
def test_logits_are_those_of_the_caffe_layer(x64, kind):
    margin, _ = interop.from_caffe(type=kind)
    kernel = interop.kernel_from_rows(ROWS.reshape(1, 1, 4, 5), in_features=5, classes=4)
    ours = lsm.lsoftmax_logits(FEATURES, kernel, LABELS, margin=margin, lam=0.5)
    np.testing.assert_allclose(
        ours, caffe_logits(FEATURES, ROWS, LABELS, kind, 0.5), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("iteration", [0, 3000, np.int32(3000)])
def test_lambda_is_that_of_the_caffe_layer(iteration):
    base, gamma, power, lambda_min = 1000.0, 2.5e-5, 35.0, 20.0
    _, constants = interop.from_caffe(
        type="DOUBLE",
        base=base,
        gamma=gamma,
        power=power,
        iteration=iteration,
        lambda_min=lambda_min,
    )
    schedule = lsm.annealed_lambda(*constants)
    counter = iteration
    for step in range(2000):
        counter += 1
        wanted = max(base * (1 + gamma * counter) ** -power, lambda_min)
        if step in (0, 1, 700, 1999):
            np.testing.assert_allclose(schedule(step), wanted, rtol=1e-5)


def test_caffe_defaults_keep_lambda_at_one():
    margin, preset = interop.from_caffe()
    assert margin == 1
    assert lsm.annealed_lambda(*preset)(10**6) == 1.0


def test_layouts_and_the_way_back():
    np.testing.assert_array_equal(interop.kernel_from_rows(ROWS), KERNEL)
    np.testing.assert_array_equal(interop.kernel_from_columns(KERNEL.tolist()), KERNEL)
    np.testing.assert_array_equal(interop.kernel_to_rows(jnp.asarray(KERNEL)), ROWS.astype("f4"))
    for array in (interop.kernel_from_rows(ROWS), interop.kernel_to_rows(KERNEL)):
        assert array.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_the_dtype_stays(dtype):
    weight = ROWS.astype(dtype)
    assert interop.kernel_from_rows(weight).dtype == dtype
    assert interop.kernel_to_rows(interop.kernel_from_rows(weight)).dtype == dtype


def test_heads_take_the_kernel():
    wanted = FEATURES.astype(np.float32) @ ROWS.astype(np.float32).T
    kernel = interop.kernel_from_rows(ROWS, in_features=5, classes=4)
    head = LSoftmaxDense(5, 4, rngs=nnx.Rngs(0))
    head.kernel[...] = kernel
    np.testing.assert_allclose(head(FEATURES), wanted, rtol=1e-5)
    params = {"params": {"kernel": kernel}}
    np.testing.assert_allclose(LinenHead(4).apply(params, FEATURES), wanted, rtol=1e-5)


def test_wrong_shapes_are_refused():
    with pytest.raises(
        ValueError, match=r"\(classes=4, in_features=5\), got \(5, 4\); kernel_from_c"
    ):
        interop.kernel_from_rows(KERNEL, in_features=5, classes=4)
    with pytest.raises(
        ValueError, match=r"\(in_features=5, classes\), got \(4, 5\); kernel_from_r"
    ):
        interop.kernel_from_columns(ROWS, in_features=5)
    with pytest.raises(ValueError, match=r"\(classes=10, in_features\), got \(4, 5\)$"):
        interop.kernel_from_rows(ROWS, classes=10)
    with pytest.raises(ValueError, match=r"weight must .* got \(2, 1, 4, 5\)"):
        interop.kernel_from_rows(np.ones((2, 1, 4, 5)))
    with pytest.raises(ValueError, match=r"kernel must .* got \(4,\)"):
        interop.kernel_to_rows(np.ones(4))


class Bfloat16:
    """As a tensor of PyTorch in bfloat16, which NumPy does not know."""

    def __array__(self, *_, **__):
        raise TypeError("Got unsupported ScalarType BFloat16")


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match="weight must be a matrix, got Bfloat16: Got unsupported"):
        interop.kernel_from_rows(Bfloat16())
    with pytest.raises(TypeError, match="weight must be floating point, got dtype int"):
        interop.kernel_from_columns(np.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"type must be one of SINGLE.*'QUINTUPLE'"):
        interop.from_caffe(type="QUINTUPLE")
    with pytest.raises(ValueError, match="iteration"):
        interop.from_caffe(iteration=-1)


def test_metric_learning_settings():
    """Degrees become radians; a scale may move into the kernel. test_peers.py compares losses."""
    kernel, margin = interop.from_metric_learning("ArcFaceLoss", KERNEL, margin=90, scale=64)
    assert margin == ArcFace(np.pi / 2, scale=64.0)
    np.testing.assert_array_equal(kernel, KERNEL)
    got = interop.from_metric_learning("CosFaceLoss", KERNEL, margin=0.35, scale=30)[1:]
    assert got == (CosFace(0.35, scale=30.0),)
    got = interop.from_metric_learning("SphereFaceLoss", KERNEL, margin=4, scale=1)[1:]
    assert got == (SphereFace(4),)
    kernel, margin = interop.from_metric_learning(
        "LargeMarginSoftmaxLoss", KERNEL.astype("f4"), margin=3, scale=2.0
    )
    assert (margin, kernel.dtype) == (LSoftmax(3), np.float32)
    np.testing.assert_array_equal(kernel, 2 * KERNEL.astype("f4"))


def combined_margin_loss(cosines, labels, s, m1, m2, m3):
    """Logits of insightface's CombinedMarginLoss below theta + m2 = pi, written out in NumPy."""
    cosines, rows = cosines.copy(), np.arange(len(labels))
    if m1 == 1 and m3 == 0:
        cosines[rows, labels] = np.cos(np.arccos(cosines[rows, labels]) + m2)
    else:
        cosines[rows, labels] -= m3
    return s * cosines


@pytest.mark.parametrize("m", [(1.0, 0.3, 0.0), (1.0, 0.0, 0.4), (7.0, 0.5, 0.2)])
def test_insightface_settings(x64, m):
    settings = dict(zip(("m1", "m2", "m3"), m, strict=True), s=16.0)
    kernel, margin = interop.from_insightface(ROWS, **settings)
    cosines = oracle.unit(FEATURES, 1)[0] @ oracle.unit(KERNEL, 0)[0]
    theta = np.arccos(cosines[np.arange(12), LABELS])
    kept = theta + 0.3 < np.pi
    logits = lsm.lsoftmax_logits(FEATURES, kernel, LABELS, margin=margin, lam=0.0)
    wanted = combined_margin_loss(cosines, LABELS, **settings)
    assert kept.sum() > 8
    np.testing.assert_allclose(logits[kept], wanted[kept], rtol=1e-10, atol=1e-10)


def test_settings_that_have_no_counterpart_are_refused():
    columns = functools.partial(interop.from_metric_learning, weight=KERNEL)
    for loss, margin, scale, name in (
        ("SubCenterArcFaceLoss", 28.6, 64, "loss must be ArcFaceLoss, .*'SubCenterArcFaceLoss'"),
        ("ArcFaceLoss", 180, 64, r"margin must be in \[0, 180\)"),
        ("ArcFaceLoss", 0.5, 64, r"margin must be in degrees.*got 0.5: for radians"),
        ("CosFaceLoss", 0.35, 0, "scale"),
        ("SphereFaceLoss", 4, 2, "scale must be 1 with SphereFaceLoss, got 2"),
        ("SphereFaceLoss", 0, 1, "margin"),
        ("LargeMarginSoftmaxLoss", 0, 1, "margin"),
    ):
        with pytest.raises(ValueError, match=name):
            columns(loss, margin=margin, scale=scale)
    with pytest.raises(TypeError, match="margin"):
        columns("ArcFaceLoss", margin="28.6", scale=64)
    with pytest.raises(TypeError, match="scale"):
        columns("ArcFaceLoss", margin=28.6, scale=None)
    half = KERNEL.astype("f2")
    with pytest.raises(ValueError, match="scale must keep the kernel within float16"):
        interop.from_metric_learning("LargeMarginSoftmaxLoss", half, margin=2, scale=1e6)
    with pytest.raises(ValueError, match="scale must keep the kernel within float16"):
        interop.from_metric_learning("LargeMarginSoftmaxLoss", half, margin=2, scale=1e-9)
    usual = {"s": 64, "m1": 1.0, "m2": 0.5, "m3": 0.0}
    for change, name in (
        ({"m1": 1.35}, r"m1 must be 1 .*Combined\(m1, m2, m3\)"),
        ({"m3": -0.1}, "m3"),
        ({"s": 0}, "scale"),
        ({"interclass_filtering_threshold": 0.4}, "never filtered"),
    ):
        with pytest.raises(ValueError, match=name):
            interop.from_insightface(ROWS, **(usual | change))


def test_safetensors(tmp_path):
    file = tmp_path / "model.safetensors"
    tensors = {
        "backbone.conv.weight": np.ones((2, 3, 3, 3), np.float32),
        "fc.weight": interop.kernel_to_rows(KERNEL),
        "half": ROWS.astype(jnp.bfloat16),
    }
    save_file(tensors, file)
    weight = interop.read_safetensors(file, "fc.weight")
    np.testing.assert_array_equal(interop.kernel_from_rows(weight), KERNEL)
    assert interop.read_safetensors(str(file), "half").dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"backbone.conv.weight, fc.weight, half; got 'fc'"):
        interop.read_safetensors(file, "fc")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_safetensors_of_8_bits_are_refused_in_words(tmp_path, dtype):
    tensors = {"fc.weight": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 4]}}
    header = json.dumps(tensors).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ValueError, match=r"name must be .* dtype, got 'fc.weight': .*float8_e"):
        interop.read_safetensors(file, "fc.weight")


def test_files_that_are_no_safetensors_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="missing"):
        interop.read_safetensors(tmp_path / "missing.safetensors", "fc.weight")
    file = tmp_path / "model.pth"
    file.write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(ValueError, match=r"path must be a safetensors file, got .*model.pth"):
        interop.read_safetensors(file, "fc.weight")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        interop.read_safetensors(file, "fc.weight")
