"""What the losses have in common: how they read arguments and predictions."""

import math
import warnings

import numpy as np
import tensorflow as tf
from keras.src.losses.loss import squeeze_or_expand_to_same_rank

FLOATS = (tf.float16, tf.bfloat16, tf.float32, tf.float64)


def number(name, given):
    """`given` as a float; ValueError names the argument."""
    try:
        return float(given)
    except (TypeError, ValueError):
        raise ValueError(f"`{name}` must be a number. Got {given!r}.") from None


def positive(name, given):
    """`given` as a float; ValueError if it is not finite and greater than 0.

    It and its reciprocal have normal numbers in float32.
    """
    value = number(name, given)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be finite and greater than 0. Got {value}.")
    if not 2.0**-126 <= value <= 2.0**126:
        raise ValueError(f"`{name}` must be between 2**-126 and 2**126. Got {value}.")
    return value


def weight(name, given):
    """`given` as a float; ValueError if it is not finite or negative."""
    value = number(name, given)
    if not _is_weight(value):
        raise ValueError(
            f"`{name}` must be finite and at least 0. Got {value}{_in_float32(value)}."
        )
    return value


def _is_weight(value):
    """Whether it is finite and at least 0, and float32 has a number for it that is so too."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = np.float32(value)
    return np.isfinite(rounded) & (value >= 0) & ((rounded > 0) == (value > 0))


def _in_float32(value):
    """What is wrong with a number that is only wrong once it is rounded."""
    if not (math.isfinite(value) and value >= 0):
        return ""
    return f", which is {'infinite' if value > 1 else '0'} in float32"


def is_list(given):
    """Whether an argument that may be one number is several."""
    return isinstance(given, list | tuple) or (isinstance(given, np.ndarray) and given.ndim > 0)


def numbers(name, given, one):
    """`given` as a float64 array; ValueError if it is no flat list. `one`: "one a class"."""
    try:
        array = np.asarray(given)
    except ValueError:  # Lists of different lengths.
        array = np.zeros([0])
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(
            f"`{name}` must be a flat, non-empty list of numbers, {one}. Got {given!r}."
        )
    return array.astype(np.float64)


def weights(name, given, one):
    """`numbers`; ValueError if one is not finite or negative."""
    array = numbers(name, given, one)
    wrong = np.flatnonzero(~_is_weight(array))
    if wrong.size:
        raise ValueError(
            f"`{name}` must be finite and at least 0. Got {array[wrong[0]]} at position {wrong[0]}"
            f"{_in_float32(array[wrong[0]])}."
        )
    return array


def check_choice(name, given, choices):
    """Raises ValueError if it is none of the choices."""
    if given not in choices:
        known = ", ".join(map(repr, choices))
        raise ValueError(f"`{name}` must be one of {known}. Got {given!r}.")


def loss_dtype(predictions):
    """float64 for float64 predictions, else float32: sums of half precision are kept in it."""
    return tf.float64 if predictions.dtype == tf.float64 else tf.float32


def check_predictions(targets, predictions):
    """Raises TypeError for a type that is not taken, ValueError for unknown ranks."""
    if predictions.dtype not in FLOATS:
        raise TypeError(
            "The predictions must be float16, bfloat16, float32 or float64. Got "
            f"{predictions.dtype.name}: cast them."
        )
    if not (targets.dtype.is_floating or targets.dtype.is_integer or targets.dtype.is_bool):
        raise TypeError(f"The targets must be numbers or booleans. Got {targets.dtype.name}.")
    if predictions.shape.rank is None or targets.shape.rank is None:
        raise ValueError(
            "The ranks of targets and predictions must be known. Got shapes "
            f"{targets.shape} and {predictions.shape}: set them with `tf.ensure_shape`."
        )


def same_rank(targets, predictions):
    """Both, without a last axis of 1 that only one of them has, as Keras takes it away."""
    if targets.shape.rank is None or predictions.shape.rank is None:
        return targets, predictions
    return squeeze_or_expand_to_same_rank(targets, predictions)


def check_axis(axis):
    """Raises ValueError if it is no integer."""
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise ValueError(f"`axis` must be an integer. Got {axis!r}.")


def checked_axis(axis, predictions):
    """`axis` counted from the first; ValueError if it is none of the predictions."""
    rank = predictions.shape.rank
    if isinstance(axis, bool) or not isinstance(axis, int) or not -rank <= axis < rank:
        raise ValueError(
            f"`axis` must be an integer in [{-rank}, {rank}) for predictions of shape "
            f"{predictions.shape}. Got {axis!r}."
        )
    return axis % rank


def logits_behind(predictions, from_logits, activation):
    """Walks back from the output of an activation to its logits, as Keras does; else None.

    The way through the probabilities loses bits and, where they saturate, the gradient.

    Args:
      from_logits: whether the predictions are said to be logits. A warning tells if they are not.
      activation: "Softmax" or "Sigmoid", the type of its op.
    """
    logits = getattr(predictions, "_keras_logits", None)
    is_eager = isinstance(predictions, tf.__internal__.EagerTensor)
    if logits is None and not is_eager and predictions.op.type == activation:
        logits = predictions.op.inputs[0]
    if logits is not None and from_logits:
        warnings.warn(
            "The loss has `from_logits=True`, but its predictions were produced by a "
            f"{activation.lower()}: its inputs are taken as the logits. Was this intended?",
            stacklevel=5,
        )
    return logits
