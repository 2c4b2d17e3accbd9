"""Softmax cross-entropy as the last layer of a model, for masks that are inputs of the model."""

import keras
import tensorflow as tf
from keras.src import backend
from keras.src.losses.loss import unscale_loss_for_distribution

from fusedloss.reference._inputs import loss_dtype
from fusedloss.reference.softmax_xent import checked_mask, warped
from fusedloss.softmax_xent import CategoricalCrossentropy, SparseCategoricalCrossentropy


@keras.saving.register_keras_serializable(package="fusedloss")
class MaskedCrossentropy(keras.layers.Layer):
    """Adds the cross-entropy over the legal classes to a model's loss; returns their softmax.

    A loss of `compile` sees targets and predictions alone. This layer takes the mask as well, from
    wherever it comes in the model, and adds the mean of the rows by `add_loss`; illegal classes
    count for nothing, and rows with nothing legal have loss 0. Logits in half precision are read as
    they are. The softmax is made only where it is used, so that training takes one pass.

    Args:
      label_smoothing, class_weight, temperature, z_loss, softcap, gamma, alpha: as in
        `fusedloss.losses.CategoricalCrossentropy`.
      kwargs: name and dtype, as of `keras.layers.Layer`.
    Raises:
      ValueError: an argument out of range.

    ```python
    board, move = keras.Input([64]), keras.Input([], dtype="int32")
    legal = keras.Input([1858], dtype="bool")
    logits = keras.layers.Dense(1858)(board)
    policy = fusedloss.layers.MaskedCrossentropy()(logits, move, legal)
    model = keras.Model([board, move, legal], policy)
    model.compile("adam")
    model.fit([boards, moves, legal_moves])
    ```
    """

    def __init__(
        self,
        label_smoothing=0.0,
        class_weight=None,
        temperature=1.0,
        z_loss=0.0,
        softcap=None,
        gamma=0.0,
        alpha=1.0,
        **kwargs,
    ):
        super().__init__(autocast=False, **kwargs)
        constants = {
            "label_smoothing": label_smoothing,
            "class_weight": class_weight,
            "temperature": temperature,
            "z_loss": z_loss,
            "softcap": softcap,
            "gamma": gamma,
            "alpha": alpha,
        }
        dtype = "float64" if self.compute_dtype == "float64" else "float32"
        self._of_labels = SparseCategoricalCrossentropy(True, dtype=dtype, **constants)
        self._of_targets = CategoricalCrossentropy(True, dtype=dtype, **constants)
        config = self._of_targets.get_config()
        self._config = {name: config[name] for name in constants}

    def call(self, logits, targets=None, mask=True, sample_weight=None):
        """Adds the loss, if there are targets.

        Args:
          logits: `[..., classes]`.
          targets: labels `[...]` or `[..., 1]`, or dense targets `[..., classes]`; None: no loss.
          mask: a boolean tensor or array `[classes]`, or what broadcasts to the logits: the legal
            classes; True: all.
            TensorFlow does not split boolean inputs over replicas: there give the model numbers,
            and the layer `numbers != 0`.
          sample_weight: broadcasts to `[...]`.
        Returns:
          The softmax over the legal classes, in the compute dtype; 0 for the others.
        """
        # Not None by default: in its place Keras puts the mask of the logits, which is about rows.
        mask = None if mask is None or mask is True else checked_mask(mask)
        if targets is not None:
            of_labels = targets.shape.rank < logits.shape.rank or (
                targets.shape[-1] == 1 and logits.shape[-1] != 1
            )
            loss = self._of_labels if of_labels else self._of_targets
            loss = loss if mask is None else loss.masked(mask)
            mean = loss(targets, logits, sample_weight)
            self.add_loss(unscale_loss_for_distribution(mean))  # Keras scales what it collects.
        return self._softmax(logits, mask)

    def _softmax(self, logits, mask):
        scores = tf.cast(logits, loss_dtype(logits))
        scores = warped(scores, self._config["softcap"], self._config["temperature"])
        if mask is not None:
            scores = tf.where(mask, scores, scores.dtype.min)
        shares = tf.nn.softmax(scores)
        if mask is not None:
            shares = tf.where(mask, shares, tf.zeros([], shares.dtype))
        return tf.cast(shares, self.compute_dtype)

    def compute_mask(self, inputs, previous_mask=None):
        """That of the logits."""
        return backend.get_keras_mask(inputs)

    def get_config(self):
        return {**super().get_config(), **self._config}
