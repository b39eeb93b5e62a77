"""Dropout of long bags: what is dropped, what is kept, and what flows back."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from survfuse.layers.dropout import Dropout, dropout, dropped, rounded


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_as_many_go_as_p_says(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 501)
    out = dropout(x, p)
    kept = 1.0 / (1.0 - rounded(p))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(kept).item()}
    # five standard deviations of a binomial share
    n = x.numel()
    assert abs(float((out == 0).double().mean()) - p) < 5 * (p * (1 - p) / n) ** 0.5
    # neighbours, which share a draw, are dropped independently of one another
    gone = (out == 0).double().flatten()
    for apart in (1, 2, 3, 4):
        both = float((gone[apart:] * gone[:-apart]).mean())
        assert abs(both - p * p) < 5 * (p * p * (1 - p * p) / n) ** 0.5 + 5 * p * n**-0.5


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 5), (7, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_those_of_the_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=dtype).add_(3).requires_grad_()
    layer = Dropout(0.5)
    out = layer(x)
    assert (out.shape, out.dtype) == (x.shape, dtype)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, torch.where(out == 0, 0.0, 2.0).to(dtype))
    assert torch.equal(layer.eval()(x), x)


def test_a_seed_says_the_mask_and_a_second_run_draws_it_again() -> None:
    x = torch.randn(33, 7, requires_grad=True)
    torch.manual_seed(2)
    first = dropout(x, 0.5)
    torch.manual_seed(2)
    again = checkpoint(lambda x: dropout(x, 0.5), x, use_reentrant=False)
    assert torch.equal(first, again)
    assert not torch.equal(first, dropout(x, 0.5))
    gradients = (torch.autograd.grad(out.sum(), x)[0] for out in (first, again))
    assert torch.equal(*gradients)


def test_probabilities_are_multiples_and_results_are_scaled_by_them() -> None:
    assert rounded(0.1) == 6554 / 65536
    assert rounded(0.0) == rounded(1e-6) == 0.0
    assert rounded(1.0) == 1.0
    assert rounded(1 - 1e-9) == 65535 / 65536
    x = torch.ones(5)
    assert dropout(x, 0.0) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(5))
    assert not dropped(torch.ones(100_000), 0.0).any()
    with pytest.raises(ValueError, match="between 0 and 1"):
        Dropout(1.5)


def test_it_compiles_to_one_graph() -> None:
    compiled = torch.compile(Dropout(0.5), fullgraph=True, backend="aot_eager")
    out = compiled(torch.ones(1000))
    assert set(out.unique().tolist()) == {0.0, 2.0}
