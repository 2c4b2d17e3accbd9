"""The losses in plain TensorFlow: the same signatures, differentiable to any order, not fast.

They say what the compiled kernels must compute, stand in where those cannot be loaded, and give
the second derivatives.
"""

from fusedloss.reference.softmax_xent import softmax_xent, sparse_softmax_xent

__all__ = ["softmax_xent", "sparse_softmax_xent"]
