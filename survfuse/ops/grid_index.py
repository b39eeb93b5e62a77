"""`grid_index`: the grid cells of packed patches, from the corners that tiling tools write."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from survfuse.grid import GridIndex
from survfuse.ops.checks import check_number
from survfuse.ragged import Ragged, check_ragged

_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_FLOATS = (torch.float32, torch.float64)
_MOST_CELLS = 2**31
_NO_ROW = 2**31 - 1


def grid_index(
    coords: Tensor,
    *,
    patch_size: float | Sequence[float] | Tensor,
    ragged: Ragged | None = None,
    tolerance: float = 0.01,
    duplicates: str = "error",
) -> GridIndex:
    r"""A map from the cells of each bag's grid to rows of the packed matrix.

    .. math:: cell_i = (coords_i - \min_{j \in bag} coords_j) / patch\_size

    Args:
        coords: [T, 2] (x, y) of the upper left corner of each stored patch: integers, or fp32 or
            fp64 numbers. Level-0 pixels, or any other unit. Rows in no bag are never read.
        patch_size: the distance from one patch to the next, in the same unit: for pixels that of
            level 0 (`patch_size_level0`), less the overlap. One number, or B of them, since slides
            were scanned at different magnifications.
        ragged: the range of rows of each bag; None is one bag. Bags may overlap and repeat. A bag
            of several slides has several grids: give one range for each slide.
        tolerance: fraction of a patch by which a corner may miss its cell, at most 0.5. A tool that
            starts a grid of its own in every piece of tissue misses by up to 0.5.
        duplicates: what to do with two patches in one cell: "error", or "first", which keeps the
            one of the lowest row.

    Returns:
        GridIndex(index [cells], cell_offsets [B + 1], shapes [B, 2]), on the device of `coords`. A
        bag of no patches has shape (0, 0).

    Raises:
        TypeError: an argument has the wrong type; it is named.
        ValueError: a corner lies on no cell, two patches lie in one, a bounding box has 2^31 cells
            or more, or an argument has the wrong shape or value.

    Cost: a few passes over coords, and 4 bytes per cell of the bounding boxes. This is preparation:
    it waits for the device. Make it once per slide and not once per step.

    Example:
        >>> corners = torch.tensor([[512, 256], [256, 256], [512, 512]])
        >>> grid = grid_index(corners, patch_size=256)
        >>> grid.index.reshape(*grid.shapes[0].tolist())
        tensor([[ 1,  0],
                [-1,  2]], dtype=torch.int32)
    """
    ragged = _check(coords, ragged, tolerance, duplicates)
    size = _sizes(patch_size, ragged)
    bag, row = ragged.bags(), ragged.rows()
    place = coords[row].to(torch.float64 if coords.is_floating_point() else torch.int64)
    if place.is_floating_point() and not bool(place.isfinite().all()):
        at = int((~place.isfinite().all(1)).nonzero()[0])
        raise ValueError(
            f"coords of row {int(row[at])} (bag {int(bag[at])}) are {tuple(place[at].tolist())}; "
            "they must be finite"
        )
    origin = _per_bag(place, bag, ragged.n_bags, "amin")
    relative = _differences(place, origin[bag]) / size[bag, None]
    # not round(), which would put the halves 1.5 and 2.5 of one piece of tissue into one cell
    cell = (relative + 0.5).floor()
    _check_on_grid(place, relative - cell, bag, row, size, tolerance)
    # fp64 holds what an outlying corner would make of height * width
    shapes = _per_bag(cell, bag, ragged.n_bags, "amax").flip(1) + 1.0
    shapes = torch.where(ragged.lengths[:, None] > 0, shapes, 0.0)
    _check_size(place, shapes, bag, row)
    shapes = shapes.to(torch.int64)
    offsets = shapes.new_zeros(ragged.n_bags + 1)
    offsets[1:] = shapes.prod(1).cumsum(0)
    x, y = cell.to(torch.int64).unbind(1)
    flat = offsets[bag] + y * shapes[bag, 1] + x
    index = torch.full((int(offsets[-1]),), _NO_ROW, dtype=torch.int32, device=coords.device)
    index.scatter_reduce_(0, flat, row.to(torch.int32), "amin")
    if duplicates == "error":
        _check_one_per_cell(index[flat], bag, row, x, y)
    return GridIndex(torch.where(index == _NO_ROW, -1, index), offsets, shapes)


def _differences(place: Tensor, origin: Tensor) -> Tensor:
    """How far each place lies beyond its origin, in fp64; the int64 difference may overflow."""
    exact = place - origin
    return torch.where(exact < 0, place.to(torch.float64) - origin, exact.to(torch.float64))


def _check(coords: Tensor, ragged: Ragged | None, tolerance: float, duplicates: str) -> Ragged:
    if not isinstance(coords, Tensor):
        raise TypeError(f"coords is {type(coords).__name__}; it must be a tensor")
    if coords.dtype not in (*_INTEGERS, *_FLOATS):
        raise TypeError(
            f"coords is {coords.dtype}; it must hold integers, fp32 or fp64 (16 bits do not tell "
            "the pixels of a slide apart)"
        )
    if coords.dim() != 2 or coords.shape[1] != 2:
        raise ValueError(f"coords has shape {tuple(coords.shape)}; it must be [T, 2]")
    if coords.is_meta:
        raise ValueError(
            "coords is on meta; it must hold numbers, since the sizes follow from them"
        )
    if coords.shape[0] > _NO_ROW:
        raise ValueError(f"coords has {coords.shape[0]} rows; there must be fewer than 2^31")
    check_number("tolerance", tolerance)
    if not 0 <= tolerance <= 0.5:
        raise ValueError(f"tolerance is {tolerance}; it must be at least 0 and at most 0.5")
    if duplicates not in ("error", "first"):
        raise ValueError(f'duplicates is {duplicates!r}; it must be "error" or "first"')
    if ragged is None:
        return Ragged.from_lengths([coords.shape[0]], device=coords.device)
    check_ragged("ragged", ragged, "coords", coords.device)
    ragged.check(coords.shape[0])
    return ragged


def _sizes(patch_size: float | Sequence[float] | Tensor, ragged: Ragged) -> Tensor:
    """The patch size of each bag, [B] fp64."""
    if isinstance(patch_size, bool):
        raise TypeError(f"patch_size is {patch_size}; it must be a number, or one for each bag")
    try:
        sizes = torch.as_tensor(patch_size, dtype=torch.float64, device=ragged.starts.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"patch_size is {patch_size!r}; it must be a number, or one for each bag"
        ) from error
    wrong = ~((sizes > 0) & sizes.isfinite())
    if sizes.dim() == 0:
        if bool(wrong):
            raise ValueError(f"patch_size is {sizes.item()}; it must be positive and finite")
        return sizes.expand(ragged.n_bags)
    if sizes.shape != (ragged.n_bags,):
        raise ValueError(
            f"patch_size has shape {tuple(sizes.shape)}; it must be one number or {ragged.n_bags}, "
            "one for each bag"
        )
    # nobody knows the patches of a bag that has none
    wrong = wrong & (ragged.lengths > 0)
    if bool(wrong.any()):
        bag = int(wrong.nonzero()[0])
        raise ValueError(
            f"patch_size of bag {bag} is {sizes[bag].item()}; it must be positive and finite "
            "(stores write 0 where it is unknown)"
        )
    return sizes


def _per_bag(values: Tensor, bag: Tensor, n_bags: int, reduce: str) -> Tensor:
    """The smallest or largest of values [total, 2] in each bag, [B, 2]; 0 for an empty one."""
    out = values.new_zeros((n_bags, 2))
    return out.scatter_reduce_(0, bag[:, None].expand(-1, 2), values, reduce, include_self=False)


def _check_on_grid(
    place: Tensor,
    miss: Tensor,
    bag: Tensor,
    row: Tensor,
    sizes: Tensor,
    tolerance: float,
) -> None:
    # of all corners the one that lies farthest off, so that the tolerance named accepts the rest
    worst = miss.abs().amax() if miss.numel() else 0.0
    if not bool(worst > tolerance):
        return
    at, axis = divmod(int(miss.abs().argmax()), 2)
    share, size = float(miss[at, axis]), float(sizes[bag[at]])
    needed = min(0.5, math.ceil(abs(share) * 1000) / 1000)
    raise ValueError(
        f"coords of row {int(row[at])} (bag {int(bag[at])}): {'xy'[axis]} = "
        f"{place[at, axis].item():g} misses the grid of its bag by {share * size:g}, "
        f"{share:+.3f} of patch_size = {size:g}; it must lie a whole number of patches from "
        "the bag's first corner. Either patch_size is not the distance between patches in the unit "
        "of coords, or each piece of tissue has a grid of its own: then "
        f"tolerance={needed:g} takes the nearest cell for every patch"
    )


def _check_size(place: Tensor, shapes: Tensor, bag: Tensor, row: Tensor) -> None:
    large = shapes.prod(1) >= _MOST_CELLS
    if not bool(large.any()):
        return
    b = int(large.nonzero()[0])
    height, width = shapes[b].tolist()
    mine = place[bag == b].to(torch.float64)
    far = int((mine - mine.median(0).values).abs().amax(1).argmax())
    where = int(row[bag == b][far])
    raise ValueError(
        f"coords of bag {b} span {height:.15g} x {width:.15g} cells; a bounding box must have "
        f"fewer than 2^31. Row {where} lies farthest out, at {tuple(place[bag == b][far].tolist())}"
    )


def _check_one_per_cell(kept: Tensor, bag: Tensor, row: Tensor, x: Tensor, y: Tensor) -> None:
    twice = kept != row
    if not bool(twice.any()):
        return
    at = int(twice.nonzero()[0])
    raise ValueError(
        f"coords of rows {int(kept[at])} and {int(row[at])} (bag {int(bag[at])}) lie in one cell, "
        f'({int(x[at])}, {int(y[at])}); there must be one patch per cell. duplicates="first" keeps '
        "the lowest row"
    )
