"""Keras metrics that go with the losses."""

from fusedloss.crossentropy_metrics import CrossentropyMetric, crossentropy_metrics
from fusedloss.softmax_xent import SubsetAccuracy

__all__ = ["CrossentropyMetric", "SubsetAccuracy", "crossentropy_metrics"]
