"""The commands as a user types them, on sizes that take seconds."""

import contextlib
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import fusedloss
from fusedloss import bench, demo, doctor
from fusedloss.cases import CASES
from fusedloss.cli import main

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PNG = b"\x89PNG"
MEASURED = [name for name, case in CASES.items() if case.rank == 2]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A quick run of every case of rank 2: the folder with its files and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    files = ["--json", f"{folder}/a.json", "--plot", f"{folder}/a.png"]
    with open(folder / "printed", "w") as printed, contextlib.redirect_stdout(printed):
        assert main(["bench", "--quick", "--shape", "32x40", *files]) == 0
    return folder


def test_doctor_names_versions_and_fails_only_without_the_compiled_library(capsys):
    status = main(["doctor"])
    printed = capsys.readouterr().out
    assert status == (0 if fusedloss.backend() == "compiled" else 1), printed
    for version in (tf.__version__, keras.__version__, np.__version__):
        assert version in printed


def test_doctor_tells_what_each_gpu_lacks(monkeypatch):
    gpus = [("GPU:0 Old", (6, 1)), ("GPU:1 New", (9, 0)), ("GPU:2 Other", None)]
    monkeypatch.setattr(doctor._lib, "gpus", lambda: gpus)
    monkeypatch.setattr(doctor._lib, "driver_cuda", lambda: (12, 4))

    def remedies(**build):
        rows = doctor.gpu_findings(build)
        assert all(what and state for what, state, _ in rows)
        return {what: remedy for what, _, remedy in rows if remedy}

    found = remedies(cuda_version="13.0", cuda_architectures=["75", "90"])
    assert list(found) == ["NVIDIA driver", "GPU visible: GPU:0 Old", "GPU visible: GPU:2 Other"]
    assert "update the driver" in found["NVIDIA driver"]
    assert "CMAKE_CUDA_ARCHITECTURES=61" in found["GPU visible: GPU:0 Old"]
    assert list(remedies(cuda_version="12.9", cuda_architectures=["60", "90"])) == [
        "GPU visible: GPU:2 Other"
    ]
    found = remedies(cuda_version="", cuda_architectures=[])
    assert "rebuild with a CUDA compiler" in found["CUDA architectures in the library"]
    gpus.clear()
    assert remedies(cuda_version="13.0", cuda_architectures=["90"]) == {}


def test_bench_prints_its_columns(measured):
    printed = (measured / "printed").read_text()
    assert max(map(len, printed.splitlines())) <= 120
    for word in ("32×40 float32", "median ms", "p20", "p80", "GB/s", "extra MiB", "Keras", "Goals"):
        assert word in printed


def test_bench_records_every_form_in_both_modes(measured):
    document = json.loads((measured / "a.json").read_text())
    assert {"cpu", "threads", "tensorflow", "keras"} <= set(document["machine"])
    assert [result["case"] for result in document["results"]] == MEASURED
    for result in document["results"]:
        case = CASES[result["case"]]
        expected = {bench.FUSED, *case.stock(tuple(result["shape"]), [])}
        if case.plain:
            expected.add(bench.FUSED_PLAIN)
        for mode in bench.MODES:
            forms = {t["form"] for t in result["timings"] if t["mode"] == mode}
            assert forms == expected
        for timing in result["timings"]:
            assert len(timing["samples_ms"]) == bench.QUICK_ROUNDS
            assert min(timing["samples_ms"]) > 0
            # Stock and ours both round in float32, XLA sums millions of squares in one run; a wrong
            # truth or gradient is off by far more.
            if timing["form"] == bench.FUSED_PLAIN:
                assert timing["loss_error"] is timing["gradient_error"] is None
                continue
            assert timing["loss_error"] < (1e-5 if timing["form"] == bench.FUSED else 1e-4)
            if case.evaluation:
                assert timing["gradient_error"] is None
            else:
                assert timing["gradient_error"] < 1e-5


def test_bench_draws(measured):
    assert (measured / "a.png").read_bytes().startswith(PNG)


def test_report_renders_what_bench_wrote(measured, capsys):
    report = runpy.run_path(str(BENCHMARKS / "report.py"))
    report["main"]([f"{measured}/a.json", "--plot", f"{measured}/b.png"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(MEASURED)
    assert len({line.count("|") for line in lines}) == 1
    assert "32×40 float32" in lines[2]
    assert (measured / "b.png").read_bytes().startswith(PNG)


def test_report_renders_what_pytest_benchmark_wrote(tmp_path, capsys):
    written = tmp_path / "speed.json"
    subprocess.run(
        [sys.executable, "-m", "pytest", BENCHMARKS, "-q", "-k", "32x10-", "-p", "no:cacheprovider",
         f"--benchmark-json={written}"],
        check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    runpy.run_path(str(BENCHMARKS / "report.py"))["main"]([str(written)])
    assert "32×10 float32" in capsys.readouterr().out.splitlines()[-1]


def assert_is_the_derivative(gradient, loss, at):
    for index in np.ndindex(at.shape):
        low, high = at.copy(), at.copy()
        low[index] -= 1e-6
        high[index] += 1e-6
        slope = (loss(high) - loss(low)) / 2e-6
        assert math.isclose(slope, gradient[index], rel_tol=1e-5, abs_tol=1e-8)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_truth_is_the_derivative_of_its_loss(case):
    rng, shape = np.random.default_rng(1), {2: (2, 16), 4: (2, 2, 2, 3)}[case.rank]
    if case.truth and not case.evaluation:
        inputs = case.sample(rng, shape, "float32")
        targets, predictions = (tf.nest.flatten(x)[-1].numpy() for x in inputs)  # of one layer
        predictions = predictions.astype(np.float64)
        _, gradient = case.truth(targets, predictions)
        assert_is_the_derivative(gradient, lambda x: case.truth(targets, x)[0], predictions)
    if case.penalty_truth:
        weight = rng.normal(size=shape)
        _, gradient = case.penalty_truth(weight)
        assert_is_the_derivative(gradient, lambda w: case.penalty_truth(w)[0], weight)


def test_truth_in_chunks_is_truth_at_once(monkeypatch):
    case = CASES["pointwise/huber_penalty"]
    rng = np.random.default_rng(1)
    inputs = [x.numpy() for x in case.sample(rng, (7, 5), "float32")]
    weights = [rng.normal(size=(4, 3)), rng.normal(size=6)]
    monkeypatch.setattr(bench, "TRUTH_BYTES", 2 * 5 * 8)
    loss, gradients = bench.exact(case, inputs, weights)
    whole = [case.truth(*inputs), *map(case.penalty_truth, weights)]
    assert math.isclose(loss, sum(value for value, _ in whole), rel_tol=1e-12)
    for gradient, (_, whole_gradient) in zip(gradients, whole, strict=True):
        np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-12)


def test_every_round_times_every_call_once(monkeypatch):
    monkeypatch.setattr(bench, "calls_per_sample", lambda call: 1)
    made = []
    samples = bench.interleave({name: lambda name=name: made.append(name) for name in "abc"}, 4)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = made[-12:]
    assert all(sorted(rounds[start : start + 3]) == ["a", "b", "c"] for start in range(0, 12, 3))


@pytest.mark.parametrize(
    "words,text",
    [
        (["bench", "softmax"], "no case 'softmax'; there are: softmax_xent/sparse"),
        (["bench", "--shape", "3xy"], "--shape is positive sizes such as 1024x32000, got '3xy'"),
        (["bench", "--shape", "0x3"], "--shape is positive sizes"),
        (["bench", "--shape", "3"], "takes predictions of rank 2"),
        (["bench", "--dtype", "int8"], "--dtype 'int8' is not one of softmax_xent/sparse: float32"),
        (["demo", "--epochs", "0"], "--epochs must be at least 1, got 0"),
    ],
)
def test_a_wrong_command_line_says_what_would_be_right(words, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert text in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("fusedloss.cli.util.find_spec", lambda module: None)
    with pytest.raises(SystemExit):
        main(["demo"])
    assert "python -m pip install 'fusedloss[demo]'" in capsys.readouterr().err


def test_demo_trains_both_alike_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "TIMED_ROUNDS", 2)
    assert main(["demo", "--epochs", "2", "--plot", f"{tmp_path}/curves.png"]) == 0
    printed = capsys.readouterr().out
    assert "within 1e-05" in printed
    assert "moves of which 2% are legal" in printed
    assert max(map(len, printed.splitlines())) <= 120
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
