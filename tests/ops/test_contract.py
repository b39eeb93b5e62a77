"""The contract every op keeps on every backend: docs/design.md, section 4."""

from __future__ import annotations

import functools
import importlib
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch._dynamo.utils
from torch import Tensor

from survfuse.native.core import CPU_ISAS, native_core
from survfuse.ops.backends import backend_obstacle
from tests.ops.contract import CASES, FAR_CASE, OPS, TARGETS, WIDE_CASES, Call, Case, Op
from tests.ops.tolerance import (
    Compared,
    assert_draws_within_budget,
    assert_within_budget,
    nearby,
)

IDS = {"ids": lambda value: getattr(value, "name", str(value))}


def targets(op: Op) -> list[tuple[str, str]]:
    return [target for target in TARGETS if target[0] in op.backends]


def marked(op: Op, backend: str, device: str, *rest) -> object:
    marks = [pytest.mark.gpu] if device == "cuda" else []
    name = "-".join([op.name, backend, device, *(getattr(r, "name", str(r)) for r in rest)])
    return pytest.param(op, backend, device, *rest, id=name, marks=marks)


def product_of(cases, *, only=lambda op, backend: True) -> list:
    return [
        marked(op, backend, device, case)
        for op in OPS
        # the backends of a case one after the other: they share what `judges` found
        for case in cases
        for backend, device in targets(op)
        if only(op, backend)
    ]


def dtypes(backend: str, device: str) -> list[torch.dtype]:
    if backend == "triton" and device == "cpu":
        return [torch.float32]
    if device == "cuda":
        return [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def grads_and_results(op: Op, call: Call, backend: str | None, weights=None, **options):
    """Results, and the gradients of one fixed weighted sum of them, in fp64 on the CPU."""
    results = op.function(call, backend, **options)
    return _differentiate(call, results)


def _differentiate(call: Call, results: tuple[Tensor, ...]):
    total = 0.0
    for index, result in enumerate(results):
        g = torch.Generator().manual_seed(zlib.crc32(str(index).encode()))
        weight = torch.randn(result.shape, generator=g, dtype=torch.float64).to(result.device)
        finite = torch.where(result == -torch.inf, 0.0, result.double())
        total = total + (weight * finite).sum()
    inputs = [t for t in call.tensors.values() if t.requires_grad]
    gradients = torch.autograd.grad(total, inputs)
    return [r.detach() for r in results], list(gradients)


pytestmark = pytest.mark.usefixtures("one_thread", "nan_in_fresh_memory")


@pytest.mark.parametrize(("op", "backend", "device", "case"), product_of(CASES))
def test_results_and_gradients_within_budget(op: Op, backend: str, device: str, case: Case) -> None:
    check_budget(op, backend, device, case)


@pytest.mark.parametrize(
    ("op", "backend", "device", "case"),
    product_of(
        WIDE_CASES, only=lambda op, backend: backend != "triton" or torch.cuda.is_available()
    ),
)
def test_wide_results_and_gradients_within_budget(op, backend, device, case) -> None:
    check_budget(op, backend, device, case)


@pytest.mark.parametrize("backend", ["tiled", "native", "triton"])
def test_gradients_of_rows_are_balanced(backend: str) -> None:
    """d_logits of a row sum to d_lse: what rounding leaves of that would stand times the mean."""
    check_budget(OPS[0], backend, "cpu", FAR_CASE)


@functools.lru_cache(maxsize=48)
def judges(
    op: Op, case: Case, dtype: torch.dtype, wide: bool, k: int
) -> tuple[Call, list[Tensor], list[Tensor]]:
    """The k-th call like this case's, what plain torch makes of it, and the exact result.

    No backend and no instruction set has a part in it, so one computation serves all of them.
    """
    made = op.make(case)
    call = made.with_tensors(nearby(made.tensors, k)).to(dtype, wide=wide)
    # the exact result of the very numbers this type holds
    exact = itertools.chain(*grads_and_results(op, call.to(torch.float64), "reference"))
    plain_call = call.to(dtype)
    plain = itertools.chain(*_differentiate(plain_call, op.plain(plain_call)))
    return call, list(plain), list(exact)


def check_budget(op: Op, backend: str, device: str, case: Case) -> None:
    for dtype, wide in itertools.product(dtypes(backend, device), (False, True)):
        if wide and torch.finfo(dtype).bits >= 32:
            continue

        def draw(k: int, dtype=dtype, wide: bool = wide) -> Iterator[Compared]:
            call, plain, exact = judges(op, case, dtype, wide, k)
            call = call.to(dtype, device, wide=wide)
            got = list(itertools.chain(*grads_and_results(op, call, backend)))
            names = [f"result {i}" for i in range(len(got) - len(call.tensors))]
            names += [f"gradient of {name}" for name in call.tensors]
            labels = [f"{name} in {dtype}" for name in names]
            return zip(labels, got, plain, exact, strict=True)

        assert_draws_within_budget(draw, dtype)


NATIVE_OPS = [op for op in OPS if "native" in op.backends and "attend" not in op.name]


@pytest.mark.parametrize("isa", CPU_ISAS[1:])
@pytest.mark.parametrize("case", [CASES[5], CASES[10], *WIDE_CASES[1:]], **IDS)
@pytest.mark.parametrize("op", NATIVE_OPS, **IDS)
def test_native_on_every_instruction_set(op: Op, case: Case, isa: str, monkeypatch) -> None:
    if native_core() is None or not native_core().cpu_isa_available(CPU_ISAS.index(isa)):
        pytest.skip(f"this processor has no {isa}")
    module = importlib.import_module(f"survfuse.native.{op.registered}")
    for name in (f"{op.registered}_forward", f"{op.registered}_backward"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, **k: f(*a, **k, isa=isa))
    check_budget(op, "native", "cpu", case)


@pytest.mark.parametrize(
    ("op", "backend", "device", "case"),
    product_of(CASES[:6], only=lambda op, backend: op.has_dropout),
)
def test_dropout_draws_the_same_mask_everywhere(op, backend, device, case) -> None:
    if device == "cuda":
        pytest.skip("the device's generator draws another seed than the CPU's")
    dtype = dtypes(backend, device)[0]

    made = op.make(case)

    def draw(k: int) -> Iterator[Compared]:
        near, outs = made.with_tensors(nearby(made.tensors, k)), []
        for name, kind in ((backend, dtype), ("reference", dtype), ("reference", torch.float64)):
            torch.manual_seed(11)
            call = near.to(kind)
            outs.append(itertools.chain(*grads_and_results(op, call, name, dropout_p=0.4)))
        each = enumerate(zip(*outs, strict=True))
        return ((f"{i} with dropout", *compared) for i, compared in each)

    assert_draws_within_budget(draw, dtype)
    call = made.to(dtype)
    torch.manual_seed(11)
    dropped, kept = op.function(call, backend, dropout_p=0.4)[0], op.function(call, backend)[0]
    assert not torch.equal(torch.nan_to_num(dropped), torch.nan_to_num(kept))


@pytest.mark.parametrize(
    ("op", "backend", "device", "case"),
    # the interpreter runs one program after the other: nothing there could come in another order
    product_of(
        [CASES[5], CASES[11]],
        only=lambda op, backend: backend != "triton" or torch.cuda.is_available(),
    ),
)
def test_same_call_twice_is_bitwise_equal(op, backend, device, case) -> None:
    call = op.make(case).to(dtypes(backend, device)[-1], device)
    first, second = (grads_and_results(op, call, backend) for _ in range(2))
    for a, b in zip(itertools.chain(*first), itertools.chain(*second), strict=True):
        assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("op", NATIVE_OPS, **IDS)
def test_threads_change_no_bit(op: Op, threads: int) -> None:
    # long enough to be cut into several chunks
    case = replace(WIDE_CASES[0], ranges=((0, 2700), (1400, 1500)), n_stored=3000, dim=40)
    call = op.make(case).to(torch.float32)
    before = torch.get_num_threads()
    expected = grads_and_results(op, call, "native")
    torch.set_num_threads(threads)
    try:
        got = grads_and_results(op, call, "native")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(itertools.chain(*expected), itertools.chain(*got), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("op", "backend", "device", "case"),
    product_of([CASES[0], CASES[5]], only=lambda op, backend: backend != "triton"),
)
def test_gradcheck_in_fp64(op, backend, device, case) -> None:
    if device == "cuda":
        pytest.skip("fp64 is checked on the CPU")
    small = Case(
        "small",
        ranges=((0, 3), (1, 3)) if case is CASES[5] else ((0, 4),),
        n_stored=5,
        dim=4,
        queries=2,
        heads=1,
        norm=case.norm,
    )
    call = op.make(small).to(torch.float64)
    tensors = {n: torch.nan_to_num(t.detach()).requires_grad_() for n, t in call.tensors.items()}

    def function(*values):
        return op.function(call.with_tensors(dict(zip(tensors, values, strict=True))), backend)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()), atol=1e-6, rtol=1e-4)


def _padded(stored: Tensor) -> Tensor:
    """The same values in rows that are longer, the rest of them NaN."""
    wider = stored.new_full((*stored.shape[:-1], stored.shape[-1] + 9), torch.nan)
    wider[..., :-9] = stored
    return wider[..., :-9].requires_grad_()


def _turned(stored: Tensor) -> Tensor:
    """The same values with the last stride other than 1."""
    return stored.mT.contiguous().mT.requires_grad_()


@pytest.mark.parametrize(("op", "backend", "device", "case"), product_of([CASES[2]]))
def test_strided_bags_are_read_in_place(op, backend, device, case) -> None:
    dtype = dtypes(backend, device)[-1]
    call = op.make(case).to(dtype, device)
    expected = grads_and_results(op, call, backend)
    for make_view in (_padded, _turned):
        views = {name: make_view(call.tensors[name].detach()) for name in call.stored}
        got = grads_and_results(op, call.with_tensors(views), backend)
        for a, b in zip(itertools.chain(*expected), itertools.chain(*got), strict=True):
            assert_within_budget("strided", b, a, a.double(), dtype)


@pytest.mark.parametrize(
    ("op", "backend", "device"),
    [marked(op, *target) for op in OPS for target in targets(op)],
)
def test_dense_bags_are_ragged_bags_of_one_length(op, backend, device) -> None:
    case = Case("dense", ranges=((0, 7), (7, 7)), n_stored=14, norm=True)
    call = op.make(case).to(torch.float32, device)
    expected = grads_and_results(op, call, backend)
    got = grads_and_results(op, call.dense(2), backend)
    for a, b in zip(itertools.chain(*expected), itertools.chain(*got), strict=True):
        assert torch.equal(a.flatten(), b.flatten())


@pytest.mark.parametrize(
    ("op", "backend", "device"),
    [marked(op, *t) for op in OPS for t in targets(op) if "formed" not in op.name],
)
def test_opcheck(op, backend, device) -> None:
    """Schema, autograd registration, fake tensors and AOT dispatch of the registered op."""
    from unittest import mock

    case = Case("small", ranges=((0, 5), (3, 4), (2, 0)), n_stored=8, dim=8, norm=True)
    call = op.make(case).to(torch.float32, device)
    views = {name: _padded(torch.nan_to_num(call.tensors[name].detach())) for name in call.stored}
    call = call.with_tensors(views)
    module = importlib.import_module(f"survfuse.ops.{op.registered}")
    seen = []
    with mock.patch.object(module, "_forward", side_effect=module._forward) as spy:
        op.function(call, backend)
        seen = [recorded.args for recorded in spy.call_args_list]
    assert len(seen) == 1
    arguments = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
                      for a in seen[0])  # fmt: skip
    torch.library.opcheck(module._forward, arguments)


@pytest.mark.parametrize(
    ("op", "backend", "device"),
    # the compiler sees one opaque op, behind which the backend is chosen
    [marked(op, *t) for op in OPS for t in targets(op) if t[0] == "tiled" or t[1] == "cuda"],
)
# otherwise defaults such as dropout_p are symbols until all has been compiled, and then it is
# compiled once more with the numbers they are: test_compile_module does that to every op
@torch._dynamo.config.patch(specialize_float=True)
def test_compiles_as_one_graph_for_every_length(op, backend, device) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def function(call: Call):
        return op.function(call, backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (40, 65, 90):
        case = Case("n", ranges=((0, n), (5, n - 9)), n_stored=n + 1, norm=True)
        call = op.make(case).to(torch.float32, device)
        expected = grads_and_results(op, call, backend)
        got = _differentiate(call, compiled(call))
        for a, b in zip(itertools.chain(*expected), itertools.chain(*got), strict=True):
            torch.testing.assert_close(b, a)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("op", "backend", "device"),
    [marked(op, *target) for op in OPS for target in targets(op) if op.has_dropout],
)
def test_checkpoint_recomputes_the_same_mask(op, backend, device) -> None:
    from torch.utils.checkpoint import checkpoint

    call = op.make(CASES[0]).to(torch.float32, device)
    outs = []
    for wrap in (False, True):
        torch.manual_seed(5)

        def function(*values):
            c = call.with_tensors(dict(zip(call.tensors, values, strict=True)))
            return op.function(c, backend, dropout_p=0.5)

        values = tuple(call.tensors.values())
        results = checkpoint(function, *values, use_reentrant=False) if wrap else function(*values)
        outs.append(_differentiate(call, results))
    for a, b in zip(itertools.chain(*outs[0]), itertools.chain(*outs[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", [op for op in OPS if "formed" not in op.name], **IDS)
def test_double_backward_raises_with_a_hint_and_works_on_reference(op: Op) -> None:
    call = op.make(Case("small", ranges=((0, 4),), n_stored=4, dim=4)).to(torch.float64)
    first = next(iter(call.tensors.values()))

    def gradient(backend):
        out = op.function(call, backend)[0]
        return torch.autograd.grad((out**2).sum(), first, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match='backend="reference"'):
        gradient("tiled").backward()
    assert bool(torch.autograd.grad(gradient("reference"), first)[0].abs().sum() > 0)


@pytest.mark.parametrize(
    ("op", "backend", "device"),
    [marked(op, *target) for op in OPS for target in [("reference", "cpu"), *targets(op)]],
)
def test_autocast_changes_no_bit(op, backend, device) -> None:
    call = op.make(CASES[2]).to(torch.float32, device)
    expected = grads_and_results(op, call, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = op.function(call, backend)
    got = _differentiate(call, results)
    for a, b in zip(itertools.chain(*expected), itertools.chain(*got), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_default_backend_serves_every_type(op: Op) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        call = op.make(CASES[0]).to(dtype)
        result = op.function(call, None)[0]
        assert bool(result.isfinite().all())


def test_a_backend_that_cannot_serve_says_why() -> None:
    call = OPS[0].make(CASES[0]).to(torch.float64)
    with pytest.raises(RuntimeError, match="fp64"):
        OPS[0].function(call, "triton")
    with pytest.raises(ValueError, match="must be None or one of"):
        OPS[0].function(call, "cudnn")
    assert "fp64" in backend_obstacle("triton", device=torch.device("cpu"), dtype=torch.float64)


def test_tiles_in_lockstep_match_tiles_bag_by_bag(monkeypatch) -> None:
    """Devices walk all bags at once, since reading the ranges would make the host wait."""
    import survfuse.tiled.tiles as module

    monkeypatch.setattr(module, "_MAX_ROWS", 16)
    monkeypatch.setattr(module, "_MIN_ROWS", 16)
    tiled = [op for op in OPS if "attend" not in op.name]
    for op, case, dropout in itertools.product(tiled, (CASES[5], CASES[-1]), (0.0, 0.3)):
        call = op.make(case).to(torch.float64)
        options = {"dropout_p": dropout} if op.has_dropout and dropout else {}
        outs = []
        for known in (True, False):
            monkeypatch.setattr(module, "_known_to_host", lambda starts, k=known: k)
            torch.manual_seed(3)
            outs.append(grads_and_results(op, call, "tiled", **options))
        for a, b in zip(itertools.chain(*outs[0]), itertools.chain(*outs[1]), strict=True):
            assert_within_budget("lockstep", b, a, a, torch.float64)
