"""A trained head exports as a plain product: by jax.export, and as ONNX if jax2onnx is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from lsoftmax_jax.nnx import LSoftmaxDense
from tests.oracle import assert_close

D, CLASSES = 6, 4
IMAGES = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype(np.float32)


class Network(nnx.Module):
    """Every kind of layer of the paper's networks, and the head."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.full = nnx.Linear(32, D, rngs=rngs)
        self.head = LSoftmaxDense(D, CLASSES, margin=4, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        outputs = nnx.relu(self.norm(self.conv(images)))
        outputs = nnx.max_pool(outputs, window_shape=(2, 2), strides=(2, 2))
        return self.head(self.full(outputs.reshape(outputs.shape[0], -1)))


@pytest.fixture(scope="module")
def network():
    network = Network(nnx.Rngs(0))
    network.eval()
    return network


def symbolic(*shape):
    (batch,) = export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)


def test_the_head_alone_exports_as_one_product(network):
    exported = export.export(jax.jit(network.head.__call__))(symbolic(D))
    text = exported.mlir_module()
    assert text.count("stablehlo.dot_general") == 1
    for name in ("sqrt", "exponential", "divide", "while", "scatter", "gather"):
        assert f"stablehlo.{name} " not in text, name


def test_an_exported_network_gives_the_same_numbers(network):
    def classify(images):
        return network(images)

    exported = export.export(jax.jit(classify))(symbolic(8, 8, 1))
    restored = export.deserialize(exported.serialize())
    assert_close(restored.call(IMAGES), jax.jit(classify)(IMAGES), 1e-6)


# jax2onnx still reads BatchNorm's parameters by `.value`.
@pytest.mark.filterwarnings(r"ignore:'\.value' access is now deprecated:DeprecationWarning")
def test_onnx_gives_the_same_numbers(network):
    jax2onnx = pytest.importorskip("jax2onnx", reason="pip install -e '.[onnx]'")
    onnxruntime = pytest.importorskip("onnxruntime")

    def classify(images):
        return network(images)

    model = jax2onnx.to_onnx(classify, inputs=[("batch", 8, 8, 1)])
    head = jax2onnx.to_onnx(network.head, inputs=[("batch", D)])
    assert [node.op_type for node in head.graph.node] in (["Gemm"], ["MatMul"])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES})
    assert_close(logits, network(IMAGES), 1e-5)
