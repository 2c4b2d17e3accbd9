"""Softmax cross-entropy: the functional ops, the Keras classes and a metric for subsets."""

import copy
import dataclasses
import warnings
from typing import Any, NamedTuple

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
    row_metrics,
)


def _encoded(formula):
    """The attributes of the compiled ops. Their floats are strings: an attribute has 32 bits."""
    attributes = formula.scalars()
    ignore_class = attributes.pop("ignore_class")
    attributes["has_ignore_class"] = ignore_class is not None
    attributes["ignore_class"] = ignore_class or 0
    attributes["normalize_full"] = attributes.pop("normalize") == "full"
    weights = map(float, formula.blend or (1, 0))
    attributes["prediction_weight"], attributes["blended_weight"] = weights
    return {
        name: repr(value) if isinstance(value, float) else value
        for name, value in attributes.items()
    }


def _reference(
    predictions,
    *inputs,
    subset_kind,
    from_logits,
    has_ignore_class,
    ignore_class,
    normalize_full,
    mask_negative,
    focal,
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
        subset_kind=tf.compat.as_str(subset_kind),
        from_logits=from_logits,
        ignore_class=ignore_class if has_ignore_class else None,
        normalize="full" if normalize_full else "subset",
        mask_negative=mask_negative,
        focal=focal,
        **{name: float(value) for name, value in decimal_strings.items()},
    )


def _row_inputs(attribute):
    """How many of the inputs have rows: predictions and targets, and a subset of the rows' own."""
    return 3 if attribute("subset_kind") in (b"mask", b"candidates") else 2


_COMPILED = CompiledLoss(
    "softmax_xent",
    attributes=(
        "subset_kind",
        "from_logits",
        "has_ignore_class",
        "ignore_class",
        "normalize_full",
        "mask_negative",
        "subset_weight",
        "full_weight",
        "label_smoothing",
        "epsilon",
        "temperature",
        "z_loss",
        "softcap",
        "focal",
        "gamma",
        "prediction_weight",
        "blended_weight",
    ),
    # One array of predictions or two that are blended, and targets; then subset and class_weight.
    inputs=("parts", None, None, None),
    row_inputs=_row_inputs,
    residuals="metrics",
    reference=_reference,
)


def _row_losses(targets, predictions, formula, metrics=0):
    """The losses for a list of one tensor of predictions, or of two that are blended.

    And a list of one tensor, rank, entropy and log-sum-exp `[..., 3]`, if `metrics` is 1, not 0.
    """
    if _lib.ops() is None:
        if formula.blend is not None:
            predictions = [blended(predictions, formula.blend)]
        losses = checked_row_loss(targets, *predictions, formula)
        if not metrics:
            return losses, []
        subset = tf.convert_to_tensor(formula.arrays(losses.dtype)[0])
        return losses, [row_metrics(*predictions, targets, subset, **formula.scalars())]
    arrays = formula.arrays(loss_dtype(predictions[0]))
    attributes = {**_encoded(formula), "metrics": metrics}
    losses, _, *residuals = _COMPILED.rows(predictions, targets, *arrays, **attributes)
    return losses, residuals


def softmax_xent(
    targets,
    logits,
    *,
    axis=-1,
    from_logits=True,
    subset=None,
    mask=None,
    candidates=None,
    mask_negative_targets=False,
    normalize="subset",
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
    temperature=1.0,
    z_loss=0.0,
    softcap=None,
    gamma=0.0,
    alpha=1.0,
):
    """Cross-entropy of each row's softmax with dense targets, in nats.

    The loss is `subset_weight * L_S + full_weight * L_all`, made in one pass. For a family F of
    classes, S or all, L_F is the sum over c in F of

        class_weight[c] * ((1 - label_smoothing) * targets[c] + label_smoothing / |F|)
            * (log_sum_exp - logits[c])

    and `z_loss * log_sum_exp ** 2`, where the log-sum-exp of L_S is over S (`normalize="subset"`:
    the softmax of the gathered logits) or over all classes (`"full"`). A row with no target in S,
    sum 0 before smoothing, has L_S = 0 and no gradient from it. S is `subset`, the same for all
    rows, or every row's own: its `mask` or its `candidates`, less its negative targets under
    `mask_negative_targets`. Without any of them the loss is L_all.

    Logits z are first made `softcap * tanh(z / softcap)`, if there is a softcap, and then divided
    by `temperature`. With gamma > 0 the loss is focal, as that of
    `keras.losses.categorical_focal_crossentropy`: `-alpha * (1 - q) ** gamma * log(q)` takes the
    place of `log_sum_exp - logits`, q being the softmax clipped to [epsilon, 1 - epsilon].

    From probabilities, `from_logits=False`, logarithms of shares take the place of
    `logits - log_sum_exp`: the probabilities divided by their sum over S or all classes and clipped
    to [epsilon, 1 - epsilon], epsilon being `keras.config.epsilon()`. The formulas are those of
    `tf.nn.softmax_cross_entropy_with_logits` and `keras.ops.categorical_crossentropy`. As in Keras,
    predictions that a softmax has just made are replaced by its logits.

    Args:
      targets: `[..., classes]`, any numeric type; with `candidates` `[..., K]`, one a candidate.
      logits: float16, bfloat16, float32 or float64 `[..., classes]`.
      axis: the class axis of logits, targets and `mask`.
      from_logits: False if `logits` are probabilities.
      subset: class ids, or a mask over the classes. Booleans are a mask, and so are integers that
        are all 0 or 1 and repeat. Multiplying logits by a mask is not the same: a masked logit of 0
        still takes part in the softmax.
      mask: booleans `[classes]`, or what broadcasts to `[..., classes]`. A row may have no class.
      candidates: int32 or int64 class ids `[..., K]`, K last whatever `axis`; -1 stands for none.
        An id that is listed twice counts twice. At most one of subset, mask and candidates.
      mask_negative_targets: whether classes with a target below 0 leave S; they have target 0.
      normalize: "subset" or "full".
      subset_weight, full_weight: finite, not negative; 1 and 0 without an S.
      label_smoothing: in [0, 1].
      class_weight: `[classes]` finite constants, not negative. They do not change the divisor of a
        later mean.
      temperature: finite, greater than 0.
      z_loss: finite, not negative.
      softcap: finite, greater than 0, or None. These three are for logits alone.
      gamma: finite, not negative.
      alpha: of the focal loss: one factor, or `[classes]` constants, finite and not negative.
    Returns:
      float `[...]`, the axes of `logits` without `axis`: float64 for float64 logits, else float32.
      Differentiable to any order in logits and targets.
    Raises:
      TypeError: logits of another type; a mask that is not boolean; candidates of another type.
      ValueError: an argument out of range; shapes that disagree or have no known rank.
      InvalidArgumentError: a candidate outside `[-1, classes)`, where a GPU gives NaN as loss and
        gradient of the row instead; shapes that disagree, as found when the op runs.
    """
    formula = Formula.parse(
        from_logits=from_logits,
        subset=subset,
        mask=mask,
        candidates=candidates,
        mask_negative_targets=mask_negative_targets,
        normalize=normalize,
        subset_weight=subset_weight,
        full_weight=full_weight,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        temperature=temperature,
        z_loss=z_loss,
        softcap=softcap,
        gamma=gamma,
        alpha=alpha,
    )
    targets, logits = tf.convert_to_tensor(targets), tf.convert_to_tensor(logits)
    targets, logits, formula = aligned(targets, logits, formula, axis=axis, sparse=False)
    losses, _ = _row_losses(targets, [logits], formula)
    return losses


def sparse_softmax_xent(
    labels,
    logits,
    *,
    axis=-1,
    from_logits=True,
    ignore_class=None,
    subset=None,
    mask=None,
    candidates=None,
    normalize="subset",
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
    temperature=1.0,
    z_loss=0.0,
    softcap=None,
    gamma=0.0,
    alpha=1.0,
):
    """Cross-entropy of each row's softmax with a label, in nats.

    That of `softmax_xent` for one-hot targets, except that probabilities are clipped, taken the
    logarithm of, and used as logits, as `keras.ops.sparse_categorical_crossentropy` does.

    Args:
      labels: integers `[...]`, the axes of `logits` without `axis` or with 1 in its place. Floats
        are truncated. Rows whose label is not in S have L_S = 0; among candidates the first that is
        equal is the label's.
      logits: float16, bfloat16, float32 or float64 `[..., classes]`.
      ignore_class: rows with this label, in range or not, have loss and gradient 0, and a Keras
        mask on the result says so.
      axis, from_logits, subset, mask, candidates, normalize, subset_weight, full_weight,
        label_smoothing, class_weight, temperature, z_loss, softcap, gamma, alpha: as in
        `softmax_xent`.
    Returns:
      float `[...]`: float64 for float64 logits, else float32. Differentiable to any order in
      logits.
    Raises:
      As `softmax_xent`; InvalidArgumentError: a label outside `[0, classes)`, where a GPU gives NaN
      as loss and gradient of the row instead.
    """
    formula = Formula.parse(
        from_logits=from_logits,
        ignore_class=ignore_class,
        subset=subset,
        mask=mask,
        candidates=candidates,
        normalize=normalize,
        subset_weight=subset_weight,
        full_weight=full_weight,
        label_smoothing=label_smoothing,
        class_weight=class_weight,
        temperature=temperature,
        z_loss=z_loss,
        softcap=softcap,
        gamma=gamma,
        alpha=alpha,
    )
    labels, logits = tf.convert_to_tensor(labels), tf.convert_to_tensor(logits)
    labels, logits, formula = aligned(labels, logits, formula, axis=axis, sparse=True)
    losses, _ = _row_losses(labels, [logits], formula)
    return mark_ignored(losses, labels, formula)


@dataclasses.dataclass(eq=False)
class Blend:
    """Predictions that are `weights[0] * predictions[0] + weights[1] * predictions[1]`.

    The classes below take them in place of `y_pred`: kernels add up as they read, and give the
    gradient to both, so that neither the sum nor its gradient is in memory as a whole.
    """

    predictions: list
    weights: tuple[float, float]


class _Metrics(NamedTuple):
    """What a pass has left on its predictions."""

    loss: "SoftmaxXent"
    y_true: Any
    rows: tf.Tensor


def _is_here(x):
    """Whether something is a tensor of the graph that is being made, or eager where none is."""
    graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
    return tf.is_tensor(x) and getattr(x, "graph", None) is graph


class SoftmaxXent(FusedLoss):
    """What the Keras classes share."""

    _compiled = _COMPILED
    _sparse = False
    _focal = False
    makes_metrics = False  # True where a `CrossentropyMetric` wants them

    def __init__(self, *, reduction, name, dtype, penalty, axis, **constants):
        super().__init__(reduction=reduction, name=name, dtype=dtype, penalty=penalty)
        self._formula = Formula.parse(**constants, focal=self._focal)
        check_axis(axis)
        for argument in ("subset", "class_weight", "alpha"):
            if constants[argument] is not None:
                constants[argument] = np.asarray(constants[argument]).tolist()
        self._config = {"axis": axis, **constants}

    def get_config(self):
        return {**super().get_config(), **self._config}

    def masked(self, mask):
        """The same loss, of one without a subset, on the classes where a mask is true."""
        loss = copy.copy(self)
        loss._formula = dataclasses.replace(
            self._formula, subset_kind="mask", row_subsets=mask, full_weight=0.0
        )
        return loss

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
        if formula.subset_kind == "candidates":
            y_true, candidates = _label_and_candidates(y_true, parts[0])
            formula = dataclasses.replace(formula, row_subsets=candidates)
            pairs = [(y_true, part) for part in parts]
        else:
            pairs = [same_rank(y_true, part) for part in parts]
        axis = self._config["axis"]
        laid_out = [aligned(*pair, formula, axis=axis, sparse=self._sparse) for pair in pairs]
        targets, _, formula = laid_out[0]
        predictions = [prediction for _, prediction, _ in laid_out]
        if not self._sparse and predictions[0].shape[-1] == 1:
            warnings.warn(
                f"{type(self).__name__} got predictions over a single class, of shape "
                f"{predictions[0].shape}. For two classes in one output use BinaryCrossentropy.",
                SyntaxWarning,
                stacklevel=4,
            )
        counted = None
        if formula.ignore_class is not None:
            counted = targets != formula.ignore_class
        return Rows(targets, predictions, predictions[0].shape[:-1], counted, formula)

    def _encoded(self, formula):
        return {**_encoded(formula), "metrics": int(self.makes_metrics)}

    def _row_losses(self, rows):
        made = _row_losses(rows.targets, rows.predictions, rows.formula, int(self.makes_metrics))
        losses, residuals = made
        self._keep(residuals, rows)
        return losses

    def _keep(self, residuals, rows):
        # On the predictions, as Keras keeps their mask, unless these would outlive the graph.
        y_true, y_pred = rows.given
        immutable = isinstance(y_true, tf.Tensor) and isinstance(y_pred, tf.Tensor)
        if residuals and immutable and _is_here(y_pred):
            y_pred._fusedloss_metrics = _Metrics(self, y_true, residuals[0])

    def row_metrics(self, y_true, y_pred):
        """Rank, entropy and log-sum-exp of the rows, `[..., 3]`: see `reference.row_metrics`.

        Those that a loss like this one has made of the same two tensors, else of a pass for them.
        """
        kept = getattr(y_pred, "_fusedloss_metrics", None)
        if kept and kept.y_true is y_true and kept.loss.is_like(self) and _is_here(kept.rows):
            return kept.rows
        rows = self._converted(y_true, y_pred)
        _, residuals = _row_losses(rows.targets, rows.predictions, rows.formula, metrics=1)
        self._keep(residuals, rows)
        return residuals[0]

    def is_like(self, other):
        """Whether another loss has the same formula, on the same mask if it has been `masked`."""
        same_mask = self._formula.row_subsets is other._formula.row_subsets
        return type(self) is type(other) and self._config == other._config and same_mask

    def bind(self, model):
        """Binds the penalty, and makes the metrics that the model was saved with."""
        listed = getattr(model, "_compile_metrics", None)
        given = listed and [listed._user_metrics, listed._user_weighted_metrics]
        for metric in keras.tree.flatten(given):
            loss = getattr(metric, "loss", None)
            if isinstance(loss, SoftmaxXent) and self.is_like(loss):
                self.makes_metrics = True
        return super().bind(model)


def _label_and_candidates(y_true, y_pred):
    """The two parts of targets `[..., 1 + K]`; ValueError if they are something else."""
    shape = y_true.shape
    if not y_true.dtype.is_integer or shape.rank != y_pred.shape.rank or shape[-1] in (0, 1):
        raise ValueError(
            "With `candidates_in_targets` the targets must be integers [..., 1 + K], one row for "
            "each of the predictions: its label, then its candidates. Got "
            f"{y_true.dtype.name} of shape {shape} for predictions of shape {y_pred.shape}."
        )
    return y_true[..., 0], y_true[..., 1:]


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
      mask_negative_targets: whether classes with a target below 0 leave the subset of their row.
      normalize: "subset" for the softmax over the subset, "full" for that over all classes.
      subset_weight, full_weight: weights of the loss on the subset and of that on all classes. Rows
        outside the subset count in the divisor of a mean.
      class_weight: one constant a class.
      temperature, z_loss, softcap: of logits; gamma, alpha: of the focal form: see
        `fusedloss.nn.softmax_xent`.
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

    Legal moves or valid actions, other ones for each row, as -1 in the targets. Not the same as
    a product of the logits with 0, which leaves `exp(0)` of each illegal class in the softmax:

    ```python
    loss = fusedloss.losses.CategoricalCrossentropy(from_logits=True, mask_negative_targets=True)
    model.compile("adam", loss=loss)
    model.fit(boards, np.where(legal, moves_played, -1))
    ```
    """

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
        mask_negative_targets=False,
        normalize="subset",
        subset_weight=1.0,
        full_weight=0.0,
        class_weight=None,
        temperature=1.0,
        z_loss=0.0,
        softcap=None,
        gamma=0.0,
        alpha=1.0,
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
            mask_negative_targets=mask_negative_targets,
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            class_weight=class_weight,
            temperature=temperature,
            z_loss=z_loss,
            softcap=softcap,
            gamma=gamma,
            alpha=alpha,
            penalty=penalty,
        )
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = axis


@keras.saving.register_keras_serializable(package="fusedloss")
class CategoricalFocalCrossentropy(SoftmaxXent):
    """`keras.losses.CategoricalFocalCrossentropy`, fused, with a loss on a subset of the classes.

    The first eight arguments are Keras's and give its results, with the exceptions that
    `CategoricalCrossentropy` lists; softmax outputs are walked back to their logits as there.

    Lin et al., Focal Loss for Dense Object Detection, arXiv:1708.02002 (2017).

    Args:
      alpha: a factor, or one a class.
      gamma: of the modulation `(1 - p) ** gamma`; 0 for none.
      from_logits, label_smoothing, axis, reduction, name, dtype: as in `CategoricalCrossentropy`.
      subset, mask_negative_targets, normalize, subset_weight, full_weight, class_weight, penalty:
        likewise.
    Raises:
      ValueError: likewise.
    """

    _focal = True

    def __init__(
        self,
        alpha=0.25,
        gamma=2.0,
        from_logits=False,
        label_smoothing=0.0,
        axis=-1,
        reduction="sum_over_batch_size",
        name="categorical_focal_crossentropy",
        dtype=None,
        *,
        subset=None,
        mask_negative_targets=False,
        normalize="subset",
        subset_weight=1.0,
        full_weight=0.0,
        class_weight=None,
        penalty=None,
    ):
        super().__init__(
            alpha=alpha,
            gamma=gamma,
            from_logits=from_logits,
            label_smoothing=label_smoothing,
            axis=axis,
            reduction=reduction,
            name=name,
            dtype=dtype,
            subset=subset,
            mask_negative_targets=mask_negative_targets,
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            class_weight=class_weight,
            penalty=penalty,
        )
        self.alpha = alpha
        self.gamma = gamma
        self.from_logits = from_logits
        self.label_smoothing = label_smoothing
        self.axis = axis


@keras.saving.register_keras_serializable(package="fusedloss")
class SparseCategoricalCrossentropy(SoftmaxXent):
    """`keras.losses.SparseCategoricalCrossentropy`, fused, with a loss on a subset of the classes.

    The first six arguments are Keras's and give its results, except that an empty batch has loss 0
    and that `axis` can be any; half-precision softmax outputs are walked back to their logits.

    Args:
      from_logits: whether `y_pred` are logits; else probabilities.
      ignore_class: rows with this label have loss 0 and are left out of means.
      reduction, axis, name, dtype: as in `CategoricalCrossentropy`.
      candidates_in_targets: whether `y_true` is integers `[..., 1 + K]`: the label of a row, then
        the ids of the classes that make up its subset, -1 where there are fewer than K. The last
        axis holds them whatever `axis` is.
      subset, normalize, subset_weight, full_weight, label_smoothing, class_weight, temperature,
        z_loss, softcap, gamma, alpha, penalty: as in `CategoricalCrossentropy`.
    Raises:
      ValueError: likewise; when called, targets without candidates or that are not integers.

    The softmax over K sampled candidates a row, the label among them:

    ```python
    loss = fusedloss.losses.SparseCategoricalCrossentropy(
        from_logits=True, candidates_in_targets=True
    )
    model.compile("adam", loss=loss)
    model.fit(features, np.concatenate([labels[:, None], labels[:, None], sampled], axis=-1))
    ```
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
        candidates_in_targets=False,
        normalize="subset",
        subset_weight=1.0,
        full_weight=0.0,
        label_smoothing=0.0,
        class_weight=None,
        temperature=1.0,
        z_loss=0.0,
        softcap=None,
        gamma=0.0,
        alpha=1.0,
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
            candidates_in_targets=candidates_in_targets,
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            temperature=temperature,
            z_loss=z_loss,
            softcap=softcap,
            gamma=gamma,
            alpha=alpha,
            penalty=penalty,
        )
        self.from_logits = from_logits
        self.ignore_class = ignore_class


def row_weights(counted, mask, sample_weight, dtype):
    """The weights of rows in a mean: of those that are counted and in Keras's mask.

    Args:
      counted: bool `[...]`.
      mask: bool, or None.
      sample_weight: broadcasts to `[...]`, or None.
    """
    weights = apply_mask(tf.cast(counted, dtype), mask, dtype=dtype, reduction="sum")
    if sample_weight is not None:
        sample_weight = keras.ops.convert_to_tensor(sample_weight, dtype)
        weights, sample_weight = squeeze_or_expand_to_same_rank(weights, sample_weight)
        spread = weights.shape.rank - sample_weight.shape.rank
        weights *= sample_weight[(...,) + (None,) * spread]
    return weights


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
        inside = tf.reduce_any(label[..., None] == self._subset.ids, axis=-1)
        weights = row_weights(inside, mask, sample_weight, self.dtype)
        super().update_state(tf.reshape(matches, [-1]), tf.reshape(weights, [-1]))

    def get_config(self):
        return {**super().get_config(), **self._config}
