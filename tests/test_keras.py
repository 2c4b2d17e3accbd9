"""The Keras classes: Keras's results for Keras's arguments, and training that uses the others."""

import itertools
import os
import pathlib
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras.src.losses.loss import reduce_weighted_values

import fusedloss
from fusedloss import layers, losses, metrics

pytestmark = pytest.mark.usefixtures("device")
# Products of matrices round to 10 bits in it, and steps that are to agree drift apart.
tf.config.experimental.enable_tensor_float_32_execution(False)

RUN = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "xla": lambda function: tf.function(function, autograph=False, jit_compile=True),
}
COMPILED = fusedloss.backend() == "compiled"


def both(name, **arguments):
    """Our loss and Keras's."""
    return getattr(losses, name)(**arguments), getattr(keras.losses, name)(**arguments)


def sample(shape, name, from_logits, seed=0):
    """Targets and predictions over the last axis of `shape`."""
    rng = np.random.default_rng(seed)
    predictions = rng.normal(size=shape).astype("float32")
    if not from_logits:
        predictions = np.exp(predictions) / np.exp(predictions).sum(-1, keepdims=True)
    if name == "SparseCategoricalCrossentropy":
        return rng.integers(0, shape[-1], shape[:-1]), predictions
    targets = rng.random(shape).astype("float32")
    return targets / targets.sum(-1, keepdims=True), predictions


def loss_and_gradient(loss, targets, predictions, mask=None, sample_weight=None):
    predictions = tf.convert_to_tensor(predictions)
    with tf.GradientTape() as tape:
        tape.watch(predictions)
        if mask is not None:
            predictions._keras_mask = mask
        value = loss(targets, predictions, sample_weight)
    return value, tape.gradient(value, predictions)


def assert_same(ours, theirs, **tolerance):
    tolerance = {"rtol": 2e-5, "atol": 1e-6, **tolerance}
    for our, their in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        assert our.dtype == their.dtype
        np.testing.assert_allclose(our, their, **tolerance)


CLASSES = ("CategoricalCrossentropy", "SparseCategoricalCrossentropy")
FOCAL = "CategoricalFocalCrossentropy"
REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight", None)
# Shape of the predictions, and shapes of weights that Keras takes for them.
WEIGHTS = {
    (6, 5): [None, (), (6,), (6, 1), (1,), (3, 6), (4, 1, 1)],
    (1, 5): [None, (), (1,), (1, 1), (4,)],
    (4, 3, 5): [None, (), (4, 3), (4, 3, 1), (4, 1), (1, 3), (3,), (2, 4, 3)],
    (4, 1, 5): [None, (), (4,), (4, 1), (1,), (4, 3)],
}


@pytest.mark.parametrize("recorded", [False, True], ids=["evaluate", "train"])
@pytest.mark.parametrize(
    "shape,weights", [(s, w) for s, weights in WEIGHTS.items() for w in weights], ids=str
)
@pytest.mark.parametrize("name", [*CLASSES, FOCAL])
def test_weights_masks_and_reductions_are_kerass(name, shape, weights, recorded):
    targets, predictions = sample(shape, name, from_logits=True)
    rng = np.random.default_rng(1)
    weight = None if weights is None else rng.random(weights).astype("float32")
    masks = [None]
    if weights is None or len(weights) < len(shape):  # Keras cannot combine others with a mask.
        masks += [tf.constant(rng.random(shape[:-1]) < 0.6), tf.zeros(shape[:-1], tf.bool)]
    for reduction, mask in itertools.product(REDUCTIONS, masks):
        results = []
        for loss in both(name, from_logits=True, reduction=reduction):
            if recorded:
                results.append(loss_and_gradient(loss, targets, predictions, mask, weight))
            else:
                tensor = tf.constant(predictions)
                if mask is not None:
                    tensor._keras_mask = mask
                results.append(loss(targets, tensor, weight))
        assert_same(*results)


ARGUMENTS = [
    ("CategoricalCrossentropy", {}),
    ("CategoricalCrossentropy", {"from_logits": True}),
    ("CategoricalCrossentropy", {"label_smoothing": 0.1}),
    ("CategoricalCrossentropy", {"from_logits": True, "label_smoothing": 0.3}),
    ("CategoricalCrossentropy", {"axis": 1}),
    ("CategoricalCrossentropy", {"axis": 1, "from_logits": True}),
    ("CategoricalCrossentropy", {"axis": -2}),
    ("CategoricalCrossentropy", {"axis": 0, "from_logits": True}),
    ("SparseCategoricalCrossentropy", {}),
    ("SparseCategoricalCrossentropy", {"from_logits": True}),
    ("SparseCategoricalCrossentropy", {"ignore_class": 2}),
    ("SparseCategoricalCrossentropy", {"ignore_class": 2, "from_logits": True}),
    ("SparseCategoricalCrossentropy", {"ignore_class": -1, "from_logits": True}),
    (FOCAL, {}),
    (FOCAL, {"from_logits": True, "alpha": [0.1, 2.0, 0.0, 1.0, 0.5]}),
    (FOCAL, {"from_logits": True, "gamma": 0.0, "alpha": 1.0}),
    (FOCAL, {"gamma": 0.5, "label_smoothing": 0.1}),
    (FOCAL, {"axis": 1, "gamma": 1}),
]


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("name,arguments", ARGUMENTS, ids=str)
def test_arguments_of_keras_give_its_results(name, arguments, weighted, run):
    targets, predictions = sample((7, 4, 5), name, arguments.get("from_logits", False))
    if arguments.get("ignore_class") == -1:
        targets[::2] = -1
    axis = arguments.get("axis", -1)
    if axis != -1:
        targets, predictions = (np.moveaxis(x, -1, axis) for x in (targets, predictions))
    losses_shape = np.delete(predictions.shape, axis)
    weight = None
    if weighted:
        weight = np.random.default_rng(1).random(losses_shape).astype("float32")
    # One reduction under XLA: it takes a second to compile.
    for reduction in ["mean_with_sample_weight"] if run is RUN["xla"] else REDUCTIONS[2:]:
        ours, theirs = both(name, reduction=reduction, **arguments)
        assert_same(
            *(
                run(lambda y, x, loss=loss: loss_and_gradient(loss, y, x, sample_weight=weight))(
                    tf.constant(targets), tf.constant(predictions)
                )
                for loss in (ours, theirs)
            )
        )


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("dtype", [None, "float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "predictions_dtype", ["float16", "bfloat16", "float32", "float64", "int32"]
)
def test_result_has_the_dtype_of_the_loss(name, dtype, predictions_dtype, run):
    targets, predictions = sample((6, 5), name, from_logits=True)
    predictions = tf.cast(3 * predictions, predictions_dtype)
    ours, theirs = both(name, from_logits=True, dtype=dtype)
    value, expected = (run(loss)(targets, predictions) for loss in (ours, theirs))
    assert value.dtype == expected.dtype
    half = {"float16": 2e-3, "bfloat16": 2e-2}
    rtol = max(half.get(dtype, 1e-6), half.get(predictions_dtype, 1e-6))
    np.testing.assert_allclose(
        tf.cast(value, "float64"), tf.cast(expected, "float64"), rtol=4 * rtol
    )


@pytest.mark.parametrize("labels_dtype", ["int8", "uint8", "int32", "int64", "float32", "float64"])
def test_labels_of_every_dtype_and_a_last_axis_of_one(labels_dtype):
    labels, logits = sample((6, 5), "SparseCategoricalCrossentropy", from_logits=True)
    ours, theirs = both("SparseCategoricalCrossentropy", from_logits=True)
    for shape in ((6,), (6, 1)):
        given = labels.astype(labels_dtype).reshape(shape)
        assert_same(ours(given, logits), theirs(given, logits))
    assert_same(ours(labels.tolist(), logits.tolist()), theirs(labels, logits))


def test_labels_above_2_to_the_24_stay_exact(device):
    labels = tf.constant([2**24 + 1])
    loss = losses.SparseCategoricalCrossentropy(True, ignore_class=2**24, reduction=None)
    # As a float32 it would be the ignored 2^24.
    if device.startswith("GPU") and COMPILED:
        assert np.isnan(loss(labels, tf.zeros([1, 3])))
    else:
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            loss(labels, tf.zeros([1, 3]))


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("name", CLASSES)
def test_softmax_outputs_are_walked_back_to_their_logits(name, run):
    targets, logits = sample((6, 5), name, from_logits=True)
    logits *= 60  # The softmax saturates: from probabilities the gradient would be lost.
    for softmax in (tf.nn.softmax, keras.activations.softmax):

        def step(targets, logits, loss, softmax=softmax):
            def of_logits(y, x, weight):
                return loss(y, softmax(x), weight)

            return loss_and_gradient(of_logits, targets, logits)

        assert_same(
            *(run(lambda y, x, loss=loss: step(y, x, loss))(targets, logits) for loss in both(name))
        )
    with pytest.warns(UserWarning, match="produced by a softmax"):
        tf.function(
            lambda x: losses.CategoricalCrossentropy(from_logits=True)(x, tf.nn.softmax(x))
        )(tf.zeros([2, 3]))


@pytest.mark.parametrize("gamma", [0, 0.5, 2])
@pytest.mark.parametrize("from_logits", [True, False])
def test_the_focal_form_clips_and_saturates_as_keras(from_logits, gamma):
    """Probabilities stay what they are: Keras does not look for the logits behind them."""
    targets, logits = sample((6, 5), FOCAL, from_logits=True)
    logits *= 60
    ours, theirs = both(FOCAL, from_logits=from_logits, gamma=gamma)

    def step(loss):
        def of_logits(y, x, weight):
            return loss(y, x if from_logits else tf.nn.softmax(x), weight)

        return loss_and_gradient(of_logits, targets, logits)

    assert_same(step(ours), step(theirs))
    for odd in ([0.0, 0, 0, 0, 1], [0.5, 0.5, 0, 0, 0], [1.0, 1, 1, 1, 1]):
        results = [
            loss_and_gradient(loss, targets[:1], np.array([odd], "float32"))
            for loss in (ours, theirs)
        ]
        assert_same(*results, rtol=1e-4)


def test_a_single_class_warns_as_in_keras():
    for loss in (losses.CategoricalCrossentropy(), losses.CategoricalFocalCrossentropy()):
        with pytest.warns(SyntaxWarning, match="single class"):
            loss(np.ones([4, 1]), np.ones([4, 1]))


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("name", [*CLASSES, FOCAL])
@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 5), (3, 0, 5)], ids=str)
def test_an_empty_batch_has_loss_0(name, shape, run):
    targets, predictions = sample(shape, name, from_logits=True)
    for reduction in REDUCTIONS[:-1]:
        loss = getattr(losses, name)(from_logits=True, reduction=reduction)
        value, gradient = run(lambda y, x, loss=loss: loss_and_gradient(loss, y, x))(
            tf.constant(targets), tf.constant(predictions)
        )
        assert value.shape == () and value == 0 and gradient.shape == shape


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_rows_that_do_not_count_hide_nan(run):
    logits = tf.constant([[np.nan, 1.0, np.inf], [0.5, 1.0, 2.0], [np.nan] * 3])
    ignoring = losses.SparseCategoricalCrossentropy(True, ignore_class=7)
    value, gradient = run(lambda x: loss_and_gradient(ignoring, [7, 1, 7], x))(logits)
    row, row_gradient = loss_and_gradient(ignoring, [1], logits[1:2])
    assert_same((value, gradient[1:2]), (row, row_gradient))
    np.testing.assert_array_equal(tf.gather(gradient, [0, 2]), np.zeros([2, 3]))

    outside = losses.SparseCategoricalCrossentropy(True, subset=[0, 1])
    value, gradient = run(lambda x: loss_and_gradient(outside, [2, 1, 2], x))(logits)
    expected = np.log(1 + np.exp(-0.5)) / 3  # Rows outside stay in the divisor.
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(tf.gather(gradient, [0, 2]), np.zeros([2, 3]))


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_smoothing_along_another_axis_counts_its_classes(run):
    """Keras divides by the size of the last axis."""
    targets, logits = sample((6, 4, 5), "CategoricalCrossentropy", from_logits=True)
    arguments = {"from_logits": True, "label_smoothing": 0.2}
    moved = losses.CategoricalCrossentropy(axis=1, **arguments)
    result = run(lambda y, x: loss_and_gradient(moved, y, x))(
        np.moveaxis(targets, -1, 1), np.moveaxis(logits, -1, 1)
    )
    value, gradient = loss_and_gradient(
        keras.losses.CategoricalCrossentropy(**arguments), targets, logits
    )
    assert_same(result, (value, tf.transpose(gradient, [0, 2, 1])))

    labels = targets.argmax(-1)
    sparse, stock = both("SparseCategoricalCrossentropy", from_logits=True)
    moved = losses.SparseCategoricalCrossentropy(from_logits=True, axis=1)
    assert_same(run(moved)(labels, np.moveaxis(logits, -1, 1)), stock(labels, logits))
    assert_same(run(moved)(labels[:, None], np.moveaxis(logits, -1, 1)), stock(labels, logits))


# Which path is taken.


def ops_in(function, *arguments):
    graph = tf.function(function, autograph=False).get_concrete_function(*arguments).graph
    return {op.type for op in graph.get_operations() if op.type.startswith("Fusedloss>")}


TRAINING = {"Fusedloss>SoftmaxXentReduced"}
GENERAL = {"Fusedloss>SoftmaxXent", "Fusedloss>SoftmaxXentGrad"}


@pytest.mark.parametrize("name", CLASSES)
def test_the_path_follows_from_what_is_recorded(name):
    targets, logits = map(tf.constant, sample((6, 5), name, from_logits=True))
    weight = tf.ones([6])
    loss = getattr(losses, name)(from_logits=True)

    def step(y, x, w=None, loss=loss, watch=()):
        with tf.GradientTape() as tape:
            tape.watch([x, *[{"y": y, "w": w}[i] for i in watch]])
            value = loss(y, x, w)
        return tape.gradient(value, x)

    unreduced = getattr(losses, name)(from_logits=True, reduction=None)
    expected = {
        "evaluate": (lambda: ops_in(loss, targets, logits), {"Fusedloss>SoftmaxXent"}),
        "plain": (lambda: ops_in(step, targets, logits), TRAINING),
        "weights": (lambda: ops_in(step, targets, logits, weight), TRAINING),
        "bfloat16": (lambda: ops_in(step, targets, tf.cast(logits, "bfloat16")), TRAINING),
        "float16": (lambda: ops_in(step, targets, tf.cast(logits, "float16")), GENERAL),
        "weights recorded": (
            lambda: ops_in(lambda y, x, w: step(y, x, w, watch="w"), targets, logits, weight),
            GENERAL,
        ),
        "weights that broadcast up": (
            lambda: ops_in(step, targets, logits, tf.ones([3, 6])),
            GENERAL,
        ),
        "no reduction": (
            lambda: ops_in(lambda y, x: step(y, x, loss=unreduced), targets, logits),
            GENERAL,
        ),
    }
    if name == "CategoricalCrossentropy":
        expected["targets recorded"] = (
            lambda: ops_in(lambda y, x: step(y, x, watch="y"), targets, logits),
            GENERAL,
        )
    for case, (traced, ops) in expected.items():
        assert traced() == (ops if COMPILED else set()), case


@pytest.mark.parametrize("name", [*CLASSES, FOCAL])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_and_dense_targets_have_their_gradient(name, reduction):
    targets, logits = map(tf.constant, sample((6, 5), name, from_logits=True))
    weight = tf.linspace(0.1, 1.0, 6)
    weight = tf.cast(weight, tf.float32)
    watched = [weight, logits] + ([targets] if targets.dtype.is_floating else [])
    results = []
    for loss in both(name, from_logits=True, reduction=reduction):
        with tf.GradientTape() as tape:
            tape.watch(watched)
            value = loss(targets, logits, weight)
        results.append(tape.gradient(value, watched))
    assert_same(*results)


# The forms that Keras does not have, as classes; targets of `p4` for each.
OWN_FORMS = {
    "negative targets": losses.CategoricalCrossentropy(True, mask_negative_targets=True),
    "mixture": losses.CategoricalCrossentropy(
        True, mask_negative_targets=True, normalize="full", subset_weight=0.8, full_weight=0.2
    ),
    "candidates": losses.SparseCategoricalCrossentropy(True, candidates_in_targets=True),
    "ignoring": losses.SparseCategoricalCrossentropy(
        True, ignore_class=2, candidates_in_targets=True
    ),
    "warped": losses.SparseCategoricalCrossentropy(True, temperature=0.7, z_loss=1e-2, softcap=3.0),
    "labels, focal": losses.SparseCategoricalCrossentropy(True, gamma=2.0, alpha=0.25),
}


def p4(shape, form, seed=3):
    """Targets and logits over the last axis of `shape`, and the rows' losses."""
    rng = np.random.default_rng(seed)
    logits, labels = (
        rng.normal(size=shape).astype("float32"),
        rng.integers(0, shape[-1], shape[:-1]),
    )
    arguments = {
        name: value
        for name, value in OWN_FORMS[form].get_config().items()
        if name not in ("reduction", "name", "dtype", "penalty", "candidates_in_targets")
    }
    if isinstance(OWN_FORMS[form], losses.CategoricalCrossentropy):
        targets = np.eye(shape[-1], dtype="float32")[labels]
        targets[(rng.random(shape) < 0.6) & (targets == 0)] = -1
        targets[-1] = -1
        return targets, logits, lambda y, x: fusedloss.nn.softmax_xent(y, x, **arguments)
    if not OWN_FORMS[form].get_config()["candidates_in_targets"]:
        return labels, logits, lambda y, x: fusedloss.nn.sparse_softmax_xent(y, x, **arguments)
    candidates = rng.integers(-1, shape[-1], (*shape[:-1], 3))
    candidates[..., 1] = labels
    candidates[0] = -1
    targets = np.concatenate([labels[..., None], candidates], axis=-1)

    def rows(y, x):
        return fusedloss.nn.sparse_softmax_xent(y[..., 0], x, candidates=y[..., 1:], **arguments)

    return targets, logits, rows


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 5)], ids=str)
@pytest.mark.parametrize("form", OWN_FORMS)
def test_own_forms_are_weighed_masked_and_reduced_as_keras_does(form, shape):
    """Rows without a class in their subset count in means, ignored ones do not."""
    targets, logits, rows = p4(shape, form)
    rng = np.random.default_rng(1)
    mask = tf.constant(rng.random(shape[:-1]) < 0.7)
    weight = rng.random(shape[:-1]).astype("float32")
    for reduction, kept, weights in itertools.product(REDUCTIONS, (None, mask), (None, weight)):
        config = {**OWN_FORMS[form].get_config(), "reduction": reduction}
        loss = type(OWN_FORMS[form]).from_config(config)

        def expected(y, x, weights, kept=kept, reduction=reduction):
            values = rows(y, x)
            counted = getattr(values, "_keras_mask", None)
            if kept is not None:
                counted = kept if counted is None else counted & kept
            return reduce_weighted_values(values, weights, counted, reduction)

        assert_same(
            loss_and_gradient(loss, targets, logits, kept, weights),
            loss_and_gradient(expected, targets, logits, None, weights),
        )


@pytest.mark.parametrize("form", OWN_FORMS)
def test_own_forms_take_the_training_path(form):
    targets, logits, _ = p4((6, 5), form)

    def step(y, x):
        return loss_and_gradient(OWN_FORMS[form], y, x, sample_weight=tf.ones([6]))[1]

    assert ops_in(step, tf.constant(targets), tf.constant(logits)) == (
        TRAINING if COMPILED else set()
    )
    evaluated = ops_in(OWN_FORMS[form], tf.constant(targets), tf.constant(logits))
    assert evaluated == ({"Fusedloss>SoftmaxXent"} if COMPILED else set())


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8"])
def test_labels_and_candidates_of_every_dtype(dtype):
    targets, logits, rows = p4((6, 5), "candidates")
    if dtype == "uint8":  # which has no pads
        targets = np.abs(targets)
    loss = OWN_FORMS["candidates"]
    expected = tf.reduce_mean(rows(targets, logits))
    np.testing.assert_allclose(loss(targets.astype(dtype), logits), expected, rtol=1e-6)


def test_a_traced_step_is_differentiable_in_what_it_did_not_record():
    """An outer tape may ask the training path for the gradient of its targets and weights."""
    targets, logits = map(tf.constant, sample((6, 5), "CategoricalCrossentropy", True))
    weight = tf.cast(tf.linspace(0.1, 1.0, 6), tf.float32)

    def naive(y, x, w):
        return tf.reduce_mean(-w * tf.reduce_sum(y * tf.nn.log_softmax(x), axis=-1))

    results = []
    for loss in (losses.CategoricalCrossentropy(from_logits=True), naive):

        @tf.function(autograph=False)
        def step(y, x, w, loss=loss):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x, w)
            return value, tape.gradient(value, x)

        with tf.GradientTape() as tape:
            tape.watch([targets, logits, weight])
            value, gradient = step(targets, logits, weight)
            total = value + tf.reduce_sum(tf.sin(tf.range(30.0)) * tf.reshape(gradient, [-1]))
        results.append(tape.gradient(total, [targets, logits, weight]))
    assert_same(*results)


# Second derivatives.


def stock_mixture(targets, logits):
    """0.8 on classes 0, 3 and 4 gathered, 0.2 on all; no row is outside."""
    part = [tf.gather(x, [0, 3, 4], axis=-1) for x in (targets, logits)]

    def cross_entropy(y, z):
        return -tf.reduce_sum(y * tf.nn.log_softmax(z), axis=-1)

    return 0.8 * cross_entropy(*part) + 0.2 * cross_entropy(targets, logits)


MIXTURE = {"subset": [0, 3, 4], "subset_weight": 0.8, "full_weight": 0.2}


@pytest.mark.parametrize("dtype,rtol", [("float32", 1e-4), ("float64", 1e-10)])
@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("path", ["general", "training"])
def test_second_derivatives(path, run, dtype, rtol):
    targets, logits = sample((6, 5), "CategoricalCrossentropy", from_logits=True)
    targets, logits = tf.cast(targets, dtype), tf.cast(logits, dtype)
    rng = np.random.default_rng(2)
    direction, cotangent = tf.constant(rng.normal(size=(6, 5)), dtype), tf.constant(0.7, dtype)
    weights = tf.constant(rng.normal(size=6), dtype)
    ours = {
        "general": lambda y, x: tf.reduce_sum(weights * fusedloss.nn.softmax_xent(y, x, **MIXTURE)),
        "training": losses.CategoricalCrossentropy(True, dtype=dtype, **MIXTURE),
    }[path]
    theirs = {
        "general": lambda y, x: tf.reduce_sum(weights * stock_mixture(y, x)),
        "training": lambda y, x: tf.reduce_mean(stock_mixture(y, x)),
    }[path]

    def second(loss):
        def derivatives(y, x, dloss):
            with tf.GradientTape() as outer:
                outer.watch([x, dloss])
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    value = loss(y, x)
                gradient = inner.gradient(value, x, dloss)
            return gradient, outer.gradient(gradient, [x, dloss], direction)

        return run(derivatives)(targets, logits, cotangent)

    assert_same(second(ours), second(theirs), rtol=rtol, atol=rtol / 100)


def test_third_derivatives():
    targets, logits = sample((3, 5), "CategoricalCrossentropy", from_logits=True)
    targets, logits = tf.cast(targets, "float64"), tf.cast(logits, "float64")
    ours = losses.CategoricalCrossentropy(True, dtype="float64", **MIXTURE)

    def third(loss):
        tapes = [tf.GradientTape() for _ in range(3)]
        with tapes[0]:
            tapes[0].watch(logits)
            with tapes[1]:
                tapes[1].watch(logits)
                with tapes[2]:
                    tapes[2].watch(logits)
                    value = loss(targets, logits)
                value = tf.reduce_sum(tapes[2].gradient(value, logits) ** 3)
            value = tf.reduce_sum(tf.sin(tapes[1].gradient(value, logits)))
        return tapes[0].gradient(value, logits)

    stock = third(lambda y, x: tf.reduce_mean(stock_mixture(y, x)))
    assert_same(third(ours), stock, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", ["general", "training"])
def test_jacobian_and_vectorized_map_need_no_loop(path, caplog):
    targets, logits = sample((4, 5), "CategoricalCrossentropy", from_logits=True)
    targets, logits = tf.cast(targets, "float64"), tf.cast(logits, "float64")
    if path == "general":

        def ours(y, x):
            return fusedloss.nn.softmax_xent(y, x, **MIXTURE)

        theirs = stock_mixture
    else:
        ours = losses.CategoricalCrossentropy(True, dtype="float64", **MIXTURE)

        def theirs(y, x):
            return tf.reduce_mean(stock_mixture(y, x))

    def jacobian_and_hessian(loss):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(logits)
            with tf.GradientTape(persistent=True) as inner:
                inner.watch(logits)
                value = loss(targets, logits)
            gradient = inner.gradient(value, logits)
        jacobian = inner.jacobian if value.shape.rank else inner.gradient
        return jacobian(value, logits), outer.jacobian(gradient, logits)

    def mapped(loss):
        def gradient(y, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x)
            return tape.gradient(value, x)

        stacked = [tf.stack([x, x[::-1], 2 * x]) for x in (targets, logits)]
        return (
            tf.vectorized_map(lambda pair: gradient(*pair), tuple(stacked)),
            tf.vectorized_map(lambda x: gradient(targets, x), stacked[1]),
            tf.vectorized_map(lambda y: gradient(y, logits), stacked[0]),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(jacobian_and_hessian(ours), jacobian_and_hessian(theirs), rtol=1e-9)
        assert_same(mapped(ours), mapped(theirs), rtol=1e-9)
    assert "while_loop" not in caplog.text


def test_forward_mode():
    targets, logits = sample((4, 5), "CategoricalCrossentropy", from_logits=True)
    logits = tf.constant(logits)
    direction = tf.random.stateless_normal(logits.shape, seed=[0, 1])

    def jvp(loss):
        with tf.autodiff.ForwardAccumulator(logits, direction) as forward:
            with tf.GradientTape() as tape:
                tape.watch(logits)
                value = loss(targets, logits)
            gradient = tape.gradient(value, logits)
        return forward.jvp(value), forward.jvp(gradient)

    ours, theirs = both("CategoricalCrossentropy", from_logits=True)
    assert_same(jvp(ours), jvp(theirs))


# Under fit.


def clusters(rows=256, classes=5, features=8):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    points = rng.normal(size=(classes, features))[labels] + rng.normal(size=(rows, features))
    return points.astype("float32"), labels, np.eye(classes, dtype="float32")[labels]


def classifier(activation=None, outputs=1):
    keras.utils.set_random_seed(0)
    inputs = keras.Input([8])
    hidden = keras.layers.Dense(16, activation="relu")(inputs)
    heads = [
        keras.layers.Dense(5, activation=activation, name=f"head{i}")(hidden)
        for i in range(outputs)
    ]
    return keras.Model(inputs, heads if outputs > 1 else heads[0])


def trained(loss, y, activation=None, outputs=1, optimizer="sgd", fit=None, **compiled):
    """The weights after three epochs, the history, and the model."""
    model = classifier(activation, outputs)
    model.compile(optimizer, loss=loss, **compiled)
    history = model.fit(clusters()[0], y, epochs=3, batch_size=64, verbose=0, **(fit or {}))
    return model.get_weights(), history.history, model


def assert_trains_alike(ours, theirs):
    (weights, history, _), (stock_weights, stock_history, _) = ours, theirs
    for weight, stock in zip(weights, stock_weights, strict=True):
        np.testing.assert_allclose(weight, stock, rtol=1e-4, atol=1e-5)
    for key, values in history.items():
        np.testing.assert_allclose(values, stock_history[key], rtol=1e-4, err_msg=key)


SUBSET = [0, 2]


def naive_p1(targets, probabilities):
    """All classes and a gathered subset, weighed 0.2 and 0.8; rows outside the subset have no L_S.

    A loss per row: a scalar returned from a custom loss would be wrong under distribution.
    """
    entropy = keras.losses.categorical_crossentropy
    gathered = [tf.gather(x, SUBSET, axis=-1) for x in (targets, probabilities)]
    return 0.8 * entropy(*gathered) + 0.2 * entropy(targets, probabilities)


MODES = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p1_two_heads_in_one_loss(mode):
    targets = clusters()[2]
    loss = losses.CategoricalCrossentropy(subset=SUBSET, subset_weight=0.8, full_weight=0.2)
    assert_trains_alike(
        trained(loss, targets, activation="softmax", **mode),
        trained(naive_p1, targets, activation="softmax", **mode),
    )


def test_p1_two_heads_as_two_outputs():
    targets = clusters()[2]
    ours = [losses.CategoricalCrossentropy(), losses.CategoricalCrossentropy(subset=SUBSET)]

    def naive(targets, probabilities):
        gathered = [tf.gather(x, SUBSET, axis=-1) for x in (targets, probabilities)]
        return keras.losses.categorical_crossentropy(*gathered)

    arguments = {"activation": "softmax", "outputs": 2, "loss_weights": [0.2, 0.8]}
    assert_trains_alike(
        trained(ours, [targets] * 2, **arguments),
        trained([keras.losses.CategoricalCrossentropy(), naive], [targets] * 2, **arguments),
    )


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p2_class_mask(mode):
    mask = [1, 0, 1, 0, 1]

    def naive(targets, probabilities):
        return keras.losses.categorical_crossentropy(targets * mask, probabilities * mask)

    targets = clusters()[2]
    assert_trains_alike(
        trained(losses.CategoricalCrossentropy(subset=mask), targets, "softmax", **mode),
        trained(naive, targets, "softmax", **mode),
    )


def legal_moves():
    """Points, one-hot targets with −1 for classes that are not legal, and what is legal."""
    points, labels, targets = clusters()
    rng = np.random.default_rng(1)
    legal = (rng.random(targets.shape) < 0.5) | (targets == 1)
    legal[::50] = False
    return points, labels, np.where(legal, targets, -1), legal


def naive_legal(targets, logits):
    legal = targets >= 0
    rows = keras.losses.categorical_crossentropy(
        tf.nn.relu(targets), tf.where(legal, logits, -1e9), from_logits=True
    )
    return tf.where(tf.reduce_any(legal, axis=-1), rows, 0)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p4_legal_moves_as_negative_targets(mode):
    points, _, targets, _ = legal_moves()
    loss = losses.CategoricalCrossentropy(from_logits=True, mask_negative_targets=True)
    weights = np.random.default_rng(2).random(len(points))
    mode = {**mode, "fit": {"sample_weight": weights}}
    ours, theirs = trained(loss, targets, **mode), trained(naive_legal, targets, **mode)
    assert_trains_alike(ours, theirs)
    evaluated = [each[2].evaluate(points, targets, verbose=0) for each in (ours, theirs)]
    np.testing.assert_allclose(*evaluated, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p4_candidates_in_the_targets(mode):
    def naive(targets, logits):
        targets = tf.cast(targets, tf.int64)
        label, candidates = targets[:, :1], targets[:, 1:]
        listed = tf.gather(logits, tf.maximum(candidates, 0), axis=-1, batch_dims=1)
        listed = tf.where(candidates >= 0, listed, -1e9)
        hits = tf.cast((candidates == label) & (candidates >= 0), tf.float32)
        first = hits * tf.cast(tf.cumsum(hits, axis=-1) == 1, tf.float32)
        return -tf.reduce_sum(first * tf.nn.log_softmax(listed), axis=-1)

    loss = losses.SparseCategoricalCrossentropy(from_logits=True, candidates_in_targets=True)
    targets = sampled_candidates()
    assert_trains_alike(trained(loss, targets, **mode), trained(naive, targets, **mode))


def sampled_candidates():
    """Labels, and beside each three candidates; the label may not be one of them."""
    labels, rng = clusters()[1], np.random.default_rng(1)
    candidates = rng.integers(-1, 5, (len(labels), 3))
    candidates[:, 0] = np.where(rng.random(len(labels)) < 0.9, labels, -1)
    return np.concatenate([labels[:, None], candidates], axis=1)


def with_endpoint(loss, targets_shape):
    """The classifier with its targets and a mask as inputs, and `MaskedCrossentropy` at its end."""
    keras.utils.set_random_seed(0)
    features, mask = keras.Input([8], name="features"), keras.Input([5], dtype="bool", name="mask")
    dtype = "float32" if targets_shape else "int64"
    targets = keras.Input(targets_shape, dtype=dtype, name="targets")
    hidden = keras.layers.Dense(16, activation="relu")(features)
    logits = keras.layers.Dense(5)(hidden)
    return keras.Model([features, targets, mask], loss(logits, targets, mask))


ENDPOINTS = [(True, "graph"), (True, "eager"), (False, "graph"), (False, "xla")]


@pytest.mark.parametrize("dense,mode", ENDPOINTS)
def test_p4_masks_of_the_models_inputs_in_an_endpoint_layer(dense, mode):
    points, labels, targets, legal = legal_moves()
    model = with_endpoint(layers.MaskedCrossentropy(), [5] if dense else [])
    model.compile("sgd", **MODES[mode])
    inputs = [points, np.maximum(targets, 0) if dense else labels, legal]
    history = model.fit(inputs, epochs=3, batch_size=64, verbose=0)
    theirs = trained(naive_legal, targets, **MODES[mode])
    assert_trains_alike((model.get_weights(), history.history, model), theirs)


def test_an_endpoint_layer_predicts_the_softmax_over_what_is_legal(tmp_path):
    points, labels, _, legal = legal_moves()
    model = with_endpoint(layers.MaskedCrossentropy(temperature=0.5, name="policy"), [])
    model.compile("sgd")
    inputs = [points, labels, legal]
    shares = model.predict(inputs, verbose=0)
    logits = keras.Model(model.inputs, model.layers[-1].input[0]).predict(inputs, verbose=0)
    expected = np.where(legal, np.exp(2 * logits), 0)
    expected /= np.maximum(expected.sum(-1, keepdims=True), 1e-9)
    np.testing.assert_allclose(shares, expected, rtol=1e-4)
    assert not shares[~legal].any()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].get_config() == model.layers[-1].get_config()
    np.testing.assert_array_equal(loaded.predict(inputs, verbose=0), shares)
    assert loaded.evaluate(inputs, verbose=0) == model.evaluate(inputs, verbose=0)
    loaded.fit(inputs, verbose=0)


def test_an_endpoint_layer_in_training_is_one_op():
    _, labels, _, legal = legal_moves()
    layer = layers.MaskedCrossentropy()

    def step(y, z, mask, weights):
        with tf.GradientTape() as tape:
            tape.watch(z)
            layer(z, y, mask, weights)
            value = layer.losses[0]
        return value, tape.gradient(value, z)

    logits, weights = tf.random.stateless_normal([256, 5], [0, 1]), tf.linspace(0.0, 1.0, 256)
    arguments = tf.constant(labels), logits, tf.constant(legal), tf.cast(weights, tf.float32)
    assert ops_in(step, *arguments) == (TRAINING if COMPILED else set())
    value, gradient = tf.function(step, autograph=False)(*arguments)
    rows = fusedloss.nn.sparse_softmax_xent(labels, logits, mask=legal)
    np.testing.assert_allclose(value, tf.reduce_mean(rows * arguments[-1]), rtol=1e-5)
    assert not np.any(gradient[~legal])


def test_the_focal_form_trains_as_keras_does():
    targets = clusters()[2]
    for activation, arguments in (("softmax", {}), (None, {"from_logits": True, "gamma": 1.0})):
        ours, theirs = both(FOCAL, **arguments)
        assert_trains_alike(
            trained(ours, targets, activation), trained(theirs, targets, activation)
        )


@pytest.mark.parametrize("form", ["dense", "integer"])
def test_p3_subset_as_a_metric(form):
    points, labels, dense = clusters()
    y = dense if form == "dense" else labels
    name = "CategoricalCrossentropy" if form == "dense" else "SparseCategoricalCrossentropy"
    ours, theirs = both(name, from_logits=True)
    metric = metrics.SubsetAccuracy(SUBSET)
    _, history, model = trained(ours, y, weighted_metrics=[metric])
    evaluated = model.evaluate(points, y, verbose=0, return_dict=True)
    inside = np.isin(labels, SUBSET)
    best = np.take(SUBSET, model.predict(points, verbose=0)[:, SUBSET].argmax(-1))
    np.testing.assert_allclose(
        evaluated["subset_accuracy"], (best == labels)[inside].mean(), rtol=1e-6
    )
    stock_weights, stock_history, _ = trained(theirs, y)
    np.testing.assert_allclose(history["loss"], stock_history["loss"], rtol=1e-4)


def test_subset_accuracy_by_hand():
    scores = [[0.9, 0.1, 0.5], [0.2, 0.9, 0.2], [0.1, 0.2, 0.3], [0.0, 1.0, 0.0]]
    metric = metrics.SubsetAccuracy([2, 0])
    assert metric.result() == 0
    metric.update_state([0, 2, 2, 1], scores)  # The second is a tie, taken by class 0.
    np.testing.assert_allclose(metric.result(), 2 / 3)
    metric.reset_state()
    metric.update_state([[0], [2], [2], [1]], scores, sample_weight=[1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(metric.result(), 4 / 6)
    metric.reset_state()
    metric.update_state(np.eye(3)[[1, 1, 1, 1]], scores)
    assert metric.result() == 0
    sequence = np.array(scores, "float32").reshape(2, 2, 3)
    metric.update_state([[0, 2], [2, 1]], sequence, sample_weight=[1.0, 3.0])
    np.testing.assert_allclose(metric.result(), 4 / 5)
    metric.reset_state()
    masked = tf.constant(sequence)
    masked._keras_mask = tf.constant([[True, False], [True, True]])
    metric.update_state([[0, 2], [2, 1]], masked)
    assert metric.result() == 1


@pytest.mark.parametrize("name", CLASSES)
def test_sample_and_class_weights_in_fit(name):
    _, labels, dense = clusters()
    ours, theirs = both(name, from_logits=True)
    fit = {"class_weight": {0: 1.0, 1: 2.0, 2: 0.5, 3: 0.0, 4: 1.0}}
    y = dense if name == "CategoricalCrossentropy" else labels
    assert_trains_alike(trained(ours, y, fit=fit), trained(theirs, y, fit=fit))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_and_loss_scaling(policy):
    labels = clusters()[1]
    ours, theirs = both("SparseCategoricalCrossentropy", from_logits=True)
    keras.config.set_dtype_policy(policy)
    try:
        results = []
        for loss in (ours, theirs):
            optimizer = keras.optimizers.SGD(0.01)
            if policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            results.append(trained(loss, labels, optimizer=optimizer))
    finally:
        keras.config.set_dtype_policy("float32")
    for weight, stock in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(weight, stock, atol=2e-3)
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-2)


def test_loss_weights_and_gradient_accumulation():
    labels = clusters()[1]
    results = []
    for loss in both("SparseCategoricalCrossentropy", from_logits=True):
        optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
        results.append(trained(loss, labels, optimizer=optimizer, loss_weights=0.3))
    assert_trains_alike(*results)


def test_masked_sequences_in_fit():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 7, (32, 6))
    results = []
    for loss in both("SparseCategoricalCrossentropy", from_logits=True):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.layers.Embedding(7, 8, mask_zero=True), keras.layers.Dense(7)]
        )
        model.compile("sgd", loss=loss)
        history = model.fit(tokens, tokens, epochs=2, verbose=0)
        results.append((model.get_weights(), history.history, model))
    assert_trains_alike(*results)


# Saving.


ROUND_TRIPS = [
    losses.CategoricalCrossentropy(
        True, 0.1, axis=1, reduction="sum", name="mine", dtype="float64"
    ),
    losses.CategoricalCrossentropy(
        subset=np.array([0, 2]), normalize="full", subset_weight=0.8, full_weight=0.2
    ),
    losses.CategoricalCrossentropy(
        subset=np.array([True, False, True, False, True]), class_weight=range(5)
    ),
    losses.SparseCategoricalCrossentropy(True, ignore_class=-1, subset=(0, 2), label_smoothing=0.2),
    losses.CategoricalCrossentropy(
        True, mask_negative_targets=True, temperature=0.7, z_loss=1e-4, softcap=30.0
    ),
    losses.SparseCategoricalCrossentropy(
        True, candidates_in_targets=True, gamma=2.0, alpha=np.array([0.25, 1, 1, 1, 1])
    ),
    losses.CategoricalFocalCrossentropy([0.25, 0.5, 1, 1, 1], 1.5, label_smoothing=0.1, axis=1),
    losses.CategoricalFocalCrossentropy(subset=[0, 2], subset_weight=0.8, full_weight=0.2),
    metrics.SubsetAccuracy([1, 0, 1, 0, 1], name="part", dtype="float32"),
]


@pytest.mark.parametrize("instance", ROUND_TRIPS, ids=lambda x: type(x).__name__)
def test_config_round_trips(instance):
    serialized = keras.saving.serialize_keras_object(instance)
    revived = keras.saving.deserialize_keras_object(serialized)
    assert type(revived) is type(instance)
    assert revived.get_config() == instance.get_config()
    assert type(instance).from_config(instance.get_config()).get_config() == instance.get_config()


@pytest.mark.parametrize("name", CLASSES)
def test_configs_of_the_first_version_are_read(name):
    """Files of a model hold them, without what has come since."""
    loss = getattr(losses, name)(True, subset=[0, 2], subset_weight=0.8, full_weight=0.2)
    later = ("mask_negative_targets", "candidates_in_targets", "temperature", "z_loss", "softcap")
    config = {
        key: value
        for key, value in loss.get_config().items()
        if key not in (*later, "gamma", "alpha")
    }
    assert getattr(losses, name).from_config(config).get_config() == loss.get_config()


@pytest.mark.parametrize("form", ["negative targets", "candidates"])
def test_p4_saves_and_loads(form, tmp_path):
    points, _, targets, _ = legal_moves()
    targets = targets if form == "negative targets" else sampled_candidates()
    model = classifier()
    model.compile("sgd", loss=OWN_FORMS[form])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == OWN_FORMS[form].get_config()
    assert loaded.evaluate(points, targets, verbose=0) == model.evaluate(points, targets, verbose=0)
    loaded.fit(points, targets, verbose=0)


def test_keras_files_keep_the_loss_and_the_metric(tmp_path):
    points, _, targets = clusters()
    loss = losses.CategoricalCrossentropy(subset=SUBSET, subset_weight=0.8, full_weight=0.2)
    _, _, model = trained(loss, targets, "softmax", metrics=[metrics.SubsetAccuracy(SUBSET)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.loss.get_config() == loss.get_config()
    assert loaded.evaluate(points, targets, verbose=0) == model.evaluate(points, targets, verbose=0)
    loaded.fit(points, targets, verbose=0)


# In processes of their own.


def run_python(device, *arguments):
    here = pathlib.Path(__file__).parent
    path = [
        str(here),
        str(pathlib.Path(fusedloss.__file__).parents[1]),
        os.environ.get("PYTHONPATH"),
    ]
    return subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            **({"CUDA_VISIBLE_DEVICES": "-1"} if device == "CPU:0" else {}),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


# Classes of its tests; the third name stands for that of labels as well.
KERAS_OWN = (
    "HuberLossTest", "BinaryCrossentropyTest", "CategoricalCrossentropyTest",
    "CategoricalFocalCrossentropyTest", "MeanSquaredErrorTest", "MeanAbsoluteErrorTest",
    "LogCoshTest",
)  # fmt: skip


def test_keras_own_tests_pass(device):
    done = run_python(
        device,
        *("-m", "pytest", "-p", "keras_suite", "-p", "no:cacheprovider", "--rootdir", "."),
        *("--pyargs", "keras.src.losses.losses_test", "-k", " or ".join(KERAS_OWN)),
    )
    assert done.returncode == 0, done.stdout + done.stderr


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


def train(losses, strategy, reduction, sample_weight):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([8]), keras.layers.Dense(5)])
        loss = losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
        model.compile("sgd", loss=loss)
    history = model.fit(points, labels, 16, 1, verbose=0, sample_weight=sample_weight)
    return [*model.get_weights(), np.array(history.history["loss"])]


mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert mirrored.num_replicas_in_sync == 2
for reduction, sample_weight in (
    ("sum_over_batch_size", None),
    ("sum", weights),
    ("mean_with_sample_weight", weights),
):
    ours = train(fusedloss.losses, mirrored, reduction, sample_weight)
    theirs = train(keras.losses, mirrored, reduction, sample_weight)
    for our, their in zip(ours, theirs):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-6)
    if reduction == "sum_over_batch_size":
        single = train(fusedloss.losses, tf.distribute.get_strategy(), reduction, sample_weight)
        for our, one in zip(ours, single):
            np.testing.assert_allclose(our, one, rtol=1e-4, atol=1e-6)


def endpoint(strategy):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        inputs = keras.Input([8]), keras.Input([], dtype="int64"), keras.Input([5], dtype="int8")
        legal = inputs[2] != 0  # Keras adds up the inputs of replicas, which booleans are not for.
        logits = keras.layers.Dense(5)(inputs[0])
        shares = fusedloss.layers.MaskedCrossentropy()(logits, inputs[1], legal)
        model = keras.Model(inputs, shares)
        model.compile("sgd")
    mask = (np.arange(320).reshape(64, 5) * 7 % 3 > 0).astype("int8")
    history = model.fit([points, labels, mask], batch_size=16, verbose=0)
    return [*model.get_weights(), np.array(history.history["loss"])]


for our, one in zip(endpoint(mirrored), endpoint(tf.distribute.get_strategy())):
    np.testing.assert_allclose(our, one, rtol=1e-4, atol=1e-6)
"""
