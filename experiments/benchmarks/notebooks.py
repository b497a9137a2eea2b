"""The training steps of notebooks tour and devices, which write their networks out.

Nothing of a notebook runs: its classes and functions are taken from the script beside it.
"""

import ast
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Lowered

import lsoftmax_jax as lsm
from experiments.benchmarks.targets import Target, placed
from lsoftmax_jax import training
from lsoftmax_jax.nnx import LSoftmaxDense

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
BATCH = 64
SIZE = f"64 pixels, batch {BATCH}, f32"


def definitions(notebook: str) -> dict[str, Any]:
    """What a notebook imports, and the classes and functions that it defines, by name."""
    file = NOTEBOOKS / f"{notebook}.py"
    cells = ast.parse(file.read_text())
    kept = ast.Import | ast.ImportFrom | ast.ClassDef | ast.FunctionDef
    cells.body = [statement for statement in cells.body if isinstance(statement, kept)]
    names: dict[str, Any] = {}
    exec(compile(cells, file, "exec"), names)
    return names


def lower_tour(on: Target) -> Lowered:
    """The NNX model's update with m = 4, on one chip."""
    defined = definitions("tour")
    model = defined["Network"](4, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    graphdef, state = nnx.split((model, optimizer))

    def step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
        model, optimizer = nnx.merge(graphdef, state)
        seen = defined["update"](model, optimizer, images, labels)
        return nnx.state((model, optimizer)), seen

    return on.lower(step, state, *_batch(BATCH))


def lower_devices(on: Target) -> Lowered:
    """The step on one device."""
    step, state = _devices_step()
    return on.lower(step, state, *_batch(BATCH))


def lower_sharded(on: Target) -> Lowered:
    """The step with the classes sharded, over all chips of a slice, the batch a data shard's."""
    data = len(on.devices) // 2
    mesh = on.mesh((data, 2), ("data", "model"))
    step, state = _devices_step(lsm.ClassParallel("model", "data", mesh))
    columns = placed(state.params["head"], NamedSharding(mesh, P(None, "model")))
    state = placed(state, NamedSharding(mesh, P()))
    state.params["head"] = columns
    batch = placed(_batch(data * BATCH), NamedSharding(mesh, P("data")))
    return jax.jit(step).lower(state, *batch)


def _devices_step(layout: lsm.ClassParallel | None = None) -> tuple[training.TrainStep, Any]:
    network, optimizer = definitions("devices")["Network"], optax.sgd(0.05)
    lam = lsm.annealed_lambda(base=100.0, gamma=0.05, power=4.0, minimum=10.0)

    def model() -> nnx.Module:
        model = network(nnx.Rngs(0))
        if layout is not None:
            model.head = LSoftmaxDense(64, 10, margin=4, layout=layout, rngs=nnx.Rngs(0))
        return model

    graphdef = nnx.graphdef(nnx.eval_shape(model))
    state = jax.eval_shape(lambda: training.create(model(), optimizer)[1])
    return training.train_step(graphdef, optimizer, lam), state


def _batch(rows: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    images = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    return images, jax.ShapeDtypeStruct((rows,), jnp.int32)
