"""A penalty on the sizes of weights, in TensorFlow.

Over variables W_k, with coefficients l1_k and l2_k:

    penalty = Σ_k  l1_k·Σ_i |W_k[i]| + l2_k·Σ_i W_k[i]²

Means instead of sums are coefficients divided by the sizes. The derivative of |W| at 0 is 0, and a
coefficient of 0 takes its term away, whatever the weights hold.
"""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from fusedloss.reference._inputs import FLOATS, is_list, loss_dtype, weight, weights


def _coefficient(name, given):
    if is_list(given):
        return weights(name, given, "one a variable, or a number")
    return np.float64(weight(name, given))


@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients:
    """How much each variable is penalized."""

    l1: np.ndarray  # [] or [variables]
    l2: np.ndarray
    reduce: str

    @classmethod
    def parse(cls, *, l1, l2, reduce):
        """Checks what users give; ValueError names the argument."""
        if reduce not in ("sum", "mean"):
            raise ValueError(f"`reduce` must be 'sum' or 'mean'. Got {reduce!r}.")
        return cls(_coefficient("l1", l1), _coefficient("l2", l2), reduce)

    def check(self, count):
        """Raises ValueError if these are not for `count` variables."""
        for name, given in (("l1", self.l1), ("l2", self.l2)):
            if given.ndim and given.size != count:
                raise ValueError(
                    f"`{name}` has {given.size} entries for {count} variables: give one number, or "
                    "one a variable."
                )

    def operands(self, variables, replicas=1):
        """Coefficients and values, as `weighted_sum` and the compiled ops take them.

        Args:
          variables: what `resolved` returns.
          replicas: of a strategy: each takes its share.
        Returns:
          The factors of sums, float64 `[variables, 2]`, constant unless a mean is over a size that
          is not known yet; the variables as tensors.
        """
        self.check(len(variables))
        values = [tf.convert_to_tensor(variable) for variable in variables]
        table = np.stack([np.broadcast_to(x, len(values)) for x in (self.l1, self.l2)], axis=1)
        table = table / replicas
        if self.reduce == "mean":
            sizes = [value.shape.num_elements() for value in values]
            if None not in sizes:
                table /= np.maximum(sizes, 1)[:, None]
            else:
                sizes = tf.stack([tf.size(value, tf.int64) for value in values])
                table /= tf.cast(tf.maximum(sizes, 1), tf.float64)[:, None]
        return table, values


def _name(variable, position):
    name = getattr(variable, "path", None) or getattr(variable, "name", None)
    return f"variable {name!r}" if isinstance(name, str) else f"the variable at position {position}"


def is_callable(given):
    """Whether an argument `variables` is to be called anew at each use."""
    return callable(given) and not isinstance(given, keras.layers.Layer)


def _identity(variable):
    """That of a Keras variable is its backend's: its `value` may be a cast, made anew each time."""
    value = getattr(variable, "_value", None)
    return id(variable if value is None else value)


def resolved(given):
    """The variables and tensors that an argument `variables` stands for, in order.

    Args:
      given: a variable, tensor or array, a layer or model, a list of these, or a callable that
        returns them. Layers and models stand for their trainable variables; what several of them
        stand for counts once.
    Raises:
      TypeError: something else; a variable that is not floating point.
      ValueError: nothing; a variable listed twice; a layer that is not built.
    """
    if is_callable(given):
        given = given()
    variables, listed = {}, set()
    for item in given if isinstance(given, list | tuple) else [given]:
        if isinstance(item, keras.layers.Layer):
            if not item.built:
                raise ValueError(
                    f"`variables` holds {item.name!r}, which is not built and has no variables "
                    "yet: build it first, by a call or by its `build(input_shape)`."
                )
            found = item.trainable_variables
        elif isinstance(item, keras.Variable | tf.Variable | tf.Tensor | np.ndarray):
            found = [item]
            if _identity(item) in listed:
                raise ValueError(
                    f"`variables` holds {_name(item, len(variables))} twice: list it once."
                )
            listed.add(_identity(item))
        else:
            raise TypeError(
                "`variables` must be variables, tensors, layers, a model, or a callable without "
                f"arguments that returns these. Got {item!r}."
            )
        for variable in found:
            variables.setdefault(_identity(variable), variable)
    variables = list(variables.values())
    if not variables:
        raise ValueError(
            f"`variables` must hold at least one. Got {given!r}: layers and models stand for their "
            "trainable variables, and have none where they are frozen."
        )
    for position, variable in enumerate(variables):
        if tf.as_dtype(variable.dtype) not in FLOATS:
            raise TypeError(
                "Penalized variables must be float16, bfloat16, float32 or float64. Got "
                f"{_name(variable, position)} of type {tf.as_dtype(variable.dtype).name}."
            )
    return variables


def weighted_sum(coefficients, *values, dtype):
    """The penalty, on tensors as the compiled op takes them.

    Args:
      coefficients: float64 `[variables, 2]`: l1 and l2.
      values: float, of any shapes.
      dtype: of the result. Sums over float64 are made in it, the others in float32.
    """
    total = tf.zeros([], dtype)
    for k, value in enumerate(values):
        value = tf.cast(value, loss_dtype(value))
        factors = tf.cast(coefficients[k], value.dtype)
        for factor, size in ((factors[0], tf.abs), (factors[1], tf.square)):
            # 0 times infinity is no term.
            counted = tf.where(factor != 0, value, tf.zeros([], value.dtype))
            total += tf.cast(factor * tf.reduce_sum(size(counted)), dtype)
    return total


def result_dtype(values):
    """float64 if any of the values is, else float32."""
    return tf.float64 if any(value.dtype == tf.float64 for value in values) else tf.float32


def weight_penalty(variables, *, l1=0.0, l2=0.0, reduce="sum"):
    """`fusedloss.nn.weight_penalty` in plain TensorFlow: the same arguments, results and errors."""
    coefficients = Coefficients.parse(l1=l1, l2=l2, reduce=reduce)
    table, values = coefficients.operands(resolved(variables))
    return weighted_sum(table, *values, dtype=result_dtype(values))
