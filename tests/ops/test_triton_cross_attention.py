"""The Triton launchers of cross_attention by every route: on a GPU, else under the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from survfuse import Ragged, ops
from survfuse.attention import Attended, Attention, AttentionNeeds
from tests.ops.contract import CASES, OPS, Case, Op
from tests.ops.test_contract import check_budget, grads_and_results
from tests.ops.triton_calls import CUDA, DEVICE, seed

launchers = pytest.importorskip("survfuse.triton_kernels.cross_attention")
shapes = launchers.shapes

ATTENTION = [op for op in OPS if op.registered == "cross_attention"]
# every way through the launchers: (kernels that read keys once, a side cut into pieces)
ROUTES = {"few, cut": (True, True), "tiles": (False, False), "tiles, cut": (False, True)}
IDS = {"ids": lambda value: getattr(value, "name", str(value))}


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """Workspace and results start as NaN: what is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list:
    """One way through, with blocks of 16 and pieces of 32 rows; the list of its cuts."""
    few, cut = ROUTES[request.param]
    cuts = []

    def blocks(problem, limits, **_):
        return shapes._blocks(problem, 16 if problem.query_max <= 16 else 32, 16, 4, 1)

    def pieces(total: int, longest: int, n_bags: int, extra: int = 0):
        cuts.append(shapes.Cut(32, n_bags * (-(-longest // 32) + extra)))
        return cuts[-1]

    for name in ("forward_shape", "query_shape", "key_shape"):
        monkeypatch.setattr(shapes, name, blocks)
    if not few:
        monkeypatch.setattr(shapes, "few_shape", lambda *_, **__: None)
    else:
        monkeypatch.setattr(
            shapes, "few_shape", lambda p, *_, **__: blocks(p, None) if p.query_max <= 32 else None
        )
        monkeypatch.setattr(
            shapes, "few_forward_cut", lambda p, *_: pieces(p.key_total, p.key_max, p.n_bags)
        )
        monkeypatch.setattr(
            shapes, "few_backward_cut", lambda p, *_: pieces(p.key_total, p.key_max, p.n_bags, 1)
        )

    def keys(problem, *_):
        return pieces(problem.key_total, problem.key_max, problem.n_bags) if cut else None

    def queries(problem, *_):
        return pieces(problem.query_total, problem.query_max, problem.n_bags) if cut else None

    monkeypatch.setattr(shapes, "key_slots", keys)
    monkeypatch.setattr(shapes, "query_slots", queries)
    return cuts


every_route = pytest.mark.parametrize("route", ROUTES, indirect=True)


@every_route
@pytest.mark.parametrize("op", ATTENTION, **IDS)
@pytest.mark.parametrize("case", [CASES[5], CASES[8]], **IDS)
def test_every_route_keeps_the_budget(op: Op, case: Case, route: list) -> None:
    check_budget(op, "triton", DEVICE, case)


@every_route
@pytest.mark.parametrize("op", ATTENTION, **IDS)
def test_every_route_draws_one_mask(op: Op, route: list) -> None:
    call = op.make(CASES[5]).to(torch.float32, DEVICE)
    exact_call = call.to(torch.float64)
    module = "survfuse.ops.cross_attention.draw_seed"
    with mock.patch(module, side_effect=lambda device: seed().to(device)):
        got = grads_and_results(op, call, "triton", dropout_p=0.4)
        exact = grads_and_results(op, exact_call, "tiled", dropout_p=0.4)
    for ours, theirs in zip(got[0] + got[1], exact[0] + exact[1], strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs.cpu(), rtol=2e-5, atol=2e-5)


def launch(query, key, value, bias, query_ragged, key_ragged, needs=(True,) * 4, wide=True):
    """Results and gradients of the launchers themselves, of unit gradients."""
    attention = Attention(*query_ragged, *key_ragged, scale=0.3)
    needs = AttentionNeeds(*needs)._replace(bias=needs[3] and bias is not None)
    results = launchers.cross_attention_forward(query, key, value, bias, attention)
    out = results.out.float() if wide else results.out
    results = Attended(out, results.lse)
    ones = Attended(*(torch.ones_like(r) for r in results))
    return results, launchers.cross_attention_backward(
        ones, results, query, key, value, bias, attention, needs
    )


def few_over_long(n_queries: int = 6, n_keys: int = 700, heads: int = 1, dim: int = 16):
    """One bag of few queries over many keys, more than a slot holds."""
    g = torch.Generator().manual_seed(3)
    shape = (n_keys, heads, dim)
    query, key, value = (
        torch.randn(s, generator=g).to(DEVICE) for s in ((n_queries, heads, dim), shape, shape)
    )
    bias = torch.randn(n_keys, generator=g).to(DEVICE)
    whole = (Ragged.from_lengths([n], device=DEVICE) for n in (n_queries, n_keys))
    return query, key, value, bias, *whole


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "heads"), [(6, 600, 1), (6, 600, 3), (60, 600, 2), (600, 40, 1)]
)
def test_launches_are_few_and_long_sides_are_cut(n_queries, n_keys, heads, monkeypatch) -> None:
    names = [name for name in dir(launchers) if name.endswith("_kernel")]
    seen = []
    for name in names:

        class Counted:
            def __init__(self, kernel, name=name) -> None:
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                seen.append((self.name, grid[0]))
                return self.kernel[grid]

        monkeypatch.setattr(launchers, name, Counted(getattr(launchers, name)))
    launch(*few_over_long(n_queries, n_keys, heads))
    forward = 1 + next(i for i, (name, _) in enumerate(seen) if "bwd" in name)
    assert forward - 1 <= 3
    assert len(seen) - forward + 1 <= 3
    kernels = dict(seen)
    if n_queries == 6:
        # three slots of 256 keys
        assert kernels["cross_attention_few_fwd_kernel"] >= 3 * heads
        assert kernels["cross_attention_few_bwd_kernel"] == 3 * heads
    elif n_keys == 600:
        assert "cross_attention_merge_kernel" in kernels
        assert kernels["cross_attention_bwd_query_kernel"] >= 3 * heads
    else:
        assert kernels["cross_attention_bwd_key_kernel"] >= 3 * heads
    # what was cut is put together
    assert "cross_attention_sum_kernel" in kernels


@pytest.mark.parametrize("needed", AttentionNeeds._fields)
@every_route
def test_one_gradient_alone(needed: str, route: list) -> None:
    call = few_over_long(5, 90, 2)
    _, together = launch(*call)
    needs = [name == needed for name in AttentionNeeds._fields]
    _, alone = launch(*call, needs=needs)
    for want, ours, theirs in zip(needs, alone, together, strict=True):
        assert (ours is not None) == want
        if want:
            assert torch.equal(ours, theirs)


@every_route
def test_repeats_to_the_bit_and_clamps_ranges(route: list) -> None:
    query, key, value, bias, query_ragged, key_ragged = few_over_long(5, 90, 2)
    first, second = (launch(query, key, value, bias, query_ragged, key_ragged) for _ in range(2))
    far = key_ragged._replace(
        starts=key_ragged.starts - 3, lengths=torch.full_like(key_ragged.lengths, 1000)
    )
    clamped = launch(query, key, value, bias, query_ragged, far)
    for a, b, c in zip(*(r + g for r, g in (first, second, clamped)), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@every_route
@pytest.mark.parametrize("kind", [torch.float16])
def test_small_gradients_survive_fp16(kind: torch.dtype, route: list) -> None:
    query, key, value, bias, query_ragged, key_ragged = few_over_long(5, 90, 2)
    attention = Attention(*query_ragged, *key_ragged, scale=0.3)
    call = (query, key.to(kind), value.to(kind), bias, attention)
    results = launchers.cross_attention_forward(*call)
    needs = AttentionNeeds(query=True, key=False, value=False, bias=True)
    g = torch.Generator().manual_seed(5)
    d_out = torch.randn(results.out.shape, generator=g).to(DEVICE)
    found = []
    for size in (1.0, 1e-9):
        gradients = Attended(d_out * size, torch.zeros_like(results.lse))
        d_query, _, _, d_bias = launchers.cross_attention_backward(gradients, results, *call, needs)
        found.append([d_query / size, d_bias / size])
    # without a scale of their own, products of 1e-9 are 0 in fp16
    for large, small in zip(*found, strict=True):
        torch.testing.assert_close(small, large, rtol=0, atol=2e-3 * float(large.abs().max()))


def test_a_host_that_asks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from a tensor by the launchers, so the host never waits for the device."""

    def asked(self, *_, **__):
        raise AssertionError("the host reads a tensor")

    call = few_over_long()
    kernels = [name for name in dir(launchers) if name.endswith("_kernel")]
    for name in kernels:
        monkeypatch.setattr(launchers, name, mock.MagicMock())
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, asked)
    launch(*call)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="graphs of a device")
@pytest.mark.parametrize(("n_queries", "n_keys"), [(6, 5000), (300, 5000), (5000, 40)])
def test_captures_as_a_graph(n_queries: int, n_keys: int) -> None:
    call = few_over_long(n_queries, n_keys, 2, 32)
    results, gradients = launch(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch(*call)
    graph.replay()
    for a, b in zip(results + gradients, captured[0] + captured[1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="a device's warnings")
def test_a_device_is_never_waited_for() -> None:
    call = few_over_long(6, 5000, 2, 32)
    launch(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_heads_wider_than_the_kernels_hold() -> None:
    query, key, value, *_ = few_over_long(dim=272)
    with pytest.raises(RuntimeError, match="heads have 272 channels"):
        ops.cross_attention(query, key, value, backend="triton")


def test_workspace_stays_in_its_budget() -> None:
    limits = shapes.Limits(132, 232448)
    for n_bags in (1, 7, 3000):
        for longest in (1, 5000, 10**6):
            problem = shapes.Problem(
                torch.bfloat16,
                n_bags,
                *(6 * n_bags, 6, longest * n_bags, longest, 6 * n_bags, longest * n_bags),
                *(4, 64, 64),
                aligned=True,
                dropout=False,
                bias=False,
                wide_query=False,
            )
            shape = shapes.few_shape(problem, limits, backward=True)
            for cut, width in (
                (shapes.few_forward_cut(problem, limits, shape), 66),
                (shapes.few_backward_cut(problem, limits, shape), 64),
            ):
                if cut is not None:
                    assert cut.rows % shape["BLOCK_N"] == 0
                    assert cut.count * 6 * 4 * width * 4 <= problem.budget
