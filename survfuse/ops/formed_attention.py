"""Cross-attention to a bag with K and V formed: the way for many queries or very short bags."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged
from survfuse.reference.dropout import draw_seed, keep_mask


def formed_attention(
    query: Tensor,
    bag: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    b_k: Tensor | None,
    b_v: Tensor | None,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    bias: Tensor | None,
    ragged: Ragged,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """out [B, Lq, H, dv] and lse [B, Lq, H]; products in the type of the bag, softmax in fp32.

    Bags of one length are one batch; others go one by one on the CPU, where the ranges are known,
    and padded to the longest on a device.
    """
    seed = draw_seed(bag.device) if dropout_p > 0 else None
    weights = (w_k, w_v, b_k, b_v, norm)
    n_bags = query.shape[0]
    if n_bags == 0 or ragged.max_length == 0:
        kind = accumulation_type(bag.dtype)
        # zero, and yet a function of every argument, so that each has its zero gradient
        arguments = (query, bag, w_k, w_v, b_k, b_v, bias, *(norm or ())[:2])
        zero = sum(t.flatten()[:0].sum().to(kind) for t in arguments if t is not None)
        out = query.new_zeros((*query.shape[:3], w_v.shape[1])) + zero.to(query.dtype)
        return out, query.new_full(query.shape[:3], -torch.inf, dtype=kind) + zero
    if ragged.total == n_bags * ragged.max_length or bag.device.type != "cpu":
        index = torch.arange(ragged.max_length, device=bag.device)
        valid = index < ragged.lengths[:, None]
        rows = (ragged.starts[:, None] + torch.where(valid, index, 0)).clamp(0, bag.shape[0] - 1)
        first = torch.arange(n_bags, device=bag.device)
        return _attend(query, bag, weights, bias, rows, valid, first, scale, dropout_p, seed)
    outs, lses = [], []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        rows = torch.arange(start, start + max(length, 1))[None].clamp(max=bag.shape[0] - 1)
        valid = torch.full(rows.shape, length > 0)
        out, lse = _attend(
            query[b : b + 1], bag, weights, bias, rows, valid, torch.tensor([b]), scale, dropout_p,
            seed,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def _attend(
    query: Tensor,
    bag: Tensor,
    weights: tuple,
    bias: Tensor | None,
    rows: Tensor,
    valid: Tensor,
    bags: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One batch of bags: rows [B, N] of the packed matrix, valid [B, N]."""
    w_k, w_v, b_k, b_v, norm = weights
    kind = accumulation_type(bag.dtype)
    n_bags, n = rows.shape
    heads = query.shape[2]
    x = bag[rows]
    row_bias = torch.where(valid, 0.0, -torch.inf).to(kind)
    if bias is not None:
        row_bias = torch.where(valid, bias[rows].to(kind), -torch.inf)
    excluded = row_bias == -torch.inf
    x = torch.where(excluded[..., None], 0.0, x)
    if norm is not None:
        weight, shift, eps = norm
        x = layer_norm(
            x.to(kind),
            x.shape[-1:],
            None if weight is None else weight.to(kind),
            None if shift is None else shift.to(kind),
            eps,
        ).to(bag.dtype)
    key = _project(x, w_k, b_k).view(n_bags, n, heads, -1)
    value = _project(x, w_v, b_v).view(n_bags, n, heads, -1)
    logits = torch.einsum("bqhe,bnhe->bqhn", query.to(x.dtype), key).to(kind) * scale
    logits = logits + row_bias[:, None, None, :]
    empty = excluded.all(-1)[:, None, None]
    # an empty bag is computed with its logits at 0 and then replaced, so that no NaN arises
    safe = torch.where(empty[..., None], 0.0, logits)
    lse = safe.logsumexp(-1)
    probability = torch.where(empty[..., None], 0.0, safe.softmax(-1))
    if seed is not None:
        row = torch.arange(query.shape[1] * heads, device=bag.device)
        position = torch.arange(n, device=bag.device)
        keep = torch.stack([keep_mask(seed, b, row, position, dropout_p) for b in bags.unbind()])
        keep = keep.view(n_bags, query.shape[1], heads, n)
        probability = torch.where(keep, probability / (1.0 - dropout_p), 0.0)
    out = torch.einsum("bqhn,bnhe->bqhe", probability.to(x.dtype), value)
    return out.to(query.dtype), torch.where(empty, -torch.inf, lse)


def _project(x: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
    shift = None if shift is None else shift.reshape(-1).to(x.dtype)
    return linear(x, weight.reshape(-1, weight.shape[-1]).to(x.dtype), shift)
