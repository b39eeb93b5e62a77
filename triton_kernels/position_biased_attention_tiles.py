"""What the kernels of `position_biased_attention` share: a tile of pairs of one head."""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import inner, softmax_tile


@triton.jit
def accumulate(acc, unit, left, right, PRECISION: tl.constexpr):
    """acc + left . right, where unit [rows] keeps fp16 coefficients in range."""
    if right.dtype == tl.float16:
        # they shrink with the loss and the number of keys: keep the largest so far at 1
        new = tl.maximum(unit, tl.max(tl.abs(left), 1))
        safe = tl.where(new > 1e-30, new, 1.0)
        left = left / safe[:, None]
        acc = acc * (unit / safe)[:, None]
        unit = new
    return tl.dot(left.to(right.dtype), right, acc, input_precision=PRECISION), unit


@triton.jit
def offsets_of_tile(
    query_pos_ptr,  # of the tile's first query on
    key_pos_ptr,  # of the tile's first key on
    n_queries,  # left from there
    n_keys,
    turn,
    TURNS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Offsets along x and y, 0 where there is no pair, and which pairs there are: [BLOCK_Q,
    BLOCK_N]; or flat, one list of which each thread has its share, of every TURNS-th query from the
    turn-th on."""
    if FLAT:
        pairs = tl.arange(0, BLOCK_Q // TURNS * BLOCK_N)
        query, key = pairs // BLOCK_N * TURNS + turn, pairs % BLOCK_N
    else:
        query, key = tl.arange(0, BLOCK_Q)[:, None], tl.arange(0, BLOCK_N)[None, :]
    exist = (query < n_queries) & (key < n_keys)
    x = _offset(query_pos_ptr, key_pos_ptr, query, key, n_queries, n_keys)
    y = _offset(query_pos_ptr + 1, key_pos_ptr + 1, query, key, n_queries, n_keys)
    return tl.where(exist, x, 0.0), tl.where(exist, y, 0.0), exist


@triton.jit
def tile_of_list(values, TURNS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_Q, BLOCK_N] from the list of a turn, whose rows stand for those of other turns."""
    tile = tl.reshape(values, (BLOCK_Q // TURNS, 1, BLOCK_N))
    tile = tl.broadcast_to(tile, (BLOCK_Q // TURNS, TURNS, BLOCK_N))
    return tl.reshape(tile, (BLOCK_Q, BLOCK_N))


@triton.jit
def list_of_tile(tile, TURNS: tl.constexpr):
    """The list of a turn from a tile that is 0 in rows of others."""
    M: tl.constexpr = tile.shape[0] // TURNS
    rows = tl.sum(tl.reshape(tile, (M, TURNS, tile.shape[1])), 1)
    return tl.reshape(rows, (M * tile.shape[1],))


@triton.jit
def _offset(query_pos_ptr, key_pos_ptr, query, key, n_queries, n_keys):
    to = tl.load(query_pos_ptr + 2 * query, mask=query < n_queries, other=0.0)
    return to - tl.load(key_pos_ptr + 2 * key, mask=key < n_keys, other=0.0)


@triton.jit
def weigh_pairs(
    q, dz, k, v, bias, ok, lse, scale, keys, draws, bag, seed_ptr, threshold, keep_scale,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights [M, N] before and after dropout, and the gradient of the former."""
    scores = inner(q, k, PRECISION) * scale
    return softmax_tile(
        scores, inner(dz, v, PRECISION), bias, ok, lse[:, None], keys[None, :], draws[:, None],
        bag, seed_ptr, threshold, keep_scale,
    )  # fmt: skip
