"""`position_biased_attention` in plain torch over tiles of queries.

Contract: survfuse/ops/position_biased_attention.py.
Oracle: survfuse/reference/position_biased_attention.py.
Math: docs/math.md, "Attention biased by position".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.attention import Attended
from survfuse.pooling import accumulation_type
from survfuse.position_bias import PositionBias, PositionedAttention, PositionedNeeds
from survfuse.tiled.cross_attention import (
    by_row,
    dropped,
    multiply,
    packed_rows,
    read_packed,
    read_queries,
    without_rounding_of_lse,
)
from survfuse.tiled.pool_bag import add_rows
from survfuse.tiled.position_bias import BiasTile, bias_tile
from survfuse.tiled.tiles import Tile, operand_type, tiles

# numbers of the widest thing a tile holds: a hidden layer, or the logits
_CPU_NUMBERS, _DEVICE_NUMBERS = 1 << 19, 1 << 25


def position_biased_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    bias: PositionBias,
    attention: PositionedAttention,
) -> Attended:
    """Results of the accumulation type."""
    call = _Call(query, key, value, query_pos, key_pos, bias, attention)
    shape = (attention.total + 1, query.shape[1])  # lockstep tiles write one row more
    out = key.new_zeros((*shape, value.shape[3]), dtype=call.kind)
    lse = key.new_full(shape, -torch.inf, dtype=call.kind)
    for tile in call.tiles():
        logits = call.logits(tile, call.bias(tile))
        tile_lse = logits.logsumexp(-1)
        weights = call.dropped(tile, torch.exp(logits - _safe(tile_lse)[..., None]))
        z = multiply(weights.to(call.operand), call.values(tile))
        rows = packed_rows(tile, attention.total)
        out[rows], lse[rows] = by_row(z, rows), by_row(tile_lse, rows)
    return Attended(out[: attention.total], lse[: attention.total])


def position_biased_attention_backward(
    d_results: Attended,
    results: Attended,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_pos: Tensor,
    key_pos: Tensor,
    bias: PositionBias,
    attention: PositionedAttention,
    needs: PositionedNeeds,
) -> tuple[Tensor | None, ...]:
    """The gradients in the order of `needs`, of the accumulation type; None where not needed."""
    call = _Call(query, key, value, query_pos, key_pos, bias, attention)
    likes = (query, key, value, query_pos, key_pos, bias.parameters)
    gradients = PositionedNeeds(
        *(
            torch.zeros(like.shape, dtype=call.kind, device=like.device) if need else None
            for like, need in zip(likes, needs, strict=True)
        )
    )
    for tile in call.tiles():
        shift = call.bias(tile)
        logits = call.logits(tile, shift)
        lse, d_lse = (read_packed(tile, t[..., None]) for t in (results.lse, d_results.lse))
        softmax = without_rounding_of_lse(torch.exp(logits - _safe(lse)))
        if tile.valid is not None:
            softmax = torch.where(tile.valid[:, None, :, None], softmax, 0.0)
        dz = read_packed(tile, d_results.out).to(call.operand)
        weights = call.dropped(tile, softmax)
        slopes = weights * multiply(dz, call.values(tile).mT)
        # the mean of these very numbers: with few keys little but its rounding may be left
        mean = slopes.sum(-1, keepdim=True)
        d_logits = slopes - softmax * mean + softmax * d_lse
        _add_features(gradients, call, tile, d_logits, weights, dz)
        _add_bias(gradients, tile, shift, d_logits)
    return tuple(gradients)


def _safe(lse: Tensor) -> Tensor:
    """What to subtract: 0 where every logit is -inf."""
    return torch.where(lse == -torch.inf, 0.0, lse)


def _add_features(gradients, call: _Call, tile: Tile, d_logits, weights, dz) -> None:
    d_scores = (d_logits * call.attention.scale).to(call.operand)
    if gradients.query is not None:
        add_rows(gradients.query, tile, multiply(d_scores, call.keys(tile)).transpose(1, 2))
    if gradients.key is not None:
        gradients.key[tile.bags] += multiply(d_scores.mT, call.queries(tile)).transpose(1, 2)
    if gradients.value is not None:
        gradients.value[tile.bags] += multiply(weights.to(dz.dtype).mT, dz).transpose(1, 2)


def _add_bias(gradients, tile: Tile, shift: BiasTile, d_logits: Tensor) -> None:
    """Add to the gradients of both positions and of the bias' parameters."""
    positions = gradients.query_pos is not None or gradients.key_pos is not None
    if not positions and gradients.bias is None:
        return
    n_groups = shift.offset.shape[1]
    d_shift = d_logits.unflatten(1, (n_groups, -1)).movedim(2, -1)  # [B, G, n, M, O]
    d_u = shift.differentiate(d_shift, gradients.bias, positions)
    if not positions:
        return
    d_offset = d_u / (1.0 + shift.offset.abs())
    if gradients.query_pos is not None:
        add_rows(gradients.query_pos, tile, d_offset.sum((1, 3)))
    if gradients.key_pos is not None:
        gradients.key_pos[tile.bags] -= d_offset.sum(2)


class _Call(NamedTuple):
    """A call's inputs, read tile by tile."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_pos: Tensor
    key_pos: Tensor
    bias_of: PositionBias
    attention: PositionedAttention

    @property
    def kind(self) -> torch.dtype:
        """The type of sums."""
        return accumulation_type(self.key.dtype)

    @property
    def operand(self) -> torch.dtype:
        """The type of the products of features."""
        return operand_type(self.key, centred=False)

    def tiles(self) -> Iterator[Tile]:
        """Tiles of queries; none without keys, whose results are there already."""
        n_bags, n_groups, n_keys, _ = self.key_pos.shape
        if n_keys == 0:
            return
        on_cpu = self.key.device.type == "cpu"
        wide = max(self.bias_of.width * n_groups, self.query.shape[1]) * n_keys
        wide *= 1 if on_cpu else n_bags
        room = (_CPU_NUMBERS if on_cpu else _DEVICE_NUMBERS) // max(1, wide)
        for group in tiles(self.attention.ragged, self.query, max_rows=max(1, room)):
            yield from group

    def queries(self, tile: Tile) -> Tensor:
        """[B, H, n, d]; zero behind a bag's end."""
        return read_queries(tile, self.query, self.key)

    def keys(self, tile: Tile) -> Tensor:
        """[B, H, M, d]."""
        return self.key[tile.bags].to(self.operand).transpose(1, 2)

    def values(self, tile: Tile) -> Tensor:
        """[B, H, M, dv]."""
        return self.value[tile.bags].to(self.operand).transpose(1, 2)

    def bias(self, tile: Tile) -> BiasTile:
        """The bias of each pair of the tile, with what its gradient needs."""
        positions = tile.take(self.query_pos)  # [B, n, 2]
        if tile.valid is not None:
            positions = torch.where(tile.valid[..., None], positions, 0.0)
        offset = positions[:, None, :, None, :] - self.key_pos[tile.bags][:, :, None]
        return bias_tile(offset, self.bias_of, self.query.shape[1] // self.key_pos.shape[1])

    def logits(self, tile: Tile, shift: BiasTile) -> Tensor:
        """[B, H, n, M], of the type of sums."""
        scores = multiply(self.queries(tile), self.keys(tile).mT) * self.attention.scale
        return scores + shift.values.movedim(-1, 2).flatten(1, 2)

    def dropped(self, tile: Tile, weights: Tensor) -> Tensor:
        """The weights [B, H, n, M] that dropout keeps, scaled."""
        n_bags = self.key.shape[0]
        return dropped(weights, tile, 0, n_bags, self.attention.seed, self.attention.dropout_p)
