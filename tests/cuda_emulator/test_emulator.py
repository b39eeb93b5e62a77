"""The emulator finds what it is there to find: tests/cuda_emulator/emulator.h."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from tests.cuda_emulator.build import EMULATOR, build

N = 64


@pytest.fixture(scope="module")
def run() -> Callable[..., tuple[np.ndarray, str]]:
    """What a kernel of faults.cu wrote, and the error of its launch."""
    library = ctypes.CDLL(str(build([EMULATOR / "faults.cu"])))
    library.run_fault.restype = ctypes.c_char_p
    library.run_fault.argtypes = [ctypes.c_char_p, ctypes.c_void_p, *[ctypes.c_int] * 3]
    library.run_fault.argtypes += [ctypes.c_uint64]

    def call(name: str, argument: int, *, blocks: int = 1, threads: int = N, seed: int = 0):
        out = np.zeros(N, dtype=np.float32)
        message = library.run_fault(name.encode(), out.ctypes.data, argument, blocks, threads, seed)
        return out, message.decode()

    return call


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_barriers_hold_in_any_order(run, seed: int) -> None:
    out, error = run("rotate", 1, seed=seed)
    assert not error
    assert np.array_equal(out, (np.arange(N) + 1) % N)
    out, error = run("static", 1, seed=seed)
    assert not error
    assert np.array_equal(out, np.arange(N) ^ 1)


@pytest.mark.parametrize("name", ["rotate", "static"])
def test_a_missing_barrier_shows_as_nan(run, name: str) -> None:
    for seed in range(3):
        out, error = run(name, 0, seed=seed)
        assert not error
        # whoever came first read what nobody had written
        assert np.isnan(out).any()


def test_shuffles_reach_every_lane_of_a_warp(run) -> None:
    out, error = run("divergent", N, seed=5)
    assert not error
    assert np.array_equal(out[:32], np.full(32, 31 * 32 / 2))
    assert np.array_equal(out[32:], np.full(32, 32 * 32 + 31 * 32 / 2))


def test_a_barrier_that_some_lanes_miss_is_an_error(run) -> None:
    assert run("divergent", 20)[1] == "a faulty kernel: some threads wait forever"


def test_an_access_behind_shared_memory_is_an_error(run) -> None:
    assert run("overflow", 0)[1] == ""
    assert "a faulty kernel: invalid access to 0x" in run("overflow", 1)[1]
    # and the next launch is none the worse
    assert run("overflow", 0)[1] == ""


def test_a_misaligned_access_is_an_error(run) -> None:
    out, error = run("misaligned", 2)
    assert not error
    assert out[2:4].tolist() == [1, 2]
    assert run("misaligned", 1)[1] == "a faulty kernel: misaligned access"


def test_the_seed_decides_the_order_of_sums(run) -> None:
    sums = {float(run("sum", 0, blocks=9, seed=seed)[0][0]) for seed in range(1, 9)}
    assert len(sums) > 1
    assert run("sum", 0, blocks=9, seed=3)[0][0] == run("sum", 0, blocks=9, seed=3)[0][0]


@pytest.mark.parametrize(("blocks", "threads"), [(0, 32), (1, 0), (1, 1025)])
def test_a_launch_that_a_device_would_refuse_raises(run, blocks: int, threads: int) -> None:
    assert "a faulty kernel: invalid" in run("sum", 0, blocks=blocks, threads=threads)[1]
