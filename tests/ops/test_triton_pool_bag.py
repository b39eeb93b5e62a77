"""The Triton launchers of pool_bag against the reference: on a GPU, else under the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from survfuse import Ragged
from survfuse.reference import pool_bag as reference
from survfuse.reference.dropout import keep_mask
from tests.ops.tolerance import assert_within_budget

launchers = pytest.importorskip("survfuse.triton_kernels.pool_bag")
shapes = pytest.importorskip("survfuse.triton_kernels.pool_bag_shapes")

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SEED = 0x1234_5678_9ABC_DEF0
ROUTES = ("narrow", "wide")
NAMES = ("pooled", "lse", "weight_sum", "d_rows", "d_bag", "d_bias")


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory() -> Iterator[None]:
    """Workspace and results start as NaN: what is read before it is written shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)


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


@dataclass
class Call:
    """Arguments of the launchers."""

    rows: Tensor
    bag: Tensor
    bias: Tensor | None
    ragged: Ragged
    normalize: bool = False
    stats: tuple[Tensor, Tensor] | None = None
    dropout_p: float = 0.0
    scale: float = 0.3

    @property
    def positional(self) -> tuple:
        ragged = self.ragged
        return (
            *(self.rows, self.bag, self.bias),
            *(ragged.starts, ragged.lengths, ragged.total, ragged.max_length),
        )

    @property
    def options(self) -> dict:
        mean, rstd = self.stats if self.stats is not None else (None, None)
        return {
            "scale": self.scale,
            "normalize": self.normalize,
            "eps": 1e-5,
            "mean": mean,
            "rstd": rstd,
            "dropout_p": self.dropout_p,
            "seed": seed() if self.dropout_p else None,
        }

    def forward(self) -> tuple[Tensor, ...]:
        return launchers.pool_bag_forward(*self.positional, **self.options)

    def backward(self, results: tuple[Tensor, ...], gradients: tuple[Tensor, ...], **needs: bool):
        names = ("pooled", "lse", "weight_sum")
        saved = dict(zip(names, results, strict=True))
        needed = {"needs_rows": True, "needs_bag": True, "needs_bias": self.bias is not None}
        return launchers.pool_bag_backward(
            *gradients, *self.positional, **self.options, **saved, **{**needed, **needs}
        )


def seed() -> Tensor:
    return torch.tensor([SEED], device=DEVICE)


def make_call(
    ranges: list[tuple[int, int]],
    *,
    n_rows: int = 3,
    width: int = 40,
    n_stored: int | None = None,
    excluded: tuple[int, ...] = (),
    bias: bool = True,
    mean: float = 0.0,
    spread: float = 1.0,
    given: bool = False,
    **options,
) -> Call:
    """Random arguments; rows in no bag and excluded rows hold NaN."""
    generator = torch.Generator().manual_seed(7)
    starts, lengths = zip(*ranges, strict=True)
    n_stored = n_stored or max(s + n for s, n in ranges) + 2
    bag = mean + spread * torch.randn(n_stored, width, generator=generator)
    rows = torch.randn(len(ranges), n_rows, width, generator=generator) / max(spread, 1e-3)
    row_bias = torch.randn(n_stored, generator=generator)
    inside = torch.zeros(n_stored, dtype=torch.bool)
    for start, length in ranges:
        inside[start : start + length] = True
    inside[list(excluded)] = False
    row_bias[list(excluded)] = -torch.inf
    stats = None
    if given:
        exact = bag.double()
        rstd = (exact.var(-1, unbiased=False) + 1e-5).rsqrt()
        stats = tuple(
            torch.where(inside, s.float(), torch.nan).to(DEVICE) for s in (exact.mean(-1), rstd)
        )
    bag[~inside] = torch.nan
    return Call(
        rows.to(DEVICE),
        bag.to(DEVICE),
        row_bias.to(DEVICE) if bias or excluded else None,
        Ragged.from_ranges(starts, lengths, device=DEVICE),
        stats=stats,
        **options,
    )


def oracle(call: Call, dtype: torch.dtype, gradients: tuple[Tensor, ...]) -> list[Tensor]:
    """Results and gradients by the reference and autograd."""
    leaves = [
        None if t is None else t.detach().cpu().to(dtype).requires_grad_()
        for t in (call.rows, call.bag, call.bias)
    ]
    rows, bag, bias = leaves
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        module = __import__("survfuse.reference.pool_bag", fromlist=["draw_seed"])
        context.setattr(module, "draw_seed", lambda device: seed().cpu())
        results = reference(
            rows,
            bag,
            bias=bias,
            ragged=call.ragged.to("cpu"),
            scale=call.scale,
            normalize_eps=1e-5 if call.normalize else None,
            stats=None if call.stats is None else tuple(s.cpu().to(dtype) for s in call.stats),
            dropout_p=call.dropout_p,
        )
    loss = sum(
        (torch.where(result.isinf(), 0.0, result) * gradient.cpu().to(dtype)).sum()
        for result, gradient in zip(results, gradients, strict=True)
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    if not loss.requires_grad:
        return [*results, *(torch.zeros_like(leaf) for leaf in wanted)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [*(result.detach() for result in results), *found]


def check(call: Call, *, frozen: bool = False) -> list[Tensor]:
    """Results and all gradients, those of a frozen bag apart, are within the precision budget."""
    results = call.forward()
    generator = torch.Generator().manual_seed(11)
    gradients = tuple(
        torch.randn(result.shape, generator=generator).to(DEVICE) for result in results
    )
    found = call.backward(results, gradients, needs_bag=not frozen)
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
            if name in ("d_bag", "d_bias"):
                # d_logits subtract dz . z, as every streaming backward does: where one weight is
                # near 1 the rounding of plain torch's own sum cancels, and this one's does not
                torchs = truth + 2 * (torchs.double() - truth)
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


def test_no_rows_at_all() -> None:
    call = make_call([(0, 0), (0, 0)], n_stored=4)
    results = call.forward()
    assert results[1].eq(-torch.inf).all()
    gradients = call.backward(results, tuple(torch.ones_like(r) for r in results))
    assert [g.shape for g in gradients] == [(2, 3, 40), (4, 40), (4,)]
    assert all(g.eq(0).all() for g in (results[0], results[2], *gradients))


@pytest.mark.parametrize("needed", ["needs_rows", "needs_bag", "needs_bias"])
def test_one_gradient_alone(route: str, needed: str) -> None:
    call = make_call([(0, 40), (30, 20)], normalize=True)
    results = call.forward()
    gradients = tuple(torch.ones_like(result) for result in results)
    together = call.backward(results, gradients)
    needs = dict.fromkeys(("needs_rows", "needs_bag", "needs_bias"), False) | {needed: True}
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


needs_interpreter = pytest.mark.skipif(CUDA, reason="counts loads in Triton's interpreter")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch):
    """`count(tensor)` watches a tensor and returns how often each element is loaded."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    watched: list[tuple[Tensor, Tensor]] = []
    load = InterpreterBuilder.create_masked_load

    def counted(self, pointers, mask, other, *rest):
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].astype(np.int64)
        for tensor, counts in watched:
            at = (addresses - tensor.data_ptr()) // tensor.element_size()
            at = at[(at >= 0) & (at < counts.numel())]
            np.add.at(counts.view(-1).numpy(), at, 1)
        return load(self, pointers, mask, other, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)

    def count(tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()
        counts = torch.zeros(tensor.shape, dtype=torch.int64)
        watched.append((tensor, counts))
        return counts

    return count


def frozen_backward(call: Call, results: tuple[Tensor, ...]) -> None:
    gradients = tuple(torch.ones_like(result) for result in results)
    call.backward(results, gradients, needs_bag=False, needs_bias=False)


@needs_interpreter
@pytest.mark.parametrize(
    ("n_rows", "width", "normalize", "backward_reads"),
    # fp32, which the interpreter needs, has room for 8 query rows at D = 1024 in the backward
    [
        *((5, 40, True, 1), (5, 40, False, 1), (16, 512, False, 1)),
        *((8, 1024, True, 1), (16, 1024, False, 2)),
    ],
)
def test_each_row_is_read_once(reads, n_rows, width, normalize, backward_reads) -> None:
    ranges = [(2, 17), (20, 5)] if width < 100 else [(2, 20)]
    call = make_call(ranges, n_rows=n_rows, width=width, n_stored=30, normalize=normalize)
    counts = reads(call.bag)
    results = call.forward()
    inside = torch.zeros(30, dtype=torch.bool)
    for start, length in ranges:
        inside[start : start + length] = True
    assert torch.equal(counts, inside[:, None].long().expand_as(counts))
    counts.zero_()
    frozen_backward(call, results)
    assert torch.equal(counts, backward_reads * inside[:, None].long().expand_as(counts))


@needs_interpreter
@pytest.mark.parametrize(
    ("n_rows", "width", "forward_reads"),
    # two blocks of 16 rows in one pass; a pass for the scores and one for the product; two of each
    [(20, 1024, 2), (6, 1040, 2), (70, 48, 4)],
)
def test_reads_beyond_few_rows_and_moderate_widths(reads, n_rows, width, forward_reads) -> None:
    call = make_call([(0, 20)], n_rows=n_rows, width=width, n_stored=20)
    counts = reads(call.bag)
    results = call.forward()
    assert counts.eq(forward_reads).all()
    if width > 1024:
        counts.zero_()
        frozen_backward(call, results)
        assert counts.eq(2).all()


@needs_interpreter
def test_reads_of_a_trained_bag(reads) -> None:
    call = make_call([(0, 20), (10, 20)], n_rows=3, width=300, n_stored=40, normalize=True)
    results = call.forward()
    counts = reads(call.bag)
    gradients = tuple(torch.ones_like(result) for result in results)
    call.backward(results, gradients, needs_rows=False)
    blocks = 3  # of 128 columns: each scores the whole row
    bags = torch.tensor([1] * 10 + [2] * 10 + [1] * 10 + [0] * 10)
    # and the normalisation reads once more; the first column is also the shift of the statistics
    expected = (blocks * bags + (bags > 0))[:, None].expand_as(counts)
    assert torch.equal(counts[:, 1:], expected[:, 1:])
    assert torch.equal(counts[:, 0], expected[:, 0] + blocks * bags)
