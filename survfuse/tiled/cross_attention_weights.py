"""`cross_attention_weights` in plain torch over tiles of queries and keys.

Contract: survfuse/ops/cross_attention_weights.py.  Oracle: survfuse/reference/cross_attention.py.
Math: docs/math.md, "Weights".
Layout: by "key" [key_total, query_max, H], by "query" [query_total, H, key_max], or "mean"
[key_total], the mean over a bag's queries and heads. The mean over heads alone leaves H = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.attention import Attention
from survfuse.pooling import accumulation_type
from survfuse.tiled.cross_attention import (
    included,
    multiply,
    packed_rows,
    read_keys,
    read_queries,
    score,
    tile_pairs,
)
from survfuse.tiled.pool_bag import add_rows
from survfuse.tiled.tiles import Tile

# from [B, H, queries, keys] to the order of the result, and back
_ORDER = {"key": (0, 3, 2, 1), "query": (0, 2, 1, 3)}


def cross_attention_weights_forward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    attention: Attention,
    layout: str,
    mean_heads: bool,
) -> Tensor:
    """Of the accumulation type."""
    shape = result_shape(query.shape[1], attention, layout, mean_heads)
    # one row more, where lockstep tiles put what lies behind a bag's end
    out = key.new_zeros((shape[0] + 1, *shape[1:]), dtype=accumulation_type(key.dtype))
    for query_tile, key_tiles in tile_pairs(query, key, attention):
        q, row_lse = read_queries(query_tile, query, key), _read_lse(query_tile, lse)
        for tile in key_tiles:
            weights = _softmax(score(tile, q, key, None, bias, attention.scale)[0], row_lse)
            index = _place(query_tile, tile, weights, attention, layout)
            if layout == "mean":
                part = (weights * _share(query_tile, attention, weights)).sum((1, 2))
                out[index] += part[0] if isinstance(index[0], slice) else part
                continue
            weights = weights.mean(1, keepdim=True) if mean_heads else weights
            part = weights.permute(_ORDER[layout])
            out[index] = part[0] if isinstance(index[0], slice) else part
    return out[:-1]


def cross_attention_weights_backward(
    d_weights: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    attention: Attention,
    layout: str,
    mean_heads: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_query, d_key, d_lse [query_total, H], d_bias [Tk]; None where not needed."""
    kind = accumulation_type(key.dtype)
    d_query, d_key, d_lse, d_bias = (
        torch.zeros((like.shape[0] + 1, *like.shape[1:]), dtype=kind, device=key.device)
        if need
        else None
        for like, need in zip((query, key, lse, bias), needs, strict=True)
    )
    for query_tile, key_tiles in tile_pairs(query, key, attention):
        q, row_lse = read_queries(query_tile, query, key), _read_lse(query_tile, lse)
        d_q = torch.zeros(q.shape, dtype=kind, device=key.device)
        logit_sum = torch.zeros(q.shape[:3], dtype=kind, device=key.device)
        for tile in key_tiles:
            weights = _softmax(score(tile, q, key, None, bias, attention.scale)[0], row_lse)
            index = _place(query_tile, tile, weights, attention, layout)
            d_each = _read_gradient(d_weights, index, layout)
            if layout == "mean":
                d_each = d_each * _share(query_tile, attention, weights)
            elif mean_heads:
                d_each = d_each / weights.shape[1]
            # by selection: where a weight is 0, its gradient may be infinite
            d_logits = torch.where(weights == 0, 0.0, weights * d_each)
            logit_sum += d_logits.sum(-1)
            d_scores = (d_logits * attention.scale).to(q.dtype)
            if d_query is not None:
                d_q += multiply(d_scores, read_keys(tile, key, bias)[0])
            if d_key is not None:
                d_k = multiply(d_scores.mT, q).transpose(1, 2)
                add_rows(d_key, tile, included(d_k, tile, bias))
            if d_bias is not None:
                add_rows(d_bias, tile, d_logits.sum((1, 2)))
        if d_query is not None:
            add_rows(d_query, query_tile, d_q.transpose(1, 2))
        if d_lse is not None:
            rows = packed_rows(query_tile, attention.query_total)
            part = -logit_sum.transpose(1, 2)
            d_lse[rows] = part[0] if isinstance(rows, slice) else part
    gradients = (d_query, d_key, d_lse, d_bias)
    return tuple(None if gradient is None else gradient[:-1] for gradient in gradients)


def result_shape(
    heads: int, attention: Attention, layout: str, mean_heads: bool
) -> tuple[int, ...]:
    """The shape of the weights in one of the layouts."""
    heads = 1 if mean_heads else heads
    if layout == "mean":
        return (attention.key_total,)
    if layout == "key":
        return attention.key_total, attention.query_max, heads
    return attention.query_total, heads, attention.key_max


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 where either is -inf; lse [B, H, n, 1]."""
    excluded = (logits == -torch.inf) | (lse == -torch.inf)
    return torch.where(excluded, 0.0, torch.exp(logits - lse))


def _read_lse(tile: Tile, lse: Tensor) -> Tensor:
    """[B, H, n, 1], -inf behind a bag's end, where it makes every weight 0."""
    if isinstance(tile.packed, slice):
        return lse[tile.packed].T[None, ..., None]
    # an empty bag at the end has its first row behind the last one
    rows = lse[tile.packed.clamp(max=lse.shape[0] - 1)].transpose(1, 2)
    return torch.where(tile.valid[:, None], rows, -torch.inf)[..., None]


def _place(
    query_tile: Tile, tile: Tile, weights: Tensor, attention: Attention, layout: str
) -> tuple[slice | Tensor, ...]:
    """Where the weights [B, H, n, k] of two tiles stand in the result."""
    n, k = weights.shape[2:]
    if layout == "query":
        rows = packed_rows(query_tile, attention.query_total)
        return rows, slice(None), slice(tile.position, tile.position + k)
    rows = packed_rows(tile, attention.key_total)
    if layout == "mean":
        return (rows,)
    return rows, slice(query_tile.position, query_tile.position + n)


def _share(query_tile: Tile, attention: Attention, weights: Tensor) -> Tensor:
    """[B, 1, 1, 1]: what one query and head counts in the mean over all of its bag."""
    rows = attention.query_lengths[query_tile.bags].double() * weights.shape[1]
    return (1.0 / rows.clamp(min=1.0)).to(weights.dtype)[:, None, None, None]


def _read_gradient(d_weights: Tensor, index: tuple[slice | Tensor, ...], layout: str) -> Tensor:
    """The part of d_weights at `index` as [B, H, n, k], with 1 for what a mean has taken away."""
    if isinstance(index[0], slice):
        part = d_weights[index][None]
    else:
        # rows behind a bag's end have weight 0, whatever is read for them
        part = d_weights[(index[0].clamp(max=d_weights.shape[0] - 1), *index[1:])]
    return part[:, None, None, :] if layout == "mean" else part.permute(_ORDER[layout])
