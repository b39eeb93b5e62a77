"""The map from cells to rows, against a loop over patches; refusals; real coordinates."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.data.slides import tile_slide
from survfuse.ops import GridIndex

# three bags of one matrix: the second holds rows of the first, the third is the first again
OVERLAPPING = Ragged.from_ranges([0, 3, 0, 2], [6, 5, 6, 0])


def scattered(n_patches: int = 9, *, seed: int = 0) -> Tensor:
    """[T, 2] cells of an irregular outline, each once, in no order."""
    g = torch.Generator().manual_seed(seed)
    cells = torch.randperm(35, generator=g)[:n_patches]
    return torch.stack([cells % 7, cells // 7], 1)


def by_loop(cells: Tensor, ragged: Ragged) -> list[dict[tuple[int, int], int]]:
    """Per bag, the row of every cell with tissue."""
    bags = []
    for start, length in zip(ragged.starts.tolist(), ragged.lengths.tolist(), strict=True):
        mine = cells[start : start + length]
        corner = mine.amin(0) if length else mine.new_zeros(2)
        places = (tuple(cell) for cell in (mine - corner).tolist())
        bags.append({place: start + i for i, place in enumerate(places)})
    return bags


def as_dicts(grid: GridIndex) -> list[dict[tuple[int, int], int]]:
    bags = []
    for b, (height, width) in enumerate(grid.shapes.tolist()):
        box = grid.index[grid.cell_offsets[b] : grid.cell_offsets[b + 1]].reshape(height, width)
        found = (box >= 0).nonzero().tolist()
        bags.append({(x, y): int(box[y, x]) for y, x in found})
    return bags


@pytest.mark.parametrize(
    ("scale", "origin", "dtype"),
    [
        (256, (512, 1024), torch.int64),
        (256, (-3 * 256, -70), torch.int32),
        (1, (0, 0), torch.int16),
        (112.5, (17.25, 3.0), torch.float32),
        (0.499 * 256, (0.5, 0.25), torch.float64),
    ],
    ids=str,
)
def test_every_patch_is_found_in_its_cell(scale, origin, dtype) -> None:
    cells = scattered()
    coords = (cells.double() * scale + torch.tensor(origin, dtype=torch.double)).to(dtype)
    for ragged in (OVERLAPPING, None):
        grid = ops.grid_index(coords, patch_size=scale, ragged=ragged)
        whole = Ragged.from_lengths([len(cells)])
        assert as_dicts(grid) == by_loop(cells, whole if ragged is None else ragged)
        assert grid.index.dtype == torch.int32
        assert grid.cell_offsets.dtype == grid.shapes.dtype == torch.int64
        assert grid.cell_offsets.tolist()[-1] == grid.index.numel()
        grid.check(len(cells))


def test_slides_of_different_magnification() -> None:
    cells, ragged = scattered(), Ragged.from_ranges([0, 4, 4], [4, 5, 0])
    coords = cells * torch.tensor([256] * 4 + [512] * 5)[:, None]
    each = np.array([256, 512, 0])
    for sizes in (each.tolist(), each, torch.from_numpy(each)):
        grid = ops.grid_index(coords, patch_size=sizes, ragged=ragged)
        assert as_dicts(grid) == by_loop(cells, ragged)
    one = ops.grid_index(cells, patch_size=torch.tensor(1), ragged=ragged)
    assert as_dicts(one) == by_loop(cells, ragged)
    with pytest.raises(ValueError, match=r"\(bag 0\).* of patch_size = 512"):
        ops.grid_index(coords, patch_size=[512, 256, 7], ragged=ragged)


def test_empty_bags_and_no_bags() -> None:
    coords = scattered() * 64
    ragged = Ragged.from_ranges([9, 2, 0], [0, 1, 0])
    grid = ops.grid_index(coords, patch_size=64, ragged=ragged)
    assert grid.shapes.tolist() == [[0, 0], [1, 1], [0, 0]]
    assert grid.cell_offsets.tolist() == [0, 0, 1, 1]
    assert grid.index.tolist() == [2]
    none = Ragged.from_lengths([])
    for given, ragged, shape in (
        (coords, none, (0, 2)),
        (coords[:0], None, (1, 2)),
        (coords[:0].float(), none, (0, 2)),
    ):
        grid = ops.grid_index(given, patch_size=64, ragged=ragged)
        assert grid.index.numel() == 0
        assert grid.shapes.shape == shape
        assert not grid.shapes.any()


def test_rows_in_no_bag_are_never_read() -> None:
    coords = scattered().double()
    coords[[0, 4]] = torch.nan
    ragged = Ragged.from_ranges([5, 1], [4, 3])
    grid = ops.grid_index(coords, patch_size=1, ragged=ragged)
    assert as_dicts(grid) == by_loop(scattered(), ragged)


def test_corners_near_their_cell() -> None:
    cells = scattered()
    corner = cells.amin(0)
    coords = cells.double()
    coords[cells.amin(1) > corner.amax()] += 0.3
    with pytest.raises(
        ValueError, match=r"\+0\.300 of patch_size = 1; .* tolerance=0\.30\d? takes"
    ):
        ops.grid_index(coords, patch_size=1)
    grid = ops.grid_index(coords, patch_size=1, tolerance=0.3001)
    assert as_dicts(grid) == by_loop(cells, Ragged.from_lengths([len(cells)]))


def test_the_tolerance_that_is_named_accepts_every_patch() -> None:
    # two pieces of tissue, each with a grid of its own, as CLAM cuts them
    coords = torch.tensor([[0, 0], [256, 0], [256, 256], [1365, 777], [1621, 777]])
    words = r"coords of row 3 \(bag 0\): x = 1365 misses the grid of its bag by 85"
    with pytest.raises(ValueError, match=words) as raised:
        ops.grid_index(coords, patch_size=256)
    tolerance = float(re.search(r"tolerance=([\d.]+)", str(raised.value))[1])
    assert 0.3 < tolerance < 0.5
    grid = ops.grid_index(coords, patch_size=256, tolerance=tolerance)
    assert as_dicts(grid)[0] == {(0, 0): 0, (1, 0): 1, (1, 1): 2, (5, 3): 3, (6, 3): 4}


def test_a_piece_half_a_patch_off_keeps_its_patches_apart() -> None:
    piece = torch.tensor([[0, 0], [2, 0], [4, 0], [6, 0], [2, 2], [2, 4]])
    coords = torch.cat([piece, piece + torch.tensor([41, 5])])
    grid = ops.grid_index(coords, patch_size=2, tolerance=0.5)
    cells = torch.cat([piece // 2, piece // 2 + torch.tensor([21, 3])])
    assert as_dicts(grid) == by_loop(cells, Ragged.from_lengths([12]))


def test_two_patches_in_one_cell() -> None:
    coords = torch.tensor([[0, 0], [64, 0], [64, 64], [64, 0], [0, 0]])
    ragged = Ragged.from_ranges([1, 0], [4, 5])
    with pytest.raises(ValueError, match=r"rows 1 and 3 \(bag 0\) lie in one cell, \(1, 0\)"):
        ops.grid_index(coords, patch_size=64, ragged=ragged)
    grid = ops.grid_index(coords, patch_size=64, ragged=ragged, duplicates="first")
    assert as_dicts(grid) == [{(0, 0): 4, (1, 0): 1, (1, 1): 2}, {(0, 0): 0, (1, 0): 1, (1, 1): 2}]
    assert grid.cells(ragged).tolist() == [
        *([1, 0], [1, 1], [-1, -1], [0, 0]),
        *([0, 0], [1, 0], [1, 1], [-1, -1], [-1, -1]),
    ]


def test_cells_of_patches() -> None:
    cells = scattered()
    grid = ops.grid_index(cells * 5, patch_size=5, ragged=OVERLAPPING)
    expected = []
    for start, length in zip(OVERLAPPING.starts, OVERLAPPING.lengths, strict=True):
        mine = cells[start : start + length]
        expected.append(mine - mine.amin(0) if length else mine)
    assert torch.equal(grid.cells(OVERLAPPING), torch.cat(expected))
    with pytest.raises(ValueError, match="ragged has 1 bags and the grid 4"):
        grid.cells(Ragged.from_lengths([9]))
    with pytest.raises(ValueError, match="bag 0 of the grid shows rows outside its range"):
        grid.cells(OVERLAPPING._replace(lengths=OVERLAPPING.lengths // 2))
    with pytest.raises(TypeError, match=r"ragged is NoneType; it must be a survfuse\.Ragged"):
        grid.cells(None)
    with pytest.raises(ValueError, match=r"ragged\.starts is on meta and the grid on cpu"):
        grid.cells(OVERLAPPING.to("meta"))


def test_one_bag_of_many() -> None:
    grid = ops.grid_index(scattered() * 5, patch_size=5, ragged=OVERLAPPING)
    for b in range(4):
        one = grid.select(b)
        assert as_dicts(one) == [as_dicts(grid)[b]]
        one.check(9)
    for b in (-1, 4):
        with pytest.raises(ValueError, match=f"bag is {b}; the grid has 4, numbered from 0"):
            grid.select(b)


@pytest.mark.parametrize("shift", [0, -(2**40), 2**60])
def test_corners_far_from_zero_lose_nothing(shift: int) -> None:
    cells = scattered()
    grid = ops.grid_index(cells * 3 + shift, patch_size=3)
    assert as_dicts(grid) == by_loop(cells, Ragged.from_lengths([len(cells)]))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"coords": [[0, 0]]}, TypeError, "coords is list; it must be a tensor"),
        ({"coords": torch.zeros(3, 2).half()}, TypeError, "coords is torch.float16"),
        ({"coords": torch.zeros(3, 2) > 0}, TypeError, "coords is torch.bool"),
        ({"coords": torch.zeros(3, 3)}, ValueError, r"coords has shape \(3, 3\); .* \[T, 2\]"),
        ({"coords": torch.zeros(2)}, ValueError, r"coords has shape \(2,\)"),
        ({"patch_size": 0}, ValueError, "patch_size is 0.0; it must be positive"),
        ({"patch_size": -1.0}, ValueError, "patch_size is -1.0"),
        ({"patch_size": float("nan")}, ValueError, "patch_size is nan"),
        ({"patch_size": float("inf")}, ValueError, "patch_size is inf"),
        (
            {"patch_size": "256"},
            TypeError,
            "patch_size is '256'; it must be a number, or one for each bag",
        ),
        ({"patch_size": True}, TypeError, "patch_size is True; it must be a number"),
        ({"patch_size": 1e-300}, ValueError, r"span 1e\+300 x 1e\+300 cells"),
        ({"coords": torch.zeros(3, 2, device="meta")}, ValueError, "coords is on meta; it must"),
        ({"patch_size": [1, 1]}, ValueError, r"patch_size has shape \(2,\); .* one number or 1"),
        ({"patch_size": torch.ones(1, 1)}, ValueError, r"patch_size has shape \(1, 1\)"),
        ({"patch_size": [torch.nan]}, ValueError, "patch_size of bag 0 is nan"),
        ({"patch_size": [0]}, ValueError, "patch_size of bag 0 is 0.0; .* where it is unknown"),
        ({"tolerance": 0.6}, ValueError, "tolerance is 0.6; .* at most 0.5"),
        ({"tolerance": None}, TypeError, "tolerance is None"),
        ({"duplicates": "last"}, ValueError, "duplicates is 'last'"),
        ({"ragged": (0, 3)}, TypeError, "ragged is tuple"),
        ({"ragged": Ragged.from_lengths([4])}, ValueError, "bag 0 is rows 0 to 4"),
        (
            {"ragged": Ragged(torch.zeros(1).long().to("meta"), torch.ones(1).long(), 1, 1)},
            ValueError,
            "ragged.starts is on meta and coords on cpu",
        ),
        (
            {"coords": torch.tensor([[0.0, 0], [1, torch.nan], [2, 2]])},
            ValueError,
            r"coords of row 1 \(bag 0\) are \(1.0, nan\); they must be finite",
        ),
        (
            {"coords": torch.tensor([[0, 0], [2**20, 2**20], [1, 1]])},
            ValueError,
            r"bag 0 span 1048577 x 1048577 cells; .* Row 1 lies farthest out",
        ),
        (
            {"coords": torch.tensor([[-(2**62), 0], [2**63 - 1, 0], [5 - 2**62, 0]])},
            ValueError,
            r"bag 0 span 1 x 1.38350580552822e\+19 cells; .* Row 1 lies farthest out",
        ),
        (
            {"coords": torch.tensor([[0, 0], [0, 2**62], [2, 2]])},
            ValueError,
            "fewer than 2",
        ),
    ],
)
def test_wrong_arguments_are_named(changed: dict, error, words: str) -> None:
    arguments = {"coords": torch.tensor([[0, 0], [1, 0], [1, 1]]), "patch_size": 1} | changed
    with pytest.raises(error, match=words):
        ops.grid_index(arguments.pop("coords"), **arguments)


def test_a_wrong_patch_size_is_noticed_in_the_bag_that_it_is_wrong_for() -> None:
    coords = torch.cat([scattered(), scattered(8, seed=1)]) * 512
    ragged = Ragged.from_lengths([9, 8])
    coords[9:] //= 2
    with pytest.raises(ValueError, match=r"\(bag 1\)") as raised:
        ops.grid_index(coords, patch_size=512, ragged=ragged)
    assert "patch_size is not the distance between patches" in str(raised.value)


def test_grids_that_do_not_agree_with_themselves() -> None:
    grid = ops.grid_index(scattered(), patch_size=1, ragged=OVERLAPPING)
    grid.check(9)
    for changed, words in (
        ({"index": grid.index[:0]}, "index has 0 cells and cell_offsets runs from 0 to"),
        ({"index": grid.index - 1}, "index shows rows -2 to"),
        ({"shapes": grid.shapes + 1}, "cell_offsets and shapes disagree"),
        ({"shapes": -grid.shapes}, "cell_offsets and shapes disagree"),
        ({"cell_offsets": grid.cell_offsets + 1}, "cell_offsets runs from 1"),
    ):
        with pytest.raises(ValueError, match=words):
            grid._replace(**changed).check(9)
    with pytest.raises(ValueError, match=r"rows -1 to 7, but the bag matrix has 7 rows"):
        grid.check(7)


def test_real_slides(shared_data) -> None:
    """Two sections of tissue as they were tiled, in one call; the second of a grid of 128."""
    folder = shared_data / "slides"
    tcga = tile_slide(folder / "tcga-cr-7395-01a-01-ts1.svs", target_mpp=None)
    cmu = tile_slide(folder / "cmu-1-small-region.svs", target_mpp=0.499 / 2)
    assert (tcga.patch_size_level0, cmu.patch_size_level0) == (256, 128)
    for tiles in (tcga, cmu):
        coords = torch.as_tensor(tiles.coords)
        grid = ops.grid_index(coords, patch_size=tiles.patch_size_level0)
        cells = coords // tiles.patch_size_level0
        assert as_dicts(grid) == by_loop(cells, Ragged.from_lengths([len(coords)]))
        # not all of the box is tissue
        assert len(coords) < grid.index.numel() < 2 * len(coords)
    with pytest.raises(ValueError, match="misses the grid of its bag by"):
        ops.grid_index(torch.as_tensor(cmu.coords), patch_size=256)
