"""Specification of `pool_bag` and `pool_weights`."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import PooledBag, accumulation_type
from survfuse.ragged import Ragged, as_packed
from survfuse.reference.dropout import draw_seed, keep_mask


def pool_bag(
    rows: Tensor,
    bag: Tensor,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
) -> PooledBag:
    """Softmax pooling of a bag that is both keys and values; see `survfuse.ops.pool_bag`."""
    bag, ragged = as_packed(bag, ragged, rows.shape[0])
    seed = draw_seed(bag.device) if dropout_p > 0 else None
    parts = []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, row_bias = _clean_rows(bag, bias, start, length, normalize_eps, stats)
        a = rows[b].to(x.dtype)
        logits = scale * (a @ x.T) + row_bias
        lse = _logsumexp(logits)
        weights = _softmax(logits, lse)
        if seed is not None:
            keep = keep_mask(
                seed,
                b,
                torch.arange(a.shape[0], device=bag.device),
                torch.arange(length, device=bag.device),
                dropout_p,
            )
            weights = weights * keep / (1.0 - dropout_p)
        parts.append((weights @ x, lse, weights.sum(-1)))
    if not parts:
        kind = accumulation_type(bag.dtype)
        shape = rows.shape[:2]
        return PooledBag(
            rows.new_zeros(rows.shape), rows.new_zeros(shape, dtype=kind), rows.new_zeros(shape)
        )
    pooled, lse, weight_sum = (torch.stack(part) for part in zip(*parts, strict=True))
    return PooledBag(pooled.to(rows.dtype), lse, weight_sum.to(rows.dtype))


def pool_weights(
    rows: Tensor,
    bag: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    ragged: Ragged | None = None,
    scale: float = 1.0,
    normalize_eps: float | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    reduce: str | None = None,
) -> Tensor:
    """The softmax weights of `pool_bag`, given its `lse`; see `survfuse.ops.pool_weights`."""
    bag, ragged = as_packed(bag, ragged, rows.shape[0])
    shape = tuple(lse.shape[1:])
    parts = []
    for b, (start, length) in enumerate(
        zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        x, row_bias = _clean_rows(bag, bias, start, length, normalize_eps, stats)
        logits = scale * (rows[b].to(x.dtype) @ x.T) + row_bias
        weights = _softmax(logits, lse[b].reshape(-1).to(x.dtype)).T
        parts.append(weights.reshape(length, *shape))
    if not parts:
        parts = [bag.new_zeros((0, *shape), dtype=accumulation_type(bag.dtype))]
    weights = torch.cat(parts)
    if reduce == "rows":
        return weights.flatten(1).mean(1)
    if reduce == "heads":
        return weights.mean(-1)
    return weights


def _clean_rows(
    bag: Tensor,
    bias: Tensor | None,
    start: int,
    length: int,
    normalize_eps: float | None,
    stats: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Rows of one bag in the type of accumulation, excluded ones zeroed, and their bias."""
    rows = slice(start, start + length)
    kind = accumulation_type(bag.dtype)
    x = bag[rows].to(kind)
    if bias is None:
        row_bias = x.new_zeros(length)
    else:
        row_bias = bias[rows].to(kind)
        x = torch.where((row_bias == -torch.inf)[:, None], 0.0, x)
    if normalize_eps is not None:
        # stats are a cache of these two, so gradients flow as if they were computed here
        mean = x.mean(-1, keepdim=True)
        rstd = ((x - mean).square().mean(-1, keepdim=True) + normalize_eps).rsqrt()
        if stats is not None:
            excluded = (row_bias == -torch.inf)[:, None]
            given_mean, given_rstd = (s[rows].to(kind)[:, None] for s in stats)
            mean = mean + (torch.where(excluded, 0.0, given_mean) - mean).detach()
            rstd = rstd + (torch.where(excluded, 0.0, given_rstd) - rstd).detach()
        x = (x - mean) * rstd
    return x, row_bias


def _logsumexp(logits: Tensor) -> Tensor:
    """logsumexp over the last dimension; -inf with zero gradient where nothing is included."""
    empty = (
        (logits == -torch.inf).all(-1)
        if logits.shape[-1]
        else logits.new_ones(logits.shape[0], dtype=torch.bool)
    )
    if logits.shape[-1] == 0:
        return logits.new_full(logits.shape[:1], -torch.inf)
    safe = torch.where(empty[:, None], 0.0, logits)
    return torch.where(empty, -torch.inf, safe.logsumexp(-1))


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse), 0 with zero gradient where a logit or the lse is -inf."""
    excluded = (logits == -torch.inf) | (lse == -torch.inf)[:, None]
    shifted = torch.where(excluded, 0.0, logits) - torch.where(lse == -torch.inf, 0.0, lse)[:, None]
    return torch.where(excluded, 0.0, torch.where(excluded, 0.0, shifted).exp())
