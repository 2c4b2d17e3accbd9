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


class SoftmaxRows:
    """Scores, subsets and targets of rows, in long double.

    A subset is a list of places, each with a class: all classes in order, or the candidates of the
    row. A place that is not `listed` is not there.

    Attributes:
      predictions, scores: `[rows, classes]`; scores are logits or their like, None if there are
        none: from probabilities and dense targets.
      slope: derivative of the scores in the predictions; `steepest`, without that of the softcap.
      counted: `[rows]`, whether the label is not the ignored one.
      subset, everything: each `(classes, listed, targets)` of `[rows, places]`; subset may be None.
      normalizer: that of the two over which the subset's softmax runs.
      inside: `[rows]`, whether there is a target in the subset.
    """

    def __init__(
        self,
        predictions,
        targets,
        *,
        from_logits=True,
        ignore_class=None,
        subset=None,
        mask=None,
        candidates=None,
        mask_negative_targets=False,
        normalize="subset",
        temperature=1.0,
        softcap=None,
    ):
        x = np.asarray(predictions).astype(np.longdouble)
        self.predictions = x = x.reshape(-1, x.shape[-1])
        rows, classes = x.shape
        targets = np.asarray(targets)
        sparse = targets.dtype.kind == "i"
        targets = targets.reshape(rows, -1)
        self._set_scores(sparse, from_logits, np.longdouble(temperature), softcap)

        self.counted = np.ones(rows, bool)
        if sparse and ignore_class is not None:
            self.counted = targets[:, 0] != ignore_class
        all_classes = np.broadcast_to(np.arange(classes), x.shape)
        ids, listed = all_classes, np.ones(x.shape, bool)
        if candidates is not None:
            candidates = np.asarray(candidates).reshape(rows, -1)
            ids, listed = np.maximum(candidates, 0), candidates >= 0
        elif mask is not None:
            mask = np.broadcast_to(mask, np.shape(predictions))
            listed = mask.reshape(x.shape)
        elif subset is not None:
            subset = np.asarray(subset)
            chosen = np.flatnonzero(subset) if subset.dtype == bool else subset
            listed = np.isin(all_classes, chosen)
        if sparse:
            hits = listed & (ids == targets)
            y = hits & (np.cumsum(hits, axis=-1) == 1)
            y_all = (all_classes == targets) & self.counted[:, None]
        else:
            y = np.where(listed | (candidates is None), targets, 0)
            if mask_negative_targets:
                listed, y = listed & ~(y < 0), np.where(y < 0, 0, y)
            y_all = self.of_classes(ids, y)
            y = np.where(listed, y, 0)
        y, y_all = (each.astype(np.longdouble) for each in (y, y_all))
        self.everything = all_classes, np.ones(x.shape, bool), y_all
        self.subset, self.inside = None, self.counted
        if not (subset is None and mask is None and candidates is None):
            self.subset = ids, listed, y
        if mask_negative_targets:
            self.subset = ids, listed, y
        if self.subset is not None:
            self.inside = self.counted & (y.sum(-1) != 0)
        over_all = self.subset is None or normalize == "full"
        self.normalizer = self.everything if over_all else self.subset

    def _set_scores(self, sparse, from_logits, temperature, softcap):
        x, one = self.predictions, np.ones_like(self.predictions)
        self.scores, self.slope, self.steepest = None, one, one
        if from_logits:
            self.scores, self.slope = x, one
            if softcap is not None:
                ratio = np.tanh(x / np.longdouble(softcap))
                self.scores, self.slope = softcap * ratio, 1 - ratio * ratio
            if temperature != 1:
                self.scores, self.slope = self.scores / temperature, self.slope / temperature
                self.steepest = one / temperature
        elif sparse:
            self.scores = np.log(np.clip(x, EPSILON, 1 - EPSILON))
            within = (x >= EPSILON) & (x <= 1 - EPSILON)
            self.slope = np.where(within, 1 / np.maximum(x, EPSILON), 0)
            self.steepest = self.slope

    def of_classes(self, ids, values):
        """Sums the values of places, `[rows, places]`, over those of the same class."""
        if ids.shape == self.predictions.shape and (ids == np.arange(ids.shape[-1])).all():
            return values
        sums = np.zeros(self.predictions.shape, np.longdouble)
        np.add.at(sums, (np.arange(len(ids))[:, None], ids), values)
        return sums


def _at(values, ids, listed, otherwise):
    return np.where(listed, np.take_along_axis(values, ids, axis=-1), otherwise)


@np.errstate(divide="ignore", invalid="ignore")  # −Inf − −Inf, in rows that do not count
def with_terms(
    predictions,
    targets,
    *,
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
    z_loss=0.0,
    gamma=None,
    alpha=1.0,
    **arguments,
):
    """`softmax_xent`, and the largest of the terms whose differences loss and gradient are.

    The focal form is that of a `gamma` that is a number, 0 included.
    """
    shape = np.shape(predictions)
    if 0 in shape:
        return np.zeros(shape[:-1], np.longdouble), np.zeros(shape, np.longdouble), 0, 0
    rows = SoftmaxRows(predictions, targets, **arguments)
    classes = shape[-1]
    of_all, weights = (1, alpha) if np.ndim(alpha) else (alpha, np.ones(classes))
    weights = np.asarray(weights).astype(np.longdouble)
    weights = weights if class_weight is None else weights * np.asarray(class_weight)
    weights = np.broadcast_to(weights, rows.predictions.shape)
    smoothing = np.longdouble(label_smoothing)
    families = [(1.0, rows.everything, rows.everything, rows.counted)]
    if rows.subset is not None:
        families = [
            (subset_weight, rows.subset, rows.normalizer, rows.inside),
            (full_weight, rows.everything, rows.everything, rows.counted),
        ]
    loss, gradient = np.zeros(len(rows.counted), np.longdouble), np.zeros_like(rows.predictions)
    loss_terms, gradient_terms = np.zeros_like(loss), np.zeros_like(gradient)
    for weight, (ids, listed, y), (over, in_over, _), counted in families:
        size = np.maximum(1, listed.sum(-1, keepdims=True))
        y = y * (1 - smoothing) + smoothing / size
        shares = np.where(listed, y * _at(weights, ids, listed, 0), 0)
        if rows.scores is not None:
            s, s_over = _at(rows.scores, ids, listed, 0), _at(rows.scores, over, in_over, -np.inf)
            peak = s_over.max(-1, keepdims=True)
            power = np.where(in_over, np.exp(s_over - peak), 0)
            sum_over = power.sum(-1, keepdims=True)
            q, of_over = np.exp(s - peak) / sum_over, power / sum_over
            nats = np.log(sum_over) - (s - peak)
            # Logits as they are given are exact; warped, or logarithms, they have been rounded.
            sizes = np.abs(s - (peak if rows.scores is rows.predictions else 0))
        else:
            p_over = _at(rows.predictions, over, in_over, 0)
            sum_over = p_over.sum(-1, keepdims=True)
            q, of_over = _at(rows.predictions, ids, listed, 0) / sum_over, in_over / sum_over
        if rows.scores is None or gamma is not None:
            clipped = np.clip(q, EPSILON, 1 - EPSILON)
            nats, dq = -np.log(clipped), 1 / clipped
            if gamma is not None:
                exponent = np.longdouble(gamma)
                rest = (1 - clipped) ** exponent
                dq = rest / clipped + exponent * (1 - clipped) ** (exponent - 1) * nats
                nats = rest * nats
            sizes = np.maximum(nats, dq * clipped)  # for what an error of q makes of the loss
            dq = np.where(clipped == q, -shares * dq, 0)
            pull = np.where(listed, dq * (1 / sum_over if rows.scores is None else q), 0)
            pull_over = -np.where(listed, dq * q, 0).sum(-1, keepdims=True) * of_over
            gradient_sizes = np.abs(pull)
        else:
            pull, pull_over = -shares, shares.sum(-1, keepdims=True) * of_over
            gradient_sizes = np.abs(shares)
        part = np.where(shares != 0, shares * nats, 0).sum(-1)
        largest = np.where(shares != 0, np.abs(shares) * sizes, 0).max(-1, initial=0)
        if z_loss:
            lse = peak + np.log(sum_over)
            part = part + z_loss * lse[:, 0] ** 2
            pull_over = pull_over + 2 * z_loss * lse * of_over
            spread = np.maximum(np.abs(peak), np.abs(np.log(sum_over)))
            largest = largest + 2 * z_loss * (np.abs(lse) * spread)[:, 0]
            gradient_sizes = gradient_sizes + 2 * z_loss * spread
        pull = rows.of_classes(over, pull_over) + rows.of_classes(ids, pull)
        gradient_sizes = rows.of_classes(ids, np.where(listed, gradient_sizes, 0))
        weight = weight * of_all
        loss += np.where(counted, weight * part, 0)
        gradient += np.where(counted[:, None], weight * pull * rows.slope, 0)
        loss_terms += np.where(counted, weight * largest, 0)
        gradient_terms += np.where(counted[:, None], weight * gradient_sizes * rows.steepest, 0)
    return (
        loss.reshape(shape[:-1]),
        gradient.reshape(shape),
        loss_terms.max(initial=0),
        gradient_terms.max(initial=0),
    )


def softmax_xent(predictions, targets, **arguments):
    """Loss `[...]` and its gradient `[..., classes]` row by row, for labels or dense targets."""
    return with_terms(predictions, targets, **arguments)[:2]


def softmax_xent_metrics(predictions, targets, **arguments):
    """Rank, entropy and log-sum-exp of each row, `[..., 3]`.

    Args:
      arguments: those of `SoftmaxRows`; what else a loss is made of does not matter here.
    """
    shape = np.shape(predictions)
    found = np.zeros((int(np.prod(shape[:-1])), 3), np.longdouble)
    found[:, 0] = -1
    if 0 not in shape:
        rows = SoftmaxRows(predictions, targets, **arguments)
        scores = rows.predictions if rows.scores is None else rows.scores
        ids, listed, y = rows.everything if rows.subset is None else rows.subset
        over, in_over, _ = rows.normalizer
        for row in np.flatnonzero(rows.inside):
            places = np.flatnonzero(listed[row])
            z = rows.predictions[row, ids[row, places]]
            own = np.argmax(y[row, places])
            rank = (z > z[own]).sum() + (z[:own] == z[own]).sum()
            s = scores[row, over[row, in_over[row]]]
            if rows.scores is None:
                log_sum_exp = np.log(s.sum())
                q = s / s.sum()
            else:
                log_sum_exp = s.max() + np.log(np.exp(s - s.max()).sum())
                q = np.exp(s - log_sum_exp)
            q = q[q != 0]
            found[row] = rank, -(q * np.log(q)).sum(), log_sum_exp
    return found.reshape(*shape[:-1], 3)


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
