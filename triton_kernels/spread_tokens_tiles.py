"""What the kernels of `spread_tokens` share: a tile of the bag against a block of heads and keys.

Math: docs/math.md, "Spreading tokens over a bag".  A tile's numbers are [BLOCK_N, R]: rows of the
bag by the BLOCK_H * BLOCK_L keys of a block of heads, one head behind the other. They come from
one product over the columns of the bag. Values and results of the heads lie side by side, [.., C]
with C = BLOCK_H * BLOCK_V, so that a product with them is one, with zeros where heads differ: a
product batched over heads would give every warp a head of its own and its registers with it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import logit_gradient
from .pool_bag_scores import score_tile
from .ragged import keep_mask


@triton.jit
def keys_of_block(head0, j0, n_keys, HEADS: tl.constexpr, G: tl.constexpr, BLOCK_L: tl.constexpr):
    """Of the R keys of a block: head and key, place among the H * Lk of a bag, and which exist."""
    offs_r = tl.arange(0, G * BLOCK_L)
    heads = head0 + offs_r // BLOCK_L
    keys = j0 + offs_r % BLOCK_L
    return heads, keys, heads * n_keys + keys, (heads < HEADS) & (keys < n_keys)


@triton.jit
def columns_of_block(
    head0, v0, HEADS: tl.constexpr, DV: tl.constexpr, G: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Of the C columns of a block: head, column, and which exist."""
    offs_c = tl.arange(0, G * BLOCK_V)
    heads = head0 + offs_c // BLOCK_V
    cols = v0 + offs_c % BLOCK_V
    return heads, cols, (heads < HEADS) & (cols < DV)


@triton.jit
def by_head(x, G: tl.constexpr):
    """[N, R] as [N, G, R / G]."""
    return tl.reshape(x, (x.shape[0], G, x.shape[1] // G))


@triton.jit
def repeat(x, times: tl.constexpr):
    """[N, G] as [N, G * times], each number next to itself."""
    wide = tl.broadcast_to(x[:, :, None], (x.shape[0], x.shape[1], times))
    return tl.reshape(wide, (x.shape[0], x.shape[1] * times))


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
    entries,  # [R] keys_of_block
    exists,  # [R]
    n_bags,
    n_entries,  # H * Lk
    scale,
    eps,
    stride_bag_row,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits without bias [N, R], bias [R], which keys take part, and the rows' statistics."""
    first = bag.to(tl.int64) * n_entries
    s, _, rel, shift, rstd = score_tile(
        bag_ptr,
        rows,
        inside,
        stride_bag_row,
        mean_ptr,
        rstd_ptr,
        eps,
        a_ptr + first * ((D + 15) // 16 * 16),
        None,
        entries * ((D + 15) // 16 * 16),
        exists,
        D,
        False,
        NORMALIZE,
        PRECISION,
        rows.shape[0],
        entries.shape[0],
        BLOCK_K,
    )
    if NORMALIZE:
        a_sum = tl.load(per_key_ptr + first + entries, mask=exists, other=0.0)
        s = (s - rel[:, None] * a_sum[None, :]) * rstd[:, None]
    plane = n_bags.to(tl.int64) * n_entries
    factor = tl.load(per_key_ptr + plane + first + entries, mask=exists, other=0.0)
    s = s * (factor * scale)[None, :]
    ok = exists
    bias = tl.zeros(entries.shape, tl.float32)
    if key_bias_ptr is not None:
        bias = tl.load(key_bias_ptr + first + entries, mask=exists, other=-float("inf"))
        bias = bias.to(tl.float32)
        ok = ok & (bias != -float("inf"))
    return s, bias, ok, rel, shift, rstd


@triton.jit
def load_values(
    values_ptr,  # [H, Lk, DV] in    of one bag
    key_heads,
    entries,
    ok,
    heads,
    cols,
    valid,
    DV: tl.constexpr,
    dtype: tl.constexpr,
):
    """[R, C] in the type of the bag: the values of a key in the columns of its own head."""
    mask = ok[:, None] & valid[None, :] & (key_heads[:, None] == heads[None, :])
    v = tl.load(values_ptr + entries[:, None] * DV + cols[None, :], mask=mask, other=0.0)
    return v.to(dtype)


@triton.jit
def load_results(
    ptr,  # [.., H, DV] in    from the first row of the tile on
    at,  # [N] rows from there
    inside,
    heads,
    cols,
    valid,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
):
    """[N, C] of what belongs to rows and heads."""
    place = at[:, None] * (HEADS * DV) + (heads * DV + cols)[None, :]
    return tl.load(ptr + place, mask=inside[:, None] & valid[None, :], other=0.0)


@triton.jit
def keep_block(seed_ptr, keys, key_heads, positions, bag, threshold, HEADS: tl.constexpr):
    """[N, R] True where a weight is kept; position of the mask is the key's, row the patch's."""
    draws = positions[:, None] * HEADS + key_heads[None, :]
    return keep_mask(tl.load(seed_ptr), keys[None, :], draws, bag, threshold)


@triton.jit
def result_factor(
    d_out_ptr, at, inside, head0, HEADS: tl.constexpr, DV: tl.constexpr, G: tl.constexpr,
    BLOCK_V: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """[N, G] powers of two that bring rows of d_out to [1, 2) for fp16; 1 for other types."""
    largest = tl.zeros((at.shape[0], G), tl.float32)
    if dtype == tl.float16:
        for v0 in range(0, DV, BLOCK_V):
            heads, cols, valid = columns_of_block(head0, v0, HEADS, DV, G, BLOCK_V)
            dz = load_results(d_out_ptr, at, inside, heads, cols, valid, HEADS, DV)
            dz = tl.abs(dz.to(tl.float32))
            largest = tl.maximum(largest, tl.max(by_head(dz, G), 2))
        factor = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
    else:
        factor = largest + 1.0
    return factor


@triton.jit
def weigh_block(
    s,  # [N, R] logits without bias
    bias,  # [R]
    ok,  # [R]
    d_out_ptr,  # [.., H, DV] in      from the first row of the tile on, as lse
    lse_ptr,  # [.., H] in
    values_ptr,  # [B, H, Lk, DV] in
    seed_ptr,
    factor,  # [N, G] result_factor
    at,  # [N] rows from there
    inside,
    positions,  # [N] of the patches in their bag
    bag,
    head0,
    key_heads,
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
    G: tl.constexpr = factor.shape[1]
    dp = tl.zeros(s.shape, tl.float32)
    values_ptr += bag.to(tl.int64) * HEADS * n_keys * DV
    for v0 in range(0, DV, BLOCK_V):
        heads, cols, valid = columns_of_block(head0, v0, HEADS, DV, G, BLOCK_V)
        dz = load_results(d_out_ptr, at, inside, heads, cols, valid, HEADS, DV)
        if dtype == tl.float16:
            dz = dz / repeat(factor, BLOCK_V)
        v = load_values(values_ptr, key_heads, entries, ok, heads, cols, valid, DV, dtype)
        dp = tl.dot(dz.to(dtype), tl.trans(v), dp, input_precision=PRECISION)
    if dtype == tl.float16:
        dp = dp * repeat(factor, s.shape[1] // G)
    mask = inside[:, None] & ok[None, :]
    lse_at = at[:, None] * HEADS + key_heads[None, :]
    lse = tl.load(lse_ptr + lse_at, mask=mask, other=-float("inf"))
    included = mask & (lse != -float("inf"))
    shifted = s + bias[None, :] - tl.where(lse == -float("inf"), 0.0, lse)
    softmax = tl.exp(tl.where(included, shifted, -float("inf")))
    weights = softmax
    if seed_ptr is not None:
        keep = keep_block(seed_ptr, keys, key_heads, positions, bag, threshold, HEADS)
        weights = tl.where(keep, softmax * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    # by selection: a gradient may be infinite where a weight is 0
    return softmax, weights, tl.where(included, dp, 0.0)


@triton.jit
def finish_block(
    softmax, weights, dp, rows_ptr, d_lse_ptr, at, inside, head0, total,
    HEADS: tl.constexpr, G: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Weights and d_logits, whose mean gradient and sum are the block's own or, of [2, total, H],
    what spread_tokens_rows_kernel found.

    The sum takes out what the rounding of lse did to the weights; the gradient of lse is added
    after the difference, of which little may be left.
    """
    BLOCK_L: tl.constexpr = softmax.shape[1] // G
    heads = head0 + tl.arange(0, G)
    place = at[:, None] * HEADS + heads[None, :]
    mask = inside[:, None] & (heads < HEADS)[None, :]
    if WHOLE:
        sums = tl.sum(by_head(softmax, G), 2)
        share = 1.0 / tl.where(sums == 0, 1.0, sums)
        mean = tl.sum(by_head(softmax * dp, G), 2) * share
    else:
        mean = tl.load(rows_ptr + place, mask=mask, other=0.0)
        share = tl.load(rows_ptr + total.to(tl.int64) * HEADS + place, mask=mask, other=0.0)
    d_lse = tl.load(d_lse_ptr + place, mask=mask, other=0.0)
    share = repeat(share, BLOCK_L)
    ds = logit_gradient(softmax * share, dp, repeat(mean, BLOCK_L), repeat(d_lse, BLOCK_L))
    return weights * share, ds
