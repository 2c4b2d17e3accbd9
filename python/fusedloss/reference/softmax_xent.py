"""Softmax cross-entropy over all classes, a subset of them, or a mixture of both, in TensorFlow.

Row-wise, with logits z, s = cap(z) / temperature where cap(z) = softcap * tanh(z / softcap), or z
without one, targets y, a subset S of the classes and, for a family F of classes (S or all),
y^F_c = class_weight_c * ((1 - label_smoothing) * y_c + label_smoothing / |F|):

    L   = subset_weight * L_S + full_weight * L_all
    L_F = sum_{c in F} y^F_c * (lse_N - s_c) + z_loss * lse_N^2
    lse_N = log sum_{c in N} exp(s_c)

where N is S for L_S under normalize="subset", and all classes otherwise. In the focal form, as in
Keras, (1 - q_c)^gamma * -log(q_c) takes the place of lse_N - s_c, with q_c the share of exp(s_c) in
the sum over N, clipped to [epsilon, 1 - epsilon]. The gradient is that of this formula;
TensorFlow's own op supposes targets that sum to one, which class weights break.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras.src import backend

from fusedloss.reference._inputs import (
    check_predictions,
    checked_axis,
    is_list,
    logits_behind,
    loss_dtype,
    number,
    positive,
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


def _subset_kind(**arguments):
    """The kind that `row_loss` takes, of the arguments of which at most one is given."""
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"`{given[0]}` and `{given[1]}` both say which classes count: give one of them."
        )
    kinds = {"subset": "ids", "mask": "mask"}
    return kinds.get(given[0], "candidates") if given else "all"


@dataclasses.dataclass(frozen=True, eq=False)
class Formula:
    """What one softmax cross-entropy is made of; `fusedloss.nn.softmax_xent` explains it."""

    from_logits: bool
    ignore_class: int | None
    subset_kind: str  # "all", "ids", "mask" or "candidates"
    subset: Subset | None  # of the kind "ids"
    row_subsets: Any  # of the kinds "mask" and "candidates", which `aligned` lays out
    mask_negative: bool
    normalize: str
    subset_weight: float
    full_weight: float  # without any subset that of the whole loss
    label_smoothing: float
    class_weight: np.ndarray | None
    alpha: np.ndarray | None  # one a class; a single one is in the weights of subset and all
    temperature: float
    z_loss: float
    softcap: float | None
    focal: bool
    gamma: float
    blend: tuple[float, float] | None = None  # weights of two predictions whose sum is meant

    @classmethod
    def parse(
        cls,
        *,
        from_logits=True,
        ignore_class=None,
        subset=None,
        mask=None,
        candidates=None,
        candidates_in_targets=False,
        mask_negative_targets=False,
        normalize="subset",
        subset_weight=1.0,
        full_weight=0.0,
        label_smoothing=0.0,
        class_weight=None,
        temperature=1.0,
        z_loss=0.0,
        softcap=None,
        focal=False,
        gamma=0.0,
        alpha=1.0,
    ):
        """Checks what users give, tensors aside.

        `focal` asks for the focal form, which a `gamma` above 0 implies.

        Raises:
          ValueError: an argument out of its range, by name.
        """
        subset_kind = _subset_kind(
            subset=subset,
            mask=mask,
            candidates=candidates,
            candidates_in_targets=candidates_in_targets or None,
        )
        if normalize not in ("subset", "full"):
            raise ValueError(f"`normalize` must be 'subset' or 'full'. Got {normalize!r}.")
        subset_weight = weight("subset_weight", subset_weight)
        full_weight = weight("full_weight", full_weight)
        if subset_kind == "all" and not mask_negative_targets:
            if (subset_weight, full_weight) != (1, 0):
                raise ValueError(
                    "`subset_weight` and `full_weight` weigh a subset against all classes and need "
                    f"a `subset`. Got {subset_weight} and {full_weight} without one: give a "
                    "`subset`, or leave both out and scale the loss."
                )
            full_weight = 1.0
        label_smoothing = number("label_smoothing", label_smoothing)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"`label_smoothing` must lie in [0, 1]. Got {label_smoothing}.")
        if ignore_class is not None:
            given, ignore_class = ignore_class, _integer(ignore_class)
            if ignore_class is None:
                raise ValueError(f"`ignore_class` must be an integer or None. Got {given!r}.")
        if class_weight is not None:
            class_weight = weights("class_weight", class_weight, "one a class")
        temperature = positive("temperature", temperature)
        z_loss = weight("z_loss", z_loss)
        if softcap is not None:
            softcap = positive("softcap", softcap)
        of_logits = (
            ("temperature", temperature, 1),
            ("z_loss", z_loss, 0),
            ("softcap", softcap, None),
        )
        for name, value, neutral in of_logits:
            if value != neutral and not from_logits:
                raise ValueError(
                    f"`{name}` is about logits and needs `from_logits=True`. Got {value} for "
                    "probabilities."
                )
        gamma = weight("gamma", gamma)
        focal = focal or gamma > 0
        several = is_list(alpha)
        alpha = weights("alpha", alpha, "one a class") if several else weight("alpha", alpha)
        if not focal and (several or alpha != 1):
            raise ValueError(
                f"`alpha` weighs the focal form and needs gamma > 0. Got {alpha} and gamma {gamma}."
            )
        if not several:
            subset_weight, full_weight, alpha = subset_weight * alpha, full_weight * alpha, None
        return cls(
            from_logits=bool(from_logits),
            ignore_class=ignore_class,
            subset_kind=subset_kind,
            subset=None if subset is None else Subset.parse(subset),
            row_subsets=candidates if mask is None else mask,
            mask_negative=bool(mask_negative_targets),
            normalize=normalize,
            subset_weight=subset_weight,
            full_weight=full_weight,
            label_smoothing=label_smoothing,
            class_weight=class_weight,
            alpha=alpha,
            temperature=temperature,
            z_loss=z_loss,
            softcap=softcap,
            focal=bool(focal),
            gamma=gamma,
        )

    @property
    def lists(self):
        """The lists with one entry a class, by the name of the argument."""
        lists = {"class_weight": self.class_weight, "alpha": self.alpha}
        return {name: given for name, given in lists.items() if given is not None}

    def check(self, classes):
        """Raises ValueError if the formula does not fit predictions over `classes` classes."""
        if self.subset is not None:
            self.subset.check(classes)
        for name, given in self.lists.items():
            if given.size != classes:
                raise ValueError(
                    f"`{name}` has {given.size} entries, but the predictions have {classes} "
                    "classes: give one entry a class."
                )

    def arrays(self, dtype):
        """`subset` and `class_weight` as `row_loss` takes them, the weights in `dtype`."""
        subset = self.row_subsets
        if subset is None:
            subset = np.asarray(() if self.subset is None else self.subset.ids, np.int64)
        class_weight = np.prod(list(self.lists.values()), axis=0) if self.lists else ()
        return subset, np.asarray(class_weight, dtype.as_numpy_dtype)

    def scalars(self):
        """The keyword arguments of `row_loss`."""
        return {
            "subset_kind": self.subset_kind,
            "from_logits": self.from_logits,
            "ignore_class": self.ignore_class,
            "normalize": self.normalize,
            "mask_negative": self.mask_negative,
            "subset_weight": self.subset_weight,
            "full_weight": self.full_weight,
            "label_smoothing": self.label_smoothing,
            "epsilon": float(keras.config.epsilon()),
            "temperature": self.temperature,
            "z_loss": self.z_loss,
            "softcap": self.softcap or 0.0,
            "focal": self.focal,
            "gamma": self.gamma,
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
    for name, given in formula.lists.items():
        rule = f"`{name}` must have one entry a class"
        assertions.append(tf.debugging.assert_equal(np.int64(given.size), classes, rule))
    with tf.control_dependencies(assertions):
        return tf.identity(predictions)


def _broadcasts(shape, to):
    """Whether a shape broadcasts to another one, as far as sizes are known."""
    if shape.rank in (None, 0) or shape.rank > to.rank:
        return False
    pairs = zip(shape[::-1], to[::-1], strict=False)
    return all(size in (None, 1) or other in (None, size) for size, other in pairs)


def checked_mask(mask):
    """A mask over classes as a tensor; TypeError if it is not boolean."""
    mask = tf.convert_to_tensor(mask)
    if mask.dtype != tf.bool:
        raise TypeError(f"`mask` must be boolean. Got {mask.dtype.name}: cast it, as `mask != 0`.")
    return mask


def _with_mask(formula, predictions, axis, classes_last):
    """The formula with its mask laid out; a constant for all rows becomes a `Subset`."""
    mask = checked_mask(formula.row_subsets)
    of_classes = mask.shape.rank == 1
    shape = predictions.shape[axis : axis + 1] if of_classes else predictions.shape
    if not _broadcasts(mask.shape, shape):
        raise ValueError(
            "`mask` must have one entry a class, or broadcast to the shape of the predictions. Got "
            f"shape {mask.shape} for predictions of shape {predictions.shape}, class axis {axis}."
        )
    constant = tf.get_static_value(mask) if of_classes and mask.shape == shape else None
    if constant is not None:
        ids = np.flatnonzero(constant)
        subset = Subset(ids.astype(np.int64), ids, constant.size)
        return dataclasses.replace(formula, subset_kind="ids", subset=subset, row_subsets=None)
    laid_out = tf.shape(predictions)
    if of_classes:
        laid_out = tf.gather(laid_out, classes_last)
    mask = tf.broadcast_to(mask, laid_out)
    if not of_classes and axis != predictions.shape.rank - 1:
        mask = tf.transpose(mask, classes_last)
    return dataclasses.replace(formula, row_subsets=mask)


def _with_candidates(formula, rows):
    """The formula with its candidates as a tensor, for rows of that shape."""
    candidates = tf.convert_to_tensor(formula.row_subsets)
    if not candidates.dtype.is_integer:
        raise TypeError(f"`candidates` must be integers, class ids. Got {candidates.dtype.name}.")
    shape = candidates.shape
    if shape.rank != rows.rank + 1 or not shape[:-1].is_compatible_with(rows):
        raise ValueError(
            "`candidates` must have the shape of the predictions without their class axis, and "
            f"one more axis, the last. Got {shape} for rows of shape {rows}."
        )
    if candidates.dtype not in (tf.int32, tf.int64):
        candidates = tf.cast(candidates, tf.int64)
    return dataclasses.replace(formula, row_subsets=candidates)


def aligned(targets, predictions, formula, *, axis, sparse):
    """Lays targets and predictions out as `row_loss` takes them and checks what is known of them.

    Args:
      targets, predictions: tensors, as users give them.
      formula: a `Formula`, with the mask or candidates as users give them.
      axis: the class axis of the predictions, of dense targets and of a mask.
      sparse: whether the targets are labels.
    Returns:
      Targets, predictions with the class axis last, and the formula, with mask or candidates laid
      out, from logits if the predictions could be walked back to them.
    Raises:
      TypeError: predictions that are not floating point, a mask that is not boolean, candidates
        that are not integers.
      ValueError: an unknown rank, predictions without a class axis, shapes that disagree, `axis`
        out of range, a formula that does not fit the number of classes.
      InvalidArgumentError: the last, if the number of classes is only known at run time.
    """
    check_predictions(targets, predictions)
    if formula.mask_negative and (targets.dtype.is_bool or targets.dtype.is_unsigned):
        raise TypeError(
            "`mask_negative_targets` reads negative targets, which "
            f"{targets.dtype.name} has none of: cast the targets before -1 is put into them."
        )
    rank = predictions.shape.rank
    if rank == 0:
        raise ValueError("The predictions must have an axis of classes. Got a scalar.")
    axis = checked_axis(axis, predictions)
    rows = predictions.shape[:axis].concatenate(predictions.shape[axis + 1 :])
    of_candidates = formula.subset_kind == "candidates"
    if of_candidates:
        formula = _with_candidates(formula, rows)
    if sparse:
        if targets.shape.rank == rank and targets.shape[axis] == 1:
            targets = tf.squeeze(targets, axis)
        expected = rows
        rule = "Labels must have the same shape as the predictions without their class axis."
    elif of_candidates:
        expected = formula.row_subsets.shape
        rule = f"Dense targets must have the shape of `candidates`, {expected}."
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
    classes_last = [*range(axis), *range(axis + 1, rank), axis]
    if formula.subset_kind == "mask":
        formula = _with_mask(formula, predictions, axis, classes_last)
    predictions, formula = _logits_behind(predictions, formula)
    if axis != rank - 1:
        predictions = tf.transpose(predictions, classes_last)
        if not (sparse or of_candidates):
            targets = tf.transpose(targets, classes_last)
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


def warped(logits, softcap, temperature):
    """Logits with a softcap, or 0 or None for none, divided by the temperature."""
    if softcap:
        logits = softcap * tf.tanh(logits / softcap)
    return logits / temperature if temperature != 1 else logits


class _Family(NamedTuple):
    """Classes over which a loss is summed, F or N of the formula, one an entry."""

    # int64 [entries], or the rows' own, [..., entries]; None: all classes in order
    ids: tf.Tensor | None
    # bool [..., entries], False where an entry is left out; None: nowhere
    member: tf.Tensor | None
    # float [..., entries], 0 where an entry is left out
    targets: tf.Tensor

    def pick(self, values):
        """The entries of `[..., classes]` or `[classes]`."""
        if self.ids is None:
            return values
        rank = self.ids.shape.rank
        return tf.gather(
            values, self.ids, axis=-1, batch_dims=(values.shape.rank == rank) * (rank - 1)
        )


def _sums_by_class(targets, ids, shape):
    """Targets of candidates, `[..., K]`, as targets of classes, in a shape `[..., classes]`."""
    first = tf.reshape(tf.range(tf.reduce_prod(shape[:-1])) * shape[-1], shape[:-1])
    places = tf.reshape(ids + first[..., None], [-1])
    sums = tf.math.unsorted_segment_sum(tf.reshape(targets, [-1]), places, tf.reduce_prod(shape))
    return tf.reshape(sums, shape)


def _families(targets, shape, subset, subset_kind, mask_negative, dtype):
    """S and all classes, the targets before smoothing.

    Args:
      targets: int64 `[...]` or float `[..., classes]`; of candidates also `[..., K]`.
      shape: that of the predictions.
      subset, subset_kind, mask_negative: of `row_loss`.
      dtype: of the targets of a family.
    """
    classes = shape[-1]
    of_candidates = subset_kind == "candidates"
    ids = member = None
    if subset_kind == "ids":
        ids = subset
    elif subset_kind == "mask":
        member = subset
    elif of_candidates:
        member = subset >= 0
        ids = tf.where(member & (subset < classes), subset, tf.zeros([], tf.int64))
    if targets.dtype.is_integer:
        labels, every_class = targets[..., None], tf.range(classes)
        matches = labels == (every_class if ids is None else ids)
        if member is not None:
            matches &= member
        if of_candidates:
            matches &= tf.cumsum(tf.cast(matches, dtype), axis=-1) == 1  # The first one alone.
        of_subset, of_all = tf.cast(matches, dtype), tf.cast(labels == every_class, dtype)
    else:
        of_all = targets
        of_subset = targets if of_candidates else _Family(ids, None, targets).pick(targets)
        if mask_negative:
            of_all = tf.where(targets < 0, tf.zeros([], dtype), targets)
            legal = ~(of_subset < 0)  # NaN stays, and propagates.
            member = legal if member is None else member & legal
        if member is not None:
            of_subset = tf.where(member, of_subset, tf.zeros([], dtype))
        if of_candidates:
            of_all = _sums_by_class(of_subset, ids, shape)
    return _Family(ids, member, of_subset), _Family(None, None, of_all)


def row_loss(
    predictions,
    targets,
    subset,
    class_weight,
    *,
    subset_kind,
    from_logits,
    ignore_class,
    normalize,
    mask_negative,
    subset_weight,
    full_weight,
    label_smoothing,
    epsilon,
    temperature,
    z_loss,
    softcap,
    focal,
    gamma,
):
    """The loss of every row, on tensors laid out as the compiled op takes them.

    From probabilities, Keras's arithmetic: with dense targets they are divided by the sum over N
    and clipped to [epsilon, 1 - epsilon], and their logarithms stand for s - lse; with labels they
    are clipped only, and their logarithms are the logits.

    Args:
      predictions: float `[..., classes]`.
      targets: integer `[...]` or float `[..., classes]`; of candidates also `[..., K]`.
      subset: by `subset_kind`; "all": `[0]`; "ids": int64 `[classes of the subset]`, ascending;
        "mask": bool `[..., classes]`; "candidates": int32 or int64 `[..., K]`, -1 where there is
        none.
      class_weight: float `[classes]`, or `[0]` for none.
      mask_negative: classes with a negative target leave the subset.
      softcap: 0 for none.
    Returns:
      float `[...]`, in nats; 0 without classes, NaN for a label outside `[0, classes)` and for
      candidates outside `[-1, classes)`.
    """
    dtype = loss_dtype(predictions)
    scores = tf.cast(predictions, dtype)
    if scores.shape[-1] == 0:
        return tf.reduce_sum(scores, axis=-1)
    sparse = targets.dtype.is_integer
    targets = tf.cast(targets, tf.int64 if sparse else dtype)
    class_weight = None if class_weight.shape[0] == 0 else tf.cast(class_weight, dtype)
    shape = tf.shape(predictions, tf.int64)
    classes = shape[-1]
    are_logits = from_logits or sparse
    zero, one = tf.zeros([], dtype), tf.ones([], dtype)

    def family_loss(family, normalizer, counted):
        """L_F for F and N, 0 in the rows that are not counted (None: all)."""
        safe = scores
        if counted is not None:
            # Selecting among the results is not enough: 0 times NaN would reach the gradient.
            safe = tf.where(counted[..., None], scores, one)

        def read(entries):
            """Logits or probabilities of entries; -inf or 0 for those that are left out."""
            values, member = entries.pick(safe), entries.member
            if member is not None:
                member = member if counted is None else member | ~counted[..., None]
                values = tf.where(member, values, one)
            values = warped(values, softcap, temperature)
            if sparse and not from_logits:
                values = tf.math.log(tf.clip_by_value(values, epsilon, 1 - epsilon))
            if member is not None:
                values = tf.where(member, values, -math.inf if are_logits else zero)
            return values

        chosen = read(family)
        over = chosen if normalizer is family else read(normalizer)
        if are_logits:
            peak = tf.stop_gradient(tf.reduce_max(over, axis=-1, keepdims=True))
            log_sum = tf.math.log(tf.reduce_sum(tf.exp(over - peak), axis=-1, keepdims=True))
            nats = log_sum - (chosen - peak)
        if focal or not are_logits:
            if are_logits:
                share = tf.exp(-nats)
            else:
                share = chosen / tf.reduce_sum(over, axis=-1, keepdims=True)
            share = tf.clip_by_value(share, epsilon, 1 - epsilon)
            nats = -tf.math.log(share)
        if focal:
            nats *= (1 - share) ** gamma
        shares = family.targets
        if label_smoothing:
            if family.member is None:
                size = tf.cast(tf.shape(nats)[-1], dtype)
            else:
                size = tf.reduce_sum(tf.cast(family.member, dtype), axis=-1, keepdims=True)
            uniform = tf.math.divide_no_nan(tf.constant(label_smoothing, dtype), size)
            shares = shares * (1 - label_smoothing) + uniform
        if class_weight is not None:
            shares *= family.pick(class_weight)
        if family.member is not None:
            shares = tf.where(family.member, shares, zero)
        # A class without a share adds nothing, even where its logit is infinite.
        loss = tf.reduce_sum(tf.math.multiply_no_nan(nats, shares), axis=-1)
        if z_loss:
            loss += z_loss * tf.squeeze(peak + log_sum, -1) ** 2
        return loss if counted is None else tf.where(counted, loss, zero)

    counted = targets != ignore_class if ignore_class is not None else None
    if subset_kind == "candidates":
        subset = tf.cast(subset, tf.int64)
    part, everything = _families(targets, shape, subset, subset_kind, mask_negative, dtype)
    loss = None
    if (subset_kind != "all" or mask_negative) and subset_weight:
        inside = tf.reduce_sum(part.targets, axis=-1) != 0
        inside = inside if counted is None else inside & counted
        normalizer = part if normalize == "subset" else everything
        loss = subset_weight * family_loss(part, normalizer, inside)
    if full_weight:
        full = full_weight * family_loss(everything, everything, counted)
        loss = full if loss is None else loss + full
    if loss is None:
        # Both weights are 0. So is the gradient, and not None.
        loss = family_loss(everything, everything, tf.zeros(shape[:-1], tf.bool))

    unknown = tf.zeros([], tf.bool)
    if sparse:
        unknown = _is_outside(targets, 0, classes)
        unknown = unknown if counted is None else unknown & counted
    if subset_kind == "candidates":
        unknown |= tf.reduce_any(_is_outside(subset, -1, classes), axis=-1)
    return tf.where(unknown, tf.constant(math.nan, dtype), loss)


def row_metrics(
    predictions,
    targets,
    subset,
    *,
    subset_kind,
    from_logits,
    ignore_class,
    normalize,
    mask_negative,
    epsilon,
    temperature,
    softcap,
    **_,
):
    """What a row's softmax looks like; no gradient is to be asked of it.

    Args:
      as of `row_loss`; what is not named here changes nothing.
    Returns:
      float `[..., 3]`. Rank: how many classes of S, or of all without one, are more probable than
      the row's own, the label or the first of the greatest targets in S; of equal ones the first
      is. Entropy and log-sum-exp of the softmax, in nats; of probabilities the log of their sum.
      -1, 0 and 0 for a row that is ignored or has no target in S.
    """
    dtype = loss_dtype(predictions)
    scores = tf.cast(predictions, dtype)
    shape = tf.shape(predictions, tf.int64)
    no_metrics = tf.constant([-1, 0, 0], dtype)
    if scores.shape[-1] == 0:
        return tf.broadcast_to(no_metrics, tf.concat([shape[:-1], [3]], 0))
    sparse = targets.dtype.is_integer
    targets = tf.cast(targets, tf.int64 if sparse else dtype)
    if subset_kind == "candidates":
        subset = tf.cast(subset, tf.int64)
    part, everything = _families(targets, shape, subset, subset_kind, mask_negative, dtype)
    lowest = tf.constant(-math.inf, dtype)

    def among(values, family):
        return values if family.member is None else tf.where(family.member, values, lowest)

    inside = tf.ones(shape[:-1], tf.bool)
    if subset_kind != "all" or mask_negative:
        inside = tf.reduce_sum(part.targets, axis=-1) != 0
    if ignore_class is not None:
        inside &= targets != ignore_class
    own = tf.argmax(among(part.targets, part), axis=-1)[..., None]
    chosen = among(part.pick(scores), part)
    of_own = tf.gather(chosen, own, axis=-1, batch_dims=own.shape.rank - 1)
    before = tf.range(tf.shape(chosen, tf.int64)[-1]) < own
    higher = ~(chosen <= of_own) | (before & (chosen == of_own))  # NaN, too.
    if part.member is not None:
        higher &= part.member
    rank = tf.math.count_nonzero(higher, -1, dtype=dtype)

    over = part if normalize == "subset" else everything
    if from_logits or sparse:
        scores = warped(scores, softcap, temperature)
        if not from_logits:
            scores = tf.math.log(tf.clip_by_value(scores, epsilon, 1 - epsilon))
        scores = among(over.pick(scores), over)
        peak = tf.reduce_max(scores, axis=-1, keepdims=True)
        powers = tf.exp(scores - peak)
        total = tf.reduce_sum(powers, axis=-1, keepdims=True)
        log_sum_exp = tf.squeeze(peak + tf.math.log(total), -1)
    else:
        powers = over.pick(scores)
        if over.member is not None:
            powers = tf.where(over.member, powers, tf.zeros([], dtype))
        total = tf.reduce_sum(powers, axis=-1, keepdims=True)
        log_sum_exp = tf.squeeze(tf.math.log(total), -1)
    shares = powers / total
    entropy = -tf.reduce_sum(tf.math.multiply_no_nan(tf.math.log(shares), shares), axis=-1)
    metrics = tf.stack([rank, entropy, log_sum_exp], axis=-1)
    return tf.where(inside[..., None], metrics, no_metrics)


def _is_outside(ids, first, classes):
    """Where class ids lie outside `[first, classes)`; nowhere if there are no classes."""
    return ((ids < first) | (ids >= classes)) & (classes > 0)


def _assert_known(name, ids, first, classes, ignored=None):
    """Asserts that class ids lie in `[first, classes)`; the text names the first that does not.

    Args:
      ids: integers `[...]`.
      ignored: an id that is let through, or None.
    """
    flat = tf.reshape(tf.cast(ids, tf.int64), [-1])
    unknown = _is_outside(flat, first, classes)
    if ignored is not None:
        unknown &= flat != ignored
    # An end is appended, so that there is a first one in any case.
    position = tf.argmax(tf.concat([unknown, [True]], 0))
    found = tf.gather(tf.concat([flat, [0]], 0), position)
    rule = f"`{name}` must lie in [{first}, classes); the first that does not, its row"
    where = [position]
    if name == "candidates":
        size = tf.maximum(tf.shape(ids, tf.int64)[-1], 1)
        rule, where = rule + ", its place", [position // size, position % size]
    known = ~tf.reduce_any(unknown)
    return tf.debugging.Assert(known, [rule + ", classes:", found, *where, classes])


def checked_row_loss(targets, predictions, formula):
    """`row_loss` of what `aligned` returns.

    Raises:
      InvalidArgumentError: outside XLA, which has no assertions: a label outside `[0, classes)`, a
        candidate outside `[-1, classes)`; shapes that turn out to disagree.
    """
    sparse = targets.dtype.is_integer
    shape, given = tf.shape(predictions, tf.int64), tf.shape(targets, tf.int64)
    expected = shape[:-1] if sparse else shape
    assertions = []
    if formula.subset_kind == "candidates":
        candidates = formula.row_subsets
        expected = shape[:-1] if sparse else tf.shape(candidates, tf.int64)
        rule = "candidates and predictions must agree in shape"
        rows = tf.shape(candidates, tf.int64)[:-1]
        assertions.append(tf.debugging.assert_equal(rows, shape[:-1], rule))
        assertions.append(_assert_known("candidates", candidates, -1, shape[-1]))
    if not (targets.shape.is_fully_defined() and predictions.shape.is_fully_defined()):
        rule = "targets and predictions must agree in shape"
        assertions.append(tf.debugging.assert_equal(given, expected, rule))
    if sparse:
        assertions.append(
            _assert_known("labels", targets, 0, shape[-1], ignored=formula.ignore_class)
        )
    with tf.control_dependencies([a for a in assertions if a is not None]):
        targets, predictions = tf.identity(targets), tf.identity(predictions)
    arrays = map(tf.convert_to_tensor, formula.arrays(loss_dtype(predictions)))
    return row_loss(predictions, targets, *arrays, **formula.scalars())


def mark_ignored(loss, labels, formula):
    """Sets Keras's mask on the loss of rows, so that a mean leaves `ignore_class` rows out."""
    if formula.ignore_class is not None:
        backend.set_keras_mask(loss, labels != formula.ignore_class)
    return loss


def softmax_xent(targets, logits, *, axis=-1, **arguments):
    """`fusedloss.nn.softmax_xent` in plain TensorFlow: the same arguments, results and errors."""
    formula = Formula.parse(**arguments)
    targets, logits = tf.convert_to_tensor(targets), tf.convert_to_tensor(logits)
    return checked_row_loss(*aligned(targets, logits, formula, axis=axis, sparse=False))


def sparse_softmax_xent(labels, logits, *, axis=-1, **arguments):
    """`fusedloss.nn.sparse_softmax_xent` in plain TensorFlow: the same arguments, results, errors.

    Only under XLA a label or candidate out of range gives NaN, since XLA has no assertions.
    """
    formula = Formula.parse(**arguments)
    labels, logits = tf.convert_to_tensor(labels), tf.convert_to_tensor(logits)
    labels, logits, formula = aligned(labels, logits, formula, axis=axis, sparse=True)
    return mark_ignored(checked_row_loss(labels, logits, formula), labels, formula)
