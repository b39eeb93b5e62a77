"""`pool_bag` for few query rows over moderate widths: each stored row is read once.

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".  Layout: one program per (slot, block of query rows). A tile of the bag is one tensor
[GROUPS, BLOCK_N, BLOCK_K] of all columns that serves as keys and as values. The groups are a batch:
each warp holds its columns of the accumulator and sums its share of the scores, and only the
[BLOCK_N, BLOCK_R] scores cross warps. Slots are merged in index order by pool_bag_merge.py.

The tile is never transposed, only the small coefficients are: a transposed use would keep it out of
the asynchronous pipeline.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pool_bag_scores import load_bias, load_per_row, score_gradient
from .ragged import keep_mask, rows_of_slot


@triton.jit
def columns(GROUPS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[GROUPS, 1, BLOCK_K] column indices."""
    group = tl.arange(0, GROUPS)[:, None, None]
    return group * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]


@triton.jit
def load_tile(
    ptr,
    at,  # [N] offsets of matrix rows
    mask,  # [N]
    D: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """[GROUPS, N, BLOCK_K]: all columns of N rows, 0 where masked."""
    cols = columns(GROUPS, BLOCK_K)
    inside = mask[None, :, None]
    if GROUPS * BLOCK_K != D:
        inside = inside & (cols < D)
    return tl.load(ptr + at[None, :, None] + cols, mask=inside, other=0.0)


@triton.jit
def normalize_tile(x, rows, ok, mean_ptr, rstd_ptr, eps, D: tl.constexpr):
    """The tile ready for its dots, and each row's remaining mean and rstd.

    fp32 tiles have their mean subtracted here, and what rounding left of it remains. 16-bit tiles
    stay as they are, since rounding x - mean again would cost digits: their mean leaves the scores
    through the sum of the query row.
    """
    GROUPS: tl.constexpr = x.shape[0]
    BLOCK_K: tl.constexpr = x.shape[2]
    inside = columns(GROUPS, BLOCK_K) < D
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + rows, mask=ok, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=ok, other=0.0)
    else:
        mean = tl.sum(tl.sum(x.to(tl.float32), 2), 0) / D
    rest = tl.zeros_like(mean)
    if mean_ptr is None or x.dtype == tl.float32:
        centred = x.to(tl.float32) - mean[None, :, None]
        if GROUPS * BLOCK_K != D:
            centred = tl.where(inside, centred, 0.0)
    if mean_ptr is None:
        if x.dtype == tl.float32:
            rest = tl.sum(tl.sum(centred, 2), 0) / D
        variance = tl.sum(tl.sum(centred * centred, 2), 0) / D - rest * rest
        rstd = tl.where(ok, tl.rsqrt(variance + eps), 0.0)
    if x.dtype == tl.float32:
        x = centred
        mean = rest
    return x, mean, rstd


@triton.jit
def accumulate(acc, shrink, x, coef, PRECISION: tl.constexpr):
    """acc * shrink + coef^T x, for coef [N, R] and shrink [R] or None."""
    if shrink is not None:
        acc = acc * shrink[None, :, None]
    coef = tl.trans(coef.to(x.dtype))
    coef = tl.broadcast_to(coef[None, :, :], (x.shape[0], coef.shape[0], coef.shape[1]))
    return tl.dot(coef, x, acc, input_precision=PRECISION)


@triton.jit
def store_partial(
    part_ptr,
    out,  # [R] rows of part
    mask_r,
    acc,
    factor,  # [R]
    D: tl.constexpr,
    CENTRE: tl.constexpr,
):
    """Write an accumulator times `factor`, less its mean over columns where CENTRE.

    x_hat sums to 0 over its columns, hence so does every sum of it: the identity is exact, and it
    removes what the means of the rows left in the accumulator.
    """
    cols = columns(acc.shape[0], acc.shape[2])
    if CENTRE:
        acc = acc - (tl.sum(tl.sum(acc, 2), 0) / D)[None, :, None]
    acc = acc * factor[None, :, None]
    mask = mask_r[None, :, None] & (cols < D)
    tl.store(part_ptr + out[None, :, None] * D + cols, acc, mask=mask)


@triton.jit
def round_rows(rows, dtype: tl.constexpr):
    """Query rows [GROUPS, R, BLOCK_K] in the type of the bag and their fp32 factors taken out.

    fp16 has few exponents: rows are brought to a largest magnitude in [1, 2) by a power of two.
    """
    rows = rows.to(tl.float32)
    factor = tl.zeros((rows.shape[1],), tl.float32) + 1.0
    if dtype == tl.float16:
        largest = tl.max(tl.max(tl.abs(rows), 2), 0)
        factor = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
        rows = rows / factor[None, :, None]
    return rows.to(dtype), factor


_RUNTIME = ["n_bags", "n_stored", "n_rows", "first_slot", "rows_per_slot", "threshold"]


@triton.jit(do_not_specialize=_RUNTIME)
def pool_bag_fwd_kernel(
    rows_ptr,  # [B, R, D] in    absorbed queries
    bag_ptr,  # [T, D] in       rows outside every bag are never read
    bias_ptr,  # [T] in          or None
    mean_ptr,  # [T] in          or None
    rstd_ptr,  # [T] in          or None
    seed_ptr,  # [1] in          or None: no dropout
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    part_ptr,  # [C, R, D] out   unnormalised sums of this chunk's slots
    part_max_ptr,  # [C, R] out   largest logit
    part_sum_ptr,  # [C, R] out   sum of exp(logit - max)
    part_weight_ptr,  # [C, R] out   the same over kept weights
    n_bags,
    n_stored,
    n_rows,
    first_slot,
    rows_per_slot,
    threshold,
    scale,
    eps,
    stride_rows_bag,
    stride_rows_row,
    stride_bag_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Partial (max, sum, pooled) of one slot. Grid: (slots * cdiv(R, BLOCK_R),)."""
    n_blocks = tl.cdiv(n_rows, BLOCK_R)
    local_slot = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_r = tl.program_id(0) % n_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    bag, first_row, position, count = rows_of_slot(
        first_slot + local_slot.to(tl.int32),
        starts_ptr,
        lengths_ptr,
        n_bags,
        n_stored,
        rows_per_slot,
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    mask_r = offs_r < n_rows
    row_at = bag.to(tl.int64) * stride_rows_bag + offs_r.to(tl.int64) * stride_rows_row
    a, factor = round_rows(load_tile(rows_ptr, row_at, mask_r, D, GROUPS, BLOCK_K), dtype)
    a_sum = tl.sum(tl.sum(a.to(tl.float32), 2), 0)
    a = tl.trans(a, 0, 2, 1)
    factor = factor * scale

    acc = tl.zeros((GROUPS, BLOCK_R, BLOCK_K), tl.float32)
    largest = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    kept = tl.zeros((BLOCK_R,), tl.float32)
    for n0 in range(0, count, BLOCK_N):
        rows = first_row + n0 + offs_n
        bias, ok = load_bias(bias_ptr, rows, n0 + offs_n < count)
        x_at = rows * (stride_bag_row * STRIDE_UNIT)
        x = load_tile(bag_ptr, x_at, ok, D, GROUPS, BLOCK_K)
        if NORMALIZE:
            x, mean, rstd = normalize_tile(x, rows, ok, mean_ptr, rstd_ptr, eps, D)
        logits = tl.sum(tl.dot(x, a, input_precision=PRECISION), 0)
        if NORMALIZE:
            logits = (logits - mean[:, None] * a_sum[None, :]) * rstd[:, None]
        logits = logits * factor[None, :] + bias[:, None]
        logits = tl.where(ok[:, None], logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 0))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        weights = tl.exp(logits - finite[None, :])
        largest = new
        total = total * shrink + tl.sum(weights, 0)
        if seed_ptr is not None:
            at = (position + n0 + offs_n)[:, None]
            keep = keep_mask(tl.load(seed_ptr), at, offs_r[None, :], bag, threshold)
            weights = tl.where(keep, weights, 0.0)
            kept = kept * shrink + tl.sum(weights, 0)
        if NORMALIZE:
            weights = weights * rstd[:, None]
        acc = accumulate(acc, shrink, x, weights, PRECISION)

    out = local_slot * n_rows + offs_r
    one = tl.zeros((BLOCK_R,), tl.float32) + 1.0
    CENTRE: tl.constexpr = NORMALIZE and (dtype != tl.float32 or mean_ptr is None)
    store_partial(part_ptr, out, mask_r, acc, one, D, CENTRE)
    tl.store(part_max_ptr + out, largest, mask=mask_r)
    tl.store(part_sum_ptr + out, total, mask=mask_r)
    tl.store(part_weight_ptr + out, total if seed_ptr is None else kept, mask=mask_r)


@triton.jit(do_not_specialize=_RUNTIME)
def pool_bag_bwd_rows_kernel(
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
    part_ptr,  # [C, R, D] out   this chunk's share of d_rows
    part_sum_ptr,  # [C, R] out   sum of d_logits; or None: not balanced
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
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """d_rows of one slot. Grid: (slots * cdiv(R, BLOCK_R),)."""
    n_blocks = tl.cdiv(n_rows, BLOCK_R)
    local_slot = (tl.program_id(0) // n_blocks).to(tl.int64)
    offs_r = tl.program_id(0) % n_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    bag, first_row, position, count = rows_of_slot(
        first_slot + local_slot.to(tl.int32),
        starts_ptr,
        lengths_ptr,
        n_bags,
        n_stored,
        rows_per_slot,
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    mask_r = offs_r < n_rows
    at = bag.to(tl.int64) * n_rows + offs_r
    PADDED: tl.constexpr = (D + 15) // 16 * 16
    a = tl.trans(load_tile(a_ptr, at * PADDED, mask_r, D, GROUPS, BLOCK_K), 0, 2, 1)
    dz = tl.trans(load_tile(dz_ptr, at * PADDED, mask_r, D, GROUPS, BLOCK_K), 0, 2, 1)
    per_row = load_per_row(per_row_ptr, at, n_bags.to(tl.int64) * n_rows, mask_r)

    acc = tl.zeros((GROUPS, BLOCK_R, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    unit = tl.zeros((BLOCK_R,), tl.float32)
    for n0 in range(0, count, BLOCK_N):
        rows = first_row + n0 + offs_n
        bias, ok = load_bias(bias_ptr, rows, n0 + offs_n < count)
        x_at = rows * (stride_bag_row * STRIDE_UNIT)
        x = load_tile(bag_ptr, x_at, ok, D, GROUPS, BLOCK_K)
        if NORMALIZE:
            x, mean, rstd = normalize_tile(x, rows, ok, mean_ptr, rstd_ptr, eps, D)
        else:
            mean = tl.zeros((BLOCK_N,), tl.float32)
            rstd = mean
        s = tl.sum(tl.dot(x, a, input_precision=PRECISION), 0)
        dp = tl.sum(tl.dot(x, dz, input_precision=PRECISION), 0)
        _weights, ds, _s, _dp = score_gradient(
            s,
            dp,
            bias,
            ok,
            mean,
            rstd,
            position + n0 + offs_n,
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
        if part_sum_ptr is not None:
            total += tl.sum(ds, 0)
        if NORMALIZE:
            ds = ds * rstd[:, None]
        if dtype == tl.float16:
            # ds shrinks with the bag's length and with the loss: keep the largest so far at 1
            new = tl.maximum(unit, tl.max(tl.abs(ds), 0))
            safe = tl.where(new > 1e-30, new, 1.0)
            ds = ds / safe[None, :]
            shrink = unit / safe
            unit = new
            acc = accumulate(acc, shrink, x, ds, PRECISION)
        else:
            acc = accumulate(acc, None, x, ds, PRECISION)

    out = local_slot * n_rows + offs_r
    if part_sum_ptr is not None:
        tl.store(part_sum_ptr + out, total, mask=mask_r)
    factor = (unit if dtype == tl.float16 else unit + 1.0) * scale
    CENTRE: tl.constexpr = NORMALIZE and (dtype != tl.float32 or mean_ptr is None)
    store_partial(part_ptr, out, mask_r, acc, factor, D, CENTRE)
