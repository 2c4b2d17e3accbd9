"""The losses in plain TensorFlow: the same signatures, differentiable to any order, not fast.

They say what the compiled kernels must compute, stand in where those cannot be loaded, and give
the second derivatives.
"""

from fusedloss.reference.feature_distance import feature_distance
from fusedloss.reference.penalty import weight_penalty
from fusedloss.reference.pointwise import (
    binary_crossentropy,
    huber,
    log_cosh,
    mean_absolute_error,
    mean_squared_error,
    quantile,
)
from fusedloss.reference.softmax_xent import softmax_xent, sparse_softmax_xent

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
