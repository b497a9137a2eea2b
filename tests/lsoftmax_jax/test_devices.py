"""Steps compiled for a mesh, alone or in a row, give the numbers of one device."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lsoftmax_jax as lsm
from lsoftmax_jax import devices, training
from steps import (
    BATCH,
    CLASSES,
    LAM,
    OPTIMIZER,
    WIDTH,
    Headed,
    Line,
    Small,
    assert_close,
    images_and_labels,
    mesh_of,
    stacked,
)

pytestmark = pytest.mark.lax  # Optax's schedules multiply floats by integer steps

ALIASING = {
    "dog": optax.contrib.dog,
    "prodigy": optax.contrib.prodigy,
    "sam": lambda: optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1), sync_period=2),
}


def copied(state):
    return jax.tree.map(jnp.copy, state)


def same(step, data):
    """The batch of every step."""
    return data


@pytest.fixture(scope="module")
def graphdef_and_state():
    return training.create(Small(nnx.Rngs(0)), OPTIMIZER)


@pytest.fixture(scope="module")
def examples():
    return images_and_labels(BATCH, 4, 4, 1)


def updates(graphdef, state, examples, count=3, optimizer=OPTIMIZER):
    """The state after some updates on one device, and their metrics."""
    step, metrics = jax.jit(training.train_step(graphdef, optimizer, LAM)), []
    for _ in range(count):
        state, seen = step(state, *examples)
        metrics.append(seen)
    return state, stacked(metrics)


@pytest.fixture(scope="module")
def single(graphdef_and_state, examples):
    return updates(*graphdef_and_state, examples)


# The batch is split over all devices.


def test_a_mesh_of_devices_that_are_not_there():
    with pytest.raises(ValueError, match="devices must be >= 1, got 0"):
        devices.data_mesh(0)
    with pytest.raises(ValueError, match=f"devices must be at most {jax.device_count()}, got 99"):
        devices.data_mesh(99)


def test_numpys_counts_and_pythons_numbers():
    mesh = devices.data_mesh(np.int64(2))
    assert mesh.size == 2
    assert float(devices.put(1.5, mesh, P())) == 1.5


@pytest.mark.parametrize(
    ("kind", "current"),
    [(AxisType.Auto, False), (AxisType.Explicit, False), (AxisType.Explicit, True)],
    ids=["auto", "explicit", "explicit, set"],
)
def test_a_mesh_gives_one_devices_numbers(kind, current, graphdef_and_state, examples, single):
    graphdef, state = graphdef_and_state
    mesh = mesh_of(4, kind=kind)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    with jax.set_mesh(mesh) if current else nullcontext():
        compiled, ours = devices.compile_step(step, mesh), copied(state)
        for _ in range(3):
            ours, _ = compiled(ours, *examples)
        repeated = devices.repeat(step, same, mesh, loop=True)(copied(state), examples, 3)
    assert_close(ours, single[0])
    assert_close(repeated, single)
    assert repeated[0].params["head"]["kernel"].sharding.is_fully_replicated


def test_a_mesh_of_two_axes_splits_the_batch_over_both(graphdef_and_state, examples, single):
    graphdef, state = graphdef_and_state
    rows = []

    def step(state, images, labels, where=None):
        jax.debug.inspect_array_sharding(images, callback=rows.append)
        return training.train_step(graphdef, OPTIMIZER, LAM)(state, images, labels, where)

    compiled = devices.compile_step(step, mesh_of(2, 2), donate=False)
    _, metrics = compiled(state, *examples)
    assert_close(metrics, jax.tree.map(lambda array: array[0], single[1]))
    assert {sharding.shard_shape((BATCH, 4, 4, 1)) for sharding in rows} == {(2, 4, 4, 1)}


def test_updates_in_a_row_equal_single_updates(graphdef_and_state, examples, single):
    graphdef, state = graphdef_and_state
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    many = devices.repeat(step, same, devices.data_mesh(1), loop=False)
    assert_close(many(copied(state), examples, 3), single)


def test_updates_in_a_row_compile_to_a_loop_except_on_a_cpu(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    many = devices.repeat(step, same, devices.data_mesh(1))
    text = many.lower(state, examples, 3).as_text()
    assert ("stablehlo.while" in text) == (jax.default_backend() != "cpu")


def test_padding_does_not_change_a_batch(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    images, labels = examples
    where, mesh = np.arange(BATCH) < 5, devices.data_mesh(4)
    for step in (training.train_step(graphdef, OPTIMIZER, LAM), training.eval_step(graphdef)):
        padded = devices.compile_step(step, mesh, donate=False)(state, images, labels, where)
        assert_close(padded, jax.jit(step)(state, images[:5], labels[:5]))


def test_images_may_be_a_tree():
    class Pair(Line):
        def __call__(self, halves):
            return super().__call__(jnp.concatenate(halves, axis=-1))

    images, labels = images_and_labels(BATCH, WIDTH)
    halves, mesh = (images[:, :2], images[:, 2:]), devices.data_mesh(4)
    graphdef, state = training.create(Pair(nnx.Rngs(0)), OPTIMIZER)
    wanted = updates(graphdef, state, (halves, labels), 1)
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    many = devices.repeat(step, same, mesh, loop=True)
    assert_close(many(copied(state), (halves, labels), 1), wanted)
    assert_close(devices.compile_step(step, mesh)(state, halves, labels)[0], wanted[0])


@pytest.mark.parametrize("loop", [False, True], ids=["in a row", "in a loop"])
def test_a_batch_that_does_not_divide(loop):
    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    step, mesh = training.train_step(graphdef, OPTIMIZER, LAM), devices.data_mesh(4)
    batch = images_and_labels(6, 3)
    for call in (
        lambda: devices.compile_step(step, mesh)(state, *batch),
        lambda: devices.repeat(step, same, mesh, loop=loop)(state, batch, 2),
    ):
        with pytest.raises(ValueError, match=r"labels must have a multiple of 4 rows.* got 6"):
            call()


def test_a_state_on_another_mesh_is_named():
    layout = lsm.ClassParallel("model", "model", mesh_of(4, 1))
    with jax.set_mesh(mesh_of(1, 4)):
        model = Headed(nnx.Rngs(0), layout=lsm.ClassParallel("model", ("data", "model")))
        graphdef, state = training.create(model, OPTIMIZER)
    step = devices.compile_step(training.train_step(graphdef, OPTIMIZER, LAM), layout.mesh)
    named = r"state.params\['head'\]\['kernel'\] must lie on the mesh of the step"
    with pytest.raises(ValueError, match=named):
        step(state, *images_and_labels(8, 3))


@pytest.mark.parametrize("length", [0, -1, 1.0])
def test_a_number_of_updates_below_one_is_refused(length):
    graphdef, state = training.create(Headed(nnx.Rngs(0)), OPTIMIZER)
    step, mesh = training.train_step(graphdef, OPTIMIZER, LAM), devices.data_mesh(1)
    many = devices.repeat(step, same, mesh)
    with pytest.raises((TypeError, ValueError), match="length must be"):
        many(state, images_and_labels(4, 3), length)


# The classes are split over some devices.


@pytest.fixture(scope="module")
def line_alone():
    """A line's first kernel, and two updates and an evaluation of it on one device."""
    model, batch = Line(nnx.Rngs(0)), images_and_labels(BATCH, WIDTH)
    graphdef, state = training.create(model, optax.adam(1e-2))
    reached, metrics = updates(graphdef, state, batch, 2, optax.adam(1e-2))
    evaluated = jax.jit(training.eval_step(graphdef))(reached, *batch)
    return model.head.kernel[...], reached, metrics, evaluated


@pytest.mark.parametrize(
    ("kind", "shape", "named"),
    [
        (AxisType.Auto, (2, 2), False),
        (AxisType.Auto, (4,), False),
        (AxisType.Explicit, (2, 2), False),
        (AxisType.Explicit, (4,), False),
        (AxisType.Explicit, (2, 2), True),
    ],
    ids=["auto, two axes", "auto", "explicit, two axes", "explicit", "explicit, named"],
)
def test_a_class_parallel_head_gives_one_devices_numbers(kind, shape, named, line_alone):
    """The kernel and its optimizer moments stay split, also where the layout names the mesh."""
    batch, mesh, optimizer = images_and_labels(BATCH, WIDTH), mesh_of(*shape, kind=kind), optax.adam
    classes = mesh.axis_names[-1]
    with jax.set_mesh(mesh):
        layout = lsm.ClassParallel(classes, mesh.axis_names, mesh if named else None)
        model = Line(nnx.Rngs(0), layout=layout)
        kernel = np.asarray(model.head.kernel[...])[:, :CLASSES]
        graphdef, state = training.create(model, optimizer(1e-2))
        step = training.train_step(graphdef, optimizer(1e-2), LAM)
        compiled, reached = devices.compile_step(step, mesh), copied(state)
        for _ in range(2):
            reached, metrics = compiled(reached, *batch)
        repeated, _ = devices.repeat(step, same, mesh, loop=True)(copied(state), batch, 2)
        evaluate = devices.compile_step(training.eval_step(graphdef), mesh, donate=False)
        evaluated = evaluate(reached, *batch)

    first, wanted, seen, wanted_evaluation = line_alone
    np.testing.assert_allclose(kernel, first, rtol=1e-5)
    for ours in (reached, repeated):
        held = [ours.params["head"]["kernel"], *jax.tree.leaves(ours.opt_state)]
        split = [array for array in held if array.shape == (4, 8 if len(shape) == 1 else 6)]
        assert [array.sharding.spec for array in split] == [P(None, classes)] * 3
        cut = jax.tree.map(
            lambda array: array[:, :CLASSES] if array.ndim == 2 else array, jax.device_get(ours)
        )
        cut.params["layer"] = ours.params["layer"]
        assert_close(cut.params, wanted.params)
        assert ours.params["layer"]["kernel"].sharding.is_fully_replicated
    assert_close(metrics, jax.tree.map(lambda array: array[-1], seen))
    assert_close(evaluated, wanted_evaluation)


# The state's memory is donated.


def test_state_is_donated(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    step = devices.compile_step(training.train_step(graphdef, OPTIMIZER, LAM), devices.data_mesh(1))
    ours = copied(state)
    step(ours, *examples)
    assert ours.params["head"]["kernel"].is_deleted()
    with pytest.raises(ValueError, match="state must be alive, got a deleted state"):
        step(ours, *examples)
    many = devices.repeat(training.train_step(graphdef, OPTIMIZER, LAM), same, devices.data_mesh(1))
    with pytest.raises(ValueError, match="state must be alive, got a deleted state"):
        many(ours, examples, 2)


@pytest.mark.parametrize("name", ALIASING)
def test_an_optimizer_that_keeps_the_parameters_can_be_donated(name):
    optimizer, batch = ALIASING[name](), images_and_labels(BATCH, WIDTH)
    model, mesh = Line(nnx.Rngs(0)), devices.data_mesh(4)
    graphdef, state = training.create(model, optimizer)
    wanted, _ = updates(graphdef, state, batch, 4, optimizer)
    step = training.train_step(graphdef, optimizer, LAM)
    compiled, ours = devices.compile_step(step, mesh), state
    for _ in range(4):
        ours, _ = compiled(ours, *batch)
    assert_close(ours.params, wanted.params)
    # A caller may initialise the optimizer again: the state then holds the parameters twice.
    _, state = training.create(model, optimizer)
    aliased = state._replace(opt_state=optimizer.init(state.params))
    repeated, _ = devices.repeat(step, same, mesh, loop=True)(aliased, batch, 4)
    assert_close(repeated.params, wanted.params)
    assert model(batch[0]).shape == (BATCH, 4)


def test_a_donated_step_under_jit_leaves_the_callers_model():
    model, batch = Line(nnx.Rngs(0)), images_and_labels(BATCH, WIDTH)
    optimizer = optax.contrib.dog()
    graphdef, state = training.create(model, optimizer)
    step = jax.jit(training.train_step(graphdef, optimizer, LAM), donate_argnums=0)
    step(state, *batch)
    assert state.params["head"]["kernel"].is_deleted() and model(batch[0]).shape == (BATCH, 4)


def test_a_fresh_state_and_its_successor_share_a_program(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    step = training.train_step(graphdef, OPTIMIZER, LAM)
    compiled, ours, programs = (
        devices.compile_step(step, devices.data_mesh(4)),
        copied(state),
        set(),
    )
    for _ in range(2):
        programs.add(id(compiled._program(ours, *examples, None)))
        ours, _ = compiled(ours, *examples)
    assert len(programs) == 1


def test_a_step_is_traced_once(graphdef_and_state, examples):
    graphdef, state = graphdef_and_state
    step, traces = training.train_step(graphdef, OPTIMIZER, LAM), []

    def counted(*arguments):
        traces.append(None)
        return step(*arguments)

    mesh = devices.data_mesh(4)
    compiled, ours = (
        devices.compile_step(counted, mesh),
        jax.device_put(state, NamedSharding(mesh, P())),
    )
    for _ in range(3):
        ours, _ = compiled(ours, *examples)
    assert len(traces) == 1
