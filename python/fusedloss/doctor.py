"""`fusedloss doctor`: what is installed, what runs, and what to do about what does not."""

import itertools
import os
import platform
from importlib import metadata

import keras
import numpy as np
import tensorflow as tf
from rich.markup import escape
from rich.table import Table

from fusedloss import _lib, losses

REBUILD = "rebuild in a clone: python -m pip install --force-reinstall --no-deps ."


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed, run from its source"


def _xla_complaint() -> str:
    """Compiles and runs a small loss with its gradient; "" if they are those of eager mode."""
    predictions = tf.constant(np.random.default_rng(0).standard_normal((4, 6), np.float32))
    labels = tf.constant([0, 5, 2, 2])
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(predictions):
        with tf.GradientTape() as tape:
            tape.watch(predictions)
            value = loss(labels, predictions)
        return value, tape.gradient(value, predictions)

    try:
        compiled = tf.function(step, jit_compile=True)(predictions)
    except Exception as error:  # whatever it is, it is what the user came to see
        return str(error).strip().splitlines()[-1]
    for got, expected in zip(compiled, step(predictions), strict=True):
        if not np.allclose(got, expected, rtol=1e-5, atol=1e-6):
            return "the compiled loss differs from the eager one"
    return ""


def gpu_findings(built) -> list[tuple[str, str, str]]:
    """Rows of `findings` on the GPUs and what they need; `built` is None without a library."""
    gpus, driver = _lib.gpus(), _lib.driver_cuda()
    complaints = []
    if built and gpus:
        complaints = [_lib.library_complaint(built)]
        if built["cuda_architectures"]:
            complaints += [_lib.driver_complaint(built, driver)]
            complaints += [_lib.gpu_complaint(built, driver, *gpu) for gpu in gpus]
    remedies = [complaint.remedy if complaint else "" for complaint in complaints]
    rows = []
    if built:
        architectures = ", ".join(built["cuda_architectures"])
        state = f"{architectures} (CUDA {built['cuda_version']})" if architectures else "none"
        rows.append(("CUDA architectures in the library", state))
    rows.append(("NVIDIA driver", "for CUDA {}.{}".format(*driver) if driver else "none"))
    for name, capability in gpus:
        state = "no CUDA" if capability is None else "compute capability {}.{}".format(*capability)
        rows.append((f"GPU visible: {name}", state))
    if not gpus:
        rows.append(("GPUs visible", "none"))
    return [(*row, remedy) for row, remedy in itertools.zip_longest(rows, remedies, fillvalue="")]


def findings() -> list[tuple[str, str, str]]:
    """(what, its state, what to do); the last is "" where nothing is wrong."""
    rows = []

    def add(what, state, remedy=""):
        rows.append((what, str(state), remedy))

    add("fusedloss", _version("fusedloss"))
    add("Python", platform.python_version())
    add("NumPy", np.__version__)
    add("Keras", keras.__version__)
    backend = keras.backend.backend()
    add(
        "Keras backend",
        backend,
        "" if backend == "tensorflow" else "set KERAS_BACKEND=tensorflow",
    )
    add("TensorFlow", tf.__version__)
    add("TensorFlow's C++ ABI", tf.sysconfig.CXX11_ABI_FLAG)

    try:
        reason = _lib.reason()
    except ImportError as error:  # FUSEDLOSS_REQUIRE_COMPILED=1
        reason = str(error)
    add(
        "implementation",
        f"reference: {reason}" if reason else "compiled",
        f"the losses are right but slow: {REBUILD}, unless the reason names another cure"
        if reason
        else "",
    )
    built = None
    try:
        from fusedloss import _core
    except ImportError as error:
        add("compiled module", error, REBUILD)
    else:
        built = _core.build_info()
        same = built["tensorflow"].split(".")[:2] == tf.__version__.split(".")[:2]
        remedy = f"install tensorflow=={built['tensorflow']}, or {REBUILD}"
        add("built against TensorFlow", built["tensorflow"], "" if same else remedy)
        same = built["cxx11_abi"] == tf.sysconfig.CXX11_ABI_FLAG
        add("built for C++ ABI", built["cxx11_abi"], "" if same else REBUILD)
        add("compiler", built["compiler"])
        add("CPU features", " ".join(_core.cpu_features()))
        add("CPU kernels in the library", ", ".join(built["cpu_levels"]))
        refused = _core.cpu_level_error()
        forced = os.environ.get("FUSEDLOSS_CPU")
        add(
            "CPU kernels chosen",
            _core.cpu_level() + (f" (FUSEDLOSS_CPU={forced})" if forced else ""),
            f"{refused}; unset FUSEDLOSS_CPU" if refused else "",
        )
    rows += gpu_findings(built)
    complaint = _xla_complaint()
    add(
        "XLA",
        complaint or "runs",
        "compile models with jit_compile=False and report this" if complaint else "",
    )
    return rows


def run(console) -> int:
    """Prints the findings. Returns 0, or 1 if something is wrong."""
    table = Table(title="fusedloss doctor", title_justify="left")
    for heading in ("", "what", "state", "what to do"):
        table.add_column(heading, overflow="fold")
    rows = findings()
    for what, state, remedy in rows:
        mark = "[red]✗[/]" if remedy else "[green]✓[/]"
        table.add_row(mark, what, escape(state), escape(remedy))
    console.print(table)
    wrong = sum(bool(remedy) for _, _, remedy in rows)
    console.print(f"{wrong} of {len(rows)} need attention." if wrong else "Nothing is wrong.")
    return 1 if wrong else 0
