"""Loads the compiled ops once, or says why the reference implementation is used instead."""

import os
import pathlib
import threading
import warnings

import tensorflow as tf

LIBRARY = pathlib.Path(__file__).with_name("libfusedloss.so")
_lock = threading.Lock()
_state = None  # (op module or None, why it is None)


def _release(version):
    """`2.21` of `2.21.0-rc1`: TensorFlow keeps its C++ ABI within such a release only."""
    return ".".join(version.split(".")[:2])


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
    if not build["cuda_architectures"] and tf.config.list_physical_devices("GPU"):
        return (
            "TensorFlow sees a GPU and the library was built without CUDA; hide the GPU "
            "(CUDA_VISIBLE_DEVICES=-1) to use the CPU kernels"
        )
    return ""


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
