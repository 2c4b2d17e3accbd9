"""Calls of the compiled ops and their derivatives, once for all losses.

A loss X of the library is three ops, whose first inputs, at least the predictions, have rows:

    X(*inputs) -> loss of every row, stats
    XGrad(dloss, *inputs, stats) -> gradient of sum(dloss * loss) in the predictions
    XReduced(*inputs, row_weight) -> sum or mean of row_weight * loss, and its gradient at once

First derivatives in the predictions come from the kernels. All others come from the reference, in
plain TensorFlow, and so exist to any order.
"""

import functools

import tensorflow as tf
from tensorflow.python.ops.parallel_for.pfor import RegisterPFor, wrap

from fusedloss import _lib


def _floats(inputs):
    return [x for x in inputs if x.dtype.is_floating]


@functools.cache
def _derivatives(reference, attributes, reduction=None):
    """Derivatives of a loss in plain TensorFlow, differentiable themselves.

    Functions of a graph, not of tapes: a tape does not record inside of forward-mode derivatives.

    Args:
      reference: the loss of every row, a function of tensors and attributes.
      attributes: items of the attributes.
      reduction: None, or name and number of replicas: then the last input is row_weight.
    Returns:
      gradients(dloss, *inputs): of sum(dloss * loss) in each float input;
      second(ddpredictions, dloss, *inputs): of sum(ddpredictions * gradients[0]) in dloss and each
        float input.
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

    def gradients_in(inputs, value, cotangent):
        gradients = tf.gradients(value, inputs, cotangent, unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in gradients]

    @tf.function(autograph=False)
    def gradients(dloss, *inputs):
        return gradients_in(_floats(inputs), loss(*inputs), dloss)

    @tf.function(autograph=False)
    def second(ddpredictions, dloss, *inputs):
        (dpredictions,) = gradients_in([inputs[0]], loss(*inputs), dloss)
        return gradients_in([dloss, *_floats(inputs)], dpredictions, ddpredictions)

    return gradients, second


def _is_constant(x):
    return not isinstance(x, tf.__internal__.EagerTensor) and x.op.type == "Const"


def _with_nones(gradients, inputs):
    """Puts None in the place of integer inputs."""
    gradients = iter(gradients)
    return [next(gradients) if x.dtype.is_floating else None for x in inputs]


class CompiledLoss:
    """The three ops of one loss, with gradients and vectorisers registered."""

    def __init__(self, name, *, attributes, row_inputs, reference):
        """Registers the derivatives; the library itself may be missing.

        Args:
          name: in snake case.
          attributes: names of the attributes that the three ops share.
          row_inputs: how many of the inputs, the predictions first, have rows.
          reference: `reference(*inputs, **attributes)`, the loss of every row in plain TensorFlow.
        """
        self._name = name
        self._attributes = attributes
        self._row_inputs = row_inputs
        self._reference = reference
        self._op_type = "Fusedloss>" + name.title().replace("_", "")
        tf.RegisterGradient(self._op_type)(self._rows_gradient)
        tf.RegisterGradient(self._op_type + "Grad")(self._gradient_gradient)
        tf.RegisterGradient(self._op_type + "Reduced")(self._reduced_gradient)
        RegisterPFor(self._op_type)(self._vectorize_rows)
        RegisterPFor(self._op_type + "Grad")(self._vectorize_gradient)
        RegisterPFor(self._op_type + "Reduced")(self._vectorize_reduced)

    def rows(self, *inputs, **attributes):
        """The loss of every row, and the stats for `gradient`."""
        return getattr(_lib.ops(), f"fusedloss_{self._name}")(*inputs, **attributes)

    def gradient(self, *inputs, **attributes):
        """Inputs: dloss, those of `rows`, stats."""
        return getattr(_lib.ops(), f"fusedloss_{self._name}_grad")(*inputs, **attributes)

    def reduced(self, *inputs, **attributes):
        """Inputs: those of `rows`, row_weight. Attributes: also `reduction` and `replicas`."""
        return getattr(_lib.ops(), f"fusedloss_{self._name}_reduced")(*inputs, **attributes)

    def _attributes_of(self, op):
        return {name: op.get_attr(name) for name in self._attributes}

    def _needed_gradients(self, op, dpredictions, others):
        """`dpredictions()` for the predictions and `others()` for the rest, if asked for."""
        # Eager code says what it does not need; in a graph, constants are known to need none.
        skipped = getattr(op, "skip_input_indices", None)
        if skipped is None:
            skipped = [i for i, x in enumerate(op.inputs) if _is_constant(x)]
        gradients = [None] * len(op.inputs)
        if 0 not in skipped:
            gradients[0] = dpredictions()
        if any(x.dtype.is_floating and i not in skipped for i, x in enumerate(op.inputs) if i):
            gradients[1:] = _with_nones(others(), op.inputs)[1:]
        return gradients

    def _rows_gradient(self, op, dloss, _):
        attributes = self._attributes_of(op)
        gradients, _ = _derivatives(self._reference, tuple(attributes.items()))
        return self._needed_gradients(
            op,
            lambda: self.gradient(dloss, *op.inputs, op.outputs[1], **attributes),
            lambda: gradients(dloss, *op.inputs),
        )

    def _gradient_gradient(self, op, ddpredictions):
        _, second = _derivatives(self._reference, tuple(self._attributes_of(op).items()))
        *inputs, _ = op.inputs
        return [*_with_nones(second(ddpredictions, *inputs), inputs), None]

    def _reduced_gradient(self, op, dloss, _):
        gradients, second = _derivatives(
            self._reference,
            tuple(self._attributes_of(op).items()),
            (op.get_attr("reduction"), op.get_attr("replicas")),
        )

        # The cotangent of op.outputs[1] never says whether anyone asked for it. So the output is
        # taken as a constant here, and the derivative of the product is given explicitly.
        @tf.custom_gradient
        def scaled(dloss, *inputs):
            def backward(ddpredictions):
                return _with_nones(second(ddpredictions, dloss, *inputs), [dloss, *inputs])

            return op.outputs[1] * tf.cast(dloss, op.outputs[1].dtype), backward

        return self._needed_gradients(
            op, lambda: scaled(dloss, *op.inputs), lambda: gradients(dloss, *op.inputs)
        )

    def _stacked(self, pfor_input, first):
        """The inputs of `rows`, which begin at `first`, those with rows stacked over the loop.

        Rows may have any number of axes: one call does the work of all iterations.
        """
        split = first + self._row_inputs
        pfor_input.stack_inputs(range(first, split))
        stacked = [pfor_input.stacked_input(i) for i in range(first, split)]
        end = pfor_input.num_inputs - (pfor_input.op_type != self._op_type)
        return stacked + [pfor_input.unstacked_input(i) for i in range(split, end)]

    def _vectorize_rows(self, pfor_input):
        inputs = self._stacked(pfor_input, 0)
        return [wrap(x) for x in self.rows(*inputs, **self._attributes_of(pfor_input))]

    def _vectorize_gradient(self, pfor_input):
        attributes = self._attributes_of(pfor_input)
        last = pfor_input.num_inputs - 1
        if not any(pfor_input.input(i).is_stacked for i in range(1, last + 1)):
            # A Jacobian: the kernel runs once, not once a cotangent.
            dloss = pfor_input.stacked_input(0)
            inputs = [pfor_input.unstacked_input(i) for i in range(1, last + 1)]
            one = tf.ones(tf.shape(dloss)[1:], dloss.dtype)
            gradient = self.gradient(one, *inputs, **attributes)
            return wrap(tf.cast(dloss, gradient.dtype)[..., None] * gradient)
        inputs = self._stacked(pfor_input, 1)
        pfor_input.stack_inputs([0, last])
        dloss, stats = pfor_input.stacked_input(0), pfor_input.stacked_input(last)
        return wrap(self.gradient(dloss, *inputs, stats, **attributes))

    def _vectorize_reduced(self, pfor_input):
        # One reduction an iteration, where the op has one a call: made of the other two.
        attributes = self._attributes_of(pfor_input)
        inputs = self._stacked(pfor_input, 0)
        loss, stats = self.rows(*inputs, **attributes)
        row_weight, is_stacked, _ = pfor_input.input(pfor_input.num_inputs - 1)
        if not is_stacked and row_weight.shape == [0]:
            dloss = tf.ones_like(loss)
        else:
            dloss = tf.broadcast_to(row_weight, tf.shape(loss))
        if pfor_input.get_attr("reduction") == b"mean":
            rows = tf.reduce_prod(tf.shape(loss)[1:]) * pfor_input.get_attr("replicas")
            dloss = tf.math.divide_no_nan(dloss, tf.cast(rows, dloss.dtype))
        total = tf.reduce_sum(dloss * loss, axis=list(range(1, loss.shape.rank)))
        gradient = self.gradient(dloss, *inputs, stats, **attributes)
        return [wrap(total), wrap(gradient)]
