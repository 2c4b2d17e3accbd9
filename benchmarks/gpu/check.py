"""Every form of the kernels against float64, by the bound of csrc/kernels/README.md.

With f64 the truth and torch the plain formula in the same dtype with the same sums:
max|ours − f64| ≤ 2·max|torch − f64| + 4·ε·max|f64|, for losses and gradients. Every case runs twice
into outputs that hold different numbers: bitwise equal results are deterministic and all written.
"""

import collections
import itertools
import math

import numpy as np
import torch
import xent
from kernels import sums_dtype

import truth

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of the predictions, as they are rounded.
EPSILON = {
    torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}  # fmt: skip
POISON = (12345.0, -77.0)

# Few classes and many, on both sides of powers of two, with and without rows aligned to 16 bytes;
# from one row to more than a grid of blocks.
SMALL = [
    (1, 1), (3, 2), (37, 10), (16, 32), (5, 33), (4, 64), (7, 101), (1, 4096), (2, 4099), (500, 3),
    (1000, 1), (129, 128), (33, 1000), (6, 1024), (5, 1025), (3, 2048), (3, 8191), (2, 16384),
    (65, 255), (4097, 5), (1, 20011), (2, 32000), (19, 7), (11, 513),
]  # fmt: skip
LARGE = [
    (3, 128256), (2, 300000), (1, 1000003), (8193, 1000), (257, 32000), (70001, 10), (1 << 20, 10),
    (300000, 2), (301, 16384), (133, 50257),
]  # fmt: skip
SANITIZED = [(1, 1), (37, 10), (5, 33), (7, 101), (3, 1025), (2, 4099), (2, 40003), (1, 128256)]
# Up to here the truth comes from long double; above, from the plain formula in float64.
LONG_DOUBLE_ELEMENTS = 5000
# float64 predictions always need it, and it takes its time.
LONG_DOUBLE_LIMIT = 1_100_000
FACTORS = {
    "targets": [torch.int32, torch.int64, "soft"],
    "from_logits": [True, False],
    "subset": [None, 1 / 9, 1 / 2],  # a share of the classes
    "normalize_full": [False, True],
    "weights": [(1.0, 0.0), (0.8, 0.2), (0.0, 1.0)],
    "label_smoothing": [0.0, 0.1],
    "class_weight": [False, True],
    "ignore_class": [None, -1],
}


def _is_possible(case):
    alone = case["weights"] == (1.0, 0.0) and not case["normalize_full"]
    dense_ignores = case["targets"] == "soft" and case["ignore_class"] is not None
    return (case["subset"] is not None or alone) and not dense_ignores


PRODUCT = (
    dict(zip(FACTORS, values, strict=True)) for values in itertools.product(*FACTORS.values())
)
FORMS = [case for case in PRODUCT if _is_possible(case)]


def sample(case, shape, dtype, generator, device):
    """Predictions, targets, form and cotangents."""
    rows, classes = shape
    sums = sums_dtype(dtype)
    source = {"generator": generator, "device": device}

    def uniform(low, high, *size):
        return low + (high - low) * torch.rand(size, dtype=torch.float64, **source)

    x = torch.randn(shape, dtype=torch.float64, **source) * 3
    if not case["from_logits"]:
        # Away from the bounds at which the gradient jumps, and not quite of sum 1.
        x = (x.clamp(-4, 4) / 3).exp()
        x = (x / (x.sum(-1, keepdim=True) * uniform(1.01, 1.1, rows, 1))).clamp(4e-5, 0.99)
    form = {key: case[key] for key in ("from_logits", "label_smoothing", "ignore_class")}
    if case["targets"] == "soft":
        targets = uniform(0, 1, *shape)
        targets = (targets / targets.sum(-1, keepdim=True)).to(sums)
    else:
        targets = torch.randint(classes, (rows,), **source)
        if case["ignore_class"] is not None:
            targets[uniform(0, 1, rows) < 0.3] = case["ignore_class"]
        targets = targets.to(case["targets"])
    if case["class_weight"]:
        form["class_weight"] = uniform(0.5, 2, classes).to(sums)
    if case["subset"] is not None:
        size = max(1, int(classes * case["subset"]))
        form["subset"] = torch.randperm(classes, **source)[:size].sort()[0]
        form["normalize_full"] = case["normalize_full"]
        form["subset_weight"], form["full_weight"] = case["weights"]
    cotangents = torch.randn(rows, dtype=torch.float64, **source).to(sums)
    return x.to(dtype), targets, form, cotangents


def moved(tensor, offset):
    """A copy that begins `offset` elements behind an aligned address."""
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return room[offset:].view(tensor.shape).copy_(tensor)


def run(kernels, x, targets, form, cotangents, row_weight, scale, offset=0):
    """Loss and gradient by both paths: {what: tensor}.

    Raises:
      AssertionError: two runs differ, or an element is not written.
    """
    sums = sums_dtype(x.dtype)
    found = []
    for poison in POISON:

        def filled(shape, dtype, offset=0, poison=poison):
            return moved(torch.full(shape, poison, dtype=dtype, device=x.device), offset)

        rows = len(x)
        loss, reduced_loss = filled((rows,), sums), filled((1,), sums)
        stats = filled((rows, kernels.stats_per_row(x, targets, form)), sums)
        gradient, reduced = filled(x.shape, x.dtype, offset), filled(x.shape, x.dtype, offset)
        kernels.forward(x, targets, form, loss, stats)
        kernels.grad(x, targets, form, cotangents, stats, gradient)
        kernels.reduced(x, targets, form, row_weight, scale, reduced_loss, reduced)
        found.append({
            "loss": loss, "gradient": gradient, "reduced loss": reduced_loss,
            "reduced gradient": reduced,
        })  # fmt: skip
    first, second = found
    for what, tensor in first.items():
        same = torch.equal(tensor.view(torch.uint8), second[what].view(torch.uint8))
        assert same, f"{what}: two runs differ, or an element is not written"
    return first


def exact(x, targets, form):
    """Loss, gradient of each row's loss, and the largest terms of both, in float64."""
    if x.numel() > LONG_DOUBLE_ELEMENTS and x.dtype != torch.float64:
        ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
        loss, gradient = xent.row_loss_and_gradient(x.double(), targets, torch.float64, ones, form)
        # What cancels in p · Σy − y, should the gradient be 0.
        terms = largest(targets) if targets.is_floating_point() else 1.0
        terms *= largest(form["class_weight"]) if "class_weight" in form else 1.0
        return loss, gradient, 0.0, terms if form["from_logits"] else 0.0
    arguments = {k: v.cpu().numpy() if torch.is_tensor(v) else v for k, v in form.items()}
    arguments["normalize"] = "full" if arguments.pop("normalize_full", False) else "subset"
    with np.errstate(invalid="ignore"):  # −Inf − −Inf, in rows that do not count
        found = truth.with_terms(x.double().cpu().numpy(), targets.cpu().numpy(), **arguments)
    loss, gradient = (torch.tensor(v.astype(np.float64), device=x.device) for v in found[:2])
    return loss, gradient, float(found[2]), float(found[3])


class Report:
    """What was checked, by name: the worst error as a share of what is allowed, and failures."""

    def __init__(self):
        self.worst = collections.defaultdict(float)
        self.counts = collections.Counter()
        self.failures = []

    def bound(self, what, dtype, error, allowed):
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
        key = f"{str(dtype).removeprefix('torch.')} {what}"
        self.worst[key] = max(self.worst[key], error / allowed if allowed else 0.0)

    def attempt(self, group, name, check, *arguments):
        """Runs check(*arguments); a broken promise is noted, a broken call ends the run."""
        self.counts[group] += 1
        try:
            check(*arguments)
        except AssertionError as failure:
            self.failures.append(f"{group}: {name}: {failure}")
        except Exception as error:
            error.add_note(f"in {group}: {name}")
            raise


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def check_inputs(report, kernels, inputs, number, reference_device):
    """One form on one batch, by both paths; `number` chooses row weights, scale and alignment."""
    x, targets, form, cotangents = inputs
    dtype = x.dtype
    row_weight = None if number % 4 == 0 else cotangents
    scale = 1 / len(x) if number % 3 else 1.0
    offset = number % 5 == 4
    dense = targets.is_floating_point()
    given = moved(x, offset), moved(targets, offset) if dense else targets
    ours = run(kernels, *given, form, cotangents, row_weight, scale, offset)

    def there(values):
        return values.to(reference_device) if torch.is_tensor(values) else values

    ours = {key: there(tensor).double() for key, tensor in ours.items()}
    x, targets, cotangents = there(x), there(targets), there(cotangents)
    row_weight = there(row_weight)
    form = {key: there(value) for key, value in form.items()}
    sums = sums_dtype(dtype)
    loss, gradient, loss_terms, gradient_terms = exact(x, targets, form)
    ones = torch.ones_like(cotangents)
    weights = (ones if row_weight is None else row_weight) * torch.tensor(scale, dtype=sums)
    for path, factors in (("", cotangents), ("reduced ", weights)):
        torch_loss, torch_gradient = xent.row_loss_and_gradient(x, targets, sums, factors, form)
        truth_gradient = gradient * factors.double()[:, None]
        terms = gradient_terms * largest(factors)
        plain = 2 * largest(torch_gradient.double() - truth_gradient)
        # What is 0 in exact arithmetic, such as the loss over one class, is a difference of terms.
        allowed = max(
            plain + 4 * EPSILON[dtype] * largest(truth_gradient), 2 * EPSILON[dtype] * terms
        )
        error = largest(ours[path + "gradient"] - truth_gradient)
        report.bound(path + "gradient", dtype, error, allowed)
    plain = 2 * largest(torch_loss.double() - loss)
    allowed = max(plain + 4 * EPSILON[sums] * largest(loss), 2 * EPSILON[sums] * loss_terms)
    report.bound("loss", dtype, largest(ours["loss"] - loss), allowed)
    weights = weights.double()
    total = (loss * weights).sum()
    plain = 2 * ((torch_loss.double() - loss) * weights).abs().sum().item()
    size = 4 * (loss * weights).abs().sum().item()
    size = max(size, 2 * loss_terms * weights.abs().sum().item())
    error = largest(ours["reduced loss"] - total)
    report.bound("reduced loss", dtype, error, plain + EPSILON[sums] * size)


def _with_jump(height, where):
    def profile(z, position, in_subset):
        return z + height * where(position, in_subset)

    return profile


# Logits that rise, fall, jump and vanish; `position` runs from 0 to 1 along the classes.
PROFILES = {
    "rising": lambda z, position, in_subset: (z * 10).sort(-1)[0],
    "falling": lambda z, position, in_subset: (z * 10).sort(-1, descending=True)[0],
    "a jump in the middle": _with_jump(500, lambda position, in_subset: position > 0.5),
    "a jump at the end": _with_jump(1e4, lambda position, in_subset: position == position[-1]),
    "the subset far below": _with_jump(500, lambda position, in_subset: ~in_subset),
    "the subset far above": _with_jump(30, lambda position, in_subset: in_subset),
    "nothing at first": lambda z, position, in_subset: z.where(position >= 0.5, -math.inf),
    "nothing but one": lambda z, position, in_subset: z.where(position == position[-1], -math.inf),
}


def check_profile(report, kernels, generator, device, reference_device, case, shape, dtype, form):
    """Logits of any profile; the label is the last class, so that no loss is infinite."""
    x, targets, options, cotangents = sample(case, shape, dtype, generator, device)
    classes = shape[1]
    in_subset = torch.ones(classes, dtype=torch.bool, device=device)
    if "subset" in options:
        options["subset"][-1] = classes - 1
        in_subset[:] = False
        in_subset[options["subset"]] = True
    x = form(x, torch.linspace(0, 1, classes, device=device), in_subset).contiguous()
    if targets.is_floating_point():
        targets = torch.eye(classes, dtype=targets.dtype, device=device)[-1].repeat(shape[0], 1)
    else:
        targets = torch.full_like(targets, classes - 1)
    check_inputs(report, kernels, (x, targets, options, cotangents), 1, reference_device)


def check_bad_rows(kernels, generator, device, dtype, classes, case, spoil, expected):
    """Row 7 of 40 is spoiled: its loss and gradient are as expected, the other rows unharmed.

    `expected` is "nan" (all of the row), "not finite" (some of its gradient) or "zero".
    """
    x, targets, form, cotangents = sample(case, (40, classes), dtype, generator, device)
    sound = run(kernels, x, targets, form, cotangents, cotangents, 0.5)
    x, targets, form = spoil(x.clone(), targets.clone(), dict(form))
    found = run(kernels, x, targets, form, cotangents, cotangents, 0.5)
    others = torch.arange(40, device=device) != 7
    for what in ("loss", "gradient", "reduced gradient"):
        assert torch.equal(found[what][others], sound[what][others]), f"{what} of other rows"
        row = found[what][7]
        if expected == "zero":
            assert (row == 0).all(), f"{what} is {row}"
        elif expected == "nan" or what == "loss":
            assert row.isnan().all(), f"{what} is {row}"
        else:
            assert not row.isfinite().all(), f"{what} is finite"
    assert found["reduced loss"].isnan().item() == (expected != "zero")


def check_odd_probabilities(kernels, device, sparse, classes, odd, form):
    """A row that is no distribution: the losses are those of the formula, NaN and Inf included."""
    p = torch.full((3, classes), 1e-3)
    p[:, :4] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    p[0, :4] = torch.tensor(odd)
    y = torch.tensor([[0.25, 0.3, 0.45, 0] + [0] * (classes - 4)] * 3)
    targets = torch.tensor([1, 2, 0]) if sparse else y
    form = {"from_logits": False, **form}
    if "subset" in form:
        form["subset"] = torch.tensor(form["subset"])
    ones = torch.ones(3)
    loss, gradient = xent.row_loss_and_gradient(p, targets, torch.float32, ones, form)
    form = {k: v.to(device) if torch.is_tensor(v) else v for k, v in form.items()}
    ones = ones.to(device)
    found = run(kernels, p.to(device), targets.to(device), form, ones, None, 1.0)
    for what in ("gradient", "reduced gradient"):
        ours, ours_loss = found[what].cpu(), found["loss"].cpu()
        torch.testing.assert_close(ours_loss, loss, rtol=1e-5, atol=1e-6, equal_nan=True)
        finite = loss.isfinite()
        torch.testing.assert_close(ours[finite], gradient[finite], rtol=1e-4, atol=1e-5)
        assert not ours[~finite].isfinite().all(-1).any(), "the gradient hides a bad row"


def check_zeros(kernels, device, shape, dtype, dense, form):
    """No rows, no classes, or no row that counts: loss 0 and gradient 0."""
    x = torch.randn(shape).to(dtype).to(device)
    targets = torch.zeros(shape[0], dtype=torch.int64, device=device)
    if dense:
        targets = torch.zeros(shape, dtype=sums_dtype(dtype), device=device)
    ones = torch.ones(shape[0], dtype=sums_dtype(dtype), device=device)
    for what, tensor in run(kernels, x, targets, form, ones, None, 1.0).items():
        assert (tensor == 0).all(), f"{what} is not 0"


def check_unordered_subset(kernels, device, dtype, classes, ids, sparse, full_weight):
    """Ids that descend, repeat or do not exist: every row is NaN."""
    x = torch.randn(9, classes).to(dtype).to(device)
    sums = sums_dtype(dtype)
    targets = torch.zeros(9, dtype=torch.int64, device=device)
    if not sparse:
        targets = torch.full(x.shape, 1 / classes, dtype=sums, device=device)
    form = {"subset": torch.tensor(ids, device=device), "full_weight": full_weight}
    ones = torch.ones(9, dtype=sums, device=device)
    for what, tensor in run(kernels, x, targets, form, ones, None, 1.0).items():
        assert tensor.isnan().all(), f"{what} is not NaN"


def check_beyond_int32(kernels, device, generator):
    """More than 2^31 elements: the first and the last rows are right, and no element is missed."""
    classes = 128256
    rows = 2**31 // classes + 40
    x = torch.randn((rows, classes), dtype=torch.bfloat16, device=device)
    labels = torch.randint(classes, (rows,), generator=generator, device=device)
    gradient = torch.full_like(x, torch.nan)
    loss = torch.full((1,), torch.nan, device=device)
    kernels.reduced(x, labels, {}, None, 1.0, loss, gradient)
    total = 0.0
    for start in range(0, rows, 512):
        part = slice(start, start + 512)
        assert gradient[part].isfinite().all(), f"rows from {start} on"
        total += torch.nn.functional.cross_entropy(
            x[part].float(), labels[part], reduction="sum"
        ).item()
    assert math.isclose(loss.item(), total, rel_tol=1e-5)
    for part in (slice(0, 32), slice(rows - 32, rows)):
        ones = torch.ones(32, dtype=torch.float64, device=device)
        _, right = xent.row_loss_and_gradient(
            x[part].double(), labels[part], torch.float64, ones, {}
        )
        error = (gradient[part].double() - right).abs().sum() / right.abs().sum()
        assert error <= EPSILON[torch.bfloat16], f"relative error {error:.3g}"


PLAIN = {
    "targets": torch.int64, "from_logits": True, "subset": None, "normalize_full": False,
    "weights": (1.0, 0.0), "label_smoothing": 0.0, "class_weight": False, "ignore_class": None,
}  # fmt: skip
MIXED = {**PLAIN, "subset": 1 / 2, "weights": (0.8, 0.2), "class_weight": True}
STRESSED = {"plain": PLAIN, "mixed": MIXED}
ODD_FORMS = {
    "all": {},
    "subset": {"subset": [1, 2]},
    "normalized over all": {"subset": [1, 2], "normalize_full": True},
    "mixture": {"subset": [1, 2], "subset_weight": 0.8, "full_weight": 0.2},
    "weight 0": {"subset": [1, 2], "subset_weight": 0.0, "full_weight": 1.0},
}


def _spoilers(classes):
    """What can be wrong with row 7: {name: (spoil, targets, expected)}."""
    far = 2**31 - 1

    def logit(value, where=slice(3, 4)):
        def spoil(x, targets, form):
            x[7, where] = value
            return x, targets, form

        return spoil

    def label(value, ignored=None):
        def spoil(x, targets, form):
            targets[7] = value
            return x, targets, {**form, "ignore_class": ignored}

        return spoil

    spoilers = {
        "a NaN among labelled logits": (logit(math.nan), torch.int64, "not finite"),
        "a NaN among soft logits": (logit(math.nan), "soft", "not finite"),
        "an Inf among labelled logits": (logit(math.inf), torch.int32, "not finite"),
        "an Inf among soft logits": (logit(math.inf), "soft", "not finite"),
        "only NaN": (logit(math.nan, slice(None)), torch.int64, "not finite"),
        "an ignored label": (label(far, far), torch.int32, "zero"),
    }
    for integer in (torch.int32, torch.int64):
        for bad in (-1, -(2**31), classes, far):
            spoilers[f"{integer} label {bad}"] = (label(bad), integer, "nan")
    for bad in (2**32, -(2**63)):
        spoilers[f"label {bad}"] = (label(bad), torch.int64, "nan")
    return spoilers


def _check_odd_numbers(report, kernels, generator, device, reference_device):
    profiles = itertools.product(
        DTYPES[:3], (10, 2571, 40003), STRESSED.items(), (torch.int32, "soft"), PROFILES.items()
    )
    for dtype, classes, (name, form), targets, (profile, function) in profiles:
        report.attempt(
            "profiles", f"{profile}, {classes} classes, {dtype}, {name}, {targets}", check_profile,
            report, kernels, generator, device, reference_device, {**form, "targets": targets},
            (5, classes), dtype, function,
        )  # fmt: skip
    odd = itertools.product(
        (False, True), (4, 64, 5000), truth.ODD_PROBABILITIES.items(), ODD_FORMS.items()
    )
    for sparse, classes, (kind, row), (name, form) in odd:
        report.attempt(
            "odd probabilities", f"{kind}, {name}, {classes} classes, sparse={sparse}",
            check_odd_probabilities, kernels, device, sparse, classes, row, form,
        )  # fmt: skip


def _check_edges(report, kernels, generator, device):
    everywhere = itertools.product(DTYPES, (6, 300, 4099), STRESSED.items())
    for dtype, classes, (name, form) in everywhere:
        for what, (spoil, targets, expected) in _spoilers(classes).items():
            report.attempt(
                "bad rows", f"{what}, {classes} classes, {dtype}, {name}", check_bad_rows,
                kernels, generator, device, dtype, classes, {**form, "targets": targets}, spoil,
                expected,
            )  # fmt: skip
    shapes = ((0, 7), (0, 0), (5, 0), (0, 5000), (40000, 0))
    for dtype, dense, shape in itertools.product(DTYPES, (False, True), shapes):
        report.attempt(
            "nothing to do", f"{shape}, {dtype}, dense={dense}",
            check_zeros, kernels, device, shape, dtype, dense, {},
        )  # fmt: skip
    for dtype, shape in itertools.product(DTYPES, ((9, 1), (500, 10), (3, 5000))):
        report.attempt(
            "nothing to do", f"all rows ignored, {shape}, {dtype}",
            check_zeros, kernels, device, shape, dtype, False, {"ignore_class": 0},
        )  # fmt: skip
    wrong = itertools.product(
        ([2, 1], [1, 1], [-1, 2], [3, 100], [0, 5000], [0, 2**40]), DTYPES, (False, True),
        (100, 5000), (0.0, 0.2),
    )  # fmt: skip
    for ids, dtype, sparse, classes, full_weight in wrong:
        if ids == [3, 100] and classes > 100:
            continue  # nothing wrong with it
        report.attempt(
            "unordered subset", f"{ids}, {classes} classes, {dtype}, sparse={sparse}",
            check_unordered_subset, kernels, device, dtype, classes, ids, sparse, full_weight,
        )  # fmt: skip


def check_all(kernels, seed, device="cuda", reference_device="cuda", sanitized=False, large=True):
    """All checks, or for a sanitizer a few of small shapes; returns a Report."""
    report = Report()
    generator = torch.Generator(device).manual_seed(seed)

    def check(group, case, shape, dtype):
        words = ", ".join(f"{key}={value}" for key, value in case.items())
        inputs = sample(case, shape, dtype, generator, device)
        number = report.counts.total()
        report.attempt(
            group, f"{shape}, {dtype}, {words}",
            check_inputs, report, kernels, inputs, number, reference_device,
        )  # fmt: skip

    shapes = SANITIZED if sanitized else SMALL
    start = seed % len(shapes)
    for index, case in enumerate(FORMS):
        # All dtypes of a form, each at another shape.
        for turn, dtype in enumerate([DTYPES[index % 4]] if sanitized else DTYPES):
            shape = shapes[(start + index + index // len(shapes) + 7 * turn) % len(shapes)]
            check("forms", case, shape, dtype)
    _check_edges(report, kernels, generator, device)
    if sanitized:
        return report
    _check_odd_numbers(report, kernels, generator, device, reference_device)
    for shape, dtype in itertools.product(SMALL, DTYPES):
        check("plain at every shape", PLAIN, shape, dtype)
    for shape, dtype in itertools.product(LARGE if large else (), DTYPES):
        if dtype == torch.float64 and math.prod(shape) > LONG_DOUBLE_LIMIT:
            continue
        drawn = torch.randint(len(FORMS), (5,), generator=generator, device=device)
        known = [PLAIN, MIXED, {**MIXED, "targets": "soft", "from_logits": False}]
        for case in known + [FORMS[int(i)] for i in drawn]:
            check("large", case, shape, dtype)
    if large:
        report.attempt(
            "large", "more than 2^31 elements", check_beyond_int32, kernels, device, generator
        )
    return report
