"""Where the patches of a batch lie, as deformable attention wants to know it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.batch import BagBatch
from survfuse.grid import GridIndex
from survfuse.ops import grid_index
from survfuse.ragged import Ragged


class SlideLayout(NamedTuple):
    """The patches of those samples that have any, packed, and their places."""

    stored: Ragged  # rows of the stored matrix; length 0 where a sample has no slide
    packed: Ragged  # the same patches one behind the other
    grid: GridIndex | None  # of packed patches; None for dense maps
    samples: Tensor | None  # [n] the samples with a map, of dense maps
    index: Tensor | None  # [n, side * side] the packed patch of each cell, of dense maps


def lay_out(
    batch: BagBatch,
    *,
    layout: str,
    without_coords: str,
    patch_size: float | None,
    map_side: int,
    gap: int,
    name: str,
) -> SlideLayout | None:
    """The places of a batch; None if no sample has a patch. Waits for the device.

    Args:
        batch: checked by `survfuse.models.inputs.encode_inputs`.
        layout, without_coords, patch_size, map_side: of `SubspaceFusionConfig`.
        gap: cells between maps that lie side by side, a multiple of the coarse cell's side.
        name: of the modality, for errors.

    Raises:
        ValueError: a slide has no coordinates and needs them.
    """
    lengths = torch.where(batch.present, batch.ragged.lengths, 0)
    stored = Ragged.from_ranges(batch.ragged.starts, lengths)
    if stored.total == 0:
        return None
    packed = stored.packed()
    if layout == "fixed":
        samples = lengths.nonzero()[:, 0]
        cells = map_side * map_side
        index = torch.stack([fill_map(n, cells) for n in lengths[samples].tolist()])
        index = index.to(lengths.device) + packed.starts[samples, None]
        return SlideLayout(stored, packed, None, samples, index)
    bag = torch.arange(stored.n_bags, device=lengths.device).repeat_interleave(
        lengths, output_size=stored.total
    )
    within = torch.arange(stored.total, device=lengths.device) - packed.starts[bag]
    # row by row on a map that is as high as wide, or one row less
    width = lengths.double().sqrt().ceil().long()[bag]
    square = torch.stack([within % width.clamp(min=1), within // width.clamp(min=1)], 1)
    if layout == "grid":
        coords = _coords(batch, bag, within, without_coords, name)
        cells = [
            places if part is None else _cells(part, patch_size, gap)
            for part, places in zip(coords, square.split(lengths.tolist()), strict=True)
        ]
        square = torch.cat(cells)
    return SlideLayout(stored, packed, grid_index(square, patch_size=1, ragged=packed), None, None)


def fill_map(n_patches: int, n_cells: int) -> Tensor:
    """Which patch each cell of a map shows: [n_cells] int64.

    Fewer patches than cells are repeated, in their order, from the first again; more are taken at
    even distances, rounded to the nearest even, as numpy does.
    """
    cell = torch.arange(n_cells)
    if n_patches <= n_cells:
        return cell % n_patches
    return (cell.double() * (n_patches / n_cells)).round().long()


def patch_distance(coords: Tensor) -> float:
    """The commonest step from a patch to the next in its row or column; 1 for a single patch.

    Args:
        coords: [N, 2], in any unit.
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        # by row, and within it by column
        order = coords[:, along].argsort(stable=True)
        order = order[coords[order, across].argsort(stable=True)]
        ordered = coords[order]
        same = ordered[1:, across] == ordered[:-1, across]
        steps.append((ordered[1:, along] - ordered[:-1, along])[same])
    found = torch.cat(steps)
    if not bool((found > 0).any()):
        # no two patches in one row or column: any smallest step tells two of them apart
        found = coords.sort(0).values.diff(dim=0).flatten()
    found = found[found > 0]
    if found.numel() == 0:
        return 1.0
    values, counts = found.unique(return_counts=True)
    return float(values[counts.argmax()])


def _coords(
    batch: BagBatch, bag: Tensor, within: Tensor, without_coords: str, name: str
) -> list[Tensor | None]:
    """[N, 2] fp64 of each sample, None where the slide has none and may do without."""
    lengths = torch.bincount(bag, minlength=batch.ragged.n_bags).tolist()
    if batch.coords is None:
        known = [False] * len(lengths)
        parts: tuple[Tensor, ...] = ()
    else:
        coords = batch.coords[batch.ragged.starts[bag] + within].double()
        parts = coords.split(lengths)
        known = [bool(part.isfinite().all()) for part in parts]
    missing = [b for b, (n, has) in enumerate(zip(lengths, known, strict=True)) if n and not has]
    if missing and without_coords == "error":
        raise ValueError(
            f"inputs[{name!r}].coords of sample {missing[0]} of the batch are missing or not "
            "finite; layout 'grid' puts patches at their coordinates. Read the slide with them, or "
            "set without_coords to 'square', which lays such a bag out in the order of its patches"
        )
    return [parts[b] if has else None for b, has in enumerate(known)]


def _cells(coords: Tensor, patch_size: float | None, gap: int) -> Tensor:
    """Cells (x, y) [N, 2] int64 of one sample, each patch in one of its own.

    Patches that share a cell lie on maps side by side: several slides of a patient, whose
    coordinates start anew, and pieces of tissue that were cut on grids of their own. The k-th patch
    of a cell lies on the k-th map.
    """
    if coords.shape[0] == 0:
        return coords.long()
    size = patch_distance(coords) if patch_size is None else patch_size
    cells = ((coords - coords.amin(0)) / size + 0.5).floor().long()
    width = int(cells[:, 0].max()) + 1
    order = (cells[:, 1] * width + cells[:, 0]).argsort(stable=True)
    number = (cells[:, 1] * width + cells[:, 0])[order]
    place = torch.arange(len(order), device=order.device)
    # how many patches of the same cell came before
    first = torch.searchsorted(number, number)
    rank = torch.empty_like(order)
    rank[order] = place - first
    # whole coarse cells, so that no cell of one map has patches of another
    shift = -(-(width + gap) // gap) * gap
    return torch.stack([cells[:, 0] + rank * shift, cells[:, 1]], 1)
