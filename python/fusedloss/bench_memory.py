"""Peak memory of a step, read in a process of its own.

TensorFlow's oneDNN build keeps freed buffers in a pool, where the peak of a step cannot be seen
from outside, and its own statistics do not know what a kernel takes from malloc. This process
turns the pool off and has malloc return every large block to the kernel at once; what is resident
before a step is then what the process holds, and the kernel's high-water mark (VmHWM), reset just
before, what the step needed, whoever allocated it.

    python -m fusedloss.bench_memory CASE SHAPE DTYPE [CASE SHAPE DTYPE ...]
"""

import json
import os
import re
import subprocess
import sys

import numpy as np

ENVIRONMENT = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    # The parent has said all of it.
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
STEPS = 3


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as status:
        return int(re.search(rf"^{key}:\s+(\d+) kB", status.read(), re.MULTILINE)[1]) << 10


def _extra_bytes(run, inputs) -> int:
    """Median peak of a step above what the process held before and the gradients it returns."""
    # Warm up on the same shape: code, threads and XLA's compilation are not the step's.
    for _ in range(2):
        run(*inputs)
    peaks = []
    for _ in range(STEPS):
        with open("/proc/self/clear_refs", "w") as clear:
            clear.write("5")  # VmHWM falls to VmRSS
        before = _status_bytes("VmRSS")
        _, gradients = run(*inputs)
        peaks.append(_status_bytes("VmHWM") - before)
        gradient_bytes = sum(x.dtype.size * int(np.prod(x.shape)) for x in gradients)
        del gradients
    return max(0, int(np.median(peaks)) - gradient_bytes)


def _main(words: list[str]) -> None:
    from fusedloss.bench import MODES, losses_of, parse_shape, sample, step
    from fusedloss.cases import CASES, Setting

    peaks = []
    for name, shape, dtype in zip(words[0::3], words[1::3], words[2::3], strict=True):
        case, setting = CASES[name], Setting(parse_shape(shape), dtype)
        inputs, weights = sample(case, setting)
        peaks.append(
            {
                f"{mode} {form}": _extra_bytes(
                    step(loss, mode, inputs, weights, case.evaluation), inputs
                )
                for mode in MODES
                for form, loss in losses_of(case, setting, weights).items()
            }
        )
    json.dump(peaks, sys.stdout)


def add_peak_memory(results: list) -> None:
    """Fills `extra_bytes` of the timings; leaves None where that cannot be read (not Linux)."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return
    words = [word for r in results for word in (r.case, "x".join(map(str, r.shape)), r.dtype)]
    answer = subprocess.run(
        [sys.executable, "-m", "fusedloss.bench_memory", *words],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        check=True,
    )
    for result, peaks in zip(results, json.loads(answer.stdout), strict=True):
        for timing in result.timings:
            timing.extra_bytes = peaks.get(timing.key)


if __name__ == "__main__":
    _main(sys.argv[1:])
