"""Specification of `tokens_attend_bag`: K and V are formed, then attended."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed, keep_mask
from survfuse.reference.pool_bag import _logsumexp, _softmax


def tokens_attend_bag(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Few tokens attend to a bag; see `survfuse.ops.tokens_attend_bag`."""
    return tokens_attend_bag_with_lse(
        query,
        bag,
        w_k,
        w_v,
        b_k=b_k,
        b_v=b_v,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        bias=bias,
        ragged=ragged,
        scale=scale,
        dropout_p=dropout_p,
    )[0]


def tokens_attend_bag_with_lse(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `tokens_attend_bag`, and the logsumexp of the logits [B, Lq, H]."""
    bag, ragged = as_packed(bag, ragged, query.shape[0])
    n_queries, heads = query.shape[1:3]
    seed = draw_seed(bag.device) if dropout_p > 0 else None
    # row r of the mask is query r // heads, head r % heads, as pool_bag numbers them
    row = torch.arange(n_queries * heads, device=bag.device)
    outs, lses = [], []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, logits = _logits(
            query[b], bag, w_k, b_k, norm_weight, norm_bias, norm_eps, bias, start, length, scale
        )
        value = torch.einsum("nd,hed->nhe", x, w_v.to(x.dtype))
        if b_v is not None:
            value = value + b_v.to(x.dtype)
        flat = logits.reshape(n_queries * heads, length)
        lse = _logsumexp(flat)
        weights = _softmax(flat, lse)
        if seed is not None:
            position = torch.arange(length, device=bag.device)
            weights = weights * keep_mask(seed, b, row, position, dropout_p) / (1.0 - dropout_p)
        weights = weights.reshape(n_queries, heads, length)
        outs.append(torch.einsum("qhn,nhe->qhe", weights, value))
        lses.append(lse.reshape(n_queries, heads))
    if not outs:
        shape = (0, n_queries, heads)
        return query.new_zeros(*shape, w_v.shape[1]), query.new_zeros(
            shape, dtype=accumulation_type(bag.dtype)
        )
    return torch.stack(outs).to(query.dtype), torch.stack(lses)


def tokens_attend_bag_weights(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    lse: Tensor,
    *,
    b_k: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    reduce: str | None = None,
) -> Tensor:
    """The weights of `tokens_attend_bag`; see `survfuse.ops.tokens_attend_bag_weights`."""
    bag, ragged = as_packed(bag, ragged, query.shape[0])
    n_queries, heads = query.shape[1:3]
    parts = []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, logits = _logits(
            query[b], bag, w_k, b_k, norm_weight, norm_bias, norm_eps, bias, start, length, scale
        )
        flat = logits.reshape(n_queries * heads, length)
        weights = _softmax(flat, lse[b].reshape(-1).to(x.dtype))
        parts.append(weights.T.reshape(length, n_queries, heads))
    if not parts:
        kind = accumulation_type(bag.dtype)
        parts = [bag.new_zeros((0, n_queries, heads), dtype=kind)]
    weights = torch.cat(parts)
    if reduce == "rows":
        return weights.flatten(1).mean(1)
    if reduce == "heads":
        return weights.mean(-1)
    return weights


def _logits(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    bias: Tensor | None,
    start: int,
    length: int,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """The (normalised) rows of one bag [N, D] and the logits [Lq, H, N]."""
    kind = accumulation_type(bag.dtype)
    x = bag[start : start + length].to(kind)
    row_bias = None if bias is None else bias[start : start + length].to(kind)
    if row_bias is not None:
        x = torch.where((row_bias == -torch.inf)[:, None], 0.0, x)
    if norm_weight is not None or norm_bias is not None:
        weight = None if norm_weight is None else norm_weight.to(kind)
        shift = None if norm_bias is None else norm_bias.to(kind)
        x = layer_norm(x, x.shape[-1:], weight, shift, norm_eps)
    key = torch.einsum("nd,hed->nhe", x, w_k.to(kind))
    if b_k is not None:
        key = key + b_k.to(kind)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("qhe,nhe->qhn", query.to(kind), key)
    return x, logits if row_bias is None else logits + row_bias
