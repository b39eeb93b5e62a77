"""Samples between patches: against fp64, torch's grid_sample, and a loop; edges and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

from survfuse import Ragged, ops
from survfuse.data.slides import tile_slide
from survfuse.ops import GridIndex
from tests.ops.tolerance import assert_within_budget

BACKENDS = ["reference", "tiled"]
CORNERS = ["zero", "renormalise"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# overlapping, empty and repeated bags; rows 0 and 10 are in none and hold NaN
RANGES = Ragged.from_ranges([1, 5, 5, 1, 1], [6, 5, 0, 6, 9])
SPECIAL = [
    *((0.0, 0.0), (2.0, 1.0), (-1.0, -1.0), (-0.5, 2.0), (1.0, -0.25), (4.5, 3.5), (6.0, 4.0)),
    *((float("nan"), 1.0), (1.0, float("inf")), (-float("inf"), 0.0), (1e30, 1.0), (-1e9, -1e9)),
    (0.5, 0.5),
]


pytestmark = pytest.mark.usefixtures("nan_in_fresh_memory")


def make(
    ragged: Ragged = RANGES, n_groups: int = 2, width: int = 3, n_points: int = 40
) -> tuple[Tensor, GridIndex, Tensor]:
    """Bag, grid and points in fp64 on an irregular outline; rows in no bag hold NaN."""
    g = torch.Generator().manual_seed(1)
    n_rows = 11
    places = torch.randperm(35, generator=g)[:n_rows]
    coords = torch.stack([places % 7, places // 7], 1) * 32
    grid = ops.grid_index(coords, patch_size=32, ragged=ragged)
    bag = torch.randn(n_rows, n_groups * width, generator=g, dtype=torch.double)
    inside = torch.zeros(n_rows, dtype=torch.bool)
    inside[grid.index[grid.index >= 0].long()] = True
    bag[~inside] = torch.nan
    shape = (ragged.n_bags, n_groups, n_points, 2)
    points = torch.rand(shape, generator=g, dtype=torch.double) * torch.tensor([9.0, 7.0]) - 1.5
    special = torch.tensor(SPECIAL, dtype=torch.double)
    points = torch.cat([points, special.expand(*shape[:2], -1, 2)], 2)
    # every type is given the same numbers
    return bag, grid, points.float().double()


def to(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Leaves of a type; points stay fp32 beside 16 bits."""
    bag, points = tensors
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [bag.to(dtype).requires_grad_(), points.to(wide).requires_grad_()]


def differentiate(samples: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    up = torch.linspace(-1, 1, samples.numel(), dtype=torch.double).view(samples.shape)
    gradients = torch.autograd.grad((up * samples.double()).sum(), inputs)
    return [samples.detach(), *gradients]


def run(bag, grid, points, **options) -> list[Tensor]:
    return differentiate(ops.sample_bag(bag, grid, points, **options), [bag, points])


def plain(bag: Tensor, grid: GridIndex, points: Tensor, corners: str) -> list[Tensor]:
    """As anybody would write it: dense slides, weights and sums of the bag's type."""
    samples = []
    n_groups = points.shape[1]
    for b, (height, width) in enumerate(grid.shapes.tolist()):
        index = grid.index[grid.cell_offsets[b] : grid.cell_offsets[b + 1]].long()
        tissue = (index >= 0).reshape(height, width)
        dense = bag[index.clamp(min=0)].reshape(height, width, n_groups, bag.shape[1] // n_groups)
        dense = torch.where(tissue[..., None, None], dense, 0.0)
        # a border of nothing around it, and one cell to send all points to that lie beyond
        dense, tissue = pad(dense, (0, 0, 0, 0, 1, 2, 1, 2)), pad(tissue, (1, 2, 1, 2))
        x, y = points[b].unbind(-1)
        near = (x >= -1) & (x < width) & (y >= -1) & (y < height)
        x, y = torch.where(near, x + 1, width + 1.0), torch.where(near, y + 1, height + 1.0)
        left, top = x.detach().floor().long(), y.detach().floor().long()
        fx, fy = x - left, y - top
        group = torch.arange(n_groups)[:, None]
        total, weight = 0.0, 0.0
        for down, right in itertools.product((0, 1), (0, 1)):
            # the last column and row are nothing, and so is what would lie behind them
            at = (top + down).clamp(max=height + 2), (left + right).clamp(max=width + 2)
            share = (fx if right else 1 - fx) * (fy if down else 1 - fy)
            share = torch.where(tissue[at] & near, share, 0.0).to(bag.dtype)
            total = total + share[..., None] * dense[(*at, group)]
            weight = weight + share
        if corners == "renormalise":
            some = (weight > 0)[..., None]
            total = torch.where(some, total / torch.where(some, weight[..., None], 1.0), 0.0)
        samples.append(total)
    return differentiate(torch.stack(samples), [bag, points])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_within_budget(backend, corners, dtype) -> None:
    made, grid, points = make()
    bag, at = to(dtype, made, points)
    exact_bag = bag.detach().double().requires_grad_()
    exact = run(exact_bag, grid, points.requires_grad_(), corners=corners, backend="reference")
    expected = plain(bag, grid, at, corners)
    got = run(bag, grid, at, corners=corners, backend=backend)
    assert got[0].dtype == got[1].dtype == dtype
    for name, g, p, e in zip(("samples", "d_bag", "d_points"), got, expected, exact, strict=True):
        assert_within_budget(f"{name} in {dtype}", g, p, e, dtype)
    # in fp64 the formula by slides is an oracle of its own
    if dtype == torch.float64:
        for g, p in zip(got, expected, strict=True):
            torch.testing.assert_close(g, p, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, corners) -> None:
    bag, grid, points = make(n_points=6)
    # at whole coordinates slopes jump, and what is nothing has none
    points = points[:, :, :6] + 1e-3
    bag = torch.nan_to_num(bag).requires_grad_()

    def function(bag, points):
        return ops.sample_bag(bag, grid, points, corners=corners, backend=backend)

    assert torch.autograd.gradcheck(function, (bag, points.requires_grad_()))


@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_full_rectangle_is_grid_sample(backend, corners) -> None:
    height, width, n_groups = 5, 8, 3
    places = torch.arange(height * width)
    coords = torch.stack([places % width, places // width], 1)
    grid = ops.grid_index(coords, patch_size=1)
    bag = torch.randn(height * width, 6, dtype=torch.double, requires_grad=True)
    edge = torch.tensor([width - 1.0, height - 1.0], dtype=torch.double)
    # what is renormalised is torch's padding by the border, as far as a patch is next to the point
    mode, reach = ("zeros", 1.5) if corners == "zero" else ("border", 0.99)
    points = torch.rand(1, n_groups, 200, 2, dtype=torch.double) * (edge + 2 * reach) - reach
    points = points.requires_grad_()
    got = run(bag, grid, points, corners=corners, backend=backend)
    dense = bag.reshape(height, width, n_groups, 2).permute(2, 3, 0, 1)
    normalised = 2 * points[0][:, None] / edge - 1
    samples = grid_sample(dense, normalised, padding_mode=mode, align_corners=True)
    expected = differentiate(samples[:, :, 0].mT[None], [bag, points])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_points_on_patches_give_the_patches(backend, corners) -> None:
    bag, grid, _ = make(n_groups=1)
    cells = grid.cells(RANGES)
    for b in range(RANGES.n_bags):
        start, length = int(RANGES.starts[b]), int(RANGES.lengths[b])
        first = int(RANGES.lengths[:b].sum())
        points = cells[first : first + length].double()[None, None]
        out = ops.sample_bag(bag, grid.select(b), points, corners=corners, backend=backend)
        assert torch.equal(out[0, 0], bag[start : start + length])


@pytest.mark.parametrize("backend", BACKENDS)
def test_outside_and_nan_are_zeros_with_zero_gradients(backend) -> None:
    bag, grid, points = make()
    points = points[:, :, 40:].clone().requires_grad_()
    bag = bag.requires_grad_()
    for corners in CORNERS:
        samples, d_bag, d_points = run(bag, grid, points, corners=corners, backend=backend)
        for column in (7, 8, 9, 10, 11):
            assert not samples[:, :, column].any()
            assert not d_points[:, :, column].any()
        assert samples.isfinite().all()
        assert d_bag.isfinite().all()
        assert not d_bag[[0, 10]].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_of_nan_stays_where_its_point_is(backend) -> None:
    """A patch that a point does not touch takes no part in its gradient, not even times zero."""
    grid = ops.grid_index(torch.tensor([[0, 0], [5, 0], [6, 0]]), patch_size=1)
    bag = torch.ones(3, 1, requires_grad=True)
    points = torch.tensor([[0.0, 0.0], [4.5, 0.0], [9.0, 9.0]])[None, None]
    samples = ops.sample_bag(bag, grid, points, backend=backend)
    up = torch.tensor([1.0, torch.nan, torch.nan]).view(1, 1, 3, 1)
    (d_bag,) = torch.autograd.grad(samples, bag, up)
    assert d_bag[0].item() == 1.0
    assert d_bag[1].isnan()
    assert d_bag[2].item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_renormalised_at_the_outline(backend) -> None:
    # tissue is an L of three cells
    grid = ops.grid_index(torch.tensor([[0, 0], [0, 1], [1, 1]]), patch_size=1)
    bag = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    places = [[0.5, 0.5], [0.75, 0.25], [1.5, 0.5], [-0.25, -0.5], [2.0, 1.0], [1.0, 0.0]]
    points = torch.tensor(places).view(1, 1, 6, 2).requires_grad_()
    samples, d_bag, d_points = run(bag, grid, points, corners="renormalise", backend=backend)
    weights = torch.tensor([0.25 * 0.75, 0.25 * 0.25, 0.75 * 0.25])
    second = (weights * bag.detach().flatten()).sum() / weights.sum()
    expected = torch.tensor([7 / 3, float(second), 4.0, 1.0, 0.0, 0.0])
    torch.testing.assert_close(samples.flatten(), expected)
    # one patch alone: its features, wherever the point moves
    torch.testing.assert_close(d_points[0, 0, 2:], torch.zeros(4, 2), rtol=0, atol=1e-7)
    torch.testing.assert_close(d_bag.sum(), torch.linspace(-1, 1, 6)[:4].sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bag_of_one_patch(backend) -> None:
    grid = ops.grid_index(torch.tensor([[640, 128]]), patch_size=64)
    bag = torch.tensor([[3.0]], requires_grad=True)
    points = torch.tensor([[0.0, 0.0], [0.25, 0.0], [-0.5, 0.5], [1.0, 0.0], [-1.0, 0.0]])
    points = points[None, None].requires_grad_()
    samples, d_bag, _ = run(bag, grid, points, backend=backend)
    assert samples.flatten().tolist() == [3.0, 2.25, 0.75, 0.0, 0.0]
    assert d_bag.item() == -1.0 - 0.5 * 0.75
    samples = ops.sample_bag(bag, grid, points, corners="renormalise", backend=backend)
    assert samples.flatten().tolist() == [3.0, 3.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("corners", CORNERS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("n_rows", "lengths", "n_points"),
    [(4, [0], 3), (0, [0], 3), (4, [], 3), (0, [], 0), (4, [4], 0)],
)
def test_nothing_to_sample(backend, corners, n_rows, lengths, n_points) -> None:
    coords = torch.arange(n_rows)[:, None].expand(-1, 2)
    grid = ops.grid_index(coords, patch_size=1, ragged=Ragged.from_lengths(lengths))
    bag = torch.randn(n_rows, 4, requires_grad=True)
    points = torch.zeros(len(lengths), 2, n_points, 2, requires_grad=True)
    samples, d_bag, d_points = run(bag, grid, points, corners=corners, backend=backend)
    assert samples.shape == (len(lengths), 2, n_points, 2)
    assert not samples.any()
    assert d_bag.shape == bag.shape
    assert not d_bag.any()
    assert not d_points.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_rows_and_batches_changes_nothing(backend) -> None:
    bag, grid, points = make(ragged=Ragged.from_lengths([11]))
    turn = torch.randperm(11)
    back = torch.empty_like(turn)
    back[turn] = torch.arange(11)
    index = torch.where(grid.index >= 0, back[grid.index.long()], -1).int()
    for corners in CORNERS:
        options = {"corners": corners, "backend": backend}
        expected = ops.sample_bag(bag, grid, points, **options)
        turned = ops.sample_bag(bag[turn], grid._replace(index=index), points, **options)
        assert torch.equal(turned, expected)
    bag, grid, points = make()
    for b in range(RANGES.n_bags):
        alone = ops.sample_bag(bag, grid.select(b), points[b : b + 1], backend=backend)
        assert torch.equal(alone, ops.sample_bag(bag, grid, points, backend=backend)[b : b + 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [300, 3000])
def test_far_from_the_corner_a_fraction_of_a_pixel_still_counts(size: int, dtype) -> None:
    """Sixteen bits know no numbers between 2999 and 3000; the points are not of that type."""
    coords = torch.tensor([[0, 0], [size - 1, size - 1], [size, size - 1]])
    grid = ops.grid_index(coords, patch_size=1)
    bag = torch.tensor([[7.0], [0.0], [1.0]], dtype=dtype)
    share = torch.linspace(0.0, 0.96875, 32)
    points = torch.stack([size - 1 + share, torch.full_like(share, size - 1)], 1)[None, None]
    for backend in BACKENDS:
        out = ops.sample_bag(bag, grid, points, backend=backend).flatten()
        # five bits of the share, which both types hold
        assert torch.equal(out.float(), share)
    with pytest.raises(TypeError, match=r"points is torch.*16; |points is torch.bfloat16"):
        ops.sample_bag(bag, grid, points.to(dtype))


@pytest.mark.parametrize("corners", CORNERS)
def test_tiles_of_points_change_nothing(corners, monkeypatch) -> None:
    import survfuse.tiled.sample_bag as module

    bag, grid, points = make(n_points=90)
    inputs = [bag.requires_grad_(), points.requires_grad_()]
    whole = run(inputs[0], grid, inputs[1], corners=corners)
    monkeypatch.setattr(module, "_CPU_TILE_BYTES", 64)
    for got, expected in zip(run(bag, grid, points, corners=corners), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_twenty_runs_are_bitwise_equal_whatever_the_threads() -> None:
    made, grid, at = make(n_points=3000)
    bag, points = to(torch.bfloat16, made, at)
    torch.use_deterministic_algorithms(False)
    before, outs = torch.get_num_threads(), []
    for n_threads in (1, *(4,) * 19):
        torch.set_num_threads(n_threads)
        outs.append(run(bag, grid, points, corners="renormalise"))
    torch.set_num_threads(before)
    for other in outs[1:]:
        for a, b in zip(outs[0], other, strict=True):
            assert torch.equal(a, b)


def test_rows_with_a_stride_are_read_in_place() -> None:
    bag, grid, points = make()
    wider = torch.full((bag.shape[0], 11), torch.nan, dtype=torch.double)
    wider[:, :6] = bag
    turned = bag.mT.contiguous().mT
    expected = ops.sample_bag(bag, grid, points)
    for view in (wider[:, :6], turned):
        assert torch.equal(ops.sample_bag(view, grid, points), expected)
        view = view.requires_grad_()
        assert torch.equal(run(view, grid, points.requires_grad_())[0], expected)


@pytest.mark.parametrize("which", ["bag", "points"])
def test_only_what_is_asked_for_is_differentiated(which: str) -> None:
    bag, grid, points = make()
    both = run(bag.requires_grad_(), grid, points.requires_grad_(), corners="renormalise")
    alone = {"bag": bag.detach(), "points": points.detach()}
    alone[which].requires_grad_()
    samples = ops.sample_bag(grid=grid, corners="renormalise", **alone)
    assert torch.equal(differentiate(samples, [alone[which]])[1], both[1 if which == "bag" else 2])


def test_real_slides(shared_data) -> None:
    """Between neighbours of a real section lies their mean; its features are its coordinates."""
    tiles = tile_slide(shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs", target_mpp=None)
    coords = torch.as_tensor(tiles.coords)
    grid = ops.grid_index(coords, patch_size=256)
    cells = grid.cells(Ragged.from_lengths([len(coords)]))
    points = (cells.float() + torch.tensor([0.25, 0.5]))[None, None]
    height, width = grid.shapes[0].tolist()
    box = grid.index.reshape(height, width)
    inner = torch.stack(
        [
            box[(cells[:, 1] + dy).clamp(max=height - 1), (cells[:, 0] + dx).clamp(max=width - 1)]
            for dx, dy in itertools.product((0, 1), (0, 1))
        ]
    )
    inner = (inner >= 0).all(0) & (cells[:, 0] < width - 1) & (cells[:, 1] < height - 1)
    assert 80 < int(inner.sum()) < len(coords)
    bag = torch.cat([coords.float(), torch.ones(len(coords), 1)], 1)
    for corners in CORNERS:
        out = ops.sample_bag(bag, grid, points, corners=corners)[0, 0]
        torch.testing.assert_close(
            out[inner, :2], coords[inner].float() + torch.tensor([64.0, 128.0])
        )
        whole = out[:, 2]
        assert bool((whole[inner] == 1).all())
        # the weight of tissue: below 1 at the outline, unless it is made 1 there
        assert bool((whole[~inner] < 1).all()) == (corners == "zero")
        if corners == "renormalise":
            torch.testing.assert_close(whole, torch.ones(len(coords)))
