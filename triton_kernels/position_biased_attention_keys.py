"""`position_biased_attention` by tiles of keys: d_key, d_value, d_key_pos and those of the bias.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".
Layout: one program per (slot of a bag's queries, run of tiles of keys, head), which walks the slot
once for each tile and keeps all sums in registers: those of the MLP to the end of the run.
position_biased_attention_sums.py adds the slots in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import load_head, logit_gradient, rows_before, store_head
from .position_biased_attention_mlp import (
    bias_of_pairs,
    empty_sums,
    gradients_of_pairs,
    load_layers,
    load_slopes,
    signed_log,
    store_sums,
)
from .position_biased_attention_table import add_to_table, interpolate, slope_in_table
from .position_biased_attention_tiles import (
    accumulate,
    list_of_tile,
    offsets_of_tile,
    tile_of_list,
    weigh_pairs,
)
from .ragged import rows_of_slot

_RUNTIME = [
    "n_bags",
    "n_queries",
    "n_keys",
    "table_size",
    "rows_per_slot",
    "tiles_per_program",
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
    lse_ptr,  # [total, H] in
    d_out_ptr,  # [total, H, DV] in
    d_lse_ptr,  # [total, H] in
    rows_ptr,  # [2, total, H] in   of position_biased_query_kernel
    per_unit_ptr,  # [1] in         units of the fixed point in 1; read where the table's is int64
    d_key_ptr,  # [S, M, H, D] out  or None
    d_value_ptr,  # [S, M, H, DV] out, or None
    d_key_pos_ptr,  # [S, H, M, 2] out, or None
    d_bias_ptr,  # [programs, P] out, zeros before; or [O, n, n] add; or None
    n_bags,
    n_queries,
    n_keys,
    table_size,
    rows_per_slot,
    tiles_per_program,
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
    N_WARPS: tl.constexpr,
    ADDS: tl.constexpr,  # to d_bias: 1, the uppermost hidden layer and what follows; 2, those below
):
    """Grid: (slots of rows_per_slot queries * cdiv(cdiv(M, BLOCK_N), tiles_per_program) * H,)."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    SIZE: tl.constexpr = BLOCK_Q // TURNS * BLOCK_N
    TABLE: tl.constexpr = reach_ptr is not None
    N_PARAMETERS: tl.constexpr = (
        3 * WIDTH + (DEPTH - 1) * (WIDTH * WIDTH + WIDTH) + PER_GROUP * (WIDTH + 1)
    )
    MOVES: tl.constexpr = d_key_pos_ptr is not None
    head = tl.program_id(0) % HEADS
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    n_runs = tl.cdiv(n_tiles, tiles_per_program)
    tile0 = tl.program_id(0) // HEADS % n_runs * tiles_per_program
    slot = tl.program_id(0) // HEADS // n_runs
    bag, row0, position, count = rows_of_slot(
        slot, starts_ptr, lengths_ptr, n_bags, n_queries, rows_per_slot
    )
    if bag >= n_bags:
        return
    dtype: tl.constexpr = key_ptr.dtype.element_ty
    query_ptr += head.to(tl.int64) * (stride_query_head * QUERY_UNIT)
    query_pos_ptr += 2 * row0
    key_ptr += bag.to(tl.int64) * (stride_key_bag * KEY_UNIT)
    key_ptr += head.to(tl.int64) * (stride_key_head * KEY_UNIT)
    value_ptr += bag.to(tl.int64) * (stride_value_bag * VALUE_UNIT)
    value_ptr += head.to(tl.int64) * (stride_value_head * VALUE_UNIT)
    key_pos_ptr += (bag.to(tl.int64) * GROUPS + head // PER_GROUP) * n_keys * 2
    result0 = rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_queries) + position
    plane = total.to(tl.int64) * HEADS
    if TABLE:
        parameters_ptr += head % PER_GROUP * table_size * table_size
        if ADDS:
            d_bias_ptr += head % PER_GROUP * table_size * table_size
    else:
        layers = load_layers(parameters_ptr, WIDTH, DEPTH, dtype)
        slopes = load_slopes(parameters_ptr, head % PER_GROUP, WIDTH, DEPTH, PER_GROUP, dtype)
        sums = empty_sums(SIZE, WIDTH, N_WARPS, dtype)

    for tile in range(tile0, tl.minimum(tile0 + tiles_per_program, n_tiles)):
        keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = keys < n_keys
        keys_64 = keys.to(tl.int64)
        k = load_head(key_ptr, keys_64 * (stride_key_row * KEY_UNIT), ok, D, BLOCK_D)
        v = load_head(value_ptr, keys_64 * (stride_value_row * VALUE_UNIT), ok, DV, BLOCK_V)
        d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        d_v = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        unit_k = tl.zeros((BLOCK_N,), tl.float32)
        unit_v = tl.zeros((BLOCK_N,), tl.float32)
        # summed over the queries of a tile at the end
        if TABLE:
            moved_x = tl.zeros((BLOCK_Q, BLOCK_N), tl.float32)
        else:
            moved_x = tl.zeros((SIZE,), tl.float32)
        moved_y = moved_x
        for step in range(tl.cdiv(count, BLOCK_Q) * TURNS):
            q0, turn = step // TURNS * BLOCK_Q, step % TURNS
            offs_q = q0 + tl.arange(0, BLOCK_Q)
            mask_q = (offs_q < count) & (offs_q % TURNS == turn)
            off_x, off_y, exist = offsets_of_tile(
                query_pos_ptr + 2 * q0, key_pos_ptr + 2 * tile * BLOCK_N, count - q0,
                n_keys - tile * BLOCK_N, turn, TURNS, BLOCK_Q, BLOCK_N, not TABLE,
            )  # fmt: skip
            x, y = signed_log(off_x, dtype), signed_log(off_y, dtype)
            if TABLE:
                bias = interpolate(parameters_ptr, x, y, reach_ptr, table_size, exist)
            else:
                # again for every tile, from a place that the compiler does not know to stay
                here_ptr = parameters_ptr + q0 * tl.program_id(1)
                bias, hidden = bias_of_pairs(
                    x, y, layers, here_ptr, head % PER_GROUP, SIZE >= 16 * N_WARPS, dtype,
                    WIDTH, DEPTH, PER_GROUP, MLP_PRECISION,
                )  # fmt: skip
                bias = tile_of_list(bias, TURNS, BLOCK_Q, BLOCK_N)
            rows = (row0 + offs_q) * (stride_query_row * QUERY_UNIT)
            q = load_head(query_ptr, rows, mask_q, D, BLOCK_D)
            at = (result0 + offs_q) * HEADS + head
            dz = load_head(d_out_ptr, at * DV, mask_q, DV, BLOCK_V).to(dtype)
            lse = tl.load(lse_ptr + at, mask=mask_q, other=-float("inf"))
            draws = (position + offs_q) * HEADS + head
            softmax, weights, dp = weigh_pairs(
                q, dz, k, v, bias, mask_q[:, None] & ok[None, :], lse, scale, keys, draws, bag,
                seed_ptr, threshold, keep_scale, PRECISION,
            )  # fmt: skip
            share = tl.load(rows_ptr + plane + at, mask=mask_q, other=0.0)[:, None]
            mean = tl.load(rows_ptr + at, mask=mask_q, other=0.0)
            d_lse = tl.load(d_lse_ptr + at, mask=mask_q, other=0.0)
            ds = logit_gradient(softmax * share, dp, mean[:, None], d_lse[:, None])
            if d_value_ptr is not None:
                turned = tl.trans(weights * share)
                d_v, unit_v = accumulate(d_v, unit_v, turned, dz, PRECISION)
            if d_key_ptr is not None:
                d_k, unit_k = accumulate(d_k, unit_k, tl.trans(ds), q, PRECISION)
            if TABLE:
                if ADDS:
                    add_to_table(ds, d_bias_ptr, per_unit_ptr, x, y, reach_ptr, table_size, exist)
                if MOVES:
                    d_x, d_y = slope_in_table(
                        ds, parameters_ptr, x, y, reach_ptr, table_size, exist
                    )
                    d_x, d_y = d_x / (1.0 + tl.abs(off_x)), d_y / (1.0 + tl.abs(off_y))
            elif MOVES or ADDS:
                d_x, d_y, sums = gradients_of_pairs(
                    list_of_tile(ds, TURNS), x, y, hidden, slopes, here_ptr, head % PER_GROUP, sums,
                    ADDS, MOVES, dtype, WIDTH, DEPTH, PER_GROUP, MLP_PRECISION,
                )  # fmt: skip
            if MOVES:
                moved_x -= d_x
                moved_y -= d_y

        at = (slot.to(tl.int64) * n_keys + keys) * HEADS + head
        if d_key_ptr is not None:
            factor = (unit_k if dtype == tl.float16 else unit_k + 1.0) * scale
            store_head(d_key_ptr, at * D, ok, d_k * factor[:, None], D)
        if d_value_ptr is not None:
            factor = unit_v if dtype == tl.float16 else unit_v + 1.0
            store_head(d_value_ptr, at * DV, ok, d_v * factor[:, None], DV)
        if MOVES:
            to = d_key_pos_ptr + 2 * ((slot.to(tl.int64) * HEADS + head) * n_keys + keys)
            tl.store(to, tl.sum(tl.reshape(moved_x, (BLOCK_Q // TURNS, BLOCK_N)), 0), mask=ok)
            tl.store(to + 1, tl.sum(tl.reshape(moved_y, (BLOCK_Q // TURNS, BLOCK_N)), 0), mask=ok)

    if ADDS and not TABLE:
        to = d_bias_ptr + tl.program_id(0).to(tl.int64) * N_PARAMETERS
        store_sums(to, sums, parameters_ptr, head % PER_GROUP, ADDS, dtype, WIDTH, DEPTH, PER_GROUP)
