"""Builds the CUDA kernels alone, checks every form against float64, times them, prints one table.

    python benchmarks/gpu/run.py                # builds, checks and times: a few minutes
    python benchmarks/gpu/run.py --check        # or a part of it
    python benchmarks/gpu/run.py --time --json results.json
    python benchmarks/gpu/run.py --sanitize     # compute-sanitizer over small cases

Needs an NVIDIA GPU with 80 GB of memory, the CUDA toolkit (nvcc; compute-sanitizer for
--sanitize), and in this Python torch with CUDA, numpy, cmake, ninja and pybind11. TensorFlow is not
needed. What else is there is timed beside the kernels: Liger's Triton kernel if `liger-kernel` is
installed, XLA-compiled Keras if this Python, or that of --keras-python, has a TensorFlow that sees
the GPU.

Exits with 1 if a check fails or the sanitizer finds something; a goal that is missed is only said.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests"  # the float64 truth lies there
BUILD = HERE / "build"
SANITIZERS = ("memcheck", "racecheck")


def find_tools():
    """Puts this Python's own tools and the usual place of the CUDA toolkit on the path."""
    toolkit = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    own = str(pathlib.Path(sys.executable).parent)
    more = [own, os.environ["PATH"], f"{toolkit}/bin", f"{toolkit}/compute-sanitizer"]
    os.environ["PATH"] = os.pathsep.join(more)


def build():
    """Builds the module for the GPU of this machine, and makes it importable."""
    import pybind11
    import torch

    major, minor = torch.cuda.get_device_capability()
    configure = [
        "cmake", "-S", HERE, "-B", BUILD, "-G", "Ninja",
        f"-DCMAKE_CUDA_ARCHITECTURES={major}{minor}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", BUILD]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(done.stdout)
    sys.path.insert(0, str(BUILD))


def answer_of(*command):
    """What a command prints, or "unknown"."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def machine():
    """{what: name or version}."""
    import torch

    release = re.search(r"release (\S+),", answer_of("nvcc", "--version"))
    driver = answer_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "GPU": torch.cuda.get_device_name(),
        "driver": driver.splitlines()[0],
        "CUDA toolkit": release[1] if release else "unknown",
        "torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        **{name: version_of(name) for name in ("triton", "liger-kernel", "tensorflow", "keras")},
        "Python": sys.version.split()[0],
    }


def check(kernels, seed, sanitized):
    """Prints what was checked; returns a document for JSON."""
    import check as checks
    import check_features
    import check_pointwise
    import check_subsets

    reference = "cpu" if sanitized else "cuda"
    report = checks.check_all(kernels, seed, "cuda", reference, sanitized)
    for of_others in (check_subsets, check_pointwise, check_features):
        of_others.check_all(report, kernels, seed, "cuda", reference, sanitized)
    counts = ", ".join(f"{count} {group}" for group, count in report.counts.items())
    print(f"Checked (seed {seed}): {counts}.")
    if not sanitized:
        print("Worst error as a share of what is allowed:")
        for what, share in sorted(report.worst.items()):
            print(f"  {what:28} {share:.2f}")
    for failure in report.failures[:20]:
        print(f"FAILED {failure}")
    print(f"{len(report.failures)} of {report.counts.total()} checks failed.", flush=True)
    return {"counts": report.counts, "worst": report.worst, "failures": report.failures}


def sanitize():
    """Runs the small checks under each tool; prints its verdict; returns {tool: verdict}."""
    if not shutil.which("compute-sanitizer"):
        sys.exit("compute-sanitizer is not on the path: it comes with the CUDA toolkit.")
    # Without torch's cache every array is an allocation of its own, and its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    verdicts = {}
    for tool in SANITIZERS:
        command = [
            "compute-sanitizer", f"--tool={tool}", "--kernel-name", "kns=fusedloss",
            "--target-processes=application-only", "--error-exitcode=9",
            sys.executable, __file__, "--check", "--small",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        verdict = " ".join(summary) or "no summary"
        if done.returncode:
            verdict += f" (exit code {done.returncode})"
            print(done.stdout[-8000:])
        print(f"compute-sanitizer {tool}: {verdict}", flush=True)
        verdicts[tool] = {"verdict": verdict, "passed": done.returncode == 0 and bool(summary)}
    return verdicts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="check, and time only if asked to")
    parser.add_argument("--time", action="store_true", help="time, and check only if asked to")
    parser.add_argument("--sanitize", action="store_true", help="run compute-sanitizer")
    parser.add_argument("--small", action="store_true", help="check little, for a sanitizer")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--seed", type=int, help="of the checks; without it another one every time")
    parser.add_argument(
        "--keras-python", metavar="PYTHON", default=sys.executable,
        help="a Python whose TensorFlow sees the GPU",
    )  # fmt: skip
    arguments = parser.parse_args()
    everything = not (arguments.check or arguments.time or arguments.sanitize)

    find_tools()
    sys.path[:0] = [str(HERE), str(TESTS)]
    import torch

    if not torch.cuda.is_available():
        sys.exit("torch sees no GPU.")
    start = time.monotonic()
    build()
    document = {"machine": machine()}
    print(", ".join(f"{what} {name}" for what, name in document["machine"].items()))
    print(f"Built in {time.monotonic() - start:.0f} s.", flush=True)
    passed = True
    if arguments.sanitize:
        document["sanitizer"] = sanitize()
        passed &= all(verdict["passed"] for verdict in document["sanitizer"].values())
    import fusedloss_gpu
    from kernels import Kernels

    kernels = Kernels(fusedloss_gpu)
    if arguments.check or everything:
        seed = secrets.randbits(31) if arguments.seed is None else arguments.seed
        document["check"] = check(kernels, seed, arguments.small)
        passed &= not document["check"]["failures"]
    if arguments.time or everything:
        import speed

        lines, document["speed"] = speed.run(kernels, arguments.keras_python, TESTS)
        print("\n".join(lines))
    print(f"{time.monotonic() - start:.0f} s in all.")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(document, indent=1))
    sys.exit(not passed)


if __name__ == "__main__":
    main()
