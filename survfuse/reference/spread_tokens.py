"""Specification of `spread_tokens`."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.attention import Attended
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed, keep_mask
from survfuse.reference.pool_bag import _clean_rows, _logsumexp, _softmax


def spread_tokens(
    keys: Tensor,
    values: Tensor,
    bag: Tensor,
    *,
    key_bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
) -> Attended:
    """Each patch attends to a few keys as wide as itself; see `survfuse.ops.spread_tokens`."""
    bag, ragged = as_packed(bag, ragged, keys.shape[0])
    kind = accumulation_type(bag.dtype)
    heads = keys.shape[1]
    seed = draw_seed(bag.device) if dropout_p > 0 else None
    outs = [values.new_zeros((0, heads, values.shape[-1]), dtype=kind)]
    lses = [bag.new_zeros((0, heads), dtype=kind)]
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, _ = _clean_rows(bag, None, start, length, normalize_eps, stats)
        k, v = keys[b].to(kind), values[b].to(kind)
        bias = k.new_zeros(k.shape[:2]) if key_bias is None else key_bias[b].to(kind)
        k, v = (torch.where((bias == -torch.inf)[..., None], 0.0, t) for t in (k, v))
        logits = (scale * torch.einsum("nd,hkd->nhk", x, k) + bias).flatten(0, 1)
        lse = _logsumexp(logits)
        weights = _softmax(logits, lse)
        if seed is not None:
            row = torch.arange(length * heads, device=bag.device)
            position = torch.arange(k.shape[1], device=bag.device)
            weights = weights * keep_mask(seed, b, row, position, dropout_p) / (1.0 - dropout_p)
        weights = weights.reshape(length, heads, k.shape[1])
        outs.append(torch.einsum("nhk,hke->nhe", weights, v))
        lses.append(lse.reshape(length, heads))
    return Attended(torch.cat(outs).to(values.dtype), torch.cat(lses))
