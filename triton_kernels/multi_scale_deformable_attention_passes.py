"""`multi_scale_deformable_attention`: its forward kernel and its backward kernel.

Contract: survfuse/ops/multi_scale_deformable_attention.py.
Oracle: survfuse/reference/multi_scale_deformable_attention.py.
Math: docs/math.md, "Multi-scale deformable attention".
Layout: one program per block of results (batch, query, head), counted through, so that points,
weights and results are read and written as they lie. A corner of a sample is d numbers in a row,
read by as many threads as it takes at 16 bytes each. Samples are walked one by one: the registers
of a program hold one row of d per result, whatever L and P are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_scale_deformable_attention_tiles import (
    cell_of,
    corner,
    place,
    rows_behind,
    rows_of_block,
    sides_of_level,
    softmax_of_rows,
    weigh,
)

_RUNTIME = ["n_results", "n_queries", "n_rows"]


@triton.jit(do_not_specialize=_RUNTIME)
def deformable_fwd_kernel(
    value_ptr,  # [B, S, H, D] in
    shapes_ptr,  # [L, 2] in         (height, width)
    points_ptr,  # [B, Q, H, L, P, 2] in
    weights_ptr,  # [B, Q, H, L, P] in
    reference_ptr,  # [B, Q, L, 4 if BOX else 2] in, or None: weights are no logits
    out_ptr,  # [B, Q, H, D] out
    lse_ptr,  # [B, Q, H] out       or None
    n_results,  # B Q H
    n_queries,
    n_rows,
    stride_batch,
    stride_row,
    stride_head,
    UNIT: tl.constexpr,  # of the strides
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    BOX: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (cdiv(B * Q * H, BLOCK_R),)."""
    SAMPLES: tl.constexpr = LEVELS * POINTS
    SOFTMAX: tl.constexpr = reference_ptr is not None
    rows, batch, query, head = rows_of_block(n_queries, HEADS, BLOCK_R)
    mask = rows < n_results
    cols = tl.arange(0, BLOCK_D)
    mask_d = (cols < D)[None, :]
    largest = tl.zeros((BLOCK_R,), tl.float32)
    share = tl.zeros((BLOCK_R,), tl.float32)
    if SOFTMAX:
        largest, total = softmax_of_rows(weights_ptr, rows, mask, SAMPLES, BLOCK_S)
        share = 1.0 / total
        tl.store(lse_ptr + rows, largest + tl.log(total), mask=mask)
    first = batch * (stride_batch * UNIT) + head * (stride_head * UNIT)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    start = tl.zeros((), tl.int64)
    for level in range(LEVELS):
        height, width = sides_of_level(shapes_ptr, level)
        references = query * LEVELS + level
        for p in tl.range(0, POINTS, loop_unroll_factor=UNROLL):
            at = rows * SAMPLES + level * POINTS + p
            x, _, _ = place(points_ptr, reference_ptr, at, references, mask, width, 0, POINTS, BOX)
            y, _, _ = place(points_ptr, reference_ptr, at, references, mask, height, 1, POINTS, BOX)
            weight = weigh(weights_ptr, at, mask, largest, share, SOFTMAX)
            inside = mask & (x > -1) & (x < width) & (y > -1) & (y < height)
            low_x, far_x = cell_of(x, inside)
            low_y, far_y = cell_of(y, inside)
            for c in tl.static_range(4):
                row, held, part = corner(
                    low_x, low_y, far_x, far_y, inside, start, height, width, n_rows,
                    c % 2, c // 2,
                )  # fmt: skip
                source = (first + row * (stride_row * UNIT))[:, None] + cols[None, :]
                v = tl.load(value_ptr + source, mask=held[:, None] & mask_d, other=0.0)
                # by selection: a weight may be NaN where there is nothing to weigh
                acc += tl.where(held, part * weight, 0.0)[:, None] * v.to(tl.float32)
        start = rows_behind(start, height, width, n_rows)
    tl.store(
        out_ptr + (rows * D)[:, None] + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=mask[:, None] & mask_d,
    )


@triton.jit(do_not_specialize=[*_RUNTIME, "n_points"])
def deformable_bwd_kernel(
    d_out_ptr,  # [B, Q, H, D] in
    value_ptr,  # [B, S, H, D] in
    shapes_ptr,  # [L, 2] in         (height, width)
    points_ptr,  # [B, Q, H, L, P, 2] in
    weights_ptr,  # [B, Q, H, L, P] in
    reference_ptr,  # [B, Q, L, 4 if BOX else 2] in, or None: weights are no logits
    per_unit_ptr,  # [1] in             units of the fixed point in 1; read where d_value is int64
    d_value_ptr,  # [B, S, H, D] add   fp32, or int64 in fixed point; or None
    d_points_ptr,  # [B, Q, H, L, P, 2] out, or None
    d_weights_ptr,  # [B, Q, H, L, P] out, or None
    d_reference_ptr,  # [B, Q, H, L, 4 if BOX else 2] out, or None
    n_results,  # B Q H
    n_queries,
    n_rows,
    n_points,  # as POINTS: a loop that is not unrolled leaves its registers to other programs
    stride_batch,
    stride_row,
    stride_head,
    UNIT: tl.constexpr,  # of the strides
    HEADS: tl.constexpr,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    D: tl.constexpr,
    BOX: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """What the samples of a block give each gradient. Grid: (cdiv(B * Q * H, BLOCK_R),)."""
    SAMPLES: tl.constexpr = LEVELS * POINTS
    SOFTMAX: tl.constexpr = reference_ptr is not None
    MOVES: tl.constexpr = d_points_ptr is not None or d_reference_ptr is not None
    READS: tl.constexpr = MOVES or d_weights_ptr is not None
    rows, batch, query, head = rows_of_block(n_queries, HEADS, BLOCK_R)
    mask = rows < n_results
    cols = tl.arange(0, BLOCK_D)
    mask_d = (cols < D)[None, :]
    d_out = tl.load(
        d_out_ptr + (rows * D)[:, None] + cols[None, :], mask=mask[:, None] & mask_d, other=0.0
    ).to(tl.float32)
    largest = tl.zeros((BLOCK_R,), tl.float32)
    share = tl.zeros((BLOCK_R,), tl.float32)
    if SOFTMAX:
        # as in the forward: the rounding of lse would be one more
        largest, total = softmax_of_rows(weights_ptr, rows, mask, SAMPLES, BLOCK_S)
        share = 1.0 / total
    first = batch * (stride_batch * UNIT) + head * (stride_head * UNIT)
    target = batch * (n_rows.to(tl.int64) * (HEADS * D)) + head * D
    mean = tl.zeros((BLOCK_R,), tl.float32)
    start = tl.zeros((), tl.int64)
    for level in range(LEVELS):
        height, width = sides_of_level(shapes_ptr, level)
        references = query * LEVELS + level
        origin_x = tl.zeros((BLOCK_R,), tl.float32)
        origin_y = tl.zeros((BLOCK_R,), tl.float32)
        extent_x = tl.zeros((BLOCK_R,), tl.float32)
        extent_y = tl.zeros((BLOCK_R,), tl.float32)
        for p in range(n_points):
            at = rows * SAMPLES + level * POINTS + p
            x, step_x, point_x = place(
                points_ptr, reference_ptr, at, references, mask, width, 0, POINTS, BOX
            )
            y, step_y, point_y = place(
                points_ptr, reference_ptr, at, references, mask, height, 1, POINTS, BOX
            )
            weight = weigh(weights_ptr, at, mask, largest, share, SOFTMAX)
            inside = mask & (x > -1) & (x < width) & (y > -1) & (y < height)
            low_x, far_x = cell_of(x, inside)
            low_y, far_y = cell_of(y, inside)
            sample = tl.zeros((BLOCK_R,), tl.float32)
            slope_x = tl.zeros((BLOCK_R,), tl.float32)
            slope_y = tl.zeros((BLOCK_R,), tl.float32)
            for c in tl.static_range(4):
                row, held, part = corner(
                    low_x, low_y, far_x, far_y, inside, start, height, width, n_rows,
                    c % 2, c // 2,
                )  # fmt: skip
                source = (first + row * (stride_row * UNIT))[:, None] + cols[None, :]
                if READS:
                    v = tl.load(value_ptr + source, mask=held[:, None] & mask_d, other=0.0)
                    along = tl.where(held, tl.sum(d_out * v.to(tl.float32), 1), 0.0)
                    sample += part * along
                    if MOVES:
                        # the share's derivatives: its other factor, with the sign of the corner
                        slope_x += (far_y if c // 2 else 1.0 - far_y) * (along if c % 2 else -along)
                        slope_y += (far_x if c % 2 else 1.0 - far_x) * (along if c // 2 else -along)
            # behind all reads, which nothing moves across an addition
            if d_value_ptr is not None:
                for c in tl.static_range(4):
                    row, held, part = corner(
                        low_x, low_y, far_x, far_y, inside, start, height, width, n_rows,
                        c % 2, c // 2,
                    )  # fmt: skip
                    add = tl.where(held, part * weight, 0.0)[:, None] * d_out
                    at_row = target + row * (HEADS * D)
                    to = d_value_ptr + at_row[:, None] + cols[None, :]
                    here = held[:, None] & mask_d
                    if d_value_ptr.dtype.element_ty == tl.int64:
                        units = add.to(tl.float64) * tl.load(per_unit_ptr)
                        tl.atomic_add(
                            to,
                            (units + tl.where(units < 0, -0.5, 0.5)).to(tl.int64),
                            here,
                            "relaxed",
                        )
                    else:
                        tl.atomic_add(to, add, here, "relaxed")
            if d_weights_ptr is not None:
                if SOFTMAX:
                    mean += weight * sample
                tl.store(d_weights_ptr + at, sample, mask=mask)
            if MOVES:
                slope_x = tl.where(inside, slope_x * weight, 0.0)
                slope_y = tl.where(inside, slope_y * weight, 0.0)
                if d_points_ptr is not None:
                    d_x = tl.where(inside, slope_x * step_x, 0.0)
                    d_y = tl.where(inside, slope_y * step_y, 0.0)
                    tl.store(d_points_ptr + 2 * at, d_x, mask=mask)
                    tl.store(d_points_ptr + 2 * at + 1, d_y, mask=mask)
                origin_x += slope_x
                origin_y += slope_y
                if BOX:
                    extent_x += tl.where(inside, slope_x * point_x, 0.0)
                    extent_y += tl.where(inside, slope_y * point_y, 0.0)
        if d_reference_ptr is not None:
            wide, high = width.to(tl.float32), height.to(tl.float32)
            to = (rows * LEVELS + level) * (4 if BOX else 2)
            tl.store(d_reference_ptr + to, origin_x * wide, mask=mask)
            tl.store(d_reference_ptr + to + 1, origin_y * high, mask=mask)
            if BOX:
                tl.store(d_reference_ptr + to + 2, extent_x * (wide * (0.5 / POINTS)), mask=mask)
                tl.store(d_reference_ptr + to + 3, extent_y * (high * (0.5 / POINTS)), mask=mask)
        start = rows_behind(start, height, width, n_rows)
    if SOFTMAX and d_weights_ptr is not None:
        # what other threads of this program have just written
        tl.debug_barrier()
        for s0 in range(0, SAMPLES, BLOCK_S):
            offs_s = s0 + tl.arange(0, BLOCK_S)
            here = mask[:, None] & (offs_s < SAMPLES)[None, :]
            at = (rows * SAMPLES)[:, None] + offs_s[None, :]
            weight = weigh(weights_ptr, at, here, largest[:, None], share[:, None], True)
            sample = tl.load(d_weights_ptr + at, mask=here, other=0.0)
            tl.store(d_weights_ptr + at, weight * (sample - mean[:, None]), mask=here)
