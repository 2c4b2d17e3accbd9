"""Every form of the feature distances against float64, by the bound of check.py."""

import itertools
import math

import features
import torch
from check import DTYPES, EPSILON, POISON, largest, moved
from kernels import sums_dtype

# Rows, and positions and channels of every layer: teams of 1 to 32 lanes with one to four vectors
# each, more channels than they hold, channels in no vectors, and many positions.
SMALL = [
    (2, (1, 1)), (3, (5, 7)), (700, (1, 3)), (37, (1, 8)), (9, (300, 3)), (5, (6, 16)),
    (9, (2, 24)), (4, (33, 64)), (3, (9, 96)), (2, (7, 192)), (3, (50, 256)), (2, (31, 512)),
    (2, (3, 1024)), (2, (5, 1032)), (2, (2, 5001)), (64, (9, 32)), (3, (100, 63)),
    (8, (70, 5), (20, 64), (0, 7), (4, 200)), (3, *[(k % 5, 8 + k % 9) for k in range(70)]),
]  # fmt: skip
LARGE = [
    (32, (56 * 56, 64), (28 * 28, 128), (14 * 14, 256), (7 * 7, 512)), (100_000, (1, 384)),
    (1, (1 << 20, 3)), (1_000_000, (1, 4)), (300, (49, 2048)),
]  # fmt: skip
SANITIZED = [(37, (1, 8)), (3, (5, 7)), (4, (33, 64)), (6, (3, 512)), (2, (2, 2500), (5, 16))]
FACTORS = {
    "metric": features.METRICS,
    "reference": ["target", "one target", "first"],
    "channels_last": [True, False],
    "channel_weights": [False, True],
    "dtargets": [False, True],
    "row_weight": [False, True],
    "epsilon_in_root": [True, False],
}


def _is_possible(case):
    wants_targets = case["dtargets"] and case["reference"] == "first"
    return not wants_targets and (case["epsilon_in_root"] or case["metric"] == "lpips")


PRODUCT = (
    dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())
)
FORMS = [case for case in PRODUCT if _is_possible(case)]


def sample(case, shape, dtype, generator, device):
    """Predictions, targets, form and cotangents."""
    source = {"generator": generator, "device": device, "dtype": torch.float64}
    (rows, *layers), sums = shape, sums_dtype(dtype)

    def normal(rows):
        sizes = [layer if case["channels_last"] else layer[::-1] for layer in layers]
        return [torch.randn((rows, *size), **source).to(dtype) for size in sizes]

    targets = None
    if case["reference"] != "first":
        targets = normal(1 if case["reference"] == "one target" else rows)
    form = {key: case[key] for key in ("metric", "channels_last", "epsilon_in_root")}
    form["epsilon"] = features.EPSILONS.get(case["metric"], 0.0)
    form["layer_weights"] = 0.5 + torch.rand(len(layers), **source)
    if case["channel_weights"]:
        form["channel_weights"] = [
            (torch.rand(channels, **source) * (torch.arange(channels, device=device) % 3 > 0)).to(
                sums
            )
            for _, channels in layers
        ]
    return normal(rows), targets, form, torch.randn(rows, **source).to(sums)


def run(kernels, predictions, targets, form, cotangents, row_weight, scale, dtargets, offset=0):
    """Loss and gradients by both paths: {what: tensor}.

    Raises:
      AssertionError: two runs differ, or an element is not written.
    """
    dtype, device = predictions[0].dtype, predictions[0].device
    sums, found = sums_dtype(dtype), []
    for poison in POISON:

        def filled(like, poison=poison):
            return [moved(torch.full_like(array, poison), offset) for array in like or []]

        loss = torch.full((len(predictions[0]),), poison, dtype=sums, device=device)
        reduced_loss = torch.full((1,), poison, dtype=sums, device=device)
        wanted = targets if dtargets else None
        of_grad, of_reduced = ((filled(predictions), filled(wanted)) for _ in range(2))
        kernels.features(predictions, targets, form, loss)
        kernels.features_grad(predictions, targets, form, cotangents, *of_grad)
        kernels.features_reduced(
            predictions, targets, form, row_weight, scale, reduced_loss, *of_reduced
        )
        tensors = {"loss": loss, "reduced loss": reduced_loss}
        for path, gradients in (("", of_grad), ("reduced ", of_reduced)):
            for name, arrays in zip(("gradient", "target gradient"), gradients, strict=True):
                tensors |= {f"{path}{name} {k}": array for k, array in enumerate(arrays)}
        found.append(tensors)
    first, second = found
    for what, tensor in first.items():
        same = torch.equal(tensor.view(torch.uint8), second[what].view(torch.uint8))
        assert same, f"{what}: two runs differ, or an element is not written"
    return first


def check_inputs(report, kernels, inputs, case, number, reference_device):
    """One form on one batch, by both paths; `number` chooses scale and alignment."""
    predictions, targets, form, cotangents = inputs
    dtype, rows = predictions[0].dtype, len(predictions[0])
    sums = sums_dtype(dtype)
    row_weight = cotangents if case["row_weight"] else None
    scale = 1 / rows if number % 3 else 1.0
    offset = number % 5 == 4

    def each(fn, arrays):
        return None if arrays is None else [fn(array) for array in arrays]

    ours = run(
        kernels, each(lambda x: moved(x, offset), predictions),
        each(lambda x: moved(x, offset), targets), form, cotangents, row_weight, scale,
        case["dtargets"], offset,
    )  # fmt: skip

    def there(values):
        if isinstance(values, list):
            return each(there, values)
        return values.to(reference_device) if torch.is_tensor(values) else values

    ours = {key: there(tensor).double() for key, tensor in ours.items()}
    predictions, targets, cotangents = there(predictions), there(targets), there(cotangents)
    form = {key: there(value) for key, value in form.items()}
    weights = cotangents if case["row_weight"] else torch.ones_like(cotangents)
    weights = weights * torch.tensor(scale, dtype=sums)
    exact = each(torch.Tensor.double, predictions), each(torch.Tensor.double, targets)
    for path, factors in (("", cotangents), ("reduced ", weights)):
        loss, right = features.row_loss_and_gradients(*exact, torch.float64, factors, form)
        plain_loss, plain = features.row_loss_and_gradients(
            predictions, targets, sums, factors, form
        )
        count = len(predictions)
        for k, (truth, torchs) in enumerate(zip(right, plain, strict=True)):
            what = f"{path}gradient {k}" if k < count else f"{path}target gradient {k - count}"
            if what not in ours or truth.numel() == 0:
                continue
            # What a whole example's gradients cancel to under one target, errs with their terms.
            terms = 1.0
            if case["reference"] != "target":
                terms = max(1.0, factors.abs().sum().item() / factors.abs().max().item())
            allowed = 2 * largest(torchs.double() - truth)
            allowed += 4 * EPSILON[dtype] * largest(truth) + 4 * EPSILON[sums] * terms * largest(
                truth
            )
            name = " ".join(what.split()[:-1])
            report.bound(f"feature {name}", dtype, largest(ours[what] - truth), allowed)
    error = (plain_loss.double() - loss).abs()
    # The terms of a cosine, and of many metrics' differences, are of size 1.
    size = loss.abs() + (case["metric"] == "cosine") * form["layer_weights"].sum()
    allowed = 2 * largest(error) + 4 * EPSILON[sums] * largest(size)
    report.bound("feature loss", dtype, largest(ours["loss"] - loss), allowed)
    weights = weights.double()
    allowed = 2 * (error * weights.abs()).sum() + 4 * EPSILON[sums] * (size * weights.abs()).sum()
    error = largest(ours["reduced loss"] - (loss * weights).sum())
    report.bound("feature reduced loss", dtype, error, allowed.item())


def check_nothing(kernels, device, shape, metric, dtype, reference):
    """No rows, no positions, no channels, or one row under "first": loss and gradients 0."""
    generator = torch.Generator(device).manual_seed(0)
    case = {key: values[0] for key, values in FACTORS.items()}
    case |= {"metric": metric, "reference": reference}
    inputs = sample(case, shape, dtype, generator, device)
    found = run(kernels, *inputs, None, math.inf if shape[0] == 0 else 1.0, reference != "first")
    for what, tensor in found.items():
        assert (tensor == 0).all(), f"{what} is not 0"


def check_beyond_int32(kernels, device):
    """More than 2^31 elements: the gradient of every element, and the loss."""
    rows, positions, channels = 65, 1 << 18, 128
    x = torch.randn((rows, positions, channels), dtype=torch.bfloat16, device=device)
    form = {"metric": "mse", "layer_weights": torch.ones(1, dtype=torch.float64, device=device)}
    loss, gradient = torch.full((1,), torch.nan, device=device), torch.full_like(x, torch.nan)
    target = torch.zeros_like(x[:1])
    total = sum(row.double().square().sum().item() for row in x)
    scale = positions * channels / 2
    kernels.features_reduced([x], [target], form, None, scale, loss, [gradient], None)
    assert math.isclose(loss.item(), total / 2, rel_tol=1e-6)
    assert all(map(torch.equal, gradient, x))
    form |= {"metric": "lpips", "epsilon": 1e-10}
    gradient.fill_(torch.nan)
    kernels.features_reduced([x], [x], form, None, scale, loss, [gradient], None)
    assert loss.item() == 0 and all((row == 0).all() for row in gradient)


def check_all(report, kernels, seed, device, reference_device, sanitized=False, large=True):
    """All checks, or for a sanitizer a few of small shapes, noted in the report of check.py."""
    generator = torch.Generator(device).manual_seed(seed)

    def check(group, case, shape, dtype):
        words = ", ".join(f"{key}={value}" for key, value in case.items())
        inputs = sample(case, shape, dtype, generator, device)
        report.attempt(
            group, f"{shape}, {dtype}, {words}", check_inputs, report, kernels, inputs, case,
            report.counts.total(), reference_device,
        )  # fmt: skip

    shapes = SANITIZED if sanitized else SMALL
    for index, case in enumerate(FORMS):
        for turn, dtype in enumerate([DTYPES[index % 4]] if sanitized else DTYPES):
            shape = shapes[(seed + index + index // len(shapes) + 7 * turn) % len(shapes)]
            check("feature forms", case, shape, dtype)
    nothing = (
        ((0, (3, 8)), "one target"), ((0, (3, 8)), "first"), ((3, (0, 8)), "target"),
        ((3, (5, 0)), "one target"), ((1, (5, 8)), "first"),
    )  # fmt: skip
    for (shape, reference), metric, dtype in itertools.product(nothing, features.METRICS, DTYPES):
        report.attempt(
            "nothing to do", f"{shape}, {metric}, {dtype}, {reference}", check_nothing, kernels,
            device, shape, metric, dtype, reference,
        )  # fmt: skip
    if sanitized or not large:
        return
    for shape, dtype in itertools.product(LARGE, DTYPES):
        drawn = torch.randint(len(FORMS), (3,), generator=generator, device=device)
        for case in [FORMS[-1], *(FORMS[int(i)] for i in drawn)]:
            check("large", case, shape, dtype)
    report.attempt(
        "large", "more than 2^31 elements of features", check_beyond_int32, kernels, device
    )
