"""`sample_bag` in plain torch over tiles of the points.

Contract: survfuse/ops/sample_bag.py.  Oracle: survfuse/reference/sample_bag.py.
Math: docs/math.md, "Sampling a bag between its patches".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.grid import GridIndex
from survfuse.pooling import accumulation_type

# of the features of a tile's corners, widened: they are read several times
_CPU_TILE_BYTES = 4 << 20
_DEVICE_TILE_BYTES = 256 << 20


class Corners(NamedTuple):
    """The four cells around each of n points: upper left, upper right, lower left, lower right."""

    rows: Tensor  # [n, 4] stored rows; 0 where there is no tissue
    group: Tensor  # [n, 1]
    tissue: Tensor  # [n, 4] bool
    shares: Tensor  # [n, 4] what each counts, renormalised if asked for; 0 without tissue
    total: Tensor  # [n] sum of the bilinear weights on tissue; 1 if not renormalised
    d_shares: Tensor  # [n, 4, 2] of the bilinear weights by (x, y); 0 without tissue


def sample_bag_forward(bag: Tensor, grid: GridIndex, points: Tensor, renormalise: bool) -> Tensor:
    """Samples [B, G, M, D / G] of the type of the bag."""
    n_groups = points.shape[1]
    width = bag.shape[1] // n_groups
    out = bag.new_zeros((*points.shape[:3], width))
    if bag.shape[0] == 0 or grid.index.shape[0] == 0:
        return out
    stored = bag.unflatten(1, (n_groups, width))
    flat = out.view(-1, width)
    for tile in _tiles(points, width):
        corners = _corners(bag.shape[0], grid, points, tile, renormalise)
        features = _features(stored, corners)
        flat[tile] = (corners.shares[..., None] * features).sum(1).to(bag.dtype)
    return out


def sample_bag_backward(
    d_samples: Tensor,
    bag: Tensor,
    grid: GridIndex,
    points: Tensor,
    renormalise: bool,
    needs_bag: bool,
    needs_points: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d_bag [T, D] and d_points, of the accumulation type; None where not needed."""
    kind = accumulation_type(bag.dtype)
    n_groups = points.shape[1]
    width = bag.shape[1] // n_groups
    d_bag = torch.zeros(bag.shape, dtype=kind, device=bag.device) if needs_bag else None
    d_points = torch.zeros(points.shape, dtype=kind, device=bag.device) if needs_points else None
    if bag.shape[0] == 0 or grid.index.shape[0] == 0:
        return d_bag, d_points
    stored = bag.unflatten(1, (n_groups, width))
    d_flat = d_samples.reshape(-1, width)
    for tile in _tiles(points, width):
        corners = _corners(bag.shape[0], grid, points, tile, renormalise)
        d_out = d_flat[tile].to(kind)
        if d_bag is not None:
            parts = corners.shares[..., None] * d_out[:, None]
            parts = torch.where(corners.tissue[..., None], parts, 0.0)
            slots = corners.rows * n_groups + corners.group
            d_bag.view(-1, width).index_add_(0, slots.flatten(), parts.flatten(0, 1))
        if d_points is not None:
            along = (_features(stored, corners) * d_out[:, None]).sum(-1)
            if renormalise:
                # of these very numbers: a point with tissue on one corner gets exactly zero
                mean = (corners.shares * along).sum(1, keepdim=True)
                along = (along - mean) / corners.total[:, None]
            d_points.view(-1, 2)[tile] = (along[..., None] * corners.d_shares).sum(1)
    return d_bag, d_points


def _tiles(points: Tensor, width: int) -> Iterator[slice]:
    """Slices of the points, all bags and groups in a row."""
    n_points = points.shape[:3].numel()
    n_bytes = _CPU_TILE_BYTES if points.device.type == "cpu" else _DEVICE_TILE_BYTES
    step = max(64, n_bytes // (4 * 4 * width))
    for at in range(0, n_points, step):
        yield slice(at, min(at + step, n_points))


def _corners(
    n_rows: int, grid: GridIndex, points: Tensor, tile: slice, renormalise: bool
) -> Corners:
    n_groups, per_group = points.shape[1:3]
    number = torch.arange(tile.start, tile.stop, device=points.device)
    bag = number // (n_groups * per_group)
    group = number // per_group % n_groups
    height, width = grid.shapes[bag].unbind(1)
    x, y = points.reshape(-1, 2)[tile].unbind(1)
    # false for NaN; whatever is far out cannot be made an integer
    near = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x, y = torch.where(near, x, 0.0), torch.where(near, y, 0.0)
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    across, down = (torch.stack([1.0 - s, s], 1) for s in (right_share, bottom_share))

    corner = torch.arange(4, device=points.device)
    cx, cy = left.long()[:, None] + corner % 2, top.long()[:, None] + corner // 2
    inside = near[:, None] & (cx >= 0) & (cx < width[:, None]) & (cy >= 0) & (cy < height[:, None])
    cell = grid.cell_offsets[bag][:, None] + cy * width[:, None] + cx
    # offsets that are wrong reach no memory on a device, where nothing was checked
    last = grid.index.shape[0] - 1
    row = grid.index[torch.where(inside, cell, 0).clamp(0, last)].long()
    tissue = inside & (row >= 0) & (row < n_rows)
    row = torch.where(tissue, row, 0)

    weights = (down[:, :, None] * across[:, None, :]).flatten(1)
    shares = torch.where(tissue, weights, 0.0)
    total = torch.ones_like(x)
    sign = 2 * corner[:2] - 1
    by_x = (down[:, :, None] * sign).flatten(1)
    by_y = (sign[:, None] * across[:, None, :]).flatten(1)
    d_shares = torch.where(tissue[..., None], torch.stack([by_x, by_y], 2), 0.0)
    if renormalise:
        # summed like the shares are, so that a single corner counts exactly 1
        total = shares.sum(1)
        some = total > 0
        total = torch.where(some, total, 1.0)
        shares = shares / total[:, None]
        d_shares = torch.where(some[:, None, None], d_shares, 0.0)
    return Corners(row, group[:, None], tissue, shares, total, d_shares)


def _features(stored: Tensor, corners: Corners) -> Tensor:
    """[n, 4, D / G] of the accumulation type; zeros without tissue, where row 0 may hold NaN."""
    features = stored[corners.rows, corners.group].to(accumulation_type(stored.dtype))
    return torch.where(corners.tissue[..., None], features, 0.0)
