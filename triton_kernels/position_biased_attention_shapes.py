"""Launch shapes of `position_biased_attention`: blocks, and the cut of the queries into slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .pool_bag_shapes import Limits

# programs that share the heads of a group evaluate its MLP once each
MAX_HEADS = 4


class Problem(NamedTuple):
    """What blocks depend on."""

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    per_group: int  # heads
    width: int  # of the MLP; 0 with a table
    depth: int

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def block_h(self) -> int:
        return min(MAX_HEADS, triton.next_power_of_2(self.per_group))


def blocks(problem: Problem, *, backward: bool) -> dict[str, int]:
    """Of the kernels by queries and of that by keys."""
    block_h = problem.block_h
    # a tile of pairs times the MLP's width lies in registers, several times in the backward
    pairs = 512 if problem.width == 0 and block_h < 4 else 256
    return {
        "BLOCK_Q": 16,
        "BLOCK_N": pairs // 16,
        "BLOCK_H": block_h,
        "BLOCK_D": max(16, triton.next_power_of_2(problem.head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(problem.value_dim)),
        "num_warps": 8 if problem.width > 16 or block_h > 2 else 4,
        "num_stages": 1,
    }


def slots(total: int, longest: int, n_bags: int, rows: int) -> int:
    """At most so many slots of so many rows."""
    return min(total // rows + n_bags, n_bags * -(-longest // rows))


def rows_per_slot(
    total: int, n_bags: int, block_q: int, *, programs: int, slot_bytes: int, limits: Limits
) -> int:
    """Queries of a slot, a multiple of `block_q`.

    Args:
        total: queries of all bags.
        n_bags: how many there are.
        block_q: queries of a tile.
        programs: that share a slot.
        slot_bytes: workspace of a slot.
        limits: of the device.
    """
    wanted = max(1, 4 * limits.n_processors // programs)
    affordable = max(1, 16 * 2**20 // max(1, slot_bytes) - n_bags)
    rows = max(-(-total // min(wanted, affordable)), 4 * block_q)
    return -(-rows // block_q) * block_q


def precision(asked: str) -> str:
    """How products are formed: fp32 ones, asked for exactly, in three of TF32 where there are such.

    On scalar units a thread would hold all of a product's operands.
    """
    return "tf32x3" if asked == "ieee" and torch.version.hip is None else asked
