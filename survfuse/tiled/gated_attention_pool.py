"""`gated_attention_pool` in plain torch over tiles of the bag.

Contract: survfuse/ops/gated_attention_pool.py.  Oracle: survfuse/reference/gated_attention_pool.py.
Math: docs/math.md, "Gated attention pooling".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Gate, GatedBag, GatedNeeds, Pooling
from survfuse.tiled.gated_hidden import GatedGradients, GatedTiles
from survfuse.tiled.pool_bag import tile_keep_mask
from survfuse.tiled.tiles import Tile, product, tiles


def gated_attention_pool_forward(
    bag: Tensor, gate: Gate, bias: Tensor | None, pooling: Pooling
) -> GatedBag:
    """Results of the accumulation type."""
    call = GatedTiles(bag, gate, bias, pooling)
    n_bags, n_pools = pooling.starts.shape[0], gate.w_score.shape[0]
    pooled = bag.new_zeros((n_bags, n_pools, bag.shape[1]), dtype=call.kind)
    lse = bag.new_full((n_bags, n_pools), -torch.inf, dtype=call.kind)
    for group in tiles(pooling.ragged, bag):
        if group:
            bags = group[0].bags
            _pool_group(call, group, pooled[bags], lse[bags])
    return GatedBag(pooled, lse)


def _pool_group(call: GatedTiles, group: list[Tile], pooled: Tensor, lse: Tensor) -> None:
    """Fill pooled and lse, zeros and -inf so far, for the bags of one group of tiles."""
    top, total = torch.full_like(lse, -torch.inf), torch.zeros_like(lse)
    z = torch.zeros_like(pooled)
    for tile in group:
        rows = call.rows(tile)
        logits = call.logits(rows, call.hidden(rows))
        new_top = torch.maximum(top, logits.amax(-1))
        # where nothing is included so far, subtract 0 and not -inf
        shift = torch.where(new_top == -torch.inf, 0.0, new_top)
        factor = torch.exp(top - shift)
        weights = torch.exp(logits - shift[..., None])
        total = total * factor + weights.sum(-1)
        weights = _drop(call, tile, weights)
        z = z * factor[..., None] + product(weights.to(rows.wide.dtype), rows.wide)
        top = new_top
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    pooled.copy_(torch.where(empty[..., None], 0.0, z / safe[..., None]))
    infinite = torch.where(top == torch.inf, top, top + safe.log())
    lse.copy_(torch.where(empty, -torch.inf, infinite))


def _drop(call: GatedTiles, tile: Tile, weights: Tensor) -> Tensor:
    """Weights [B, K, n] after dropout."""
    pooling = call.pooling
    if pooling.seed is None:
        return weights
    keep = tile_keep_mask(tile, pooling, *weights.shape[1:])
    return torch.where(keep, weights / (1.0 - pooling.dropout_p), 0.0)


def gated_attention_pool_backward(
    d_results: GatedBag,
    results: GatedBag,
    bag: Tensor,
    gate: Gate,
    bias: Tensor | None,
    pooling: Pooling,
    needs: GatedNeeds,
) -> tuple[Tensor | None, ...]:
    """The gradients of the bag, of the six parameters and of the bias; None where not needed."""
    call = GatedTiles(bag, gate, bias, pooling)
    sums = GatedGradients(call, gate, needs)
    # rounded as in the products below: the two must cancel
    rounded = d_results.pooled.to(call.pooled_as).to(call.kind)
    delta = (rounded * results.pooled).sum(-1) - d_results.lse
    for group in tiles(pooling.ragged, bag):
        for tile in group:
            rows = call.rows(tile)
            hidden = call.hidden(rows)
            logits, lse = call.logits(rows, hidden), results.lse[tile.bags]
            excluded = (logits == -torch.inf) | (lse == -torch.inf)[..., None]
            softmax = torch.where(excluded, 0.0, torch.exp(logits - lse[..., None]))
            weights = _drop(call, tile, softmax)
            d_pooled = d_results.pooled[tile.bags]
            d_weights = product(d_pooled.to(rows.wide.dtype), rows.wide.mT)
            d_logits = weights * d_weights - softmax * delta[tile.bags][..., None]
            d_logits = torch.where(excluded, 0.0, d_logits)
            sums.add(tile, rows, hidden, d_logits, weights, d_pooled)
    *gradients, d_bias = sums.results()
    d_b_score = None
    if needs.b_score:
        # the gradients of a pool's logits sum to that of its lse
        d_b_score = torch.where(results.lse == -torch.inf, 0.0, d_results.lse).sum(0)
    return *gradients, d_b_score, d_bias
