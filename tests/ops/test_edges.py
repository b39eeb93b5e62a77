"""Edges a review found: each was wrong once."""

from __future__ import annotations

import pytest
import torch

import survfuse.tiled.tiles as tiles
from survfuse import Ragged, ops
from tests.ops.contract import CASES, OPS, Case
from tests.ops.test_contract import check_budget

BACKENDS = ("tiled", "native")


def test_a_range_whose_end_passes_64_bits_is_refused() -> None:
    ragged = Ragged.from_ranges([2**63 - 1], [1])
    with pytest.raises(ValueError, match="bag 0 is rows 9223372036854775807 to"):
        ops.pool_bag(torch.zeros(1, 1, 4), torch.zeros(5, 4), ragged=ragged)


@pytest.mark.parametrize(
    "ragged",
    [
        Ragged(torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), 1, 1),
        Ragged(torch.zeros(1, dtype=torch.int64), torch.ones(2, dtype=torch.int64), 2, 1),
    ],
    ids=["int32", "lengths differ"],
)
def test_a_ragged_made_by_hand_is_checked(ragged: Ragged) -> None:
    rows = torch.zeros(len(ragged.lengths), 1, 4)
    with pytest.raises(ValueError, match="int64 vectors of one length"):
        ops.pool_bag(rows, torch.zeros(5, 4), ragged=ragged)


@pytest.mark.parametrize(("absorb", "backend"), [("never", None), ("auto", "reference")])
def test_ranges_are_checked_where_no_kernel_runs(absorb: str, backend: str | None) -> None:
    ragged = Ragged.from_ranges([49], [10])
    query, weight = torch.zeros(1, 1, 1, 2), torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="rows 49 to 59"):
        ops.tokens_attend_bag(
            query, torch.zeros(50, 4), weight, weight, ragged=ragged, absorb=absorb, backend=backend
        )


def test_weights_have_no_kernel() -> None:
    query = torch.zeros(1, 1, 1, 2)
    with pytest.raises(RuntimeError, match="implement pool_weights"):
        ops.selected_backend("pool_weights", query[0], torch.zeros(5, 2), backend="native")


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_sums_do_not_overflow(backend: str) -> None:
    bag = torch.full((8192, 64), 10.0, dtype=torch.float16)
    pooled = ops.pool_bag(torch.zeros(1, 1, 64), bag, backend=backend).pooled
    assert torch.equal(pooled, torch.full((1, 1, 64), 10.0))
    rows = torch.full((1, 1, 64), 1e5, requires_grad=True)
    out = ops.pool_bag(rows, bag, scale=1e-9, backend=backend).pooled
    (gradient,) = torch.autograd.grad(out, rows, torch.full_like(out, 1e5))
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_gradients_do_not_reach_excluded_patches(backend: str) -> None:
    bag = torch.randn(6, 4, requires_grad=True)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0, -torch.inf, 0.0])
    out = ops.pool_bag(torch.randn(1, 2, 4), bag, bias=bias, backend=backend).pooled
    (gradient,) = torch.autograd.grad(out, bag, torch.full_like(out, torch.inf))
    assert torch.equal(gradient[[1, 4]], torch.zeros(2, 4))


def test_entropy_of_weights_with_excluded_patches_has_a_gradient() -> None:
    rows, bag = torch.randn(1, 2, 4, requires_grad=True), torch.randn(6, 4)
    bias = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0, 0.0])
    gradients = []
    for backend in ("reference", "tiled"):
        lse = ops.pool_bag(rows, bag, bias=bias, backend=backend).lse
        weights = ops.pool_weights(rows, bag, lse, bias=bias, backend=backend)
        (gradient,) = torch.autograd.grad(torch.special.entr(weights).sum(), rows)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_an_infinite_logit_gives_an_infinite_lse(backend: str) -> None:
    bias = torch.tensor([0.0, torch.inf, 0.0])
    lse = ops.pool_bag(torch.zeros(1, 1, 2), torch.zeros(3, 2), bias=bias, backend=backend).lse
    assert lse.item() == torch.inf


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5]], ids=lambda case: case.name)
def test_16_bit_products_of_matrix_units_stay_within_budget(case: Case, monkeypatch) -> None:
    """What `tiled` does where the processor has AMX; the products run anywhere, only slower."""
    monkeypatch.setattr(tiles, "multiplies_bf16", lambda: True)
    assert tiles.operand_type(torch.zeros(1, dtype=torch.bfloat16), centred=True) == torch.bfloat16
    check_budget(OPS[0], "tiled", "cpu", case)
