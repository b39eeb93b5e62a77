"""The launches that make up `pool_bag`: one function per pass, used by pool_bag.py."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from survfuse.pooling import PooledBag

from . import pool_bag_shapes as shapes
from .pool_bag_call import Call
from .pool_bag_merge import pool_bag_merge_kernel, pool_bag_sum_kernel
from .pool_bag_narrow import pool_bag_bwd_rows_kernel, pool_bag_fwd_kernel
from .pool_bag_scores import N_PLANES, pool_bag_prepare_kernel
from .pool_bag_trained import pool_bag_bwd_bag_kernel
from .pool_bag_wide import pool_bag_product_kernel, pool_bag_scores_kernel


def forward_narrow(call: Call, shape: dict[str, int], rows: Tensor, pooled: Tensor) -> PooledBag:
    """pooled, lse and weight_sum in one read of the bag per block of query rows."""
    n_bags, n_rows, _ = call.shape
    blocks = -(-n_rows // shape["BLOCK_R"])
    resident = shapes.programs_per_processor(shape)
    slots = call.plan(shape["BLOCK_N"], programs=blocks / resident, row_bytes=0)
    part, statistics = _partials(call, slots)
    state = State(pooled, call)
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        pool_bag_fwd_kernel[(chunk * blocks,)](
            rows,
            *call.inputs,
            part,
            *statistics,
            n_bags,
            call.bag.shape[0],
            n_rows,
            first,
            slots.rows,
            call.threshold,
            call.scale,
            call.eps,
            rows.stride(0),
            rows.stride(1),
            call.row_stride,
            **call.constants,
            **shape,
        )
        state.merge(part, statistics, first, chunk, slots.rows)
    return state.results


def forward_wide(call: Call, rows: Tensor, pooled: Tensor) -> PooledBag:
    """The same by coefficients that are kept, chunk by chunk."""
    a, _, per_row = prepare(call, rows)
    state = State(pooled, call)
    for first, chunk, slot_rows, part, statistics in products(call, a, None, per_row):
        state.merge(part, statistics, first, chunk, slot_rows)
    return state.results


class State:
    """Results over the chunks so far. Maxima and sums alternate between two buffers: the programs
    of one query row all read them, and one writes."""

    def __init__(self, pooled: Tensor, call: Call) -> None:
        self.call = call
        self.results = PooledBag(pooled, *(pooled.new_empty(call.shape[:2]) for _ in range(2)))
        self.pair = planes(pooled, 2, 3 * call.shape[0] * call.shape[1])
        self.n_merged = 0

    def merge(
        self, part: Tensor, statistics: list[Tensor], first: int, chunk: int, slot_rows: int
    ) -> None:
        """Take in the slots first to first + chunk."""
        call = self.call
        n_bags, n_rows, width = call.shape
        blocks = -(-width // _MERGE["BLOCK_D"])
        pool_bag_merge_kernel[(n_bags * n_rows * blocks,)](
            part,
            *statistics,
            call.starts,
            call.lengths,
            *self.results,
            self.pair[(self.n_merged + 1) % 2],
            self.pair[self.n_merged % 2],
            n_bags,
            call.bag.shape[0],
            n_rows,
            first,
            chunk,
            slot_rows,
            call.keep_scale,
            D=width,
            FIRST=self.n_merged == 0,
            **_MERGE,
        )
        self.n_merged += 1


def backward_rows(
    call: Call,
    a: Tensor,
    dz: Tensor,
    per_row: Tensor,
    pooled: Tensor,
    d_lse: Tensor,
    d_rows: Tensor,
) -> None:
    """Fill d_rows."""
    n_bags, n_rows, _ = call.shape
    known = (pooled.contiguous(), d_lse.contiguous())
    shape = shapes.narrow_shape(call.problem, call.limits, backward=True)
    if shape is None:
        for first, chunk, slot_rows, part, (_, sums, _) in products(call, a, dz, per_row):
            sums = None if call.normalize else sums
            sum_slots(call, part, sums, *known, d_rows, first, chunk, slot_rows)
        return
    blocks = -(-n_rows // shape["BLOCK_R"])
    resident = shapes.programs_per_processor(shape)
    slots = call.plan(shape["BLOCK_N"], programs=blocks / resident, row_bytes=0)
    part, (_, sums, _) = _partials(call, slots)
    sums = sums if shapes.narrow_balances(call.problem) else None
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        pool_bag_bwd_rows_kernel[(chunk * blocks,)](
            a,
            dz,
            per_row,
            *call.inputs,
            part,
            sums,
            n_bags,
            call.bag.shape[0],
            n_rows,
            first,
            slots.rows,
            call.threshold,
            call.scale,
            call.eps,
            call.keep_scale,
            call.row_stride,
            **call.constants,
            **shape,
        )
        sum_slots(call, part, sums, *known, d_rows, first, chunk, slots.rows)


def backward_stored(
    call: Call,
    a: Tensor,
    dz: Tensor,
    per_row: Tensor,
    d_bag: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """Fill d_bag and d_bias."""
    n_bags, n_rows, width = call.shape
    n_stored = call.bag.shape[0]
    shape = shapes.trained_shape(call.problem)
    blocks = 1 if d_bag is None else -(-width // shape["BLOCK_D"])
    pool_bag_bwd_bag_kernel[(-(-n_stored // shape["BLOCK_N"]) * blocks,)](
        a,
        dz,
        per_row,
        *call.inputs,
        d_bag,
        d_bias,
        n_bags,
        n_stored,
        n_rows,
        call.threshold,
        call.scale,
        call.eps,
        call.keep_scale,
        call.row_stride,
        0 if d_bag is None else d_bag.stride(0),
        **call.constants,
        **shape,
    )


def products(
    call: Call, a: Tensor, dz: Tensor | None, per_row: Tensor
) -> Iterator[tuple[int, int, int, Tensor, list[Tensor]]]:
    """The wide route, chunk by chunk: (first slot, slots, rows per slot, partials, statistics).

    The buffers are used again by the next chunk: the caller merges before it asks for more.
    """
    n_bags, n_rows, width = call.shape
    bag = call.bag
    scores = shapes.scores_shape(call.problem, call.limits, backward=dz is not None)
    product = shapes.product_shape(call.problem, call.limits)
    tile = scores["BLOCK_T"]
    stride = -(-n_rows // 16) * 16
    programs = -(-n_rows // product["BLOCK_R"]) * -(-width // product["BLOCK_D"])
    row_bytes = stride * bag.element_size() + 4 + 16 * n_rows // tile
    slots = call.plan(tile, programs=programs, row_bytes=row_bytes)
    part, statistics = _partials(call, slots)
    n_scratch = slots.chunk * slots.rows
    coef = torch.empty((n_scratch, stride), dtype=bag.dtype, device=bag.device)
    row_mean = part.new_empty((n_scratch if call.normalize else 1,))
    tiles = planes(part, 4, n_scratch // tile * n_rows)
    sums = (tiles[2], tiles[3] if dz is None else None)
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        n_tiles = chunk * (slots.rows // tile)
        pool_bag_scores_kernel[(n_tiles * -(-n_rows // scores["BLOCK_R"]),)](
            a,
            dz,
            per_row,
            *call.inputs,
            coef,
            row_mean,
            tiles[0],
            tiles[1],
            *sums,
            n_bags,
            bag.shape[0],
            n_rows,
            first,
            slots.rows,
            call.threshold,
            call.scale,
            call.eps,
            call.keep_scale,
            call.row_stride,
            stride,
            **call.constants,
            **scores,
        )
        pool_bag_product_kernel[(chunk * programs,)](
            bag,
            call.bias,
            call.starts,
            call.lengths,
            coef,
            row_mean,
            tiles[0],
            tiles[1],
            *sums,
            part,
            *statistics,
            n_bags,
            bag.shape[0],
            n_rows,
            first,
            slots.rows,
            call.scale,
            call.row_stride,
            stride,
            **call.constants,
            BLOCK_T=tile,
            **product,
        )
        yield first, chunk, slots.rows, part, statistics


# a strip of 128 columns over 32 slots: 16 KB in flight per program
_MERGE = {"BLOCK_S": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}


def sum_slots(
    call: Call,
    part: Tensor,
    sums: Tensor | None,
    pooled: Tensor,
    d_lse: Tensor,
    d_rows: Tensor,
    first: int,
    chunk: int,
    slot_rows: int,
) -> None:
    """Add the partials of the slots first to first + chunk to d_rows."""
    n_bags, n_rows, width = call.shape
    pool_bag_sum_kernel[(n_bags * n_rows * -(-width // _MERGE["BLOCK_D"]),)](
        part,
        sums,
        pooled,
        d_lse,
        call.starts,
        call.lengths,
        d_rows,
        n_bags,
        call.bag.shape[0],
        n_rows,
        first,
        chunk,
        slot_rows,
        call.scale,
        D=width,
        FIRST=first == 0,
        **_MERGE,
    )


def prepare(
    call: Call, rows: Tensor, results: PooledBag | None = None, d_results: PooledBag | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rounded query rows and, in the backward, gradients, and what is known per query row."""
    n_bags, n_rows, width = call.shape
    bag = call.bag
    padded = -(-width // 16) * 16
    a = torch.empty((n_bags, n_rows, padded), dtype=bag.dtype, device=bag.device)
    backward = d_results is not None
    dz = torch.empty_like(a) if backward else None
    saved = [t.contiguous() for t in (*results, *d_results)] if backward else [None] * 6
    per_row = torch.empty(
        (N_PLANES.value if backward else 2, n_bags, n_rows),
        dtype=torch.float32,
        device=bag.device,
    )
    pool_bag_prepare_kernel[(n_bags * n_rows,)](
        rows,
        *saved,
        a,
        dz,
        per_row,
        n_rows,
        rows.stride(0),
        rows.stride(1),
        D=width,
        BLOCK_D=shapes.next_power(padded),
        num_warps=4 if padded <= 1024 else 16,
        num_stages=1,
    )
    return a, dz, per_row


def _partials(call: Call, slots: shapes.Slots) -> tuple[Tensor, list[Tensor]]:
    """A chunk's sums [C, R, D], and its maxima, sums and kept sums [C, R]."""
    _, n_rows, width = call.shape
    part = torch.empty((slots.chunk, n_rows, width), dtype=torch.float32, device=call.bag.device)
    return part, planes(part, 3, slots.chunk * n_rows)


def planes(like: Tensor, count: int, size: int) -> list[Tensor]:
    """Vectors of `size` in one allocation, each aligned: Triton compiles anew where it changes."""
    planes = like.new_empty((count, -(-size // 4) * 4))
    return [plane[:size] for plane in planes]
