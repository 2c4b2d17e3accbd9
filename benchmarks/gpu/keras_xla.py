"""Times XLA-compiled Keras, in a process of its own: torch and TensorFlow bring a CUDA each.

Reads the cases of speed.py as JSON and prints {"ms": {case: ms}, "notes": [...]}. One compiled
function holds the steps of a whole lap, so that they share what a call costs on the host.
"""

import json
import os
import statistics
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import truth

WARM_UP_LAPS, LAPS = 2, 10
SUBSET_WEIGHT, FULL_WEIGHT, L2 = 0.8, 0.2, 0.01
KERNEL_SIZE = 2048
CHECKED_ROWS = 4


POINTWISE = {  # the Keras class and that of truth.py
    "Huber": (keras.losses.Huber(), "huber"),
    "Huber + L2": (keras.losses.Huber(), "huber"),
    "binary logits": (keras.losses.BinaryCrossentropy(from_logits=True), "binary_crossentropy"),
}


def feature_loss(metric):
    """The mean distance of lists of feature maps; targets of None: the first example."""

    def distance(b, a):
        a, b = tf.cast(a, tf.float32), tf.cast(b, tf.float32)
        if metric == "mse":
            return tf.reduce_mean(tf.math.squared_difference(a, b))
        a, b = (tf.math.l2_normalize(x, axis=-1, epsilon=1e-12) for x in (a, b))
        if metric == "cosine":
            return 1 - tf.reduce_mean(tf.reduce_sum(a * b, axis=-1))
        return tf.reduce_mean(tf.reduce_sum(tf.math.squared_difference(a, b), axis=-1))

    def loss(targets, predictions):
        return tf.add_n([
            distance(x[:1] if targets is None else targets[k], x)
            for k, x in enumerate(predictions)
        ])  # fmt: skip

    return loss


def mean_losses(case, ids):
    """The mean loss as users write it: {name: fn(targets, predictions)}."""
    if "maps" in case:
        return {"": feature_loss(case["kind"].split()[0])}
    if case["kind"] in POINTWISE:
        return {"": POINTWISE[case["kind"]][0]}
    if case["kind"] == "L2":
        return {"": None}
    if case["kind"] == "labels":
        return {"": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    mask = np.isin(np.arange(case["classes"]), ids)

    def from_logits(y, z, counted=None):
        # Keras's gradient supposes targets that sum to 1, which those of a subset do not.
        y, z = tf.cast(y, tf.float32), tf.cast(z, tf.float32)
        over = z if counted is None else tf.where(counted, z, -np.inf)
        y = y if counted is None else tf.where(counted, y, 0)
        nats = tf.reduce_logsumexp(over, axis=-1, keepdims=True) - z
        return tf.reduce_mean(tf.reduce_sum(y * nats, axis=-1))

    entropy = keras.losses.CategoricalCrossentropy()

    def from_probabilities(y, p, counted=None):
        if counted is not None:
            y, p = y * tf.cast(counted, y.dtype), p * tf.cast(counted, p.dtype)
        return entropy(y, p)

    loss = from_logits if case["kind"] == "mixture of logits" else from_probabilities

    def gathered(y, x):
        part = loss(tf.gather(y, ids, axis=-1), tf.gather(x, ids, axis=-1))
        return SUBSET_WEIGHT * part + FULL_WEIGHT * loss(y, x)

    def masked(y, x):
        return SUBSET_WEIGHT * loss(y, x, mask) + FULL_WEIGHT * loss(y, x)

    return {"gather": gathered, "mask": masked}


def sample(case):
    """Targets, or None, and what has gradients: predictions, if there are targets, and weights."""
    shape, dtype = (case["rows"], case["classes"]), case["dtype"]
    if "maps" in case:
        maps = [
            [tf.cast(tf.random.normal((case["rows"], *layer)), dtype) for layer in case["maps"]]
            for _ in range(2)
        ]
        return None if case["kind"].endswith("first") else maps[1], maps[0]
    weights = [
        tf.cast(tf.random.normal((KERNEL_SIZE, KERNEL_SIZE), stddev=0.02), dtype)
        for _ in range(case["kernels"])
    ]
    if case["kind"] == "L2":
        return None, weights
    x = tf.random.normal(shape)
    if case["kind"] in POINTWISE:
        targets = tf.random.normal(shape)
        if case["kind"] == "binary logits":
            targets = targets > 0
        return tf.cast(targets, dtype), [tf.cast(x, dtype), *weights]
    if case["kind"] == "mixture of probabilities":
        x = tf.nn.softmax(x)
    if case["kind"] == "labels":
        targets = tf.random.uniform(shape[:1], maxval=shape[1], dtype=tf.int64)
    else:
        targets = tf.random.uniform(shape)
        targets /= tf.reduce_sum(targets, axis=-1, keepdims=True)
    return targets, [tf.cast(x, dtype)]


def lap_of(loss, is_of_features):
    @tf.function(jit_compile=True)
    def lap(batches):
        values, gradients = [], []
        for targets, leaves in batches:
            with tf.GradientTape() as tape:
                tape.watch(leaves)
                weights, value = leaves, 0.0
                if is_of_features:
                    value, weights = loss(targets, leaves), []
                elif targets is not None:
                    value, weights = loss(targets, leaves[0]), leaves[1:]
                for weight in weights:
                    value += L2 * tf.reduce_sum(tf.square(tf.cast(weight, tf.float32)))
                values.append(value)
            gradients.append(tape.gradient(value, leaves))
        return values, gradients

    return lap


def gradient_error(case, ids, batch, gradients):
    """Relative error of the first rows, in the sum of absolute values.

    Of feature maps, of the last layer's; under "first" without the first example's.
    """

    def first_rows(tensors):
        return tf.cast(tensors[0][:CHECKED_ROWS], tf.float64).numpy()

    if "maps" in case:
        is_first = case["kind"].endswith("first")
        x, found = first_rows(batch[1][-1:])[:, None], first_rows(gradients[-1:])
        y = x[:1] if is_first else first_rows(batch[0][-1:])[:, None]
        scales = np.full(len(x), 1 / case["rows"])
        _, (right,), *_ = truth.feature_distance(
            [x], [y], scales, metric=case["kind"].split()[0], epsilon=1e-12
        )
        found, right = found[is_first:], right[is_first:, 0]
        return float(np.abs(found - right).sum() / np.abs(right).sum())
    targets, x = batch[0], first_rows(batch[1])
    if case["kind"] == "L2":
        right = 2 * L2 * x
    elif case["kind"] in POINTWISE:
        form = {"from_logits": True} if case["kind"] == "binary logits" else {}
        y = first_rows([targets])
        right = truth.pointwise(POINTWISE[case["kind"]][1], x, y, **form)[1] / case["rows"]
    else:
        form = {}
        if case["kind"] != "labels":
            form = {"subset": ids, "subset_weight": SUBSET_WEIGHT, "full_weight": FULL_WEIGHT}
            form["from_logits"] = case["kind"] == "mixture of logits"
        y = targets[:CHECKED_ROWS].numpy()
        right = truth.softmax_xent(x, y, **form)[1] / case["rows"]
    found = first_rows(gradients)
    return float(np.abs(found - right).sum() / np.abs(right).sum())


def measure(case):
    """The least milliseconds of a step among the ways to write it, and notes."""
    classes = case["classes"]
    ids = np.sort(np.random.default_rng().permutation(classes)[: max(1, classes // 5)])
    batches = [sample(case) for _ in range(case["batches"])]
    found, notes = [], []
    for name, loss in mean_losses(case, ids).items():
        lap, times_ms = lap_of(loss, "maps" in case), []
        for _ in range(WARM_UP_LAPS + LAPS):
            start = time.perf_counter()
            values, gradients = lap(batches)
            values[-1].numpy()  # waits
            times_ms.append((time.perf_counter() - start) * 1e3 / len(batches))
        error = gradient_error(case, ids, batches[0], gradients[0])
        if error <= case["tolerance"]:
            found.append(statistics.median(times_ms[WARM_UP_LAPS:]))
        else:
            notes.append(f"{case['name']}: XLA {name} differs by {error:.3g} and does not count")
    return min(found, default=None), notes


def main():
    device = sys.argv[1]
    if not tf.config.list_logical_devices(device.strip("/").split(":")[0]):
        sys.exit("TensorFlow sees no GPU")
    times_ms, notes = {}, ["XLA: by the clock of the host"]
    for case in json.load(sys.stdin):
        try:
            with tf.device(device):
                ms, said = measure(case)
        except tf.errors.OpError as error:
            words = str(error).partition("\n")[0]
            ms, said = None, [f"{case['name']}: XLA failed: {words}"]
        notes += said
        if ms is not None:
            times_ms[case["name"]] = ms
    print(json.dumps({"ms": times_ms, "notes": notes}))


if __name__ == "__main__":
    main()
