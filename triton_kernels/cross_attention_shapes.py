"""Launch shapes of the attention kernels: routes, blocks and cuts, from host integers alone.

Nothing here depends on the number of queries or keys except routes and cuts, which are runtime
values, so a new length never compiles. Reasons and the register table: docs/kernels.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .pool_bag_shapes import Limits, next_power

# queries of a bag that stay in the registers of the kernels that read keys once
MAX_FEW = 32
# rows of a slot that repay its partial and the merge
_MIN_ROWS = 256


class Problem(NamedTuple):
    """What a launch shape depends on."""

    dtype: torch.dtype  # of keys and values
    n_bags: int
    query_total: int
    query_max: int
    key_total: int
    key_max: int
    n_queries: int  # stored rows
    n_keys: int
    heads: int
    head_dim: int
    value_dim: int
    aligned: bool  # rows of keys and values start at multiples of 16 bytes
    dropout: bool
    bias: bool
    wide_query: bool  # queries are fp32 over keys of 16 bits

    @property
    def half(self) -> bool:
        """The products run on tensor cores."""
        return self.dtype.itemsize == 2

    @property
    def crowded(self) -> bool:
        """What costs registers: a mask of dropout, rows to round, loads in pieces, coefficients
        that are kept in the range of fp16."""
        fp16 = self.dtype == torch.float16
        return self.dropout or self.wide_query or fp16 or not self.aligned

    @property
    def block_d(self) -> int:
        """Channels of keys, padded."""
        return max(16, next_power(self.head_dim))

    @property
    def block_v(self) -> int:
        """Channels of values, padded."""
        return max(16, next_power(self.value_dim))

    @property
    def widest(self) -> int:
        """The larger of the two."""
        return max(self.block_d, self.block_v)

    @property
    def budget(self) -> int:
        """Bytes of workspace a call may take: max(16 MB, 1 % of the batch's)."""
        channels = self.heads * (self.head_dim + self.value_dim)
        batch = max(self.query_total, self.key_total) * channels * self.dtype.itemsize
        return max(16 * 2**20, batch // 100)


class Cut(NamedTuple):
    """Pieces of `rows` rows, at most `count` of them."""

    rows: int
    count: int


def few_shape(problem: Problem, limits: Limits, *, backward: bool) -> dict[str, int] | None:
    """Blocks of the kernels that read keys once; None where queries are too many."""
    if problem.query_max > MAX_FEW:
        return None
    wide, few = problem.widest, problem.query_max <= 16
    if not problem.half:
        if backward and not few:
            return None
        rows = 32 if wide <= 64 else 16
        return _blocks(problem, 16 if few else 32, rows, 4 if few and wide < 256 else 8, 1)
    if backward:
        rows = 32 if wide >= 128 or not few or problem.crowded else 64
        tight = problem.dtype == torch.float16 and wide >= 128 and not few
        rows = rows if wide < 256 and problem.aligned and not tight else 16
        warps = 4 if few or wide < 256 else 8
    else:
        rows, warps = 32 if wide >= 256 else 64, 4
    tile = rows * (problem.block_d + problem.block_v) * 2
    # two programs share a processor, and 64 KB in flight are more than latency needs; a bias is
    # loaded one step ahead of its mask
    room = limits.shared_bytes // 2 - 24576
    buffers = max(1, min(32768 // tile + 1, room // tile))
    return _blocks(problem, 16 if few else 32, rows, warps, 1 + buffers + problem.bias)


def forward_shape(problem: Problem, limits: Limits) -> dict[str, int]:
    """Blocks of cross_attention_many_fwd_kernel."""
    wide = problem.widest
    if not problem.half:
        # 32 queries of 128 channels spill; wider ones are laid out otherwise and do not
        return _blocks(problem, 16 if wide == 128 else 32, 16, 4 if wide < 256 else 8, 1)
    if limits.shared_bytes < 100_000:
        return _blocks(problem, 64, 32 if wide >= 128 else 64, 4, 1)
    rows = 64 if wide >= 256 or problem.query_max <= 64 else 128
    keys = 32 if wide == 128 and problem.crowded else 64
    return _blocks(problem, rows, keys, 8, 2 if wide >= 256 else 3)


def query_shape(problem: Problem, limits: Limits) -> dict[str, int]:
    """Blocks of cross_attention_bwd_query_kernel."""
    wide = problem.widest
    if not problem.half:
        return _blocks(problem, 32 if wide < 256 else 16, 16, 8, 1)
    rows = 64 if problem.query_max <= 64 or problem.crowded else 128
    rows = rows if wide < 256 else 32
    keys = 16 if wide >= 256 else 32 if wide >= 128 else 64
    return _blocks(problem, rows, keys, 8, 2 if limits.shared_bytes > 100_000 else 1)


def key_shape(problem: Problem, limits: Limits) -> dict[str, int]:
    """Blocks of cross_attention_bwd_key_kernel, which holds two accumulators of a tile's size."""
    wide = problem.widest
    if not problem.half:
        return _blocks(problem, 16, *((32, 4) if wide <= 64 else (16, 8)), 1)
    optional = problem.dropout or problem.wide_query
    tight = not problem.aligned or (problem.dtype == torch.float16 and optional)
    queries, warps = 32, 8
    if wide >= 256:
        keys = 16 if problem.crowded else 32
    elif wide >= 128:
        keys = 16 if tight else 32 if problem.crowded else 64
    else:
        keys = 64 if problem.crowded or problem.key_max <= 64 else 128
    stages = 2 if limits.shared_bytes > 100_000 else 1
    return _blocks(problem, queries, keys, warps, stages)


def _blocks(problem: Problem, queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_Q": queries,
        "BLOCK_N": keys,
        "BLOCK_D": problem.block_d,
        "BLOCK_V": problem.block_v,
        "num_warps": warps,
        "num_stages": stages,
    }


SUM = {"BLOCK_S": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2}
BLOCK_T = 512


def few_forward_cut(problem: Problem, limits: Limits, shape: dict[str, int]) -> Cut | None:
    """Slots of keys for few queries, each a partial; None where these would not fit."""
    return _slots(
        problem,
        limits,
        total=problem.key_total,
        longest=problem.key_max,
        align=shape["BLOCK_N"],
        programs=problem.heads * -(-problem.query_max // shape["BLOCK_Q"]) / 2,
        partial=problem.query_max * problem.heads * (problem.value_dim + 2) * 4,
    )


def few_backward_cut(problem: Problem, limits: Limits, shape: dict[str, int]) -> Cut | None:
    """Pieces of the stored keys, and a bound on how often bags touch one; None: not for this."""
    partial = problem.query_max * problem.heads * problem.head_dim * 4
    waves = 1 if problem.n_bags == 1 else 2
    wanted = max(1, 2 * waves * limits.n_processors // problem.heads)
    align = shape["BLOCK_N"]
    # of the rows that take part: bags may repeat rows, and may leave most of them out
    rows = max(_MIN_ROWS, -(-min(problem.key_total, problem.n_keys) // wanted))
    rows = -(-rows // align) * align
    longest = problem.n_bags * (-(-problem.key_max // rows) + 1)
    count = min(problem.key_total // rows + 2 * problem.n_bags, longest)
    return Cut(rows, count) if count * partial <= problem.budget else None


def key_slots(problem: Problem, limits: Limits, shape: dict[str, int], width: int) -> Cut | None:
    """Slots of keys for tiles of queries, where these alone would leave the device idle."""
    tiles = _tiles(problem.query_total, problem.query_max, problem.n_bags, shape["BLOCK_Q"])
    if tiles * problem.heads >= limits.n_processors or problem.key_total <= problem.query_total:
        return None
    return _slots(
        problem,
        limits,
        total=problem.key_total,
        longest=problem.key_max,
        align=shape["BLOCK_N"],
        programs=problem.heads * -(-problem.query_max // shape["BLOCK_Q"]),
        partial=problem.query_max * problem.heads * width * 4,
    )


def query_slots(problem: Problem, limits: Limits, shape: dict[str, int]) -> Cut | None:
    """Slots of queries for tiles of keys, likewise."""
    tiles = _tiles(problem.key_total, problem.key_max, problem.n_bags, shape["BLOCK_N"])
    if tiles * problem.heads >= limits.n_processors or problem.query_total <= problem.key_total:
        return None
    width = problem.head_dim + problem.value_dim + 1
    return _slots(
        problem,
        limits,
        total=problem.query_total,
        longest=problem.query_max,
        align=shape["BLOCK_Q"],
        programs=problem.heads * -(-problem.key_max // shape["BLOCK_N"]),
        partial=problem.key_max * problem.heads * width * 4,
    )


def query_tiles(problem: Problem, shape: dict[str, int]) -> int:
    """At most so many slots of BLOCK_Q queries."""
    return _tiles(problem.query_total, problem.query_max, problem.n_bags, shape["BLOCK_Q"])


def _tiles(total: int, longest: int, n_bags: int, block: int) -> int:
    return min(total // block + n_bags, n_bags * -(-longest // block))


def _slots(
    problem: Problem,
    limits: Limits,
    *,
    total: int,
    longest: int,
    align: int,
    programs: float,  # that share a slot, over those a processor holds at once
    partial: int,  # bytes of a slot
) -> Cut | None:
    # the device filled once when there is one bag (all end together), else twice for balance
    waves = 1 if problem.n_bags == 1 else 2
    wanted = max(1, math.ceil(limits.n_processors * waves / programs))
    affordable = problem.budget // partial - problem.n_bags
    if affordable < 1:
        return None
    rows = max(-(-total // min(wanted, affordable)), _MIN_ROWS)
    rows = -(-rows // align) * align
    return Cut(rows, _tiles(total, longest, problem.n_bags, rows))
