"""Mean features of the patches around each patch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.batch import BagBatch
from survfuse.data.neighbourhood import neighbourhood_mean, with_neighbourhood


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
    cells = torch.cat([places(n, 12) for n in lengths])
    bag = torch.randn(sum(lengths), 5, dtype=torch.float64, requires_grad=True)
    found = neighbourhood_mean(bag, cells, Ragged.from_lengths(lengths), radius=radius)
    expected = by_definition(bag, cells, lengths, radius)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(found)
    (mine,) = torch.autograd.grad((found * weight).sum(), bag)
    (other,) = torch.autograd.grad((expected * weight).sum(), bag)
    torch.testing.assert_close(mine, other)


def test_channels_in_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    bag, cells, ragged = torch.randn(20, 7), places(20, 6), Ragged.from_lengths([20])
    whole = neighbourhood_mean(bag, cells, ragged, radius=2)
    monkeypatch.setattr("survfuse.data.neighbourhood._AT_ONCE", 100)
    torch.testing.assert_close(neighbourhood_mean(bag, cells, ragged, radius=2), whole)


def test_a_batch_gets_twice_the_features() -> None:
    torch.manual_seed(1)
    bag, cells = torch.randn(50, 7), torch.cat([places(20, 6), places(30, 7)])
    # rows in no bag are never read, and slides may be cut at different sizes
    bag[20:22] = float("nan")
    coords = cells.clone()
    coords[:20] = coords[:20] * 512 + 1000
    coords[22:] = coords[22:] * 256
    ragged = Ragged.from_ranges(torch.tensor([22, 0, 0]), torch.tensor([28, 20, 0]))
    found = with_neighbourhood(BagBatch(bag, ragged, ragged.lengths > 0, coords), 2)
    order = torch.cat([torch.arange(22, 50), torch.arange(20)])
    assert found.ragged.starts.tolist() == [0, 28, 48]
    assert torch.equal(found.coords, coords[order])
    torch.testing.assert_close(found.features[:, :7], bag[order])
    # no other patch lies where the two rows were, so the grid begins at the rest
    torch.testing.assert_close(
        found.features[:, 7:], by_definition(bag[order], cells[order], [28, 20], 2)
    )


def test_other_types_empty_batches_and_refusals() -> None:
    cells, ragged = places(9, 3), Ragged.from_lengths([9])
    bag = torch.randn(9, 4).bfloat16()
    found = neighbourhood_mean(bag, cells, ragged, radius=1)
    assert found.dtype == torch.bfloat16
    expected = by_definition(bag.float(), cells, [9], 1)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    none = Ragged.from_lengths([0])
    batch = BagBatch(bag[:0], none, none.lengths > 0)
    assert with_neighbourhood(batch, 1).features.shape == (0, 8)
    with pytest.raises(ValueError, match="radius is 0"):
        neighbourhood_mean(bag, cells, ragged, radius=0)
    for coords in (None, torch.full((9, 2), float("nan"))):
        with pytest.raises(ValueError, match="patches of 'cells' have no coordinates"):
            with_neighbourhood(BagBatch(bag, ragged, ragged.lengths > 0, coords), 1, name="cells")
