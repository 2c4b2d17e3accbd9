"""Calls of the compiled ops and their derivatives, once for all losses.

A loss X of the library is four ops. The predictions are the first of the inputs, each of which is a
tensor or a list of tensors:

    X(*inputs) -> loss of every row, stats if the loss has any
    XGrad(dloss, *inputs, stats) -> gradients of sum(dloss * loss) in the predictions
    XReduced(*inputs, row_weight) -> sum or mean of row_weight * loss, and its gradients at once
    XReducedPenalized(*inputs, row_weight, coefficients, variables) -> the same, and the penalty on
        the variables and its gradients

First derivatives in predictions and variables, of some losses also in targets, come from the
kernels. All others come from the reference, in plain TensorFlow, and so exist to any order.
"""

import functools
import itertools

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
    is_eager = isinstance(x, tf.__internal__.EagerTensor)
    return not is_eager and x.op.type in ("Const", "StopGradient")


def _skipped(op, inputs):
    """The places of the inputs of an op whose gradients are known to be asked for by nobody."""
    # Tapes say what they do not need; in a graph, constants are known to need none.
    skipped = getattr(op, "skip_input_indices", None)
    if skipped is None:
        skipped = [i for i, x in enumerate(inputs) if _is_constant(x)]
    return skipped


def _count(lengths):
    """How many tensors arguments are together: lists of these lengths, or one tensor for None."""
    return sum(1 if length is None else length for length in lengths)


def _grouped(tensors, lengths):
    """The arguments that these tensors are."""
    tensors = iter(tensors)
    return [
        next(tensors) if length is None else list(itertools.islice(tensors, length))
        for length in lengths
    ]


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

    def __init__(
        self,
        name,
        *,
        attributes,
        inputs,
        row_inputs,
        reference,
        residuals=None,
        differentiates_targets=False,
    ):
        """Registers the derivatives; the library itself may be missing.

        Args:
          name: in snake case.
          attributes: names of the attributes that the ops share.
          inputs: of the op of the rows: for each the attribute that holds the length of the list,
            or None for one tensor.
          row_inputs: how many of these, the predictions first, have rows, or a function that says
            it from `get_attr`, by the name of an attribute; 0 if rows depend on each other, so that
            no loop over calls is one call.
          reference: `reference(*inputs, **attributes)`, the loss of every row in plain TensorFlow.
          residuals: the attribute that holds the length of the output `residuals` of the ops of
            rows and the reduced ones, if they have this output. It has no gradient.
          differentiates_targets: whether the kernels can make the gradients in the second input
            too. Then their ops have an attribute `differentiated`, the number of gradients.
        """
        self._name = name
        self._attributes = attributes
        self._inputs = inputs
        self._row_inputs = row_inputs
        self._reference = reference
        self._residuals = residuals
        self.differentiates_targets = differentiates_targets
        op_type = "Fusedloss>" + name.title().replace("_", "")
        tf.RegisterGradient(op_type)(self._rows_gradient)
        tf.RegisterGradient(op_type + "Grad")(self._gradient_gradient)
        tf.RegisterGradient(op_type + "Reduced")(self._reduced_gradient)
        tf.RegisterGradient(op_type + "ReducedPenalized")(self._penalized_gradient)
        if row_inputs:
            RegisterPFor(op_type)(self._vectorize_rows)
            RegisterPFor(op_type + "Grad")(self._vectorize_gradient)
            RegisterPFor(op_type + "Reduced")(self._vectorize_reduced)
            RegisterPFor(op_type + "ReducedPenalized")(self._vectorize_penalized)

    def _op(self, suffix, *inputs, **attributes):
        return getattr(_lib.ops(), f"fusedloss_{self._name}{suffix}")(*inputs, **attributes)

    def rows(self, *inputs, **attributes):
        """A list: the loss of every row, the stats for `gradients` if there are any, residuals."""
        return tf.nest.flatten(self._op("", *inputs, **attributes))

    def gradients(self, *inputs, **attributes):
        """A list. Inputs: dloss, those of `rows`, stats."""
        return tf.nest.flatten(self._op("_grad", *inputs, **attributes))

    def reduced(self, *inputs, penalized=None, **attributes):
        """The reduced loss with the penalty, if there is any, and the list of residuals.

        Args:
          inputs: those of `rows`, row_weight.
          penalized: None, or coefficients and variables, of which the gradient is made as well.
          attributes: also `reduction` and `replicas`.
        """
        if self.differentiates_targets:
            predictions, targets = (tf.nest.flatten(x) for x in inputs[:2])
            recorded = should_record_backprop(targets)
            attributes["differentiated"] = len(predictions) + recorded * len(targets)
        if penalized is None:
            outputs = self._op("_reduced", *inputs, **attributes)
            loss = outputs.loss
        else:
            outputs = self._op("_reduced_penalized", *inputs, *penalized, **attributes)
            loss = outputs.loss + outputs.penalty
        return loss, outputs.residuals if self._residuals else []

    def _attributes_of(self, op):
        return {name: op.get_attr(name) for name in self._attributes}

    def _attributes_with_residuals(self, op):
        attributes = self._attributes_of(op)
        if self._residuals:
            attributes[self._residuals] = op.get_attr(self._residuals)
        return attributes

    def _lengths_of(self, op):
        return tuple(None if name is None else op.get_attr(name) for name in self._inputs)

    def _tensor_reference(self, *tensors, lengths, **attributes):
        return self._reference(*_grouped(tensors, lengths), **attributes)

    def _derivatives_of(self, op, reduction=None):
        attributes = {**self._attributes_of(op), "lengths": self._lengths_of(op)}
        return _derivatives(self._tensor_reference, tuple(attributes.items()), reduction)

    def _gradients_in(self, op, inputs, count, made, others):
        """`made()` for the first inputs of an op, `others()` for the rest, as far as asked for."""
        skipped = _skipped(op, inputs)
        gradients = [None] * len(inputs)
        if any(i not in skipped for i in range(count)):
            gradients[:count] = made()
        rest = list(enumerate(inputs))[count:]
        if any(x.dtype.is_floating and i not in skipped for i, x in rest):
            gradients[count:] = _with_nones(others(), inputs)[count:]
        return gradients

    def _residuals_of(self, op):
        """How many outputs are residuals."""
        return op.get_attr(self._residuals) if self._residuals else 0

    def _rows_gradient(self, op, dloss, *_):
        gradients, _ = self._derivatives_of(op)
        stats = op.outputs[1 : len(op.outputs) - self._residuals_of(op)]
        attributes, lengths = self._attributes_of(op), self._lengths_of(op)
        count = _count(lengths[:1])
        if self.differentiates_targets:
            skipped, both = _skipped(op, op.inputs), _count(lengths[:2])
            if any(i not in skipped for i in range(count, both)):
                count = both
            attributes["differentiated"] = count
        inputs = _grouped(op.inputs, lengths)
        return self._gradients_in(
            op,
            op.inputs,
            count,
            lambda: self.gradients(dloss, *inputs, *stats, **attributes),
            lambda: gradients(dloss, *op.inputs),
        )

    def _gradient_gradient(self, op, *ddgradients):
        _, second = self._derivatives_of(op)
        count = 1 + _count(self._lengths_of(op))
        inputs, stats = op.inputs[:count], op.inputs[count:]
        return [*_with_nones(second(list(ddgradients), *inputs), inputs), *(None for _ in stats)]

    def _reduced_gradient(self, op, dloss, *others):
        dgradients = others[: len(others) - self._residuals_of(op)]
        reduction = (op.get_attr("reduction"), op.get_attr("replicas"))
        gradients, second = self._derivatives_of(op, reduction)
        inputs = op.inputs[: _count(self._lengths_of(op)) + 1]
        count = len(dgradients)
        return self._gradients_in(
            op,
            inputs,
            count,
            lambda: _scaled(op.outputs[1 : 1 + count], second, dloss, *inputs),
            lambda: gradients(dloss, *inputs),
        )

    def _penalized_gradient(self, op, dloss, *others):
        penalized = op.inputs[_count(self._lengths_of(op)) + 1 :]
        # After gradients and residuals come the penalty and the gradient of each variable.
        count = len(others) - len(penalized)
        return [
            *self._reduced_gradient(op, dloss, *others[:count]),
            *scaled_penalty_gradients(op.outputs[2 + count :], others[count], *penalized),
        ]

    def _stacked(self, pfor_input, first):
        """The inputs of `rows`, which begin at `first`, those with rows stacked over the loop.

        Rows may have any number of axes: one call does the work of all iterations.
        """
        lengths = self._lengths_of(pfor_input)
        row_inputs = self._row_inputs
        if callable(row_inputs):
            row_inputs = row_inputs(pfor_input.get_attr)
        split, end = first + _count(lengths[:row_inputs]), first + _count(lengths)
        pfor_input.stack_inputs(range(first, split))
        stacked = [pfor_input.stacked_input(i) for i in range(first, split)]
        unstacked = [pfor_input.unstacked_input(i) for i in range(split, end)]
        return _grouped(stacked + unstacked, lengths)

    def _vectorize_rows(self, pfor_input):
        inputs = self._stacked(pfor_input, 0)
        attributes = self._attributes_with_residuals(pfor_input)
        return [wrap(x) for x in self.rows(*inputs, **attributes)]

    def _vectorize_gradient(self, pfor_input):
        attributes, lengths = self._attributes_of(pfor_input), self._lengths_of(pfor_input)
        places = range(1, pfor_input.num_inputs)
        if not any(pfor_input.input(i).is_stacked for i in places):
            # A Jacobian: the kernel runs once, not once a cotangent.
            dloss = pfor_input.stacked_input(0)
            tensors = [pfor_input.unstacked_input(i) for i in places]
            inputs = [*_grouped(tensors, lengths), *tensors[_count(lengths) :]]
            one = tf.ones(tf.shape(dloss)[1:], dloss.dtype)
            return [
                wrap(tf.cast(dloss, gradient.dtype)[..., None] * gradient)
                for gradient in self.gradients(one, *inputs, **attributes)
            ]
        inputs = self._stacked(pfor_input, 1)
        others = [0, *places[_count(lengths) :]]
        pfor_input.stack_inputs(others)
        dloss, *stats = [pfor_input.stacked_input(i) for i in others]
        return [wrap(x) for x in self.gradients(dloss, *inputs, *stats, **attributes)]

    def _vectorize_reduced(self, pfor_input):
        # One reduction an iteration, where the op has one a call: made of the other two.
        attributes = self._attributes_of(pfor_input)
        inputs = self._stacked(pfor_input, 0)
        loss, *stats = self.rows(*inputs, **self._attributes_with_residuals(pfor_input))
        count = len(stats) - self._residuals_of(pfor_input)
        stats, residuals = stats[:count], stats[count:]
        row_weight, is_stacked, _ = pfor_input.input(_count(self._lengths_of(pfor_input)))
        if not is_stacked and row_weight.shape == [0]:
            dloss = tf.ones_like(loss)
        else:
            dloss = tf.broadcast_to(row_weight, tf.shape(loss))
        if pfor_input.get_attr("reduction") == b"mean":
            rows = tf.reduce_prod(tf.shape(loss)[1:]) * pfor_input.get_attr("replicas")
            dloss = tf.math.divide_no_nan(dloss, tf.cast(rows, dloss.dtype))
        total = tf.reduce_sum(dloss * loss, axis=list(range(1, loss.shape.rank)))
        gradients = self.gradients(dloss, *inputs, *stats, **attributes)
        return [wrap(x) for x in (total, *gradients, *residuals)]

    def _vectorize_penalized(self, pfor_input):
        places = range(_count(self._lengths_of(pfor_input)) + 1, pfor_input.num_inputs)
        coefficients, *variables = [pfor_input.unstacked_input(i) for i in places]
        reduced = self._vectorize_reduced(pfor_input)
        penalty, dvariables = _lib.ops().fusedloss_penalty_reduced(
            coefficients, variables, A=reduced[0].t.dtype
        )
        return [*reduced, *(wrap(x, False) for x in (penalty, *dvariables))]
