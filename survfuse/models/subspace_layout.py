"""Where the patches of a batch lie, as deformable attention wants to know it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.batch import BagBatch
from survfuse.grid import GridIndex
from survfuse.ops import grid_index
from survfuse.patch_cells import patch_cells
from survfuse.ragged import Ragged


class SlideLayout(NamedTuple):
    """The patches of those samples that have any, packed, and their places."""

    rows: Tensor | None  # rows of the batch's matrix that maps show; None for all as they lie
    seen: Tensor | None  # the same as places in batch order
    stored: Ragged  # rows of that matrix, or of those rows; length 0 where a sample has no slide
    packed: Ragged  # the same patches one behind the other
    grid: GridIndex | None  # of packed patches; None for dense maps
    samples: Tensor | None  # [n] the samples with a map, of dense maps
    index: Tensor | None  # [n, side * side] the packed patch of each cell, of dense maps


# whole numbers that the host reads over and over: compiled, each reading would end a graph
@torch.compiler.disable
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
        return _dense_maps(batch.ragged, stored, map_side * map_side)
    bag, within = stored.bags(), stored.places()
    # row by row on a map that is as high as wide, or one row less
    width = lengths.double().sqrt().ceil().long()[bag]
    square = torch.stack([within % width.clamp(min=1), within // width.clamp(min=1)], 1)
    if layout == "grid":
        coords, known = _coords(batch, bag, within, without_coords, name)
        if known is not None:
            cells = patch_cells(
                coords[known], bag[known], stored.n_bags, patch_size=patch_size, gap=gap
            )
            square = square.index_put((known.nonzero()[:, 0],), cells)
    grid = grid_index(square, patch_size=1, ragged=packed)
    return SlideLayout(None, None, stored, packed, grid, None, None)


def _dense_maps(given: Ragged, stored: Ragged, n_cells: int) -> SlideLayout:
    """Maps of `n_cells`; of a longer bag only the patches that its map shows are read."""
    samples, device = stored.lengths.nonzero()[:, 0], stored.lengths.device
    lengths = stored.lengths.clamp(max=n_cells)
    packed = Ragged.from_lengths(lengths)
    # a shorter bag is repeated; what is read of a longer one lies in the order of its cells
    index = torch.stack([fill_map(n, n_cells) for n in lengths[samples].tolist()]).to(device)
    index = index + packed.starts[samples, None]
    if stored.max_length <= n_cells:
        return SlideLayout(None, None, stored, packed, None, samples, index)
    shown = [fill_map(n, n_cells)[:n].to(device) for n in stored.lengths[samples].tolist()]
    starts, first = stored.starts[samples], given.packed().starts[samples]
    rows = torch.cat([place + start for place, start in zip(shown, starts)])
    seen = torch.cat([place + start for place, start in zip(shown, first)])
    return SlideLayout(rows, seen, packed, packed, None, samples, index)


def fill_map(n_patches: int, n_cells: int) -> Tensor:
    """Which patch each cell of a map shows: [n_cells] int64.

    Fewer patches than cells are repeated, in their order, from the first again; more are taken at
    even distances, rounded to the nearest even, as numpy does.
    """
    cell = torch.arange(n_cells)
    if n_patches <= n_cells:
        return cell % n_patches
    return (cell.double() * (n_patches / n_cells)).round().long()


def _coords(
    batch: BagBatch, bag: Tensor, within: Tensor, without_coords: str, name: str
) -> tuple[Tensor | None, Tensor | None]:
    """[total, 2] of all patches, and which of them lie in a slide whose coordinates are known."""
    coords, known = None, None
    missing = torch.ones(batch.ragged.n_bags, dtype=torch.bool, device=bag.device)
    if batch.coords is not None:
        coords = batch.coords[batch.ragged.starts[bag] + within].double()
        finite = coords.isfinite().all(1)
        whole = torch.ones_like(missing).index_put((bag[~finite],), missing.new_zeros(()))
        missing, known = ~whole, whole[bag]
    unknown = missing & (torch.bincount(bag, minlength=batch.ragged.n_bags) > 0)
    if without_coords == "error" and bool(unknown.any()):
        sample = int(unknown.nonzero()[0])
        raise ValueError(
            f"inputs[{name!r}].coords of sample {sample} of the batch are missing or not "
            "finite; layout 'grid' puts patches at their coordinates. Read the slide with them, or "
            "set without_coords to 'square', which lays such a bag out in the order of its patches"
        )
    return coords, known
