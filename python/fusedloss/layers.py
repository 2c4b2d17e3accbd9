"""Keras layers that hold a loss."""

from fusedloss.masked_crossentropy import MaskedCrossentropy

__all__ = ["MaskedCrossentropy"]
