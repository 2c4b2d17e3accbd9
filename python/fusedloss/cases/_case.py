"""What a benchmark needs to know of a loss."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

Shape = tuple[int, ...]
# (*targets, predictions) -> scalar loss, the mean over the rows; of a penalty alone () -> scalar.
Loss = Callable[..., object]
Weights = list[tf.Variable]


@dataclass(frozen=True)
class Goal:
    """The speed that is accepted. None: nothing is asked of that comparison."""

    graph: float | None = None
    """At least this many times as fast as the fastest stock form in a graph."""
    xla: float | None = None
    """The same when both are compiled by XLA."""
    floor: float | None = None
    """At most this many times the longer of the bare traffic and the in-cache arithmetic."""
    float32: float | None = None
    """At most this share of the time that the same step takes on float32 predictions."""
    plain: float | None = None
    """At most this many times the time of `Case.plain`."""


@dataclass(frozen=True)
class Setting:
    """One row of a case's default table."""

    shape: Shape
    dtype: str = "float32"
    goal: Goal = field(default_factory=Goal)


@dataclass(frozen=True)
class Case:
    """One loss as it is measured: with its gradient with respect to predictions and weights.

    `shape` is the shape of the predictions; its first axis is the batch. Of a penalty alone it is
    (number of variables, size of the largest).
    """

    name: str
    title: str
    rank: int
    """Rank of the predictions."""
    dtypes: tuple[str, ...]
    """Dtypes of the predictions that the case can be measured with."""
    settings: tuple[Setting, ...]
    sample: Callable[[np.random.Generator, Shape, str], tuple]
    """(generator, shape, dtype) -> (*targets, predictions), tensors or tuples of them, one a layer;
    of a penalty alone ()."""
    fused: Callable[[Shape, Weights], Loss]
    stock: Callable[[Shape, Weights], dict[str, Loss]]
    """The forms a user of Keras would write, by name; the fastest one counts."""
    truth: Callable[..., tuple[float, np.ndarray | None]] | None
    """(*targets, predictions) -> (loss, gradient) in float64, both of the mean over the rows, of
    which the sum over the layers is the truth; None of a penalty alone. The gradient is None in an
    evaluation."""
    raw: Callable[..., Callable[[], object] | None] | None
    """(*targets, predictions) -> our kernel on them, on one thread and without TensorFlow; None for
    dtypes that `_core` does not take. It is timed where everything stays in the L2 cache."""
    bytes_read: Callable[[Shape, str], int]
    """Bytes that any implementation must read."""
    bytes_written: Callable[[Shape, str], int]
    """Bytes that any implementation must write."""
    evaluation: bool = False
    """Whether the loss alone is measured, as in `evaluate`, without a gradient."""
    plain: Callable[[Shape], Loss] | None = None
    """Ours without the options whose price is asked; it has another truth."""
    independent_rows: bool = True
    """Whether the truth of some rows is that of these rows alone."""
    weights: Callable[[np.random.Generator, Shape, str], Weights] = lambda rng, shape, dtype: []
    """(generator, shape, dtype) -> the penalized variables."""
    penalty_truth: Callable[[np.ndarray], tuple[float, np.ndarray]] | None = None
    """A variable's penalty and its gradient, in float64."""


def itemsize(dtype: str) -> int:
    """Bytes of a number."""
    return tf.as_dtype(dtype).size


def size(shape: Shape) -> int:
    """Elements of an array."""
    return int(np.prod(shape))
