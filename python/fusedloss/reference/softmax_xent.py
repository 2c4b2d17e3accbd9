"""Softmax cross-entropy over all classes, a subset of them, or a mixture of both, in TensorFlow.

Row-wise, with logits z, targets y, a subset S of the classes and, for a family F of classes (S or
all), y^F_c = class_weight_c * ((1 - label_smoothing) * y_c + label_smoothing / |F|):

    L   = subset_weight * L_S + full_weight * L_all
    L_F = sum_{c in F} y^F_c * (lse_N - z_c),    lse_N = log sum_{c in N} exp(z_c)

where N is S for L_S under normalize="subset", and all classes otherwise. The gradient is that of
this formula; TensorFlow's own op supposes targets that sum to one, which class weights break.
"""

import dataclasses
import math

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend

from fusedloss.reference._inputs import (
    check_predictions,
    checked_axis,
    logits_behind,
    loss_dtype,
    number,
    weight,
    weights,
)


def _integer(given):
    """`given` as an int if it is a whole number, 2.0 included; else None."""
    try:
        whole = int(given)
        return whole if whole == given and not isinstance(given, bool) else None
    except (TypeError, ValueError, OverflowError):
        return None


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some of the classes."""

    ids: np.ndarray  # int64, ascending
    positions: np.ndarray  # of each id in what the user gave
    mask_length: int | None  # None if the user gave ids

    @classmethod
    def parse(cls, subset):
        """Reads class ids, or a mask over the classes.

        Booleans are a mask. So are integers that are all 0 or 1 and repeat, since ids may not.

        Raises:
          ValueError: not a flat, non-empty list of integers or booleans; a negative or repeated id;
            a mask that selects nothing.
        """
        given = np.asarray(subset)
        if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "biu":
            raise ValueError(
                "`subset` must be a flat, non-empty list of integer class ids, or of booleans, one "
                f"a class. Got {subset!r}."
            )
        repeats = np.unique(given).size != given.size
        is_mask = given.dtype.kind == "b" or (repeats and np.isin(given, (0, 1)).all())
        if is_mask:
            ids = np.flatnonzero(given)
            if not ids.size:
                raise ValueError("`subset` is a mask without a class: set at least one entry.")
            return cls(ids.astype(np.int64), ids, given.size)
        if (given < 0).any():
            position = np.flatnonzero(given < 0)[0]
            raise ValueError(
                f"`subset` holds class {given[position]} at position {position}: class ids start "
                "at 0."
            )
        ids, positions, counts = np.unique(given, return_index=True, return_counts=True)
        if (counts > 1).any():
            repeated = ids[counts > 1][0]
            positions = np.flatnonzero(given == repeated)
            raise ValueError(
                f"`subset` holds class {repeated} twice, at positions {positions[0]} and "
                f"{positions[1]}: list each class once."
            )
        return cls(ids.astype(np.int64), positions, None)

    def check(self, classes):
        """Raises ValueError if the predictions have `classes` classes and these do not fit them."""
        if self.mask_length not in (None, classes):
            raise ValueError(
                f"`subset` is a mask of {self.mask_length} entries, but the predictions have "
                f"{classes} classes: give one entry a class."
            )
        if self.mask_length is None and self.ids.size == classes == 2:
            raise ValueError(
                "`subset` of 0 and 1 over two classes can mean both classes or a mask. Give "
                "booleans: [True, True] for both, [False, True] or [True, False] for one."
            )
        if self.ids[-1] >= classes:
            first = np.searchsorted(self.ids, classes)
            raise ValueError(
                f"`subset` holds class {self.ids[first]} at position {self.positions[first]}, but "
                f"the predictions have {classes} classes: ids must lie in [0, {classes})."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """The constants of one softmax cross-entropy; `softmax_xent` says what they mean."""

    from_logits: bool
    ignore_class: int | None
    subset: Subset | None
    normalize: str
    subset_weight: float
    full_weight: float
    label_smoothing: float
    class_weight: np.ndarray | None
    blend: tuple[float, float] | None = None  # weights of two predictions whose sum is meant

    @classmethod
    def parse(
        cls,
        *,
        from_logits,
        ignore_class=None,
        subset,
        normalize,
        subset_weight,
        full_weight,
        label_smoothing,
        class_weight,
    ):
        """Checks what users give.

        Raises:
          ValueError: an argument out of its range, by name.
        """
        if normalize not in ("subset", "full"):
            raise ValueError(f"`normalize` must be 'subset' or 'full'. Got {normalize!r}.")
        subset_weight = weight("subset_weight", subset_weight)
        full_weight = weight("full_weight", full_weight)
        if subset is None and (subset_weight, full_weight) != (1, 0):
            raise ValueError(
                "`subset_weight` and `full_weight` weigh a subset against all classes and need a "
                f"`subset`. Got {subset_weight} and {full_weight} without one: give a `subset`, or "
                "leave both out and scale the loss."
            )
        label_smoothing = number("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1]. Got {label_smoothing}.")
        if ignore_class is not None:
            given, ignore_class = ignore_class, _integer(ignore_class)
            if ignore_class is None:
                raise ValueError(f"`ignore_class` must be an integer or None. Got {given!r}.")
        if class_weight is not None:
            class_weight = weights("class_weight", class_weight, "one a class")
        return cls(
            from_logits=bool(from_logits),
            ignore_class=ignore_class,
            subset=None if subset is None else Subset.parse(subset),
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
        )

    def check(self, classes):
        """Raises ValueError if the formula does not fit predictions over `classes` classes."""
        if self.subset is not None:
            self.subset.check(classes)
        if self.class_weight is not None and self.class_weight.size != classes:
            raise ValueError(
                f"`class_weight` has {self.class_weight.size} entries, but the predictions have "
                f"{classes} classes: give one entry a class."
            )

    def arrays(self, dtype):
        """`class_weight` and `subset` as `row_loss` takes them, the weights in `dtype`."""
        weights = () if self.class_weight is None else self.class_weight
        ids = () if self.subset is None else self.subset.ids
        return np.asarray(weights, dtype.as_numpy_dtype), np.asarray(ids, np.int64)

    def scalars(self):
        """The keyword arguments of `row_loss`."""
        return {
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
            "normalize": self.normalize,
            "subset_weight": self.subset_weight,
            "full_weight": self.full_weight,
            "label_smoothing": self.label_smoothing,
            "epsilon": float(keras.config.epsilon()),
        }


def _logits_behind(predictions, formula):
    """`logits_behind`. Keras cannot go back under `ignore_class`; its numbers are kept.

    Nor is a blend of probabilities the softmax of anything at hand.
    """
    if formula.ignore_class is not None or formula.blend is not None:
        return predictions, formula
    logits = logits_behind(predictions, formula.from_logits, "Softmax")
    if logits is None:
        return predictions, formula
    return logits, dataclasses.replace(formula, from_logits=True)


def _checked_at_run_time(predictions, formula):
    """`Formula.check` for a number of classes that is not known before; InvalidArgumentError."""
    classes = tf.shape(predictions, tf.int64)[-1]
    assertions = []
    if formula.subset is not None:
        rule = "`subset` ids must lie in [0, classes)"
        assertions.append(tf.debugging.assert_less(formula.subset.ids[-1], classes, rule))
        if formula.subset.mask_length is not None:
            length = np.int64(formula.subset.mask_length)
            rule = "`subset`, a mask, must have one entry a class"
            assertions.append(tf.debugging.assert_equal(length, classes, rule))
    if formula.class_weight is not None:
        length = np.int64(formula.class_weight.size)
        rule = "`class_weight` must have one entry a class"
        assertions.append(tf.debugging.assert_equal(length, classes, rule))
    with tf.control_dependencies(assertions):
        return tf.identity(predictions)


def aligned(targets, predictions, formula, *, axis, sparse):
    """Lays targets and predictions out as `row_loss` takes them and checks what is known of them.

    Args:
      targets, predictions: tensors, as users give them.
      formula: a `Formula`.
      axis: the class axis of the predictions, and of dense targets.
      sparse: whether the targets are labels.
    Returns:
      Targets, predictions with the class axis last, and the formula, from logits if the predictions
      could be walked back to them.
    Raises:
      TypeError: predictions that are not floating point.
      ValueError: an unknown rank, predictions without a class axis, shapes that disagree, `axis`
        out of range, a formula that does not fit the number of classes.
      InvalidArgumentError: the last, if the number of classes is only known at run time.
    """
    check_predictions(targets, predictions)
    rank = predictions.shape.rank
    if rank == 0:
        raise ValueError("The predictions must have an axis of classes. Got a scalar.")
    axis = checked_axis(axis, predictions)
    if sparse:
        if targets.shape.rank == rank and targets.shape[axis] == 1:
            targets = tf.squeeze(targets, axis)
        expected = predictions.shape[:axis].concatenate(predictions.shape[axis + 1 :])
        rule = "Labels must have the same shape as the predictions without their class axis."
    else:
        expected = predictions.shape
        rule = (
            "Dense targets and predictions must have the same shape; integer labels belong to the "
            "sparse form of the loss."
        )
    if not targets.shape.is_compatible_with(expected):
        raise ValueError(
            f"{rule} Got targets of shape {targets.shape} and predictions of shape "
            f"{predictions.shape}, class axis {axis}."
        )
    classes = predictions.shape[axis]
    if classes is not None:
        formula.check(classes)
    predictions, formula = _logits_behind(predictions, formula)
    if axis != rank - 1:
        classes_last = [*range(axis), *range(axis + 1, rank), axis]
        predictions = tf.transpose(predictions, classes_last)
        targets = targets if sparse else tf.transpose(targets, classes_last)
    if classes is None:
        predictions = _checked_at_run_time(predictions, formula)
    if sparse:
        if targets.dtype not in (tf.int32, tf.int64):
            targets = tf.cast(targets, tf.int64)
    else:
        targets = tf.cast(targets, loss_dtype(predictions))
    return targets, predictions, formula


def blended(predictions, weights):
    """The weighted sum of two predictions, made in the type of losses and rounded to their own."""
    dtype = loss_dtype(predictions[0])
    terms = [weight * tf.cast(x, dtype) for weight, x in zip(weights, predictions, strict=True)]
    return tf.cast(tf.add_n(terms), predictions[0].dtype)


def row_loss(
    predictions,
    targets,
    class_weight,
    subset,
    *,
    from_logits,
    ignore_class,
    normalize,
    subset_weight,
    full_weight,
    label_smoothing,
    epsilon,
):
    """The loss of every row, on tensors laid out as the compiled op takes them.

    From probabilities, Keras's arithmetic: with dense targets they are divided by the sum over N
    and clipped to [epsilon, 1 - epsilon], and their logarithms stand for z - lse; with labels they
    are clipped only, and their logarithms are the logits.

    Args:
      predictions: float `[..., classes]`.
      targets: integer `[...]` or float `[..., classes]`.
      class_weight: float `[classes]`, or `[0]` for none.
      subset: int64 `[classes of the subset]`, ascending, or `[0]` for all classes.
    Returns:
      float `[...]`, in nats; 0 without classes, NaN for a label outside `[0, classes)`.
    """
    dtype = loss_dtype(predictions)
    scores = tf.cast(predictions, dtype)
    sparse = targets.dtype.is_integer
    targets = tf.cast(targets, tf.int64 if sparse else dtype)
    class_weight = None if class_weight.shape[0] == 0 else tf.cast(class_weight, dtype)

    def family_loss(family, normalizer, counted):
        """L_F for class ids F and N (None: all), 0 in the rows that are not counted (None: all)."""

        def part(values, ids):
            return values if ids is None else tf.gather(values, ids, axis=-1)

        safe = scores
        if counted is not None:
            # Selecting among the results is not enough: 0 times NaN would reach the gradient.
            safe = tf.where(counted[..., None], scores, tf.ones([], dtype))
        if sparse and not from_logits:
            safe = tf.math.log(tf.clip_by_value(safe, epsilon, 1 - epsilon))
        chosen, over = part(safe, family), part(safe, normalizer)
        if from_logits or sparse:
            peak = tf.stop_gradient(tf.reduce_max(over, axis=-1, keepdims=True))
            log_sum = tf.math.log(tf.reduce_sum(tf.exp(over - peak), axis=-1, keepdims=True))
            nats = log_sum - (chosen - peak)
        else:
            chosen /= tf.reduce_sum(over, axis=-1, keepdims=True)
            nats = -tf.math.log(tf.clip_by_value(chosen, epsilon, 1 - epsilon))
        size = tf.shape(nats, tf.int64)[-1]
        if sparse:
            ids = tf.range(size) if family is None else family
            shares = tf.cast(targets[..., None] == ids, dtype)
        else:
            shares = part(targets, family)
        if label_smoothing:
            uniform = tf.math.divide_no_nan(
                tf.constant(label_smoothing, dtype), tf.cast(size, dtype)
            )
            shares = shares * (1 - label_smoothing) + uniform
        if class_weight is not None:
            shares *= part(class_weight, family)
        # A class without a share adds nothing, even where its logit is infinite.
        loss = tf.reduce_sum(tf.math.multiply_no_nan(nats, shares), axis=-1)
        return loss if counted is None else tf.where(counted, loss, tf.zeros([], dtype))

    counted = targets != ignore_class if ignore_class is not None else None
    loss = None
    if subset.shape[0] != 0 and subset_weight:
        if sparse:
            inside = tf.reduce_any(targets[..., None] == subset, axis=-1)
        else:
            inside = tf.reduce_sum(tf.gather(targets, subset, axis=-1), axis=-1) != 0
        inside = inside if counted is None else inside & counted
        normalizer = subset if normalize == "subset" else None
        loss = subset_weight * family_loss(subset, normalizer, inside)
    if subset.shape[0] == 0:
        loss = family_loss(None, None, counted)
    elif full_weight:
        full = full_weight * family_loss(None, None, counted)
        loss = full if loss is None else loss + full
    elif loss is None:
        # Both weights are 0. So is the gradient, and not None.
        loss = family_loss(None, None, tf.zeros(tf.shape(predictions)[:-1], tf.bool))
    if sparse:
        classes = tf.shape(predictions, tf.int64)[-1]
        unknown = ((targets < 0) | (targets >= classes)) & (classes > 0)
        unknown = unknown if counted is None else unknown & counted
        loss = tf.where(unknown, tf.constant(math.nan, dtype), loss)
    return loss


def checked_row_loss(targets, predictions, formula):
    """`row_loss` of what `aligned` returns.

    Raises:
      InvalidArgumentError: outside XLA, which has no assertions: a label outside `[0, classes)`;
        shapes that turn out to disagree.
    """
    sparse = targets.dtype.is_integer
    shape, given = tf.shape(predictions, tf.int64), tf.shape(targets, tf.int64)
    assertions = []
    if not (targets.shape.is_fully_defined() and predictions.shape.is_fully_defined()):
        rule = "targets and predictions must agree in shape"
        assertions.append(tf.debugging.assert_equal(given, shape[:-1] if sparse else shape, rule))
    if sparse:
        labels = tf.reshape(tf.cast(targets, tf.int64), [-1])
        unknown = ((labels < 0) | (labels >= shape[-1])) & (shape[-1] > 0)
        if formula.ignore_class is not None:
            unknown &= labels != formula.ignore_class
        # The first one. An end is appended, so that there is a first one in any case.
        row = tf.argmax(tf.concat([unknown, [True]], 0))
        label = tf.concat([labels, [0]], 0)[row]
        rule = "`labels` must lie in [0, classes); the first that does not, its row, classes:"
        known = ~tf.reduce_any(unknown)
        assertions.append(tf.debugging.Assert(known, [rule, label, row, shape[-1]]))
    with tf.control_dependencies([a for a in assertions if a is not None]):
        targets, predictions = tf.identity(targets), tf.identity(predictions)
    arrays = map(tf.constant, formula.arrays(loss_dtype(predictions)))
    return row_loss(predictions, targets, *arrays, **formula.scalars())


def mark_ignored(loss, labels, formula):
    """Sets Keras's mask on the loss of rows, so that a mean leaves `ignore_class` rows out."""
    if formula.ignore_class is not None:
        backend.set_keras_mask(loss, labels != formula.ignore_class)
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
    """`fusedloss.nn.softmax_xent` in plain TensorFlow: the same arguments, results and errors."""
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
    return checked_row_loss(*aligned(targets, logits, formula, axis=axis, sparse=False))


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
    """`fusedloss.nn.sparse_softmax_xent` in plain TensorFlow: the same arguments, results, errors.

    Only under XLA a label out of range gives NaN, since XLA has no assertions.
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
    return mark_ignored(checked_row_loss(labels, logits, formula), labels, formula)
