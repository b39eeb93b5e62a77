"""Specification of `cross_attention` and its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed_heads
from survfuse.reference.dropout import draw_seed, keep_mask
from survfuse.reference.pool_bag import _logsumexp, _softmax


def cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    query_ragged: Ragged | None = None,
    key_ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of queries to keys, either side ragged; see `survfuse.ops.cross_attention`."""
    return cross_attention_with_lse(
        query,
        key,
        value,
        bias=bias,
        query_ragged=query_ragged,
        key_ragged=key_ragged,
        scale=scale,
        dropout_p=dropout_p,
    )[0]


def cross_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    query_ragged: Ragged | None = None,
    key_ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`, and the logsumexp of the logits."""
    seed = draw_seed(key.device) if dropout_p > 0 else None
    packed, query_ragged = as_packed_heads("query", query, query_ragged)
    key, key_ragged = as_packed_heads("key", key, key_ragged)
    value = value.reshape(-1, *value.shape[-2:])
    heads = query.shape[-2]
    kind = accumulation_type(key.dtype)
    outs, lses = [], []
    for b, (queries, keys) in enumerate(zip(_ranges(query_ragged), _ranges(key_ragged))):
        k, key_bias = _clean(key, bias, keys)
        v, _ = _clean(value, bias, keys)
        logits = _logits(packed[queries], k, key_bias, scale)  # [n, H, Lk]
        flat = logits.flatten(0, 1)
        lse = _logsumexp(flat)
        weights = _softmax(flat, lse)
        if seed is not None:
            # row r of the mask is query r // heads, head r % heads, as pool_bag numbers them
            row = torch.arange(flat.shape[0], device=key.device)
            position = torch.arange(flat.shape[1], device=key.device)
            weights = weights * keep_mask(seed, b, row, position, dropout_p) / (1.0 - dropout_p)
        outs.append(torch.einsum("nhk,khe->nhe", weights.reshape(logits.shape), v))
        lses.append(lse.reshape(-1, heads))
    outs.append(query.new_zeros((0, heads, value.shape[-1]), dtype=kind))
    lses.append(query.new_zeros((0, heads), dtype=kind))
    out, lse = torch.cat(outs).to(query.dtype), torch.cat(lses)
    if query.dim() == 4:
        return out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])
    return out, lse


def cross_attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    query_ragged: Ragged | None = None,
    key_ragged: Ragged | None = None,
    scale: float | None = None,
    reduce: str | None = None,
) -> Tensor:
    """The weights of `cross_attention`; see `survfuse.ops.cross_attention_weights`."""
    long_queries = query.dim() == 3
    dense_keys = key.dim() == 4
    n_bags, n_keys = key.shape[:2]
    packed, query_ragged = as_packed_heads("query", query, query_ragged)
    key, key_ragged = as_packed_heads("key", key, key_ragged)
    heads = query.shape[-2]
    first = 0
    lse = lse.reshape(-1, heads).to(accumulation_type(key.dtype))
    parts = [lse.new_zeros((0, heads, n_keys) if long_queries else (0, query.shape[1], heads))]
    if reduce == "rows":
        parts = [lse.new_zeros(0)]
    elif reduce == "heads":
        parts = [lse.new_zeros((0, n_keys if long_queries else query.shape[1]))]
    for queries, keys in zip(_ranges(query_ragged), _ranges(key_ragged)):
        k, key_bias = _clean(key, bias, keys)
        logits = _logits(packed[queries], k, key_bias, scale)
        n = logits.shape[0]
        weights = _softmax(logits.flatten(0, 1), lse[first : first + n].reshape(-1))
        weights = weights.reshape(logits.shape)
        first += n
        if reduce == "rows":
            # no query gives no weight
            parts.append(weights.sum((0, 1)) / max(n * heads, 1))
        elif long_queries:
            parts.append(weights.mean(1) if reduce == "heads" else weights)
        else:
            parts.append((weights.mean(1) if reduce == "heads" else weights).movedim(-1, 0))
    weights = torch.cat(parts)
    return weights.reshape(n_bags, n_keys) if reduce == "rows" and dense_keys else weights


def _ranges(ragged: Ragged) -> list[slice]:
    pairs = zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    return [slice(start, start + length) for start, length in pairs]


def _clean(stored: Tensor, bias: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Rows of one bag in the type of accumulation, excluded ones zeroed, and their bias."""
    x = stored[rows].to(accumulation_type(stored.dtype))
    if bias is None:
        return x, None
    row_bias = bias.reshape(-1)[rows].to(x.dtype)
    return torch.where((row_bias == -torch.inf)[:, None, None], 0.0, x), row_bias


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, scale: float | None) -> Tensor:
    """[n, H, Lk]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("nhe,khe->nhk", query.to(key.dtype), key)
    return logits if bias is None else logits + bias
