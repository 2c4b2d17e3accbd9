"""Losses of a prediction and its target, output by output: the functional ops and Keras classes."""

import keras
import tensorflow as tf

from fusedloss import _lib
from fusedloss._compiled import CompiledLoss
from fusedloss._loss import FusedLoss, Rows
from fusedloss.reference._inputs import check_axis, loss_dtype, same_rank
from fusedloss.reference.pointwise import (
    Formula,
    aligned,
    aligned_binary,
    checked_row_loss,
    row_loss,
)


def _encoded(formula):
    """The attributes of the compiled ops. Their floats are strings: an attribute has 32 bits."""
    scalars = formula.scalars()
    return {"kind": scalars.pop("kind"), **{name: repr(value) for name, value in scalars.items()}}


def _reference(*inputs, kind, parameter, epsilon):
    """`row_loss`, called with the attributes of the compiled ops."""
    return row_loss(
        *inputs, kind=tf.compat.as_str(kind), parameter=float(parameter), epsilon=float(epsilon)
    )


_COMPILED = CompiledLoss(
    "pointwise",
    attributes=("kind", "parameter", "epsilon"),
    inputs=(None,) * 4,  # predictions and targets; then output_weights and quantiles
    row_inputs=2,
    reference=_reference,
)


def _row_losses(targets, predictions, formula):
    if _lib.ops() is None:
        return checked_row_loss(targets, predictions, formula)
    arrays = formula.arrays(loss_dtype(predictions))
    (loss,) = _COMPILED.rows(predictions, targets, *arrays, **_encoded(formula))
    return loss


def _losses(targets, predictions, formula):
    targets, predictions = tf.convert_to_tensor(targets), tf.convert_to_tensor(predictions)
    return _row_losses(*aligned(targets, predictions, formula))


def huber(targets, predictions, *, delta=1.0, output_weights=None):
    """Huber loss of each row: squared near the target, absolute beyond `delta`.

    The mean over the last axis of, with e = predictions - targets,

        output_weights * (e ** 2 / 2 if |e| <= delta else delta * (|e| - delta / 2))

    as `keras.losses.huber` has it, made in one pass. Shapes are made to agree as in Keras: a last
    axis of 1 that only one of the two has is taken away, or added to a single axis; then they
    broadcast as in NumPy.

    Args:
      targets: `[..., outputs]`, or what broadcasts, any numeric type.
      predictions: float16, bfloat16, float32 or float64 `[..., outputs]`.
      delta: finite, greater than 0, in the unit of the targets.
      output_weights: `[outputs]` finite constants, not negative. They do not change the divisor.
        Weight 0 leaves an output out: what it holds, NaN or not, has no loss and no gradient.
    Returns:
      float `[...]`: float64 for float64 predictions, else float32. Differentiable to any order in
      predictions and targets; where the loss has a corner its derivative is 0.
    Raises:
      TypeError: predictions of another type.
      ValueError: an argument out of range; shapes that do not broadcast or have no known rank;
        predictions without an axis.
      InvalidArgumentError: shapes that disagree, as found when the op runs. A size that is not
        known before is taken to be that of the predictions.
    """
    return _losses(targets, predictions, Formula.huber(delta, output_weights))


def mean_squared_error(targets, predictions, *, output_weights=None):
    """Mean over the last axis of `output_weights * (predictions - targets) ** 2`.

    That of `keras.losses.mean_squared_error`, in one pass. Arguments, result and errors are those
    of `huber`.
    """
    return _losses(targets, predictions, Formula.parse("squared", output_weights))


def mean_absolute_error(targets, predictions, *, output_weights=None):
    """Mean over the last axis of `output_weights * |predictions - targets|`.

    That of `keras.losses.mean_absolute_error`, in one pass. Arguments, result and errors are those
    of `huber`.
    """
    return _losses(targets, predictions, Formula.parse("absolute", output_weights))


def log_cosh(targets, predictions, *, output_weights=None):
    """Mean over the last axis of `output_weights * log(cosh(predictions - targets))`.

    That of `keras.losses.log_cosh`, in one pass, and more exact for small errors and in float64.
    Arguments, result and errors are those of `huber`.
    """
    return _losses(targets, predictions, Formula.parse("log_cosh", output_weights))


def quantile(targets, predictions, *, quantile=0.5, output_weights=None):
    """Pinball loss of each row: least where predictions are a quantile of the targets.

    The mean over the last axis of, with e = predictions - targets and q = quantile,

        output_weights * (q * max(-e, 0) + (1 - q) * max(e, 0))

    Koenker and Bassett, Regression Quantiles, Econometrica 46 (1978).

    Args:
      targets: as in `huber`; with a list of quantiles also without the last axis, `[...]`.
      predictions: float16, bfloat16, float32 or float64 `[..., outputs]`.
      quantile: in (0, 1): one number, or a list of one an output.
      output_weights: as in `huber`.
    Returns, Raises:
      As in `huber`.
    """
    return _losses(targets, predictions, Formula.quantile(quantile, output_weights))


def binary_crossentropy(
    targets, predictions, *, from_logits=False, label_smoothing=0.0, axis=-1, output_weights=None
):
    """Cross-entropy of each output with a target between 0 and 1, in nats; its mean over an axis.

    With s = (1 - label_smoothing) * targets + label_smoothing / 2 it is, from logits z,

        output_weights * (max(z, 0) - z * s + log(1 + exp(-|z|)))

    and from probabilities p, clipped to [epsilon, 1 - epsilon], epsilon being
    `keras.config.epsilon()`,

        output_weights * (-s * log(p) - (1 - s) * log(1 - p))

    as of `keras.losses.binary_crossentropy`, in one pass. As there, predictions that a sigmoid has
    just made are replaced by its logits, and shapes do not broadcast.

    Args:
      targets: any numeric type, of the shape of the predictions.
      predictions: float16, bfloat16, float32 or float64 `[..., outputs]`.
      from_logits: False if `predictions` are probabilities.
      label_smoothing: in [0, 1].
      axis: the axis of the outputs, of which the mean is taken.
      output_weights: as in `huber`.
    Returns:
      As in `huber`, the axes of `predictions` without `axis`.
    Raises:
      As `huber`; ValueError: shapes that differ.
    """
    formula = Formula.binary(from_logits, label_smoothing, output_weights)
    targets, predictions = tf.convert_to_tensor(targets), tf.convert_to_tensor(predictions)
    return _row_losses(*aligned_binary(targets, predictions, formula, axis=axis))


class _Pointwise(FusedLoss):
    """What the classes share."""

    _compiled = _COMPILED
    _encoded = staticmethod(_encoded)

    def __init__(self, formula, *, reduction, name, dtype, penalty, **config):
        super().__init__(reduction=reduction, name=name, dtype=dtype, penalty=penalty)
        weights = formula.output_weights
        self._formula = formula
        self._config = {
            **config,
            "output_weights": None if weights is None else weights.tolist(),
        }

    def get_config(self):
        return {**super().get_config(), **self._config}

    def _aligned(self, y_true, y_pred):
        return aligned(y_true, y_pred, self._formula)

    def _rows(self, y_true, y_pred):
        targets, predictions, formula = self._aligned(y_true, y_pred)
        return Rows(targets, predictions, predictions.shape[:-1], None, formula)

    def _row_losses(self, rows):
        return _row_losses(rows.targets, rows.predictions, rows.formula)


@keras.saving.register_keras_serializable(package="fusedloss")
class Huber(_Pointwise):
    """`keras.losses.Huber`, fused, with weights of the outputs and a penalty on weights.

    The first four arguments are Keras's and give its results, except that an empty batch has loss 0
    and that half-precision predictions are not cast but read as they are and summed in float32.

    Args:
      delta: finite, greater than 0.
      reduction: "sum_over_batch_size" or "mean", "sum", "mean_with_sample_weight", None or "none".
      name: of the loss.
      dtype: of the result; None for `keras.config.floatx()`.
      output_weights: one constant for each entry of the last axis: see `fusedloss.nn.huber`. An
        output of weight 0 is left out, NaN or not; a sample weight of 0 multiplies, as in Keras.
      penalty: a `fusedloss.Penalty` to be added to the loss once a step, or None.
    Raises:
      ValueError: an argument out of range; a penalty without a reduction; when called, shapes that
        do not broadcast, or a penalty that is not bound or that several outputs of a compiled model
        carry.

    Two outputs, the second counting a tenth:

    ```python
    model.compile("adam", loss=fusedloss.losses.Huber(output_weights=[1, 0.1]))
    ```
    """

    def __init__(
        self,
        delta=1.0,
        reduction="sum_over_batch_size",
        name="huber_loss",
        dtype=None,
        *,
        output_weights=None,
        penalty=None,
    ):
        formula = Formula.huber(delta, output_weights)
        super().__init__(
            formula,
            reduction=reduction,
            name=name,
            dtype=dtype,
            penalty=penalty,
            delta=formula.parameter,
        )


@keras.saving.register_keras_serializable(package="fusedloss")
class MeanSquaredError(_Pointwise):
    """`keras.losses.MeanSquaredError`, fused; arguments and differences as of `Huber`."""

    def __init__(
        self,
        reduction="sum_over_batch_size",
        name="mean_squared_error",
        dtype=None,
        *,
        output_weights=None,
        penalty=None,
    ):
        formula = Formula.parse("squared", output_weights)
        super().__init__(formula, reduction=reduction, name=name, dtype=dtype, penalty=penalty)


@keras.saving.register_keras_serializable(package="fusedloss")
class MeanAbsoluteError(_Pointwise):
    """`keras.losses.MeanAbsoluteError`, fused; arguments and differences as of `Huber`."""

    def __init__(
        self,
        reduction="sum_over_batch_size",
        name="mean_absolute_error",
        dtype=None,
        *,
        output_weights=None,
        penalty=None,
    ):
        formula = Formula.parse("absolute", output_weights)
        super().__init__(formula, reduction=reduction, name=name, dtype=dtype, penalty=penalty)


@keras.saving.register_keras_serializable(package="fusedloss")
class LogCosh(_Pointwise):
    """`keras.losses.LogCosh`, fused; arguments and differences as of `Huber`."""

    def __init__(
        self,
        reduction="sum_over_batch_size",
        name="log_cosh",
        dtype=None,
        *,
        output_weights=None,
        penalty=None,
    ):
        formula = Formula.parse("log_cosh", output_weights)
        super().__init__(formula, reduction=reduction, name=name, dtype=dtype, penalty=penalty)


@keras.saving.register_keras_serializable(package="fusedloss")
class Quantile(_Pointwise):
    """The pinball loss, which Keras lacks, for one quantile or one an output.

    Args:
      quantile: in (0, 1), or a list of such: then predictions are `[..., quantiles]` and targets
        `[...]`, `[..., 1]` or of the same shape. See `fusedloss.nn.quantile`.
      reduction, name, dtype, output_weights, penalty: as in `Huber`.
    Raises:
      ValueError: as `Huber`.

    The median and the middle 90 % of a distribution, by a model of three outputs:

    ```python
    model.compile("adam", loss=fusedloss.losses.Quantile([0.05, 0.5, 0.95]))
    ```
    """

    def __init__(
        self,
        quantile=0.5,
        reduction="sum_over_batch_size",
        name="quantile",
        dtype=None,
        *,
        output_weights=None,
        penalty=None,
    ):
        formula = Formula.quantile(quantile, output_weights)
        one_for_all = formula.quantiles is None
        super().__init__(
            formula,
            reduction=reduction,
            name=name,
            dtype=dtype,
            penalty=penalty,
            quantile=formula.parameter if one_for_all else formula.quantiles.tolist(),
        )


@keras.saving.register_keras_serializable(package="fusedloss")
class BinaryCrossentropy(_Pointwise):
    """`keras.losses.BinaryCrossentropy`, fused, with weights of the outputs and a penalty.

    The first six arguments are Keras's and give its results, except that an empty batch has loss 0
    and that half-precision predictions are not cast, so that a sigmoid output in half precision is
    walked back to its logits.

    Args:
      from_logits: whether `y_pred` are logits; else probabilities.
      label_smoothing: in [0, 1].
      axis: the axis of `y_true` and `y_pred` of which the mean is taken.
      reduction, name, dtype, output_weights, penalty: as in `Huber`; the weights are of the entries
        along `axis`.
    Raises:
      ValueError: as `Huber`; shapes that differ, since they do not broadcast here, as in Keras.
    """

    def __init__(
        self,
        from_logits=False,
        label_smoothing=0.0,
        axis=-1,
        reduction="sum_over_batch_size",
        name="binary_crossentropy",
        dtype=None,
        *,
        output_weights=None,
        penalty=None,
    ):
        check_axis(axis)
        super().__init__(
            Formula.binary(from_logits, label_smoothing, output_weights),
            reduction=reduction,
            name=name,
            dtype=dtype,
            penalty=penalty,
            from_logits=from_logits,
            label_smoothing=label_smoothing,
            axis=axis,
        )
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = axis

    def _aligned(self, y_true, y_pred):
        y_true, y_pred = same_rank(y_true, y_pred)
        return aligned_binary(y_true, y_pred, self._formula, axis=self.axis)
