"""The CUDA sources compile for every architecture, without spills and without foreign symbols."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "csrc" / "cuda_check.py"

REPORT = """ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 260 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers
"""


@pytest.fixture(scope="module")
def check():
    spec = importlib.util.spec_from_file_location("cuda_check", CHECK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cuda_check"]


@pytest.fixture(scope="module")
def nvcc(check):
    if check.find_nvcc() is None:
        if os.environ.get("LORAFORGE_REQUIRE_NVCC") == "1":
            pytest.fail("LORAFORGE_REQUIRE_NVCC=1 and no nvcc is here")
        pytest.skip("no nvcc here: the CUDA sources are not compiled")


@pytest.mark.slow
def test_every_kernel_compiles_without_spills(check, nvcc):
    kernels, faults = check.check(int(os.environ.get("MAX_JOBS", "2")))
    assert not faults
    assert {k.arch for k in kernels} == set(check.ARCHS)
    sources = {p.name for p in (ROOT / "csrc" / "cuda").glob("*.cu") if "__global__" in p.read_text()}
    assert {k.source for k in kernels} == sources


def test_every_kernel_states_its_threads():
    """Without it the compiler may give a thread more registers than a block of them has."""
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")):
        text = source.read_text()
        assert len(re.findall(r"__global__ void", text)) == len(
            re.findall(r"__global__ void\s+__launch_bounds__", text)
        ), source.name


def test_the_report_is_read(check):
    first, second = check.parse("a.cu", REPORT)
    assert (first.name, first.arch, first.registers, first.shared_bytes) == ("first", "80", 32, 260)
    assert (first.stack_bytes, first.spill_bytes) == (8, 12)
    assert (second.name, second.arch, second.shared_bytes, second.spill_bytes) == ("second", "90a", 0, 0)


def test_symbols_that_tie_the_build_to_one_torch_are_foreign(check):
    fine = [
        "aoti_torch_get_size",
        "memcpy@GLIBC_2.14",
        "std::terminate()@GLIBCXX_3.4",
        "cudaFuncSetAttribute@libcudart.so.13",
    ]
    assert all(check.ALLOWED.search(name) for name in fine)
    foreign = ["at::Tensor::sum() const", "c10::Error::what()", "torch::Library::Library()", "cublasCreate_v2"]
    assert not any(check.ALLOWED.search(name) for name in foreign)


def test_macros_of_a_newer_torch_are_seen(check):
    assert check.MACRO.findall("STABLE_TORCH_ERROR_CODE_CHECK(f()); TORCH_BOX(&g)") == [
        "STABLE_TORCH_ERROR_CODE_CHECK",
        "TORCH_BOX",
    ]
    assert "STABLE_TORCH_ERROR_CODE_CHECK" not in check.MACROS


def test_without_nvcc_it_says_so(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "CUDA_HOME"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(CHECK)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "no nvcc here" in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_spill_over_the_record_is_a_fault(check, monkeypatch, nvcc):
    planted = check.Kernel("anderson.cu", "k", "80", 32, 0, 8, 8)
    monkeypatch.setattr(check, "parse", lambda source, text: [planted])
    monkeypatch.setattr(check, "compile_one", lambda source, command: (Path("x.o"), ""))
    monkeypatch.setattr(check, "foreign_symbols", lambda objects, nvcc: ["cublasCreate_v2"])
    faults = check.check(1)[1]
    assert "k spills 8 bytes on sm_80, 0 are recorded" in faults
    assert "the library asks for cublasCreate_v2" in faults
