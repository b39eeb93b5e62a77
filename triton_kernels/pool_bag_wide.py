"""`pool_bag` for many query rows or wide features: scores first, then one product with the bag.

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".  Layout: a chunk of slots is scored by programs over (tile of BLOCK_T rows, block of
query rows), which keep [rows, R] coefficients in the type of the bag and, per tile and query row,
the exponent they stand over; then programs over (slot, query rows, columns) multiply them with
the bag. The chunk is sized so that all of it fits the workspace.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pool_bag_scores import load_bias, load_per_row, score_gradient, score_tile
from .ragged import keep_mask, rows_of_slot

_RUNTIME = ["n_bags", "n_stored", "n_rows", "first_slot", "rows_per_slot", "threshold"]


@triton.jit(do_not_specialize=_RUNTIME)
def pool_bag_scores_kernel(
    a_ptr,  # [B, R, PADDED] in    rounded query rows
    dz_ptr,  # [B, R, PADDED] in    rounded gradient of pooled, or None: forward
    per_row_ptr,  # [7, B, R] in   see pool_bag_prepare_kernel
    bag_ptr,  # [T, D] in
    bias_ptr,  # [T] in          or None
    mean_ptr,  # [T] in          or None
    rstd_ptr,  # [T] in          or None
    seed_ptr,  # [1] in          or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    coef_ptr,  # [C * rows_per_slot, R] out   weight (or d_logit) * rstd over exp(tile_ref)
    row_mean_ptr,  # [C * rows_per_slot] out  mean of each row, fp32 bags under normalisation
    tile_ref_ptr,  # [tiles, R] out
    tile_mean_ptr,  # [tiles, R] out   under normalisation: sum of coef * mean not yet subtracted
    tile_sum_ptr,  # [tiles, R] out   sum of exp(logit - tile_ref), or of d_logits
    tile_weight_ptr,  # [tiles, R] out   forward: the first over kept weights; or None: backward
    n_bags,
    n_stored,
    n_rows,
    first_slot,
    rows_per_slot,
    threshold,
    scale,
    eps,
    keep_scale,
    stride_bag_row,
    stride_coef_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Coefficients of one tile. Grid: (C * rows_per_slot / BLOCK_T * cdiv(R, BLOCK_R),)."""
    n_blocks = tl.cdiv(n_rows, BLOCK_R)
    tile = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_r = tl.program_id(0) % n_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    tiles_per_slot = rows_per_slot // BLOCK_T
    bag, first_row, position, count = rows_of_slot(
        first_slot + (tile // tiles_per_slot).to(tl.int32),
        starts_ptr,
        lengths_ptr,
        n_bags,
        n_stored,
        rows_per_slot,
    )
    n0 = (tile % tiles_per_slot).to(tl.int32) * BLOCK_T
    if n0 >= count:
        return
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    mask_r = offs_r < n_rows
    offs_n = n0 + tl.arange(0, BLOCK_T)
    rows = first_row + offs_n
    bias, ok = load_bias(bias_ptr, rows, offs_n < count)
    at = bag.to(tl.int64) * n_rows + offs_r
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
        at * ((D + 15) // 16 * 16),
        mask_r,
        D,
        dz_ptr is not None,
        NORMALIZE,
        PRECISION,
        BLOCK_T,
        BLOCK_R,
        BLOCK_K,
    )
    tile_at = tile * n_rows + offs_r
    if dz_ptr is not None:
        plane = n_bags.to(tl.int64) * n_rows
        per_row = load_per_row(per_row_ptr, at, plane, mask_r)
        _, coef, _, _ = score_gradient(
            s,
            dp,
            bias,
            ok,
            rel,
            rstd,
            position + offs_n,
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
        tl.store(tile_sum_ptr + tile_at, tl.sum(coef, 0), mask=mask_r)
        if NORMALIZE:
            coef = coef * rstd[:, None]
        largest = tl.max(tl.abs(coef), 0)
        unit = tl.where(largest > 1e-30, largest, 1.0)
        coef = coef / unit[None, :]
        ref = tl.where(largest > 1e-30, tl.log(unit), -float("inf"))
    else:
        a_sum = tl.load(per_row_ptr + at, mask=mask_r, other=0.0)
        factor = tl.load(per_row_ptr + n_bags.to(tl.int64) * n_rows + at, mask=mask_r, other=0.0)
        if NORMALIZE:
            s = (s - rel[:, None] * a_sum[None, :]) * rstd[:, None]
        s = s * (factor * scale)[None, :] + bias[:, None]
        s = tl.where(ok[:, None], s, -float("inf"))
        ref = tl.max(s, 0)
        coef = tl.exp(s - tl.where(ref == -float("inf"), 0.0, ref)[None, :])
        total = tl.sum(coef, 0)
        tl.store(tile_sum_ptr + tile_at, total, mask=mask_r)
        if seed_ptr is not None:
            keep = keep_mask(
                tl.load(seed_ptr),
                (position + offs_n)[:, None],
                offs_r[None, :],
                bag,
                threshold,
            )
            coef = tl.where(keep, coef, 0.0)
            total = tl.sum(coef, 0)
        tl.store(tile_weight_ptr + tile_at, total, mask=mask_r)
        if NORMALIZE:
            coef = coef * rstd[:, None]
    tl.store(tile_ref_ptr + tile_at, ref, mask=mask_r)
    rounded = coef.to(dtype)
    scratch = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    tl.store(
        coef_ptr + scratch[:, None] * stride_coef_row + offs_r[None, :],
        rounded,
        mask=mask_r[None, :],
    )
    if NORMALIZE:
        rest = rel
        if dtype == tl.float32:
            # the product subtracts the mean on load, all but what rounding leaves of it
            mean = rel + shift
            rest = rel - (mean - shift)
            if tl.program_id(0) % n_blocks == 0:
                tl.store(row_mean_ptr + scratch, mean)
        # of the rounded coefficients, as the product with the bag will see them
        tile_mean = tl.sum(rounded.to(tl.float32) * rest[:, None], 0)
        tl.store(tile_mean_ptr + tile_at, tile_mean, mask=mask_r)


@triton.jit(do_not_specialize=_RUNTIME)
def pool_bag_product_kernel(
    bag_ptr,  # [T, D] in
    bias_ptr,  # [T] in          or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    coef_ptr,  # [C * rows_per_slot, R] in
    row_mean_ptr,  # [C * rows_per_slot] in
    tile_ref_ptr,  # [tiles, R] in
    tile_mean_ptr,  # [tiles, R] in
    tile_sum_ptr,  # [tiles, R] in
    tile_weight_ptr,  # [tiles, R] in  or None: backward
    part_ptr,  # [C, R, D] out
    part_max_ptr,  # [C, R] out       forward
    part_sum_ptr,  # [C, R] out
    part_weight_ptr,  # [C, R] out    forward
    n_bags,
    n_stored,
    n_rows,
    first_slot,
    rows_per_slot,
    scale,
    stride_bag_row,
    stride_coef_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """coef^T x of one slot. Grid: (slots * cdiv(D, BLOCK_D) * cdiv(R, BLOCK_R),).

    The running reference works as in an online softmax; in the backward it only keeps d_logits,
    which may lie below the range of fp16, at a magnitude of 1.
    """
    D_BLOCKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    n_blocks = tl.cdiv(n_rows, BLOCK_R)
    offs_r = tl.program_id(0) % n_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    d_block = tl.program_id(0) // n_blocks % D_BLOCKS
    local_slot = (tl.program_id(0) // n_blocks // D_BLOCKS).to(tl.int64)
    bag, first_row, _position, count = rows_of_slot(
        first_slot + local_slot.to(tl.int32),
        starts_ptr,
        lengths_ptr,
        n_bags,
        n_stored,
        rows_per_slot,
    )
    if bag >= n_bags:
        return
    mask_r = offs_r < n_rows
    offs_n = tl.arange(0, BLOCK_N)
    cols = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    first_tile = local_slot * (rows_per_slot // BLOCK_T)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    mean_sum = tl.zeros((BLOCK_R,), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    kept = tl.zeros((BLOCK_R,), tl.float32)
    largest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    for n0 in range(0, count, BLOCK_N):
        rows = first_row + n0 + offs_n
        _bias, ok = load_bias(bias_ptr, rows, n0 + offs_n < count)
        mask_x = ok[:, None]
        if D % BLOCK_D != 0:
            mask_x = mask_x & (cols < D)[None, :]
        x = tl.load(
            bag_ptr + rows[:, None] * (stride_bag_row * STRIDE_UNIT) + cols[None, :],
            mask=mask_x,
            other=0.0,
        )
        scratch = local_slot * rows_per_slot + n0 + offs_n
        if NORMALIZE and dtype == tl.float32:
            mean = tl.load(row_mean_ptr + scratch, mask=ok, other=0.0)
            x = x - mean[:, None]
        coef = tl.load(
            coef_ptr + scratch[:, None] * stride_coef_row + offs_r[None, :],
            mask=ok[:, None] & mask_r[None, :],
            other=0.0,
        )
        tile_at = (first_tile + n0 // BLOCK_T) * n_rows + offs_r
        ref = tl.load(tile_ref_ptr + tile_at, mask=mask_r, other=-float("inf"))
        new = tl.maximum(largest, ref)
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        share = tl.exp(ref - finite)
        largest = new
        product = tl.dot(tl.trans(coef), x, input_precision=PRECISION)
        acc = acc * shrink[:, None] + product * share[:, None]
        # what a tile gives once is added at its first step
        share = tl.where(n0 % BLOCK_T == 0, share, 0.0)
        if NORMALIZE:
            part = tl.load(tile_mean_ptr + tile_at, mask=mask_r, other=0.0)
            mean_sum = mean_sum * shrink + part * share
        part = tl.load(tile_sum_ptr + tile_at, mask=mask_r, other=0.0)
        if tile_weight_ptr is not None:
            total = total * shrink + part * share
            part = tl.load(tile_weight_ptr + tile_at, mask=mask_r, other=0.0)
            kept = kept * shrink + part * share
        else:
            total += tl.where(n0 % BLOCK_T == 0, part, 0.0)

    if NORMALIZE:
        acc = acc - mean_sum[:, None]
    out = local_slot * n_rows + offs_r
    if d_block == 0:
        tl.store(part_sum_ptr + out, total, mask=mask_r)
        if tile_weight_ptr is not None:
            tl.store(part_max_ptr + out, largest, mask=mask_r)
            tl.store(part_weight_ptr + out, kept, mask=mask_r)
    if tile_weight_ptr is None:
        acc = acc * (tl.exp(largest) * scale)[:, None]
    tl.store(
        part_ptr + out[:, None] * D + cols[None, :],
        acc,
        mask=mask_r[:, None] & (cols < D)[None, :],
    )
