"""Mean features of the patches around each patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.layers.neighbourhood import neighbourhood_mean
from survfuse.ops import grid_index


def by_definition(bag: Tensor, coords: Tensor, lengths: list[int], radius: int) -> Tensor:
    parts = []
    for x, c in zip(bag.split(lengths), coords.split(lengths)):
        near = (c[:, None] - c[None]).abs().amax(-1) <= radius
        parts += [(near[i, :, None] * x).sum(0) / near[i].sum() for i in range(len(x))]
    return torch.stack(parts)


def places(n: int, side: int) -> Tensor:
    cell = torch.randperm(side * side)[:n]
    return torch.stack([cell % side, cell // side], 1)


@pytest.mark.parametrize("radius", [1, 3, 20])
def test_means_over_the_squares_of_sparse_slides(radius: int) -> None:
    torch.manual_seed(0)
    lengths = [30, 0, 1, 50, 30]
    coords = torch.cat([places(n, 12) for n in lengths])
    bag = torch.randn(sum(lengths), 5, dtype=torch.float64, requires_grad=True)
    ragged = Ragged.from_lengths(lengths)
    grid = grid_index(coords, patch_size=1, ragged=ragged)
    found = neighbourhood_mean(bag, grid, ragged, radius=radius)
    expected = by_definition(bag, coords, lengths, radius)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (mine,) = torch.autograd.grad((found * weight).sum(), bag)
    (other,) = torch.autograd.grad((expected * weight).sum(), bag)
    torch.testing.assert_close(mine, other)


def test_bags_in_another_order_with_gaps_and_channels_in_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    bag, coords = torch.randn(50, 7), torch.cat([places(20, 6), places(30, 7)])
    bag[20:22] = float("nan")
    ragged = Ragged.from_ranges(torch.tensor([22, 0]), torch.tensor([28, 20]))
    grid = grid_index(coords, patch_size=1, ragged=ragged)
    whole = neighbourhood_mean(bag, grid, ragged, radius=2)
    order = torch.cat([torch.arange(22, 50), torch.arange(20)])
    torch.testing.assert_close(whole, by_definition(bag[order], coords[order], [28, 20], 2))
    monkeypatch.setattr("survfuse.layers.neighbourhood._AT_ONCE", 100)
    torch.testing.assert_close(neighbourhood_mean(bag, grid, ragged, radius=2), whole)


def test_other_types_empty_batches_and_a_wrong_radius() -> None:
    coords, ragged = places(9, 3), Ragged.from_lengths([9])
    grid = grid_index(coords, patch_size=1, ragged=ragged)
    bag = torch.randn(9, 4).bfloat16()
    found = neighbourhood_mean(bag, grid, ragged, radius=1)
    assert found.dtype == torch.bfloat16
    expected = by_definition(bag.float(), coords, [9], 1)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    none = Ragged.from_lengths([0])
    empty = grid_index(coords[:0], patch_size=1, ragged=none)
    assert neighbourhood_mean(bag[:0], empty, none, radius=1).shape == (0, 4)
    with pytest.raises(ValueError, match="radius is 0"):
        neighbourhood_mean(bag, grid, ragged, radius=0)
