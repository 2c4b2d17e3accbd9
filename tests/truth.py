"""The losses and their gradients in NumPy's long double, written out from the formulas."""

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


def pointwise(
    function,
    predictions,
    targets,
    *,
    delta=1.0,
    quantile=0.5,
    from_logits=False,
    label_smoothing=0.0,
    output_weights=None,
):
    """The loss called `function` in `fusedloss.nn`, one `[..., outputs]` and one a row.

    Returns:
      Loss `[...]` and its gradient `[..., outputs]`, row by row; the largest of the terms whose
      differences they are.
    """
    p, y = (np.asarray(x).astype(np.longdouble) for x in (predictions, targets))
    p, y = np.broadcast_arrays(p, y)
    weights = np.ones(p.shape[-1]) if output_weights is None else np.asarray(output_weights)
    weights = weights.astype(np.longdouble)
    # 0.5 lies away from all corners, and within the range of probabilities.
    p, y = (np.where(weights != 0, x, np.longdouble(0.5)) for x in (p, y))
    e = p - y
    size, sign = np.abs(e), np.sign(e)
    loss_terms, gradient_terms = np.zeros_like(p), np.zeros_like(p)
    if function == "huber":
        delta = np.longdouble(delta)
        loss = np.where(size <= delta, e * e / 2, delta * (size - delta / 2))
        gradient = np.clip(e, -delta, delta)
    elif function == "mean_squared_error":
        loss, gradient = e * e, 2 * e
    elif function == "mean_absolute_error":
        loss, gradient = size, sign
    elif function == "log_cosh":
        loss = np.log1p(2 * np.sinh(np.minimum(size, 1) / 2) ** 2)
        loss = np.where(
            size < 1, loss, size + np.log1p(np.exp(-2 * size)) - np.log(np.longdouble(2))
        )
        gradient = np.tanh(e)
    elif function == "quantile":
        q = np.asarray(quantile, np.longdouble)
        loss = np.maximum(q * -e, (1 - q) * e)
        gradient = np.where(e > 0, 1 - q, -q) * np.abs(sign)
    else:
        assert function == "binary_crossentropy"
        smoothing = np.longdouble(label_smoothing)
        y = (1 - smoothing) * y + smoothing / 2
        if from_logits:
            loss = np.maximum(p, 0) - p * y + np.log1p(np.exp(-np.abs(p)))
            sigmoid = np.where(p > 0, 1, np.exp(-np.abs(p))) / (1 + np.exp(-np.abs(p)))
            gradient = sigmoid - y
            loss_terms, gradient_terms = np.abs(p * y) + np.abs(p), sigmoid + np.abs(y)
        else:
            c = np.clip(p, EPSILON, 1 - EPSILON)
            loss = -y * np.log(c) - (1 - y) * np.log1p(-c)
            gradient = np.where(c == p, (1 - y) / (1 - c) - y / c, 0)
            gradient_terms = np.abs(y / c) + np.abs((1 - y) / (1 - c))
    scale = weights / max(1, p.shape[-1])
    return (
        (scale * loss).sum(-1),
        scale * gradient,
        (scale * loss_terms).max(initial=0),
        (scale * gradient_terms).max(initial=0),
    )


def penalty(values, *, l1=0.0, l2=0.0, reduce="sum"):
    """The penalty on a list of arrays, and a list of its gradients."""
    total, gradients = np.longdouble(0), []
    for value, a, b in zip(
        values, *(np.broadcast_to(x, len(values)) for x in (l1, l2)), strict=True
    ):
        w = np.asarray(value).astype(np.longdouble)
        share = np.longdouble(1) if reduce == "sum" else 1 / np.longdouble(max(1, w.size))
        a, b = a * share, b * share
        total += a * np.abs(w).sum() + b * (w * w).sum()
        gradients.append(a * np.sign(w) + 2 * b * w)
    return total, gradients
