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
    width: int  # of the MLP; 0 with a table
    depth: int
    dropout: bool
    shared_bytes: int  # that a program may have

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def units(self) -> int:
        """Of all hidden layers."""
        return self.depth * self.width

    @property
    def narrow(self) -> bool:
        """A tile of features is small beside the MLP's."""
        return max(self.head_dim, self.value_dim) <= 64

    @property
    def wide(self) -> bool:
        """Two hidden layers of 64 units of a tile do not stay in registers together."""
        return self.width > 32 and self.depth > 1


class Launch(NamedTuple):
    """What one launch of a backward kernel writes, and how."""

    features: bool  # gradients of queries, or of keys and values
    moves: bool  # of places
    adds: int  # of the bias: 1, the uppermost hidden layer and what follows; 2, those below
    blocks: dict[str, int]


def forward_blocks(problem: Problem) -> dict[str, int]:
    """Of the forward."""
    if not problem.width:
        rows = 32 if problem.half and problem.narrow else 16
        return _blocks(problem, warps=4, turns=1, num_stages=2) | {"BLOCK_Q": rows}
    if problem.half:
        return _blocks(problem, warps=4, turns=2 if problem.wide else 1, num_stages=2)
    return _blocks(problem, warps=8 if problem.width > 32 else 4, turns=2)


def query_launches(problem: Problem, *, moves: bool) -> list[Launch]:
    """Of the gradients of queries; of their places where `moves`."""
    if not problem.width:
        return [Launch(True, True, 0, _table_blocks(problem, num_stages=2))]
    if problem.half and not problem.wide and problem.depth < 3:
        blocks = _blocks(problem, warps=8 if moves else 4, turns=1, num_stages=2)
        return [Launch(True, True, 0, blocks)]
    turns = _blocks(problem, warps=8, turns=2)
    together = problem.units <= 128 if problem.half else problem.units <= 64 and problem.narrow
    if together:
        return [Launch(True, True, 0, turns)]
    return [Launch(True, False, 0, turns), Launch(False, True, 0, turns)]


def key_launches(problem: Problem) -> list[Launch]:
    """Of the gradients of keys and of the bias."""
    if not problem.width:
        return [Launch(True, True, 3, _table_blocks(problem))]
    few, many = (_blocks(problem, warps=warps, turns=2) for warps in (4, 8))
    plain = problem.dtype == torch.bfloat16 and not problem.dropout and problem.narrow
    if plain and problem.depth < 3 and problem.units <= 64:
        return [Launch(True, True, 3, many if problem.width > 32 else few)]
    features = Launch(True, False, 0, many if problem.wide else few)
    if problem.half and problem.units <= 128:
        return [features, Launch(False, True, 3, many)]
    # of both TF32 halves: two or three layers of 64 units may take more than a device has
    needed = 0 if problem.half else {128: 180, 192: 280}.get(problem.units, 0) * 2**10
    large = needed > problem.shared_bytes
    sums = _blocks(problem, warps=4, turns=4) if large else many
    parts = [Launch(False, False, adds, sums) for adds in ((1, 2) if problem.depth > 1 else (1,))]
    return [features, Launch(False, True, 0, many), *parts]


def _table_blocks(problem: Problem, num_stages: int = 1) -> dict[str, int]:
    """Of a backward kernel with a table."""
    warps = 4 if problem.half and problem.narrow else 8
    return _blocks(problem, warps=warps, turns=1, num_stages=num_stages)


def _blocks(problem: Problem, *, warps: int, turns: int, num_stages: int = 1) -> dict[str, int]:
    """A tile of 16 x 16 pairs keeps its MLP in registers, in one turn or in several; a table does
    not."""
    return {
        "BLOCK_Q": 16,
        "BLOCK_N": 32 if problem.width == 0 and (problem.half or problem.narrow) else 16,
        "BLOCK_D": max(16, triton.next_power_of_2(problem.head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(problem.value_dim)),
        "TURNS": turns,
        "num_warps": warps,
        "num_stages": num_stages,
    }


def tiles_per_program(programs: int, n_tiles: int, bytes_each: int) -> int:
    """Tiles of keys that a program walks one after the other, so that what each of them leaves
    stays within 16 MB.

    Args:
        programs: that share a tile.
        n_tiles: of keys.
        bytes_each: of the gradient of the parameters.
    """
    affordable = max(1, 16 * 2**20 // (programs * bytes_each))
    return -(-n_tiles // affordable)


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
    wanted = max(1, 16 * limits.n_processors // programs)
    affordable = max(1, 16 * 2**20 // max(1, slot_bytes) - n_bags)
    rows = max(-(-total // min(wanted, affordable)), 4 * block_q)
    return -(-rows // block_q) * block_q


def mlp_precision(asked: str) -> str:
    """How the MLP's products are formed: fp32 ones, asked for exactly, in three of TF32 where there
    are such.

    Exact ones run on scalar units, where a thread would hold all of their operands.
    """
    return "tf32x3" if asked == "ieee" and torch.version.hip is None else asked
