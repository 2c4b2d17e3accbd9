"""The losses of a prediction and its target: accuracy, derivatives, Keras's results, training."""

import math
import random
import warnings
import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import fusedloss
import truth
from fusedloss import losses, nn, reference
from test_accuracy import check_error
from test_keras import (
    COMPILED,
    MODES,
    REDUCTIONS,
    RUN,
    WEIGHTS,
    assert_same,
    assert_trains_alike,
    clusters,
    loss_and_gradient,
    ops_in,
    trained,
)

pytestmark = pytest.mark.usefixtures("device")

# Function, class and arguments; a quantile of None stands for a list, one an output.
KINDS = {
    "huber": ("huber", "Huber", {"delta": 0.7}),
    "squared": ("mean_squared_error", "MeanSquaredError", {}),
    "absolute": ("mean_absolute_error", "MeanAbsoluteError", {}),
    "log cosh": ("log_cosh", "LogCosh", {}),
    "quantile": ("quantile", "Quantile", {"quantile": 0.3}),
    "quantiles": ("quantile", "Quantile", {"quantile": None}),
    "logits": ("binary_crossentropy", "BinaryCrossentropy", {"from_logits": True}),
    "smoothed logits": (
        "binary_crossentropy",
        "BinaryCrossentropy",
        {"from_logits": True, "label_smoothing": 0.1},
    ),
    "probabilities": ("binary_crossentropy", "BinaryCrossentropy", {}),
    "smoothed probabilities": (
        "binary_crossentropy",
        "BinaryCrossentropy",
        {"label_smoothing": 0.1},
    ),
}

# One output, rows of less and of more than 64 outputs, which are cut in different ways, with and
# without a rest of a vector; a row longer than a block of 16384; no rows and no outputs.
SHAPES = [
    (1, 1), (300, 1), (5, 3), (37, 10), (3000, 7), (9, 101), (2, 4099), (3, 40001), (2, 3, 5),
    (7,), (0, 4), (4, 0),
]  # fmt: skip
FACTORS = {
    "kind": list(KINDS),
    "shape": SHAPES,
    "dtype": ["float32", "float64", "float16", "bfloat16"],
    "targets": ["like predictions", "like sums", "int32", "one a row"],
    "output_weights": [None, "positive", "some 0"],
    "path": ["general", "training"],
    "row_weights": [False, True],
    "reduction": ["sum", "mean", "mean_with_sample_weight"],
    "run": list(RUN),
}


def _is_possible(values):
    case = dict(zip(FACTORS, values, strict=False))
    kind, shape = case["kind"], case.get("shape", (1, 1))
    if kind == "quantiles" and shape[-1] == 0:
        return False  # A list is not empty.
    if case.get("output_weights") is not None and shape[-1] == 0:
        return False
    # Binary cross-entropy does not broadcast.
    return not (case.get("targets") == "one a row" and KINDS[kind][0] == "binary_crossentropy")


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


def sample(case, rng):
    """Predictions, targets and keyword arguments of one case."""
    shape, function = case["shape"], KINDS[case["kind"]][0]
    arguments = dict(KINDS[case["kind"]][2])
    dtype = tf.as_dtype(case["dtype"]).as_numpy_dtype
    sums = np.float64 if case["dtype"] == "float64" else np.float32
    target_shape = (*shape[:-1], 1) if case["targets"] == "one a row" else shape
    if function == "binary_crossentropy":
        predictions, targets = rng.normal(size=shape) * 3, rng.random(target_shape)
        if "from_logits" not in arguments:
            # Away from the bounds, at which the gradient jumps.
            predictions = np.clip(1 / (1 + np.exp(-predictions)), 4e-5, 0.99)
    else:
        # Errors far below and far above 1, and a few of exactly 0.
        targets = rng.normal(size=target_shape) * 4
        size = np.exp(rng.uniform(-6, 3, size=shape)) * (rng.random(shape) > 0.05)
        predictions = targets + size * rng.choice([-1, 1], size=shape)
    if case["targets"] == "int32":
        targets = np.round(targets).astype(np.int32)
    else:
        targets = targets.astype(dtype if case["targets"] == "like predictions" else sums)
    predictions = predictions.astype(dtype)
    if arguments.get("quantile", 0) is None:
        arguments["quantile"] = rng.uniform(0.05, 0.95, shape[-1]).tolist()
    if case["output_weights"] is not None:
        weights = rng.uniform(0.2, 2, shape[-1])
        if case["output_weights"] == "some 0":
            left_out = rng.random(shape[-1]) < 0.4
            weights[left_out] = 0
            predictions[..., left_out] = np.nan
            if targets.shape == shape and targets.dtype.kind != "i":
                targets[..., left_out] = np.inf
        arguments["output_weights"] = weights.tolist()
    return predictions, targets, arguments


def row_weights_of(case, rng):
    """Weights that a Keras reduction is given, and the factor that each row's loss then has."""
    shape = case["shape"][:-1]
    rows = max(1, math.prod(shape))
    weights = np.ones(shape, np.longdouble)
    if case["row_weights"]:
        weights = rng.uniform(0.1, 2, shape).astype(np.float32).astype(np.longdouble)
    divisor = {
        "sum": 1,
        "mean": rows,
        "mean_with_sample_weight": weights.sum() if case["row_weights"] and weights.size else rows,
    }[case["reduction"]]
    return (weights.astype(np.float32) if case["row_weights"] else None), weights / divisor


def rows_of(function, targets, predictions, cotangents, arguments):
    """Losses of rows and gradient of their sum, weighted with `cotangents`."""
    with tf.GradientTape() as tape:
        tape.watch(predictions)
        loss = function(targets, predictions, **arguments)
        total = tf.reduce_sum(loss * cotangents)
    return loss, tape.gradient(total, predictions)


def check_case(values, device):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    function, name, _ = KINDS[case["kind"]]
    predictions, targets, arguments = sample(case, rng)
    exact_loss, exact_gradient, loss_terms, gradient_terms = truth.pointwise(
        function, predictions, targets, **arguments
    )
    sums = np.float64 if case["dtype"] == "float64" else np.float32
    general = case["path"] == "general" or len(case["shape"]) == 1
    if general:
        weights = rng.normal(size=case["shape"][:-1]).astype(sums)
        factors = weights.astype(np.longdouble)
    else:
        weights, factors = row_weights_of(case, rng)
    exact_gradient = exact_gradient * factors[..., None]
    gradient_terms *= np.abs(factors).max(initial=0)
    inputs = tf.constant(targets), tf.constant(predictions)
    tf_loss, tf_gradient = rows_of(
        getattr(reference, function), *inputs, tf.constant(factors.astype(sums)), arguments
    )
    sums_epsilon = np.finfo(sums).eps
    epsilon = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case["dtype"], sums_epsilon)
    if case["dtype"] == "float64":  # The reference is right, and not only what it is compared with.
        np.testing.assert_allclose(tf_loss, exact_loss.astype(sums), rtol=1e-12, atol=1e-14)
    if general:
        loss, gradient = RUN[case["run"]](
            lambda y, x: rows_of(getattr(nn, function), y, x, tf.constant(weights), arguments)
        )(*inputs)
        check_error(loss, tf_loss, exact_loss, loss_terms, sums_epsilon, "loss")
    else:
        fused = getattr(losses, name)(
            reduction=case["reduction"], dtype=np.dtype(sums).name, **arguments
        )
        loss, gradient = RUN[case["run"]](
            lambda y, x: loss_and_gradient(fused, y, x, sample_weight=weights)
        )(*inputs)
        assert loss.shape == ()
        error = abs(np.longdouble(loss.numpy()) - (exact_loss * factors).sum())
        tf_error = np.abs((tf_loss.numpy() - exact_loss) * factors).sum()
        terms = np.abs(factors).sum() * loss_terms
        scale = np.abs(exact_loss * factors).sum()
        allowed = 2 * tf_error + sums_epsilon * max(4 * scale, terms)
        assert error <= allowed, f"reduced loss: error {error:.3g}, allowed {allowed:.3g}"
    assert loss.dtype == sums and gradient.dtype == predictions.dtype
    assert loss.device.endswith(device) and gradient.device.endswith(device)
    gradient, tf_gradient = tf.cast(gradient, tf.float64), tf.cast(tf_gradient, tf.float64)
    check_error(gradient, tf_gradient, exact_gradient, gradient_terms, epsilon, "gradient")
    if case["output_weights"] == "some 0":
        left_out = np.equal(arguments["output_weights"], 0)
        np.testing.assert_array_equal(gradient.numpy()[..., left_out], 0)


@pytest.mark.parametrize("values", [*PAIRS, *_drawn(250)], ids=_name)
def test_error_is_within_twice_tensorflows(values, device):
    check_case(values, device)


# From 8 MiB on gradients are stored past the caches, in vectors of whole cache lines: rows that
# begin anywhere in a line, in each of the ways in which a call is cut.
LARGE = {
    "flat": ((2100001, 1), False),
    "flat of two axes": ((1400, 1501), False),
    "short rows": ((41000, 53), True),
    "long rows": ((700, 3001), True),
    "a few rows": ((3, 700001), True),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape,weighted", LARGE.values(), ids=LARGE)
def test_error_of_gradients_larger_than_the_caches(shape, weighted, dtype):
    rng = np.random.default_rng(0)
    shape = (shape[0] * (2 if dtype == "bfloat16" else 1), shape[1])
    as_given = tf.as_dtype(dtype).as_numpy_dtype
    predictions, targets = (
        rng.normal(size=shape).astype(np.float32).astype(as_given) for _ in range(2)
    )
    weights = rng.uniform(0.1, 2, shape[0]).astype(np.float32) if weighted else None
    ours = losses.Huber(0.5, reduction="sum")
    loss, gradient = loss_and_gradient(ours, targets, predictions, sample_weight=weights)
    # In float64, next to which the error of float32 is large; long doubles would take seconds.
    e = predictions.astype(np.float64) - targets.astype(np.float64)
    slope = np.clip(e, -0.5, 0.5) / shape[1] * (1 if weights is None else weights[:, None])
    np.testing.assert_allclose(
        tf.cast(gradient, tf.float32), slope, rtol=1e-6 if dtype == "float32" else 2.0**-8
    )
    np.testing.assert_allclose(loss, (slope * (e - np.clip(e, -0.5, 0.5) / 2)).sum(), rtol=1e-6)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-6, 1e-3, 0.3, 20, 1e4, 1e18])
@pytest.mark.parametrize("kind", ["huber", "squared", "log cosh"])
def test_errors_of_any_size_keep_their_digits(kind, size):
    function, _, arguments = KINDS[kind]
    predictions = np.array([[size], [-size]], np.float32)
    targets = np.zeros_like(predictions)
    loss, gradient = rows_of(
        getattr(nn, function), targets, tf.constant(predictions), tf.ones([2]), arguments
    )
    exact_loss, exact_gradient, *_ = truth.pointwise(function, predictions, targets, **arguments)
    tiny = 1e-37  # Below it, float32 has fewer digits.
    np.testing.assert_allclose(loss, exact_loss.astype(np.float64), rtol=1e-6, atol=tiny)
    np.testing.assert_allclose(gradient, exact_gradient.astype(np.float64), rtol=1e-6, atol=tiny)


@pytest.mark.parametrize("of_list", [False, True], ids=["one", "list"])
@pytest.mark.parametrize("quantile", [1e-9, 0.001, 0.5, 0.75, 0.999, 1 - 1e-6])
def test_quantiles_near_the_ends_keep_their_digits(quantile, of_list):
    targets = np.zeros([3, 2], np.float32)
    predictions = np.array([[1, 2], [-1, -3], [5, -5]], np.float32)
    arguments = {"quantile": [quantile, 0.5] if of_list else quantile}
    exact_loss, exact_gradient, *_ = truth.pointwise("quantile", predictions, targets, **arguments)
    for functions in (nn, reference):
        loss, gradient = rows_of(
            functions.quantile, targets, tf.constant(predictions), tf.ones([3]), arguments
        )
        np.testing.assert_allclose(loss, exact_loss.astype(np.float64), rtol=4e-7)
        np.testing.assert_allclose(gradient, exact_gradient.astype(np.float64), rtol=4e-7)


def test_an_epsilon_of_any_type_and_size_is_kerass(monkeypatch):
    targets = np.array([[0, 1, 0.3, 0], [1, 1, 0, 0]], np.float32)
    predictions = np.array([[0, 1, 0.5, 1], [0.2, 0, 1, 0.9]], np.float32)
    for epsilon in (1e-3, np.float64(1e-3), np.float32(1e-3), 1e-8):
        monkeypatch.setattr("keras.src.backend.config._EPSILON", epsilon)
        ours, theirs = both("BinaryCrossentropy", reduction=None)
        assert_same(ours(targets, predictions), theirs(targets, predictions))


@pytest.mark.parametrize("logit", [0, 1e-30, 1e-4, 3, 20, 60, 300, 1e30])
def test_logits_of_any_size_keep_their_digits(logit):
    logits = np.array([[logit, logit, -logit, -logit]], np.float32).T
    targets = np.array([[0, 1, 0, 1]], np.float32).T
    loss, gradient = rows_of(
        nn.binary_crossentropy, targets, tf.constant(logits), tf.ones([4]), {"from_logits": True}
    )
    exact_loss, exact_gradient, *_ = truth.pointwise(
        "binary_crossentropy", logits, targets, from_logits=True
    )
    # What a target of 1 leaves of log(1 + e^-z) + z - z has an error of one ulp of z.
    np.testing.assert_allclose(
        loss, exact_loss.astype(np.float64), rtol=2e-6, atol=1.2e-7 * max(logit, 1)
    )
    np.testing.assert_allclose(gradient, exact_gradient.astype(np.float64), rtol=2e-6, atol=1.2e-7)


@pytest.mark.parametrize("outputs", [1, 3, 200])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("place", ["prediction", "target", "both"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "quantiles"])
def test_nan_and_inf_propagate_as_in_the_reference_and_stay_in_their_row(kind, place, odd, outputs):
    function, _, arguments = KINDS[kind]
    rng = np.random.default_rng(0)
    predictions, targets = rng.random((2, 40, outputs)).astype(np.float32)
    if place != "target":
        predictions[7, -1] = odd
    if place != "prediction":
        targets[7, -1] = odd
    found = [
        rows_of(
            getattr(module, function), targets, tf.constant(predictions), tf.ones([40]), arguments
        )
        for module in (nn, reference)
    ]
    (loss, gradient), (reference_loss, reference_gradient) = (
        [x.numpy() for x in pair] for pair in found
    )
    np.testing.assert_allclose(loss, reference_loss, rtol=2e-5, atol=1e-6)
    # Where the gradient is not finite, that it says so is what counts.
    finite = np.isfinite(reference_gradient)
    np.testing.assert_array_equal(np.isfinite(gradient), finite)
    np.testing.assert_allclose(gradient[finite], reference_gradient[finite], rtol=2e-5, atol=1e-6)
    others = np.arange(40) != 7
    assert np.isfinite(loss[others]).all() and finite[others].all()
    if math.isnan(odd):
        assert np.isnan(loss[7]) and not finite[7, -1]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_probabilities_at_and_beyond_their_bounds(from_logits, dtype):
    """Clipped there, without a gradient, as in the reference and in Keras."""
    p = tf.constant([[-3.0, 0.0, 1e-9, 1e-4, 0.5, 0.9990234375, 1.0, 1.5]], dtype)
    for share in (0.0, 0.25, 1.0):
        y = tf.fill(p.shape, tf.cast(share, dtype))
        ours, theirs = (
            rows_of(
                module.binary_crossentropy, y, p, tf.ones([1], loss_dtype_of(dtype)),
                {"from_logits": from_logits},
            )
            for module in (nn, reference)
        )  # fmt: skip
        assert_same(ours, theirs, rtol=1e-5 if dtype in ("float32", "float64") else 1e-2)
        if not from_logits:
            outside = tf.gather(ours[1][0], [0, 1, 2, 6, 7])
            np.testing.assert_array_equal(tf.cast(outside, tf.float32), np.zeros(5))


def loss_dtype_of(dtype):
    """The dtype of losses of predictions of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


@pytest.mark.parametrize("path", ["general", "training"])
@pytest.mark.parametrize("kind", ["huber", "absolute", "quantile", "quantiles", "log cosh"])
def test_corners_have_no_slope(kind, path):
    function, name, arguments = KINDS[kind]
    if kind == "quantiles":
        arguments = {"quantile": [0.2, 0.5, 0.9]}
    x = tf.constant([[1.0, -2.0, 0.0], [0.5, 3.0, -0.0]])
    if path == "general":
        loss, gradient = rows_of(getattr(nn, function), x, x, tf.ones([2]), arguments)
    else:
        loss, gradient = loss_and_gradient(getattr(losses, name)(**arguments), x, x)
    np.testing.assert_array_equal(loss, np.zeros(loss.shape))
    np.testing.assert_array_equal(gradient, np.zeros([2, 3]))


# Other derivatives.


@pytest.mark.parametrize("one_a_row", [False, True])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_targets_have_the_gradient_of_the_reference(kind, weighted, one_a_row):
    case = {
        "kind": kind,
        "shape": (6, 4),
        "dtype": "float64",
        "targets": "like predictions",
        "output_weights": "positive" if weighted else None,
    }
    if one_a_row and KINDS[kind][0] != "binary_crossentropy":
        case["targets"] = "one a row"
    predictions, targets, arguments = sample(case, np.random.default_rng(0))
    predictions, targets = tf.constant(predictions), tf.constant(targets)
    cotangents = tf.constant(np.random.default_rng(1).normal(size=6))
    found = []
    for module in (nn, reference):
        with tf.GradientTape() as tape:
            tape.watch([targets, predictions])
            loss = getattr(module, KINDS[kind][0])(targets, predictions, **arguments)
            total = tf.reduce_sum(cotangents * loss)
        found.append(tape.gradient(total, [targets, predictions]))
    assert_same(*found, rtol=1e-12, atol=1e-14)


def stock(kind, targets, predictions, output_weights=None, quantile=None):
    """The loss of rows, as one would write it in TensorFlow."""
    function, _, arguments = KINDS[kind]
    y, p = targets, predictions
    e = p - y
    if function == "huber":
        delta = arguments["delta"]
        loss = tf.where(tf.abs(e) <= delta, e**2 / 2, delta * (tf.abs(e) - delta / 2))
    elif function == "mean_squared_error":
        loss = e**2
    elif function == "mean_absolute_error":
        loss = tf.abs(e)
    elif function == "log_cosh":
        loss = tf.math.log(tf.cosh(e))
    elif function == "quantile":
        q = tf.constant(arguments["quantile"] if quantile is None else quantile, e.dtype)
        loss = tf.maximum(-q * e, (1 - q) * e)
    else:
        smoothing = arguments.get("label_smoothing", 0)
        y = (1 - smoothing) * y + smoothing / 2
        if arguments.get("from_logits"):
            loss = tf.math.softplus(p) - p * y
        else:
            loss = -y * tf.math.log(p) - (1 - y) * tf.math.log(1 - p)
    if output_weights is not None:
        loss *= tf.constant(output_weights, loss.dtype)
    return tf.reduce_mean(loss, axis=-1)


def smooth_case(kind, dtype="float64", shape=(6, 4)):
    """Targets and predictions away from all corners, and what both forms of the loss take."""
    rng = np.random.default_rng(0)
    predictions, targets = rng.uniform(0.1, 0.9, (2, *shape))
    if KINDS[kind][0] != "binary_crossentropy":
        predictions += rng.choice([-2, -0.2, 0.2, 2], shape)
    arguments = {"output_weights": rng.uniform(0.5, 2, shape[-1]).tolist()}
    if kind == "quantiles":
        arguments["quantile"] = rng.uniform(0.1, 0.9, shape[-1]).tolist()
    return tf.constant(targets, dtype), tf.constant(predictions, dtype), arguments


def scalar_losses(kind, path, dtype, arguments):
    """Our loss and the stock form of it, reduced."""
    function, name, fixed = KINDS[kind]

    def theirs(y, x):
        return tf.reduce_mean(stock(kind, y, x, **arguments))

    if path == "training":
        return getattr(losses, name)(dtype=dtype, **{**fixed, **arguments}), theirs
    return lambda y, x: tf.reduce_mean(
        getattr(nn, function)(y, x, **{**fixed, **arguments})
    ), theirs


SECOND = list(AllPairs([list(KINDS), ["general", "training"], list(RUN), ["float32", "float64"]]))


@pytest.mark.parametrize("kind,path,run,dtype", SECOND)
def test_second_derivatives(kind, path, run, dtype):
    targets, predictions, arguments = smooth_case(kind, dtype)
    rng = np.random.default_rng(2)
    direction, cotangent = tf.constant(rng.normal(size=(6, 4)), dtype), tf.constant(0.7, dtype)

    def second(loss):
        def derivatives(y, x, dloss):
            with tf.GradientTape() as outer:
                outer.watch([x, dloss])
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    value = loss(y, x)
                gradient = inner.gradient(value, x, dloss)
            return gradient, outer.gradient(
                gradient, [x, dloss], direction, unconnected_gradients="zero"
            )

        return RUN[run](derivatives)(targets, predictions, cotangent)

    ours, theirs = map(second, scalar_losses(kind, path, dtype, arguments))
    rtol = 1e-4 if dtype == "float32" else 1e-10
    assert_same(ours, theirs, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("path", ["general", "training"])
@pytest.mark.parametrize("kind", ["huber", "log cosh", "quantiles", "smoothed probabilities"])
def test_forward_mode(kind, path):
    targets, predictions, arguments = smooth_case(kind)
    direction = tf.random.stateless_normal(predictions.shape, [0, 1], dtype=tf.float64)

    def jvp(loss):
        with tf.autodiff.ForwardAccumulator(predictions, direction) as forward:
            with tf.GradientTape() as tape:
                tape.watch(predictions)
                value = loss(targets, predictions)
            gradient = tape.gradient(value, predictions)
        return forward.jvp(value), forward.jvp(gradient, unconnected_gradients="zero")

    ours, theirs = map(jvp, scalar_losses(kind, path, "float64", arguments))
    assert_same(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", ["general", "rows", "training"])
@pytest.mark.parametrize("kind", ["huber", "quantiles", "smoothed logits"])
def test_jacobian_and_vectorized_map_need_no_loop(kind, path, caplog):
    targets, predictions, arguments = smooth_case(kind)
    pair = scalar_losses(kind, path, "float64", arguments)
    if path == "rows":
        function, _, fixed = KINDS[kind]
        pair = (
            lambda y, x: getattr(nn, function)(y, x, **{**fixed, **arguments}),
            lambda y, x: stock(kind, y, x, **arguments),
        )

    def jacobian_and_hessian(loss):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(predictions)
            with tf.GradientTape(persistent=True) as inner:
                inner.watch(predictions)
                value = loss(targets, predictions)
            gradient = inner.gradient(value, predictions)
        jacobian = inner.jacobian if value.shape.rank else inner.gradient
        zeros = {"unconnected_gradients": "zero"}
        found = [jacobian(value, predictions), outer.jacobian(gradient, predictions, **zeros)]
        return [*found, outer.batch_jacobian(gradient, predictions, **zeros)]

    def mapped(loss):
        def gradient(y, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x)
            return tape.gradient(value, x)

        y, x = (tf.stack([x, x[::-1], x / 2]) for x in (targets, predictions))
        return (
            tf.vectorized_map(lambda pair: gradient(*pair), (y, x)),
            tf.vectorized_map(lambda x: gradient(targets, x), x),
            tf.vectorized_map(lambda y: gradient(y, predictions), y),
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(*map(jacobian_and_hessian, pair), rtol=1e-9, atol=1e-12)
        assert_same(*map(mapped, pair), rtol=1e-9, atol=1e-12)
    assert "while_loop" not in caplog.text


# Keras's results.

KERAS = [
    ("Huber", {}),
    ("Huber", {"delta": 0.3}),
    ("MeanSquaredError", {}),
    ("MeanAbsoluteError", {}),
    ("LogCosh", {}),
    ("BinaryCrossentropy", {}),
    ("BinaryCrossentropy", {"from_logits": True}),
    ("BinaryCrossentropy", {"label_smoothing": 0.1}),
    ("BinaryCrossentropy", {"from_logits": True, "label_smoothing": 0.3}),
    ("BinaryCrossentropy", {"axis": 1}),
    ("BinaryCrossentropy", {"axis": 0, "from_logits": True}),
    ("BinaryCrossentropy", {"axis": -2, "label_smoothing": 0.1}),
]


def both(name, **arguments):
    """Our loss and Keras's."""
    return getattr(losses, name)(**arguments), getattr(keras.losses, name)(**arguments)


def keras_sample(shape, target_shape=None, seed=0):
    """Targets and predictions in (0, 1), good for every loss."""
    rng = np.random.default_rng(seed)
    targets = rng.random(shape if target_shape is None else target_shape)
    return targets.astype("float32"), rng.uniform(0.05, 0.95, shape).astype("float32")


@pytest.mark.parametrize("recorded", [False, True], ids=["evaluate", "train"])
@pytest.mark.parametrize(
    "shape,weights", [(s, w) for s, weights in WEIGHTS.items() for w in weights], ids=str
)
def test_weights_masks_and_reductions_are_kerass(shape, weights, recorded):
    targets, predictions = keras_sample(shape)
    rng = np.random.default_rng(1)
    weight = None if weights is None else rng.random(weights).astype("float32")
    masks = [None]
    if weights is None or len(weights) < len(shape):  # Keras cannot combine others with a mask.
        masks += [tf.constant(rng.random(shape[:-1]) < 0.6), tf.zeros(shape[:-1], tf.bool)]
    for reduction in REDUCTIONS:
        for mask in masks:
            results = []
            for loss in both("Huber", delta=0.2, reduction=reduction):
                if recorded:
                    results.append(loss_and_gradient(loss, targets, predictions, mask, weight))
                else:
                    tensor = tf.constant(predictions)
                    if mask is not None:
                        tensor._keras_mask = mask
                    results.append(loss(targets, tensor, weight))
            assert_same(*results)


@pytest.mark.parametrize(
    "run,weighted", [("eager", False), ("eager", True), ("graph", True), ("xla", True)]
)
@pytest.mark.parametrize("name,arguments", KERAS, ids=str)
def test_arguments_of_keras_give_its_results(name, arguments, run, weighted):
    targets, predictions = map(tf.constant, keras_sample((7, 4, 5)))
    weight = None
    if weighted:
        losses_shape = np.delete(predictions.shape, arguments.get("axis", -1))
        weight = np.random.default_rng(1).random(losses_shape).astype("float32")
    # One reduction under XLA: it takes a second to compile.
    for reduction in ["mean_with_sample_weight"] if run == "xla" else REDUCTIONS:
        assert_same(
            *(
                RUN[run](
                    lambda y, x, loss=loss: loss_and_gradient(loss, y, x, sample_weight=weight)
                )(targets, predictions)
                for loss in both(name, reduction=reduction, **arguments)
            )
        )


@pytest.mark.parametrize("dtype", [None, "float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "predictions_dtype", ["float16", "bfloat16", "float32", "float64", "int32"]
)
@pytest.mark.parametrize("name,arguments", KERAS[:7], ids=str)
def test_result_has_the_dtype_of_the_loss(name, arguments, dtype, predictions_dtype):
    targets, predictions = keras_sample((6, 5))
    if name != "BinaryCrossentropy":
        predictions *= 9
    predictions = tf.cast(predictions, predictions_dtype)
    ours, theirs = both(name, dtype=dtype, **arguments)
    value, expected = (loss(targets, predictions) for loss in (ours, theirs))
    assert value.dtype == expected.dtype
    # Keras clips float16 probabilities at 1.2e-7, the nearest to 1e-7.
    half = {"float16": 3e-3, "bfloat16": 2e-2}
    rtol = max(half.get(dtype, 1e-6), half.get(predictions_dtype, 1e-6))
    np.testing.assert_allclose(
        tf.cast(value, "float64"), tf.cast(expected, "float64"), rtol=4 * rtol
    )


# Targets and predictions, as Keras takes an axis away or broadcasts.
SHAPES_OF_KERAS = [
    ((6,), (6,)), ((6, 1), (6,)), ((6,), (6, 1)), ((6, 1), (6, 1)), ((6, 1), (6, 5)),
    ((6, 5), (6, 1)), ((5,), (6, 5)), ((6, 5), (5,)), ((1, 5), (6, 5)), ((6, 5), (1, 5)),
    ((1, 1), (6, 5)), ((6, 5), (1, 1)), ((), (6, 5)), ((), (6,)), ((1,), (6, 5)), ((1,), (6,)),
    ((6, 3), (6, 3, 1)), ((6, 3, 1), (6, 3)), ((6, 1, 5), (6, 3, 5)), ((1, 3, 1), (6, 3, 5)),
    ((6, 1), (1, 5)), ((1, 5), (6, 1)), ((3, 5), (6, 3, 5)), ((6, 1, 5), (1, 3, 1)),
    ((3, 1), (6, 3, 5)), ((6, 3, 5), (3, 1)), ((1,), (1,)), ((1, 1), (1,)), ((3, 3), (3, 1)),
]  # fmt: skip


@pytest.mark.parametrize("recorded", [False, True], ids=["evaluate", "train"])
@pytest.mark.parametrize("targets,predictions", SHAPES_OF_KERAS, ids=str)
def test_shapes_broadcast_as_in_keras(targets, predictions, recorded):
    y, p = keras_sample(predictions, targets)
    for reduction in REDUCTIONS:
        results = []
        for loss in both("Huber", delta=0.2, reduction=reduction):
            results.append(loss_and_gradient(loss, y, p) if recorded else loss(y, tf.constant(p)))
        assert_same(*results)


# Shape of the targets, then what is known of it, and of the (6, 5) of the predictions.
KNOWN = [
    ((6, 5), [None, None], [None, None]),
    ((6, 5), [None, 5], [None, None]),
    ((6, 1), [None, 1], [None, 5]),
    ((6, 1), [None, None], [None, None]),
]


@pytest.mark.parametrize("run", ["graph", "xla"])
@pytest.mark.parametrize("shape,targets,predictions", KNOWN, ids=str)
def test_shapes_that_are_found_when_the_op_runs(shape, targets, predictions, run):
    y, p = map(tf.constant, keras_sample((6, 5), shape))
    for loss in (losses.MeanSquaredError(), lambda y, x, _: nn.mean_squared_error(y, x)):
        step = tf.function(
            lambda y, x, loss=loss: loss_and_gradient(loss, y, x),
            input_signature=[tf.TensorSpec(targets), tf.TensorSpec(predictions)],
            autograph=False,
            jit_compile=run == "xla",
        )
        value, gradient = step(y, p)
        error = p.numpy() - y.numpy()
        np.testing.assert_allclose(tf.reduce_mean(value), np.mean(error**2), rtol=1e-5)
        scale = 15 if value.shape.rank == 0 else 2.5
        np.testing.assert_allclose(gradient, error / scale, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "int64", "float16", "float64"])
def test_targets_of_every_dtype(dtype):
    targets, predictions = keras_sample((6, 5))
    targets = (4 * targets).astype(dtype)
    for name in ("MeanAbsoluteError", "BinaryCrossentropy"):
        results = [
            loss_and_gradient(loss, targets, predictions) for loss in both(name, reduction=None)
        ]
        assert_same(*results)
    ours, theirs = both("Huber")
    assert_same(ours(targets.tolist(), predictions.tolist()), theirs(targets, predictions))


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_sigmoid_outputs_are_walked_back_to_their_logits(run):
    targets, logits = keras_sample((6, 5))
    logits = (logits - 0.5) * 200  # The sigmoid saturates: the gradient would be lost.
    for sigmoid in (tf.nn.sigmoid, keras.activations.sigmoid):

        def step(targets, logits, loss, sigmoid=sigmoid):
            def of_logits(y, x, weight):
                return loss(y, sigmoid(x), weight)

            return loss_and_gradient(of_logits, targets, logits)

        assert_same(
            *(
                run(lambda y, x, loss=loss: step(y, x, loss))(targets, logits)
                for loss in both("BinaryCrossentropy")
            )
        )
    with pytest.warns(UserWarning, match="produced by a sigmoid"):
        tf.function(lambda x: losses.BinaryCrossentropy(from_logits=True)(x, tf.nn.sigmoid(x)))(
            tf.zeros([2, 3])
        )


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("shape", [(0, 5), (0,), (0, 3, 5), (3, 0, 5), (3, 0)], ids=str)
def test_an_empty_batch_has_loss_0(shape, run):
    targets, predictions = map(tf.constant, keras_sample(shape))
    # One of each under XLA: it takes a second to compile.
    is_xla = run is RUN["xla"]
    for name in ("Huber",) if is_xla else ("Huber", "BinaryCrossentropy"):
        for reduction in ("sum_over_batch_size",) if is_xla else REDUCTIONS[:-1]:
            loss = getattr(losses, name)(reduction=reduction)
            value, gradient = run(lambda y, x, loss=loss: loss_and_gradient(loss, y, x))(
                targets, predictions
            )
            assert value.shape == () and value == 0 and gradient.shape == shape


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_an_output_of_weight_0_hides_nan_and_a_sample_of_weight_0_does_not(run):
    targets = np.array([[1, np.nan], [2, 3]], "float32")
    predictions = np.array([[0.5, 1], [np.inf, np.nan]], "float32")
    loss = losses.MeanSquaredError(output_weights=[1, 0])
    value, gradient = run(lambda y, x: loss_and_gradient(loss, y, x))(targets[:1], predictions[:1])
    np.testing.assert_allclose(value, 0.125)
    np.testing.assert_allclose(gradient, [[-0.5, 0]])
    for either in (loss, keras.losses.MeanSquaredError()):
        value, _ = run(lambda y, x, loss=either: loss_and_gradient(loss, y, x, None, [1.0, 0.0]))(
            targets, predictions
        )
        assert np.isnan(value)


# Which path is taken.


@pytest.mark.parametrize("name", ["Huber", "Quantile", "BinaryCrossentropy"])
def test_the_path_follows_from_what_is_recorded(name):
    training = {"Fusedloss>PointwiseReduced"}
    general = {"Fusedloss>Pointwise", "Fusedloss>PointwiseGrad"}
    targets, predictions = map(tf.constant, keras_sample((6, 5)))
    weight = tf.ones([6])
    loss = getattr(losses, name)()
    unreduced = getattr(losses, name)(reduction=None)

    def step(y, x, w=None, loss=loss, watch=()):
        with tf.GradientTape() as tape:
            tape.watch([x, *[{"y": y, "w": w}[i] for i in watch]])
            value = loss(y, x, w)
        return tape.gradient(value, x)

    expected = {
        "evaluate": ((loss, targets, predictions), {"Fusedloss>Pointwise"}),
        "plain": ((step, targets, predictions), training),
        "weights": ((step, targets, predictions, weight), training),
        "bfloat16": ((step, targets, tf.cast(predictions, "bfloat16")), training),
        "float16": ((step, targets, tf.cast(predictions, "float16")), general),
        "weights recorded": (
            (lambda y, x, w: step(y, x, w, watch="w"), targets, predictions, weight),
            general,
        ),
        "targets recorded": ((lambda y, x: step(y, x, watch="y"), targets, predictions), general),
        "weights that broadcast up": ((step, targets, predictions, tf.ones([3, 6])), general),
        "no reduction": ((lambda y, x: step(y, x, loss=unreduced), targets, predictions), general),
    }
    for case, (traced, ops) in expected.items():
        assert ops_in(*traced) == (ops if COMPILED else set()), case


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["Huber", "LogCosh", "BinaryCrossentropy"])
def test_weights_and_targets_have_their_gradient(name, reduction):
    targets, predictions = map(tf.constant, keras_sample((6, 5)))
    weight = tf.cast(tf.linspace(0.1, 1.0, 6), tf.float32)
    results = []
    for loss in both(name, reduction=reduction):
        with tf.GradientTape() as tape:
            tape.watch([targets, predictions, weight])
            value = loss(targets, predictions, weight)
        results.append(tape.gradient(value, [targets, predictions, weight]))
    assert_same(*results)


def test_a_traced_step_is_differentiable_in_what_it_did_not_record():
    """An outer tape may ask the training path for the gradient of its targets and weights."""
    targets, predictions, arguments = smooth_case("huber", "float32")
    weight = tf.cast(tf.linspace(0.1, 1.0, 6), tf.float32)

    def naive(y, x, w):
        return tf.reduce_mean(w * stock("huber", y, x, **arguments))

    results = []
    for loss in (losses.Huber(0.7, **arguments), naive):

        @tf.function(autograph=False)
        def step(y, x, w, loss=loss):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(y, x, w)
            return value, tape.gradient(value, x)

        with tf.GradientTape() as tape:
            tape.watch([targets, predictions, weight])
            value, gradient = step(targets, predictions, weight)
            total = value + tf.reduce_sum(tf.sin(tf.range(24.0)) * tf.reshape(gradient, [-1]))
        results.append(tape.gradient(total, [targets, predictions, weight]))
    assert_same(*results)


# Under fit.


def regression():
    """Five targets for the points of `clusters`."""
    points = clusters()[0]
    rng = np.random.default_rng(1)
    return (points @ rng.normal(size=(8, 5)) / 3).astype("float32")


def weighted_square(weights):
    def naive(targets, predictions):
        return tf.reduce_mean(weights * (predictions - targets) ** 2, axis=-1)

    return naive


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p5_outputs_left_out(mode):
    targets = regression()
    with_nan = targets.copy()
    with_nan[:, 1] = np.nan
    ours = losses.MeanSquaredError(output_weights=[1, 0, 1, 0, 2])
    assert_trains_alike(
        trained(ours, with_nan, **mode),
        trained(weighted_square([1.0, 0.0, 1.0, 0.0, 2.0]), targets, **mode),
    )


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_p6_weighted_outputs(mode):
    targets = regression()
    weights = [0.8, 1.2, 0.8, 1.2, 1.0]
    assert_trains_alike(
        trained(losses.MeanSquaredError(output_weights=weights), targets, **mode),
        trained(weighted_square(weights), targets, **mode),
    )


@pytest.mark.parametrize(
    "name,arguments",
    [
        ("Huber", {"delta": 0.3}),
        ("LogCosh", {}),
        ("BinaryCrossentropy", {"label_smoothing": 0.1}),
        ("BinaryCrossentropy", {"from_logits": True}),
    ],
    ids=str,
)
def test_fit_trains_as_keras(name, arguments):
    targets = clusters()[2] if name == "BinaryCrossentropy" else regression()
    activation = None if arguments.get("from_logits", name != "BinaryCrossentropy") else "sigmoid"
    weights = np.random.default_rng(0).random(256).astype("float32")
    fit = {"sample_weight": weights}
    assert_trains_alike(
        *(trained(loss, targets, activation, fit=fit) for loss in both(name, **arguments))
    )


@pytest.mark.parametrize("form", ["one target", "one a quantile"])
def test_quantiles_of_one_target(form):
    quantiles = [0.05, 0.25, 0.5, 0.75, 0.95]
    target = regression()[:, 0]
    wide = np.repeat(target[:, None], 5, axis=1)

    def naive(targets, predictions):
        return stock("quantiles", targets, predictions, quantile=quantiles)

    given = target if form == "one target" else wide
    assert_trains_alike(trained(losses.Quantile(quantiles), given), trained(naive, wide))


@pytest.mark.parametrize("targets", [(6,), (6, 1), (6, 3)], ids=str)
def test_quantiles_take_targets_without_their_axis(targets):
    y, p = keras_sample((6, 3), targets)
    quantiles = [0.1, 0.5, 0.9]
    expected = stock("quantiles", y.reshape(6, -1), p, quantile=quantiles)
    for functions in (nn, reference):
        assert_same(functions.quantile(y, p, quantile=quantiles), expected)
    sequence = functions.quantile(y[None], p[None], quantile=quantiles)
    assert_same(sequence, expected[None])


def test_loss_weights_and_mixed_precision():
    targets = regression()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        results = [trained(loss, targets, loss_weights=0.3) for loss in both("Huber")]
    finally:
        keras.config.set_dtype_policy("float32")
    for weight, theirs in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(weight, theirs, atol=2e-3)
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-2)


# Saving.


ROUND_TRIPS = [
    losses.Huber(0.5, "sum", "mine", "float64", output_weights=np.array([1, 0, 2])),
    losses.MeanSquaredError(output_weights=(0.8, 1.2)),
    losses.MeanAbsoluteError("mean_with_sample_weight"),
    losses.LogCosh(None),
    losses.Quantile([0.1, 0.5], output_weights=[1, 2]),
    losses.Quantile(0.3),
    losses.BinaryCrossentropy(True, 0.1, 1, output_weights=[1, 2]),
]


@pytest.mark.parametrize("instance", ROUND_TRIPS, ids=lambda x: type(x).__name__)
def test_config_round_trips(instance):
    serialized = keras.saving.serialize_keras_object(instance)
    revived = keras.saving.deserialize_keras_object(serialized)
    assert type(revived) is type(instance)
    assert revived.get_config() == instance.get_config()
    assert type(instance).from_config(instance.get_config()).get_config() == instance.get_config()
    outputs = 3 if instance is ROUND_TRIPS[0] else 2
    targets, predictions = keras_sample((outputs, outputs))
    assert_same(revived(targets, predictions), instance(targets, predictions), rtol=0)


def test_keras_files_keep_the_loss(tmp_path):
    targets = regression()
    loss = losses.MeanSquaredError(output_weights=[1, 0, 1, 0, 2])
    _, _, model = trained(loss, targets)
    model.save(tmp_path / "model.keras")
    for load in (keras.models.load_model, fusedloss.load_model):
        loaded = load(tmp_path / "model.keras")
        assert loaded.loss.get_config() == loss.get_config()
        points = clusters()[0]
        assert loaded.evaluate(points, targets, verbose=0) == model.evaluate(
            points, targets, verbose=0
        )
        loaded.fit(points, targets, verbose=0)


# Bad input.

FUNCTIONS = {"fused": nn, "reference": reference}
OF_WEIGHTS = ["huber", "mean_squared_error", "mean_absolute_error", "log_cosh", "quantile"]
OF_WEIGHTS += ["binary_crossentropy"]

ARGUMENTS = {
    "delta 0": ("huber", {"delta": 0}, "`delta` must be finite and greater than 0. Got 0"),
    "delta < 0": ("huber", {"delta": -1.5}, "`delta` must be .*Got -1.5"),
    "delta NaN": ("huber", {"delta": math.nan}, "`delta` must be .*Got nan"),
    "delta infinite": ("huber", {"delta": math.inf}, "`delta` must be .*Got inf"),
    "delta 0 in float32": ("huber", {"delta": 1e-60}, "`delta` must be .*Got 1e-60"),
    "delta by name": ("huber", {"delta": "one"}, "`delta` must be a number. Got 'one'"),
    "no delta": ("huber", {"delta": None}, "`delta` must be a number. Got None"),
    "quantile 0": ("quantile", {"quantile": 0}, r"`quantile` must lie in \(0, 1\).*Got 0"),
    "quantile 1": ("quantile", {"quantile": 1.0}, r"`quantile` must lie in \(0, 1\).*Got 1"),
    "quantile NaN": ("quantile", {"quantile": math.nan}, "`quantile` must lie.*Got nan"),
    "one of the quantiles": (
        "quantile",
        {"quantile": [0.5, 1.5]},
        "`quantile` must lie.*Got 1.5 at position 1",
    ),
    "no quantiles": ("quantile", {"quantile": []}, "`quantile` must be a flat, non-empty"),
    "nested quantiles": ("quantile", {"quantile": [[0.5]]}, "`quantile` must be a flat"),
    "quantile by name": ("quantile", {"quantile": "half"}, "`quantile` must be a number"),
    "smoothing": (
        "binary_crossentropy",
        {"label_smoothing": 1.5},
        r"`label_smoothing` must lie in \[0, 1\]. Got 1.5",
    ),
    "smoothing of NaN": (
        "binary_crossentropy",
        {"label_smoothing": math.nan},
        "`label_smoothing` must lie in",
    ),
    **{
        f"{what} in {function}": (function, {"output_weights": weights}, text)
        for function in OF_WEIGHTS
        for what, weights, text in (
            ("negative weight", [1, -2, 3], "Got -2.0 at position 1"),
            ("infinite weight", [1, math.inf], "Got inf at position 1"),
            ("large weight", [1, 1e39], r"Got 1e\+39 at position 1, which is infinite in float32"),
            ("small weight", [1e-60], "Got 1e-60 at position 0, which is 0 in float32"),
            ("weight of NaN", [math.nan], "Got nan at position 0"),
            ("nested weights", [[1.0, 2.0]], "`output_weights` must be a flat, non-empty"),
            ("no weights", [], "`output_weights` must be a flat, non-empty"),
            ("a number for weights", 2.0, "`output_weights` must be a flat, non-empty"),
            ("weights by name", {"a": 1.0}, "`output_weights` must be a flat, non-empty"),
        )
    },
}
CLASSES = {function: name for function, name, _ in KINDS.values()}


@pytest.mark.parametrize("function,arguments,text", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_out_of_range(function, arguments, text):
    with pytest.raises(ValueError, match=text):
        getattr(losses, CLASSES[function])(**arguments)
    for functions in FUNCTIONS.values():
        with pytest.raises(ValueError, match=text):
            getattr(functions, function)(np.ones([2, 3]), np.ones([2, 3]), **arguments)


def test_other_arguments_out_of_range():
    with pytest.raises(ValueError, match="`axis` must be an integer. Got True"):
        losses.BinaryCrossentropy(axis=True)
    with pytest.raises(ValueError, match="reduction"):
        losses.Huber(reduction="median")
    with pytest.raises(TypeError, match="`penalty` must be a fusedloss.Penalty or None"):
        losses.Huber(penalty=0.1)
    for functions in FUNCTIONS.values():
        for axis in (2, -3, True, 1.0):
            with pytest.raises(ValueError, match=r"`axis` must be an integer in \[-2, 2\)"):
                functions.binary_crossentropy(tf.zeros([2, 5]), tf.zeros([2, 5]), axis=axis)


# Arguments that fit or not once the predictions have 5 outputs.
UNFIT = {
    "weights": ("huber", {"output_weights": [1, 2, 3]}, "`output_weights` has 3 entries.*5"),
    "one weight": ("huber", {"output_weights": [1]}, "`output_weights` has 1 entries.*5"),
    "quantiles": ("quantile", {"quantile": [0.1, 0.5]}, "`quantile` has 2 entries.*5"),
    "weights of classes": (
        "binary_crossentropy",
        {"output_weights": [1] * 6},
        "`output_weights` has 6 entries.*5",
    ),
}


@pytest.mark.parametrize("run", ["eager", "graph"])
@pytest.mark.parametrize("function,arguments,text", UNFIT.values(), ids=UNFIT)
def test_arguments_that_do_not_fit_the_outputs(function, arguments, text, run):
    ones = tf.ones([2, 5])
    for functions in FUNCTIONS.values():
        with pytest.raises(ValueError, match=text):
            RUN[run](
                lambda y, x, functions=functions: getattr(functions, function)(y, x, **arguments)
            )(ones, ones)
    with pytest.raises(ValueError, match=text):
        RUN[run](getattr(losses, CLASSES[function])(**arguments))(ones, ones)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("unfit", ["weights", "quantiles"])
def test_arguments_that_turn_out_not_to_fit_the_outputs(unfit, functions):
    function, arguments, _ = UNFIT[unfit]
    unknown = tf.function(
        lambda y, x: getattr(functions, function)(y, x, **arguments),
        input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None, None])],
        autograph=False,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="output_weights|quantiles"):
        unknown(tf.ones([2, 5]), tf.ones([2, 5]))


DISAGREEING = {
    "outputs": ("huber", (2, 4), (2, 5), r"must broadcast.*\(2, 4\).*\(2, 5\)"),
    "rows": ("mean_squared_error", (3, 5), (2, 5), r"must broadcast.*\(3, 5\).*\(2, 5\)"),
    "rows, one a row": ("log_cosh", (3, 1), (2, 5), r"must broadcast.*\(3, 1\).*\(2, 5\)"),
    "flat": ("mean_absolute_error", (2,), (2, 5), r"must broadcast.*\(2,\).*\(2, 5\)"),
    "scalar": ("huber", (), (), "must have an axis of outputs"),
    "binary": ("binary_crossentropy", (2, 1), (2, 5), r"the same shape.*\(2, 1\).*\(2, 5\)"),
    "binary rank": ("binary_crossentropy", (5,), (2, 5), r"the same shape.*\(5,\).*\(2, 5\)"),
    "binary scalar": ("binary_crossentropy", (), (), "must have an axis of outputs"),
}


@pytest.mark.parametrize("run", ["eager", "graph"])
@pytest.mark.parametrize("function,targets,predictions,text", DISAGREEING.values(), ids=DISAGREEING)
def test_shapes_that_disagree(function, targets, predictions, text, run):
    targets, predictions = tf.zeros(targets), tf.zeros(predictions)
    for functions in FUNCTIONS.values():
        with pytest.raises(ValueError, match=text):
            RUN[run](getattr(functions, function))(targets, predictions)
    with pytest.raises(ValueError, match=text):
        RUN[run](getattr(losses, CLASSES[function])())(targets, predictions)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 4), (3, 1)], ids=str)
def test_shapes_that_turn_out_to_disagree(shape, functions, jit_compile):
    function = tf.function(
        functions.huber,
        input_signature=[tf.TensorSpec([None, None]), tf.TensorSpec([None, None])],
        autograph=False,
        jit_compile=jit_compile,
    )
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        function(tf.zeros(shape), tf.zeros([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("function", CLASSES)
def test_unknown_rank(function, functions):
    traced = tf.function(
        getattr(functions, function),
        input_signature=[tf.TensorSpec(None), tf.TensorSpec(None)],
        autograph=False,
    )
    with pytest.raises(ValueError, match="ranks.*must be known.*tf.ensure_shape"):
        traced(tf.zeros([2, 5]), tf.zeros([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("function", CLASSES)
def test_dtypes_that_are_not_floats(function, functions):
    for dtype in (tf.int32, tf.bool, tf.complex64, tf.string):
        with pytest.raises(TypeError, match=f"must be float16, bfloat16.* Got {dtype.name}: cast"):
            getattr(functions, function)(tf.zeros([2, 5]), tf.zeros([2, 5], dtype))


def test_a_model_reports_the_loss_that_does_not_fit():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(5)])
    model.compile("sgd", loss=losses.Huber(output_weights=[1, 2]))
    with pytest.raises(ValueError, match="`output_weights` has 2 entries"):
        model.fit(np.ones([4, 3]), np.ones([4, 5]), verbose=0)


# Determinism.


@pytest.mark.parametrize("shape", [(20000, 10), (300, 1000), (7, 70001), (262144, 1)], ids=str)
@pytest.mark.parametrize("path", ["general", "training", "weighted"])
def test_bits_are_the_same_in_every_run_inside_xla_and_outside(path, shape):
    rng = np.random.default_rng(0)
    targets, predictions = map(tf.constant, rng.normal(size=(2, *shape)).astype(np.float32))
    weights = None
    loss = nn.huber if path == "general" else losses.Huber()
    if path == "weighted":
        weights = tf.constant(rng.random(shape[0]).astype(np.float32))
        loss = losses.Huber(output_weights=rng.random(shape[1]).tolist())

    def step(y, x):
        return loss_and_gradient(
            (lambda y, x, _: loss(y, x)) if path == "general" else loss, y, x, None, weights
        )

    found = []
    for run in RUN.values():
        traced = run(step)
        found += [[x.numpy().tobytes() for x in traced(targets, predictions)] for _ in range(2)]
    assert not COMPILED or all(bits == found[0] for bits in found)
