"""`position_biased_attention` by tiles of queries: the forward, d_query and d_query_pos.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".
Layout: one program per (tile of a bag's queries, head), which walks all keys of the bag.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import (
    inner,
    load_head,
    logit_gradient,
    mean_gradient,
    rows_before,
    store_head,
    whole_rows,
)
from .position_biased_attention_mlp import (
    bias_of_pairs,
    gradients_of_pairs,
    load_layers,
    load_slopes,
    signed_log,
)
from .position_biased_attention_table import interpolate, slope_in_table
from .position_biased_attention_tiles import (
    accumulate,
    list_of_tile,
    offsets_of_tile,
    tile_of_list,
    weigh_pairs,
)
from .ragged import keep_mask, rows_of_slot

_RUNTIME = ["n_bags", "n_queries", "n_keys", "table_size", "threshold"]


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
    out_ptr,  # [total, H, DV] out
    lse_ptr,  # [total, H] out
    n_bags,
    n_queries,
    n_keys,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TURNS: tl.constexpr,  # in which the queries of a tile are taken
):
    """Grid: (slots of BLOCK_Q queries * H,)."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    TABLE: tl.constexpr = reach_ptr is not None
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    bag, row0, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_queries, BLOCK_Q
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    offs_q = tl.arange(0, BLOCK_Q)
    mask_q = offs_q < count
    rows = row0 + offs_q
    query_ptr += head.to(tl.int64) * (stride_query_head * QUERY_UNIT)
    q = load_head(query_ptr, rows * (stride_query_row * QUERY_UNIT), mask_q, D, BLOCK_D)
    query_pos_ptr += 2 * row0
    key_ptr += bag.to(tl.int64) * (stride_key_bag * KEY_UNIT)
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += bag.to(tl.int64) * (stride_value_bag * VALUE_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)
    key_pos_ptr += (bag.to(tl.int64) * GROUPS + head // PER_GROUP) * n_keys * 2
    draws = (position + offs_q) * HEADS + head
    if TABLE:
        parameters_ptr += head % PER_GROUP * table_size * table_size
    else:
        layers = load_layers(parameters_ptr, WIDTH, DEPTH, dtype)

    acc = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    largest = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    # summed over the keys of a tile at the end
    total = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
    for step in range(tl.cdiv(n_keys, BLOCK_N) * TURNS):
        n0, turn = step // TURNS * BLOCK_N, step % TURNS
        keys = n0 + tl.arange(0, BLOCK_N)
        ok = keys < n_keys
        keys_64 = keys.to(tl.int64)
        off_x, off_y, exist = offsets_of_tile(
            query_pos_ptr, key_pos_ptr + 2 * n0, count, n_keys - n0,
            turn, TURNS, BLOCK_Q, BLOCK_N, not TABLE,
        )  # fmt: skip
        x, y = signed_log(off_x, dtype), signed_log(off_y, dtype)
        if TABLE:
            bias = interpolate(parameters_ptr, x, y, reach_ptr, table_size, exist)
        else:
            bias, _ = bias_of_pairs(
                x, y, layers, parameters_ptr, head % PER_GROUP, False, dtype,
                WIDTH, DEPTH, PER_GROUP, MLP_PRECISION,
            )  # fmt: skip
            bias = tile_of_list(bias, TURNS, BLOCK_Q, BLOCK_N)
        k = load_head(key_ptr, keys_64 * (stride_key_row * KEY_UNIT), ok, D, BLOCK_D)
        logits = inner(q, k, PRECISION) * scale + bias
        logits = tl.where(ok[None, :] & (offs_q % TURNS == turn)[:, None], logits, -float("inf"))
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        shrink = tl.exp(largest - finite)
        weights = tl.exp(logits - finite[:, None])
        largest = new
        total = total * shrink[:, None] + weights
        if seed_ptr is not None:
            keep = keep_mask(tl.load(seed_ptr), keys[None, :], draws[:, None], bag, threshold)
            weights = tl.where(keep, weights, 0.0)
        v = load_head(value_ptr, keys_64 * (stride_value_row * VALUE_UNIT), ok, DV, BLOCK_V)
        weights = weights.to(dtype)
        acc = tl.dot(weights, v, acc * shrink[:, None], input_precision=PRECISION)

    at = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_queries)
    at = (at + position + offs_q) * HEADS + head
    total = tl.sum(total, 1)
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    tl.store(lse_ptr + at, tl.where(empty, -float("inf"), finite + tl.log(divisor)), mask=mask_q)
    store_head(out_ptr, at * DV, mask_q, acc * (keep_scale / divisor)[:, None], DV)


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
    out_ptr,  # [total, H, DV] in
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] out   mean gradient of a row's weights; what makes them sum to 1
    d_query_ptr,  # [total, H, D] out  or None
    d_query_pos_ptr,  # [total, H, 2] out, or None
    n_bags,
    n_queries,
    n_keys,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TURNS: tl.constexpr,  # in which the queries of a tile are taken
):
    """Gradients of a tile of queries, packed as the results. Grid as the forward."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    SIZE: tl.constexpr = BLOCK_Q // TURNS * BLOCK_N
    TABLE: tl.constexpr = reach_ptr is not None
    head = tl.program_id(0) % HEADS
    slot = tl.program_id(0) // HEADS
    bag, row0, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_queries, BLOCK_Q
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    offs_q = tl.arange(0, BLOCK_Q)
    mask_q = offs_q < count
    rows = row0 + offs_q
    query_pos_ptr += 2 * row0
    key_ptr += bag.to(tl.int64) * (stride_key_bag * KEY_UNIT)
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += bag.to(tl.int64) * (stride_value_bag * VALUE_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)
    key_pos_ptr += (bag.to(tl.int64) * GROUPS + head // PER_GROUP) * n_keys * 2
    draws = (position + offs_q) * HEADS + head
    if TABLE:
        parameters_ptr += head % PER_GROUP * table_size * table_size
    else:
        layers = load_layers(parameters_ptr, WIDTH, DEPTH, dtype)
        slopes = load_slopes(parameters_ptr, head % PER_GROUP, WIDTH, DEPTH, PER_GROUP, dtype)
    result = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_queries) + position
    at = (result + offs_q) * HEADS + head
    lse = tl.load(lse_ptr + at, mask=mask_q, other=-float("inf"))
    d_lse = tl.load(d_lse_ptr + at, mask=mask_q, other=0.0)
    one = tl.zeros((BLOCK_Q,), tl.float32) + 1.0
    mean = mean_gradient(d_out_ptr, out_ptr, at * DV, mask_q, one, dtype, DV)
    share = one
    query_ptr += head.to(tl.int64) * (stride_query_head * QUERY_UNIT)
    q = load_head(query_ptr, rows * (stride_query_row * QUERY_UNIT), mask_q, D, BLOCK_D)
    dz = load_head(d_out_ptr, at * DV, mask_q, DV, BLOCK_V).to(dtype)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    unit = one * 0.0
    # summed over the keys of a tile at the end; a list where one turn has all of them
    LISTED: tl.constexpr = not TABLE and TURNS == 1
    moved_x = tl.zeros((SIZE,) if LISTED else (BLOCK_Q, BLOCK_N), tl.float32)
    moved_y = moved_x
    stop = n_keys
    if d_query_ptr is None and d_query_pos_ptr is None:
        # the mean alone, which needs no walk
        stop = tl.where(n_keys <= BLOCK_N, n_keys, 0)
    for step in range(tl.cdiv(stop, BLOCK_N) * TURNS):
        n0, turn = step // TURNS * BLOCK_N, step % TURNS
        keys = n0 + tl.arange(0, BLOCK_N)
        ok = keys < n_keys
        keys_64 = keys.to(tl.int64)
        off_x, off_y, exist = offsets_of_tile(
            query_pos_ptr, key_pos_ptr + 2 * n0, count, n_keys - n0,
            turn, TURNS, BLOCK_Q, BLOCK_N, not TABLE,
        )  # fmt: skip
        x, y = signed_log(off_x, dtype), signed_log(off_y, dtype)
        if TABLE:
            bias = interpolate(parameters_ptr, x, y, reach_ptr, table_size, exist)
        else:
            bias, hidden = bias_of_pairs(
                x, y, layers, parameters_ptr, head % PER_GROUP, False, dtype,
                WIDTH, DEPTH, PER_GROUP, MLP_PRECISION,
            )  # fmt: skip
            bias = tile_of_list(bias, TURNS, BLOCK_Q, BLOCK_N)
        k = load_head(key_ptr, keys_64 * (stride_key_row * KEY_UNIT), ok, D, BLOCK_D)
        v = load_head(value_ptr, keys_64 * (stride_value_row * VALUE_UNIT), ok, DV, BLOCK_V)
        taken = mask_q & (offs_q % TURNS == turn)
        softmax, _, dp = weigh_pairs(
            q, dz, k, v, bias, taken[:, None] & ok[None, :], lse, scale, keys, draws, bag,
            seed_ptr, threshold, keep_scale, PRECISION,
        )  # fmt: skip
        if n_keys <= BLOCK_N:
            whole, mean_of_whole = whole_rows(softmax, dp, 1)
            share, mean = tl.where(taken, whole, share), tl.where(taken, mean_of_whole, mean)
            softmax = softmax * share[:, None]
        ds = logit_gradient(softmax, dp, mean[:, None], d_lse[:, None])
        if d_query_ptr is not None:
            acc, unit = accumulate(acc, unit, ds, k, PRECISION)
        if d_query_pos_ptr is not None:
            if TABLE:
                d_x, d_y = slope_in_table(ds, parameters_ptr, x, y, reach_ptr, table_size, exist)
                d_x, d_y = d_x / (1.0 + tl.abs(off_x)), d_y / (1.0 + tl.abs(off_y))
            else:
                d_x, d_y, _ = gradients_of_pairs(
                    list_of_tile(ds, TURNS), x, y, hidden, slopes, parameters_ptr, head % PER_GROUP,
                    (0, 0, 0, 0, 0, 0, 0), 0, True, dtype, WIDTH, DEPTH, PER_GROUP, MLP_PRECISION,
                )  # fmt: skip
            if TURNS > 1:
                d_x = tile_of_list(d_x, TURNS, BLOCK_Q, BLOCK_N)
                d_y = tile_of_list(d_y, TURNS, BLOCK_Q, BLOCK_N)
                d_x, d_y = tl.where(taken[:, None], d_x, 0.0), tl.where(taken[:, None], d_y, 0.0)
            moved_x += d_x
            moved_y += d_y
    tl.store(rows_ptr + at, mean, mask=mask_q)
    tl.store(rows_ptr + total.to(tl.int64) * HEADS + at, share, mask=mask_q)
    if d_query_ptr is not None:
        factor = (unit if dtype == tl.float16 else unit + 1.0) * scale
        store_head(d_query_ptr, at * D, mask_q, acc * factor[:, None], D)
    if d_query_pos_ptr is not None:
        to = d_query_pos_ptr + at * 2
        moved_x = tl.sum(tl.reshape(moved_x, (BLOCK_Q, BLOCK_N)), 1)
        moved_y = tl.sum(tl.reshape(moved_y, (BLOCK_Q, BLOCK_N)), 1)
        tl.store(to, moved_x, mask=mask_q)
        tl.store(to + 1, moved_y, mask=mask_q)
