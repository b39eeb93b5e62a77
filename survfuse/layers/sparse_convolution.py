"""A strided depthwise convolution over the patches of sparse maps, which stay sparse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from survfuse.grid import GridIndex
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged


class CoarseCells(NamedTuple):
    """The P cells of coarser maps that hold tissue, bag by bag, each row by row."""

    places: Tensor  # [P, 2] (x, y) in coarse cells
    neighbours: Tensor  # [P, K * K] packed patches under the kernel, row by row; -1 is no tissue
    ragged: Ragged  # the coarse cells of each bag


# whole numbers whose count is read, nothing that a compiler could make faster
@torch.compiler.disable
def coarse_cells(
    grid: GridIndex, cells: Tensor, ragged: Ragged, *, stride: int, kernel_size: int
) -> CoarseCells:
    """The cells of `stride` x `stride` patches that hold any, and what a kernel around them sees.

    The kernel reaches `(kernel_size - stride) / 2` beyond its cell on every side. Waits for the
    device, since how many cells hold tissue decides the sizes of all that follows.

    Args:
        grid: the maps of B bags.
        cells: [total, 2] (x, y) of each packed patch, from `grid.cells`.
        ragged: the ranges that the grid was made for.
        stride: patches along each side of a coarse cell.
        kernel_size: patches along each side of the kernel.
    """
    device, n_bags = grid.index.device, ragged.n_bags
    reach = (kernel_size - stride) // 2
    bag = ragged.bags()
    # a number for every coarse cell of every bag, row by row
    coarse_shapes = (grid.shapes + stride - 1) // stride
    n_coarse = coarse_shapes.prod(1)
    ends = n_coarse.cumsum(0)
    x, y = (cells // stride).unbind(1)
    held = ((ends - n_coarse)[bag] + y * coarse_shapes[bag, 1] + x).unique()
    owner = torch.searchsorted(ends, held, right=True)
    within, width = held - (ends - n_coarse)[owner], coarse_shapes[owner, 1]
    places = torch.stack([within % width, within // width], 1)
    counts = torch.bincount(owner, minlength=n_bags)
    # the cells under the kernel at each of them
    tap = torch.arange(kernel_size, device=device)
    seen = places[:, None] * stride - reach + torch.stack([tap, tap], 1)  # [P, K, 2]
    columns, rows = seen[:, None, :, 0], seen[:, :, None, 1]
    high, wide = (size[:, None, None] for size in grid.shapes[owner].unbind(1))
    inside = (columns >= 0) & (columns < wide) & (rows >= 0) & (rows < high)
    cell = grid.cell_offsets[owner][:, None, None] + rows * wide + columns
    shown = grid.index[torch.where(inside, cell, 0)].long() if held.numel() else cell
    # from rows of the matrix to packed patches
    moved = (ragged.packed().starts - ragged.starts)[owner][:, None, None]
    neighbours = torch.where(inside & (shown >= 0), shown + moved, -1).flatten(1)
    return CoarseCells(places, neighbours, Ragged.from_lengths(counts))


def convolve_patches(
    patches: Tensor, neighbours: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A depthwise convolution at P places, read through the rows of its neighbours.

    Args:
        patches: [N, G, C]; the G groups share one kernel.
        neighbours: [P, K] rows of patches, -1 for none; no row twice in a column.
        weight: [C, K].
        bias: [C] or None.

    Returns:
        [P, G, C] of the type of `patches`. Sums are fp32 (fp64). Beside it and the gradients
        memory for P G C numbers is used, whatever K. No double backward.
    """
    return _Convolution.apply(patches, neighbours, weight, bias)


class _Convolution(torch.autograd.Function):
    """One tap of the kernel after the other, backward too: no [P, K, G, C] is ever held."""

    @staticmethod
    def forward(ctx, patches, neighbours, weight, bias):
        ctx.save_for_backward(patches, neighbours, weight)
        kind = accumulation_type(patches.dtype)
        out = patches.new_zeros((neighbours.shape[0], *patches.shape[1:]), dtype=kind)
        for tap, rows in enumerate(neighbours.unbind(1)):
            out += _taken(patches, rows, kind) * weight[:, tap].to(kind)
        if bias is not None:
            out += bias.to(kind)
        return out.to(patches.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        patches, neighbours, weight = ctx.saved_tensors
        kind = accumulation_type(patches.dtype)
        d_out = d_out.to(kind)
        needs_patches, _, needs_weight, needs_bias = ctx.needs_input_grad
        d_patches = torch.zeros_like(patches, dtype=kind) if needs_patches else None
        d_weight = torch.zeros_like(weight, dtype=kind) if needs_weight else None
        for tap, rows in enumerate(neighbours.unbind(1)):
            if d_patches is not None:
                part = torch.where(_present(rows), d_out * weight[:, tap].to(kind), 0.0)
                d_patches.index_add_(0, rows.clamp(min=0), part)
            if d_weight is not None:
                d_weight[:, tap] = (_taken(patches, rows, kind) * d_out).sum((0, 1))
        d_bias = d_out.sum((0, 1)).to(weight.dtype) if needs_bias else None
        return (
            None if d_patches is None else d_patches.to(patches.dtype),
            None,
            None if d_weight is None else d_weight.to(weight.dtype),
            d_bias,
        )


def _present(rows: Tensor) -> Tensor:
    return (rows >= 0)[:, None, None]


def _taken(patches: Tensor, rows: Tensor, kind: torch.dtype) -> Tensor:
    """[P, G, C] of the accumulation type; zeros where there is no row."""
    if patches.shape[0] == 0:
        return patches.new_zeros((rows.shape[0], *patches.shape[1:]), dtype=kind)
    return torch.where(_present(rows), patches[rows.clamp(min=0)].to(kind), 0.0)
