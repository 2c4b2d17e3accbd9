"""The CUDA kernels of subsets of rows' own, the focal form, softcaps and metrics, run on a CPU.

As in test_gpu_kernels.py.
"""

import ctypes
import random
import zlib

import numpy as np
import pytest
from allpairspy import AllPairs

import test_gpu_kernels as gpu
import truth
from test_accuracy import PLAIN, _with_new_pairs, sample
from test_gpu_blended import WEIGHTS, Blended, blend

emulator, on_hopper = gpu.emulator, gpu.on_hopper
METRICS = ("ignore_class", "subset", "mask", "candidates", "mask_negative_targets", "normalize")
METRICS += ("from_logits", "temperature", "softcap")  # what they depend on

FACTORS = {
    # Short rows with 1, 2 and 32 lanes each; then rows for a block, kept and not, and for clusters.
    "shape": [(3, 2), (37, 10), (9, 33), (7, 101), (3, 1025), (2, 4099), (1, 33001)],
    "dtype": gpu.DTYPES,
    "targets": ["int32", "int64", "one-hot", "soft"],
    "from_logits": [True, False],
    "subset": [None, "few", "many", "few a row", "many a row", "candidates", "long list"],
    "mask_negative_targets": [False, True],
    "normalize": ["subset", "full"],
    "weights": [(1.0, 0.0), (0.8, 0.2), (0.0, 1.0)],
    "label_smoothing": [0.0, 0.1],
    "class_weight": [False, True],
    "temperature": [1.0, 0.6],
    "z_loss": [0.0, 0.01],
    "softcap": [None, 4.0],
    "gamma": [None, 0.0, 0.5, 2.0],
    "ignore_class": [None, -1],
    "metrics": [False, True],
    "blended": [False, True],
    "offset": [0, 0, 1],
    "device": [gpu.HOPPER, gpu.OLD],
    "runs_backwards": [False, True],
}


def _is_possible(values):
    case = {**PLAIN, **dict(zip(FACTORS, values, strict=False))}
    sparse = case["targets"].startswith("int")
    is_warped = (case["temperature"], case["z_loss"], case["softcap"]) != (1.0, 0.0, None)
    has_subset = case["subset"] is not None or case["mask_negative_targets"]
    if not has_subset and (case["normalize"], case["weights"]) != ("subset", (1.0, 0.0)):
        return False
    if case["ignore_class"] is not None if not sparse else case["mask_negative_targets"]:
        return False
    return case["from_logits"] or not is_warped


def _drawn(count):
    draw = random.Random(0)
    product = (tuple(draw.choice(factor) for factor in FACTORS.values()) for _ in range(count))
    # Filtered, AllPairs ends before it has all of them.
    pairs = map(tuple, AllPairs(list(FACTORS.values()), filter_func=_is_possible))
    return list(_with_new_pairs([*pairs, *filter(_is_possible, product)]))


@pytest.mark.parametrize("values", _drawn(20000))
def test_every_general_form_agrees_with_the_truth(emulator, values):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    emulator.emulate(ctypes.c_int64(case["device"][0]), case["device"][1], case["runs_backwards"])
    predictions, targets, arguments, cotangents = sample({**PLAIN, **case}, rng)
    options = {**arguments, "metrics": case["metrics"], "offset": case["offset"]}
    shares, x = [1.0], predictions
    if case["blended"]:
        blended = sample({**PLAIN, **case}, rng)[0]
        kernels = Blended(emulator, predictions, blended, targets, **options)
        shares, x = WEIGHTS, blend(predictions, blended)
    else:
        kernels = gpu.SoftmaxXent(emulator, predictions, targets, **options)
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(x, targets, **arguments)
    epsilon, sums_epsilon = gpu.EPSILONS[case["dtype"]], gpu.EPSILONS[str(cotangents.dtype)]
    spread = np.abs(cotangents).max()
    if not case["from_logits"] or case["gamma"] is not None:
        terms = max(terms, 1)  # the bound 1 − ε is itself rounded

    def check_gradients(gradient, scale, what):
        pulled = scale * exact_gradient * cotangents[:, None].astype(np.longdouble)
        found = [gradient, kernels.dblended] if case["blended"] else [gradient]
        for share, one in zip(shares, found, strict=True):
            largest = share * scale * gradient_terms * spread
            gpu.check_error(one, share * pulled, largest, epsilon, what)

    def check_metrics():
        if not case["metrics"]:
            return
        known = {name: arguments[name] for name in METRICS if name in arguments}
        ranks, *others = np.moveaxis(truth.softmax_xent_metrics(x, targets, **known), -1, 0)
        np.testing.assert_array_equal(kernels.metrics[:, 0], ranks.astype(np.float64))
        scores = x.astype(np.float64)
        scores = scores / case["temperature"] if case["from_logits"] else np.log(scores)
        largest = 2 * np.abs(scores).max()
        for column, right in enumerate(others, 1):
            gpu.check_error(kernels.metrics[:, column], right, largest, sums_epsilon, "metrics")

    loss, gradient = kernels.general(cotangents)
    gpu.check_error(loss, exact, terms, sums_epsilon, "loss")
    check_gradients(gradient, 1.0, "gradient")
    check_metrics()
    if case["metrics"]:
        kernels.metrics[:] = np.nan
    total, gradient = kernels.reduced(cotangents, scale=0.5)
    largest = np.abs(cotangents).sum() * max(terms, np.abs(exact).max())
    gpu.check_error([total], 0.5 * (exact * cotangents).sum(), largest, sums_epsilon, "sum")
    check_gradients(gradient, 0.5, "gradient of the sum")
    check_metrics()


def random_case(shape, rng):
    predictions, labels = gpu.logits_and_labels(rng, shape)
    return predictions, labels, np.ones(shape[0], np.float32)


@pytest.mark.parametrize("classes", [10, 3000])
@pytest.mark.parametrize("full_weight", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_candidate_that_is_no_class_makes_its_row_nan(on_hopper, classes, full_weight, dtype):
    logits, labels, ones = random_case((5, classes), np.random.default_rng(0))
    labels[3] = -1
    candidates = np.tile(np.arange(4, dtype=dtype), (5, 1))
    candidates[:, 2] = labels
    candidates[[1, 3], 0] = classes
    candidates[2, 1] = -2
    options = {"candidates": candidates, "full_weight": full_weight, "ignore_class": -1}
    kernels = gpu.SoftmaxXent(on_hopper, logits, labels, metrics=True, **options)
    loss, gradient = kernels.general(ones)
    for found in (loss, gradient.sum(-1), kernels.metrics.sum(-1)):
        np.testing.assert_array_equal(np.isnan(found), [False, True, True, False, False])
    assert np.isnan(gradient[[1, 2]]).all()
    assert loss[3] == 0 and (gradient[3] == 0).all()
    np.testing.assert_array_equal(kernels.metrics[3], [-1, 0, 0])


@pytest.mark.parametrize("classes", [10, 3000])
@pytest.mark.parametrize("kind", ["mask", "candidates", "no candidates", "negative", "label"])
@pytest.mark.parametrize("normalize", ["subset", "full"])
@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, {"label_smoothing": 0.1, "z_loss": 0.1}])
def test_a_row_without_a_target_in_its_subset_is_0(on_hopper, classes, kind, normalize, options):
    logits, targets, ones = random_case((3, classes), np.random.default_rng(1))
    targets[:] = 7
    options = {"normalize": normalize, "metrics": True, **options}
    if kind == "mask":
        options["mask"] = np.zeros(logits.shape, bool)
    elif kind == "negative":
        targets = np.full(logits.shape, -1, np.float32)
        options["mask_negative_targets"] = True
    else:
        listed = {"candidates": [-1, -1], "no candidates": [], "label": [3, -1, 2]}[kind]
        options["candidates"] = np.tile(np.array(listed, np.int64), (3, 1))
    kernels = gpu.SoftmaxXent(on_hopper, logits, targets, **options)
    loss, gradient = kernels.general(ones)
    total, fused = kernels.reduced()
    assert (loss == 0).all() and total == 0
    assert (gradient == 0).all() and (fused == 0).all()
    np.testing.assert_array_equal(kernels.metrics, [[-1, 0, 0]] * 3)


@pytest.mark.parametrize("classes", [10, 3000, 20000])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["mask", "candidates"])
@pytest.mark.parametrize("options", [{}, {"gamma": 2.0}, {"softcap": 3.0}, {"from_logits": False}])
def test_what_lies_outside_the_subset_is_not_looked_at(on_hopper, classes, value, kind, options):
    rng = np.random.default_rng(2)
    _, labels, ones = random_case((3, classes), rng)
    predictions = rng.uniform(0.1, 0.2, (3, classes)).astype(np.float32)
    labels[:] = 1
    legal = np.arange(classes) < 5
    candidates = np.tile(np.arange(5, dtype=np.int32), (3, 1))
    subset = {"mask": legal} if kind == "mask" else {"candidates": candidates}
    right, right_gradient = gpu.SoftmaxXent(
        on_hopper, predictions, labels, **subset, **options
    ).general(ones)
    predictions[:, 5:] = value
    kernels = gpu.SoftmaxXent(on_hopper, predictions, labels, **subset, **options)
    loss, gradient = kernels.general(ones)
    np.testing.assert_array_equal(loss, right)
    np.testing.assert_array_equal(gradient, right_gradient)
    predictions[1, 4] = np.nan
    kernels = gpu.SoftmaxXent(on_hopper, predictions, labels, **subset, **options)
    loss, gradient = kernels.general(ones)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False])
    assert np.isnan(gradient[1]).any() and np.isfinite(gradient[[0, 2]]).all()


@pytest.mark.parametrize("targets", ["labels", "dense"])
@pytest.mark.parametrize("normalize", ["subset", "full"])
def test_a_long_list_of_the_same_candidates_adds_up(on_hopper, targets, normalize):
    rng = np.random.default_rng(3)
    logits, labels, ones = random_case((2, 6), rng)
    candidates = rng.integers(-1, 5, (2, 2000))
    candidates[:, 1999] = labels
    if targets == "dense":
        labels = rng.random((2, 2000)).astype(np.float32)
    options = {"candidates": candidates, "normalize": normalize}
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(logits, labels, **options)
    loss, gradient = gpu.SoftmaxXent(on_hopper, logits, labels, **options).general(ones)
    gpu.check_error(loss, exact, terms, 2**-23, "loss")
    gpu.check_error(gradient, exact_gradient, gradient_terms, 2**-23, "gradient")


@pytest.mark.parametrize("classes", [9, 1500])
def test_of_equal_scores_the_first_ranks_highest(on_hopper, classes):
    logits = np.zeros((4, classes), np.float32)
    logits[:, 2], logits[1, 5], logits[2, 7] = 1, 2, np.nan
    labels, ones = np.array([2, 4, 2, 7]), np.ones(4, np.float32)
    kernels = gpu.SoftmaxXent(on_hopper, logits, labels, metrics=True)
    kernels.general(ones)
    np.testing.assert_array_equal(kernels.metrics[:, 0], [0, 5, 1, 7])
    mask = np.arange(classes) != 2
    kernels = gpu.SoftmaxXent(on_hopper, logits, labels, mask=mask, metrics=True)
    kernels.general(ones)
    np.testing.assert_array_equal(kernels.metrics[:, 0], [-1, 4, -1, 6])
    candidates = np.array([[4, 2, -1, 2], [7, 4, 5, 4], [2, 7, 7, 2], [7, 2, 3, 7]])
    kernels = gpu.SoftmaxXent(on_hopper, logits, labels, candidates=candidates, metrics=True)
    kernels.general(ones)
    np.testing.assert_array_equal(kernels.metrics[:, 0], [0, 2, 2, 1])


def test_rows_without_classes_have_no_metrics(on_hopper):
    kernels = gpu.SoftmaxXent(
        on_hopper, np.zeros((300, 0), np.float32), np.zeros(300, np.int64), metrics=True
    )
    loss, _ = kernels.general(np.ones(300, np.float32))
    assert (loss == 0).all()
    np.testing.assert_array_equal(kernels.metrics, [[-1, 0, 0]] * 300)


@pytest.mark.parametrize("classes", [10, 4100])
@pytest.mark.parametrize("dense", [False, True])
def test_metrics_cost_no_digit_of_loss_and_gradient(on_hopper, classes, dense):
    """The backward pass takes the statistics of either forward pass."""
    logits, targets, ones = random_case((3, classes), np.random.default_rng(4))
    if dense:
        targets = np.eye(classes, dtype=np.float32)[targets]
    for options in ({}, {"subset": [1, 3, 4]}, {"subset": [1, 3], "normalize": "full"}):
        found = [
            gpu.SoftmaxXent(on_hopper, logits, targets, metrics=metrics, **options).general(ones)
            for metrics in (False, True)
        ]
        for plain, measured in zip(*found, strict=True):
            np.testing.assert_allclose(measured, plain, rtol=2e-6, atol=1e-6)
