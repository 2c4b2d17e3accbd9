"""The penalty on weights: accuracy, derivatives, that it counts once, training, saving."""

import collections
import math
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs
from tensorflow.python.eager import context

import fusedloss
import truth
from fusedloss import losses, nn, reference
from test_accuracy import check_error
from test_keras import (
    COMPILED,
    MODES,
    RUN,
    assert_same,
    assert_trains_alike,
    clusters,
    run_python,
)

pytestmark = pytest.mark.usefixtures("device")

HALF = ["float16", "bfloat16"]
# Shapes and dtypes: the sizes decide how the variables are cut into blocks of 65536 elements, of
# which small ones share one, and whether gradients are stored past the caches, from 8 MiB on.
VARIABLES = {
    "one": [((17, 5), "float32")],
    "a scalar": [((), "float32")],
    "none but empty ones": [((0,), "float32"), ((3, 0), "float64")],
    "float64": [((30, 4), "float64"), ((7,), "float64")],
    "of half precision": [((9, 11), "float16"), ((65, 33), "bfloat16")],
    "of all kinds": [
        ((3, 4), "float16"), ((), "float64"), ((0, 7), "float32"), ((2, 3, 5), "bfloat16"),
        ((70, 1001), "float32"),
    ],
    "a block and one more": [((65536,), "float32"), ((65537,), "float32"), ((1,), "float32")],
    "200 of all kinds": [
        ((k % 7, 1 + k % 5, 3), ("float32", "float64", *HALF)[k % 4]) for k in range(200)
    ],
    "large": [((1500, 1501), "float32"), ((70001,), "bfloat16"), ((3,), "float32")],
}  # fmt: skip
FORMS = {
    "l1": lambda rng, count: {"l1": 0.3},
    "l2": lambda rng, count: {"l2": 0.01},
    "both": lambda rng, count: {"l1": 0.02, "l2": 0.7},
    "neither": lambda rng, count: {},
    "one a variable": lambda rng, count: {
        "l1": rng.random(count),
        "l2": (rng.random(count) * rng.integers(0, 2, count)).tolist(),
    },
}


def sample(name, rng):
    """Values of about 1, some of them 0."""
    return [
        (rng.normal(size=shape) * (rng.random(shape) > 0.1)).astype(
            tf.as_dtype(dtype).as_numpy_dtype
        )
        for shape, dtype in VARIABLES[name]
    ]


def value_and_gradients(penalty, variables, cotangent):
    with tf.GradientTape() as tape:
        tape.watch(variables)
        value = penalty(variables)
    return value, tape.gradient(value, variables, tf.cast(cotangent, value.dtype))


CASES = list(AllPairs([list(VARIABLES), list(FORMS), ["sum", "mean"], list(RUN), [1.0, -0.7]]))


@pytest.mark.parametrize("name,form,reduce,run,cotangent", CASES)
def test_error_is_within_twice_tensorflows(name, form, reduce, run, cotangent, device):
    rng = np.random.default_rng(zlib.crc32(repr((name, form)).encode()))
    values = sample(name, rng)
    arguments = {**FORMS[form](rng, len(values)), "reduce": reduce}
    exact, exact_gradients = truth.penalty(values, **arguments)
    variables = [tf.constant(value) for value in values]
    found = [
        run(lambda variables, f=f: value_and_gradients(f, variables, cotangent))(variables)
        for run, f in (
            (RUN[run], lambda variables: nn.weight_penalty(variables, **arguments)),
            (RUN["eager"], lambda variables: reference.weight_penalty(variables, **arguments)),
        )
    ]
    (value, gradients), (tf_value, tf_gradients) = found
    is_double = any(dtype == "float64" for _, dtype in VARIABLES[name])
    assert value.dtype == tf_value.dtype == ("float64" if is_double else "float32")
    assert value.device.endswith(device)
    in_float32 = any(dtype != "float64" for _, dtype in VARIABLES[name])
    epsilon = np.finfo(np.float32 if in_float32 else np.float64).eps
    check_error(value, tf_value, np.asarray(exact), 0, epsilon, "value")
    for k, (_, dtype) in enumerate(VARIABLES[name]):
        assert gradients[k].dtype == dtype
        epsilon = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(dtype)
        epsilon = np.finfo(dtype).eps if epsilon is None else epsilon
        ours, theirs = (tf.cast(g[k], tf.float64) for g in (gradients, tf_gradients))
        # Below 6e-8 a float16 has no digits.
        terms = 6e-8 / epsilon if dtype == "float16" else 0
        check_error(ours, theirs, exact_gradients[k] * cotangent, terms, epsilon, f"gradient {k}")


@pytest.mark.parametrize("functions", [nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_propagate(odd, functions):
    variables = [tf.constant([1.0, odd, -2.0]), tf.ones([2])]
    for arguments, slope in (
        ({"l1": 0.5}, 0.5 * np.sign(odd)),
        ({"l2": 0.5}, odd),
        ({"l1": 1.0, "l2": [0.5, 0]}, odd),
    ):
        value, gradients = value_and_gradients(
            lambda v, arguments=arguments: functions.weight_penalty(v, **arguments), variables, 1
        )
        np.testing.assert_array_equal(value, abs(odd))
        np.testing.assert_array_equal(gradients[0][1], slope)
        assert np.isfinite(gradients[0].numpy()[[0, 2]]).all() and np.isfinite(gradients[1]).all()
    # Where both coefficients are 0 there is no term at all.
    arguments = {"l1": [0, 1], "l2": [0, 1]}
    value, gradients = value_and_gradients(
        lambda v: functions.weight_penalty(v, **arguments), variables, 1
    )
    np.testing.assert_array_equal(value, 4)
    np.testing.assert_array_equal(gradients[0].numpy()[[0, 2]], [0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_zeros_have_no_slope(dtype):
    zeros = tf.constant([0.0, -0.0], dtype)
    for l2 in (0, 0.5):
        value, gradient = value_and_gradients(
            lambda v, l2=l2: nn.weight_penalty(v, l1=2, l2=l2), zeros, 1
        )
        assert value == 0
        np.testing.assert_array_equal(tf.cast(gradient, tf.float32), [0, 0])


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
def test_digits_of_large_sums_are_kept():
    """A plain sum in float32 would stop growing at 2^24."""
    count = 2**25 + 3
    value, _ = value_and_gradients(lambda v: nn.weight_penalty(v, l1=1), tf.ones([count]), 1)
    np.testing.assert_allclose(value, count, rtol=1e-7)


# What a penalty is on.


def small_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([8]),
            keras.layers.Dense(16, activation="relu", name="hidden"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(5, name="out"),
        ]
    )


def norm(variables):
    return sum(np.square(np.asarray(v, np.float64)).sum() for v in variables)


def test_layers_and_models_stand_for_their_trainable_variables():
    model = small_model()
    hidden, normalization, out = model.layers
    out.trainable = False
    everything = [*hidden.trainable_variables, normalization.gamma, normalization.beta]
    for given, variables in (
        (hidden, [hidden.kernel, hidden.bias]),
        (hidden.kernel, [hidden.kernel]),
        ([hidden, hidden], [hidden.kernel, hidden.bias]),
        ([hidden.kernel, hidden], [hidden.kernel, hidden.bias]),
        ([hidden, hidden.kernel], [hidden.kernel, hidden.bias]),
        (model, everything),
        ([hidden, model], everything),
        (out.kernel, [out.kernel]),
        (lambda: [hidden.kernel, out], None),
        (lambda: [hidden.kernel, out.kernel], [hidden.kernel, out.kernel]),
        (lambda: hidden, [hidden.kernel, hidden.bias]),
        (tf.Variable([3.0]), [[3.0]]),
        (tf.constant([3.0]), [[3.0]]),
        ([np.array([3.0], np.float32), hidden.kernel], [[3.0], hidden.kernel]),
    ):
        if variables is None:
            variables = [hidden.kernel]
        expected = norm(variables)
        for penalty in (
            fusedloss.Penalty(given, l2=1),
            lambda given=given: nn.weight_penalty(given, l2=1),
            lambda given=given: reference.weight_penalty(given, l2=1),
        ):
            np.testing.assert_allclose(penalty(), expected, rtol=1e-6)


def test_a_callable_is_called_anew_at_each_use():
    chosen = [tf.Variable([1.0, 2.0])]
    penalty = fusedloss.Penalty(lambda: chosen[-1], l2=1)
    assert penalty() == 5
    chosen.append(tf.Variable([3.0]))
    assert penalty() == 9
    chosen[-1].assign([4.0])
    assert penalty() == 16


def test_shapes_that_are_found_when_the_op_runs():
    for function in (nn.weight_penalty, reference.weight_penalty):
        step = tf.function(
            lambda a, b, function=function: value_and_gradients(
                lambda v: function(v, l1=[0.5, 1], l2=2, reduce="mean"), [a, b], 1
            ),
            input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec(None)],
            autograph=False,
        )
        a, b = tf.random.stateless_normal([4, 3], [0, 1]), tf.constant([[[-3.0]]])
        exact, gradients = truth.penalty([a, b], l1=[0.5, 1], l2=2, reduce="mean")
        assert_same(
            step(a, b),
            tf.nest.map_structure(lambda x: tf.cast(x.astype(float), tf.float32),
                                  (np.asarray(exact), gradients)),
        )  # fmt: skip
        empty, _ = step(tf.zeros([0, 3]), tf.zeros([0]))
        assert empty == 0


# Other derivatives.


def naive_penalty(variables, l1=0.0, l2=0.0, reduce="sum"):
    """The penalty, as one would write it in TensorFlow."""
    sum_or_mean = {"sum": tf.reduce_sum, "mean": tf.reduce_mean}[reduce]
    total = 0.0
    for k, variable in enumerate(variables):
        value = tf.convert_to_tensor(variable)
        a, b = (float(np.broadcast_to(x, len(variables))[k]) for x in (l1, l2))
        total += a * sum_or_mean(tf.abs(value)) + b * sum_or_mean(value**2)
    return total


FIXED = {"l1": [0.3, 0.2], "l2": [0.0, 0.6], "reduce": "mean"}


def penalised_pair(path, dtype):
    """Functions of targets, predictions, two variables: our penalised loss and the stock form."""

    def theirs(y, x, *variables):
        data = tf.reduce_mean((x - y) ** 2)
        if path == "cross-entropy":
            data = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(y, x))
        return data + naive_penalty(variables, **FIXED)

    def ours(y, x, *variables):
        if path == "alone":
            data = tf.reduce_mean((x - y) ** 2)
            return data + nn.weight_penalty(list(variables), **FIXED)
        if path == "cross-entropy":
            loss = losses.CategoricalCrossentropy(
                True, dtype=dtype, penalty=fusedloss.Penalty(list(variables), **FIXED)
            )
        else:
            loss = losses.MeanSquaredError(
                dtype=dtype, penalty=fusedloss.Penalty(list(variables), **FIXED)
            )
        return loss(y, x)

    return ours, theirs


def penalised_inputs(dtype):
    rng = np.random.default_rng(0)
    targets = rng.random((6, 4))
    targets /= targets.sum(-1, keepdims=True)
    shapes = ((6, 4), (3, 4), (5,))
    return [tf.constant(targets, dtype)] + [tf.constant(rng.normal(size=s), dtype) for s in shapes]


SECOND = list(AllPairs([["alone", "training", "cross-entropy"], list(RUN), ["float64", "float32"]]))


@pytest.mark.parametrize("path,run,dtype", SECOND)
def test_second_derivatives(path, run, dtype):
    rtol = 1e-4 if dtype == "float32" else 1e-10
    inputs = penalised_inputs(dtype)
    rng = np.random.default_rng(2)
    directions = [tf.constant(rng.normal(size=x.shape), dtype) for x in inputs[1:]]

    def second(loss):
        def derivatives(dloss, *inputs):
            with tf.GradientTape() as outer:
                outer.watch([dloss, *inputs[1:]])
                with tf.GradientTape() as inner:
                    inner.watch(inputs[1:])
                    # What the predictions share with the variables has mixed derivatives.
                    x = inputs[1] + tf.reduce_mean(inputs[2] ** 2, axis=0)
                    value = loss(inputs[0], x, *inputs[2:])
                gradients = inner.gradient(value, inputs[1:], dloss)
            return gradients, outer.gradient(
                gradients, [dloss, *inputs[1:]], directions, unconnected_gradients="zero"
            )

        return RUN[run](derivatives)(tf.constant(0.7, dtype), *inputs)

    ours, theirs = map(second, penalised_pair(path, dtype))
    assert_same(ours, theirs, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("path", ["alone", "training"])
def test_forward_mode(path):
    inputs = penalised_inputs("float64")
    rng = np.random.default_rng(2)
    directions = [tf.constant(rng.normal(size=x.shape)) for x in inputs[1:]]

    def jvp(loss):
        with tf.autodiff.ForwardAccumulator(inputs[1:], directions) as forward:
            with tf.GradientTape() as tape:
                tape.watch(inputs[1:])
                value = loss(*inputs)
            gradients = tape.gradient(value, inputs[1:])
        return forward.jvp(value), forward.jvp(gradients, unconnected_gradients="zero")

    assert_same(*map(jvp, penalised_pair(path, "float64")), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("run", ["eager", "graph"])
@pytest.mark.parametrize("path", ["alone", "training"])
def test_hessians_and_vectorized_maps(path, run):
    targets, predictions, first, second = penalised_inputs("float64")

    def derivatives(loss):
        def hessians(y, x, a, b):
            with tf.GradientTape(persistent=True) as outer:
                outer.watch([x, a])
                with tf.GradientTape() as inner:
                    inner.watch([x, a])
                    value = loss(y, x, a, b)
                gradients = inner.gradient(value, [x, a])
            zeros = {"unconnected_gradients": "zero"}
            return [outer.jacobian(g, [x, a], **zeros) for g in gradients]

        def mapped(y, x, a, b):
            def gradients(x):
                with tf.GradientTape() as tape:
                    tape.watch([x, a, b])
                    value = loss(y, x, a, b)
                return value, tape.gradient(value, [x, a, b])

            return tf.vectorized_map(gradients, tf.stack([x, x[::-1], 2 * x]))

        return [RUN[run](f)(targets, predictions, first, second) for f in (hessians, mapped)]

    assert_same(*map(derivatives, penalised_pair(path, "float64")), rtol=1e-9, atol=1e-12)


# It counts once.


BATCHES = {
    "one sample": (1, None),
    "seven samples": (7, None),
    "weighted": (7, "random"),
    "weights of 0": (7, "zeros"),
    "no sample": (0, None),
}


@pytest.mark.parametrize("run", ["eager", "graph"])
@pytest.mark.parametrize("recorded", [False, True], ids=["evaluate", "train"])
@pytest.mark.parametrize("rows,weights", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum", "mean_with_sample_weight"])
@pytest.mark.parametrize("name", ["Huber", "BinaryCrossentropy", "SparseCategoricalCrossentropy"])
def test_it_counts_once_whatever_the_batch(name, reduction, rows, weights, recorded, run):
    rng = np.random.default_rng(0)
    variables = [tf.constant(rng.normal(size=s).astype(np.float32)) for s in ((3, 4), (5,))]
    predictions = tf.constant(rng.uniform(0.1, 0.9, (rows, 4)).astype(np.float32))
    targets = rng.random((rows, 4)).astype(np.float32)
    if name.startswith("Sparse"):
        targets = rng.integers(0, 4, rows)
    if weights is not None:
        weights = (rng.random(rows) * (weights == "random")).astype(np.float32)
    arguments = {"l1": 0.3, "l2": 0.2, "reduce": "mean"}
    plain = getattr(losses, name)(reduction=reduction)

    def value_of(penalised, x, variables):
        if not penalised:
            return plain(targets, x, weights) + naive_penalty(variables, **arguments)
        loss = getattr(losses, name)(
            reduction=reduction, penalty=fusedloss.Penalty(variables, **arguments)
        )
        return loss(targets, x, weights)

    def step(x, *variables, penalised):
        if not recorded:
            return value_of(penalised, x, list(variables))
        with tf.GradientTape() as tape:
            tape.watch([x, *variables])
            value = value_of(penalised, x, list(variables))
        return value, tape.gradient(value, [x, *variables])

    found = [
        RUN[run](lambda *inputs, penalised=penalised: step(*inputs, penalised=penalised))(
            predictions, *variables
        )
        for penalised in (True, False)
    ]
    assert_same(*found)


def data():
    points = clusters()[0]
    rng = np.random.default_rng(1)
    return points, (points @ rng.normal(size=(8, 5)) / 3).astype("float32")


def trained(make_loss, optimizer="sgd", fit=None, epochs=3, model=None, **compiled):
    """The weights, the history, and the model, trained with `make_loss(model)`."""
    model = small_model() if model is None else model
    model.compile(optimizer, loss=make_loss(model), **compiled)
    history = model.fit(*data(), epochs=epochs, batch_size=64, verbose=0, **(fit or {}))
    return model.get_weights(), history.history, model


# Variables of a model, as a user gives them and flat, and the other arguments.
CHOSEN = {
    "mean square of a kernel": (
        lambda model: model.layers[0].kernel,
        lambda model: [model.layers[0].kernel],
        {"l2": 0.01, "reduce": "mean"},
    ),
    "sizes of a layer": (
        lambda model: model.layers[0],
        lambda model: [model.layers[0].kernel, model.layers[0].bias],
        {"l1": 0.003},
    ),
    "both of two layers, one each": (
        lambda model: [model.layers[0], model.layers[2].kernel],
        lambda model: [model.layers[0].kernel, model.layers[0].bias, model.layers[2].kernel],
        {"l1": [0.1, 0, 0.02], "l2": [0, 0.3, 0.5], "reduce": "mean"},
    ),
    "the model": (
        lambda model: model,
        lambda model: model.trainable_variables,
        {"l1": 0.001, "l2": 0.01},
    ),
    "a callable": (
        lambda model: lambda: [layer.kernel for layer in (model.layers[0], model.layers[2])],
        lambda model: [model.layers[0].kernel, model.layers[2].kernel],
        {"l2": 0.01},
    ),
}


def fused_p7(chosen, **arguments):
    given, _, how = CHOSEN[chosen]
    return lambda model: losses.Huber(**arguments, penalty=fusedloss.Penalty(given(model), **how))


def naive_p7(chosen, delta=1.0):
    _, flat, how = CHOSEN[chosen]

    def of(model):
        def naive(targets, predictions):
            return keras.losses.huber(targets, predictions, delta) + naive_penalty(
                flat(model), **how
            )

        return naive

    return of


P7 = [(chosen, "graph") for chosen in CHOSEN]
P7 += [("mean square of a kernel", "xla"), ("both of two layers, one each", "eager")]


@pytest.mark.parametrize("chosen,mode", P7)
def test_p7_huber_with_a_penalty(chosen, mode):
    assert_trains_alike(
        trained(fused_p7(chosen), **MODES[mode]), trained(naive_p7(chosen), **MODES[mode])
    )


@pytest.mark.parametrize("name", ["CategoricalCrossentropy", "SparseCategoricalCrossentropy"])
def test_cross_entropies_carry_a_penalty(name):
    points, labels, dense = clusters()
    y = dense if name == "CategoricalCrossentropy" else labels
    results = []
    for ours in (True, False):
        model = small_model()
        loss = getattr(losses, name)(True, penalty=fusedloss.Penalty(model, l2=0.01))
        if not ours:
            stock = getattr(keras.losses, name)(True, reduction=None)

            def loss(y, x, stock=stock, model=model):
                return stock(y, x) + naive_penalty(model.trainable_variables, l2=0.01)

        model.compile("sgd", loss=loss)
        history = model.fit(points, y, epochs=3, batch_size=64, verbose=0)
        results.append((model.get_weights(), history.history, model))
    assert_trains_alike(*results)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_samples_of_weight_0_leave_the_penalty_alone(mode):
    model = small_model()
    kernel = model.layers[0].kernel
    before = kernel.numpy()
    model.compile(
        keras.optimizers.SGD(0.1),
        loss=losses.Huber(penalty=fusedloss.Penalty(kernel, l2=0.5)),
        **MODES[mode],
    )
    history = model.fit(*data(), 64, 1, verbose=0, sample_weight=np.zeros(256))
    np.testing.assert_allclose(kernel, before * 0.9**4, rtol=1e-5)
    steps = [0.5 * (before**2).sum() * 0.81**k for k in range(4)]
    np.testing.assert_allclose(history.history["loss"], [np.mean(steps)], rtol=1e-5)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_evaluate_adds_it_once(mode):
    model = small_model()
    points, targets = data()
    penalty = fusedloss.Penalty(model, l1=0.1, l2=0.2)
    for weights in (None, np.random.default_rng(0).random(256).astype("float32")):
        found = []
        for loss in (losses.Huber(penalty=penalty), losses.Huber()):
            model.compile("sgd", loss=loss, **mode)
            found.append(model.evaluate(points, targets, 100, verbose=0, sample_weight=weights))
        np.testing.assert_allclose(found[0], found[1] + penalty(), rtol=1e-5)


def test_loss_weights_scale_it():
    results = [trained(make("the model"), loss_weights=0.3) for make in (fused_p7, naive_p7)]
    assert_trains_alike(*results)


def test_gradient_accumulation_counts_it_once_a_step():
    results = [
        trained(
            make("the model"), optimizer=keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
        )
        for make in (fused_p7, naive_p7)
    ]
    assert_trains_alike(*results)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_and_loss_scaling(policy):
    keras.config.set_dtype_policy(policy)
    try:
        results = []
        for make in (fused_p7, naive_p7):
            optimizer = keras.optimizers.SGD(0.01)
            if policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            results.append(trained(make("the model"), optimizer=optimizer))
    finally:
        keras.config.set_dtype_policy("float32")
    for weight, stock in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(weight, stock, atol=3e-3)
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-2)


def test_variables_of_another_type_than_the_loss():
    rng = np.random.default_rng(0)
    targets, predictions = map(tf.constant, rng.random((2, 6, 4)).astype(np.float32))
    variables = [tf.constant(rng.normal(size=s)) for s in ((3, 4), (5,))]
    for dtype in ("float64", "float16", "bfloat16"):
        given = [tf.cast(variables[0], dtype), tf.cast(variables[1], "float32")]
        loss = losses.Huber(penalty=fusedloss.Penalty(given, l1=0.1, l2=0.2))

        def step(x, *given, loss=loss):
            with tf.GradientTape() as tape:
                tape.watch([x, *given])
                value = loss(targets, x)
            return value, tape.gradient(value, [x, *given])

        with tf.GradientTape() as tape:
            tape.watch([predictions, *given])
            value = losses.Huber()(targets, predictions)
            value += tf.cast(reference.weight_penalty(given, l1=0.1, l2=0.2), tf.float32)
        expected = value, tape.gradient(value, [predictions, *given])
        found = step(predictions, *given)
        assert found[0].dtype == "float32"
        assert [g.dtype for g in found[1]] == ["float32", dtype, "float32"]
        for ours, theirs in zip(tf.nest.flatten(found), tf.nest.flatten(expected), strict=True):
            np.testing.assert_allclose(
                tf.cast(ours, "float64"), tf.cast(theirs, "float64"), rtol=1e-2, atol=1e-6
            )


# One loss object, several outputs.


def two_heads():
    keras.utils.set_random_seed(0)
    inputs = keras.Input([8])
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    heads = [keras.layers.Dense(5, name=f"head{i}")(hidden) for i in range(2)]
    return keras.Model(inputs, heads)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_one_penalty_on_several_outputs_is_refused(mode):
    points, targets = data()
    model = two_heads()
    penalty = fusedloss.Penalty(model.layers[1], l2=0.1)
    once = losses.Huber(penalty=penalty)
    for loss in (
        [once, once],
        once,
        {"head0": once, "head1": once},
        [once, losses.MeanSquaredError(penalty=penalty)],
    ):
        model.compile("sgd", loss=loss, **MODES[mode])
        with pytest.raises(ValueError, match="losses of 2 outputs.*carry the same one"):
            model.fit(points, [targets] * 2, verbose=0)
        with pytest.raises(ValueError, match="losses of 2 outputs.*carry the same one"):
            model.evaluate(points, [targets] * 2, verbose=0)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_penalties_on_one_output_or_of_several_objects_are_taken(mode):
    points, targets = data()
    found = []
    for both in (False, True):
        model = two_heads()
        first = losses.Huber(penalty=fusedloss.Penalty(model.layers[1], l2=0.1))
        second = losses.Huber(penalty=fusedloss.Penalty(model.layers[2], l1=0.1) if both else None)
        model.compile("sgd", loss=[first, second], loss_weights=[0.5, 2.0], **MODES[mode])
        expected = 0.5 * first.penalty() + (2 * second.penalty() if both else 0)
        total = model.evaluate(points, [targets] * 2, 100, verbose=0, return_dict=True)["loss"]
        model.compile("sgd", loss=[losses.Huber()] * 2, loss_weights=[0.5, 2.0], **MODES[mode])
        plain = model.evaluate(points, [targets] * 2, 100, verbose=0, return_dict=True)["loss"]
        found.append(total - plain)
        np.testing.assert_allclose(found[-1], expected, rtol=1e-4)


def test_a_loop_of_ones_own_may_call_a_loss_twice():
    targets, predictions = tf.ones([6, 5]), tf.zeros([6, 5])
    loss = losses.Huber(penalty=fusedloss.Penalty(tf.constant([3.0]), l2=1))
    once = loss(targets, predictions)
    twice = tf.function(lambda: loss(targets, predictions) + loss(targets, predictions))()
    np.testing.assert_allclose([once, twice], [9.5, 19])


# The ops of a step.


def executed(step, *arguments):
    """How often each type of op occurs in the graph of a step as it is run."""
    context.enable_run_metadata()
    try:
        step(*arguments)
        metadata = context.export_run_metadata()
    finally:
        context.disable_run_metadata()
    graphs = [function.post_optimization_graph for function in metadata.function_graphs]
    return collections.Counter(node.op for graph in graphs for node in graph.node)


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
@pytest.mark.parametrize("path", ["fit", "alone"])
def test_a_step_is_one_op_for_any_number_of_variables(path):
    found = []
    for count in (3, 40):
        variables = [tf.Variable(tf.ones([3, 4])) for _ in range(count)]
        kernel = tf.Variable(tf.ones([5, 5]))
        loss = losses.Huber(penalty=fusedloss.Penalty(variables, l1=0.1, l2=0.1))

        @tf.function(autograph=False)
        def step(y, x, kernel=kernel, loss=loss, variables=variables):
            trained = variables if path == "alone" else [kernel, *variables]
            with tf.GradientTape() as tape:
                value = loss.penalty() if path == "alone" else loss(y, tf.matmul(x, kernel))
            gradients = tape.gradient(value, trained)
            for variable, gradient in zip(trained, gradients, strict=True):
                variable.assign_sub(gradient)
            return value

        ops = executed(step, tf.ones([6, 5]), tf.zeros([6, 5]))
        assert ops, "nothing was recorded"
        ours = {op: n for op, n in ops.items() if op.startswith("Fusedloss>")}
        assert ours == {
            "Fusedloss>PenaltyReduced"
            if path == "alone"
            else "Fusedloss>PointwiseReducedPenalized": 1
        }
        found.append(ops)
    more = {op: n - found[0][op] for op, n in found[1].items() if n != found[0][op]}
    assert set(more) <= {"ReadVariableOp", "AssignSubVariableOp", "_Arg"}, more


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
def test_fit_runs_one_op_and_evaluate_no_gradient():
    model = small_model()
    x, y = (tf.constant(a[:7]) for a in data())
    model.compile("sgd", loss=fused_p7("the model")(model))
    model.optimizer.build(model.trainable_variables)
    expected = {
        "train_step": {"Fusedloss>PointwiseReducedPenalized": 1},
        "test_step": {"Fusedloss>Pointwise": 1, "Fusedloss>Penalty": 1},
    }
    for name, ops in expected.items():
        traced = tf.function(lambda x, y, name=name: getattr(model, name)((x, y)), autograph=False)
        graph = traced.get_concrete_function(x, y).graph
        found = collections.Counter(op.type for op in graph.get_operations())
        assert {op: n for op, n in found.items() if op.startswith("Fusedloss>")} == ops


@pytest.mark.parametrize("run", ["eager", "graph"])
def test_variables_that_are_not_recorded_cost_no_gradient(run):
    targets, predictions = tf.ones([6, 5]), tf.zeros([6, 5])
    variable = tf.Variable([3.0])
    loss = losses.Huber(penalty=fusedloss.Penalty(variable, l2=1))

    def step(y, x, watch_accessed_variables=False):
        with tf.GradientTape(watch_accessed_variables=watch_accessed_variables) as tape:
            tape.watch(x)
            value = loss(y, x)
        return value, tape.gradient(value, [x, variable])

    value, (gradient, none) = RUN[run](step)(targets, predictions)
    assert value == 9.5 and none is None
    np.testing.assert_allclose(gradient, np.full((6, 5), -1 / 30), rtol=1e-6)

    def of_variables_alone(y, x):
        with tf.GradientTape() as tape:
            value = loss(y, x)
        return value, tape.gradient(value, variable)

    value, gradient = RUN[run](of_variables_alone)(targets, predictions)
    assert value == 9.5 and gradient.numpy() == [6]


# Saving.


@pytest.mark.parametrize(
    "chosen,load",
    [*((chosen, "fusedloss.load_model") for chosen in CHOSEN), ("the model", "bind")],
)
def test_training_goes_on_after_saving_as_if_nothing_had_been(chosen, load, tmp_path):
    fit = {"shuffle": False}
    _, _, model = trained(fused_p7(chosen, delta=0.8), optimizer="adam", fit=fit)
    model.save(tmp_path / "model.keras")
    if load == "bind":
        loaded = keras.models.load_model(tmp_path / "model.keras")
        with pytest.raises(ValueError, match=r"loss.bind\(model\).*fusedloss.load_model"):
            loaded.evaluate(*data(), verbose=0)
        with pytest.raises(ValueError, match=r"loss.bind\(model\).*fusedloss.load_model"):
            loaded.fit(*data(), verbose=0)
        assert loaded.loss.bind(loaded) is loaded.loss
    else:
        loaded = fusedloss.load_model(tmp_path / "model.keras")
    # Keras names a sequential model anew, and its variables with it.
    assert len(loaded.loss.get_config()["penalty"]["config"]["variables"]) == len(
        model.loss.get_config()["penalty"]["config"]["variables"]
    )
    assert loaded.loss.penalty() == model.loss.penalty()
    assert loaded.evaluate(*data(), verbose=0) == model.evaluate(*data(), verbose=0)
    for each in (model, loaded):
        each.fit(*data(), epochs=2, batch_size=64, verbose=0, shuffle=False)
    for one, other in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    loaded.save(tmp_path / "again.keras")
    assert fusedloss.load_model(tmp_path / "again.keras").loss.penalty() == loaded.loss.penalty()


def nested_model(*names):
    """Models in one, each with a layer of one of these names."""
    keras.utils.set_random_seed(0)
    inputs = outputs = keras.Input([8])
    for k, name in enumerate(names):
        layers = [keras.Input([8]), keras.layers.Dense(8, name=name)]
        outputs = keras.Sequential(layers, name=f"part{k}")(outputs)
    return keras.Model(inputs, keras.layers.Dense(5, name="out")(outputs))


def test_variables_of_nested_models_are_found_again(tmp_path):
    model = nested_model("first", "second")
    kernel = model.get_layer("part1").layers[0].kernel
    penalty = fusedloss.Penalty([kernel, model.get_layer("out")], l2=[1, 2, 3])
    trained(lambda model: losses.Huber(penalty=penalty), model=model)
    model.save(tmp_path / "model.keras")
    loaded = fusedloss.load_model(tmp_path / "model.keras")
    assert loaded.loss.penalty() == penalty()
    loaded.get_layer("part0").layers[0].kernel.assign(tf.zeros([8, 8]))
    assert loaded.loss.penalty() == penalty()
    loaded.get_layer("part1").layers[0].kernel.assign(tf.zeros([8, 8]))
    assert loaded.loss.penalty() < penalty()


def test_several_losses_of_a_loaded_model_are_bound(tmp_path):
    points, targets = data()
    model = two_heads()
    loss = {
        f"head{i}": losses.Huber(penalty=fusedloss.Penalty(model.layers[1 + i], l2=0.1))
        for i in range(2)
    }
    model.compile("sgd", loss=loss)
    model.fit(points, [targets] * 2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = fusedloss.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(points, [targets] * 2, verbose=0) == model.evaluate(
        points, [targets] * 2, verbose=0
    )


def test_a_model_file_holds_no_weights_of_the_loss(tmp_path):
    sizes = []
    for make in (fused_p7("the model"), lambda model: losses.Huber()):
        _, _, model = trained(make, epochs=1)
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        sizes.append((tmp_path / "model.weights.h5").stat().st_size)
    assert sizes[0] == sizes[1]


@keras.saving.register_keras_serializable("test_penalty")
class Subclassed(keras.Model):
    """Two layers, which Keras names in every process as it counts there, or which have names."""

    def __init__(self, names=(None, None), **arguments):
        super().__init__(**arguments)
        self.names = names
        self.first, self.second = (keras.layers.Dense(5, name=name) for name in names)

    def call(self, x):
        return self.second(self.first(x))

    def get_config(self):
        return {**super().get_config(), "names": self.names}


@pytest.mark.parametrize("inside", [False, True], ids=["model", "layer of a functional model"])
def test_a_subclassed_model_is_bound_by_names_of_its_layers_alone(inside, tmp_path):
    points, targets = data()
    path = tmp_path / "model.keras"
    for names in ((None, None), ("one", "two")):
        subclassed = Subclassed(names, name="subclassed")
        model = subclassed
        if inside:
            inputs = keras.Input([8])
            model = keras.Model(inputs, subclassed(inputs))
        subclassed(points[:1])
        penalty = fusedloss.Penalty(subclassed.first.kernel, l2=1)
        model.compile("sgd", loss=losses.Huber(penalty=penalty))
        model.fit(points, targets, verbose=0)
        model.save(path)
        if names[0] is None:
            # That the counts differ now, or agree by chance, is no matter.
            with pytest.raises(ValueError, match="need names of their own"):
                fusedloss.load_model(path)
        else:
            loaded = fusedloss.load_model(path)
            assert loaded.evaluate(points, targets, verbose=0) == model.evaluate(
                points, targets, verbose=0
            )


def test_a_count_that_agrees_by_chance_binds_nothing():
    model = Subclassed(name="subclassed")
    model(data()[0][:1])
    path = model.second.kernel.path
    with pytest.raises(ValueError, match=f"by the path '{path}'.* need names of their own"):
        fusedloss.Penalty([path], l2=1).bind(model)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_config_round_trips(reduce):
    model = small_model()
    penalty = fusedloss.Penalty(model.layers[0], l1=[0.1, 0], l2=0.3, reduce=reduce)
    for instance in (
        penalty,
        losses.Huber(penalty=penalty),
        losses.CategoricalCrossentropy(True, penalty=penalty),
    ):
        serialized = keras.saving.serialize_keras_object(instance)
        revived = keras.saving.deserialize_keras_object(serialized)
        assert type(revived) is type(instance)
        assert revived.get_config() == instance.get_config()
        again = type(instance).from_config(instance.get_config())
        assert again.get_config() == instance.get_config()
        revived.bind(model)
        assert revived.get_config() == instance.get_config()
    assert revived.penalty() == penalty()
    assert penalty.get_config()["variables"] == [
        variable.path for variable in model.layers[0].variables
    ]


def test_a_penalty_that_is_not_bound_says_so():
    model = small_model()
    penalty = fusedloss.Penalty.from_config(fusedloss.Penalty(model, l2=1).get_config())
    ones = tf.ones([2, 5])
    for call in (penalty, lambda: losses.Huber(penalty=penalty)(ones, ones)):
        with pytest.raises(ValueError, match=r"hidden/kernel.*loss.bind\(model\).*load_model"):
            call()
    other = keras.Sequential([keras.Input([8]), keras.layers.Dense(5, name="another")])
    with pytest.raises(ValueError, match="hidden/kernel'.* has 0.*another/kernel"):
        penalty.bind(other)
    with pytest.raises(ValueError, match="one variable 'hidden/kernel'.* has 2.*part0/hidden"):
        fusedloss.Penalty(["hidden/kernel"], l2=1).bind(nested_model("hidden", "hidden"))


def test_what_has_no_path_is_not_saved():
    for given in (tf.Variable([1.0]), tf.constant([1.0]), lambda: tf.Variable([1.0])):
        loss = losses.Huber(penalty=fusedloss.Penalty(given, l2=1))
        with pytest.raises(ValueError, match="by the paths of Keras variables"):
            loss.get_config()


# Bad input.


def unbuilt():
    return keras.layers.Dense(3, name="plain")


def built():
    layer = keras.layers.Dense(3)
    layer.build([None, 4])
    return layer


def frozen():
    layer = built()
    layer.trainable = False
    return layer


TWO = [tf.constant([1.0, 2.0]), tf.constant([[3.0]])]
BAD = {
    "no variable": ([], {}, ValueError, "`variables` must hold at least one"),
    "frozen layer": (frozen, {}, ValueError, "`variables` must hold at least one"),
    "unbuilt layer": (unbuilt, {}, ValueError, "'plain', which is not built.*build it first"),
    "unbuilt in a list": (
        lambda: [TWO[0], unbuilt()],
        {},
        ValueError,
        "'plain', which is not built",
    ),
    "unbuilt model": (
        lambda: keras.Sequential([keras.layers.Dense(3)], name="bare"),
        {},
        ValueError,
        "'bare', which is not built",
    ),
    "twice": ([TWO[0], TWO[0]], {}, ValueError, "position 1.* twice: list it once"),
    "twice by two names": (
        lambda: (lambda kernel: [kernel, kernel.value])(built().kernel),
        {},
        ValueError,
        "kernel.* twice: list it once",
    ),
    "integers": (
        [TWO[0], tf.constant([1, 2])],
        {},
        TypeError,
        "must be float16, bfloat16, float32 or float64. Got .*position 1 of type int32",
    ),
    "a complex variable": (
        tf.constant([1j], tf.complex64),
        {},
        TypeError,
        "must be float16, bfloat16, float32 or float64",
    ),
    "None": (None, {}, TypeError, "`variables` must be variables, tensors.*Got None"),
    "a number": ([1.0], {}, TypeError, "`variables` must be variables.*Got 1.0"),
    "l1 < 0": (TWO, {"l1": -1}, ValueError, "`l1` must be finite and at least 0. Got -1"),
    "l2 NaN": (TWO, {"l2": math.nan}, ValueError, "`l2` must be finite and at least 0. Got nan"),
    "l2 infinite": (TWO, {"l2": math.inf}, ValueError, "`l2` must be .*Got inf"),
    "l1 by name": (TWO, {"l1": "much"}, ValueError, "`l1` must be a number. Got 'much'"),
    "one l2 < 0": (TWO, {"l2": [0, -2]}, ValueError, "`l2` must be .*Got -2.0 at position 1"),
    "l1 of another length": (TWO, {"l1": [1, 2, 3]}, ValueError, "`l1` has 3 entries for 2"),
    "l2 of another length": (TWO, {"l2": [1]}, ValueError, "`l2` has 1 entries for 2"),
    "nested l1": (TWO, {"l1": [[1], [2]]}, ValueError, "`l1` must be a flat, non-empty"),
    "empty l1": (TWO, {"l1": []}, ValueError, "`l1` must be a flat, non-empty"),
    "reduce": (TWO, {"reduce": "max"}, ValueError, "`reduce` must be 'sum' or 'mean'. Got 'max'"),
    "no reduce": (TWO, {"reduce": None}, ValueError, "`reduce` must be 'sum' or 'mean'"),
}


@pytest.mark.parametrize("given,arguments,error,text", BAD.values(), ids=BAD)
def test_bad_input(given, arguments, error, text):
    of_callable = callable(given)
    given = given() if of_callable else given
    for function in (nn.weight_penalty, reference.weight_penalty, fusedloss.Penalty):
        with pytest.raises(error, match=text):
            function(given, **{"l2": 1, **arguments})
    # What a callable returns is known when it is called.
    with pytest.raises(error, match=text):
        fusedloss.Penalty(lambda: given, **{"l2": 1, **arguments})()


@pytest.mark.parametrize("name", sorted({*losses.__all__} - {"BlendedLoss", "PerceptualLoss"}))
@pytest.mark.parametrize("reduction", [None, "none"])
def test_a_penalty_needs_a_reduction(reduction, name):
    penalty = fusedloss.Penalty(TWO, l2=1)
    with pytest.raises(ValueError, match="(?s)not reduced.*choose another reduction"):
        getattr(losses, name)(reduction=reduction, penalty=penalty)
    with pytest.raises(TypeError, match="`penalty` must be a fusedloss.Penalty or None"):
        getattr(losses, name)(penalty=keras.regularizers.L2(0.1))


def test_a_model_that_is_not_built_yet_is_given_as_a_callable():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Dense(5)])
    loss = losses.Huber(penalty=fusedloss.Penalty(lambda: model.trainable_variables, l2=1))
    model.compile("sgd", loss=loss)
    history = model.fit(*data(), verbose=0).history
    assert history["loss"][0] > 0


# Determinism, in one process and over threads, and replicas.


def test_bits_are_the_same_in_every_run_inside_xla_and_outside():
    rng = np.random.default_rng(0)
    shapes = [(70, 1001), (3,), (65536,), (1, 1), *[(k % 13, 57) for k in range(60)]]
    variables = [tf.constant(rng.normal(size=s).astype(np.float32)) for s in shapes]
    found = []
    for run in RUN.values():
        step = run(
            lambda *variables: value_and_gradients(
                lambda v: nn.weight_penalty(v, l1=0.1, l2=0.3), list(variables), 1.0
            )
        )
        for _ in range(2):
            found.append([x.numpy().tobytes() for x in tf.nest.flatten(step(*variables))])
    assert not COMPILED or all(bits == found[0] for bits in found)


@pytest.mark.parametrize("device", ["CPU:0"], indirect=True)
def test_two_replicas_train_as_one(device):
    done = run_python(device, "-c", REPLICAS)
    assert done.returncode == 0, done.stdout + done.stderr


REPLICAS = """
import keras
import numpy as np
import tensorflow as tf

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import fusedloss

rng = np.random.default_rng(0)
points, labels = rng.normal(size=(64, 8)).astype("float32"), rng.integers(0, 5, 64)
weights = rng.random(64).astype("float32")
dense = np.eye(5, dtype="float32")[labels]


def train(name, strategy, reduction, sample_weight):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(5)])
        penalty = fusedloss.Penalty(model, l1=0.01, l2=0.1, reduce="sum")
        loss = getattr(fusedloss.losses, name)(reduction=reduction, penalty=penalty)
        model.compile(keras.optimizers.SGD(0.01), loss=loss)
    y = labels if name.startswith("Sparse") else dense
    given = dict(verbose=0, sample_weight=sample_weight, batch_size=16)
    history = model.fit(points, y, epochs=2, shuffle=False, **given)
    reported = [*history.history["loss"], model.evaluate(points, y, **given)]
    return model.get_weights(), reported


mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert mirrored.num_replicas_in_sync == 2
for name, reduction, sample_weight in (
    ("Huber", "sum_over_batch_size", weights),
    ("Huber", "sum", weights),
    ("SparseCategoricalCrossentropy", "sum_over_batch_size", None),
):
    two, two_reported = train(name, mirrored, reduction, sample_weight)
    one, one_reported = train(name, tf.distribute.get_strategy(), reduction, sample_weight)
    for ours, single in zip(two, one):
        np.testing.assert_allclose(ours, single, rtol=1e-4, atol=1e-6)
    if reduction != "sum":
        np.testing.assert_allclose(two_reported, one_reported, rtol=1e-4)
"""
