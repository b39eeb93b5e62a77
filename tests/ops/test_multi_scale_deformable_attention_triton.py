"""The Triton launchers of multi-scale deformable attention, on a GPU or under the interpreter.

The interpreter walks samples slowly: on the CPU these small calls stand in for the whole contract.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from survfuse import reference
from survfuse.deformable import Samples, SamplingNeeds
from tests.ops.deformable_cases import Case
from tests.ops.test_multi_scale_deformable_attention import check_budget
from tests.ops.tolerance import assert_within_budget
from tests.ops.triton_calls import DEVICE

launchers = pytest.importorskip("survfuse.triton_kernels.multi_scale_deformable_attention")

SHAPES = [(0, 3), (3, 4), (5, 2)]
NAMES = ("out", "d_value", "d_points", "d_weights", "d_reference")
FORMS = pytest.mark.parametrize("sides", [0, 2, 4], ids=["locations", "offsets", "boxes"])


@pytest.fixture(autouse=True)
def _deterministic_with_nan_in_fresh_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["atomic", "deterministic"])
def mode(request: pytest.FixtureRequest) -> bool:
    """Sums in fp32 in any order, and in fixed point."""
    torch.use_deterministic_algorithms(request.param)
    return request.param


def make(sides: int, *, n_queries: int = 5, n_points: int = 2, heads: int = 3, dim: int = 5):
    """A value and samples, some of them outside, one of them nowhere; and a gradient."""
    g = torch.Generator().manual_seed(sides)
    # offsets in pixels of a level that has none are no numbers to the reference
    shapes = SHAPES[1:] if sides == 2 else SHAPES
    n_batches, n_levels, n_rows = 2, len(shapes), sum(h * w for h, w in shapes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    value = normal(n_batches, n_rows, heads, dim)
    grid = (n_batches, n_queries, heads, n_levels, n_points)
    points, weights = normal(*grid, 2), normal(*grid)
    at = None
    if sides:
        at = torch.rand(n_batches, n_queries, n_levels, sides, generator=g)
    else:
        points = 0.5 + 0.4 * points
    points[-1, -1, 0, -1, 0, 0] = torch.nan
    samples = Samples(torch.tensor(shapes), points, weights, at)
    samples = Samples(*(None if t is None else t.to(DEVICE) for t in samples))
    return value.to(DEVICE), samples, normal(n_batches, n_queries, heads * dim).to(DEVICE)


def oracle(value: Tensor, samples: Samples, d_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out and every gradient by the reference."""
    tensors = (value, *samples[1:])
    leaves = [None if t is None else t.cpu().to(dtype).requires_grad_() for t in tensors]
    value, points, weights, at = leaves
    shapes = samples.shapes.cpu()
    if at is None:
        out = reference.multi_scale_deformable_attention(value, shapes, points, weights)
    else:
        out = reference.multi_scale_deformable_attention_from_offsets(
            value, shapes, at, points, weights
        )
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(out, wanted, d_out.cpu().to(dtype))
    return [out.detach(), *gradients]


def run(value: Tensor, samples: Samples, d_out: Tensor) -> list[Tensor]:
    out, lse = launchers.multi_scale_deformable_attention_forward(value, samples)
    gradients = backward(value, samples, d_out, lse)
    return [out, *(gradient for gradient in gradients if gradient is not None)]


def backward(value, samples, d_out, lse, only: str | None = None) -> tuple[Tensor | None, ...]:
    needed = SamplingNeeds(*(only in (None, name) for name in SamplingNeeds._fields))
    return launchers.multi_scale_deformable_attention_backward(d_out, lse, value, samples, needed)


def finite(samples: Samples) -> Samples:
    """A NaN, which lies outside, moved to a place outside: autograd would carry it on."""
    return samples._replace(points=samples.points.nan_to_num(-1e6))


SMALL = [
    Case("no queries", queries=0),
    Case("no batch", batch=0),
    Case("a level without pixels", shapes=((3, 4), (0, 5)), queries=3, points=1),
    Case("on borders", where="borders", shapes=((4, 8), (1, 1)), queries=3, points=2),
    Case("on integers", where="integers", shapes=((4, 8), (1, 1)), queries=3, points=2),
    Case("nowhere", where="nan", shapes=((3, 4),), queries=4, points=2),
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("form", ["locations", "boxes"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_of_the_contract(case: Case, form: str) -> None:
    check_budget(case, form, "triton", DEVICE, torch.float32)


@FORMS
def test_both_modes_are_within_budget(mode: bool, sides: int) -> None:
    value, samples, d_out = make(sides)
    arguments = (value, finite(samples), d_out)
    exact, plain = (oracle(*arguments, kind) for kind in (torch.float64, torch.float32))
    got = run(value, samples, d_out)
    for name, g, p, e in zip(NAMES, got, plain, exact, strict=False):
        assert_within_budget(name, g, p, e, torch.float32)
    assert bool((got[2][-1, -1, 0, -1, 0] == 0).all())


@pytest.mark.parametrize(("heads", "dim", "n_points"), [(1, 1, 1), (2, 20, 13), (5, 8, 2)])
def test_sizes_that_fill_no_block(heads: int, dim: int, n_points: int) -> None:
    """13 points of 3 levels are two blocks of logits."""
    value, samples, d_out = make(4, n_queries=1, heads=heads, dim=dim, n_points=n_points)
    value = value.transpose(1, 2).contiguous().transpose(1, 2)
    arguments = (value, finite(samples), d_out)
    exact, plain = (oracle(*arguments, kind) for kind in (torch.float64, torch.float32))
    for name, g, p, e in zip(NAMES, run(value, samples, d_out), plain, exact, strict=True):
        assert_within_budget(name, g, p, e, torch.float32)


def test_order_of_queries_changes_no_bit_of_the_sums() -> None:
    value, samples, d_out = make(0)
    order = torch.randperm(d_out.shape[1], generator=torch.Generator().manual_seed(1))
    turned = samples._replace(points=samples.points[:, order], weights=samples.weights[:, order])
    d_value = run(value, samples, d_out)[1]
    assert torch.equal(run(value, turned, d_out[:, order].contiguous())[1], d_value)


@pytest.mark.parametrize("sides", [0, 2], ids=["locations", "offsets"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_sums_in_fixed_point_take_any_size(sides: int, size: float) -> None:
    value, samples, d_out = make(sides, n_queries=2)
    d_value, scaled = (run(value, samples, d_out * s)[1] for s in (1.0, size))
    torch.testing.assert_close(scaled.double() / size, d_value.double(), rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ["d_out", "weights", "logits"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_sums(where: str, number: float) -> None:
    value, samples, d_out = make(2 if where == "logits" else 0, n_queries=2)
    (d_out if where == "d_out" else samples.weights).view(-1)[7] = number
    assert bool(run(value, samples, d_out)[1].isnan().any())


@pytest.mark.parametrize(
    "last",
    [(50, 60), (2**20, 2**20), (2**40, 2**50), (-3, 5)],
    ids=["long", "wraps", "huge", "less"],
)
def test_levels_beyond_the_value_are_not_sampled_there(mode: bool, last: tuple[int, int]) -> None:
    """On a GPU nobody looks at the shapes on the host: rows that do not exist hold nothing."""
    value, samples, d_out = make(0)
    shapes = samples.shapes.clone()
    shapes[-1] = torch.tensor(last)
    got = run(value, samples._replace(shapes=shapes), d_out)
    assert all(bool(result.isfinite().all()) for result in got)
    if last == (50, 60):
        behind = 50 * 60 - 5 * 2
        longer = torch.cat([value, value.new_zeros(2, behind, *value.shape[2:])], 1)
        samples = finite(samples)._replace(shapes=shapes)
        expected = oracle(longer, samples, d_out, torch.float64)
        expected[1] = expected[1][:, : value.shape[1]]
        # the sums of what lies inside alone: the reference reads zeros behind them
        torch.testing.assert_close(got[0].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[1].cpu().double(), expected[1], rtol=1e-5, atol=1e-5)


@FORMS
def test_each_gradient_alone(sides: int) -> None:
    value, samples, d_out = make(sides, n_queries=2)
    _, lse = launchers.multi_scale_deformable_attention_forward(value, samples)
    together = backward(value, samples, d_out, lse)
    for only in SamplingNeeds._fields:
        alone = backward(value, samples, d_out, lse, only)
        for name, a, b in zip(SamplingNeeds._fields, alone, together, strict=True):
            assert (a is not None) == (name == only and b is not None)
            assert a is None or torch.equal(a, b)


@FORMS
def test_nothing_to_sample(sides: int) -> None:
    for sizes in ({"n_queries": 0}, {"n_points": 0}):
        value, samples, d_out = make_empty(sides, **sizes)
        out, lse = launchers.multi_scale_deformable_attention_forward(value, samples)
        gradients = backward(value, samples, d_out, lse)
        assert bool((out == 0).all())
        assert (lse is None) == (sides == 0)
        assert all(bool((g == 0).all()) for g in gradients if g is not None)


def make_empty(sides: int, n_queries: int = 2, n_points: int = 2):
    grid, n_rows = (1, n_queries, 2, len(SHAPES), n_points), sum(h * w for h, w in SHAPES)
    at = torch.zeros(1, n_queries, len(SHAPES), sides, device=DEVICE) if sides else None
    points = torch.zeros(*grid, 2, device=DEVICE)
    samples = Samples(torch.tensor(SHAPES, device=DEVICE), points, points[..., 0], at)
    value = torch.ones(1, n_rows, 2, 3, device=DEVICE)
    return value, samples, torch.ones(1, n_queries, 6, device=DEVICE)
