"""Keras losses, fused."""

from fusedloss.softmax_xent import CategoricalCrossentropy, SparseCategoricalCrossentropy

__all__ = ["CategoricalCrossentropy", "SparseCategoricalCrossentropy"]
