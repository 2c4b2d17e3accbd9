"""Fused loss kernels for TensorFlow and Keras 3: the numbers of `keras.losses`, faster."""

import importlib.util
import os

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "fusedloss needs TensorFlow, which is not installed: python -m pip install "
        "'fusedloss[cpu]', or 'fusedloss[gpu]', or any TensorFlow 2.21."
    )

if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
    # Before Keras itself fails to import a framework that is not installed.
    raise ImportError(
        "fusedloss runs on Keras's TensorFlow backend, but the environment has KERAS_BACKEND="
        f"{os.environ['KERAS_BACKEND']}: set KERAS_BACKEND=tensorflow."
    )

import keras

if keras.config.backend() != "tensorflow":
    raise ImportError(
        f"fusedloss runs on Keras's TensorFlow backend. Keras uses {keras.config.backend()!r}: set "
        "KERAS_BACKEND=tensorflow before anything imports Keras."
    )
if os.environ.get("TF_USE_LEGACY_KERAS", "").lower() in ("1", "true"):
    raise ImportError(
        "fusedloss needs Keras 3, but TF_USE_LEGACY_KERAS asks TensorFlow for tf_keras: unset it."
    )

from fusedloss import _lib, layers, losses, metrics, models, nn, reference
from fusedloss._loss import load_model
from fusedloss.fuse import fuse, register
from fusedloss.penalty import Penalty

_lib.ops()  # Loads the library, or says now why there is none.

__all__ = [
    "Penalty",
    "backend",
    "fuse",
    "layers",
    "load_model",
    "losses",
    "metrics",
    "models",
    "nn",
    "reference",
    "register",
]


def backend():
    """Which implementation runs: "compiled", or "reference" if the library cannot be loaded."""
    return "reference" if _lib.ops() is None else "compiled"
