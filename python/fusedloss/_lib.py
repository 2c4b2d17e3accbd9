"""Loads the compiled ops once, or says why the reference implementation is used instead."""

import ctypes
import os
import pathlib
import re
import threading
import warnings
from typing import NamedTuple

import tensorflow as tf

DRIVER = "libcuda.so.1"
LIBRARY = pathlib.Path(__file__).with_name("libfusedloss.so")
_lock = threading.Lock()
_state = None  # (op module or None, why it is None)


class Complaint(NamedTuple):
    """Why the library cannot serve a machine with a GPU."""

    reason: str
    remedy: str


def _release(version):
    """`2.21` of `2.21.0-rc1`: TensorFlow keeps its C++ ABI within such a release only."""
    return ".".join(version.split(".")[:2])


def driver_cuda():
    """The newest CUDA that the NVIDIA driver runs, as (major, minor); None without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


def gpus():
    """(name, compute capability as (major, minor), or None) of each GPU that TensorFlow sees."""
    found = []
    for gpu in tf.config.get_visible_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        name = f"{gpu.name.removeprefix('/physical_device:')} {details.get('device_name', '')}"
        found.append((name.strip(), details.get("compute_capability")))
    return found


def library_complaint(build):
    """What is wrong with a library for a machine that has GPUs, or None."""
    if build["cuda_architectures"]:
        return None
    return Complaint(
        "TensorFlow sees a GPU and the library was built without CUDA",
        "rebuild with a CUDA compiler on the path, or hide the GPU (CUDA_VISIBLE_DEVICES=-1) to "
        "use the CPU kernels",
    )


def driver_complaint(build, driver):
    """What is wrong with the driver for the library, or None."""
    if driver is None:
        return Complaint(
            f"the NVIDIA driver cannot be asked for its version ({DRIVER})",
            "install an NVIDIA driver, or hide the GPU: CUDA_VISIBLE_DEVICES=-1",
        )
    # A driver runs the code of every release of its CUDA's major version.
    needed = int(build["cuda_version"].split(".")[0])
    if driver[0] >= needed:
        return None
    return Complaint(
        f"the NVIDIA driver is for CUDA {driver[0]}.{driver[1]}, and the library was built with "
        f"CUDA {build['cuda_version']}",
        f"update the driver to one for CUDA {needed} or newer, or install the build of fusedloss "
        f"for CUDA {driver[0]}, or hide the GPU: CUDA_VISIBLE_DEVICES=-1",
    )


def _covers(architecture, capability, translates):
    major, minor, only, ptx = re.fullmatch(r"(\d+)(\d)([af]?)(-ptx)?", architecture).groups()
    major, minor = int(major), int(minor)
    if only == "a":  # 90a, of instructions that no other has
        return capability == (major, minor) and (not ptx or translates)
    if ptx and not only:
        return translates and capability >= (major, minor)
    # Machine code: for this major version, from this minor one on. So is the PTX of a family.
    return capability[0] == major and capability[1] >= minor and (not ptx or translates)


def gpu_complaint(build, driver, name, capability):
    """What is wrong with a GPU for the library, or None."""
    hide = "hide the GPU: CUDA_VISIBLE_DEVICES with the others alone, or -1"
    if capability is None:
        return Complaint(f"{name} has no CUDA compute capability", hide)
    # A driver translates the PTX of no CUDA newer than its own.
    version = tuple(int(part) for part in build["cuda_version"].split(".")[:2])
    translates = driver is not None and driver >= version
    architectures = build["cuda_architectures"]
    if any(_covers(architecture, capability, translates) for architecture in architectures):
        return None
    remedy = (
        "rebuild from source with CMAKE_CUDA_ARCHITECTURES="
        f"{capability[0]}{capability[1]}, or {hide}"
    )
    if any(_covers(architecture, capability, True) for architecture in architectures):
        remedy = f"update the NVIDIA driver to one for CUDA {build['cuda_version']}, or {remedy}"
    return Complaint(
        f"{name} has compute capability {capability[0]}.{capability[1]}, which is not among those "
        f"that the library runs on ({', '.join(architectures)})",
        remedy,
    )


def gpu_reason(build):
    """Why the library cannot serve the GPUs of this machine, or an empty string."""
    visible = gpus()
    if not visible:
        return ""
    complaint = library_complaint(build)
    if complaint is None:
        driver = driver_cuda()
        complaints = [gpu_complaint(build, driver, *gpu) for gpu in visible]
        complaint = next(filter(None, [*complaints, driver_complaint(build, driver)]), None)
    return f"{complaint.reason}; {complaint.remedy}" if complaint else ""


def _reason_not_to_load():
    if not LIBRARY.exists():
        return f"this installation has no compiled library ({LIBRARY.name})"
    try:
        from fusedloss import _core
    except ImportError as error:
        return f"the compiled module cannot be imported: {error}"
    build = _core.build_info()
    if _release(build["tensorflow"]) != _release(tf.__version__):
        return (
            f"the library was built for TensorFlow {_release(build['tensorflow'])}, and TensorFlow "
            f"{tf.__version__} is installed; install tensorflow=={_release(build['tensorflow'])}.* "
            "or build fusedloss from source against yours"
        )
    if build["cxx11_abi"] != tf.sysconfig.CXX11_ABI_FLAG:
        return (
            f"the library was built with _GLIBCXX_USE_CXX11_ABI={build['cxx11_abi']}, TensorFlow "
            f"with {tf.sysconfig.CXX11_ABI_FLAG}; build fusedloss from source against yours"
        )
    return gpu_reason(build)


def _load():
    reason = _reason_not_to_load()
    module = None
    if not reason:
        try:
            module = tf.load_op_library(str(LIBRARY))
        except (tf.errors.OpError, OSError) as error:
            reason = f"TensorFlow cannot load {LIBRARY.name}: {error}"
    if reason and os.environ.get("FUSEDLOSS_REQUIRE_COMPILED") == "1":
        raise ImportError(f"FUSEDLOSS_REQUIRE_COMPILED=1, but {reason}.")
    if reason:
        warnings.warn(
            f"fusedloss uses its reference implementation, which is slow: {reason}. "
            "`fusedloss doctor` tells more.",
            RuntimeWarning,
            stacklevel=1,
        )
    if module:
        from fusedloss import _core

        if error := _core.cpu_level_error():
            warnings.warn(
                f"{error}. Got {os.environ['FUSEDLOSS_CPU']!r}; the {_core.cpu_level()} kernels "
                "run.",
                RuntimeWarning,
                stacklevel=1,
            )
    return module, reason


def _loaded():
    # Loading a second copy of an XLA op aborts the process: load under a lock, and once.
    global _state
    with _lock:
        if _state is None:
            _state = _load()
    return _state


def ops():
    """The module of compiled ops, or None: use the reference."""
    return _loaded()[0]


def reason():
    """Why `ops()` is None, or an empty string."""
    return _loaded()[1]
