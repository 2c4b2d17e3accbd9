"""What the Keras losses of the package have in common: two paths, and Keras's results on both."""

import sys
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.losses.loss import apply_mask, reduce_weighted_values
from keras.src.trainers.compile_utils import CompileLoss

from fusedloss import _lib
from fusedloss._compiled import makes_gradients, should_record_backprop
from fusedloss.penalty import Penalty, penalty_sum
from fusedloss.reference._inputs import loss_dtype


class Rows(NamedTuple):
    """The arguments of one call, laid out for the kernels."""

    targets: tf.Tensor | list[tf.Tensor]
    predictions: tf.Tensor | list[tf.Tensor]  # of one type, with the same leading axes
    shape: tf.TensorShape  # of the losses: those axes
    counted: tf.Tensor | None  # bool, of that shape: the rows that belong to a mean; None: all
    formula: Any  # the rest; `formula.arrays(dtype)` are the inputs that have no rows
    given: tuple = ()  # y_true and y_pred as the loss was called with them

    @property
    def prediction(self):
        """The first of the predictions, for what they have in common."""
        return tf.nest.flatten(self.predictions)[0]


class FusedLoss(keras.losses.Loss):
    """A Keras loss that fuses its gradient into the forward pass wherever that is possible.

    The general path makes the loss of every row and leaves masks, weights and the reduction to
    Keras. The training path makes the reduced loss and its gradient in one pass. It needs to know
    in the forward pass what each row's cotangent will be, so it is taken if the predictions are
    being recorded for a gradient, and targets and weights are not.

    `dtype` is that of the result. float64 and integer predictions are cast to it first, as in
    Keras; half-precision ones are read as they are and summed in float32.

    A penalty on weights is added to the reduced loss. Each replica of a strategy adds its share, so
    that a step counts it once. On the training path one op makes the loss, the penalty and all
    their gradients, where the gradients are asked for.

    Subclasses define:
      `_compiled`: the `CompiledLoss`;
      `_encoded(formula)`: the attributes of its ops;
      `_rows(y_true, y_pred)`: checks two tensors and returns `Rows`;
      `_row_losses(rows)`: the losses, of shape `rows.shape`.
    """

    def __init__(self, *, reduction, name, dtype, penalty):
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if not isinstance(penalty, Penalty | None):
            raise TypeError(f"`penalty` must be a fusedloss.Penalty or None. Got {penalty!r}.")
        if penalty is not None and not self._reduces():
            raise ValueError(
                "A penalty is one number a step, and cannot be added to losses that are not "
                f"reduced. Got a `penalty` and `reduction={reduction!r}`: choose another "
                "reduction, or add `penalty()` to the total yourself."
            )
        self.penalty = penalty

    def __call__(self, y_true, y_pred, sample_weight=None):
        mask = backend.get_keras_mask(y_pred)
        with keras.name_scope(self.name):
            rows = self._converted(y_true, y_pred)
            if mask is None:
                mask = rows.counted
            elif rows.counted is not None:
                mask &= rows.counted
            dtype = loss_dtype(rows.prediction)
            if sample_weight is not None:
                sample_weight = keras.ops.convert_to_tensor(sample_weight, dtype.name)
            penalized = self._penalized()
            loss = None
            if self._is_training(rows, sample_weight):
                fused = penalized if penalized and makes_gradients(penalized[1]) else None
                loss = self._training_loss(rows, sample_weight, mask, dtype, fused)
                if loss is not None and fused:
                    penalized = None  # It is in the loss.
            if loss is None:
                loss = reduce_weighted_values(
                    self._row_losses(rows),
                    sample_weight=sample_weight,
                    mask=mask,
                    reduction=self.reduction,
                    dtype=dtype.name,
                )
                if self._reduces() and loss.shape == [0]:
                    loss = tf.reduce_sum(loss)  # Keras returns an empty batch as it is.
            if penalized:
                loss += penalty_sum(*penalized, dtype)
            return tf.cast(loss, self.dtype)

    def call(self, y_true, y_pred):
        """The losses before weights, reduction and penalty."""
        rows = self._converted(y_true, y_pred)
        losses = self._row_losses(rows)
        if rows.counted is not None:
            backend.set_keras_mask(losses, rows.counted)
        return losses

    def bind(self, model):
        """Binds the penalty of a loaded loss, if there is one, to the variables of `model`.

        Returns:
          Itself.
        Raises:
          ValueError: the model has no or several variables of a path that the penalty is on.
        """
        if self.penalty is not None:
            self.penalty.bind(model)
        return self

    def get_config(self):
        penalty = keras.saving.serialize_keras_object(self.penalty)
        return {**super().get_config(), "dtype": self.dtype, "penalty": penalty}

    @classmethod
    def from_config(cls, config):
        penalty = keras.saving.deserialize_keras_object(config.get("penalty"))
        return cls(**{**config, "penalty": penalty})

    def _converted(self, y_true, y_pred):
        rows = self._rows(tf.convert_to_tensor(y_true), self._cast(y_pred))
        return rows._replace(given=(y_true, y_pred))

    def _cast(self, y_pred):
        y_pred = tf.convert_to_tensor(y_pred)
        as_they_are = (tf.float16, tf.bfloat16, tf.float32)
        if self.dtype == "float64" or y_pred.dtype not in as_they_are:
            y_pred = tf.cast(y_pred, self.dtype)
        return y_pred

    def _reduces(self):
        return self.reduction not in (None, "none")

    def _is_training(self, rows, sample_weight):
        differentiable = [] if sample_weight is None else [sample_weight]
        if not self._compiled.differentiates_targets:
            differentiable += tf.nest.flatten(rows.targets)
        return (
            self._reduces()
            and rows.shape.rank > 0  # Keras leaves the loss of a single row unscaled.
            and rows.prediction.dtype != tf.float16  # Underflows before a loss scale arrives.
            and _lib.ops() is not None
            and should_record_backprop(tf.nest.flatten(rows.predictions))
            and not should_record_backprop(differentiable)
        )

    def _penalized(self):
        """What `Penalty.operands` returns, None without a penalty."""
        if self.penalty is None:
            return None
        outputs = _outputs_with(self.penalty)
        if outputs > 1:
            raise ValueError(
                f"A penalty counts once a step, but the losses of {outputs} outputs of the model "
                "carry the same one: give it to the loss of one output alone."
            )
        return self.penalty.operands(tf.distribute.get_strategy().num_replicas_in_sync)

    def _training_loss(self, rows, sample_weight, mask, dtype, penalized):
        """The reduced loss, or None if the weights do not simply weigh rows."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        reduction = "sum" if self.reduction == "sum" else "mean"
        weight = apply_mask(sample_weight, mask, dtype=dtype.name, reduction=self.reduction)
        if weight is None:
            return self._reduced_loss(rows, tf.zeros([0], dtype), penalized, reduction, replicas)
        if weight.shape.rank == rows.shape.rank + 1 and weight.shape[-1] == 1:
            weight = tf.squeeze(weight, -1)
        if not _broadcasts_to(weight.shape, rows.shape):
            return None
        if self.reduction == "mean_with_sample_weight":
            reduction = "sum"
            weight = tf.math.divide_no_nan(weight, tf.reduce_sum(weight) * replicas)
        if not (weight.shape.is_fully_defined() and weight.shape == rows.shape):
            weight = tf.broadcast_to(weight, tf.shape(rows.prediction)[: rows.shape.rank])
        return self._reduced_loss(rows, weight, penalized, reduction, replicas)

    def _reduced_loss(self, rows, row_weight, penalized, reduction, replicas):
        """Sum of row_weight * loss, over rows * replicas if `reduction` is "mean", plus penalty."""
        loss, residuals = self._compiled.reduced(
            rows.predictions,
            rows.targets,
            *rows.formula.arrays(row_weight.dtype),
            row_weight,
            penalized=penalized,
            reduction=reduction,
            replicas=replicas,
            **self._encoded(rows.formula),
        )
        self._keep(residuals, rows)
        return loss

    def _keep(self, residuals, rows):
        """What a loss does with the residuals of the op that has made it."""


def _broadcasts_to(weight, rows):
    """Whether Keras would multiply losses of shape `rows` by such weights and keep the shape.

    Not where it would reshape the losses to match, or where it would raise an error.
    """
    if weight.rank is None or weight.rank > rows.rank:
        return False
    if weight.rank == rows.rank - 1 and rows[-1] == 1:
        return False
    pairs = zip(weight[::-1], rows[::-1], strict=False)
    return all(w == 1 or w == row or (row != 1 and None in (w, row)) for w, row in pairs)


def _outputs_with(penalty):
    """How many outputs of the compiled model that is calling have a loss with this penalty."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is CompileLoss.call.__code__:
            entries = frame.f_locals["self"]._flat_losses
            return sum(getattr(entry.loss, "penalty", None) is penalty for entry in entries)
        frame = frame.f_back
    return 0


def load_model(path, **kwargs):
    """`keras.models.load_model`, which then binds the penalties of the model's losses.

    Args:
      path, kwargs: as of `keras.models.load_model`.
    Raises:
      ValueError: the model has no or several variables of a path that a penalty is on.
    """
    model = keras.models.load_model(path, **kwargs)
    for loss in keras.tree.flatten(model.loss):
        if hasattr(loss, "bind"):  # Also one that holds another loss.
            loss.bind(model)
    return model
