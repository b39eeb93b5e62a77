"""What the kernels of `position_biased_attention` share: a tile of pairs, all heads of a block side by side.

Rows of a tile are (head, query), columns keys; features of keys are (head, key), so that products of
a block of heads are one product of which the blocks on the diagonal count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import softmax_tile
from .position_biased_attention_mlp import (
    columns_of_pairs,
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
    """[BLOCK_H * M, N]: rows of x [BLOCK_H * M, D] times those of y [BLOCK_H * N, D] of their head."""
    full = tl.dot(x, tl.trans(y), input_precision=PRECISION)
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
def load_places(positions_ptr, rows, mask):
    """[N] x and y; 0 where masked."""
    x = tl.load(positions_ptr + 2 * rows, mask=mask, other=0.0)
    return x, tl.load(positions_ptr + 2 * rows + 1, mask=mask, other=0.0)


@triton.jit
def bias_of_pairs(
    from_x,  # [M] places of queries
    from_y,
    to_x,  # [N] places of keys
    to_y,
    pairs,  # [M, N] that exist
    parameters_ptr,
    reach_ptr,
    head0,  # in the group
    table_size,
    PER_GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Offsets [M, N], signed logs [M * N], them as columns, two hidden layers, and the bias
    [BLOCK_H * M, N]."""
    SIZE: tl.constexpr = pairs.shape[0] * pairs.shape[1]
    off_x = from_x[:, None] - to_x[None, :]
    off_y = from_y[:, None] - to_y[None, :]
    x = tl.reshape(signed_log(off_x), (SIZE,))
    y = tl.reshape(signed_log(off_y), (SIZE,))
    if reach_ptr is not None:
        columns, second, last = x, x, x
        mask = tl.reshape(pairs, (SIZE,))
        bias = interpolate(
            parameters_ptr, x, y, reach_ptr, head0, table_size, mask, PER_GROUP, BLOCK_H
        )
    else:
        columns = columns_of_pairs(x, y, dtype)
        second, last = evaluate_hidden(columns, parameters_ptr, WIDTH, DEPTH, PRECISION)
        bias = evaluate_last(
            last, parameters_ptr, head0, WIDTH, DEPTH, PER_GROUP, BLOCK_H, PRECISION
        )
    bias = tl.reshape(bias, (BLOCK_H * pairs.shape[0], pairs.shape[1]))
    return off_x, off_y, x, y, columns, second, last, bias


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
