"""`sample_bag`: features at real-valued points of a sparse grid of patches.

Oracle: survfuse/reference/sample_bag.py.  Math: docs/math.md, "Sampling a bag between its patches".
"""

from __future__ import annotations

import torch
from torch import Tensor

from survfuse import reference
from survfuse.grid import GridIndex
from survfuse.ops.backends import Selection, check_backend
from survfuse.ops.checks import check_coordinates, check_tensor
from survfuse.ops.flops import flop_formula
from survfuse.ops.registration import (
    call_op,
    call_reference,
    fake_gradients,
    gradients_like,
    no_double_backward,
    save_call,
    saved_call,
    to_autograd,
    unit_stride,
    without_autocast,
)
from survfuse.tiled.sample_bag import sample_bag_backward, sample_bag_forward


def sample_bag(
    bag: Tensor,
    grid: GridIndex,
    points: Tensor,
    *,
    corners: str = "zero",
    backend: str | None = None,
) -> Tensor:
    r"""Bilinear samples of a bag's features at points between its patches.

    The point (x, y) = (3, 1) lies on the centre of the patch in column 3 and row 1 of its bag's
    grid, and gives that patch's features; halfway to the next patch are their means. The four
    cells c around a point share it,

    .. math:: s(p) = \sum_c w_c(p)\, x_c, \quad w_c(p) = (1 - |p_x - c_x|)(1 - |p_y - c_y|)

    and cells without tissue count as zeros, or, with `corners="renormalise"`, not at all:
    the sum is divided by the sum of w_c over the cells with tissue. The slide is never made dense.

    Args:
        bag: [T, D] packed; bf16, fp16, fp32, or fp64 on the CPU. Any row stride; a last stride
            other than 1 is copied. Rows that no cell shows are never read.
        grid: which row lies in which cell of each of the B bags, from `grid_index`.
        points: [B, G, M, 2] (x, y) in cells; fp32, beside an fp64 bag fp64. Group g, which divides
            D, samples channels g D / G to (g + 1) D / G. NaN and infinite points count as outside.
        corners: "zero" or "renormalise".
        backend: None, "reference" or "tiled".

    Returns:
        samples [B, G, M, D / G] of the type of the bag; zeros where no cell around a point has
        tissue. Differentiable in the bag and in the points. At a whole coordinate, where the slope
        jumps, the gradient is that towards larger coordinates.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or device; it is named. On the
            CPU also a grid that does not fit the bag; on a device its rows outside of the matrix
            are no tissue.
        RuntimeError: a named backend cannot serve the call; double backward, forward mode,
            derivatives of torch.func (use backend="reference").

    Precision: fp32 (fp64) weights and sums; error against fp64 at most twice that of plain torch in
    the type of the bag. Coordinates are never rounded to 16 bits. Renormalised, the gradient of a
    point divides by the weight that tissue has, and its rounding with it.
    Determinism: bitwise on the CPU, and on CUDA under `torch.use_deterministic_algorithms`;
    otherwise the gradient of the bag is added up by atomics there.
    Cost: reads 4 B M rows forward and, for the gradient of the points, once more backward; 8 B M D
    operations forward and 8 for each gradient. The gradient of the bag is [T, D], in fp32 until it
    is rounded.
    vmap: by the fallback of torch, one call per sample; batch through the grid.

    Example:
        >>> from survfuse.ops import grid_index
        >>> bag, corner = torch.tensor([[1.0], [3.0]]), torch.tensor([[0, 0], [256, 0]])
        >>> grid = grid_index(corner, patch_size=256)
        >>> sample_bag(bag, grid, torch.tensor([[[[0.5, 0.0], [1.5, 0.0]]]])).flatten()
        tensor([2.0000, 1.5000])
    """
    _check(bag, grid, points, corners)
    check_sampling_backend(backend)
    if backend == "reference":
        if not torch.compiler.is_compiling():
            _check_values(bag, grid)
        return call_reference(reference.sample_bag, bag, grid, points, corners=corners)
    return call_op("sample_bag", _forward, bag, *grid, points, corners == "renormalise")


def check_sampling_backend(backend: str | None) -> Selection:
    """The backend of a call; raises unless `backend` can serve it."""
    check_backend(backend)
    if backend in ("native", "triton"):
        raise RuntimeError(
            f"backend={backend!r} cannot serve this call: only None, "
            '"reference" and "tiled" implement sample_bag'
        )
    if backend is None:
        return Selection("tiled", "its only implementation beside the reference")
    return Selection(backend, "asked for")


def _check(bag: Tensor, grid: GridIndex, points: Tensor, corners: str) -> None:
    if not isinstance(bag, Tensor):
        raise TypeError(f"bag is {type(bag).__name__}; it must be a tensor")
    check_tensor("bag", bag, shape=("T", "D"), device=bag.device)
    check_grid(grid, bag.device)
    if not isinstance(points, Tensor):
        raise TypeError(f"points is {type(points).__name__}; it must be a tensor")
    check_coordinates("points", points, bag, "bag")
    check_tensor("points", points, shape=(grid.n_bags, "G", "M", 2), device=bag.device)
    n_groups = points.shape[1]
    if n_groups == 0 or bag.shape[1] == 0 or bag.shape[1] % n_groups:
        raise ValueError(
            f"points has {n_groups} groups and bag {bag.shape[1]} features; the first must divide "
            "the second"
        )
    check_corners(corners)


def check_corners(corners: str) -> None:
    """Raise unless `corners` says what cells without tissue count as."""
    if corners not in ("zero", "renormalise"):
        raise ValueError(f'corners is {corners!r}; it must be "zero" or "renormalise"')


def check_grid(grid: GridIndex, device: torch.device, beside: str = "the bag") -> None:
    """Raise unless `grid` is one whose tensors have their types and shapes and lie on `device`."""
    if not isinstance(grid, GridIndex):
        raise TypeError(f"grid is {type(grid).__name__}; it must be a survfuse.grid.GridIndex")
    place = (device, beside)
    _check_grid_tensor("index", grid.index, torch.int32, ("cells",), *place)
    _check_grid_tensor("shapes", grid.shapes, torch.int64, ("B", 2), *place)
    _check_grid_tensor("cell_offsets", grid.cell_offsets, torch.int64, (grid.n_bags + 1,), *place)


def _check_grid_tensor(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: tuple[int | str, ...],
    device: torch.device,
    beside: str,
) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"grid.{name} is {type(tensor).__name__}; it must be a tensor")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or have == want
        for have, want in zip(tensor.shape, shape, strict=True)
    )
    if tensor.dtype != dtype or not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"grid.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; it must be {dtype} "
            f"[{wanted}]"
        )
    if tensor.device != device:
        raise ValueError(
            f"grid.{name} is on {tensor.device} and {beside} on {device}; GridIndex.to moves it"
        )


def _check_values(bag: Tensor, grid: GridIndex) -> None:
    """On the CPU, raise unless the grid fits the bag; on a device what lies outside is empty."""
    if bag.device.type == "cpu":
        grid.check(bag.shape[0])


_INPUTS = (
    "Tensor bag, Tensor index, Tensor cell_offsets, Tensor shapes, Tensor points, bool renormalise"
)


@torch.library.custom_op("survfuse::sample_bag", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
@without_autocast
def _forward(bag, index, cell_offsets, shapes, points, renormalise):
    grid = GridIndex(index, cell_offsets, shapes)
    _check_values(bag, grid)
    return sample_bag_forward(unit_stride(bag), grid, points, renormalise)


@_forward.register_fake
def _(bag, index, cell_offsets, shapes, points, renormalise):
    return bag.new_empty((*points.shape[:3], bag.shape[1] // points.shape[1]))


@torch.library.custom_op(
    "survfuse::sample_bag_backward",
    mutates_args=(),
    schema=f"(Tensor d_samples, {_INPUTS}, bool needs_bag, bool needs_points) -> (Tensor, Tensor)",
)
@without_autocast
def _backward(d_samples, bag, index, cell_offsets, shapes, points, renormalise, *needs):
    gradients = sample_bag_backward(
        d_samples,
        unit_stride(bag),
        GridIndex(index, cell_offsets, shapes),
        points,
        renormalise,
        *needs,
    )
    return gradients_like(gradients, (bag, points))


@_backward.register_fake
def _(d_samples, bag, index, cell_offsets, shapes, points, renormalise, *needs):
    return fake_gradients((bag, points), needs)


def _save(ctx, inputs, output):
    save_call(ctx, inputs)


def _differentiate(ctx, d_samples):
    _, inputs = saved_call(ctx)
    needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[4])
    d_bag, d_points = to_autograd(
        call_op("sample_bag", _backward, d_samples, *inputs, *needs), needs, 2
    )
    return d_bag, None, None, None, d_points, None


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(no_double_backward("sample_bag"))


@flop_formula(torch.ops.survfuse.sample_bag)
def _forward_flops(bag, index, cell_offsets, shapes, points, *rest, **_) -> int:
    n_bags, _, n_points, _ = points
    return 8 * n_bags * n_points * bag[1]


@flop_formula(torch.ops.survfuse.sample_bag_backward)
def _backward_flops(d_samples, bag, index, offsets, shapes, points, *rest, **_) -> int:
    n_bags, _, n_points, _ = points
    return 8 * n_bags * n_points * bag[1] * sum(rest[1:])
