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


def feature_distance(
    predictions,
    targets,
    dloss,
    *,
    metric="mse",
    reference="target",
    channel_weights=None,
    layer_weights=None,
    data_format="channels_last",
    epsilon=None,
    epsilon_in_root=True,
):
    """The distance of lists of feature maps, one a layer, and its gradients.

    Args:
      predictions, targets: lists of `[rows, ..., channels]`; of one target of all examples
        `[1, ..., channels]` or `[..., channels]`; targets are not looked at under "first".
      dloss: `[rows]`, the cotangents.
      channel_weights: None or a list, one entry a layer.
    Returns:
      Loss `[rows]`; lists of the gradients of sum(dloss * loss) in predictions and in targets; the
      largest of the terms whose differences the loss is, and a list of those of the gradients.
    """
    if epsilon is None:
        epsilon = {"charbonnier": 1e-3, "cosine": 1e-12, "lpips": 1e-10}.get(metric, 0.0)
    count, rows = len(predictions), len(predictions[0])
    of_layers = np.ones(count) if layer_weights is None else layer_weights
    of_rows = np.asarray(dloss).astype(np.longdouble)
    is_first = reference == "first"
    if is_first:
        of_rows = np.where(np.arange(rows) == 0, 0, of_rows)
    loss = np.zeros(rows, np.longdouble)
    dpredictions, dtargets, loss_terms, gradient_terms = [], [], 0, []
    for k, layer_weight in enumerate(of_layers):
        a = _channels_last(predictions[k], data_format)
        b = a[:1]
        if not is_first:
            target = np.asarray(targets[k])
            if target.ndim < np.ndim(predictions[k]):
                target = target[None]
            b = _channels_last(target, data_format)
        weights = np.ones(a.shape[-1], np.longdouble)
        if channel_weights is not None and channel_weights[k] is not None:
            weights = np.asarray(channel_weights[k]).astype(np.longdouble)
        positions = int(np.prod(a.shape[1:-1]))
        flat = [x.reshape(x.shape[0], positions, x.shape[-1]) for x in (a, b)]
        distance, slopes, terms, slope_terms = _distance(
            metric, *flat, weights, np.longdouble(epsilon), epsilon_in_root
        )
        distance *= layer_weight
        if is_first and rows:
            distance[0] = 0
        loss += distance
        loss_terms = max(loss_terms, terms * layer_weight)
        da, db = (layer_weight * slope * of_rows[:, None, None] for slope in slopes)
        summed = (layer_weight * slope_terms * np.abs(of_rows)[:, None, None]).sum(0)
        gradient_terms.append(summed.max(initial=0))
        if is_first and rows:
            da[0] += db.sum(0)
        elif b.shape[0] == 1:
            db = db.sum(0, keepdims=True)
        dpredictions.append(_as_given(da.reshape(a.shape), data_format))
        if not is_first:
            dtargets.append(_as_given(db.reshape(b.shape), data_format).reshape(targets[k].shape))
    return loss, dpredictions, dtargets, loss_terms, gradient_terms


def _channels_last(features, data_format):
    x = np.asarray(features).astype(np.longdouble)
    return np.moveaxis(x, 1, -1) if data_format == "channels_first" else x


def _as_given(features, data_format):
    return np.moveaxis(features, -1, 1) if data_format == "channels_first" else features


def _distance(metric, a, b, w, epsilon, epsilon_in_root):
    """D `[rows]`, its slopes in a and b, and the sizes of their terms.

    a: `[rows, positions, channels]`; b: that, or with one row.
    """
    rows, positions, channels = a.shape
    e = a - b
    if e.size == 0:
        return np.zeros(rows, np.longdouble), (e, e), 0, np.abs(e)
    if metric in ("mse", "mae", "charbonnier"):
        if metric == "mse":
            size, slope = e * e, 2 * e
        elif metric == "mae":
            size, slope = np.abs(e), np.sign(e)
        else:
            size = np.sqrt(e * e + epsilon**2)
            slope = e / size
        slope = w * slope / (positions * channels)
        return (w * size).mean((1, 2)), (slope, -slope), 0, np.abs(slope)
    if metric == "gram":
        gram_a, gram_b = (np.einsum("rpi,rpj->rij", x, x) / positions for x in (a, b))
        difference = gram_a - gram_b
        scale = 4 / np.longdouble(positions * channels**2)
        slopes = [sign * scale * (x @ difference) for sign, x in ((1, a), (-1, b))]
        magnitude = sum(np.einsum("rpi,rpj->rij", np.abs(x), np.abs(x)) / positions for x in (a, b))
        terms = 2 * (np.abs(difference) * magnitude).mean((1, 2)).max()
        slope_terms = scale * (np.abs(a) + np.abs(b)) @ magnitude
        return (difference**2).mean((1, 2)), slopes, terms, slope_terms
    if metric == "cosine":
        sum_a, sum_b = ((w * x * x).sum(-1, keepdims=True) + epsilon for x in (a, b))
        norms = np.sqrt(sum_a) * np.sqrt(sum_b)
        cosine = (w * a * b).sum(-1, keepdims=True) / norms
        slopes = [
            -w * (y / norms - cosine * x / squared) / positions
            for x, y, squared in ((a, b, sum_a), (b, a, sum_b))
        ]
        slope_terms = sum(
            w * (np.abs(y) / norms + np.abs(cosine * x) / squared) / positions
            for x, y, squared in ((a, b, sum_a), (b, a, sum_b))
        )
        return (1 - cosine[..., 0]).mean(-1), slopes, 1, slope_terms
    assert metric == "lpips"
    roots = [np.sqrt((x * x).sum(-1, keepdims=True)) for x in (a, b)]
    if epsilon_in_root:
        roots = norms = [np.sqrt(root**2 + epsilon) for root in roots]
    else:
        norms = [root + epsilon for root in roots]
    unit_a, unit_b = a / norms[0], b / norms[1]
    difference = unit_a - unit_b
    pull = 2 * w * difference / positions
    slopes, slope_terms = [], 0
    for sign, x, root, norm in zip((1, -1), (a, b), roots, norms, strict=True):
        along = (x * pull).sum(-1, keepdims=True)
        back = x * along / (norm**2 * np.where(root == 0, 1, root))
        slopes.append(sign * (pull / norm - back))
        sizes = 2 * w * (np.abs(unit_a) + np.abs(unit_b)) / positions
        slope_terms = slope_terms + sizes / norm
    terms = 2 * (w * np.abs(difference) * (np.abs(unit_a) + np.abs(unit_b))).sum(-1)
    return (w * difference**2).sum(-1).mean(-1), slopes, terms.mean(-1).max(), slope_terms
