"""The surroundings of patches: mean features of those next to each, as further features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from survfuse.batch import BagBatch
from survfuse.data.bags import Bags, empty_rows
from survfuse.patch_cells import patch_cells
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged

if TYPE_CHECKING:
    from survfuse.data.modalities import BagSource

# numbers of a dense map held at once, 64 MB in fp32
_AT_ONCE = 2**24
# bytes up to which bags with their surroundings are held, computed once
_HELD = 2**30
_BAGS_AT_ONCE = 64


def surrounded_bags(bags: BagSource, used: Sequence[int], radius: int) -> Bags | None:
    """Bags with their surroundings, computed once, or None where they take more than 1 GiB.

    Args:
        bags: with coordinates.
        used: the bags that are computed, each once; others become empty.
        radius: cells to each side.

    Raises:
        ValueError: a bag that is used has no coordinates, or they are not finite.
    """
    lengths, starts = torch.zeros_like(bags.lengths), torch.zeros_like(bags.lengths)
    used = list(used)
    lengths[used] = bags.lengths[used]
    starts[used] = lengths[used].cumsum(0) - lengths[used]
    total, done = int(lengths.sum()), 0
    if total * 2 * bags.width * 2 > _HELD:
        # too much in 16 bits already: nothing is computed to find out
        return None
    features = coords = None
    for first in range(0, len(used), _BAGS_AT_ONCE):
        chosen = [[i] for i in used[first : first + _BAGS_AT_ONCE]]
        part = surrounded_batch(bags, chosen, radius)
        n_rows, width = part.features.shape
        if features is None:
            if total * width * part.features.element_size() > _HELD:
                return None
            kind = {"device": part.features.device, "dtype": part.features.dtype}
            features = empty_rows(total, width, **kind)
            coords = part.coords.new_empty(total, 2)
        features[done : done + n_rows] = part.features
        coords[done : done + n_rows] = part.coords
        done += n_rows
    if features is None:
        return None
    return Bags(features, lengths, bags.names, coords=coords, starts=starts)


def surrounded_batch(
    bags: BagSource,
    groups: Sequence[Sequence[int]],
    radius: int,
    *,
    device: torch.device | str | None = None,
) -> BagBatch:
    """A minibatch whose patches carry the means of what surrounds them on their own slide.

    Args:
        bags, groups, device: as in `Bags.batch`.
        radius: cells to each side.
    """
    alone = [[i] for group in groups for i in group]
    batch = with_neighbourhood(bags.batch(alone, device=device), radius)
    lengths = bags.lengths
    sums = [sum(int(lengths[i]) for i in group) for group in groups]
    ragged = Ragged.from_lengths(sums, device="cpu").to(batch.features.device)
    return batch._replace(ragged=ragged, present=ragged.lengths > 0)


def with_neighbourhood(batch: BagBatch, radius: int, *, name: str = "slides") -> BagBatch:
    """The bags with twice the features: a patch's own, then the means of the square around it.

    Args:
        batch: with coordinates.
        radius: cells to each side; 3 is a square of 7 x 7.
        name: of the modality, for errors.

    Returns:
        Packed bags: features [total, 2 D] of the type of the batch.

    Raises:
        ValueError: a bag has no coordinates, or they are not finite.
    """
    ragged = batch.ragged
    packed, row = ragged.packed(), ragged.rows()
    coords = None if batch.coords is None else batch.coords[row]
    if ragged.total and (coords is None or not bool(coords.double().isfinite().all())):
        raise ValueError(
            f"the patches of {name!r} have no coordinates, or some that are not finite; a "
            "neighbourhood needs all of them (data.patches.neighbourhood: 0 asks for none)"
        )
    features = batch.features[row]
    if ragged.total:
        cells = patch_cells(coords, ragged.bags(), ragged.n_bags, gap=radius)
        around = neighbourhood_mean(features, cells, packed, radius=radius)
        features = torch.cat([features, around], 1)
    else:
        features = torch.cat([features, features], 1)
    return batch._replace(features=features, ragged=packed, coords=coords)


def neighbourhood_mean(bag: Tensor, cells: Tensor, ragged: Ragged, *, radius: int) -> Tensor:
    r"""Mean features of the patches in the square around each patch, itself included.

    .. math:: m_i = \mathrm{mean} \{ x_j : |cell_j - cell_i|_\infty \le radius \}

    Places without tissue, and beyond the slide, take no part in a mean.

    Args:
        bag: [total, D] packed in batch order.
        cells: [total, 2] int64 (x, y) from 0 in each bag, no two of a bag alike.
        ragged: the ranges of the packed bags.
        radius: cells to each side.

    Returns:
        [total, D] of the type of the bag; differentiable.

    Raises:
        ValueError: `radius` is no integer of at least 1.

    Cost: two passes over the cells of the bounding boxes, (2 radius + 1) additions each, in tiles
    of channels; holds the result and some maps of at most 64 MB.
    """
    if not isinstance(radius, int) or isinstance(radius, bool) or radius < 1:
        raise ValueError(f"radius is {radius!r}; it must be an integer of at least 1")
    kind, found = accumulation_type(bag.dtype), bag.new_zeros(bag.shape)
    for (n_maps, height, width), rows, place in _by_shape(cells, ragged):
        shown = torch.zeros(n_maps * height * width, dtype=kind, device=bag.device)
        shown = shown.index_fill(0, place, 1.0).view(n_maps, height, width)
        count = _box(shown, radius).flatten()[place]
        step = max(1, _AT_ONCE // shown.numel())
        means = []
        for first in range(0, bag.shape[1], step):
            tile = bag[rows, first : first + step].to(kind)
            dense = tile.new_zeros(tile.shape[1], shown.numel()).index_copy(1, place, tile.mT)
            sums = _box(dense.view(-1, *shown.shape), radius).flatten(1)[:, place]
            means.append((sums / count).mT.to(bag.dtype))
        found = found.index_put((rows,), torch.cat(means, 1))
    return found


def _by_shape(cells: Tensor, ragged: Ragged) -> list[tuple[tuple[int, int, int], Tensor, Tensor]]:
    """Maps of one shape: (number, height, width), the rows of their patches, and their places."""
    bag = ragged.bags()
    pair = bag[:, None].expand(-1, 2)
    shapes = cells.new_zeros(ragged.n_bags, 2).scatter_reduce(0, pair, cells, "amax") + 1
    shapes = torch.where(ragged.lengths[:, None] > 0, shapes, 0)
    found = []
    for shape in shapes.unique(dim=0).tolist():
        width, height = shape
        if width * height == 0:
            continue
        same = (shapes == shapes.new_tensor(shape)).all(1)
        number = same.cumsum(0) - 1
        rows = same[bag].nonzero()[:, 0]
        place = (number[bag[rows]] * height + cells[rows, 1]) * width + cells[rows, 0]
        found.append(((int(same.sum()), height, width), rows, place))
    return found


def _box(maps: Tensor, radius: int) -> Tensor:
    """Sums over squares, rows first: [..., h, w] to the same."""
    side, shape = 2 * radius + 1, maps.shape
    maps = maps.reshape(1, -1, *shape[-2:])
    for kernel, padding in (((1, side), (0, radius)), ((side, 1), (radius, 0))):
        maps = functional.avg_pool2d(maps, kernel, 1, padding, divisor_override=1)
    return maps.view(shape)
