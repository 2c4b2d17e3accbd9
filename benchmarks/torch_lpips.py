"""Times LPIPS, loss and gradient, in PyTorch on the CPU, interleaved with fusedloss.

The two frameworks live in environments of their own. Run it where PyTorch is, and name the Python
that has fusedloss; that one makes the inputs and the truth, and waits while PyTorch is timed, as
PyTorch does while it is:

    python benchmarks/torch_lpips.py /path/to/fusedloss/bin/python [8x56x56x256 | 4x224]
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

EPSILON = 1e-10
ROUNDS = 21
CASES = {4: "feature_distance/lpips", 2: "feature_distance/lpips_layers"}
FUSED = ("graph fusedloss", "xla fusedloss", "bare traffic")


def milliseconds(call):
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def serve(folder, shape):
    """The other side: saves inputs and truth, then times what each line names."""
    import tensorflow as tf

    from fusedloss import bench, cases

    case, setting = cases.CASES[CASES[len(shape)]], cases.Setting(shape)
    _, calls = bench.prepare(case, setting)
    inputs, _ = bench.sample(case, setting)
    arrays = tf.nest.map_structure(lambda x: x.numpy(), list(inputs))
    loss, gradients = bench.exact(case, arrays, [])
    for name, layers in zip(
        ("target", "prediction", "gradient"), (*arrays, gradients), strict=True
    ):
        for k, layer in enumerate(tf.nest.flatten(layers)):
            np.save(f"{folder}/{name}{k}.npy", layer)
    for key in FUSED:
        calls[key]()
    print(json.dumps({"layers": len(gradients), "loss": loss}), flush=True)
    for line in sys.stdin:
        print(milliseconds(calls[line.strip()]), flush=True)


def torch_steps(torch, folder, layers, truth_loss):
    """Eager and compiled, each checked against the truth."""

    def load(name):
        return [torch.from_numpy(np.load(f"{folder}/{name}{k}.npy")) for k in range(layers)]

    targets, predictions = load("target"), [x.requires_grad_() for x in load("prediction")]

    def unit(x):
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) + EPSILON)

    def lpips(predictions):
        pairs = zip(predictions, targets, strict=True)
        return sum(((unit(p) - unit(t)) ** 2).sum(-1).mean() for p, t in pairs)

    compiled = torch.compile(lpips)
    steps = {
        "torch eager": lambda: torch.autograd.grad(lpips(predictions), predictions),
        "torch compiled": lambda: torch.autograd.grad(compiled(predictions), predictions),
    }
    for name, step in steps.items():
        errors = [
            float((found - truth).abs().max() / truth.abs().max())
            for found, truth in zip(step(), load("gradient"), strict=True)
        ]
        loss_error = abs(float(lpips(predictions).detach()) / truth_loss - 1)
        print(f"{name}: loss error {loss_error:.0e}, gradient error {max(errors):.0e}")
    return steps


def main(python, shape="8x56x56x256"):
    import torch

    torch.set_num_threads(os.cpu_count())
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [python, __file__, "--serve", folder, shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as other,
    ):
        facts = json.loads(other.stdout.readline())
        steps = torch_steps(torch, folder, facts["layers"], facts["loss"])
        for step in steps.values():
            for _ in range(3):
                step()

        def timed(key):
            if key in steps:
                return milliseconds(steps[key])
            print(key, file=other.stdin, flush=True)
            return float(other.stdout.readline())

        samples = [{key: timed(key) for key in (*FUSED, *steps)} for _ in range(ROUNDS)]
        other.stdin.close()
    print(f"LPIPS {shape} float32, torch {torch.__version__}, medians of {ROUNDS} rounds")
    medians = {key: statistics.median(x[key] for x in samples) for key in samples[0]}
    for key, median in medians.items():
        print(f"{key:15} {median:7.2f} ms {median / medians[FUSED[0]]:6.2f}x")


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2], tuple(int(size) for size in sys.argv[3].split("x")))
    else:
        main(*sys.argv[1:])
