"""`pool_weights` in plain torch over tiles of the bag: R x N weights, or their means, streamed.

Contract: survfuse/ops/pool_weights.py.  Oracle: survfuse/reference/pool_bag.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Pooling, accumulation_type
from survfuse.tiled.pool_bag import (
    add_rows,
    included,
    normalize_gradient,
    read_tile,
    tile_logits,
)
from survfuse.tiled.tiles import Tile, operand_type, product, tiles


def pool_weights_forward(
    rows: Tensor, bag: Tensor, lse: Tensor, bias: Tensor | None, pooling: Pooling, group: int
) -> Tensor:
    """[total, R / group] of the accumulation type: means over `group` neighbouring rows."""
    kind = accumulation_type(bag.dtype)
    n_out = rows.shape[1] // group
    # one row more, where lockstep tiles put what lies behind a bag's end
    out = bag.new_zeros((pooling.total + 1, n_out), dtype=kind)
    for tile_group in tiles(pooling.ragged, bag):
        for tile in tile_group:
            a = rows[tile.bags].to(operand_type(bag, centred=pooling.normalize))
            x, row_bias, _ = read_tile(tile, bag, bias, pooling)
            weights = _softmax(tile_logits(a, x, row_bias, pooling.scale), lse[tile.bags])
            weights = weights.unflatten(1, (n_out, group)).mean(2).mT
            if isinstance(tile.packed, slice):
                out[tile.packed] = weights[0]
            else:
                out[torch.where(tile.valid, tile.packed, pooling.total)] = weights
    return out[: pooling.total]


def pool_weights_backward(
    d_weights: Tensor,
    rows: Tensor,
    bag: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    pooling: Pooling,
    group: int,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_rows, d_bag, d_lse, d_bias; None where not needed."""
    needs_rows, needs_bag, needs_lse, needs_bias = needs
    kind = accumulation_type(bag.dtype)
    d_rows = torch.zeros(rows.shape, dtype=kind, device=bag.device) if needs_rows else None
    d_bag = torch.zeros(bag.shape, dtype=kind, device=bag.device) if needs_bag else None
    d_lse = torch.zeros_like(lse) if needs_lse else None
    d_bias = bag.new_zeros(bag.shape[0], dtype=kind) if needs_bias else None
    for tile_group in tiles(pooling.ragged, bag):
        for tile in tile_group:
            a = rows[tile.bags].to(operand_type(bag, centred=pooling.normalize))
            x, row_bias, row_rstd = read_tile(tile, bag, bias, pooling)
            weights = _softmax(tile_logits(a, x, row_bias, pooling.scale), lse[tile.bags])
            # by selection: where a weight is 0, its gradient may be infinite
            d_logits = torch.where(weights == 0, 0.0, weights * _spread(d_weights, tile, group))
            if d_lse is not None:
                d_lse[tile.bags] -= d_logits.sum(-1)
            if d_rows is not None:
                d_rows[tile.bags] += product((d_logits * pooling.scale).to(x.dtype), x)
            if d_bias is not None:
                add_rows(d_bias, tile, d_logits.sum(-2))
            if d_bag is not None:
                d_x = product((d_logits * pooling.scale).to(x.dtype).mT, a)
                if pooling.normalize:
                    d_x = normalize_gradient(d_x, x.to(kind), row_rstd)
                add_rows(d_bag, tile, included(d_x, row_bias))
    return d_rows, None if d_bag is None else d_bag.to(bag.dtype), d_lse, d_bias


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where either is -inf."""
    excluded = (logits == -torch.inf) | (lse == -torch.inf)[..., None]
    return torch.where(excluded, 0.0, torch.exp(logits - lse[..., None]))


def _spread(d_weights: Tensor, tile: Tile, group: int) -> Tensor:
    """The gradient of each row's weight [B, R, n] from that of the means [total, R / group]."""
    if isinstance(tile.packed, slice):
        part = d_weights[tile.packed][None]
    else:
        # an empty bag at the end has its first row behind the last one
        part = d_weights[tile.packed.clamp(max=d_weights.shape[0] - 1)]
    return part.mT.repeat_interleave(group, 1) / group
