"""Compares the NNX and Linen heads with the functions, each other and Flax's own Dense."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lsoftmax_jax as lsm
from lsoftmax_jax import training
from lsoftmax_jax.linen import LSoftmaxDense as LinenHead
from lsoftmax_jax.nnx import LSoftmaxDense as NnxHead
from tests import oracle
from tests.oracle import as_arrays, assert_close

B, D, C = 7, 5, 4
PROBLEM = oracle.problem(1, B, D, C)
OPTIONS = {"label_smoothing": 0.1, "plan": lsm.Plan(class_block=3)}


def arguments():
    features, _, labels = as_arrays(PROBLEM, jnp.float32)
    return features, labels, jnp.float32(0.5)


def nnx_head(**keywords):
    head = NnxHead(D, C, margin=3, rngs=nnx.Rngs(0), **keywords)
    head.kernel[...] = jnp.asarray(PROBLEM.kernel, head.kernel.dtype)
    return head


def linen_variables():
    return {"params": {"kernel": jnp.asarray(PROBLEM.kernel, jnp.float32)}}


@pytest.fixture(scope="module")
def answers():
    """(logits with margin, without, loss, gradient of the mean loss) of function and both heads."""

    def function(features, labels, lam):
        kernel = jnp.asarray(PROBLEM.kernel, jnp.float32)

        def mean(kernel):
            return jnp.mean(lsm.lsoftmax_loss(features, kernel, labels, margin=3, lam=lam))

        rows = features, kernel, labels
        return (
            lsm.lsoftmax_logits(*rows, margin=3, lam=lam),
            features @ kernel,
            lsm.lsoftmax_loss(*rows, margin=3, lam=lam, **OPTIONS),
            jax.grad(mean)(kernel),
        )

    def with_nnx(features, labels, lam):
        head = nnx_head()
        gradients = nnx.grad(lambda head: jnp.mean(head.loss(features, labels, lam)))(head)
        loss = head.loss(features, labels, lam, **OPTIONS)
        return head(features, labels, lam), head(features), loss, gradients["kernel"][...]

    def with_linen(features, labels, lam):
        head, variables = LinenHead(C, margin=3), linen_variables()

        def loss(variables, **keywords):
            return head.apply(variables, features, labels, lam, method="loss", **keywords)

        gradients = jax.grad(lambda variables: jnp.mean(loss(variables)))(variables)
        logits = head.apply(variables, features, labels, lam), head.apply(variables, features)
        return *logits, loss(variables, **OPTIONS), gradients["params"]["kernel"]

    results = {
        rule.__name__: jax.jit(rule)(*arguments()) for rule in (function, with_nnx, with_linen)
    }
    results["oracle"] = (
        oracle.logits(*PROBLEM, 3, 0.5),
        PROBLEM.features @ PROBLEM.kernel,
        oracle.loss(*PROBLEM, 3, 0.5, None, 0.1),
        oracle.loss_pullback(*PROBLEM, np.full(B, 1 / B), 3, 0.5).kernel,
    )
    return results


@pytest.mark.parametrize("other", ["with_nnx", "with_linen", "oracle"])
def test_heads_agree_with_the_function_and_the_oracle(answers, other):
    for ours, theirs in zip(answers["function"], answers[other], strict=True):
        assert_close(ours, theirs, 1e-5)


def test_the_only_parameter_is_kernel():
    state = nnx.to_pure_dict(nnx.state(NnxHead(D, C, rngs=nnx.Rngs(0)), nnx.Param))
    assert jax.tree.map(jnp.shape, state) == {"kernel": (D, C)}
    variables = jax.eval_shape(LinenHead(C).init, jax.random.key(0), jnp.ones((B, D)))
    assert jax.tree.map(jnp.shape, variables) == {"params": {"kernel": (D, C)}}


def test_margin_defaults_to_four():
    features, labels, _ = arguments()
    wanted = oracle.logits(*PROBLEM, 4)
    head = NnxHead(D, C, rngs=nnx.Rngs(0))
    head.kernel[...] = jnp.asarray(PROBLEM.kernel, jnp.float32)
    assert_close(head(features, labels, 0.0), wanted, 1e-5)
    assert_close(LinenHead(C).apply(linen_variables(), features, labels, 0.0), wanted, 1e-5)


def test_same_initial_kernel_as_flax_dense():
    head = NnxHead(D, C, rngs=nnx.Rngs(7))
    dense = nnx.Linear(D, C, use_bias=False, rngs=nnx.Rngs(7))
    chex.assert_trees_all_equal(head.kernel[...], dense.kernel[...])
    features = arguments()[0]
    ours = LinenHead(C).init(jax.random.key(7), features)
    theirs = linen.Dense(C, use_bias=False).init(jax.random.key(7), features)
    chex.assert_trees_all_equal(ours, theirs)


def test_a_dense_checkpoint_loads_and_answers_alike():
    features = arguments()[0]
    dense = nnx.Linear(D, C, use_bias=False, rngs=nnx.Rngs(1))
    head = NnxHead(D, C, rngs=nnx.Rngs(2))
    nnx.update(head, nnx.state(dense, nnx.Param))
    chex.assert_trees_all_close(head(features), dense(features), rtol=1e-6)

    dense = linen.Dense(C, use_bias=False)
    variables = dense.init(jax.random.key(1), features)
    wanted = dense.apply(variables, features)
    chex.assert_trees_all_close(LinenHead(C).apply(variables, features), wanted, rtol=1e-6)


def test_a_linen_kernel_of_other_classes_is_refused():
    params = {"params": {"kernel": jnp.ones((8, 12))}}
    with pytest.raises(ValueError, match=r"\(D, 10\).*\(8, 12\)"):
        LinenHead(10).apply(params, jnp.ones((2, 8)), jnp.zeros(2, int), lam=1.0, method="loss")


def test_linen_initialises_through_features_labels_or_loss():
    features, labels, lam = arguments()
    key, head = jax.random.key(0), LinenHead(C)
    variables = head.init(key, features)
    chex.assert_trees_all_equal(variables, head.init(key, features, labels, lam))
    chex.assert_trees_all_equal(variables, head.init(key, features, labels, lam, method="loss"))


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="Flax 0.11 has one mode")
@pytest.mark.parametrize("graph_mode", [True, False])
def test_nnx_training_step_with_and_without_graph_mode(graph_mode):
    features, labels, lam = arguments()
    with nnx.set_graph_mode(graph_mode):
        head = nnx_head()
        traces = []

        @nnx.jit
        def step(head, features, labels, lam):
            traces.append(lam)

            @nnx.value_and_grad
            def mean(head):
                return jnp.mean(head.loss(features, labels, lam))

            loss, gradients = mean(head)
            return loss, gradients, head(features)

        for value in (lam, 2 * lam):
            loss, gradients, logits = step(head, features, labels, value)
    assert len(traces) == 1
    assert_close(loss, np.mean(oracle.loss(*PROBLEM, 3, 1.0)), 1e-5)
    wanted = oracle.loss_pullback(*PROBLEM, np.full(B, 1 / B), 3, 1.0).kernel
    (kernel_bar,) = jax.tree.leaves(gradients)
    assert_close(kernel_bar, wanted, 1e-5)
    assert_close(logits, PROBLEM.features @ PROBLEM.kernel, 1e-6)


def test_nnx_split_and_merge_keep_the_head():
    features, labels, lam = arguments()
    graphdef, state = nnx.split(nnx_head())
    logits = jax.jit(lambda state: nnx.merge(graphdef, state)(features, labels, lam))(state)
    assert_close(logits, oracle.logits(*PROBLEM, 3, 0.5), 1e-5)


def test_dtype_is_of_the_computation_and_param_dtype_of_the_kernel():
    features, labels, lam = arguments()
    rounded = PROBLEM._replace(
        features=np.asarray(features.astype(jnp.bfloat16), np.float64),
        kernel=np.asarray(jnp.asarray(PROBLEM.kernel, jnp.bfloat16), np.float64),
    )
    head = nnx_head(dtype=jnp.bfloat16)
    assert head.kernel.dtype == jnp.float32
    other = LinenHead(C, margin=3, dtype=jnp.bfloat16)
    variables = other.init(jax.random.key(0), features)
    assert variables["params"]["kernel"].dtype == jnp.float32
    answers = [
        (head(features, labels, lam), head.loss(features, labels, lam)),
        (
            other.apply(linen_variables(), features, labels, lam),
            other.apply(linen_variables(), features, labels, lam, method="loss"),
        ),
    ]
    for logits, loss in answers:
        assert logits.dtype == jnp.bfloat16 and loss.dtype == jnp.float32
        assert_close(logits, oracle.logits(*rounded, 3, 0.5), 2**-8)
        np.testing.assert_allclose(loss, oracle.loss(*rounded, 3, 0.5), rtol=3e-3)
    half = NnxHead(D, C, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half.kernel.dtype == jnp.bfloat16
    variables = LinenHead(C, param_dtype=jnp.bfloat16).init(jax.random.key(0), features)
    assert variables["params"]["kernel"].dtype == jnp.bfloat16


def test_kernel_init_is_used():
    head = NnxHead(D, C, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    chex.assert_trees_all_equal(head.kernel[...], jnp.ones((D, C)))
    head = LinenHead(C, kernel_init=linen.initializers.ones)
    variables = head.init(jax.random.key(0), jnp.ones((B, D)))
    chex.assert_trees_all_equal(variables["params"]["kernel"], jnp.ones((D, C)))


def test_loss_options_reach_the_function():
    features, labels, lam = arguments()
    where = jnp.arange(B) != 2
    wanted = oracle.loss(*PROBLEM, 3, 0.5, np.arange(B) != 2, 0.2)
    plain = PROBLEM.features @ PROBLEM.kernel
    apply = LinenHead(C, margin=3).apply
    keywords = {"where": where, "label_smoothing": 0.2}
    for loss, seen in (
        nnx_head().loss_and_statistics(features, labels, lam, **keywords),
        apply(linen_variables(), features, labels, lam, method="loss_and_statistics", **keywords),
    ):
        assert_close(loss, wanted, 1e-5)
        kept = np.asarray(where)
        target = plain[np.arange(B), PROBLEM.labels]
        assert_close(np.asarray(seen.plain_logit)[kept], target[kept], 1e-5)


@pytest.mark.parametrize("margin", [0, 2.5, True, "4"])
def test_margin_mistakes_are_named(margin):
    with pytest.raises((TypeError, ValueError), match="margin"):
        NnxHead(D, C, margin=margin, rngs=nnx.Rngs(0))
    with pytest.raises((TypeError, ValueError), match="margin"):
        LinenHead(C, margin=margin).init(jax.random.key(0), jnp.ones((B, D)))


@pytest.mark.parametrize("argument", ["labels", "lam", "features"])
def test_call_mistakes_are_named(argument):
    features, labels, _ = arguments()
    wrong = {"labels": jnp.ones(B), "lam": -1.0, "features": jnp.ones((B, D), jnp.int32)}
    call = {"features": features, "labels": labels, "lam": 0.0, argument: wrong[argument]}
    head = nnx_head()
    for rule in (head, head.loss):
        with pytest.raises((TypeError, ValueError), match=argument):
            rule(**call)


@pytest.mark.parametrize(("argument", "value"), [("classes", 0), ("in_features", -1)])
def test_sizes_below_one_are_refused(argument, value):
    sizes = {"in_features": D, "classes": C, argument: value}
    with pytest.raises(ValueError, match=argument):
        NnxHead(**sizes, rngs=nnx.Rngs(0))


def test_importing_the_functions_imports_no_flax():
    code = "import sys, lsoftmax_jax; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_objects_than_layouts_are_refused():
    with pytest.raises(TypeError, match=r"layout must be .*ClassParallel, got 'model'"):
        NnxHead(4, 3, layout="model", rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"layout must be .*ClassParallel, got 'model'"):
        LinenHead(3, layout="model").init(jax.random.key(0), jnp.ones((2, 4)))


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="Flax 0.11 has one mode")
def test_without_lam_the_heads_pace_themselves():
    features, labels, _ = arguments()
    rows = features, jnp.asarray(PROBLEM.kernel, jnp.float32), labels
    wanted = lsm.lsoftmax_loss_and_statistics(*rows, margin=3, lam=lsm.self_paced())
    for graph_mode in (True, False):
        with nnx.set_graph_mode(graph_mode):
            got = nnx.jit(lambda head: head.loss_and_statistics(features, labels))(nnx_head())
            chex.assert_trees_all_close(got, wanted, rtol=1e-5)
            loss = nnx.jit(lambda head: head.loss(features, labels))(nnx_head())
            chex.assert_trees_all_close(loss, wanted[0], rtol=1e-5)
    got = LinenHead(C, margin=3).apply(
        linen_variables(), features, labels, method="loss_and_statistics"
    )
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)


def test_lam_without_labels_is_refused_in_words():
    features, _, lam = arguments()
    for call in (nnx_head(), functools.partial(LinenHead(C).apply, linen_variables())):
        with pytest.raises(TypeError, match="labels must be given with lam"):
            call(features, lam=lam)


@pytest.mark.parametrize(
    ("margin", "lam", "wanted"),
    [
        (3, None, lsm.self_paced()),
        (3, 2.5, 2.5),
        (3, lsm.self_paced(1.0), lsm.self_paced(1.0)),
        (lsm.margins.ArcFace(0.3, scale=8.0), None, 0.0),
        (lsm.margins.ArcFace(0.3, scale=8.0), 1.0, 1.0),
        (lsm.margins.SphereFace(3), None, lsm.self_paced()),
        (lsm.margins.SphereFace(3, scale=8.0), None, lsm.self_paced()),
    ],
)
def test_lam_comes_from_the_call_or_the_head_or_the_margin(margin, lam, wanted):
    features, labels, _ = arguments()
    weights = jnp.linspace(0.5, 1.5, B)
    rows = features, jnp.asarray(PROBLEM.kernel, jnp.float32), labels
    one = NnxHead(D, C, margin=margin, lam=lam, rngs=nnx.Rngs(0))
    one.kernel[...] = rows[1]
    twin = functools.partial(LinenHead(C, margin=margin, lam=lam).apply, linen_variables())
    loss = lsm.lsoftmax_loss(*rows, margin=margin, lam=wanted)
    logits = lsm.lsoftmax_logits(*rows, margin=margin, lam=wanted)
    for heads_loss, heads_logits, heads_sum in (
        (
            one.loss(features, labels),
            one(features, labels),
            one.loss_sum(features, labels, weights),
        ),
        (
            twin(features, labels, method="loss"),
            twin(features, labels),
            twin(features, labels, weights, method="loss_sum"),
        ),
    ):
        chex.assert_trees_all_close(heads_loss, loss, rtol=1e-5)
        chex.assert_trees_all_close(heads_logits, logits, rtol=1e-5)
        chex.assert_trees_all_close(heads_sum, jnp.sum(weights * loss), rtol=1e-5)
    for_call = one.loss(features, labels, 7.0), twin(features, labels, 7.0, method="loss")
    loss = lsm.lsoftmax_loss(*rows, margin=margin, lam=7.0)
    chex.assert_trees_all_close(for_call, (loss, loss), rtol=1e-5)


@pytest.mark.parametrize("rule", ["__call__", "loss", "loss_and_statistics"])
def test_a_schedule_in_place_of_its_value_is_refused_in_words(rule):
    features, labels, _ = arguments()
    with pytest.raises(TypeError, match=r"pass schedule\(step\), not the schedule"):
        getattr(nnx_head(), rule)(features, labels, lsm.margin_schedule(10))


@pytest.mark.parametrize("lam", [jnp.float32(5.0), np.array(5.0), 5])
def test_lam_of_a_head_is_a_number_that_nobody_trains(lam):
    head = nnx_head(lam=lam)
    assert list(nnx.to_pure_dict(nnx.state(head))) == ["kernel"] and type(head.lam) is float


def test_lam_of_a_head_must_be_known():
    with pytest.raises(TypeError, match="lam of a head must be known, got a traced float32"):
        jax.jit(lambda lam: nnx_head(lam=lam).kernel[...])(jnp.float32(5.0))


def test_the_rule_in_place_of_its_call_is_refused_in_words():
    features, labels, _ = arguments()
    graphdef, _ = training.create(nnx_head(), optax.sgd(0.1))
    for call in (
        lambda: nnx_head(lam=lsm.self_paced),
        lambda: nnx_head().loss(features, labels, lsm.self_paced),
    ):
        with pytest.raises(TypeError, match=r"lam must be .* call the rule, self_paced\(\)"):
            call()
    with pytest.raises(TypeError, match=r"lam must be .*self_paced\(\)"):
        training.train_step(graphdef, optax.sgd(0.1), lsm.self_paced)


@pytest.mark.parametrize("dtype", [None, jnp.float32])
def test_features_that_are_no_real_floats_are_refused(dtype):
    for features in (jnp.ones((2, D), int), jnp.ones((2, D), jnp.complex64)):
        with pytest.raises(TypeError, match="features must be floating point"):
            nnx_head(dtype=dtype).loss(features, [0, 1])


def test_lam_may_be_a_variable_of_flax():
    features, labels, _ = arguments()
    call = nnx_head().loss
    wanted = call(features, labels, 2.0)
    for run in (call, jax.jit(call)):
        ours = run(features, labels, nnx.Variable(jnp.float32(2.0)))
        chex.assert_trees_all_close(ours, wanted, rtol=1e-6)


@pytest.mark.parametrize("rule", ["loss", "loss_and_statistics"])
def test_lam_may_be_named_and_options_must(rule):
    features, labels, lam = arguments()
    call = getattr(nnx_head(), rule)
    chex.assert_trees_all_equal(call(features, labels, lam=lam), call(features, labels, lam))
    with pytest.raises(TypeError, match="positional"):
        call(features, labels, lam, jnp.ones(B, bool))


def test_a_head_goes_through_an_orbax_checkpoint(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    head, other = nnx_head(), NnxHead(D, C, margin=3, rngs=nnx.Rngs(9))
    with checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "head", nnx.to_pure_dict(nnx.state(head)))
        saver.wait_until_finished()
        state = saver.restore(tmp_path / "head", nnx.to_pure_dict(nnx.state(other)))
    nnx.update(other, state)
    chex.assert_trees_all_equal(other.kernel[...], head.kernel[...])


def test_one_feature_without_a_batch():
    features, labels, lam = arguments()
    for head in (nnx_head(), LinenHead(C, margin=3).bind(linen_variables())):
        assert_close(head(features[2]), head(features)[2], 1e-6)
        whole = head.loss(features, labels, lam)
        assert_close(head.loss(features[2], labels[2], lam), whole[2], 1e-6)
