"""Distances of feature maps, as they are benchmarked."""

import keras
import numpy as np
import tensorflow as tf

from fusedloss import losses
from fusedloss.cases._case import Case, Goal, Setting, itemsize, size

EPSILON = 1e-10
# Where LPIPS takes the features of VGG16: channels, and how often the image was halved before.
VGG16 = ((64, 0), (128, 1), (256, 2), (512, 3), (512, 4))


def _features(rng, shape, dtype):
    """Two maps that are alike, as of a ReLU."""
    targets = rng.standard_normal(shape, dtype=np.float32)
    predictions = targets + 0.5 * rng.standard_normal(shape, dtype=np.float32)
    return tuple(tf.cast(np.maximum(x, 0), dtype) for x in (targets, predictions))


def _case(name, title, loss, stock, truth, settings, reads=2, **options):
    return Case(
        name=f"feature_distance/{name}",
        title=title,
        rank=len(settings[0].shape),
        dtypes=("float32", "float64", "bfloat16"),
        settings=settings,
        fused=lambda shape, _: loss(),
        stock=lambda shape, _: stock,
        truth=truth,
        raw=None,
        **{
            "sample": _features,
            "bytes_read": lambda shape, dtype: reads * size(shape) * itemsize(dtype),
            "bytes_written": lambda shape, dtype: size(shape) * itemsize(dtype),
            **options,
        },
    )


# LPIPS.


def _unit(features):
    return features / tf.sqrt(tf.reduce_sum(features**2, axis=-1, keepdims=True) + EPSILON)


def _lpips(targets, predictions):
    """The mean over the images, of one layer or the sum of several."""
    layers = zip(tf.nest.flatten(targets), tf.nest.flatten(predictions), strict=True)
    distances = [tf.reduce_sum((_unit(p) - _unit(t)) ** 2, axis=-1) for t, p in layers]
    return tf.add_n([tf.reduce_mean(distance) for distance in distances])


def _truth_lpips(targets, predictions):
    targets, predictions = targets.astype(np.float64), predictions.astype(np.float64)
    norms = [np.sqrt((x**2).sum(-1, keepdims=True) + EPSILON) for x in (targets, predictions)]
    unit = predictions / norms[1]
    error = unit - targets / norms[0]
    slope = 2 * (error - (error * unit).sum(-1, keepdims=True) * unit) / norms[1]
    positions = error[..., 0].size
    return (error**2).sum() / positions, slope / positions


def _vgg16_shapes(shape):
    """Of the maps of `shape[0]` images of so many pixels a side."""
    images, pixels = shape
    return [(images, pixels >> halved, pixels >> halved, c) for c, halved in VGG16]


def _sample_vgg16(rng, shape, dtype):
    return tuple(zip(*(_features(rng, map_, dtype) for map_ in _vgg16_shapes(shape)), strict=True))


def _vgg16_bytes(arrays):
    return lambda shape, dtype: arrays * itemsize(dtype) * sum(map(size, _vgg16_shapes(shape)))


LPIPS = _case(
    "lpips",
    "LPIPS",
    loss=lambda: losses.FeatureDistance(metric="lpips", epsilon=EPSILON),
    stock={"by hand": _lpips},
    truth=_truth_lpips,
    settings=(Setting((8, 56, 56, 256), goal=Goal(graph=5, xla=4, floor=1.5)),),
)

LAYERS = _case(
    "lpips_layers",
    "LPIPS over five layers of VGG16, so many images of so many pixels squared",
    loss=lambda: losses.FeatureDistance(metric="lpips", epsilon=EPSILON),
    stock={"by hand": _lpips},
    truth=_truth_lpips,
    settings=(Setting((4, 224), goal=Goal(graph=5, xla=3, floor=1.5)),),
    sample=_sample_vgg16,
    bytes_read=_vgg16_bytes(2),
    bytes_written=_vgg16_bytes(1),
)


# Squared error, to a target and to the first example.


def _truth_squared(targets, predictions):
    error = predictions.astype(np.float64) - targets
    return (error**2).mean(), 2 * error / error.size


SQUARED = _case(
    "mse",
    "squared error of features",
    loss=lambda: losses.FeatureDistance(metric="mse"),
    stock={"Keras": keras.losses.MeanSquaredError()},
    truth=_truth_squared,
    settings=(Setting((8, 56, 56, 256), goal=Goal(graph=2.5, xla=2, floor=1.3)),),
)


def _to_first(_, predictions):
    return tf.reduce_mean((predictions - predictions[:1]) ** 2)


def _truth_to_first(_, predictions):
    loss, gradient = _truth_squared(predictions[:1], predictions)
    gradient[0] = -gradient[1:].sum(0)
    return loss, gradient


FIRST = _case(
    "first",
    "squared error of features, to the first example",
    loss=lambda: losses.FeatureDistance(metric="mse", reference="first"),
    stock={"by hand": _to_first},
    truth=_truth_to_first,
    settings=(Setting((8, 56, 56, 256), goal=Goal(graph=4, xla=2, floor=1.5)),),
    reads=1,
    independent_rows=False,
)


# Cosine.


def _cosine():
    similarity = keras.losses.CosineSimilarity()
    return lambda targets, predictions: 1 + similarity(targets, predictions)


def _truth_cosine(targets, predictions):
    targets, predictions = targets.astype(np.float64), predictions.astype(np.float64)
    norms = [np.sqrt((x**2).sum(-1, keepdims=True)) for x in (targets, predictions)]
    unit, other = predictions / norms[1], targets / norms[0]
    cosine = (unit * other).sum(-1, keepdims=True)
    return (1 - cosine).mean(), (cosine * unit - other) / norms[1] / cosine.size


COSINE = _case(
    "cosine",
    "cosine distance",
    loss=lambda: losses.FeatureDistance(metric="cosine"),
    stock={"Keras": _cosine()},
    truth=_truth_cosine,
    settings=(Setting((32768, 512), goal=Goal(graph=5, xla=2, floor=1.5)),),
)

CASES = (LPIPS, LAYERS, SQUARED, FIRST, COSINE)
