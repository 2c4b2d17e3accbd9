"""The losses as functions of tensors, one value a row."""

from fusedloss.softmax_xent import softmax_xent, sparse_softmax_xent

__all__ = ["softmax_xent", "sparse_softmax_xent"]
