"""Layers, maps and sparse bags that the tests of deformable cross-attention share."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.layers import DeformableCrossAttention
from survfuse.ops import GridIndex

DIM = 16
# an irregular outline of several sizes: rows of the matrix are shared, and one bag is empty
RANGES = Ragged.from_ranges([0, 40, 7, 20, 90], [60, 45, 0, 1, 30])


def make_layer(**changed) -> DeformableCrossAttention:
    sizes = {"heads": 4, "dim_head": 6, "offset_groups": 2}
    layer = DeformableCrossAttention(DIM, **(sizes | changed)).double()
    # large enough offsets that points leave the map, and a bias that matters
    with torch.no_grad():
        layer.to_offsets[2].weight.mul_(4)
        layer.rel_pos_bias.mlp[2].weight.mul_(4)
    return layer


def maps(height: int, width: int, n_bags: int = 2) -> list[Tensor]:
    shape = (n_bags, height * width, DIM)
    return [torch.randn(shape, dtype=torch.double, requires_grad=True) for _ in range(2)]


def sparse_bags(ragged: Ragged = RANGES) -> tuple[Tensor, Tensor, GridIndex]:
    g = torch.Generator().manual_seed(3)
    places = torch.randperm(17 * 14, generator=g)[:120]
    coords = torch.stack([places % 17, places // 17], 1) * 256
    grid = ops.grid_index(coords, patch_size=256, ragged=ragged)
    query, context = (torch.randn(120, DIM, dtype=torch.double, generator=g) for _ in range(2))
    return query.requires_grad_(), context.requires_grad_(), grid


def full_grid(height: int, width: int, n_bags: int) -> tuple[GridIndex, Ragged]:
    cell = torch.arange(height * width)
    coords = torch.stack([cell % width, cell // width], 1).repeat(n_bags, 1)
    ragged = Ragged.from_lengths([height * width] * n_bags)
    return ops.grid_index(coords, patch_size=1, ragged=ragged), ragged
