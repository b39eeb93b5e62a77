"""`cross_attention` for few queries over long keys: keys and values are read once.

Contract: survfuse/ops/cross_attention.py.  Oracle: survfuse/reference/cross_attention.py.  Math:
docs/math.md, "Attention with keys given".  Layout: forward, one program per (slot of keys,
head), merged by cross_attention_merge.py. Backward, one program per (piece of the
stored keys, head): it owns the gradients of its rows and walks the bags that touch them in
ascending order. Between two bags it remembers only from where to where its rows have been written:
a bag adds to what is there, and writes beyond it. So overlaps need no atomics, no table and no
second pass, and where bags do not overlap each row is written once and never read back.

A tile has keys first, [BLOCK_N, BLOCK_Q]: keys and values enter products as they lie in memory,
which keeps their loads in the asynchronous pipeline, and only the small coefficients are turned.
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
    pieces_of_bag,
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
def cross_attention_few_fwd_kernel(
    query_ptr,  # [Tq, H, D] in
    key_ptr,  # [Tk, H, D] in      rows outside every bag are never read
    value_ptr,  # [Tk, H, DV] in
    bias_ptr,  # [Tk] in          or None
    seed_ptr,  # [1] in           or None: no dropout
    query_starts_ptr,  # [B] in
    query_lengths_ptr,  # [B] in
    key_starts_ptr,  # [B] in
    key_lengths_ptr,  # [B] in
    part_ptr,  # [S, H, query_max, DV] out   unnormalised sums of each slot, kept weights
    part_max_ptr,  # [S, H, query_max] out   largest logit
    part_sum_ptr,  # [S, H, query_max] out   sum of exp(logit - max), all weights
    n_bags,
    n_queries,
    n_keys,
    query_max,
    rows_per_piece,
    threshold,
    scale,
    keep_scale,  # of the merge, which takes it
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
    """Partial (max, sum, out) of one slot. Grid: (slots * H,)."""
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    bag, first_row, position, count = rows_of_slot(
        slot, key_starts_ptr, key_lengths_ptr, n_bags, n_keys, rows_per_piece
    )
    if bag >= n_bags:
        return
    query_start, n_rows = bag_range(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    offs_q = tl.arange(0, BLOCK_Q)
    offs_n = tl.arange(0, BLOCK_N)
    mask_q = (offs_q < n_rows) & (offs_q < query_max)
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
        logits = inner(k, q, PRECISION) * factor[None, :] + bias[:, None]
        logits = tl.where(ok[:, None], logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 0))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        weights = tl.exp(logits - finite[None, :])
        largest = new
        total = total * shrink + tl.sum(weights, 0)
        if seed_ptr is not None:
            positions = (position + n0 + offs_n)[:, None]
            draws = (offs_q * HEADS + head)[None, :]
            keep = keep_mask(tl.load(seed_ptr), positions, draws, bag, threshold)
            weights = tl.where(keep, weights, 0.0)
        weights = tl.trans(weights.to(dtype))
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)

    out = (slot.to(tl.int64) * HEADS + head) * query_max + offs_q
    mask_out = offs_q < query_max
    store_head(part_ptr, out * DV, mask_out, acc, DV)
    tl.store(part_max_ptr + out, largest, mask=mask_out)
    tl.store(part_sum_ptr + out, total, mask=mask_out)


@triton.jit
def _write_nothing(
    low,  # stored rows low to high
    high,
    head,
    d_key_ptr,
    d_value_ptr,
    d_bias_ptr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Zero gradients for rows that no bag has reached."""
    for n0 in range(0, (high - low).to(tl.int32), BLOCK_N):
        rows = low + n0 + tl.arange(0, BLOCK_N)
        mask = rows < high
        at = rows * HEADS + head
        if d_key_ptr is not None:
            store_head(d_key_ptr, at * D, mask, tl.zeros((BLOCK_N, BLOCK_D), tl.float32), D)
        if d_value_ptr is not None:
            store_head(d_value_ptr, at * DV, mask, tl.zeros((BLOCK_N, BLOCK_V), tl.float32), DV)
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + rows, tl.zeros((BLOCK_N,), tl.float32), mask=mask)


@triton.jit
def _add_rows(
    ptr,  # [Tk, H, D] in, out
    at,
    ok,
    inside,
    written,  # rows an earlier bag has written
    left,  # [N, Q] coefficients, fp32
    right,  # [Q, BLOCK_D]
    PRECISION: tl.constexpr,
    D: tl.constexpr,
):
    """Write left . right to rows of a gradient, or add it where an earlier bag has written."""
    if right.dtype == tl.float16:
        # coefficients shrink with the bag's length: bring each row's largest to 1
        unit = tl.max(tl.abs(left), 1)
        unit = tl.where(unit > 1e-30, unit, 1.0)
        left = left / unit[:, None]
    d = tl.dot(left.to(right.dtype), right, input_precision=PRECISION)
    if right.dtype == tl.float16:
        d = d * unit[:, None]
    # nothing for excluded keys, whatever an infinite gradient made of them
    d = tl.where(ok[:, None], d, 0.0)
    d += load_head(ptr, at, written, D, right.shape[1]).to(tl.float32)
    store_head(ptr, at, inside, d, D)


@triton.jit(do_not_specialize=_RUNTIME)
def cross_attention_few_bwd_kernel(
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
    part_ptr,  # [P, H, query_max, D] out   d_query of each (bag, piece it touches); or None
    d_key_ptr,  # [Tk, H, D] out     or None
    d_value_ptr,  # [Tk, H, DV] out    or None
    d_bias_ptr,  # [H, Tk] out        each head's share; or None
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
    """Every gradient of one piece of the stored keys. Grid: (cdiv(Tk, rows_per_piece) * H,)."""
    head = tl.program_id(0) % HEADS
    piece = tl.program_id(0) // HEADS
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    first = piece.to(tl.int64) * rows_per_piece
    last = tl.minimum(first + rows_per_piece, n_keys)
    offs_q = tl.arange(0, BLOCK_Q)
    offs_n = tl.arange(0, BLOCK_N)
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)
    if d_bias_ptr is not None:
        d_bias_ptr += head.to(tl.int64) * n_keys
    # rows written so far: what lies between bags that do not meet was written 0
    begun = first
    done = first
    bag = next_bag(-1, first, last, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
    while bag < n_bags:
        key_start, n_all = bag_range(bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)
        low = tl.maximum(key_start, first)
        high = tl.minimum(key_start + n_all, last)
        position = (low - key_start).to(tl.int32)
        count = (high - low).to(tl.int32)
        alone = n_all <= tl.minimum(count, BLOCK_N)
        if done > begun:
            gap_low = tl.where(low > done, done, high)
            gap_high = tl.where(low > done, low, begun)
            _write_nothing(
                gap_low, gap_high, head, d_key_ptr, d_value_ptr, d_bias_ptr,
                HEADS, D, DV, BLOCK_N, BLOCK_D, BLOCK_V,
            )  # fmt: skip

        query_start, n_rows = bag_range(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        mask_q = (offs_q < n_rows) & (offs_q < query_max)
        query_at = (query_start + offs_q) * (stride_query_row * QUERY_UNIT)
        query_at += head * (stride_query_head * QUERY_UNIT)
        q, q_factor = round_rows(load_head(query_ptr, query_at, mask_q, D, BLOCK_D), dtype)
        q_factor = q_factor * scale
        result = rows_before(bag, query_starts_ptr, query_lengths_ptr, n_bags, n_queries)
        result = (result + offs_q) * HEADS + head
        dz = load_head(d_out_ptr, result * DV, mask_q, DV, BLOCK_V)
        dz, dz_factor = round_rows(dz, dtype)
        mean = mean_gradient(d_out_ptr, out_ptr, result * DV, mask_q, dz_factor, dtype, DV)
        lse = tl.load(lse_ptr + result, mask=mask_q, other=-float("inf"))
        d_lse = tl.load(d_lse_ptr + result, mask=mask_q, other=0.0)

        acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
        unit = tl.zeros((BLOCK_Q,), tl.float32)
        for n0 in range(0, count, BLOCK_N):
            rows = low + n0 + offs_n
            inside = n0 + offs_n < count
            bias, ok = load_bias(bias_ptr, rows, inside)
            k = load_head(key_ptr, rows * (stride_key_row * KEY_UNIT), ok, D, BLOCK_D)
            v = load_head(value_ptr, rows * (stride_value_row * VALUE_UNIT), ok, DV, BLOCK_V)
            softmax, weights, dp = softmax_tile(
                inner(k, q, PRECISION) * q_factor[None, :],
                inner(v, dz, PRECISION) * dz_factor[None, :],
                bias[:, None],
                ok[:, None],
                lse[None, :],
                (position + n0 + offs_n)[:, None],
                (offs_q * HEADS + head)[None, :],
                bag,
                seed_ptr,
                threshold,
                keep_scale,
            )
            if alone:
                share, mean = whole_rows(softmax, dp, 0)
                softmax = softmax * share[None, :]
                weights = weights * share[None, :]
            ds = logit_gradient(softmax, dp, mean[None, :], d_lse[None, :])
            written = inside & (rows >= begun) & (rows < done)
            at = rows * HEADS + head
            if d_value_ptr is not None:
                along = weights * dz_factor[None, :]
                _add_rows(d_value_ptr, at * DV, ok, inside, written, along, dz, PRECISION, DV)
            if d_key_ptr is not None:
                along = ds * q_factor[None, :]
                _add_rows(d_key_ptr, at * D, ok, inside, written, along, q, PRECISION, D)
            if d_bias_ptr is not None:
                d_bias = tl.sum(ds, 1) + tl.load(d_bias_ptr + rows, mask=written, other=0.0)
                tl.store(d_bias_ptr + rows, d_bias, mask=inside)
            if part_ptr is not None:
                if dtype == tl.float16:
                    # ds shrinks with the bag's length and with the loss: keep the largest at 1
                    new = tl.maximum(unit, tl.max(tl.abs(ds), 0))
                    safe = tl.where(new > 1e-30, new, 1.0)
                    ds = ds / safe[None, :]
                    acc = acc * (unit / safe)[:, None]
                    unit = new
                acc = tl.dot(tl.trans(ds.to(dtype)), k, acc, input_precision=PRECISION)

        if part_ptr is not None:
            pair, _ = pieces_of_bag(
                bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys, rows_per_piece, True
            )
            pair += piece - (key_start.to(tl.uint32) // rows_per_piece.to(tl.uint32)).to(tl.int32)
            at = (pair.to(tl.int64) * HEADS + head) * query_max + offs_q
            factor = (unit if dtype == tl.float16 else unit + 1.0) * scale
            store_head(part_ptr, at * D, offs_q < query_max, acc * factor[:, None], D)
        begun = tl.where(done > begun, tl.minimum(begun, low), low)
        done = tl.maximum(done, high)
        # the next bag may read what other threads have written
        tl.debug_barrier()
        bag = next_bag(bag, first, last, key_starts_ptr, key_lengths_ptr, n_bags, n_keys)

    _write_nothing(
        first, begun, head, d_key_ptr, d_value_ptr, d_bias_ptr,
        HEADS, D, DV, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
    _write_nothing(
        done, last, head, d_key_ptr, d_value_ptr, d_bias_ptr,
        HEADS, D, DV, BLOCK_N, BLOCK_D, BLOCK_V,
    )  # fmt: skip
