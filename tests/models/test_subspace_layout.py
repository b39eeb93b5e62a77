"""Places of patches: grids that are measured, several slides of one patient, dense maps."""

from __future__ import annotations

import pytest
import torch

from survfuse import Ragged
from survfuse.batch import BagBatch
from survfuse.models.subspace_layout import lay_out

OPTIONS = {
    "layout": "grid",
    "without_coords": "error",
    "patch_size": None,
    "map_side": 3,
    "gap": 8,
    "name": "slides",
}


def _bag(coords: torch.Tensor, lengths: list[int] | None = None) -> BagBatch:
    ragged = Ragged.from_lengths(lengths or [len(coords)])
    return BagBatch(torch.randn(len(coords), 2), ragged, ragged.lengths > 0, coords)


def _cells(batch: BagBatch, **options: object) -> torch.Tensor:
    found = lay_out(batch, **(OPTIONS | options))
    return found.grid.cells(found.packed)


def test_slides_of_different_magnification_in_one_batch() -> None:
    cell = torch.arange(12)
    cells = torch.stack([cell % 4, cell // 4], 1)
    coords = torch.cat([cells * 256.0 + 1000.0, cells * 512.0])
    found = _cells(_bag(coords, [12, 12]))
    assert torch.equal(found, cells.repeat(2, 1))
    # a size that is given holds for all
    wide = _cells(_bag(coords, [12, 12]), patch_size=256.0)
    assert torch.equal(wide, torch.cat([cells, cells * 2]))


def test_patches_of_one_cell_lie_on_maps_side_by_side() -> None:
    cell = torch.arange(12)
    cells = torch.stack([cell % 4, cell // 4], 1)
    # two slides of one patient, whose coordinates both start at 0, and one patch of a third
    coords = torch.cat([cells, cells[:6], cells[2:3]]) * 256.0
    found = _cells(_bag(coords))
    assert torch.equal(found[:12], cells)
    # 4 columns and a gap of 8, in whole gaps
    assert torch.equal(found[12:18], cells[:6] + torch.tensor([16, 0]))
    assert found[18].tolist() == [34, 0]
    assert len({tuple(place) for place in found.tolist()}) == 19


def test_maps_without_places() -> None:
    bag = _bag(torch.zeros(11, 2), [7, 0, 4])
    square = _cells(bag._replace(coords=None), layout="square")
    assert square[:7].tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1], [0, 2]]
    assert square[7:].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    fixed = lay_out(bag, **(OPTIONS | {"layout": "fixed"}))
    assert fixed.samples.tolist() == [0, 2]
    assert fixed.index.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1], [7, 8, 9, 10, 7, 8, 9, 10, 7]]


def test_of_a_long_bag_only_what_its_map_shows_is_read() -> None:
    # 12 patches for 9 cells behind a bag of 4 that is repeated, stored in another order with gaps
    ragged = Ragged.from_ranges(torch.tensor([20, 0, 5]), torch.tensor([4, 0, 12]))
    bag = BagBatch(torch.randn(30, 2), ragged, ragged.lengths > 0, None)
    found = lay_out(bag, **(OPTIONS | {"layout": "fixed"}))
    # every 4/3rd patch, rounded to even
    shown = [0, 1, 3, 4, 5, 7, 8, 9, 11]
    assert found.rows.tolist() == [20, 21, 22, 23, *(5 + i for i in shown)]
    assert found.seen.tolist() == [0, 1, 2, 3, *(4 + i for i in shown)]
    assert found.stored.lengths.tolist() == [4, 0, 9]
    assert found.index.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0], list(range(4, 13))]
    # where no bag is longer than the map, all are read where they lie
    few = bag._replace(ragged=Ragged.from_ranges(ragged.starts, ragged.lengths.clamp(max=9)))
    assert lay_out(few, **(OPTIONS | {"layout": "fixed"})).rows is None


def test_a_batch_without_patches_has_no_layout() -> None:
    bag = _bag(torch.zeros(5, 2), [3, 2])
    assert lay_out(bag._replace(present=torch.zeros(2, dtype=torch.bool)), **OPTIONS) is None


def test_a_lone_slide_without_coordinates_is_told() -> None:
    coords = torch.zeros(5, 2)
    coords[4] = torch.nan
    with pytest.raises(ValueError, match="of sample 1 of the batch are missing or not finite"):
        lay_out(_bag(coords, [1, 4]), **OPTIONS)
