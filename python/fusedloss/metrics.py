"""Keras metrics that go with the losses."""

from fusedloss.softmax_xent import SubsetAccuracy

__all__ = ["SubsetAccuracy"]
