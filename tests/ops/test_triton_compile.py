"""tests/compile_triton.py: what it compiles, and what it refuses; no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "compile_triton.py"


def test_a_kernel_compiles_for_hopper_without_spills() -> None:
    """One for all: `make compile` compiles every kernel for every target."""
    pytest.importorskip("triton")
    # a process of its own: this one may have the kernels in the interpreter
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--targets", "sm_90", "--only", "pool_bag_fwd"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [line.split() for line in done.stdout.splitlines() if line.startswith("sm_90")]
    assert {line[1] for line in compiled} == {"pool_bag_fwd"}
    # the tile of the bag must stay in the asynchronous pipeline: the last column counts its copies
    assert [line for line in compiled if line[2] == "bf16"]
    assert all(int(line[-1]) > 0 for line in compiled if line[2] == "bf16")


def test_the_script_refuses_the_interpreter_and_unknown_targets() -> None:
    pytest.importorskip("triton")
    for arguments, interpret, word in (
        (["--quick"], "1", "TRITON_INTERPRET"),
        (["--quick", "--targets", "sm_1"], "0", "sm_1"),
    ):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": interpret},
            check=False,
        )
        assert done.returncode == 2
        assert word in done.stderr
