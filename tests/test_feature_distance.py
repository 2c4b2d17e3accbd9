"""Distances of feature maps: accuracy, derivatives, the published formulas, training, bad input."""

import json
import math
import os
import random
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import fusedloss
import truth
from fusedloss import bench_memory, losses, nn, reference
from test_accuracy import check_error
from test_keras import (
    COMPILED,
    MODES,
    REDUCTIONS,
    RUN,
    assert_same,
    loss_and_gradient,
    run_python,
)
from test_pointwise import loss_dtype_of, row_weights_of

pytestmark = pytest.mark.usefixtures("device")

METRICS = ("mse", "mae", "charbonnier", "cosine", "lpips", "gram")
# Of all that has a gradient; the second placement of epsilon is that of the original code.
KINDS = {
    **{metric: {"metric": metric} for metric in METRICS},
    "wide charbonnier": {"metric": "charbonnier", "epsilon": 0.3},
    "lpips outside": {"metric": "lpips", "epsilon_in_root": False},
}
# One position; few channels and many, with and without a rest of a vector, next to few positions
# and many; nothing of each kind; a batch of one.
SHAPES = [
    (5, 7), (3, 4, 5, 6), (2, 3, 3, 64), (2, 17, 130), (9, 1, 1, 3), (3, 5, 512), (0, 4, 4, 8),
    (4, 0, 0, 8), (3, 5, 0), (1, 4, 4, 8),
]  # fmt: skip
# What the layers after the first have behind the axis of rows.
OTHER_LAYERS = ((3, 5), (4,))
LAYER_WEIGHTS = (0.7, 1.3, 0.25)
KEYS = ("b", "c", "a")  # in a dict
FACTORS = {
    "kind": list(KINDS),
    "reference": ["target", "one target", "one without rows", "first"],
    "data_format": ["channels_last", "channels_first"],
    "shape": SHAPES,
    "dtype": ["float32", "float64", "float16", "bfloat16"],
    "channel_weights": [None, "positive", "some 0"],
    "layers": ["one", "list of one", "list", "dict"],
    "differentiate_target": [False, True],
    "path": ["general", "training"],
    "row_weights": [False, True],
    "reduction": ["sum", "mean", "mean_with_sample_weight"],
    "run": list(RUN),
}


def _is_possible(values):
    case = dict(zip(FACTORS, values, strict=False))
    if case["kind"] == "gram" and case.get("channel_weights") is not None:
        return False
    if 0 in case.get("shape", (1,))[1:] and case.get("channel_weights") is not None:
        return False  # A list is not empty.
    # There is no target to differentiate.
    return not (case.get("reference") == "first" and case.get("differentiate_target"))


PAIRS = list(AllPairs(list(FACTORS.values()), filter_func=_is_possible))


def _drawn(count):
    """Cases at random, none under XLA, which takes its time to compile."""
    rng = random.Random(0)
    while count:
        values = [rng.choice(factor) for factor in FACTORS.values()]
        if _is_possible(values) and values[-1] != "xla":
            count -= 1
            yield values


def _name(values):
    return "-".join(str(value).replace(" ", "") for value in values)


def channels_of(shape, data_format):
    return shape[1] if data_format == "channels_first" else shape[-1]


def features(rng, shape, data_format, dtype):
    """Values of about 1, a tenth of them 0, but no position of zeros alone."""
    values = rng.uniform(0.1, 2, shape) * rng.choice([-1, 1], shape)
    is_zero = rng.random(shape) < 0.1
    np.moveaxis(is_zero, 1 if data_format == "channels_first" else -1, 0)[:1] = False
    return np.where(is_zero, 0, values).astype(tf.as_dtype(dtype).as_numpy_dtype)


def sample(case, rng):
    """Lists of predictions and targets, one a layer, and keyword arguments, lists as well."""
    shape, data_format, dtype = case["shape"], case["data_format"], case["dtype"]
    shapes = [shape]
    if case["layers"] in ("list", "dict"):
        shapes += [(shape[0], *rest) for rest in OTHER_LAYERS]
    predictions, targets = [], []
    for each in shapes:
        of_target = (1, *each[1:]) if case["reference"].startswith("one") else each
        target = features(rng, of_target, data_format, dtype)
        prediction = features(rng, each, data_format, dtype)
        # Without errors of 0 corners are not seen.
        is_same = rng.random(each) < 0.05
        predictions.append(np.where(is_same, target, prediction))
        targets.append(target[0] if case["reference"] == "one without rows" else target)
    arguments = {**KINDS[case["kind"]], "data_format": data_format}
    if case["reference"] == "first":
        arguments["reference"] = "first"
    if case["channel_weights"] is not None:
        weights = [rng.uniform(0.2, 2, channels_of(each, data_format)) for each in shapes]
        if case["channel_weights"] == "some 0":
            weights = [np.where(rng.random(w.size) < 0.4, 0, w) for w in weights]
            if len(weights) > 1:
                weights[1] = None
        arguments["channel_weights"] = [None if w is None else w.tolist() for w in weights]
    if len(shapes) > 1:
        arguments["layer_weights"] = list(LAYER_WEIGHTS)
    return predictions, targets, arguments


def in_form(layers, values):
    """A list, one entry a layer, as users give it."""
    if values is None or layers in ("list", "list of one"):
        return values
    return values[0] if layers == "one" else dict(zip(KEYS, values, strict=True))


def in_forms(layers, arguments):
    """Arguments that are lists, as users give them."""
    forms = {
        name: in_form(layers, arguments[name])
        for name in ("channel_weights", "layer_weights")
        if name in arguments
    }
    return {**arguments, **forms}


def value_and_gradients(loss, watched, cotangents=None):
    """`loss()` and the gradients of its sum, weighted with `cotangents`."""
    with tf.GradientTape() as tape:
        tape.watch(watched)
        value = loss()
    return value, tape.gradient(value, watched, cotangents)


def by_layer(structure):
    """The tensors of a layer or of several, in the order of `in_form`."""
    if isinstance(structure, dict):
        return [structure[key] for key in KEYS]
    return structure if isinstance(structure, list) else [structure]


def check_case(values, device):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    predictions, targets, arguments = sample(case, rng)
    is_first, both_sides = case["reference"] == "first", case["differentiate_target"]
    sums = np.dtype(loss_dtype_of(case["dtype"])).type
    general = case["path"] == "general"
    if general:
        weights = rng.normal(size=case["shape"][:1]).astype(sums)
        factors = weights.astype(np.longdouble)
    else:
        weights, factors = row_weights_of({**case, "shape": (case["shape"][0], 1)}, rng)
    exact_loss, *exact_gradients, loss_terms, gradient_terms = truth.feature_distance(
        predictions, targets, factors, **arguments
    )
    exact_gradients = exact_gradients[0] + (exact_gradients[1] if both_sides else [])
    gradient_terms += gradient_terms  # of predictions, and of targets

    x = in_form(case["layers"], [tf.constant(p) for p in predictions])
    y = None if is_first else in_form(case["layers"], [tf.constant(t) for t in targets])
    arguments = {
        **in_forms(case["layers"], arguments),
        "differentiate_target": both_sides,
    }

    def rows_of(function, cotangents):
        def step(y, x):
            watched = by_layer(x) + (by_layer(y) if both_sides else [])
            return value_and_gradients(lambda: function(y, x, **arguments), watched, cotangents)

        return step

    def reduced(y, x):
        watched = by_layer(x) + (by_layer(y) if both_sides else [])
        fused = losses.FeatureDistance(
            reduction=case["reduction"], dtype=np.dtype(sums).name, **arguments
        )
        return value_and_gradients(lambda: fused(y, x, sample_weight=weights), watched)

    tf_loss, tf_gradients = rows_of(reference.feature_distance, tf.constant(factors.astype(sums)))(
        y, x
    )
    sums_epsilon = np.finfo(sums).eps
    epsilon = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case["dtype"], sums_epsilon)
    if case["dtype"] == "float64":  # The reference is right, and not only what it is compared with.
        np.testing.assert_allclose(tf_loss, exact_loss.astype(sums), rtol=1e-11, atol=1e-14)
        for ours, exact in zip(tf_gradients, exact_gradients, strict=True):
            np.testing.assert_allclose(ours, exact.astype(sums), rtol=1e-9, atol=1e-13)
    if general:
        loss, gradients = RUN[case["run"]](rows_of(nn.feature_distance, tf.constant(weights)))(y, x)
        check_error(loss, tf_loss, exact_loss, loss_terms, sums_epsilon, "loss")
    else:
        loss, gradients = RUN[case["run"]](reduced)(y, x)
        assert loss.shape == ()
        error = abs(np.longdouble(loss.numpy()) - (exact_loss * factors).sum())
        tf_error = np.abs((tf_loss.numpy() - exact_loss) * factors).sum()
        terms = np.abs(factors).sum() * loss_terms
        scale = np.abs(exact_loss * factors).sum()
        allowed = 2 * tf_error + sums_epsilon * max(4 * scale, terms)
        assert error <= allowed, f"reduced loss: error {error:.3g}, allowed {allowed:.3g}"
    assert loss.dtype == sums and loss.device.endswith(device)
    given = predictions + (targets if both_sides else [])
    for k, gradient in enumerate(gradients):
        assert gradient.dtype == given[k].dtype and gradient.device.endswith(device)
        ours, theirs = (tf.cast(g[k], tf.float64) for g in (gradients, tf_gradients))
        # Below 6e-8 a float16 has no digits.
        terms = max(gradient_terms[k], 6e-8 / epsilon if case["dtype"] == "float16" else 0)
        check_error(ours, theirs, exact_gradients[k], terms, epsilon, f"gradient {k}")


@pytest.mark.parametrize("values", [*PAIRS, *_drawn(200)], ids=_name)
def test_error_is_within_twice_tensorflows(values, device):
    check_case(values, device)


# From 8 MiB on gradients are stored past the caches: positions that begin anywhere in a line, in
# each of the ways in which a call is cut.
LARGE = {
    "maps": ((3, 41, 53, 331), "lpips", "target", "channels_last", "float32"),
    "maps, channels first": ((3, 331, 41, 53), "lpips", "target", "channels_first", "float32"),
    "maps of half precision": ((6, 41, 53, 331), "cosine", "first", "channels_last", "bfloat16"),
    "one position": ((2, 1100003), "cosine", "target", "channels_last", "float32"),
    "few channels": ((2, 350001, 3), "lpips", "first", "channels_last", "float32"),
    "few channels first": ((2, 3, 350001), "cosine", "first", "channels_first", "float32"),
    "flat": ((7, 300007), "mse", "one target", "channels_last", "float32"),
}


@pytest.mark.parametrize("name", LARGE)
def test_error_of_gradients_larger_than_the_caches(name):
    shape, metric, form, data_format, dtype = LARGE[name]
    rng = np.random.default_rng(0)
    of_target = (1, *shape[1:]) if form == "one target" else shape
    y, x = (
        rng.normal(size=s).astype(np.float32).astype(tf.as_dtype(dtype).as_numpy_dtype)
        for s in (of_target, shape)
    )
    weights = rng.uniform(0.1, 2, shape[0]).astype(np.float32)
    arguments = {"metric": metric, "data_format": data_format}
    arguments["reference"] = "first" if form == "first" else "target"
    loss = losses.FeatureDistance(reduction="sum", **arguments)
    value, gradient = loss_and_gradient(loss, y, x, sample_weight=weights)
    exact, (exact_gradient,), *_ = truth.feature_distance([x], [y], weights, **arguments)
    np.testing.assert_allclose(value, float((exact * weights).sum()), rtol=2e-6)
    error = np.abs(tf.cast(gradient, tf.float64) - exact_gradient.astype(float)).max()
    tolerance = 4e-6 if dtype == "float32" else 2.0**-8
    assert error <= tolerance * np.abs(exact_gradient).max()


# The published formulas.


def distances(*arguments, **keywords):
    """Of the kernel and of the reference, as arrays."""
    return [
        functions.feature_distance(*arguments, **keywords).numpy() for functions in (nn, reference)
    ]


def pair(shape, seed=0, dtype="float64"):
    """Targets and predictions."""
    rng = np.random.default_rng(seed)
    return [features(rng, shape, "channels_last", dtype) for _ in range(2)]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_lpips_is_the_sum_over_layers_of_its_publication(weighted, data_format):
    """Equation 1 of Zhang et al. 2018, with its weights inside of the square, as roots of ours."""
    rng = np.random.default_rng(0)
    shapes = [(3, 8, 6, 5), (3, 4, 3, 16), (3, 2, 2, 40)]
    layers = [pair(shape, k) for k, shape in enumerate(shapes)]
    weights = [rng.uniform(0, 2, shape[-1]) for shape in shapes] if weighted else None
    total = 0
    for k, (y, x) in enumerate(layers):
        unit = [each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (y, x)]
        w = np.sqrt(weights[k]) if weighted else 1
        total += (np.linalg.norm(w * (unit[0] - unit[1]), axis=-1) ** 2).mean((1, 2))
    y, x = zip(*layers, strict=True)
    if data_format == "channels_first":
        y, x = ([np.moveaxis(each, -1, 1) for each in side] for side in (y, x))
    if weighted:
        weights = [w.tolist() for w in weights]
    arguments = {"channel_weights": weights, "data_format": data_format, "metric": "lpips"}
    for found in distances(list(y), list(x), **arguments):
        np.testing.assert_allclose(found, total, rtol=1e-9)


@pytest.mark.parametrize("epsilon", [None, 1e-3])
def test_lpips_with_epsilon_outside_of_the_root_is_that_of_the_original_code(epsilon):
    y, x = pair((3, 4, 5, 6))
    y[0, 0], x[1, 2] = 0, 0
    e = 1e-10 if epsilon is None else epsilon
    unit = [each / (np.sqrt((each**2).sum(-1, keepdims=True)) + e) for each in (y, x)]
    exact = ((unit[0] - unit[1]) ** 2).sum(-1).mean((1, 2))
    for found in distances(y, x, metric="lpips", epsilon=epsilon, epsilon_in_root=False):
        np.testing.assert_allclose(found, exact, rtol=1e-12)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_gram_is_the_style_loss_of_its_publications(data_format):
    y, x = pair((3, 4, 5, 6))

    def gram_of(each):  # [channels, positions], as the papers write features
        f = np.moveaxis(each, -1, 1).reshape(3, 6, 20)
        return f @ f.swapaxes(1, 2)

    difference = gram_of(x) - gram_of(y)
    johnson = (difference**2).sum((1, 2)) / (6 * 4 * 5) ** 2
    gatys = (difference**2).sum((1, 2)) / (4 * 6**2 * 20**2)
    if data_format == "channels_first":
        y, x = np.moveaxis(y, -1, 1), np.moveaxis(x, -1, 1)
    for found in distances(y, x, metric="gram", data_format=data_format):
        np.testing.assert_allclose(found, johnson, rtol=1e-12)
        np.testing.assert_allclose(found, 4 * gatys, rtol=1e-12)


def test_cosine_is_one_minus_the_cosine():
    y, x = pair((7, 30))
    exact = 1 + keras.losses.cosine_similarity(y, x).numpy()
    for found in distances(y, x, metric="cosine"):
        np.testing.assert_allclose(found, exact, rtol=1e-10)
    y, x = pair((3, 4, 5, 6))
    cosines = (y * x).sum(-1) / (np.linalg.norm(y, axis=-1) * np.linalg.norm(x, axis=-1))
    for found in distances(y, x, metric="cosine"):
        np.testing.assert_allclose(found, (1 - cosines).mean((1, 2)), rtol=1e-10)


def test_charbonnier_is_that_of_lapsrn():
    y, x = pair((3, 4, 5, 6))
    exact = np.sqrt((x - y) ** 2 + 1e-3**2).mean((1, 2, 3))
    for found in distances(y, x, metric="charbonnier"):
        np.testing.assert_allclose(found, exact, rtol=1e-12)


def test_squared_and_absolute_errors_are_kerass():
    y, x = pair((7, 30))
    for metric, stock in (("mse", "mean_squared_error"), ("mae", "mean_absolute_error")):
        exact = getattr(keras.losses, stock)(y, x)
        for found in distances(y, x, metric=metric):
            np.testing.assert_allclose(found, exact, rtol=1e-12)


# Forms of the arguments.


@pytest.mark.parametrize("functions", [nn, reference], ids=["fused", "reference"])
def test_layers_come_in_any_structure(functions):
    pairs = [pair(shape, k) for k, shape in enumerate([(3, 4, 4, 6), (3, 2, 5), (3, 9)])]
    targets, predictions = map(list, zip(*pairs, strict=True))
    weights = [None, [1, 2, 0, 3, 1], np.ones(9)]
    distance = functions.feature_distance
    expected = sum(
        layer_weight * distance(y, x, metric="lpips", channel_weights=channel_weights)
        for layer_weight, y, x, channel_weights in zip(
            LAYER_WEIGHTS, targets, predictions, weights, strict=True
        )
    )

    def named(values, order=(2, 0, 1)):
        return {"cab"[i]: values[i] for i in order}

    for y, x, channel_weights, layer_weights in (
        (targets, predictions, weights, list(LAYER_WEIGHTS)),
        (tuple(targets), tuple(predictions), tuple(weights), LAYER_WEIGHTS),
        (targets, tuple(predictions), weights, np.array(LAYER_WEIGHTS)),
        (named(targets), named(predictions, (0, 1, 2)), named(weights), named(LAYER_WEIGHTS)),
    ):
        found = distance(
            y, x, metric="lpips", channel_weights=channel_weights, layer_weights=layer_weights
        )
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    unweighted = sum(distance(y, x) for y, x in pairs)
    np.testing.assert_allclose(distance(targets, predictions), unweighted, rtol=1e-12)
    # A target of its own for one layer, one for the whole batch for another.
    mixed = distance([targets[0][:1], targets[1], targets[2][0]], predictions)
    repeated = [np.repeat(targets[0][:1], 3, 0), targets[1], np.repeat(targets[2][:1], 3, 0)]
    np.testing.assert_allclose(mixed, distance(repeated, predictions), rtol=1e-12)


@pytest.mark.parametrize("functions", [nn, reference], ids=["fused", "reference"])
def test_a_layer_of_weight_0_counts_for_nothing(functions):
    (y, x), (other_y, other_x) = pair((3, 4, 6)), pair((3, 5), 1)
    found = functions.feature_distance([y, other_y], [x, other_x], layer_weights=[1, 0])
    np.testing.assert_allclose(found, functions.feature_distance(y, x), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_targets_are_cast_to_the_predictions(dtype):
    x = tf.cast(pair((3, 4, 6))[1], dtype)
    for target_dtype in ("int32", "uint8", "bool", "float16", "float32", "float64"):
        y = np.arange(72).reshape(3, 4, 6).astype(target_dtype)
        expected = nn.feature_distance(tf.cast(y, dtype), x)
        assert expected.dtype == loss_dtype_of(dtype)
        for functions in (nn, reference):
            assert_same(functions.feature_distance(y, x), expected, rtol=1e-6)


# Shape of the predictions and of the target, then what is known of each.
KNOWN = {
    "batch": ((3, 4, 5, 6), (3, 4, 5, 6), [None, 4, 5, 6], [None, 4, 5, 6]),
    "batch and map": ((3, 4, 5, 6), (3, 4, 5, 6), [None, None, None, 6], [None, None, None, 6]),
    "nothing": ((3, 4, 5, 6), (3, 4, 5, 6), [None] * 4, [None] * 4),
    "one target": ((3, 4, 5, 6), (1, 4, 5, 6), [None, None, None, 6], [1, None, None, 6]),
    "maybe one target": ((3, 4, 5, 6), (1, 4, 5, 6), [None, None, None, 6], [None] * 3 + [6]),
    "target without rows": ((3, 4, 5, 6), (4, 5, 6), [None, None, None, 6], [None, None, 6]),
    "one example": ((1, 4, 5, 6), (1, 4, 5, 6), [None, None, None, 6], [None, None, None, 6]),
    "no example": ((0, 4, 5, 6), (0, 4, 5, 6), [None, None, None, 6], [None, None, None, 6]),
}


@pytest.mark.parametrize(
    "name,path,run,metric",
    list(AllPairs([list(KNOWN), ["general", "training"], ["graph", "xla"], METRICS])),
)
def test_shapes_that_are_found_when_the_op_runs(name, path, run, metric):
    shape, target_shape, known, target_known = KNOWN[name]
    x, y = pair(shape)[1], pair(target_shape, 1)[0]
    weights = None if metric == "gram" else [1, 2, 0, 3, 1, 1]
    arguments = {"metric": metric, "channel_weights": weights}
    fused = losses.FeatureDistance(dtype="float64", reduction="sum", **arguments)

    def step(y, x):
        if path == "training":
            return value_and_gradients(lambda: fused(y, x), [x])
        return value_and_gradients(lambda: nn.feature_distance(y, x, **arguments), [x])

    traced = tf.function(
        step,
        input_signature=[tf.TensorSpec(each, tf.float64) for each in (target_known, known)],
        autograph=False,
        jit_compile=run == "xla",
    )
    value, (gradient,) = traced(y, x)
    exact, (exact_gradient,), *_ = truth.feature_distance(
        [x], [y], np.ones(shape[0]), metric=metric, channel_weights=[weights]
    )
    exact = exact.sum() if path == "training" else exact
    np.testing.assert_allclose(value, np.asarray(exact).astype(float), rtol=1e-11)
    np.testing.assert_allclose(gradient, exact_gradient.astype(float), rtol=1e-8, atol=1e-14)


# The first example as the reference.


def naive(targets, predictions, metric, reference="target", epsilon=None, epsilon_in_root=True):
    """The distance of one layer, channels last, as one would write it in TensorFlow."""
    x = predictions
    y = x[:1] if reference == "first" else targets
    axes = list(range(1, x.shape.rank))
    if metric == "mse":
        rows = tf.reduce_mean(tf.square(x - y), axes)
    elif metric == "mae":
        rows = tf.reduce_mean(tf.abs(x - y), axes)
    elif metric == "charbonnier":
        rows = tf.reduce_mean(tf.sqrt(tf.square(x - y) + (epsilon or 1e-3) ** 2), axes)
    elif metric == "gram":
        grams = []
        for each in (x, y):
            f = tf.reshape(each, [each.shape[0], -1, each.shape[-1]])
            grams.append(tf.matmul(f, f, transpose_a=True) / f.shape[1])
        rows = tf.reduce_mean(tf.square(grams[0] - grams[1]), [1, 2])
    else:
        squares = [tf.reduce_sum(tf.square(each), -1, keepdims=True) for each in (x, y)]
        if epsilon_in_root:
            epsilon = {"cosine": 1e-12, "lpips": 1e-10}[metric] if epsilon is None else epsilon
            norms = [tf.sqrt(square + epsilon) for square in squares]
        else:
            norms = [tf.sqrt(square) + 1e-10 for square in squares]
        if metric == "cosine":
            rows = 1 - tf.reduce_sum(x * y, -1) / (norms[0] * norms[1])[..., 0]
        else:
            rows = tf.reduce_sum(tf.square(x / norms[0] - y / norms[1]), -1)
        rows = tf.reduce_mean(rows, axes[:-1]) if axes[:-1] else rows
    if reference == "first":
        rows *= tf.cast(tf.range(x.shape[0]) > 0, rows.dtype)
    return rows


def scalar_losses(kind, path, reference_kind, differentiate_target=False):
    """Our loss and the naive form of it, reduced, of float64."""
    form = {**KINDS[kind], "reference": reference_kind}
    weights = np.random.default_rng(3).uniform(0.5, 2, 5)

    def theirs(y, x):
        return tf.reduce_mean(weights * naive(y, x, **form))

    arguments = {**form, "differentiate_target": differentiate_target}
    if path == "training":
        fused = losses.FeatureDistance(dtype="float64", **arguments)
        return lambda y, x: fused(y, x, weights), theirs
    return lambda y, x: tf.reduce_mean(weights * nn.feature_distance(y, x, **arguments)), theirs


@pytest.mark.parametrize("path", ["general", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_flows_through_the_first_example_too(kind, path):
    x = tf.constant(pair((5, 3, 4, 6))[1])
    found = [
        value_and_gradients(lambda loss=loss: loss(None, x), [x])
        for loss in scalar_losses(kind, path, "first")
    ]
    assert_same(*found, rtol=1e-8, atol=1e-13)
    gradient = found[0][1][0].numpy()
    assert np.abs(gradient[0]).max() > 1e-6


@pytest.mark.parametrize("path", ["reference", "general", "training"])
@pytest.mark.parametrize("features_are", ["sound", "zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_one_is_at_distance_0_of_its_first(kind, features_are, path):
    x = tf.constant(pair((1, 3, 4, 6), dtype="float32")[1])
    if features_are == "zeros":
        x = tf.zeros_like(x)
    arguments = {**KINDS[kind], "reference": "first"}

    def loss():
        if path == "training":
            return losses.FeatureDistance(**arguments)(None, x)
        functions = reference if path == "reference" else nn
        return functions.feature_distance(None, x, **arguments)

    value, (gradient,) = value_and_gradients(loss, [x])
    np.testing.assert_array_equal(value, np.zeros(value.shape))
    np.testing.assert_array_equal(gradient, np.zeros(x.shape))


def test_the_target_is_not_looked_at_where_the_first_example_is_the_reference():
    x = pair((5, 4, 6))[1]
    expected = nn.feature_distance(None, x, reference="first")
    fused = losses.FeatureDistance(reference="first", reduction=None, dtype="float64")
    for y in (None, np.full(x.shape, np.nan), np.zeros(5), tf.zeros([2, 3])):
        for functions in (nn, reference):
            assert_same(functions.feature_distance(y, x, reference="first"), expected)
        assert_same(fused(y, x), expected)
    assert expected[0] == 0


# Where features are zero or equal.


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("path", ["general", "training"])
@pytest.mark.parametrize("kind", ["cosine", "lpips", "lpips outside"])
def test_features_of_zero_have_a_finite_gradient(kind, path, dtype):
    y, x = pair((4, 3, 6))
    x[0, 0] = 0  # the prediction alone
    y[1, 1] = 0  # the target alone
    x[2, 2] = y[2, 2] = 0
    x[3], y[3] = 0, 0
    y, x = tf.cast(y, dtype), tf.cast(x, dtype)
    exact, (exact_gradient,), (exact_target_gradient,), *_ = truth.feature_distance(
        [x.numpy()], [y.numpy()], np.ones(4), **KINDS[kind]
    )
    arguments = {**KINDS[kind], "differentiate_target": True}

    def loss():
        if path == "general":
            return nn.feature_distance(y, x, **arguments)
        fused = losses.FeatureDistance(reduction="sum", dtype=loss_dtype_of(dtype), **arguments)
        return fused(y, x)

    exact = exact if path == "general" else exact.sum()
    value, gradients = value_and_gradients(loss, [x, y])
    rtol = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 2.0**-7}[dtype]
    np.testing.assert_allclose(value, np.asarray(exact).astype(float), rtol=max(rtol / 10, 1e-9))
    for ours, theirs in zip(gradients, (exact_gradient, exact_target_gradient), strict=True):
        ours, theirs = tf.cast(ours, "float64").numpy(), theirs.astype(float)
        assert np.isfinite(ours).all()
        # The slope at zero is many orders of magnitude above that elsewhere.
        np.testing.assert_allclose(ours, theirs, rtol=20 * rtol, atol=rtol)
        np.testing.assert_array_equal(ours[3], 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("path", ["general", "training"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_features_have_the_least_distance_and_no_slope(kind, path, dtype):
    x = tf.constant(pair((3, 2, 4, 6), dtype=dtype)[1])
    x = tf.concat([x, tf.zeros_like(x[:1])], 0)
    least = {"charbonnier": 1e-3, "wide charbonnier": 0.3}.get(kind, 0)
    loss = losses.FeatureDistance(
        **KINDS[kind],
        reduction="sum" if path == "training" else None,
        dtype=loss_dtype_of(dtype),
        differentiate_target=True,
    )
    y = tf.identity(x)
    value, gradients = value_and_gradients(lambda: loss(y, x), [x, y])
    tolerance = 1e-12 if dtype == "float64" else 2e-6
    if KINDS[kind]["metric"] == "lpips":
        tolerance = 0  # Equal features, divided by equal norms, are equal.
    if kind == "cosine":
        # Of a position of zeros nothing says where it points: the distance to it is 1.
        value = value[:3] if path == "general" else value - 1
    rows = 1 if path == "general" else 4
    np.testing.assert_allclose(value, np.full(value.shape, rows * least), atol=tolerance)
    for gradient in gradients:
        np.testing.assert_allclose(tf.cast(gradient, "float64"), np.zeros(x.shape), atol=tolerance)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", ["prediction", "target", "one target", "first"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gram"])
def test_nan_and_inf_propagate_as_in_the_reference(kind, place, odd):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 6, 5, 40)).astype(np.float32)
    arguments = KINDS[kind]
    if place == "prediction":
        x[2, 3, 39] = odd
    elif place == "target":
        y[2, 3, 39] = odd
    elif place == "one target":
        y = y[:1]
        y[0, 3, 39] = odd
    else:
        x[0, 3, 39] = odd
        arguments = {**arguments, "reference": "first"}
    x = tf.constant(x)

    def rows(functions):
        value, (gradient,) = value_and_gradients(
            lambda: functions.feature_distance(y, x, **arguments), [x]
        )
        return value.numpy(), gradient.numpy()

    (loss, gradient), (reference_loss, reference_gradient) = rows(nn), rows(reference)
    np.testing.assert_allclose(loss, reference_loss, rtol=2e-5, atol=1e-6)
    # Where the gradient is not finite, that it says so is what counts.
    finite = np.isfinite(reference_gradient)
    np.testing.assert_array_equal(np.isfinite(gradient), finite)
    np.testing.assert_allclose(gradient[finite], reference_gradient[finite], rtol=2e-5, atol=1e-6)
    odd_rows = [2] if place in ("prediction", "target") else range(1, 6)
    if math.isnan(odd):
        assert np.isnan(loss[odd_rows]).all()
    if place in ("prediction", "target"):
        others = np.arange(6) != 2
        assert np.isfinite(loss[others]).all() and finite[others].all()


# Other derivatives.


@pytest.mark.parametrize("functions", [nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize("shape", ["same", "one target"])
def test_targets_are_constants_unless_they_are_to_be_differentiated(shape, functions):
    y, x = map(tf.constant, pair((3, 4, 6)))
    if shape == "one target":
        y = y[:1]
    for differentiate in (False, True):
        arguments = {"differentiate_target": differentiate}
        fused = losses.FeatureDistance(reduction="sum", dtype="float64", **arguments)
        _, of_rows = value_and_gradients(
            lambda arguments=arguments: functions.feature_distance(y, x, **arguments), [x, y]
        )
        _, of_class = value_and_gradients(lambda fused=fused: fused(y, x), [x, y])
        assert (of_rows[1] is not None) == (of_class[1] is not None) == differentiate
        assert_same(of_rows[: 1 + differentiate], of_class[: 1 + differentiate], rtol=1e-10)


SECOND = list(
    AllPairs([list(KINDS), ["general", "training"], list(RUN), ["target", "both", "first"]])
)


@pytest.mark.parametrize("kind,path,run,of", SECOND)
def test_second_derivatives(kind, path, run, of):
    y, x = map(tf.constant, pair((5, 2, 3, 4)))
    rng = np.random.default_rng(2)
    watched = 2 if of == "both" else 1
    directions = [tf.constant(rng.normal(size=x.shape)) for _ in range(watched)]

    def second(loss):
        def derivatives(y, x, dloss):
            inputs = [x, y][:watched]
            with tf.GradientTape() as outer:
                outer.watch([*inputs, dloss])
                with tf.GradientTape() as inner:
                    inner.watch(inputs)
                    value = loss(y, x)
                gradients = inner.gradient(value, inputs, dloss)
            zeros = {"unconnected_gradients": "zero"}
            return gradients, outer.gradient(gradients, [*inputs, dloss], directions, **zeros)

        return RUN[run](derivatives)(y, x, tf.constant(0.7, tf.float64))

    forms = scalar_losses(kind, path, "first" if of == "first" else "target", of == "both")
    assert_same(*map(second, forms), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "kind,of,path",
    [
        ("charbonnier", "target", "training"),
        ("cosine", "first", "general"),
        ("lpips", "first", "training"),
        ("lpips", "target", "general"),
        ("gram", "target", "training"),
    ],
)
def test_forward_mode(kind, of, path):
    y, x = map(tf.constant, pair((5, 2, 3, 4)))
    direction = tf.random.stateless_normal(x.shape, [0, 1], dtype=tf.float64)

    def jvp(loss):
        with tf.autodiff.ForwardAccumulator(x, direction) as forward:
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x)
            gradient = tape.gradient(value, x)
        return forward.jvp(value), forward.jvp(gradient, unconnected_gradients="zero")

    assert_same(*map(jvp, scalar_losses(kind, path, of)), rtol=1e-7, atol=1e-10)


def test_third_derivatives_and_several_layers():
    pairs = [pair((5, 3, 4)), pair((5, 6), 1)]
    y, x = ([tf.constant(each) for each in side] for side in zip(*pairs, strict=True))
    fused = losses.FeatureDistance("lpips", dtype="float64", layer_weights=[0.3, 2])

    def theirs(y, x):
        rows = [naive(*each, "lpips") for each in zip(y, x, strict=True)]
        return tf.reduce_mean(0.3 * rows[0] + 2 * rows[1])

    def third(loss):
        tapes = [tf.GradientTape() for _ in range(3)]
        with tapes[0]:
            tapes[0].watch(x)
            with tapes[1]:
                tapes[1].watch(x)
                with tapes[2]:
                    tapes[2].watch(x)
                    value = loss(y, x)
                value = tf.add_n([tf.reduce_sum(g**3) for g in tapes[2].gradient(value, x)])
            value = tf.add_n([tf.reduce_sum(tf.sin(g)) for g in tapes[1].gradient(value, x)])
        return tapes[0].gradient(value, x)

    assert_same(third(fused), third(theirs), rtol=1e-7, atol=1e-11)


# Which path is taken.


def fused_ops(function, *arguments):
    """Types of the ops of the library in a traced function, one by one."""
    graph = tf.function(function, autograph=False).get_concrete_function(*arguments).graph
    types = sorted(op.type for op in graph.get_operations() if op.type.startswith("Fusedloss>"))
    return [name.removeprefix("Fusedloss>FeatureDistance") for name in types]


FIVE_LAYERS = [(4, 8, 8, 3), (4, 4, 4, 6), (4, 2, 2, 9), (4, 5), (4, 1, 7)]


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
@pytest.mark.parametrize("metric", ["lpips", "gram"])
@pytest.mark.parametrize("form", ["target", "both", "first"])
def test_five_layers_take_one_op_and_evaluation_makes_no_gradient(form, metric):
    pairs = [pair(shape, k, "float32") for k, shape in enumerate(FIVE_LAYERS)]
    y, x = ([tf.constant(each) for each in side] for side in zip(*pairs, strict=True))
    arguments = {"metric": metric, "differentiate_target": form == "both"}
    if form == "first":
        y, arguments = None, {**arguments, "reference": "first"}
    loss = losses.FeatureDistance(**arguments)
    unreduced = losses.FeatureDistance(**arguments, reduction=None)
    general = ["", "Grad"]

    def step(y, x, weight=None, loss=loss, watch=()):
        watched = x + (y if form == "both" else [])
        with tf.GradientTape() as tape:
            tape.watch([watched, *watch])
            value = loss(y, x, weight)
        return tape.gradient(value, watched)

    weight = tf.ones([4])
    assert fused_ops(loss, y, x) == [""]
    assert fused_ops(lambda y, x: nn.feature_distance(y, x, **arguments), y, x) == [""]
    assert fused_ops(step, y, x) == ["Reduced"]
    assert fused_ops(step, y, x, weight) == ["Reduced"]
    assert fused_ops(lambda y, x, w: step(y, x, w, watch=[w]), y, x, weight) == general
    assert fused_ops(lambda y, x: step(y, x, loss=unreduced), y, x) == general
    assert fused_ops(step, y, x, tf.ones([3, 4])) == general
    if form == "target":  # They are constants, whoever records them.
        assert fused_ops(lambda y, x: step(y, x, watch=y), y, x) == ["Reduced"]
    if metric == "gram":  # Its matrices are float32, whatever their features are.
        return
    halves = [[tf.cast(each, "bfloat16") for each in side] if side else None for side in (y, x)]
    assert fused_ops(step, *halves) == ["Reduced"]
    halves = [[tf.cast(each, "float16") for each in side] if side else None for side in (y, x)]
    assert fused_ops(step, *halves) == general


def test_the_target_alone_can_be_differentiated():
    y, x = map(tf.constant, pair((3, 4, 6)))
    arguments = {"metric": "cosine", "differentiate_target": True}
    loss = losses.FeatureDistance(**arguments, dtype="float64")
    _, (expected,) = value_and_gradients(lambda: tf.reduce_mean(naive(y, x, "cosine")), [y])
    _, (found,) = value_and_gradients(lambda: loss(y, x), [y])
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-14)


# Keras's results.


class Naive(keras.losses.Loss):
    """The distance of one layer, as a Keras loss that is written in TensorFlow."""

    def __init__(self, metric="mse", reference="target", **arguments):
        super().__init__(**arguments)
        self._form = {"metric": metric, "reference": reference}

    def call(self, y_true, y_pred):
        return naive(y_true, y_pred, **self._form)


def both(metric="mse", **arguments):
    return losses.FeatureDistance(metric, **arguments), Naive(metric, **arguments)


@pytest.mark.parametrize("recorded", [False, True], ids=["evaluate", "train"])
@pytest.mark.parametrize("weights", [None, (), (6,), (6, 1), (1,), (3, 6)], ids=str)
@pytest.mark.parametrize("reference", ["target", "first"])
def test_weights_masks_and_reductions_are_kerass(reference, weights, recorded):
    y, x = pair((6, 3, 4, 5), dtype="float32")
    rng = np.random.default_rng(1)
    weight = None if weights is None else rng.random(weights).astype("float32")
    masks = [None]
    if weights in (None, (6,)):
        masks += [tf.constant(rng.random(6) < 0.6), tf.zeros([6], tf.bool)]
    for reduction in REDUCTIONS:
        for mask in masks:
            results = []
            for loss in both("lpips", reference=reference, reduction=reduction):
                if recorded:
                    results.append(loss_and_gradient(loss, y, x, mask, weight))
                else:
                    tensor = tf.constant(x)
                    if mask is not None:
                        tensor._keras_mask = mask
                    results.append(loss(y, tensor, weight))
            assert_same(*results, atol=2e-6)


def test_a_mask_of_positions_is_refused():
    y, x = map(tf.constant, pair((6, 3, 5)))
    for shape in ([6, 3], [6, 1]):
        x._keras_mask = tf.ones(shape, tf.bool)
        with pytest.raises(ValueError, match=r"a mask of shape \(6, [31]\)"):
            losses.FeatureDistance()(y, x)


@pytest.mark.parametrize("dtype", [None, "float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "predictions_dtype", ["float16", "bfloat16", "float32", "float64", "int32"]
)
def test_result_has_the_dtype_of_the_loss(predictions_dtype, dtype):
    y, x = pair((6, 3, 5))
    x = tf.cast(4 * x, predictions_dtype)
    ours, theirs = both("mae", dtype=dtype)
    value, expected = ours(y, x), theirs(y, x)
    assert value.dtype == expected.dtype
    half = {"float16": 3e-3, "bfloat16": 2e-2}
    rtol = max(half.get(dtype, 1e-6), half.get(predictions_dtype, 1e-6))
    np.testing.assert_allclose(
        tf.cast(value, "float64"), tf.cast(expected, "float64"), rtol=4 * rtol
    )


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("metric", ["mse", "lpips", "gram"])
def test_an_empty_batch_has_loss_0(metric, run):
    y, x = tf.zeros([0, 3, 4, 5]), tf.zeros([0, 3, 4, 5])
    for reference_kind in ("target", "first"):
        for reduction in REDUCTIONS[:1] if run is RUN["xla"] else REDUCTIONS[:-1]:
            loss = losses.FeatureDistance(metric, reference_kind, reduction)
            value, gradient = run(lambda y, x, loss=loss: loss_and_gradient(loss, y, x))(y, x)
            assert value.shape == () and value == 0 and gradient.shape == x.shape


# Under fit.


def pictures(count=64):
    """Pictures [count, 8, 8, 1] of five classes, and their classes, one-hot."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, count)
    x = rng.normal(size=(5, 8, 8, 1))[labels] + 0.5 * rng.normal(size=(count, 8, 8, 1))
    return x.astype("float32"), np.eye(5, dtype="float32")[labels]


def classifier(after_features=None):
    """A convolution called "features", whose output goes through a layer, and a classifier."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input([8, 8, 1])
    x = keras.layers.Conv2D(4, 3, activation="relu", name="features")(inputs)
    if after_features is not None:
        x = after_features(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(5, activation="softmax", name="class")(x))


def two_outputs():
    model = classifier()
    features = model.get_layer("features").output
    return keras.Model(model.input, {"class": model.output, "features": features})


def exposed():
    return fusedloss.models.expose(classifier(), ["features"])


def by_hand(optimizer, epochs=2, batch=16):
    """P8: the step written out, with plain TensorFlow ops."""
    model = two_outputs()
    x, y = pictures()

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            f, p = outputs["features"], outputs["class"]
            content = tf.reduce_mean((f - f[0]) ** 2)
            entropy = tf.reduce_mean(keras.losses.categorical_crossentropy(y, p))
            total = 0.5 * content + 0.5 * entropy
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(total, variables), variables, strict=True))
        return total

    for _ in range(epochs):
        totals = [float(step(x[i : i + batch], y[i : i + batch])) for i in range(0, len(x), batch)]
    return model.get_weights(), np.mean(totals)


class ContentLoss(keras.layers.Layer):
    """Hands its inputs on, and adds their distance to the first example to the loss."""

    def __init__(self, weight, **arguments):
        super().__init__(**arguments)
        self._weight = weight
        self._distance = losses.FeatureDistance(reference="first")

    def call(self, inputs):
        self.add_loss(self._weight * self._distance(None, inputs))
        return inputs


FIT = {"epochs": 2, "batch_size": 16, "shuffle": False, "verbose": 0}


@pytest.mark.parametrize(
    "model_of,mode",
    [(two_outputs, "graph"), (exposed, "graph"), (exposed, "xla"), (exposed, "eager")],
)
def test_p8_the_custom_loop_is_p9_a_second_output(model_of, mode):
    weights, total = by_hand(keras.optimizers.SGD(0.1))
    x, y = pictures()
    model = model_of()
    other = next(name for name in model.output_names if name != "features")
    model.compile(
        keras.optimizers.SGD(0.1),
        loss={
            "features": losses.FeatureDistance(reference="first"),
            other: losses.CategoricalCrossentropy(),
        },
        loss_weights={"features": 0.5, other: 0.5},
        **MODES[mode],
    )
    unused = np.zeros(len(x), "float32")
    history = model.fit(x, {"features": unused, other: y}, **FIT).history
    for ours, theirs in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history["loss"][-1], total, rtol=1e-4)


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_p8_the_custom_loop_is_p9_a_layer_with_add_loss(mode):
    weights, total = by_hand(keras.optimizers.SGD(0.1))
    x, y = pictures()
    model = classifier(ContentLoss(0.5))
    entropy = losses.CategoricalCrossentropy()
    model.compile(keras.optimizers.SGD(0.1), loss=entropy, loss_weights=0.5, **MODES[mode])
    history = model.fit(x, y, **FIT).history
    for ours, theirs in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(history["loss"][-1], total, rtol=1e-4)


def encoder(regularizer=None):
    """Maps of features [4, 4, 3] of pictures."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input([8, 8, 1]),
            keras.layers.Conv2D(6, 3, strides=2, padding="same", activation="relu"),
            keras.layers.Conv2D(3, 3, padding="same", kernel_regularizer=regularizer),
        ]
    )


def trained(loss, targets, fit=None, **compiled):
    """The weights after two epochs, and the history."""
    model = encoder()
    model.compile("sgd", loss=loss, **compiled)
    history = model.fit(pictures()[0], targets, **FIT, **(fit or {})).history
    return model.get_weights(), history, model


def assert_trains_alike(ours, theirs):
    for our, their in zip(ours[0], theirs[0], strict=True):
        np.testing.assert_allclose(our, their, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1]["loss"], theirs[1]["loss"], rtol=1e-4)


@pytest.mark.parametrize(
    "reduction,metric",
    [("mean", "mae"), ("sum", "cosine"), ("mean_with_sample_weight", "gram")],
)
def test_fit_trains_as_the_naive_form(reduction, metric):
    targets = np.random.default_rng(1).normal(size=(64, 4, 4, 3)).astype("float32")
    fit = {"sample_weight": np.random.default_rng(2).random(64).astype("float32")}
    assert_trains_alike(
        *(trained(loss, targets, fit) for loss in both(metric, reduction=reduction))
    )


@pytest.mark.parametrize("reference_kind,mode", [("target", "xla"), ("first", "eager")])
def test_lpips_under_fit_trains_as_the_naive_form(reference_kind, mode):
    targets = np.random.default_rng(1).normal(size=(64, 4, 4, 3)).astype("float32")
    forms = both("lpips", reference=reference_kind)
    assert_trains_alike(*(trained(loss, targets, **MODES[mode]) for loss in forms))


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_and_loss_weights(policy):
    targets = np.random.default_rng(1).normal(size=(64, 4, 4, 3)).astype("float32")
    keras.config.set_dtype_policy(policy)
    try:
        results = []
        for loss in both("lpips"):
            optimizer = keras.optimizers.SGD(0.01)
            if policy == "mixed_float16":
                optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
            model = encoder()
            model.compile(optimizer, loss=loss, loss_weights=0.3)
            history = model.fit(pictures()[0], targets, **FIT).history
            results.append((model.get_weights(), history))
    finally:
        keras.config.set_dtype_policy("float32")
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-2)


def test_a_penalty_rides_on_the_distance():
    x, targets = pictures()[0], np.ones([64, 4, 4, 3], "float32")
    ours, theirs = encoder(), encoder(keras.regularizers.L2(0.1))
    penalty = fusedloss.Penalty(ours.layers[1].kernel, l2=0.1)
    results = []
    for model, loss in (
        (ours, losses.FeatureDistance("charbonnier", penalty=penalty)),
        (theirs, Naive("charbonnier")),
    ):
        model.compile("sgd", loss=loss)
        history = model.fit(x, targets, **FIT).history
        results.append((model.get_weights(), history))
    assert_trains_alike(*results)


# Saving.


ROUND_TRIPS = [
    losses.FeatureDistance(),
    losses.FeatureDistance(
        "lpips", "first", "sum", "mine", "float64",
        channel_weights=np.array([1, 0, 2]), data_format="channels_first", epsilon=1e-6,
        epsilon_in_root=False, differentiate_target=True,
    ),
    losses.FeatureDistance("cosine", layer_weights=(0.5,), channel_weights=[[1, 2, 3]]),
    losses.FeatureDistance("charbonnier", epsilon=0.1, reduction=None),
    losses.FeatureDistance("gram", layer_weights=np.array([2.0])),
    losses.FeatureDistance(layer_weights={"a": 2, "b": 0}, channel_weights={"a": None, "b": [1]}),
]  # fmt: skip


@pytest.mark.parametrize("instance", ROUND_TRIPS, ids=range(len(ROUND_TRIPS)))
def test_config_round_trips(instance):
    serialized = json.loads(json.dumps(keras.saving.serialize_keras_object(instance)))
    revived = keras.saving.deserialize_keras_object(serialized)
    assert type(revived) is type(instance)
    assert revived.get_config() == instance.get_config()
    assert type(instance).from_config(instance.get_config()).get_config() == instance.get_config()
    layers = instance.get_config()["layer_weights"]
    y, x = pair((3, 3, 4, 3))
    if isinstance(layers, dict):
        y, x = ({"a": each, "b": each[..., :1]} for each in (y, x))
    elif layers is not None:
        y, x = [y], [x]
    assert_same(revived(y, x), instance(y, x), rtol=0)


def test_keras_files_keep_the_loss(tmp_path):
    targets = np.random.default_rng(1).normal(size=(64, 4, 4, 3)).astype("float32")
    loss = losses.FeatureDistance("lpips", channel_weights=[1, 0, 2], epsilon=1e-4)
    *_, model = trained(loss, targets)
    model.save(tmp_path / "model.keras")
    for load in (keras.models.load_model, fusedloss.load_model):
        loaded = load(tmp_path / "model.keras")
        assert loaded.loss.get_config() == loss.get_config()
        points = pictures()[0]
        assert loaded.evaluate(points, targets, verbose=0) == model.evaluate(
            points, targets, verbose=0
        )
        loaded.fit(points, targets, verbose=0)


# Bad input.

FUNCTIONS = {"fused": nn, "reference": reference}
ARGUMENTS = {
    "metric": ({"metric": "l2"}, "`metric` must be one of 'mse', .*'gram'. Got 'l2'"),
    "no metric": ({"metric": None}, "`metric` must be one of 'mse', .*Got None"),
    "reference": (
        {"reference": "last"},
        "`reference` must be one of 'target', 'first'. Got 'last'",
    ),
    "data_format": (
        {"data_format": "NCHW"},
        "`data_format` must be one of 'channels_last', 'channels_first'. Got 'NCHW'",
    ),
    "channel_weights of gram": (
        {"metric": "gram", "channel_weights": [1, 1]},
        "'gram' has no `channel_weights`",
    ),
    "epsilon_in_root": (
        {"metric": "cosine", "epsilon_in_root": False},
        "`epsilon_in_root=False` is for metric 'lpips' alone. Got metric 'cosine'",
    ),
    **{
        f"epsilon of {metric}": ({"metric": metric, "epsilon": 0.1}, f"{metric!r} has no `epsilon`")
        for metric in ("mse", "mae", "gram")
    },
    **{
        f"epsilon {epsilon} of {metric}": (
            {"metric": metric, "epsilon": epsilon},
            "`epsilon` must be finite and greater than 0",
        )
        for metric in ("charbonnier", "cosine", "lpips")
        for epsilon in (0, -1e-3, math.nan, math.inf, 1e-60, 1e60)
    },
    "epsilon by name": ({"metric": "lpips", "epsilon": "s"}, "`epsilon` must be a number. Got 's'"),
    "negative weight": ({"channel_weights": [1, -2, 3]}, "`channel_weights`.*-2.0 at position 1"),
    "infinite weight": ({"channel_weights": [math.inf]}, "`channel_weights`.*inf at position 0"),
    "weight of NaN": ({"channel_weights": [1, math.nan]}, "`channel_weights`.*nan at position 1"),
    "small weight": ({"channel_weights": [1e-60]}, "`channel_weights`.* is 0 in float32"),
    "no weights": ({"channel_weights": []}, "`channel_weights`"),
    "a number for weights": ({"channel_weights": 2.0}, "`channel_weights`.* flat, non-empty"),
    "weights of a layer": (
        {"channel_weights": {"low": [1, -2]}},
        r"`channel_weights\['low'\]`.*Got -2.0 at position 1",
    ),
    "weights of a second layer": (
        {"channel_weights": [None, [1, math.nan]]},
        r"`channel_weights\[1\]`.*Got nan at position 1",
    ),
    "layer of NaN": ({"layer_weights": [1, math.nan]}, "`layer_weights`.*nan at position 1"),
    "negative layer": ({"layer_weights": [-1.0]}, "`layer_weights`.*-1.0 at position 0"),
    "infinite layer": ({"layer_weights": {"a": math.inf}}, "`layer_weights`.*inf"),
    "layers by number": ({"layer_weights": 2.0}, "`layer_weights` must be a flat, non-empty"),
    "nested layers": ({"layer_weights": [[1.0], [2.0]]}, "`layer_weights` must be a flat"),
}  # fmt: skip


@pytest.mark.parametrize("arguments,text", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_out_of_range(arguments, text):
    with pytest.raises(ValueError, match=text):
        losses.FeatureDistance(**arguments)
    for functions in FUNCTIONS.values():
        with pytest.raises(ValueError, match=text):
            functions.feature_distance(np.ones([2, 3]), np.ones([2, 3]), **arguments)


def test_other_arguments_out_of_range():
    with pytest.raises(ValueError, match="reduction"):
        losses.FeatureDistance(reduction="median")
    with pytest.raises(TypeError, match="`penalty` must be a fusedloss.Penalty or None"):
        losses.FeatureDistance(penalty=0.1)


def zeros(*shapes):
    return [tf.zeros(shape) for shape in shapes]


# Target, prediction, arguments: what does not fit, and where.
DISAGREEING = {
    "channels": ((2, 4, 5), (2, 4, 6), {}, r"targets of shape \(2, 4, 5\).*\(2, 4, 6\)"),
    "positions": ((2, 3, 5), (2, 4, 5), {}, r"targets of shape \(2, 3, 5\).*\(2, 4, 5\)"),
    "examples": ((3, 4, 5), (2, 4, 5), {}, r"targets of shape \(3, 4, 5\).*\(2, 4, 5\)"),
    "rank": ((2, 4, 5), (2, 2, 2, 5), {}, r"targets of shape \(2, 4, 5\).*\(2, 2, 2, 5\)"),
    "two axes too few": ((5,), (2, 4, 5), {}, r"targets of shape \(5,\).*\(2, 4, 5\)"),
    "no channels": ((2,), (2,), {}, r"predictions of shape \(2,\)"),
    "a scalar": ((), (), {}, r"predictions of shape \(\)"),
    "weights": ((2, 5), (2, 5), {"channel_weights": [1, 2]}, r"2 entries.*\(2, 5\).*5 channels"),
    "weights of the first axis": (
        (2, 4, 5),
        (2, 4, 5),
        {"channel_weights": [1] * 5, "data_format": "channels_first"},
        r"5 entries.*\(2, 4, 5\).*4 channels",
    ),
    "a layer": (
        [(2, 4), (2, 3, 5)],
        [(2, 4), (2, 4, 5)],
        {},
        r"targets of shape \(2, 3, 5\).*\(2, 4, 5\).*layer 1",
    ),
    "a layer by name": (
        {"low": (2, 4), "high": (2, 5)},
        {"low": (2, 4), "high": (2, 4)},
        {"metric": "lpips"},
        r"\(2, 5\).*\(2, 4\).*layer 'high'",
    ),
    "a layer's Gram matrices": (
        [(2, 4), (2, 3, 6)],
        [(2, 4), (2, 4, 5)],
        {"metric": "gram"},
        r"\(2, 3, 6\).*\(2, 4, 5\).*layer 1",
    ),
    "weights of a layer": (
        [(2, 4), (2, 3, 5)],
        [(2, 4), (2, 3, 5)],
        {"channel_weights": [None, [1, 2]]},
        "2 entries in layer 1",
    ),
    "examples of layers": ([(2, 4), (1, 5)], [(2, 4), (3, 5)], {}, r"\(2, 4\).*\(3, 5\)"),
    "number of targets": ([(2, 4)], [(2, 4), (2, 4)], {}, "`target` must be for .*2 layers"),
    "a target for two": ((2, 4), [(2, 4), (2, 4)], {}, "`target` must be for .*2 layers"),
    "two targets for one": ([(2, 4), (2, 4)], (2, 4), {}, "`target` must be for"),
    "other names": (
        {"a": (2, 4), "b": (2, 4)},
        {"a": (2, 4), "c": (2, 4)},
        {},
        r"`target` must be for .*\['a', 'c'\].*\['a', 'b'\]",
    ),
    "layer_weights": (
        [(2, 4), (2, 4)],
        [(2, 4), (2, 4)],
        {"layer_weights": [1, 2, 3]},
        "`layer_weights` must be for .*2 layers.*3 layers",
    ),
    "channel_weights": (
        [(2, 4), (2, 4)],
        [(2, 4), (2, 4)],
        {"channel_weights": [None, None, None]},
        "`channel_weights` must be for .*2 layers.*3 layers",
    ),
    "channel_weights of one for two": (
        [(2, 4), (2, 4)],
        [(2, 4), (2, 4)],
        {"channel_weights": [1, 2, 3, 4]},
        "`channel_weights` must be for .*2 layers",
    ),
    "no layers": ([], [], {}, "at least one layer"),
}


def tensors(shapes):
    if isinstance(shapes, dict):
        return {key: tf.zeros(shape) for key, shape in shapes.items()}
    return zeros(*shapes) if isinstance(shapes, list) else tf.zeros(shapes)


@pytest.mark.parametrize("run", ["eager", "graph"])
@pytest.mark.parametrize("y,x,arguments,text", DISAGREEING.values(), ids=DISAGREEING)
def test_shapes_and_layers_that_disagree(y, x, arguments, text, run):
    y, x = tensors(y), tensors(x)
    for functions in FUNCTIONS.values():
        with pytest.raises(ValueError, match=text):
            RUN[run](
                lambda y, x, functions=functions: functions.feature_distance(y, x, **arguments)
            )(y, x)
    with pytest.raises(ValueError, match=text):
        RUN[run](losses.FeatureDistance(**arguments))(y, x)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_missing_target_says_what_may_be_missing(functions):
    with pytest.raises(ValueError, match='Only with `reference="first"` .* None'):
        functions.feature_distance(None, tf.zeros([2, 4]))


@pytest.mark.parametrize(
    "form,jit_compile",
    [
        ("reference", False),  # XLA has no assertions.
        *((form, jit) for form in ("rows", "general", "training") for jit in (False, True)),
    ],
)
@pytest.mark.parametrize("wrong", ["examples", "positions", "channels", "layers", "weights"])
def test_shapes_that_turn_out_to_disagree(wrong, form, jit_compile):
    arguments = {"channel_weights": [None, [1, 2]]} if wrong == "weights" else {}
    reduction = None if form == "general" else "sum"

    def step(y, x):
        if form in ("reference", "rows"):
            functions = reference if form == "reference" else nn
            return functions.feature_distance(y, x, **arguments)
        loss = losses.FeatureDistance(reduction=reduction, **arguments)
        return value_and_gradients(lambda: loss(y, x), x)

    unknown = [tf.TensorSpec([None, None, None])] * 2
    traced = tf.function(
        step, input_signature=[unknown, unknown], autograph=False, jit_compile=jit_compile
    )
    targets, predictions = {
        "examples": ((3, 4, 5), (2, 4, 5)),
        "positions": ((2, 3, 5), (2, 4, 5)),
        "channels": ((2, 4, 6), (2, 4, 5)),
        "layers": ((3, 4, 5), (3, 4, 5)),
        "weights": ((2, 4, 5), (2, 4, 5)),
    }[wrong]
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        traced(zeros((2, 3, 4), targets), zeros((2, 3, 4), predictions))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_unknown_rank(metric, functions):
    traced = tf.function(
        lambda y, x: functions.feature_distance(y, x, metric=metric),
        input_signature=[tf.TensorSpec(None), tf.TensorSpec(None)],
        autograph=False,
    )
    with pytest.raises(ValueError, match="ranks.*must be known.*tf.ensure_shape"):
        traced(tf.zeros([2, 5]), tf.zeros([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("metric", METRICS)
def test_dtypes_that_are_not_floats_or_of_one_type(metric, functions):
    for dtype in (tf.int32, tf.bool, tf.complex64, tf.string):
        with pytest.raises(TypeError, match=f"must be float16, bfloat16.* Got {dtype.name}"):
            functions.feature_distance(tf.zeros([2, 5]), tf.zeros([2, 5], dtype), metric=metric)
    with pytest.raises(TypeError, match="targets must be numbers.*string"):
        functions.feature_distance(tf.zeros([2, 5], tf.string), tf.zeros([2, 5]), metric=metric)
    mixed = [tf.zeros([2, 5]), tf.zeros([2, 5], tf.bfloat16)]
    with pytest.raises(TypeError, match="of one type. Got float32.* and bfloat16.*layer 1"):
        functions.feature_distance(mixed, mixed, metric=metric)


def test_a_model_reports_the_loss_that_does_not_fit():
    model = encoder()
    model.compile("sgd", loss=losses.FeatureDistance("lpips", channel_weights=[1, 2]))
    with pytest.raises(ValueError, match="`channel_weights` has 2 entries"):
        model.fit(pictures(4)[0], np.ones([4, 4, 4, 3]), verbose=0)


# Determinism, threads, replicas and memory.


STEP = """
import hashlib, sys
import numpy as np, tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(THREADS)
from fusedloss import losses, nn
rng = np.random.default_rng(0)


def digest(*tensors):
    # Through float32: NumPy's bfloat16 has no bytes of its own.
    found = b"".join(tf.cast(x, "float32").numpy().tobytes() for x in tensors)
    print(hashlib.sha256(found).hexdigest())


for shapes in ([(3, 20, 30, 64)], [(2, 9, 11, 130), (2, 4097), (2, 1, 3)], [(700, 512)]):
    x, y = ([tf.constant(rng.normal(size=s).astype("float32")) for s in shapes] for _ in range(2))
    row_weight = tf.constant(rng.random(shapes[0][0]).astype("float32"))
    for metric in ("mse", "mae", "charbonnier", "cosine", "lpips"):
        for form in ("target", "one", "first"):
            arguments = {"metric": metric, "reference": "first" if form == "first" else "target"}
            targets = [t[:1] for t in y] if form == "one" else y
            both = {"differentiate_target": form != "first"}
            fused = losses.FeatureDistance(**arguments, **both)
            watched = x + (targets if form != "first" else [])
            with tf.GradientTape() as tape:
                tape.watch(watched)
                loss = fused(targets, x, row_weight)
            digest(loss, *tape.gradient(loss, watched))
            with tf.GradientTape() as tape:
                tape.watch(watched)
                loss = nn.feature_distance(targets, x, **arguments, **both)
            digest(loss, *tape.gradient(loss, watched, row_weight))
            x16 = [tf.cast(each, "bfloat16") for each in x]
            digest(nn.feature_distance(targets, x16, **arguments))
"""


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
@pytest.mark.parametrize("device", ["CPU:0"], indirect=True)
def test_results_are_bitwise_the_same_for_any_number_of_threads(device):
    runs = [run_python(device, "-c", STEP.replace("THREADS", str(n))) for n in (1, 2)]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr[-2000:]
    digests = [run.stdout.split() for run in runs]
    assert len(digests[0]) == 135
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "metric,path,form",
    list(
        AllPairs(
            [METRICS[:-1], ["general", "training", "weighted"], ["target", "one target", "first"]]
        )
    ),
)
def test_bits_are_the_same_in_every_run_inside_xla_and_outside(metric, path, form):
    shapes = [(5, 9, 11, 70), (5, 4100), (5, 3, 7, 4)]
    pairs = [pair(shape, k, "float32") for k, shape in enumerate(shapes)]
    y, x = ([tf.constant(each) for each in side] for side in zip(*pairs, strict=True))
    arguments = {"metric": metric, "layer_weights": [0.3, 1.0, 2.0]}
    if form == "one target":
        y = [each[:1] for each in y]
    elif form == "first":
        y, arguments["reference"] = None, "first"
    weights = tf.constant([0.3, 0.1, 2.0, 0.7, 1.1]) if path == "weighted" else None
    loss = losses.FeatureDistance(**arguments, reduction=None if path == "general" else "mean")

    def step(y, x):
        return value_and_gradients(lambda: loss(y, x, weights), x)

    found = []
    for run in RUN.values():
        traced = run(step)
        for _ in range(2):
            found.append([each.numpy().tobytes() for each in tf.nest.flatten(traced(y, x))])
    assert not COMPILED or all(bits == found[0] for bits in found)


@pytest.mark.parametrize("device", ["CPU:0"], indirect=True)
def test_two_replicas_train_as_one(device):
    done = run_python(device, "-c", REPLICAS)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


REPLICAS = """
import keras
import numpy as np
import tensorflow as tf

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
import fusedloss

rng = np.random.default_rng(0)
x = rng.normal(size=(64, 6, 6, 2)).astype("float32")
y = rng.normal(size=(64, 6, 6, 3)).astype("float32")
weights = rng.random(64).astype("float32")


def train(metric, strategy, reduction, sample_weight):
    with strategy.scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input([6, 6, 2]), keras.layers.Conv2D(3, 1)])
        loss = fusedloss.losses.FeatureDistance(metric, reduction=reduction)
        model.compile(keras.optimizers.SGD(0.01), loss=loss)
    given = dict(verbose=0, sample_weight=sample_weight, batch_size=16)
    history = model.fit(x, y, epochs=2, shuffle=False, **given)
    return model.get_weights(), [*history.history["loss"], model.evaluate(x, y, **given)]


mirrored = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert mirrored.num_replicas_in_sync == 2
for metric, reduction, sample_weight in (
    ("lpips", "sum_over_batch_size", weights),
    ("charbonnier", "sum", weights),
):
    two, two_reported = train(metric, mirrored, reduction, sample_weight)
    one, one_reported = train(metric, tf.distribute.get_strategy(), reduction, sample_weight)
    for ours, single in zip(two, one):
        np.testing.assert_allclose(ours, single, rtol=1e-4, atol=1e-6)
    if reduction != "sum":
        np.testing.assert_allclose(two_reported, one_reported, rtol=1e-4)
"""


# 16 MB of features: 4 pictures of one layer, and of three.
MEMORY = """
import json
import numpy as np, tensorflow as tf
from fusedloss import losses, nn
from fusedloss.bench_memory import _extra_bytes

rng = np.random.default_rng(0)
found = {}
for shapes in ([(4, 64, 64, 256)], [(4, 64, 64, 128), (4, 32, 32, 512)]):
    x, y = (
        [tf.constant(rng.standard_normal(s, dtype=np.float32)) for s in shapes] for _ in range(2)
    )
    for metric in ("mse", "lpips"):
        for form in ("target", "first"):
            fused = losses.FeatureDistance(metric, form)
            for path in ("training", "general"):
                for jit in (False, True):
                    if jit and len(shapes) == 1:
                        continue

                    @tf.function(jit_compile=jit, autograph=False)
                    def step(y, x, dloss):
                        with tf.GradientTape() as tape:
                            tape.watch(x)
                            if path == "training":
                                loss = fused(y, x, dloss)
                                dloss = None
                            else:
                                loss = nn.feature_distance(y, x, metric=metric, reference=form)
                        return loss, tape.gradient(loss, x, dloss)

                    dloss = tf.constant([0.3, 1.0, 0.7, 2.0])
                    name = f"{len(shapes)} {metric} {form} {path} {jit}"
                    found[name] = _extra_bytes(step, (y, x, dloss))


@tf.function(autograph=False)
def stock(y, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_mean((x[0] - y[0]) ** 2)
    return loss, tape.gradient(loss, x[:1])


found["stock"] = _extra_bytes(stock, (y, x))
print(json.dumps(found))
"""


@pytest.mark.skipif(not COMPILED, reason="there is no compiled library to test")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="it is Linux's to say")
@pytest.mark.parametrize("device", ["CPU:0"], indirect=True)
def test_a_step_allocates_its_gradients_and_nothing_else_of_their_size(device, monkeypatch):
    for name, value in bench_memory.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    run = run_python(device, "-c", MEMORY)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found.pop("stock") > 2**22, "what a stock form needs is seen"
    assert len(found) == 24
    for name, extra in found.items():
        assert extra < 2**20, name
