"""Fourier encodings of positions, for grids, patch indices and true coordinates.

A coordinate p in [-1, 1] becomes `sin(pi s p)`, `cos(pi s p)` for scales s spaced evenly from 1 to
`max_frequency / 2`, and p itself. Source: Jaegle et al., "Perceiver", ICML 2021, section 3.2, in
the form HEALNet v0.1.0 uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from survfuse.ragged import Ragged


def fourier_channels(axes: int, bands: int) -> int:
    """Channels that encode a position with `axes` coordinates: `axes * (2 * bands + 1)`."""
    return axes * (2 * bands + 1)


def fourier_encode(positions: Tensor, *, bands: int, max_frequency: float) -> Tensor:
    """Encode positions.

    Args:
        positions: [..., axes], each coordinate in [-1, 1].
        bands: number of frequencies.
        max_frequency: twice the highest frequency, in half periods per unit.

    Returns:
        [..., axes * (2 * bands + 1)]: per axis the sines, the cosines, then the coordinate.
    """
    scales = torch.linspace(
        1.0, max_frequency / 2, bands, device=positions.device, dtype=positions.dtype
    )
    angles = positions[..., None] * scales * math.pi
    return torch.cat([angles.sin(), angles.cos(), positions[..., None]], dim=-1).flatten(-2)


def grid_positions(
    sizes: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Positions of a grid's cells [*sizes, len(sizes)]; every axis runs from -1 to 1."""
    axes = [torch.linspace(-1.0, 1.0, size, dtype=dtype, device=device) for size in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def index_positions(ragged: Ragged, *, dtype: torch.dtype) -> Tensor:
    """Position of every patch by its place in its bag, as `linspace(-1, 1, N)` [total, 1].

    The bag's order is meant to carry meaning then: a model that reads these positions is not
    invariant to a permutation of the patches.
    """
    index, length = ragged.places(), ragged.per_patch(ragged.lengths)
    step = 2.0 / (length - 1).clamp(min=1).to(dtype)
    # counted from the nearer end, as torch.linspace does, so that both ends are exact
    from_start = -1.0 + step * index.to(dtype)
    from_end = 1.0 - step * (length - 1 - index).to(dtype)
    first_half = (index < length // 2) | (length == 1)
    return torch.where(first_half, from_start, from_end)[:, None]


def coordinate_positions(coords: Tensor, ragged: Ragged) -> Tensor:
    """Position of every patch by its slide coordinates [total, 2], in float32.

    Each bag is centred on its bounding box and divided by half the box's longer side, so that the
    aspect ratio stays and the order of the patches does not matter.

    Args:
        coords: [T, 2] patch corners, in one unit per bag, such as level-0 pixels.
        ragged: the ranges of the bags.
    """
    coords = coords.index_select(0, ragged.rows()).to(torch.float32)
    bag = ragged.bags()[:, None].expand(-1, 2)
    bounds = coords.new_zeros(ragged.n_bags, 2)
    low = bounds.scatter_reduce(0, bag, coords, "amin", include_self=False)
    high = bounds.scatter_reduce(0, bag, coords, "amax", include_self=False)
    half_side = ((high - low).amax(-1, keepdim=True) / 2).clamp(min=torch.finfo(low.dtype).tiny)
    centre = low + (high - low) / 2
    return (coords - centre.gather(0, bag)) / half_side.gather(0, bag[:, :1])


def append_channels(features: Tensor, ragged: Ragged, channels: Tensor) -> tuple[Tensor, Ragged]:
    """A packed copy of the bags with further channels behind their own.

    Only rows that belong to a bag are copied, so a minibatch of a cohort that lies in memory costs
    the minibatch. The row stride is a multiple of 8 elements, so that rows stay aligned.

    Args:
        features: [T, D].
        ragged: the ranges of the bags in `features`.
        channels: [total, C], one row per packed patch.

    Returns:
        The bag [total, D + C], and its ranges, one bag behind the other.
    """
    rows = ragged.rows()
    channels = channels.to(features.dtype)
    needs_graph = torch.is_grad_enabled() and (features.requires_grad or channels.requires_grad)
    if needs_graph or torch.compiler.is_compiling():
        return torch.cat([features.index_select(0, rows), channels], dim=1), ragged.packed()
    width, extra = features.shape[1], channels.shape[1]
    stride = -(-(width + extra) // 8) * 8
    bag = features.new_empty(ragged.total, stride)[:, : width + extra]
    torch.index_select(features, 0, rows, out=bag[:, :width])
    bag[:, width:] = channels
    return bag, ragged.packed()
