"""torch's FLOP counter knows the ops, whichever of the two is imported first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from survfuse import Ragged, ops

ROOT = Path(__file__).resolve().parents[2]
N, D, R = 50, 8, 3


def count(*, trained: bool) -> tuple[int, int, int]:
    """Operations of pool_bag forward, of its backward, and of pool_weights forward."""
    from torch.utils.flop_counter import FlopCounterMode

    # two bags over the same rows: operations follow the total and not the stored rows
    ragged = Ragged.from_ranges([0, 0], [N, N - 10])
    rows = torch.randn(2, R, D, requires_grad=True)
    bag = torch.randn(N, D, requires_grad=trained)
    counts = []
    with FlopCounterMode(display=False) as counter:
        pooled, lse, _ = ops.pool_bag(rows, bag, ragged=ragged)
        counts.append(counter.get_total_flops())
        pooled.sum().backward()
        counts.append(counter.get_total_flops() - counts[0])
    with FlopCounterMode(display=False) as counter:
        ops.pool_weights(rows, bag, lse.detach(), ragged=ragged)
        counts.append(counter.get_total_flops())
    return tuple(counts)


@pytest.mark.parametrize("trained", [False, True])
def test_operations_of_a_call(trained: bool) -> None:
    unit = (N + N - 10) * R * D
    assert count(trained=trained) == (4 * unit, (10 if trained else 6) * unit, 2 * unit)


@pytest.mark.parametrize("first", ["survfuse.ops", "torch.utils.flop_counter"])
def test_order_of_imports_does_not_matter(first: str) -> None:
    program = f"import {first}\nfrom tests.ops.test_flops import count\nprint(count(trained=False))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == str(count(trained=False))
