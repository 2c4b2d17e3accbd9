"""Softmax cross-entropy, as it is benchmarked."""

import keras
import numpy as np
import tensorflow as tf

from fusedloss import losses
from fusedloss.cases._case import Case, Goal, Setting, itemsize, size

SUBSET_WEIGHT, FULL_WEIGHT = 0.8, 0.2


# Sparse labels, logits, all classes.


def _sample_sparse(rng, shape, dtype):
    labels = rng.integers(0, shape[-1], shape[:-1], dtype=np.int32)
    logits = rng.standard_normal(shape, dtype=np.float32)
    return tf.constant(labels), tf.cast(logits, dtype)


def _truth_sparse(labels, logits):
    logits = logits.astype(np.float64)
    rows = np.arange(len(labels))
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.exp(shifted).sum(-1, keepdims=True)
    loss = (np.log(total[:, 0]) - shifted[rows, labels]).mean()
    gradient = np.exp(shifted) / total
    gradient[rows, labels] -= 1
    return loss, gradient / len(labels)


def _raw_sparse(labels, logits):
    from fusedloss import _core  # there may be no compiled library: then this is not called

    if logits.dtype not in (np.float32, np.float64):
        return None
    labels, gradient = labels.astype(np.int64), np.empty_like(logits)
    return lambda: _core.softmax_xent_reduced(logits, labels, gradient)


SPARSE = Case(
    name="softmax_xent/sparse",
    title="sparse labels, logits",
    rank=2,
    dtypes=("float32", "float64", "float16", "bfloat16"),
    settings=(
        Setting((1024, 32000), goal=Goal(graph=7, xla=3, floor=1.35)),
        Setting((256, 128256), goal=Goal(graph=7, xla=3, floor=1.35)),
        Setting((4096, 1000), goal=Goal(graph=6, xla=3)),
        Setting((32768, 10), goal=Goal(graph=4, xla=1.5)),
        Setting((32, 10), goal=Goal(graph=1, xla=1)),
        Setting((1024, 32000), "bfloat16", Goal(float32=0.8)),
    ),
    sample=_sample_sparse,
    fused=lambda shape, _: losses.SparseCategoricalCrossentropy(from_logits=True),
    stock=lambda shape, _: {"Keras": keras.losses.SparseCategoricalCrossentropy(from_logits=True)},
    truth=_truth_sparse,
    raw=_raw_sparse,
    bytes_read=lambda shape, dtype: size(shape) * itemsize(dtype) + size(shape[:-1]) * 4,
    bytes_written=lambda shape, dtype: size(shape) * itemsize(dtype),
)


# Dense targets, probabilities, a fifth of the classes and all of them mixed.


def _first_fifth(classes):
    return np.arange(max(1, classes // 5))


def _scattered_fifth(classes):
    return np.sort(np.random.default_rng(0).permutation(classes)[: max(1, classes // 5)])


def _sample_mixture(rng, shape, dtype):
    # Soft targets: with one-hot ones a form that skips zeros would look better than it is.
    targets = rng.random(shape, dtype=np.float32)
    targets /= targets.sum(-1, keepdims=True)
    predictions = np.exp(rng.standard_normal(shape, dtype=np.float32))
    predictions /= predictions.sum(-1, keepdims=True)
    return tf.cast(targets, dtype), tf.cast(predictions, dtype)


def _mixture(name, title, subset, goal):
    def fused(shape, _):
        return losses.CategoricalCrossentropy(
            subset=subset(shape[-1]), subset_weight=SUBSET_WEIGHT, full_weight=FULL_WEIGHT
        )

    def stock(shape, _):
        ids = subset(shape[-1])
        mask = np.zeros(shape[-1], np.float32)
        mask[ids] = 1
        entropy = keras.losses.CategoricalCrossentropy()

        def mixed(part):
            def loss(targets, predictions):
                return SUBSET_WEIGHT * entropy(part(targets), part(predictions)) + (
                    FULL_WEIGHT * entropy(targets, predictions)
                )

            return loss

        forms = {
            "gather": mixed(lambda x: tf.gather(x, ids, axis=-1)),
            "mask": mixed(lambda x: x * tf.cast(mask, x.dtype)),
        }
        if ids[-1] - ids[0] == len(ids) - 1:
            forms["slice"] = mixed(lambda x: x[..., ids[0] : ids[-1] + 1])
        return forms

    def truth(targets, predictions):
        targets, predictions = targets.astype(np.float64), predictions.astype(np.float64)
        epsilon = keras.backend.epsilon()
        classes = predictions.shape[-1]
        loss, gradient = 0.0, np.zeros_like(predictions)
        for weight, ids in ((SUBSET_WEIGHT, subset(classes)), (FULL_WEIGHT, np.arange(classes))):
            y, p = targets[:, ids], predictions[:, ids]
            total = p.sum(-1, keepdims=True)
            q = p / total
            clipped = np.clip(q, epsilon, 1 - epsilon)
            loss -= weight * (y * np.log(clipped)).sum()
            dq = np.where(clipped == q, -y / clipped, 0)
            gradient[:, ids] += weight * (dq - (dq * q).sum(-1, keepdims=True)) / total
        return loss / len(targets), gradient / len(targets)

    return Case(
        name=name,
        title=title,
        rank=2,
        dtypes=("float32", "float64", "bfloat16"),
        settings=(Setting((1024, 32000), goal=goal),),
        sample=_sample_mixture,
        fused=fused,
        stock=stock,
        truth=truth,
        raw=None,
        bytes_read=lambda shape, dtype: 2 * size(shape) * itemsize(dtype),
        bytes_written=lambda shape, dtype: size(shape) * itemsize(dtype),
    )


CASES = (
    SPARSE,
    # Contiguous, so that slicing is among the stock forms that must be beaten.
    _mixture(
        "softmax_xent/mixture",
        "dense targets, probabilities, 0.8 · first fifth of the classes + 0.2 · all",
        _first_fifth,
        Goal(graph=8, xla=4, floor=1.5),
    ),
    _mixture(
        "softmax_xent/scattered",
        "dense targets, probabilities, 0.8 · scattered fifth of the classes + 0.2 · all",
        _scattered_fifth,
        Goal(graph=8, xla=4, floor=1.5),
    ),
)
