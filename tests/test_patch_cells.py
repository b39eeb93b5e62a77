"""The grid that patches were cut on, from their corners."""

from __future__ import annotations

import pytest
import torch

from survfuse.patch_cells import patch_cells, patch_distances


def one_bag(coords: torch.Tensor) -> float:
    bag = torch.zeros(len(coords), dtype=torch.int64)
    return float(patch_distances(coords.double(), bag, 1)[0])


@pytest.mark.parametrize("size", [256.0, 512.0, 1.0, 224.5])
def test_the_distance_of_patches_is_measured(size: float) -> None:
    cell = torch.randperm(30 * 20)[:400]
    cells = torch.stack([cell % 30, cell // 30], 1)
    assert one_bag(cells * size + 17.0) == pytest.approx(size)
    # a second piece of tissue with a grid of its own
    other = cells[:50] * size + size * 0.37
    assert one_bag(torch.cat([cells * size, other])) == pytest.approx(size)


def test_the_distance_of_few_patches() -> None:
    assert one_bag(torch.tensor([[7.0, 9.0]])) == 1.0
    assert one_bag(torch.tensor([[0.0, 0.0], [512.0, 256.0]])) == 256.0
    assert one_bag(torch.tensor([[0.0, 0.0], [0.0, 256.0], [0.0, 512.0]])) == 256.0


def test_bags_are_measured_each_by_itself() -> None:
    cell = torch.arange(12)
    cells = torch.stack([cell % 4, cell // 4], 1)
    coords = torch.cat([cells * 256.0 + 1000.0, cells * 512.0, torch.zeros(1, 2)])
    bag = torch.tensor([0] * 12 + [2] * 12 + [3])
    assert patch_distances(coords.double(), bag, 4).tolist() == [256.0, 1.0, 512.0, 1.0]
    found = patch_cells(coords, bag, 4)
    assert torch.equal(found, torch.cat([cells, cells, cells[:1]]))
    alone = patch_cells(coords[:12], bag[:12], 1)
    assert torch.equal(alone, cells)
