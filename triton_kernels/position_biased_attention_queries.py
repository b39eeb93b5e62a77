"""`position_biased_attention` by tiles of queries: the forward, d_query and d_query_pos.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".
Layout: one program per (tile of a bag's queries, group, block of the group's heads), which walks all
keys of the bag. The MLP of a pair is evaluated once for the heads of the block, and once more where
it is differentiated.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import (
    logit_gradient,
    mean_gradient,
    rows_before,
    store_head,
    whole_rows,
)
from .position_biased_attention_mlp import signed_log, slope_of_pairs
from .position_biased_attention_table import slope_in_table
from .position_biased_attention_tiles import (
    accumulate,
    bias_of_tile,
    heads_of_rows,
    load_heads,
    load_piece,
    load_slopes,
    of_own_head,
    offsets_of_pairs,
    on_diagonal,
    pass_on,
    rows_by_head,
    store_slopes,
    weigh_pairs,
)
from .ragged import keep_mask, rows_of_slot

_RUNTIME = ["n_bags", "n_queries", "n_keys", "n_pairs", "table_size", "threshold"]


@triton.jit(do_not_specialize=_RUNTIME)
def position_biased_fwd_kernel(
    query_ptr,  # [T, H, D] in
    key_ptr,  # [B, M, H, D] in
    value_ptr,  # [B, M, H, DV] in
    query_pos_ptr,  # [T, 2] in
    key_pos_ptr,  # [B, G, M, 2] in
    parameters_ptr,  # [P] in, the MLP; or [O, n, n], the table
    reach_ptr,  # [2] in           or None: the MLP
    seed_ptr,  # [1] in           or None: no dropout
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    scratch_ptr,  # [programs, SCRATCH], see position_biased_attention_tiles.py
    out_ptr,  # [total, H, DV] out
    lse_ptr,  # [total, H] out
    n_bags,
    n_queries,
    n_keys,
    n_pairs,  # BLOCK_Q * BLOCK_N: loops over pieces are not to be unrolled
    table_size,
    threshold,
    scale,
    keep_scale,
    stride_query_row,
    stride_query_head,
    stride_key_bag,
    stride_key_row,
    stride_key_head,
    stride_value_bag,
    stride_value_row,
    stride_value_head,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    MLP_PRECISION: tl.constexpr,
    SCRATCH: tl.constexpr,
    PIECE: tl.constexpr,  # pairs whose MLP is in registers at once
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid: (slots of BLOCK_Q queries * G * cdiv(H / G, BLOCK_H),)."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    H_BLOCKS: tl.constexpr = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    part = tl.program_id(0) % (GROUPS * H_BLOCKS)
    group = part // H_BLOCKS
    first_head = part % H_BLOCKS * BLOCK_H
    slot = tl.program_id(0) // (GROUPS * H_BLOCKS)
    bag, row0, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_queries, BLOCK_Q
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    head0 = group * PER_GROUP + first_head
    left = PER_GROUP - first_head
    offs_q = tl.arange(0, BLOCK_Q)
    mask_q = offs_q < count
    rows = row0 + offs_q
    q = load_heads(
        query_ptr, rows * (stride_query_row * QUERY_UNIT), mask_q, head0, left,
        stride_query_head * QUERY_UNIT, BLOCK_H, D, BLOCK_D,
    )  # fmt: skip
    query_pos_ptr += 2 * row0
    scratch_ptr += tl.program_id(0).to(tl.int64) * SCRATCH
    key_ptr += bag.to(tl.int64) * (stride_key_bag * KEY_UNIT)
    value_ptr += bag.to(tl.int64) * (stride_value_bag * VALUE_UNIT)
    key_pos_ptr += (bag.to(tl.int64) * GROUPS + group) * n_keys * 2
    heads = heads_of_rows(BLOCK_H, BLOCK_Q)
    draws = rows_by_head(position + offs_q, BLOCK_H) * HEADS + head0 + heads

    acc = tl.zeros((BLOCK_H * BLOCK_Q, BLOCK_V), tl.float32)
    largest = tl.full((BLOCK_H * BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_H * BLOCK_Q,), tl.float32)
    for n0 in range(0, n_keys, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        ok = keys < n_keys
        keys_64 = keys.to(tl.int64)
        bias = bias_of_tile(
            query_pos_ptr, key_pos_ptr + 2 * n0, scratch_ptr, count, n_keys - n0,
            parameters_ptr, reach_ptr, first_head, n_pairs, table_size,
            PER_GROUP, WIDTH, DEPTH, BLOCK_H, BLOCK_Q, BLOCK_N, PIECE, dtype, MLP_PRECISION,
        )  # fmt: skip
        k = load_heads(
            key_ptr, keys_64 * (stride_key_row * KEY_UNIT), ok, head0, left,
            stride_key_head * KEY_UNIT, BLOCK_H, D, BLOCK_D,
        )  # fmt: skip
        logits = of_own_head(q, k, BLOCK_H, PRECISION) * scale + bias
        logits = tl.where(ok[None, :], logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        weights = tl.exp(logits - finite[:, None])
        largest = new
        total = total * shrink + tl.sum(weights, 1)
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), keys[None, :], draws[:, None], bag, threshold)
            weights = tl.where(keep, weights, 0.0)
        v = load_heads(
            value_ptr, keys_64 * (stride_value_row * VALUE_UNIT), ok, head0, left,
            stride_value_head * VALUE_UNIT, BLOCK_H, DV, BLOCK_V,
        )  # fmt: skip
        weights = on_diagonal(weights, BLOCK_H).to(dtype)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)

    at = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_queries)
    at = rows_by_head(at + position + offs_q, BLOCK_H) * HEADS + head0 + heads
    mask = rows_by_head(mask_q, BLOCK_H) & (heads < left)
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(lse_ptr + at, tl.where(empty, -float("inf"), finite + tl.log(divisor)), mask=mask)
    store_head(out_ptr, at * DV, mask, acc * (keep_scale / divisor)[:, None], DV)


@triton.jit(do_not_specialize=[*_RUNTIME, "total"])
def position_biased_query_kernel(
    query_ptr,  # [T, H, D] in
    key_ptr,  # [B, M, H, D] in
    value_ptr,  # [B, M, H, DV] in
    query_pos_ptr,  # [T, 2] in
    key_pos_ptr,  # [B, G, M, 2] in
    parameters_ptr,  # [P] in, the MLP; or [O, n, n], the table
    reach_ptr,  # [2] in           or None: the MLP
    seed_ptr,  # [1] in           or None
    starts_ptr,  # [B] in
    lengths_ptr,  # [B] in
    scratch_ptr,  # [programs, SCRATCH], see position_biased_attention_tiles.py
    out_ptr,  # [total, H, DV] in
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] out   mean gradient of a row's weights; what makes them sum to 1
    d_query_ptr,  # [total, H, D] out  or None
    d_query_pos_ptr,  # [total, G * H_BLOCKS, 2] out, or None
    n_bags,
    n_queries,
    n_keys,
    n_pairs,  # BLOCK_Q * BLOCK_N: loops over pieces are not to be unrolled
    table_size,
    total,
    threshold,
    scale,
    keep_scale,
    stride_query_row,
    stride_query_head,
    stride_key_bag,
    stride_key_row,
    stride_key_head,
    stride_value_bag,
    stride_value_row,
    stride_value_head,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    MLP_PRECISION: tl.constexpr,
    SCRATCH: tl.constexpr,
    PIECE: tl.constexpr,  # pairs whose MLP is in registers at once
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of a tile of queries, packed as the results. Grid as the forward."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    H_BLOCKS: tl.constexpr = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    SIZE: tl.constexpr = BLOCK_Q * BLOCK_N
    part = tl.program_id(0) % (GROUPS * H_BLOCKS)
    group = part // H_BLOCKS
    first_head = part % H_BLOCKS * BLOCK_H
    slot = tl.program_id(0) // (GROUPS * H_BLOCKS)
    bag, row0, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_queries, BLOCK_Q
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    head0 = group * PER_GROUP + first_head
    left = PER_GROUP - first_head
    offs_q = tl.arange(0, BLOCK_Q)
    mask_q = offs_q < count
    rows = row0 + offs_q
    q = load_heads(
        query_ptr, rows * (stride_query_row * QUERY_UNIT), mask_q, head0, left,
        stride_query_head * QUERY_UNIT, BLOCK_H, D, BLOCK_D,
    )  # fmt: skip
    query_pos_ptr += 2 * row0
    scratch_ptr += tl.program_id(0).to(tl.int64) * SCRATCH
    key_ptr += bag.to(tl.int64) * (stride_key_bag * KEY_UNIT)
    value_ptr += bag.to(tl.int64) * (stride_value_bag * VALUE_UNIT)
    key_pos_ptr += (bag.to(tl.int64) * GROUPS + group) * n_keys * 2
    heads = heads_of_rows(BLOCK_H, BLOCK_Q)
    draws = rows_by_head(position + offs_q, BLOCK_H) * HEADS + head0 + heads
    result = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_queries) + position
    at = rows_by_head(result + offs_q, BLOCK_H) * HEADS + head0 + heads
    mask = rows_by_head(mask_q, BLOCK_H) & (heads < left)
    dz = load_heads(
        d_out_ptr, (result + offs_q) * (HEADS * DV), mask_q, head0, left, DV,
        BLOCK_H, DV, BLOCK_V,
    ).to(dtype)  # fmt: skip
    lse = tl.load(lse_ptr + at, mask=mask, other=-float("inf"))
    d_lse = tl.load(d_lse_ptr + at, mask=mask, other=0.0)
    one = tl.zeros((BLOCK_H * BLOCK_Q,), tl.float32) + 1.0
    mean = mean_gradient(d_out_ptr, out_ptr, at * DV, mask, one, dtype, DV)
    share = one
    acc = tl.zeros((BLOCK_H * BLOCK_Q, BLOCK_D), tl.float32)
    unit = one * 0.0
    moved_x = tl.zeros((BLOCK_Q,), tl.float32)
    moved_y = tl.zeros((BLOCK_Q,), tl.float32)
    stop = n_keys
    if d_query_ptr is None and d_query_pos_ptr is None:
        # the mean alone, which needs no walk
        stop = tl.where(n_keys <= BLOCK_N, n_keys, 0)
    for n0 in range(0, stop, BLOCK_N):
        keys = n0 + tl.arange(0, BLOCK_N)
        ok = keys < n_keys
        keys_64 = keys.to(tl.int64)
        bias = bias_of_tile(
            query_pos_ptr, key_pos_ptr + 2 * n0, scratch_ptr, count, n_keys - n0,
            parameters_ptr, reach_ptr, first_head, n_pairs, table_size,
            PER_GROUP, WIDTH, DEPTH, BLOCK_H, BLOCK_Q, BLOCK_N, PIECE, dtype, MLP_PRECISION,
        )  # fmt: skip
        k = load_heads(
            key_ptr, keys_64 * (stride_key_row * KEY_UNIT), ok, head0, left,
            stride_key_head * KEY_UNIT, BLOCK_H, D, BLOCK_D,
        )  # fmt: skip
        v = load_heads(
            value_ptr, keys_64 * (stride_value_row * VALUE_UNIT), ok, head0, left,
            stride_value_head * VALUE_UNIT, BLOCK_H, DV, BLOCK_V,
        )  # fmt: skip
        softmax, _, dp = weigh_pairs(
            q, dz, k, v, bias, mask[:, None] & ok[None, :], lse, scale, keys, draws, bag,
            seed_ptr, threshold, keep_scale, BLOCK_H, PRECISION,
        )  # fmt: skip
        if n_keys <= BLOCK_N:
            share, mean = whole_rows(softmax, dp, 1)
            softmax = softmax * share[:, None]
        ds = logit_gradient(softmax, dp, mean[:, None], d_lse[:, None])
        if d_query_ptr is not None:
            acc, unit = accumulate(acc, unit, on_diagonal(ds, BLOCK_H), k, PRECISION)
        if d_query_pos_ptr is not None:
            pass_on(scratch_ptr, ds, BLOCK_H, BLOCK_Q, BLOCK_N)
            for p0 in range(0, n_pairs, PIECE):
                off_x, off_y, exist = offsets_of_pairs(
                    query_pos_ptr, key_pos_ptr + 2 * n0, count, n_keys - n0, p0, BLOCK_N, PIECE
                )
                x, y = signed_log(off_x), signed_log(off_y)
                d_bias = load_piece(scratch_ptr, p0, SIZE, BLOCK_H, PIECE)
                if reach_ptr is not None:
                    d_x, d_y = slope_in_table(
                        d_bias, parameters_ptr, x, y, reach_ptr, first_head, table_size, exist,
                        PER_GROUP,
                    )  # fmt: skip
                else:
                    d_x, d_y = slope_of_pairs(
                        d_bias, x, y, parameters_ptr, first_head,
                        WIDTH, DEPTH, PER_GROUP, BLOCK_H, dtype, MLP_PRECISION,
                    )  # fmt: skip
                store_slopes(scratch_ptr, p0, d_x, d_y, off_x, off_y, exist, SIZE, BLOCK_H, PIECE)
            d_x, d_y = load_slopes(scratch_ptr, BLOCK_H, BLOCK_Q, BLOCK_N)
            moved_x += tl.sum(d_x, 1)
            moved_y += tl.sum(d_y, 1)
    tl.store(rows_ptr + at, mean, mask=mask)
    tl.store(rows_ptr + total.to(tl.int64) * HEADS + at, share, mask=mask)
    if d_query_ptr is not None:
        factor = (unit if dtype == tl.float16 else unit + 1.0) * scale
        store_head(d_query_ptr, at * D, mask, acc * factor[:, None], D)
    if d_query_pos_ptr is not None:
        to = d_query_pos_ptr + ((result + offs_q) * (GROUPS * H_BLOCKS) + part) * 2
        tl.store(to, moved_x, mask=mask_q)
        tl.store(to + 1, moved_y, mask=mask_q)
