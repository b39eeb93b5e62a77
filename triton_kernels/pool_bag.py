"""Pool a ragged bag by softmax attention in Triton: the launchers.

Contract: survfuse/ops/pool_bag.py.  Oracle: survfuse/reference/pool_bag.py.  Math: docs/math.md,
"Pooling".  Layout, traffic and registers: docs/kernels.md.  Two routes, chosen by pool_bag_shapes:
pool_bag_narrow.py reads each row once, pool_bag_wide.py keeps coefficients and reads more often;
pool_bag_merge.py joins their slots and pool_bag_trained.py gives the gradients of stored rows.

No autograd, no validation and no host synchronisation: split plans come from `total`, `max_length`
and the number of processors. Every reduction has a fixed order, so results repeat to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Needs, PooledBag, Pooling

from . import pool_bag_shapes as shapes
from .pool_bag_call import make_call
from .pool_bag_passes import (
    backward_rows,
    backward_stored,
    forward_narrow,
    forward_wide,
    prepare,
)


def pool_bag_forward(rows: Tensor, bag: Tensor, bias: Tensor | None, pooling: Pooling) -> PooledBag:
    """Softmax pooling: z_r = sum_i softmax_i(scale * a_r . x_i + bias_i) x_i.

    Args:
        rows: [B, R, D] fp32, or the type of the bag; any strides with a unit last one, as the bag.
        bag: [T, D] fp32, bf16 or fp16. Rows in no bag and rows with bias -inf are never read.
        bias: [T], or None.
        pooling: the rest; ranges are clamped to the stored rows, statistics are fp32.

    Returns:
        pooled [B, R, D], lse [B, R] and weight_sum [B, R], fp32.

    Cost: narrow route (D <= 1024, R <= 32): each stored row is read once for R <= 16 and twice
    beyond, by neighbouring programs, so once from memory and once out of L2. Where 16 query rows
    would spill (D > 512 under normalisation and dropout in fp32; docs/kernels.md lists all such
    cases) a program takes 8, and the route serves R <= 16. Wide route: cdiv(R, 128) reads for the
    scores and as many for the product (64 instead of 128 in fp32), neighbours again sharing L2,
    plus R coefficients in the type of the bag, written once and read cdiv(D, 128) times.
    4 * R * D operations per row. Workspace: under max(16 MB, 1 % of the batch's bytes) for R * D up
    to 512 x 4608. fp16 with eps below 1e-9 can overflow on rows without spread.
    """
    n_bags, n_rows, width = rows.shape
    pooled = torch.empty((n_bags, n_rows, width), dtype=torch.float32, device=bag.device)
    if pooling.total == 0 or pooled.numel() == 0:
        lse = pooled.new_full((n_bags, n_rows), -torch.inf)
        return PooledBag(pooled.zero_(), lse, torch.zeros_like(lse))
    call = make_call(rows, bag, bias, pooling)
    shape = shapes.narrow_shape(call.problem, call.limits, backward=False)
    if shape is None:
        return forward_wide(call, rows, pooled)
    return forward_narrow(call, shape, rows, pooled)


def pool_bag_backward(
    d_results: PooledBag,
    results: PooledBag,
    rows: Tensor,
    bag: Tensor,
    bias: Tensor | None,
    pooling: Pooling,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `pool_bag_forward`, with the weights recomputed from `lse`.

    Args:
        d_results: gradients of the three results, fp32.
        results: the three results.
        rows, bag, bias, pooling: as given to the forward.
        needs: which gradients to compute; the others are None.

    Returns:
        d_rows [B, R, D] fp32; d_bag [T, D] in the type of the bag; d_bias [T] fp32. Rows in no bag
        have gradient 0; where bags overlap theirs are summed in ascending order.

    Cost: d_rows reads the bag as often as the forward does (8 query rows per program at D > 512 in
    fp32). d_bag and d_bias read each row cdiv(D, 256) times (128 in fp32) per bag that holds it and
    block of 64 query rows (32 in fp32; one of 16 for R <= 16), out of L1 and L2 but for the first,
    once more for the normalisation, and write once. 6 * R * D operations per row for d_rows,
    (4 * cdiv(D, 256) + 4) * R * D for d_bag.
    """
    n_bags, n_rows, width = rows.shape
    d_rows = d_bag = d_bias = None
    if needs.rows:
        d_rows = torch.empty((n_bags, n_rows, width), dtype=torch.float32, device=bag.device)
    if needs.bag:
        d_bag = torch.empty(bag.shape, dtype=bag.dtype, device=bag.device)
    if needs.bias:
        d_bias = torch.empty(bag.shape[:1], dtype=torch.float32, device=bag.device)
    gradients = (d_rows, d_bag, d_bias)
    if pooling.total == 0 or rows.numel() == 0:
        return tuple(None if g is None else g.zero_() for g in gradients)
    call = make_call(rows, bag, bias, pooling)
    a, dz, per_row = prepare(call, rows, results, d_results)
    if d_rows is not None:
        backward_rows(call, a, dz, per_row, results.pooled, d_results.lse, d_rows)
    if d_bag is not None or d_bias is not None:
        backward_stored(call, a, dz, per_row, d_bag, d_bias)
    return gradients
