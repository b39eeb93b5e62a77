"""Specification of `position_biased_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, as_packed_heads
from survfuse.reference.cross_attention import _ranges
from survfuse.reference.dropout import draw_seed, keep_mask
from survfuse.reference.pool_bag import _logsumexp, _softmax

Mlp = Sequence[tuple[Tensor, Tensor]]

# the measured reach of a table, widened by this: the farthest offset must not round past its edge
_MARGIN = 1.0001
# where all offsets are zero a table still needs an extent
_LEAST_REACH = 1e-3


def position_biased_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    mlp: Mlp,
    *,
    query_ragged: Ragged | None = None,
    bias: str = "exact",
    table_size: int = 256,
    table_range: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention biased by an MLP of offsets; see `survfuse.ops.position_biased_attention`."""
    return position_biased_attention_with_lse(
        query,
        key,
        value,
        query_pos,
        key_pos,
        mlp,
        query_ragged=query_ragged,
        bias=bias,
        table_size=table_size,
        table_range=table_range,
        scale=scale,
        dropout_p=dropout_p,
    )[0]


def position_biased_attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    mlp: Mlp,
    *,
    query_ragged: Ragged | None = None,
    bias: str = "exact",
    table_size: int = 256,
    table_range: float | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `position_biased_attention`, and the logsumexp of the logits."""
    seed = draw_seed(key.device) if dropout_p > 0 else None
    packed, query_ragged = as_packed_heads("query", query, query_ragged)
    query_pos = packed_positions(query, query_pos)
    heads, kind = query.shape[-2], accumulation_type(key.dtype)
    mlp = [(weight.to(kind), shift.to(kind)) for weight, shift in mlp]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if bias == "table":
        reach = table_reach(query_pos, key_pos, query_ragged, table_range)
        table = make_table(mlp, table_size, reach)
    outs, lses = [], []
    for b, queries in enumerate(_ranges(query_ragged)):
        offset = query_pos[queries][:, None, None, :] - key_pos[b]  # [n, G, M, 2]
        u = signed_log(offset.to(kind))
        shift = interpolate(table, u, reach) if bias == "table" else evaluate(mlp, u)
        shift = shift.movedim(-1, 2).flatten(1, 2)  # [n, H, M]
        logits = scale * torch.einsum("nhe,khe->nhk", packed[queries].to(kind), key[b].to(kind))
        logits = logits + shift
        flat = logits.flatten(0, 1)
        lse = _logsumexp(flat)
        weights = _softmax(flat, lse)
        if seed is not None:
            row = torch.arange(flat.shape[0], device=key.device)
            position = torch.arange(flat.shape[1], device=key.device)
            weights = weights * keep_mask(seed, b, row, position, dropout_p) / (1.0 - dropout_p)
        outs.append(torch.einsum("nhk,khe->nhe", weights.view(logits.shape), value[b].to(kind)))
        lses.append(lse.reshape(-1, heads))
    outs.append(query.new_zeros((0, heads, value.shape[-1]), dtype=kind))
    lses.append(query.new_zeros((0, heads), dtype=kind))
    out, lse = torch.cat(outs).to(query.dtype), torch.cat(lses)
    if query.dim() == 4:
        return out.unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])
    return out, lse


def packed_positions(query: Tensor, query_pos: Tensor) -> Tensor:
    """One position per packed query, [T, 2]; [Lq, 2] is the same for all bags."""
    if query.dim() == 4 and query_pos.dim() == 2:
        query_pos = query_pos.expand(query.shape[0], -1, -1)
    return query_pos.reshape(-1, 2)


def signed_log(offset: Tensor) -> Tensor:
    """sign(d) log(1 + |d|), whose derivative at 0 is 1."""
    ahead = torch.log1p(offset.clamp(min=0.0))
    behind = -torch.log1p((-offset).clamp(min=0.0))
    return torch.where(offset >= 0, ahead, behind)


def evaluate(mlp: Mlp, u: Tensor) -> Tensor:
    """The MLP with ReLU between its layers: [..., 2] to [..., O]."""
    *hidden, (weight, shift) = mlp
    for hidden_weight, hidden_shift in hidden:
        u = torch.relu(linear(u, hidden_weight, hidden_shift))
    return linear(u, weight, shift)


def table_reach(
    query_pos: Tensor, key_pos: Tensor, ragged: Ragged, table_range: float | None
) -> Tensor:
    """[2]: the largest signed log of an offset that a table covers, along x and y.

    Args:
        query_pos: [T, 2]; rows in no bag do not count, nor do positions that are not finite.
        key_pos: [B, G, M, 2].
        ragged: the ranges of the queries.
        table_range: the largest offset covered; None measures it.
    """
    if table_range is not None:
        return key_pos.new_full((2,), math.log1p(table_range))
    queries, keys = query_pos.detach(), key_pos.detach().reshape(-1, 2)
    inside = _in_a_bag(ragged, queries.shape[0])
    low_q, high_q = _extent(queries, inside[:, None])
    low_k, high_k = _extent(keys, torch.ones_like(keys, dtype=torch.bool))
    farthest = torch.maximum(high_q - low_k, high_k - low_q)
    return (farthest.clamp(min=0.0).log1p() * _MARGIN).clamp(min=_LEAST_REACH)


def _in_a_bag(ragged: Ragged, n_rows: int) -> Tensor:
    """[T] bool: rows that a bag holds, without a look at the ranges by the host."""
    first = ragged.starts.clamp(0, n_rows)
    last = (ragged.starts + ragged.lengths).clamp(0, n_rows)
    change = first.new_zeros(n_rows + 1)
    one = torch.ones_like(first)
    change = change.index_add(0, first, one).index_add(0, last, -one)
    return change.cumsum(0)[:-1] > 0


def _extent(positions: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The least and greatest coordinate [2] of [n, 2]; infinities where nothing counts."""
    counted = counted & positions.isfinite()
    nothing = positions.new_full((1, 2), torch.inf)
    low = torch.cat([torch.where(counted, positions, torch.inf), nothing]).amin(0)
    high = torch.cat([torch.where(counted, positions, -torch.inf), -nothing]).amax(0)
    return low, high


def make_table(mlp: Mlp, size: int, reach: Tensor) -> Tensor:
    """[O, n, n]: the MLP on n x n nodes, evenly spaced from -reach to reach in the signed log."""
    nodes = torch.linspace(-1.0, 1.0, size, dtype=reach.dtype, device=reach.device)
    x, y = nodes * reach[0], nodes * reach[1]
    grid = torch.stack([x[:, None].expand(-1, size), y[None, :].expand(size, -1)], -1)
    return evaluate(mlp, grid).movedim(-1, 0)


def interpolate(table: Tensor, u: Tensor, reach: Tensor) -> Tensor:
    """The table [O, n, n] between its nodes, bilinear; [..., 2] to [..., O].

    Beyond the table the value at its edge, without a gradient along that axis.
    """
    n = table.shape[1]
    per_cell = (n - 1) / (2.0 * reach)
    at = (u.clamp(-reach, reach) + reach) * per_cell
    # NaN stays in the fraction; as an index it must be one
    cell = at.detach().nan_to_num(0.0).floor().clamp(0, n - 2)
    fx, fy = (at - cell)[..., None].unbind(-2)
    i, j = cell.long().unbind(-1)
    nodes = table.movedim(0, -1)
    low = nodes[i, j] * (1.0 - fy) + nodes[i, j + 1] * fy
    high = nodes[i + 1, j] * (1.0 - fy) + nodes[i + 1, j + 1] * fy
    return low * (1.0 - fx) + high * fx
