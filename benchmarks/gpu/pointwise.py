"""The pointwise losses and the penalty on weights in plain torch."""

import torch

EPSILON = 1e-7  # Keras's, of probabilities
KINDS = (
    "huber", "squared", "absolute", "log_cosh", "quantile", "binary_logits",
    "binary_probabilities",
)  # fmt: skip


def row_loss(x, targets, dtype, *, kind, parameter=0.0, output_weights=None, quantiles=None):
    """The loss of every row in plain torch, computed in `dtype`: the mean over the outputs.

    `targets` are [rows, outputs], or [rows] for the same one in a whole row. `parameter` is δ, q or
    the label smoothing.
    """
    functional = torch.nn.functional
    p, y = x.to(dtype), targets.to(dtype)
    y = y[:, None] if y.ndim == 1 else y
    if output_weights is not None:
        # Selecting among the results is not enough: 0 times NaN would reach the gradient.
        p = torch.where(output_weights == 0, 0.5, p)
    e = p - y
    if kind == "huber":
        loss = torch.where(e.abs() <= parameter, e * e / 2, parameter * (e.abs() - parameter / 2))
    elif kind == "squared":
        loss = e * e
    elif kind == "absolute":
        loss = e.abs()
    elif kind == "log_cosh":
        loss = e.abs() + functional.softplus(-2 * e.abs()) - torch.log(torch.tensor(2.0).to(e))
    elif kind == "quantile":
        q = parameter if quantiles is None else quantiles.to(dtype)
        loss = q * functional.relu(-e) + (1 - q) * functional.relu(e)  # slope 0 at 0
    else:
        share = (y * (1 - parameter) + parameter / 2).expand_as(p)
        if kind == "binary_logits":
            loss = functional.relu(p) - p * share + (-p.abs()).exp().log1p()
        else:
            c = p.clamp(EPSILON, 1 - EPSILON)
            loss = -share * c.log() - (1 - share) * (1 - c).log()
    if output_weights is not None:
        loss = loss * output_weights.to(dtype)
    return loss.mean(-1)


def row_loss_and_gradient(x, targets, dtype, cotangents, form):
    """`row_loss`, and the gradient of Σ cotangent · loss in the dtype of x."""
    x = x.detach().requires_grad_()
    loss = row_loss(x, targets, dtype, **form)
    (gradient,) = torch.autograd.grad(loss, x, cotangents.to(dtype))
    return loss.detach(), gradient


def penalty(variables, coefficients, dtype):
    """Σ l1·Σ|w| + l2·Σw² of the variables, computed in `dtype`."""
    total = 0
    for values, (l1, l2) in zip(variables, coefficients, strict=True):
        w = values.to(dtype)
        total = total + l1 * w.abs().sum() + l2 * w.square().sum()
    return total
