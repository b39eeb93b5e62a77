"""The surroundings of a patch: the mean features of the patches next to it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from survfuse.grid import GridIndex
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged

# numbers of a dense map held at once, 64 MB in fp32
_AT_ONCE = 2**24


def neighbourhood_mean(bag: Tensor, grid: GridIndex, ragged: Ragged, *, radius: int) -> Tensor:
    r"""Mean features of the patches in the square around each patch, itself included.

    .. math:: m_i = \mathrm{mean} \{ x_j : |cell_j - cell_i|_\infty \le radius \}

    Places without tissue, and beyond the slide, take no part in a mean.

    Args:
        bag: [T, D] packed.
        grid: of its patches, from `survfuse.ops.grid_index`, one patch per cell and one cell per
            patch.
        ragged: the ranges of rows that the grid was made for.
        radius: cells to each side; 3 is a square of 7 x 7.

    Returns:
        [total, D] of the type of the bag, packed in batch order; differentiable.

    Raises:
        ValueError: `radius` is below 1.

    Cost: two passes over the cells of the bounding boxes, (2 radius + 1) additions each in a tile
    of channels; holds the result and one tile of at most 64 MB.
    """
    if not isinstance(radius, int) or isinstance(radius, bool) or radius < 1:
        raise ValueError(f"radius is {radius!r}; it must be an integer of at least 1")
    kind = accumulation_type(bag.dtype)
    packed = ragged.packed().starts
    offsets, parts, places = grid.cell_offsets.tolist(), [], []
    for (height, width), bags in _by_shape(grid).items():
        # the cells of all bags of one shape: [bags, height, width] rows of the matrix
        index = torch.stack([grid.index[offsets[b] : offsets[b + 1]] for b in bags]).long()
        shown = index >= 0
        which = torch.tensor(bags, device=index.device)
        place = index + (packed - ragged.starts)[which, None]
        maps = (len(bags), -1, height, width)
        count = _box(shown.to(kind).view(maps), radius)
        step = max(1, _AT_ONCE // max(1, index.numel()))
        means = []
        for first in range(0, bag.shape[1], step):
            # selected, not multiplied: what a cell without tissue reads may be anything
            tile = bag[:, first : first + step].to(kind)[index.clamp(min=0)]
            tile = torch.where(shown[..., None], tile, 0.0).mT.reshape(maps)
            mean = _box(tile, radius) / count
            means.append(mean.flatten(2).mT[shown].to(bag.dtype))
        parts.append(torch.cat(means, 1))
        places.append(place[shown])
    if not parts:
        return bag.new_zeros(0, bag.shape[1])
    found = bag.new_zeros(ragged.total, bag.shape[1])
    return found.index_put((torch.cat(places),), torch.cat(parts))


def _by_shape(grid: GridIndex) -> dict[tuple[int, int], list[int]]:
    """Bags that hold any cell, by height and width of their maps."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for bag, (height, width) in enumerate(grid.shapes.tolist()):
        if height * width:
            shapes.setdefault((height, width), []).append(bag)
    return shapes


def _box(maps: Tensor, radius: int) -> Tensor:
    """Sums over squares, rows first: [n, C, h, w] to the same."""
    side = 2 * radius + 1
    for kernel, padding in (((1, side), (0, radius)), ((side, 1), (radius, 0))):
        maps = functional.avg_pool2d(maps, kernel, 1, padding, divisor_override=1)
    return maps
