"""`project_bag` in plain torch over tiles of the bag. Contract: survfuse/ops/project_bag.py."""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse.pooling import Pooling, accumulation_type
from survfuse.tiled.pool_bag import add_rows, included, normalize_gradient, read_tile
from survfuse.tiled.tiles import Tile, tiles


def project_bag_forward(
    bag: Tensor, weight: Tensor, shift: Tensor | None, bias: Tensor | None, pooling: Pooling
) -> Tensor:
    """[total, E] of the type of the bag."""
    # one row more, where lockstep tiles put what lies behind a bag's end
    out = bag.new_zeros((pooling.total + 1, weight.shape[0]))
    w = weight.to(bag.dtype)
    b = None if shift is None else shift.to(bag.dtype)
    for group in tiles(pooling.ragged, bag):
        for tile in group:
            x = _read(tile, bag, bias, pooling)[0]
            if isinstance(tile.packed, slice):
                target = out[tile.packed]
                torch.mm(x[0], w.T, out=target)
                if b is not None:
                    target += b
            else:
                y = torch.nn.functional.linear(x, w, b)
                out[torch.where(tile.valid, tile.packed, pooling.total)] = y
    return out[: pooling.total]


def project_bag_backward(
    d_out: Tensor,
    bag: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pooling: Pooling,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_bag [T, D] of the bag's type, d_weight [E, D] and d_shift [E]; None where not needed."""
    needs_bag, needs_weight, needs_shift = needs
    kind = accumulation_type(bag.dtype)
    d_bag = torch.zeros(bag.shape, dtype=kind, device=bag.device) if needs_bag else None
    d_weight = torch.zeros(weight.shape, dtype=kind, device=bag.device) if needs_weight else None
    w = weight.to(bag.dtype)
    for group in tiles(pooling.ragged, bag):
        for tile in group:
            x, row_bias, row_rstd = _read(tile, bag, bias, pooling)
            d_y = _read_gradient(tile, d_out.to(bag.dtype))
            if d_weight is not None:
                rows, columns = d_y.flatten(0, 1), x.flatten(0, 1)
                if d_weight.dtype == bag.dtype:
                    d_weight.addmm_(rows.T, columns)
                else:
                    d_weight += rows.T @ columns
            if d_bag is not None:
                d_x = (d_y @ w).to(kind)
                if pooling.normalize:
                    d_x = normalize_gradient(d_x, x.to(kind), row_rstd)
                add_rows(d_bag, tile, included(d_x, row_bias))
    d_shift = d_out.to(kind).sum(0) if needs_shift else None
    return None if d_bag is None else d_bag.to(bag.dtype), d_weight, d_shift


def _read(tile: Tile, bag: Tensor, bias: Tensor | None, pooling: Pooling):
    """As `read_tile`, with the rows in the type of the bag, which its products round to anyhow."""
    x, row_bias, row_rstd = read_tile(tile, bag, bias, pooling)
    return x.to(bag.dtype), row_bias, row_rstd


def _read_gradient(tile: Tile, d_out: Tensor) -> Tensor:
    """Rows of [total, E] as [B, n, E]; zero for rows behind a bag's end."""
    if isinstance(tile.packed, slice):
        return d_out[tile.packed][None]
    rows = d_out[tile.packed.clamp(max=max(0, d_out.shape[0] - 1))]
    return torch.where(tile.valid[..., None], rows, 0.0)
