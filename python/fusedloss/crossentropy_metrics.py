"""Keras metrics that come out of the pass that makes a softmax cross-entropy."""

import re

import keras
import tensorflow as tf
from keras.src import backend

from fusedloss.softmax_xent import SoftmaxXent, row_weights


@keras.saving.register_keras_serializable(package="fusedloss")
class CrossentropyMetric(keras.metrics.Mean):
    """The mean of one measure of the softmax that a cross-entropy takes the logarithm of.

    Rows count if they are not ignored and have a target among the classes of the loss; they are
    weighted by `sample_weight` and Keras's mask. The result is 0 without rows.

    The loss makes the measures in its own pass, for all metrics that it has been given to: a step
    of `fit` or `evaluate` whose model is compiled with both reads the predictions once. Called
    with other tensors than the loss has just been, a metric runs the pass itself. So it does after
    `keras.models.load_model`, where loss and metric are read apart, but not after
    `fusedloss.load_model`.

    Args:
      loss: `fusedloss.losses.CategoricalCrossentropy`, `SparseCategoricalCrossentropy` or
        `CategoricalFocalCrossentropy`. The classes are those of its subset, and of the row's own
        if it has such; all of them without one.
      measure: one of
        "accuracy", how often the label has the highest score of the classes, or of dense targets
        the first of the greatest; of equal scores the first is the highest;
        "top_<k>_accuracy" with a number for <k>, how often its score is one of the k highest;
        "entropy" of the softmax, in nats;
        "log_sum_exp" of the logits, in nats, those behind a softmax output included; of other
        probabilities the log of their sum.
        The last two are over all classes if the loss has `normalize="full"`.
      name: of the metric; None for `measure`.
      dtype: as of `keras.metrics.Mean`.
    Raises:
      TypeError: another loss.
      ValueError: another measure.
    """

    def __init__(self, loss, measure="accuracy", name=None, dtype=None):
        if not isinstance(loss, SoftmaxXent):
            raise TypeError(
                "Metrics come from the pass of CategoricalCrossentropy, "
                "SparseCategoricalCrossentropy or CategoricalFocalCrossentropy in "
                f"fusedloss.losses. Got {loss!r}."
            )
        top = re.fullmatch(r"top_([1-9]\d*)_accuracy", str(measure))
        if not top and measure not in ("accuracy", "entropy", "log_sum_exp"):
            raise ValueError(
                '`measure` must be "accuracy", "top_<k>_accuracy" with a positive number for <k>, '
                f'"entropy" or "log_sum_exp". Got {measure!r}.'
            )
        super().__init__(name=name or measure, dtype=dtype)
        self.loss = loss
        self.measure = measure
        self._top = int(top[1]) if top else 1
        loss.makes_metrics = True
        if measure.endswith("accuracy"):
            self._direction = "up"

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Counts rows.

        Args:
          y_true, y_pred: as the loss takes them.
          sample_weight: broadcasts to the rows.
        """
        rank, entropy, log_sum_exp = tf.unstack(self.loss.row_metrics(y_true, y_pred), axis=-1)
        if self.measure == "entropy":
            values = entropy
        elif self.measure == "log_sum_exp":
            values = log_sum_exp
        else:
            values = rank < self._top
        mask = backend.get_keras_mask(y_pred)
        weights = row_weights(rank >= 0, mask, sample_weight, self.dtype)
        # A row that does not count hides its NaN.
        values = tf.math.multiply_no_nan(tf.cast(values, self.dtype), weights)
        self.total.assign_add(tf.reduce_sum(values))
        self.count.assign_add(tf.reduce_sum(weights))

    def get_config(self):
        loss = keras.saving.serialize_keras_object(self.loss)
        return {**super().get_config(), "loss": loss, "measure": self.measure}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "loss": keras.saving.deserialize_keras_object(config["loss"])})


def crossentropy_metrics(loss, top_k=None):
    """All that the pass of a cross-entropy can tell: a list of metrics for `compile`.

    They are separate, and not one with several results, so that Keras names them after their output
    where a model has several.

    Args:
      loss: see `CrossentropyMetric`. Give the same object to `compile`.
      top_k: None, a positive int, or a list of them.
    Returns:
      Metrics of the names "accuracy", "top_<k>_accuracy" for every k, "entropy", "log_sum_exp".
    Raises:
      TypeError: a loss that `CrossentropyMetric` does not take.
      ValueError: a `top_k` that is no positive int, or is listed twice.

    ```python
    loss = fusedloss.losses.CategoricalCrossentropy(from_logits=True, mask_negative_targets=True)
    model.compile("adam", loss=loss, metrics=fusedloss.metrics.crossentropy_metrics(loss, top_k=5))
    ```
    """
    tops = [] if top_k is None else tf.nest.flatten(top_k)
    wrong = [k for k in tops if isinstance(k, bool) or not isinstance(k, int) or k < 1]
    if wrong or len(set(tops)) < len(tops):
        raise ValueError(f"`top_k` must be positive integers, each listed once. Got {top_k!r}.")
    measures = ["accuracy", *(f"top_{k}_accuracy" for k in tops), "entropy", "log_sum_exp"]
    return [CrossentropyMetric(loss, measure) for measure in measures]
