"""Specification of `bag_attends_tokens`: the queries are formed, then attend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.cross_attention import cross_attention_with_lse


def bag_attends_tokens(
    bag: Tensor,
    w_q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    b_q: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    key_bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Every patch attends to a few tokens; see `survfuse.ops.bag_attends_tokens`."""
    return bag_attends_tokens_with_lse(
        bag,
        w_q,
        key,
        value,
        b_q=b_q,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        norm_eps=norm_eps,
        key_bias=key_bias,
        ragged=ragged,
        scale=scale,
        dropout_p=dropout_p,
    )[0]


def bag_attends_tokens_with_lse(
    bag: Tensor,
    w_q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    b_q: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    key_bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `bag_attends_tokens`, and the logsumexp of the logits [total, H]."""
    bag, ragged = as_packed(bag, ragged, key.shape[0])
    kind = accumulation_type(bag.dtype)
    pairs = zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    x = torch.cat([bag[:0], *(bag[start : start + length] for start, length in pairs)]).to(kind)
    if norm_weight is not None or norm_bias is not None:
        gamma, beta = (None if t is None else t.to(kind) for t in (norm_weight, norm_bias))
        x = layer_norm(x, x.shape[-1:], gamma, beta, norm_eps)
    query = torch.einsum("nd,hed->nhe", x, w_q.to(kind))
    if b_q is not None:
        query = query + b_q.to(kind)
    out, lse = cross_attention_with_lse(
        query,
        key.to(kind),
        value.to(kind),
        bias=key_bias,
        query_ragged=ragged.packed(),
        scale=scale,
        dropout_p=dropout_p,
    )
    return out.to(value.dtype), lse
