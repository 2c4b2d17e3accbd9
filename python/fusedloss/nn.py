"""The losses as functions of tensors, one value a row, and the penalty on weights."""

from fusedloss.feature_distance import feature_distance
from fusedloss.penalty import weight_penalty
from fusedloss.pointwise import (
    binary_crossentropy,
    huber,
    log_cosh,
    mean_absolute_error,
    mean_squared_error,
    quantile,
)
from fusedloss.softmax_xent import softmax_xent, sparse_softmax_xent

__all__ = [
    "binary_crossentropy",
    "feature_distance",
    "huber",
    "log_cosh",
    "mean_absolute_error",
    "mean_squared_error",
    "quantile",
    "softmax_xent",
    "sparse_softmax_xent",
    "weight_penalty",
]
