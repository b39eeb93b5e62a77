"""The formulas as anybody would write them in torch, in one type: the yardstick of precision.

Also the baseline of the benchmarks. No dropout: its precision is that of what it multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear


def plain_pool_bag(rows, bag, *, bias, ragged, scale, normalize_eps):
    """pooled, lse, weight_sum, everything in the type of the bag."""
    outs = []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, row_bias = _rows(bag, bias, start, length)
        if normalize_eps is not None:
            x = layer_norm(x, x.shape[-1:], eps=normalize_eps)
        logits = scale * (rows[b].to(x.dtype) @ x.T) + row_bias
        weights, lse = _softmax(logits)
        outs.append((weights @ x, lse, weights.sum(-1)))
    return tuple(torch.stack(part) for part in zip(*outs, strict=True))


def plain_attention(
    query, bag, w_k, w_v, *, b_k, b_v, norm_weight, norm_bias, norm_eps, bias, ragged, scale
):
    """out, lse: K and V projected, then attended, everything in the type of the bag."""
    outs = []
    kind = bag.dtype
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, row_bias = _rows(bag, bias, start, length)
        if norm_weight is not None:
            x = layer_norm(x, x.shape[-1:], norm_weight.to(kind), norm_bias.to(kind), norm_eps)
        key = torch.einsum("nd,hed->hne", x, w_k.to(kind)) + b_k.to(kind)[:, None]
        value = torch.einsum("nd,hed->hne", x, w_v.to(kind)) + b_v.to(kind)[:, None]
        logits = scale * torch.einsum("qhe,hne->qhn", query[b].to(kind), key) + row_bias
        weights, lse = _softmax(logits)
        outs.append((torch.einsum("qhn,hne->qhe", weights, value), lse))
    return tuple(torch.stack(part) for part in zip(*outs, strict=True))


def plain_cross_attention(query, key, value, *, bias, query_ragged, key_ragged, scale):
    """out, lse: every weight formed, everything in the type of the longer side."""
    dense = query.dim() == 4
    kind = key.dtype if dense else query.dtype
    outs = []
    for b in range(len((key_ragged or query_ragged).lengths)):
        q = _bag(query, query_ragged, b).to(kind)
        k, v = _bag(key, key_ragged, b).to(kind), _bag(value, key_ragged, b).to(kind)
        row_bias = k.new_zeros(k.shape[0])
        if bias is not None:
            row_bias = _bag(bias, key_ragged, b).to(kind)
            k, v = (torch.where((row_bias == -torch.inf)[:, None, None], 0.0, t) for t in (k, v))
        weights, lse = _softmax(scale * torch.einsum("nhe,khe->nhk", q, k) + row_bias)
        outs.append((torch.einsum("nhk,khe->nhe", weights, v), lse))
    return tuple((torch.stack if dense else torch.cat)(part) for part in zip(*outs, strict=True))


def plain_spread_tokens(keys, values, bag, *, key_bias, ragged, scale, normalize_eps):
    """out, lse: every weight formed, everything in the type of the bag."""
    outs = []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x = bag[start : start + length]
        if normalize_eps is not None:
            x = layer_norm(x, x.shape[-1:], eps=normalize_eps)
        k, v = keys[b].to(x.dtype), values[b].to(x.dtype)
        bias = k.new_zeros(k.shape[:2]) if key_bias is None else key_bias[b].to(x.dtype)
        k, v = (torch.where((bias == -torch.inf)[..., None], 0.0, t) for t in (k, v))
        weights, lse = _softmax(scale * torch.einsum("nd,hkd->nhk", x, k) + bias)
        outs.append((torch.einsum("nhk,hke->nhe", weights, v), lse))
    return tuple(torch.cat(part) for part in zip(*outs, strict=True))


def plain_bag_attends_tokens(
    bag, w_q, key, value, *, b_q, norm_weight, norm_bias, norm_eps, key_bias, ragged, scale
):
    """out, lse: queries projected, then attended, everything in the type of the bag."""
    kind, outs = bag.dtype, []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x = bag[start : start + length]
        if norm_weight is not None:
            x = layer_norm(x, x.shape[-1:], norm_weight.to(kind), norm_bias.to(kind), norm_eps)
        query = torch.einsum("nd,hed->nhe", x, w_q.to(kind)) + b_q.to(kind)
        k, v = key[b].to(kind), value[b].to(kind)
        bias = k.new_zeros(k.shape[0]) if key_bias is None else key_bias[b].to(kind)
        k, v = (torch.where((bias == -torch.inf)[:, None, None], 0.0, t) for t in (k, v))
        weights, lse = _softmax(scale * torch.einsum("nhe,khe->nhk", query, k) + bias)
        outs.append((torch.einsum("nhk,khe->nhe", weights, v), lse))
    return tuple(torch.cat(part) for part in zip(*outs, strict=True))


def _bag(stored, ragged, b):
    if ragged is None:
        return stored[b]
    start, length = int(ragged.starts[b]), int(ragged.lengths[b])
    return stored[start : start + length]


def plain_gated_attention_pool(
    bag, w_tanh, b_tanh, w_gate, b_gate, w_score, b_score, *, bias, ragged
):
    """pooled, lse: the hidden layer formed, everything in the type of the bag."""
    outs = []
    parameters = (w_tanh, b_tanh, w_gate, b_gate, w_score, b_score)
    w_tanh, b_tanh, w_gate, b_gate, w_score, b_score = (p.to(bag.dtype) for p in parameters)
    for start, length in zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True):
        x, row_bias = _rows(bag, bias, start, length)
        gated = torch.tanh(linear(x, w_tanh, b_tanh)) * torch.sigmoid(linear(x, w_gate, b_gate))
        weights, lse = _softmax(linear(gated, w_score, b_score).T + row_bias)
        outs.append((weights @ x, lse))
    return tuple(torch.stack(part) for part in zip(*outs, strict=True))


def _rows(bag: Tensor, bias: Tensor | None, start: int, length: int) -> tuple[Tensor, Tensor]:
    x = bag[start : start + length]
    if bias is None:
        return x, x.new_zeros(length)
    row_bias = bias[start : start + length].to(x.dtype)
    return torch.where((row_bias == -torch.inf)[:, None], 0.0, x), row_bias


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    safe = torch.where(empty, 0.0, logits)
    lse = safe.logsumexp(-1) if logits.shape[-1] else safe.sum(-1)
    weights = torch.where(empty, 0.0, safe.softmax(-1))
    return weights, torch.where(empty[..., 0], -torch.inf, lse)
