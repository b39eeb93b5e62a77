"""`spread_tokens` backward: d_bag of a trained bag.

Contract: survfuse/ops/spread_tokens.py.  Oracle: survfuse/reference/spread_tokens.py.  Math:
docs/math.md, "Spreading tokens over a bag".  Layout: as pool_bag_trained.py, one program per (tile
of stored rows, block of columns) that walks its bags in ascending order and writes once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import next_bag, rows_before
from .ragged import bag_range
from .spread_tokens_tiles import (
    finish_block,
    keys_of_block,
    result_factor,
    score_block,
    weigh_block,
)


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_keys", "total", "threshold"])
def spread_tokens_bag_kernel(
    a_ptr,  # [B, H * Lk, PADDED] in    rounded keys
    per_key_ptr,  # [2, B, H * Lk] in     sum and factor of each
    values_ptr,  # [B, H, Lk, DV] in
    key_bias_ptr,  # [B, H, Lk] in         or None
    bag_ptr,  # [T, D] in
    mean_ptr,  # [T] in               or None
    rstd_ptr,  # [T] in               or None
    seed_ptr,  # [1] in               or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] in      of spread_tokens_rows_kernel; read unless WHOLE
    d_bag_ptr,  # [T, D] out
    n_bags,
    n_stored,
    n_keys,
    total,
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
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # a block holds all keys
):
    """Grid: (cdiv(T, BLOCK_N) * cdiv(D, BLOCK_D),)."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    PADDED: tl.constexpr = (D + 15) // 16 * 16
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    low = (tl.program_id(0) // D_BLOCKS).to(tl.int64) * BLOCK_N
    rows = low + tl.arange(0, BLOCK_N)
    cols = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    n_entries = HEADS * n_keys
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    unit = tl.zeros((BLOCK_N,), tl.float32)
    # of the normalisation: sums that belong to every column, and the row's statistics
    flat = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    row_mean = tl.zeros((BLOCK_N,), tl.float32)
    row_shift = tl.zeros((BLOCK_N,), tl.float32)
    row_rstd = tl.zeros((BLOCK_N,), tl.float32)
    bag = next_bag(-1, low, low + BLOCK_N, starts_ptr, lengths_ptr, n_bags, n_stored)
    while bag < n_bags:
        start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        inside = (rows >= start) & (rows < start + length)
        positions = (rows - start).to(tl.int32)
        # where the tile's first row would have its results, were it in the bag
        first = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_stored) + low - start
        at = tl.arange(0, BLOCK_N)
        d_out_here = d_out_ptr + first * (HEADS * DV)
        rows_here = rows_ptr
        if not WHOLE:
            rows_here += first * HEADS
        for head0 in range(0, HEADS, BLOCK_H):
            factor = result_factor(
                d_out_here, at, inside, head0, HEADS, DV, BLOCK_H, BLOCK_V, dtype
            )
            for j0 in range(0, n_keys, BLOCK_L):
                key_heads, keys, entries, exists = keys_of_block(
                    head0, j0, n_keys, HEADS, BLOCK_H, BLOCK_L
                )
                s, bias, ok, rel, shift, rstd = score_block(
                    bag_ptr, mean_ptr, rstd_ptr, a_ptr, per_key_ptr, key_bias_ptr,
                    rows, inside, bag, entries, exists, n_bags, n_entries,
                    scale, eps, stride_bag_row * STRIDE_UNIT, D, NORMALIZE, PRECISION, BLOCK_K,
                )  # fmt: skip
                softmax, weights, dp = weigh_block(
                    s, bias, ok, d_out_here, lse_ptr + first * HEADS, values_ptr, seed_ptr, factor,
                    at, inside, positions, bag, head0, key_heads, keys, entries, n_keys,
                    threshold, keep_scale, HEADS, DV, PRECISION, BLOCK_V, dtype,
                )  # fmt: skip
                _, ds = finish_block(
                    softmax, weights, dp, rows_here, d_lse_ptr + first * HEADS, at, inside,
                    head0, total, HEADS, BLOCK_H, WHOLE,
                )  # fmt: skip
                bag_entry = bag.to(tl.int64) * n_entries
                if NORMALIZE:
                    along += tl.sum(ds * s, 1)
                    row_mean = tl.where(inside, rel, row_mean)
                    row_shift = tl.where(inside, shift, row_shift)
                    row_rstd = tl.where(inside, rstd, row_rstd)
                plane = n_bags.to(tl.int64) * n_entries
                a_factor = tl.load(
                    per_key_ptr + plane + bag_entry + entries, mask=exists, other=0.0
                )
                left = ds * (a_factor * scale)[None, :]
                if NORMALIZE:
                    a_sum = tl.load(per_key_ptr + bag_entry + entries, mask=exists, other=0.0)
                    flat += tl.sum(left * a_sum[None, :], 1)
                if dtype == tl.float16:
                    # they shrink with the loss: keep the largest so far at 1
                    new = tl.maximum(unit, tl.max(tl.abs(left), 1))
                    safe = tl.where(new > 1e-30, new, 1.0)
                    left = left / safe[:, None]
                    acc = acc * (unit / safe)[:, None]
                    unit = new
                mask = exists[:, None] & (cols < D)[None, :]
                a_at = (entries * PADDED)[:, None] + cols[None, :]
                a = tl.load(a_ptr + bag_entry * PADDED + a_at, mask=mask, other=0.0)
                acc = tl.dot(left.to(dtype), a, acc, input_precision=PRECISION)
        bag = next_bag(bag, low, low + BLOCK_N, starts_ptr, lengths_ptr, n_bags, n_stored)

    if dtype == tl.float16:
        acc = acc * unit[:, None]
    mask = (rows < n_stored)[:, None] & (cols < D)[None, :]
    if NORMALIZE:
        # rows that took part have a positive rstd; the others are not read
        x = tl.load(
            bag_ptr + rows[:, None] * (stride_bag_row * STRIDE_UNIT) + cols[None, :],
            mask=mask & (row_rstd != 0)[:, None],
            other=0.0,
        )
        x_hat = (x.to(tl.float32) - row_shift[:, None] - row_mean[:, None]) * row_rstd[:, None]
        acc = (acc - flat[:, None] / D - x_hat * (along[:, None] / D)) * row_rstd[:, None]
    tl.store(
        d_bag_ptr + rows[:, None] * D + cols[None, :],
        acc.to(d_bag_ptr.dtype.element_ty),
        mask=mask,
    )
