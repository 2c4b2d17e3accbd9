"""The CUDA kernels of blended predictions, run on a CPU as in test_gpu_kernels.py."""

import ctypes
import zlib

import numpy as np
import pytest
from allpairspy import AllPairs

import test_gpu_kernels as gpu
import truth
from test_accuracy import PLAIN, sample

emulator, on_hopper = gpu.emulator, gpu.on_hopper
WEIGHTS = (0.7, 0.3)


class Blended(gpu.SoftmaxXent):
    """One case of softmax_xent on blended predictions. `dblended`: of the latest gradient op."""

    def __init__(self, emulator, predictions, blended, targets, **options):
        super().__init__(emulator, predictions, targets, **options)
        self._arguments.blended = self._arrays.place(blended)
        self._arguments.prediction_weight, self._arguments.blended_weight = WEIGHTS

    def _run(self, op, **pointers):
        if op != gpu.FORWARD:
            gradient = self._arrays.output(self._rows * self._classes, self._dtype)
            self.dblended = gradient.reshape(self._rows, self._classes)
            pointers["dblended"] = gradient.ctypes.data
        super()._run(op, **pointers)


def blend(predictions, blended):
    sums = gpu.sums_dtype(predictions.dtype)
    first, second = np.array(WEIGHTS, sums)
    total = first * predictions.astype(sums) + second * blended.astype(sums)
    return total.astype(predictions.dtype)


@pytest.mark.parametrize(
    "values", list(AllPairs(list(gpu.FACTORS.values()), filter_func=gpu._is_possible))
)
def test_every_form_of_blended_predictions_agrees_with_the_truth(emulator, values):
    case = dict(zip(gpu.FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    blended, *_ = sample({**PLAIN, **case}, rng)
    predictions, targets, arguments, cotangents = sample({**PLAIN, **case}, rng)
    emulator.emulate(ctypes.c_int64(case["device"][0]), case["device"][1], case["runs_backwards"])
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(
        blend(predictions, blended), targets, **arguments
    )
    epsilon, sums_epsilon = gpu.EPSILONS[case["dtype"]], gpu.EPSILONS[str(cotangents.dtype)]
    spread = np.abs(cotangents).max(initial=0)
    if not case["from_logits"]:
        terms = max(terms, 1)  # the bound 1 − ε is itself rounded
    kernels = Blended(emulator, predictions, blended, targets, **arguments)

    loss, gradient = kernels.general(cotangents)
    gpu.check_error(loss, exact, terms, sums_epsilon, "loss")
    pulled = exact_gradient * cotangents[:, None].astype(np.longdouble)
    for weight, found in zip(WEIGHTS, (gradient, kernels.dblended), strict=True):
        largest = weight * gradient_terms * spread
        gpu.check_error(found, weight * pulled, largest, epsilon, "gradient")

    total, gradient = kernels.reduced(cotangents, scale=0.5)
    largest = np.abs(cotangents).sum() * max(terms, np.abs(exact).max(initial=0))
    gpu.check_error([total], 0.5 * (exact * cotangents).sum(), largest, sums_epsilon, "sum")
    for weight, found in zip(WEIGHTS, (gradient, kernels.dblended), strict=True):
        largest = 0.5 * weight * gradient_terms * spread
        gpu.check_error(found, 0.5 * weight * pulled, largest, epsilon, "gradient of the sum")


@pytest.mark.parametrize("shape", [(9, 10), (3, 1000), (2, 4100), (2, 40000)])
@pytest.mark.parametrize("dtype", gpu.DTYPES)
def test_memory_that_is_not_aligned_gives_the_same(on_hopper, shape, dtype):
    rng = np.random.default_rng(0)
    predictions, labels = gpu.logits_and_labels(rng, shape, dtype)
    blended, _ = gpu.logits_and_labels(rng, shape, dtype)
    kernels = [Blended(on_hopper, predictions, blended, labels, offset=offset) for offset in (0, 1)]
    (total, gradient), (shifted, shifted_gradient) = [case.reduced() for case in kernels]
    np.testing.assert_allclose(shifted, total, rtol=1e-5)
    rtol = 4 * gpu.EPSILONS[dtype]
    np.testing.assert_allclose(shifted_gradient, gradient, rtol=max(rtol, 1e-5), atol=1e-6)
    np.testing.assert_allclose(
        kernels[1].dblended, kernels[0].dblended, rtol=max(rtol, 1e-5), atol=1e-6
    )


@pytest.mark.parametrize("classes", [10, 5000, 40000])
@pytest.mark.parametrize("subset", [None, [3, 7, 8]])
def test_bad_rows_are_nan_and_ignored_ones_0_in_both_gradients(on_hopper, classes, subset):
    rng = np.random.default_rng(1)
    predictions, labels = gpu.logits_and_labels(rng, (5, classes))
    blended, _ = gpu.logits_and_labels(rng, (5, classes))
    labels[:] = [3, classes, -1, 7, 8]
    kernels = Blended(on_hopper, predictions, blended, labels, ignore_class=-1, subset=subset)
    loss, gradient = kernels.general(np.ones(5, np.float32))
    assert np.isnan(loss[1]) and loss[2] == 0 and np.isfinite(loss[[0, 3, 4]]).all()
    for found in (gradient, kernels.dblended):
        assert np.isnan(found[1]).all() and (found[2] == 0).all()
        assert np.isfinite(found[[0, 3, 4]]).all()


@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_in_either_array_stays_in_its_row(on_hopper, classes, where):
    rng = np.random.default_rng(2)
    arrays = rng.normal(size=(2, 3, classes)).astype(np.float32)
    arrays[where, 1, classes - 1] = np.nan
    kernels = Blended(on_hopper, *arrays, np.zeros(3, np.int64))
    loss, gradient = kernels.general(np.ones(3, np.float32))
    for found in (loss, gradient.sum(-1), kernels.dblended.sum(-1)):
        np.testing.assert_array_equal(np.isnan(found), [False, True, False])


def test_no_classes_and_no_rows_are_loss_0(on_hopper):
    for shape in ((3, 0), (0, 3)):
        empty = np.zeros(shape, np.float32)
        total, _ = Blended(on_hopper, empty, empty, np.zeros(shape[0], np.int64)).reduced()
        assert total == 0
