"""Pool a ragged bag by gated attention in Triton: the launchers.

Contract: survfuse/ops/gated_attention_pool.py.  Oracle: survfuse/reference/gated_attention_pool.py.
Math: docs/math.md, "Gated attention pooling".  Layout, traffic and registers: docs/kernels.md.
The scores come from gated_attention_pool_hidden.py; pooling and merging are those of pool_bag's
wide route, over K pools in place of R query rows.

No autograd, no validation and no host synchronisation: all cuts come from host integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Gate, GatedBag, GatedNeeds, PooledBag, Pooling

from . import gated_attention_pool_shapes as shapes
from . import pool_bag_passes as passes
from . import pool_bag_shapes
from .gated_attention_pool_hidden import gated_scores_kernel
from .gated_attention_pool_passes import Gradients, as_multiplied, constants, row_inputs
from .pool_bag_call import make_call


def gated_attention_pool_forward(
    bag: Tensor, gate: Gate, bias: Tensor | None, pooling: Pooling
) -> GatedBag:
    """Gated attention pooling: pooled [B, K, D] and lse [B, K], fp32.

    Cost: three launches per chunk, and one chunk unless K is large. The scores read each row from
    memory once and out of the caches for every further block of hidden units; the product reads it
    once more, out of L2 where the chunk fits. 4 D L + 2 D K operations per row.
    """
    n_bags, n_pools = pooling.starts.shape[0], gate.w_score.shape[0]
    pooled = torch.empty((n_bags, n_pools, bag.shape[1]), dtype=torch.float32, device=bag.device)
    if pooling.total == 0 or n_bags == 0:
        return GatedBag(pooled.zero_(), pooled.new_full((n_bags, n_pools), -torch.inf))
    call = make_call(pooled, bag, bias, pooling)
    weights = as_multiplied(gate, bag)
    n_hidden = gate.w_tanh.shape[0]
    scores = shapes.hidden_shape(call.problem, call.limits, n_hidden)
    product = pool_bag_shapes.product_shape(call.problem, call.limits)
    tile, stride = scores["BLOCK_T"], -(-n_pools // 16) * 16
    programs = -(-n_pools // product["BLOCK_R"]) * -(-bag.shape[1] // product["BLOCK_D"])
    row_bytes = stride * bag.element_size() + 4 + 16 * n_pools // tile
    slots = call.plan(tile, programs=programs, row_bytes=row_bytes)
    part, statistics = passes._partials(call, slots)
    n_scratch = slots.chunk * slots.rows
    coef = torch.empty((n_scratch, stride), dtype=bag.dtype, device=bag.device)
    ref, total, kept = passes._planes(part, 3, n_scratch // tile * n_pools)
    state = passes.State(pooled, call)
    for first in range(0, slots.count, slots.chunk):
        chunk = min(slots.chunk, slots.count - first)
        gated_scores_kernel[(chunk * (slots.rows // tile),)](
            *weights,
            *row_inputs(call),
            coef,
            ref,
            total,
            kept,
            n_bags,
            bag.shape[0],
            n_pools,
            first,
            slots.rows,
            call.threshold,
            call.row_stride,
            stride,
            **constants(call, n_hidden),
            **scores,
        )
        passes.pool_bag_product_kernel[(chunk * programs,)](
            bag,
            call.bias,
            call.starts,
            call.lengths,
            coef,
            part,  # means of the rows: not normalised, never read
            ref,
            ref,
            total,
            kept,
            part,
            *statistics,
            n_bags,
            bag.shape[0],
            n_pools,
            first,
            slots.rows,
            call.scale,
            call.row_stride,
            stride,
            **call.constants,
            BLOCK_T=tile,
            **product,
        )
        state.merge(part, statistics, first, chunk, slots.rows)
    return GatedBag(*state.results[:2])


def gated_attention_pool_backward(
    d_results: GatedBag,
    results: GatedBag,
    bag: Tensor,
    gate: Gate,
    bias: Tensor | None,
    pooling: Pooling,
    needs: GatedNeeds,
) -> tuple[Tensor | None, ...]:
    """The gradients of the bag, of the six parameters and of the bias; None where not needed.

    Cost: the hidden layer of a chunk of rows is computed again and its gradient kept in the
    workspace, under max(16 MB, 1 % of the batch's bytes) together with the splits of the weights'
    gradients. 8 D L + 2 D K operations per row of a bag; for a trained bag (or bias) 12 D L per
    stored row, and 4 D K per row of a bag. No atomics: every sum has a fixed order.
    """
    sums = Gradients(bag, gate, needs)
    if pooling.total > 0 and pooling.starts.shape[0] > 0:
        call = make_call(results.pooled, bag, bias, pooling)
        nothing = torch.zeros_like(results.lse)
        # rounds d_pooled and forms delta; the query rows it also rounds are not used
        _, dz, per_row = passes.prepare(
            call, results.pooled, PooledBag(*results, nothing), PooledBag(*d_results, nothing)
        )
        sums.run(call, dz, per_row)
    d_b_score = None
    if needs.b_score:
        # the gradients of a pool's logits sum to that of its lse
        d_b_score = torch.where(results.lse == -torch.inf, 0.0, d_results.lse).sum(0)
    *gradients, d_bias = sums.results()
    return *gradients, d_b_score, d_bias
