"""What the kernels of `position_biased_attention` share: a tile of pairs for a block of heads.

Rows of a tile are (head, query), columns keys; features of keys are (head, key), so that products
of a block of heads are one product, of which the blocks on the diagonal count.

The MLP of a tile is evaluated in pieces: its hidden layers take WIDTH numbers of registers per pair,
where a tile takes one. Pieces and tiles meet in a scratch of a few KB per program, which stays in
the nearest cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import inner, softmax_tile
from .position_biased_attention_mlp import (
    rows_of_pairs,
    evaluate_hidden,
    evaluate_last,
    signed_log,
)
from .position_biased_attention_table import interpolate


@triton.jit
def load_heads(
    ptr,
    offsets,  # [N] of rows
    mask,  # [N]
    head0,  # the group's first head and the block's first in it
    n_heads,  # of the group, left from there
    stride_head,
    BLOCK_H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_H * N, BLOCK_D]: the heads of a block of rows, 0 where there are none."""
    N: tl.constexpr = offsets.shape[0]
    heads = tl.arange(0, BLOCK_H)
    at = (offsets[None, :] + ((head0 + heads) * stride_head)[:, None]).reshape(BLOCK_H * N)
    here = (mask[None, :] & (heads < n_heads)[:, None]).reshape(BLOCK_H * N)
    cols = tl.arange(0, BLOCK_D)
    inside = here[:, None]
    if BLOCK_D != D:
        inside = inside & (cols < D)[None, :]
    return tl.load(ptr + at[:, None] + cols[None, :], mask=inside, other=0.0)


@triton.jit
def of_own_head(x, y, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr):
    """[BLOCK_H * M, N]: rows of x [BLOCK_H * M, D] times those of y of their own head."""
    full = inner(x, y, PRECISION)
    if BLOCK_H > 1:
        M: tl.constexpr = x.shape[0] // BLOCK_H
        N: tl.constexpr = y.shape[0] // BLOCK_H
        heads = tl.arange(0, BLOCK_H)
        own = (heads[:, None] == heads[None, :])[:, None, :, None]
        full = tl.reshape(full, (BLOCK_H, M, BLOCK_H, N))
        full = tl.reshape(tl.sum(tl.where(own, full, 0.0), 2), (BLOCK_H * M, N))
    return full


@triton.jit
def on_diagonal(x, BLOCK_H: tl.constexpr):
    """[BLOCK_H * M, BLOCK_H * N] with each head's [M, N] of x in its own block, 0 elsewhere."""
    if BLOCK_H > 1:
        M: tl.constexpr = x.shape[0] // BLOCK_H
        N: tl.constexpr = x.shape[1]
        heads = tl.arange(0, BLOCK_H)
        own = (heads[:, None] == heads[None, :])[:, None, :, None]
        wide = tl.reshape(x, (BLOCK_H, M, 1, N))
        wide = tl.where(own, wide, 0.0)
        x = tl.reshape(wide, (BLOCK_H * M, BLOCK_H * N))
    return x


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
def offsets_of_pairs(
    query_pos_ptr,  # of the tile's first query on
    key_pos_ptr,  # of the tile's first key on
    n_queries,  # left from there
    n_keys,
    p0,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Of PIECE pairs of a tile from the p0-th on: offsets along x and y, and which pairs exist."""
    pairs = p0 + tl.arange(0, PIECE)
    query, key = pairs // BLOCK_N, pairs % BLOCK_N
    exist = (query < n_queries) & (key < n_keys)
    off_x = tl.load(query_pos_ptr + 2 * query, mask=exist, other=0.0)
    off_x -= tl.load(key_pos_ptr + 2 * key, mask=exist, other=0.0)
    off_y = tl.load(query_pos_ptr + 2 * query + 1, mask=exist, other=0.0)
    off_y -= tl.load(key_pos_ptr + 2 * key + 1, mask=exist, other=0.0)
    return off_x, off_y, exist


@triton.jit
def bias_of_tile(
    query_pos_ptr,  # of the tile's first query on
    key_pos_ptr,  # of the tile's first key on
    scratch_ptr,  # [BLOCK_H, BLOCK_Q * BLOCK_N], this program's own
    n_queries,  # left from there
    n_keys,
    parameters_ptr,
    reach_ptr,
    head0,  # in the group
    n_pairs,  # BLOCK_Q * BLOCK_N
    table_size,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECE: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The bias [BLOCK_H * BLOCK_Q, BLOCK_N] of a tile, piece of its pairs by piece."""
    heads = tl.arange(0, BLOCK_H)[:, None]
    # what the tile before left here has been read by all threads
    tl.debug_barrier()
    for p0 in range(0, n_pairs, PIECE):
        off_x, off_y, exist = offsets_of_pairs(
            query_pos_ptr, key_pos_ptr, n_queries, n_keys, p0, BLOCK_N, PIECE
        )
        x, y = signed_log(off_x), signed_log(off_y)
        if reach_ptr is not None:
            bias = interpolate(
                parameters_ptr, x, y, reach_ptr, head0, table_size, exist, PER_GROUP, BLOCK_H
            )
        else:
            inputs = rows_of_pairs(x, y, dtype)
            _second, last = evaluate_hidden(inputs, parameters_ptr, WIDTH, DEPTH, PRECISION)
            bias = evaluate_last(
                last, parameters_ptr, head0, WIDTH, DEPTH, PER_GROUP, BLOCK_H, PRECISION
            )
        at = heads * (BLOCK_Q * BLOCK_N) + (p0 + tl.arange(0, PIECE))[None, :]
        tl.store(scratch_ptr + at, bias)
    tl.debug_barrier()
    return tl.load(scratch_ptr + tile_offsets(BLOCK_H * BLOCK_Q, BLOCK_N))


@triton.jit
def tile_offsets(M: tl.constexpr, N: tl.constexpr):
    """[M, N] row by row."""
    return tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]


@triton.jit
def pass_on(scratch_ptr, ds, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """Leave the gradient of a tile's logits where differentiate_pairs reads it."""
    tl.debug_barrier()
    tl.store(scratch_ptr + tile_offsets(BLOCK_H * BLOCK_Q, BLOCK_N), ds)
    tl.debug_barrier()


@triton.jit
def load_slopes(scratch_ptr, BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_Q, BLOCK_N] gradients of the offsets along x and y."""
    tl.debug_barrier()
    at = scratch_ptr + BLOCK_H * BLOCK_Q * BLOCK_N + tile_offsets(BLOCK_Q, BLOCK_N)
    return tl.load(at), tl.load(at + BLOCK_Q * BLOCK_N)


@triton.jit
def load_piece(scratch_ptr, p0, SIZE: tl.constexpr, BLOCK_H: tl.constexpr, PIECE: tl.constexpr):
    """[BLOCK_H, PIECE] the gradient of the bias that pass_on left."""
    heads = tl.arange(0, BLOCK_H)[:, None]
    return tl.load(scratch_ptr + heads * SIZE + (p0 + tl.arange(0, PIECE))[None, :])


@triton.jit
def store_slopes(
    scratch_ptr, p0, d_x, d_y, off_x, off_y, exist,
    SIZE: tl.constexpr, BLOCK_H: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Leave the gradients of the offsets of a piece for load_slopes."""
    at = scratch_ptr + BLOCK_H * SIZE + p0 + tl.arange(0, PIECE)
    tl.store(at, tl.where(exist, d_x / (1.0 + tl.abs(off_x)), 0.0))
    tl.store(at + SIZE, tl.where(exist, d_y / (1.0 + tl.abs(off_y)), 0.0))


@triton.jit
def rows_by_head(values, BLOCK_H: tl.constexpr):
    """[BLOCK_H * M]: one value per query, for every head."""
    M: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[None, :], (BLOCK_H, M)), (BLOCK_H * M,))


@triton.jit
def heads_of_rows(BLOCK_H: tl.constexpr, M: tl.constexpr):
    """[BLOCK_H * M] each row's head in the block."""
    heads = tl.broadcast_to(tl.arange(0, BLOCK_H)[:, None], (BLOCK_H, M))
    return tl.reshape(heads, (BLOCK_H * M,))


@triton.jit
def weigh_pairs(
    q, dz, k, v, bias, ok, lse, scale, keys, draws, bag, seed_ptr, threshold, keep_scale,
    BLOCK_H: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights [BLOCK_H * M, N] before and after dropout, and the gradient of the former."""
    scores = of_own_head(q, k, BLOCK_H, PRECISION) * scale
    dp = of_own_head(dz, v, BLOCK_H, PRECISION)
    return softmax_tile(
        scores, dp, bias, ok, lse[:, None], keys[None, :], draws[:, None], bag,
        seed_ptr, threshold, keep_scale,
    )  # fmt: skip
