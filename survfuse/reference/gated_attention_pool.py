"""Specification of `gated_attention_pool` and `gated_attention_weights`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from survfuse.pooling import Gate, GatedBag, accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed, keep_mask
from survfuse.reference.pool_bag import _clean_rows, _logsumexp, _softmax


def gated_attention_pool(
    bag: Tensor,
    w_tanh: Tensor,
    b_tanh: Tensor | None,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_score: Tensor,
    b_score: Tensor | None,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    dropout_p: float = 0.0,
) -> GatedBag:
    """Pooling by gated attention; see `survfuse.ops.gated_attention_pool`."""
    bag, ragged = as_packed(bag, ragged)
    gate = Gate(w_tanh, b_tanh, w_gate, b_gate, w_score, b_score)
    seed = draw_seed(bag.device) if dropout_p > 0 else None
    n_pools, kind = w_score.shape[0], accumulation_type(bag.dtype)
    parts = []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, row_bias = _clean_rows(bag, bias, start, length, None, None)
        logits = _logits(x, gate) + row_bias
        lse = _logsumexp(logits)
        weights = _softmax(logits, lse)
        if seed is not None:
            pool = torch.arange(n_pools, device=bag.device)
            position = torch.arange(length, device=bag.device)
            keep = keep_mask(seed, b, pool, position, dropout_p)
            weights = weights * keep / (1.0 - dropout_p)
        parts.append((weights @ x, lse))
    if not parts:
        pooled = w_score.new_zeros((0, n_pools, bag.shape[1]))
        return GatedBag(pooled, bag.new_zeros((0, n_pools), dtype=kind))
    pooled, lse = (torch.stack(part) for part in zip(*parts, strict=True))
    return GatedBag(pooled.to(w_score.dtype), lse)


def gated_attention_weights(
    bag: Tensor,
    w_tanh: Tensor,
    b_tanh: Tensor | None,
    w_gate: Tensor,
    b_gate: Tensor | None,
    w_score: Tensor,
    b_score: Tensor | None,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    reduce: str | None = None,
) -> Tensor:
    """The softmax weights of the pooling, given its `lse`; see `survfuse.ops`."""
    bag, ragged = as_packed(bag, ragged, lse.shape[0])
    gate = Gate(w_tanh, b_tanh, w_gate, b_gate, w_score, b_score)
    # of no bags, this remains
    parts = [bag.new_zeros((0, w_score.shape[0]), dtype=accumulation_type(bag.dtype))]
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, row_bias = _clean_rows(bag, bias, start, length, None, None)
        parts.append(_softmax(_logits(x, gate) + row_bias, lse[b].to(x.dtype)).T)
    weights = torch.cat(parts)
    return weights if reduce is None else weights.mean(1)


def _logits(x: Tensor, gate: Gate) -> Tensor:
    """[K, N]: w_score . (tanh(W_t x + b_t) * sigmoid(W_g x + b_g)) + b_score."""
    gate = Gate(*(None if tensor is None else tensor.to(x.dtype) for tensor in gate))
    value = torch.tanh(linear(x, gate.w_tanh, gate.b_tanh))
    share = torch.sigmoid(linear(x, gate.w_gate, gate.b_gate))
    return linear(value * share, gate.w_score, gate.b_score).T
