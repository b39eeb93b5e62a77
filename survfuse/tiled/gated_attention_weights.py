"""`gated_attention_weights` in plain torch over tiles of the bag: N x K weights, streamed.

Contract: survfuse/ops/gated_attention_weights.py.
Oracle: survfuse/reference/gated_attention_pool.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Gate, GatedNeeds, Pooling
from survfuse.tiled.gated_hidden import GatedGradients, GatedTiles
from survfuse.tiled.pool_weights import _softmax, _spread
from survfuse.tiled.tiles import tiles


def gated_attention_weights_forward(
    bag: Tensor, gate: Gate, bias: Tensor | None, lse: Tensor, pooling: Pooling, group: int
) -> Tensor:
    """[total, K / group] of the accumulation type: means over `group` neighbouring pools."""
    call = GatedTiles(bag, gate, bias, pooling)
    n_out = gate.w_score.shape[0] // group
    # one row more, where lockstep tiles put what lies behind a bag's end
    out = bag.new_zeros((pooling.total + 1, n_out), dtype=call.kind)
    for tile_group in tiles(pooling.ragged, bag):
        for tile in tile_group:
            rows = call.rows(tile)
            weights = _softmax(call.logits(rows, call.hidden(rows)), lse[tile.bags])
            weights = weights.unflatten(1, (n_out, group)).mean(2).mT
            if isinstance(tile.packed, slice):
                out[tile.packed] = weights[0]
            else:
                out[torch.where(tile.valid, tile.packed, pooling.total)] = weights
    return out[: pooling.total]


def gated_attention_weights_backward(
    d_weights: Tensor,
    bag: Tensor,
    gate: Gate,
    bias: Tensor | None,
    lse: Tensor,
    pooling: Pooling,
    group: int,
    needs: GatedNeeds,
    needs_lse: bool,
) -> tuple[Tensor | None, ...]:
    """The gradients of the bag, the six parameters, the bias and lse; None where not needed."""
    call = GatedTiles(bag, gate, bias, pooling)
    sums = GatedGradients(call, gate, needs)
    d_logit_sum = torch.zeros_like(lse, dtype=call.kind)
    for tile_group in tiles(pooling.ragged, bag):
        for tile in tile_group:
            rows = call.rows(tile)
            hidden = call.hidden(rows)
            weights = _softmax(call.logits(rows, hidden), lse[tile.bags])
            # by selection: where a weight is 0, its gradient may be infinite
            d_logits = torch.where(weights == 0, 0.0, weights * _spread(d_weights, tile, group))
            d_logit_sum[tile.bags] += d_logits.sum(-1)
            sums.add(tile, rows, hidden, d_logits)
    *gradients, d_bias = sums.results()
    d_b_score = d_logit_sum.sum(0) if needs.b_score else None
    return *gradients, d_b_score, d_bias, -d_logit_sum if needs_lse else None
