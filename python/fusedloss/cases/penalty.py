"""The penalty on weights alone, as it is benchmarked."""

import keras
import numpy as np
import tensorflow as tf

from fusedloss import nn
from fusedloss.cases._case import Case, Goal, Setting, itemsize

L2 = 0.01
SMALLEST = 64


def _sides(shape):
    """Sides of square variables, multiples of SMALLEST from the largest down, and again."""
    count, largest = shape
    sizes = max(1, largest // SMALLEST)
    return [SMALLEST * (sizes - k % sizes) for k in range(count)]


def _weights(rng, shape, dtype):
    arrays = [rng.standard_normal((side, side), dtype=np.float32) for side in _sides(shape)]
    return [tf.Variable(tf.cast(array, dtype)) for array in arrays]


def _keras(shape, weights):
    regularizer = keras.regularizers.L2(L2)
    return {"Keras regularizers": lambda: tf.add_n([regularizer(weight) for weight in weights])}


def _bytes(shape, dtype):
    return sum(side * side for side in _sides(shape)) * itemsize(dtype)


CASES = (
    Case(
        name="penalty/l2",
        title="L2 of square variables, number × largest side",
        rank=2,
        dtypes=("float32", "float64", "bfloat16"),
        # Nearly as much in many variables as in one.
        settings=(
            Setting((200, 512), goal=Goal(graph=2.5, xla=1.5, floor=1.3)),
            Setting((1, 4544)),
        ),
        sample=lambda rng, shape, dtype: (),
        fused=lambda shape, weights: lambda: nn.weight_penalty(weights, l2=L2),
        stock=_keras,
        truth=None,
        raw=None,
        bytes_read=_bytes,
        bytes_written=_bytes,
        weights=_weights,
        penalty_truth=lambda weight: (
            L2 * np.square(weight.astype(np.float64)).sum(),
            2 * L2 * weight.astype(np.float64),
        ),
    ),
)
