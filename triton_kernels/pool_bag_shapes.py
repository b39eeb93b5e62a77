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

    @property
    def half(self) -> bool:
        """The products run on tensor cores."""
        return self.dtype.itemsize == 2


def narrow_shape(problem: Problem, limits: Limits, *, backward: bool) -> dict[str, int] | None:
    """Blocks of the kernels that read each row once; None where the wide kernels serve."""
    dtype, n_rows, width, aligned, normalize, given, dropout = problem
    block_d = max(16, next_power(width))
    if width > MAX_NARROW_WIDTH or (not aligned and normalize and block_d > 512):
        return None
    # 8 query rows where 16 would spill: see the register table
    every = normalize and dropout
    if block_d == MAX_NARROW_WIDTH:
        fp16 = dtype == torch.float16
        crowded = (every and (backward or not problem.half)) or (
            backward and (not problem.half or (normalize and fp16))
        )
    else:
        crowded = not problem.half and backward and every and block_d == MAX_NARROW_WIDTH // 2
    for block_r in (8,) if n_rows <= 8 or crowded else (16, 8):
        accumulators = block_r * block_d
        operands = (2 if backward else 1) * accumulators * dtype.itemsize
        if problem.half:
            groups = min(8, block_d // 16)
            few = accumulators == 16384 and (backward or normalize)
            few |= accumulators == 8192 and backward and normalize
            choices = [
                (n, s) for n in (32, 16) for s in (4, 3, 2, 1) if n == 16 or (aligned and not few)
            ]
            # scores cross warps; a pipeline of n stages buffers n - 1 tiles
            fixed, extra = operands + 16384, 0
        else:
            groups = block_d // (32 if backward and block_d == MAX_NARROW_WIDTH else 16)
            deep = not normalize or (backward and given and block_d == MAX_NARROW_WIDTH)
            choices = [(16, 2), (16, 1)] if deep else [(16, 1)]
            # operands of scalar products lie in shared memory, the weights of every group too
            fixed, extra = operands + groups * block_r * 64, int(normalize)
        for block_n, stages in choices:
            tiles = max(stages - 1, 1) if problem.half else 1 + extra * (stages - 1)
            if fixed + tiles * block_n * block_d * dtype.itemsize <= limits.shared_bytes:
                break
        else:
            continue
        if n_rows > 2 * block_r:
            return None
        return {
            "BLOCK_R": block_r,
            "GROUPS": groups,
            "BLOCK_K": block_d // groups,
            "BLOCK_N": block_n,
            "num_warps": 8 if block_d >= (256 if problem.half or block_r == 16 else 512) else 4,
            "num_stages": stages,
        }
    return None


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
