"""The compiled kernels on torch tensors, each into tensors that the caller made.

A form of a loss is a dict of the keywords that the plain formula, in xent.py, pointwise.py or
features.py, takes as well.
"""

import torch


def sums_dtype(dtype):
    """What sums over elements of a dtype are held in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _device_array(value):
    """A tensor as the module takes it, which has no type string for bfloat16; else the value."""
    is_bfloat16 = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
    return value.detach().view(torch.int16) if is_bfloat16 else value


class Kernels:
    """The functions of the module `fusedloss_gpu`, on the current stream."""

    def __init__(self, module):
        self._module = module

    def _call(self, name, x, *arguments, **form):
        arguments = map(_device_array, (x, *arguments))
        form = {key: _device_array(value) for key, value in form.items()}
        return getattr(self._module, name)(_name(x.dtype), *arguments, **form)

    def _enqueue(self, name, x, *arguments, **form):
        self._call(name, x, *arguments, torch.cuda.current_stream().cuda_stream, **form)

    def stats_per_row(self, x, targets, form):
        return self._call("softmax_xent_stats", x, targets, **form)

    def forward(self, x, targets, form, loss, stats):
        self._enqueue("softmax_xent", x, targets, loss, stats, **form)

    def grad(self, x, targets, form, dloss, stats, dx):
        self._enqueue("softmax_xent_grad", x, targets, dloss, stats, dx, **form)

    def reduced(self, x, targets, form, row_weight, scale, loss, dx):
        self._enqueue("softmax_xent_reduced", x, targets, row_weight, scale, loss, dx, **form)

    def pointwise(self, x, targets, kind, form, loss):
        self._enqueue("pointwise", x, targets, kind, loss, **form)

    def pointwise_grad(self, x, targets, kind, form, dloss, dx):
        self._enqueue("pointwise_grad", x, targets, kind, dloss, dx, **form)

    def pointwise_reduced(self, x, targets, kind, form, row_weight, scale, loss, dx):
        self._enqueue("pointwise_reduced", x, targets, kind, row_weight, scale, loss, dx, **form)

    def penalty(self, variables, gradients, coefficients, dpenalty, penalty):
        """`coefficients`: (l1, l2) of each variable. What is None is not wanted, or 1."""
        gradients = gradients or [None] * len(variables)
        rows = [
            (_name(values.dtype), _device_array(values), _device_array(gradient))
            for values, gradient in zip(variables, gradients, strict=True)
        ]
        coefficients = torch.tensor(coefficients, dtype=torch.float64, device=variables[0].device)
        arrays = map(_device_array, (coefficients, dpenalty, penalty))
        stream = torch.cuda.current_stream().cuda_stream
        self._module.penalty(rows, *arrays, stream)

    def _features(self, name, predictions, targets, form, gradients, *arguments):
        dpredictions, dtargets = gradients
        nothing = [None] * len(predictions)
        lists = (predictions, targets, form.get("channel_weights"), dpredictions, dtargets)
        layers = [
            list(map(_device_array, layer))
            for layer in zip(*(x or nothing for x in lists), strict=True)
        ]
        getattr(self._module, f"feature_distance{name}")(
            _name(predictions[0].dtype), layers, _device_array(form["layer_weights"]),
            form["metric"], form.get("channels_last", True), form.get("epsilon", 0.0),
            form.get("epsilon_in_root", True), *map(_device_array, arguments),
            torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip

    def features(self, predictions, targets, form, loss):
        """Lists of maps `[rows, positions, channels]`; targets are None under "first"."""
        self._features("", predictions, targets, form, (None, None), loss)

    def features_grad(self, predictions, targets, form, dloss, dpredictions, dtargets):
        gradients = dpredictions, dtargets
        self._features("_grad", predictions, targets, form, gradients, dloss)

    def features_reduced(
        self, predictions, targets, form, row_weight, scale, loss, dpredictions, dtargets
    ):
        """`dtargets` may be None: not wanted."""
        arguments = row_weight, scale, loss
        gradients = dpredictions, dtargets
        self._features("_reduced", predictions, targets, form, gradients, *arguments)
