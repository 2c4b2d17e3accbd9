"""The CUDA kernels compute the right numbers: their source, run on a CPU by `emulated_gpu.h`.

Threads are fibers there, in two orders, so that a missing barrier shows; shared memory begins as
NaN, and every access of 16 bytes is checked for its alignment. What only a GPU can show, a GPU
must: see benchmarks/gpu.
"""

import ctypes
import pathlib
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import truth
from test_accuracy import sample

ROOT = pathlib.Path(__file__).parents[1]
FORWARD, BACKWARD, REDUCED = range(3)
DTYPES = ["float32", "float64", "float16", "bfloat16"]
EPSILONS = dict(zip(DTYPES, [2**-23, 2**-52, 2**-10, 2**-7], strict=True))
HOPPER, OLD = (227 << 10, True), (48 << 10, False)  # shared memory of a block, clusters

FACTORS = {
    # Short rows with 1, 2, 16 and 32 lanes each; then rows for a block, for a cluster of 2 to 8,
    # and, on an old GPU, too long to be kept; aligned and not.
    "shape": [
        (1, 1), (3, 2), (37, 10), (300, 3), (16, 32), (5, 33), (9, 101), (5, 1000), (3, 2048),
        (2, 4099), (2, 20011), (1, 70001), (3, 32000), (0, 7),
    ],
    "dtype": DTYPES,
    "targets": ["int32", "int64", "one-hot", "soft"],
    "from_logits": [True, False],
    "subset": [None, "few", "many"],
    "normalize": ["subset", "full"],
    "weights": [(1.0, 0.0), (0.8, 0.2)],
    "label_smoothing": [0.0, 0.1],
    "class_weight": [False, True],
    "ignore_class": [None, -1],
    "device": [HOPPER, OLD],
    "runs_backwards": [False, True],
}  # fmt: skip


class Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "rows", "classes", "subset_size", "ignore_class",
            "from_logits", "normalize_full", "has_ignore_class",
        )),
        *((name, ctypes.c_double) for name in (
            "subset_weight", "full_weight", "label_smoothing", "epsilon", "scale",
        )),
        *((name, ctypes.c_void_p) for name in (
            "predictions", "labels32", "labels64", "targets", "class_weight", "subset",
            "dloss", "row_weight", "loss", "stats", "gradient",
        )),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulator") / "emulated_gpu.so"
    sources = [ROOT / "csrc/kernels/softmax_xent_gpu.cu", ROOT / "tests/emulated_gpu.cc"]
    compiler = shutil.which("g++")
    assert compiler, "the package is built with g++"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DFUSEDLOSS_EMULATED_GPU",
         "-fsanitize=alignment,bounds,signed-integer-overflow",
         "-fsanitize-undefined-trap-on-error",
         f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-x", "c++", *sources, "-o", library],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.run.restype = ctypes.c_char_p
    return loaded


class Kernels:
    """One case on the emulated GPU. Arrays have a guard behind them, and outputs begin as NaN."""

    GUARD = 16  # elements

    def __init__(self, emulator, predictions, targets, *, offset=0, **options):
        self._emulator, self._offset = emulator, offset
        self._keep = []
        self._dtype = predictions.dtype
        self._sums = np.float64 if self._dtype == np.float64 else np.float32
        self._rows, self._classes = predictions.shape
        subset = options.get("subset")
        self._rich = any(options.get(key) is not None for key in ("subset", "class_weight"))
        self._rich = self._rich or options.get("label_smoothing", 0) != 0
        if subset is not None:
            subset = np.sort(np.asarray(subset)).astype(np.int64)
        weight = options.get("class_weight")
        kind = {"int32": "labels32", "int64": "labels64"}.get(str(targets.dtype), "targets")
        ignored = options.get("ignore_class")
        self._arguments = Arguments(
            rows=self._rows,
            classes=self._classes,
            subset_size=0 if subset is None else len(subset),
            from_logits=options.get("from_logits", True),
            normalize_full=options.get("normalize", "subset") == "full",
            has_ignore_class=ignored is not None,
            ignore_class=ignored or 0,
            subset_weight=options.get("subset_weight", 1.0),
            full_weight=options.get("full_weight", 0.0),
            label_smoothing=options.get("label_smoothing", 0.0),
            epsilon=truth.EPSILON,
            scale=1.0,
            predictions=self._place(predictions),
            class_weight=None if weight is None else self._place(weight.astype(self._sums)),
            subset=None if subset is None else self._place(subset),
            **{kind: self._place(targets)},
        )

    def _place(self, array):
        """The address of a copy, 16-byte aligned and then `offset` elements on."""
        return self._guarded(array).ctypes.data

    def _guarded(self, array):
        size, itemsize = array.size, array.dtype.itemsize
        lead = 16 // itemsize
        memory = np.full((size + self.GUARD + 2 * lead + self._offset) * itemsize, 0xFF, np.uint8)
        start = -memory.ctypes.data % 16 + self._offset * itemsize
        placed = memory[start : start + size * itemsize].view(array.dtype)
        placed[:] = array.ravel()
        self._keep.append((memory, start + size * itemsize))
        return placed

    def _output(self, size, dtype):
        dtype = np.dtype(dtype)
        return self._guarded(np.full(size * dtype.itemsize, 0xFF, np.uint8).view(dtype))

    def _run(self, op, **pointers):
        arguments = Arguments.from_buffer_copy(self._arguments)
        for name, value in pointers.items():
            setattr(arguments, name, value)
        code = DTYPES.index(str(self._dtype))
        error = self._emulator.run(op, code, ctypes.byref(arguments))
        assert error is None, error
        for memory, end in self._keep:
            assert (memory[end:] == 0xFF).all(), "wrote beyond an array"

    def general(self, cotangents):
        """The loss of every row, and the gradient for the cotangents, by two ops."""
        loss = self._output(self._rows, self._sums)
        stats = self._output(self._rows * (5 if self._rich else 2), self._sums)
        self._run(FORWARD, loss=loss.ctypes.data, stats=stats.ctypes.data)
        gradient = self._output(self._rows * self._classes, self._dtype)
        self._run(
            BACKWARD,
            dloss=self._place(cotangents),
            stats=stats.ctypes.data,
            gradient=gradient.ctypes.data,
        )
        return loss, gradient.reshape(self._rows, self._classes)

    def reduced(self, row_weight=None, scale=1.0):
        """The weighted sum of the losses times scale, and its gradient, by one op."""
        loss = self._output(1, self._sums)
        gradient = self._output(self._rows * self._classes, self._dtype)
        self._run(
            REDUCED,
            row_weight=None if row_weight is None else self._place(row_weight),
            scale=scale,
            loss=loss.ctypes.data,
            gradient=gradient.ctypes.data,
        )
        return loss[0], gradient.reshape(self._rows, self._classes)


def check_error(got, exact, terms, epsilon, what):
    got = np.asarray(got).astype(np.longdouble)
    allowed = 8 * epsilon * max(np.abs(exact).max(initial=0), terms)
    error = np.abs(got - exact).max(initial=0)
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


def _is_possible(values):
    case = dict(zip(FACTORS, values, strict=False))
    subset = case.get("subset", "few")
    if subset is None and (case.get("weights") == (0.8, 0.2) or case.get("normalize") == "full"):
        return False
    if case.get("targets", "int32")[:3] != "int" and case.get("ignore_class") is not None:
        return False
    return not (subset == "many" and case.get("shape", (0, 3))[-1] <= 2)


@pytest.mark.parametrize("values", list(AllPairs(list(FACTORS.values()), filter_func=_is_possible)))
def test_every_form_agrees_with_the_truth(emulator, values):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    predictions, targets, arguments, cotangents = sample(case, rng)
    emulator.emulate(ctypes.c_int64(case["device"][0]), case["device"][1], case["runs_backwards"])
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(
        predictions, targets, **arguments
    )
    epsilon, sums_epsilon = EPSILONS[case["dtype"]], EPSILONS[str(cotangents.dtype)]
    spread = np.abs(cotangents).max(initial=0)
    if not case["from_logits"]:
        terms = max(terms, 1)  # the bound 1 − ε is itself rounded
    kernels = Kernels(emulator, predictions, targets, **arguments)

    loss, gradient = kernels.general(cotangents)
    check_error(loss, exact, terms, sums_epsilon, "loss")
    pulled = exact_gradient * cotangents[:, None].astype(np.longdouble)
    check_error(gradient, pulled, gradient_terms * spread, epsilon, "gradient")

    total, fused = kernels.reduced(cotangents, scale=0.5)
    largest = np.abs(cotangents).sum() * max(terms, np.abs(exact).max(initial=0))
    check_error([total], 0.5 * (exact * cotangents).sum(), largest, sums_epsilon, "sum")
    check_error(fused, 0.5 * pulled, 0.5 * gradient_terms * spread, epsilon, "gradient of the sum")


def logits_and_labels(rng, shape, dtype="float32"):
    logits = rng.normal(size=shape).astype(tf.as_dtype(dtype).as_numpy_dtype)
    return logits, rng.integers(0, shape[-1], shape[:-1])


@pytest.fixture
def on_hopper(emulator):
    emulator.emulate(ctypes.c_int64(HOPPER[0]), HOPPER[1], False)
    return emulator


@pytest.mark.parametrize("shape", [(9, 10), (3, 1000), (2, 4100), (2, 40000)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_that_is_not_aligned_gives_the_same(on_hopper, shape, dtype):
    rng = np.random.default_rng(0)
    logits, labels = logits_and_labels(rng, shape, dtype)
    cotangents = rng.normal(size=shape[:-1]).astype("float64" if dtype == "float64" else "float32")
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(logits, labels)
    loss, gradient = Kernels(on_hopper, logits, labels, offset=1).general(cotangents)
    check_error(loss, exact, terms, EPSILONS[str(cotangents.dtype)], "loss")
    pulled = exact_gradient * cotangents[:, None].astype(np.longdouble)
    spread = np.abs(cotangents).max()
    check_error(gradient, pulled, gradient_terms * spread, EPSILONS[dtype], "gradient")


@pytest.mark.parametrize("classes", [10, 1000, 5000, 40000])
@pytest.mark.parametrize("rich", [False, True])
def test_a_label_out_of_range_is_nan_and_an_ignored_one_0(on_hopper, classes, rich):
    rng = np.random.default_rng(1)
    logits, labels = logits_and_labels(rng, (5, classes))
    labels[1:4] = [classes, -1, -7]
    options = {"ignore_class": -1, "label_smoothing": 0.1 if rich else 0.0}
    loss, gradient = Kernels(on_hopper, logits, labels, **options).general(np.ones(5, np.float32))
    assert np.isnan(loss[[1, 3]]).all() and np.isnan(gradient[[1, 3]]).all()
    assert loss[2] == 0 and (gradient[2] == 0).all()
    assert np.isfinite(loss[[0, 4]]).all() and np.isfinite(gradient[[0, 4]]).all()
    total, _ = Kernels(on_hopper, logits, labels, **options).reduced()
    assert np.isnan(total)


@pytest.mark.parametrize("subset", [[3, 3], [5, 2], [0, 5000], [-1, 4], [0, 2**40]])
@pytest.mark.parametrize("full_weight", [0.0, 0.2])  # gathered, and not
def test_a_subset_that_is_no_subset_is_nan(on_hopper, subset, full_weight):
    rng = np.random.default_rng(2)
    logits, labels = logits_and_labels(rng, (3, 5000))
    labels[1] = -1
    options = {"full_weight": full_weight, "ignore_class": -1}
    kernels = Kernels(on_hopper, logits, labels, subset=np.arange(2), **options)
    wrong = np.array(subset, np.int64)
    kernels._arguments.subset = kernels._place(wrong)
    loss, gradient = kernels.general(np.ones(3, np.float32))
    assert np.isnan(loss[[0, 2]]).all() and np.isnan(gradient[[0, 2]]).all()
    assert loss[1] == 0 and (gradient[1] == 0).all()


def test_a_bad_label_is_nan_in_all_classes_of_a_gathered_row(on_hopper):
    rng = np.random.default_rng(5)
    logits, labels = logits_and_labels(rng, (4, 3000))
    labels[:] = [7, 3000, -1, 20]
    kernels = Kernels(on_hopper, logits, labels, subset=[7, 20, 31], ignore_class=-1)
    loss, gradient = kernels.general(np.ones(4, np.float32))
    assert np.isnan(loss[1]) and np.isnan(gradient[1]).all()
    assert loss[2] == 0 and (gradient[2] == 0).all()
    outside = np.delete(gradient[[0, 3]], [7, 20, 31], axis=1)
    assert (outside == 0).all() and np.isfinite(gradient[[0, 3]]).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gathered_half_precision_with_dense_targets(on_hopper, dtype):
    rng = np.random.default_rng(6)
    predictions = rng.normal(size=(3, 3001)).astype(tf.as_dtype(dtype).as_numpy_dtype)
    targets = rng.random((3, 3001)).astype(np.float32)
    options = {"subset": [1, 5, 3000]}
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(predictions, targets, **options)
    total, gradient = Kernels(on_hopper, predictions, targets, **options).reduced()
    check_error([total], exact.sum(), max(terms, np.abs(exact).max()) * 3, 2**-23, "sum")
    check_error(gradient, exact_gradient, gradient_terms, EPSILONS[dtype], "gradient")


@pytest.mark.parametrize("classes", [310, 520, 1000])
def test_tiles_of_many_rows_fit_an_old_gpu(emulator, classes):
    emulator.emulate(ctypes.c_int64(OLD[0]), OLD[1], False)
    rng = np.random.default_rng(7)
    logits, labels = logits_and_labels(rng, (9000, classes))
    exact, _ = truth.softmax_xent(logits[:50], labels[:50])
    loss, _ = Kernels(emulator, logits, labels).general(np.ones(9000, np.float32))
    np.testing.assert_allclose(loss[:50], exact.astype(np.float64), rtol=1e-6)


def test_negative_probabilities_have_shares_too(on_hopper):
    predictions = -np.ones((2, 4), np.float32)
    targets = np.eye(4, dtype=np.float32)[:2]
    kernels = Kernels(on_hopper, predictions, targets, from_logits=False)
    loss, _ = kernels.general(np.ones(2, np.float32))
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("classes", [10, 1000, 5000, 40000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_row(on_hopper, classes, value):
    rng = np.random.default_rng(3)
    logits, labels = logits_and_labels(rng, (3, classes))
    labels[:] = 0
    logits[1, classes - 1] = value
    loss, gradient = Kernels(on_hopper, logits, labels).general(np.ones(3, np.float32))
    assert np.isfinite(loss[[0, 2]]).all() and np.isfinite(gradient[[0, 2]]).all()
    if value == -np.inf:  # a class that cannot be
        assert np.isfinite(loss[1]) and gradient[1, classes - 1] == 0
    else:
        assert np.isnan(loss[1]) and np.isnan(gradient[1]).all()


def test_many_rows_are_summed_in_two_stages(on_hopper):
    rng = np.random.default_rng(4)
    logits, labels = logits_and_labels(rng, (40000, 3))
    weights = rng.normal(size=40000).astype(np.float32)
    exact, _ = truth.softmax_xent(logits, labels)
    total, _ = Kernels(on_hopper, logits, labels).reduced(weights)
    largest = np.abs(exact * weights).sum()
    check_error([total], (exact * weights).sum(), largest, EPSILONS["float32"], "sum")
