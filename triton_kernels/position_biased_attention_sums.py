"""`position_biased_attention` backward: partial sums added in a fixed order.

Contract: survfuse/ops/position_biased_attention.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import next_bag, rows_before
from .ragged import bag_range, slots_of_bag


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_parts"])
def position_biased_rows_kernel(
    packed_ptr,  # [total, n_parts, C] in, fp32
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    stored_ptr,  # [T, C] out
    n_bags,
    n_stored,
    n_parts,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The gradient of stored rows from that of packed ones, over bags in ascending order; 0 for
    rows in no bag. Grid: (cdiv(T, BLOCK_R) * cdiv(C, BLOCK_C),)."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    low = (tl.program_id(0) // C_BLOCKS).to(tl.int64) * BLOCK_R
    rows = low + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) % C_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    bag = next_bag(-1, low, low + BLOCK_R, starts_ptr, lengths_ptr, n_bags, n_stored)
    while bag < n_bags:
        start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        inside = (rows >= start) & (rows < start + length)
        first = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        mask = inside[:, None] & (cols < C)[None, :]
        for part in range(n_parts):
            at = ((first + rows - start) * n_parts + part)[:, None] * C + cols[None, :]
            acc += tl.load(packed_ptr + at, mask=mask, other=0.0)
        bag = next_bag(bag, low, low + BLOCK_R, starts_ptr, lengths_ptr, n_bags, n_stored)
    mask = (rows < n_stored)[:, None] & (cols < C)[None, :]
    to = stored_ptr + rows[:, None] * C + cols[None, :]
    tl.store(to, acc.to(stored_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_bags", "n_stored", "rows_per_slot", "size", "inner", "n_parts"])
def position_biased_slots_kernel(
    part_ptr,  # [S, size / inner, n_parts, inner] in, fp32
    starts_ptr,  # [B] in, of the queries
    lengths_ptr,  # [B] in
    sum_ptr,  # [B, size] out
    n_bags,
    n_stored,
    rows_per_slot,
    size,
    inner,
    n_parts,
    BLOCK_C: tl.constexpr,
):
    """Sums over the slots of a bag, in their order. Grid: (B * cdiv(size, BLOCK_C),)."""
    blocks = tl.cdiv(size, BLOCK_C)
    bag = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < size
    first, count = slots_of_bag(bag, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for step in range(count):
        slot = (first + step).to(tl.int64)
        for part in range(n_parts):
            at = slot * size * n_parts
            at += (cols // inner * n_parts + part).to(tl.int64) * inner + cols % inner
            acc += tl.load(part_ptr + at, mask=mask, other=0.0)
    to = sum_ptr + bag.to(tl.int64) * size + cols
    tl.store(to, acc.to(sum_ptr.dtype.element_ty), mask=mask)
