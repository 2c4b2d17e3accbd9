"""Distances of feature maps: the functional op and the Keras class."""

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend

from fusedloss import _lib
from fusedloss._compiled import CompiledLoss
from fusedloss._loss import FusedLoss, Rows
from fusedloss.reference._inputs import loss_dtype
from fusedloss.reference.feature_distance import Formula, aligned, checked_row_loss, row_loss


def _encoded(formula):
    """The attributes of the compiled ops. Their floats are strings: an attribute has 32 bits."""
    scalars = formula.scalars()
    return {**scalars, "epsilon": repr(scalars["epsilon"])}


def _reference(*inputs, epsilon, epsilon_in_root, **words):
    """`row_loss`, called with the attributes of the compiled ops."""
    words = {name: tf.compat.as_str(word) for name, word in words.items()}
    return row_loss(*inputs, epsilon=float(epsilon), epsilon_in_root=epsilon_in_root, **words)


_COMPILED = CompiledLoss(
    "feature_distance",
    attributes=("metric", "reference", "data_format", "epsilon", "epsilon_in_root"),
    # predictions and targets; then channel_weights and layer_weights
    inputs=("layers", "layers", "layers", None),
    row_inputs=0,
    reference=_reference,
    differentiates_targets=True,
)


def _row_losses(targets, predictions, formula):
    if _lib.ops() is None:
        return checked_row_loss(targets, predictions, formula)
    arrays = formula.arrays(loss_dtype(predictions[0]))
    (loss,) = _COMPILED.rows(predictions, targets, *arrays, **_encoded(formula))
    return loss


def feature_distance(
    target,
    prediction,
    *,
    metric="mse",
    reference="target",
    channel_weights=None,
    layer_weights=None,
    data_format="channels_last",
    epsilon=None,
    epsilon_in_root=True,
    differentiate_target=False,
):
    """Distance of each example's feature maps from those of a reference, summed over layers.

    With a the features that a layer predicts, b those of its reference, e = a - b, and weights w
    of the channels, or 1, the distance of a layer is, by `metric`:

    - "mse": the mean of `w * e**2` over positions and channels;
    - "mae": the mean of `w * |e|`;
    - "charbonnier": the mean of `w * sqrt(e**2 + epsilon**2)`, of LapSRN (Lai et al. 2017);
    - "cosine": one less `sum_c w*a*b / (|a| * |b|)`, `|x| = sqrt(sum_c w*x**2 + epsilon)`, its mean
      over positions;
    - "lpips": `sum_c w * (a/|a| - b/|b|)**2`, its mean over positions, with
      `|x| = sqrt(sum_c x**2 + epsilon)`, so that gradients are finite where features are 0: Zhang
      et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (2018), eq. 1.
      Without `epsilon_in_root`, `|x| = sqrt(sum_c x**2) + epsilon`, as their code has it; the
      derivative of this norm at 0 is taken to be 0.
    - "gram": "mse" of the Gram matrices `F.T @ F / positions`, F being `[positions, channels]`: the
      style distance of Johnson et al., Perceptual Losses for Real-Time Style Transfer (2016), which
      is 4 times that of Gatys et al. (2016). The matrices are made by TensorFlow.

    All layers are read in one pass. Where a distance has a corner, its derivative is 0; without
    positions or channels it is 0.

    Args:
      target: the features of the reference, one tensor or a list, tuple or dict of one a layer, as
        `prediction`, of any numeric type. Each has the shape of its prediction, or that of one
        example, `[..., channels]` or `[1, ..., channels]`, as one target of all examples. Not
        looked at with `reference="first"`.
      prediction: float16, bfloat16, float32 or float64 `[rows, ..., channels]`, of one type.
      metric: see above.
      reference: "target", or "first" for the prediction of the first example in place of a target.
        The distance of that example is 0, and gradients flow to both.
      channel_weights: finite constants, not negative: a flat list for one layer; for several, a
        list or dict of flat lists or None. They do not change the divisor. Not with "gram".
      layer_weights: a list or dict of finite constants, not negative; None for 1 each. They do not
        change the sum to a mean.
      data_format: "channels_last", or "channels_first" for `[rows, channels, ...]`.
      epsilon: greater than 0; None for 1e-3 of "charbonnier", in the unit of the features, 1e-12 of
        "cosine" and 1e-10 of "lpips". The others have none.
      epsilon_in_root: False for the other placement in "lpips".
      differentiate_target: whether gradients flow to `target` too; else it is taken as constant.
    Returns:
      float `[rows]`: float64 for float64 predictions, else float32. Differentiable to any order.
    Raises:
      TypeError: predictions of another type, or of several.
      ValueError: an argument out of range or for other layers than there are; shapes that disagree
        or have no known rank.
      InvalidArgumentError: shapes that disagree, as found when the op runs.
    """
    formula = Formula.parse(
        metric=metric,
        reference=reference,
        channel_weights=channel_weights,
        layer_weights=layer_weights,
        data_format=data_format,
        epsilon=epsilon,
        epsilon_in_root=epsilon_in_root,
        differentiate_target=differentiate_target,
    )
    return _row_losses(*aligned(target, prediction, formula))


def _listed(by_layer):
    """The weights in a `Formula` as lists and dicts, as users give them and a config holds them."""
    if by_layer is None:
        return None
    lists = {name: None if x is None else np.asarray(x).tolist() for name, x in by_layer.items()}
    if None in lists:
        return lists[None]
    return list(lists.values()) if list(lists) == list(range(len(lists))) else lists


@keras.saving.register_keras_serializable(package="fusedloss")
class FeatureDistance(FusedLoss):
    """Distance of feature maps, as a Keras loss.

    `y_pred` are the features of the batch, `y_true` those of their reference, as `prediction` and
    `target` of `fusedloss.nn.feature_distance`: tensors, or, where the loss is called in a loop of
    one's own, also lists or dicts of several layers'. Under `fit` a loss gets one output of the
    model. To have the features of a layer there, expose it as an output; a loss that reads the
    layer's symbolic tensor would read another graph's.

    Args:
      metric: "mse", "mae", "charbonnier", "cosine", "lpips" or "gram".
      reference: "target", or "first" for the distance from the first example of the batch, whose
        own is 0. Then `y_true` is not looked at and can be None.
      reduction: "sum_over_batch_size" or "mean", "sum", "mean_with_sample_weight", None or "none".
      name: of the loss.
      dtype: of the result; None for `keras.config.floatx()`.
      channel_weights, layer_weights, data_format, epsilon, epsilon_in_root, differentiate_target:
        as in `fusedloss.nn.feature_distance`.
      penalty: a `fusedloss.Penalty` to be added to the loss once a step, or None.
    Raises:
      ValueError: an argument out of range; a penalty without a reduction; when called, shapes or
        layers that disagree, predictions with a Keras mask of positions, or a penalty that is not
        bound or that several outputs of a compiled model carry.
      TypeError: when called, layers of several types.

    Half of the distance from the first example's features and half of a cross-entropy:

    ```python
    model = fusedloss.models.expose(model, ["features"])
    model.compile(
        "adam",
        loss={
            "features": fusedloss.losses.FeatureDistance(reference="first"),
            "output": fusedloss.losses.SparseCategoricalCrossentropy(),
        },
        loss_weights={"features": 0.5, "output": 0.5},
    )
    ```
    """

    _compiled = _COMPILED
    _encoded = staticmethod(_encoded)

    def __init__(
        self,
        metric="mse",
        reference="target",
        reduction="sum_over_batch_size",
        name="feature_distance",
        dtype=None,
        *,
        channel_weights=None,
        layer_weights=None,
        data_format="channels_last",
        epsilon=None,
        epsilon_in_root=True,
        differentiate_target=False,
        penalty=None,
    ):
        super().__init__(reduction=reduction, name=name, dtype=dtype, penalty=penalty)
        self._formula = Formula.parse(
            metric=metric,
            reference=reference,
            channel_weights=channel_weights,
            layer_weights=layer_weights,
            data_format=data_format,
            epsilon=epsilon,
            epsilon_in_root=epsilon_in_root,
            differentiate_target=differentiate_target,
        )
        self._config = {
            "metric": metric,
            "reference": reference,
            "channel_weights": _listed(self._formula.channel_weights),
            "layer_weights": _listed(self._formula.layer_weights),
            "data_format": data_format,
            "epsilon": None if epsilon is None else self._formula.epsilon,
            "epsilon_in_root": self._formula.epsilon_in_root,
            "differentiate_target": self._formula.differentiate_target,
        }

    def get_config(self):
        return {**super().get_config(), **self._config}

    def _layers(self, y_true, y_pred):
        """The arguments of `fusedloss.nn.feature_distance`."""
        return y_true, y_pred

    def _converted(self, y_true, y_pred):
        for x in tf.nest.flatten(y_pred):
            mask = backend.get_keras_mask(x)
            if mask is not None and mask.shape.rank != 1:
                raise ValueError(
                    "A feature distance is a mean over all positions, and cannot leave some out. "
                    f"Got predictions with a mask of shape {mask.shape}: stop the mask before this "
                    "output of the model."
                )
        target, prediction = self._layers(y_true, y_pred)
        prediction = tf.nest.map_structure(
            lambda x: self._cast(tf.convert_to_tensor(x)), prediction
        )
        targets, predictions, formula = aligned(target, prediction, self._formula)
        return Rows(targets, predictions, predictions[0].shape[:1], None, formula)

    def _row_losses(self, rows):
        return _row_losses(rows.targets, rows.predictions, rows.formula)
