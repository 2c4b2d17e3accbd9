"""Keras losses, fused."""

from fusedloss.blended import BlendedLoss
from fusedloss.feature_distance import FeatureDistance
from fusedloss.perceptual import PerceptualLoss
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
    "BlendedLoss",
    "CategoricalCrossentropy",
    "FeatureDistance",
    "Huber",
    "LogCosh",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "PerceptualLoss",
    "Quantile",
    "SparseCategoricalCrossentropy",
]
