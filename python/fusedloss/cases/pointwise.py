"""Huber loss and its family, as they are benchmarked."""

import keras
import numpy as np
import tensorflow as tf

import fusedloss
from fusedloss import losses
from fusedloss.cases._case import Case, Goal, Setting, itemsize, size

OUTPUT_WEIGHTS = (0.8, 1.2)
KERNELS, KERNEL_SIZE, L2 = 8, 1024, 0.01


def _sample(rng, shape, dtype):
    targets = rng.standard_normal(shape, dtype=np.float32)
    # Errors on both sides of the Huber loss's delta, 1.
    predictions = targets + 1.5 * rng.standard_normal(shape, dtype=np.float32)
    return tf.cast(targets, dtype), tf.cast(predictions, dtype)


def _truth_huber(targets, predictions):
    error = predictions.astype(np.float64) - targets
    slope = np.clip(error, -1, 1)
    return (slope * (error - slope / 2)).mean(), slope / error.size


def _elementwise(name, title, fused, stock, truth, settings, sample=_sample, **weights):
    kernels = KERNELS * KERNEL_SIZE**2 if weights else 0

    def bytes_moved(arrays):
        return lambda shape, dtype: (arrays * size(shape) + kernels) * itemsize(dtype)

    return Case(
        name=name,
        title=title,
        rank=2,
        dtypes=("float32", "float64", "bfloat16"),
        settings=settings,
        sample=sample,
        fused=fused,
        stock=stock,
        truth=truth,
        raw=None,
        bytes_read=bytes_moved(2),
        bytes_written=bytes_moved(1),
        **weights,
    )


HUBER = _elementwise(
    "pointwise/huber",
    "Huber",
    fused=lambda shape, _: losses.Huber(),
    stock=lambda shape, _: {"Keras": keras.losses.Huber()},
    truth=_truth_huber,
    settings=(
        Setting((4096, 8192), goal=Goal(graph=8, xla=1.6, floor=1.2)),
        Setting((1024, 1024), goal=Goal(graph=6, xla=1.5)),
        Setting((262144, 1), goal=Goal(graph=2, xla=1.2)),
    ),
)


# With a penalty on weights.


def _kernels(rng, shape, dtype):
    shape = (KERNEL_SIZE, KERNEL_SIZE)
    kernels = [rng.standard_normal(shape, dtype=np.float32) for _ in range(KERNELS)]
    return [tf.Variable(tf.cast(kernel, dtype)) for kernel in kernels]


def _penalized_huber(huber):
    """As it is written without a fused penalty."""
    return lambda kernels: (
        lambda targets, predictions: (
            huber(targets, predictions)
            + L2 * tf.add_n([tf.reduce_mean(tf.square(kernel)) for kernel in kernels])
        )
    )


PENALIZED = _elementwise(
    "pointwise/huber_penalty",
    f"Huber + L2 mean over {KERNELS} kernels of {KERNEL_SIZE}²",
    fused=lambda shape, kernels: losses.Huber(
        penalty=fusedloss.Penalty(lambda: kernels, l2=L2, reduce="mean")
    ),
    stock=lambda shape, kernels: {"Keras": _penalized_huber(keras.losses.Huber())(kernels)},
    truth=_truth_huber,
    settings=(Setting((4096, 8192), goal=Goal(graph=8, xla=1.8, floor=1.3)),),
    weights=_kernels,
    penalty_truth=lambda kernel: (
        L2 * np.square(kernel.astype(np.float64)).mean(),
        2 * L2 * kernel.astype(np.float64) / kernel.size,
    ),
)


# Binary cross-entropy.


def _sample_binary(rng, shape, dtype):
    targets = rng.integers(0, 2, shape).astype(np.float32)
    logits = 2 * rng.standard_normal(shape, dtype=np.float32)
    return tf.cast(targets, dtype), tf.cast(logits, dtype)


def _truth_binary(targets, logits):
    logits = logits.astype(np.float64)
    power = np.exp(-np.abs(logits))
    nats = np.maximum(logits, 0) - logits * targets + np.log1p(power)
    sigmoid = np.where(logits < 0, power, 1) / (1 + power)
    return nats.mean(), (sigmoid - targets) / logits.size


BINARY = _elementwise(
    "pointwise/binary_crossentropy",
    "binary cross-entropy, logits",
    fused=lambda shape, _: losses.BinaryCrossentropy(from_logits=True),
    stock=lambda shape, _: {"Keras": keras.losses.BinaryCrossentropy(from_logits=True)},
    truth=_truth_binary,
    settings=(Setting((4096, 8192), goal=Goal(graph=8, xla=1.5, floor=1.6)),),
    sample=_sample_binary,
)


# Weights of the outputs.


def _weighted_stock(shape, _):
    weights = np.resize(np.float32(OUTPUT_WEIGHTS), shape[-1])

    def by_hand(targets, predictions):
        return tf.reduce_mean(tf.cast(weights, predictions.dtype) * (predictions - targets) ** 2)

    return {"by hand": by_hand}


def _truth_weighted(targets, predictions):
    weights = np.resize(OUTPUT_WEIGHTS, predictions.shape[-1])
    error = predictions.astype(np.float64) - targets
    return (weights * error**2).mean(), 2 * weights * error / error.size


WEIGHTED = _elementwise(
    "pointwise/weighted_squared",
    "squared error, a weight an output",
    fused=lambda shape, _: losses.MeanSquaredError(
        output_weights=np.resize(OUTPUT_WEIGHTS, shape[-1])
    ),
    stock=_weighted_stock,
    truth=_truth_weighted,
    settings=(Setting((32, 2), goal=Goal(graph=1, xla=1)),),
)

CASES = (HUBER, PENALIZED, BINARY, WEIGHTED)
