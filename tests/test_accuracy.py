"""Every form of every op is as accurate as TensorFlow on the same inputs, give or take an ulp.

The bound of csrc/kernels/README.md: with f64 the truth (in long double) and TF the plain TensorFlow
form in the same dtype, max|ours − f64| ≤ 2·max|TF − f64| + 4·ε·max|f64|, for loss and gradient.
"""

import itertools
import os
import random
import zlib

import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import fusedloss
import truth
from fusedloss.losses import (
    CategoricalCrossentropy,
    CategoricalFocalCrossentropy,
    SparseCategoricalCrossentropy,
)

pytestmark = pytest.mark.usefixtures("device")

IS_REFERENCE = fusedloss.backend() == "reference"
RUN = {
    "eager": lambda fn: fn,
    "graph": tf.function,
    "xla": lambda fn: tf.function(fn, jit_compile=True),
}
# Few classes go across the lanes, up to 32; above, vectors of 4 to 16 lanes with and without a
# rest; 4096 is where exp is no longer kept; one row is long enough for several runs of sums.
SHAPES = [
    (1, 1), (3, 2), (40, 3), (37, 10), (16, 32), (5, 33), (4, 64), (7, 101), (6, 1858), (1, 4096),
    (2, 4099), (2, 40001), (2, 3, 5), (19,), (0, 7), (500, 3),
]  # fmt: skip
ROW_MASKS, CANDIDATES = {"few a row": 0.02, "many a row": 0.6}, {"candidates": 5, "long list": 80}
FACTORS = {
    "shape": SHAPES,
    "dtype": ["float32", "float64", "float16", "bfloat16"],
    "targets": ["int32", "int64", "one-hot", "soft"],
    "from_logits": [True, False],
    "subset": [None, "few", "many", "mask", *ROW_MASKS, *CANDIDATES],
    "mask_negative_targets": [False, True],
    "normalize": ["subset", "full"],
    "weights": [(1.0, 0.0), (0.8, 0.2)],
    "label_smoothing": [0.0, 0.1],
    "class_weight": [False, True],
    "temperature": [1.0, 0.6],
    "z_loss": [0.0, 0.01],
    "softcap": [None, 4.0],
    "gamma": [None, 0.5, 2.0],
    "ignore_class": [None, -1],
    "path": ["general", "training"],
    "run": list(RUN),
}
PLAIN = {name: factor[0] for name, factor in FACTORS.items()}
WARPS = {"temperature", "z_loss", "softcap"}
# Factors that are arguments as they stand.
KEYWORDS = (
    "mask_negative_targets", "label_smoothing", "temperature", "z_loss", "softcap", "ignore_class",
)  # fmt: skip


def _is_possible(values):
    case = {**PLAIN, **dict(zip(FACTORS, values, strict=False))}
    sparse = case["targets"].startswith("int")
    subset, training = case["subset"], case["path"] == "training"
    is_warped = any(case[name] != PLAIN[name] for name in WARPS)
    has_subset = subset is not None or case["mask_negative_targets"]
    if not has_subset and (case["normalize"], case["weights"]) != ("subset", (1.0, 0.0)):
        return False
    if case["ignore_class"] is not None if not sparse else case["mask_negative_targets"]:
        return False
    if is_warped and not case["from_logits"]:
        return False
    # What no class takes.
    if training and subset in ROW_MASKS and case["weights"] != (1.0, 0.0):
        return False
    if training and subset in CANDIDATES and not sparse:
        return False
    # A mask over two classes must be booleans, and is; two ids over two classes are refused.
    return not (subset == "many" and case["shape"][-1] <= 2)


def _product(count):
    """So many rows of the product of all factors, which is too large to be written down."""
    draw = random.Random(0)
    while count:
        values = tuple(draw.choice(factor) for factor in FACTORS.values())
        if _is_possible(values):
            count -= 1
            yield values


def _with_new_pairs(rows):
    """Those in which two factors have values that they have in no row before."""
    seen = set()
    for values in rows:
        pairs = set(itertools.combinations(enumerate(values), 2))
        if not pairs <= seen:
            seen |= pairs
            yield values


PRODUCT = list(_product(5000))
# Filtered, AllPairs ends before it has all of them.
PAIRS = map(tuple, AllPairs(list(FACTORS.values()), filter_func=_is_possible))
DRAWN = list(dict.fromkeys([*_with_new_pairs([*PAIRS, *PRODUCT]), *PRODUCT[:100]]))


def sample(case, rng):
    """Predictions, targets, keyword arguments and cotangents of one case."""
    shape, rows = case["shape"], case["shape"][:-1]
    classes = shape[-1]
    dtype = tf.as_dtype(case["dtype"]).as_numpy_dtype
    predictions = rng.normal(size=shape) * 3
    if not case["from_logits"]:
        # Away from the bounds at which the gradient jumps, and not quite of sum 1.
        predictions = np.exp(np.clip(predictions, -4, 4) / 3)
        predictions /= predictions.sum(-1, keepdims=True) * rng.uniform(1.01, 1.1, (*rows, 1))
        predictions = np.clip(predictions, 4e-5, 0.99)
    predictions = predictions.astype(dtype)
    sums = np.float64 if case["dtype"] == "float64" else np.float32
    labels = rng.integers(0, classes, rows)
    arguments = {name: case[name] for name in KEYWORDS if case[name] != PLAIN[name]}
    arguments["from_logits"] = case["from_logits"]
    if case["gamma"] is not None:
        weights = rng.uniform(0.5, 2, classes).astype(np.float32)
        arguments.update(gamma=case["gamma"], alpha=[1.0, 0.25, weights][rng.integers(3)])
    if case["class_weight"]:
        arguments["class_weight"] = rng.uniform(0.5, 2, classes).astype(np.float32)
    subset, places = case["subset"], classes
    if subset in ROW_MASKS:
        mask = rng.random(shape) < ROW_MASKS[subset]
        mask |= (np.arange(classes) == labels[..., None]) & (rng.random((*rows, 1)) < 0.8)
        arguments["mask"] = mask & _mostly(rng, rows)
    elif subset in CANDIDATES:
        places = CANDIDATES[subset]
        candidates = rng.integers(-1, classes, (*rows, places))
        labels = np.where(rng.random(rows) < 0.6, candidates[..., -1].clip(0), labels)
        candidates = np.where(_mostly(rng, rows), candidates, -1)
        arguments["candidates"] = candidates.astype(rng.choice([np.int32, np.int64]))
    elif subset is not None:
        size = {"few": classes // 9, "many": classes // 2, "mask": classes // 3}[subset]
        ids = rng.choice(classes, max(1, size), replace=False)
        arguments["subset"] = np.isin(np.arange(classes), ids) if subset == "mask" else ids
    if subset is not None or case["mask_negative_targets"]:
        arguments["normalize"] = case["normalize"]
        arguments["subset_weight"], arguments["full_weight"] = case["weights"]
    if case["targets"] == "soft":
        targets = rng.random((*rows, places)).astype(sums)
        targets /= np.maximum(targets.sum(-1, keepdims=True), 1e-3)
    elif case["targets"] == "one-hot":
        targets = np.zeros((*rows, places), sums)
        np.put_along_axis(targets, labels[..., None] % places, 1, -1)
    else:
        targets = labels.astype(case["targets"])
        if case["ignore_class"] is not None:
            targets = np.where(rng.random(rows) < 0.3, case["ignore_class"], targets)
        targets = targets.astype(case["targets"])
    if case["mask_negative_targets"]:
        illegal = (rng.random(targets.shape) < 0.5) & (targets < 0.5) | ~_mostly(rng, rows)
        targets = np.where(illegal, rng.choice([-1, -0.25], targets.shape), targets).astype(sums)
    return predictions, targets, arguments, rng.normal(size=rows).astype(sums)


def _mostly(rng, rows):
    """`[*rows, 1]`, false in some rows where there are several."""
    return (rng.random((*rows, 1)) < 0.9) | (np.prod(rows) < 3)


def check_error(ours, tensorflow, exact, terms, epsilon, what):
    ours, tensorflow = np.asarray(ours, np.longdouble), np.asarray(tensorflow, np.longdouble)
    assert ours.shape == exact.shape, what
    if exact.size == 0:
        return
    allowed = 2 * np.abs(tensorflow - exact).max() + 4 * epsilon * np.abs(exact).max()
    # What is 0 in exact arithmetic, such as the loss over one class, is a difference of terms.
    allowed = max(allowed, epsilon * terms)
    error = np.abs(ours - exact).max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def check_rounding(tensorflow, exact, terms, epsilon, what):
    """TensorFlow's error is the measure of ours only where it is one of rounding."""
    if exact.size:
        error = np.abs(np.asarray(tensorflow, np.longdouble) - exact).max()
        assert error <= 2**10 * epsilon * max(np.abs(exact).max(), terms), f"TensorFlow's {what}"


def reduced(sparse, dtype, *, mask=None, candidates=None, **arguments):
    """Our loss on the training path: the sum of the rows' times their weights."""
    kind = SparseCategoricalCrossentropy if sparse else CategoricalCrossentropy
    if not sparse and "gamma" in arguments and not WARPS.intersection(arguments):
        kind = CategoricalFocalCrossentropy
    if candidates is not None:
        arguments["candidates_in_targets"] = True
    if mask is not None:
        del arguments["subset_weight"], arguments["full_weight"]
    loss = kind(reduction="sum", dtype=dtype, **arguments)
    if mask is not None:
        loss = loss.masked(tf.constant(mask))

    def total(targets, predictions, weights):
        if candidates is not None:
            listed = tf.cast(candidates, targets.dtype)
            targets = tf.concat([targets[..., None], listed], axis=-1)
        return loss(targets, predictions, weights)

    return total


def check_case(values, device):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    predictions, targets, arguments, cotangents = sample(case, rng)
    sparse = case["targets"].startswith("int")
    exact_loss, exact_gradient, loss_terms, gradient_terms = truth.with_terms(
        predictions, targets, **arguments
    )
    exact_gradient = exact_gradient * cotangents.astype(np.longdouble)[..., None]
    gradient_terms *= np.abs(cotangents).max(initial=0)
    name = "sparse_softmax_xent" if sparse else "softmax_xent"

    def rows_of(module):
        def step(targets, predictions, cotangents):
            with tf.GradientTape() as tape:
                tape.watch(predictions)
                loss = getattr(module, name)(targets, predictions, **arguments)
                total = tf.reduce_sum(loss * cotangents)
            return loss, tape.gradient(total, predictions)

        return step

    inputs = tf.constant(targets), tf.constant(predictions), tf.constant(cotangents)
    run, stock = RUN[case["run"]], rows_of(fusedloss.reference)
    # Without the library it is the reference that is tested, however it runs.
    tf_loss, tf_gradient = (run(stock) if IS_REFERENCE else stock)(*inputs)
    sums_epsilon = np.finfo(cotangents.dtype).eps
    epsilon = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(case["dtype"], sums_epsilon)
    check_rounding(tf_loss, exact_loss, loss_terms, sums_epsilon, "loss")
    if case["path"] == "general" or not case["shape"][:-1]:
        loss, gradient = run(rows_of(fusedloss.nn))(*inputs)
        check_error(loss, tf_loss, exact_loss, loss_terms, sums_epsilon, "loss")
    else:
        fused = reduced(sparse, cotangents.dtype.name, **arguments)

        def step(targets, predictions, cotangents):
            with tf.GradientTape() as tape:
                tape.watch(predictions)
                loss = fused(targets, predictions, cotangents)
            return loss, tape.gradient(loss, predictions)

        loss, gradient = run(step)(*inputs)
        scale = np.abs(exact_loss * cotangents).sum()
        error = abs(np.longdouble(loss.numpy()) - (exact_loss * cotangents).sum())
        tf_error = np.abs((tf_loss.numpy() - exact_loss) * cotangents).sum()
        terms = np.abs(cotangents).sum() * loss_terms
        allowed = 2 * tf_error + sums_epsilon * max(4 * scale, terms)
        assert error <= allowed, f"reduced loss: error {error:.3g}, allowed {allowed:.3g}"
    assert gradient.dtype == predictions.dtype
    assert loss.device.endswith(device) and gradient.device.endswith(device)
    gradient, tf_gradient = tf.cast(gradient, tf.float64), tf.cast(tf_gradient, tf.float64)
    check_rounding(tf_gradient, exact_gradient, gradient_terms, epsilon, "gradient")
    check_error(gradient, tf_gradient, exact_gradient, gradient_terms, epsilon, "gradient")


def _name(values):
    return "-".join(str(value).replace(" ", "") for value in values)


@pytest.mark.parametrize("values", DRAWN, ids=_name)
def test_error_is_within_twice_tensorflows(values, device):
    check_case(values, device)


@pytest.mark.long
@pytest.mark.parametrize("values", PRODUCT, ids=_name)
def test_error_is_within_twice_tensorflows_in_the_product(values, device):
    check_case(values, device)


def test_the_kernels_are_those_that_were_asked_for():
    from fusedloss import _lib

    asked = os.environ.get("FUSEDLOSS_CPU")
    if asked and _lib.ops() is not None:
        from fusedloss import _core

        assert _core.cpu_level() == asked


ODD_FORMS = {
    "all": {},
    "subset": {"subset": [1, 2]},
    "normalized over all": {"subset": [1, 2], "normalize": "full"},
    "mixture": {"subset": [1, 2], "subset_weight": 0.8, "full_weight": 0.2},
    "weight 0": {"subset": [1, 2], "subset_weight": 0, "full_weight": 1},
}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("form", ODD_FORMS.values(), ids=ODD_FORMS)
@pytest.mark.parametrize("odd", truth.ODD_PROBABILITIES.values(), ids=truth.ODD_PROBABILITIES)
def test_odd_probabilities_give_what_the_reference_gives(odd, form, sparse, wide):
    p = np.tile(np.array([0.1, 0.2, 0.3, 0.4], np.float32), (3, 1))
    p[0] = odd
    targets = np.array([[0.25, 0.3, 0.45, 0]] * 3, np.float32)
    if wide:  # classes along the lanes, and a subset that is gathered
        p = np.concatenate([p, np.full((3, 60), 1e-3, np.float32)], axis=1)
        targets = np.concatenate([targets, np.zeros((3, 60), np.float32)], axis=1)
    y = np.array([1, 2, 0]) if sparse else targets
    name = "sparse_softmax_xent" if sparse else "softmax_xent"
    found = []
    for module in (fusedloss.nn, fusedloss.reference):
        x = tf.constant(p)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = getattr(module, name)(y, x, from_logits=False, **form)
        found.append((loss.numpy(), tape.gradient(loss, x).numpy()))
    (loss, gradient), (reference_loss, reference_gradient) = found
    np.testing.assert_allclose(loss, reference_loss, rtol=1e-5, atol=1e-6)
    # Where the loss is not finite, that the gradient says so is what counts.
    finite = np.isfinite(reference_loss)
    np.testing.assert_allclose(gradient[finite], reference_gradient[finite], rtol=1e-4, atol=1e-5)
    assert not np.isfinite(gradient[~finite]).all(-1).any()


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(sparse, classes, bad):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, classes)).astype(np.float32)
    logits[7, 3] = bad
    labels = rng.integers(0, classes, 40)
    targets = labels if sparse else np.eye(classes, dtype=np.float32)[labels]
    function = fusedloss.nn.sparse_softmax_xent if sparse else fusedloss.nn.softmax_xent
    x = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = function(targets, x)
    gradient = tape.gradient(loss, x).numpy()
    assert np.flatnonzero(~np.isfinite(loss)).tolist() == [7]
    assert np.isnan(loss[7])
    assert np.flatnonzero(~np.isfinite(gradient).all(-1)).tolist() == [7]


@pytest.mark.parametrize("classes", [6, 300])
def test_a_masked_logit_of_minus_infinity_costs_and_gets_nothing(classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, classes)).astype(np.float32)
    labels = rng.integers(1, classes, 20)
    masked = logits.copy()
    masked[:, 0] = -np.inf
    x = tf.constant(masked)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = fusedloss.nn.softmax_xent(np.eye(classes, dtype=np.float32)[labels], x)
    gradient = tape.gradient(loss, x)
    np.testing.assert_array_equal(gradient[:, 0], 0)
    without, _ = truth.softmax_xent(logits[:, 1:], labels - 1)
    np.testing.assert_allclose(loss, without.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("distance", [0, 5, 30, 500, 1e30])
@pytest.mark.parametrize("classes", [8, 200])
def test_a_subset_far_below_the_rest_keeps_its_digits(classes, distance):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(17, classes)).astype(np.float32)
    logits[:, classes // 2 :] += np.float32(distance)
    labels = rng.integers(0, classes // 2, 17)
    arguments = {
        "subset": np.arange(classes // 2), "subset_weight": 0.75, "full_weight": 0.25,
    }  # fmt: skip
    x = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = fusedloss.nn.sparse_softmax_xent(labels, x, **arguments)
    exact_loss, exact_gradient = truth.softmax_xent(logits, labels, **arguments)
    np.testing.assert_allclose(loss, exact_loss.astype(np.float64), rtol=2e-6)
    gradient = tape.gradient(loss, x)
    np.testing.assert_allclose(gradient, exact_gradient.astype(np.float64), atol=1e-6)


# Long rows are written while the next one is read, in chunks whose powers are relative to what
# came before: logits that rise, fall, jump and vanish, rows left out, rows that are not aligned.
LONG_ROWS = {
    "rising": lambda z: np.sort(z * 30, axis=-1),
    "falling": lambda z: -np.sort(z * 30, axis=-1),
    "a jump in the last full chunk": lambda z: z + 20 * (np.arange(z.shape[-1]) == 1500),
    "a jump at the end": lambda z: z + 1e4 * (np.arange(z.shape[-1]) == z.shape[-1] - 3),
    "a jump in the middle": lambda z: z + 500 * (np.arange(z.shape[-1]) > z.shape[-1] // 2),
    "nothing at first": lambda z: np.where(np.arange(z.shape[-1]) < 1100, -np.inf, z),
    "nothing but the label": lambda z: np.where(np.arange(z.shape[-1]) == 1500, z, -np.inf),
}


@pytest.mark.parametrize("form", LONG_ROWS.values(), ids=LONG_ROWS)
@pytest.mark.parametrize("shape", [(5, 2048), (4, 2571), (4, 2064), (700, 3001)])
def test_long_rows_of_any_profile(shape, form):
    rng = np.random.default_rng(0)
    logits = form(rng.normal(size=shape)).astype(np.float32)
    labels = np.where(rng.random(shape[0]) < 0.2, -1, 1500)
    fused = SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction="sum")
    weights = rng.normal(size=shape[0]).astype(np.float32)
    x = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = fused(labels, x, sample_weight=weights)
    gradient = tape.gradient(loss, x).numpy()
    exact_loss, exact_gradient = truth.softmax_xent(logits, labels, ignore_class=-1)
    exact_gradient = (exact_gradient * weights[:, None]).astype(np.float64)
    np.testing.assert_allclose(gradient, exact_gradient, atol=2e-6, rtol=1e-4)
    total = (exact_loss * weights).astype(np.float64)
    # A row whose label has all the probability has a loss of log(1 + tiny), exact to an ulp of 1.
    np.testing.assert_allclose(loss, total.sum(), rtol=1e-5, atol=1.2e-7 * np.abs(weights).sum())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_and_inf_stay_in_their_long_row(bad, dtype):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 4001)).astype(tf.as_dtype(dtype).as_numpy_dtype)
    logits[2, 3777] = bad
    fused = SparseCategoricalCrossentropy(from_logits=True)
    x = tf.constant(logits)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = fused(rng.integers(0, 4001, 6), x)
    gradient = tf.cast(tape.gradient(loss, x), tf.float32).numpy()
    assert np.isnan(loss)
    assert np.flatnonzero(~np.isfinite(gradient).any(-1)).tolist() == [2]
    assert np.isfinite(np.delete(gradient, 2, axis=0)).all()


@pytest.mark.long
def test_more_than_two_to_the_31_elements():
    rows, classes = 2**16 + 1, 2**15
    x = np.zeros((rows, classes), tf.bfloat16.as_numpy_dtype)
    x[-1, -1] = 20
    labels = np.zeros(rows, np.int32)
    labels[-1] = classes - 1
    fused = SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    @tf.function  # where the gradient is there once: 9 GB in all
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = fused(labels, x)
        return loss, tf.gather(tape.gradient(loss, x), [0, rows - 2, rows - 1])

    loss, gradient = step(tf.constant(x))
    last = np.log1p((classes - 1) * np.exp(-20.0))
    np.testing.assert_allclose(loss, (rows - 1) * np.log(classes) + last, rtol=1e-6)
    gradient = tf.cast(gradient, tf.float32).numpy()
    np.testing.assert_allclose(gradient[:2, 0], 1 / classes - 1, rtol=1e-2)
    np.testing.assert_allclose(gradient[:2, 1:], 1 / classes, rtol=1e-2)
    np.testing.assert_allclose(gradient[2, -1], np.expm1(-last), rtol=1e-2, atol=1e-9)
