"""The Triton launchers of pool_bag against the reference: on a GPU, else under the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.pooling import Needs
from survfuse.reference.dropout import keep_mask
from tests.ops.plain import plain_pool_bag
from tests.ops.tolerance import assert_within_budget
from tests.ops.triton_calls import CUDA, DEVICE, NAMES, Call, make_call, oracle, seed

shapes = pytest.importorskip("survfuse.triton_kernels.pool_bag_shapes")

ROUTES = ("narrow", "wide")


pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


@pytest.fixture
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One way through the launchers, cut into many slots and chunks of four."""
    name = getattr(request, "param", "narrow")

    def plan(total: int, max_length: int, n_bags: int, *, align: int, **_: object):
        rows = 2 * align
        return shapes.Slots(rows, total // rows + n_bags, 4)

    monkeypatch.setattr(shapes, "plan_slots", plan)
    if name == "wide":
        monkeypatch.setattr(shapes, "narrow_shape", lambda *args, **keywords: None)
        blocks = {"num_warps": 4, "num_stages": 1}
        scores = {"BLOCK_R": 16, "BLOCK_K": 32, "BLOCK_T": 32, **blocks}
        product = {"BLOCK_R": 16, "BLOCK_D": 32, "BLOCK_N": 16, **blocks}
        monkeypatch.setattr(shapes, "scores_shape", lambda *args, **keywords: scores)
        monkeypatch.setattr(shapes, "product_shape", lambda *args, **keywords: product)
    return name


def check(call: Call, *, frozen: bool = False) -> list[Tensor]:
    """Results and all gradients, those of a frozen bag apart, are within the precision budget."""
    results = call.forward()
    generator = torch.Generator().manual_seed(11)
    gradients = tuple(
        torch.randn(result.shape, generator=generator).to(DEVICE) for result in results
    )
    found = call.backward(results, gradients, bag=not frozen)
    got = {
        name: result
        for name, result in zip(NAMES, (*results, *found), strict=True)
        if result is not None
    }
    exact = oracle(call, torch.float64, gradients)
    plain = oracle(call, torch.float32, gradients)
    for name, torchs, truth in zip(NAMES, plain, exact, strict=False):
        if name in got:
            assert got[name].dtype == (call.bag.dtype if name == "d_bag" else torch.float32)
            assert_within_budget(name, got[name], torchs, truth, torch.float32)
    return list(got.values())


EDGES = [(0, 0), (0, 1), (1, 15), (16, 16), (32, 17), (49, 31), (80, 32), (112, 33), (145, 67)]


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize("normalize", [False, True])
def test_lengths_around_the_blocks(route: str, normalize: bool) -> None:
    check(make_call(EDGES, normalize=normalize))


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize("normalize", [False, True])
def test_gaps_overlaps_repeats_and_excluded_rows(route: str, normalize: bool) -> None:
    ranges = [(40, 20), (3, 20), (10, 25), (3, 20), (9, 0), (65, 2), (30, 1)]
    call = make_call(ranges, n_stored=71, excluded=(5, 33, 65, 66), normalize=normalize)
    pooled, lse, weight_sum, _, d_bag, d_bias = check(call)
    for empty in (4, 5):
        assert pooled[empty].eq(0).all()
        assert weight_sum[empty].eq(0).all()
        assert lse[empty].eq(-torch.inf).all()
    never = [0, 1, 2, 5, 33, 35, 39, 60, 65, 66, 67, 70]
    assert d_bag[never].eq(0).all()
    assert d_bias[never].eq(0).all()


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("mean", [0.0, 30.0, 300.0])
def test_normalised_rows_far_from_zero(route: str, given: bool, mean: float) -> None:
    call = make_call([(0, 37), (35, 20)], normalize=True, mean=mean, given=given, excluded=(3,))
    # statistics are given for frozen bags: there the reference's own gradient of the bag differs
    # from ours by the rounding of the given mean, 1e-5 of a deviation at 300
    check(call, frozen=given)


def test_trained_bag_with_given_statistics(route: str) -> None:
    check(make_call([(0, 20), (15, 20)], normalize=True, given=True, excluded=(3,)))


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_rows_without_spread(route: str) -> None:
    call = make_call([(0, 20)], normalize=True)
    call.bag[4] = 3.0
    call.bag[5] = 0.0
    check(call)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize("normalize", [False, True])
def test_dropout(route: str, normalize: bool) -> None:
    check(make_call([(0, 50), (20, 33)], dropout_p=0.3, normalize=normalize, n_rows=18))


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_dropout_mask_is_the_reference_mask(route: str) -> None:
    lengths, n_rows, p = [40, 71], 19, 0.4
    n_stored = sum(lengths)
    ragged = Ragged.from_lengths(lengths, device=DEVICE)
    # equal logits over one-hot rows: pooled shows which weights were kept
    call = Call(
        torch.zeros(2, n_rows, n_stored, device=DEVICE),
        torch.eye(n_stored, device=DEVICE),
        None,
        ragged,
        dropout_p=p,
    )
    pooled, _, weight_sum = call.forward()
    for b, (start, length) in enumerate(zip([0, 40], lengths, strict=True)):
        mask = keep_mask(seed().cpu(), b, torch.arange(n_rows), torch.arange(length), p)
        assert torch.equal(pooled[b, :, start : start + length].cpu() != 0, mask)
        expected = mask.sum(-1) / (length * (1 - p))
        torch.testing.assert_close(weight_sum[b].cpu(), expected)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize(("n_rows", "width"), [(1, 16), (17, 33), (3, 100)])
def test_query_blocks_and_odd_widths(route: str, n_rows: int, width: int) -> None:
    check(make_call([(0, 35), (35, 3)], n_rows=n_rows, width=width, normalize=True))


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_strides(route: str) -> None:
    call = make_call([(0, 33), (10, 20)], bias=False)
    contiguous = check(call)
    wide = torch.full((call.bag.shape[0], 47), torch.nan, device=DEVICE)
    wide[:, 3:43] = call.bag
    call.bag = wide[:, 3:43]
    call.rows = call.rows.transpose(0, 1).contiguous().transpose(0, 1)
    for plain, strided in zip(contiguous, check(call), strict=True):
        torch.testing.assert_close(plain, strided, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_ranges_are_clamped_to_the_stored_rows(route: str) -> None:
    call = make_call([(0, 20), (10, 10)], n_stored=20)
    expected = call.forward()
    call.ragged = call.ragged._replace(
        starts=torch.tensor([-5, 10], device=DEVICE), lengths=torch.tensor([25, 90], device=DEVICE)
    )
    for ours, theirs in zip(call.forward(), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_nan_in_a_bag_stays_in_its_bag(route: str) -> None:
    call = make_call([(0, 20), (20, 20)])
    clean = call.forward()
    call.bag[25, 3] = torch.nan
    call.bag[20:40, 0] = torch.nan
    results = call.forward()
    for ours, theirs in zip(results, clean, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1].isnan().all()


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_repeats_to_the_bit(route: str) -> None:
    call = make_call([(0, 70), (30, 20)], normalize=True, dropout_p=0.2)
    runs = []
    for _ in range(2):
        results = call.forward()
        runs.append([*results, *call.backward(results, tuple(torch.ones_like(r) for r in results))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the interpreter bf16 products: its own multiply the raw bits (triton issue 11584)."""
    if CUDA:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(self, a, b, d, *rest):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (
                TensorHandle((t.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
                for t in (a, b)
            )
        return dot(self, a, b, d, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


@pytest.mark.usefixtures("bf16_products")
@pytest.mark.parametrize("route", ROUTES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mean", [None, 0.0, 30.0])
def test_sixteen_bit_bags(route: str, dtype: torch.dtype, mean: float | None) -> None:
    ranges = [(0, 37), (30, 20)]
    call = make_call(ranges, n_rows=9, mean=mean or 0.0, normalize=mean is not None, excluded=(3,))
    call.bag = call.bag.to(dtype)
    results = call.forward()
    generator = torch.Generator().manual_seed(11)
    gradients = tuple(torch.randn(r.shape, generator=generator).to(DEVICE) for r in results)
    got = [*results, *call.backward(results, gradients)]
    exact = oracle(call, torch.float64, gradients)
    # the plain formula in the type of the bag, as the precision budget measures it; the
    # interpreter truncates to bf16, which costs another factor of 2
    slack = 2.0 if dtype == torch.bfloat16 and not CUDA else 1.0
    plain = plain_results(call, dtype, gradients)
    for name, ours, torchs, truth in zip(NAMES, got, plain, exact, strict=True):
        torchs = truth + slack * (torchs.double() - truth)
        assert_within_budget(name, ours.float(), torchs, truth, dtype)


def plain_results(call: Call, dtype: torch.dtype, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """The plain formula and its gradients with everything in one 16-bit type."""
    leaves = [t.detach().cpu().to(dtype).requires_grad_() for t in (call.rows, call.bag, call.bias)]
    results = plain_pool_bag(
        leaves[0],
        leaves[1],
        bias=leaves[2],
        ragged=call.ragged.to("cpu"),
        scale=call.scale,
        normalize_eps=1e-5 if call.normalize else None,
    )
    loss = sum((r * g.cpu().to(r.dtype)).sum() for r, g in zip(results, gradients, strict=True))
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("route", ROUTES, indirect=True)
def test_small_gradients_survive_fp16(route: str) -> None:
    call = make_call([(0, 60), (20, 25)], normalize=True)
    call.bag = call.bag.half()
    results = call.forward()
    ones = tuple(torch.linspace(-1, 1, r.numel(), device=DEVICE).view(r.shape) for r in results)
    d_rows, _, d_bias = call.backward(results, ones)
    # without a scale of their own, products of 1e-9 are 0 in fp16
    small_rows, _, small_bias = call.backward(results, tuple(1e-9 * g for g in ones))
    torch.testing.assert_close(
        small_rows * 1e9, d_rows, rtol=0, atol=2e-3 * float(d_rows.abs().max())
    )
    torch.testing.assert_close(
        small_bias * 1e9, d_bias, rtol=0, atol=2e-3 * float(d_bias.abs().max())
    )


def test_no_rows_at_all() -> None:
    call = make_call([(0, 0), (0, 0)], n_stored=4)
    results = call.forward()
    assert results[1].eq(-torch.inf).all()
    gradients = call.backward(results, tuple(torch.ones_like(r) for r in results))
    assert [g.shape for g in gradients] == [(2, 3, 40), (4, 40), (4,)]
    assert all(g.eq(0).all() for g in (results[0], results[2], *gradients))


@pytest.mark.parametrize("needed", Needs._fields)
def test_one_gradient_alone(route: str, needed: str) -> None:
    call = make_call([(0, 40), (30, 20)], normalize=True)
    results = call.forward()
    gradients = tuple(torch.ones_like(result) for result in results)
    together = call.backward(results, gradients)
    needs = dict.fromkeys(Needs._fields, False) | {needed: True}
    alone = call.backward(results, gradients, **needs)
    for (name, want), ours, theirs in zip(needs.items(), alone, together, strict=True):
        assert (ours is not None) == want, name
        if want:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("n_bags", [1, 7, 300])
@pytest.mark.parametrize("longest", [1, 255, 5000, 1_000_000])
@pytest.mark.parametrize(
    ("slot_bytes", "row_bytes"), [(65536, 0), (820_000, 420), (9_437_184, 1100)]
)
def test_slot_plans_fit_the_workspace_and_cover_the_bags(
    n_bags: int, longest: int, slot_bytes: int, row_bytes: int
) -> None:
    lengths = [max(1, longest // (1 + b)) for b in range(n_bags)]
    batch_bytes = sum(lengths) * 2048
    slots = shapes.plan_slots(
        sum(lengths),
        longest,
        n_bags,
        align=128,
        slot_bytes=slot_bytes,
        row_bytes=row_bytes,
        batch_bytes=batch_bytes,
        programs_per_slot=1 if row_bytes == 0 else 16,
        limits=shapes.Limits(132, 232448),
    )
    assert slots.rows % 128 == 0
    assert sum(-(-length // slots.rows) for length in lengths) <= slots.count
    assert 1 <= slots.chunk <= slots.count
    used = slots.chunk * (slot_bytes + slots.rows * row_bytes)
    assert used <= max(16 * 2**20, batch_bytes // 100)
