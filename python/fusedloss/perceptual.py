"""A distance of images by what a frozen model sees in them."""

import keras
import tensorflow as tf

from fusedloss.feature_distance import FeatureDistance
from fusedloss.models import (
    applied,
    check_function,
    from_archive,
    frozen_extractor,
    to_archive,
    to_config,
)
from fusedloss.reference._inputs import is_list


def _by_name(argument, given, layers):
    """A list of one entry a layer as a dict by the names of the layers."""
    if layers is None or not is_list(given):
        return given
    if len(given) != len(layers):
        raise ValueError(
            f"`{argument}` must have one entry a layer. Got {len(given)} for {len(layers)} layers, "
            f"{', '.join(layers)}."
        )
    return dict(zip(layers, given, strict=True))


@keras.saving.register_keras_serializable(package="fusedloss")
class PerceptualLoss(FeatureDistance):
    """Distance of the features that a frozen model finds in predicted and in target images.

    `FeatureDistance(metric)` of `extractor(preprocess(image))` for the two images, summed over
    layers. The gradient flows through the extractor to the predictions; its weights
    never change, are no weights of the model in training, and are saved inside of the loss.

    Args:
      extractor: a Keras model or layer, or what `fusedloss.models.load_frozen` returns; frozen in
        place, as far as it is used. What it returns is compared: a tensor, or a list or dict.
      layers: None, or names of layers of the extractor: their outputs are compared in place of its
        own.
      layer_weights: of the distances: a list in the order of `layers`, or a dict by their names;
        None for 1 each.
      metric: as in `fusedloss.nn.feature_distance`. Style is "gram".
      preprocess: None, or a layer without weights (a `Rescaling`) or a function of images, applied
        to both. To be saved, a function has to be registered:
        `keras.saving.register_keras_serializable()`.
      reduction: "sum_over_batch_size" or "mean", "sum", "mean_with_sample_weight", None or "none".
      name: of the loss.
      dtype: of the result; None for `keras.config.floatx()`.
      channel_weights: of each layer, a list or dict of flat lists or None; a flat list for one.
      epsilon, epsilon_in_root, data_format: as in `fusedloss.nn.feature_distance`.
      penalty: a `fusedloss.Penalty` to be added to the loss once a step, or None.
    Raises:
      TypeError: something else than a model.
      ValueError: an argument out of range; a layer that the extractor has not; weights of other
        layers; when called, a `preprocess` with weights or images of a shape that the extractor
        does not take; when saved, a `preprocess` that cannot be.

    Called with a list or dict in the place of `y_true`, the loss takes it for features made before
    by `features`, as for a target that stays the same. Content and style of two pictures:

    ```python
    content = fusedloss.losses.PerceptualLoss(vgg, ["block4_conv2"], metric="mse")
    style = fusedloss.losses.PerceptualLoss(vgg, ["block1_conv1", "block2_conv1"], metric="gram")
    of_content, of_style = content.features(photograph), style.features(painting)
    loss = content(of_content, image) + 10 * style(of_style, image)
    ```
    """

    def __init__(
        self,
        extractor,
        layers=None,
        layer_weights=None,
        metric="lpips",
        preprocess=None,
        reduction="sum_over_batch_size",
        name="perceptual_loss",
        dtype=None,
        *,
        channel_weights=None,
        epsilon=None,
        epsilon_in_root=True,
        data_format="channels_last",
        penalty=None,
    ):
        layers = [layers] if isinstance(layers, str) else layers
        if is_list(channel_weights) and any(x is None or is_list(x) for x in channel_weights):
            channel_weights = _by_name("channel_weights", channel_weights, layers)
        super().__init__(
            metric=metric,
            reduction=reduction,
            name=name,
            dtype=dtype,
            channel_weights=channel_weights,
            layer_weights=_by_name("layer_weights", layer_weights, layers),
            data_format=data_format,
            epsilon=epsilon,
            epsilon_in_root=epsilon_in_root,
            penalty=penalty,
        )
        self.extractor = frozen_extractor(extractor, layers)
        check_function("preprocess", preprocess)
        self.preprocess = preprocess

    def features(self, images):
        """What the loss compares of images: a list or dict of features, one a layer."""
        images = tf.convert_to_tensor(images)
        if not images.dtype.is_floating:
            images = tf.cast(images, keras.config.floatx())
        features = self.extractor(applied("preprocess", self.preprocess, images))
        return features if isinstance(features, list | tuple | dict) else [features]

    def _layers(self, y_true, y_pred):
        if not isinstance(y_true, list | tuple | dict):
            y_true = self.features(y_true)
        return y_true, self.features(y_pred)

    def get_config(self):
        config = super().get_config()
        for fixed in ("reference", "differentiate_target"):
            del config[fixed]
        return {
            **config,
            "extractor": to_archive(self.extractor),
            "preprocess": to_config("preprocess", self.preprocess),
        }

    @classmethod
    def from_config(cls, config):
        return super().from_config(
            {
                **config,
                "extractor": from_archive(config["extractor"]),
                "preprocess": keras.saving.deserialize_keras_object(config["preprocess"]),
            }
        )
