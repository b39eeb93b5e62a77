"""`spread_tokens` in plain torch over tiles of the bag.

Contract: survfuse/ops/spread_tokens.py.  Oracle: survfuse/reference/spread_tokens.py.
Math: docs/math.md, "Spreading tokens over a bag".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.attention import Attended
from survfuse.pooling import Pooling, SpreadNeeds, accumulation_type
from survfuse.tiled.cross_attention import (
    by_row,
    dropped,
    multiply,
    packed_rows,
    read_packed,
    without_rounding_of_lse,
)
from survfuse.tiled.pool_bag import add_rows, normalize_gradient, read_tile
from survfuse.tiled.tiles import Tile, operand_type, product, tiles

# logits of a tile: they should stay in the cache beside its rows
_TILE_LOGITS = 1 << 20


def spread_tokens_forward(
    keys: Tensor, values: Tensor, bag: Tensor, key_bias: Tensor | None, pooling: Pooling
) -> Attended:
    """Out in the type of the values, lse in that of accumulation."""
    kind = accumulation_type(bag.dtype)
    operand = operand_type(bag, centred=pooling.normalize)
    heads, value_dim = keys.shape[1], values.shape[3]
    # one row more, where lockstep tiles put what lies behind a bag's end
    out = values.new_zeros((pooling.total + 1, heads, value_dim))
    lse = bag.new_full((pooling.total + 1, heads), -torch.inf, dtype=kind)
    mask = (keys.shape[0], pooling.seed, pooling.dropout_p)
    for group in _tiles(keys, bag, pooling):
        for tile in group:
            x, _, _ = read_tile(tile, bag, None, pooling)
            logits = _logits(tile, x, keys, key_bias, pooling.scale)
            top = _amax(logits)
            shift = torch.where(top == -torch.inf, 0.0, top)
            weights = torch.exp(logits - shift[..., None])
            total = weights.sum(-1)
            empty = total == 0
            safe = torch.where(empty, 1.0, total)
            weights = dropped(weights, tile, 0, *mask)
            z = multiply(weights.to(operand), values[tile.bags].to(operand)) / safe[..., None]
            rows = packed_rows(tile, pooling.total)
            out[rows] = by_row(torch.where(empty[..., None], 0.0, z), rows).to(out.dtype)
            infinite = torch.where(top == torch.inf, top, shift + safe.log())
            lse[rows] = by_row(torch.where(empty, -torch.inf, infinite), rows)
    return Attended(out[: pooling.total], lse[: pooling.total])


def spread_tokens_backward(
    d_results: Attended,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    bag: Tensor,
    key_bias: Tensor | None,
    pooling: Pooling,
    needs: SpreadNeeds,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_keys, d_values, d_bag [T, D], d_key_bias; None where not needed."""
    kind = accumulation_type(bag.dtype)
    operand = operand_type(bag, centred=pooling.normalize)
    d_keys, d_values, d_bag, d_bias = (
        torch.zeros(like.shape, dtype=kind, device=bag.device) if need else None
        for like, need in zip((keys, values, bag, key_bias), needs, strict=True)
    )
    mask = (keys.shape[0], pooling.seed, pooling.dropout_p)
    for group in _tiles(keys, bag, pooling):
        for tile in group:
            x, _, row_rstd = read_tile(tile, bag, None, pooling)
            logits = _logits(tile, x, keys, key_bias, pooling.scale)
            row_lse = read_packed(tile, lse[..., None])
            excluded = (logits == -torch.inf) | (row_lse == -torch.inf)
            softmax = torch.where(excluded, 0.0, torch.exp(logits - row_lse))
            softmax = without_rounding_of_lse(softmax)
            weights = dropped(softmax, tile, 0, *mask)
            dz = read_packed(tile, d_results.out).to(operand)
            d_weights = multiply(dz, values[tile.bags].to(operand).mT)
            # of these very numbers, so that what is common to all values cancels
            mean = (weights * d_weights).sum(-1, keepdim=True)
            d_lse = read_packed(tile, d_results.lse[..., None])
            d_logits = weights * d_weights - softmax * mean + softmax * d_lse
            d_logits = _inside(tile, torch.where(excluded, 0.0, d_logits))
            if d_values is not None:
                d_values[tile.bags] += multiply(_inside(tile, weights).to(operand).mT, dz)
            if d_bias is not None:
                d_bias[tile.bags] += d_logits.sum(2)
            # [B, H * Lk, n]
            d_scores = (d_logits * pooling.scale).to(operand).mT.flatten(1, 2)
            if d_keys is not None:
                d_keys[tile.bags] += product(d_scores, x).unflatten(1, keys.shape[1:3])
            if d_bag is not None:
                d_x = product(d_scores.mT, keys[tile.bags].flatten(1, 2).to(operand))
                if pooling.normalize:
                    d_x = normalize_gradient(d_x, x.to(kind), row_rstd)
                add_rows(d_bag, tile, d_x)
    return d_keys, d_values, None if d_bag is None else d_bag.to(bag.dtype), d_bias


def _tiles(keys: Tensor, bag: Tensor, pooling: Pooling):
    n_keys = keys.shape[1] * keys.shape[2]
    n_bags = 1 if bag.device.type == "cpu" else max(1, keys.shape[0])
    return tiles(pooling.ragged, bag, max_rows=max(16, _TILE_LOGITS // max(1, n_keys * n_bags)))


def _logits(tile: Tile, x: Tensor, keys: Tensor, key_bias: Tensor | None, scale: float) -> Tensor:
    """[B, H, n, Lk] of the accumulation type."""
    k = keys[tile.bags].to(x.dtype)
    logits = (product(x, k.flatten(1, 2).mT) * scale).unflatten(2, k.shape[1:3]).transpose(1, 2)
    return logits if key_bias is None else logits + key_bias[tile.bags][:, :, None]


def _amax(logits: Tensor) -> Tensor:
    """The largest logit of each row; -inf where there are no keys."""
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:-1], -torch.inf)
    return logits.amax(-1)


def _inside(tile: Tile, values: Tensor) -> Tensor:
    """Values [B, H, n, Lk], zero for rows behind a bag's end."""
    if tile.valid is None:
        return values
    return torch.where(tile.valid[:, None, :, None], values, 0.0)
