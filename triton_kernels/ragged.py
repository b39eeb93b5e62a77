"""Device functions for ragged bags: clamped ranges, the walk from a slot to its rows, dropout bits.

A *slot* is at most `rows_per_slot` consecutive rows of one bag. Slots are numbered bag by bag, so
their count, and where a bag's slots begin, follow from the lengths alone: no table is built, and
the host bounds their number by `total // rows_per_slot + n_bags` without asking the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK_B: tl.constexpr = tl.constexpr(128)


@triton.jit
def bag_range(
    bag,  # bag indices, scalar or vector
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    n_bags,
    n_stored,
):
    """First stored row and row count of a bag, clamped to the stored rows; 0, 0 past the end."""
    here = bag < n_bags
    start = tl.load(starts_ptr + bag, mask=here, other=0)
    length = tl.load(lengths_ptr + bag, mask=here, other=0)
    start = tl.minimum(tl.maximum(start, 0), n_stored)
    return start, tl.minimum(tl.maximum(length, 0), n_stored - start)


@triton.jit
def slots_of_bag(bag, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot):
    """The bag's first slot and its number of slots."""
    first = 0
    for b0 in range(0, n_bags, BLOCK_B):
        offs_b = b0 + tl.arange(0, BLOCK_B)
        _, length = bag_range(offs_b, starts_ptr, lengths_ptr, n_bags, n_stored)
        slots = tl.cdiv(length, rows_per_slot).to(tl.int32)
        first += tl.sum(tl.where(offs_b < bag, slots, 0))
    _, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
    return first, tl.cdiv(length, rows_per_slot).to(tl.int32)


@triton.jit
def rows_of_slot(slot, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot):
    """The slot's bag, first stored row, position of that row in its bag, and row count.

    A slot past the last one gives bag >= n_bags and no rows.
    """
    bag = 0
    before = 0
    running = 0
    for b0 in range(0, n_bags, BLOCK_B):
        offs_b = b0 + tl.arange(0, BLOCK_B)
        _, length = bag_range(offs_b, starts_ptr, lengths_ptr, n_bags, n_stored)
        ends = running + tl.cumsum(tl.cdiv(length, rows_per_slot).to(tl.int32), 0)
        passed = (ends <= slot) & (offs_b < n_bags)
        bag += tl.sum(passed.to(tl.int32))
        before = tl.maximum(before, tl.max(tl.where(passed, ends, 0)))
        running = tl.max(ends)
    start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
    position = (slot - before).to(tl.int64) * rows_per_slot
    count = tl.minimum(tl.maximum(length - position, 0), rows_per_slot)
    return bag, start + position, position.to(tl.int32), count.to(tl.int32)


@triton.jit
def keep_mask(
    seed,  # 64-bit seed, scalar
    positions,  # [N, 1] positions in the bag
    rows,  # [1, R] query rows
    bag,
    threshold,  # words below it are dropped
):
    """[N, R] True where a weight is kept: Philox 4x32-10, see survfuse/reference/dropout.py."""
    zero = tl.zeros_like(positions + rows)
    word, _, _, _ = tl.philox(seed, zero + positions, zero + rows, zero + bag, zero)
    return word >= threshold.to(tl.uint32)
