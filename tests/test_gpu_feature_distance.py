"""The CUDA kernels of feature distances, run on a CPU as in test_gpu_kernels.py."""

import ctypes
import zlib

import numpy as np
import pytest
import tensorflow as tf
from allpairspy import AllPairs

import test_gpu_kernels as gpu
import truth

emulator, on_hopper = gpu.emulator, gpu.on_hopper
METRICS = ["mse", "mae", "charbonnier", "cosine", "lpips"]  # in the order of the enum
EPSILONS = {"charbonnier": 1e-3, "cosine": 1e-12, "lpips": 1e-10}
REFERENCES = ["target", "one target", "first"]

FACTORS = {
    # Rows, and the positions and channels of a layer each: teams of 1 to 32 lanes with one, two and
    # four vectors each, and more than they hold; channels in no vectors; few units and many;
    # channels of one position and of many; several layers, of which some are empty.
    "shape": [
        (1, (1, 1)), (2, (1, 1)), (3, (5, 7)), (700, (1, 3)), (37, (1, 8)), (2, (300, 3)),
        (5, (6, 16)), (9, (2, 24)), (4, (33, 64)), (3, (9, 96)), (2, (7, 192)), (3, (5, 256)),
        (2, (3, 512)), (2, (3, 1024)), (2, (2, 1032)), (2, (2, 2500)), (40, (3, 32)), (3, (0, 8)),
        (2, (70, 5), (20, 64), (4, 200)), (3, (2, 9), (0, 4), (6, 32), (3, 0), (1, 16)),
        (0, (4, 8), (2, 3)),
    ],
    "metric": METRICS,
    "reference": REFERENCES,
    "dtype": gpu.DTYPES,
    "channels_last": [True, False],
    "channel_weights": [False, True],
    "dtargets": [False, True],
    "row_weight": [False, True],
    "epsilon_in_root": [True, False],
    "offset": [0, 0, 1],
    "runs_backwards": [False, True],
}  # fmt: skip


class FeatureLayerArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("positions", "channels", "reference")),
        *((name, ctypes.c_void_p) for name in (
            "predictions", "targets", "channel_weights", "dpredictions", "dtargets",
        )),
    ]  # fmt: skip


class FeatureDistanceArguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "rows", "count", "metric", "channels_last", "epsilon_in_root",
        )),
        *((name, ctypes.c_double) for name in ("epsilon", "scale")),
        ("layers", ctypes.POINTER(FeatureLayerArguments)),
        *((name, ctypes.c_void_p) for name in ("layer_weights", "dloss", "row_weight", "loss")),
    ]  # fmt: skip


class FeatureDistance:
    """One case of feature_distance on the emulated GPU.

    `targets` are None under "first", and have one row where all examples share them.
    """

    def __init__(
        self, emulator, metric, predictions, targets, *, channels_last=True, channel_weights=None,
        layer_weights=None, epsilon=None, epsilon_in_root=True, dtargets=False, offset=0,
    ):  # fmt: skip
        self._emulator, self._arrays = emulator, gpu.Arrays(offset)
        self._predictions, self._targets = predictions, targets
        self._wants_dtargets = dtargets and targets is not None
        self._dtype, self._rows = predictions[0].dtype, len(predictions[0])
        self._sums = gpu.sums_dtype(self._dtype)
        self._layers = (FeatureLayerArguments * len(predictions))()
        for k, layer in enumerate(self._layers):
            shape = predictions[k].shape[1:]
            layer.positions, layer.channels = shape if channels_last else shape[::-1]
            layer.predictions = self._arrays.place(predictions[k])
            if targets is None:
                layer.reference = REFERENCES.index("first")
            else:
                layer.targets = self._arrays.place(targets[k])
                layer.reference = len(targets[k]) == 1 != self._rows
            if channel_weights is not None:
                layer.channel_weights = self._arrays.place(channel_weights[k].astype(self._sums))
        if layer_weights is None:
            layer_weights = np.ones(len(predictions))
        self._layer_weights = np.asarray(layer_weights, np.float64)
        self._arguments = FeatureDistanceArguments(
            rows=self._rows,
            count=len(predictions),
            metric=METRICS.index(metric),
            channels_last=channels_last,
            epsilon_in_root=epsilon_in_root,
            epsilon=EPSILONS.get(metric, 0) if epsilon is None else epsilon,
            layers=self._layers,
            layer_weights=self._layer_weights.ctypes.data,
        )

    def _run(self, op, **arguments):
        for name, value in arguments.items():
            setattr(self._arguments, name, value)
        error = self._emulator.run_feature_distance(
            op, gpu.DTYPES.index(str(self._dtype)), ctypes.byref(self._arguments)
        )
        assert error is None, error
        self._arrays.check_guards()

    def _gradients(self):
        """New outputs: those of the predictions, and those of the targets."""

        def outputs(name, arrays):
            found = []
            for layer, array in zip(self._layers, arrays, strict=True):
                output = self._arrays.output(array.size, self._dtype)
                setattr(layer, name, output.ctypes.data)
                found.append(output.reshape(array.shape))
            return found

        dtargets = outputs("dtargets", self._targets) if self._wants_dtargets else []
        return outputs("dpredictions", self._predictions), dtargets

    def loss(self):
        loss = self._arrays.output(self._rows, self._sums)
        self._run(gpu.FORWARD, loss=loss.ctypes.data)
        return loss

    def gradients(self, dloss):
        """Those of the predictions, and those of the targets, for the cotangents."""
        found = self._gradients()
        self._run(gpu.BACKWARD, dloss=self._arrays.place(dloss))
        return found

    def reduced(self, row_weight=None, scale=1.0):
        """The weighted sum of the losses times scale, and its gradients, by one op."""
        loss, found = self._arrays.output(1, self._sums), self._gradients()
        self._run(
            gpu.REDUCED,
            row_weight=None if row_weight is None else self._arrays.place(row_weight),
            scale=scale,
            loss=loss.ctypes.data,
        )
        return loss[0], *found


def features(rng, shape, dtype, channels_last=True, reference="target"):
    """Predictions and targets, of the shape's layers; targets are None under "first"."""
    rows, *layers = shape
    numpy_dtype = tf.as_dtype(dtype).as_numpy_dtype

    def normal(rows, positions, channels):
        size = (positions, channels) if channels_last else (channels, positions)
        return rng.normal(size=(rows, *size)).astype(numpy_dtype)

    predictions = [normal(rows, *layer) for layer in layers]
    if reference == "first":
        return predictions, None
    return predictions, [
        normal(1 if reference == "one target" else rows, *layer) for layer in layers
    ]


def with_dimensions(arrays, channels_last):
    """The maps as images of one line, as the truth takes them."""
    return [array[:, None] if channels_last else array[:, :, None] for array in arrays]


@pytest.mark.parametrize("values", list(AllPairs(list(FACTORS.values()))))
def test_every_form_agrees_with_the_truth(emulator, values):
    case = dict(zip(FACTORS, values, strict=True))
    check_form(emulator, case, np.random.default_rng(zlib.crc32(repr(values).encode())))


def check_form(emulator, case, rng):
    emulator.emulate(ctypes.c_int64(gpu.HOPPER[0]), gpu.HOPPER[1], case["runs_backwards"])
    shape, dtype, metric = case["shape"], case["dtype"], case["metric"]
    channels_last, reference = case["channels_last"], case["reference"]
    sums = gpu.sums_dtype(dtype)
    predictions, targets = features(rng, shape, dtype, channels_last, reference)
    weights = None
    if case["channel_weights"]:
        weights = [rng.uniform(0.5, 2, channels).astype(sums) for _, channels in shape[1:]]
        for of_layer in weights:
            of_layer[1::3] = 0
    layer_weights = rng.uniform(0.5, 2, len(shape) - 1)
    cotangents = rng.normal(size=shape[0]).astype(sums)
    epsilon_in_root = case["epsilon_in_root"] or metric != "lpips"
    options = {"channel_weights": weights, "layer_weights": layer_weights}

    def exact(cotangents):
        return truth.feature_distance(
            with_dimensions(predictions, channels_last),
            with_dimensions(targets or [], channels_last),
            cotangents,
            metric=metric,
            reference="first" if reference == "first" else "target",
            data_format="channels_last" if channels_last else "channels_first",
            epsilon_in_root=epsilon_in_root,
            **options,
        )

    kernels = FeatureDistance(
        emulator, metric, predictions, targets, channels_last=channels_last,
        epsilon_in_root=epsilon_in_root, dtargets=case["dtargets"], offset=case["offset"],
        **options,
    )  # fmt: skip
    epsilon, sums_epsilon = gpu.EPSILONS[dtype], gpu.EPSILONS[str(sums)]

    def check_gradients(found, right, terms, what):
        for k, (ours, theirs, largest) in enumerate(zip(found, right, terms, strict=True)):
            allowed = largest * sums_epsilon / epsilon
            gpu.check_error(ours.ravel(), theirs.ravel(), allowed, epsilon, f"{what} {k}")

    right, dpredictions, dtargets, terms, gradient_terms = exact(cotangents)
    gpu.check_error(kernels.loss(), right, terms, sums_epsilon, "loss")
    found = kernels.gradients(cotangents)
    check_gradients(found[0], dpredictions, gradient_terms, "gradient")
    if found[1]:
        check_gradients(found[1], dtargets, gradient_terms, "gradient in targets")

    row_weight = cotangents if case["row_weight"] else None
    scales = 0.5 * (cotangents if case["row_weight"] else np.ones(shape[0], sums))
    _, dpredictions, dtargets, _, gradient_terms = exact(scales)
    total, *found = kernels.reduced(row_weight, scale=0.5)
    largest = np.abs(scales * right).sum() + terms * np.abs(scales).sum()
    gpu.check_error([total], (right * scales).sum(), largest, sums_epsilon, "sum")
    check_gradients(found[0], dpredictions, gradient_terms, "gradient of the sum")
    if found[1]:
        check_gradients(found[1], dtargets, gradient_terms, "gradient of the sum in targets")


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("metric", METRICS)
def test_many_layers_and_ranges_of_rows(on_hopper, metric, reference):
    case = {
        "shape": (30, *[(1 + k % 3, 4 + k % 7) for k in range(70)], (4, 64)),
        "metric": metric, "reference": reference, "dtype": "float32", "channels_last": True,
        "channel_weights": True, "dtargets": True, "row_weight": True, "epsilon_in_root": True,
        "offset": 0, "runs_backwards": True,
    }  # fmt: skip
    check_form(on_hopper, case, np.random.default_rng(10))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_layers_with_one_target_and_with_their_own_add_up(on_hopper, metric, channels_last):
    rng = np.random.default_rng(11)
    predictions, targets = features(rng, (6, (3, 8), (5, 4)), "float64", channels_last)
    targets[1] = targets[1][:1]
    row_weight = rng.normal(size=6)
    loss, dpredictions, dtargets, *_ = truth.feature_distance(
        with_dimensions(predictions, channels_last),
        with_dimensions(targets, channels_last),
        row_weight,
        metric=metric,
        data_format="channels_last" if channels_last else "channels_first",
    )
    kernels = FeatureDistance(
        on_hopper, metric, predictions, targets, channels_last=channels_last, dtargets=True
    )
    total, *found = kernels.reduced(row_weight)
    np.testing.assert_allclose(kernels.loss(), loss.astype(np.float64), rtol=1e-12)
    np.testing.assert_allclose(total, float((loss * row_weight).sum()), rtol=1e-12)
    for ours, theirs in zip(found[0] + found[1], dpredictions + dtargets, strict=True):
        right = theirs.reshape(ours.shape).astype(np.float64)
        np.testing.assert_allclose(ours, right, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize(
    ("metric", "epsilon_in_root"), [*((metric, True) for metric in METRICS), ("lpips", False)]
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_features_of_0_have_finite_gradients(on_hopper, metric, epsilon_in_root, channels_last):
    rng = np.random.default_rng(12)
    predictions, targets = features(rng, (4, (6, 8)), "float32", channels_last)
    positions = (lambda x: x[0]) if channels_last else (lambda x: np.moveaxis(x[0], 1, 2))
    positions(predictions)[0] = positions(predictions)[1, 2] = 0
    positions(targets)[0, :3] = positions(targets)[2, 1] = 0
    row_weight = rng.normal(size=4).astype(np.float32)
    _, dpredictions, _, _, (terms,) = truth.feature_distance(
        with_dimensions(predictions, channels_last),
        with_dimensions(targets, channels_last),
        row_weight,
        metric=metric,
        data_format="channels_last" if channels_last else "channels_first",
        epsilon_in_root=epsilon_in_root,
    )
    kernels = FeatureDistance(
        on_hopper, metric, predictions, targets, channels_last=channels_last,
        epsilon_in_root=epsilon_in_root,
    )  # fmt: skip
    total, (gradient,), _ = kernels.reduced(row_weight)
    assert np.isfinite(total) and np.isfinite(gradient).all()
    gpu.check_error(gradient.ravel(), dpredictions[0].ravel(), terms, 2**-23, "gradient")


@pytest.mark.parametrize("metric", ["mse", "mae", "lpips"])
@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_equal_features_have_distance_0_and_gradient_0(on_hopper, metric, dtype, channels_last):
    predictions, _ = features(np.random.default_rng(13), (3, (5, 72)), dtype, channels_last)
    kernels = FeatureDistance(
        on_hopper, metric, predictions, predictions, channels_last=channels_last, dtargets=True
    )
    total, (gradient,), (dtargets,) = kernels.reduced()
    assert total == 0 and (kernels.loss() == 0).all()
    assert (gradient == 0).all() and (dtargets == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_first_example_alone_has_distance_0(on_hopper, metric, channels_last):
    predictions, _ = features(np.random.default_rng(14), (1, (5, 8)), "float32", channels_last)
    kernels = FeatureDistance(on_hopper, metric, predictions, None, channels_last=channels_last)
    total, (gradient,), _ = kernels.reduced()
    assert total == 0 and kernels.loss() == [0] and (gradient == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_example(on_hopper, metric, channels_last, value):
    predictions, targets = features(
        np.random.default_rng(15), (4, (5, 24)), "float32", channels_last
    )
    predictions[0][2, 3, 1] = value
    kernels = FeatureDistance(
        on_hopper, metric, predictions, targets, channels_last=channels_last, dtargets=True
    )
    loss, others = kernels.loss(), [0, 1, 3]
    (gradient,), (dtargets,) = kernels.gradients(np.ones(4, np.float32))
    assert np.isfinite(loss[others]).all() and not np.isfinite(loss[2])
    assert np.isfinite(gradient[others]).all() and np.isfinite(dtargets[others]).all()
    if np.isnan(value):
        assert np.isnan(loss[2]) and np.isnan(gradient[2, 3, 1]) and np.isnan(dtargets[2, 3, 1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("layer", [(0, 8), (3, 0), (0, 0)])
def test_no_positions_and_no_channels_have_distance_0(on_hopper, metric, layer):
    for rows, reference in ((3, "target"), (3, "one target"), (3, "first"), (0, "target")):
        arrays = features(np.random.default_rng(16), (rows, layer), "float32", True, reference)
        kernels = FeatureDistance(on_hopper, metric, *arrays, dtargets=True)
        assert (kernels.loss() == 0).all() and kernels.reduced(scale=2.0)[0] == 0


def test_without_rows_the_gradient_in_one_target_is_0(on_hopper):
    predictions, targets = features(
        np.random.default_rng(17), (0, (3, 8)), "float32", True, "one target"
    )
    kernels = FeatureDistance(on_hopper, "lpips", predictions, targets, dtargets=True)
    total, _, (dtargets,) = kernels.reduced(scale=np.inf)
    assert total == 0 and (dtargets == 0).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reference", REFERENCES)
def test_memory_that_is_not_aligned_gives_the_same(on_hopper, metric, reference):
    arrays = features(np.random.default_rng(18), (5, (7, 40)), "float64", True, reference)
    results = []
    for offset in (0, 1):
        kernels = FeatureDistance(on_hopper, metric, *arrays, dtargets=True, offset=offset)
        total, dpredictions, dtargets = kernels.reduced()
        results.append([kernels.loss(), total, *dpredictions, *dtargets])
    for aligned, moved in zip(*results, strict=True):
        np.testing.assert_allclose(aligned, moved, rtol=1e-11, atol=1e-15)
