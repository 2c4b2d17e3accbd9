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
from cases import CASES, Xent, relative_error

WARM_UP_LAPS, MIN_LAPS, LAPS = 3, 8, 20
ENOUGH_MS = 1000  # of laps, if there were MIN_LAPS
SLEEP_CYCLES = 10_000_000  # 5 ms at 2 GHz: longer than it takes to enqueue a lap
COPY_BYTES = 1 << 31
# Relative error in the sum of absolute values: for a softmax the label weighs as much as the rest.
OWN_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8}
# PyTorch rounds log-probabilities of 12 nats to bfloat16.
THEIR_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2.0**-4}


@dataclasses.dataclass
class Timing:
    ms: float
    percentile_20_ms: float
    percentile_80_ms: float
    waited_for_host: bool  # some lap was not enqueued in time: the time holds some of Python's
    result: tuple  # loss and gradients of the first batch


def time_laps(step, batches, before=None):
    """Times step(batch number) -> loss, gradients. What is called `before` a lap is not timed."""
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


def torch_steps(case, batches, form):
    """Steps of eager and compiled torch: {name: step}."""

    def backward_of(loss):
        leaves = [[leaf.detach().requires_grad_() for leaf in leaves] for leaves, _ in batches]

        def step(i):
            value = loss(leaves[i], batches[i][1])
            return value, torch.autograd.grad(value, leaves[i])

        return step

    def one_graph_of(loss):
        compiled = torch.compile(torch.func.grad_and_value(loss), dynamic=False)

        def step(i):
            gradients, value = compiled(*batches[i])
            return value, gradients

        return step

    steps = {}
    for name, loss in case.torch_losses(form).items():
        steps["eager" + name] = backward_of(loss)
        steps["compile" + name] = backward_of(torch.compile(loss, dynamic=False))
        # Loss and gradients compiled together: less traffic than a loss and its backward pass.
        steps["one graph" + name] = one_graph_of(loss)
    return steps


def copy_step(batches):
    """A copy of what has gradients."""
    copies = [[torch.empty_like(leaf) for leaf in leaves] for leaves, _ in batches]

    def step(i):
        torch._foreach_copy_(copies[i], batches[i][0])
        return None, copies[i]

    return step


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
    overwritten = [x.clone().requires_grad_() for (x,), _ in batches]
    try:
        for x, (_, (labels,)) in zip(overwritten, batches, strict=True):
            cross_entropy.cross_entropy_forward(
                x, labels, None, -100, 0.0, 0.0, "mean", None, False
            )
    finally:
        cross_entropy.liger_cross_entropy_kernel = kernel

    def step(i):
        grid, arguments = launches[i]
        kernel[grid](**arguments)
        return arguments["loss_ptr"].sum(), [overwritten[i].detach()]

    def restore():
        with torch.no_grad():
            for x, ((logits,), _) in zip(overwritten, batches, strict=True):
                x.copy_(logits)

    return step, restore


def measure(kernels, case, note):
    """Times of everything in this process: {name: Timing}, ours under "ours"; ours is right."""
    batches, form = case.sample()
    steps = {"ours": (lambda i: case.own(kernels, batches[i], form), None)}
    steps["copy"] = (copy_step(batches), None)
    steps |= {name: (step, None) for name, step in torch_steps(case, batches, form).items()}
    if isinstance(case, Xent) and case.kind == "labels":
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
        loss, gradients = timing.result
        timing.result = None
        if name == "ours":
            ours = loss.sum().item(), gradients
            error = case.own_error(batches[0], form, ours)
            assert error <= OWN_TOLERANCE[case.dtype], f"{case.name}: ours is off by {error:.3g}"
        elif name == "copy":
            assert all(map(torch.equal, gradients, batches[0][0]))
        else:
            error = relative_error(gradients, ours[1])
            error = max(error, abs(loss.item() - ours[0]) / abs(ours[0]))
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
        # In arrays of the sizes of the case, for its bytes.
        "copy_ms": times_ms["copy"] * case.moved_bytes / (2 * case.leaves_bytes),
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
        "copied in arrays of the sizes of what has gradients. ratio: over ours, the best of",
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
