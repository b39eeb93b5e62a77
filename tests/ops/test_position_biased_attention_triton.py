"""The Triton launchers of position-biased attention, on a GPU or under the interpreter.

The interpreter walks tiles slowly: on the CPU these small calls stand in for the whole contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from survfuse.ops import position_bias
from tests.ops.position_biased import (
    EXACT_CASES,
    TABLE_CASES,
    Call,
    Case,
    differentiate,
    make,
    names,
)
from tests.ops.test_position_biased_attention import check_budget
from tests.ops.tolerance import assert_within_budget
from tests.ops.triton_calls import DEVICE

launchers = pytest.importorskip("survfuse.triton_kernels.position_biased_attention")
shapes = launchers.shapes

SMALL = {
    "one hidden layer": Case("one hidden layer", n_queries=3, n_keys=5),
    "two hidden layers": Case("two hidden layers", n_queries=18, n_keys=5, widths=(17, 9)),
    "three hidden layers": Case("three hidden layers", n_bags=1, n_keys=18, widths=(16, 24, 9)),
    "64 units": Case("64 units", n_bags=1, n_keys=5, widths=(64, 40), dim=20, value_dim=12),
    "heads share groups": Case("heads share groups", n_bags=1, heads=3, groups=1, n_keys=18),
    "no keys": EXACT_CASES[6],
    "no queries": EXACT_CASES[7],
    "ragged": Case("ragged", n_bags=3, ranges=((2, 4), (1, 3), (9, 0)), n_stored=9, n_keys=3),
    "table": replace(TABLE_CASES[0], n_bags=1, n_keys=18, n_queries=5),
    "table, heads share groups": replace(TABLE_CASES[1], n_bags=1, n_keys=9, n_queries=5),
    "table, much beyond it": replace(TABLE_CASES[6], n_bags=1, n_keys=9),
}
EACH_CASE = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


@pytest.fixture(autouse=True)
def _deterministic_with_nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@EACH_CASE
def test_results_and_gradients_within_budget(case: Case) -> None:
    check_budget(case, "triton", DEVICE)


@pytest.mark.parametrize(
    "name", ["one hidden layer", "two hidden layers", "three hidden layers", "heads share groups"]
)
def test_fp16_within_budget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launches are those of 16 bits. The interpreter, refused for these since bf16 is wrong in
    it, forms fp16 products as it should."""
    monkeypatch.setattr(position_bias, "backend_obstacle", lambda *_, **__: None)
    made, outs = make(SMALL[name]), []
    for dtype, backend in (
        (torch.float64, "reference"),
        (torch.float16, "reference"),
        (torch.float16, "triton"),
    ):
        call = made.to(dtype, DEVICE)
        outs.append(differentiate(call, call.run(backend)))
    for label, exact, plain, got in zip(names(made), *outs, strict=True):
        assert_within_budget(label, got, plain, exact, torch.float16)


@pytest.mark.parametrize(("warps", "turns"), [(4, 1), (4, 4), (8, 2)])
@pytest.mark.parametrize("name", ["one hidden layer", "three hidden layers", "heads share groups"])
def test_every_layout(name: str, warps: int, turns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 16 bits and wide layers take: everything in one launch, of any warps and turns."""

    def blocks(problem: object, **_: int) -> dict[str, int]:
        return made(problem, warps=warps, turns=turns)

    made = shapes._blocks
    monkeypatch.setattr(shapes, "_blocks", blocks)
    problem = shapes.Problem(torch.bfloat16, 8, 8, 16, 1, dropout=False, shared_bytes=232448)
    once = [shapes.Launch(True, True, 3, shapes.key_launches(problem)[0].blocks)]
    monkeypatch.setattr(shapes, "key_launches", lambda _: once)
    check_budget(SMALL[name], "triton", DEVICE)


def test_slots_of_queries_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "rows_per_slot", lambda *_, **__: 16)
    case = Case("slots", ranges=((2, 35), (1, 18)), n_stored=40, n_keys=3)
    check_budget(case, "triton", DEVICE)


def test_a_program_walks_several_tiles_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "tiles_per_program", lambda *_: 2)
    check_budget(Case("tiles", n_bags=1, heads=2, groups=1, n_keys=35), "triton", DEVICE)


def test_what_programs_leave_of_the_parameters_stays_within_16_mb() -> None:
    n_tiles, each = 375, 4 * 8641
    run = shapes.tiles_per_program(8, n_tiles, each)
    assert 8 * -(-n_tiles // run) * each <= 16 * 2**20 < 8 * -(-n_tiles // (run - 1)) * each
    assert shapes.tiles_per_program(8, 9, each) == 1


def test_the_table_by_atomics() -> None:
    """Elsewhere the fixture asks for the fixed point."""
    torch.use_deterministic_algorithms(False)
    check_budget(SMALL["table, heads share groups"], "triton", DEVICE)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sums_in_fixed_point_take_any_size(size: float) -> None:
    call = make(SMALL["table"]).to(torch.float32, DEVICE)
    out, _ = call.run("triton")
    weights = [value for name, value in call.tensors.items() if name[0] in "wb"]
    whole, scaled = (
        torch.autograd.grad((out * s).sum(), weights, retain_graph=True) for s in (1.0, size)
    )
    for a, b in zip(whole, scaled, strict=True):
        torch.testing.assert_close(b.double() / size, a.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["heads share groups", "table"])
def test_dropout_draws_the_same_mask(name: str) -> None:
    if DEVICE == "cuda":
        pytest.skip("the device's generator draws another seed than the CPU's")
    made, outs = make(SMALL[name]), []
    for dtype, backend in (
        (torch.float64, "reference"),
        (torch.float32, "reference"),
        (torch.float32, "triton"),
    ):
        call = made.to(dtype)
        torch.manual_seed(11)
        outs.append(differentiate(call, call.run(backend, dropout_p=0.4)))
    for label, exact, plain, got in zip(names(made), *outs, strict=True):
        assert_within_budget(label, got, plain, exact, torch.float32)


def test_each_gradient_alone() -> None:
    call = make(SMALL["one hidden layer"]).to(torch.float32, DEVICE)
    every = dict(zip(call.tensors, differentiate(call, call.run("triton"))[2:], strict=True))
    for group in (["query"], ["key"], ["value"], ["query_pos"], ["key_pos"], ["w0", "b1"]):
        tensors = {n: t.detach().requires_grad_(n in group) for n, t in call.tensors.items()}
        results = Call(tensors, call.options).run("triton")
        alone = Call({n: tensors[n] for n in group}, {})
        for name, gradient in zip(group, differentiate(alone, results)[2:], strict=True):
            assert torch.equal(gradient, every[name])


@pytest.mark.parametrize("name", ["two hidden layers", "table"])
@pytest.mark.parametrize("where", ["query_pos", "key_pos"])
def test_nan_goes_where_torch_sends_it(where: str, name: str) -> None:
    call = make(SMALL[name]).to(torch.float32, DEVICE)
    with torch.no_grad():
        call.tensors[where][0, 1, ..., 0] = torch.nan
        for got, expected in zip(call.run("triton"), call.run("reference"), strict=True):
            assert torch.equal(got.isnan().cpu(), expected.isnan().cpu())
            assert bool(got.isnan().any())
