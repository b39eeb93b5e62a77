"""Launch shapes of `position_biased_attention`: blocks, and the cut of the queries into slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from .pool_bag_shapes import Limits


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
    def tight(self) -> bool:
        """The gradients of features, of positions and of the bias do not fit one kernel."""
        wide = self.width > 32 or self.depth > 2 or self.per_group > 1
        return self.dtype != torch.bfloat16 or wide

    @property
    def block_h(self) -> int:
        """Heads of a group that share a program, and an evaluation of their MLP."""
        wide = max(self.head_dim, self.value_dim) > 64
        most = 1 if not self.half or self.width > 32 or wide else 2
        return min(most, triton.next_power_of_2(self.per_group))


def blocks(problem: Problem) -> dict[str, int]:
    """Of every kernel that walks tiles of pairs."""
    block_h = problem.block_h
    block_q, block_n = 16, 32 if problem.width == 0 else 16
    # a warp holds all of a layer's weight: more pairs at once would leave too little beside it
    few = not problem.half or problem.width > 32 or block_h > 1
    piece = (16 if few else 32) if problem.width else block_q * block_n
    return {
        # a number per pair and head, and its slopes along x and y
        "SCRATCH": (block_h + 2) * block_q * block_n,
        "PIECE": piece,
        "BLOCK_Q": block_q,
        "BLOCK_N": block_n,
        "BLOCK_H": block_h,
        "BLOCK_D": max(16, triton.next_power_of_2(problem.head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(problem.value_dim)),
        "num_warps": 8,
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


def mlp_precision(asked: str) -> str:
    """How the MLP's products are formed: fp32 ones, asked for exactly, in three of TF32 where there
    are such.

    Exact ones run on scalar units, where a thread would hold all of their operands.
    """
    return "tf32x3" if asked == "ieee" and torch.version.hip is None else asked
