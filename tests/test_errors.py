"""Bad input: each is refused with a text that says what was wrong and what to do."""

import itertools
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import fusedloss
from fusedloss import layers, losses, metrics, nn, reference

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
    "temperature of 0": (
        {"temperature": 0},
        "`temperature` must be finite and greater than 0. Got 0",
    ),
    "temperature without a reciprocal": (
        {"temperature": 1e-39},
        r"`temperature` must be between 2\*\*-126 and 2\*\*126. Got 1e-39",
    ),
    "softcap without a reciprocal": (
        {"softcap": 1e38},
        r"`softcap` must be between 2\*\*-126 and 2\*\*126. Got 1e\+38",
    ),
    "negative temperature": ({"temperature": -0.5}, "`temperature` must be .* Got -0.5"),
    "infinite temperature": ({"temperature": math.inf}, "`temperature` must be .* Got inf"),
    "temperature of NaN": ({"temperature": math.nan}, "`temperature` must be .* Got nan"),
    "negative z-loss": ({"z_loss": -1e-4}, "`z_loss` must be finite and at least 0. Got -0.0001"),
    "z-loss of NaN": ({"z_loss": math.nan}, "`z_loss` must be finite and at least 0. Got nan"),
    "softcap of 0": ({"softcap": 0}, "`softcap` must be finite and greater than 0. Got 0"),
    "negative softcap": ({"softcap": -30.0}, "`softcap` must be .* Got -30"),
    "infinite softcap": ({"softcap": math.inf}, "`softcap` must be .* Got inf"),
    "negative gamma": ({"gamma": -2.0}, "`gamma` must be finite and at least 0. Got -2"),
    "gamma of NaN": ({"gamma": math.nan}, "`gamma` must be finite and at least 0. Got nan"),
    "negative alpha": (
        {"gamma": 2.0, "alpha": -0.25},
        "`alpha` must be finite and at least 0. Got -0.25",
    ),
    "an alpha that is negative": (
        {"gamma": 2.0, "alpha": [0.5, -1, 1]},
        "`alpha` must be finite and at least 0. Got -1.0 at position 1",
    ),
    "nested alpha": ({"gamma": 2.0, "alpha": [[0.5]]}, "`alpha` must be a flat"),
    "alpha without gamma": (
        {"alpha": 0.25},
        "`alpha` weighs the focal form and needs gamma > 0. Got 0",
    ),
    "alphas without gamma": ({"alpha": [0.25, 1]}, "`alpha` weighs the focal form"),
    "temperature of probabilities": (
        {"from_logits": False, "temperature": 0.7},
        "`temperature`.*needs.*`from_logits=True`. Got 0.7 for probabilities",
    ),
    "z-loss of probabilities": (
        {"from_logits": False, "z_loss": 1e-4},
        "`z_loss`.*needs.*`from_logits=True`. Got 0.0001 for probabilities",
    ),
    "softcap of probabilities": (
        {"from_logits": False, "softcap": 30.0},
        "`softcap`.*needs.*`from_logits=True`. Got 30.0 for probabilities",
    ),
}


@pytest.mark.parametrize("arguments,text", ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_out_of_range(arguments, text):
    arguments = {"from_logits": True, **arguments}
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
    with pytest.raises(ValueError, match="`gamma` must be finite and at least 0. Got -1"):
        losses.CategoricalFocalCrossentropy(gamma=-1)
    with pytest.raises(ValueError, match="`alpha` must be finite and at least 0. Got nan"):
        losses.CategoricalFocalCrossentropy(alpha=math.nan)
    with pytest.raises(ValueError, match="`temperature` must be .* Got 0"):
        layers.MaskedCrossentropy(temperature=0)
    with pytest.raises(ValueError, match="`softcap` must be .* Got -1"):
        layers.MaskedCrossentropy(softcap=-1)


# Two at a time.
SUBSETS = {"subset": [0, 2], "mask": np.ones([2, 5], bool), "candidates": [[0, 1], [2, 3]]}


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("two", list(itertools.combinations(SUBSETS, 2)), ids="-".join)
def test_two_kinds_of_subset_at_once(functions, two):
    arguments = {name: SUBSETS[name] for name in two}
    text = f"`{two[0]}` and `{two[1]}` both say which classes count: give one of them"
    with pytest.raises(ValueError, match=text):
        functions.softmax_xent(np.ones([2, 5]), np.ones([2, 5]), **arguments)
    with pytest.raises(ValueError, match=text):
        functions.sparse_softmax_xent([1, 2], np.ones([2, 5]), **arguments)
    text = "`subset` and `candidates_in_targets` both"
    with pytest.raises(ValueError, match=text):
        losses.SparseCategoricalCrossentropy(subset=[0, 2], candidates_in_targets=True)


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_warp_finds_logits_behind_a_softmax_only_if_they_are_called_so(functions, run):
    """Else it would be there or not, as the graph happens to be."""
    with pytest.raises(ValueError, match="`temperature`.*`from_logits=True`"):
        run(
            lambda z: functions.sparse_softmax_xent(
                [1, 2], tf.nn.softmax(z), from_logits=False, temperature=2.0
            )
        )(tf.zeros([2, 5]))


# Arguments that fit or not once the predictions have 5 classes.
UNFIT = {
    "id": ({"subset": [0, 9, 2]}, r"holds class 9 at position 1.*5 classes.*\[0, 5\)"),
    "mask": ({"subset": [True, False, True]}, "mask of 3 entries.*5 classes"),
    "class weight": ({"class_weight": [1.0, 2.0]}, "`class_weight` has 2 entries.*5 classes"),
    "alpha": ({"gamma": 2.0, "alpha": [1.0, 2.0]}, "`alpha` has 2 entries.*5 classes"),
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
    with pytest.raises(tf.errors.InvalidArgumentError, match="subset|class_weight|alpha"):
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


# Subsets of the rows' own that do not fit predictions [2, 5].
ROW_SUBSETS = {
    "mask of integers": ({"mask": [[1, 0, 1, 0, 1]] * 2}, r"`mask` must be boolean. Got int.*cast"),
    "mask of floats": ({"mask": np.ones([2, 5])}, "`mask` must be boolean. Got float.*cast"),
    "classes of the mask": ({"mask": np.ones([2, 4], bool)}, r"`mask` must.*\(2, 4\).*\(2, 5\)"),
    "entries of the mask": ({"mask": np.ones([4], bool)}, r"`mask` must.*\(4,\).*\(2, 5\)"),
    "rows of the mask": ({"mask": np.ones([3, 5], bool)}, r"`mask` must.*\(3, 5\).*\(2, 5\)"),
    "rank of the mask": ({"mask": np.ones([1, 2, 5], bool)}, r"`mask` must.*\(1, 2, 5\)"),
    "scalar mask": ({"mask": True}, r"`mask` must.*\(\)"),
    "fractional candidates": ({"candidates": [[0.0, 1], [2, 3]]}, "`candidates` must be integers"),
    "flat candidates": ({"candidates": [0, 1]}, r"`candidates` must.*\(2,\)"),
    "rows of candidates": ({"candidates": [[0, 1]] * 3}, r"`candidates` must.*\(3, 2\).*\(2,\)"),
}


@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("arguments,text", ROW_SUBSETS.values(), ids=ROW_SUBSETS)
def test_masks_and_candidates_that_do_not_fit_the_logits(functions, arguments, text, run):
    with pytest.raises((ValueError, TypeError), match=text):
        run(lambda y, x: functions.softmax_xent(y, x, **arguments))(
            tf.ones([2, 5]), tf.ones([2, 5])
        )
    with pytest.raises((ValueError, TypeError), match=text):
        run(lambda y, x: functions.sparse_softmax_xent(y, x, **arguments))([1, 2], tf.ones([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_targets_that_do_not_fit_their_candidates(functions):
    candidates = [[0, 1, 2], [2, 3, -1]]
    with pytest.raises(ValueError, match=r"`candidates`.*\(2, 3\).*\(2, 5\)"):
        functions.softmax_xent(tf.ones([2, 5]), tf.ones([2, 5]), candidates=candidates)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("kind", ["mask", "candidates"])
def test_masks_and_candidates_that_turn_out_not_to_fit(functions, kind, jit_compile):
    dtype = tf.bool if kind == "mask" else tf.int32
    function = tf.function(
        lambda y, x, subset: functions.sparse_softmax_xent(y, x, **{kind: subset}),
        input_signature=[
            tf.TensorSpec([None], tf.int32),
            tf.TensorSpec([None, 5]),
            tf.TensorSpec([None, None], dtype),
        ],
        autograph=False,
        jit_compile=jit_compile,
    )
    assert function([1, 2], tf.zeros([2, 5]), tf.ones([2, 5], dtype)).shape == [2]
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        function([1, 2], tf.zeros([2, 5]), tf.ones([3, 5], dtype))
    if kind == "mask":
        with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
            function([1, 2], tf.zeros([2, 5]), tf.ones([2, 4], dtype))


@on_cpu
@pytest.mark.parametrize("run", RUN.values(), ids=RUN)
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_candidates_out_of_range_name_the_first(functions, dtype, run):
    logits, labels = tf.zeros([3, 5]), tf.constant([1, 2, 3])
    for bad, place in ((5, (1, 2)), (-2, (2, 0)), (2**31 - 1, (0, 1))):
        candidates = np.full([3, 4], -1)
        candidates[place] = bad
        candidates = tf.constant(candidates, dtype)
        row, position = place
        text = rf"`candidates` holds {bad} at place {position} of row {row} .*5 classes"
        of_assertion = rf"row, its place, classes.*\D{bad}\b.*{row}\b.*{position}\b.*5"
        for name, y in (("sparse_softmax_xent", labels), ("softmax_xent", tf.ones([3, 4]))):
            match = f"(?s){text}|{of_assertion}"
            with pytest.raises(tf.errors.InvalidArgumentError, match=match):
                run(lambda y, x, c, name=name: getattr(functions, name)(y, x, candidates=c))(
                    y, logits, candidates
                )


@on_cpu
def test_candidates_out_of_range_in_training():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, candidates_in_targets=True)

    @tf.function(autograph=False)
    def step(y, logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            value = loss(y, logits)
        return tape.gradient(value, logits)

    with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)`candidates`.*7\b.*row.*1\b"):
        step(tf.constant([[1, 1, 0], [2, 2, 7]]), tf.zeros([2, 5]))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_candidates_out_of_range_under_xla_are_never_a_number(functions, device):
    function = tf.function(
        lambda y, x, c: functions.sparse_softmax_xent(y, x, candidates=c),
        jit_compile=True,
        autograph=False,
    )
    labels, candidates = tf.constant([1, 1, 1]), tf.constant([[1, 2], [1, 7], [1, -2]])
    try:
        loss = function(labels, tf.zeros([3, 5]), candidates)
    except tf.errors.InvalidArgumentError as error:
        assert "`candidates` holds 7" in str(error)
    else:
        on_gpu = device.startswith("GPU")
        assert on_gpu or functions is reference or fusedloss.backend() == "reference"
        np.testing.assert_allclose(loss, [math.log(2), math.nan, math.nan], rtol=1e-6)


@on_cpu
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_labels_out_of_range_are_refused_under_any_subset(functions):
    for subset in ({"mask": np.ones([2, 5], bool)}, {"candidates": [[0, 1], [2, 3]]}):
        with pytest.raises(tf.errors.InvalidArgumentError, match=r"(?s)`labels`.*9.*1.*5"):
            functions.sparse_softmax_xent([1, 9], tf.zeros([2, 5]), **subset)


def test_targets_that_hold_no_candidates():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, candidates_in_targets=True)
    logits = tf.zeros([2, 5])
    with pytest.raises(ValueError, match=r"candidates.*\(2,\)"):
        loss([1, 2], logits)
    with pytest.raises(ValueError, match="candidates"):
        loss(tf.zeros([2, 0], tf.int64), logits)
    with pytest.raises(ValueError, match="candidates"):
        loss(tf.zeros([3, 4], tf.int64), logits)
    with pytest.raises(ValueError, match="must be integers.*Got float32"):
        loss(tf.zeros([2, 4]), logits)


def test_a_layer_refuses_what_does_not_fit():
    layer = layers.MaskedCrossentropy()
    logits, mask = tf.zeros([2, 5]), tf.ones([2, 5], tf.bool)
    with pytest.raises((ValueError, TypeError), match="`mask` must be boolean. Got int32.*cast"):
        layer(logits, tf.constant([1, 2]), tf.ones([2, 5], tf.int32))
    with pytest.raises(ValueError, match=r"`mask` must.*\(2, 4\)"):
        layer(logits, tf.constant([1, 2]), mask[:, :4])
    with pytest.raises(ValueError, match=r"targets.*\(3,\)"):
        layer(logits, tf.constant([1, 2, 3]), mask)


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


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", ["uint8", "bool"])
def test_negative_targets_need_a_type_that_has_them(functions, dtype):
    targets = np.eye(3).astype(dtype)
    with pytest.raises(TypeError, match=f"negative targets, which {dtype} has none of"):
        functions.softmax_xent(targets, np.zeros((3, 3), np.float32), mask_negative_targets=True)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_nan_among_negative_targets_stays(functions):
    logits = np.array([[1, 2, 3]], np.float32)
    losses = functions.softmax_xent([[np.nan, 1, -1]], logits, mask_negative_targets=True)
    assert np.isnan(losses).all()
