"""Gradients of `pool_bag` that live on stored rows: d_bag and d_bias of a trained bag.

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".  Layout: one program per (tile of stored rows, block of columns). It walks the bags in
ascending order, skips those that miss its rows, and writes once: overlapping and repeated bags
need no atomics and no workspace, and a row in no bag is written 0 without being read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pool_bag_scores import load_bias, load_per_row, score_gradient, score_tile
from .ragged import bag_range


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_rows", "threshold"])
def pool_bag_bwd_bag_kernel(
    a_ptr,  # [B, R, PADDED] in    rounded query rows
    dz_ptr,  # [B, R, PADDED] in    rounded gradient of pooled
    per_row_ptr,  # [7, B, R] in   see pool_bag_prepare_kernel
    bag_ptr,  # [T, D] in
    bias_ptr,  # [T] in          or None
    mean_ptr,  # [T] in          or None
    rstd_ptr,  # [T] in          or None
    seed_ptr,  # [1] in          or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    d_bag_ptr,  # [T, D] out      or None
    d_bias_ptr,  # [T] out         or None
    n_bags,
    n_stored,
    n_rows,
    threshold,
    scale,
    eps,
    keep_scale,
    stride_bag_row,
    stride_d_bag_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (cdiv(T, BLOCK_N) * cdiv(D, BLOCK_D),); one block of columns where d_bag is None."""
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D if d_bag_ptr is not None else 1
    PADDED: tl.constexpr = (D + 15) // 16 * 16
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    tile_start = (tl.program_id(0) // D_BLOCKS).to(tl.int64) * BLOCK_N
    d_block = tl.program_id(0) % D_BLOCKS
    rows = tile_start + tl.arange(0, BLOCK_N)
    cols = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    plane = n_bags.to(tl.int64) * n_rows
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    # of the normalisation: sums that belong to every column, and the row's statistics
    flat = tl.zeros((BLOCK_N,), tl.float32)
    along = tl.zeros((BLOCK_N,), tl.float32)
    row_shift = tl.zeros((BLOCK_N,), tl.float32)
    row_mean = tl.zeros((BLOCK_N,), tl.float32)
    row_rstd = tl.zeros((BLOCK_N,), tl.float32)
    unit = tl.zeros((BLOCK_N,), tl.float32)
    for bag in range(n_bags):
        start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        if (start < tile_start + BLOCK_N) & (start + length > tile_start) & (length > 0):
            inside = (rows >= start) & (rows < start + length)
            bias, ok = load_bias(bias_ptr, rows, inside)
            for r0 in range(0, n_rows, BLOCK_R):
                offs_r = r0 + tl.arange(0, BLOCK_R)
                mask_r = offs_r < n_rows
                at = plane // n_bags * bag + offs_r
                s, dp, rel, shift, rstd = score_tile(
                    bag_ptr,
                    rows,
                    ok,
                    stride_bag_row * STRIDE_UNIT,
                    mean_ptr,
                    rstd_ptr,
                    eps,
                    a_ptr,
                    dz_ptr,
                    at * PADDED,
                    mask_r,
                    D,
                    True,
                    NORMALIZE,
                    PRECISION,
                    BLOCK_N,
                    BLOCK_R,
                    BLOCK_K,
                )
                per_row = load_per_row(per_row_ptr, at, plane, mask_r)
                weights, ds, s, dp = score_gradient(
                    s,
                    dp,
                    bias,
                    ok,
                    rel,
                    rstd,
                    (rows - start).to(tl.int32),
                    bag,
                    offs_r,
                    per_row,
                    seed_ptr,
                    threshold,
                    scale,
                    keep_scale,
                    NORMALIZE,
                    dtype == tl.float16,
                )
                a_sum, a_factor, dz_sum, dz_factor, _, _, _ = per_row
                d_bias += tl.sum(ds, 1)
                if d_bag_ptr is not None:
                    along_a = ds * (a_factor * scale)[None, :]
                    along_dz = weights * dz_factor[None, :]
                    if NORMALIZE:
                        flat += tl.sum(along_a * a_sum[None, :] + along_dz * dz_sum[None, :], 1)
                        along += tl.sum(ds * s + weights * dp, 1)
                        row_shift = tl.where(ok, shift, row_shift)
                        row_mean = tl.where(ok, rel, row_mean)
                        row_rstd = tl.where(ok, rstd, row_rstd)
                    if dtype == tl.float16:
                        # both shrink with the bag's length: keep the largest so far at 1
                        new = tl.max(tl.maximum(tl.abs(along_a), tl.abs(along_dz)), 1)
                        new = tl.maximum(new, unit)
                        safe = tl.where(new > 1e-30, new, 1.0)
                        acc = acc * (unit / safe)[:, None]
                        along_a = along_a / safe[:, None]
                        along_dz = along_dz / safe[:, None]
                        unit = new
                    mask = mask_r[:, None]
                    if D % BLOCK_D != 0:
                        mask = mask & (cols < D)[None, :]
                    query = (at * PADDED)[:, None] + cols[None, :]
                    a = tl.load(a_ptr + query, mask=mask, other=0.0)
                    acc = tl.dot(along_a.to(dtype), a, acc, input_precision=PRECISION)
                    dz = tl.load(dz_ptr + query, mask=mask, other=0.0)
                    acc = tl.dot(along_dz.to(dtype), dz, acc, input_precision=PRECISION)

    stored = rows < n_stored
    if d_bag_ptr is not None:
        if dtype == tl.float16:
            acc = acc * unit[:, None]
        mask = stored[:, None]
        if D % BLOCK_D != 0:
            mask = mask & (cols < D)[None, :]
        if NORMALIZE:
            # rows that took part have a positive rstd; the others are not read
            x = tl.load(
                bag_ptr + rows[:, None] * (stride_bag_row * STRIDE_UNIT) + cols[None, :],
                mask=mask & (row_rstd != 0)[:, None],
                other=0.0,
            )
            x_hat = x.to(tl.float32) - row_shift[:, None] - row_mean[:, None]
            x_hat = x_hat * row_rstd[:, None]
            acc = (acc - flat[:, None] / D - x_hat * (along[:, None] / D)) * row_rstd[:, None]
        d_bag = d_bag_ptr + rows[:, None] * stride_d_bag_row + cols[None, :]
        tl.store(d_bag, acc.to(d_bag_ptr.dtype.element_ty), mask=mask)
    # two tests: the first is settled when compiling
    if d_bias_ptr is not None:  # noqa: SIM102
        if d_block == 0:
            tl.store(d_bias_ptr + rows, d_bias, mask=stored)
