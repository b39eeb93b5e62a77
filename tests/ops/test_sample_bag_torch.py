"""`sample_bag` as a citizen of torch: registration, compiling, counting; what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils

from survfuse import Ragged, ops, reference
from tests.ops.test_sample_bag import BACKENDS, CORNERS, differentiate, make, run, to


@pytest.mark.parametrize("corners", CORNERS)
def test_opcheck(corners) -> None:
    bag, grid, points = make(n_points=5)
    bag, points = to(torch.float32, torch.nan_to_num(bag), points[:, :, :5])
    op = torch.ops.survfuse.sample_bag.default
    torch.library.opcheck(op, (bag, *grid, points, corners == "renormalise"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_as_one_graph_for_every_size(backend) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def function(bag, grid, points):
        return ops.sample_bag(bag, grid, points, corners="renormalise", backend=backend)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_points in (9, 20, 33):
        lengths = [11, 5, 4][: 2 + n_points % 2]
        ranges = Ragged.from_ranges([0] * len(lengths), lengths)
        bag, grid, points = make(ranges, n_points=n_points)
        bag, points = to(torch.float32, bag, points)
        expected = run(bag, grid, points, corners="renormalise", backend=backend)
        got = differentiate(compiled(bag, grid, points), [bag, points])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_checkpoint_and_autocast() -> None:
    from torch.utils.checkpoint import checkpoint

    made, grid, at = make()
    bag, points = to(torch.float32, made, at)
    expected = run(bag, grid, points)
    again = checkpoint(lambda b, p: ops.sample_bag(b, grid, p), bag, points, use_reentrant=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = ops.sample_bag(bag, grid, points)
    for samples in (again, cast):
        for a, b in zip(differentiate(samples, [bag, points]), expected, strict=True):
            assert torch.equal(a, b)


def test_double_backward_raises_with_a_hint_and_works_on_reference() -> None:
    bag, grid, points = make()
    bag, points = torch.nan_to_num(bag).requires_grad_(), points.requires_grad_()

    def gradient(backend):
        out = ops.sample_bag(bag, grid, points, backend=backend)
        return torch.autograd.grad((out**2).sum(), points, create_graph=True)[0].square().sum()

    with pytest.raises(RuntimeError, match=r'sample_bag has no double .* backend="reference"'):
        gradient("tiled").backward()
    assert bool(torch.autograd.grad(gradient("reference"), bag)[0].abs().sum() > 0)


def test_operations_of_a_call() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    bag, points = to(torch.float32, *make()[::2])
    grid, unit = make()[1], 5 * 53 * 6
    for needs in ((True, True), (False, True)):
        bag.requires_grad_(needs[0])
        with FlopCounterMode(display=False) as counter:
            samples = ops.sample_bag(bag, grid, points)
            assert counter.get_total_flops() == 8 * unit
            samples.sum().backward()
        assert counter.get_total_flops() == 8 * unit * (1 + sum(needs))


def test_the_choice_is_visible() -> None:
    bag = torch.zeros(2, 2)
    assert ops.selected_backend("sample_bag", bag).backend == "tiled"
    assert ops.selected_backend("sample_bag", bag, backend="reference")[1] == "asked for"
    with pytest.raises(RuntimeError, match="implement sample_bag"):
        ops.selected_backend("sample_bag", bag, backend="native")


def test_on_a_device_rows_outside_are_no_tissue() -> None:
    """Nothing is checked there, which would make the host wait; what is wrong reads nothing."""
    from survfuse.tiled.sample_bag import sample_bag_backward, sample_bag_forward

    grid = ops.grid_index(torch.tensor([[0, 0], [1, 0], [2, 0]]), patch_size=1)
    points = torch.tensor([[[[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]]])
    bag = torch.tensor([[5.0], [6.0]])
    assert sample_bag_forward(bag, grid, points, False).flatten().tolist() == [5.0, 6.0, 0.0]
    cut = grid._replace(index=torch.tensor([0, 2**31 - 1, -7], dtype=torch.int32))
    assert sample_bag_forward(bag, cut, points, False).flatten().tolist() == [5.0, 0.0, 0.0]
    got = reference.sample_bag(bag, cut, points)
    assert got.flatten().tolist() == [5.0, 0.0, 0.0]
    short = grid._replace(index=grid.index[:0])
    assert not sample_bag_forward(bag, short, points, True).any()
    shifted = grid._replace(cell_offsets=grid.cell_offsets + 100)
    assert sample_bag_forward(bag, shifted, points, False).isfinite().all()
    d_bag, _ = sample_bag_backward(torch.ones(1, 1, 3, 1), bag, cut, points, False, True, False)
    assert d_bag.flatten().tolist() == [1.0, 0.0]


def test_wrong_arguments_are_named() -> None:
    bag, grid, points = make()
    good = {"bag": bag.float(), "grid": grid, "points": points.float()}
    for name, value, error, words in (
        ("bag", None, TypeError, "bag is NoneType"),
        ("bag", torch.zeros(11, 2, 3), ValueError, r"bag has shape .* must be \[T, D\]"),
        ("bag", torch.zeros(11, 6).int(), TypeError, "bag is torch.int32"),
        ("bag", torch.zeros(11, 5), ValueError, "points has 2 groups and bag 5 features"),
        ("bag", torch.zeros(11, 0), ValueError, "points has 2 groups and bag 0 features"),
        ("bag", bag, TypeError, "points is torch.float32; it must be torch.float64"),
        ("bag", bag[:7].float(), ValueError, r"index shows rows -1 to 9, .* has 7 rows"),
        ("grid", tuple(grid), TypeError, "grid is tuple"),
        ("grid", grid._replace(index=None), TypeError, "grid.index is NoneType"),
        ("grid", grid._replace(index=grid.index.long()), ValueError, "grid.index is torch.int64"),
        ("grid", grid._replace(shapes=grid.shapes[0]), ValueError, r"grid.shapes .* \[B, 2\]"),
        ("grid", grid._replace(shapes=grid.shapes[1:]), ValueError, r"cell_offsets .* \[5\]"),
        ("grid", grid._replace(index=grid.index[:0]), ValueError, "index has 0 cells"),
        ("grid", grid.to("meta"), ValueError, "grid.index is on meta and the bag on cpu"),
        ("points", None, TypeError, "points is NoneType"),
        ("points", points, TypeError, r"points .* it must be .*32 beside a bag of torch.float32$"),
        ("points", points.half(), TypeError, "points is torch.float16; .* 16 bits lose"),
        ("points", points.long(), TypeError, r"points is torch.int64; .* of torch.float32$"),
        ("points", points.float()[1:], ValueError, r"points has shape .* \[5, G, M, 2\]"),
        ("points", points.float()[..., :1], ValueError, r"must be \[5, G, M, 2\]"),
        ("points", points.float()[:, :0], ValueError, "points has 0 groups"),
        ("corners", "border", ValueError, "corners is 'border'"),
        ("backend", "cudnn", ValueError, "backend is 'cudnn'"),
        ("backend", "triton", RuntimeError, '"reference" and "tiled" implement sample_bag'),
    ):
        for backend in BACKENDS:
            with pytest.raises(error, match=words):
                ops.sample_bag(**({"backend": backend} | good | {name: value}))
