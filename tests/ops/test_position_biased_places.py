"""Attention biased by position: places near, far and equal, and how tables err."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from survfuse import ops, reference
from survfuse.native.core import CPU_ISAS
from survfuse.reference.position_biased_attention import (
    evaluate,
    interpolate,
    make_table,
    signed_log,
    table_reach,
)
from tests.ops.position_biased import (
    EACH_TARGET,
    EXACT_CASES,
    TABLE,
    TORCH_TARGETS,
    Call,
    Case,
    differentiate,
    make,
    names,
    use_isa,
)
from tests.ops.test_contract import dtypes
from tests.ops.tolerance import assert_within_budget


@EACH_TARGET
def test_slope_of_the_signed_log_at_coincident_positions_is_one(backend: str, device: str) -> None:
    """Gradients where every offset is exactly 0 are those a step away on either side."""
    call = make(Case("coincident", 1, 3, 4, 2, 1)).to(dtypes(backend, device)[0], device)
    tensors = dict(call.tensors)
    for name in ("query_pos", "key_pos"):
        tensors[name] = torch.full_like(tensors[name], 0.625).requires_grad_()
    call = replace(call, tensors=tensors)
    got = differentiate(call, call.run(backend))
    exact_call = call.to(torch.float64, "cpu")
    exact = differentiate(exact_call, exact_call.run("reference"))
    for name, g, e in zip(names(call), got, exact, strict=True):
        assert_within_budget(name, g, e, e, torch.float32)
    # the step away, which moves no kink of this MLP
    moved = dict(exact_call.tensors)
    moved["query_pos"] = (moved["query_pos"].detach() + 1e-9).requires_grad_()
    away = Call(moved, {})
    beside = differentiate(away, away.run("reference"))
    assert bool(exact[5].abs().max() > 1e-3)
    torch.testing.assert_close(exact[5], beside[5], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("isa", ["tiled", *CPU_ISAS[1:]])
def test_signed_log_is_exact_at_every_distance(isa: str, dtype, monkeypatch) -> None:
    """One key that nothing is asked of: lse is the MLP, here the signed log along x."""
    backend = "tiled" if isa == "tiled" else "native"
    if backend == "native":
        use_isa(monkeypatch, isa)
    size = torch.logspace(-30, 30, 2001, dtype=torch.float64)
    near = torch.linspace(0.0, 4.0, 3000, dtype=torch.float64)
    x = torch.cat([size, -size, near, -near]).to(dtype)
    at = torch.stack([x, torch.zeros_like(x)], -1)[None]
    w0, w1 = torch.zeros(2, 2, dtype=dtype), torch.tensor([[1.0, -1.0]], dtype=dtype)
    w0[:, 0] = torch.tensor([1.0, -1.0])
    mlp = ((w0, torch.zeros(2, dtype=dtype)), (w1, torch.zeros(1, dtype=dtype)))
    query, key = torch.zeros(1, len(x), 1, 4, dtype=dtype), torch.zeros(1, 1, 1, 4, dtype=dtype)
    origin = torch.zeros(1, 1, 1, 2, dtype=dtype)
    _, lse = ops.position_biased_attention_with_lse(
        query, key, key, at, origin, mlp, scale=0.0, backend=backend
    )
    exact = x.double().abs().log1p().copysign(x.double())
    got, away = lse.flatten(), x != 0
    ratio = got[away].double() / exact[away]
    assert_within_budget("ratio", ratio, torch.ones_like(ratio), torch.ones_like(ratio), dtype)
    assert bool((got[~away] == 0).all())


@EACH_TARGET
def test_places_up_to_300_keep_their_fraction_beside_16_bits(backend: str, device: str) -> None:
    """lse of logits that are bias alone, where bf16 would move a place by a whole patch."""
    dtype = dtypes(backend, device)[-1]
    made = make(Case("far and between", 1, 40, 9, 1, 1, widths=(32,)))
    fraction = torch.rand(1, 40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    places = made.tensors | {
        "query": torch.zeros_like(made.tensors["query"]),
        # patches side by side at the far corner of a slide of 300
        "query_pos": (299 + fraction).float().double(),
        "key_pos": (made.tensors["key_pos"] + 299).float().double(),
    }
    call = Call(places, made.options).to(dtype, device)
    exact = call.to(torch.float64, "cpu").run("reference")[1]
    plain = call.to(torch.float32, "cpu").run("reference")[1]
    assert_within_budget("lse", call.run(backend)[1], plain, exact, torch.float32)


@pytest.mark.parametrize("where", ["query_pos", "key_pos"])
@EACH_TARGET
def test_nan_goes_where_torch_sends_it(backend: str, device: str, where: str) -> None:
    for options in ({}, TABLE):
        case = replace(EXACT_CASES[1], n_bags=1, n_queries=4, options=options)
        call = make(case).to(dtypes(backend, device)[0], device)
        with torch.no_grad():
            call.tensors[where][0, 1, ..., 0] = torch.nan
            for got, expected in zip(call.run(backend), call.run("reference"), strict=True):
                assert torch.equal(got.isnan().cpu(), expected.isnan().cpu())
                assert bool(got.isnan().any())
                assert where == "key_pos" or not bool(got.isnan().all())


@EACH_TARGET
def test_infinitely_far_is_beyond_every_table(backend: str, device: str) -> None:
    case = Case("far", n_bags=1, n_queries=4, options=TABLE | {"table_range": 9.0})
    call = make(case).to(dtypes(backend, device)[0], device)
    results = []
    for far in (torch.inf, 1e9):
        with torch.no_grad():
            call.tensors["query_pos"][0, :, 0] = far
            results.append(call.run(backend))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool(results[0][0].isfinite().all())


@TORCH_TARGETS
def test_one_position_for_all_bags(backend: str) -> None:
    call = make(EXACT_CASES[0]).to(torch.float64)
    shared = call.tensors["query_pos"][0].detach().requires_grad_()
    tensors = call.tensors | {"query_pos": shared}
    got = differentiate(Call(tensors, {}), Call(tensors, {}).run(backend))
    repeated = shared.detach().expand(2, -1, -1).clone().requires_grad_()
    tensors = call.tensors | {"query_pos": repeated}
    expected = differentiate(Call(tensors, {}), Call(tensors, {}).run(backend))
    expected[5] = expected[5].sum(0)
    for name, g, e in zip(names(call), got, expected, strict=True):
        assert_within_budget(name, g, e, e, torch.float64)


def kinks_along(mlp, u: Tensor) -> Tensor:
    """Which hidden units are on at u [..., 2]: one row of bools per point."""
    states = []
    for weight, shift in mlp[:-1]:
        u = u @ weight.T + shift
        states.append(u > 0)
        u = torch.relu(u)
    return torch.cat(states, -1)


@pytest.mark.parametrize("widths", [(16,), (32, 32), (16, 24, 9)], ids=str)
def test_a_table_is_exact_where_no_kink_is_and_bounded_elsewhere(widths: tuple[int, ...]) -> None:
    call = make(Case("bounded", widths=widths)).to(torch.float64)
    mlp = [(w.detach(), b.detach()) for w, b in call.split()[-1]]
    reach, size = torch.tensor([2.5, 1.5], dtype=torch.float64), 64
    u = (torch.rand(20000, 2, dtype=torch.float64) * 2 - 1) * reach
    table = make_table(mlp, size, reach)
    error = (interpolate(table, u, reach) - evaluate(mlp, u)).abs().amax(-1)
    cell = 2 * reach / (size - 1)
    corner = ((u + reach) / cell).floor().clamp(0, size - 2) * cell - reach
    corners = torch.stack(
        [corner + cell * torch.tensor(s) for s in itertools.product((0, 1), (0, 1))]
    )
    states = kinks_along(mlp, corners.double())
    # on the same side of every kink at all corners, the MLP is affine between them
    affine = (states == states[0]).all(-1).all(0)
    assert 0.1 < affine.double().mean() < 1.0
    assert float(error[affine].max()) < 1e-13
    # docs/math.md: half the cell times the Lipschitz constant of the MLP along each axis, and half
    # of that with one hidden layer
    slopes = torch.eye(2, dtype=torch.float64)
    for weight, _ in mlp:
        slopes = weight.abs() @ slopes.abs()
    bound = float((slopes * cell / (4 if len(widths) == 1 else 2)).sum(-1).max())
    worst = float(error.max())
    assert 0.0 < worst <= bound


def test_a_table_errs_less_the_finer_it_is() -> None:
    call = make(EXACT_CASES[1]).to(torch.float64)
    with torch.no_grad():
        exact = call.run("reference")[0]
        errors = [
            float((call.run("reference", bias="table", table_size=n)[0] - exact).abs().max())
            for n in (16, 64, 256)
        ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_a_measured_range_covers_every_offset_and_ignores_rows_in_no_bag() -> None:
    case = Case("measured", ranges=((3, 9), (1, 4)), n_stored=14, n_keys=5)
    for dtype in (torch.float64, torch.float32):
        call = make(case).to(dtype)
        ragged = call.options["query_ragged"]
        query_pos, key_pos = call.tensors["query_pos"].detach(), call.tensors["key_pos"].detach()
        reach = table_reach(query_pos, key_pos, ragged, None)
        u = signed_log(query_pos[1:12, None] - key_pos.reshape(1, -1, 2)).abs().amax((0, 1))
        assert bool((u <= reach).all())
        assert bool((reach <= 1.001 * u).all())
        query_pos[0], query_pos[13] = 1e6, -1e6
        assert torch.equal(reach, table_reach(query_pos, key_pos, ragged, None))


def test_beyond_a_table_the_bias_is_that_of_its_edge() -> None:
    call = make(EXACT_CASES[0]).to(torch.float64)
    query, key, value, _, _, mlp = call.split()
    far = torch.tensor([[50.0, 0.25]], dtype=torch.float64).expand(5, 2).clone().requires_grad_()
    edge = torch.tensor([[4.0, 0.25]], dtype=torch.float64).expand(5, 2)
    origin = torch.zeros(2, 2, 7, 2, dtype=torch.float64)
    options = {"bias": "table", "table_size": 32, "table_range": 4.0}
    outs = [
        reference.position_biased_attention_with_lse(query, key, value, at, origin, mlp, **options)
        for at in (far, edge)
    ]
    torch.testing.assert_close(outs[0], outs[1])
    d_far = torch.autograd.grad(outs[0][1].sum(), far)[0]
    assert bool((d_far[:, 0] == 0).all())
    assert bool((d_far[:, 1] != 0).all())
