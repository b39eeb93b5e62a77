"""The hidden layer of gated attention in Triton: in registers, and its scores.

Contract: survfuse/ops/gated_attention_pool.py.  Oracle: survfuse/reference/gated_attention_pool.py.
Math: docs/math.md, "Gated attention pooling".  Layout: one program per tile of BLOCK_T rows; it
walks the hidden units in blocks of BLOCK_L and, for each, the columns of the bag in slices. The
tile comes from memory once and out of the caches for the other blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pool_bag_scores import load_bias
from .ragged import keep_mask, rows_of_slot


@triton.jit
def tanh(x):
    """tanh to a few units of rounding: a polynomial where the exponential would cancel."""
    z = x * x
    y = 0.0022546048276126385 * z - 0.00829343218356371
    y = y * z + 0.021745560690760612
    y = y * z - 0.053954653441905975
    y = y * z + 0.13333266973495483
    y = y * z - 0.3333333134651184
    e = tl.exp(-2.0 * tl.abs(x))
    far = 1.0 - 2.0 * e / (1.0 + e)
    return tl.where(tl.abs(x) < 0.6, x + x * (z * y), tl.where(x < 0, -far, far))


@triton.jit
def _branches_step(
    u,
    v,
    bag_ptr,
    row_at,
    ok,
    w_tanh_ptr,
    w_gate_ptr,
    unit_at,
    mask_l,
    k0,
    D: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One slice of columns."""
    cols = k0 + tl.arange(0, BLOCK_K)
    mask_x = ok[:, None]
    mask_w = mask_l[:, None]
    if TAIL:
        mask_x = mask_x & (cols < D)[None, :]
        mask_w = mask_w & (cols < D)[None, :]
    x = tl.load(bag_ptr + row_at[:, None] + cols[None, :], mask=mask_x, other=0.0)
    w = tl.load(w_tanh_ptr + unit_at[:, None] + cols[None, :], mask=mask_w, other=0.0)
    u = tl.dot(x, tl.trans(w), u, input_precision=PRECISION)
    w = tl.load(w_gate_ptr + unit_at[:, None] + cols[None, :], mask=mask_w, other=0.0)
    v = tl.dot(x, tl.trans(w), v, input_precision=PRECISION)
    return u, v


@triton.jit
def branches(
    bag_ptr,
    row_at,  # [T] offset of each row
    ok,  # [T]
    w_tanh_ptr,
    b_tanh_ptr,
    w_gate_ptr,
    b_gate_ptr,
    offs_l,  # [BLOCK_L] hidden units
    D: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """tanh and sigmoid of a block of hidden units, both [T, BLOCK_L]; tanh is 0 past L."""
    mask_l = offs_l < L
    u = tl.zeros((BLOCK_T, BLOCK_L), tl.float32)
    v = tl.zeros((BLOCK_T, BLOCK_L), tl.float32)
    for k0 in range(0, D // BLOCK_K * BLOCK_K, BLOCK_K):
        u, v = _branches_step(
            u,
            v,
            bag_ptr,
            row_at,
            ok,
            w_tanh_ptr,
            w_gate_ptr,
            offs_l * D,
            mask_l,
            k0,
            D,
            False,
            PRECISION,
            BLOCK_K,
        )
    if D % BLOCK_K != 0:
        u, v = _branches_step(
            u,
            v,
            bag_ptr,
            row_at,
            ok,
            w_tanh_ptr,
            w_gate_ptr,
            offs_l * D,
            mask_l,
            tl.full((), D // BLOCK_K * BLOCK_K, tl.int32),
            D,
            True,
            PRECISION,
            BLOCK_K,
        )
    if b_tanh_ptr is not None:
        u += tl.load(b_tanh_ptr + offs_l, mask=mask_l, other=0.0)[None, :]
    if b_gate_ptr is not None:
        v += tl.load(b_gate_ptr + offs_l, mask=mask_l, other=0.0)[None, :]
    return tanh(u), 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def gated_scores(
    bag_ptr,
    row_at,  # [T]
    ok,  # [T]
    w_tanh_ptr,
    b_tanh_ptr,
    w_gate_ptr,
    b_gate_ptr,
    w_score_ptr,
    b_score_ptr,
    hidden_ptr,  # keeps both branches, or None
    hidden_at,  # [T] offset of each row there
    n_pools,
    D: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits of a tile [T, P], without the bias of the patches."""
    PADDED: tl.constexpr = (L + 15) // 16 * 16
    dtype: tl.constexpr = bag_ptr.dtype.element_ty
    offs_p = tl.arange(0, BLOCK_P)
    s = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    for l0 in range(0, L, BLOCK_L):
        offs_l = l0 + tl.arange(0, BLOCK_L)
        value, share = branches(
            bag_ptr,
            row_at,
            ok,
            w_tanh_ptr,
            b_tanh_ptr,
            w_gate_ptr,
            b_gate_ptr,
            offs_l,
            D,
            L,
            PRECISION,
            BLOCK_T,
            BLOCK_L,
            BLOCK_K,
        )
        if hidden_ptr is not None:
            at = hidden_ptr + hidden_at[:, None] + offs_l[None, :]
            tl.store(at, value.to(dtype), mask=(offs_l < PADDED)[None, :])
            tl.store(at + PADDED, share.to(dtype), mask=(offs_l < PADDED)[None, :])
            # what the backward will read again is what its scores are made of
            value = value.to(dtype).to(tl.float32)
            share = share.to(dtype).to(tl.float32)
        w = tl.load(
            w_score_ptr + offs_p[:, None] * L + offs_l[None, :],
            mask=(offs_p < n_pools)[:, None] & (offs_l < L)[None, :],
            other=0.0,
        )
        s = tl.dot((value * share).to(dtype), tl.trans(w), s, input_precision=PRECISION)
    if b_score_ptr is not None:
        s += tl.load(b_score_ptr + offs_p, mask=offs_p < n_pools, other=0.0)[None, :]
    return s


@triton.jit(do_not_specialize=["n_bags", "n_stored", "n_pools", "first_slot", "rows_per_slot",
                               "threshold"])  # fmt: skip
def gated_scores_kernel(
    w_tanh_ptr,  # [L, D] in
    b_tanh_ptr,  # [L] in            or None
    w_gate_ptr,  # [L, D] in
    b_gate_ptr,  # [L] in            or None
    w_score_ptr,  # [K, L] in
    b_score_ptr,  # [K] in            or None
    bag_ptr,  # [T, D] in
    bias_ptr,  # [T] in            or None
    seed_ptr,  # [1] in            or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    coef_ptr,  # [C * rows_per_slot, K] out   weights over exp(tile_ref)
    tile_ref_ptr,  # [tiles, K] out
    tile_sum_ptr,  # [tiles, K] out   sum of exp(logit - tile_ref)
    tile_weight_ptr,  # [tiles, K] out   the same over kept weights
    n_bags,
    n_stored,
    n_pools,
    first_slot,
    rows_per_slot,
    threshold,
    stride_bag_row,
    stride_coef_row,
    STRIDE_UNIT: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Coefficients of one tile, for pool_bag_product_kernel. Grid: (tiles,)."""
    tile = tl.program_id(0).to(tl.int64)
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
    offs_p = tl.arange(0, BLOCK_P)
    mask_p = offs_p < n_pools
    offs_n = n0 + tl.arange(0, BLOCK_T)
    rows = first_row + offs_n
    bias, ok = load_bias(bias_ptr, rows, offs_n < count)
    row_at = rows * (stride_bag_row * STRIDE_UNIT)
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
        None,
        row_at,
        n_pools,
        D,
        L,
        PRECISION,
        BLOCK_P,
        BLOCK_T,
        BLOCK_L,
        BLOCK_K,
    )
    s = tl.where(ok[:, None], s + bias[:, None], -float("inf"))
    ref = tl.max(s, 0)
    coef = tl.exp(s - tl.where(ref == -float("inf"), 0.0, ref)[None, :])
    total = tl.sum(coef, 0)
    tile_at = tile * n_pools + offs_p
    tl.store(tile_sum_ptr + tile_at, total, mask=mask_p)
    if seed_ptr is not None:
        keep = keep_mask(
            tl.load(seed_ptr), (position + offs_n)[:, None], offs_p[None, :], bag, threshold
        )
        coef = tl.where(keep, coef, 0.0)
        total = tl.sum(coef, 0)
    tl.store(tile_weight_ptr + tile_at, total, mask=mask_p)
    tl.store(tile_ref_ptr + tile_at, ref, mask=mask_p)
    scratch = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    tl.store(
        coef_ptr + scratch[:, None] * stride_coef_row + offs_p[None, :],
        coef.to(dtype),
        mask=mask_p[None, :],
    )
