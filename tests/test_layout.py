"""The layers point one way, and the versions of a kernel cannot be mixed up."""

import pathlib
import re
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
KERNELS = ROOT / "csrc" / "kernels"
LOSSES = re.search(r"set\(LOSSES ([\w ]+)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.[ch]*")), ids=lambda path: path.name)
def test_kernels_include_themselves_and_the_system_alone(path):
    for include in re.findall(r'#include ["<](.*)[">]', path.read_text()):
        assert "/" not in include or include.startswith("kernels/"), include


def test_one_file_sees_the_headers_of_tf2xla():
    seen = [
        path.name
        for path in (ROOT / "csrc").rglob("*.[ch]*")
        if "tensorflow/compiler/" in path.read_text()
    ]
    assert seen == ["xla_call.cc"]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_has_one_file_in_each_place(loss):
    for place in (
        f"csrc/kernels/{loss}.h",
        f"csrc/kernels/{loss}_cpu.cc",
        f"csrc/kernels/{loss}_simd.cc",
        f"csrc/kernels/{loss}_gpu.cu",
        f"csrc/tf/{loss}.cc",
        f"python/fusedloss/{loss}.py",
        f"python/fusedloss/reference/{loss}.py",
        f"python/fusedloss/cases/{loss}.py",
    ):
        assert (ROOT / place).is_file(), place


@pytest.mark.parametrize("source", sorted(KERNELS.glob("*_simd.cc")), ids=lambda path: path.stem)
def test_no_weak_symbol_leaves_its_version(source, tmp_path):
    # The linker keeps one of several weak symbols of a name: were it the AVX-512 one, a CPU without
    # AVX-512 would run it.
    compiler = shutil.which("g++")
    assert compiler, "the package is built with g++"
    built = tmp_path / "version.o"
    flags = re.search(r"set\(avx2_flags (.*)\)", (ROOT / "CMakeLists.txt").read_text())[1].split()
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-w", *flags, "-DFUSEDLOSS_CPU_LEVEL=avx2", "-I",
         str(ROOT / "csrc"), "-c", str(source), "-o", str(built)],
        check=True,
    )  # fmt: skip
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", str(built)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    weak = [line for line in symbols if re.match(r"\S* [WwVvu] ", line)]
    assert weak, "the versions are reached through weak symbols"
    assert [line for line in weak if "fusedloss::avx2::" not in line] == []
