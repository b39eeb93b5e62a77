"""Scores of a tile of a bag against query rows, and their gradient: what the pooling kernels share.

Math: docs/math.md, "Pooling".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ragged import keep_mask

# planes of `per_row`, the [7, B, R] fp32 array that pool_bag_prepare_kernel fills
N_PLANES: tl.constexpr = tl.constexpr(7)


@triton.jit
def load_bias(bias_ptr, rows, ok):
    """[N] bias, and which rows take part: inside the bag and not excluded by -inf.

    The bag is loaded under that mask with other=0, so an excluded row may hold NaN.
    """
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=ok, other=-float("inf")).to(tl.float32)
        ok = ok & (bias != -float("inf"))
    else:
        bias = tl.zeros(rows.shape, tl.float32)
    return bias, ok


@triton.jit
def load_per_row(per_row_ptr, at, plane, mask):
    """The planes of `per_row` at [R] entries: sum and factor of a, of dz, delta, lse, d_weight."""
    ptr = per_row_ptr + at
    a_sum = tl.load(ptr, mask=mask, other=0.0)
    a_factor = tl.load(ptr + plane, mask=mask, other=0.0)
    dz_sum = tl.load(ptr + 2 * plane, mask=mask, other=0.0)
    dz_factor = tl.load(ptr + 3 * plane, mask=mask, other=0.0)
    delta = tl.load(ptr + 4 * plane, mask=mask, other=0.0)
    lse = tl.load(ptr + 5 * plane, mask=mask, other=-float("inf"))
    d_weight = tl.load(ptr + 6 * plane, mask=mask, other=0.0)
    return a_sum, a_factor, dz_sum, dz_factor, delta, lse, d_weight


@triton.jit
def score_gradient(
    s,  # [N, R] x . a, raw
    dp,  # [N, R] x . dz, raw
    bias,  # [N]
    ok,  # [N] rows that take part
    mean,  # [N] what is left to subtract of the mean
    rstd,  # [N]
    positions,  # [N] in the bag
    bag,
    offs_r,  # [R]
    per_row,  # load_per_row
    seed_ptr,
    threshold,
    scale,
    keep_scale,
    NORMALIZE: tl.constexpr,
    FACTORS: tl.constexpr,  # the factors of a and dz are not 1: fp16
):
    """Weights, d_logits, logits without bias and dz . x_hat, all [N, R]."""
    a_sum, a_factor, dz_sum, dz_factor, delta, lse, d_weight = per_row
    if NORMALIZE:
        s = (s - mean[:, None] * a_sum[None, :]) * rstd[:, None]
        dp = (dp - mean[:, None] * dz_sum[None, :]) * rstd[:, None]
    if FACTORS:
        s = s * (a_factor * scale)[None, :]
        dp = dp * dz_factor[None, :]
    else:
        s = s * scale
    included = ok[:, None] & (lse != -float("inf"))[None, :]
    shifted = s + bias[:, None] - tl.where(lse == -float("inf"), 0.0, lse)[None, :]
    p = tl.exp(tl.where(included, shifted, -float("inf")))
    weights = p
    upstream = dp + d_weight[None, :]
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), positions[:, None], offs_r[None, :], bag, threshold)
        weights = tl.where(keep, p * keep_scale, 0.0)
        upstream = tl.where(keep, upstream * keep_scale, 0.0)
    ds = tl.where(included, p * (upstream - delta[None, :]), 0.0)
    return weights, ds, s, dp


@triton.jit
def _score_step(
    s,
    dp,
    rel,
    spread,
    shift,
    bag_ptr,
    row_at,
    ok,
    a_ptr,
    dz_ptr,
    query_at,
    mask_r,
    k0,
    D: tl.constexpr,
    TAIL: tl.constexpr,
    WITH_DZ: tl.constexpr,
    WITH_STATS: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One slice of columns: scores and, by Chan's update, the rows' mean and sum of squares."""
    cols = k0 + tl.arange(0, BLOCK_K)
    mask_x = ok[:, None]
    mask_a = mask_r[:, None]
    if TAIL:
        mask_x = mask_x & (cols < D)[None, :]
        mask_a = mask_a & (cols < D)[None, :]
    x = tl.load(bag_ptr + row_at[:, None] + cols[None, :], mask=mask_x, other=0.0)
    a = tl.load(a_ptr + query_at[:, None] + cols[None, :], mask=mask_a, other=0.0)
    if SHIFTED:
        x = x - shift[:, None]
        if TAIL:
            x = tl.where((cols < D)[None, :], x, 0.0)
    if WITH_STATS:
        n_cols = tl.minimum(D - k0, BLOCK_K).to(tl.float32)
        slice_mean = tl.sum(x.to(tl.float32), 1) / n_cols
        centred = x.to(tl.float32) - slice_mean[:, None]
        if TAIL:
            centred = tl.where((cols < D)[None, :], centred, 0.0)
        step = slice_mean - rel
        share = n_cols / (k0 + n_cols)
        rel += step * share
        spread += tl.sum(centred * centred, 1) + step * step * share * k0
    s = tl.dot(x, tl.trans(a), s, input_precision=PRECISION)
    if WITH_DZ:
        dz = tl.load(dz_ptr + query_at[:, None] + cols[None, :], mask=mask_a, other=0.0)
        dp = tl.dot(x, tl.trans(dz), dp, input_precision=PRECISION)
    return s, dp, rel, spread


@triton.jit
def score_tile(
    bag_ptr,
    rows,  # [N] stored rows
    ok,  # [N]
    stride_bag_row,
    mean_ptr,
    rstd_ptr,
    eps,
    a_ptr,
    dz_ptr,
    query_at,  # [R] offset of each query row in a and dz
    mask_r,  # [R]
    D: tl.constexpr,
    WITH_DZ: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Raw x . a and x . dz of a tile over all columns, each stored row read once.

    Returns s, dp [N, R], then per row: the mean still to be subtracted from the raw scores, the
    shift that was subtracted on load, and rstd. fp32 rows are shifted, by their mean where it is
    given and else by their first value, so that a mean far from 0 costs no digits; 16-bit rows stay
    exact as stored.
    """
    row_at = rows * stride_bag_row
    s = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    dp = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    rel = tl.zeros((BLOCK_N,), tl.float32)
    spread = tl.zeros((BLOCK_N,), tl.float32)
    WITH_STATS: tl.constexpr = NORMALIZE and mean_ptr is None
    SHIFTED: tl.constexpr = NORMALIZE and bag_ptr.dtype.element_ty == tl.float32
    if NORMALIZE and mean_ptr is not None:
        rel = tl.load(mean_ptr + rows, mask=ok, other=0.0)
        if SHIFTED:
            shift = rel
            rel = tl.zeros((BLOCK_N,), tl.float32)
    if WITH_STATS and SHIFTED:
        shift = tl.load(bag_ptr + row_at, mask=ok, other=0.0)
    # only the last slice of an odd width pays for a mask over columns
    for k0 in range(0, D // BLOCK_K * BLOCK_K, BLOCK_K):
        s, dp, rel, spread = _score_step(
            s,
            dp,
            rel,
            spread,
            shift,
            bag_ptr,
            row_at,
            ok,
            a_ptr,
            dz_ptr,
            query_at,
            mask_r,
            k0,
            D,
            False,
            WITH_DZ,
            WITH_STATS,
            SHIFTED,
            PRECISION,
            BLOCK_K,
        )
    if D % BLOCK_K != 0:
        s, dp, rel, spread = _score_step(
            s,
            dp,
            rel,
            spread,
            shift,
            bag_ptr,
            row_at,
            ok,
            a_ptr,
            dz_ptr,
            query_at,
            mask_r,
            tl.full((), D // BLOCK_K * BLOCK_K, tl.int32),
            D,
            True,
            WITH_DZ,
            WITH_STATS,
            SHIFTED,
            PRECISION,
            BLOCK_K,
        )
    if WITH_STATS:
        rstd = tl.where(ok, tl.rsqrt(spread / D + eps), 0.0)
    elif NORMALIZE:
        rstd = tl.load(rstd_ptr + rows, mask=ok, other=0.0)
    else:
        rstd = tl.zeros((BLOCK_N,), tl.float32)
    return s, dp, rel, shift, rstd


@triton.jit
def _round(values, dtype: tl.constexpr):
    """Values [D] in the type of the bag, the fp32 factor taken out, and the sum of the rounded.

    fp16 has few exponents: the largest magnitude is brought to [1, 2) by a power of two.
    """
    factor = tl.full((), 1.0, tl.float32)
    if dtype == tl.float16:
        largest = tl.max(tl.abs(values), 0)
        factor = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
        values = values / factor
    rounded = values.to(dtype)
    return rounded, factor, tl.sum(rounded.to(tl.float32), 0)


@triton.jit(do_not_specialize=["n_rows"])
def pool_bag_prepare_kernel(
    rows_ptr,  # [B, R, D] in
    pooled_ptr,  # [B, R, D] in    this and the next five or None: forward
    lse_ptr,  # [B, R] in
    weight_sum_ptr,  # [B, R] in
    d_pooled_ptr,  # [B, R, D] in
    d_lse_ptr,  # [B, R] in
    d_weight_sum_ptr,  # [B, R] in
    a_ptr,  # [B, R, PADDED] out   rows in the type of the bag, PADDED the next multiple of 16
    dz_ptr,  # [B, R, PADDED] out   d_pooled in the type of the bag
    per_row_ptr,  # [7, B, R] out   planes of load_per_row; the first two only in the forward
    n_rows,
    stride_rows_bag,
    stride_rows_row,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Round the query side once, and sum what was rounded. Grid: (B * R,).

    delta uses the rounded gradient, as the scores will: what the two have in common, above all a
    large mean of the bag, then cancels to the last bit.
    """
    at = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    row_at = rows_ptr + at // n_rows * stride_rows_bag + at % n_rows * stride_rows_row
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    a, factor, total = _round(tl.load(row_at + cols, mask=mask, other=0.0).to(tl.float32), dtype)
    PADDED: tl.constexpr = (D + 15) // 16 * 16
    tl.store(a_ptr + at * PADDED + cols, a, mask=cols < PADDED)
    tl.store(per_row_ptr + at, total)
    tl.store(per_row_ptr + plane + at, factor)
    if d_pooled_ptr is not None:
        dz = tl.load(d_pooled_ptr + at * D + cols, mask=mask, other=0.0)
        dz, factor, total = _round(dz, dtype)
        tl.store(dz_ptr + at * PADDED + cols, dz, mask=cols < PADDED)
        z = tl.load(pooled_ptr + at * D + cols, mask=mask, other=0.0)
        d_weight = tl.load(d_weight_sum_ptr + at)
        # what dz . x and dz . z have in common cancels later: this sum adds no rounding of its own
        delta = tl.sum(dz.to(tl.float64) * z.to(tl.float64), 0).to(tl.float32) * factor
        delta += d_weight * tl.load(weight_sum_ptr + at) - tl.load(d_lse_ptr + at)
        tl.store(per_row_ptr + 2 * plane + at, total)
        tl.store(per_row_ptr + 3 * plane + at, factor)
        tl.store(per_row_ptr + 4 * plane + at, delta)
        tl.store(per_row_ptr + 5 * plane + at, tl.load(lse_ptr + at))
        tl.store(per_row_ptr + 6 * plane + at, d_weight)
