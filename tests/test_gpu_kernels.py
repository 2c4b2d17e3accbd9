"""The CUDA kernels compute the right numbers: their source, run on a CPU by `emulated_gpu.h`.

Threads are fibers there, in two orders, so that a missing barrier shows; shared memory begins as
NaN, and every access of 16 bytes is checked for its alignment. What only a GPU can show, a GPU
must: see benchmarks/gpu.
"""

import ctypes
import functools
import pathlib
import shutil
import subprocess
import zlib

import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import truth
from test_accuracy import PLAIN, sample

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
    "temperature": [1.0, 0.6],
    "z_loss": [0.0, 0.01],
    "ignore_class": [None, -1],
    "device": [HOPPER, OLD],
    "runs_backwards": [False, True],
}  # fmt: skip


class SoftmaxXentArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "rows", "classes", "subset_size", "ignore_class",
            "from_logits", "normalize_full", "has_ignore_class", "subset_kind", "mask_negative",
            "focal",
        )),
        *((name, ctypes.c_double) for name in (
            "subset_weight", "full_weight", "label_smoothing", "epsilon", "scale",
            "prediction_weight", "blended_weight", "temperature", "z_loss", "softcap", "gamma",
        )),
        *((name, ctypes.c_void_p) for name in (
            "predictions", "labels32", "labels64", "targets", "class_weight", "subset", "mask",
            "candidates32", "candidates64", "dloss", "row_weight", "loss", "stats", "gradient",
            "metrics", "blended", "dblended",
        )),
    ]  # fmt: skip


class PointwiseArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "outputs", "one_target_a_row", "kind")),
        *((name, ctypes.c_double) for name in ("parameter", "epsilon", "scale")),
        *((name, ctypes.c_void_p) for name in (
            "predictions", "targets", "output_weights", "quantiles", "dloss", "row_weight",
            "loss", "gradient",
        )),
    ]  # fmt: skip


class PenaltyVariable(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int), ("size", ctypes.c_int64), ("values", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
    ]  # fmt: skip


class PenaltyArguments(ctypes.Structure):
    _fields_ = [
        ("variables", ctypes.POINTER(PenaltyVariable)), ("count", ctypes.c_int64),
        ("coefficients", ctypes.c_void_p), ("dpenalty", ctypes.c_void_p),
        ("penalty", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    return _built(tmp_path_factory.getbasetemp() / "emulator")


@functools.cache  # for all modules that take the fixture from here
def _built(build):
    build.mkdir()
    compiler = shutil.which("g++")
    assert compiler, "the package is built with g++"
    sources = [*ROOT.glob("csrc/kernels/*_gpu.cu"), ROOT / "tests/emulated_gpu.cc"]
    objects = [build / f"{source.stem}.o" for source in sources]
    flags = [
        "-std=c++17", "-O1", "-w", "-fPIC", "-DFUSEDLOSS_EMULATED_GPU",
        "-fsanitize=alignment,bounds,signed-integer-overflow",
        "-fsanitize-undefined-trap-on-error", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}",
    ]  # fmt: skip
    compilers = [
        subprocess.Popen([compiler, *flags, "-x", "c++", "-c", source, "-o", built])
        for source, built in zip(sources, objects, strict=True)
    ]
    assert not any([running.wait() for running in compilers])
    library = build / "emulated_gpu.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    for loss in ("softmax_xent", "pointwise", "penalty", "feature_distance"):
        getattr(loaded, f"run_{loss}").restype = ctypes.c_char_p
    return loaded


class Arrays:
    """Arrays of an emulated GPU, with a guard behind each. Outputs begin as NaN."""

    GUARD = 16  # elements

    def __init__(self, offset=0):
        self._offset = offset
        self._keep = []

    def place(self, array):
        """The address of a copy, 16-byte aligned and then `offset` elements on."""
        return self.copy(array).ctypes.data

    def copy(self, array):
        size, itemsize = array.size, array.dtype.itemsize
        lead = 16 // itemsize
        memory = np.full((size + self.GUARD + 2 * lead + self._offset) * itemsize, 0xFF, np.uint8)
        start = -memory.ctypes.data % 16 + self._offset * itemsize
        placed = memory[start : start + size * itemsize].view(array.dtype)
        placed[:] = array.ravel()
        self._keep.append((memory, start + size * itemsize))
        return placed

    def output(self, size, dtype):
        dtype = np.dtype(dtype)
        return self.copy(np.full(size * dtype.itemsize, 0xFF, np.uint8).view(dtype))

    def check_guards(self):
        for memory, end in self._keep:
            assert (memory[end:] == 0xFF).all(), "wrote beyond an array"


def sums_dtype(dtype):
    return np.dtype("float64" if dtype == "float64" else "float32")


class SoftmaxXent:
    """One case of softmax_xent on the emulated GPU."""

    def __init__(self, emulator, predictions, targets, *, offset=0, **options):
        self._emulator, self._arrays = emulator, Arrays(offset)
        place = self._arrays.place
        self._dtype = predictions.dtype
        self._sums = sums_dtype(self._dtype)
        self._rows, self._classes = predictions.shape
        kind = {"int32": "labels32", "int64": "labels64"}.get(str(targets.dtype), "targets")
        pointers = {kind: place(targets)}
        subset, mask, candidates = (options.get(key) for key in ("subset", "mask", "candidates"))
        subset_kind, subset_size = 0, 0
        if subset is not None:
            subset = np.asarray(subset)
            ids = np.flatnonzero(subset) if subset.dtype == bool else np.sort(subset)
            subset_kind, subset_size = 1, len(ids)
            pointers["subset"] = place(ids.astype(np.int64))
        elif mask is not None:
            subset_kind = 2
            pointers["mask"] = place(np.broadcast_to(mask, predictions.shape))
        elif candidates is not None:
            subset_kind, subset_size = 3, candidates.shape[1]
            name = "candidates32" if candidates.dtype == np.int32 else "candidates64"
            pointers[name] = place(candidates)
        has_subset = subset_kind != 0 or options.get("mask_negative_targets", False)
        alpha, weight = options.get("alpha", 1.0), options.get("class_weight")
        if np.ndim(alpha):
            factor = 1.0 if weight is None else weight
            alpha, weight = 1.0, np.asarray(alpha, np.float64) * factor
        if weight is not None:
            pointers["class_weight"] = place(weight.astype(self._sums))
        ignored, gamma = options.get("ignore_class"), options.get("gamma")
        self.metrics = None
        if options.get("metrics", False):
            self.metrics = self._arrays.output(3 * self._rows, self._sums).reshape(-1, 3)
            pointers["metrics"] = self.metrics.ctypes.data
        self._arguments = SoftmaxXentArguments(
            rows=self._rows,
            classes=self._classes,
            subset_kind=subset_kind,
            subset_size=subset_size,
            from_logits=options.get("from_logits", True),
            normalize_full=options.get("normalize", "subset") == "full",
            mask_negative=options.get("mask_negative_targets", False),
            has_ignore_class=ignored is not None,
            ignore_class=ignored or 0,
            focal=gamma is not None,
            gamma=gamma or 0.0,
            subset_weight=alpha * options.get("subset_weight", 1.0),
            full_weight=alpha * options.get("full_weight", 0.0 if has_subset else 1.0),
            label_smoothing=options.get("label_smoothing", 0.0),
            temperature=options.get("temperature", 1.0),
            z_loss=options.get("z_loss", 0.0),
            softcap=options.get("softcap") or 0.0,
            epsilon=truth.EPSILON,
            scale=1.0,
            predictions=place(predictions),
            **pointers,
        )

    def _run(self, op, **pointers):
        arguments = SoftmaxXentArguments.from_buffer_copy(self._arguments)
        for name, value in pointers.items():
            setattr(arguments, name, value)
        code = DTYPES.index(str(self._dtype))
        error = self._emulator.run_softmax_xent(op, code, ctypes.byref(arguments))
        assert error is None, error
        self._arrays.check_guards()

    def general(self, cotangents):
        """The loss of every row, and the gradient for the cotangents, by two ops."""
        loss = self._arrays.output(self._rows, self._sums)
        stats = self._emulator.softmax_xent_stats(ctypes.byref(self._arguments))
        stats = self._arrays.output(self._rows * stats, self._sums)
        self._run(FORWARD, loss=loss.ctypes.data, stats=stats.ctypes.data)
        gradient = self._arrays.output(self._rows * self._classes, self._dtype)
        self._run(
            BACKWARD,
            dloss=self._arrays.place(cotangents),
            stats=stats.ctypes.data,
            gradient=gradient.ctypes.data,
        )
        return loss, gradient.reshape(self._rows, self._classes)

    def reduced(self, row_weight=None, scale=1.0):
        """The weighted sum of the losses times scale, and its gradient, by one op."""
        loss = self._arrays.output(1, self._sums)
        gradient = self._arrays.output(self._rows * self._classes, self._dtype)
        self._run(
            REDUCED,
            row_weight=None if row_weight is None else self._arrays.place(row_weight),
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
    is_warped = case.get("temperature", 1.0) != 1.0 or case.get("z_loss", 0.0) != 0.0
    if is_warped and not case.get("from_logits", True):
        return False
    return not (subset == "many" and case.get("shape", (0, 3))[-1] <= 2)


@pytest.mark.parametrize("values", list(AllPairs(list(FACTORS.values()), filter_func=_is_possible)))
def test_every_form_agrees_with_the_truth(emulator, values):
    case = dict(zip(FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    predictions, targets, arguments, cotangents = sample({**PLAIN, **case}, rng)
    emulator.emulate(ctypes.c_int64(case["device"][0]), case["device"][1], case["runs_backwards"])
    exact, exact_gradient, terms, gradient_terms = truth.with_terms(
        predictions, targets, **arguments
    )
    epsilon, sums_epsilon = EPSILONS[case["dtype"]], EPSILONS[str(cotangents.dtype)]
    spread = np.abs(cotangents).max(initial=0)
    if not case["from_logits"]:
        terms = max(terms, 1)  # the bound 1 − ε is itself rounded
    kernels = SoftmaxXent(emulator, predictions, targets, **arguments)

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
    loss, gradient = SoftmaxXent(on_hopper, logits, labels, offset=1).general(cotangents)
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
    loss, gradient = SoftmaxXent(on_hopper, logits, labels, **options).general(
        np.ones(5, np.float32)
    )
    assert np.isnan(loss[[1, 3]]).all() and np.isnan(gradient[[1, 3]]).all()
    assert loss[2] == 0 and (gradient[2] == 0).all()
    assert np.isfinite(loss[[0, 4]]).all() and np.isfinite(gradient[[0, 4]]).all()
    total, _ = SoftmaxXent(on_hopper, logits, labels, **options).reduced()
    assert np.isnan(total)


@pytest.mark.parametrize("subset", [[3, 3], [5, 2], [0, 5000], [-1, 4], [0, 2**40]])
@pytest.mark.parametrize("full_weight", [0.0, 0.2])  # gathered, and not
def test_a_subset_that_is_no_subset_is_nan(on_hopper, subset, full_weight):
    rng = np.random.default_rng(2)
    logits, labels = logits_and_labels(rng, (3, 5000))
    labels[1] = -1
    options = {"full_weight": full_weight, "ignore_class": -1}
    kernels = SoftmaxXent(on_hopper, logits, labels, subset=np.arange(2), **options)
    wrong = np.array(subset, np.int64)
    kernels._arguments.subset = kernels._arrays.place(wrong)
    loss, gradient = kernels.general(np.ones(3, np.float32))
    assert np.isnan(loss[[0, 2]]).all() and np.isnan(gradient[[0, 2]]).all()
    assert loss[1] == 0 and (gradient[1] == 0).all()


def test_a_bad_label_is_nan_in_all_classes_of_a_gathered_row(on_hopper):
    rng = np.random.default_rng(5)
    logits, labels = logits_and_labels(rng, (4, 3000))
    labels[:] = [7, 3000, -1, 20]
    kernels = SoftmaxXent(on_hopper, logits, labels, subset=[7, 20, 31], ignore_class=-1)
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
    total, gradient = SoftmaxXent(on_hopper, predictions, targets, **options).reduced()
    check_error([total], exact.sum(), max(terms, np.abs(exact).max()) * 3, 2**-23, "sum")
    check_error(gradient, exact_gradient, gradient_terms, EPSILONS[dtype], "gradient")


@pytest.mark.parametrize("classes", [310, 520, 1000])
def test_tiles_of_many_rows_fit_an_old_gpu(emulator, classes):
    emulator.emulate(ctypes.c_int64(OLD[0]), OLD[1], False)
    rng = np.random.default_rng(7)
    logits, labels = logits_and_labels(rng, (9000, classes))
    exact, _ = truth.softmax_xent(logits[:50], labels[:50])
    loss, _ = SoftmaxXent(emulator, logits, labels).general(np.ones(9000, np.float32))
    np.testing.assert_allclose(loss[:50], exact.astype(np.float64), rtol=1e-6)


def test_negative_probabilities_have_shares_too(on_hopper):
    predictions = -np.ones((2, 4), np.float32)
    targets = np.eye(4, dtype=np.float32)[:2]
    kernels = SoftmaxXent(on_hopper, predictions, targets, from_logits=False)
    loss, _ = kernels.general(np.ones(2, np.float32))
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)


@pytest.mark.parametrize("classes", [10, 1000, 5000, 40000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_row(on_hopper, classes, value):
    rng = np.random.default_rng(3)
    logits, labels = logits_and_labels(rng, (3, classes))
    labels[:] = 0
    logits[1, classes - 1] = value
    loss, gradient = SoftmaxXent(on_hopper, logits, labels).general(np.ones(3, np.float32))
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
    total, _ = SoftmaxXent(on_hopper, logits, labels).reduced(weights)
    largest = np.abs(exact * weights).sum()
    check_error([total], (exact * weights).sum(), largest, EPSILONS["float32"], "sum")


# ---- The pointwise losses.

KINDS = {  # in the order of the enum
    "huber": ("huber", "delta", {}),
    "squared": ("mean_squared_error", None, {}),
    "absolute": ("mean_absolute_error", None, {}),
    "log cosh": ("log_cosh", None, {}),
    "quantile": ("quantile", "quantile", {}),
    "logits": ("binary_crossentropy", "label_smoothing", {"from_logits": True}),
    "probabilities": ("binary_crossentropy", "label_smoothing", {"from_logits": False}),
}
POINTWISE_FACTORS = {
    # Rows of one lane to 32, of whole tiles and of blocks of their own, aligned and not; more than
    # a tile of elements.
    "shape": [
        (1, 1), (300, 1), (3, 2), (37, 10), (500, 3), (16, 32), (5, 33), (9, 101), (70, 128),
        (5, 1000), (3, 4100), (2, 9001), (8191, 2), (1, 20000), (2, 32768),
    ],
    "dtype": DTYPES,
    "kind": list(KINDS),
    "targets": ["own", "sums", "one a row"],
    "output_weights": [False, True],
    "quantiles": [False, True],
    "row_weight": [False, True],
    "parameter": [0.1, 0.7],
    "offset": [0, 0, 1],
    "runs_backwards": [False, True],
}  # fmt: skip


def pointwise_case(rng, shape, dtype, kind, targets="own"):
    """Predictions and targets of the kind, away from its corners."""
    numpy_dtype = tf.as_dtype(dtype).as_numpy_dtype
    binary = kind in ("logits", "probabilities")
    y = rng.random((shape[0], 1) if targets == "one a row" else shape)
    y = np.round(y) if binary else 3 * y
    y = y.astype(numpy_dtype if targets == "own" else sums_dtype(dtype))
    if kind == "probabilities":
        return rng.uniform(0.01, 0.99, shape).astype(numpy_dtype), y
    scale = np.exp(rng.uniform(-4, 1, shape))
    p = scale * rng.normal(size=shape) * (3 if kind == "logits" else 1)
    return (p if binary else y.astype("float64") + p).astype(numpy_dtype), y


class Pointwise:
    """One case of pointwise on the emulated GPU."""

    def __init__(
        self, emulator, kind, p, y, *, parameter=0.5, output_weights=None, quantiles=None, offset=0
    ):
        self._emulator, self._arrays = emulator, Arrays(offset)
        self._dtype, self._sums = p.dtype, sums_dtype(p.dtype)
        self._rows, self._outputs = p.shape
        self._wide_targets = y.dtype != p.dtype

        def given(values):
            return None if values is None else self._arrays.place(values.astype(self._sums))

        self._arguments = PointwiseArguments(
            rows=self._rows,
            outputs=self._outputs,
            one_target_a_row=y.shape[1] == 1 != p.shape[1],
            kind=list(KINDS).index(kind),
            parameter=parameter,
            epsilon=truth.EPSILON,
            predictions=self._arrays.place(p),
            targets=self._arrays.place(y),
            output_weights=given(output_weights),
            quantiles=given(quantiles),
        )

    def _run(self, op, **arguments):
        for name, value in arguments.items():
            setattr(self._arguments, name, value)
        error = self._emulator.run_pointwise(
            op, DTYPES.index(str(self._dtype)), self._wide_targets, ctypes.byref(self._arguments)
        )
        assert error is None, error
        self._arrays.check_guards()

    def _gradient(self):
        return self._arrays.output(self._rows * self._outputs, self._dtype)

    def general(self, dloss):
        """The loss of every row, and the gradient for the cotangents, by two ops."""
        loss, gradient = self._arrays.output(self._rows, self._sums), self._gradient()
        self._run(FORWARD, loss=loss.ctypes.data)
        self._run(BACKWARD, dloss=self._arrays.place(dloss), gradient=gradient.ctypes.data)
        return loss, gradient.reshape(self._rows, self._outputs)

    def reduced(self, row_weight=None, scale=1.0):
        """The weighted sum of the losses times scale, and its gradient, by one op."""
        loss, gradient = self._arrays.output(1, self._sums), self._gradient()
        self._run(
            REDUCED,
            row_weight=None if row_weight is None else self._arrays.place(row_weight),
            scale=scale,
            loss=loss.ctypes.data,
            gradient=gradient.ctypes.data,
        )
        return loss[0], gradient.reshape(self._rows, self._outputs)


def _is_possible_pointwise(values):
    case = dict(zip(POINTWISE_FACTORS, values, strict=False))
    return case.get("kind", "quantile") == "quantile" or not case.get("quantiles", False)


@pytest.mark.parametrize(
    "values",
    list(AllPairs(list(POINTWISE_FACTORS.values()), filter_func=_is_possible_pointwise)),
)
def test_every_pointwise_form_agrees_with_the_truth(emulator, values):
    case = dict(zip(POINTWISE_FACTORS, values, strict=True))
    rng = np.random.default_rng(zlib.crc32(repr(values).encode()))
    emulator.emulate(ctypes.c_int64(OLD[0]), OLD[1], case["runs_backwards"])
    (rows, outputs), dtype, sums = case["shape"], case["dtype"], sums_dtype(case["dtype"])
    p, y = pointwise_case(rng, case["shape"], dtype, case["kind"], case["targets"])
    function, name, arguments = KINDS[case["kind"]]
    options = {"parameter": case["parameter"], "offset": case["offset"]}
    arguments = {**arguments, **({name: case["parameter"]} if name else {})}
    if case["output_weights"]:
        weights = rng.uniform(0.5, 2, outputs).astype(sums)
        weights[:: 3 if outputs > 1 else 2] = 0
        p[:, weights == 0] = np.nan
        options["output_weights"] = arguments["output_weights"] = weights
    if case["quantiles"]:
        options["quantiles"] = arguments["quantile"] = rng.uniform(0.1, 0.9, outputs).astype(sums)
    exact, exact_gradient, terms, gradient_terms = truth.pointwise(function, p, y, **arguments)
    epsilon, sums_epsilon = EPSILONS[dtype], EPSILONS[str(sums)]
    cotangents = rng.normal(size=rows).astype(sums)
    spread = np.abs(cotangents).max()
    kernels = Pointwise(emulator, case["kind"], p, y, **options)

    loss, gradient = kernels.general(cotangents)
    check_error(loss, exact, terms, sums_epsilon, "loss")
    pulled = exact_gradient * cotangents[:, None].astype(np.longdouble)
    check_error(
        gradient, pulled, gradient_terms * spread * sums_epsilon / epsilon, epsilon, "gradient"
    )

    row_weight = cotangents if case["row_weight"] else None
    weight = cotangents.astype(np.longdouble) if case["row_weight"] else np.ones(rows)
    total, fused = kernels.reduced(row_weight, scale=0.5)
    largest = np.abs(weight * exact).sum() + terms * np.abs(weight).sum()
    check_error([total], 0.5 * (exact * weight).sum(), largest, sums_epsilon, "sum")
    spread = np.abs(weight).max()
    pulled = 0.5 * exact_gradient * weight[:, None]
    check_error(
        fused, pulled, gradient_terms * spread * sums_epsilon / epsilon, epsilon, "gradient of sum"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pointwise_nan_and_inf_stay_where_they_are(on_hopper, kind, flat, value):
    rng = np.random.default_rng(8)
    p, y = pointwise_case(rng, (4, 9), "float32", kind)
    p[1, 7] = value
    kernels = Pointwise(on_hopper, kind, p, y)
    loss, gradient = kernels.general(np.ones(4, np.float32))
    total, fused = kernels.reduced(None if flat else np.ones(4, np.float32))
    others = np.ones((4, 9), bool)
    others[1, 7] = False
    assert np.isfinite(loss[[0, 2, 3]]).all()
    for found in (gradient, fused):
        assert np.isfinite(found[others]).all()
    if np.isnan(value):
        assert np.isnan([loss[1], total, gradient[1, 7], fused[1, 7]]).all()
    elif kind == "probabilities":  # clipped
        assert np.isfinite(total) and gradient[1, 7] == fused[1, 7] == 0
    else:
        assert not np.isfinite(loss[1]) or kind == "logits"
        bounded = kind in ("huber", "absolute", "log cosh", "quantile", "logits")
        assert np.isfinite(gradient[1, 7]) == np.isfinite(fused[1, 7]) == bounded


@pytest.mark.parametrize("kind", ["log cosh", "logits"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_losses_keep_their_digits(on_hopper, kind, dtype):
    size = np.exp(np.linspace(np.log(1e-6), np.log(30), 2000))[:, None].astype(dtype)
    y = np.zeros_like(size)
    p = -size if kind == "logits" else size
    function, _, arguments = KINDS[kind]
    exact, exact_gradient, *_ = truth.pointwise(function, p, y, **arguments)
    loss, gradient = Pointwise(on_hopper, kind, p, y, parameter=0).general(
        np.ones(len(p), np.dtype(dtype))
    )
    # e^x itself errs by |x|/2 ulp more.
    rtol = 16 * EPSILONS[dtype]
    np.testing.assert_allclose(loss, exact.astype(np.float64), rtol=rtol)
    np.testing.assert_allclose(gradient, exact_gradient.astype(np.float64), rtol=rtol)


@pytest.mark.parametrize("shape", [(0, 7), (0, 0), (5, 0)])
def test_no_rows_and_no_outputs_have_loss_0(on_hopper, shape):
    empty = np.zeros(shape, np.float32)
    kernels = Pointwise(on_hopper, "huber", empty, empty)
    loss, gradient = kernels.general(np.ones(shape[0], np.float32))
    assert (loss == 0).all() and gradient.shape == shape
    total, _ = kernels.reduced(scale=np.inf)
    assert total == 0


@pytest.mark.long
def test_more_tiles_than_sums(on_hopper):
    rng = np.random.default_rng(9)
    p = rng.normal(size=(9_000_000, 1))
    total, gradient = Pointwise(on_hopper, "squared", p, np.zeros_like(p)).reduced()
    np.testing.assert_allclose(total, (p * p).sum(), rtol=1e-12)
    np.testing.assert_array_equal(gradient, 2 * p)


# ---- The penalty.


def penalty(emulator, arrays, coefficients, *, dpenalty=None, value=True, gradients=True, offset=0):
    """Penalty and gradients of the arrays, None for what is not asked for."""
    memory = Arrays(offset)
    sums = np.dtype("float64" if any(a.dtype == np.float64 for a in arrays) else "float32")
    variables, found = (PenaltyVariable * max(1, len(arrays)))(), []
    for variable, array in zip(variables, arrays, strict=False):
        found.append(memory.output(array.size, array.dtype) if gradients else None)
        variable.type = DTYPES.index(str(array.dtype))
        variable.size = array.size
        variable.values = memory.place(array)
        variable.gradient = found[-1].ctypes.data if gradients else None
    total = memory.output(1, sums)
    coefficients = np.ascontiguousarray(coefficients, np.float64)
    arguments = PenaltyArguments(
        variables=variables,
        count=len(arrays),
        coefficients=coefficients.ctypes.data,
        dpenalty=None if dpenalty is None else memory.place(np.array([dpenalty], sums)),
        penalty=total.ctypes.data if value else None,
    )
    error = emulator.run_penalty(sums == np.float64, ctypes.byref(arguments))
    assert error is None, error
    memory.check_guards()
    return total[0] if value else None, found


def _variables(rng, sizes, dtypes):
    return [
        rng.normal(size=size).astype(tf.as_dtype(dtypes[k % len(dtypes)]).as_numpy_dtype)
        for k, size in enumerate(sizes)
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        [1], [4096], [100_003], [5, 70_000], [0, 3, 0, 4097, 0], [16] * 200,
        [*range(1, 60), 20_000, 0, 8192, 33],
    ],
    ids=["1", "tile", "large", "two", "empty ones", "200", "many"],
)  # fmt: skip
@pytest.mark.parametrize("dtypes", [[dtype] for dtype in DTYPES] + [DTYPES], ids=[*DTYPES, "mixed"])
@pytest.mark.parametrize("offset", [0, 1])
def test_the_penalty_agrees_with_the_truth(on_hopper, sizes, dtypes, offset):
    rng = np.random.default_rng(len(sizes))
    arrays = _variables(rng, sizes, dtypes)
    l1, l2 = rng.uniform(0, 2, (2, len(sizes)))
    l1[::3], l2[1::3] = 0, 0
    exact, exact_gradients = truth.penalty(arrays, l1=l1, l2=l2)
    coefficients = np.stack([l1, l2], axis=1)
    total, found = penalty(on_hopper, arrays, coefficients, dpenalty=-0.5, offset=offset)
    epsilon = 2**-52 if dtypes == ["float64"] else 2**-23
    check_error([total], exact, 0, epsilon, "penalty")
    for array, gradient, right in zip(arrays, found, exact_gradients, strict=True):
        check_error(gradient, -0.5 * right, 0, EPSILONS[str(array.dtype)], "gradient")
    alone, _ = penalty(on_hopper, arrays, coefficients, gradients=False, offset=offset)
    assert alone == total
    _, again = penalty(on_hopper, arrays, coefficients, dpenalty=-0.5, value=False, offset=offset)
    for gradient, same in zip(found, again, strict=True):
        np.testing.assert_array_equal(gradient, same)


def test_the_penalty_of_nothing_is_0(on_hopper):
    assert penalty(on_hopper, [], np.zeros((0, 2)))[0] == 0
    assert penalty(on_hopper, [np.zeros(0, np.float32)], [[1, 1]])[0] == 0


@pytest.mark.parametrize("coefficients", [[1, 0], [0, 1], [1, 1], [0, 0]])
def test_a_term_without_coefficient_makes_no_nan(on_hopper, coefficients):
    wanted = any(coefficients)
    values = np.array([1, -np.inf, 0, -0.0, np.nan], np.float32)
    total, (gradient,) = penalty(on_hopper, [values[:4]], [coefficients])
    assert np.isinf(total) if wanted else total == 0
    assert gradient[2] == gradient[3] == 0 and not np.isnan(gradient).any()
    total, (gradient,) = penalty(on_hopper, [values], [coefficients])
    assert np.isnan(total) == np.isnan(gradient[4]) == wanted
