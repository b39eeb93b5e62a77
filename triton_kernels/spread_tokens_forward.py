"""`spread_tokens` forward: every patch attends to a few keys, the bag is read once.

Contract: survfuse/ops/spread_tokens.py.  Oracle: survfuse/reference/spread_tokens.py.  Math:
docs/math.md, "Spreading tokens over a bag".  Layout: one program per (tile of patches, block of
heads, block of value columns). All keys of its heads are one right side of a product over the
columns of the bag; the softmax runs over registers. Programs of one tile are neighbours, so that
all but one of them read it out of L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import rows_before
from .ragged import rows_of_slot
from .spread_tokens_tiles import (
    by_head,
    columns_of_block,
    keep_block,
    keys_of_block,
    load_values,
    repeat,
    score_block,
)


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_keys", "threshold"])
def spread_tokens_fwd_kernel(
    a_ptr,  # [B, H * Lk, PADDED] in    rounded keys
    per_key_ptr,  # [2, B, H * Lk] in     sum and factor of each
    values_ptr,  # [B, H, Lk, DV] in
    key_bias_ptr,  # [B, H, Lk] in         or None
    bag_ptr,  # [T, D] in            rows outside every bag are never read
    mean_ptr,  # [T] in               or None
    rstd_ptr,  # [T] in               or None
    seed_ptr,  # [1] in               or None: no dropout
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    out_ptr,  # [total, H, DV] out
    lse_ptr,  # [total, H] out
    n_bags,
    n_stored,
    n_keys,
    threshold,
    scale,
    eps,
    keep_scale,
    stride_bag_row,
    STRIDE_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid: (slots of BLOCK_N rows * cdiv(H, BLOCK_H) * cdiv(DV, BLOCK_V),)."""
    V_BLOCKS: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    H_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    v_block = tl.program_id(0) % V_BLOCKS
    head0 = tl.program_id(0) // V_BLOCKS % H_BLOCKS * BLOCK_H
    slot = tl.program_id(0) // V_BLOCKS // H_BLOCKS
    bag, first_row, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_stored, BLOCK_N
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    inside = offs_n < count
    rows = first_row + offs_n
    heads, cols, valid = columns_of_block(head0, v_block * BLOCK_V, HEADS, DV, BLOCK_H, BLOCK_V)
    values_ptr += bag.to(tl.int64) * HEADS * n_keys * DV
    acc = tl.zeros((BLOCK_N, BLOCK_H * BLOCK_V), tl.float32)
    largest = tl.full((BLOCK_N, BLOCK_H), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for j0 in range(0, n_keys, BLOCK_L):
        key_heads, keys, entries, exists = keys_of_block(head0, j0, n_keys, HEADS, BLOCK_H, BLOCK_L)
        s, bias, ok, _rel, _shift, _rstd = score_block(
            bag_ptr, mean_ptr, rstd_ptr, a_ptr, per_key_ptr, key_bias_ptr,
            rows, inside, bag, entries, exists, n_bags, HEADS * n_keys,
            scale, eps, stride_bag_row * STRIDE_UNIT, D, NORMALIZE, PRECISION, BLOCK_K,
        )  # fmt: skip
        logits = tl.where(ok[None, :], s + bias[None, :], -float("inf"))
        new = tl.maximum(largest, tl.max(by_head(logits, BLOCK_H), 2))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        weights = tl.exp(logits - repeat(finite, BLOCK_L))
        largest = new
        total = total * shrink + tl.sum(by_head(weights, BLOCK_H), 2)
        if seed_ptr is not None:
            keep = keep_block(seed_ptr, keys, key_heads, position + offs_n, bag, threshold, HEADS)
            weights = tl.where(keep, weights, 0.0)
        v = load_values(values_ptr, key_heads, entries, ok, heads, cols, valid, DV, dtype)
        acc = acc * repeat(shrink, BLOCK_V)
        acc = tl.dot(weights.to(dtype), v, acc, input_precision=PRECISION)

    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    first = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_stored) + position
    if v_block == 0:
        finite = tl.where(largest == -float("inf"), 0.0, largest)
        lse = tl.where(empty, -float("inf"), finite + tl.log(divisor))
        row_heads = head0 + tl.arange(0, BLOCK_H)
        place = offs_n[:, None] * HEADS + row_heads[None, :]
        mask = inside[:, None] & (row_heads < HEADS)[None, :]
        tl.store(lse_ptr + first * HEADS + place, lse, mask=mask)
    out = acc * repeat(keep_scale / divisor, BLOCK_V)
    place = offs_n[:, None] * (HEADS * DV) + (heads * DV + cols)[None, :]
    tl.store(
        out_ptr + first * HEADS * DV + place,
        out.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & valid[None, :],
    )
