"""Launch shapes of the pooling kernels: a table by type, query rows, width and shared memory.

Nothing here depends on the number of rows in a bag except the slots, which are runtime values, so
a new length never compiles. Reasons and the register table: docs/kernels.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

MAX_NARROW_WIDTH = 1024


class Limits(NamedTuple):
    """What the launch heuristics need to know of a device."""

    n_processors: int
    shared_bytes: int  # shared memory one program may have


def device_limits(device: torch.device) -> Limits:
    """Limits of a CUDA or ROCm device; for the interpreter those of an H200."""
    if device.type != "cuda":
        return Limits(132, 232448)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(
        properties, "shared_memory_per_block_optin", properties.shared_memory_per_block
    )
    return Limits(properties.multi_processor_count, shared)


class Problem(NamedTuple):
    """What a launch shape depends on."""

    dtype: torch.dtype  # of the bag
    n_rows: int
    width: int
    aligned: bool  # rows of the bag start at multiples of 16 bytes
    normalize: bool
    given: bool  # the statistics of the normalisation are
    dropout: bool
    bias: bool

    @property
    def half(self) -> bool:
        """The products run on tensor cores."""
        return self.dtype.itemsize == 2


def narrow_shape(problem: Problem, limits: Limits, *, backward: bool) -> dict[str, int] | None:
    """Blocks of the kernels that read each row once; None where the wide kernels serve."""
    block_d = max(16, next_power(problem.width))
    if problem.width > MAX_NARROW_WIDTH or problem.n_rows > 32:
        return None
    if not problem.aligned and problem.normalize and block_d > 512:
        return None
    few = problem.n_rows <= 8 or _crowded(problem, block_d, backward=backward)
    for block_r in (8,) if few else (16, 8):
        if problem.n_rows > 2 * block_r:
            return None
        choose = _half_shape if problem.half else _single_shape
        shape = choose(problem, block_r, block_d, limits.shared_bytes, backward=backward)
        if shape is not None:
            return {"BLOCK_R": block_r, **shape}
    return None


def _crowded(problem: Problem, block_d: int, *, backward: bool) -> bool:
    """Where 16 query rows would spill: see the register table."""
    every = problem.normalize and problem.dropout
    if problem.half:
        fly = problem.normalize and not problem.given
        return backward and block_d == 1024 and (fly or every)
    if backward:
        return block_d == 1024 or (every and block_d == 512)
    return every and block_d == 1024


def narrow_balances(problem: Problem) -> bool:
    """Whether the row pass of the backward also sums d_logits, to balance d_rows.

    Normalised patches are centred and need it least; wide fp32 rows leave no register for it.
    """
    return not problem.normalize and (problem.half or problem.width <= 512)


def _half_shape(
    problem: Problem, block_r: int, block_d: int, shared: int, *, backward: bool
) -> dict[str, int] | None:
    """16-bit bags: tiles wait in shared memory for the tensor cores."""
    accumulators = block_r * block_d
    if backward:
        large = (
            accumulators > 8192 or block_d == 1024 or (accumulators > 4096 and problem.normalize)
        )
    else:
        large = problem.normalize and problem.dropout and accumulators > 8192
    resident = 2 if accumulators <= 4096 else 1
    # the query side, and scores that cross warps
    fixed = (2 if backward else 1) * accumulators * 2 + 16384
    for block_n in (16,) if large or not problem.aligned else (32, 16):
        tile = block_n * block_d * 2
        # without Hopper's large shared memory a tile also changes its layout there
        taken = fixed + (0 if shared > 100_000 else tile)
        # 128 KB in flight are more than latency needs; a bias is loaded one step ahead of its mask
        buffers = min(6, 131072 // tile, (shared // resident - taken) // tile)
        if buffers > 0 or taken + tile <= shared:
            return {
                "GROUPS": min(8, block_d // 16),
                "BLOCK_K": block_d // min(8, block_d // 16),
                "BLOCK_N": block_n,
                "num_warps": 8 if block_d >= 256 else 4,
                "num_stages": 1 + buffers + problem.bias if buffers > 0 else 1,
            }
    return None


def _single_shape(
    problem: Problem, block_r: int, block_d: int, shared: int, *, backward: bool
) -> dict[str, int] | None:
    """fp32 bags: products on scalar units, whose operands pass through shared memory and registers.

    Many short groups keep the operands of a thread few.
    """
    if backward and block_d == 1024 and problem.given and problem.bias and problem.dropout:
        # spills at any shape tried
        return None
    groups = block_d // (32 if backward and block_d == 1024 else 16)
    tile = 16 * block_d * 4
    fixed = (2 if backward else 1) * block_r * block_d * 4 + groups * block_r * 64 + tile
    given = problem.given and not problem.dropout
    deep = not problem.normalize or (backward and given and block_d == 1024)
    stages = 2 if deep and fixed + problem.normalize * tile <= shared else 1
    if fixed > shared:
        return None
    return {
        "GROUPS": groups,
        "BLOCK_K": block_d // groups,
        "BLOCK_N": 16,
        "num_warps": 8 if block_d >= (256 if block_r == 16 else 512) else 4,
        "num_stages": stages,
    }


def _stages(limits: Limits) -> int:
    return 3 if limits.shared_bytes > 100_000 else 2


def programs_per_processor(shape: dict[str, int]) -> int:
    """How many programs of a narrow shape are resident together, by registers."""
    return 2 if shape["BLOCK_R"] * shape["GROUPS"] * shape["BLOCK_K"] <= 4096 else 1


def scores_shape(problem: Problem, limits: Limits, *, backward: bool) -> dict[str, int]:
    """Blocks of pool_bag_scores_kernel."""
    wide = problem.half and problem.aligned
    block_r = min(max(16, next_power(problem.n_rows)), 128 if wide else 64)
    # two accumulators in the backward: half the tile
    block_t = 128 if wide else 64
    if backward and block_r == (128 if wide else 64) and not (problem.half and not wide):
        block_t //= 2
    return {
        "BLOCK_R": block_r,
        "BLOCK_K": 64 if wide else 32 if problem.half or problem.aligned else 16,
        "BLOCK_T": block_t,
        "num_warps": 8,
        "num_stages": _stages(limits) if problem.half or problem.aligned else 2,
    }


def product_shape(problem: Problem, limits: Limits) -> dict[str, int]:
    """Blocks of pool_bag_product_kernel; BLOCK_N divides the BLOCK_T of the scores."""
    wide = problem.half and problem.aligned
    return {
        "BLOCK_R": min(max(16, next_power(problem.n_rows)), 128 if wide else 64),
        "BLOCK_D": min(128, max(16, next_power(problem.width))),
        "BLOCK_N": (64 if problem.aligned else 32) if problem.half else 16,
        "num_warps": 8,
        "num_stages": _stages(limits) if problem.half else 1,
    }


def trained_shape(problem: Problem) -> dict[str, int]:
    """Blocks of pool_bag_bwd_bag_kernel."""
    half = problem.half
    return {
        "BLOCK_R": 16 if problem.n_rows <= 16 else 64 if half else 32,
        "BLOCK_K": (64 if problem.aligned else 32) if half else 16,
        "BLOCK_N": 32,
        "BLOCK_D": min(256 if half else 128, max(16, next_power(problem.width))),
        "num_warps": 8,
        "num_stages": 2,
    }


class Slots(NamedTuple):
    """How bags are cut: slots of `rows` rows, at most `count` of them, `chunk` at a time."""

    rows: int
    count: int
    chunk: int


def plan_slots(
    total: int,
    max_length: int,
    n_bags: int,
    *,
    align: int,
    slot_bytes: int,
    row_bytes: int,
    batch_bytes: int,
    programs_per_slot: float,
    limits: Limits,
) -> Slots:
    """Cut the bags from host integers alone.

    Args:
        total: rows of all bags, at least 1.
        max_length: rows of the longest.
        n_bags: number of bags.
        align: slots hold a multiple of this many rows.
        slot_bytes: workspace of a slot, without its rows.
        row_bytes: workspace of each of its rows.
        batch_bytes: bytes of all rows of all bags.
        programs_per_slot: programs that share a slot, over those a processor holds at once.
        limits: the device.
    """
    budget = max(16 * 2**20, batch_bytes // 100)
    # the device filled once when there is one bag (all end together), else twice for balance
    waves = 1 if n_bags == 1 else 2
    wanted = max(1, math.ceil(limits.n_processors * waves / programs_per_slot))
    if row_bytes:
        wanted *= 2
        affordable = budget // 2 // slot_bytes
        slots = max(1, min(wanted, affordable))
        most_rows = (budget - slots * slot_bytes) // (slots * row_bytes)
    else:
        slots = max(1, min(wanted, budget // slot_bytes))
        most_rows = max_length
    rows = max(-(-total // slots), 256)
    rows = min(rows, max(most_rows, 1))
    rows = max(align, rows // align * align if row_bytes else -(-rows // align) * align)
    count = min(total // rows + n_bags, n_bags * -(-max_length // rows))
    chunk = max(1, min(count, budget // (slot_bytes + rows * row_bytes)))
    return Slots(rows, count, chunk)


def next_power(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
