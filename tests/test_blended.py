"""Cross-entropy of predictions blended with another model's: the sum is made inside the kernels.

That it is what the same sum in TensorFlow gives, in value and gradients to both, on every path, and
that no memory holds it.
"""

import json
import os
import subprocess
import sys
import warnings
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import fusedloss
import test_accuracy
import truth
from fusedloss import _lib, bench_memory, losses, reference
from fusedloss.softmax_xent import Blend

pytestmark = pytest.mark.usefixtures("device")
COMPILED = fusedloss.backend() == "compiled"
RUN = test_accuracy.RUN
WEIGHTS = (0.7, 0.3)
FACTORS = {
    **test_accuracy.FACTORS,
    "shape": [*test_accuracy.SHAPES, (3, 0), (40, 400)],
    "subset": [None, "few", "many", "mask"],  # those that the Keras classes take by themselves
}
PAIRS = list(AllPairs(list(FACTORS.values()), filter_func=test_accuracy._is_possible))


def _is_drawn(values):
    case = dict(zip(FACTORS, values, strict=True))
    return case["shape"][-1] > 0 or (case["subset"] is None and not case["class_weight"])


def naive(x, g):
    """The blend as users write it."""
    return WEIGHTS[0] * x + WEIGHTS[1] * g


@pytest.mark.parametrize("values", list(filter(_is_drawn, PAIRS)), ids=test_accuracy._name)
def test_error_is_within_twice_that_of_the_sum_in_tensorflow(values):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    if case["shape"][-1] == 0:
        case["targets"] = "soft"  # there is no label
    g, *_ = test_accuracy.sample(case, rng)
    x, targets, arguments, cotangents = test_accuracy.sample(case, rng)
    sparse = case["targets"].startswith("int")
    blend = naive(x.astype(np.longdouble), g.astype(np.longdouble))
    if x.dtype.itemsize == 2:  # Half precision is where the rounding of the blend counts.
        blend = blend.astype(x.dtype)
    with np.errstate(invalid="ignore"):  # −Inf − −Inf, in rows that do not count
        exact, exact_gradient, terms, gradient_terms = truth.with_terms(blend, targets, **arguments)
    exact_gradient = exact_gradient * cotangents.astype(np.longdouble)[..., None]
    gradient_terms *= np.abs(cotangents).max(initial=0)
    sums_epsilon = np.finfo(cotangents.dtype).eps
    epsilon = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case["dtype"], sums_epsilon)

    kind = losses.SparseCategoricalCrossentropy if sparse else losses.CategoricalCrossentropy
    training = case["path"] == "training" and case["shape"][:-1]
    ours = kind(
        reduction="sum" if training else None,
        dtype=cotangents.dtype.name,
        **{"from_logits": True, **arguments},
    )
    stock = getattr(reference, "sparse_softmax_xent" if sparse else "softmax_xent")

    def fused(targets, x, g, cotangents):
        with tf.GradientTape() as tape:
            tape.watch([x, g])
            if training:
                loss = ours(targets, Blend([x, g], WEIGHTS), cotangents)
                cotangents = None
            else:
                loss = ours(targets, Blend([x, g], WEIGHTS))
        return loss, tape.gradient(loss, [x, g], cotangents)

    def plain(targets, x, g, cotangents):
        with tf.GradientTape() as tape:
            tape.watch([x, g])
            loss = stock(targets, naive(x, g), **arguments)
        return loss, tape.gradient(loss, [x, g], cotangents)

    inputs = [tf.constant(array) for array in (targets, x, g, cotangents)]
    tf_loss, tf_gradients = plain(*inputs)
    loss, gradients = RUN[case["run"]](fused)(*inputs)
    if training:
        exact, tf_loss = exact * cotangents, tf_loss * cotangents
        terms *= np.abs(cotangents).sum()
        size = np.abs(exact).sum()
        allowed = 2 * np.abs(tf_loss - exact).sum() + sums_epsilon * max(4 * size, terms)
        assert abs(np.longdouble(loss.numpy()) - exact.sum()) <= allowed
    else:
        test_accuracy.check_error(loss, tf_loss, exact, terms, sums_epsilon, "loss")
    for w, gradient, tf_gradient in zip(WEIGHTS, gradients, tf_gradients, strict=True):
        assert gradient.dtype == tf_gradient.dtype
        gradient, tf_gradient = tf.cast(gradient, tf.float64), tf.cast(tf_gradient, tf.float64)
        test_accuracy.check_error(
            gradient, tf_gradient, w * exact_gradient, w * gradient_terms, epsilon, "gradient"
        )


def probabilities(shape, seed=0):
    scores = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return tf.constant(tf.nn.softmax(scores).numpy())


def frozen(classes, seed=0):
    keras.utils.set_random_seed(seed)
    dense = keras.layers.Dense(classes, activation="softmax")
    return keras.Sequential([keras.Input([classes]), keras.layers.Reshape([classes]), dense])


def targets_of(name, rows, classes):
    labels = np.random.default_rng(9).integers(0, classes, rows)
    return labels if name.startswith("Sparse") else np.eye(classes, dtype=np.float32)[labels]


NAMES = ["CategoricalCrossentropy", "SparseCategoricalCrossentropy"]
REDUCTIONS = ["sum_over_batch_size", "sum", "mean_with_sample_weight", None]


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_blended_loss_is_keras_on_the_sum_through_the_frozen_model(name, reduction, run):
    x, model, y = probabilities((6, 10)), frozen(10), targets_of(name, 6, 10)
    weight = tf.constant(np.random.default_rng(1).random(6), tf.float32)
    mask = tf.constant([True, False, True, True, True, False])
    ours = losses.BlendedLoss(getattr(losses, name)(reduction=reduction), model, WEIGHTS)
    stock = getattr(keras.losses, name)(reduction=reduction)

    def of(loss):
        def step(x, weight):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(x, weight)
            return value, tape.gradient(value, x)

        return run(step)(x, weight)

    def masked(x):
        x = tf.identity(x)
        keras.src.backend.set_keras_mask(x, mask)
        return x

    def stock_masked(x, weight):
        return stock(y, masked(naive(x, model(x))), weight)

    for our, their in (
        (lambda x, w: ours(y, x, w), lambda x, w: stock(y, naive(x, model(x)), w)),
        (lambda x, w: ours(y, x), lambda x, w: stock(y, naive(x, model(x)))),
        (lambda x, w: ours(y, masked(x), w), stock_masked),
    ):
        for a, b in zip(of(our), of(their), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_ignored_rows_have_no_gradient_to_either_prediction(run):
    y = tf.constant([3, -1, 0, -1])
    x, g = probabilities((4, 5)), probabilities((4, 5), 1)
    loss = losses.SparseCategoricalCrossentropy(ignore_class=-1)
    stock = keras.losses.SparseCategoricalCrossentropy(ignore_class=-1)

    def step(x, g, blend):
        with tf.GradientTape() as tape:
            tape.watch([x, g])
            value = blend(x, g)
        return value, *tape.gradient(value, [x, g])

    ours = run(lambda x, g: step(x, g, lambda x, g: loss(y, Blend([x, g], WEIGHTS))))(x, g)
    theirs = run(lambda x, g: step(x, g, lambda x, g: stock(y, naive(x, g))))(x, g)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert not tf.reduce_any(tf.stack(ours[1:])[:, 1::2] != 0)


@pytest.mark.parametrize("axis", [1, -1])
def test_the_class_axis_of_a_blend_can_be_any(axis):
    x, g = probabilities((2, 5, 5)), probabilities((2, 5, 5), 1)
    y = tf.one_hot(np.random.default_rng(0).integers(0, 5, (2, 5)), 5, axis=axis)
    ours = losses.CategoricalCrossentropy(axis=axis)(y, Blend([x, g], WEIGHTS))
    stock = keras.losses.CategoricalCrossentropy(axis=axis)(y, naive(x, g))
    np.testing.assert_allclose(ours, stock, rtol=1e-6)


@pytest.mark.parametrize("run", [tf.function, RUN["xla"]])
def test_softmax_outputs_are_blended_as_they_are(run):
    """Walked back to its logits, a prediction would be another thing than what the blend holds."""
    logits = tf.constant(np.random.default_rng(0).normal(size=(4, 5)), tf.float32)
    g, y = probabilities((4, 5), 1), targets_of("Categorical", 4, 5)
    ours = losses.CategoricalCrossentropy()
    found = run(lambda z: ours(y, Blend([tf.nn.softmax(z), g], WEIGHTS)))(logits)
    stock = keras.losses.CategoricalCrossentropy()(y, naive(tf.nn.softmax(logits), g))
    np.testing.assert_allclose(found, stock, rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_compiled_library_the_sum_is_tensorflows(name, monkeypatch):
    monkeypatch.setattr(_lib, "ops", lambda: None)
    x, g, y = probabilities((6, 10)), probabilities((6, 10), 1), targets_of(name, 6, 10)
    ours = getattr(losses, name)()(y, Blend([x, g], WEIGHTS))
    np.testing.assert_allclose(ours, getattr(keras.losses, name)()(y, naive(x, g)), rtol=1e-6)


def test_an_empty_batch_has_loss_0():
    for shape in ((0, 5), (3, 0)):
        x, g = tf.zeros(shape), tf.zeros(shape)
        with tf.GradientTape() as tape:
            tape.watch([x, g])
            loss = losses.CategoricalCrossentropy()(tf.zeros(shape), Blend([x, g], WEIGHTS))
        assert loss == 0
        assert [gradient.shape for gradient in tape.gradient(loss, [x, g])] == [shape] * 2


# What a step consists of.


def traced(step, *arguments):
    return tf.function(step, autograph=False).get_concrete_function(*arguments).graph


def fused_ops(graph):
    return [op.type for op in graph.get_operations() if op.type.startswith("Fusedloss>")]


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_one_op_without_a_sum_in_tensorflow(name):
    x, g, y = probabilities((6, 10)), probabilities((6, 10), 1), targets_of(name, 6, 10)
    loss = getattr(losses, name)()

    def step(x, g):
        with tf.GradientTape() as tape:
            tape.watch([x, g])
            value = loss(y, Blend([x, g], WEIGHTS))
        return value, tape.gradient(value, [x, g])

    graph = traced(step, x, g)
    assert fused_ops(graph) == ["Fusedloss>SoftmaxXentReduced"]
    types = [op.type for op in graph.get_operations() if (6, 10) in [o.shape for o in op.outputs]]
    # Each gradient is multiplied by the cotangent of the loss, a 1 that the optimiser folds away.
    assert types.count("Mul") == 2
    assert not any(word in kind for kind in types for word in ("Add", "Sub", "Accumulate"))
    evaluated = traced(lambda x, g: loss(y, Blend([x, g], WEIGHTS)), x, g)
    assert fused_ops(evaluated) == ["Fusedloss>SoftmaxXent"]
    half = [tf.cast(part, tf.float16) for part in (x, g)]
    assert fused_ops(traced(step, *half)) == ["Fusedloss>SoftmaxXent", "Fusedloss>SoftmaxXentGrad"]


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
def test_the_frozen_model_counts_as_recorded_through_the_predictions():
    model, y = frozen(10), targets_of("Sparse", 6, 10)
    loss = losses.BlendedLoss(losses.SparseCategoricalCrossentropy(), model, WEIGHTS)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = loss(y, x)
        return tape.gradient(value, x)

    assert fused_ops(traced(step, probabilities((6, 10)))) == ["Fusedloss>SoftmaxXentReduced"]


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
def test_a_penalty_rides_along():
    x, g, y = probabilities((6, 10)), probabilities((6, 10), 1), targets_of("Sparse", 6, 10)
    kernel = tf.Variable(tf.ones([3, 4]))
    plain = losses.SparseCategoricalCrossentropy()
    loss = losses.SparseCategoricalCrossentropy(penalty=fusedloss.Penalty(kernel, l2=0.01))

    def step(x, g, loss=loss):
        with tf.GradientTape() as tape:
            tape.watch([x, g])
            value = loss(y, Blend([x, g], WEIGHTS))
        return value, tape.gradient(value, [x, g, kernel])

    assert fused_ops(traced(step, x, g)) == ["Fusedloss>SoftmaxXentReducedPenalized"]
    value, gradients = tf.function(step)(x, g)
    expected, parts = step(x, g, plain)
    np.testing.assert_allclose(value, expected + 0.12, rtol=1e-6)
    for ours, theirs in zip(gradients, [*parts[:2], 0.02 * kernel], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


# 16 MB in each array.
MEMORY = """
import json
import numpy as np, tensorflow as tf
from fusedloss import losses
from fusedloss.bench_memory import _extra_bytes
from fusedloss.softmax_xent import Blend

rng = np.random.default_rng(0)
x, g, dense = (tf.constant(rng.uniform(0.1, 1, (4096, 1024)), tf.float32) for _ in range(3))
labels = tf.constant(rng.integers(0, 1024, 4096))
found = {}
for name, y in (("CategoricalCrossentropy", dense), ("SparseCategoricalCrossentropy", labels)):
    for path in ("sum", None):
        for jit in (False, True):
            loss = getattr(losses, name)(reduction=path)

            @tf.function(jit_compile=jit, autograph=False)
            def step(y, x, g, blends=True):
                with tf.GradientTape() as tape:
                    tape.watch([x, g])
                    value = loss(y, Blend([x, g], (0.7, 0.3)) if blends else 0.7 * x + 0.3 * g)
                return value, tape.gradient(value, [x, g])

            found[f"{name} {path} {jit}"] = _extra_bytes(step, (y, x, g))
found["sum"] = _extra_bytes(lambda *inputs: step(*inputs, blends=False), (y, x, g))
print(json.dumps(found))
"""


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="it is Linux's to say")
@pytest.mark.parametrize("device", ["CPU:0"], indirect=True)
def test_neither_the_blend_nor_its_gradient_is_in_memory(device):
    run = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env=os.environ | bench_memory.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found.pop("sum") > 2**23, "what a sum in TensorFlow needs is seen"
    assert len(found) == 8
    for name, extra in found.items():
        assert extra < 2**20, name


# Derivatives of higher order, and loops.


def float64_case():
    rng = np.random.default_rng(0)
    x, g = (tf.constant(tf.nn.softmax(rng.normal(size=(4, 5)))) for _ in range(2))
    y = tf.constant(np.eye(5)[rng.integers(0, 5, 4)])
    return y, x, g


def keras_mean(y, x, g):
    shares = naive(x, g)
    return -tf.reduce_mean(
        tf.reduce_sum(y * tf.math.log(shares / tf.reduce_sum(shares, -1, keepdims=True)), -1)
    )


OURS = {
    "training": losses.CategoricalCrossentropy(dtype="float64"),
    "general": losses.CategoricalCrossentropy(dtype="float64", reduction=None),
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("path", OURS)
def test_second_derivatives_are_those_of_the_sum(path, run):
    y, x, g = float64_case()
    rng = np.random.default_rng(1)
    directions = [tf.constant(rng.normal(size=(4, 5))) for _ in range(2)]

    def second(loss):
        def derivatives(x, g):
            with tf.GradientTape() as outer:
                outer.watch([x, g])
                with tf.GradientTape() as inner:
                    inner.watch([x, g])
                    value = loss(x, g)
                gradients = inner.gradient(value, [x, g])
            return *gradients, *outer.gradient(gradients, [x, g], directions)

        return run(derivatives)(x, g)

    ours = second(lambda x, g: tf.reduce_mean(OURS[path](y, Blend([x, g], WEIGHTS))))
    for a, b in zip(ours, second(lambda x, g: keras_mean(y, x, g)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", OURS)
def test_a_hessian_and_a_vectorized_map_need_no_loop(path):
    y, x, g = float64_case()

    def hessian(loss):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch([x, g])
            with tf.GradientTape() as inner:
                inner.watch([x, g])
                value = loss(x, g)
            gradients = inner.gradient(value, [x, g])
        return [outer.jacobian(gradient, part) for gradient in gradients for part in (x, g)]

    def mapped(loss):
        def gradients(x):
            with tf.GradientTape() as tape:
                tape.watch([x, g])
                value = loss(x, g)
            return tape.gradient(value, [x, g])

        return tf.vectorized_map(gradients, tf.stack([x, x[::-1]]))

    def ours(x, g):
        return tf.reduce_mean(OURS[path](y, Blend([x, g], WEIGHTS)))

    def theirs(x, g):
        return keras_mean(y, x, g)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for form in (hessian, mapped):
            for a, b in zip(form(ours), form(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


# Errors.


def test_arrays_that_differ_are_refused_by_name():
    loss = losses.SparseCategoricalCrossentropy()
    with pytest.raises(ValueError, match="Labels must have the same shape"):
        loss([0, 1], Blend([tf.zeros([2, 3]), tf.zeros([4, 3])], WEIGHTS))

    signature = [tf.TensorSpec([None, None])] * 2
    step = tf.function(lambda x, g: loss([0, 1], Blend([x, g], WEIGHTS)), signature)
    with pytest.raises(tf.errors.InvalidArgumentError):
        step(tf.zeros([2, 3]), tf.zeros([2, 4]))


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
def test_the_op_refuses_more_than_two_arrays():
    with pytest.raises(tf.errors.InvalidArgumentError, match="one array, or two .* got 3"):
        _lib.ops().fusedloss_softmax_xent(
            [tf.zeros([2, 3])] * 3, [0, 1], tf.zeros([0], tf.int64), tf.zeros([0])
        )
