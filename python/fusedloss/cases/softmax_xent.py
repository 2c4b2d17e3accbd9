"""Softmax cross-entropy, as it is benchmarked."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from fusedloss import losses, metrics, nn
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


# Policies over the legal moves of a position, the others being marked by targets of -1.


def _legal(classes):
    return max(2, round(0.02 * classes))


def _sample_legal(rng, shape, dtype):
    rows, classes = shape
    legal = rng.permuted(np.tile(np.arange(classes) < _legal(classes), (rows, 1)), axis=-1)
    targets = np.where(legal, rng.random(shape, dtype=np.float32), 0)
    targets = np.where(legal, targets / targets.sum(-1, keepdims=True), -1)
    logits = rng.standard_normal(shape, dtype=np.float32)
    return tf.cast(targets, dtype), tf.cast(logits, dtype)


def _truth_legal(targets, logits):
    legal = targets >= 0
    y, z = np.where(legal, targets, 0).astype(np.float64), logits.astype(np.float64)
    z = np.where(legal, z - z.max(-1, keepdims=True, where=legal, initial=-np.inf), -np.inf)
    total = np.exp(z).sum(-1, keepdims=True)
    nats = np.where(legal, np.log(total) - z, 0)
    gradient = y.sum(-1, keepdims=True) * np.exp(z) / total - y
    return (y * nats).sum() / len(y), gradient / len(y)


def _filled(targets, logits):
    """What is written by hand: targets, and logits that vanish in the softmax."""
    return tf.maximum(targets, 0), tf.where(targets >= 0, logits, -1e10)


def _stock_legal(shape, _):
    def loss(targets, logits):
        filled = _filled(targets, logits)
        return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(*filled))

    return {"where": loss}


def _fused_legal(shape, _):
    return losses.CategoricalCrossentropy(from_logits=True, mask_negative_targets=True)


def _stock_legal_metrics(shape, _):
    accuracy, entropy = keras.metrics.CategoricalAccuracy(), keras.metrics.Mean()

    def loss_and_metrics(targets, logits):
        filled = _filled(targets, logits)
        accuracy.update_state(*filled)
        shares, logarithms = tf.nn.softmax(filled[1]), tf.nn.log_softmax(filled[1])
        entropy.update_state(-tf.reduce_sum(shares * logarithms, axis=-1))
        return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(*filled))

    return {"where": loss_and_metrics}


def _fused_legal_metrics(shape, _):
    loss = _fused_legal(shape, _)
    measures = [metrics.CrossentropyMetric(loss, name) for name in ("accuracy", "entropy")]

    def loss_and_metrics(targets, logits):
        value = loss(targets, logits)
        for metric in measures:
            metric.update_state(targets, logits)
        return value

    return loss_and_metrics


def _legal_moves(name, title, fused, stock, goal):
    return Case(
        name=name,
        title=title,
        rank=2,
        dtypes=("float32", "float64"),
        settings=(Setting((1024, 1858), goal=goal),),
        sample=_sample_legal,
        fused=fused,
        stock=stock,
        truth=_truth_legal,
        raw=None,
        # Which moves are legal is known from the targets, and the logits of no other are needed.
        bytes_read=lambda shape, dtype: (
            (size(shape) + size(shape[:-1]) * _legal(shape[-1])) * itemsize(dtype)
        ),
        bytes_written=lambda shape, dtype: size(shape) * itemsize(dtype),
    )


# A label among candidates.


def _candidates(count, settings):
    def sample(rng, shape, dtype):
        rows, classes = shape
        # Each row a run of a shuffled ring: no class twice. The label comes first.
        ring, starts = rng.permutation(classes).astype(np.int32), rng.integers(classes, size=rows)
        listed = min(count, classes)
        candidates = ring[(starts[:, None] + np.arange(listed)) % classes]
        logits = rng.standard_normal(shape, dtype=np.float32)
        return tf.constant(candidates[:, 0]), tf.constant(candidates), tf.cast(logits, dtype)

    def fused(shape, _):
        def loss(labels, candidates, logits):
            return tf.reduce_mean(nn.sparse_softmax_xent(labels, logits, candidates=candidates))

        return loss

    def stock(shape, _):
        def loss(labels, candidates, logits):
            gathered = tf.gather(logits, candidates, batch_dims=1)
            return tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(tf.zeros_like(labels), gathered)
            )

        return {"gather": loss}

    def truth(labels, candidates, logits):
        z = np.take_along_axis(logits, candidates, axis=-1).astype(np.float64)
        loss, _ = _truth_sparse(np.argmax(candidates == labels[:, None], axis=-1), z)
        return loss, None

    def bytes_read(shape, dtype):
        listed = min(count, shape[-1])
        return size(shape[:-1]) * (listed * (itemsize(dtype) + 4) + 4)

    return Case(
        name=f"softmax_xent/candidates{count}",
        title=f"labels, logits, {count} candidates a row, evaluation",
        rank=2,
        dtypes=("float32", "float64", "bfloat16"),
        settings=settings,
        sample=sample,
        fused=fused,
        stock=stock,
        truth=truth,
        raw=None,
        bytes_read=bytes_read,
        bytes_written=lambda shape, dtype: size(shape[:-1]) * 4,
        evaluation=True,
    )


# Sparse labels, logits, with everything that changes the logits.

TEMPERATURE, Z_LOSS, SOFTCAP = 0.7, 1e-4, 30.0


def _stock_warped(shape, _):
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def warped(labels, logits):
        s = SOFTCAP * tf.tanh(logits / SOFTCAP) / TEMPERATURE
        return entropy(labels, s) + Z_LOSS * tf.reduce_mean(tf.reduce_logsumexp(s, axis=-1) ** 2)

    return {"by hand": warped}


def _truth_warped(labels, logits):
    capped = np.tanh(logits.astype(np.float64) / SOFTCAP)
    s = SOFTCAP * capped / TEMPERATURE
    loss, gradient = _truth_sparse(labels, s)
    lse = np.logaddexp.reduce(s, axis=-1, keepdims=True)
    loss += Z_LOSS * (lse**2).mean()
    gradient += Z_LOSS * 2 * lse * np.exp(s - lse) / len(labels)
    return loss, gradient * (1 - capped**2) / TEMPERATURE


# Dense targets, probabilities, the focal form.

ALPHA, GAMMA = 0.25, 2.0


def _truth_focal(targets, predictions):
    y, p = targets.astype(np.float64), predictions.astype(np.float64)
    epsilon = keras.backend.epsilon()
    total = p.sum(-1, keepdims=True)
    q = np.clip(p / total, epsilon, 1 - epsilon)
    loss = -(ALPHA * y * (1 - q) ** GAMMA * np.log(q)).sum() / len(y)
    dq = ALPHA * y * (GAMMA * (1 - q) ** (GAMMA - 1) * np.log(q) - (1 - q) ** GAMMA / q)
    dq = np.where(q == p / total, dq, 0)
    return loss, (dq - (dq * q).sum(-1, keepdims=True)) / total / len(y)


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
    _legal_moves(
        "softmax_xent/legal_moves",
        "dense targets, logits, 2 % of the classes legal",
        _fused_legal,
        _stock_legal,
        Goal(graph=5, xla=3),
    ),
    _legal_moves(
        "softmax_xent/legal_moves_metrics",
        "dense targets, logits, 2 % of the classes legal, accuracy and entropy too",
        _fused_legal_metrics,
        _stock_legal_metrics,
        Goal(graph=10, xla=5),
    ),
    # The time is to grow with the candidates and not with the classes.
    _candidates(
        256,
        (
            Setting((1024, 32000), goal=Goal(graph=2, xla=2)),
            Setting((1024, 8000), goal=Goal(graph=2, xla=2)),
        ),
    ),
    _candidates(512, (Setting((1024, 32000), goal=Goal(graph=2, xla=2)),)),
    dataclasses.replace(
        SPARSE,
        name="softmax_xent/warped",
        title="sparse labels, logits, temperature 0.7, z-loss and softcap 30",
        dtypes=("float32", "float64", "bfloat16"),
        settings=(Setting((1024, 32000), goal=Goal(plain=1.15)),),
        fused=lambda shape, _: losses.SparseCategoricalCrossentropy(
            from_logits=True, temperature=TEMPERATURE, z_loss=Z_LOSS, softcap=SOFTCAP
        ),
        plain=lambda shape: losses.SparseCategoricalCrossentropy(from_logits=True),
        stock=_stock_warped,
        truth=_truth_warped,
        raw=None,
    ),
    Case(
        name="softmax_xent/focal",
        title="dense targets, probabilities, focal with gamma 2",
        rank=2,
        dtypes=("float32", "float64", "bfloat16"),
        settings=(Setting((4096, 1000), goal=Goal(graph=8, xla=2)),),
        sample=_sample_mixture,
        fused=lambda shape, _: losses.CategoricalFocalCrossentropy(ALPHA, GAMMA),
        stock=lambda shape, _: {"Keras": keras.losses.CategoricalFocalCrossentropy(ALPHA, GAMMA)},
        truth=_truth_focal,
        raw=None,
        bytes_read=lambda shape, dtype: 2 * size(shape) * itemsize(dtype),
        bytes_written=lambda shape, dtype: size(shape) * itemsize(dtype),
    ),
)
