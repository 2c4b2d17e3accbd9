"""Distances of feature maps in plain torch.

A form is a dict of the keywords of `row_loss`, which are the kernels' too.
"""

import torch

METRICS = ("mse", "mae", "charbonnier", "cosine", "lpips")
EPSILONS = {"charbonnier": 1e-3, "cosine": 1e-12, "lpips": 1e-10}


def _distance(metric, a, b, w, epsilon, epsilon_in_root):
    """Of maps `[rows, positions, channels]`, and of weights that broadcast, or None."""

    def weighted(x):
        return x if w is None else w * x

    if metric == "cosine":
        norms = [(weighted(x * x).sum(-1) + epsilon).sqrt() for x in (a, b)]
        return (1 - weighted(a * b).sum(-1) / (norms[0] * norms[1])).mean(-1)
    if metric == "lpips":
        sums = [(x * x).sum(-1, keepdim=True) for x in (a, b)]
        if epsilon_in_root:
            norms = [(x + epsilon).sqrt() for x in sums]
        else:
            norms = [x.sqrt() + epsilon for x in sums]
        return weighted((a / norms[0] - b / norms[1]).square()).sum(-1).mean(-1)
    e = a - b
    if metric == "mse":
        size = e * e
    elif metric == "mae":
        size = e.abs()
    else:
        size = (e * e + epsilon**2).sqrt()
    return weighted(size).mean((1, 2))


def row_loss(
    predictions, targets, dtype, *, metric, layer_weights, channel_weights=None,
    channels_last=True, epsilon=0.0, epsilon_in_root=True,
):  # fmt: skip
    """The loss of every row in plain torch, computed in `dtype`.

    Args:
      predictions: a list of `[rows, positions, channels]`, or `[rows, channels, positions]`.
      targets: that, or with one row each for all examples; or None: the first example's.
      layer_weights: `[layers]`.
      channel_weights: a list of `[channels]`, or None.
    """
    total = 0
    for k, features in enumerate(predictions):
        a = features if channels_last else features.mT
        b = a[:1] if targets is None else targets[k] if channels_last else targets[k].mT
        w = None if channel_weights is None else channel_weights[k].to(dtype)
        own = _distance(metric, a.to(dtype), b.to(dtype), w, epsilon, epsilon_in_root)
        total = total + layer_weights[k].to(dtype) * own
    if targets is None:
        total = total * (torch.arange(len(total), device=total.device) > 0)
    return total


def row_loss_and_gradients(predictions, targets, dtype, cotangents, form):
    """`row_loss`, and the gradients of Σ cotangent · loss in predictions and targets."""
    predictions = [x.detach().requires_grad_() for x in predictions]
    leaves = list(predictions)
    if targets is not None:
        targets = [x.detach().requires_grad_() for x in targets]
        leaves += targets
    loss = row_loss(predictions, targets, dtype, **form)
    return loss.detach(), torch.autograd.grad(loss, leaves, cotangents.to(dtype))
