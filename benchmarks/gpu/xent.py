"""Softmax cross-entropy in plain torch.

A form of the loss is a dict of the keywords of `row_loss`, which are the kernels' too: from_logits,
ignore_class, subset (int64 ids, ascending), mask (bool, of the shape of x), candidates (int32 or
int64), mask_negative_targets, normalize_full, subset_weight, full_weight, label_smoothing,
class_weight, temperature, z_loss, softcap, gamma (of the focal form).
"""

import torch

EPSILON = 1e-7  # Keras's, of probabilities


class Places:
    """All classes of every row, or those of its subset: `[rows, places]`."""

    def __init__(self, take, listed, y):
        """`take`: from values `[rows, classes]` or `[classes]` to those of the places."""
        self.take, self.listed, self.y = take, listed, y

    def chosen(self, values, otherwise):
        return torch.where(self.listed, self.take(values), otherwise)


def _places(x, targets, subset, mask, candidates, mask_negative_targets):
    """Everything, and the subset or None."""
    sparse = not targets.is_floating_point()
    ids = torch.arange(x.shape[1], device=x.device)
    everywhere = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    if candidates is not None:
        ids, listed = candidates.long().clamp(min=0), candidates >= 0

        def take(values):
            return values.expand(x.shape).gather(1, ids)

    elif subset is not None:
        ids, listed = subset, everywhere[:, subset]

        def take(values):
            return values[..., subset]

    else:
        listed = everywhere if mask is None else mask

        def take(values):
            return values

    if sparse:
        y_all = targets[:, None] == torch.arange(x.shape[1], device=x.device)
        y = (targets[:, None] == ids) & listed
        y &= y.cumsum(-1) == 1
    else:
        y_all = targets
        if mask_negative_targets:
            y_all = targets.clamp(min=0)
        if candidates is None:
            y, illegal = take(y_all), take(targets) < 0
        else:
            y, illegal = torch.where(listed, y_all, 0), targets < 0
            y_all = torch.zeros(x.shape, dtype=y.dtype, device=x.device).scatter_add(1, ids, y)
        if mask_negative_targets:
            listed = listed & ~illegal
        y = torch.where(listed, y, 0)
    everything = Places(lambda values: values, everywhere, y_all)
    has_subset = mask_negative_targets or any(s is not None for s in (subset, mask, candidates))
    return everything, Places(take, listed, y) if has_subset else None


def row_loss(
    x,
    targets,
    dtype,
    *,
    from_logits=True,
    ignore_class=None,
    subset=None,
    mask=None,
    candidates=None,
    mask_negative_targets=False,
    normalize_full=False,
    subset_weight=1.0,
    full_weight=0.0,
    label_smoothing=0.0,
    class_weight=None,
    temperature=1.0,
    z_loss=0.0,
    softcap=None,
    gamma=None,
):
    """The loss of every row in plain torch, computed in `dtype`; NaN for a label out of range."""
    classes = x.shape[1]
    z = x.to(dtype)
    sparse = not targets.is_floating_point()
    counted = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if sparse and ignore_class is not None:
        counted = targets != ignore_class
    everything, part = _places(x, targets, subset, mask, candidates, mask_negative_targets)

    def family_loss(family, over, rows):
        # Selecting among the results is not enough: 0 times NaN would reach the gradient.
        safe = torch.where(rows[:, None], z, 1)
        if from_logits and softcap is not None:
            safe = softcap * (safe / softcap).tanh()
        if from_logits:
            safe = safe / temperature
        elif sparse:
            safe = safe.clamp(EPSILON, 1 - EPSILON).log()
        log_sum_exp = 0.0
        if from_logits or sparse:
            # Of a row without places, which does not count, all are as good.
            normalizer = Places(over.take, over.listed | ~over.listed.any(-1, keepdim=True), None)
            normalizer = normalizer.chosen(safe, -torch.inf)
            peak = normalizer.amax(-1, keepdim=True).detach()
            log_sum = (normalizer - peak).exp().sum(-1, keepdim=True).log()
            nats = log_sum - (family.chosen(safe, 0) - peak)
            log_sum_exp = (log_sum + peak)[:, 0]
            if gamma is not None:
                q = (-nats).exp().clamp(EPSILON, 1 - EPSILON)
        else:
            q = family.chosen(safe, 0) / over.chosen(safe, 0).sum(-1, keepdim=True)
            q = q.clamp(EPSILON, 1 - EPSILON)
            nats = -q.log()
        if gamma is not None:
            nats = -((1 - q) ** gamma) * q.log()
        size = family.listed.sum(-1, keepdim=True).clamp(min=1).to(dtype)
        shares = family.y.to(dtype) * (1 - label_smoothing) + label_smoothing / size
        if class_weight is not None:
            shares = shares * family.take(class_weight.to(dtype))
        wanted = family.listed & (shares != 0)
        loss = torch.where(wanted, torch.where(wanted, nats, 0) * shares, 0).sum(-1)
        return torch.where(rows, loss + z_loss * log_sum_exp**2, 0)

    if part is None:
        loss = family_loss(everything, everything, counted)
    else:
        inside = counted & (part.y.sum(-1) != 0)
        over = everything if normalize_full else part
        loss = subset_weight * family_loss(part, over, inside) if subset_weight else 0
        if full_weight:
            loss = loss + full_weight * family_loss(everything, everything, counted)
    if sparse:
        loss = torch.where(counted & ((targets < 0) | (targets >= classes)), torch.nan, loss)
    return loss


def row_loss_and_gradient(x, targets, dtype, cotangents, form):
    """`row_loss`, and the gradient of Σ cotangent · loss in the dtype of x."""
    x = x.detach().requires_grad_()
    loss = row_loss(x, targets, dtype, **form)
    (gradient,) = torch.autograd.grad(loss, x, cotangents.to(dtype))
    return loss.detach(), gradient
