"""lsoftmax_jax.interop: each layout against the layer it comes from, written out in NumPy."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import lsoftmax_jax as lsm
from lsoftmax_jax import interop
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
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


@pytest.mark.parametrize("iteration", [0, 3000])
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
    assert interop.cosine_kernel(weight).dtype == dtype


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


def test_other_mistakes_are_named():
    with pytest.raises(TypeError, match="weight must be floating point, got dtype int"):
        interop.kernel_from_columns(np.ones((2, 3), int))
    with pytest.raises(ValueError, match="type must be one of SINGLE.*'QUINTUPLE'"):
        interop.from_caffe(type="QUINTUPLE")
    with pytest.raises(ValueError, match="iteration"):
        interop.from_caffe(iteration=-1)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale"):
            interop.cosine_kernel(KERNEL, scale)


def test_cosine_kernel_gives_scaled_cosines(x64):
    kernel = interop.cosine_kernel(KERNEL, scale=30.0)
    unit = FEATURES / np.linalg.norm(FEATURES, axis=1, keepdims=True)
    column_norms = [np.sqrt(sum(w**2 for w in column)) for column in KERNEL.T]
    cosines = (unit @ KERNEL) / column_norms
    logits = lsm.lsoftmax_logits(unit, kernel, None, margin=4, lam=0.0)
    np.testing.assert_allclose(logits, 30 * cosines)


def test_cosine_kernel_leaves_a_zero_column():
    assert interop.cosine_kernel(np.array([[0.0, 1.0], [0.0, 1.0]]))[:, 0].tolist() == [0.0, 0.0]


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
    with pytest.raises(ValueError, match="backbone.conv.weight, fc.weight, half; got 'fc'"):
        interop.read_safetensors(file, "fc")


def test_files_that_are_no_safetensors_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="missing"):
        interop.read_safetensors(tmp_path / "missing.safetensors", "fc.weight")
    file = tmp_path / "model.pth"
    file.write_bytes(b"PK\x03\x04 a pickle in a zip")
    with pytest.raises(ValueError, match="path must be a safetensors file, got .*model.pth"):
        interop.read_safetensors(file, "fc.weight")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        interop.read_safetensors(file, "fc.weight")
