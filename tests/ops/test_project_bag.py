"""K, V and Q formed tile by tile: what the contract suite does not see of `project_bag`."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from survfuse import Ragged, ops
from survfuse.ops import project_bag as module
from survfuse.ops.project_bag import packed_rows, project_bag
from survfuse.tiled import tiles

RAGGED = Ragged.from_ranges([4, 0, 2, 7], [3, 5, 0, 1])


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bag [9, 6] with NaN in the one row no bag holds and in one that is excluded."""
    torch.manual_seed(0)
    bag = torch.randn(9, 6, dtype=dtype)
    bias = torch.zeros(9, dtype=dtype)
    bias[4] = -torch.inf
    bag[[4, 8]] = torch.nan
    weight, shift = torch.randn(5, 6, dtype=dtype), torch.randn(5, dtype=dtype)
    return bag.requires_grad_(), weight.requires_grad_(), shift.requires_grad_(), bias


def plain(bag: Tensor, weight: Tensor, shift: Tensor, bias: Tensor, eps: float | None) -> Tensor:
    rows = torch.where((bias == -torch.inf)[:, None], 0.0, bag)[packed_rows(RAGGED, 9)]
    rows = rows if eps is None else layer_norm(rows, (6,), eps=eps)
    return rows @ weight.T + shift


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("known", [True, False], ids=["bag by bag", "in lockstep"])
def test_equals_plain_torch_with_its_gradients(eps: float | None, known: bool, monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_known_to_host", lambda starts: known)
    bag, weight, shift, bias = leaves()
    got = project_bag(bag, weight, shift, ragged=RAGGED, bias=bias, normalize_eps=eps)
    want = plain(bag, weight, shift, bias, eps)
    torch.testing.assert_close(got, want)
    upstream = torch.randn_like(got)
    # an excluded row, zeroed, is a constant: no gradient reaches what it held
    for a, b in zip(
        torch.autograd.grad(got, (bag, weight, shift), upstream),
        torch.autograd.grad(want, (bag, weight, shift), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, torch.nan_to_num(b))


def test_is_a_proper_op() -> None:
    bag, weight, shift, bias = leaves(torch.float32)
    bag = torch.nan_to_num(bag.detach()).requires_grad_()
    arguments = (bag, weight, shift, bias, *RAGGED, 1.0, True, 1e-5, None, None)
    torch.library.opcheck(module._forward, arguments)


def test_double_backward_says_where_to_find_one() -> None:
    bag, weight, shift, _ = leaves()
    out = project_bag(bag, weight, shift, ragged=RAGGED)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient.sum().backward()


def test_operations_are_counted() -> None:
    bag, weight, shift, _ = leaves()
    with FlopCounterMode(display=False) as counter:
        project_bag(bag.detach(), weight, shift, ragged=RAGGED).sum().backward()
    # forward, and the gradient of the weight alone
    assert counter.get_total_flops() == 2 * 2 * RAGGED.total * 5 * 6


@pytest.mark.parametrize("absorb", ["always", "never"])
def test_a_million_empty_bags_finish_quickly(absorb: str) -> None:
    n = 1_000_000
    zeros = torch.zeros(n, dtype=torch.int64)
    lengths = zeros.clone()
    lengths[-1] = 3
    ragged = Ragged.from_ranges(zeros, lengths)
    key = torch.ones(1, 1, 1, 2).expand(n, -1, -1, -1)
    begin = time.perf_counter()
    bag, w_q = torch.ones(3, 4), torch.ones(1, 2, 4)
    out = ops.bag_attends_tokens(bag, w_q, key, key, ragged=ragged, absorb=absorb)
    assert torch.equal(out, torch.ones(3, 1, 2))
    assert time.perf_counter() - begin < 60
