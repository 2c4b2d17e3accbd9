"""Distances of feature maps a and b, example by example, in TensorFlow.

Summed over layers, each with its weight λ; with e = a - b, and weights w of the channels, or 1:

    L = Σ λ·D

    mse          D = mean of w·e²                over positions and channels
    mae          D = mean of w·|e|
    charbonnier  D = mean of w·√(e² + ε²)
    cosine       D = 1 - Σ_c w·a·b / (|a|·|b|),  |x| = √(Σ_c w·x² + ε)      mean over positions
    lpips        D = Σ_c w·(a/|a| - b/|b|)²,     |x| = √(Σ_c x² + ε), or, unless epsilon_in_root,
                                                 √(Σ_c x²) + ε              mean over positions
    gram         D = the mse of FᵀF / positions, where F is a feature map [positions, channels]

b is a target or, with `reference="first"`, the first example, whose own distance is 0. Where a
distance has a corner, its derivative is 0; where a norm is 0, that of x/|x| is 1/|x|. Without
positions or channels it is 0.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from fusedloss.reference._inputs import (
    check_choice,
    check_predictions,
    is_list,
    loss_dtype,
    number,
    weights,
)

# The metrics and the epsilon that each has if none is given; None: it has none.
EPSILONS = {
    "mse": None,
    "mae": None,
    "charbonnier": 1e-3,
    "cosine": 1e-12,
    "lpips": 1e-10,
    "gram": None,
}


def _parsed_epsilon(metric, given):
    if EPSILONS[metric] is None:
        if given is not None:
            raise ValueError(f"Metric {metric!r} has no `epsilon`. Got {given!r}: leave it out.")
        return 0.0
    epsilon = EPSILONS[metric] if given is None else number("epsilon", given)
    added = epsilon**2 if metric == "charbonnier" else epsilon
    # TensorFlow takes what is less than `tiny` for 0.
    limits = np.finfo(np.float32)
    if not (epsilon > 0 and float(limits.tiny) <= added <= float(limits.max)):
        raise ValueError(
            f"`epsilon` must be finite and greater than 0, and what metric {metric!r} adds too, in "
            f"float32. Got {epsilon}, which adds {added}."
        )
    return epsilon


def _by_layer(given):
    """A dict of what is given for each layer, in order; the only layer has the name None."""
    if isinstance(given, dict):
        return given
    return dict(enumerate(given)) if isinstance(given, list | tuple) else {None: given}


def _in(name):
    """Where an error is, in words."""
    return "" if name is None else f" in layer {name!r}"


def _parsed_channel_weights(given, metric):
    if given is None:
        return None
    if metric == "gram":
        raise ValueError("Metric 'gram' has no `channel_weights`: leave them out.")
    if is_list(given) and not any(x is None or is_list(x) for x in given):
        given = {None: given}
    elif isinstance(given, np.ndarray):
        given = list(given)
    parsed = {}
    for name, values in _by_layer(given).items():
        argument = "channel_weights" if name is None else f"channel_weights[{name!r}]"
        parsed[name] = None if values is None else weights(argument, values, "one a channel")
    return parsed


def _parsed_layer_weights(given):
    if given is None:
        return None
    names = list(given) if isinstance(given, dict) else None
    values = list(given.values()) if isinstance(given, dict) else given
    values = weights("layer_weights", values, "one a layer")
    return dict(zip(names or range(len(values)), values.tolist(), strict=True))


def _matched(argument, given, names):
    """What is given for each of the layers, in their order; ValueError if it is for others."""
    if len(given) == len(names) == 1 and (None in given or None in names):
        return list(given.values())
    if given.keys() != set(names):
        expected, got = (
            "one tensor" if None in keys else f"{len(keys)} layers, {list(keys)}"
            for keys in (names, given)
        )
        raise ValueError(
            f"`{argument}` must be for the layers of the predictions: {expected}. Got it for {got}."
        )
    return [given[name] for name in names]


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """The constants of one loss."""

    metric: str
    reference: str
    channel_weights: dict | list | None  # of each layer, an array or None; None: all None
    layer_weights: dict | list | None  # None: all 1
    data_format: str
    epsilon: float
    epsilon_in_root: bool
    differentiate_target: bool

    @classmethod
    def parse(
        cls,
        *,
        metric,
        reference,
        channel_weights,
        layer_weights,
        data_format,
        epsilon,
        epsilon_in_root,
        differentiate_target,
    ):
        """Checks what users give; ValueError names the argument."""
        check_choice("metric", metric, tuple(EPSILONS))
        check_choice("reference", reference, ("target", "first"))
        check_choice("data_format", data_format, ("channels_last", "channels_first"))
        if not epsilon_in_root and metric != "lpips":
            raise ValueError(
                f"`epsilon_in_root=False` is for metric 'lpips' alone. Got metric {metric!r}."
            )
        return cls(
            metric=metric,
            reference=reference,
            channel_weights=_parsed_channel_weights(channel_weights, metric),
            layer_weights=_parsed_layer_weights(layer_weights),
            data_format=data_format,
            epsilon=_parsed_epsilon(metric, epsilon),
            epsilon_in_root=bool(epsilon_in_root),
            differentiate_target=bool(differentiate_target),
        )

    def of_layers(self, names):
        """The same with lists of weights, in the order of these layers; ValueError: of others."""
        channel_weights, layer_weights = self.channel_weights, self.layer_weights
        if channel_weights is None:
            channel_weights = dict.fromkeys(names)
        if layer_weights is None:
            layer_weights = dict.fromkeys(names, 1.0)
        return dataclasses.replace(
            self,
            channel_weights=_matched("channel_weights", channel_weights, names),
            layer_weights=_matched("layer_weights", layer_weights, names),
        )

    def arrays(self, dtype):
        """`channel_weights` and `layer_weights` as `row_loss` takes them, the first in `dtype`."""
        dtype = dtype.as_numpy_dtype
        channel_weights = [np.asarray(() if x is None else x, dtype) for x in self.channel_weights]
        return [channel_weights, np.asarray(self.layer_weights, np.float64)]

    def scalars(self):
        """The keyword arguments of `row_loss`."""
        return {
            "metric": self.metric,
            "reference": self.reference,
            "data_format": self.data_format,
            "epsilon": self.epsilon,
            "epsilon_in_root": self.epsilon_in_root,
        }


def _channel_axis(data_format):
    return -1 if data_format == "channels_last" else 1


def _check_prediction(prediction, name, weights_, data_format):
    """Raises ValueError if a feature map lacks an axis or does not fit its channels' weights."""
    shape = prediction.shape
    if shape.rank < 2:
        raise ValueError(
            "Feature maps must have an axis of examples and one of channels. Got predictions of "
            f"shape {shape}{_in(name)}."
        )
    channels = shape[_channel_axis(data_format)]
    if weights_ is not None and channels not in (None, weights_.size):
        raise ValueError(
            f"`channel_weights` has {weights_.size} entries{_in(name)}, but the predictions of "
            f"shape {shape} have {channels} channels, {data_format}: give one entry a channel."
        )


def _with_rows(target, prediction, name):
    """A target with an axis of examples, of 1 if it had none; ValueError if the shapes disagree."""
    shape = prediction.shape
    expanded = target[None] if target.shape.rank == shape.rank - 1 else target
    one = [1, *shape[1:]]
    if not any(expanded.shape.is_compatible_with(allowed) for allowed in (shape, one)):
        raise ValueError(
            "Targets must have the shape of the predictions or, as one target of all examples, "
            f"that without the first axis or with 1 there. Got targets of shape {target.shape} "
            f"and predictions of shape {shape}{_in(name)}."
        )
    return expanded


def _gram(features, data_format):
    """The Gram matrix of every example, over its positions: float `[rows, channels, channels]`."""
    axis, last = _channel_axis(data_format), data_format == "channels_last"
    shape = tf.shape(features, tf.int64)
    rows, channels = shape[0], shape[axis]
    positions = tf.size(features, tf.int64) // tf.maximum(rows * channels, 1)
    flat = [rows, positions, channels] if last else [rows, channels, positions]
    features = tf.reshape(tf.cast(features, loss_dtype(features)), flat)
    products = tf.matmul(features, features, transpose_a=last, transpose_b=not last)
    return tf.math.divide_no_nan(products, tf.cast(positions, products.dtype))


def aligned(target, prediction, formula):
    """Lays feature maps out as `row_loss` takes them and checks what is known of them.

    Args:
      target, prediction: a tensor, or a list, tuple or dict of tensors, as users give them.
      formula: a `Formula`.
    Returns:
      Lists of targets and of predictions, one a layer, Gram matrices in their place if that is the
      metric, and the formula of these layers.
    Raises:
      TypeError: predictions that are not floating point, or of several types.
      ValueError: unknown ranks, shapes that disagree, other layers here than there.
    """
    predictions = _by_layer(prediction)
    names = list(predictions)
    formula = formula.of_layers(names)
    if not names:
        raise ValueError("There must be at least one layer. Got an empty list of predictions.")
    predictions = [tf.convert_to_tensor(x) for x in predictions.values()]
    dtype = predictions[0].dtype
    if formula.reference == "first":
        targets = [tf.zeros([0], dtype)] * len(names)
    elif target is None:
        raise ValueError('Only with `reference="first"` can the target be None.')
    else:
        targets = _matched("target", _by_layer(target), names)
        targets = [tf.convert_to_tensor(x) for x in targets]
    for k, name in enumerate(names):
        check_predictions(targets[k], predictions[k])
        if predictions[k].dtype != dtype:
            raise TypeError(
                f"All layers must be of one type. Got {dtype.name}{_in(names[0])} and "
                f"{predictions[k].dtype.name}{_in(name)}: cast them."
            )
        _check_prediction(predictions[k], name, formula.channel_weights[k], formula.data_format)
        if not predictions[k].shape[:1].is_compatible_with(predictions[0].shape[:1]):
            raise ValueError(
                "All layers must have the same examples. Got predictions of shape "
                f"{predictions[0].shape}{_in(names[0])} and {predictions[k].shape}{_in(name)}."
            )
        if formula.reference == "target":
            targets[k] = tf.cast(_with_rows(targets[k], predictions[k], name), dtype)
    if not formula.differentiate_target:
        targets = [tf.stop_gradient(x) for x in targets]
    if formula.metric == "gram":
        predictions = [_gram(x, formula.data_format) for x in predictions]
        if formula.reference == "first":
            targets = [tf.zeros([0], x.dtype) for x in predictions]
        else:
            targets = [_gram(x, formula.data_format) for x in targets]
        formula = dataclasses.replace(formula, metric="mse", data_format="channels_last")
    return targets, predictions, formula


def _norm(features, weights_, axis, epsilon, epsilon_in_root):
    """|x| of every position, its axis of channels kept."""
    square = tf.reduce_sum(weights_ * tf.square(features), axis, keepdims=True)
    if epsilon_in_root:
        return tf.sqrt(square + epsilon)
    # The root has no derivative at 0. Selecting among results is not enough: infinity times 0
    # would reach the gradient.
    is_zero = square == 0
    root = tf.sqrt(tf.where(is_zero, tf.ones([], square.dtype), square))
    return tf.where(is_zero, tf.zeros([], square.dtype), root) + epsilon


def _distance(a, b, weights_, axis, metric, epsilon, epsilon_in_root):
    """D of every example in `a`; `b` has as many or one."""
    shape = tf.shape(a, tf.int64)
    values = tf.reduce_prod(shape[1:])
    positions = values // tf.maximum(shape[axis], 1)
    if metric == "cosine":
        norm_a, norm_b = (_norm(x, weights_, axis, epsilon, True) for x in (a, b))
        product = tf.reduce_sum(weights_ * a * b, axis, keepdims=True)
        terms, count = 1 - product / (norm_a * norm_b), positions
    elif metric == "lpips":
        one = tf.ones([], a.dtype)
        unit_a, unit_b = (x / _norm(x, one, axis, epsilon, epsilon_in_root) for x in (a, b))
        terms, count = weights_ * tf.square(unit_a - unit_b), positions
    else:
        error = a - b
        if metric == "mae":
            size = tf.abs(error)
        else:
            size = tf.square(error)
            if metric == "charbonnier":
                size = tf.sqrt(size + epsilon * epsilon)
        terms, count = weights_ * size, values
    total = tf.reduce_sum(terms, list(range(1, a.shape.rank)))
    return tf.math.divide_no_nan(total, tf.cast(count, total.dtype))


def row_loss(
    predictions,
    targets,
    channel_weights,
    layer_weights,
    *,
    metric,
    reference,
    data_format,
    epsilon,
    epsilon_in_root,
):
    """The loss of every example, on tensors laid out as the compiled op takes them.

    Args:
      predictions: of each layer, float `[rows, ..., channels]`, or `[rows, channels, ...]`.
      targets: of each layer, the same, or with 1 in the place of rows; not read with "first".
      channel_weights: of each layer, float `[channels]`, or `[0]` for 1.
      layer_weights: float64 `[layers]`.
      metric, reference, data_format, epsilon, epsilon_in_root: see above; not "gram".
    Returns:
      float `[rows]`.
    """
    dtype = loss_dtype(predictions[0])
    epsilon, axis = tf.constant(epsilon, dtype), _channel_axis(data_format)
    layers = zip(predictions, targets, channel_weights, tf.unstack(layer_weights), strict=True)
    loss = tf.zeros([], dtype)
    for prediction, target, weights_, layer_weight in layers:
        a, b = tf.cast(prediction, dtype), tf.cast(target, dtype)
        if reference == "first":
            a, b = a[1:], a[:1]
        if weights_.shape[0] == 0:
            weights_ = tf.ones([], dtype)
        elif data_format == "channels_first":
            weights_ = tf.reshape(weights_, [-1] + [1] * (a.shape.rank - 2))
        distance = _distance(a, b, weights_, axis, metric, epsilon, epsilon_in_root)
        loss += tf.cast(layer_weight, dtype) * distance
    if reference == "first":
        # tf.concat, in XLA, has no derivative of third order.
        rows = tf.shape(predictions[0])[:1]
        loss = tf.scatter_nd(tf.range(rows[0])[1:, None], loss, rows)
    loss.set_shape(predictions[0].shape[:1])
    return loss


def checked_row_loss(targets, predictions, formula):
    """`row_loss` of what `aligned` returns.

    Raises:
      InvalidArgumentError: shapes that turn out to disagree, outside XLA, which has no assertions.
    """
    axis = _channel_axis(formula.data_format)
    rows = tf.shape(predictions[0])[:1]
    assertions = []
    for target, prediction, weights_ in zip(
        targets, predictions, formula.channel_weights, strict=True
    ):
        shape, given = tf.shape(prediction), tf.shape(target)
        rule = "all layers must have the same examples"
        assertions.append(tf.debugging.assert_equal(shape[:1], rows, rule))
        if formula.reference == "target":
            one = tf.concat([[1], shape[1:]], 0)
            agrees = tf.reduce_all(given == shape) | tf.reduce_all(given == one)
            rule = "targets must have the shape of the predictions, or of one example"
            assertions.append(tf.debugging.Assert(agrees, [rule, given, shape]))
        if weights_ is not None:
            rule = "`channel_weights` must have one entry a channel"
            assertions.append(tf.debugging.assert_equal(weights_.size, shape[axis], rule))
    with tf.control_dependencies([a for a in assertions if a is not None]):
        predictions = [tf.identity(x) for x in predictions]
    arrays = tf.nest.map_structure(tf.constant, formula.arrays(loss_dtype(predictions[0])))
    return row_loss(predictions, targets, *arrays, **formula.scalars())


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
    """`fusedloss.nn.feature_distance` in plain TensorFlow: the same in all respects."""
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
    return checked_row_loss(*aligned(target, prediction, formula))
