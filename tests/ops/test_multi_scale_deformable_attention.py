"""`multi_scale_deformable_attention` on every backend: the contract of docs/design.md."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from survfuse import ops
from survfuse.native.core import CPU_ISAS, native_core
from tests.ops.contract import CUDA
from tests.ops.deformable_cases import (
    CASES,
    FORMS,
    Call,
    Case,
    make_call,
    plain_deformable_attention,
)
from tests.ops.tolerance import (
    Compared,
    assert_draws_within_budget,
    assert_within_budget,
    nearby,
)

TARGETS = [("tiled", "cpu"), ("native", "cpu")]
if CUDA:
    TARGETS += [
        pytest.param("tiled", "cuda", marks=pytest.mark.gpu),
        pytest.param("native", "cuda", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ]
both_targets = pytest.mark.parametrize(("backend", "device"), TARGETS)
every_form = pytest.mark.parametrize("form", FORMS)
IDS = {"ids": lambda value: getattr(value, "name", str(value))}


pytestmark = pytest.mark.usefixtures("one_thread")


def dtypes(backend: str, device: str) -> tuple[torch.dtype, ...]:
    if backend == "triton" and device == "cpu":
        return (torch.float32,)
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return narrow if device == "cuda" else (torch.float64, *narrow)


def result_and_gradients(call: Call, out: Tensor) -> dict[str, Tensor]:
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.double
    )
    total = (upstream.to(out.device) * out.double()).sum()
    gradients = torch.autograd.grad(total, list(call.tensors.values()), allow_unused=True)
    named = zip(call.tensors, gradients, strict=True)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in call.tensors.items()}
    return {"result": out.detach()} | {n: zeros[n] if g is None else g for n, g in named}


def check_budget(case: Case, form: str, backend: str, device: str, dtype: torch.dtype) -> None:
    made = make_call(case, form)

    def draw(k: int) -> Iterator[Compared]:
        call = replace(made, tensors=nearby(made.tensors, k)).to(dtype, device)
        # the exact result of the very numbers this type holds
        exact_call = call.to(torch.float64)
        exact = result_and_gradients(exact_call, exact_call.run("reference"))
        got = result_and_gradients(call, call.run(backend))
        plain_call = call.to(dtype)
        # grid_sample has slopes of its own on borders, and NaN gradients of NaN
        by_hand = case.where in ("around", "far") and exact["result"].numel() > 0
        out = plain_deformable_attention(plain_call) if by_hand else plain_call.run("reference")
        plain = result_and_gradients(plain_call, out)
        return ((f"{n} in {dtype}", got[n], plain[n], exact[n]) for n in exact)

    assert_draws_within_budget(draw, dtype)


@every_form
@both_targets
@pytest.mark.parametrize("case", CASES, **IDS)
@pytest.mark.usefixtures("nan_in_fresh_memory")
def test_results_and_gradients_within_budget(case, backend, device, form) -> None:
    for dtype in dtypes(backend, device):
        check_budget(case, form, backend, device, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@every_form
@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[11], CASES[-1]], **IDS)
def test_atomic_sums_within_budget(case: Case, form: str) -> None:
    """The default of CUDA kernels; where fresh memory holds NaN, they sum in fixed point."""
    for dtype in dtypes("native", "cuda"):
        check_budget(case, form, "native", "cuda", dtype)


@pytest.mark.parametrize("isa", CPU_ISAS[1:])
@pytest.mark.parametrize("form", ["locations", "boxes"])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[9], CASES[10]], **IDS)
def test_native_on_every_instruction_set(case, form, isa, monkeypatch) -> None:
    if native_core() is None or not native_core().cpu_isa_available(CPU_ISAS.index(isa)):
        pytest.skip(f"this processor has no {isa}")
    module = importlib.import_module("survfuse.native.multi_scale_deformable_attention")
    for name in ("forward", "backward"):
        name = f"multi_scale_deformable_attention_{name}"
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original: f(*a, isa=isa))
    for dtype in dtypes("native", "cpu"):
        check_budget(case, form, "native", "cpu", dtype)


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], **IDS)
def test_reference_is_grid_sample(case: Case) -> None:
    call = make_call(case).to(torch.float64)
    torch.testing.assert_close(call.run("reference"), plain_deformable_attention(call))


@both_targets
def test_sub_pixel_positions_survive_16_bit_values(backend: str, device: str) -> None:
    """Stripes over 300 x 300 pixels tell where they were sampled."""
    side, n = 300, 500
    # the value of a pixel is its column modulo 2: exact in bf16, of slope 1 between neighbours
    value = torch.arange(side).remainder(2).expand(side, side).reshape(1, -1, 1, 1)
    value = value.to(device, torch.bfloat16)
    x = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 298 + 0.5
    y = torch.full_like(x, 150.5)
    locations = (torch.stack([x, y], -1) / side).view(1, n, 1, 1, 1, 2).to(device, torch.float32)
    names = ("value", "sampling_locations", "attention_weights")
    tensors = (value.float(), locations, torch.ones(1, n, 1, 1, 1, device=device))
    call = Call("locations", ((side, side),), dict(zip(names, tensors, strict=True)))
    out = call.run(backend)
    pixel = locations.double().cpu().flatten(0, 4)[:, 0] * side - 0.5
    low = pixel.floor()
    expected = torch.where(low % 2 == 0, pixel - low, 1 - (pixel - low))
    plain = plain_deformable_attention(call)
    assert_within_budget("out", out[0, :, 0], plain[0, :, 0], expected, torch.float32)
    narrow = call.to(torch.bfloat16, device).run(backend)
    assert torch.equal(narrow, out.to(torch.bfloat16))


@every_form
@both_targets
def test_nan_values_that_no_sample_touches_are_not_seen(backend, device, form) -> None:
    call = make_call(Case("one pixel read", shapes=((4, 4),), points=1, where="integers"), form)
    for name in ("sampling_locations", "sampling_offsets"):
        if name in call.tensors:
            call.tensors[name].fill_(0.3 if form == "locations" else 0.0)
    if form != "locations":
        call.tensors["reference_points"].fill_(0.3)
    call.tensors["value"][:, 5:] = torch.nan
    call.tensors["value"][:, 0] = 1.0
    shifted = call.to(torch.float32, device)
    # 0.3 * 4 - 0.5 = 0.7: pixels 0, 1, 4 and 5, of which the last is NaN
    assert shifted.run(backend).isnan().all()
    call.tensors["value"][:, 5] = 1.0
    assert call.to(torch.float32, device).run(backend).isfinite().all()


@every_form
@pytest.mark.parametrize("backend", ["tiled", "native"])
def test_gradcheck_in_fp64(backend: str, form: str) -> None:
    call = make_call(Case("small", shapes=((3, 2), (1, 2)), queries=2, dim=3, points=2), form)
    tensors = [t.requires_grad_() for t in call.tensors.values()]

    def function(*values: Tensor) -> Tensor:
        return Call(form, call.shapes, dict(zip(call.tensors, values, strict=True))).run(backend)

    assert torch.autograd.gradcheck(function, tensors, atol=1e-6, rtol=1e-4)


@both_targets
@every_form
def test_twenty_runs_are_bitwise_equal(backend, device, form) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        call = make_call(CASES[-1], form).to(torch.float32, device)
        first = result_and_gradients(call, call.run(backend))
        for _ in range(19):
            again = result_and_gradients(call, call.run(backend))
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("threads", [2, 5, 16])
@every_form
def test_threads_change_no_bit(form: str, threads: int) -> None:
    call = make_call(CASES[-1], form).to(torch.float32)
    expected = result_and_gradients(call, call.run("native"))
    torch.set_num_threads(threads)
    got = result_and_gradients(call, call.run("native"))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@both_targets
def test_strided_tensors(backend: str, device: str) -> None:
    call = make_call(CASES[0]).to(torch.float32, device)
    expected = result_and_gradients(call, call.run(backend))
    views = {}
    for name, tensor in call.tensors.items():
        longer = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), torch.nan)
        longer[..., :-3] = tensor.detach()
        views[name] = longer[..., :-3].requires_grad_()
    turned = views | {"value": call.tensors["value"].detach().mT.contiguous().mT.requires_grad_()}
    for tensors in (views, turned):
        strided = Call(call.form, call.shapes, tensors)
        got = result_and_gradients(strided, strided.run(backend))
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


@every_form
@both_targets
def test_opcheck(backend, device, form) -> None:
    module = importlib.import_module("survfuse.ops.multi_scale_deformable_attention")
    call = make_call(CASES[0], form).to(torch.float32, device)
    with mock.patch.object(module, "_forward", side_effect=module._forward) as spy:
        call.run(backend)
    torch.library.opcheck(module._forward, spy.call_args.args)


@both_targets
@every_form
def test_compiles_as_one_graph_for_every_length(backend, device, form) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shapes = torch.tensor(CASES[0].shapes, device=device)

    def function(tensors: dict[str, Tensor]) -> Tensor:
        op = ops.multi_scale_deformable_attention
        if form != "locations":
            op = ops.multi_scale_deformable_attention_from_offsets
        return op(spatial_shapes=shapes, **tensors, backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, batch in ((9, 5), (17, 6), (30, 7)):
        case = Case("n", queries=queries, batch=batch)
        call = make_call(case, form).to(torch.float32, device)
        expected = result_and_gradients(call, call.run(backend))
        got = result_and_gradients(call, compiled(call.tensors))
        for name in expected:
            torch.testing.assert_close(got[name], expected[name])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@both_targets
def test_checkpoint_and_autocast_change_no_bit(backend: str, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    call = make_call(CASES[0]).to(torch.float32, device)
    expected = result_and_gradients(call, call.run(backend))
    with torch.autocast(device, dtype=torch.bfloat16):
        out = checkpoint(lambda: call.run(backend), use_reentrant=False)
    got = result_and_gradients(call, out)
    for name in expected:
        assert expected[name].dtype == got[name].dtype
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("wanted", ["value", "sampling_locations", "attention_weights"])
@both_targets
def test_one_gradient_at_a_time(backend: str, device: str, wanted: str) -> None:
    call = make_call(CASES[0]).to(torch.float32, device)
    expected = result_and_gradients(call, call.run(backend))
    alone = {n: t.detach().requires_grad_(n == wanted) for n, t in call.tensors.items()}
    out = Call(call.form, call.shapes, alone).run(backend)
    upstream = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.double
    )
    (out.double() * upstream.to(device)).sum().backward()
    torch.testing.assert_close(alone[wanted].grad, expected[wanted], rtol=1e-6, atol=1e-6)


def test_double_backward_raises_with_a_hint_and_works_on_reference() -> None:
    def gradient(backend: str) -> Tensor:
        call = make_call(CASES[0]).to(torch.float64)
        out = call.run(backend)
        value = call.tensors["value"]
        return torch.autograd.grad(out.square().sum(), value, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient("tiled").backward()
    gradient("reference").backward()


def test_shapes_as_pairs_or_as_a_tensor() -> None:
    call = make_call(CASES[0]).to(torch.float32)
    expected = call.run(None)
    numbers = np.array(call.shapes, dtype=np.int32)
    pairs = [list(pair) for pair in call.shapes]
    for shapes in (torch.tensor(call.shapes), pairs, numbers, [tuple(pair) for pair in numbers]):
        out = ops.multi_scale_deformable_attention(spatial_shapes=shapes, **call.tensors)
        assert torch.equal(out, expected)


def test_meta_tensors_tell_the_shape_but_to_the_reference() -> None:
    call = make_call(CASES[0]).to(torch.float32)
    moved = {name: tensor.to("meta") for name, tensor in call.tensors.items()}
    for shapes in (call.shapes, torch.tensor(call.shapes, device="meta")):
        out = ops.multi_scale_deformable_attention(spatial_shapes=shapes, **moved)
        assert out.shape == call.run(None).shape
        with pytest.raises(RuntimeError, match=r"'reference' cannot serve .* meta hold no numbers"):
            ops.multi_scale_deformable_attention(
                spatial_shapes=shapes, **moved, backend="reference"
            )


def test_logits_may_come_flat() -> None:
    call = make_call(CASES[0], "points").to(torch.float32)
    flat = call.tensors | {"attention_logits": call.tensors["attention_logits"].flatten(3)}
    assert torch.equal(Call(call.form, call.shapes, flat).run(None), call.run(None))


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    call = make_call(CASES[0]).to(torch.float32)
    with FlopCounterMode(display=False) as counter:
        call.run("native").sum().backward()
    assert counter.get_total_flops() == 3 * 8 * (2 * 9 * 2 * 3 * 3) * 8


def _refused(**changed) -> dict:
    call = make_call(CASES[0]).to(torch.float32)
    return {"spatial_shapes": call.shapes, **call.tensors} | changed


@pytest.mark.parametrize("backend", [None, "reference", "tiled"])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"value": torch.zeros(2, 51, 2)}, ValueError, r"value has shape.*\[B, S, H, d\]"),
        ({"value": [1.0]}, TypeError, "value is list"),
        ({"value": torch.zeros(2, 51, 2, 8, dtype=torch.int64)}, TypeError, "value is torch.int64"),
        ({"value": torch.zeros(2, 51, 2, 0)}, ValueError, "a head and a channel"),
        ({"spatial_shapes": [(5, 7), (3, 4), (2, 3)]}, ValueError, "53 pixels.* has 51 rows"),
        ({"spatial_shapes": torch.tensor([(5, 7), (3, 4), (2, 3)])}, ValueError, "53 pixels"),
        ({"spatial_shapes": torch.tensor([(5, 7), (3, 4), (-2, -2)])}, ValueError, "at least 0"),
        ({"spatial_shapes": torch.zeros(3, 2, dtype=torch.int32)}, TypeError, "must be int64"),
        ({"spatial_shapes": torch.zeros(3, 2)}, TypeError, "must be int64"),
        ({"spatial_shapes": [(5.0, 7.0), (3, 4), (2, 2)]}, TypeError, "whole numbers"),
        ({"spatial_shapes": [(5, 7), (3,)]}, TypeError, "pairs of whole numbers"),
        ({"spatial_shapes": [(True, True)]}, TypeError, "pairs of whole numbers"),
        (
            {"spatial_shapes": torch.zeros(3, 2, dtype=torch.int64, device="meta")},
            ValueError,
            "spatial_shapes is on meta and value on cpu; it must hold numbers",
        ),
        ({"spatial_shapes": torch.zeros(3, dtype=torch.int64)}, ValueError, r"must be \[L, 2\]"),
        ({"spatial_shapes": []}, ValueError, "L at least 1"),
        (
            {"sampling_locations": torch.zeros(2, 9, 2, 3, 3, 2, dtype=torch.bfloat16)},
            TypeError,
            "sampling_locations is torch.bfloat16; it must be torch.float32",
        ),
        (
            {"sampling_locations": torch.zeros(2, 9, 2, 3, 3, 2, dtype=torch.float64)},
            TypeError,
            "must be torch.float32 beside a value of torch.float32$",
        ),
        (
            {"sampling_locations": torch.zeros(2, 9, 2, 2, 3, 2)},
            ValueError,
            r"must be \[2, Q, 2, 3, P, 2\], with the levels of spatial_shapes",
        ),
        ({"sampling_locations": torch.zeros(2, 9, 2, 3, 0, 2)}, ValueError, "P must be at least 1"),
        (
            {"attention_weights": torch.zeros(2, 9, 2, 3, 4)},
            ValueError,
            r"attention_weights has shape.*must be \[2, 9, 2, 3, 3\]",
        ),
    ],
)
def test_refusals(changed: dict, error: type, message: str, backend: str | None) -> None:
    with pytest.raises(error, match=message):
        ops.multi_scale_deformable_attention(**_refused(**changed), backend=backend)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"reference_points": torch.zeros(2, 9, 3, 3)},
            ValueError,
            r"must be \[2, 9, 3, 2\], or hold 4 numbers each for boxes",
        ),
        ({"reference_points": torch.zeros(2, 8, 3, 4)}, ValueError, r"must be \[2, 9, 3, 4\]"),
        ({"reference_points": torch.zeros(2, 9, 3, 2).half()}, TypeError, "reference_points is"),
        ({"sampling_offsets": torch.zeros(2, 9, 2, 3, 3, 2).half()}, TypeError, "sampling_offsets"),
        ({"attention_logits": torch.zeros(2, 9, 2, 8)}, ValueError, r"must be \[2, 9, 2, 9\]"),
        (
            {"attention_logits": torch.zeros(2, 9, 2)},
            ValueError,
            r"must be \[2, 9, 2, 3, 3\], or flat \[B, Q, H, L \* P\]",
        ),
    ],
)
def test_refusals_of_offsets(changed: dict, error: type, message: str) -> None:
    call = make_call(CASES[0], "points").to(torch.float32)
    with pytest.raises(error, match=message):
        ops.multi_scale_deformable_attention_from_offsets(
            **({"spatial_shapes": call.shapes, **call.tensors} | changed)
        )


def test_backends_that_cannot_serve_say_why() -> None:
    call = make_call(CASES[0]).to(torch.float64)
    with pytest.raises(RuntimeError, match="fp64"):
        call.run("triton")
    with pytest.raises(ValueError, match="must be None or one of"):
        call.run("mmcv")
    for name in (
        "multi_scale_deformable_attention",
        "multi_scale_deformable_attention_from_offsets",
    ):
        chosen = ops.selected_backend(name, call.tensors["value"])
        assert chosen.backend == ("tiled" if native_core() is None else "native")
