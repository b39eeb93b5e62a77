"""Gradients of gated attention pooling in Triton, chunk by chunk of rows.

Contract: survfuse/ops/gated_attention_pool.py.  Oracle: survfuse/reference/gated_attention_pool.py.
Math: docs/math.md, "Gated attention pooling".  Layout: gated_hidden_kernel computes the hidden
layer of a tile again and leaves its gradient in a workspace; gated_weights_kernel multiplies that
with the bag, gated_bag_kernel with the weights. A frozen bag is cut into slots of its bags. For a
trained one a slot is a range of *stored* rows, and a tile walks the bags in ascending order: the
hidden layer belongs to the row, so the gradients of all bags that hold it are added in front of it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gated_attention_pool_hidden import gated_scores
from .pool_bag_scores import load_bias, load_per_row, score_gradient
from .ragged import bag_range, rows_of_slot


@triton.jit
def _slot(slot, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot, STORED: tl.constexpr):
    """First stored row, row count, and the range of bags to walk."""
    if STORED:
        first = slot.to(tl.int64) * rows_per_slot
        count = tl.minimum(tl.maximum(n_stored - first, 0), rows_per_slot).to(tl.int32)
        return first, count, 0, n_bags
    bag, first, _, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot
    )
    return first, count, bag, tl.minimum(bag + 1, n_bags)


@triton.jit
def _upstream(
    bag_ptr,
    row_at,
    ok,
    dz_ptr,
    pool_at,
    mask_p,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x . dz of a tile, [T, P]."""
    dp = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for k0 in range(0, D, BLOCK_K):
        cols = k0 + tl.arange(0, BLOCK_K)
        inside = (cols < D)[None, :]
        x = tl.load(bag_ptr + row_at[:, None] + cols[None, :], mask=ok[:, None] & inside, other=0.0)
        dz = tl.load(
            dz_ptr + pool_at[:, None] + cols[None, :], mask=mask_p[:, None] & inside, other=0.0
        )
        dp = tl.dot(x, tl.trans(dz), dp, input_precision=PRECISION)
    return dp


@triton.jit
def _power_of_two(largest):
    """A unit near `largest`, for types with few exponents; 1 where there is nothing."""
    # 0, not finite, or below what a float can be divided by
    usable = (largest > 1e-30) & (largest < 1e30)
    return tl.exp2(tl.floor(tl.log2(tl.where(usable, largest, 1.0))))


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_pools", "first_slot", "rows_per_slot",
                               "threshold"])  # fmt: skip
def gated_hidden_kernel(
    w_tanh_ptr,  # [L, D] in
    b_tanh_ptr,  # [L] in            or None
    w_gate_ptr,  # [L, D] in
    b_gate_ptr,  # [L] in            or None
    w_score_ptr,  # [K, L] in
    b_score_ptr,  # [K] in            or None
    dz_ptr,  # [B, K, PADDED] in   rounded gradient of pooled
    per_row_ptr,  # [7, B, K] in   see pool_bag_prepare_kernel
    bag_ptr,  # [T, D] in
    bias_ptr,  # [T] in            or None
    seed_ptr,  # [1] in            or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    hidden_ptr,  # [C * rows_per_slot, 2 * PADDED_L] out   gradient over `unit`, tanh then gate
    unit_ptr,  # [C * rows_per_slot] out   the tile's unit; 0 for rows that take no part
    logit_ptr,  # [C * rows_per_slot, K] out   trained; or None
    d_bias_ptr,  # [T] out           trained; or None
    part_bias_ptr,  # [tiles, 2 * PADDED_L] out   sums of the gradient
    part_score_ptr,  # [tiles, K, L] out
    n_bags,
    n_stored,
    n_pools,
    first_slot,
    rows_per_slot,
    threshold,
    keep_scale,
    stride_bag_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    STORED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of the hidden layer of one tile. Grid: (tiles,)."""
    PADDED: tl.constexpr = (L + 15) // 16 * 16
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    tile = tl.program_id(0).to(tl.int64)
    tiles_per_slot = rows_per_slot // BLOCK_T
    slot = first_slot + (tile // tiles_per_slot).to(tl.int32)
    first_row, count, first_bag, end_bag = _slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot, STORED
    )
    n0 = (tile % tiles_per_slot).to(tl.int32) * BLOCK_T
    offs_n = n0 + tl.arange(0, BLOCK_T)
    rows = first_row + offs_n
    inside = offs_n < count
    if STORED:
        held = tl.zeros((BLOCK_T,), tl.int32)
        for bag in range(first_bag, end_bag):
            start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
            held = tl.where((rows >= start) & (rows < start + length), 1, held)
        inside = inside & (held > 0)
    bias, ok = load_bias(bias_ptr, rows, inside)
    scratch = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < n_pools
    row_at = rows * (stride_bag_row * STRIDE_UNIT)
    hidden_at = scratch * (2 * PADDED)
    s = gated_scores(
        bag_ptr,
        row_at,
        ok,
        w_tanh_ptr,
        b_tanh_ptr,
        w_gate_ptr,
        b_gate_ptr,
        w_score_ptr,
        b_score_ptr,
        hidden_ptr,
        hidden_at,
        n_pools,
        D,
        L,
        PRECISION,
        BLOCK_P,
        BLOCK_T,
        BLOCK_L,
        BLOCK_K,
    )
    if logit_ptr is not None:
        tl.store(
            logit_ptr + scratch[:, None] * n_pools + offs_p[None, :],
            s + bias[:, None],
            mask=mask_p[None, :],
        )
    ds = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    plane = n_bags.to(tl.int64) * n_pools
    nothing = tl.zeros((BLOCK_T,), tl.float32)
    for bag in range(first_bag, end_bag):
        start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        in_bag = ok & (rows >= start) & (rows < start + length)
        if tl.max(in_bag.to(tl.int32), 0) > 0:
            pool_at = plane // n_bags * bag + offs_p
            per_row = load_per_row(per_row_ptr, pool_at, plane, mask_p)
            dp = _upstream(
                bag_ptr,
                row_at,
                in_bag,
                dz_ptr,
                pool_at * ((D + 15) // 16 * 16),
                mask_p,
                D,
                PRECISION,
                BLOCK_P,
                BLOCK_T,
                BLOCK_K,
            )
            _, ds_bag, _, _ = score_gradient(
                s,
                dp * per_row[3][None, :],
                bias,
                in_bag,
                nothing,
                nothing,
                (rows - start).to(tl.int32),
                bag,
                offs_p,
                per_row,
                seed_ptr,
                threshold,
                1.0,
                keep_scale,
                False,
                False,
            )
            ds += ds_bag
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + rows, tl.sum(ds, 1), mask=offs_n < count)
    unit = _power_of_two(tl.max(tl.max(tl.abs(ds), 1), 0))
    tl.store(unit_ptr + scratch, tl.where(ok, unit, 0.0))
    ds = ds / unit
    # other threads of the program wrote what this one reads
    tl.debug_barrier()
    for l0 in range(0, L, BLOCK_L):
        offs_l = l0 + tl.arange(0, BLOCK_L)
        mask_l = (offs_l < PADDED)[None, :]
        at = hidden_ptr + hidden_at[:, None] + offs_l[None, :]
        value = tl.load(at, mask=mask_l, other=0.0).to(tl.float32)
        share = tl.load(at + PADDED, mask=mask_l, other=0.0).to(tl.float32)
        w = tl.load(
            w_score_ptr + offs_p[:, None] * L + offs_l[None, :],
            mask=mask_p[:, None] & (offs_l < L)[None, :],
            other=0.0,
        )
        d_gated = tl.dot(ds.to(dtype), w, input_precision=PRECISION)
        d_value = d_gated * share * (1.0 - value * value)
        d_share = d_gated * value * share * (1.0 - share)
        tl.debug_barrier()
        tl.store(at, d_value.to(dtype), mask=mask_l)
        tl.store(at + PADDED, d_share.to(dtype), mask=mask_l)
        part = part_bias_ptr + tile * (2 * PADDED) + offs_l
        tl.store(part, tl.sum(d_value, 0) * unit, mask=offs_l < PADDED)
        tl.store(part + PADDED, tl.sum(d_share, 0) * unit, mask=offs_l < PADDED)
        d_score = tl.dot(
            tl.trans(ds.to(dtype)), (value * share).to(dtype), input_precision=PRECISION
        )
        tl.store(
            part_score_ptr + (tile * n_pools + offs_p[:, None]) * L + offs_l[None, :],
            d_score * unit,
            mask=mask_p[:, None] & (offs_l < L)[None, :],
        )


@triton.jit(do_not_specialize=["n_bags", "n_stored", "first_slot", "rows_per_slot", "n_slots",
                               "n_splits"])  # fmt: skip
def gated_weights_kernel(
    bag_ptr,  # [T, D] in
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    hidden_ptr,  # [C * rows_per_slot, 2 * PADDED_L] in
    unit_ptr,  # [C * rows_per_slot] in
    part_ptr,  # [splits, 2 * PADDED_L, D] in, out
    n_bags,
    n_stored,
    first_slot,
    rows_per_slot,
    n_slots,
    n_splits,
    stride_bag_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    STORED: tl.constexpr,
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of both weights over a chunk: every n_splits-th slot, in order.
    Grid: (splits * cdiv(2 * PADDED_L, BLOCK_L) * cdiv(D, BLOCK_D),)."""
    WIDTH: tl.constexpr = 2 * ((L + 15) // 16 * 16)
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    L_BLOCKS: tl.constexpr = (WIDTH + BLOCK_L - 1) // BLOCK_L
    split = tl.program_id(0) // (D_BLOCKS * L_BLOCKS)
    cols = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_l = tl.program_id(0) // D_BLOCKS % L_BLOCKS * BLOCK_L + tl.arange(0, BLOCK_L)
    at = part_ptr + (split.to(tl.int64) * WIDTH + offs_l[:, None]) * D + cols[None, :]
    mask = (offs_l < WIDTH)[:, None] & (cols < D)[None, :]
    acc = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    if not FIRST:
        acc = tl.load(at, mask=mask, other=0.0)
    for step in range(tl.cdiv(tl.maximum(n_slots - split, 0), n_splits)):
        slot = split + step * n_splits
        first_row, count, _, _ = _slot(
            first_slot + slot, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_slot, STORED
        )
        for n0 in range(0, count, BLOCK_N):
            offs_n = n0 + tl.arange(0, BLOCK_N)
            scratch = slot.to(tl.int64) * rows_per_slot + offs_n
            units = tl.load(unit_ptr + scratch, mask=offs_n < count, other=0.0)
            ok = units != 0
            x = tl.load(
                bag_ptr
                + (first_row + offs_n)[:, None] * (stride_bag_row * STRIDE_UNIT)
                + cols[None, :],
                mask=ok[:, None] & (cols < D)[None, :],
                other=0.0,
            )
            d_hidden = tl.load(
                hidden_ptr + scratch[:, None] * WIDTH + offs_l[None, :],
                mask=ok[:, None] & (offs_l < WIDTH)[None, :],
                other=0.0,
            )
            product = tl.dot(tl.trans(d_hidden), x, input_precision=PRECISION)
            acc += product * tl.max(units, 0)
    tl.store(at, acc, mask=mask)


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_pools", "first_slot", "rows_per_slot",
                               "threshold"])  # fmt: skip
def gated_bag_kernel(
    w_tanh_ptr,  # [L, D] in
    w_gate_ptr,  # [L, D] in
    dz_ptr,  # [B, K, PADDED] in
    per_row_ptr,  # [7, B, K] in
    seed_ptr,  # [1] in            or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    hidden_ptr,  # [C * rows_per_slot, 2 * PADDED_L] in
    unit_ptr,  # [C * rows_per_slot] in
    logit_ptr,  # [C * rows_per_slot, K] in
    d_bag_ptr,  # [T, D] out
    n_bags,
    n_stored,
    n_pools,
    first_slot,
    rows_per_slot,
    threshold,
    keep_scale,
    D: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of stored rows. Grid: (tiles of BLOCK_N rows * cdiv(D, BLOCK_D),)."""
    PADDED: tl.constexpr = (L + 15) // 16 * 16
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    scratch = (tl.program_id(0) // D_BLOCKS).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(0) % D_BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = (cols < D)[None, :]
    rows = first_slot.to(tl.int64) * rows_per_slot + scratch
    units = tl.load(unit_ptr + scratch)
    ok = units != 0
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for l0 in range(0, L, BLOCK_L):
        offs_l = l0 + tl.arange(0, BLOCK_L)
        mask_l = offs_l < L
        at = hidden_ptr + scratch[:, None] * (2 * PADDED) + offs_l[None, :]
        mask_h = ok[:, None] & mask_l[None, :]
        mask_w = mask_l[:, None] & mask_d
        d_hidden = tl.load(at, mask=mask_h, other=0.0)
        w = tl.load(w_tanh_ptr + offs_l[:, None] * D + cols[None, :], mask=mask_w, other=0.0)
        acc = tl.dot(d_hidden, w, acc, input_precision=PRECISION)
        d_hidden = tl.load(at + PADDED, mask=mask_h, other=0.0)
        w = tl.load(w_gate_ptr + offs_l[:, None] * D + cols[None, :], mask=mask_w, other=0.0)
        acc = tl.dot(d_hidden, w, acc, input_precision=PRECISION)
    acc = acc * units[:, None]
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < n_pools
    s = tl.load(
        logit_ptr + scratch[:, None] * n_pools + offs_p[None, :],
        mask=ok[:, None] & mask_p[None, :],
        other=0.0,
    )
    plane = n_bags.to(tl.int64) * n_pools
    nothing = tl.zeros((BLOCK_N,), tl.float32)
    for bag in range(n_bags):
        start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        in_bag = ok & (rows >= start) & (rows < start + length)
        if tl.max(in_bag.to(tl.int32), 0) > 0:
            pool_at = plane // n_bags * bag + offs_p
            per_row = load_per_row(per_row_ptr, pool_at, plane, mask_p)
            weights, _, _, _ = score_gradient(
                s,
                s,
                nothing,
                in_bag,
                nothing,
                nothing,
                (rows - start).to(tl.int32),
                bag,
                offs_p,
                per_row,
                seed_ptr,
                threshold,
                1.0,
                keep_scale,
                False,
                False,
            )
            weights = tl.where(in_bag[:, None], weights, 0.0) * per_row[3][None, :]
            unit = _power_of_two(tl.max(tl.max(tl.abs(weights), 1), 0))
            dz = tl.load(
                dz_ptr + pool_at[:, None] * ((D + 15) // 16 * 16) + cols[None, :],
                mask=mask_p[:, None] & mask_d,
                other=0.0,
            )
            acc += tl.dot((weights / unit).to(dtype), dz, input_precision=PRECISION) * unit
    tl.store(
        d_bag_ptr + rows[:, None] * D + cols[None, :],
        tl.where(ok[:, None], acc, 0.0),
        mask=(rows < n_stored)[:, None] & mask_d,
    )
