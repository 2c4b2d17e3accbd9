"""The general forms against float64: rows with subsets of their own, focal, softcaps, metrics.

As check.py does. The forms have many factors: a run checks a sample of their combinations, another
for every seed.
"""

import random

import numpy as np
import torch
from check import (
    DTYPES,
    EPSILON,
    LARGE,
    SANITIZED,
    SMALL,
    check_inputs,
    largest,
    run,
    sample,
)
from kernels import sums_dtype

import truth

CHECKED_ELEMENTS = 200_000  # of metrics, whose truth has a loop
FACTORS = {
    "targets": [torch.int32, torch.int64, "soft"],
    "from_logits": [True, False],
    "subset": [None, None, 1 / 9],
    "own": [None, "few a row", "many a row", "candidates", "a long list"],
    "mask_negative_targets": [False, True],
    "normalize_full": [False, True],
    "weights": [(1.0, 0.0), (0.8, 0.2), (0.0, 1.0)],
    "label_smoothing": [0.0, 0.1],
    "class_weight": [False, True],
    "temperature": [1.0, 0.6],
    "z_loss": [0.0, 0.01],
    "softcap": [None, 4.0],
    "gamma": [None, 0.0, 0.5, 2.0],
    "ignore_class": [None, -1],
}
SHARES, LENGTHS = {"few a row": 0.02, "many a row": 0.6}, {"candidates": 5, "a long list": 300}
AS_THEY_ARE = ("mask_negative_targets", "temperature", "z_loss", "softcap", "gamma")
OF_METRICS = ("ignore_class", "subset", "mask", "candidates", "mask_negative_targets")
OF_METRICS += ("from_logits", "temperature", "softcap")


def _is_possible(case):
    dense = case["targets"] == "soft"
    has_subset = any(case[key] for key in ("subset", "own", "mask_negative_targets"))
    is_warped = (case["temperature"], case["z_loss"], case["softcap"]) != (1.0, 0.0, None)
    if case["subset"] and case["own"] or is_warped and not case["from_logits"]:
        return False
    if not has_subset and (case["normalize_full"] or case["weights"] != (1.0, 0.0)):
        return False
    return case["ignore_class"] is None if dense else not case["mask_negative_targets"]


def _forms(seed, count):
    draw = random.Random(seed)
    while count:
        case = {key: draw.choice(values) for key, values in FACTORS.items()}
        if _is_possible(case):
            count -= 1
            yield case


def sample_general(case, shape, dtype, generator, device):
    """Predictions, targets, form and cotangents."""
    source = {"generator": generator, "device": device}
    x, targets, form, cotangents = sample(case, shape, dtype, generator, device)
    rows, classes = shape
    for key in AS_THEY_ARE:
        if case[key] is not None:
            form[key] = case[key]
    if case["own"] in SHARES:
        form["mask"] = torch.rand(shape, **source) < SHARES[case["own"]]
    elif case["own"] is not None:
        places = LENGTHS[case["own"]]
        candidates = torch.randint(-1, classes, (rows, places), **source)
        if targets.is_floating_point():
            targets = torch.rand((rows, places), **source).to(targets.dtype)
        else:  # a label is among them more often than by chance
            listed = torch.rand(rows, **source) < 0.7
            candidates[:, -1] = torch.where(listed, targets.clamp(min=-1), candidates[:, -1])
        form["candidates"] = candidates.to(torch.int32 if rows % 2 else torch.int64)
    if case["mask_negative_targets"]:
        illegal = torch.rand(targets.shape, **source) < 0.4
        targets = torch.where(illegal, -1, targets)
    if case["own"] or case["mask_negative_targets"]:
        form["normalize_full"] = case["normalize_full"]
        form["subset_weight"], form["full_weight"] = case["weights"]
    return x, targets, form, cotangents


def check_metrics(report, kernels, inputs):
    """Both passes that know the metrics write the same, those of the truth."""
    x, targets, form, cotangents = inputs
    sums = sums_dtype(x.dtype)
    plain = run(kernels, x, targets, form, cotangents, None, 1.0)
    found = []
    for poison in (5.0, -5.0):
        metrics = torch.full((len(x), 3), poison, dtype=sums, device=x.device)
        measured = run(kernels, x, targets, {**form, "metrics": metrics}, cotangents, None, 1.0)
        found.append(metrics)
        torch.testing.assert_close(measured["loss"], plain["loss"], rtol=1e-4, atol=1e-5)
        half = x.dtype.itemsize == 2
        for what in ("gradient", "reduced gradient"):
            tolerance = 2 * EPSILON[x.dtype] if half else 1e-4
            torch.testing.assert_close(
                measured[what], plain[what], rtol=tolerance, atol=tolerance * largest(plain[what])
            )
    first, second = found
    assert torch.equal(first, second), "two runs differ, or a metric is not written"
    known = {key: form[key] for key in OF_METRICS if key in form}
    known = {key: v.cpu().numpy() if torch.is_tensor(v) else v for key, v in known.items()}
    known["normalize"] = "full" if form.get("normalize_full") else "subset"
    scores = x.double().cpu().numpy()
    right = truth.softmax_xent_metrics(scores, targets.cpu().numpy(), **known)
    right = torch.tensor(right.astype(np.float64))
    first = first.cpu().double()
    assert torch.equal(first[:, 0], right[:, 0]), "ranks"
    size = largest(x.double()) / form.get("temperature", 1.0)
    size = max(size, 1.0 if form["from_logits"] else -np.log(x.double().min().item()))
    for column, what in ((1, "entropy"), (2, "log-sum-exp")):
        error = largest(first[:, column] - right[:, column])
        report.bound(what, x.dtype, error, 32 * EPSILON[sums] * size)


def check_bad_candidate(kernels, device, dtype, classes, integer, full_weight):
    """Row 1 lists no class: it is NaN as a whole, an ignored row and the others are not."""
    x = torch.randn(4, classes).to(dtype).to(device)
    sums = sums_dtype(dtype)
    labels = torch.tensor([2, 2, -1, 3], device=device)
    candidates = torch.tensor([[2, 1, -1]] * 4, dtype=integer, device=device)
    candidates[1:3, 1] = classes
    form = {"candidates": candidates, "full_weight": full_weight, "ignore_class": -1}
    ones = torch.ones(4, dtype=sums, device=device)
    found = run(kernels, x, labels, form, ones, ones, 1.0)
    for what in ("loss", "gradient", "reduced gradient"):
        assert found[what][1].isnan().all(), f"{what} of the bad row"
        assert (found[what][2] == 0).all(), f"{what} of the ignored row"
        assert found[what][[0, 3]].isfinite().all(), f"{what} of other rows"


def check_all(report, kernels, seed, device, reference_device, sanitized=False, large=True):
    """All checks of the general forms, or for a sanitizer a few of small shapes."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = SANITIZED if sanitized else SMALL
    count = 60 if sanitized else 600
    batches = [
        (case, shapes[index % len(shapes)], DTYPES[index // 3 % 4])
        for index, case in enumerate(_forms(seed, count))
    ]
    if large and not sanitized:
        batches += [
            (case, LARGE[index % len(LARGE)], DTYPES[index % 3])
            for index, case in enumerate(_forms(seed + 1, 3 * len(LARGE)))
            if LARGE[index % len(LARGE)][1] >= 10
        ]
    for case, shape, dtype in batches:
        words = ", ".join(f"{key}={value}" for key, value in case.items())
        name = f"{shape}, {dtype}, {words}"
        inputs = sample_general(case, shape, dtype, generator, device)
        number = report.counts.total()
        report.attempt(
            "general forms", name,
            check_inputs, report, kernels, inputs, number, reference_device,
        )  # fmt: skip
        if shape[0] * shape[1] <= CHECKED_ELEMENTS:
            report.attempt("metrics", name, check_metrics, report, kernels, inputs)
    for dtype in DTYPES:
        for classes in (5, 5000):
            for integer in (torch.int32, torch.int64):
                for full_weight in (0.0, 0.2):
                    report.attempt(
                        "bad candidates", f"{classes} classes, {dtype}, {integer}",
                        check_bad_candidate, kernels, device, dtype, classes, integer, full_weight,
                    )  # fmt: skip
