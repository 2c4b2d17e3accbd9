"""The cases that `fusedloss bench` and `benchmarks/` measure: one module for each loss."""

from fusedloss.cases import feature_distance, penalty, pointwise, softmax_xent
from fusedloss.cases._case import Case, Goal, Setting

_MODULES = (softmax_xent, pointwise, penalty, feature_distance)
CASES = {case.name: case for module in _MODULES for case in module.CASES}


def select(name: str) -> list[Case]:
    """The cases called `name`, or those of the loss called `name`; all of them for "".

    Raises:
      KeyError: there is no such case.
    """
    found = [case for case in CASES.values() if name in ("", case.name, case.name.split("/")[0])]
    if not found:
        raise KeyError(name)
    return found


__all__ = ["CASES", "Case", "Goal", "Setting", "select"]
