"""Attention biased by position: precision, gradients, tables, and what every op promises."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from survfuse import ops
from survfuse.native.core import CPU_ISAS
from tests.ops.position_biased import (
    BIG,
    CASES,
    EACH_TARGET,
    EXACT_CASES,
    TABLE,
    TABLE_CASES,
    TORCH_TARGETS,
    Call,
    Case,
    differentiate,
    make,
    names,
    plain,
    use_isa,
)
from tests.ops.test_contract import dtypes
from tests.ops.tolerance import (
    Compared,
    assert_draws_within_budget,
    assert_within_budget,
    nearby,
)

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=str)
BOTH_BIASES = pytest.mark.parametrize("case", [EXACT_CASES[2], TABLE_CASES[1]], ids=str)
MODULE = importlib.import_module("survfuse.ops.position_biased_attention")


pytestmark = pytest.mark.usefixtures("one_thread", "nan_in_fresh_memory")


def check_budget(case: Case, backend: str, device: str) -> None:
    made = make(case)
    for dtype in dtypes(backend, device):

        def draw(k: int, dtype=dtype) -> Iterator[Compared]:
            call = Call(nearby(made.tensors, k), made.options).to(dtype, device)
            # the exact result of the very numbers this type holds
            exact_call, plain_call = call.to(torch.float64, "cpu"), call.to(dtype, "cpu")
            exact = differentiate(exact_call, exact_call.run("reference"))
            yardstick = differentiate(plain_call, plain(plain_call))
            got = differentiate(call, call.run(backend))
            labels = [f"{name} in {dtype}" for name in names(call)]
            return zip(labels, got, yardstick, exact, strict=True)

        assert_draws_within_budget(draw, dtype)


@EACH_CASE
@EACH_TARGET
def test_results_and_gradients_within_budget(backend: str, device: str, case: Case) -> None:
    check_budget(case, backend, device)


@pytest.mark.parametrize("case", EXACT_CASES, ids=str)
def test_reference_is_the_formula_as_anybody_writes_it(case: Case) -> None:
    call = make(case).to(torch.float64)
    expected = differentiate(call, plain(call))
    got = differentiate(call, call.run("reference"))
    for name, g, e in zip(names(call), got, expected, strict=True):
        assert_within_budget(name, g, e, torch.where(g == -torch.inf, g, e), torch.float64)


@pytest.mark.parametrize("isa", CPU_ISAS[1:])
@pytest.mark.parametrize(
    "case", [*EXACT_CASES[1:4], EXACT_CASES[-1], *TABLE_CASES[:2], TABLE_CASES[-1], BIG], ids=str
)
def test_native_on_every_instruction_set(case: Case, isa: str, monkeypatch) -> None:
    use_isa(monkeypatch, isa)
    check_budget(case, "native", "cpu")


@BOTH_BIASES
@EACH_TARGET
def test_dropout_draws_the_same_mask_everywhere(backend: str, device: str, case: Case) -> None:
    if device == "cuda":
        pytest.skip("the device's generator draws another seed than the CPU's")
    dtype = dtypes(backend, device)[0]
    made = make(case)
    calls = [(made.to(torch.float64), "reference"), (made.to(dtype), "reference")]
    calls.append((made.to(dtype), backend))
    outs = []
    for call, name in calls:
        torch.manual_seed(11)
        outs.append(differentiate(call, call.run(name, dropout_p=0.4)))
    for name, exact, yardstick, got in zip(names(calls[0][0]), *outs, strict=True):
        assert_within_budget(f"{name} with dropout", got, yardstick, exact, dtype)
    assert not torch.equal(outs[2][0], calls[2][0].run(backend)[0])


@BOTH_BIASES
@EACH_TARGET
def test_twenty_runs_are_bitwise_equal(backend: str, device: str, case: Case) -> None:
    call = make(case).to(dtypes(backend, device)[-1], device)
    n_runs = 3 if backend == "triton" and device == "cpu" else 20
    first, *others = (differentiate(call, call.run(backend)) for _ in range(n_runs))
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("options", [{}, TABLE], ids=["exact", "table"])
def test_threads_change_no_bit(options: dict, threads: int) -> None:
    call = make(replace(BIG, options=options)).to(torch.float32)
    expected = differentiate(call, call.run(None))
    torch.set_num_threads(threads)
    got = differentiate(call, call.run(None))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@pytest.mark.parametrize("options", [{}, TABLE | {"table_range": 20.0}], ids=["exact", "table"])
@pytest.mark.parametrize("widths", [(16,), (3, 5), (4, 2, 3)], ids=str)
@TORCH_TARGETS
def test_gradcheck_in_fp64(backend: str, widths: tuple[int, ...], options: dict) -> None:
    case = Case("gradcheck", 2, 2, 3, 2, 1, 2, 2, widths, ((0, 2), (1, 2)), 3, options)
    call = make(case).to(torch.float64)

    def function(*values):
        return Call(dict(zip(call.tensors, values, strict=True)), call.options).run(backend)

    assert torch.autograd.gradcheck(function, tuple(call.tensors.values()), atol=1e-6, rtol=1e-4)


@TORCH_TARGETS
def test_a_single_key_moves_no_query(backend: str) -> None:
    """Its weight is 1 whatever its logit: the gradient is 0, not what rounding leaves of it."""
    for options in ({}, TABLE):
        for dtype in (torch.float32, torch.bfloat16):
            call = make(Case("single", n_queries=40, n_keys=1, options=options)).to(dtype)
            out = call.run(backend)[0]
            (d_query,) = torch.autograd.grad(out.double().square().sum(), [call.tensors["query"]])
            assert bool((d_query == 0).all())


@pytest.mark.parametrize("options", [{}, TABLE], ids=["exact", "table"])
@TORCH_TARGETS
def test_an_mlp_in_16_bits_is_computed_in_32(backend: str, options: dict) -> None:
    made = make(replace(EXACT_CASES[1], options=options)).to(torch.bfloat16)
    places = [name for name in made.tensors if name[0] in "wb"]
    narrow = {n: made.tensors[n].detach().bfloat16().requires_grad_() for n in places}
    wide = {n: t.detach().float().requires_grad_() for n, t in narrow.items()}
    outs = []
    for layers in (narrow, wide):
        call = Call(made.tensors | layers, made.options)
        outs.append(differentiate(call, call.run(backend)))
    for name, a, b in zip(names(made), *outs, strict=True):
        assert torch.equal(a, b.to(a.dtype)), name


@TORCH_TARGETS
def test_strided_inputs(backend: str) -> None:
    call = make(EXACT_CASES[1]).to(torch.float32)
    expected = differentiate(call, call.run(backend))
    for view in (_padded, _turned):
        viewed = Call({n: view(t.detach()) for n, t in call.tensors.items()}, call.options)
        got = differentiate(viewed, viewed.run(backend))
        for name, a, b in zip(names(call), expected, got, strict=True):
            assert_within_budget(name, b, a, a.double(), torch.float32)


def _padded(tensor: Tensor) -> Tensor:
    wider = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 9), torch.nan)
    wider[..., :-9] = tensor
    return wider[..., :-9].requires_grad_()


def _turned(tensor: Tensor) -> Tensor:
    if tensor.dim() == 1:
        return tensor.repeat_interleave(2)[::2].requires_grad_()
    return tensor.mT.contiguous().mT.requires_grad_()


@TORCH_TARGETS
def test_queries_may_be_one_packed_bag(backend: str) -> None:
    call = make(Case("dense", n_bags=1)).to(torch.float64)
    packed = {n: t.detach()[0] for n, t in call.tensors.items() if n in ("query", "query_pos")}
    expected = call.run(backend)
    got = Call(call.tensors | packed, {}).run(backend)
    assert all(torch.equal(a[0], b) for a, b in zip(expected, got, strict=True))


@BOTH_BIASES
@EACH_TARGET
def test_opcheck(backend: str, device: str, case: Case) -> None:
    from unittest import mock

    call = make(replace(case, n_queries=3, n_keys=4)).to(torch.float32, device)
    call = Call({n: _padded(t.detach()) for n, t in call.tensors.items()}, call.options)
    with mock.patch.object(MODULE, "_forward", side_effect=MODULE._forward) as spy:
        call.run(backend)
    (recorded,) = spy.call_args_list
    arguments = tuple(
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in recorded.args
    )
    torch.library.opcheck(MODULE._forward, arguments)


@pytest.mark.parametrize("options", [{}, TABLE], ids=["exact", "table"])
@EACH_TARGET
def test_compiles_as_one_graph_for_every_length(backend: str, device: str, options: dict) -> None:
    if (backend, device) == ("triton", "cpu"):
        pytest.skip("the interpreter runs no compiled graph")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda call: call.run(backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for n, n_keys in ((4, 9), (6, 5), (9, 7)):
        case = Case("n", ranges=((0, n), (2, n - 3)), n_stored=n + 1, n_keys=n_keys)
        call = make(replace(case, options=options)).to(torch.float32, device)
        expected = differentiate(call, call.run(backend))
        got = differentiate(call, compiled(call))
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(b, a, equal_nan=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@EACH_TARGET
def test_checkpoint_recomputes_the_same_mask(backend: str, device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    call = make(EXACT_CASES[0]).to(torch.float32, device)
    outs = []
    for wrap in (False, True):
        torch.manual_seed(5)

        def function(*values):
            tensors = dict(zip(call.tensors, values, strict=True))
            return Call(tensors, call.options).run(backend, dropout_p=0.5)

        values = tuple(call.tensors.values())
        results = checkpoint(function, *values, use_reentrant=False) if wrap else function(*values)
        outs.append(differentiate(call, results))
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@BOTH_BIASES
@EACH_TARGET
def test_autocast_changes_no_bit(backend: str, device: str, case: Case) -> None:
    call = make(case).to(torch.float32, device)
    expected = differentiate(call, call.run(backend))
    with torch.autocast(device, dtype=torch.bfloat16):
        results = call.run(backend)
    for a, b in zip(expected, differentiate(call, results), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_double_backward_raises_with_a_hint_and_works_on_reference() -> None:
    call = make(EXACT_CASES[0]).to(torch.float64)

    def gradient(backend: str) -> Tensor:
        out = call.run(backend)[0]
        first = torch.autograd.grad((out**2).sum(), call.tensors["query"], create_graph=True)[0]
        return first.square().sum()

    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient("tiled").backward()
    twice = torch.autograd.grad(gradient("reference"), call.tensors["key_pos"])[0]
    assert bool(twice.abs().sum() > 0)


@EACH_TARGET
def test_gradients_nobody_wants_are_not_computed(backend: str, device: str) -> None:
    """Each alone is what it is beside the others."""
    for case in (EXACT_CASES[2], TABLE_CASES[1]):
        call = make(case).to(dtypes(backend, device)[0], device)
        every = dict(zip(call.tensors, differentiate(call, call.run(backend))[2:], strict=True))
        for group in (["query"], ["key"], ["value"], ["query_pos"], ["key_pos"], ["w0", "b1"]):
            tensors = {n: t.detach().requires_grad_(n in group) for n, t in call.tensors.items()}
            results = Call(tensors, call.options).run(backend)
            alone = Call({n: tensors[n] for n in group}, {})
            for name, gradient in zip(group, differentiate(alone, results)[2:], strict=True):
                assert torch.equal(gradient, every[name])


@TORCH_TARGETS
def test_merging_two_halves_of_the_keys_is_the_whole(backend: str) -> None:
    call = make(EXACT_CASES[1]).to(torch.float64)
    query, key, value, at, key_at, mlp = call.split()
    parts = [
        ops.position_biased_attention_with_lse(
            query, key[:, s], value[:, s], at, key_at[:, :, s], mlp, backend=backend
        )
        for s in (slice(0, 20), slice(20, None))
    ]
    merged = ops.merge_attention(*zip(*parts, strict=True))
    whole = call.run(backend)
    for a, b in zip(differentiate(call, merged), differentiate(call, whole), strict=True):
        assert_within_budget("merged", a, b, b, torch.float64)


def test_packed_in_lockstep_is_packed_bag_by_bag(monkeypatch) -> None:
    """The walk of the tiles on devices, run on the CPU."""
    from survfuse.tiled import tiles

    for case in (EXACT_CASES[10], TABLE_CASES[-1], EXACT_CASES[2]):
        call = make(case).to(torch.float64)
        expected = differentiate(call, call.run("tiled"))
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "_known_to_host", lambda starts: False)
            got = differentiate(call, call.run("tiled"))
        for name, g, e in zip(names(call), got, expected, strict=True):
            assert_within_budget(name, g, e, e, torch.float64)


def test_flops_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    n_pairs, hd = 2 * 5 * 7, 2 * 8
    mlp = 2 * n_pairs * 2 * (2 * 16 + 16)
    for options, bias in (({}, mlp), (TABLE, 8 * n_pairs * 2)):
        call = make(replace(EXACT_CASES[0], options=options)).to(torch.float64)
        with FlopCounterMode(display=False) as counter:
            results = call.run("tiled")
            differentiate(call, results)
        counts = counter.get_flop_counts()["Global"]
        ours = torch.ops.survfuse
        assert counts[ours.position_biased_attention] == 4 * n_pairs * hd + bias
        assert counts[ours.position_biased_attention_backward] == 10 * n_pairs * hd + 3 * bias
