"""`DeformableCrossAttention`: patches attend to points of a slide that they choose themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.grid import GridIndex
from survfuse.layers.deformable_parts import (
    DeformableAttended,
    PositionMLP,
    attend_ragged,
    check_inputs,
    check_map,
    check_options,
    check_points,
    check_released,
    check_sizes,
    full_grid,
    normalise,
    normalised_places,
    places,
    project,
    project_groups,
    sample_dense,
    sample_ragged,
    sampled_cells,
)
from survfuse.layers.deformable_released import read_released
from survfuse.layers.sparse_convolution import coarse_cells, convolve_patches
from survfuse.ops import position_biased_attention
from survfuse.ops.checks import check_size
from survfuse.ops.registration import autocast_off
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged, in_batch_order


class DeformableCrossAttention(nn.Module):
    """Cross-attention of the tokens of a map to a few points of another, chosen by the tokens.

    Each of G groups of channels predicts, from the queries, one offset for every cell of a grid
    that is `downsample` times coarser. The context is sampled there, between its patches. These M
    samples are the keys and values of the heads of that group, with a small MLP of the distance
    between query and sample added to the logits. All pairs of that MLP are never held.

    Maps are dense, or ragged bags of patches at their true places (`grid`), of any outline and
    size. A coarse cell of a sparse map predicts a point if it holds a patch, so M grows with the
    tissue: `downsample=16` gives a slide of 100,000 patches some 400 points, and 4, the released
    value, some 6,000; there `bias="table"` is what keeps the MLP affordable. So it does for `dim`
    beyond 256: the MLP has `dim // 4` units and kernels serve 64, so that plain torch computes a
    wider one for every pair, many times slower.

    `torch.compile(fullgraph=True)` takes dense maps only: for ragged bags the host reads how many
    points they have, which breaks the graph.

    Args:
        dim: width of the queries, the context and the result.
        heads: number of heads H.
        dim_head: width of a head.
        offset_groups: groups G, which divide `heads` and `dim`; None is one per head.
        downsample: patches along each side of a coarse cell.
        offset_scale: the largest offset along an axis, in coarse cells; None is `downsample`.
        kernel_size: of the convolution that predicts offsets: `downsample` or an even number more;
            None is `downsample + 2`.
        group_queries, group_key_values: project each group of channels by itself.
        dropout: probability with which a weight of the attention is dropped in training.
        bias, table_size: as in `survfuse.ops.position_biased_attention`.
        corners: as in `survfuse.ops.sample_bag`.
        released: compute what the public code of Subspace fusion does, on dense maps: points are
            scaled to the map by its other axis and to its outer edges, which puts half of what lies
            at the border on zeros; keys are placed on the coarse grid's own extent for the bias;
            patches that fill no coarse cell predict no point.
        backend: of the attention, and "reference" of the sampling too; None for the fastest.
        device, dtype: of the parameters.

    Source: Zhang et al., "Knowledge-driven subspace fusion and gradient coordination for
    multi-modal learning", MICCAI 2024, in its public code, which follows Xia et al., "Vision
    transformer with deformable attention", CVPR 2022.

    Example:
        >>> layer = DeformableCrossAttention(16, heads=2, dim_head=8)
        >>> fused, patches = torch.randn(1, 12 * 9, 16), torch.randn(1, 12 * 9, 16)
        >>> out = layer(fused, patches, shape=(12, 9))
        >>> out.tokens.shape, out.points.shape
        (torch.Size([1, 108, 16]), torch.Size([1, 2, 9, 2]))

        A slide of three patches, two of them in one coarse cell:

        >>> from survfuse.ops import grid_index
        >>> grid = grid_index(torch.tensor([[0, 0], [256, 0], [2048, 0]]), patch_size=256)
        >>> out = layer(torch.randn(3, 16), torch.randn(3, 16), grid=grid)
        >>> out.tokens.shape, out.points.shape
        (torch.Size([3, 16]), torch.Size([2, 2, 2]))
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        dim_head: int = 64,
        offset_groups: int | None = None,
        downsample: int = 4,
        offset_scale: float | None = None,
        kernel_size: int | None = None,
        group_queries: bool = True,
        group_key_values: bool = True,
        dropout: float = 0.0,
        bias: str = "exact",
        table_size: int = 256,
        corners: str = "zero",
        released: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        groups = heads if offset_groups is None else offset_groups
        check_size("downsample", downsample)
        kernel_size = downsample + 2 if kernel_size is None else kernel_size
        check_sizes(dim, heads, dim_head, groups, downsample, kernel_size)
        offset_scale = downsample if offset_scale is None else offset_scale
        check_options(offset_scale, dropout, bias, table_size, corners, backend, dtype)
        self.dim, self.heads, self.dim_head, self.offset_groups = dim, heads, dim_head, groups
        self.downsample, self.kernel_size = downsample, kernel_size
        self.offset_scale = float(offset_scale)
        self.dropout, self.bias, self.table_size = dropout, bias, table_size
        self.corners, self.released, self.backend = corners, released, backend
        inner, kind = heads * dim_head, {"device": device, "dtype": dtype}
        per_group, reach = inner // groups, (kernel_size - downsample) // 2
        query_groups = groups if group_queries else 1
        key_groups = groups if group_key_values else 1
        # names, shapes and initialisation of the released module, so that weights load both ways
        self.to_offsets = nn.Sequential(
            nn.Conv2d(
                per_group,
                per_group,
                kernel_size,
                stride=downsample,
                padding=reach,
                groups=per_group,
                **kind,
            ),
            nn.GELU(),
            nn.Conv2d(per_group, 2, 1, bias=False, **kind),
        )
        self.rel_pos_bias = PositionMLP(dim // 4, heads // groups, **kind)
        self.to_q = nn.Conv2d(dim, inner, 1, groups=query_groups, bias=False, **kind)
        self.to_k = nn.Conv2d(dim, inner, 1, groups=key_groups, bias=False, **kind)
        self.to_v = nn.Conv2d(dim, inner, 1, groups=key_groups, bias=False, **kind)
        self.to_out = nn.Conv2d(inner, dim, 1, **kind)

    @classmethod
    def from_released(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        prefix: str = "",
        downsample: int = 4,
        offset_scale: float | None = None,
        dropout: float = 0.0,
        bias: str = "exact",
        table_size: int = 256,
        corners: str = "zero",
        released: bool = True,
        backend: str | None = None,
    ) -> DeformableCrossAttention:
        """The layer with the weights of a released module; sizes are read off them.

        Args:
            state_dict: of the released `DeformCrossAttention2D`, or of a model that holds one.
            prefix: in front of its names in that model, with the dot.
            downsample, offset_scale, dropout: as its constructor had them.
            bias, table_size, corners, released, backend: as in the constructor.

        Raises:
            TypeError: `state_dict` is no mapping, or an entry no floating tensor; it is named.
            ValueError: an entry is missing, unknown or of a shape that fits no layer; it is named.
        """
        state, sizes = read_released(state_dict, prefix)
        layer = cls(
            **sizes,
            downsample=downsample,
            offset_scale=offset_scale,
            dropout=dropout,
            bias=bias,
            table_size=table_size,
            corners=corners,
            released=released,
            backend=backend,
            device=state["to_out.weight"].device,
            dtype=state["to_out.weight"].dtype,
        )
        for name, parameter in layer.named_parameters():
            if parameter.shape != state[name].shape:
                raise ValueError(
                    f"state_dict entry {prefix + name!r} has shape {tuple(state[name].shape)}; "
                    f"beside the others it must be {tuple(parameter.shape)}"
                )
        layer.load_state_dict(state)
        return layer

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        *,
        shape: tuple[int, int] | None = None,
        grid: GridIndex | None = None,
        ragged: Ragged | None = None,
    ) -> DeformableAttended:
        """Attention of the tokens of maps to sampled points of the context on the same maps.

        Args:
            query: [B, h w, dim] dense, row by row; or packed [T, dim] beside `grid`.
            context: of the same shape and type.
            shape: (h, w) of dense maps.
            grid: the cells of the patches of packed bags, from `survfuse.ops.grid_index`, one patch
                per cell and one cell per patch.
            ragged: the ranges of rows that the grid was made for; None is one bag of all rows.

        Returns:
            DeformableAttended(tokens, points, point_ragged, offsets). Bags differ in the number of
            their points: the attention of those with equally many is computed at once.
            The host waits for the device to learn those numbers.

        Raises:
            TypeError, ValueError: an argument has the wrong type or shape, or does not go with the
                others; it is named.
        """
        check_inputs(query, context, self.to_out.weight, shape, grid, ragged)
        out, *where = self._call(query, context, shape, grid, ragged)
        return DeformableAttended(project(self.to_out, out), *where)

    @torch.no_grad()
    def received(
        self,
        query: Tensor,
        context: Tensor,
        *,
        shape: tuple[int, int] | None = None,
        grid: GridIndex | None = None,
        ragged: Ragged | None = None,
    ) -> Tensor:
        """How much attention each patch of the context receives, without dropout.

        The weight that tokens give to a point goes to the patches around it, in the shares in which
        bilinear sampling reads them; what lies on no patch is lost, so that a bag sums to 1 at
        most. Pairs are never held: weights are the gradient of what they sum. Arguments and errors
        are those of `forward`.

        Returns:
            [B, h w] for dense maps, else [T]: means over the tokens of a bag and the heads, and
            where bags share a row, the sum over the bags.
        """
        check_inputs(query, context, self.to_out.weight, shape, grid, ragged)
        with torch.enable_grad():
            # one channel per group of points, since each samples at places of its own
            shares = query.new_zeros((*query.shape[:-1], self.offset_groups), requires_grad=True)
            out, *_ = self._call(query.detach(), context.detach(), shape, grid, ragged, shares)
            lengths: int | Tensor = out.shape[-2]
            if ragged is not None:
                lengths = ragged.per_patch(ragged.lengths)[:, None]
            weights = torch.ones_like(out) / (self.heads * lengths)
            (received,) = torch.autograd.grad(out, shares, weights)
        return received.sum(-1)

    def sampled_cells(self, points: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Where points lie on the map: (x, y) in patches, as `survfuse.ops.sample_bag` counts.

        Args:
            points: [..., 2] as the layer returns them.
            shape: (h, w) of the dense map; only `released` layers need it.

        Raises:
            TypeError, ValueError: `points` has the wrong type or shape, or no `shape` is given.
        """
        check_points(points)
        if self.released:
            check_map(shape)
        return sampled_cells(points, self.downsample, shape if self.released else None)

    def _call(
        self,
        query: Tensor,
        context: Tensor,
        shape: tuple[int, int] | None,
        grid: GridIndex | None,
        ragged: Ragged | None,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Ragged | None, Tensor]:
        """What heads put out, points, their ranges, offsets; values are `shares` if given."""
        if self.released:
            check_released(shape, self.downsample)
        if grid is None:
            return self._dense(query, context, *shape, shares)
        if ragged is None:
            ragged = Ragged.from_lengths([query.shape[0]], device=query.device)
        return self._sparse(query, context, grid, ragged, shares)

    def _dense(
        self, query: Tensor, context: Tensor, height: int, width: int, shares: Tensor | None
    ) -> tuple[Tensor, Tensor, None, Tensor]:
        n_bags = query.shape[0]
        q = project(self.to_q, query)
        maps = q.unflatten(2, (self.offset_groups, -1)).permute(0, 2, 3, 1)
        maps = maps.reshape(n_bags * self.offset_groups, maps.shape[2], height, width)
        if not self.released:
            # patches that fill no coarse cell get one all the same
            beyond = (0, -width % self.downsample, 0, -height % self.downsample)
            maps = functional.pad(maps, beyond)
        hidden = self.to_offsets[0](maps)
        rows, columns = hidden.shape[2:]
        hidden = hidden.flatten(2).mT.unflatten(0, (n_bags, self.offset_groups))
        offsets = self._offsets(hidden)
        points = places(rows, columns, hidden.device) + offsets

        grid = full_grid(n_bags, height, width, query.device)
        place = self.sampled_cells(points, (height, width))
        key, value = self._key_value(
            context,
            shares,
            lambda rows: sample_dense(rows, grid, place, self.corners, self.backend),
        )
        cells = places(height, width, query.device)
        if self.released:
            query_pos = normalise(cells.to(points.dtype), (height, width))
            key_pos = normalise(points, (rows, columns))
        else:
            query_pos, key_pos = (
                normalise(at, (width, height)) for at in (cells.to(points.dtype), place)
            )
        dropped = self.training and shares is None
        return (
            self._attend(q, key, value, query_pos, key_pos, dropped=dropped),
            points,
            None,
            offsets,
        )

    def _sparse(
        self,
        query: Tensor,
        context: Tensor,
        grid: GridIndex,
        ragged: Ragged,
        shares: Tensor | None,
    ) -> tuple[Tensor, Tensor, Ragged, Tensor]:
        cells = grid.cells(ragged)
        if bool((cells < 0).any()):
            at = int((cells < 0).any(1).nonzero()[0])
            raise ValueError(
                f"grid shows no cell of packed patch {at}; every patch needs a cell of its own. "
                'Leave out the patches that duplicates="first" dropped, and give the ragged that '
                "the grid was made for"
            )
        coarse = coarse_cells(
            grid, cells, ragged, stride=self.downsample, kernel_size=self.kernel_size
        )
        q = project(self.to_q, in_batch_order(query, ragged, may_wait=True)[0])
        convolution = self.to_offsets[0]
        hidden = convolve_patches(
            q.unflatten(1, (self.offset_groups, -1)),
            coarse.neighbours,
            convolution.weight.flatten(1),
            convolution.bias,
        )
        offsets = self._offsets(hidden)
        points = coarse.places[:, None] + offsets
        place = self.sampled_cells(points)
        key, value = self._key_value(
            context,
            shares,
            lambda rows: sample_ragged(rows, grid, coarse, place, self.corners, self.backend),
        )

        query_pos, key_pos = normalised_places(grid, cells, place, ragged, coarse.ragged)
        sides = (q, key, value, query_pos, key_pos)
        dropped = self.training and shares is None
        out = attend_ragged(
            partial(self._attend, dropped=dropped), sides, ragged.packed(), coarse.ragged
        )
        return out, points, coarse.ragged, offsets

    def _offsets(self, hidden: Tensor) -> Tensor:
        """Offsets [..., 2] in coarse cells from what the convolution gave, [..., C]."""
        kind = accumulation_type(hidden.dtype)
        # 16 bits would move a point by whole patches, far from the map's corner
        with autocast_off(hidden.device):
            hidden = self.to_offsets[1](hidden.to(kind))
            out = functional.linear(hidden, self.to_offsets[2].weight.flatten(1).to(kind))
            return torch.tanh(out) * self.offset_scale

    def _key_value(
        self, context: Tensor, shares: Tensor | None, sample: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Projected samples of the context; or in place of the values those of shares, by head."""
        samples = sample(context)
        key = project_groups(self.to_k, samples)
        if shares is None:
            return key, project_groups(self.to_v, samples)
        shared = sample(shares)  # [..., G, 1]
        each = (*shared.shape[:-1], self.heads // self.offset_groups)
        return key, shared.expand(each).flatten(-2)

    def _attend(
        self,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        query_pos: Tensor,
        key_pos: Tensor,
        ragged: Ragged | None = None,
        *,
        dropped: bool,
    ) -> Tensor:
        """[B, Lq, H dv] of projected [B, Lq, H d], [B, M, H d] and [B, M, H dv].

        With `ragged`, queries are packed [T, H d] and so is what is returned.
        """
        q, key, value = (t.unflatten(-1, (self.heads, -1)) for t in (q, key, value))
        out = position_biased_attention(
            q,
            key,
            value,
            query_pos,
            key_pos,
            self.rel_pos_bias.layers(),
            query_ragged=ragged,
            bias=self.bias,
            table_size=self.table_size,
            dropout_p=self.dropout if dropped else 0.0,
            backend=self.backend,
        )
        return out.flatten(-2)
