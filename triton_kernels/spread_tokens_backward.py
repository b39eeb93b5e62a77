"""`spread_tokens` backward: what is summed over patches, d_keys, d_values and d_key_bias.

Contract: survfuse/ops/spread_tokens.py.  Oracle: survfuse/reference/spread_tokens.py.  Math:
docs/math.md, "Spreading tokens over a bag".  Layout: one program per (piece of a slot, block of
heads, block of keys, block of value columns) walks the tiles of its piece. It adds up d_values in
registers and keeps d_logits [rows, H * Lk] in the type of the bag, over one exponent per tile and
key, as pool_bag_wide.py takes them: its product with the bag is d_keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import rows_before
from .ragged import bag_range, rows_of_slot, slots_of_bag
from .spread_tokens_tiles import (
    by_head,
    columns_of_block,
    finish_block,
    keys_of_block,
    load_results,
    repeat,
    result_factor,
    score_block,
    weigh_block,
)


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_keys", "total", "threshold"])
def spread_tokens_rows_kernel(
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
    rows_ptr,  # [2, total, H] out     mean gradient of a row's weights; what makes them sum to 1
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
):
    """What needs all keys, where they are more than a block. Grid as the forward, one v_block."""
    H_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    head0 = tl.program_id(0) % H_BLOCKS * BLOCK_H
    bag, first_row, position, count = rows_of_slot(
        tl.program_id(0) // H_BLOCKS, starts_ptr, lengths_ptr, n_bags, n_stored, BLOCK_N
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    inside = offs_n < count
    first = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_stored) + position
    lse_ptr += first * HEADS
    d_out_ptr += first * HEADS * DV
    rows_ptr += first * HEADS
    factor = result_factor(d_out_ptr, offs_n, inside, head0, HEADS, DV, BLOCK_H, BLOCK_V, dtype)
    mean = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    weight = tl.zeros((BLOCK_N, BLOCK_H), tl.float32)
    for j0 in range(0, n_keys, BLOCK_L):
        key_heads, keys, entries, exists = keys_of_block(head0, j0, n_keys, HEADS, BLOCK_H, BLOCK_L)
        s, bias, ok, _rel, _shift, _rstd = score_block(
            bag_ptr, mean_ptr, rstd_ptr, a_ptr, per_key_ptr, key_bias_ptr,
            first_row + offs_n, inside, bag, entries, exists, n_bags, HEADS * n_keys,
            scale, eps, stride_bag_row * STRIDE_UNIT, D, NORMALIZE, PRECISION, BLOCK_K,
        )  # fmt: skip
        softmax, _, dp = weigh_block(
            s, bias, ok, d_out_ptr, lse_ptr, values_ptr, seed_ptr, factor,
            offs_n, inside, position + offs_n, bag, head0, key_heads, keys, entries, n_keys,
            threshold, keep_scale, HEADS, DV, PRECISION, BLOCK_V, dtype,
        )  # fmt: skip
        mean += tl.sum(by_head(softmax * dp, BLOCK_H), 2)
        weight += tl.sum(by_head(softmax, BLOCK_H), 2)
    share = 1.0 / tl.where(weight == 0, 1.0, weight)
    heads = head0 + tl.arange(0, BLOCK_H)
    place = offs_n[:, None] * HEADS + heads[None, :]
    mask = inside[:, None] & (heads < HEADS)[None, :]
    tl.store(rows_ptr + place, mean * share, mask=mask)
    tl.store(rows_ptr + total.to(tl.int64) * HEADS + place, share, mask=mask)


_RUNTIME = ["n_bags", "n_stored", "n_keys", "total", "first_slot", "rows_per_slot", "threshold"]


@triton.jit(do_not_specialize=_RUNTIME)
def spread_tokens_bwd_kernel(
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
    coef_ptr,  # [C * rows_per_slot, H * Lk] out   d_logit * rstd over exp(tile_ref)
    row_mean_ptr,  # [C * rows_per_slot] out  mean of each row, fp32 bags under normalisation
    tile_ref_ptr,  # [tiles, H * Lk] out
    tile_mean_ptr,  # [tiles, H * Lk] out   under normalisation: sum of coef * mean not taken
    tile_sum_ptr,  # [tiles, H * Lk] out   sum of d_logits
    part_ptr,  # [pieces, H * Lk, DV] out   d_values of each piece
    n_bags,
    n_stored,
    n_keys,
    total,
    first_slot,
    rows_per_slot,
    threshold,
    scale,
    eps,
    keep_scale,
    stride_bag_row,
    stride_coef_row,
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
    TILES: tl.constexpr,  # of a piece
    WHOLE: tl.constexpr,  # a block holds all keys
):
    """Grid: (pieces * H_BLOCKS * L_BLOCKS * V_BLOCKS,), the blocks of the first varying last."""
    V_BLOCKS: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    H_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    n_blocks = tl.cdiv(n_keys, BLOCK_L)
    v_block = tl.program_id(0) % V_BLOCKS
    j0 = tl.program_id(0) // V_BLOCKS % n_blocks * BLOCK_L
    head0 = tl.program_id(0) // V_BLOCKS // n_blocks % H_BLOCKS * BLOCK_H
    piece = tl.program_id(0) // V_BLOCKS // n_blocks // H_BLOCKS
    per_slot = rows_per_slot // (TILES * BLOCK_N)
    bag, first_row, position, count = rows_of_slot(
        first_slot + piece // per_slot, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot
    )
    n0 = piece % per_slot * (TILES * BLOCK_N)
    if n0 >= count:
        return
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    key_heads, keys, entries, exists = keys_of_block(head0, j0, n_keys, HEADS, BLOCK_H, BLOCK_L)
    heads, cols, valid = columns_of_block(head0, v_block * BLOCK_V, HEADS, DV, BLOCK_H, BLOCK_V)
    first = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_stored) + position + n0
    lse_ptr += first * HEADS
    d_out_ptr += first * HEADS * DV
    d_lse_ptr += first * HEADS
    if not WHOLE:
        rows_ptr += first * HEADS
    acc = tl.zeros((BLOCK_H * BLOCK_L, BLOCK_H * BLOCK_V), tl.float32)
    unit = tl.zeros((BLOCK_H * BLOCK_L,), tl.float32)
    n_entries = HEADS * n_keys
    for i in range(tl.minimum(tl.cdiv(count - n0, BLOCK_N), TILES)):
        at = i * BLOCK_N + tl.arange(0, BLOCK_N)
        offs_n = n0 + at
        inside = offs_n < count
        s, bias, ok, rel, shift, rstd = score_block(
            bag_ptr, mean_ptr, rstd_ptr, a_ptr, per_key_ptr, key_bias_ptr,
            first_row + offs_n, inside, bag, entries, exists, n_bags, n_entries,
            scale, eps, stride_bag_row * STRIDE_UNIT, D, NORMALIZE, PRECISION, BLOCK_K,
        )  # fmt: skip
        factor = result_factor(d_out_ptr, at, inside, head0, HEADS, DV, BLOCK_H, BLOCK_V, dtype)
        softmax, weights, dp = weigh_block(
            s, bias, ok, d_out_ptr, lse_ptr, values_ptr, seed_ptr, factor,
            at, inside, position + offs_n, bag, head0, key_heads, keys, entries, n_keys,
            threshold, keep_scale, HEADS, DV, PRECISION, BLOCK_V, dtype,
        )  # fmt: skip
        weights, ds = finish_block(
            softmax, weights, dp, rows_ptr, d_lse_ptr, at, inside, head0, total,
            HEADS, BLOCK_H, WHOLE,
        )  # fmt: skip
        dz = load_results(d_out_ptr, at, inside, heads, cols, valid, HEADS, DV)
        if dtype == tl.float16:
            # they shrink with the loss: keep the largest so far at 1
            dz = dz / repeat(factor, BLOCK_V)
            weights = weights * repeat(factor, BLOCK_L)
            new = tl.maximum(unit, tl.max(tl.abs(weights), 0))
            safe = tl.where(new > 1e-30, new, 1.0)
            weights = weights / safe[None, :]
            acc = acc * (unit / safe)[:, None]
            unit = new
        left = tl.trans(weights.to(dtype))
        acc = tl.dot(left, dz.to(dtype), acc, input_precision=PRECISION)
        if v_block == 0:
            tile = (piece * TILES + i).to(tl.int64)
            tile_at = tile * n_entries + entries
            tile_rows = tl.arange(0, BLOCK_N)
            tl.store(tile_sum_ptr + tile_at, tl.sum(ds, 0), mask=exists)
            if NORMALIZE:
                ds = ds * rstd[:, None]
            largest = tl.max(tl.abs(ds), 0)
            small = tl.where(largest > 1e-30, largest, 1.0)
            coef = (ds / small[None, :]).to(dtype)
            ref = tl.where(largest > 1e-30, tl.log(small), -float("inf"))
            tl.store(tile_ref_ptr + tile_at, ref, mask=exists)
            coef_at = tile_rows[:, None] * stride_coef_row + entries[None, :]
            scratch = coef_ptr + tile * BLOCK_N * stride_coef_row
            tl.store(scratch + coef_at, coef, mask=exists[None, :])
            if NORMALIZE:
                rest = rel
                if dtype == tl.float32:
                    # the product subtracts the mean on load, all but what rounding leaves of it
                    mean = rel + shift
                    rest = rel - (mean - shift)
                    tl.store(row_mean_ptr + tile * BLOCK_N + tile_rows, mean)
                # of the rounded coefficients, as the product with the bag will see them
                tile_mean = tl.sum(coef.to(tl.float32) * rest[:, None], 0)
                tl.store(tile_mean_ptr + tile_at, tile_mean, mask=exists)

    if dtype == tl.float16:
        acc = acc * unit[:, None]
    # nothing for excluded keys, whatever an infinite gradient made of them
    if key_bias_ptr is not None:
        bias_at = bag.to(tl.int64) * n_entries + entries
        bias = tl.load(key_bias_ptr + bias_at, mask=exists, other=-float("inf"))
        acc = tl.where((bias == -float("inf"))[:, None], 0.0, acc)
    part_ptr += piece.to(tl.int64) * n_entries * DV
    own = exists[:, None] & valid[None, :] & (key_heads[:, None] == heads[None, :])
    tl.store(part_ptr + entries[:, None] * DV + cols[None, :], acc, mask=own)


@triton.jit(
    do_not_specialize=["n_bags", "n_stored", "n_entries", "first_slot", "n_slots", "rows_per_slot"]
)
def spread_tokens_sum_kernel(
    part_ptr,  # [C * rows_per_slot / rows_per_piece, R, DV] in    d_values of each piece
    part_sum_ptr,  # [C, R] in                d_key_bias of each slot
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    d_values_ptr,  # [B, R, DV] in, out
    d_bias_ptr,  # [B, R] in, out
    n_bags,
    n_stored,
    n_entries,  # R = H * Lk
    first_slot,
    n_slots,
    rows_per_slot,
    rows_per_piece,
    DV: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add a chunk of pieces. Grid: (B * R * cdiv(DV, BLOCK_C),)."""
    STRIPS: tl.constexpr = (DV + BLOCK_C - 1) // BLOCK_C
    strip = tl.program_id(0) % STRIPS
    out = (tl.program_id(0) // STRIPS).to(tl.int64)
    bag = (out // n_entries).to(tl.int32)
    entry = out % n_entries
    cols = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_s = tl.arange(0, BLOCK_S)
    begin, count = slots_of_bag(bag, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot)
    _, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
    # slots of this bag in this chunk, counted within the bag
    low = tl.maximum(first_slot - begin, 0)
    high = tl.minimum(count, first_slot + n_slots - begin)
    per_slot = rows_per_slot // rows_per_piece
    acc = tl.zeros((BLOCK_C,), tl.float32)
    bias = tl.zeros((), tl.float32)
    if not FIRST:
        acc = tl.load(d_values_ptr + out * DV + cols, mask=cols < DV, other=0.0)
        bias = tl.load(d_bias_ptr + out)
    for s0 in range(low, high, BLOCK_S):
        at = (begin + s0 + offs_s - first_slot).to(tl.int64) * n_entries + entry
        bias += tl.sum(tl.load(part_sum_ptr + at, mask=s0 + offs_s < high, other=0.0), 0)
    for p0 in range(low * per_slot, high * per_slot, BLOCK_S):
        piece = p0 + offs_s
        inside = (piece < high * per_slot) & (piece.to(tl.int64) * rows_per_piece < length)
        at = (piece + (begin - first_slot) * per_slot).to(tl.int64) * n_entries + entry
        part = tl.load(
            part_ptr + at[:, None] * DV + cols[None, :],
            mask=inside[:, None] & (cols < DV)[None, :],
            other=0.0,
        )
        acc += tl.sum(part, 0)
    tl.store(d_values_ptr + out * DV + cols, acc, mask=cols < DV)
    if strip == 0:
        tl.store(d_bias_ptr + out, bias)
