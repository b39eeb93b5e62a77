"""Fixed-order merges of the slots of a bag. Math: docs/math.md, "Pooling".

A chunk of slots is merged into what earlier chunks gave. Results go to the other half of a pair of
buffers, because the programs of one query row share its running maximum and sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ragged import slots_of_bag

_RUNTIME = ["n_bags", "n_stored", "n_rows", "first_slot", "n_slots", "rows_per_slot"]


@triton.jit(do_not_specialize=_RUNTIME)
def pool_bag_merge_kernel(
    part_ptr,  # [C, R, D] in
    part_max_ptr,  # [C, R] in
    part_sum_ptr,  # [C, R] in
    part_weight_ptr,  # [C, R] in
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    pooled_ptr,  # [B, R, D] in, out
    lse_ptr,  # [B, R] out
    weight_sum_ptr,  # [B, R] out
    old_ptr,  # [3, B, R] in    planes max, sum, kept sum over the chunks before
    new_ptr,  # [3, B, R] out
    n_bags,
    n_stored,
    n_rows,
    first_slot,
    n_slots,
    rows_per_slot,
    keep_scale,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge normalised results with a chunk of partials. Grid: (B * R * cdiv(D, BLOCK_D),).

    The state is not read back from lse, which would lose digits with every chunk.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d_block = tl.program_id(0) % D_BLOCKS
    out = (tl.program_id(0) // D_BLOCKS).to(tl.int64)
    bag = (out // n_rows).to(tl.int32)
    row = out % n_rows
    begin, count = slots_of_bag(bag, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot)
    end = tl.minimum(begin + count, first_slot + n_slots) - first_slot
    begin = tl.maximum(begin, first_slot) - first_slot
    cols = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)

    plane = n_bags.to(tl.int64) * n_rows
    old_max = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    if not FIRST:
        old_max = tl.load(old_ptr + out)
        total = tl.load(old_ptr + plane + out)
    largest = old_max
    for s0 in range(begin, end, BLOCK_S):
        at = (s0 + offs_s).to(tl.int64) * n_rows + row
        inside = s0 + offs_s < end
        largest = tl.maximum(
            largest, tl.max(tl.load(part_max_ptr + at, mask=inside, other=-float("inf")), 0)
        )
    finite = tl.where(largest == -float("inf"), 0.0, largest)

    total = total * tl.exp(old_max - finite)
    weight = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    if not FIRST:
        weight = tl.load(old_ptr + 2 * plane + out) * tl.exp(old_max - finite)
        acc = tl.load(pooled_ptr + out * D + cols, mask=cols < D, other=0.0) * total
    for s0 in range(begin, end, BLOCK_S):
        at = (s0 + offs_s).to(tl.int64) * n_rows + row
        inside = s0 + offs_s < end
        share = tl.exp(tl.load(part_max_ptr + at, mask=inside, other=-float("inf")) - finite)
        total += tl.sum(share * tl.load(part_sum_ptr + at, mask=inside, other=0.0), 0)
        kept = tl.load(part_weight_ptr + at, mask=inside, other=0.0)
        weight += tl.sum(share * kept, 0) * keep_scale
        part = tl.load(
            part_ptr + at[:, None] * D + cols[None, :],
            mask=inside[:, None] & (cols < D)[None, :],
            other=0.0,
        )
        acc += tl.sum(part * share[:, None], 0) * keep_scale

    # not by the maximum, which skips NaN: a bag of NaN gives NaN
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    tl.store(pooled_ptr + out * D + cols, acc / divisor, mask=cols < D)
    if d_block == 0:
        tl.store(new_ptr + out, largest)
        tl.store(new_ptr + plane + out, total)
        tl.store(new_ptr + 2 * plane + out, weight)
        lse = tl.where(empty, -float("inf"), finite + tl.log(divisor))
        tl.store(lse_ptr + out, lse)
        tl.store(weight_sum_ptr + out, weight / divisor)


@triton.jit(do_not_specialize=_RUNTIME)
def pool_bag_sum_kernel(
    part_ptr,  # [C, R, D] in
    part_sum_ptr,  # [C, R] in      sums of d_logits; or None: not balanced
    pooled_ptr,  # [B, R, D] in
    d_lse_ptr,  # [B, R] in
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    d_rows_ptr,  # [B, R, D] in, out
    n_bags,
    n_stored,
    n_rows,
    first_slot,
    n_slots,
    rows_per_slot,
    scale,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add a chunk of partial sums, balanced. Grid: (B * R * cdiv(D, BLOCK_D),).

    The d_logits of a row sum to d_lse exactly. What their computed sum misses has gone along the
    softmax weights, so it stands in d_rows times the pooled patch and is taken out of it here.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    d_block = tl.program_id(0) % D_BLOCKS
    out = (tl.program_id(0) // D_BLOCKS).to(tl.int64)
    bag = (out // n_rows).to(tl.int32)
    row = out % n_rows
    begin, count = slots_of_bag(bag, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot)
    end = tl.minimum(begin + count, first_slot + n_slots) - first_slot
    begin = tl.maximum(begin, first_slot) - first_slot
    cols = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    missed = tl.zeros((), tl.float32)
    if FIRST:
        missed = tl.load(d_lse_ptr + out)
    else:
        acc = tl.load(d_rows_ptr + out * D + cols, mask=cols < D, other=0.0)
    for s0 in range(begin, end, BLOCK_S):
        at = (s0 + offs_s).to(tl.int64) * n_rows + row
        inside = s0 + offs_s < end
        part = tl.load(
            part_ptr + at[:, None] * D + cols[None, :],
            mask=inside[:, None] & (cols < D)[None, :],
            other=0.0,
        )
        acc += tl.sum(part, 0)
        if part_sum_ptr is not None:
            missed -= tl.sum(tl.load(part_sum_ptr + at, mask=inside, other=0.0), 0)
    if part_sum_ptr is not None:
        pooled = tl.load(pooled_ptr + out * D + cols, mask=cols < D, other=0.0)
        # by selection: a bag without rows has pooled 0, and d_lse may be anything
        acc += tl.where(pooled == 0, 0.0, missed * scale * pooled)
    tl.store(d_rows_ptr + out * D + cols, acc, mask=cols < D)
