"""The penalty on weights: the functional op, and the object that losses carry."""

import re

import keras
import tensorflow as tf
from keras.src.models import Functional
from keras.src.utils.naming import to_snake_case
from tensorflow.python.ops.parallel_for.pfor import RegisterPFor, wrap

from fusedloss import _lib
from fusedloss._compiled import makes_gradients, penalty_derivatives, scaled_penalty_gradients
from fusedloss.reference._inputs import is_list
from fusedloss.reference.penalty import (
    Coefficients,
    is_callable,
    resolved,
    result_dtype,
    weighted_sum,
)


@tf.RegisterGradient("Fusedloss>Penalty")
def _penalty_gradient(op, dpenalty):
    coefficients, *variables = op.inputs
    return [None, *_lib.ops().fusedloss_penalty_grad(dpenalty, coefficients, variables)]


@tf.RegisterGradient("Fusedloss>PenaltyGrad")
def _gradient_gradient(op, *ddvariables):
    second = penalty_derivatives(op.inputs[0].dtype)
    ddpenalty, _, *dvariables = second(list(ddvariables), *op.inputs)
    return [ddpenalty, None, *dvariables]


@tf.RegisterGradient("Fusedloss>PenaltyReduced")
def _reduced_gradient(op, dpenalty, *_):
    return scaled_penalty_gradients(op.outputs[1:], dpenalty, *op.inputs)


@RegisterPFor("Fusedloss>PenaltyGrad")
def _vectorize_gradient(pfor_input):
    # A Jacobian: the kernel runs once, not once a cotangent. Other loops are left to TensorFlow.
    dpenalty = pfor_input.stacked_input(0)
    places = range(1, pfor_input.num_inputs)
    coefficients, *variables = [pfor_input.unstacked_input(i) for i in places]
    one = tf.ones([], dpenalty.dtype)
    return [
        wrap(tf.tensordot(tf.cast(dpenalty, gradient.dtype), gradient, axes=0))
        for gradient in _lib.ops().fusedloss_penalty_grad(one, coefficients, variables)
    ]


def penalty_sum(coefficients, values, dtype):
    """The penalty, from what `Coefficients.operands` returns, in float32 or float64."""
    ops = _lib.ops()
    if ops is None:
        return weighted_sum(coefficients, *values, dtype=dtype)
    if makes_gradients(values):
        return ops.fusedloss_penalty_reduced(coefficients, values, A=dtype).penalty
    return ops.fusedloss_penalty(coefficients, values, A=dtype)


def weight_penalty(variables, *, l1=0.0, l2=0.0, reduce="sum"):
    """A penalty on the sizes of weights: `Σ_k l1_k * sum(|W_k|) + l2_k * sum(W_k ** 2)`.

    Made for all variables in one pass, whatever their number. With `reduce="sum"` the terms are
    those of `keras.regularizers.L1L2`. The derivative of |W| at 0 is 0.

    Args:
      variables: a variable or tensor, float16, bfloat16, float32 or float64, of any shape; a built
        layer or model, which stands for its trainable variables; a list of these; or a callable
        without arguments that returns one of these.
      l1, l2: finite, not negative: one number, or one a variable.
      reduce: "sum", or "mean" for the mean of each variable in place of its sum.
    Returns:
      A scalar, float64 if any variable is, else float32. Differentiable to any order.
    Raises:
      TypeError: a variable that is not floating point, or something else than a variable.
      ValueError: no variable, or one twice; a layer that is not built; l1, l2 or `reduce` out of
        range.
    """
    coefficients = Coefficients.parse(l1=l1, l2=l2, reduce=reduce)
    table, values = coefficients.operands(resolved(variables))
    return penalty_sum(table, values, result_dtype(values))


REMEDY = (
    "Layers that a subclassed model makes need names of their own (`name=...`) when it is saved; a "
    "model that is loaded can be compiled with a new loss, whose Penalty is given the variables."
)


def _ends_alike(path, other):
    """Whether one path is the end of the other: loading, Keras drops the names of outer models."""
    path, other = f"/{path}", f"/{other}"
    return path.endswith(other) or other.endswith(path)


def _numbered_anew(model):
    """Ids of the variables of layers that Keras names by counting whenever the model is made.

    Not those whose names stand in the config of a functional or sequential model.
    """
    named = isinstance(model, Functional | keras.Sequential)
    found = set()
    for layer in model._flatten_layers(include_self=False, recursive=False):
        counted = re.fullmatch(rf"{to_snake_case(type(layer).__name__)}(_\d+)?", layer.name)
        if counted and not named:
            found.update(map(id, layer.variables))
        else:
            found |= _numbered_anew(layer)
    return found


@keras.saving.register_keras_serializable(package="fusedloss")
class Penalty:
    """A penalty on weights that a loss of this package adds to itself, once a step.

    `Σ_k l1_k * sum(|W_k|) + l2_k * sum(W_k ** 2)`, as of `fusedloss.nn.weight_penalty`. Called, it
    returns the scalar.

    Layers and models are replaced by their trainable variables here and now; a callable is called
    anew at each use. A config keeps the paths of the variables, not the variables: an object made
    from it has to be bound to a model before it is used. Layers that a subclassed model makes need
    names of their own for that: the others are numbered anew in every process.

    Args:
      variables, l1, l2, reduce: as in `fusedloss.nn.weight_penalty`. A list of strings holds paths
        of Keras variables, which `bind` will find.
    Raises:
      TypeError, ValueError: as there; of what a callable returns, when it is used.

    The mean square of one kernel:

    ```python
    penalty = fusedloss.Penalty(model.layers[0].kernel, l2=0.01, reduce="mean")
    model.compile("adam", loss=fusedloss.losses.Huber(penalty=penalty))
    ```
    """

    def __init__(self, variables, *, l1=0.0, l2=0.0, reduce="sum"):
        self._coefficients = Coefficients.parse(l1=l1, l2=l2, reduce=reduce)
        kinds = {type(x) for x in variables} if is_list(variables) else set()
        by_path = kinds == {str}
        if not is_callable(variables):
            variables = list(variables) if by_path else resolved(variables)
            self._coefficients.check(len(variables))
        self._variables, self._paths = (None, variables) if by_path else (variables, None)

    def __call__(self):
        """The penalty, a scalar."""
        table, values = self.operands()
        return penalty_sum(table, values, result_dtype(values))

    def operands(self, replicas=1):
        """`Coefficients.operands` of the variables."""
        if self._paths is not None:
            raise ValueError(
                f"The penalty is on variables that it knows by path alone ({self._paths}): find "
                "them with `loss.bind(model)`, or load the model with `fusedloss.load_model(path)`."
            )
        return self._coefficients.operands(resolved(self._variables), replicas)

    def bind(self, model):
        """Takes the variables of `model` that have the paths of the present ones, or end like them.

        Returns:
          Itself.
        Raises:
          ValueError: the model has no or several variables of such a path; the path is that of a
            layer without a name of its own in a subclassed model or layer.
        """
        found, numbered_anew = [], _numbered_anew(model)
        for path in self._known_paths():
            candidates = [variable for variable in model.variables if variable.path == path]
            if not candidates:
                candidates = [x for x in model.variables if _ends_alike(x.path, path)]
            if len(candidates) != 1:
                present = sorted(variable.path for variable in model.variables)
                raise ValueError(
                    f"The penalty needs one variable {path!r}, and the model {model.name!r} has "
                    f"{len(candidates)}. Its variables: {', '.join(present) or 'none'}. {REMEDY}"
                )
            if self._paths is not None and id(candidates[0]) in numbered_anew:
                raise ValueError(
                    f"The penalty knows a variable by the path {path!r}, but Keras numbers that "
                    f"layer of {model.name!r} anew in every process: it may be another. {REMEDY}"
                )
            found += candidates
        self._variables, self._paths = resolved(found), None
        return self

    def _known_paths(self):
        if self._paths is not None:
            return self._paths
        variables = resolved(self._variables)
        for variable in variables:
            if not isinstance(variable, keras.Variable):
                raise ValueError(
                    "A penalty is saved, and bound anew, by the paths of Keras variables. Got "
                    f"{variable!r}: give Keras variables or layers, or save the model without its "
                    "loss."
                )
        return [variable.path for variable in variables]

    def get_config(self):
        return {
            "variables": self._known_paths(),
            "l1": self._coefficients.l1.tolist(),
            "l2": self._coefficients.l2.tolist(),
            "reduce": self._coefficients.reduce,
        }

    @classmethod
    def from_config(cls, config):
        return cls(**config)
