"""Pool a ragged bag by softmax attention in Triton: the launchers.

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".  Layout, traffic and registers: docs/kernels.md.  Two routes, chosen by pool_bag_shapes:
pool_bag_narrow.py reads each row once, pool_bag_wide.py keeps coefficients and reads more often;
pool_bag_merge.py joins their slots and pool_bag_trained.py gives the gradients of stored rows.

No autograd, no validation and no host synchronisation: split plans come from `total`, `max_length`
and the number of processors. Every reduction has a fixed order, so results repeat to the bit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import pool_bag_shapes as shapes
from .pool_bag_merge import pool_bag_merge_kernel, pool_bag_sum_kernel
from .pool_bag_narrow import pool_bag_bwd_rows_kernel, pool_bag_fwd_kernel
from .pool_bag_scores import N_PLANES, pool_bag_prepare_kernel
from .pool_bag_trained import pool_bag_bwd_bag_kernel
from .pool_bag_wide import pool_bag_product_kernel, pool_bag_scores_kernel


class _Call(NamedTuple):
    """What every kernel of one call shares."""

    bag: Tensor
    bias: Tensor | None
    mean: Tensor | None
    rstd: Tensor | None
    seed: Tensor | None
    starts: Tensor
    lengths: Tensor
    total: int
    max_length: int
    shape: tuple[int, int, int]  # B, R, D
    scale: float
    normalize: bool
    eps: float
    threshold: int
    keep_scale: float
    # largest power of two up to 16 that divides the bag's row stride: Triton by itself tells only
    # multiples of 16, and a stride padded to 8 would lose its wide loads
    stride_unit: int

    @property
    def problem(self) -> shapes.Problem:
        """What launch shapes depend on."""
        return shapes.Problem(
            dtype=self.bag.dtype,
            n_rows=self.shape[1],
            width=self.shape[2],
            aligned=self.stride_unit * self.bag.element_size() >= 16,
            normalize=self.normalize,
            given=self.mean is not None,
            dropout=self.seed is not None,
        )

    @property
    def limits(self) -> shapes.Limits:
        """Of the device."""
        return shapes.device_limits(self.bag.device)

    def plan(self, align: int, *, programs: float, row_bytes: int) -> shapes.Slots:
        """Cut the bags into slots of a multiple of `align` rows."""
        n_bags, n_rows, width = self.shape
        return shapes.plan_slots(
            self.total,
            self.max_length,
            n_bags,
            align=align,
            slot_bytes=n_rows * (width + 3) * 4,
            row_bytes=row_bytes,
            batch_bytes=self.total * width * self.bag.element_size(),
            programs_per_slot=programs,
            limits=self.limits,
        )


def pool_bag_forward(
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    total: int,
    max_length: int,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax pooling: z_r = sum_i softmax_i(scale * a_r . x_i + bias_i) x_i.

    Args:
        rows: [B, R, D] fp32, or the type of the bag; any strides with a unit last one, as the bag.
        bag: [T, D] fp32, bf16 or fp16. Rows in no bag and rows with bias -inf are never read.
        bias: [T], or None.
        starts, lengths: [B] int64; ranges are clamped to the stored rows.
        total, max_length: rows of all bags and of the longest, as host integers.
        scale: factor of the logits.
        normalize: the bag's rows are layer-normalised (no affine) first.
        eps: of the normalisation.
        mean, rstd: [T] fp32 statistics of the bag's rows, or None: computed on the fly.
        dropout_p: probability of dropping a weight; `seed` is then [1] int64.

    Returns:
        pooled [B, R, D], lse [B, R] and weight_sum [B, R], fp32.

    Cost: narrow route (D <= 1024 and rows for at most two programs: R <= 32 at D = 1024, 64 at 512,
    128 at 256): each stored row is read once per block of query rows (once for R <= 16, or R <= 64
    at D <= 256), by neighbouring programs, so once from memory. Wide route: cdiv(R, 128) reads for
    the scores and cdiv(R, 128) for the product (64 for fp32), the second mostly out of L2, plus R
    coefficients written once and read cdiv(D, 128) times. 4 * R * D operations per row. Workspace:
    under max(16 MB, 1 % of the batch's bytes), for R * D up to 512 x 4608.
    """
    n_bags, n_rows, width = rows.shape
    pooled = torch.empty((n_bags, n_rows, width), dtype=torch.float32, device=bag.device)
    if total == 0 or pooled.numel() == 0:
        lse = pooled.new_full((n_bags, n_rows), -torch.inf)
        return pooled.zero_(), lse, torch.zeros_like(lse)
    call = _call(
        *(rows, bag, bias, starts, lengths, total, max_length),
        *(scale, normalize, eps, mean, rstd, dropout_p, seed),
    )
    shape = shapes.narrow_shape(call.problem, call.limits, backward=False)
    if shape is None:
        return _forward_wide(call, rows, pooled)
    return _forward_narrow(call, shape, rows, pooled)


def _forward_narrow(call, shape, rows, pooled):
    n_bags, n_rows, _ = call.shape
    blocks = -(-n_rows // shape["BLOCK_R"])
    resident = shapes.programs_per_processor(shape)
    slots = call.plan(shape["BLOCK_N"], programs=blocks / resident, row_bytes=0)
    part, statistics = _partials(call, slots)
    state = _State(pooled, call)
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        pool_bag_fwd_kernel[(chunk * blocks,)](
            rows,
            call.bag,
            call.bias,
            call.mean,
            call.rstd,
            call.seed,
            call.starts,
            call.lengths,
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
            call.bag.stride(0) // call.stride_unit,
            STRIDE_UNIT=call.stride_unit,
            D=call.shape[2],
            NORMALIZE=call.normalize,
            PRECISION=_precision(),
            **shape,
        )
        state.merge(part, statistics, first, chunk, slots.rows)
    return state.results


def _forward_wide(call, rows, pooled):
    a, _, per_row = _prepare(call, rows)
    state = _State(pooled, call)
    for first, chunk, slot_rows, part, statistics in _products(call, a, None, per_row):
        state.merge(part, statistics, first, chunk, slot_rows)
    return state.results


class _State:
    """Results over the chunks so far. Maxima and sums alternate between two buffers: the programs
    of one query row all read them, and one writes."""

    def __init__(self, pooled: Tensor, call: _Call) -> None:
        self.call = call
        self.results = (pooled, *(pooled.new_empty(call.shape[:2]) for _ in range(2)))
        self.pair = pooled.new_empty((2, 3, *call.shape[:2]))
        self.n_merged = 0

    def merge(self, part, statistics, first: int, chunk: int, slot_rows: int) -> None:
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


def pool_bag_backward(
    d_pooled: Tensor,
    d_lse: Tensor,
    d_weight_sum: Tensor,
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    starts: Tensor,
    lengths: Tensor,
    total: int,
    max_length: int,
    *,
    scale: float,
    normalize: bool,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    pooled: Tensor,
    lse: Tensor,
    weight_sum: Tensor,
    needs_rows: bool,
    needs_bag: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `pool_bag_forward`, with the weights recomputed from `lse`.

    Args:
        d_pooled, d_lse, d_weight_sum: gradients of the three results, fp32.
        pooled, lse, weight_sum: the three results.
        needs_rows, needs_bag, needs_bias: which gradients to compute; the others are None.
        The rest: as given to the forward.

    Returns:
        d_rows [B, R, D] fp32; d_bag [T, D] in the type of the bag; d_bias [T] fp32. Rows in no bag
        have gradient 0; where bags overlap theirs are summed in ascending order.

    Cost: d_rows reads the bag as often as the forward does. d_bag and d_bias read each row
    cdiv(D, 256) times per bag that holds it and block of 64 query rows (32 for fp32), out of L1 and
    L2 but for the first, once more for the normalisation, and write once. 6 * R * D operations per
    row for d_rows, (4 * cdiv(D, 256) + 4) * R * D for d_bag.
    """
    n_bags, n_rows, width = rows.shape
    d_rows = d_bag = d_bias = None
    if needs_rows:
        d_rows = torch.empty((n_bags, n_rows, width), dtype=torch.float32, device=bag.device)
    if needs_bag:
        d_bag = torch.empty(bag.shape, dtype=bag.dtype, device=bag.device)
    if needs_bias:
        d_bias = torch.empty(bag.shape[:1], dtype=torch.float32, device=bag.device)
    gradients = (d_rows, d_bag, d_bias)
    if total == 0 or rows.numel() == 0:
        return tuple(None if g is None else g.zero_() for g in gradients)
    call = _call(
        *(rows, bag, bias, starts, lengths, total, max_length),
        *(scale, normalize, eps, mean, rstd, dropout_p, seed),
    )
    saved = (d_pooled, pooled, lse, weight_sum, d_lse, d_weight_sum)
    a, dz, per_row = _prepare(call, rows, *(tensor.contiguous() for tensor in saved))
    if d_rows is not None:
        _backward_rows(call, a, dz, per_row, d_rows)
    if d_bag is not None or d_bias is not None:
        _backward_stored(call, a, dz, per_row, d_bag, d_bias)
    return gradients


def _backward_rows(call, a, dz, per_row, d_rows) -> None:
    n_bags, n_rows, width = call.shape
    shape = shapes.narrow_shape(call.problem, call.limits, backward=True)
    if shape is None:
        for first, chunk, slot_rows, part, _ in _products(call, a, dz, per_row):
            _sum_slots(call, part, d_rows, first, chunk, slot_rows)
        return
    blocks = -(-n_rows // shape["BLOCK_R"])
    resident = shapes.programs_per_processor(shape)
    slots = call.plan(shape["BLOCK_N"], programs=blocks / resident, row_bytes=0)
    part, _ = _partials(call, slots)
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        pool_bag_bwd_rows_kernel[(chunk * blocks,)](
            a,
            dz,
            per_row,
            call.bag,
            call.bias,
            call.mean,
            call.rstd,
            call.seed,
            call.starts,
            call.lengths,
            part,
            n_bags,
            call.bag.shape[0],
            n_rows,
            first,
            slots.rows,
            call.threshold,
            call.scale,
            call.eps,
            call.keep_scale,
            call.bag.stride(0) // call.stride_unit,
            STRIDE_UNIT=call.stride_unit,
            D=width,
            NORMALIZE=call.normalize,
            PRECISION=_precision(),
            **shape,
        )
        _sum_slots(call, part, d_rows, first, chunk, slots.rows)


def _backward_stored(call, a, dz, per_row, d_bag, d_bias) -> None:
    n_bags, n_rows, width = call.shape
    n_stored = call.bag.shape[0]
    shape = shapes.trained_shape(call.problem)
    blocks = 1 if d_bag is None else -(-width // shape["BLOCK_D"])
    pool_bag_bwd_bag_kernel[(-(-n_stored // shape["BLOCK_N"]) * blocks,)](
        a,
        dz,
        per_row,
        call.bag,
        call.bias,
        call.mean,
        call.rstd,
        call.seed,
        call.starts,
        call.lengths,
        d_bag,
        d_bias,
        n_bags,
        n_stored,
        n_rows,
        call.threshold,
        call.scale,
        call.eps,
        call.keep_scale,
        call.bag.stride(0) // call.stride_unit,
        0 if d_bag is None else d_bag.stride(0),
        STRIDE_UNIT=call.stride_unit,
        D=width,
        NORMALIZE=call.normalize,
        PRECISION=_precision(),
        **shape,
    )


def _products(call, a, dz, per_row):
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
    tiles = part.new_empty((4, n_scratch // tile, n_rows))
    sums = (None, None) if dz is not None else (tiles[2], tiles[3])
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        n_tiles = chunk * (slots.rows // tile)
        pool_bag_scores_kernel[(n_tiles * -(-n_rows // scores["BLOCK_R"]),)](
            a,
            dz,
            per_row,
            bag,
            call.bias,
            call.mean,
            call.rstd,
            call.seed,
            call.starts,
            call.lengths,
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
            bag.stride(0) // call.stride_unit,
            stride,
            STRIDE_UNIT=call.stride_unit,
            D=width,
            NORMALIZE=call.normalize,
            PRECISION=_precision(),
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
            bag.stride(0) // call.stride_unit,
            stride,
            STRIDE_UNIT=call.stride_unit,
            D=width,
            NORMALIZE=call.normalize,
            PRECISION=_precision(),
            BLOCK_T=tile,
            **product,
        )
        yield first, chunk, slots.rows, part, statistics


# a strip of 128 columns over 32 slots: 16 KB in flight per program
_MERGE = {"BLOCK_S": 32, "BLOCK_D": 128, "num_warps": 4, "num_stages": 2}


def _sum_slots(call, part, d_rows, first: int, chunk: int, slot_rows: int) -> None:
    n_bags, n_rows, width = call.shape
    pool_bag_sum_kernel[(n_bags * n_rows * -(-width // _MERGE["BLOCK_D"]),)](
        part,
        call.starts,
        call.lengths,
        d_rows,
        n_bags,
        call.bag.shape[0],
        n_rows,
        first,
        chunk,
        slot_rows,
        D=width,
        FIRST=first == 0,
        **_MERGE,
    )


def _prepare(call, rows, d_pooled=None, *saved):
    """Rounded query rows and gradients, and what is known per query row."""
    n_bags, n_rows, width = call.shape
    bag = call.bag
    padded = -(-width // 16) * 16
    a = torch.empty((n_bags, n_rows, padded), dtype=bag.dtype, device=bag.device)
    dz = None if d_pooled is None else torch.empty_like(a)
    per_row = torch.empty(
        (N_PLANES.value if dz is not None else 2, n_bags, n_rows),
        dtype=torch.float32,
        device=bag.device,
    )
    pool_bag_prepare_kernel[(n_bags * n_rows,)](
        rows,
        d_pooled,
        *(saved or (None,) * 5),
        a,
        dz,
        per_row,
        n_rows,
        rows.stride(0),
        rows.stride(1),
        D=width,
        BLOCK_D=shapes.next_power(padded),
        num_warps=4,
        num_stages=1,
    )
    return a, dz, per_row


def _partials(call, slots: shapes.Slots) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    _, n_rows, width = call.shape
    part = torch.empty((slots.chunk, n_rows, width), dtype=torch.float32, device=call.bag.device)
    statistics = part.new_empty((3, slots.chunk, n_rows))
    return part, (statistics[0], statistics[1], statistics[2])


def _call(
    rows, bag, bias, starts, lengths, total, max_length, scale, normalize, eps, mean, rstd, p, seed
) -> _Call:
    return _Call(
        bag=bag,
        bias=bias,
        mean=mean if normalize else None,
        rstd=rstd if normalize else None,
        seed=seed if p > 0 else None,
        starts=starts,
        lengths=lengths,
        total=total,
        max_length=max_length,
        shape=tuple(rows.shape),
        scale=scale,
        normalize=normalize,
        eps=eps,
        # as survfuse/reference/dropout.py; p = 1 drops all: no weight is left to scale
        threshold=min(round(p * 2**32), 2**32 - 1),
        keep_scale=1.0 / (1.0 - p) if p < 1 else 0.0,
        stride_unit=math.gcd(bag.stride(0), 16),
    )


def _precision() -> str:
    """How fp32 products are formed: exactly, unless torch's own switch allows TF32."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
