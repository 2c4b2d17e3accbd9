"""Times loss + gradient on the GPU, beside what else computes it, and checks the results.

A lap runs a step once on each of several batches, so that no cache holds what comes next, and keeps
the results until the next lap. It is enqueued while the GPU sleeps: what is timed is the GPU's
work, not Python. A time is the median over laps, for one batch.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess

import torch
import xent

WARM_UP_LAPS, MIN_LAPS, LAPS = 3, 8, 20
ENOUGH_MS = 1000  # of laps, if there were MIN_LAPS
LAP_BYTES = 1 << 29  # of predictions; many times any L2
MAX_BATCHES = 24
SLEEP_CYCLES = 10_000_000  # 5 ms at 2 GHz: longer than it takes to enqueue a lap
COPY_BYTES = 1 << 31
CHECKED_ROWS = 32  # at each end
CHECKED_ELEMENTS = 1 << 25  # in float64 at a time
# Relative error in the sum of absolute values: for a softmax the label weighs as much as the rest.
OWN_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
# PyTorch rounds log-probabilities of 12 nats to bfloat16.
THEIR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-4}
SUBSET_WEIGHT, FULL_WEIGHT = 0.8, 0.2


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table."""

    kind: str  # "labels", "mixture of logits" or "mixture of probabilities"
    rows: int
    classes: int
    dtype: torch.dtype
    share_goal: float  # of the bandwidth of a copy
    ratio_goal: float  # against the best of the others

    @property
    def name(self):
        return f"{self.kind} {self.rows}×{self.classes} {str(self.dtype).removeprefix('torch.')}"

    @property
    def predictions_bytes(self):
        return self.rows * self.classes * self.dtype.itemsize

    @property
    def batches(self):
        return max(2, min(MAX_BATCHES, LAP_BYTES // self.predictions_bytes))

    @property
    def moved_bytes(self):
        """Predictions read, gradient written, and int64 labels or float32 targets read."""
        targets = 8 * self.rows if self.kind == "labels" else 4 * self.rows * self.classes
        return 2 * self.predictions_bytes + targets


CASES = [
    Case(kind, rows, classes, dtype, share, ratio)
    for kind, rows, classes, share, ratio in (
        ("labels", 8192, 128256, 0.85, 1.3),
        ("labels", 4096, 32000, 0.85, 1.2),
        ("labels", 16384, 4096, 0.85, 1.2),
        ("labels", 65536, 1000, 0.75, 1.0),
        ("labels", 1048576, 10, 0.75, 1.0),
        ("mixture of logits", 8192, 32000, 0.80, 2.0),
        ("mixture of probabilities", 8192, 32000, 0.80, 2.0),
    )
    for dtype in (torch.bfloat16, torch.float32)
]


@dataclasses.dataclass
class Timing:
    ms: float
    percentile_20_ms: float
    percentile_80_ms: float
    waited_for_host: bool  # some lap was not enqueued in time: the time holds some of Python's
    result: tuple  # loss and gradient of the first batch


def time_laps(step, batches, before=None):
    """Times step(batch number), which returns loss and gradient; `before` each lap is not timed."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    kept, times_ms, late = [None] * batches, [], 0
    for lap in range(WARM_UP_LAPS + LAPS):
        if before:
            before()
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        for batch in range(batches):
            kept[batch] = step(batch)
        is_late = start.query()
        end.record()
        end.synchronize()
        if lap >= WARM_UP_LAPS:
            late += is_late
            times_ms.append(start.elapsed_time(end) / batches)
        if len(times_ms) >= MIN_LAPS and sum(times_ms) * batches > ENOUGH_MS:
            break
    low, *_, high = statistics.quantiles(times_ms, n=5)
    median = statistics.median(times_ms)
    return Timing(median, low, high, late > 0, kept[0])


def copy_bandwidth():
    """Bytes read and written per second by a device-to-device copy."""
    sources = [torch.randn(COPY_BYTES // 4, device="cuda") for _ in range(2)]
    copies = [torch.empty_like(source) for source in sources]
    timing = time_laps(lambda i: (None, copies[i].copy_(sources[i])), len(sources))
    return 2 * COPY_BYTES / (timing.ms * 1e-3)


def sample(case):
    """Batches of predictions and targets, and the ids of a scattered fifth of the classes."""
    shape, batches = (case.rows, case.classes), []
    for _ in range(case.batches):
        x = torch.randn(shape, device="cuda")
        if case.kind == "mixture of probabilities":
            x = x.softmax(-1)
        if case.kind == "labels":
            targets = torch.randint(case.classes, (case.rows,), device="cuda")
        else:
            # Soft: with one-hot ones a form that skips zeros would look better than it is.
            targets = torch.rand(shape, device="cuda")
            targets /= targets.sum(-1, keepdim=True)
        batches.append((x.to(case.dtype), targets))
    ids = torch.randperm(case.classes, device="cuda")[: case.classes // 5].sort()[0]
    return batches, ids


def own_form(case, ids):
    if case.kind == "labels":
        return {}
    return {
        "from_logits": case.kind == "mixture of logits",
        "subset": ids, "subset_weight": SUBSET_WEIGHT, "full_weight": FULL_WEIGHT,
    }  # fmt: skip


def own_step(kernels, case, batches, form):
    def step(i):
        x, targets = batches[i]
        loss, gradient = torch.empty(1, device="cuda"), torch.empty_like(x)
        kernels.reduced(x, targets, form, None, 1 / case.rows, loss, gradient)
        return loss, gradient

    return step


def torch_losses(case, ids):
    """The mean loss as users write it: {name: fn(predictions, targets)}."""
    if case.kind == "labels":
        return {"": torch.nn.functional.cross_entropy}
    inside = torch.zeros(case.classes, dtype=torch.bool, device="cuda")
    inside[ids] = True

    def from_logits(z, y, counted=None):
        if counted is None:
            return -(y * z.log_softmax(-1)).sum(-1)
        log_sum = z.masked_fill(~counted, -torch.inf).logsumexp(-1, keepdim=True)
        return (torch.where(counted, y, 0) * (log_sum - z)).sum(-1)

    def from_probabilities(p, y, counted=None):
        if counted is not None:
            p, y = p * counted, y * counted
        q = (p / p.sum(-1, keepdim=True)).clamp(xent.EPSILON, 1 - xent.EPSILON)
        return -(y * q.log()).sum(-1)

    loss = from_logits if case.kind == "mixture of logits" else from_probabilities

    def gathered(x, y):
        x = x.float()
        part = loss(x[:, ids], y[:, ids])
        return (SUBSET_WEIGHT * part + FULL_WEIGHT * loss(x, y)).mean()

    def masked(x, y):
        x = x.float()
        return (SUBSET_WEIGHT * loss(x, y, inside) + FULL_WEIGHT * loss(x, y)).mean()

    return {" (gather)": gathered, " (mask)": masked}


def torch_steps(case, batches, ids):
    """Steps of eager and compiled torch: {name: step}."""

    def backward_of(loss):
        leaves = [x.detach().requires_grad_() for x, _ in batches]

        def step(i):
            value = loss(leaves[i], batches[i][1])
            return value, torch.autograd.grad(value, leaves[i])[0]

        return step

    def one_graph_of(loss):
        compiled = torch.compile(torch.func.grad_and_value(loss), dynamic=False)

        def step(i):
            gradient, value = compiled(*batches[i])
            return value, gradient

        return step

    steps = {}
    for name, loss in torch_losses(case, ids).items():
        steps["eager" + name] = backward_of(loss)
        steps["compile" + name] = backward_of(torch.compile(loss, dynamic=False))
        # Loss and gradient compiled together: less traffic than a loss and its backward pass.
        steps["one graph" + name] = one_graph_of(loss)
    return steps


def liger_step(case, batches):
    """Liger's kernel as its own launcher calls it, and what restores the logits it overwrites.

    The launcher waits for the GPU to count labels; the launch is recorded once and replayed alone.
    """
    from liger_kernel.ops import cross_entropy

    kernel, launches = cross_entropy.liger_cross_entropy_kernel, []

    class Recorder:
        def __getitem__(self, grid):
            return lambda **arguments: launches.append((grid, arguments))

    cross_entropy.liger_cross_entropy_kernel = Recorder()
    overwritten = [x.clone().requires_grad_() for x, _ in batches]
    try:
        for x, (_, labels) in zip(overwritten, batches, strict=True):
            cross_entropy.cross_entropy_forward(
                x, labels, None, -100, 0.0, 0.0, "mean", None, False
            )
    finally:
        cross_entropy.liger_cross_entropy_kernel = kernel

    def step(i):
        grid, arguments = launches[i]
        kernel[grid](**arguments)
        return arguments["loss_ptr"].sum(), overwritten[i].detach()

    def restore():
        with torch.no_grad():
            for x, (logits, _) in zip(overwritten, batches, strict=True):
                x.copy_(logits)

    return step, restore


def relative_error(found, right):
    """Of gradients, in the sum of absolute values, a few rows at a time."""
    error = size = 0.0
    for a, b in zip(found.split(512), right.split(512), strict=True):
        error += (a.float() - b.float()).abs().sum(dtype=torch.float64)
        size += b.float().abs().sum(dtype=torch.float64)
    return float(error / size)


def own_error(case, batch, form, result):
    """The larger relative error of loss and gradient against float64; of the gradient's ends."""
    (x, targets), (loss, gradient) = batch, result
    arguments = {"from_logits": True, **form}
    total, error = 0.0, 0.0
    step = max(1, CHECKED_ELEMENTS // case.classes)
    for start in range(0, case.rows, step):
        part = slice(start, start + step)
        total += xent.row_loss(x[part], targets[part], torch.float64, **arguments).sum().item()
    for part in (slice(0, CHECKED_ROWS), slice(case.rows - CHECKED_ROWS, case.rows)):
        scales = torch.full((CHECKED_ROWS,), 1 / case.rows, dtype=torch.float64, device="cuda")
        inputs = x[part].double(), targets[part], torch.float64, scales, arguments
        right = xent.row_loss_and_gradient(*inputs)[1]
        error = max(error, relative_error(gradient[part].double(), right))
    mean = total / case.rows
    return max(error, abs(loss.item() - mean) / abs(mean))


def measure(kernels, case, note):
    """Times of everything in this process: {name: Timing}, ours under "ours"; ours is right."""
    batches, ids = sample(case)
    form = own_form(case, ids)
    steps = {"ours": (own_step(kernels, case, batches, form), None)}
    copies = [torch.empty_like(x) for x, _ in batches]
    steps["copy"] = (lambda i: (None, copies[i].copy_(batches[i][0])), None)
    steps |= {name: (step, None) for name, step in torch_steps(case, batches, ids).items()}
    if case.kind == "labels":
        try:
            steps["Liger"] = liger_step(case, batches)
        except ImportError as error:
            note(f"Liger: not installed ({error})")
    timings, ours = {}, None
    for name, (step, before) in steps.items():
        torch.compiler.reset()
        # What a competitor cannot do is said in the table's notes; ours must work.
        try:
            timing = time_laps(step, case.batches, before)
        except Exception as error:
            if name == "ours":
                raise
            words = str(error).partition("\n")[0]
            note(f"{case.name}: {name} failed: {type(error).__name__}: {words}")
            continue
        loss, gradient = timing.result
        timing.result = None
        if name == "ours":
            ours = loss, gradient
            error = own_error(case, batches[0], form, ours)
            assert error <= OWN_TOLERANCE[case.dtype], f"{case.name}: ours is off by {error:.3g}"
        elif name == "copy":
            assert torch.equal(gradient, batches[0][0])
        else:
            error = relative_error(gradient, ours[1])
            error = max(error, abs(loss.item() - ours[0].item()) / abs(ours[0].item()))
            if not error <= THEIR_TOLERANCE[case.dtype]:
                note(f"{case.name}: {name} differs by {error:.3g} and does not count")
                continue
        timings[name] = timing
    return timings


def keras_times(python, tests, note):
    """Milliseconds of XLA-compiled Keras: {case's name: ms}."""
    asked = [
        {
            **dataclasses.asdict(case),
            "name": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
            "batches": case.batches,
            "tolerance": THEIR_TOLERANCE[case.dtype],
        }
        for case in CASES
    ]
    done = subprocess.run(
        [python, pathlib.Path(__file__).with_name("keras_xla.py"), "/GPU:0"],
        input=json.dumps(asked),
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        note("XLA: not measured: " + (done.stderr.strip().splitlines() or ["no reason"])[-1])
        return {}
    answer = json.loads(done.stdout.splitlines()[-1])
    for line in answer["notes"]:
        note(line)
    return answer["ms"]


COLUMNS = ("eager", "compile", "one graph", "Liger", "XLA")
RIVALS = COLUMNS[1:]


def best(times_ms, *names):
    """The least of those whose names begin with one of these, or None."""
    return min((ms for name, ms in times_ms.items() if name.startswith(names)), default=None)


def judge(case, times_ms, bandwidth):
    """A result: bytes, times, share of the bandwidth, ratio to the best rival, goals reached."""
    roof_ms = case.moved_bytes / bandwidth * 1e3
    rival_ms = best(times_ms, *RIVALS)
    share = roof_ms / times_ms["ours"]
    ratio = None if rival_ms is None else rival_ms / times_ms["ours"]
    return {
        "case": case.name,
        "moved_bytes": case.moved_bytes,
        "roof_ms": roof_ms,
        # At the size of the predictions, for the bytes of the case.
        "copy_ms": times_ms["copy"] * case.moved_bytes / (2 * case.predictions_bytes),
        "times_ms": times_ms,
        "share": share,
        "share_goal": case.share_goal,
        "share_met": share >= case.share_goal,
        "ratio": ratio,
        "ratio_goal": case.ratio_goal,
        "ratio_met": ratio is not None and ratio >= case.ratio_goal,
    }


def lines_of(results, bandwidth, notes):
    """The table to print."""
    titles = ["case", "MB", "roof", "copy", "ours", *COLUMNS, "share", "goal", "", "ratio", "goal"]
    rows = [[*titles, ""]]
    for result in results:
        times_ms = result["times_ms"]
        times = [result["roof_ms"], result["copy_ms"], times_ms["ours"]]
        times += [best(times_ms, column) for column in COLUMNS]
        ratio = "–" if result["ratio"] is None else f"{result['ratio']:.2f}"
        rows.append([
            result["case"], f"{result['moved_bytes'] / 1e6:.0f}",
            *("–" if ms is None else f"{ms:.4f}" for ms in times),
            f"{result['share']:.0%}", f"{result['share_goal']:.0%}",
            "met" if result["share_met"] else "NOT MET",
            ratio, f"{result['ratio_goal']:.1f}", "met" if result["ratio_met"] else "NOT MET",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"Loss + gradient, ms. MB: what must move; roof: that at {bandwidth / 1e9:.0f} GB/s, the",
        "bandwidth of a 2 GiB copy, read and written; share: roof over ours. copy: as many bytes,",
        "copied in arrays of the size of the predictions. ratio: over ours, the best of",
        f"{', '.join(RIVALS)}.",
    ]
    for first, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return lines + [f"note: {line}" for line in notes]


def run(kernels, keras_python, tests):
    """Times every case, XLA in `keras_python`; `tests` is the folder of the float64 truth.

    Returns:
      The lines of the table, and a document for JSON.
    """
    notes = {}  # in order, each once

    def note(line):
        notes[line] = None

    keras_ms = keras_times(keras_python, tests, note)
    bandwidth = copy_bandwidth()
    results = []
    for case in CASES:
        timings = measure(kernels, case, note)
        times_ms = {name: timing.ms for name, timing in timings.items()}
        if case.name in keras_ms:
            times_ms["XLA"] = keras_ms[case.name]
        late = [name for name, timing in timings.items() if timing.waited_for_host]
        if late:
            note(f"{case.name}: {', '.join(late)} waited for Python")
        spreads = {
            name: (timing.percentile_20_ms, timing.percentile_80_ms)
            for name, timing in timings.items()
        }
        results.append({**judge(case, times_ms, bandwidth), "percentiles_20_80_ms": spreads})
    document = {
        "copy_bytes_per_second": bandwidth, "results": results, "notes": list(notes)
    }  # fmt: skip
    return lines_of(results, bandwidth, notes), document
