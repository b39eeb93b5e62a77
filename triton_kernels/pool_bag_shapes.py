"""Launch shapes of the pooling kernels: a table by type, query rows, width and shared memory.

Nothing here depends on the number of rows in a bag except the slots, which are runtime values, so
a new length never compiles. Reasons and the register table: docs/kernels.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MAX_NARROW_WIDTH = 1024
# fp32 accumulators of one program: 64 registers in each of 256 threads
_ACCUMULATORS = 16384


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
    normalize: bool  # with statistics computed on the fly
    dropout: bool

    @property
    def half(self) -> bool:
        return self.dtype.itemsize == 2


def narrow_shape(problem: Problem, limits: Limits, *, backward: bool) -> dict[str, int] | None:
    """Blocks of the kernels that read each row once; None where the wide kernels serve."""
    dtype, n_rows, width, aligned, normalize, dropout = problem
    half = problem.half
    block_d = max(16, next_power(width))
    largest_r = min(64, _ACCUMULATORS // block_d)
    crowded = backward and (not half or (normalize and dropout))
    if crowded and block_d == MAX_NARROW_WIDTH:
        largest_r = 8
    block_r = min(max(8, next_power(n_rows)), largest_r)
    if width > MAX_NARROW_WIDTH or n_rows > 2 * max(block_r, _ACCUMULATORS // block_d):
        return None
    full = block_r * block_d == _ACCUMULATORS
    if half:
        groups = min(8, block_d // 16)
        block_n = 16 if full and (backward or normalize) else 32
    else:
        groups = max(1, block_d // (32 if backward else 16))
        block_n = 16
    if not aligned:
        block_n = 16
    tile = block_n * block_d * dtype.itemsize
    fixed = (2 if backward else 1) * block_r * block_d * dtype.itemsize + 16384
    if not half:
        # operands of scalar products pass through shared memory once more
        fixed += tile * (2 if normalize else 1)
    stages = max(1, min(4 if half else 2, 1 + (limits.shared_bytes - fixed) // tile))
    return {
        "BLOCK_R": block_r,
        "GROUPS": groups,
        "BLOCK_K": block_d // groups,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_d >= 256 else 4,
        "num_stages": stages,
    }


def scores_shape(problem: Problem, limits: Limits, *, backward: bool) -> dict[str, int]:
    """Blocks of pool_bag_scores_kernel."""
    wide = problem.half and problem.aligned
    block_r = min(max(16, next_power(problem.n_rows)), 128 if wide else 64)
    # two accumulators in the backward: half the tile
    block_t = 64 if not wide or (backward and block_r == 128) else 128
    return {
        "BLOCK_R": block_r,
        "BLOCK_K": 64 if wide else 32,
        "BLOCK_T": block_t,
        "num_warps": 8,
        "num_stages": 3 if limits.shared_bytes > 100_000 else 2,
    }


def product_shape(problem: Problem, limits: Limits) -> dict[str, int]:
    """Blocks of pool_bag_product_kernel; BLOCK_N divides the BLOCK_T of the scores."""
    wide = problem.half and problem.aligned
    return {
        "BLOCK_R": min(max(16, next_power(problem.n_rows)), 128 if wide else 64),
        "BLOCK_D": min(128, max(16, next_power(problem.width))),
        "BLOCK_N": 64 if wide else 32,
        "num_warps": 8,
        "num_stages": 3 if limits.shared_bytes > 100_000 else 2,
    }


def trained_shape(problem: Problem, limits: Limits) -> dict[str, int]:
    """Blocks of pool_bag_bwd_bag_kernel."""
    return {
        "BLOCK_R": min(max(16, next_power(problem.n_rows)), 64 if problem.half else 32),
        "BLOCK_K": 64 if problem.half and problem.aligned else 32,
        "BLOCK_N": 32,
        "BLOCK_D": min(256, max(16, next_power(problem.width))),
        "num_warps": 8,
        "num_stages": 3 if limits.shared_bytes > 100_000 else 2,
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
    programs_per_slot: int,
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
        programs_per_slot: programs that share a slot.
        limits: the device.
    """
    budget = max(16 * 2**20, batch_bytes // 100)
    # one program per processor when there is one bag (all end together), else two for balance
    wanted = -(-limits.n_processors * (1 if n_bags == 1 else 2) // programs_per_slot)
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
