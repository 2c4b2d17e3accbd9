"""Softmax cross-entropy: the functional ops, the Keras classes and a metric for subsets."""

import dataclasses
import warnings

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend
from keras.src.losses.loss import apply_mask, squeeze_or_expand_to_same_rank

from fusedloss import _lib
from fusedloss._compiled import CompiledLoss
from fusedloss._loss import FusedLoss, Rows
from fusedloss.reference._inputs import check_axis, loss_dtype, same_rank
from fusedloss.reference.softmax_xent import (
    Formula,
    Subset,
    aligned,
    blended,
    checked_row_loss,
    mark_ignored,
    row_loss,
)


def _encoded(formula):
    """The attributes of the compiled ops. Their floats are strings: an attribute has 32 bits."""
    scalars = formula.scalars()
    ignore_class, normalize = scalars.pop("ignore_class"), scalars.pop("normalize")
    scalars["prediction_weight"], scalars["blended_weight"] = formula.blend or (1.0, 0.0)
    return {
        "from_logits": scalars.pop("from_logits"),
        "has_ignore_class": ignore_class is not None,
        "ignore_class": ignore_class or 0,
        "normalize_full": normalize == "full",
        **{name: repr(value) for name, value in scalars.items()},
    }


def _reference(
    predictions,
    *inputs,
    from_logits,
    has_ignore_class,
    ignore_class,
    normalize_full,
    prediction_weight,
    blended_weight,
    **decimal_strings,
):
    """`row_loss`, called with the inputs and attributes of the compiled ops."""
    if len(predictions) == 2:
        predictions = [blended(predictions, (float(prediction_weight), float(blended_weight)))]
    return row_loss(
        *predictions,
        *inputs,
        from_logits=from_logits,
        ignore_class=ignore_class if has_ignore_class else None,
        normalize="full" if normalize_full else "subset",
        **{name: float(value) for name, value in decimal_strings.items()},
    )


_COMPILED = CompiledLoss(
    "softmax_xent",
    attributes=(
        "from_logits",
        "has_ignore_class",
        "ignore_class",
        "normalize_full",
        "subset_weight",
        "full_weight",
        "label_smoothing",
        "epsilon",
        "prediction_weight",
        "blended_weight",
    ),
    # One array of predictions or two that are blended, and targets; then class_weight and subset.
    inputs=("parts", None, None, None),
    row_inputs=2,
    reference=_reference,
)


def _row_losses(targets, predictions, formula):
    """The losses for a list of one tensor of predictions, or of two that are blended."""
    if _lib.ops() is None:
        if formula.blend is not None:
            predictions = [blended(predictions, formula.blend)]
        return checked_row_loss(targets, *predictions, formula)
    arrays = formula.arrays(loss_dtype(predictions[0]))
    loss, _ = _COMPILED.rows(predictions, targets, *arrays, **_encoded(formula))
    return loss


def softmax_xent(
    targets,
    logits,
    *,
    axis=-1,
    from_logits=True,
    subset=None,
    normalize="subset",
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
):
    """Cross-entropy of each row's softmax with dense targets, in nats.

    The loss is `subset_weight * L_S + full_weight * L_all`, made in one pass. For a family F of
    classes, S or all, L_F is the sum over c in F of

        class_weight[c] * ((1 - label_smoothing) * targets[c] + label_smoothing / |F|)
            * (log_sum_exp - logits[c])

    where the log-sum-exp of L_S is over S (`normalize="subset"`: the softmax of the gathered
    logits) or over all classes (`"full"`). A row with no target in S, sum 0 before smoothing, has
    L_S = 0 and no gradient from it. Without a subset the loss is L_all.

    From probabilities, `from_logits=False`, logarithms of shares take the place of
    `logits - log_sum_exp`: the probabilities divided by their sum over S or all classes and clipped
    to [epsilon, 1 - epsilon], epsilon being `keras.config.epsilon()`. The formulas are those of
    `tf.nn.softmax_cross_entropy_with_logits` and `keras.ops.categorical_crossentropy`. As in Keras,
    predictions that a softmax has just made are replaced by its logits.

    Args:
      targets: `[..., classes]`, any numeric type.
      logits: float16, bfloat16, float32 or float64 `[..., classes]`.
      axis: the class axis of both.
      from_logits: False if `logits` are probabilities.
      subset: class ids, or a mask over the classes. Booleans are a mask, and so are integers that
        are all 0 or 1 and repeat. Multiplying logits by a mask is not the same: a masked logit of 0
        still takes part in the softmax.
      normalize: "subset" or "full".
      subset_weight, full_weight: finite, not negative; 1 and 0 without a subset.
      label_smoothing: in [0, 1].
      class_weight: `[classes]` finite constants, not negative. They do not change the divisor of a
        later mean.
    Returns:
      float `[...]`, the axes of `logits` without `axis`: float64 for float64 logits, else float32.
      Differentiable to any order in logits and targets.
    Raises:
      TypeError: logits of another type.
      ValueError: an argument out of range; shapes that disagree or have no known rank.
      InvalidArgumentError: shapes that disagree, as found when the op runs.
    """
    formula = Formula.parse(
        from_logits=from_logits,
        subset=subset,
        normalize=normalize,
        subset_weight=subset_weight,
        full_weight=full_weight,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
    )
    targets, logits = tf.convert_to_tensor(targets), tf.convert_to_tensor(logits)
    targets, logits, formula = aligned(targets, logits, formula, axis=axis, sparse=False)
    return _row_losses(targets, [logits], formula)


def sparse_softmax_xent(
    labels,
    logits,
    *,
    axis=-1,
    from_logits=True,
    ignore_class=None,
    subset=None,
    normalize="subset",
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
):
    """Cross-entropy of each row's softmax with a label, in nats.

    That of `softmax_xent` for one-hot targets, except that probabilities are clipped, taken the
    logarithm of, and used as logits, as `keras.ops.sparse_categorical_crossentropy` does.

    Args:
      labels: integers `[...]`, the axes of `logits` without `axis` or with 1 in its place. Floats
        are truncated.
      logits: float16, bfloat16, float32 or float64 `[..., classes]`.
      ignore_class: rows with this label, in range or not, have loss and gradient 0, and a Keras
        mask on the result says so.
      axis, from_logits, subset, normalize, subset_weight, full_weight, label_smoothing,
        class_weight: as in `softmax_xent`.
    Returns:
      float `[...]`: float64 for float64 logits, else float32. Differentiable to any order in
      logits.
    Raises:
      TypeError: logits of another type.
      ValueError: an argument out of range; shapes that disagree or have no known rank.
      InvalidArgumentError: a label outside `[0, classes)`, where a GPU gives NaN as loss and
        gradient of the row instead; shapes that disagree, as found when the op runs.
    """
    formula = Formula.parse(
        from_logits=from_logits,
        ignore_class=ignore_class,
        subset=subset,
        normalize=normalize,
        subset_weight=subset_weight,
        full_weight=full_weight,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
    )
    labels, logits = tf.convert_to_tensor(labels), tf.convert_to_tensor(logits)
    labels, logits, formula = aligned(labels, logits, formula, axis=axis, sparse=True)
    return mark_ignored(_row_losses(labels, [logits], formula), labels, formula)


@dataclasses.dataclass(eq=False)
class Blend:
    """Predictions that are `weights[0] * predictions[0] + weights[1] * predictions[1]`.

    The classes below take them in place of `y_pred`: kernels add up as they read, and give the
    gradient to both, so that neither the sum nor its gradient is in memory as a whole.
    """

    predictions: list
    weights: tuple[float, float]


class SoftmaxXent(FusedLoss):
    """What the two classes share."""

    _compiled = _COMPILED
    _encoded = staticmethod(_encoded)
    _sparse: bool

    def __init__(self, *, reduction, name, dtype, penalty, axis, subset, class_weight, **constants):
        super().__init__(reduction=reduction, name=name, dtype=dtype, penalty=penalty)
        self._formula = Formula.parse(subset=subset, class_weight=class_weight, **constants)
        check_axis(axis)
        self._config = {
            "axis": axis,
            "subset": None if subset is None else np.asarray(subset).tolist(),
            "class_weight": None if class_weight is None else np.asarray(class_weight).tolist(),
            **constants,
        }

    def get_config(self):
        return {**super().get_config(), **self._config}

    def _cast(self, y_pred):
        if not isinstance(y_pred, Blend):
            return super()._cast(y_pred)
        first, second = y_pred.predictions
        first = super()._cast(first)
        return Blend([first, tf.cast(second, first.dtype)], y_pred.weights)

    def _rows(self, y_true, y_pred):
        formula, parts = self._formula, [y_pred]
        if isinstance(y_pred, Blend):
            formula, parts = dataclasses.replace(formula, blend=y_pred.weights), y_pred.predictions
        axis = self._config["axis"]
        laid_out = [
            aligned(*same_rank(y_true, part), formula, axis=axis, sparse=self._sparse)
            for part in parts
        ]
        targets, _, formula = laid_out[0]
        predictions = [prediction for _, prediction, _ in laid_out]
        counted = None
        if formula.ignore_class is not None:
            counted = targets != formula.ignore_class
        return Rows(targets, predictions, predictions[0].shape[:-1], counted, formula)

    def _row_losses(self, rows):
        return _row_losses(rows.targets, rows.predictions, rows.formula)


@keras.saving.register_keras_serializable(package="fusedloss")
class CategoricalCrossentropy(SoftmaxXent):
    """`keras.losses.CategoricalCrossentropy`, fused, with a loss on a subset of the classes.

    The first six arguments are Keras's and give its results, except that an empty batch has loss 0
    and that smoothing counts the classes along `axis`, where Keras counts the last axis. Two more
    differences are of rounding: half-precision predictions are not cast, so that a softmax output
    in half precision is walked back to its logits, and a class with target 0 adds 0 even if its
    logit is infinite.

    Args:
      from_logits: whether `y_pred` are logits; else probabilities.
      label_smoothing: in [0, 1].
      axis: the class axis of `y_true` and `y_pred`.
      reduction: "sum_over_batch_size" or "mean", "sum", "mean_with_sample_weight", None or "none".
      name: of the loss.
      dtype: of the result; None for `keras.config.floatx()`.
      subset: class ids, or a mask over the classes: see `fusedloss.nn.softmax_xent`.
      normalize: "subset" for the softmax over the subset, "full" for that over all classes.
      subset_weight, full_weight: weights of the loss on the subset and of that on all classes. Rows
        outside the subset count in the divisor of a mean.
      class_weight: one constant a class.
      penalty: a `fusedloss.Penalty` to be added to the loss once a step, or None.
    Raises:
      ValueError: an argument out of range; a penalty without a reduction; when called, a penalty
        that is not bound, or that several outputs of a compiled model carry.

    Two losses on one output, 0.8 on two of the classes and 0.2 on all:

    ```python
    loss = fusedloss.losses.CategoricalCrossentropy(
        subset=[0, 2], subset_weight=0.8, full_weight=0.2
    )
    model.compile("adam", loss=loss)
    ```
    """

    _sparse = False

    def __init__(
        self,
        from_logits=False,
        label_smoothing=0.0,
        axis=-1,
        reduction="sum_over_batch_size",
        name="categorical_crossentropy",
        dtype=None,
        *,
        subset=None,
        normalize="subset",
        subset_weight=1.0,
        full_weight=0.0,
        class_weight=None,
        penalty=None,
    ):
        super().__init__(
            from_logits=from_logits,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            name=name,
            dtype=dtype,
            subset=subset,
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            class_weight=class_weight,
            penalty=penalty,
        )
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = axis

    def _rows(self, y_true, y_pred):
        rows = super()._rows(y_true, y_pred)
        if rows.prediction.shape[-1] == 1:
            warnings.warn(
                "CategoricalCrossentropy got predictions over a single class, of shape "
                f"{rows.prediction.shape}. For two classes in one output use BinaryCrossentropy.",
                SyntaxWarning,
                stacklevel=4,
            )
        return rows


@keras.saving.register_keras_serializable(package="fusedloss")
class SparseCategoricalCrossentropy(SoftmaxXent):
    """`keras.losses.SparseCategoricalCrossentropy`, fused, with a loss on a subset of the classes.

    The first six arguments are Keras's and give its results, except that an empty batch has loss 0
    and that `axis` can be any; half-precision softmax outputs are walked back to their logits.

    Args:
      from_logits: whether `y_pred` are logits; else probabilities.
      ignore_class: rows with this label have loss 0 and are left out of means.
      reduction, axis, name, dtype: as in `CategoricalCrossentropy`.
      subset, normalize, subset_weight, full_weight, label_smoothing, class_weight, penalty:
        likewise.
    Raises:
      ValueError: likewise.
    """

    _sparse = True

    def __init__(
        self,
        from_logits=False,
        ignore_class=None,
        reduction="sum_over_batch_size",
        axis=-1,
        name="sparse_categorical_crossentropy",
        dtype=None,
        *,
        subset=None,
        normalize="subset",
        subset_weight=1.0,
        full_weight=0.0,
        label_smoothing=0.0,
        class_weight=None,
        penalty=None,
    ):
        super().__init__(
            from_logits=from_logits,
            ignore_class=ignore_class,
            reduction=reduction,
            axis=axis,
            name=name,
            dtype=dtype,
            subset=subset,
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            penalty=penalty,
        )
        self.from_logits = from_logits
        self.ignore_class = ignore_class


@keras.saving.register_keras_serializable(package="fusedloss")
class SubsetAccuracy(keras.metrics.Mean):
    """How often the most probable class of a subset is the true one, among the rows inside it.

    A row is inside if its class is in the subset; the class of dense targets is their argmax over
    all classes. Ties go to the lowest class id. The result is the mean over the rows inside,
    weighted by `sample_weight` and Keras's mask, and 0 if there are none. Restricting the argmax
    while averaging over all rows would measure the share of the subset as well.

    Args:
      subset: class ids, or a mask over the classes: see `fusedloss.nn.softmax_xent`.
      name, dtype: as of `keras.metrics.Mean`.
    Raises:
      ValueError: an empty, ambiguous or otherwise wrong subset.
    """

    def __init__(self, subset, name="subset_accuracy", dtype=None):
        super().__init__(name=name, dtype=dtype)
        self._subset = Subset.parse(subset)
        self._config = {"subset": np.asarray(subset).tolist()}
        self._direction = "up"

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Counts rows.

        Args:
          y_true: integers `[...]` or `[..., 1]`, or dense targets `[..., classes]`.
          y_pred: `[..., classes]`: logits, probabilities or other scores.
          sample_weight: broadcasts to `[...]`.
        """
        mask = backend.get_keras_mask(y_pred)
        y_true, y_pred = tf.convert_to_tensor(y_true), tf.convert_to_tensor(y_pred)
        if y_pred.shape.rank in (None, 0) or y_true.shape.rank is None:
            raise ValueError(
                "SubsetAccuracy needs targets and predictions of known rank, the predictions with "
                f"an axis of classes. Got shapes {y_true.shape} and {y_pred.shape}."
            )
        if y_pred.shape[-1] is not None:
            self._subset.check(y_pred.shape[-1])
        if y_true.shape.rank == y_pred.shape.rank:
            squeeze = y_true.shape[-1] == 1
            y_true = tf.squeeze(y_true, -1) if squeeze else tf.argmax(y_true, axis=-1)
        if not y_true.shape.is_compatible_with(y_pred.shape[:-1]):
            raise ValueError(
                "SubsetAccuracy needs labels of the shape of the predictions without their last "
                f"axis, or dense targets of their shape. Got {y_true.shape} and {y_pred.shape}."
            )
        label = tf.cast(y_true, tf.int64)
        best = tf.gather(
            self._subset.ids, tf.argmax(tf.gather(y_pred, self._subset.ids, axis=-1), axis=-1)
        )
        matches = tf.cast(label == best, self.dtype)
        weight = tf.reduce_any(label[..., None] == self._subset.ids, axis=-1)
        weight = apply_mask(tf.cast(weight, self.dtype), mask, dtype=self.dtype, reduction="sum")
        if sample_weight is not None:
            sample_weight = keras.ops.convert_to_tensor(sample_weight, self.dtype)
            weight, sample_weight = squeeze_or_expand_to_same_rank(weight, sample_weight)
            spread = sample_weight.shape.rank
            weight *= sample_weight[(...,) + (None,) * (weight.shape.rank - spread)]
        super().update_state(tf.reshape(matches, [-1]), tf.reshape(weight, [-1]))

    def get_config(self):
        return {**super().get_config(), **self._config}
