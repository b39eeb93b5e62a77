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

from . import pool_bag_passes as passes
from .gated_attention_pool_passes import Gradients, as_multiplied, pool
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
    return pool(make_call(pooled, bag, bias, pooling), as_multiplied(gate, bag), pooled)


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
