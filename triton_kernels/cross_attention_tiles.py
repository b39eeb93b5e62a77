"""What the attention kernels share: tiles of heads, their products, the gradient of a weight.

Math: docs/math.md, "Attention with keys given".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .ragged import BLOCK_B, bag_range, keep_mask


@triton.jit
def load_head(
    ptr,
    at,  # [N] offsets of rows, head included
    mask,  # [N]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[N, BLOCK_D]: one head of N rows, 0 where masked."""
    cols = tl.arange(0, BLOCK_D)
    inside = mask[:, None]
    if BLOCK_D != D:
        inside = inside & (cols < D)[None, :]
    return tl.load(ptr + at[:, None] + cols[None, :], mask=inside, other=0.0)


@triton.jit
def store_head(ptr, at, mask, values, D: tl.constexpr):
    """Write [N, BLOCK_D] in the type of `ptr`."""
    cols = tl.arange(0, values.shape[1])
    inside = mask[:, None]
    if values.shape[1] != D:
        inside = inside & (cols < D)[None, :]
    tl.store(ptr + at[:, None] + cols[None, :], values.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def round_rows(rows, dtype: tl.constexpr):
    """Rows [R, BLOCK_D] in the type of the keys, and their fp32 factors taken out.

    fp16 has few exponents: rows are brought to a largest magnitude in [1, 2) by a power of two.
    """
    factor = tl.zeros((rows.shape[0],), tl.float32) + 1.0
    if dtype == tl.float16:
        rows = rows.to(tl.float32)
        largest = tl.max(tl.abs(rows), 1)
        factor = tl.exp2(tl.floor(tl.log2(tl.where(largest > 1e-30, largest, 1.0))))
        rows = rows / factor[:, None]
    return rows.to(dtype), factor


@triton.jit
def inner(x, y, PRECISION: tl.constexpr):
    """x y^T for x [M, BLOCK_D] and y [N, BLOCK_D], fp32.

    Exact fp32 products run on scalar units, and a thread keeps its operands over the whole sum in
    registers: columns are cut into short groups, which become a batch.
    """
    if x.dtype == tl.float32 and PRECISION == "ieee" and x.shape[1] > 16:
        GROUPS: tl.constexpr = x.shape[1] // 16
        x = tl.permute(tl.reshape(x, (x.shape[0], GROUPS, 16)), (1, 0, 2))
        y = tl.permute(tl.reshape(y, (y.shape[0], GROUPS, 16)), (1, 2, 0))
        out = tl.sum(tl.dot(x, y, input_precision=PRECISION), 0)
    else:
        out = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return out


@triton.jit
def softmax_tile(
    s,  # logits without bias; all of these broadcast to one tile
    dp,  # gradient of the kept weight
    bias,
    ok,  # keys that take part
    lse,
    positions,  # of the keys in their bag
    draws,  # rows of the dropout mask
    bag,
    seed_ptr,
    threshold,
    keep_scale,
):
    """Weights before and after dropout, and the gradient of the former by way of the latter."""
    included = ok & (lse != -float("inf"))
    shifted = s + bias - tl.where(lse == -float("inf"), 0.0, lse)
    softmax = tl.exp(tl.where(included, shifted, -float("inf")))
    weights = softmax
    if seed_ptr is not None:
        keep = keep_mask(tl.load(seed_ptr), positions, draws, bag, threshold)
        weights = tl.where(keep, softmax * keep_scale, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    # by selection: a gradient may be infinite where a weight is 0
    return softmax, weights, tl.where(included, dp, 0.0)


@triton.jit
def whole_rows(softmax, dp, AXIS: tl.constexpr):
    """Of rows all of whose keys are in the tile: what makes them sum to 1 again, which the rounding
    of lse undid, and the mean gradient of these very numbers.

    With few keys little but that rounding may be left of the difference to the mean.
    """
    total = tl.sum(softmax, AXIS)
    share = 1.0 / tl.where(total == 0, 1.0, total)
    return share, tl.sum(softmax * dp, AXIS) * share


@triton.jit
def logit_gradient(softmax, dp, mean, d_lse):
    """d_logits. The gradient of lse is added after the difference, of which little may be left."""
    return tl.where(softmax == 0, 0.0, softmax * ((dp - mean) + d_lse))


@triton.jit
def mean_gradient(
    d_out_ptr,  # [total, H, DV] in
    out_ptr,  # [total, H, DV] in
    at,  # [R] offsets of rows
    mask,
    factor,  # of the rounded rows
    dtype: tl.constexpr,
    DV: tl.constexpr,
):
    """[R] mean gradient of the weights of R rows, from the rounded d_out and what was pooled.

    Each weight's gradient has it subtracted, and most of both cancels: this sum adds no rounding.
    A few columns at a time, since fp64 takes two registers.
    """
    total = tl.zeros(factor.shape, tl.float64)
    for c0 in range(0, DV, 16):
        cols = c0 + tl.arange(0, 16)
        inside = mask[:, None] & (cols < DV)[None, :]
        dz = tl.load(d_out_ptr + at[:, None] + cols[None, :], mask=inside, other=0.0)
        if dtype == tl.float16:
            dz = dz / factor[:, None]
        out = tl.load(out_ptr + at[:, None] + cols[None, :], mask=inside, other=0.0)
        total += tl.sum(dz.to(dtype).to(tl.float64) * out.to(tl.float64), 1)
    return total.to(tl.float32) * factor


@triton.jit
def next_bag(after, low, high, starts_ptr, lengths_ptr, n_bags, n_stored):
    """The first bag behind `after` that holds a row of low to high; n_bags if there is none."""
    found = n_bags
    b0 = after + 1
    while b0 < n_bags:
        bags = b0 + tl.arange(0, BLOCK_B)
        start, length = bag_range(bags, starts_ptr, lengths_ptr, n_bags, n_stored)
        touches = (start < high) & (start + length > low) & (length > 0)
        found = tl.min(tl.where(touches, bags, n_bags), 0)
        b0 = tl.where(found < n_bags, n_bags, b0 + BLOCK_B)
    return found


@triton.jit
def rows_before(bag, starts_ptr, lengths_ptr, n_bags, n_stored):
    """Rows of all bags before this one: where its results begin."""
    before = tl.zeros((), tl.int64)
    for b0 in range(0, bag, BLOCK_B):
        bags = b0 + tl.arange(0, BLOCK_B)
        _, length = bag_range(bags, starts_ptr, lengths_ptr, n_bags, n_stored)
        before += tl.sum(tl.where(bags < bag, length, 0), 0)
    return before


@triton.jit
def _pieces(start, length, rows_per_piece, STORED: tl.constexpr):
    # 64-bit division is a call that spills; rows are fewer than 2**32
    rows = rows_per_piece.to(tl.uint32)
    if STORED:
        # of the stored rows: pieces that the bag touches
        end = (start + length + rows_per_piece - 1).to(tl.uint32)
        pieces = end // rows - start.to(tl.uint32) // rows
        pieces = tl.where(length > 0, pieces, 0)
    else:
        pieces = (length + rows_per_piece - 1).to(tl.uint32) // rows
    return pieces.to(tl.int32)


@triton.jit
def pieces_of_bag(
    bag, starts_ptr, lengths_ptr, n_bags, n_stored, rows_per_piece, STORED: tl.constexpr
):
    """The first partial of a bag and their number: one per slot, or per piece of stored rows."""
    first = 0
    for b0 in range(0, bag, BLOCK_B):
        bags = b0 + tl.arange(0, BLOCK_B)
        start, length = bag_range(bags, starts_ptr, lengths_ptr, n_bags, n_stored)
        pieces = _pieces(start, length, rows_per_piece, STORED)
        first += tl.sum(tl.where(bags < bag, pieces, 0), 0)
    start, length = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
    return first, _pieces(start, length, rows_per_piece, STORED)
