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
from fusedloss.softmax_xent import (
    CategoricalCrossentropy,
    CategoricalFocalCrossentropy,
    SparseCategoricalCrossentropy,
)

__all__ = [
    "BinaryCrossentropy",
    "BlendedLoss",
    "CategoricalCrossentropy",
    "CategoricalFocalCrossentropy",
    "FeatureDistance",
    "Huber",
    "LogCosh",
    "MeanAbsoluteError",
    "MeanSquaredError",
    "PerceptualLoss",
    "Quantile",
    "SparseCategoricalCrossentropy",
]
