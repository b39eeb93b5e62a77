"""Where patches lie on the grid they were cut on, from the corners that tiling tools write."""

from __future__ import annotations

import torch
from torch import Tensor


def patch_cells(
    coords: Tensor,
    bag: Tensor,
    n_bags: int,
    *,
    patch_size: float | None = None,
    gap: int = 1,
) -> Tensor:
    """Cells (x, y) of patches, each patch of a bag in one of its own.

    Patches that share a cell lie on maps side by side: several slides of a patient, whose
    coordinates start anew, and pieces of tissue that were cut on grids of their own. The k-th patch
    of a cell lies on the k-th map.

    Args:
        coords: [total, 2] (x, y) in any unit, finite, packed in batch order.
        bag: [total] the bag of each patch, ascending.
        n_bags: B.
        patch_size: distance from a patch to the next; None measures it in each bag, see
            `patch_distances`.
        gap: cells between maps that lie side by side, at least; maps begin at multiples of it.

    Returns:
        [total, 2] int64, from 0 in each bag.
    """
    coords = coords.double()
    if patch_size is None:
        size = patch_distances(coords, bag, n_bags)[bag, None]
    else:
        size = torch.full_like(coords[:, :1], float(patch_size))
    pair = bag[:, None].expand(-1, 2)
    lowest = coords.new_full((n_bags, 2), torch.inf).scatter_reduce(0, pair, coords, "amin")
    cells = ((coords - lowest[bag]) / size + 0.5).floor().long()
    extent = cells.new_zeros(n_bags, 2).scatter_reduce(0, pair, cells, "amax")
    width = extent[:, 0] + 1
    # a number for each cell of each bag, in the order of the bags
    n_cells = width * (extent[:, 1] + 1)
    first = n_cells.cumsum(0) - n_cells
    number = first[bag] + cells[:, 1] * width[bag] + cells[:, 0]
    order = number.argsort(stable=True)
    ordered = number[order]
    # how many patches of the same cell came before
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - torch.searchsorted(
        ordered, ordered
    )
    shift = -((width + gap) // -gap) * gap
    return torch.stack([cells[:, 0] + rank * shift[bag], cells[:, 1]], 1)


def patch_distances(coords: Tensor, bag: Tensor, n_bags: int) -> Tensor:
    """The commonest step from a patch to the next in its row or column, of each bag.

    Args:
        coords: [total, 2] fp64, in any unit.
        bag: [total] the bag of each patch, ascending.
        n_bags: B.

    Returns:
        [B] fp64. Where no two patches share a row or a column, the commonest distance of two that
        follow each other along an axis; 1 for a bag of one patch.
    """
    found = coords.new_ones(n_bags)
    # the later overwrites the earlier: rows and columns count more than neighbours along an axis
    for same_line in (False, True):
        steps, owners = [], []
        for along, across in ((0, 1), (1, 0)):
            order = coords[:, along].argsort(stable=True)
            if same_line:
                # by row, and within it by column
                order = order[coords[order, across].argsort(stable=True)]
            order = order[bag[order].argsort(stable=True)]
            step, owner = coords[order, along].diff(), bag[order]
            real = (step > 0) & (owner[1:] == owner[:-1])
            if same_line:
                line = coords[order, across]
                real &= line[1:] == line[:-1]
            steps.append(step[real])
            owners.append(owner[1:][real])
        bags, values = _commonest(torch.cat(owners), torch.cat(steps))
        found[bags] = values
    return found


def _commonest(owner: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """The bags that have any step, and the commonest step of each, the smallest of such."""
    step, order = step.sort(stable=True)
    owner, second = owner[order].sort(stable=True)
    step = step[second]
    new_bag = _starts(owner)
    first = (new_bag | _starts(step)).nonzero()[:, 0]
    counts = torch.diff(first, append=first.new_tensor([len(step)]))
    # of the runs of equal steps of a bag the longest comes first
    order = counts.argsort(stable=True, descending=True)
    first = first[order]
    bags, order = owner[first].sort(stable=True)
    leads = _starts(bags)
    return bags[leads], step[first][order][leads]


def _starts(values: Tensor) -> Tensor:
    """Where a value differs from the one before."""
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[1:] = values[1:] != values[:-1]
    return starts
