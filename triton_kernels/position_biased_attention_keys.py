"""`position_biased_attention` by tiles of keys: d_key, d_value, d_key_pos and those of the bias.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".
Layout: one program per (slot of a bag's queries, tile of keys, group, block of the group's heads),
which walks the tiles of its slot and keeps all sums in registers. position_biased_attention_sums.py
adds the slots in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import logit_gradient, rows_before, store_head
from .position_biased_attention_mlp import (
    add_over_pairs,
    rows_of_heads,
    rows_of_pairs,
    evaluate_hidden,
    first_layer,
    scale_of,
    signed_log,
    slope_before,
    slope_of_last,
    slope_of_offset,
    slope_of_pairs,
)
from .position_biased_attention_table import add_to_table, slope_in_table
from .position_biased_attention_tiles import (
    accumulate,
    bias_of_tile,
    heads_of_rows,
    load_heads,
    load_piece,
    load_slopes,
    offsets_of_pairs,
    on_diagonal,
    pass_on,
    rows_by_head,
    store_slopes,
    weigh_pairs,
)
from .ragged import rows_of_slot

_RUNTIME = [
    "n_bags",
    "n_queries",
    "n_keys",
    "n_pairs",
    "table_size",
    "rows_per_slot",
    "total",
    "threshold",
]


@triton.jit(do_not_specialize=_RUNTIME)
def position_biased_key_kernel(
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
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] in   of position_biased_query_kernel
    per_unit_ptr,  # [1] in         units of the fixed point in 1; read where the table's is int64
    d_key_ptr,  # [S, M, H, D] out  or None
    d_value_ptr,  # [S, M, H, DV] out, or None
    d_key_pos_ptr,  # [S, G, H_BLOCKS, M, 2] out, or None
    d_bias_ptr,  # [programs, P] out, zeros before; or [O, n, n] add, the table; or None
    n_bags,
    n_queries,
    n_keys,
    n_pairs,  # BLOCK_Q * BLOCK_N: loops over pieces are not to be unrolled
    table_size,
    rows_per_slot,
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
    """Grid: (slots of rows_per_slot queries * cdiv(M, BLOCK_N) * G * cdiv(H / G, BLOCK_H),)."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    H_BLOCKS: tl.constexpr = (PER_GROUP + BLOCK_H - 1) // BLOCK_H
    SIZE: tl.constexpr = BLOCK_Q * BLOCK_N
    TABLE: tl.constexpr = reach_ptr is not None
    LAYER: tl.constexpr = WIDTH * WIDTH + WIDTH
    LAST: tl.constexpr = 3 * WIDTH + (DEPTH - 1) * LAYER
    N_PARAMETERS: tl.constexpr = LAST + PER_GROUP * (WIDTH + 1)
    MOVES: tl.constexpr = d_key_pos_ptr is not None
    part = tl.program_id(0) % (GROUPS * H_BLOCKS)
    group = part // H_BLOCKS
    first_head = part % H_BLOCKS * BLOCK_H
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    tile = tl.program_id(0) // (GROUPS * H_BLOCKS) % n_tiles
    slot = tl.program_id(0) // (GROUPS * H_BLOCKS) // n_tiles
    bag, row0, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_queries, rows_per_slot
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    head0 = group * PER_GROUP + first_head
    left = PER_GROUP - first_head
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = keys < n_keys
    keys_64 = keys.to(tl.int64)
    key_pos_ptr += ((bag.to(tl.int64) * GROUPS + group) * n_keys + tile * BLOCK_N) * 2
    keys_left = n_keys - tile * BLOCK_N
    scratch_ptr += tl.program_id(0).to(tl.int64) * SCRATCH
    k = load_heads(
        key_ptr + bag.to(tl.int64) * (stride_key_bag * KEY_UNIT),
        keys_64 * (stride_key_row * KEY_UNIT), ok, head0, left,
        stride_key_head * KEY_UNIT, BLOCK_H, D, BLOCK_D,
    )  # fmt: skip
    v = load_heads(
        value_ptr + bag.to(tl.int64) * (stride_value_bag * VALUE_UNIT),
        keys_64 * (stride_value_row * VALUE_UNIT), ok, head0, left,
        stride_value_head * VALUE_UNIT, BLOCK_H, DV, BLOCK_V,
    )  # fmt: skip
    heads_q = heads_of_rows(BLOCK_H, BLOCK_Q)
    result0 = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_queries) + position
    plane = total.to(tl.int64) * HEADS

    d_k = tl.zeros((BLOCK_H * BLOCK_N, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_H * BLOCK_N, BLOCK_V), tl.float32)
    unit_k = tl.zeros((BLOCK_H * BLOCK_N,), tl.float32)
    unit_v = tl.zeros((BLOCK_H * BLOCK_N,), tl.float32)
    moved_x = tl.zeros((BLOCK_N,), tl.float32)
    moved_y = tl.zeros((BLOCK_N,), tl.float32)
    SIDE: tl.constexpr = 1 if TABLE else WIDTH
    # by the columns of pairs: x, y and bias
    d_first = tl.zeros((SIDE, 16), tl.float32)
    d_shift_2 = tl.zeros((SIDE,), tl.float32)
    d_shift_3 = tl.zeros((SIDE,), tl.float32)
    d_weight_2 = tl.zeros((SIDE, SIDE), tl.float32)
    d_weight_3 = tl.zeros((SIDE, SIDE), tl.float32)
    d_last = tl.zeros((16, SIDE), tl.float32)
    d_shift = tl.zeros((BLOCK_H,), tl.float32)
    for q0 in range(0, count, BLOCK_Q):
        offs_q = q0 + tl.arange(0, BLOCK_Q)
        mask_q = offs_q < count
        rows = row0 + offs_q
        q = load_heads(
            query_ptr, rows * (stride_query_row * QUERY_UNIT), mask_q, head0, left,
            stride_query_head * QUERY_UNIT, BLOCK_H, D, BLOCK_D,
        )  # fmt: skip
        dz = load_heads(
            d_out_ptr, (result0 + offs_q) * (HEADS * DV), mask_q, head0, left, DV,
            BLOCK_H, DV, BLOCK_V,
        ).to(dtype)  # fmt: skip
        bias = bias_of_tile(
            query_pos_ptr + 2 * (row0 + q0), key_pos_ptr, scratch_ptr, count - q0, keys_left,
            parameters_ptr, reach_ptr, first_head, n_pairs, table_size,
            PER_GROUP, WIDTH, DEPTH, BLOCK_H, BLOCK_Q, BLOCK_N, PIECE, dtype, MLP_PRECISION,
        )  # fmt: skip
        at = rows_by_head(result0 + offs_q, BLOCK_H) * HEADS + head0 + heads_q
        mask = rows_by_head(mask_q, BLOCK_H) & (heads_q < left)
        lse = tl.load(lse_ptr + at, mask=mask, other=-float("inf"))
        draws = rows_by_head(position + offs_q, BLOCK_H) * HEADS + head0 + heads_q
        softmax, weights, dp = weigh_pairs(
            q, dz, k, v, bias, mask[:, None] & ok[None, :], lse, scale, keys, draws, bag,
            seed_ptr, threshold, keep_scale, BLOCK_H, PRECISION,
        )  # fmt: skip
        share = tl.load(rows_ptr + plane + at, mask=mask, other=0.0)[:, None]
        mean = tl.load(rows_ptr + at, mask=mask, other=0.0)
        d_lse = tl.load(d_lse_ptr + at, mask=mask, other=0.0)
        ds = logit_gradient(softmax * share, dp, mean[:, None], d_lse[:, None])
        if d_value_ptr is not None:
            turned = tl.trans(on_diagonal(weights * share, BLOCK_H))
            d_v, unit_v = accumulate(d_v, unit_v, turned, dz, PRECISION)
        if d_key_ptr is not None:
            turned = tl.trans(on_diagonal(ds, BLOCK_H))
            d_k, unit_k = accumulate(d_k, unit_k, turned, q, PRECISION)
        if MOVES or d_bias_ptr is not None:
            pass_on(scratch_ptr, ds, BLOCK_H, BLOCK_Q, BLOCK_N)
            for p0 in range(0, n_pairs, PIECE):
                off_x, off_y, exist = offsets_of_pairs(
                    query_pos_ptr + 2 * (row0 + q0), key_pos_ptr, count - q0, keys_left, p0,
                    BLOCK_N, PIECE,
                )  # fmt: skip
                x, y = signed_log(off_x), signed_log(off_y)
                d_bias = load_piece(scratch_ptr, p0, SIZE, BLOCK_H, PIECE)
                if TABLE:
                    if d_bias_ptr is not None:
                        add_to_table(
                            d_bias, d_bias_ptr, per_unit_ptr, x, y, reach_ptr, first_head,
                            table_size, exist, PER_GROUP,
                        )  # fmt: skip
                    if MOVES:
                        d_x, d_y = slope_in_table(
                            d_bias, parameters_ptr, x, y, reach_ptr, first_head, table_size,
                            exist, PER_GROUP,
                        )  # fmt: skip
                elif d_bias_ptr is None:
                    d_x, d_y = slope_of_pairs(
                        d_bias, x, y, parameters_ptr, first_head,
                        WIDTH, DEPTH, PER_GROUP, BLOCK_H, dtype, MLP_PRECISION,
                    )  # fmt: skip
                else:
                    inputs = rows_of_pairs(x, y, dtype)
                    second, last = evaluate_hidden(
                        inputs, parameters_ptr, WIDTH, DEPTH, MLP_PRECISION
                    )
                    size = scale_of(d_bias, dtype)
                    d_rows = rows_of_heads(d_bias / size, dtype)
                    d_shift += tl.sum(d_bias, 1)
                    d_last = add_over_pairs(d_last, d_rows, last, size, MLP_PRECISION)
                    d = slope_of_last(
                        d_rows, last, parameters_ptr, first_head, WIDTH, DEPTH, PER_GROUP,
                        BLOCK_H, MLP_PRECISION,
                    )  # fmt: skip
                    if DEPTH > 2:
                        d_weight_3 = add_over_pairs(d_weight_3, d, second, size, MLP_PRECISION)
                        d_shift_3 += tl.sum(d.to(tl.float32), 1) * size
                        weight = parameters_ptr + 3 * WIDTH + LAYER
                        d = slope_before(d, second, weight, WIDTH, MLP_PRECISION)
                    if DEPTH > 1:
                        first = first_layer(inputs, parameters_ptr, WIDTH, MLP_PRECISION)
                        d_weight_2 = add_over_pairs(d_weight_2, d, first, size, MLP_PRECISION)
                        d_shift_2 += tl.sum(d.to(tl.float32), 1) * size
                        weight = parameters_ptr + 3 * WIDTH
                        d = slope_before(d, first, weight, WIDTH, MLP_PRECISION)
                    d_first = add_over_pairs(d_first, d, inputs, size, MLP_PRECISION)
                    if MOVES:
                        d_x, d_y = slope_of_offset(d, parameters_ptr, WIDTH, MLP_PRECISION)
                        d_x, d_y = d_x * size, d_y * size
                if MOVES:
                    store_slopes(
                        scratch_ptr, p0, d_x, d_y, off_x, off_y, exist, SIZE, BLOCK_H, PIECE
                    )
            if MOVES:
                d_x, d_y = load_slopes(scratch_ptr, BLOCK_H, BLOCK_Q, BLOCK_N)
                moved_x -= tl.sum(d_x, 0)
                moved_y -= tl.sum(d_y, 0)

    heads_n = heads_of_rows(BLOCK_H, BLOCK_N)
    at = rows_by_head(slot.to(tl.int64) * n_keys + keys, BLOCK_H) * HEADS + head0 + heads_n
    mask = rows_by_head(ok, BLOCK_H) & (heads_n < left)
    if d_key_ptr is not None:
        factor = (unit_k if dtype == tl.float16 else unit_k + 1.0) * scale
        store_head(d_key_ptr, at * D, mask, d_k * factor[:, None], D)
    if d_value_ptr is not None:
        factor = unit_v if dtype == tl.float16 else unit_v + 1.0
        store_head(d_value_ptr, at * DV, mask, d_v * factor[:, None], DV)
    if MOVES:
        to = d_key_pos_ptr + ((slot.to(tl.int64) * (GROUPS * H_BLOCKS) + part) * n_keys + keys) * 2
        tl.store(to, moved_x, mask=ok)
        tl.store(to + 1, moved_y, mask=ok)
    if d_bias_ptr is not None and not TABLE:
        _store_parameters(
            d_bias_ptr + tl.program_id(0).to(tl.int64) * N_PARAMETERS,
            d_first, d_weight_2, d_shift_2, d_weight_3, d_shift_3, d_last,
            d_shift, first_head, PER_GROUP, WIDTH, DEPTH, BLOCK_H,
        )  # fmt: skip


@triton.jit
def _store_parameters(
    to, d_first, d_weight_2, d_shift_2, d_weight_3, d_shift_3, d_last, d_shift,
    first_head, PER_GROUP: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The sums in the order of the vector of parameters."""
    LAYER: tl.constexpr = WIDTH * WIDTH + WIDTH
    offs = tl.arange(0, WIDTH)
    square = offs[:, None] * WIDTH + offs[None, :]
    cols = tl.arange(0, 16)[None, :]
    at = tl.where(cols == 2, 2 * WIDTH + offs[:, None], 2 * offs[:, None] + cols)
    tl.store(to + at, d_first, mask=(cols < 3) & (offs >= 0)[:, None])
    if DEPTH > 1:
        tl.store(to + 3 * WIDTH + square, d_weight_2)
        tl.store(to + 3 * WIDTH + WIDTH * WIDTH + offs, d_shift_2)
    if DEPTH > 2:
        tl.store(to + 3 * WIDTH + LAYER + square, d_weight_3)
        tl.store(to + 3 * WIDTH + LAYER + WIDTH * WIDTH + offs, d_shift_3)
    to += 3 * WIDTH + (DEPTH - 1) * LAYER
    rows = tl.arange(0, 16)
    inside = (rows < BLOCK_H) & (first_head + rows < PER_GROUP)
    at = (first_head + rows)[:, None] * WIDTH + offs[None, :]
    tl.store(to + at, d_last, mask=inside[:, None])
    heads = first_head + tl.arange(0, BLOCK_H)
    tl.store(to + PER_GROUP * WIDTH + heads, d_shift, mask=heads < PER_GROUP)
