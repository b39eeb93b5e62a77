"""Specification of `block_attention`: one softmax over all keys that a row may attend to."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from survfuse.attention import BLOCKS, BlockAttended, BlockSide
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed_heads
from survfuse.reference.cross_attention import _clean, _logits, _ranges
from survfuse.reference.dropout import draw_seed, keep_mask
from survfuse.reference.pool_bag import _logsumexp, _softmax


def block_attention(
    tokens: BlockSide,
    bag: BlockSide,
    blocks: Collection[str],
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> BlockAttended:
    """Attention among tokens and a bag by blocks; see `survfuse.ops.block_attention`."""
    sides = {"tokens": tokens, "bag": bag}
    seeds = {}
    for block in BLOCKS:
        source = sides[block.split("->")[1]]
        if block in blocks and dropout_p > 0:
            seeds[block] = draw_seed(source.key.device)
    results = []
    for asking in sides:
        attended = [b.split("->")[1] for b in BLOCKS if b in blocks and b.startswith(asking)]
        parts = [(sides[name], seeds.get(f"{asking}->{name}")) for name in attended]
        if not parts:
            results += [None, None, None]
            continue
        out, lse, masses = _attend(sides[asking], parts, scale, dropout_p)
        mass = [
            masses[attended.index(n)] if n in attended else torch.zeros_like(lse) for n in sides
        ]
        results += [out, lse, torch.stack(mass, -1)]
    return BlockAttended(*results)


def _attend(
    asking: BlockSide,
    parts: list[tuple[BlockSide, Tensor | None]],
    scale: float | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """out, lse and the mass on each part, of the rows of one side."""
    query, query_ragged = as_packed_heads("query", asking.query, asking.ragged)
    heads = query.shape[1]
    outs, lses, masses = [], [], [[] for _ in parts]
    for b, rows in enumerate(_ranges(query_ragged)):
        logits, values, factors = [], [], []
        for side, seed in parts:
            k, v, bias, n = _keys(side, b)
            logits.append(_logits(query[rows], k, bias, scale).flatten(0, 1))
            values.append(v)
            row = torch.arange(logits[-1].shape[0], device=k.device)
            position = torch.arange(n, device=k.device)
            factor = torch.ones_like(logits[-1])
            if seed is not None:
                kept = keep_mask(seed, b, row, position, dropout_p)
                factor = factor * kept / (1.0 - dropout_p)
            factors.append(factor)
        flat = torch.cat(logits, -1)
        lse = _logsumexp(flat)
        softmax = _softmax(flat, lse)
        weights = (softmax * torch.cat(factors, -1)).unflatten(0, (-1, heads))
        outs.append(torch.einsum("nhk,khe->nhe", weights, torch.cat(values)))
        lses.append(lse.unflatten(0, (-1, heads)))
        for mass, part in zip(masses, softmax.split([v.shape[0] for v in values], -1)):
            mass.append(part.sum(-1).unflatten(0, (-1, heads)))
    kind = accumulation_type(parts[0][0].key.dtype)
    lses.append(query.new_zeros((0, heads), dtype=kind))
    outs.append(query.new_zeros((0, heads, parts[0][0].value.shape[-1]), dtype=kind))
    out, lse = torch.cat(outs).to(query.dtype), torch.cat(lses)
    masses = [torch.cat([*mass, lse[:0]]) for mass in masses]
    if asking.query.dim() == 4:
        shape = asking.query.shape[:2]
        return (
            out.unflatten(0, shape),
            lse.unflatten(0, shape),
            [m.unflatten(0, shape) for m in masses],
        )
    return out, lse, masses


def _keys(side: BlockSide, b: int) -> tuple[Tensor, Tensor, Tensor | None, int]:
    key, ragged = as_packed_heads("key", side.key, side.ragged)
    rows = _ranges(Ragged(*ragged))[b]
    k, bias = _clean(key, side.bias, rows)
    v, _ = _clean(side.value.reshape(-1, *side.value.shape[-2:]), side.bias, rows)
    return k, v, bias, k.shape[0]
