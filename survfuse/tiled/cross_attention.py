"""`cross_attention` in plain torch over tiles of queries and keys.

Contract: survfuse/ops/cross_attention.py.  Oracle: survfuse/reference/cross_attention.py.
Math: docs/math.md, "Attention with keys given".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from survfuse.attention import Attended, Attention, AttentionNeeds
from survfuse.pooling import accumulation_type
from survfuse.reference.dropout import keep_mask
from survfuse.tiled.pool_bag import add_rows
from survfuse.tiled.tiles import Tile, operand_type, product, tiles

# weights of a tile of queries and a tile of keys, over all heads: they should stay in the cache
_TILE_PAIRS = 1 << 20


def cross_attention_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, attention: Attention
) -> Attended:
    """Results of the accumulation type."""
    kind = accumulation_type(key.dtype)
    heads, value_dim = value.shape[1:]
    # one row more, where lockstep tiles put what lies behind a bag's end
    n_out = attention.query_total + 1
    out = key.new_zeros((n_out, heads, value_dim), dtype=kind)
    lse = key.new_full((n_out, heads), -torch.inf, dtype=kind)
    mask = (attention.key_lengths.shape[0], attention.seed, attention.dropout_p)
    for query_tile, key_tiles in tile_pairs(query, key, attention):
        q = read_queries(query_tile, query, key)
        top = q.new_full(q.shape[:3], -torch.inf, dtype=kind)  # [B, H, n]
        total_weight = torch.zeros_like(top)
        z = q.new_zeros((*q.shape[:3], value_dim), dtype=kind)
        for tile in key_tiles:
            logits, v = score(tile, q, key, value, bias, attention.scale)
            new_top = torch.maximum(top, logits.amax(-1))
            # where nothing is included so far, subtract 0 and not -inf
            shift = torch.where(new_top == -torch.inf, 0.0, new_top)
            factor = torch.exp(top - shift)
            weights = torch.exp(logits - shift[..., None])
            total_weight = total_weight * factor + weights.sum(-1)
            weights = dropped(weights, query_tile, tile.position, *mask)
            z = z * factor[..., None] + multiply(weights.to(v.dtype), v)
            top = new_top
        empty = total_weight == 0
        safe = torch.where(empty, 1.0, total_weight)
        rows = packed_rows(query_tile, attention.query_total)
        z = torch.where(empty[..., None], 0.0, z / safe[..., None])
        infinite = torch.where(top == torch.inf, top, top + safe.log())
        out[rows] = by_row(z, rows)
        lse[rows] = by_row(torch.where(empty, -torch.inf, infinite), rows)
    return Attended(out[: attention.query_total], lse[: attention.query_total])


def cross_attention_backward(
    d_results: Attended,
    results: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    attention: Attention,
    needs: AttentionNeeds,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """d_query, d_key, d_value of the shapes of their inputs and d_bias [Tk]; None where unneeded.

    Of the accumulation type: sums of overlapping bags are rounded once.
    """
    kind = accumulation_type(key.dtype)
    operand = operand_type(key, centred=False)
    d_query, d_key, d_value, d_bias = (
        torch.zeros(like.shape, dtype=kind, device=key.device) if need else None
        for like, need in zip((query, key, value, bias), needs, strict=True)
    )
    # rounded as in the products below: the two must cancel
    d_out = d_results.out.to(operand)
    mean_gradients = mean_gradient(d_out, results.out)[..., None]
    mask = (attention.key_lengths.shape[0], attention.seed, attention.dropout_p)
    for query_tile, key_tiles in tile_pairs(query, key, attention):
        q = read_queries(query_tile, query, key)
        dz, mean = (read_packed(query_tile, tensor) for tensor in (d_out, mean_gradients))
        lse, d_lse = (read_packed(query_tile, t[..., None]) for t in (results.lse, d_results.lse))
        d_q = torch.zeros(q.shape, dtype=kind, device=key.device)
        for tile in key_tiles:
            logits, v = score(tile, q, key, value, bias, attention.scale)
            excluded = (logits == -torch.inf) | (lse == -torch.inf)
            softmax = torch.where(excluded, 0.0, torch.exp(logits - lse))
            d_weights = multiply(dz, v.mT)
            if len(key_tiles) == 1:
                softmax = without_rounding_of_lse(softmax)
            weights = dropped(softmax, query_tile, tile.position, *mask)
            if len(key_tiles) == 1:
                # the mean of these very numbers: with few keys little but its rounding may be left
                mean = (weights * d_weights).sum(-1, keepdim=True)
            d_logits = weights * d_weights - softmax * mean + softmax * d_lse
            d_logits = torch.where(excluded, 0.0, d_logits)
            d_scores = (d_logits * attention.scale).to(v.dtype)
            if d_query is not None:
                d_q += multiply(d_scores, read_keys(tile, key, bias)[0])
            if d_key is not None:
                d_k = multiply(d_scores.mT, q).transpose(1, 2)
                add_rows(d_key, tile, included(d_k, tile, bias))
            if d_value is not None:
                d_v = multiply(weights.to(v.dtype).mT, dz).transpose(1, 2)
                add_rows(d_value, tile, included(d_v, tile, bias))
            if d_bias is not None:
                add_rows(d_bias, tile, d_logits.sum((1, 2)))
        if d_query is not None:
            add_rows(d_query, query_tile, d_q.transpose(1, 2))
    return d_query, d_key, d_value, d_bias


def mean_gradient(d_out: Tensor, out: Tensor) -> Tensor:
    """[total, H]: the mean of the gradients of a row's weights.

    Each weight's gradient has it subtracted, and most of both cancels: this sum adds no rounding,
    and the gradient of lse is added after the difference.
    """
    kind = torch.promote_types(out.dtype, torch.float32)
    return (d_out.double() * out.double()).sum(-1).to(kind)


def without_rounding_of_lse(softmax: Tensor) -> Tensor:
    """All weights of rows [..., k], recomputed from lse, so that they sum to 1 again."""
    total = softmax.sum(-1, keepdim=True)
    return softmax / torch.where(total == 0, 1.0, total)


def tile_pairs(
    query: Tensor, key: Tensor, attention: Attention
) -> Iterator[tuple[Tile, list[Tile]]]:
    """Every tile of queries with the tiles of keys its bags attend to."""
    heads = query.shape[1]
    n_bags = 1 if key.device.type == "cpu" else max(1, attention.key_lengths.shape[0])
    room = max(1, _TILE_PAIRS // (heads * n_bags))
    # the shorter side is taken whole where it fits, so that the longer one is read once
    short = min(attention.query_max, attention.key_max, int(room**0.5))
    max_rows = max(16, room // max(1, short))
    query_groups = tiles(attention.query_ragged, query, max_rows=max_rows)
    key_groups = tiles(attention.key_ragged, key, max_rows=max_rows)
    for query_group, key_group in zip(query_groups, key_groups, strict=True):
        # queries without keys have been given what they get, and no gradient
        for query_tile in query_group if key_group else ():
            yield query_tile, key_group


def read_queries(tile: Tile, query: Tensor, key: Tensor) -> Tensor:
    """[B, H, n, d] in the type of the products; zero behind a bag's end."""
    q = tile.take(query).to(operand_type(key, centred=False)).transpose(1, 2)
    return q if tile.valid is None else torch.where(tile.valid[:, None, :, None], q, 0.0)


def score(
    tile: Tile, q: Tensor, key: Tensor, value: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Logits [B, H, n, k] of the accumulation type, and the values [B, H, k, dv] of a tile."""
    k, row_bias = read_keys(tile, key, bias)
    logits = multiply(q, k.mT) * scale
    if row_bias is not None:
        logits = logits + row_bias[:, None, None, :]
    return logits, None if value is None else read_keys(tile, value, bias)[0]


def dropped(
    weights: Tensor, tile: Tile, position: int, n_bags: int, seed: Tensor | None, p: float
) -> Tensor:
    """The weights [B, H, n, k] that dropout keeps, scaled.

    Args:
        weights: of a tile of queries and k keys.
        tile: the queries.
        position: of the first key in its bag.
        n_bags: of the batch.
        seed, p: of the mask; None drops nothing.
    """
    if seed is None:
        return weights
    _, heads, n, n_keys = weights.shape
    device = weights.device
    row = (tile.position + torch.arange(n, device=device)) * heads
    row = (row[None, :] + torch.arange(heads, device=device)[:, None]).flatten()
    keys = position + torch.arange(n_keys, device=device)
    keep = torch.stack([keep_mask(seed, b, row, keys, p) for b in range(n_bags)[tile.bags]])
    return torch.where(keep.view(weights.shape), weights / (1.0 - p), 0.0)


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """left [B, H, m, k] @ right [B, H, k, n], wide."""
    return product(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])


def packed_rows(tile: Tile, total: int) -> slice | Tensor:
    """Where the results of a tile of queries go; `total` for rows behind a bag's end."""
    if isinstance(tile.packed, slice):
        return tile.packed
    return torch.where(tile.valid, tile.packed, total)


def by_row(values: Tensor, rows: slice | Tensor) -> Tensor:
    """Values [B, H, n, ...] as `packed_rows` indexes them: [n, H, ...] or [B, n, H, ...]."""
    values = values.transpose(1, 2)
    return values[0] if isinstance(rows, slice) else values


def read_packed(tile: Tile, tensor: Tensor) -> Tensor:
    """Rows of a per-query result [total, H, e] as [B, H, n, e]."""
    if isinstance(tile.packed, slice):
        return tensor[tile.packed][None].transpose(1, 2)
    # an empty bag at the end has its first row behind the last one
    rows = tensor[tile.packed.clamp(max=tensor.shape[0] - 1)].transpose(1, 2)
    return torch.where(tile.valid[:, None, :, None], rows, 0.0)


def read_keys(tile: Tile, stored: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows [B, H, k, e] in the type of the products, excluded ones zero, and their bias [B, k]."""
    rows = tile.take(stored).to(operand_type(stored, centred=False)).transpose(1, 2)
    row_bias = None if bias is None else tile.take(bias).to(accumulation_type(stored.dtype))
    if tile.valid is not None:
        row_bias = torch.where(tile.valid, 0.0 if row_bias is None else row_bias, -torch.inf)
    if row_bias is not None:
        rows = torch.where((row_bias == -torch.inf)[:, None, :, None], 0.0, rows)
    return rows, row_bias


def included(values: Tensor, tile: Tile, bias: Tensor | None) -> Tensor:
    """Gradients [B, k, H, e], zero for excluded keys whatever an infinite gradient made of them."""
    if bias is None:
        return values
    excluded = tile.take(bias) == -torch.inf
    return torch.where(excluded[..., None, None], 0.0, values)
