"""The Triton launchers of spread_tokens where they cut: on a GPU, else under the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch

from survfuse import Ragged, ops
from survfuse.ops import backends
from survfuse.pooling import SpreadNeeds
from tests.ops.contract import CASES, OPS
from tests.ops.test_contract import check_budget, grads_and_results
from tests.ops.triton_calls import DEVICE, seed

launchers = pytest.importorskip("survfuse.triton_kernels.spread_tokens")

SPREAD = next(op for op in OPS if op.name == "spread_tokens")


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """Workspace and results start as NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two slots, each of two pieces."""
    shapes = launchers.pool_bag_shapes

    def plan(total: int, max_length: int, n_bags: int, *, align: int, **_: object):
        rows = 2 * align
        return shapes.Slots(rows, total // rows + n_bags, 2)

    monkeypatch.setattr(shapes, "plan_slots", plan)
    monkeypatch.setattr(launchers.shapes, "TILES", 1)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("case", "queries"), [(CASES[5], 38), (CASES[10], 4)])
def test_cut_into_pieces_slots_chunks_and_blocks_of_keys(case, queries: int) -> None:
    """38 + 2 keys are three blocks of 16 in the backward, and two of 32 in the forward."""
    case = replace(case, queries=queries, heads=1)
    check_budget(SPREAD, "triton", DEVICE, case)


@pytest.mark.usefixtures("cut")
def test_blocks_of_keys_draw_one_mask() -> None:
    case = replace(CASES[5], queries=38, heads=1)
    call = SPREAD.make(case).to(torch.float32, DEVICE)
    module = "survfuse.ops.spread_tokens.draw_seed"
    with mock.patch(module, side_effect=lambda device: seed().to(device)):
        got = grads_and_results(SPREAD, call, "triton", dropout_p=0.4)
        exact = grads_and_results(SPREAD, call.to(torch.float64), "tiled", dropout_p=0.4)
    for ours, theirs in zip(got[0] + got[1], exact[0] + exact[1], strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs.cpu(), rtol=2e-5, atol=2e-5)


def test_small_gradients_survive_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    # the interpreter's fp16 is right, it is bf16 that is not
    monkeypatch.setattr(backends, "backend_obstacle", lambda *_, **__: None)
    g = torch.Generator().manual_seed(2)
    keys, values, bag = (
        torch.randn(shape, generator=g).to(DEVICE)
        for shape in ((2, 2, 5, 24), (2, 2, 5, 7), (70, 24))
    )
    bag = bag.half().requires_grad_()
    ragged = Ragged.from_ranges([0, 30], [40, 40], device=DEVICE)
    leaves = [keys.requires_grad_(), values.requires_grad_()]
    result = ops.spread_tokens(*leaves, bag, ragged=ragged, scale=0.3, backend="triton")
    weight = torch.randn(result.out.shape, generator=g).to(DEVICE)
    found = [
        torch.autograd.grad((result.out * weight * size).sum(), leaves, retain_graph=True)
        for size in (1.0, 1e-9)
    ]
    # without a scale of their own, products of 1e-9 are 0 in fp16
    for large, small in zip(*found, strict=True):
        close = {"rtol": 0, "atol": 2e-3 * float(large.abs().max())}
        torch.testing.assert_close(small * 1e9, large, **close)


@pytest.mark.parametrize("needed", SpreadNeeds._fields)
def test_one_gradient_alone(needed: str) -> None:
    call = SPREAD.make(CASES[0]).to(torch.float32, DEVICE)
    result = SPREAD.function(call, "triton")
    leaves = list(call.tensors.values())
    total = result[0].sum() + result[1].sum()
    together = torch.autograd.grad(total, leaves, retain_graph=True)
    place = list(call.tensors).index(needed)
    for i, tensor in enumerate(leaves):
        tensor.requires_grad_(i == place)
    result = SPREAD.function(call, "triton")
    (alone,) = torch.autograd.grad(result[0].sum() + result[1].sum(), [leaves[place]])
    assert torch.equal(alone, together[place])
