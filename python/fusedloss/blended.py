"""A loss of the predictions blended with what a frozen model makes of them."""

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend
from keras.src.losses.losses import LossFunctionWrapper

from fusedloss.models import (
    applied,
    check_function,
    from_archive,
    frozen_extractor,
    single_output,
    to_archive,
    to_config,
)
from fusedloss.reference._inputs import loss_dtype, numbers
from fusedloss.softmax_xent import Blend, SoftmaxXent


@keras.saving.register_keras_serializable(package="fusedloss")
class BlendedLoss(keras.losses.Loss):
    """`loss(y_true, w0 * y_pred + w1 * model(adapt(y_pred)))` with a frozen model.

    The weights of the model never change and are no weights of the model in training; the gradient
    flows through it to the predictions. They are saved inside of the loss. Reduction, sample
    weights and masks are those of `loss`. A blend of probabilities is not taken for a softmax
    output: there are no logits to walk back to. The cross-entropies of this package add up as they
    read, so that no memory holds the blend or its gradient.

    Args:
      loss: a Keras loss, of this package or not, its name, or a function as `compile` takes it.
      model: a Keras model or layer, or what `fusedloss.models.load_frozen` returns; frozen by this.
        Its output has the shape of the predictions.
      weights: w0 and w1, two finite numbers.
      adapt: None, or a layer without weights (a `Reshape`) or a function from the predictions to
        what the model takes. To be saved, a function has to be registered:
        `keras.saving.register_keras_serializable()`.
      name: of the loss.
    Raises:
      TypeError: something else than a model.
      ValueError: weights that are not two finite numbers; when called, an `adapt` with weights,
        predictions that the model does not take or an output of another shape; when saved, an
        `adapt` that cannot be.

    ```python
    g = fusedloss.models.load_frozen("g.keras")
    loss = fusedloss.losses.BlendedLoss(
        fusedloss.losses.CategoricalCrossentropy(), g, adapt=keras.layers.Reshape((8, 8, 1))
    )
    model.compile("adam", loss=loss)
    ```
    """

    def __init__(self, loss, model, weights=(0.7, 0.3), adapt=None, name="blended_loss"):
        given, loss = loss, keras.losses.get(loss)
        if not isinstance(loss, keras.losses.Loss):
            if not callable(loss):
                raise ValueError(
                    f"`loss` must be a Keras loss, its name, or a function. Got {given!r}."
                )
            loss = LossFunctionWrapper(loss, name=getattr(loss, "__name__", None))
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.model = frozen_extractor(model)
        self.weights = tuple(numbers("weights", weights, "w0 and w1").tolist())
        if len(self.weights) != 2 or not np.isfinite(self.weights).all():
            raise ValueError(f"`weights` must be two finite numbers, w0 and w1. Got {weights!r}.")
        check_function("adapt", adapt)
        self.adapt = adapt

    @property
    def penalty(self):
        """That of the inner loss, None without one."""
        return getattr(self.loss, "penalty", None)

    def bind(self, model):
        """Binds the penalty of the inner loss, if it has one, as of `fusedloss.load_model`."""
        if self.penalty is not None:
            self.loss.bind(model)
        return self

    def __call__(self, y_true, y_pred, sample_weight=None):
        with keras.name_scope(self.name):
            return self.loss(y_true, self._blend(*self._parts(y_pred)), sample_weight)

    def call(self, y_true, y_pred):
        """The losses of the inner loss before weights and reduction."""
        return self.loss.call(y_true, self._blend(*self._parts(y_pred)))

    def _parts(self, y_pred):
        """The predictions, and what the model makes of them in the same shape."""
        y_pred = tf.convert_to_tensor(y_pred)
        # Without a mask, which is for the loss alone.
        adapted = applied("adapt", self.adapt, tf.identity(y_pred))
        other = single_output(
            self.model(adapted), f"The model {self.model.model.name!r} of a blend"
        )
        if not other.shape.is_compatible_with(y_pred.shape):
            raise ValueError(
                "The model of a blend must return the shape of the predictions. Got "
                f"{other.shape} for predictions of shape {y_pred.shape}."
            )
        return y_pred, other

    def _blend(self, y_pred, other):
        if isinstance(self.loss, SoftmaxXent):
            blend = Blend([y_pred, other], self.weights)
        else:
            dtype = loss_dtype(y_pred)
            w0, w1 = (tf.constant(weight, dtype) for weight in self.weights)
            blend = w0 * tf.cast(y_pred, dtype) + w1 * tf.cast(other, dtype)
        mask = backend.get_keras_mask(y_pred)
        if mask is not None:
            backend.set_keras_mask(blend, mask)
        return blend

    def get_config(self):
        return {
            "name": self.name,
            "loss": keras.saving.serialize_keras_object(self.loss),
            "model": to_archive(self.model),
            "weights": list(self.weights),
            "adapt": to_config("adapt", self.adapt),
        }

    @classmethod
    def from_config(cls, config):
        return cls(
            **{
                **config,
                "loss": keras.saving.deserialize_keras_object(config["loss"]),
                "model": from_archive(config["model"]),
                "adapt": keras.saving.deserialize_keras_object(config["adapt"]),
            }
        )
