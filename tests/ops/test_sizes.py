"""Matrices whose elements no 32-bit integer can count."""

from __future__ import annotations

import pytest
import torch

from survfuse import Ragged, ops
from survfuse.ops.backends import backend_obstacle

BEYOND = 2**31
CPU = torch.device("cpu")


@pytest.fixture(params=["tiled", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    obstacle = backend_obstacle(request.param, device=CPU, dtype=torch.bfloat16)
    if obstacle:
        pytest.skip(obstacle)
    return request.param


pytestmark = pytest.mark.usefixtures("one_thread")


def test_more_than_2_to_the_31_features(backend: str) -> None:
    """All patches are one row of memory: the result is that row, and lse counts the patches."""
    dim = 4096
    n = BEYOND // dim + 777
    patch, row = torch.randn(1, dim), torch.randn(1, 1, dim) / dim**0.5
    bias = torch.randn(n)
    # only what lies behind the 2^31st feature counts in the second bag
    ragged = Ragged.from_ranges([0, n - 700], [n, 700])
    pooled, lse, weight_sum = ops.pool_bag(
        row.expand(2, -1, -1),
        patch.expand(n, dim),
        bias=bias,
        ragged=ragged,
        scale=0.5,
        backend=backend,
    )
    assert n * dim > BEYOND
    logit = 0.5 * float(row.double().flatten() @ patch.double().flatten())
    sums = torch.stack([bias.double().logsumexp(0), bias[-700:].double().logsumexp(0)])
    torch.testing.assert_close(lse[:, 0].double(), logit + sums, rtol=0, atol=1e-4)
    torch.testing.assert_close(pooled[:, 0], patch.expand(2, dim), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weight_sum, torch.ones(2, 1))


def test_rows_more_than_2_to_the_31_features_apart(backend: str) -> None:
    """Addresses past 2^31 elements, forward and backward: of all pages few are ever touched."""
    dim, stride = 8, 2**20
    n = BEYOND // stride + 70
    try:
        memory = torch.empty(n * stride, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space for {n * stride * 2 / 2**30:.1f} GiB: {error}")
    wide = memory.view(n, stride)[:, :dim]
    narrow = torch.randn(n, dim).to(torch.bfloat16)
    wide.copy_(narrow)
    rows, bias = torch.randn(2, 3, dim), torch.randn(n)
    ragged = Ragged.from_ranges([n - 50, 0], [50, n])
    outs = []
    for bag in (narrow, wide):
        leaves = [t.detach().requires_grad_() for t in (rows, bag, bias)]
        results = ops.pool_bag(*leaves[:2], bias=leaves[2], ragged=ragged, backend=backend)
        gradients = torch.autograd.grad(results.pooled.square().sum() + results.lse.sum(), leaves)
        outs.append([*results, *gradients])
    assert wide[-1].data_ptr() - wide.data_ptr() > 2 * BEYOND
    assert bool(outs[1][0].any())
    for got, expected in zip(outs[1], outs[0]):
        assert torch.equal(got, expected)
