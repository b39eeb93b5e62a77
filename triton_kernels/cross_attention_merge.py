"""Fixed-order sums over what an attention was cut into. Math: docs/math.md, "Attention with keys
given".
"""

from __future__ import annotations

import triton
import triton.language as tl

from .cross_attention_tiles import next_bag, pieces_of_bag
from .ragged import bag_range, rows_of_slot, slots_of_bag

_RUNTIME = ["n_bags", "n_queries", "n_keys", "query_max", "rows_per_piece"]


@triton.jit(do_not_specialize=_RUNTIME)
def cross_attention_merge_kernel(
    part_ptr,  # [S, H, query_max, DV] in
    part_max_ptr,  # [S, H, query_max] in
    part_sum_ptr,  # [S, H, query_max] in
    query_starts_ptr,  # [B] in
    query_lengths_ptr,  # [B] in
    key_starts_ptr,  # [B] in
    key_lengths_ptr,  # [B] in
    out_ptr,  # [total, H, DV] out
    lse_ptr,  # [total, H] out
    n_bags,
    n_queries,
    n_keys,
    query_max,
    rows_per_piece,
    keep_scale,
    HEADS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Join the slots of keys. Grid: (total * H * cdiv(DV, BLOCK_C),)."""
    STRIPS: tl.constexpr = max(1, (DV + BLOCK_C - 1) // BLOCK_C)
    strip = tl.program_id(0) % STRIPS
    result = tl.program_id(0) // STRIPS
    head = result % HEADS
    bag, _, row, _ = rows_of_slot(
        result // HEADS, query_starts_ptr, query_lengths_ptr, n_bags, n_queries, 1
    )
    if bag >= n_bags:
        return
    first, count = slots_of_bag(
        bag, key_starts_ptr, key_lengths_ptr, n_bags, n_keys, rows_per_piece
    )
    cols = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_s = tl.arange(0, BLOCK_S)
    largest = tl.full((), -float("inf"), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        at = ((first + s0 + offs_s).to(tl.int64) * HEADS + head) * query_max + row
        part_max = tl.load(part_max_ptr + at, mask=s0 + offs_s < count, other=-float("inf"))
        largest = tl.maximum(largest, tl.max(part_max, 0))
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    total = tl.zeros((), tl.float32)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for s0 in range(0, count, BLOCK_S):
        inside = s0 + offs_s < count
        at = ((first + s0 + offs_s).to(tl.int64) * HEADS + head) * query_max + row
        share = tl.exp(tl.load(part_max_ptr + at, mask=inside, other=-float("inf")) - finite)
        total += tl.sum(share * tl.load(part_sum_ptr + at, mask=inside, other=0.0), 0)
        part = tl.load(
            part_ptr + at[:, None] * DV + cols[None, :],
            mask=inside[:, None] & (cols < DV)[None, :],
            other=0.0,
        )
        acc += tl.sum(part * share[:, None], 0)
    # not by the maximum, which skips NaN: a bag of NaN gives NaN
    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    out = result.to(tl.int64)
    values = (acc * (keep_scale / divisor)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + out * DV + cols, values, mask=cols < DV)
    if strip == 0:
        tl.store(lse_ptr + out, tl.where(empty, -float("inf"), finite + tl.log(divisor)))


@triton.jit
def _sum_pieces(
    part_ptr,  # [P, H, longest, WIDTH] in
    sum_ptr,  # [T, H, WIDTH] out
    row,  # stored row
    head,
    strip,
    starts_ptr,
    lengths_ptr,
    cut_starts_ptr,
    cut_lengths_ptr,
    n_bags,
    n_stored,
    n_cut,
    longest,
    rows_per_piece,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One strip of one stored row: its bags in ascending order, of each the pieces in order.

    A width of 0 is one number per row, summed over heads too.
    """
    cols = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_s = tl.arange(0, BLOCK_S)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    bag = next_bag(-1, row, row + 1, starts_ptr, lengths_ptr, n_bags, n_stored)
    while bag < n_bags:
        start, _ = bag_range(bag, starts_ptr, lengths_ptr, n_bags, n_stored)
        first, count = pieces_of_bag(
            bag, cut_starts_ptr, cut_lengths_ptr, n_bags, n_cut, rows_per_piece, STORED
        )
        for s0 in range(0, count, BLOCK_S):
            inside = s0 + offs_s < count
            piece = (first + s0 + offs_s).to(tl.int64)
            if WIDTH == 0:
                for h in range(HEADS):
                    at = (piece * HEADS + h) * longest + row - start
                    acc += tl.sum(tl.load(part_ptr + at, mask=inside, other=0.0), 0)
            else:
                at = (piece * HEADS + head) * longest + row - start
                part = tl.load(
                    part_ptr + at[:, None] * WIDTH + cols[None, :],
                    mask=inside[:, None] & (cols < WIDTH)[None, :],
                    other=0.0,
                )
                acc += tl.sum(part, 0)
        bag = next_bag(bag, row, row + 1, starts_ptr, lengths_ptr, n_bags, n_stored)
    if WIDTH == 0:
        tl.store(sum_ptr + row + cols, acc, mask=cols == 0)
    else:
        acc = acc.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + (row * HEADS + head) * WIDTH + cols, acc, mask=cols < WIDTH)


@triton.jit(
    do_not_specialize=["n_bags", "n_stored", "n_cut", "n_keys", "longest", "rows_per_piece"]
)
def cross_attention_sum_kernel(
    part_ptr,  # [P, H, longest, D] in      of d_query or d_key; or None
    part_value_ptr,  # [P, H, longest, DV] in     of d_value, or None
    part_bias_ptr,  # [P, H, longest] in       of d_bias, or None
    head_bias_ptr,  # [H, Tk] in             each head's d_bias, or None
    starts_ptr,  # [B] in                the side whose gradients these are
    lengths_ptr,  # [B] in
    cut_starts_ptr,  # [B] in                the side that was cut into pieces
    cut_lengths_ptr,  # [B] in
    sum_ptr,  # [T, H, D] out              this and the next two or None
    sum_value_ptr,  # [T, H, DV] out
    d_bias_ptr,  # [Tk] out
    n_bags,
    n_stored,
    n_cut,
    n_keys,
    longest,
    rows_per_piece,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Add up the pieces of a gradient, and heads. Rows in no bag become 0.

    Grid: (T * H * strips + cdiv(Tk, BLOCK_T),), the first part if there are pieces, the second if
    head_bias is given.
    """
    OWN: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C if part_ptr is not None else 0
    VALUE: tl.constexpr = (DV + BLOCK_C - 1) // BLOCK_C if part_value_ptr is not None else 0
    BIAS: tl.constexpr = 1 if part_bias_ptr is not None else 0
    STRIPS: tl.constexpr = OWN + VALUE + BIAS
    n_programs = n_stored * HEADS * STRIPS
    if STRIPS > 0:  # noqa: SIM102  settled when compiling
        if tl.program_id(0) < n_programs:
            strip = tl.program_id(0) % STRIPS
            head = tl.program_id(0) // STRIPS % HEADS
            row = (tl.program_id(0) // STRIPS // HEADS).to(tl.int64)
            if OWN > 0:  # noqa: SIM102
                if strip < OWN:
                    _sum_pieces(
                        part_ptr, sum_ptr, row, head, strip,
                        starts_ptr, lengths_ptr, cut_starts_ptr, cut_lengths_ptr,
                        n_bags, n_stored, n_cut, longest, rows_per_piece,
                        HEADS, D, STORED, BLOCK_S, BLOCK_C,
                    )  # fmt: skip
            if VALUE > 0:  # noqa: SIM102
                if (strip >= OWN) & (strip < OWN + VALUE):
                    _sum_pieces(
                        part_value_ptr, sum_value_ptr, row, head, strip - OWN,
                        starts_ptr, lengths_ptr, cut_starts_ptr, cut_lengths_ptr,
                        n_bags, n_stored, n_cut, longest, rows_per_piece,
                        HEADS, DV, STORED, BLOCK_S, BLOCK_C,
                    )  # fmt: skip
            if BIAS > 0:  # noqa: SIM102
                if (strip == OWN + VALUE) & (head == 0):
                    _sum_pieces(
                        part_bias_ptr, d_bias_ptr, row, head, 0,
                        starts_ptr, lengths_ptr, cut_starts_ptr, cut_lengths_ptr,
                        n_bags, n_stored, n_cut, longest, rows_per_piece,
                        HEADS, 0, STORED, BLOCK_S, BLOCK_C,
                    )  # fmt: skip
    if head_bias_ptr is not None:  # noqa: SIM102
        if tl.program_id(0) >= n_programs:
            block = tl.program_id(0) - n_programs
            rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            acc = tl.zeros((BLOCK_T,), tl.float32)
            for h in range(HEADS):
                at = n_keys.to(tl.int64) * h + rows
                acc += tl.load(head_bias_ptr + at, mask=rows < n_keys, other=0.0)
            tl.store(d_bias_ptr + rows, acc, mask=rows < n_keys)
