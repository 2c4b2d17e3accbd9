"""The forms of softmax cross-entropy: subsets of the rows' own, warped logits, the focal form.

Each against what stands for it in plain TensorFlow, along all paths and through derivatives of any
order. Their accuracy is in test_accuracy.py, what they refuse in test_errors.py, `fit` in
test_keras.py.
"""

import dataclasses
import warnings
from collections.abc import Callable

import keras
import numpy as np
import pytest
import tensorflow as tf

import truth
from fusedloss import losses, nn, reference

pytestmark = pytest.mark.usefixtures("device")

FUNCTIONS = {"fused": nn, "reference": reference}
RUN = {
    "eager": lambda function: function,
    "graph": lambda function: tf.function(function, autograph=False),
    "xla": lambda function: tf.function(function, autograph=False, jit_compile=True),
}

RNG = np.random.default_rng(0)
LOGITS = 2 * RNG.normal(size=(6, 7))
DIRECTION, COTANGENTS = RNG.normal(size=(6, 7)), RNG.normal(size=6)
LEGAL = RNG.random((6, 7)) < 0.6
LEGAL[4] = False
TARGETS = RNG.random((6, 7))
TARGETS /= TARGETS.sum(-1, keepdims=True)
LABELS = LEGAL.argmax(-1)
LABELS[1] = np.argmin(LEGAL[1])  # not legal
NEGATIVE = np.where(LEGAL, TARGETS, -1)
# A class that is listed twice, a row of pads; CHOSEN has a label that is not listed.
CANDIDATES = np.array(
    [[2, 0, -1, 5], [6, 6, 1, -1], [-1, -1, -1, -1], [0, 1, 2, 3], [-1, 4, -1, -1], [3, 2, 5, 6]]
)
CHOSEN = np.array([5, 6, 0, 6, 4, 2])
OF_CANDIDATES = RNG.random((6, 4))
WEIGHTS = RNG.uniform(0.5, 2, 7)


def masked(y, z, legal):
    """The cross-entropy over legal classes; 0 in rows without any."""
    y = tf.where(legal, y, tf.zeros_like(y))
    return -tf.reduce_sum(y * tf.nn.log_softmax(tf.where(legal, z, -1e30)), axis=-1)


def of_candidates(y, z):
    listed = tf.gather(z, np.maximum(CANDIDATES, 0), axis=-1, batch_dims=1)
    return masked(y, listed, CANDIDATES >= 0)


def of_first_hits(y, z):
    hits = (y[:, None] == CANDIDATES) & (CANDIDATES >= 0)
    first = hits & (tf.cumsum(tf.cast(hits, tf.int32), axis=-1) == 1)
    return of_candidates(tf.cast(first, z.dtype), z)


def of_labels(loss):
    return lambda y, z: loss(tf.one_hot(y, z.shape[-1], dtype=z.dtype), z)


def negative(y, z):
    return masked(tf.nn.relu(y), z, y >= 0)


def warped(y, z):
    z = 3 * tf.tanh(z / 3) / 0.7
    return masked(y, z, True) + 0.3 * tf.reduce_logsumexp(z, axis=-1) ** 2


def focal(y, z):
    return keras.losses.categorical_focal_crossentropy(y, z, alpha=0.25, gamma=2, from_logits=True)


def mixed(y, z):
    """0.8 of the legal classes and 0.2 of all, smoothed, weighted and warped."""
    z, parts = 3 * tf.tanh(z / 3) / 0.7, []
    inside = tf.cast(LEGAL.any(-1), z.dtype)
    for legal, rows in ((LEGAL, inside), (np.ones_like(LEGAL), 1)):
        shares = WEIGHTS * (0.9 * y + 0.1 / np.maximum(1, legal.sum(-1, keepdims=True)))
        squared = tf.reduce_logsumexp(tf.where(legal, z, -1e30), axis=-1) ** 2
        parts.append(rows * (masked(shares, z, legal) + 0.3 * squared))
    return 0.8 * parts[0] + 0.2 * parts[1]


WARPED = {"temperature": 0.7, "softcap": 3.0, "z_loss": 0.3}
MIXED = {"subset_weight": 0.8, "full_weight": 0.2, "label_smoothing": 0.1, "class_weight": WEIGHTS}


@dataclasses.dataclass
class Form:
    targets: np.ndarray
    arguments: dict  # of our function
    stock: Callable  # of targets and logits
    loss: Callable | None = None  # the Keras class that takes it in training; its arguments
    in_class: dict = dataclasses.field(default_factory=dict)

    def ours(self, module, y, z):
        name = "sparse_softmax_xent" if self.targets.dtype.kind == "i" else "softmax_xent"
        return getattr(module, name)(y, z, **self.arguments)

    def reduced(self, y, z):
        """Our loss on the training path: the mean."""
        if "candidates_in_targets" in self.in_class:
            y = tf.concat([y[:, None], CANDIDATES], axis=1)
        return self.loss(from_logits=True, dtype=z.dtype.name, **self.in_class)(y, z)


DENSE, SPARSE = losses.CategoricalCrossentropy, losses.SparseCategoricalCrossentropy
FORMS = {
    "mask": Form(TARGETS, {"mask": LEGAL}, lambda y, z: masked(y, z, LEGAL)),
    "mask of all rows": Form(TARGETS, {"mask": LEGAL[0]}, lambda y, z: masked(y, z, LEGAL[0])),
    "labels and mask": Form(
        LABELS, {"mask": LEGAL}, of_labels(lambda y, z: masked(y, z, LEGAL))
    ),
    "candidates": Form(OF_CANDIDATES, {"candidates": CANDIDATES}, of_candidates),
    "labels and candidates": Form(
        CHOSEN, {"candidates": CANDIDATES}, of_first_hits, SPARSE, {"candidates_in_targets": True}
    ),
    "negative targets": Form(
        NEGATIVE, {"mask_negative_targets": True}, negative, DENSE, {"mask_negative_targets": True}
    ),
    "warped": Form(TARGETS, WARPED, warped, DENSE, WARPED),
    "labels, warped": Form(LABELS, WARPED, of_labels(warped), SPARSE, WARPED),
    "focal": Form(
        TARGETS, {"gamma": 2, "alpha": 0.25}, focal, losses.CategoricalFocalCrossentropy
    ),
    "labels, focal": Form(
        LABELS,
        {"gamma": 2, "alpha": 0.25},
        of_labels(focal),
        SPARSE,
        {"gamma": 2, "alpha": 0.25},
    ),
    "mixed": Form(TARGETS, {"mask": LEGAL, **WARPED, **MIXED}, mixed),
    "mixed by negative targets": Form(
        NEGATIVE,
        {"mask_negative_targets": True, **WARPED, **MIXED},
        lambda y, z: mixed(tf.nn.relu(y), z),
        DENSE,
        {"mask_negative_targets": True, **WARPED, **MIXED},
    ),
}  # fmt: skip
TRAINED = {name: form for name, form in FORMS.items() if form.loss is not None}
PATHS = [
    (name, path)
    for path in ("general", "training")
    for name in FORMS
    if path == "general" or name in TRAINED
]
# What takes long is tried on some.
FEW = [
    ("candidates", "general"),
    ("focal", "general"),
    ("mixed", "general"),
    ("mixed by negative targets", "training"),
]


def along(path, form):
    """Our loss of targets and logits, and what stands for it: sums of rows, or a mean."""
    if path == "training":
        return form.reduced, lambda y, z: tf.reduce_mean(form.stock(y, z))

    def summed(loss):
        return lambda y, z: tf.reduce_sum(tf.cast(COTANGENTS, z.dtype) * loss(y, z))

    return summed(lambda y, z: form.ours(nn, y, z)), summed(form.stock)


def tensors(form, dtype=tf.float64):
    y = tf.constant(form.targets)
    return (tf.cast(y, dtype) if y.dtype.is_floating else y), tf.constant(LOGITS, dtype)


def assert_same(ours, theirs, rtol=1e-9, atol=1e-11):
    for our, their in zip(tf.nest.flatten(ours), tf.nest.flatten(theirs), strict=True):
        assert our.dtype == their.dtype
        np.testing.assert_allclose(our, their, rtol=rtol, atol=atol)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_is_what_it_stands_for_however_it_runs(form, functions):
    """With the gradient of dense targets, where that of a target outside the subset is 0."""
    y, z = tensors(form)
    watched = [x for x in (y, z) if x.dtype.is_floating]

    def step(loss, y, z):
        with tf.GradientTape() as tape:
            tape.watch([x for x in (y, z) if x.dtype.is_floating])
            value = loss(y, z)
        return value, tape.gradient(value, [y, z][-len(watched) :], tf.constant(COTANGENTS))

    expected = step(form.stock, y, z)
    for run in RUN.values():
        found = run(lambda y, z: step(lambda y, z: form.ours(functions, y, z), y, z))(y, z)
        assert_same(found, expected)


@pytest.mark.parametrize("form", TRAINED.values(), ids=TRAINED)
def test_each_form_is_what_it_stands_for_in_training(form):
    y, z = tensors(form)

    def step(loss, y, z):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss(y, z)
        return value, tape.gradient(value, z)

    expected = step(along("training", form)[1], y, z)
    for run in RUN.values():
        assert_same(run(lambda y, z: step(form.reduced, y, z))(y, z), expected)


@pytest.mark.parametrize("name,path", PATHS)
def test_second_derivatives(name, path):
    form = FORMS[name]
    y, z = tensors(form)
    direction, cotangent = tf.constant(DIRECTION), tf.constant(0.7, tf.float64)

    def second(loss, y, z):
        with tf.GradientTape() as outer:
            outer.watch([z, cotangent])
            with tf.GradientTape() as inner:
                inner.watch(z)
                value = loss(y, z)
            gradient = inner.gradient(value, z, cotangent)
        return gradient, outer.gradient(gradient, [z, cotangent], direction)

    ours, stock = along(path, form)
    expected = second(stock, y, z)
    for run in RUN.values() if (name, path) in FEW else [RUN["eager"]]:
        assert_same(run(lambda y, z: second(ours, y, z))(y, z), expected)


@pytest.mark.parametrize("name,path", FEW)
def test_third_derivatives(name, path):
    y, z = tensors(FORMS[name])

    def third(loss, y, z):
        tapes = [tf.GradientTape() for _ in range(3)]
        with tapes[0]:
            tapes[0].watch(z)
            with tapes[1]:
                tapes[1].watch(z)
                with tapes[2]:
                    tapes[2].watch(z)
                    value = loss(y, z)
                value = tf.reduce_sum(tapes[2].gradient(value, z) ** 3)
            value = tf.reduce_sum(tf.sin(tapes[1].gradient(value, z)))
        return tapes[0].gradient(value, z)

    ours, stock = along(path, FORMS[name])
    assert_same(third(ours, y, z), third(stock, y, z))


@pytest.mark.parametrize("name,path", FEW)
def test_jacobian_and_forward_mode(name, path):
    y, z = tensors(FORMS[name])

    def derivatives(loss):
        with tf.GradientTape(persistent=True) as outer:
            outer.watch(z)
            with tf.GradientTape() as inner:
                inner.watch(z)
                value = loss(y, z)
            gradient = inner.gradient(value, z)
        with tf.autodiff.ForwardAccumulator(z, tf.constant(DIRECTION)) as forward:
            value = loss(y, z)
        return outer.jacobian(gradient, z), forward.jvp(value)

    ours, stock = along(path, FORMS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(derivatives(ours), derivatives(stock))


@pytest.mark.parametrize("name", ["mask", "candidates", "labels and candidates"])
def test_vectorized_map_over_logits_and_subsets_needs_no_loop(name, caplog):
    form = FORMS[name]
    y, z = tensors(form)
    ((argument, subset),) = form.arguments.items()

    def gradient(z, subset, y=y):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = Form(form.targets, {argument: subset}, form.stock).ours(nn, y, z)
        return tape.gradient(value, z)

    logits, subsets = tf.stack([z, -z, z[::-1]]), tf.stack([subset, subset[::-1], subset])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [
            tf.vectorized_map(lambda pair: gradient(*pair), (logits, subsets)),
            tf.vectorized_map(lambda z: gradient(z, tf.constant(subset)), logits),
            tf.vectorized_map(lambda subset: gradient(z, subset), subsets),
        ]
    assert "while_loop" not in caplog.text
    expected = [
        [gradient(*pair) for pair in zip(logits, subsets, strict=True)],
        [gradient(z, subset) for z in logits],
        [gradient(z, subset) for subset in subsets],
    ]
    assert_same(found, [tf.stack(each) for each in expected])


# What a subset of the rows' own is the same as.


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("classes", [7, 300])
@pytest.mark.parametrize("from_logits", [True, False])
def test_the_same_classes_for_all_rows_are_a_subset(functions, classes, from_logits):
    rng = np.random.default_rng(1)
    rows, ids = 9, np.sort(rng.choice(classes, classes // 3, replace=False))
    predictions = rng.normal(size=(rows, classes))
    if not from_logits:
        predictions = np.exp(predictions) / np.exp(predictions).sum(-1, keepdims=True)
    predictions = tf.constant(predictions)
    labels, dense = rng.integers(0, classes, rows), rng.random((rows, classes))
    chosen = np.isin(np.arange(classes), ids)
    shared = {"from_logits": from_logits, "label_smoothing": 0.1, "full_weight": 0.3}
    of_rows = {
        "mask of all rows": {"mask": chosen},
        "mask": {"mask": np.tile(chosen, (rows, 1))},
        "candidates": {"candidates": np.tile(rng.permutation(ids), (rows, 1))},
    }
    for normalize in ("subset", "full"):
        for name, y in (("sparse_softmax_xent", labels), ("softmax_xent", dense)):
            results = {}
            for form, subset in {"subset": {"subset": ids}, **of_rows}.items():
                given = y
                if form == "candidates" and y is dense:
                    given = np.take_along_axis(dense, subset["candidates"], -1)
                    others = np.zeros_like(dense)
                    np.put_along_axis(others, subset["candidates"], given, -1)
                with tf.GradientTape() as tape:
                    tape.watch(predictions)
                    loss = getattr(functions, name)(
                        given, predictions, normalize=normalize, **shared, **subset
                    )
                results[form] = loss, tape.gradient(loss, predictions)
            if y is dense:  # Targets outside of the candidates are not given.
                with tf.GradientTape() as tape:
                    tape.watch(predictions)
                    loss = functions.softmax_xent(
                        others, predictions, subset=ids, normalize=normalize, **shared
                    )
                assert_same(results.pop("candidates"), (loss, tape.gradient(loss, predictions)))
            expected = results.pop("subset")
            for found in results.values():
                assert_same(found, expected)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_all_classes_as_a_mask_are_no_subset(functions):
    z = tf.constant(LOGITS)
    plain = functions.softmax_xent(TARGETS, z)
    everything = np.tile(np.arange(7), (6, 1))
    for arguments in ({"mask": np.ones((6, 7), bool)}, {"candidates": everything}):
        assert_same(functions.softmax_xent(TARGETS, z, **arguments), plain)
    assert_same(functions.softmax_xent(TARGETS, z, mask_negative_targets=True), plain)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("axis", [0, 1, -2])
def test_the_class_axis_can_be_any(functions, axis):
    rng = np.random.default_rng(2)
    z, y, mask = rng.normal(size=(3, 4, 5)), rng.random((3, 4, 5)), rng.random((3, 4, 5)) < 0.6
    candidates = rng.integers(-1, 5, (3, 4, 6))
    moved = tf.constant(np.moveaxis(z, -1, axis))
    # K stays the last axis of candidates and of their targets.
    of_candidates = rng.random((3, 4, 6))
    for targets, logits_mask in ((y, mask), (y, mask[1, 2])):
        found = functions.softmax_xent(
            np.moveaxis(targets, -1, axis),
            moved,
            mask=np.moveaxis(logits_mask, -1, axis) if logits_mask.ndim > 1 else logits_mask,
            axis=axis,
        )
        assert_same(found, functions.softmax_xent(targets, z, mask=logits_mask))
    found = functions.softmax_xent(of_candidates, moved, candidates=candidates, axis=axis)
    assert_same(found, functions.softmax_xent(of_candidates, z, candidates=candidates))
    labels = rng.integers(0, 5, (3, 4))
    found = functions.sparse_softmax_xent(labels, moved, candidates=candidates, axis=axis)
    assert_same(found, functions.sparse_softmax_xent(labels, z, candidates=candidates))


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_subsets_may_be_tensors_of_unknown_size(functions, dtype):
    @tf.function(
        autograph=False,
        input_signature=[
            tf.TensorSpec([None], tf.int64),
            tf.TensorSpec([None, None], tf.float64),
            tf.TensorSpec([None, None], tf.bool),
            tf.TensorSpec([None, None], dtype),
        ],
    )
    def both(labels, logits, mask, candidates):
        return [
            functions.sparse_softmax_xent(labels, logits, mask=mask),
            functions.sparse_softmax_xent(labels, logits, candidates=candidates),
        ]

    for rows in (slice(None), slice(2), slice(0)):
        found = both(LABELS[rows], LOGITS[rows], LEGAL[rows], tf.cast(CANDIDATES[rows], dtype))
        subsets = {"mask": LEGAL[rows]}, {"candidates": CANDIDATES[rows]}
        for loss, subset in zip(found, subsets, strict=True):
            expected, _ = truth.softmax_xent(LOGITS[rows], LABELS[rows], **subset)
            np.testing.assert_allclose(loss, expected.astype(float), rtol=1e-12)


# At the edges.


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("classes", [7, 300])
@pytest.mark.parametrize("warp", [{}, WARPED, {"gamma": 2.0}], ids=["plain", "warped", "focal"])
def test_rows_without_a_target_in_their_subset_have_loss_0(functions, classes, warp):
    """Smoothing and z-loss included; what a mixture has of all classes stays."""
    rng = np.random.default_rng(3)
    z = tf.constant(rng.normal(size=(4, classes)))
    labels, dense = np.array([1, 2, 3, 4]), np.eye(classes)[[1, 2, 3, 4]]
    none, others = np.zeros([4, classes], bool), np.ones([4, classes], bool)
    others[np.arange(4), labels] = False
    pads, elsewhere = np.full([4, 3], -1), np.tile([0, 5, 0], (4, 1))
    cases = [
        (name, y, {"mask": mask})
        for name, y in (("sparse_softmax_xent", labels), ("softmax_xent", dense))
        for mask in (none, others, none[0])
    ]
    cases += [("sparse_softmax_xent", labels, {"candidates": c}) for c in (pads, elsewhere)]
    cases += [
        ("softmax_xent", np.full([4, 3], 0.5), {"candidates": pads}),
        ("softmax_xent", np.zeros([4, 3]), {"candidates": elsewhere}),
        ("softmax_xent", np.full([4, classes], -1.0), {"mask_negative_targets": True}),
        ("softmax_xent", dense - 1, {"mask_negative_targets": True, "mask": others}),
    ]
    for name, y, subset in cases:
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = getattr(functions, name)(y, z, label_smoothing=0.1, **subset, **warp)
        np.testing.assert_array_equal(loss, np.zeros(4))
        np.testing.assert_array_equal(tape.gradient(loss, z), np.zeros([4, classes]))
    mixed = functions.sparse_softmax_xent(labels, z, mask=none, full_weight=0.3, **warp)
    assert_same(mixed, 0.3 * functions.sparse_softmax_xent(labels, z, **warp))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_no_candidates_no_classes_and_no_rows_have_loss_0(functions):
    def of(name, y, z, **arguments):
        z = tf.constant(z)
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = getattr(functions, name)(y, z, **arguments)
        gradient = tape.gradient(loss, z)
        assert gradient.shape == z.shape
        np.testing.assert_array_equal(gradient, np.zeros(z.shape))
        np.testing.assert_array_equal(loss, np.zeros(z.shape[:-1]))

    no_candidates, no_classes = np.zeros([3, 0], np.int32), np.zeros([3, 0])
    labels, none = np.array([0, 1, 2]), np.zeros([3, 0], bool)
    of("sparse_softmax_xent", labels, np.ones([3, 5]), candidates=no_candidates)
    of("softmax_xent", no_classes, np.ones([3, 5]), candidates=no_candidates)
    for warp in ({}, WARPED, {"gamma": 2.0}):
        of("softmax_xent", no_classes, no_classes, mask=none, **warp)
        of("sparse_softmax_xent", labels, no_classes, mask=none, **warp)
        of("softmax_xent", no_classes, no_classes, mask_negative_targets=True, **warp)
        of("softmax_xent", no_classes, no_classes, **warp)
        of("sparse_softmax_xent", labels, no_classes, candidates=np.full([3, 2], -1), **warp)
        of("softmax_xent", np.ones([0, 5]), np.ones([0, 5]), mask=np.ones([0, 5], bool), **warp)
        of("sparse_softmax_xent", labels[:0], np.ones([0, 5]), candidates=np.ones([0, 2], int))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_class_that_is_listed_twice_counts_twice_and_a_label_means_the_first(functions):
    z = tf.constant([[0.0, 1.0, 2.0]], tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(z)
        loss = functions.sparse_softmax_xent([1], z, candidates=[[1, 2, 1]])
    total = 2 * np.exp(1) + np.exp(2)
    np.testing.assert_allclose(loss, [np.log(total) - 1])
    share = [0, 2 * np.exp(1) / total - 1, np.exp(2) / total]
    np.testing.assert_allclose(tape.gradient(loss, z), [share], atol=1e-15)
    # Smoothing gives each place its share: 0.9 + 0.1 and 0.1 of three.
    smoothed = functions.sparse_softmax_xent([1], z, candidates=[[1, 2, 1]], label_smoothing=0.3)
    expected = np.log(total) - (0.7 + 0.1) * 1 - 0.1 * 2 - 0.1 * 1
    np.testing.assert_allclose(smoothed, [expected])
    summed = functions.softmax_xent(
        [[0.25, 0.5, 0.25]], z, candidates=[[1, 2, 1]], subset_weight=0, full_weight=1
    )
    assert_same(summed, functions.softmax_xent([[0, 0.5, 0.5]], z))


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("classes", [7, 33, 300, 2500])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_in_the_subset_is_not_looked_at(functions, classes, bad):
    """And what is in it propagates, within its row."""
    rng = np.random.default_rng(4)
    mask = rng.random((40, classes)) < 0.5
    mask[:, :2] = True, False
    logits = np.where(mask, rng.normal(size=(40, classes)), bad).astype(np.float32)
    logits[7, 0] = bad
    labels, dense = np.zeros(40, int), np.where(mask, 1.0, 0).astype(np.float32)
    candidates = np.tile([0, -1, 0], (40, 1))
    cases = [
        ("sparse_softmax_xent", labels, {"mask": mask}),
        ("softmax_xent", dense, {"mask": mask}),
        ("softmax_xent", np.where(mask, dense, -1), {"mask_negative_targets": True}),
        ("sparse_softmax_xent", labels, {"candidates": candidates}),
    ]
    for name, y, subset in cases:
        z = tf.constant(logits)
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = getattr(functions, name)(y, z, **subset)
        gradient = tape.gradient(loss, z).numpy()
        assert np.flatnonzero(~np.isfinite(loss)).tolist() == [7], name
        assert np.flatnonzero(~np.isfinite(gradient).all(-1)).tolist() == [7], name
        outside = ~mask if "candidates" not in subset else np.arange(classes) > 0
        np.testing.assert_array_equal(np.where(outside, gradient, 0)[np.arange(40) != 7], 0)


# Masks over rows that are long enough to be written while the next one is read.
LONG_MASKS = {
    "the first": lambda at, classes: at == 0,
    "the last": lambda at, classes: at == classes - 1,
    "a run": lambda at, classes: (at >= 700) & (at < 1111),
    "all but a run": lambda at, classes: (at < 700) | (at >= 1111),
    "every third": lambda at, classes: at % 3 == 0,
    "few": lambda at, classes: at % 97 == 5,
    "all": lambda at, classes: at >= 0,
    "none": lambda at, classes: at < 0,
}


@pytest.mark.parametrize("legal", LONG_MASKS.values(), ids=LONG_MASKS)
@pytest.mark.parametrize("shape", [(5, 2048), (4, 2571), (150, 3001)])
def test_long_rows_under_any_mask(shape, legal):
    rng = np.random.default_rng(5)
    logits = (4 * rng.normal(size=shape)).astype(np.float32)
    mask = np.tile(legal(np.arange(shape[1]), shape[1]), (shape[0], 1))
    logits = np.where(mask, logits, 1e4).astype(np.float32)
    mask[1] = rng.random(shape[1]) < 0.5
    labels = np.where(mask.any(-1), mask.argmax(-1), 3)
    dense = np.where(mask, 0, -1).astype(np.float32)
    np.put_along_axis(dense, labels[:, None], np.where(mask.any(-1), 1, -1)[:, None], -1)
    weights = rng.normal(size=shape[0]).astype(np.float32)
    exact_loss, exact_gradient = truth.softmax_xent(logits, labels, mask=mask)
    exact_gradient = (exact_gradient * weights[:, None]).astype(np.float64)
    fused = DENSE(True, mask_negative_targets=True, reduction="sum")
    total = (exact_loss * weights).astype(np.float64)
    z = tf.constant(logits)
    for loss in (
        lambda: tf.reduce_sum(nn.sparse_softmax_xent(labels, z, mask=mask) * weights),
        lambda: fused(dense, z, sample_weight=weights),
    ):
        with tf.GradientTape() as tape:
            tape.watch(z)
            value = loss()
        np.testing.assert_allclose(
            value, total.sum(), rtol=1e-5, atol=1.2e-7 * np.abs(total).sum() + 1e-7
        )
        np.testing.assert_allclose(tape.gradient(value, z), exact_gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("classes", [7, 40, 2500])
def test_a_softcap_holds_any_logit(classes):
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(20, classes)).astype(np.float32)
    logits[:, ::3] *= 1e5
    logits[:, 1] = np.float32(3e38)
    labels = rng.integers(0, classes, 20)
    labels[:2] = 1
    z = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(z)
        loss = nn.sparse_softmax_xent(labels, z, softcap=30.0)
    exact_loss, exact_gradient = truth.softmax_xent(logits, labels, softcap=30.0)
    np.testing.assert_allclose(loss, exact_loss.astype(float), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tape.gradient(loss, z), exact_gradient.astype(float), atol=2e-6)


@pytest.mark.parametrize("warp", [WARPED, {"gamma": 2.0}, {"gamma": 0.5}], ids=str)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_of_a_warped_row_stay_in_it(sparse, classes, bad, warp):
    """A softcap makes a number of infinity, and what TensorFlow makes of that is ours as well."""
    rng = np.random.default_rng(7)
    logits = rng.normal(size=(40, classes)).astype(np.float32)
    logits[7, 3] = bad
    labels = rng.integers(0, classes, 40)
    y = labels if sparse else np.eye(classes, dtype=np.float32)[labels]
    results = []
    for functions in FUNCTIONS.values():
        z = tf.constant(logits)
        name = "sparse_softmax_xent" if sparse else "softmax_xent"
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = getattr(functions, name)(y, z, **warp)
        results.append((loss, tape.gradient(loss, z)))
    (loss, gradient), (expected, expected_gradient) = results
    np.testing.assert_array_equal(np.isfinite(loss), np.isfinite(expected))
    assert np.isfinite(np.delete(loss, 7)).all()
    finite = np.isfinite(gradient).all(-1)
    np.testing.assert_array_equal(finite, np.isfinite(expected_gradient).all(-1))
    assert np.delete(finite, 7).all()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("functions", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_half_precision_is_summed_in_float32(functions, dtype):
    z = tf.cast(LOGITS, dtype)
    for arguments in ({"mask": LEGAL}, {"candidates": CANDIDATES}, WARPED, {"gamma": 2.0}):
        with tf.GradientTape() as tape:
            tape.watch(z)
            loss = functions.sparse_softmax_xent(LABELS, z, **arguments)
        assert loss.dtype == ("float64" if dtype == "float64" else "float32")
        assert tape.gradient(loss, z).dtype == dtype
        focal = {"gamma": arguments.get("gamma")}
        exact, _ = truth.softmax_xent(z.numpy(), LABELS, **{**arguments, **focal})
        np.testing.assert_allclose(loss, exact.astype(float), rtol=1e-5, atol=1e-6)
