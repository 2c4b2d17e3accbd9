"""Every form of the pointwise losses and the penalty against float64, by the bound of check.py."""

import itertools
import math

import pointwise
import torch
from check import DTYPES, EPSILON, POISON, largest, moved
from kernels import sums_dtype

# One output and many, on both sides of powers of two, with and without rows aligned to 16 bytes; a
# row that is a block's, and more than a grid of blocks.
SMALL = [
    (1, 1), (300, 1), (3, 2), (37, 10), (16, 32), (5, 33), (7, 101), (500, 3), (129, 128),
    (33, 1000), (5, 1025), (3, 2049), (2, 8191), (1, 20011), (65, 255), (4097, 5), (2, 40003),
]  # fmt: skip
LARGE = [(1 << 24, 1), (3, 1000003), (8193, 1000), (700001, 10), (300, 65536)]
SANITIZED = [(37, 10), (300, 1), (5, 33), (3, 1025), (2, 9001)]
FACTORS = {
    "kind": pointwise.KINDS,
    "targets": ["own", "sums", "one a row"],
    "output_weights": [False, True],
    "quantiles": [False, True],
    "row_weight": [False, True],
}


def _is_possible(case):
    return case["kind"] == "quantile" or not case["quantiles"]


PRODUCT = (
    dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())
)
FORMS = [case for case in PRODUCT if _is_possible(case)]


def sample(case, shape, dtype, generator, device):
    """Predictions, targets, form and cotangents."""
    (rows, outputs), sums = shape, sums_dtype(dtype)
    source = {"generator": generator, "device": device}

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(size, dtype=torch.float64, **source)

    one_a_row = case["targets"] == "one a row"
    y = uniform(-2, 2, rows) if one_a_row else uniform(-2, 2, *shape)
    if case["kind"].startswith("binary"):
        y = (y > 0).double()
    y = y.to(dtype if case["targets"] == "own" else sums)
    if case["kind"] == "binary_probabilities":
        x = uniform(0.01, 0.99, *shape)  # away from the bounds at which the gradient jumps
    else:
        x = torch.randn(shape, dtype=torch.float64, **source) * 2
    form = {"kind": case["kind"]}
    if case["kind"] in ("huber", "quantile"):
        form["parameter"] = 0.75
    elif case["kind"].startswith("binary"):
        form["parameter"] = 0.125
    x = x.to(dtype)
    if case["output_weights"]:
        weights = uniform(0.5, 2, outputs).to(sums)
        weights[:: 3 if outputs > 1 else 2] = 0
        x[:, weights == 0] = torch.nan
        form["output_weights"] = weights
    if case["quantiles"]:
        form["quantiles"] = uniform(0.1, 0.9, outputs).to(sums)
    return x, y, form, torch.randn(rows, dtype=torch.float64, **source).to(sums)


def run(kernels, x, targets, form, cotangents, row_weight, scale, offset=0):
    """Loss and gradient by both paths: {what: tensor}.

    Raises:
      AssertionError: two runs differ, or an element is not written.
    """
    sums, found = sums_dtype(x.dtype), []
    form = dict(form)
    kind = form.pop("kind")
    for poison in POISON:

        def filled(shape, dtype, offset=0, poison=poison):
            return moved(torch.full(shape, poison, dtype=dtype, device=x.device), offset)

        loss, reduced_loss = filled((len(x),), sums), filled((1,), sums)
        gradient, reduced = filled(x.shape, x.dtype, offset), filled(x.shape, x.dtype, offset)
        kernels.pointwise(x, targets, kind, form, loss)
        kernels.pointwise_grad(x, targets, kind, form, cotangents, gradient)
        kernels.pointwise_reduced(x, targets, kind, form, row_weight, scale, reduced_loss, reduced)
        found.append({
            "loss": loss, "gradient": gradient, "reduced loss": reduced_loss,
            "reduced gradient": reduced,
        })  # fmt: skip
    first, second = found
    for what, tensor in first.items():
        same = torch.equal(tensor.view(torch.uint8), second[what].view(torch.uint8))
        assert same, f"{what}: two runs differ, or an element is not written"
    return first


def check_inputs(report, kernels, inputs, has_row_weight, number, reference_device):
    """One form on one batch, by both paths; `number` chooses scale and alignment."""
    x, targets, form, cotangents = inputs
    dtype, sums = x.dtype, sums_dtype(x.dtype)
    row_weight = cotangents if has_row_weight else None
    scale = 1 / len(x) if number % 3 else 1.0
    offset = number % 5 == 4
    ours = run(
        kernels, moved(x, offset), moved(targets, offset), form, cotangents, row_weight, scale,
        offset,
    )  # fmt: skip

    def there(values):
        return values.to(reference_device) if torch.is_tensor(values) else values

    ours = {key: there(tensor).double() for key, tensor in ours.items()}
    x, targets, cotangents = there(x), there(targets), there(cotangents)
    form = {key: there(value) for key, value in form.items()}
    ones = torch.ones_like(cotangents)
    loss, gradient = pointwise.row_loss_and_gradient(
        x.double(), targets, torch.float64, ones.double(), form
    )
    weights = cotangents if has_row_weight else ones
    weights = weights * torch.tensor(scale, dtype=sums)
    for path, factors in (("", cotangents), ("reduced ", weights)):
        torch_loss, torch_gradient = pointwise.row_loss_and_gradient(
            x, targets, sums, factors, form
        )
        right = gradient * factors.double()[:, None]
        allowed = 2 * largest(torch_gradient.double() - right) + 4 * EPSILON[dtype] * largest(right)
        report.bound(path + "gradient", dtype, largest(ours[path + "gradient"] - right), allowed)
    plain = (torch_loss.double() - loss).abs()
    allowed = 2 * largest(plain) + 4 * EPSILON[sums] * largest(loss)
    report.bound("loss", dtype, largest(ours["loss"] - loss), allowed)
    weights = weights.double()
    size = 2 * (plain * weights.abs()).sum() + 4 * EPSILON[sums] * (loss * weights).abs().sum()
    error = largest(ours["reduced loss"] - (loss * weights).sum())
    report.bound("reduced loss", dtype, error, size.item())


def check_penalty(report, kernels, arrays, generator, reference_device, offset):
    """Value and gradients, alone and together."""
    arrays = [moved(array, offset) for array in arrays]
    in_double = any(array.dtype == torch.float64 for array in arrays)
    sums = torch.float64 if in_double else torch.float32
    device = arrays[0].device
    drawn = torch.rand((len(arrays), 2), generator=generator, device=device).tolist()
    coefficients = [
        (0.0 if k % 3 == 0 else l1, 0.0 if k % 3 == 1 else l2) for k, (l1, l2) in enumerate(drawn)
    ]
    dpenalty = torch.tensor([-0.5], dtype=sums, device=device)
    found = []
    for poison in POISON:
        gradients = [moved(torch.full_like(array, poison), offset) for array in arrays]
        total, alone = (torch.full((1,), poison, dtype=sums, device=device) for _ in range(2))
        kernels.penalty(arrays, gradients, coefficients, dpenalty, total)
        kernels.penalty(arrays, None, coefficients, None, alone)
        found.append([total, alone, *gradients])
    for first, second in zip(*found, strict=True):
        same = torch.equal(first.view(torch.uint8), second.view(torch.uint8))
        assert same, "two runs differ, or an element is not written"
    total, alone, *gradients = (tensor.to(reference_device).double() for tensor in found[0])
    arrays = [array.to(reference_device) for array in arrays]
    exact = pointwise.penalty(arrays, coefficients, torch.float64)
    assert torch.equal(total, alone), "the value depends on whether gradients are wanted"
    # Those of other variables than float64 ones are added up in float32.
    epsilon = max(EPSILON[sums_dtype(array.dtype)] for array in arrays)
    report.bound("penalty", sums, largest(total - exact), 4 * epsilon * largest(exact))
    for array, gradient, (l1, l2) in zip(arrays, gradients, coefficients, strict=True):
        w = array.double()
        right = -0.5 * (l1 * w.sign() + 2 * l2 * w)
        allowed = 4 * EPSILON[array.dtype] * largest(right)
        report.bound("penalty's gradient", array.dtype, largest(gradient - right), allowed)


def check_zeros(kernels, device, shape, dtype):
    """No rows or no outputs: loss 0."""
    x = torch.zeros(shape, dtype=dtype, device=device)
    ones = torch.ones(shape[0], dtype=sums_dtype(dtype), device=device)
    form = {"kind": "huber", "parameter": 1.0}
    for what, tensor in run(kernels, x, x, form, ones, None, math.inf).items():
        assert (tensor == 0).all(), f"{what} is not 0"


def check_beyond_int32(kernels, device):
    """More than 2^31 elements in rows of one output and of many, flat and with row weights."""
    elements, part = 2**31 + 4100, 1 << 27
    x = torch.randn(elements, dtype=torch.bfloat16, device=device)
    total = sum(values.double().square().sum().item() for values in x.split(part))
    y, gradient = torch.zeros_like(x), torch.empty_like(x)
    loss = torch.empty(1, device=device)
    for outputs in (1, 4, elements // 4):
        shape = (elements // outputs, outputs)
        for row_weight in (None, torch.ones(shape[0], device=device)):
            loss.fill_(torch.nan)
            gradient.fill_(torch.nan)
            kernels.pointwise_reduced(
                x.view(shape), y.view(shape), "squared", {}, row_weight, float(outputs), loss,
                gradient.view(shape),
            )  # fmt: skip
            assert math.isclose(loss.item(), total, rel_tol=1e-6)
            for found, values in zip(gradient.split(part), x.split(part), strict=True):
                assert torch.equal(found, 2 * values), f"{shape}, row weight {row_weight}"


def _penalties(generator, device, sanitized):
    """Lists of variables: {name: tensors}."""

    def normal(sizes, dtypes):
        return [
            torch.randn(size, generator=generator, device=device).to(dtypes[k % len(dtypes)])
            for k, size in enumerate(sizes)
        ]

    lists = {
        "one": normal([4096], [torch.float32]),
        "two": normal([5, 70_001], [torch.bfloat16]),
        "empty ones": normal([0, 3, 0, 4097, 0], [torch.float32, torch.float64]),
        "mixed": normal([*range(1, 60), 20_000, 0, 8192, 33], DTYPES),
    }
    if not sanitized:
        lists["200"] = normal([64 + 37 * k % 262_144 for k in range(200)], [torch.float32])
        lists["200 mixed"] = normal([(64 + k) ** 2 for k in range(200)], DTYPES)
        lists["large"] = normal([100_000_007, 5, 50_000_000], [torch.bfloat16, torch.float32])
    return lists


def check_all(report, kernels, seed, device, reference_device, sanitized=False, large=True):
    """All checks, or for a sanitizer a few of small shapes, noted in the report of check.py."""
    generator = torch.Generator(device).manual_seed(seed)

    def check(group, case, shape, dtype):
        words = ", ".join(f"{key}={value}" for key, value in case.items())
        inputs = sample(case, shape, dtype, generator, device)
        number = report.counts.total()
        report.attempt(
            group, f"{shape}, {dtype}, {words}", check_inputs, report, kernels, inputs,
            case["row_weight"], number, reference_device,
        )  # fmt: skip

    shapes = SANITIZED if sanitized else SMALL
    for index, case in enumerate(FORMS):
        for turn, dtype in enumerate([DTYPES[index % 4]] if sanitized else DTYPES):
            shape = shapes[(seed + index + index // len(shapes) + 7 * turn) % len(shapes)]
            check("pointwise forms", case, shape, dtype)
    for (name, arrays), offset in itertools.product(
        _penalties(generator, device, sanitized).items(), (0, 1)
    ):
        report.attempt(
            "penalties", f"{name}, offset {offset}", check_penalty, report, kernels, arrays,
            generator, reference_device, offset,
        )  # fmt: skip
    for dtype, shape in itertools.product(DTYPES, ((0, 7), (0, 0), (5, 0))):
        report.attempt(
            "nothing to do", f"{shape}, {dtype}", check_zeros, kernels, device, shape, dtype
        )
    if sanitized or not large:
        return
    for shape, dtype in itertools.product(LARGE, DTYPES):
        drawn = torch.randint(len(FORMS), (3,), generator=generator, device=device)
        for case in [FORMS[0], *(FORMS[int(i)] for i in drawn)]:
            check("large", case, shape, dtype)
    report.attempt("large", "more than 2^31 elements", check_beyond_int32, kernels, device)
