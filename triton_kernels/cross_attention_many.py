"""`cross_attention` for many queries: tiles of queries walk over keys. Forward and d_query.

Contract: survfuse/ops/cross_attention.py.  Oracle: survfuse/reference/cross_attention.py.  Math:
docs/math.md, "Attention with keys given".  Layout: one program per (tile of queries, head), which
walks all keys of the bag and writes its results; where that would leave the device idle, one per
(slot of keys, head, tile of queries), and cross_attention_merge.py joins the slots. A tile has
queries first, [BLOCK_Q, BLOCK_N], so that a row of weights stays in one warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import (
    inner,
    load_head,
    logit_gradient,
    mean_gradient,
    next_bag,
    round_rows,
    rows_before,
    softmax_tile,
    store_head,
    whole_rows,
)
from .pool_bag_scores import load_bias
from .ragged import bag_range, keep_mask, rows_of_slot

_RUNTIME = ["n_bags", "n_queries", "n_keys", "query_max", "rows_per_piece", "threshold"]


@triton.jit(do_not_specialize=_RUNTIME)
def cross_attention_many_fwd_kernel(
    query_ptr,  # [Tq, H, D] in
    key_ptr,  # [Tk, H, D] in
    value_ptr,  # [Tk, H, DV] in
    bias_ptr,  # [Tk] in          or None
    seed_ptr,  # [1] in           or None: no dropout
    query_starts_ptr,  # [B] in
    query_lengths_ptr,  # [B] in
    key_starts_ptr,  # [B] in
    key_lengths_ptr,  # [B] in
    out_ptr,  # SPLIT: [S, H, query_max, DV] out, unnormalised; else [total, H, DV] out
    lse_ptr,  # SPLIT: [S, H, query_max] out, largest logit; else [total, H] out
    sum_ptr,  # SPLIT: [S, H, query_max] out, sum of exp(logit - max); else None
    n_bags,
    n_queries,
    n_keys,
    query_max,
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
):
    """Results of a tile, or its partials over one slot.

    Grid: (slots of BLOCK_Q queries * H,), or (slots of keys * H * cdiv(query_max, BLOCK_Q),) where
    `sum_ptr` is given.
    """
    SPLIT: tl.constexpr = sum_ptr is not None
    n_blocks = tl.cdiv(query_max, BLOCK_Q) if SPLIT else 1
    block = tl.program_id(0) % n_blocks
    head = tl.program_id(0) // n_blocks % HEADS
    slot = tl.program_id(0) // n_blocks // HEADS
    if SPLIT:
        bag, first_row, position, count = rows_of_slot(
            slot, key_starts_ptr, key_lengths_ptr, n_bags, n_keys, rows_per_piece
        )
        query_start, n_rows = bag_range(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        offs_q = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
        # a bag with fewer queries than others has nothing in its last blocks
        count = tl.where(block * BLOCK_Q < n_rows, count, 0)
    else:
        bag, _row, query_position, _ = rows_of_slot(
            slot, query_starts_ptr, query_lengths_ptr, n_bags, n_queries, BLOCK_Q
        )
        query_start, n_rows = bag_range(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        offs_q = query_position + tl.arange(0, BLOCK_Q)
        first_row, n_all = bag_range(bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
        position = 0
        count = n_all.to(tl.int32)
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    mask_q = offs_q < n_rows
    query_at = (query_start + offs_q) * (stride_query_row * QUERY_UNIT)
    query_at += head * (stride_query_head * QUERY_UNIT)
    q, factor = round_rows(load_head(query_ptr, query_at, mask_q, D, BLOCK_D), dtype)
    factor = factor * scale
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)

    acc = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    for n0 in range(0, count, BLOCK_N):
        rows = first_row + n0 + offs_n
        bias, ok = load_bias(bias_ptr, rows, n0 + offs_n < count)
        k = load_head(key_ptr, rows * (stride_key_row * KEY_UNIT), ok, D, BLOCK_D)
        v = load_head(value_ptr, rows * (stride_value_row * VALUE_UNIT), ok, DV, BLOCK_V)
        logits = inner(q, k, PRECISION) * factor[:, None] + bias[None, :]
        logits = tl.where(ok[None, :], logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        weights = tl.exp(logits - finite[:, None])
        largest = new
        total = total * shrink + tl.sum(weights, 1)
        if seed_ptr is not None:
            positions = (position + n0 + offs_n)[None, :]
            draws = (offs_q * HEADS + head)[:, None]
            keep = keep_mask(tl.load(seed_ptr), positions, draws, bag, threshold)
            weights = tl.where(keep, weights, 0.0)
        acc = tl.dot(weights.to(dtype), v, acc * shrink[:, None], input_precision=PRECISION)

    if SPLIT:
        at = (slot.to(tl.int64) * HEADS + head) * query_max + offs_q
        mask_out = offs_q < query_max
        tl.store(lse_ptr + at, largest, mask=mask_out)
        tl.store(sum_ptr + at, total, mask=mask_out)
        store_head(out_ptr, at * DV, mask_out, acc, DV)
    else:
        at = rows_before(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        at = (at + offs_q) * HEADS + head
        empty = total == 0
        divisor = tl.where(empty, 1.0, total)
        finite = tl.where(largest == -float("inf"), 0.0, largest)
        lse = tl.where(empty, -float("inf"), finite + tl.log(divisor))
        tl.store(lse_ptr + at, lse, mask=mask_q)
        store_head(out_ptr, at * DV, mask_q, acc * (keep_scale / divisor)[:, None], DV)


@triton.jit
def _tile(
    q,
    q_factor,
    dz,
    dz_factor,
    lse,
    rows,  # [N] stored keys
    inside,
    positions,
    draws,
    bag,
    key_ptr,
    value_ptr,
    bias_ptr,
    seed_ptr,
    threshold,
    keep_scale,
    stride_key,
    stride_value,
    D: tl.constexpr,
    DV: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A tile of keys, and the softmax and its gradient [BLOCK_Q, BLOCK_N]."""
    bias, ok = load_bias(bias_ptr, rows, inside)
    k = load_head(key_ptr, rows * stride_key, ok, D, BLOCK_D)
    v = load_head(value_ptr, rows * stride_value, ok, DV, BLOCK_V)
    softmax, _, dp = softmax_tile(
        inner(q, k, PRECISION) * q_factor[:, None],
        inner(dz, v, PRECISION) * dz_factor[:, None],
        bias[None, :],
        ok[None, :],
        lse[:, None],
        positions[None, :],
        draws[:, None],
        bag,
        seed_ptr,
        threshold,
        keep_scale,
    )
    return k, softmax, dp


@triton.jit(do_not_specialize=[*_RUNTIME, "total"])
def cross_attention_bwd_query_kernel(
    query_ptr,  # [Tq, H, D] in
    key_ptr,  # [Tk, H, D] in
    value_ptr,  # [Tk, H, DV] in
    bias_ptr,  # [Tk] in          or None
    seed_ptr,  # [1] in           or None
    query_starts_ptr,  # [B] in
    query_lengths_ptr,  # [B] in
    key_starts_ptr,  # [B] in
    key_lengths_ptr,  # [B] in
    out_ptr,  # [total, H, DV] in
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] out   mean gradient of a row's weights; what makes them sum to 1
    d_query_ptr,  # SPLIT: [S, H, query_max, D] out; else [Tq, H, D] out; or None: mean alone
    n_bags,
    n_queries,
    n_keys,
    total,
    query_max,
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
    """d_query of a tile of stored queries over its bags, or of a bag's queries over one slot.

    Grid: (cdiv(Tq, BLOCK_Q) * H,), or SPLIT: (slots of keys * H * cdiv(query_max, BLOCK_Q),).
    """
    n_blocks = tl.cdiv(query_max, BLOCK_Q) if SPLIT else 1
    block = tl.program_id(0) % n_blocks
    head = tl.program_id(0) // n_blocks % HEADS
    unit_index = tl.program_id(0) // n_blocks // HEADS
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    offs_n = tl.arange(0, BLOCK_N)
    if SPLIT:
        bag, first_row, position, count = rows_of_slot(
            unit_index, key_starts_ptr, key_lengths_ptr, n_bags, n_keys, rows_per_piece
        )
        query_start, n_rows = bag_range(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        low = query_start + block * BLOCK_Q
        count = tl.where(block * BLOCK_Q < n_rows, count, 0)
    else:
        low = unit_index.to(tl.int64) * BLOCK_Q
        bag = next_bag(
            -1, low, low + BLOCK_Q, query_starts_ptr, query_lengths_ptr, n_bags, n_queries
        )
    stored = low + tl.arange(0, BLOCK_Q)
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)
    stride_key = stride_key_row * KEY_UNIT
    stride_value = stride_value_row * VALUE_UNIT
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    unit = tl.zeros((BLOCK_Q,), tl.float32)
    while bag < n_bags:
        query_start, n_rows = bag_range(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        key_start, n_all = bag_range(bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
        if not SPLIT:
            first_row = key_start
            position = 0
            count = n_all.to(tl.int32)
        offs_q = (stored - query_start).to(tl.int32)
        mask_q = (offs_q >= 0) & (offs_q < n_rows)
        query_at = stored * (stride_query_row * QUERY_UNIT) + head * (
            stride_query_head * QUERY_UNIT
        )
        q, q_factor = round_rows(load_head(query_ptr, query_at, mask_q, D, BLOCK_D), dtype)
        q_factor = q_factor * scale
        result = rows_before(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        result = (result + offs_q) * HEADS + head
        dz = load_head(d_out_ptr, result * DV, mask_q, DV, BLOCK_V)
        dz, dz_factor = round_rows(dz, dtype)
        lse = tl.load(lse_ptr + result, mask=mask_q, other=-float("inf"))
        d_lse = tl.load(d_lse_ptr + result, mask=mask_q, other=0.0)
        draws = offs_q * HEADS + head
        mean = mean_gradient(d_out_ptr, out_ptr, result * DV, mask_q, dz_factor, dtype, DV)
        if d_query_ptr is None:
            # the mean alone, which needs no walk
            count = tl.where(n_all <= BLOCK_N, count, 0)
        share = tl.zeros((BLOCK_Q,), tl.float32) + 1.0
        for n0 in range(0, count, BLOCK_N):
            n = n0 + offs_n
            k, softmax, dp = _tile(
                    q, q_factor, dz, dz_factor, lse,
                    first_row + n, n < count, position + n, draws, bag,
                    key_ptr, value_ptr, bias_ptr, seed_ptr, threshold, keep_scale,
                    stride_key, stride_value, D, DV, PRECISION, BLOCK_D, BLOCK_V,
                )  # fmt: skip
            if n_all <= BLOCK_N:
                share, mean = whole_rows(softmax, dp, 1)
                softmax = softmax * share[:, None]
            ds = logit_gradient(softmax, dp, mean[:, None], d_lse[:, None])
            if dtype == tl.float16:
                # ds shrinks with the bag's length and with the loss: keep the largest at 1
                new = tl.maximum(unit, tl.max(tl.abs(ds), 1))
                safe = tl.where(new > 1e-30, new, 1.0)
                ds = ds / safe[:, None]
                acc = acc * (unit / safe)[:, None]
                unit = new
            acc = tl.dot(ds.to(dtype), k, acc, input_precision=PRECISION)
        if not SPLIT or position == 0:
            tl.store(rows_ptr + result, mean, mask=mask_q)
            tl.store(rows_ptr + total.to(tl.int64) * HEADS + result, share, mask=mask_q)
        if SPLIT:
            bag = n_bags
        else:
            bag = next_bag(
                bag, low, low + BLOCK_Q, query_starts_ptr, query_lengths_ptr, n_bags, n_queries
            )

    if d_query_ptr is not None:
        factor = (unit if dtype == tl.float16 else unit + 1.0) * scale
        if SPLIT:
            rows = block * BLOCK_Q + tl.arange(0, BLOCK_Q)
            at = (unit_index.to(tl.int64) * HEADS + head) * query_max + rows
            mask = (rows < query_max) & (unit_index >= 0)
        else:
            at = stored * HEADS + head
            mask = stored < n_queries
        store_head(d_query_ptr, at * D, mask, acc * factor[:, None], D)
