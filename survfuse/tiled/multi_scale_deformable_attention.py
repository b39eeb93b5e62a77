"""Multi-scale deformable attention in plain torch over tiles of the queries.

Contract: survfuse/ops/multi_scale_deformable_attention.py.  Oracle: the same name under
survfuse/reference.  Math: docs/math.md, "Multi-scale deformable attention".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.deformable import Sampled, Samples, SamplingNeeds
from survfuse.pooling import accumulation_type

# bytes of the pixels that a tile gathers for one of the four corners
_CPU_TILE_BYTES, _DEVICE_TILE_BYTES = 4 << 20, 256 << 20


class _Tile(NamedTuple):
    """Samples of some queries: n queries, H heads, s = L * P samples."""

    rows: slice  # of the queries of all batches
    point: Tensor  # [n, H, s, 2]
    step: Tensor  # [.., s, 2] pixels that one unit of the point goes
    size: Tensor  # [s, 2] width and height of each sample's level
    inside: Tensor  # [n, H, s]
    fraction: Tensor  # [n, H, s, 2] of a pixel, right of and below the upper left corner
    corner: Tensor  # [n, H, s, 2] that corner
    first: Tensor  # [n, 1, s] the first row of the level within the values of all batches
    n_rows: Tensor  # [n, 1, s] the row behind the batch's last

    def corners(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Row, whether it is inside, share, and the share's slope along x and y, of each corner."""
        for dy in (0, 1):
            for dx in (0, 1):
                x, y = self.corner[..., 0] + dx, self.corner[..., 1] + dy
                width, height = self.size.to(torch.int64).unbind(-1)
                row = self.first + y * width + x
                held = self.inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
                held = held & (row < self.n_rows)
                across = self.fraction[..., 0] if dx else 1 - self.fraction[..., 0]
                down = self.fraction[..., 1] if dy else 1 - self.fraction[..., 1]
                slopes = (down if dx else -down), (across if dy else -across)
                yield torch.where(held, row, 0), held, across * down, *slopes


def multi_scale_deformable_attention_forward(value: Tensor, samples: Samples) -> Sampled:
    """Out [B, Q, H * d] of the type of the value, and lse where the weights are logits."""
    n_batches, n_rows, heads, dim = value.shape
    kind = accumulation_type(value.dtype)
    pixels = value.reshape(n_batches * n_rows, heads, dim)
    logits = samples.weights.flatten(3).flatten(0, 1).to(kind)
    lse = None if samples.reference is None else logits.logsumexp(-1)
    out = value.new_empty((*samples.points.shape[:2], heads * dim))
    target = out.view(-1, heads, dim)
    head = torch.arange(heads, device=value.device)[:, None]
    for tile in _tiles(value, samples):
        weights = _weights(logits, samples, tile)
        total = value.new_zeros((*weights.shape[:2], dim), dtype=kind)
        for row, held, share, _, _ in tile.corners():
            picked = torch.where(held[..., None], pixels[row, head], 0).to(kind)
            total += torch.matmul((weights * share)[:, :, None], picked)[:, :, 0]
        target[tile.rows] = total.to(value.dtype)
    if lse is not None:
        lse = lse.unflatten(0, samples.points.shape[:2])
    return Sampled(out, lse)


def multi_scale_deformable_attention_backward(
    d_out: Tensor, lse: Tensor | None, value: Tensor, samples: Samples, needs: SamplingNeeds
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of value, points, weights and reference; None where not needed."""
    n_batches, n_rows, heads, dim = value.shape
    kind = accumulation_type(value.dtype)
    pixels = value.reshape(n_batches * n_rows, heads, dim)
    logits = samples.weights.flatten(3).flatten(0, 1).to(kind)
    d_value = pixels.new_zeros((n_batches * n_rows * heads, dim), dtype=kind)
    d_points = torch.empty_like(samples.points).flatten(3, 4).flatten(0, 1)
    d_weights = torch.empty_like(logits)
    d_reference = None
    if needs.reference:
        d_reference = torch.empty_like(samples.reference).flatten(0, 1)
    d_rows = d_out.reshape(-1, heads, dim)
    head = torch.arange(heads, device=value.device)[:, None]
    for tile in _tiles(value, samples):
        weights, g = _weights(logits, samples, tile), d_rows[tile.rows].to(kind)
        d_weight, d_x, d_y = (torch.zeros_like(weights) for _ in range(3))
        for row, held, share, slope_x, slope_y in tile.corners():
            picked = torch.where(held[..., None], pixels[row, head], 0).to(kind)
            dot = torch.matmul(picked, g[..., None])[..., 0]
            d_weight += share * dot
            d_x += weights * slope_x * dot
            d_y += weights * slope_y * dot
            if needs.value:
                mine = torch.where(held, weights * share, 0)[..., None] * g[:, :, None]
                mine = torch.where(held[..., None], mine, 0)
                d_value.index_add_(0, (row * heads + head).flatten(), mine.flatten(0, 2))
        d_pixel = torch.stack([d_x, d_y], -1)
        # what is no number lies outside and has no gradient
        d_points[tile.rows] = torch.where(tile.inside[..., None], d_pixel * tile.step, 0)
        if samples.reference is not None:
            d_weight = weights * (d_weight - (weights * d_weight).sum(-1, keepdim=True))
        d_weights[tile.rows] = d_weight
        if d_reference is not None:
            d_reference[tile.rows] = _reference_gradient(d_pixel, tile, samples)
    return (
        d_value.view(value.shape) if needs.value else None,
        d_points.view(samples.points.shape) if needs.points else None,
        d_weights.view(samples.weights.shape) if needs.weights else None,
        None if d_reference is None else d_reference.view(samples.reference.shape),
    )


def _tiles(value: Tensor, samples: Samples) -> Iterator[_Tile]:
    """The samples of so many queries that one corner's pixels stay within bounds."""
    _, n_queries, heads, n_levels, n_points, _ = samples.points.shape
    n_rows, dim = value.shape[1], value.shape[3]
    kind = samples.points.dtype
    size = samples.shapes.flip(-1).to(kind).repeat_interleave(n_points, 0)
    areas = samples.shapes.prod(-1)
    level_first = (areas.cumsum(0) - areas).repeat_interleave(n_points)
    points = samples.points.flatten(3, 4).flatten(0, 1)
    budget = _CPU_TILE_BYTES if value.device.type == "cpu" else _DEVICE_TILE_BYTES
    step = max(1, budget // (heads * n_levels * n_points * dim * kind.itemsize))
    for at in range(0, points.shape[0], step):
        rows = slice(at, min(at + step, points.shape[0]))
        point = points[rows]
        origin, unit = -0.5, size
        if samples.reference is not None:
            reference = samples.reference.flatten(0, 1)[rows, None]
            reference = reference.repeat_interleave(n_points, 2)
            origin, unit = reference[..., :2] * size - 0.5, torch.ones_like(size)
            if reference.shape[-1] == 4:
                unit = reference[..., 2:] * size * (0.5 / n_points)
        pixel = origin + point * unit
        # NaN lies outside
        inside = ((pixel > -1) & (pixel < size)).all(-1)
        pixel = torch.where(inside[..., None], pixel, 0)
        corner = pixel.floor()
        batch = torch.arange(rows.start, rows.stop, device=value.device) // max(n_queries, 1)
        batch = batch[:, None, None] * n_rows
        yield _Tile(
            rows,
            point,
            unit,
            size,
            inside,
            pixel - corner,
            corner.to(torch.int64),
            batch + level_first,
            batch + n_rows,
        )


def _weights(logits: Tensor, samples: Samples, tile: _Tile) -> Tensor:
    """[n, H, s] the weights of a tile.

    The backward takes the softmax again: the exponential of logit - lse would lose as many digits
    as lse has before its point.
    """
    weights = logits[tile.rows]
    return weights if samples.reference is None else weights.softmax(-1)


def _reference_gradient(d_pixel: Tensor, tile: _Tile, samples: Samples) -> Tensor:
    """[n, L, 2 or 4] summed over heads and points."""
    n_levels, n_points = samples.points.shape[3:5]
    d_location = d_pixel * tile.size
    parts = [d_location]
    if samples.reference.shape[-1] == 4:
        taken = torch.where(tile.inside[..., None], tile.point, 0)
        parts.append(d_location * taken * (0.5 / n_points))
    summed = torch.cat(parts, -1).sum(1)
    return summed.unflatten(1, (n_levels, n_points)).sum(2)
