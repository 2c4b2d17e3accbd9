"""What speed.py times: the inputs of a case, our step, and the loss as users of torch write it.

A batch of a case is two lists of tensors: leaves, of which gradients are wanted, and constants.
"""

import dataclasses
import math

import features
import pointwise
import torch
import xent

LAP_BYTES = 1 << 29  # of leaves; many times any L2
MAX_BATCHES = 24
CHECKED_ROWS = 32  # at each end
CHECKED_ELEMENTS = 1 << 25  # in float64 at a time
SUBSET_WEIGHT, FULL_WEIGHT = 0.8, 0.2
DELTA, L2 = 1.0, 0.01
KERNEL_SIZE = 2048  # of a weight, in both dimensions


def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def relative_error(found, right):
    """Of lists of tensors, in the sum of absolute values, a part at a time."""
    error = size = 0.0
    for ours, theirs in zip(found, right, strict=True):
        parts = (tensor.flatten().split(CHECKED_ELEMENTS) for tensor in (ours, theirs))
        for a, b in zip(*parts, strict=True):
            error += (a.float() - b.float()).abs().sum(dtype=torch.float64)
            size += b.float().abs().sum(dtype=torch.float64)
    return float(error / size)


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table. `classes` are the elements of a row, 0 where there are no predictions."""

    kind: str
    rows: int
    classes: int
    dtype: torch.dtype
    share_goal: float  # of the bandwidth of a copy
    ratio_goal: float  # against the best of the others
    kernels: int = 0  # weights of 2048² under an L2 penalty

    @property
    def name(self):
        size = f" {self.rows}×{self.classes}" if self.classes else ""
        weights = f" {self.kernels}×{KERNEL_SIZE}²" if self.kernels else ""
        return f"{self.kind}{size}{weights} {_dtype_name(self.dtype)}"

    @property
    def leaves_bytes(self):
        return sum(map(math.prod, self.leaf_shapes)) * self.dtype.itemsize

    @property
    def leaf_shapes(self):
        predictions = [(self.rows, self.classes)] if self.classes else []
        return predictions + [(KERNEL_SIZE, KERNEL_SIZE)] * self.kernels

    @property
    def batches(self):
        return max(2, min(MAX_BATCHES, LAP_BYTES // self.leaves_bytes))

    @property
    def moved_bytes(self):
        """Leaves read, gradients written, targets read."""
        return 2 * self.leaves_bytes + self.targets_bytes


class Xent(Case):
    """`kind`: "labels", "mixture of logits" or "mixture of probabilities"."""

    @property
    def targets_bytes(self):
        return 8 * self.rows if self.kind == "labels" else 4 * self.rows * self.classes

    def sample(self):
        """Batches, and the form: with the ids of a scattered fifth of the classes."""
        shape, batches = (self.rows, self.classes), []
        for _ in range(self.batches):
            x = torch.randn(shape, device="cuda")
            if self.kind == "mixture of probabilities":
                x = x.softmax(-1)
            if self.kind == "labels":
                targets = torch.randint(self.classes, (self.rows,), device="cuda")
            else:
                # Soft: with one-hot ones a form that skips zeros would look better than it is.
                targets = torch.rand(shape, device="cuda")
                targets /= targets.sum(-1, keepdim=True)
            batches.append(([x.to(self.dtype)], [targets]))
        if self.kind == "labels":
            return batches, {}
        return batches, {
            "from_logits": self.kind == "mixture of logits",
            "subset": torch.randperm(self.classes, device="cuda")[: self.classes // 5].sort()[0],
            "subset_weight": SUBSET_WEIGHT, "full_weight": FULL_WEIGHT,
        }  # fmt: skip

    def own(self, kernels, batch, form):
        """Loss and gradients by our kernels."""
        (x,), (targets,) = batch
        loss, gradient = torch.empty(1, device="cuda"), torch.empty_like(x)
        kernels.reduced(x, targets, form, None, 1 / self.rows, loss, gradient)
        return loss, [gradient]

    def torch_losses(self, form):
        """The mean loss as users write it: {name: fn(leaves, constants)}."""
        if self.kind == "labels":
            return {"": lambda x, y: torch.nn.functional.cross_entropy(x[0], y[0])}
        ids = form["subset"]
        inside = torch.zeros(self.classes, dtype=torch.bool, device="cuda")
        inside[ids] = True

        def from_logits(z, y, counted=None):
            if counted is None:
                return -(y * z.log_softmax(-1)).sum(-1)
            log_sum = z.masked_fill(~counted, -torch.inf).logsumexp(-1, keepdim=True)
            return (torch.where(counted, y, 0) * (log_sum - z)).sum(-1)

        def from_probabilities(p, y, counted=None):
            if counted is not None:
                p, y = p * counted, y * counted
            q = (p / p.sum(-1, keepdim=True)).clamp(xent.EPSILON, 1 - xent.EPSILON)
            return -(y * q.log()).sum(-1)

        loss = from_logits if form["from_logits"] else from_probabilities

        def gathered(leaves, constants):
            x, y = leaves[0].float(), constants[0]
            part = loss(x[:, ids], y[:, ids])
            return (SUBSET_WEIGHT * part + FULL_WEIGHT * loss(x, y)).mean()

        def masked(leaves, constants):
            x, y = leaves[0].float(), constants[0]
            return (SUBSET_WEIGHT * loss(x, y, inside) + FULL_WEIGHT * loss(x, y)).mean()

        return {" (gather)": gathered, " (mask)": masked}

    def own_error(self, batch, form, result):
        """The larger relative error of loss and gradients against float64, of rows at the ends."""
        return _error_of_rows(self, xent, batch, {"from_logits": True, **form}, result)


class Pointwise(Case):
    """`kind`: "Huber", "binary logits", "Huber + L2" or "L2"."""

    @property
    def targets_bytes(self):
        return self.dtype.itemsize * self.rows * self.classes

    def sample(self):
        batches = []
        for _ in range(self.batches):
            x = torch.randn((self.rows, self.classes), device="cuda", dtype=self.dtype)
            targets = torch.randn_like(x)
            if self.kind == "binary logits":
                targets = (targets > 0).to(self.dtype)
            weights = [
                torch.randn((KERNEL_SIZE, KERNEL_SIZE), device="cuda", dtype=self.dtype) * 0.02
                for _ in range(self.kernels)
            ]
            data = ([x], [targets]) if self.classes else ([], [])
            batches.append((data[0] + weights, data[1]))
        if self.kind == "binary logits":
            return batches, {"kind": "binary_logits", "parameter": 0.0}
        return batches, {"kind": "huber", "parameter": DELTA}

    def own(self, kernels, batch, form):
        leaves, constants = batch
        losses = torch.empty(2, device="cuda")
        gradients = [torch.empty_like(leaf) for leaf in leaves]
        if constants:
            kernels.pointwise_reduced(
                leaves[0], constants[0], form["kind"], {"parameter": form["parameter"]}, None,
                1 / self.rows, losses[:1], gradients[0],
            )  # fmt: skip
        if self.kernels:
            first = len(constants)
            coefficients = [(0.0, L2)] * self.kernels
            kernels.penalty(leaves[first:], gradients[first:], coefficients, None, losses[1:])
        return losses[0 if constants else 1 : 2 if self.kernels else 1], gradients

    def torch_losses(self, form):
        def loss(leaves, constants):
            total = 0
            if self.kind == "binary logits":
                function = torch.nn.functional.binary_cross_entropy_with_logits
                total = function(leaves[0].float(), constants[0].float())
            elif constants:
                function = torch.nn.functional.huber_loss
                total = function(leaves[0].float(), constants[0].float(), delta=DELTA)
            for weight in leaves[len(constants) :]:
                total = total + L2 * weight.float().square().sum()
            return total

        return {"": loss}

    def own_error(self, batch, form, result):
        (leaves, constants), (loss, gradients) = batch, result
        weights, penalty, error = leaves[len(constants) :], 0.0, 0.0
        if weights:
            coefficients = [(0.0, L2)] * len(weights)
            penalty = pointwise.penalty(weights, coefficients, torch.float64).item()
            right = [2 * L2 * weight.double() for weight in weights]
            error = relative_error(gradients[len(constants) :], right)
        if not constants:
            return max(error, abs(loss - penalty) / penalty)
        data = (leaves[:1], constants), (loss, gradients[:1])
        return max(error, _error_of_rows(self, pointwise, data[0], form, data[1], penalty))


@dataclasses.dataclass(frozen=True)
class Features(Case):
    """`kind`: a metric, "first" behind it if the reference is the first example.

    `maps`: positions and channels of each layer.
    """

    maps: tuple = ()

    @property
    def name(self):
        layers = ", ".join(f"{positions}×{channels}" for positions, channels in self.maps)
        return f"{self.kind} {self.rows}×({layers}) {_dtype_name(self.dtype)}"

    @property
    def is_first(self):
        return self.kind.endswith("first")

    @property
    def leaf_shapes(self):
        return [(self.rows, *layer) for layer in self.maps]

    @property
    def targets_bytes(self):
        return 0 if self.is_first else self.leaves_bytes

    def sample(self):
        def normal():
            maps = [torch.randn(shape, device="cuda") for shape in self.leaf_shapes]
            return [x.to(self.dtype) for x in maps]

        metric = self.kind.split()[0]
        form = {
            "metric": metric, "epsilon": features.EPSILONS.get(metric, 0.0),
            "layer_weights": torch.ones(len(self.maps), dtype=torch.float64, device="cuda"),
        }  # fmt: skip
        return [(normal(), [] if self.is_first else normal()) for _ in range(self.batches)], form

    def own(self, kernels, batch, form):
        """Loss and gradients by our kernels."""
        predictions, targets = batch
        loss = torch.empty(1, device="cuda")
        gradients = [torch.empty_like(x) for x in predictions]
        kernels.features_reduced(
            predictions, targets or None, form, None, 1 / self.rows, loss, gradients, None
        )
        return loss, gradients

    def torch_losses(self, form):
        """The mean loss as users write it: {name: fn(leaves, constants)}."""
        metric, epsilon = form["metric"], form["epsilon"]

        def distance(a, b):
            a, b = a.float(), b.float()
            if metric == "mse":
                return torch.nn.functional.mse_loss(a, b.expand_as(a))
            if metric == "cosine":
                return 1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()
            a, b = (x * (x.square().sum(-1, keepdim=True) + epsilon).rsqrt() for x in (a, b))
            return (a - b).square().sum(-1).mean()

        def loss(leaves, constants):
            targets = constants or [x[:1] for x in leaves]
            return sum(map(distance, leaves, targets))

        return {"": loss}

    def own_error(self, batch, form, result):
        """The relative error of all gradients, or of the loss if that is larger."""
        (predictions, targets), (loss, gradients) = batch, result
        total, error = 0.0, 0.0
        scales = torch.full((self.rows,), 1 / self.rows, dtype=torch.float64, device="cuda")
        for k, found in enumerate(gradients):
            of_layer = [predictions[k].double()], [targets[k].double()] if targets else None
            one = {**form, "layer_weights": form["layer_weights"][k : k + 1]}
            rows, (right, *_) = features.row_loss_and_gradients(
                *of_layer, torch.float64, scales, one
            )
            total += rows.mean().item()
            error = max(error, relative_error([found], [right]))
        return max(error, abs(loss - total) / total)


VGG16 = ((224**2, 64), (112**2, 128), (56**2, 256), (28**2, 512), (14**2, 512))


def _error_of_rows(case, module, batch, form, result, penalty=0.0):
    ((x,), (targets,)), (loss, (gradient,)) = batch, result
    total, error = 0.0, 0.0
    step = max(1, CHECKED_ELEMENTS // case.classes)
    for start in range(0, case.rows, step):
        part = slice(start, start + step)
        total += module.row_loss(x[part], targets[part], torch.float64, **form).sum().item()
    for part in (slice(0, CHECKED_ROWS), slice(case.rows - CHECKED_ROWS, case.rows)):
        scales = torch.full((CHECKED_ROWS,), 1 / case.rows, dtype=torch.float64, device="cuda")
        inputs = x[part].double(), targets[part], torch.float64, scales, form
        right = module.row_loss_and_gradient(*inputs)[1]
        error = max(error, relative_error([gradient[part].double()], [right]))
    mean = total / case.rows + penalty
    return max(error, abs(loss - mean) / abs(mean))


CASES = [
    *(
        Xent(kind, rows, classes, dtype, share, ratio)
        for kind, rows, classes, share, ratio in (
            ("labels", 8192, 128256, 0.85, 1.3),
            ("labels", 4096, 32000, 0.85, 1.2),
            ("labels", 16384, 4096, 0.85, 1.2),
            ("labels", 65536, 1000, 0.75, 1.0),
            ("labels", 1048576, 10, 0.75, 1.0),
            ("mixture of logits", 8192, 32000, 0.80, 2.0),
            ("mixture of probabilities", 8192, 32000, 0.80, 2.0),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ),
    *(
        Pointwise(kind, rows, outputs, dtype, share, ratio, kernels)
        for kind, rows, outputs, share, ratio, kernels in (
            ("Huber", 16384, 16384, 0.88, 1.0, 0),
            ("Huber", 67108864, 1, 0.88, 1.0, 0),
            ("binary logits", 16384, 16384, 0.85, 1.0, 0),
            ("Huber + L2", 4096, 8192, 0.85, 1.3, 64),
            ("L2", 0, 0, 0.85, 1.3, 64),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ),
    *(
        Features(kind, rows, 0, dtype, share, ratio, maps=maps)
        for kind, rows, maps, share, ratio in (
            ("lpips", 32, VGG16, 0.80, 1.5),
            ("lpips", 32, ((56**2, 256),), 0.80, 1.0),
            ("cosine", 262144, ((1, 512),), 0.80, 1.0),
            ("mse", 64, ((56**2, 256),), 0.85, 1.0),
            ("mse first", 64, ((56**2, 256),), 0.80, 1.0),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ),
]
