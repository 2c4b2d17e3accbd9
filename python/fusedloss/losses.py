"""Keras losses, fused."""

from fusedloss.pointwise import (
    BinaryCrossentropy,
    Huber,
    LogCosh,
    MeanAbsoluteError,
    MeanSquaredError,
    Quantile,
)
from fusedloss.softmax_xent import CategoricalCrossentropy, SparseCategoricalCrossentropy

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "Huber",
    "LogCosh",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "Quantile",
    "SparseCategoricalCrossentropy",
]
