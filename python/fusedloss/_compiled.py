"""Calls of the compiled ops and their derivatives, once for all losses.

A loss X of the library is four ops, whose first inputs, at least the predictions, have rows:

    X(*inputs) -> loss of every row, stats if the loss has any
    XGrad(dloss, *inputs, stats) -> gradient of sum(dloss * loss) in the predictions
    XReduced(*inputs, row_weight) -> sum or mean of row_weight * loss, and its gradient at once
    XReducedPenalized(*inputs, row_weight, coefficients, variables) -> the same two, and the penalty
        on the variables and its gradients

First derivatives in predictions and variables come from the kernels. All others come from the
reference, in plain TensorFlow, and so exist to any order.
"""

import functools

import tensorflow as tf
from tensorflow.python.ops.parallel_for.pfor import RegisterPFor, wrap

from fusedloss import _lib
from fusedloss.reference.penalty import weighted_sum

try:
    from tensorflow.python.eager.record import should_record_backprop
except ImportError:  # It is private to TensorFlow; without it the general path does everything.

    def should_record_backprop(_):
        return False


def _floats(inputs):
    return [x for x in inputs if x.dtype.is_floating]


@functools.cache
def _derivatives(reference, attributes, reduction=None, first=0):
    """Derivatives of a loss in plain TensorFlow, differentiable themselves.

    Functions of a graph, not of tapes: a tape does not record inside of forward-mode derivatives.

    Args:
      reference: the loss of every row, a function of tensors and attributes.
      attributes: items of the attributes.
      reduction: None, or name and number of replicas: then the last input is row_weight.
      first: the first of the inputs that `second` is about.
    Returns:
      gradients(dloss, *inputs): of sum(dloss * loss) in each float input;
      second(cotangents, dloss, *inputs): of sum(cotangents * gradients), one cotangent for each of
        the inputs from `first` on that they reach, in dloss and each float input.
    """

    def loss(*inputs):
        if reduction is None:
            return reference(*inputs, **dict(attributes))
        *inputs, row_weight = inputs
        rows = reference(*inputs, **dict(attributes))
        if row_weight.shape != [0]:
            rows *= row_weight
        total = tf.reduce_sum(rows)
        name, replicas = reduction
        if name == b"sum":
            return total
        return tf.math.divide_no_nan(total, tf.cast(tf.size(rows) * replicas, total.dtype))

    def gradients_in(inputs, values, cotangents):
        gradients = tf.gradients(values, inputs, cotangents, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    @tf.function(autograph=False)
    def gradients(dloss, *inputs):
        return gradients_in(_floats(inputs), loss(*inputs), dloss)

    @tf.function(autograph=False)
    def second(cotangents, dloss, *inputs):
        reached = inputs[first : first + len(cotangents)]
        values = gradients_in(reached, loss(*inputs), dloss)
        return gradients_in([dloss, *_floats(inputs)], values, cotangents)

    return gradients, second


def penalty_derivatives(dtype):
    """`second` of `_derivatives` for a penalty of that type on coefficients and variables."""
    _, second = _derivatives(weighted_sum, (("dtype", dtype),), first=1)
    return second


def _is_constant(x):
    return not isinstance(x, tf.__internal__.EagerTensor) and x.op.type == "Const"


def _with_nones(gradients, inputs):
    """Puts None in the place of integer inputs."""
    gradients = iter(gradients)
    return [next(gradients) if x.dtype.is_floating else None for x in inputs]


def _scaled(gradients, second, dvalue, *inputs):
    """dvalue * gradient, for each of the gradients that an op made together with its value.

    The cotangents of these outputs never say whether anyone asked for them. So they are taken as
    constants here, and the derivatives of the products are given explicitly.
    """

    @tf.custom_gradient
    def products(dvalue, *inputs):
        def backward(*cotangents):
            return _with_nones(second(cotangents, dvalue, *inputs), [dvalue, *inputs])

        return [gradient * tf.cast(dvalue, gradient.dtype) for gradient in gradients], backward

    return products(dvalue, *inputs)


def scaled_penalty_gradients(dvariables, dpenalty, coefficients, *variables):
    """The gradients in coefficients, None, and variables, of an op that has made `dvariables`."""
    second = penalty_derivatives(dpenalty.dtype)
    return [None, *_scaled(dvariables, second, dpenalty, coefficients, *variables)]


def makes_gradients(variables):
    """Whether an op with a penalty on these tensors is to make the gradients in the same pass.

    Not in eager code, which would make a cotangent for each of them, nor in float16, where they
    underflow before a loss scale arrives.
    """
    return (
        not tf.executing_eagerly()
        and should_record_backprop(variables)
        and all(variable.dtype != tf.float16 for variable in variables)
    )


class CompiledLoss:
    """The ops of one loss, with gradients and vectorisers registered."""

    def __init__(self, name, *, attributes, inputs, row_inputs, reference):
        """Registers the derivatives; the library itself may be missing.

        Args:
          name: in snake case.
          attributes: names of the attributes that the ops share.
          inputs: how many the op of the rows has.
          row_inputs: how many of these, the predictions first, have rows.
          reference: `reference(*inputs, **attributes)`, the loss of every row in plain TensorFlow.
        """
        self._name = name
        self._attributes = attributes
        self._inputs = inputs
        self._row_inputs = row_inputs
        self._reference = reference
        op_type = "Fusedloss>" + name.title().replace("_", "")
        tf.RegisterGradient(op_type)(self._rows_gradient)
        tf.RegisterGradient(op_type + "Grad")(self._gradient_gradient)
        tf.RegisterGradient(op_type + "Reduced")(self._reduced_gradient)
        tf.RegisterGradient(op_type + "ReducedPenalized")(self._penalized_gradient)
        RegisterPFor(op_type)(self._vectorize_rows)
        RegisterPFor(op_type + "Grad")(self._vectorize_gradient)
        RegisterPFor(op_type + "Reduced")(self._vectorize_reduced)
        RegisterPFor(op_type + "ReducedPenalized")(self._vectorize_penalized)

    def _op(self, suffix, *inputs, **attributes):
        return getattr(_lib.ops(), f"fusedloss_{self._name}{suffix}")(*inputs, **attributes)

    def rows(self, *inputs, **attributes):
        """A list: the loss of every row, and the stats for `gradient` if there are any."""
        return tf.nest.flatten(self._op("", *inputs, **attributes))

    def gradient(self, *inputs, **attributes):
        """Inputs: dloss, those of `rows`, stats."""
        return self._op("_grad", *inputs, **attributes)

    def reduced(self, *inputs, penalized=None, **attributes):
        """The reduced loss and, if there is any, the penalty.

        Args:
          inputs: those of `rows`, row_weight.
          penalized: None, or coefficients and variables, of which the gradient is made as well.
          attributes: also `reduction` and `replicas`.
        """
        if penalized is None:
            return self._op("_reduced", *inputs, **attributes)[0]
        outputs = self._op("_reduced_penalized", *inputs, *penalized, **attributes)
        return outputs.loss + outputs.penalty

    def _attributes_of(self, op):
        return {name: op.get_attr(name) for name in self._attributes}

    def _gradients(self, op, inputs, dpredictions, others):
        """`dpredictions()` and `others()` for the first of an op's inputs, as far as asked for."""
        # Eager code says what it does not need; in a graph, constants are known to need none.
        skipped = getattr(op, "skip_input_indices", None)
        if skipped is None:
            skipped = [i for i, x in enumerate(inputs) if _is_constant(x)]
        gradients = [None] * len(inputs)
        if 0 not in skipped:
            gradients[0] = dpredictions()
        if any(x.dtype.is_floating and i not in skipped for i, x in enumerate(inputs) if i):
            gradients[1:] = _with_nones(others(), inputs)[1:]
        return gradients

    def _rows_gradient(self, op, dloss, *_):
        attributes = self._attributes_of(op)
        gradients, _ = _derivatives(self._reference, tuple(attributes.items()))
        return self._gradients(
            op,
            op.inputs,
            lambda: self.gradient(dloss, *op.inputs, *op.outputs[1:], **attributes),
            lambda: gradients(dloss, *op.inputs),
        )

    def _gradient_gradient(self, op, ddpredictions):
        _, second = _derivatives(self._reference, tuple(self._attributes_of(op).items()))
        inputs, stats = op.inputs[: self._inputs + 1], op.inputs[self._inputs + 1 :]
        return [*_with_nones(second([ddpredictions], *inputs), inputs), *(None for _ in stats)]

    def _reduced_gradient(self, op, dloss, *_):
        gradients, second = _derivatives(
            self._reference,
            tuple(self._attributes_of(op).items()),
            (op.get_attr("reduction"), op.get_attr("replicas")),
        )
        inputs = op.inputs[: self._inputs + 1]
        return self._gradients(
            op,
            inputs,
            lambda: _scaled(op.outputs[1:2], second, dloss, *inputs)[0],
            lambda: gradients(dloss, *inputs),
        )

    def _penalized_gradient(self, op, dloss, _, dpenalty, *__):
        penalized = op.inputs[self._inputs + 1 :]
        return [
            *self._reduced_gradient(op, dloss),
            *scaled_penalty_gradients(op.outputs[3:], dpenalty, *penalized),
        ]

    def _stacked(self, pfor_input, first):
        """The inputs of `rows`, which begin at `first`, those with rows stacked over the loop.

        Rows may have any number of axes: one call does the work of all iterations.
        """
        split = first + self._row_inputs
        pfor_input.stack_inputs(range(first, split))
        stacked = [pfor_input.stacked_input(i) for i in range(first, split)]
        return stacked + [pfor_input.unstacked_input(i) for i in range(split, first + self._inputs)]

    def _vectorize_rows(self, pfor_input):
        inputs = self._stacked(pfor_input, 0)
        return [wrap(x) for x in self.rows(*inputs, **self._attributes_of(pfor_input))]

    def _vectorize_gradient(self, pfor_input):
        attributes = self._attributes_of(pfor_input)
        if not any(pfor_input.input(i).is_stacked for i in range(1, pfor_input.num_inputs)):
            # A Jacobian: the kernel runs once, not once a cotangent.
            dloss = pfor_input.stacked_input(0)
            inputs = [pfor_input.unstacked_input(i) for i in range(1, pfor_input.num_inputs)]
            one = tf.ones(tf.shape(dloss)[1:], dloss.dtype)
            gradient = self.gradient(one, *inputs, **attributes)
            return wrap(tf.cast(dloss, gradient.dtype)[..., None] * gradient)
        inputs = self._stacked(pfor_input, 1)
        others = [0, *range(self._inputs + 1, pfor_input.num_inputs)]
        pfor_input.stack_inputs(others)
        dloss, *stats = [pfor_input.stacked_input(i) for i in others]
        return wrap(self.gradient(dloss, *inputs, *stats, **attributes))

    def _vectorize_reduced(self, pfor_input):
        # One reduction an iteration, where the op has one a call: made of the other two.
        attributes = self._attributes_of(pfor_input)
        inputs = self._stacked(pfor_input, 0)
        loss, *stats = self.rows(*inputs, **attributes)
        row_weight, is_stacked, _ = pfor_input.input(self._inputs)
        if not is_stacked and row_weight.shape == [0]:
            dloss = tf.ones_like(loss)
        else:
            dloss = tf.broadcast_to(row_weight, tf.shape(loss))
        if pfor_input.get_attr("reduction") == b"mean":
            rows = tf.reduce_prod(tf.shape(loss)[1:]) * pfor_input.get_attr("replicas")
            dloss = tf.math.divide_no_nan(dloss, tf.cast(rows, dloss.dtype))
        total = tf.reduce_sum(dloss * loss, axis=list(range(1, loss.shape.rank)))
        gradient = self.gradient(dloss, *inputs, *stats, **attributes)
        return [wrap(total), wrap(gradient)]

    def _vectorize_penalized(self, pfor_input):
        places = range(self._inputs + 1, pfor_input.num_inputs)
        coefficients, *variables = [pfor_input.unstacked_input(i) for i in places]
        reduced = self._vectorize_reduced(pfor_input)
        penalty, dvariables = _lib.ops().fusedloss_penalty_reduced(
            coefficients, variables, A=reduced[0].t.dtype
        )
        return [*reduced, *(wrap(x, False) for x in (penalty, *dvariables))]
