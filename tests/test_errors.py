"""Bad input: each is refused with a text that says what was wrong and what to do."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import fusedloss
from fusedloss import losses, metrics, nn, reference

FUNCTIONS = {"fused": nn, "reference": reference}
pytestmark = pytest.mark.usefixtures("device")
# A GPU cannot refuse the labels that it finds: there the loss is NaN (test_gpu.py).
on_cpu = pytest.mark.parametrize("device", ["CPU:0"], indirect=True)

RUN = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
}

ARGUMENTS = {
    "empty subset": ({"subset": []}, "`subset` must be a flat, non-empty list"),
    "nested subset": ({"subset": [[0, 1]]}, "`subset` must be a flat"),
    "fractional subset": ({"subset": [0.5, 1.0]}, r"integer class ids.* Got \[0.5, 1.0\]"),
    "scalar subset": ({"subset": 3}, "`subset` must be a flat"),
    "repeated id": ({"subset": [0, 3, 1, 3]}, "holds class 3 twice, at positions 1 and 3"),
    "negative id": ({"subset": [2, -1]}, "holds class -1 at position 1: class ids start at 0"),
    "mask without a class": ({"subset": [0, 0, 0]}, "mask without a class"),
    "false mask": ({"subset": [False, False]}, "mask without a class"),
    "normalize": ({"normalize": "none"}, "`normalize` must be 'subset' or 'full'. Got 'none'"),
    "weights without subset": ({"full_weight": 0.2}, "need a `subset`"),
    "weight without subset": ({"subset_weight": 0.5}, "need a `subset`"),
    "negative weight": (
        {"subset": [0, 2], "subset_weight": -1},
        "`subset_weight` must be finite and at least 0. Got -1",
    ),
    "weight of NaN": (
        {"subset": [0, 2], "full_weight": math.nan},
        "`full_weight` must be finite and at least 0. Got nan",
    ),
    "smoothing": ({"label_smoothing": 1.5}, r"`label_smoothing` must lie in \[0, 1\]. Got 1.5"),
    "smoothing of NaN": ({"label_smoothing": math.nan}, "`label_smoothing` must lie in"),
    "negative class weight": (
        {"class_weight": [1, -2, 3]},
        "`class_weight` must be finite and at least 0. Got -2.0 at position 1",
    ),
    "infinite class weight": ({"class_weight": [1, math.inf]}, "Got inf at position 1"),
    "nested class weight": ({"class_weight": [[1.0]]}, "`class_weight` must be a flat"),
    "class weight by name": ({"class_weight": {0: 1.0}}, "`class_weight` must be a flat"),
}


@pytest.mark.parametrize("arguments,text", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_out_of_range(arguments, text):
    for loss in (losses.CategoricalCrossentropy, losses.SparseCategoricalCrossentropy):
        with pytest.raises(ValueError, match=text):
            loss(**arguments)
    for functions in FUNCTIONS.values():
        with pytest.raises(ValueError, match=text):
            functions.softmax_xent(np.ones([2, 5]), np.ones([2, 5]), **arguments)
        with pytest.raises(ValueError, match=text):
            functions.sparse_softmax_xent([1, 2], np.ones([2, 5]), **arguments)


def test_other_arguments_out_of_range():
    with pytest.raises(ValueError, match="`ignore_class` must be an integer or None. Got 0.5"):
        losses.SparseCategoricalCrossentropy(ignore_class=0.5)
    with pytest.raises(ValueError, match="`axis` must be an integer. Got True"):
        losses.CategoricalCrossentropy(axis=True)
    with pytest.raises(ValueError, match="reduction"):
        losses.CategoricalCrossentropy(reduction="median")
    with pytest.raises(ValueError, match="`subset` must be a flat"):
        metrics.SubsetAccuracy(None)


# Arguments that fit or not once the predictions have 5 classes.
UNFIT = {
    "id": ({"subset": [0, 9, 2]}, r"holds class 9 at position 1.*5 classes.*\[0, 5\)"),
    "mask": ({"subset": [True, False, True]}, "mask of 3 entries.*5 classes"),
    "class weight": ({"class_weight": [1.0, 2.0]}, "`class_weight` has 2 entries.*5 classes"),
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("arguments,text", UNFIT.values(), ids=UNFIT)
def test_arguments_that_do_not_fit_the_classes(functions, arguments, text, run):
    ones = tf.ones([2, 5])
    with pytest.raises(ValueError, match=text):
        run(lambda y, x: functions.softmax_xent(y, x, **arguments))(ones, ones)
    with pytest.raises(ValueError, match=text):
        run(lambda y, x: functions.sparse_softmax_xent(y, x, **arguments))([1, 2], ones)
    with pytest.raises(ValueError, match=text):
        run(losses.CategoricalCrossentropy(**arguments))(ones, ones)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("arguments", [arguments for arguments, _ in UNFIT.values()], ids=UNFIT)
def test_arguments_that_turn_out_not_to_fit_the_classes(functions, arguments):
    unknown = tf.function(
        lambda y, x: functions.sparse_softmax_xent(y, x, **arguments),
        input_signature=[tf.TensorSpec([None], tf.int64), tf.TensorSpec([None, None])],
        autograph=False,
    )
    with pytest.raises(tf.errors.InvalidArgumentError, match="subset|class_weight"):
        unknown([1, 2], tf.ones([2, 5]))


@pytest.mark.parametrize("subset", [[0, 1], [1, 0]], ids=str)
def test_a_subset_that_reads_as_ids_and_as_a_mask(subset):
    with pytest.raises(ValueError, match="can mean both classes or a mask. Give booleans"):
        nn.softmax_xent(tf.ones([2, 2]), tf.ones([2, 2]), subset=subset)
    assert nn.softmax_xent(tf.ones([2, 3]), tf.ones([2, 3]), subset=subset).shape == [2]
    masked = nn.softmax_xent(tf.ones([2, 2]), tf.ones([2, 2]), subset=np.array(subset, bool))
    np.testing.assert_allclose(masked, [0, 0], atol=1e-7)


SHAPES = {
    "sparse rows": ("sparse_softmax_xent", (3,), (2, 5), r"Labels must.*\(3,\).*\(2, 5\)"),
    "sparse rank": ("sparse_softmax_xent", (2, 3), (2, 5), r"Labels must.*\(2, 3\).*\(2, 5\)"),
    "dense classes": ("softmax_xent", (2, 4), (2, 5), r"must have the same shape.*\(2, 4\)"),
    "dense rank": ("softmax_xent", (2,), (2, 5), "integer labels belong to the sparse form"),
    "scalar": ("softmax_xent", (), (), "must have an axis of classes. Got a scalar"),
    "sparse scalar": ("sparse_softmax_xent", (), (), "must have an axis of classes"),
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name,targets,predictions,text", SHAPES.values(), ids=SHAPES)
def test_shapes_that_disagree(functions, name, targets, predictions, text, run):
    dtype = tf.int32 if name.startswith("sparse") else tf.float32
    targets, predictions = tf.zeros(targets, dtype), tf.zeros(predictions)
    with pytest.raises(ValueError, match=text):
        run(getattr(functions, name))(targets, predictions)
    loss = "SparseCategoricalCrossentropy" if dtype == tf.int32 else "CategoricalCrossentropy"
    with pytest.raises(ValueError, match=text):
        run(getattr(losses, loss)())(targets, predictions)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("name", ["softmax_xent", "sparse_softmax_xent"])
def test_shapes_that_turn_out_to_disagree(functions, name, jit_compile):
    sparse = name.startswith("sparse")
    dtype, rank = (tf.int32, 1) if sparse else (tf.float32, 2)
    function = tf.function(
        getattr(functions, name),
        input_signature=[tf.TensorSpec([None] * rank, dtype), tf.TensorSpec([None, 5])],
        autograph=False,
        jit_compile=jit_compile,
    )
    shape = [3] if sparse else [3, 5]
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        function(tf.zeros(shape, dtype), tf.zeros([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_unknown_rank(functions):
    for name, dtype in (("softmax_xent", tf.float32), ("sparse_softmax_xent", tf.int32)):
        function = tf.function(
            getattr(functions, name),
            input_signature=[tf.TensorSpec(None, dtype), tf.TensorSpec(None)],
            autograph=False,
        )
        with pytest.raises(ValueError, match="ranks.*must be known.*tf.ensure_shape"):
            function(tf.zeros([2], dtype), tf.zeros([2, 5]))
    metric = tf.function(
        metrics.SubsetAccuracy([0, 2]).update_state,
        input_signature=[tf.TensorSpec(None), tf.TensorSpec(None)],
        autograph=False,
    )
    with pytest.raises(ValueError, match="known rank"):
        metric(tf.zeros([2]), tf.zeros([2, 5]))


@on_cpu
@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_labels_out_of_range_name_the_first(functions, dtype, run):
    labels = tf.constant([[1, 4], [17, -3]], dtype)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)`labels`.*17.*2.*5"):
        run(functions.sparse_softmax_xent)(labels, tf.zeros([2, 2, 5]))
    ignoring = run(lambda y, x: functions.sparse_softmax_xent(y, x, ignore_class=17))
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)`labels`.*-3.*3.*5"):
        ignoring(labels, tf.zeros([2, 2, 5]))
    np.testing.assert_allclose(
        ignoring(tf.constant([17, 1], dtype), tf.zeros([2, 5])), [0, math.log(5)], rtol=1e-6
    )


@on_cpu
@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
def test_labels_out_of_range_in_training(run):
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(labels, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(labels, logits)
        return value, tape.gradient(value, logits)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)`labels`.*5.*1.*5"):
        run(step)(tf.constant([4, 5]), tf.zeros([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_labels_out_of_range_under_xla_are_never_a_number(functions, device):
    """XLA has no assertions for the reference; the compiled op raises there on a CPU as well."""
    function = tf.function(functions.sparse_softmax_xent, jit_compile=True, autograph=False)
    labels, logits = tf.constant([4, 5, -1]), tf.zeros([3, 5])
    try:
        loss = function(labels, logits)
    except tf.errors.InvalidArgumentError as error:
        assert "`labels` holds 5 at position 1" in str(error)
    else:
        on_gpu = device.startswith("GPU")
        assert on_gpu or functions is reference or fusedloss.backend() == "reference"
        np.testing.assert_allclose(loss, [math.log(5), math.nan, math.nan], rtol=1e-6)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_dtypes_that_are_not_floats(functions):
    for dtype in (tf.int32, tf.bool, tf.complex64, tf.string):
        predictions = tf.zeros([2, 5], dtype)
        with pytest.raises(TypeError, match="must be float16, bfloat16, float32 or float64"):
            functions.softmax_xent(tf.zeros([2, 5]), predictions)
        with pytest.raises(TypeError, match=f"Got {dtype.name}: cast them"):
            functions.sparse_softmax_xent(tf.zeros([2], tf.int32), predictions)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_axis_out_of_range(functions):
    for axis in (2, -3, True, 1.0):
        with pytest.raises(ValueError, match=r"`axis` must be an integer in \[-2, 2\)"):
            functions.softmax_xent(tf.zeros([2, 5]), tf.zeros([2, 5]), axis=axis)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_sizes_at_the_edge(functions):
    np.testing.assert_allclose(functions.softmax_xent([0.0, 1.0], [0.0, 0.0]), math.log(2))
    np.testing.assert_allclose(functions.sparse_softmax_xent(1, [0.0, 0.0]), math.log(2))
    assert functions.softmax_xent(tf.zeros([0, 5]), tf.zeros([0, 5])).shape == [0]
    assert functions.sparse_softmax_xent(tf.zeros([0], "int32"), tf.zeros([0, 5])).shape == [0]
    no_classes = tf.zeros([3, 0])
    np.testing.assert_array_equal(functions.softmax_xent(no_classes, no_classes), [0, 0, 0])
    np.testing.assert_array_equal(functions.sparse_softmax_xent([0, 1, 2], no_classes), [0, 0, 0])


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize(
    "logits", [[math.nan, 0, 1], [math.inf, 0, 1], [-math.inf, 0, 1], [-math.inf] * 3], ids=str
)
def test_nan_and_infinity_propagate_as_in_tensorflow(functions, dense, logits):
    """0 times infinity is no term of the loss: so under XLA, not in TensorFlow's dense kernel."""
    for label in range(3):
        stock = tf.nn.sparse_softmax_cross_entropy_with_logits([label], [logits])
        if dense:
            loss = functions.softmax_xent(np.eye(3)[[label]], [logits])
        else:
            loss = functions.sparse_softmax_xent([label], [logits])
        np.testing.assert_allclose(loss, stock, rtol=1e-6)


def test_a_metric_refuses_what_does_not_fit():
    metric = metrics.SubsetAccuracy([0, 7])
    with pytest.raises(ValueError, match="holds class 7 at position 1"):
        metric.update_state([1, 2], tf.zeros([2, 5]))
    with pytest.raises(ValueError, match="labels of the shape of the predictions without"):
        metrics.SubsetAccuracy([0, 2]).update_state([1, 2, 3], tf.zeros([2, 5]))


def test_a_model_reports_the_loss_that_does_not_fit():
    model = keras.Sequential([keras.Input([3]), keras.layers.Dense(5)])
    model.compile("sgd", loss=losses.CategoricalCrossentropy(subset=[0, 9]))
    with pytest.raises(ValueError, match="`subset` holds class 9"):
        model.fit(np.ones([4, 3]), np.ones([4, 5]), verbose=0)
