"""Softmax cross-entropy in plain torch.

A form of the loss is a dict of the keywords of `row_loss`, which are the kernels' too: from_logits,
ignore_class, subset (int64 ids, ascending), normalize_full, subset_weight, full_weight,
label_smoothing, class_weight.
"""

import torch

EPSILON = 1e-7  # Keras's, of probabilities


def row_loss(
    x,
    targets,
    dtype,
    *,
    from_logits=True,
    ignore_class=None,
    subset=None,
    normalize_full=False,
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
):
    """The loss of every row in plain torch, computed in `dtype`; NaN for a label out of range."""
    classes = x.shape[1]
    z = x.to(dtype)
    sparse = not targets.is_floating_point()
    counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
    y = targets.to(dtype)
    if sparse:
        if ignore_class is not None:
            counted = targets != ignore_class
        y = (targets[:, None] == torch.arange(classes, device=x.device)).to(dtype)

    def family_loss(family, over, rows):
        def part(values, ids):
            return values if ids is None else values[..., ids]

        # Selecting among the results is not enough: 0 times NaN would reach the gradient.
        safe = torch.where(rows[:, None], z, 1)
        if sparse and not from_logits:
            safe = safe.clamp(EPSILON, 1 - EPSILON).log()
        chosen, normalizer = part(safe, family), part(safe, over)
        if from_logits or sparse:
            peak = normalizer.amax(-1, keepdim=True).detach()
            log_sum = (normalizer - peak).exp().sum(-1, keepdim=True).log()
            nats = log_sum - (chosen - peak)
        else:
            q = chosen / normalizer.sum(-1, keepdim=True)
            nats = -q.clamp(EPSILON, 1 - EPSILON).log()
        shares = part(y, family) * (1 - label_smoothing) + label_smoothing / nats.shape[1]
        if class_weight is not None:
            shares = shares * part(class_weight.to(dtype), family)
        loss = (torch.where(shares != 0, nats, 0) * shares).sum(-1)
        return torch.where(rows, loss, 0)

    if subset is None:
        loss = family_loss(None, None, counted)
    else:
        inside = counted & (y[:, subset].sum(-1) != 0)
        over = None if normalize_full else subset
        loss = subset_weight * family_loss(subset, over, inside) if subset_weight else 0
        if full_weight:
            loss = loss + full_weight * family_loss(None, None, counted)
    if sparse:
        loss = torch.where(counted & ((targets < 0) | (targets >= classes)), torch.nan, loss)
    return loss


def row_loss_and_gradient(x, targets, dtype, cotangents, form):
    """`row_loss`, and the gradient of Σ cotangent · loss in the dtype of x."""
    x = x.detach().requires_grad_()
    loss = row_loss(x, targets, dtype, **form)
    (gradient,) = torch.autograd.grad(loss, x, cotangents.to(dtype))
    return loss.detach(), gradient
