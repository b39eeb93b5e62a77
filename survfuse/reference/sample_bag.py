"""Specification of `sample_bag`."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.grid import GridIndex
from survfuse.pooling import accumulation_type


def sample_bag(bag: Tensor, grid: GridIndex, points: Tensor, *, corners: str = "zero") -> Tensor:
    """Features of a bag between its patches; see `survfuse.ops.sample_bag`."""
    kind = accumulation_type(bag.dtype)
    n_groups = points.shape[1]
    height, width = grid.shapes[:, :, None, None].unbind(1)
    x, y = points.unbind(-1)
    # within reach of a cell; false for NaN
    near = (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x, y = torch.where(near, x, 0.0), torch.where(near, y, 0.0)
    left, top = x.detach().floor(), y.detach().floor()
    right_share, bottom_share = x - left, y - top

    # a last row that stands for no tissue, and one cell more where there is none
    padded = torch.nn.functional.pad(bag, (0, 0, 0, 1)).unflatten(1, (n_groups, -1))
    index = torch.cat([grid.index, grid.index.new_full((1,), -1)])
    group = torch.arange(n_groups, device=bag.device)[:, None]
    sampled, total = 0.0, 0.0
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        cx, cy = left.long() + right, top.long() + down
        inside = near & (cx >= 0) & (cx < width) & (cy >= 0) & (cy < height)
        cell = grid.cell_offsets[:-1, None, None] + cy * width + cx
        row = index[torch.where(inside, cell, grid.index.shape[0])].long()
        tissue = (row >= 0) & (row < bag.shape[0])
        share = (right_share if right else 1.0 - right_share) * (
            bottom_share if down else 1.0 - bottom_share
        )
        share = torch.where(tissue, share, 0.0)
        features = padded[torch.where(tissue, row, bag.shape[0]), group].to(kind)
        sampled = sampled + share[..., None] * features
        total = total + share
    if corners == "renormalise":
        some = total > 0
        whole = sampled / torch.where(some, total, 1.0)[..., None]
        sampled = torch.where(some[..., None], whole, 0.0)
    return sampled.to(bag.dtype)
