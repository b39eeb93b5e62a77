"""The mean of bags: against plain torch, for one bag and for several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from survfuse.layers.bag_mean import bag_mean
from survfuse.ragged import Ragged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[50], [30, 20], [50, 0]])
def test_the_mean_and_its_gradient(lengths: list[int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    bag = (5 + torch.randn(50, 6, generator=g)).to(dtype).requires_grad_()
    weight = torch.randn(len(lengths), 6, generator=g, dtype=torch.float64)
    found = bag_mean(bag, Ragged.from_lengths(lengths))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.dtype == wide
    expected = torch.stack([x.double().sum(0) / max(1, len(x)) for x in bag.split(lengths)])
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(found, expected.to(wide), **close)
    (mine,) = torch.autograd.grad((found * weight).sum(), bag)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), bag)
    torch.testing.assert_close(mine, theirs)


def test_one_bag_is_summed_as_several_are() -> None:
    bag = torch.randn(40, 3)
    both = bag_mean(bag.repeat(2, 1), Ragged.from_lengths([40, 40]))
    torch.testing.assert_close(bag_mean(bag)[0], both[0])
    torch.testing.assert_close(bag_mean(bag, backend="reference"), bag_mean(bag))
    assert torch.equal(bag_mean(bag[:0]), torch.zeros(1, 3))


def refuse(bag: Tensor, ragged: Ragged, match: str) -> None:
    with pytest.raises((TypeError, ValueError), match=match):
        bag_mean(bag, ragged)


def test_what_is_no_bag_is_named() -> None:
    refuse(torch.ones(3, 2), Ragged.from_ranges([1], [3]), "bag 0 is rows 1 to 4")
    refuse(torch.ones(3, 2, dtype=torch.int64), Ragged.from_lengths([3]), "bag")
    refuse(torch.ones(3, 0), Ragged.from_lengths([3]), "at least one feature")
