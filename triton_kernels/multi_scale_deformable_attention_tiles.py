"""Where a sample of `multi_scale_deformable_attention` lies and what it weighs, for its kernels.

Math: docs/math.md, "Multi-scale deformable attention".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_of_block(n_queries, HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Results (b, q, h) of a program, counted through, and the batch, query and head of each.

    The query counts through all batches. Only scalars are divided in 64 bits.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_R
    query0 = first // HEADS
    batch0 = query0 // n_queries
    offs_r = tl.arange(0, BLOCK_R)
    head = (first % HEADS).to(tl.int32) + offs_r
    query = head // HEADS
    batch = batch0 + ((query0 - batch0 * n_queries).to(tl.int32) + query) // n_queries
    return first + offs_r, batch, query0 + query, head % HEADS


@triton.jit
def softmax_of_rows(
    logits_ptr,  # [rows, SAMPLES] in
    rows,  # [R]
    mask,  # [R]
    SAMPLES: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """[R] largest logit, and sum of exp(logit - largest)."""
    largest = tl.full(rows.shape, -float("inf"), tl.float32)
    total = tl.zeros(rows.shape, tl.float32)
    for s0 in range(0, SAMPLES, BLOCK_S):
        cols = s0 + tl.arange(0, BLOCK_S)
        inside = mask[:, None] & (cols < SAMPLES)[None, :]
        at = (rows * SAMPLES)[:, None] + cols[None, :]
        logits = tl.load(logits_ptr + at, mask=inside, other=-float("inf")).to(tl.float32)
        # rows past the end have a sum to divide by, too
        logits = tl.where(mask[:, None], logits, 0.0)
        new = tl.maximum(largest, tl.max(logits, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(largest - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        largest = new
    return largest, total


@triton.jit
def weigh(weights_ptr, samples, mask, largest, share, SOFTMAX: tl.constexpr):
    """[R] the weights as given, or those of their softmax."""
    weight = tl.load(weights_ptr + samples, mask=mask, other=0.0).to(tl.float32)
    if SOFTMAX:
        weight = tl.exp(weight - largest) * share
    return weight


@triton.jit
def sides_of_level(shapes_ptr, level):
    """Height and width."""
    height = tl.load(shapes_ptr + 2 * level)
    width = tl.load(shapes_ptr + 2 * level + 1)
    # what is longer has no rows anyway, and would overflow
    height = tl.minimum(tl.maximum(height, 0), 0x7FFFFFFF).to(tl.int32)
    return height, tl.minimum(tl.maximum(width, 0), 0x7FFFFFFF).to(tl.int32)


@triton.jit
def rows_behind(start, height, width, n_rows):
    """The first row of the next level; with levels that nobody could check, none past the end."""
    return tl.minimum(start + height.to(tl.int64) * width, n_rows)


@triton.jit
def place(
    points_ptr,  # [samples, 2] in
    reference_ptr,  # [queries, L, 4 if BOX else 2] in, or None
    samples,  # [R]
    references,  # [R] query * L + level
    mask,
    side,  # of the level, along this axis
    AXIS: tl.constexpr,  # 0: x
    POINTS: tl.constexpr,
    BOX: tl.constexpr,
):
    """[R] coordinates in pixels, whose centres are at whole numbers, pixels per unit of the point
    as it is given, and the point."""
    point = tl.load(points_ptr + 2 * samples + AXIS, mask=mask, other=0.0)
    length = side.to(tl.float32)
    step = tl.zeros_like(point) + length
    origin = tl.zeros_like(point)
    if reference_ptr is not None:
        if BOX:
            origin = tl.load(reference_ptr + 4 * references + AXIS, mask=mask, other=0.0)
            extent = tl.load(reference_ptr + 4 * references + 2 + AXIS, mask=mask, other=0.0)
            step = extent * (length * (0.5 / POINTS))
        else:
            origin = tl.load(reference_ptr + 2 * references + AXIS, mask=mask, other=0.0)
            step = tl.zeros_like(point) + 1.0
    return origin * length + point * step - 0.5, step, point


@triton.jit
def cell_of(at, inside):
    """[R] the pixel below, and how far the sample lies from it; 0 where it lies outside."""
    at = tl.where(inside, at, 0.0)
    low = tl.floor(at)
    return low, at - low


@triton.jit
def corner(
    low_x,
    low_y,
    far_x,
    far_y,
    inside,
    start,  # the level's first row
    height,
    width,
    n_rows,
    DX: tl.constexpr,
    DY: tl.constexpr,
):
    """[R] the stored row of a corner, whether it exists, and its share of the sample."""
    x, y = low_x.to(tl.int32) + DX, low_y.to(tl.int32) + DY
    held = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row = start + y.to(tl.int64) * width + x
    held = held & (row < n_rows)
    share = (far_x if DX else 1.0 - far_x) * (far_y if DY else 1.0 - far_y)
    return row, held, share
