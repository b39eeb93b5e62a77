"""What the kernels of `spread_tokens` share: a tile of the bag against a block of heads and keys.

Math: docs/math.md, "Spreading tokens over a bag".  A tile's numbers are [HEADS_BLOCK, BLOCK_N,
BLOCK_L], a batch of heads: rows of the bag by keys. They come from one matrix product over the
columns of the bag, whose right side is all keys of these heads one behind the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import logit_gradient, whole_rows
from .pool_bag_scores import score_tile
from .ragged import keep_mask


@triton.jit
def keys_of_block(head0, j0, n_keys, HEADS: tl.constexpr, G: tl.constexpr, BLOCK_L: tl.constexpr):
    """Heads [G], keys [L], entries [G, L] among the H * Lk of a bag, and which exist."""
    heads = head0 + tl.arange(0, G)
    keys = j0 + tl.arange(0, BLOCK_L)
    exists = (heads < HEADS)[:, None] & (keys < n_keys)[None, :]
    return heads, keys, heads[:, None] * n_keys + keys[None, :], exists


@triton.jit
def score_block(
    bag_ptr,  # [T, D] in
    mean_ptr,  # [T] in   or None
    rstd_ptr,  # [T] in   or None
    a_ptr,  # [B, H * Lk, PADDED] in    rounded keys
    per_key_ptr,  # [2, B, H * Lk] in     sum and factor of each
    key_bias_ptr,  # [B, H * Lk] in        or None
    rows,  # [N] stored rows
    inside,  # [N]
    bag,
    entries,  # keys_of_block
    exists,
    n_bags,
    n_entries,  # H * Lk
    scale,
    eps,
    stride_bag_row,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    G: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits without bias [G, N, L], bias, which keys take part, and the rows' statistics."""
    R: tl.constexpr = G * BLOCK_L
    at = bag.to(tl.int64) * n_entries + entries
    flat_at = tl.reshape(at, (R,))
    flat_exists = tl.reshape(exists, (R,))
    s, _, rel, shift, rstd = score_tile(
        bag_ptr,
        rows,
        inside,
        stride_bag_row,
        mean_ptr,
        rstd_ptr,
        eps,
        a_ptr,
        None,
        flat_at * ((D + 15) // 16 * 16),
        flat_exists,
        D,
        False,
        NORMALIZE,
        PRECISION,
        BLOCK_N,
        R,
        BLOCK_K,
    )
    if NORMALIZE:
        a_sum = tl.load(per_key_ptr + flat_at, mask=flat_exists, other=0.0)
        s = (s - rel[:, None] * a_sum[None, :]) * rstd[:, None]
    plane = n_bags.to(tl.int64) * n_entries
    factor = tl.load(per_key_ptr + plane + flat_at, mask=flat_exists, other=0.0)
    s = s * (factor * scale)[None, :]
    s = tl.permute(tl.reshape(s, (BLOCK_N, G, BLOCK_L)), (1, 0, 2))
    ok = exists
    bias = tl.zeros((G, BLOCK_L), tl.float32)
    if key_bias_ptr is not None:
        bias = tl.load(key_bias_ptr + at, mask=exists, other=-float("inf")).to(tl.float32)
        ok = ok & (bias != -float("inf"))
    return s, bias, ok, rel, shift, rstd


@triton.jit
def load_values(values_ptr, at, exists, cols, DV: tl.constexpr, dtype: tl.constexpr):
    """[G, L, V] of the values [B, H, Lk, DV] in the type of the bag."""
    mask = exists[:, :, None] & (cols < DV)[None, None, :]
    v = tl.load(values_ptr + at[:, :, None] * DV + cols[None, None, :], mask=mask, other=0.0)
    return v.to(dtype)


@triton.jit
def load_results(ptr, at, heads, inside, cols, HEADS: tl.constexpr, DV: tl.constexpr):
    """[G, N, V] of the per-row results [total, H, DV], `at` [N] being result rows."""
    place = (at[None, :] * HEADS + heads[:, None])[:, :, None] * DV + cols[None, None, :]
    mask = ((heads < HEADS)[:, None] & inside[None, :])[:, :, None] & (cols < DV)[None, None, :]
    return tl.load(ptr + place, mask=mask, other=0.0)


@triton.jit
def keep_block(seed_ptr, keys, positions, heads, bag, threshold, HEADS: tl.constexpr):
    """[G, N, L] True where a weight is kept: the mask's position is the key's, its row the patch's."""
    draws = positions[None, :, None] * HEADS + heads[:, None, None]
    return keep_mask(tl.load(seed_ptr), keys[None, None, :], draws, bag, threshold)


@triton.jit
def result_factor(
    d_out_ptr, at, heads, inside, HEADS: tl.constexpr, DV: tl.constexpr, BLOCK_V: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """[G, N] powers of two that bring rows of d_out to [1, 2) for fp16; 1 for other types."""
    largest = tl.zeros((heads.shape[0], at.shape[0]), tl.float32)
    if dtype == tl.float16:
        for v0 in range(0, DV, BLOCK_V):
            cols = v0 + tl.arange(0, BLOCK_V)
            dz = load_results(d_out_ptr, at, heads, inside, cols, HEADS, DV).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(dz), 2))
        factor = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
    else:
        factor = largest + 1.0
    return factor


@triton.jit
def weigh_block(
    s,  # [G, N, L] logits without bias
    bias,  # [G, L]
    ok,  # [G, L]
    d_out_ptr,  # [total, H, DV] in
    lse_ptr,  # [total, H] in
    values_ptr,  # [B, H, Lk, DV] in
    seed_ptr,
    factor,  # result_factor
    at,  # [N] result rows
    inside,
    positions,  # [N] of the patches in their bag
    bag,
    heads,
    keys,
    entries,
    n_keys,
    threshold,
    keep_scale,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    dtype: tl.constexpr,
):
    """Weights before and after dropout, and the gradient of the former by way of the latter."""
    dp = tl.zeros(s.shape, tl.float32)
    value_at = bag.to(tl.int64) * HEADS * n_keys + entries
    for v0 in range(0, DV, BLOCK_V):
        cols = v0 + tl.arange(0, BLOCK_V)
        dz = load_results(d_out_ptr, at, heads, inside, cols, HEADS, DV)
        if dtype == tl.float16:
            dz = dz / factor[:, :, None]
        v = load_values(values_ptr, value_at, ok, cols, DV, dtype)
        v = tl.permute(v, (0, 2, 1))
        dp = tl.dot(dz.to(dtype), v, dp, input_precision=PRECISION)
    dp = dp * factor[:, :, None]
    mask = inside[None, :] & (heads < HEADS)[:, None]
    lse = tl.load(lse_ptr + at[None, :] * HEADS + heads[:, None], mask=mask, other=-float("inf"))
    included = ok[:, None, :] & (lse != -float("inf"))[:, :, None]
    shifted = s + bias[:, None, :] - tl.where(lse == -float("inf"), 0.0, lse)[:, :, None]
    softmax = tl.exp(tl.where(included, shifted, -float("inf")))
    weights = softmax
    if seed_ptr is not None:
        keep = keep_block(seed_ptr, keys, positions, heads, bag, threshold, HEADS)
        weights = tl.where(keep, softmax * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    # by selection: a gradient may be infinite where a weight is 0
    return softmax, weights, tl.where(included, dp, 0.0)


@triton.jit
def finish_block(
    softmax, weights, dp, rows_ptr, d_lse_ptr, at, heads, inside, total,
    HEADS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Weights and d_logits, whose mean gradient and sum are the block's own or, of [2, total, H],
    what spread_tokens_rows_kernel found.

    The sum takes out what the rounding of lse did to the weights; the gradient of lse is added
    after the difference, of which little may be left.
    """
    place = at[None, :] * HEADS + heads[:, None]
    mask = inside[None, :] & (heads < HEADS)[:, None]
    if WHOLE:
        share, mean = whole_rows(softmax, dp, 2)
    else:
        mean = tl.load(rows_ptr + place, mask=mask, other=0.0)
        share = tl.load(rows_ptr + total.to(tl.int64) * HEADS + place, mask=mask, other=0.0)
    d_lse = tl.load(d_lse_ptr + place, mask=mask, other=0.0)
    softmax = softmax * share[:, :, None]
    ds = logit_gradient(softmax, dp, mean[:, :, None], d_lse[:, :, None])
    return weights * share[:, :, None], ds
