"""tests/compile_cuda.py: what it reads, and what it fails on."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent / "compile_cuda.py"
REPORT = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4kernPf' for 'sm_80'
ptxas info    : Function properties for _Z4kernPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 512 bytes smem
ptxas info    : Compile time = 9.453 ms
ptxas info    : Compiling entry function '_Z4kernPf' for 'sm_90a'
ptxas info    : Function properties for _Z4kernPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 72 registers, used 1 barriers, 16 bytes cumulative stack size
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compile_cuda", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_nvcc(folder: Path, *, report: str = REPORT, code: int = 0) -> None:
    """An nvcc that compiles nothing and prints this."""
    folder.mkdir(exist_ok=True)
    (folder / "report").write_text(report)
    (folder / "nvcc").write_text(f"#!/bin/sh\ncat {folder / 'report'} >&2\nexit {code}\n")
    (folder / "nvcc").chmod(0o755)


def run(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_HOME"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PATH": path},
    )


def test_reads_what_ptxas_reports(script) -> None:
    first, second = script.kernels_of(REPORT)
    assert first[:1] + first[2:] == ("sm_80", 30, 0, 0, 512)
    assert second[:1] + second[2:] == ("sm_90a", 72, 20, 16, 0)
    assert first.name in ("kern", "_Z4kernPf")


def test_compiles_with_the_flags_of_the_build(script) -> None:
    assert script.targets_of(script.flags_for([])) == ["sm_80", "sm_90a", "sm_100", "sm_120"]
    chosen = script.flags_for(["sm_90a"])
    assert script.targets_of(chosen) == ["sm_90a"]
    assert {"-std=c++17", "-O3"} <= set(chosen)


def test_spills_on_hopper_fail(tmp_path) -> None:
    make_nvcc(tmp_path / "bin")
    done = run("--only", "device", path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "FAILED: spills" in done.stdout
    make_nvcc(tmp_path / "bin", report=REPORT.replace("'sm_90a'", "'sm_100'"))
    assert run("--only", "device", path=f"{tmp_path / 'bin'}:/usr/bin:/bin").returncode == 0


def test_a_warning_fails(tmp_path) -> None:
    make_nvcc(tmp_path / "bin", report="x.cu(3): error: unused variable\n", code=1)
    done = run("--only", "device", path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "unused variable" in done.stdout


def test_without_nvcc_nothing_is_compiled_and_it_says_so(tmp_path) -> None:
    done = run(path=str(tmp_path))
    assert done.returncode == 0
    assert "not compiled: no nvcc on PATH" in done.stdout


def test_an_unknown_target_is_refused(tmp_path) -> None:
    make_nvcc(tmp_path / "bin")
    done = run("--targets", "sm_1", path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 2
    assert "unknown target 'sm_1'" in done.stderr


def test_a_file_without_kernels_fails(tmp_path) -> None:
    make_nvcc(tmp_path / "bin", report="nothing\n")
    done = run("--only", "device", path=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert done.returncode == 1
    assert "no kernel is reported" in done.stdout


def test_a_real_file_compiles_for_hopper_without_spills() -> None:
    """One for all: `make compile` compiles every file for every architecture."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    done = run("--targets", "sm_90a", "--only", "original", path=os.environ["PATH"])
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("forward_kernel<float>", "backward_kernel<float>"):
        assert name in done.stdout or shutil.which("c++filt") is None
