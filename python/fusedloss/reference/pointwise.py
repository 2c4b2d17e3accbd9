"""Losses of a prediction p and its target y, output by output, in TensorFlow.

Row-wise, with e = p - y, weights w of the outputs, or 1, and the mean over the last axis:

    L = 1/outputs · Σ_j w_j · f(p_j, y_j)

    huber                 f = e²/2 where |e| <= δ, else δ·(|e| - δ/2)
    squared               f = e²
    absolute              f = |e|
    log_cosh              f = log cosh e
    quantile              f = q·max(-e, 0) + (1 - q)·max(e, 0)
    binary_logits         f = max(p, 0) - p·s + log(1 + exp(-|p|))
    binary_probabilities  f = -s·log c - (1 - s)·log(1 - c),   c = clip(p, epsilon, 1 - epsilon)

where s = (1 - label_smoothing)·y + label_smoothing/2. Where f has a corner its derivative is 0. An
output of weight 0 is left out, NaN or not.
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf

from fusedloss.reference._inputs import (
    check_predictions,
    checked_axis,
    is_list,
    logits_behind,
    loss_dtype,
    number,
    numbers,
    positive,
    same_rank,
    weights,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """The constants of one loss. The class methods check what users give: ValueError."""

    kind: str
    parameter: float  # δ, quantile or label_smoothing; 0 where there is none
    quantiles: np.ndarray | None  # that of every output, in place of the parameter
    output_weights: np.ndarray | None

    @classmethod
    def parse(cls, kind, output_weights, *, parameter=0.0, quantiles=None):
        if output_weights is not None:
            output_weights = weights("output_weights", output_weights, "one an output")
        return cls(kind, parameter, quantiles, output_weights)

    @classmethod
    def huber(cls, delta, output_weights):
        return cls.parse("huber", output_weights, parameter=positive("delta", delta))

    @classmethod
    def quantile(cls, quantile, output_weights):
        """One quantile, or a list of them, one an output."""
        several = is_list(quantile)
        if several:
            given = numbers("quantile", quantile, "one an output, or a number")
        else:
            given = np.array([number("quantile", quantile)])
        wrong = np.flatnonzero(~((given > 0) & (given < 1)))
        if wrong.size:
            where = f" at position {wrong[0]}" if several else ""
            raise ValueError(
                f"`quantile` must lie in (0, 1), its ends excluded. Got {given[wrong[0]]}{where}."
            )
        if several:
            return cls.parse("quantile", output_weights, quantiles=given)
        return cls.parse("quantile", output_weights, parameter=float(given[0]))

    @classmethod
    def binary(cls, from_logits, label_smoothing, output_weights):
        label_smoothing = number("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1]. Got {label_smoothing}.")
        kind = "binary_logits" if from_logits else "binary_probabilities"
        return cls.parse(kind, output_weights, parameter=label_smoothing)

    def check(self, outputs):
        """Raises ValueError if the formula does not fit predictions of `outputs` outputs."""
        for name, given in (("quantile", self.quantiles), ("output_weights", self.output_weights)):
            if given is not None and given.size != outputs:
                raise ValueError(
                    f"`{name}` has {given.size} entries, but the predictions have {outputs} "
                    "outputs, the size of their last axis: give one entry an output."
                )

    def arrays(self, dtype):
        """`output_weights` and `quantiles` as `row_loss` takes them, in `dtype`."""
        quantiles = None if self.quantiles is None else _near_0(self.quantiles)
        given = (self.output_weights, quantiles)
        return [np.asarray(() if x is None else x, dtype.as_numpy_dtype) for x in given]

    def scalars(self):
        """The keyword arguments of `row_loss`."""
        return {
            "kind": self.kind,
            "parameter": float(_near_0(self.parameter))
            if self.kind == "quantile"
            else self.parameter,
            "epsilon": float(keras.config.epsilon()),
        }


def _near_0(quantile):
    """Quantiles, those above 1/2 less 1: so 1 - q keeps its digits where they are rounded."""
    return np.where(np.greater(quantile, 0.5), np.subtract(quantile, 1), quantile)


def _lacks_rows(x, shape):
    """Whether `x` must be broadcast to have the leading axes of `shape`."""
    pairs = zip(x.shape[:-1], shape[:-1], strict=False)
    return x.shape.rank < shape.rank or any(own == 1 != size for own, size in pairs)


def _broadcast(targets, predictions):
    """Both in one shape, except that targets may keep a last axis of 1.

    Sizes of the last axis that are not known are taken to be equal, and any that are not known if
    neither size is.
    """
    try:
        # A batch of unknown size would be taken for the outputs.
        if targets.shape.rank < predictions.shape.rank and targets.shape[-1] is None:
            raise ValueError
        shape = tf.broadcast_static_shape(targets.shape, predictions.shape)
    except ValueError:
        raise ValueError(
            "The shapes of targets and predictions must broadcast. Got targets of shape "
            f"{targets.shape} and predictions of shape {predictions.shape}: give one target an "
            "output, or one a row with a last axis of 1."
        ) from None
    one_a_row = predictions.shape[-1] == 1 and shape[-1] not in (1, None)
    if one_a_row or _lacks_rows(predictions, shape):
        full = tf.broadcast_dynamic_shape(tf.shape(targets), tf.shape(predictions))
        predictions = tf.broadcast_to(predictions, full)
        predictions.set_shape(shape)
    if _lacks_rows(targets, shape):
        full = tf.concat([tf.shape(predictions)[:-1], tf.shape(targets)[-1:]], 0)
        targets = tf.broadcast_to(targets, full)
    return targets, predictions


def _laid_out(targets, predictions, formula):
    outputs = predictions.shape[-1]
    if outputs is not None:
        formula.check(outputs)
    dtype = loss_dtype(predictions)
    if targets.dtype not in (predictions.dtype, dtype):
        targets = tf.cast(targets, dtype)
    return targets, predictions, formula


def aligned(targets, predictions, formula):
    """Lays targets and predictions out as `row_loss` takes them and checks what is known of them.

    Their shapes are made to agree as in Keras: by a last axis of 1 more or less, then as NumPy
    broadcasts. With a list of quantiles, targets may lack the last axis.

    Args:
      targets, predictions: tensors, as users give them.
      formula: a `Formula`.
    Returns:
      Targets of the type of the predictions or of the loss, predictions, and the formula.
    Raises:
      TypeError: predictions that are not floating point.
      ValueError: an unknown rank, predictions without an axis, shapes that do not broadcast, a
        formula that does not fit the number of outputs.
    """
    check_predictions(targets, predictions)
    given = f"targets of shape {targets.shape} and predictions of shape {predictions.shape}"
    if formula.quantiles is None:
        targets, predictions = same_rank(targets, predictions)
    elif targets.shape.rank == predictions.shape.rank - 1:
        targets = targets[..., None]
    if predictions.shape.rank == 0:
        raise ValueError(
            f"The predictions must have an axis of outputs, whose mean is the loss. Got {given}."
        )
    if targets.shape.rank == 0:
        targets = targets[None]
    return _laid_out(*_broadcast(targets, predictions), formula)


def aligned_binary(targets, predictions, formula, *, axis):
    """`aligned` for binary cross-entropy, where Keras wants equal shapes and takes an axis.

    Returns:
      Targets, predictions with that axis last, and the formula, from logits if the predictions
      could be walked back to them.
    """
    check_predictions(targets, predictions)
    rank = predictions.shape.rank
    if rank == 0:
        raise ValueError(
            "The predictions must have an axis of outputs, whose mean is the loss. Got a scalar."
        )
    axis = checked_axis(axis, predictions)
    if not targets.shape.is_compatible_with(predictions.shape):
        raise ValueError(
            "Targets and predictions of binary cross-entropy must have the same shape. Got targets "
            f"of shape {targets.shape} and predictions of shape {predictions.shape}: give one "
            "target an output."
        )
    logits = logits_behind(predictions, formula.kind == "binary_logits", "Sigmoid")
    if logits is not None:
        predictions, formula = logits, dataclasses.replace(formula, kind="binary_logits")
    if axis != rank - 1:
        outputs_last = [*range(axis), *range(axis + 1, rank), axis]
        targets, predictions = (tf.transpose(x, outputs_last) for x in (targets, predictions))
    return _laid_out(targets, predictions, formula)


def _output_loss(targets, predictions, quantiles, kind, parameter, epsilon):
    """f of every output."""
    if kind.startswith("binary"):
        shares = (1 - parameter) * targets + parameter / 2
        if kind == "binary_logits":
            # Unlike the formula above, this has its derivatives at a logit of 0 as well.
            shares = tf.broadcast_to(shares, tf.shape(predictions))
            return tf.nn.sigmoid_cross_entropy_with_logits(labels=shares, logits=predictions)
        clipped = tf.clip_by_value(predictions, epsilon, 1 - epsilon)
        # Clipping would stop the gradient of NaN as well.
        clipped = tf.where(tf.math.is_nan(predictions), predictions, clipped)
        return -(shares * tf.math.log(clipped) + (1 - shares) * tf.math.log(1 - clipped))
    error = predictions - targets
    if kind == "huber":
        # Without a selection, whose other branch would put 0 times infinity into the gradient.
        clipped = tf.clip_by_value(error, -parameter, parameter)
        return clipped * (error - clipped / 2)
    if kind == "squared":
        return tf.square(error)
    if kind == "absolute":
        return tf.abs(error)
    if kind == "log_cosh":
        # log(1 + 2·sinh²(e/2)) keeps the bits that small errors lose in the other form.
        size = tf.abs(error)
        is_small = size < 1
        small = tf.math.log1p(2 * tf.square(tf.sinh(tf.where(is_small, error, 0) / 2)))
        return tf.where(is_small, small, size + tf.nn.softplus(-2 * size) - math.log(2))
    is_low = quantiles > 0  # else they are less by 1
    above, below = tf.where(is_low, 1 - quantiles, -quantiles), tf.where(is_low, 0.0, 1.0)
    return tf.abs(error) * tf.where(error > 0, above, tf.cast(below, error.dtype) + quantiles)


def row_loss(predictions, targets, output_weights, quantiles, *, kind, parameter, epsilon):
    """The loss of every row, on tensors laid out as the compiled op takes them.

    Args:
      predictions: float `[..., outputs]`.
      targets: float `[..., outputs]` or `[..., 1]`.
      output_weights: float `[outputs]`, or `[0]` for 1.
      quantiles: float `[outputs]`, or `[0]` for `parameter`; those above 1/2 less 1.
      kind, parameter, epsilon: see above.
    Returns:
      float `[...]`; 0 without outputs.
    """
    dtype = loss_dtype(predictions)
    predictions, targets = tf.cast(predictions, dtype), tf.cast(targets, dtype)
    if quantiles.shape[0] == 0:
        quantiles = tf.constant(parameter, dtype)  # tf.cast of a number is by way of float32.
    quantiles = tf.cast(quantiles, dtype)
    is_weighted = output_weights.shape[0] != 0
    if is_weighted:
        # Selecting among the results is not enough: 0 times NaN would reach the gradient.
        counted = output_weights != 0
        predictions, targets = (
            tf.where(counted, x, tf.zeros([], dtype)) for x in (predictions, targets)
        )
    loss = _output_loss(targets, predictions, quantiles, kind, parameter, epsilon)
    if is_weighted:
        loss *= tf.cast(output_weights, dtype)
    outputs = tf.cast(tf.shape(loss)[-1], dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(loss, axis=-1), outputs)


def checked_row_loss(targets, predictions, formula):
    """`row_loss` of what `aligned` returns.

    Raises:
      InvalidArgumentError: shapes that turn out to disagree, outside XLA, which has no assertions.
    """
    assertions = []
    if not (targets.shape.is_fully_defined() and predictions.shape.is_fully_defined()):
        shape, given = tf.shape(predictions), tf.shape(targets)
        one_a_row = tf.concat([shape[:-1], [1]], 0)
        agrees = tf.reduce_all(given == shape) | tf.reduce_all(given == one_a_row)
        rule = "targets and predictions must agree in shape"
        assertions.append(tf.debugging.Assert(agrees, [rule, given, shape]))
    if predictions.shape[-1] is None:
        outputs = tf.shape(predictions)[-1]
        for name in ("output_weights", "quantiles"):
            constants = getattr(formula, name)
            if constants is not None:
                rule = f"`{name}` must have one entry an output"
                assertions.append(tf.debugging.assert_equal(constants.size, outputs, rule))
    with tf.control_dependencies([a for a in assertions if a is not None]):
        targets, predictions = tf.identity(targets), tf.identity(predictions)
    arrays = map(tf.constant, formula.arrays(loss_dtype(predictions)))
    return row_loss(predictions, targets, *arrays, **formula.scalars())


def _row_losses(targets, predictions, formula):
    targets, predictions = tf.convert_to_tensor(targets), tf.convert_to_tensor(predictions)
    return checked_row_loss(*aligned(targets, predictions, formula))


def huber(targets, predictions, *, delta=1.0, output_weights=None):
    """`fusedloss.nn.huber` in plain TensorFlow: the same arguments, results and errors."""
    return _row_losses(targets, predictions, Formula.huber(delta, output_weights))


def mean_squared_error(targets, predictions, *, output_weights=None):
    """`fusedloss.nn.mean_squared_error` in plain TensorFlow: the same in all respects."""
    return _row_losses(targets, predictions, Formula.parse("squared", output_weights))


def mean_absolute_error(targets, predictions, *, output_weights=None):
    """`fusedloss.nn.mean_absolute_error` in plain TensorFlow: the same in all respects."""
    return _row_losses(targets, predictions, Formula.parse("absolute", output_weights))


def log_cosh(targets, predictions, *, output_weights=None):
    """`fusedloss.nn.log_cosh` in plain TensorFlow: the same arguments, results and errors."""
    return _row_losses(targets, predictions, Formula.parse("log_cosh", output_weights))


def quantile(targets, predictions, *, quantile=0.5, output_weights=None):
    """`fusedloss.nn.quantile` in plain TensorFlow: the same arguments, results and errors."""
    return _row_losses(targets, predictions, Formula.quantile(quantile, output_weights))


def binary_crossentropy(
    targets, predictions, *, from_logits=False, label_smoothing=0.0, axis=-1, output_weights=None
):
    """`fusedloss.nn.binary_crossentropy` in plain TensorFlow: the same in all respects."""
    formula = Formula.binary(from_logits, label_smoothing, output_weights)
    targets, predictions = tf.convert_to_tensor(targets), tf.convert_to_tensor(predictions)
    return checked_row_loss(*aligned_binary(targets, predictions, formula, axis=axis))
