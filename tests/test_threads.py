"""Whose threads the native core works on, and that a fork does not stop it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap

import pytest

from survfuse.native.core import native_core

pytestmark = pytest.mark.skipif(native_core() is None, reason="there is no native core")

# the parent has used all threads; in the child those of OpenMP are gone
FORK = """
    import os, signal, torch
    from survfuse.ops import pool_bag

    torch.set_num_threads(2)
    g = torch.Generator().manual_seed(0)
    rows, bag = torch.randn(1, 2, 8, generator=g), torch.randn(3000, 8, generator=g)

    def pooled():
        return pool_bag(rows, bag[None], backend="native").pooled

    expected = pooled()
    # torch has used its threads too
    torch.randn(512, 512) @ torch.randn(512, 512)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(pooled(), expected) else 3)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, code
    assert torch.equal(pooled(), expected)
"""
ALONE = """
    import importlib.util, sys
    spec = importlib.util.spec_from_file_location('_native', sys.argv[1])
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    print(core.machine_info()['threads'])
"""


def ran(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_threads_are_those_that_torch_brought() -> None:
    brought = hasattr(ctypes.CDLL(None), "GOMP_parallel")
    assert native_core().machine_info()["threads"] == ("OpenMP" if brought else "own")
    assert brought or sys.platform != "linux"


def test_without_torch_they_are_its_own() -> None:
    assert ran(ALONE, native_core().__file__) == "own"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_works() -> None:
    ran(FORK)
