"""How speed, memory and error are measured, for `fusedloss bench` and `benchmarks/`.

Every number is that of a loss and its gradient with respect to predictions and weights, or of a
loss alone where a case says so, in one `tf.function` whose inputs are arguments and variables:
TensorFlow folds a loss of constants away.
"""

import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
import tensorflow as tf

import fusedloss
from fusedloss.cases import Case, Goal, Setting
from fusedloss.cases._case import Loss, Shape, Weights

MODES = ("graph", "xla")
FUSED = "fusedloss"
FUSED_FLOAT32 = "fusedloss float32"
FUSED_PLAIN = "fusedloss plain"
# Keys of what is timed beside the forms.
TRAFFIC, ARITHMETIC = "bare traffic", "arithmetic"
ROUNDS, QUICK_ROUNDS = 20, 5
# A sample shorter than this is lost in the clock's and the scheduler's noise.
SAMPLE_S = 0.02
# Bytes of the truth's gradient that are computed at a time.
TRUTH_BYTES = 32 << 20
# Half of the 1 MiB of L2 cache that a server core has today.
IN_CACHE_BYTES = 512 << 10

try:
    from fusedloss import _core
except ImportError:  # the reference implementation is measured, without the bare traffic
    _core = None


@dataclass
class Timing:
    """One line of a table: one form of the loss in one mode."""

    mode: str
    form: str
    samples_ms: list[float] = field(default_factory=list)
    """Milliseconds of one step, one sample a round."""
    loss_error: float | None = None
    """|loss - truth| / |truth|; None of another loss, for comparison."""
    gradient_error: float | None = None
    """max |gradient - truth| / max |truth|, of the worst of several; None without any, likewise."""
    extra_bytes: int | None = None
    """Peak memory of a step above its inputs and gradients; None where it cannot be read."""

    @property
    def key(self) -> str:
        return f"{self.mode} {self.form}"

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))


@dataclass
class Result:
    """What was measured for one shape and dtype of a case."""

    case: str
    title: str
    shape: Shape
    dtype: str
    goal: Goal
    traffic_bytes: int
    """Bytes that any implementation must move."""
    traffic: str
    """The bare traffic that stands for them: "copy" (as much written as read) or "triad"."""
    timings: list[Timing]
    traffic_ms: list[float] = field(default_factory=list)
    """Samples of the bare traffic; empty without `_core`."""
    arithmetic_ms: list[float] = field(default_factory=list)
    """Samples of our kernel where memory costs nothing, scaled to all elements and threads."""

    @property
    def rows(self) -> int:
        return self.shape[0]

    def timing(self, mode: str, form: str) -> Timing | None:
        found = [t for t in self.timings if (t.mode, t.form) == (mode, form)]
        return found[0] if found else None

    def fused(self, mode: str) -> Timing:
        return self.timing(mode, FUSED)

    def fastest_stock(self, mode: str) -> Timing:
        stock = [t for t in self.timings if t.mode == mode and not t.form.startswith(FUSED)]
        return min(stock, key=lambda t: t.median_ms)

    def floor_ms(self) -> float | None:
        """The longer of the bare traffic and the in-cache arithmetic."""
        samples = [s for s in (self.traffic_ms, self.arithmetic_ms) if s]
        return max(float(np.median(s)) for s in samples) if self.traffic_ms else None


def parse_shape(text: str) -> Shape:
    """Shape written as "1024x32000".

    Raises:
      ValueError: not positive integers joined by "x".
    """
    shape = tuple(int(size) for size in text.split("x"))
    if min(shape) < 1:
        raise ValueError(f"sizes of a shape to measure are positive, got {text}")
    return shape


def threads() -> int:
    """Threads that TensorFlow gives an op."""
    return tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count()


def machine() -> dict:
    """What the numbers depend on and a reader cannot see from them."""
    cpu = platform.processor()
    if os.path.exists("/proc/cpuinfo"):  # platform.processor() is empty on most Linux systems
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": threads(),
        "kernels": _core.cpu_level() if _core else "none",
        "backend": fusedloss.backend(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }


def step(
    loss: Loss, mode: str, inputs: tuple, weights: Weights = (), evaluation: bool = False
) -> Callable:
    """(*inputs) -> (loss, gradients) in a graph of its own, as a training step has it.

    The gradients are those of the last input, the predictions of one layer or of several, and of
    the weights; there are none in an evaluation. Traced for inputs like those given.
    """

    @tf.function(jit_compile=mode == "xla")
    def run(*inputs):
        if evaluation:
            return loss(*inputs), []
        predictions = tf.nest.flatten(inputs[-1:])
        with tf.GradientTape() as tape:
            tape.watch(predictions)
            value = loss(*inputs)
        return value, tape.gradient(value, [*predictions, *weights])

    return run.get_concrete_function(*inputs)


def losses_of(case: Case, setting: Setting, weights: Weights = ()) -> dict[str, Loss]:
    """The forms that are compared, ours first."""
    forms = {FUSED: case.fused(setting.shape, weights), **case.stock(setting.shape, weights)}
    if setting.goal.float32:
        forms[FUSED_FLOAT32] = forms[FUSED]
    if case.plain:
        forms[FUSED_PLAIN] = case.plain(setting.shape)
    return forms


def sample(case: Case, setting: Setting) -> tuple[tuple, Weights]:
    """Inputs and weights of one setting, the same in every process."""
    rng = np.random.default_rng(0)
    inputs = case.sample(rng, setting.shape, setting.dtype)
    return inputs, case.weights(rng, setting.shape, setting.dtype)


def calls_per_sample(call: Callable[[], object]) -> int:
    """How often to repeat `call` so that a sample is long enough to be timed."""
    start = time.perf_counter()
    call()
    return max(1, math.ceil(SAMPLE_S / (time.perf_counter() - start)))


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call by key, `rounds` samples each.

    Every round times every call once, in a new order: what the machine does meanwhile, and what
    one call leaves in the caches of the next, falls on all of them alike.
    """
    for call in calls.values():
        for _ in range(3):
            call()
    repeats = {key: calls_per_sample(call) for key, call in calls.items()}
    samples = {key: [] for key in calls}
    order = np.random.default_rng(0)
    keys = list(calls)
    for _ in range(rounds):
        for index in order.permutation(len(keys)):
            key = keys[index]
            start = time.perf_counter()
            for _ in range(repeats[key]):
                calls[key]()
            samples[key].append((time.perf_counter() - start) * 1e3 / repeats[key])
    return samples


def bare_traffic(case: Case, setting: Setting) -> tuple[str, int]:
    """The plain memory traffic nearest to that of the case.

    Returns:
      "copy" or "triad" (two reads for a write), and the arrays it moves.
    """
    read = case.bytes_read(setting.shape, setting.dtype)
    written = case.bytes_written(setting.shape, setting.dtype)
    return ("triad", 3) if read > 1.5 * written else ("copy", 2)


def moved_bytes(case: Case, shape: Shape, dtype: str) -> int:
    """Bytes that any implementation must move."""
    return case.bytes_read(shape, dtype) + case.bytes_written(shape, dtype)


def in_cache_shape(case: Case, setting: Setting) -> Shape:
    """A few rows of the setting's predictions, cut so that a step on them stays in an L2 cache."""
    shape = (1, *setting.shape[1:])
    while shape[-1] > 1 and moved_bytes(case, shape, setting.dtype) > IN_CACHE_BYTES / 4:
        shape = (*shape[:-1], shape[-1] // 2)
    rows = max(1, IN_CACHE_BYTES // moved_bytes(case, shape, setting.dtype))
    return (rows, *shape[1:])


def in_cache_step(case: Case, setting: Setting) -> Callable[[], object] | None:
    """Our kernel on one thread where memory costs nothing, or None if the case has no such."""
    if _core is None or case.raw is None:
        return None
    shape = in_cache_shape(case, setting)
    inputs = case.sample(np.random.default_rng(0), shape, setting.dtype)
    return case.raw(*(x.numpy() for x in inputs))


def exact(case: Case, inputs: list, weights: list) -> tuple[float, list[np.ndarray]]:
    """Loss and gradients of the whole batch, from NumPy arrays; no gradients of an evaluation.

    `case.truth` is given chunks of rows that keep its temporaries small, if rows are independent.
    """
    loss, gradients = 0.0, []
    layers = zip(*(x if isinstance(x, tuple) else [x] for x in inputs), strict=True)
    for *targets, predictions in layers:
        rows = len(predictions)
        gradient = np.empty(predictions.shape)
        chunk = max(1, TRUTH_BYTES // (gradient[:1].nbytes or 1)) if case.independent_rows else rows
        for start in range(0, rows, chunk):
            part = slice(start, start + chunk)
            share = len(predictions[part]) / rows
            of_part = [x[part] for x in (*targets, predictions)]
            part_loss, part_gradient = case.truth(*of_part)
            loss += share * part_loss
            if not case.evaluation:
                gradient[part] = share * part_gradient
        if not case.evaluation:
            gradients.append(gradient)
    for weight in weights:
        value, gradient = case.penalty_truth(weight)
        loss += value
        gradients.append(gradient)
    return loss, gradients


def errors(measured: tuple, truth: tuple[float, list[np.ndarray]]) -> tuple[float, float | None]:
    """Relative errors of the loss and of the worst gradient: see Timing."""
    loss, gradients = measured
    truth_loss, truth_gradients = truth
    of_gradients = []
    for gradient, truth_gradient in zip(gradients, truth_gradients, strict=True):
        largest = worst = 0.0
        for row, truth_row in zip(gradient.numpy(), truth_gradient, strict=True):
            worst = max(worst, np.abs(row.astype(np.float64) - truth_row).max())
            largest = max(largest, np.abs(truth_row).max())
        of_gradients.append(float(worst / largest))
    return abs(float(loss) - truth_loss) / abs(truth_loss), max(of_gradients, default=None)


def blank(case: Case, setting: Setting) -> Result:
    """The result of a setting before anything is measured."""
    return Result(
        case=case.name,
        title=case.title,
        shape=setting.shape,
        dtype=setting.dtype,
        goal=setting.goal,
        traffic_bytes=moved_bytes(case, setting.shape, setting.dtype),
        traffic=bare_traffic(case, setting)[0],
        timings=[Timing(mode, form) for mode in MODES for form in losses_of(case, setting)],
    )


def keys(case: Case, setting: Setting) -> list[str]:
    """What is timed: every form, and where there is a compiled library what it is held against."""
    found = [timing.key for timing in blank(case, setting).timings]
    if _core:
        found.append(TRAFFIC)
    if in_cache_step(case, setting):
        found.append(ARITHMETIC)
    return found


def prepare(case: Case, setting: Setting) -> tuple[Result, dict[str, Callable[[], object]]]:
    """Everything but the time: a result with the errors, and the calls to be timed by `keys`."""
    result = blank(case, setting)
    given, weights = sample(case, setting)
    truth = exact(case, *tf.nest.map_structure(lambda x: x.numpy(), (list(given), weights)))
    forms = losses_of(case, setting, weights)
    calls = {}
    for timing in result.timings:
        inputs = given
        if timing.form == FUSED_FLOAT32:
            inputs = [tf.cast(x, "float32") if x.dtype.is_floating else x for x in given]
        run = step(forms[timing.form], timing.mode, inputs, weights, case.evaluation)
        measured = run(*inputs)
        if timing.form != FUSED_PLAIN:
            timing.loss_error, timing.gradient_error = errors(measured, truth)
        calls[timing.key] = lambda run=run, inputs=inputs: run(*inputs)[0].numpy()
    if _core:
        kind, streams = bare_traffic(case, setting)
        size = max(1, result.traffic_bytes // (4 * streams))
        # Made once: a copy into fresh pages costs several times the traffic.
        buffers = [np.ones(size, np.float32) for _ in range(streams)]
        calls[TRAFFIC] = lambda: getattr(_core, kind)(*buffers, threads())
    if raw := in_cache_step(case, setting):
        calls[ARITHMETIC] = raw
    return result, calls


def record(result: Result, samples: dict[str, list[float]], case: Case, setting: Setting) -> None:
    """Puts the milliseconds of the calls of `prepare` into the result."""
    for timing in result.timings:
        timing.samples_ms = samples[timing.key]
    if TRAFFIC in samples:
        result.traffic_ms = samples[TRAFFIC]
    if ARITHMETIC in samples:
        elements = math.prod(in_cache_shape(case, setting)) * threads()
        growth = math.prod(setting.shape) / elements
        result.arithmetic_ms = [ms * growth for ms in samples[ARITHMETIC]]


def measure(case: Case, setting: Setting, rounds: int = ROUNDS) -> Result:
    """Times and checks every form of the loss, interleaved, in this process."""
    result, calls = prepare(case, setting)
    record(result, interleave(calls, rounds), case, setting)
    return result
