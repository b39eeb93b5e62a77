"""What `DeformableCrossAttention` is put together from: projections, positions, checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from survfuse.grid import GridIndex
from survfuse.layers.sparse_convolution import CoarseCells
from survfuse.ops import sample_bag
from survfuse.ops.backends import check_backend, plain_backend
from survfuse.ops.checks import (
    check_dropout,
    check_dtype,
    check_integer,
    check_layer_input,
    check_number,
    check_size,
    check_tensor,
)
from survfuse.ops.position_bias import check_bias
from survfuse.ops.sample_bag import check_corners, check_grid
from survfuse.ragged import Ragged, check_ragged


class DeformableAttended(NamedTuple):
    """What `DeformableCrossAttention` returns.

    Attributes:
        tokens: [B, h w, dim], or packed [total, dim] for ragged bags.
        points: where each group sampled: [B, G, M, 2], or packed [P, G, 2]; (x, y) in cells of the
            coarse grid, base grid included. fp32 (fp64).
        point_ragged: the points of each ragged bag; None for dense maps.
        offsets: the points without the base grid, of the same shape.
    """

    tokens: Tensor
    points: Tensor
    point_ragged: Ragged | None
    offsets: Tensor


class PositionMLP(nn.Module):
    """The parameters of the MLP of offsets, under their released names."""

    def __init__(self, width: int, n_out: int, **kind) -> None:
        super().__init__()
        self.mlp = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(2, width, **kind), nn.ReLU()),
                nn.Sequential(nn.Linear(width, width, **kind), nn.ReLU()),
                nn.Linear(width, n_out, **kind),
            ]
        )

    def layers(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(weight, bias) of each layer, as `position_biased_attention` takes them."""
        layers = (self.mlp[0][0], self.mlp[1][0], self.mlp[2])
        return tuple((layer.weight, layer.bias) for layer in layers)


def project(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1 x 1 convolution of tokens [..., channels], which lie as no map."""
    if convolution.groups == 1:
        return linear(x, convolution.weight.flatten(1), convolution.bias)
    return project_groups(convolution, x.unflatten(-1, (convolution.groups, -1)))


def project_groups(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """The same of tokens [..., groups, channels / groups]."""
    if convolution.groups == 1:
        return linear(x.flatten(-2), convolution.weight.flatten(1), convolution.bias)
    weight = convolution.weight.flatten(1).unflatten(0, (convolution.groups, -1))
    return torch.einsum("...gi,goi->...go", x, weight).flatten(-2)


def places(height: int, width: int, device: torch.device) -> Tensor:
    """(x, y) of the cells of a map, row by row: [height * width, 2] int64."""
    cell = torch.arange(height * width, device=device)
    return torch.stack([cell % width, cell // width], 1)


def normalise(at: Tensor, size: tuple[int, int]) -> Tensor:
    """(x, y) in cells of a map of `size` (width, height), so that it reaches from -1 to 1."""
    x, y = at.unbind(-1)
    return torch.stack(
        [2.0 * x / max(size[0] - 1, 1) - 1.0, 2.0 * y / max(size[1] - 1, 1) - 1.0], -1
    )


def normalised_places(
    grid: GridIndex, cells: Tensor, place: Tensor, ragged: Ragged, points: Ragged
) -> tuple[Tensor, Tensor]:
    """Patches [total, 2] and points [P, G, 2] so that each bag's map reaches from -1 to 1.

    Args:
        grid: the maps.
        cells: [total, 2] (x, y) of each packed patch.
        place: [P, G, 2] of each point, in the same cells.
        ragged, points: the patches and the points of each bag.
    """
    # (width, height) of every bag, no map narrower than two cells
    size = (grid.shapes.flip(1) - 1).clamp(min=1).to(place.dtype)
    query_pos = 2.0 * cells.to(place.dtype) / ragged.per_patch(size) - 1.0
    return query_pos, 2.0 * place / points.per_patch(size)[:, None] - 1.0


@torch.compiler.disable
def equal_counts(points: Ragged) -> list[tuple[Tensor, int]]:
    """Bags that have equally many points, and how many; those without any are left out.

    Waits for the device.
    """
    counts: dict[int, list[int]] = {}
    for bag, count in enumerate(points.lengths.tolist()):
        if count:
            counts.setdefault(count, []).append(bag)
    device = points.lengths.device
    return [(torch.tensor(bags, device=device), count) for count, bags in counts.items()]


def attend_ragged(
    attend: Callable[..., Tensor], sides: tuple[Tensor, ...], ragged: Ragged, points: Ragged
) -> Tensor:
    """[total, H dv] of packed sides, all bags with equally many points at once.

    Args:
        attend: (q, key, value, query_pos, key_pos, ragged) to packed results; key, value and
            key_pos [B, M, ...], [B, G, M, 2], the others as they are packed.
        sides: q [total, H d], key [P, H d], value [P, H dv], query_pos [total, 2] and key_pos
            [P, G, 2].
        ragged, points: ranges of the patches and of the points of each bag.
    """
    q, key, value, query_pos, key_pos = sides
    outs, rows = [], []
    for bags, count in equal_counts(points):
        at = points.starts[bags, None] + torch.arange(count, device=q.device)
        some = Ragged.from_ranges(ragged.starts[bags], ragged.lengths[bags])
        outs.append(attend(q, key[at], value[at], query_pos, key_pos[at].transpose(1, 2), some))
        rows.append(some.rows())
    if not outs:
        # nothing attends, and all gradients are zeros rather than None
        nobody = key_pos.new_zeros((1, key_pos.shape[1], 0, 2))
        return attend(q[None], key[None], value[None], query_pos[None], nobody)[0]
    if len(outs) == 1 and outs[0].shape[0] == q.shape[0]:
        return outs[0]
    out = torch.cat(outs)
    return out.new_zeros(q.shape[0], out.shape[1]).index_copy(0, torch.cat(rows), out)


def sample_dense(
    rows: Tensor, grid: GridIndex, place: Tensor, corners: str, backend: str | None
) -> Tensor:
    """Samples [B, M, G, C / G] of maps [B, h w, C] at places [B, G, M, 2]."""
    return _sample(rows.flatten(0, 1), grid, place, corners, backend).transpose(1, 2)


def sample_ragged(
    rows: Tensor,
    grid: GridIndex,
    coarse: CoarseCells,
    place: Tensor,
    corners: str,
    backend: str | None,
) -> Tensor:
    """Samples [P, G, C / G] of packed bags [T, C] at places [P, G, 2], all bags at once.

    Bags are filled up to the most points with NaN, which is sampled as nothing: one call has one
    gradient of the rows, where one call per bag would have as many, each [T, C].
    """
    bag, within = coarse.ragged.bags(), coarse.ragged.places()
    shape = (grid.n_bags, coarse.ragged.max_length, *place.shape[1:])
    padded = place.new_full(shape, torch.nan).index_put((bag, within), place)
    return _sample(rows, grid, padded.transpose(1, 2), corners, backend)[bag, :, within]


def _sample(
    rows: Tensor, grid: GridIndex, place: Tensor, corners: str, backend: str | None
) -> Tensor:
    # other named backends are those of the attention
    backend = plain_backend(backend)
    return sample_bag(rows, grid, place, corners=corners, backend=backend)


def sampled_cells(points: Tensor, stride: int, released: tuple[int, int] | None) -> Tensor:
    """(x, y) in patches of points in coarse cells; `released` is the shape of such a map."""
    if released is None:
        # the centre of a coarse cell is that of its patches
        return points * stride + (stride - 1) / 2
    height, width = released
    x, y = points.unbind(-1)
    x = x * (width / max(height // stride - 1, 1))
    y = y * (height / max(width // stride - 1, 1))
    return torch.stack([x, y], -1) - 0.5


def check_released(shape: tuple[int, int] | None, downsample: int) -> None:
    """Raise unless the released arithmetic can take the call: a dense map of some size."""
    if shape is None:
        raise ValueError(
            "grid is given and released=True; the released arithmetic is one of dense maps"
        )
    if min(shape) < downsample:
        raise ValueError(
            f"shape is {tuple(shape)}; released=True needs at least downsample = {downsample} "
            "patches along each side"
        )


def full_grid(n_bags: int, height: int, width: int, device: torch.device) -> GridIndex:
    """The grids of dense maps whose patches lie one behind the other."""
    n_cells = height * width
    cell = torch.arange(n_bags * n_cells, dtype=torch.int32, device=device)
    first = torch.arange(n_bags + 1, device=device) * n_cells
    return GridIndex(cell, first, first.new_tensor([height, width]).expand(n_bags, 2))


def check_points(points: Tensor) -> None:
    """Raise unless these are points of a plane."""
    if not isinstance(points, Tensor):
        raise TypeError(f"points is {type(points).__name__}; it must be a tensor")
    if points.shape[-1:] != (2,):
        raise ValueError(f"points has shape {tuple(points.shape)}; it must be [..., 2]")


def check_sizes(
    dim: int, heads: int, dim_head: int, groups: int, downsample: int, kernel_size: int
) -> None:
    """Raise unless the sizes of a layer fit each other."""
    for name, value in (
        ("dim", dim),
        ("heads", heads),
        ("dim_head", dim_head),
        ("offset_groups", groups),
        ("downsample", downsample),
        ("kernel_size", kernel_size),
    ):
        check_size(name, value)
    if heads % groups or dim % groups:
        raise ValueError(
            f"offset_groups is {groups}; it must divide heads, {heads}, and dim, {dim}"
        )
    if dim < 4:
        raise ValueError(f"dim is {dim}; the MLP of positions has dim // 4 units and needs one")
    if kernel_size < downsample or (kernel_size - downsample) % 2:
        raise ValueError(
            f"kernel_size is {kernel_size} and downsample {downsample}; the first must be the "
            "second or an even number more, so that kernels are centred on coarse cells"
        )


def check_options(
    offset_scale: float,
    dropout: float,
    bias: str,
    table_size: int,
    corners: str,
    backend: str | None,
    dtype: torch.dtype | None,
) -> None:
    """Raise unless these can be the options of a layer."""
    check_number("offset_scale", offset_scale)
    if not 0.0 <= offset_scale < math.inf:
        raise ValueError(f"offset_scale is {offset_scale}; it must be at least 0 and finite")
    check_dropout(dropout, "dropout")
    check_bias(bias, table_size, None)
    check_corners(corners)
    check_backend(backend)
    check_dtype(dtype)


def check_inputs(
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    shape: tuple[int, int] | None,
    grid: GridIndex | None,
    ragged: Ragged | None,
) -> None:
    """Raise unless the inputs of a call are dense maps with a shape, or packed bags with a grid.

    `weight` [dim, inner, 1, 1] is one of the layer, whose type and device they share.
    """
    if (shape is None) == (grid is None):
        given = "neither" if shape is None else "both"
        raise ValueError(
            f"of shape and grid {given} is given; dense maps come with shape=(h, w), packed bags "
            "with grid="
        )
    wanted = ("B", "h w", weight.shape[0]) if grid is None else ("T", weight.shape[0])
    check_layer_input("query", query, shape=wanted, weight=weight)
    check_tensor("context", context, shape=wanted, device=weight.device, beside="the layer")
    if context.shape != query.shape or context.dtype != query.dtype:
        raise ValueError(
            f"context is {context.dtype} of shape {tuple(context.shape)} and query {query.dtype} "
            f"of shape {tuple(query.shape)}; they must be alike, since they lie on the same maps"
        )
    if grid is None:
        _check_dense(query, shape, ragged)
        return
    check_grid(grid, query.device, "the query")
    if ragged is not None:
        check_ragged("ragged", ragged, "query", query.device, grid.n_bags)
    elif grid.n_bags != 1:
        raise ValueError(f"grid has {grid.n_bags} bags; ragged must say which rows they are")
    _check_rows(query.shape[0], grid, ragged, query.device)


# compiled, every number that is read would end a graph
@torch.compiler.disable
def _check_rows(n_rows: int, grid: GridIndex, ragged: Ragged | None, device: torch.device) -> None:
    if ragged is not None:
        ragged.check(n_rows)
    if device.type == "cpu":
        grid.check(n_rows)


def check_map(shape: tuple[int, int]) -> None:
    """Raise unless `shape` is the (height, width) of a map."""
    if not isinstance(shape, tuple | list) or len(shape) != 2:
        raise TypeError(f"shape is {shape!r}; it must be (height, width)")
    for name, side in zip(("height", "width"), shape, strict=True):
        check_integer(f"{name} of shape", side)


def _check_dense(query: Tensor, shape: tuple[int, int], ragged: Ragged | None) -> None:
    if ragged is not None:
        raise ValueError("ragged is given beside shape; dense maps are of one length")
    check_map(shape)
    if min(shape) < 1 or shape[0] * shape[1] != query.shape[1]:
        raise ValueError(
            f"shape is {tuple(shape)} and query has {query.shape[1]} tokens; it must be "
            "(height, width) of the map they fill"
        )
