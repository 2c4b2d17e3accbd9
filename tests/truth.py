"""Softmax cross-entropy and its gradient in NumPy's long double, written out from the formulas."""

import numpy as np

EPSILON = 1e-7  # Keras's, of probabilities

# What probabilities should not hold, and do: in the first row, at a class inside or outside of the
# subset [1, 2]. The other rows are sound.
ODD_PROBABILITIES = {
    "zeros": [0, 0, 0, 0],
    "NaN inside": [0.2, np.nan, 0.3, 0.4],
    "NaN outside": [np.nan, 0.5, 0.3, 0.2],
    "Inf inside": [0.2, np.inf, 0.3, 0.4],
    "Inf outside": [np.inf, 0.5, 0.3, 0.2],
    "a zero": [0, 0.3, 0.4, 0.3],
    "one": [0, 1, 0, 0],
    "negative": [-3, -1, -1, 2],
    "of negative sum": [-0.9, 0.1, -0.5, -0.1],
}


def with_terms(
    predictions,
    targets,
    *,
    from_logits=True,
    ignore_class=None,
    subset=None,
    normalize="subset",
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
):
    """`softmax_xent`, and the largest of the terms whose differences loss and gradient are."""
    x = np.asarray(predictions).astype(np.longdouble)
    classes = x.shape[-1]
    everything = np.arange(classes)
    sparse = np.asarray(targets).dtype.kind == "i"
    counted = np.ones(x.shape[:-1], bool)
    if sparse:
        if ignore_class is not None:
            counted = targets != ignore_class
        y = np.where(counted, targets, 0)[..., None] == everything
    else:
        y = np.asarray(targets)
    y = y.astype(np.longdouble)
    weights = np.ones(classes) if class_weight is None else np.asarray(class_weight)
    smoothing = np.longdouble(label_smoothing)
    families = [(1.0, everything, everything, counted)]
    if subset is not None:
        subset = np.asarray(subset)
        ids = np.flatnonzero(subset) if subset.dtype == bool else np.sort(subset)
        over = ids if normalize == "subset" else everything
        inside = counted & (y[..., ids].sum(-1) != 0)
        full = (full_weight, everything, everything, counted)
        families = [(subset_weight, ids, over, inside), full]

    loss, gradient = np.zeros(x.shape[:-1], x.dtype), np.zeros_like(x)
    loss_terms, gradient_terms = np.zeros_like(x), np.zeros_like(x)
    for weight, family, over, rows in families:
        in_family, in_over = np.isin(everything, family), np.isin(everything, over)
        shares = np.where(
            in_family, weights * (y * (1 - smoothing) + smoothing / max(1, len(family))), 0
        )
        total = shares.sum(-1, keepdims=True)
        if from_logits or sparse:
            z, slope = x, np.ones_like(x)
            if not from_logits:
                z = np.log(np.clip(x, EPSILON, 1 - EPSILON))
                slope = np.where((x >= EPSILON) & (x <= 1 - EPSILON), 1 / np.maximum(x, EPSILON), 0)
            peak = np.max(z, axis=-1, where=in_over, initial=-np.inf, keepdims=True)
            power = np.where(in_over, np.exp(z - peak), 0)
            sum_over = power.sum(-1, keepdims=True)
            nats = np.log(sum_over) - (z - peak)
            pull = (total * power / sum_over - shares) * slope
            loss_terms += weight * shares * np.abs(z - (peak if from_logits else 0))
            gradient_terms += weight * shares * slope
        else:
            sum_over = np.where(in_over, x, 0).sum(-1, keepdims=True)
            q = x / sum_over
            clipped = np.clip(q, EPSILON, 1 - EPSILON)
            nats = -np.log(clipped)
            dq = np.where(clipped == q, -shares / clipped, 0)
            pull = (dq - np.where(in_over, (dq * q).sum(-1, keepdims=True), 0)) / sum_over
            loss_terms += weight * shares * np.abs(np.log(clipped))
            gradient_terms += weight * np.abs(dq) / sum_over
        part = np.where(shares != 0, shares * nats, 0).sum(-1)
        loss += np.where(rows, weight * part, 0)
        gradient += np.where(rows[..., None], weight * pull, 0)
    return loss, gradient, loss_terms.max(initial=0), gradient_terms.max(initial=0)


def softmax_xent(predictions, targets, **arguments):
    """Loss `[...]` and its gradient `[..., classes]` row by row, for labels or dense targets."""
    return with_terms(predictions, targets, **arguments)[:2]
