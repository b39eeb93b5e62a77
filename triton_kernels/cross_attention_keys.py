"""`cross_attention` for many queries: d_key, d_value and d_bias.

Contract: survfuse/ops/cross_attention.py.  Oracle: survfuse/reference/cross_attention.py.  Math:
docs/math.md, "Attention with keys given".  Layout: one program per (tile of stored keys, head),
which walks the bags that touch its rows, and all queries of each, and writes once; where few keys
would leave the device idle, one per (slot of queries, head, block of a bag's keys), and
cross_attention_merge.py adds the slots. A tile has keys first, [BLOCK_N, BLOCK_Q].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import (
    inner,
    load_head,
    logit_gradient,
    next_bag,
    round_rows,
    rows_before,
    softmax_tile,
    store_head,
)
from .pool_bag_scores import load_bias
from .ragged import bag_range, rows_of_slot

_RUNTIME = ["n_bags", "n_queries", "n_keys", "total", "key_max", "rows_per_piece", "threshold"]


@triton.jit
def _accumulate(acc, unit, left, right, PRECISION: tl.constexpr):
    """acc * unit + left . right, where unit [N] keeps fp16 coefficients in range."""
    if right.dtype == tl.float16:
        # they shrink with the bag's length: keep the largest so far at 1
        new = tl.maximum(unit, tl.max(tl.abs(left), 1))
        safe = tl.where(new > 1e-30, new, 1.0)
        left = left / safe[:, None]
        acc = acc * (unit / safe)[:, None]
        unit = new
    return tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION), unit


@triton.jit(do_not_specialize=_RUNTIME)
def cross_attention_bwd_key_kernel(
    query_ptr,  # [Tq, H, D] in
    key_ptr,  # [Tk, H, D] in
    value_ptr,  # [Tk, H, DV] in
    bias_ptr,  # [Tk] in          or None
    seed_ptr,  # [1] in           or None
    query_starts_ptr,  # [B] in
    query_lengths_ptr,  # [B] in
    key_starts_ptr,  # [B] in
    key_lengths_ptr,  # [B] in
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] in   mean gradient of a row's weights; what makes them sum to 1
    d_key_ptr,  # SPLIT: [S, H, key_max, D] out; else [Tk, H, D] out; or None
    d_value_ptr,  # SPLIT: [S, H, key_max, DV] out; else [Tk, H, DV] out; or None
    d_bias_ptr,  # SPLIT: [S, H, key_max] out; else [H, Tk] out; or None
    n_bags,
    n_queries,
    n_keys,
    total,
    key_max,
    rows_per_piece,
    threshold,
    scale,
    keep_scale,
    stride_query_row,
    stride_query_head,
    stride_key_row,
    stride_key_head,
    stride_value_row,
    stride_value_head,
    QUERY_UNIT: tl.constexpr,
    KEY_UNIT: tl.constexpr,
    VALUE_UNIT: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Gradients of a tile of keys.

    Grid: (cdiv(Tk, BLOCK_N) * H,), or SPLIT: (slots of queries * H * cdiv(key_max, BLOCK_N),).
    """
    n_blocks = tl.cdiv(key_max, BLOCK_N) if SPLIT else 1
    block = tl.program_id(0) % n_blocks
    head = tl.program_id(0) // n_blocks % HEADS
    unit_index = tl.program_id(0) // n_blocks // HEADS
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    if SPLIT:
        bag, query_row, query_position, count = rows_of_slot(
            unit_index, query_starts_ptr, query_lengths_ptr, n_bags, n_queries, rows_per_piece
        )
        key_start, n_all = bag_range(bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
        low = key_start + block * BLOCK_N
        # a bag with fewer keys than others has nothing in its last blocks
        count = tl.where(block * BLOCK_N < n_all, count, 0)
    else:
        low = unit_index.to(tl.int64) * BLOCK_N
        bag = next_bag(-1, low, low + BLOCK_N, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
    rows = low + tl.arange(0, BLOCK_N)
    query_ptr += head.to(tl.int64) * (stride_query_head * QUERY_UNIT)
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)
    d_key = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_value = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    d_bias = tl.zeros((BLOCK_N,), tl.float32)
    key_unit = tl.zeros((BLOCK_N,), tl.float32)
    value_unit = tl.zeros((BLOCK_N,), tl.float32)
    # keys that some bag holds and no bias excludes
    used = tl.zeros((BLOCK_N,), tl.int1)
    while bag < n_bags:
        key_start, n_all = bag_range(bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
        if not SPLIT:
            query_row, n_rows = bag_range(
                bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries
            )
            query_position = 0
            count = n_rows.to(tl.int32)
        positions = (rows - key_start).to(tl.int32)
        bias, ok = load_bias(bias_ptr, rows, (rows >= key_start) & (rows < key_start + n_all))
        used = used | ok
        k = load_head(key_ptr, rows * (stride_key_row * KEY_UNIT), ok, D, BLOCK_D)
        v = load_head(value_ptr, rows * (stride_value_row * VALUE_UNIT), ok, DV, BLOCK_V)
        result = rows_before(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        result = result + query_position
        for q0 in range(0, count, BLOCK_Q):
            offs_q = q0 + tl.arange(0, BLOCK_Q)
            mask_q = offs_q < count
            query_at = (query_row + offs_q) * (stride_query_row * QUERY_UNIT)
            q, q_factor = round_rows(load_head(query_ptr, query_at, mask_q, D, BLOCK_D), dtype)
            q_factor = q_factor * scale
            at = (result + offs_q) * HEADS + head
            dz, dz_factor = round_rows(load_head(d_out_ptr, at * DV, mask_q, DV, BLOCK_V), dtype)
            softmax, weights, dp = softmax_tile(
                inner(k, q, PRECISION) * q_factor[None, :],
                inner(v, dz, PRECISION) * dz_factor[None, :],
                bias[:, None],
                ok[:, None],
                tl.load(lse_ptr + at, mask=mask_q, other=-float("inf"))[None, :],
                positions[:, None],
                ((query_position + offs_q) * HEADS + head)[None, :],
                bag,
                seed_ptr,
                threshold,
                keep_scale,
            )
            mean = tl.load(rows_ptr + at, mask=mask_q, other=0.0)
            share_at = total.to(tl.int64) * HEADS + at
            share = tl.load(rows_ptr + share_at, mask=mask_q, other=0.0)
            d_lse = tl.load(d_lse_ptr + at, mask=mask_q, other=0.0)
            if d_value_ptr is not None:
                along = weights * (dz_factor * share)[None, :]
                d_value, value_unit = _accumulate(d_value, value_unit, along, dz, PRECISION)
            if d_key_ptr is not None or d_bias_ptr is not None:
                ds = logit_gradient(softmax, dp, mean[None, :], d_lse[None, :])
                ds = ds * share[None, :]
            if d_key_ptr is not None:
                along = ds * q_factor[None, :]
                d_key, key_unit = _accumulate(d_key, key_unit, along, q, PRECISION)
            if d_bias_ptr is not None:
                d_bias += tl.sum(ds, 1)
        if SPLIT:
            bag = n_bags
        else:
            bag = next_bag(bag, low, low + BLOCK_N, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)

    if dtype == tl.float16:
        d_key = d_key * key_unit[:, None]
        d_value = d_value * value_unit[:, None]
    if SPLIT:
        offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        at = (unit_index.to(tl.int64) * HEADS + head) * key_max + offs_n
        bias_at = at
        mask = offs_n < key_max
    else:
        at = rows * HEADS + head
        bias_at = head.to(tl.int64) * n_keys + rows
        mask = rows < n_keys
    # nothing for excluded keys, whatever an infinite gradient made of them
    if d_key_ptr is not None:
        store_head(d_key_ptr, at * D, mask, tl.where(used[:, None], d_key, 0.0), D)
    if d_value_ptr is not None:
        store_head(d_value_ptr, at * DV, mask, tl.where(used[:, None], d_value, 0.0), DV)
    if d_bias_ptr is not None:
        tl.store(d_bias_ptr + bias_at, d_bias, mask=mask)
