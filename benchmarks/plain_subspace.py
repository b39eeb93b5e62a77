"""Subspace fusion in plain torch with everything formed: what ours is measured against.

The same modules, parameter names and mathematics as `survfuse.models.SubspaceFusion`, so that one
state dict serves both and their equality can be tested. As in the public code maps are dense, and
the MLP of positions is evaluated for all pairs of a patch and a point, each layer of it held; on
slides at their true places too, where that code has no counterpart. Every modality must be present
for every sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.grid import GridIndex
from survfuse.layers import DeformableAttended, DeformableCrossAttention
from survfuse.models.inputs import Tokens
from survfuse.models.subspace_branch import Sides, SubspaceBranch
from survfuse.models.subspace_config import BRANCHES, SubspaceFusionConfig
from survfuse.models.subspace_fusion import SubspaceFusion
from survfuse.models.subspace_layout import SlideLayout
from survfuse.ragged import Ragged

from .plain_deformable import PlainDeformableCrossAttention
from .plain_models import attend, bags_of, joined


class PlainSubspaceFusion(SubspaceFusion):
    """Layout "grid" or "square", or the released 50 x 50 maps; patches pooled by their mean."""

    def __init__(self, config: SubspaceFusionConfig) -> None:
        if config.pool != "mean" or config.released != (config.layout == "fixed"):
            raise ValueError(
                "the plain baseline pools by the mean, and has dense maps in the released "
                "arithmetic alone; pool must be 'mean' and layout 'fixed' go with released=True"
            )
        super().__init__(config)
        columns = config.gene_columns()
        self.branches = nn.ModuleDict(
            {branch: PlainSubspaceBranch(config, columns[branch]) for branch in BRANCHES}
        )


class PlainSubspaceBranch(SubspaceBranch):
    """`SubspaceBranch` of a projected bag, or of the patches of a dense map alone."""

    def _add_patches(self, channels: int) -> None:
        super()._add_patches(channels)
        self.attention = PlainMapAttention(self.attention)

    def project_patches(self, bag: Tensor, slides: SlideLayout) -> Tensor:
        rows = joined(bags_of(Tokens(bag, slides.stored, None, ())))
        if slides.index is not None:
            rows = rows[slides.index]  # [n, cells, D]
        return self.project(rows).relu()

    def _sides(self, patches: Tensor, slides: SlideLayout, genes: Tensor) -> Sides:
        if slides.index is not None:
            # the patches of every cell lie one behind the other already
            index = torch.arange(slides.index.numel(), device=patches.device)
            slides = slides._replace(index=index.view_as(slides.index))
            patches = patches.flatten(0, 1)
        return super()._sides(patches, slides, genes)

    def _pool(
        self, sides: Sides, attended: Tensor, genes: Tensor, ragged: Ragged | None = None
    ) -> Tensor:
        tokens = self.norm(sides.fused + attended)
        if ragged is None:
            return tokens.mean(1)
        return torch.stack([rows.mean(0) for rows in tokens.split(ragged.lengths.tolist())])


class PlainMapAttention(PlainDeformableCrossAttention):
    """Dense maps as released, or patches at their true places, bag by bag.

    Args:
        like: the layer whose sizes and weights it takes.
    """

    def __init__(self, like: DeformableCrossAttention) -> None:
        super().__init__(like)
        self.downsample = like.downsample

    def forward(
        self,
        query: Tensor,
        context: Tensor,
        *,
        shape: tuple[int, int] | None = None,
        grid: GridIndex | None = None,
        ragged: Ragged | None = None,
    ) -> DeformableAttended:
        """As of the layer, which says what the arguments are."""
        if grid is None:
            return self.attended(query, context, shape)
        lengths, shapes = ragged.lengths.tolist(), grid.shapes.tolist()
        cells = grid.cells(ragged).split(lengths)
        sides = (cells, query.split(lengths), context.split(lengths), shapes)
        parts = [self._attend_places(*part) for part in zip(*sides, strict=True)]
        tokens, points, offsets = (joined(list(one)) for one in zip(*parts, strict=True))
        point_ragged = Ragged.from_lengths([len(p) for _, p, _ in parts], device=query.device)
        return DeformableAttended(tokens, points, point_ragged, offsets)

    def _attend_places(
        self, cells: Tensor, query: Tensor, context: Tensor, shape: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [n, dim], points [P, G, 2] and offsets [P, G, 2] of one slide."""
        stride, groups = self.downsample, self.n_groups
        height, width = (-(-side // stride) * stride for side in shape)
        x, y = cells.long().unbind(1)
        images = query.T[None, :, :, None]
        q = self.to_q(images)[0, :, :, 0].T  # [n, H d]

        maps = _dense(q, x, y, height, width).unflatten(0, (groups, -1))
        hidden = self.to_offsets[2](self.to_offsets[:2](maps)).float()
        moved = hidden.tanh() * self.offset_scale  # [G, 2, h', w']
        held = torch.zeros(moved.shape[2:], dtype=torch.bool, device=x.device)
        held[y // stride, x // stride] = True
        rows, columns = held.nonzero().unbind(1)
        offsets = moved[:, :, rows, columns].permute(2, 0, 1)  # [P, G, 2]
        points = torch.stack([columns, rows], 1)[:, None] + offsets
        place = points * stride + (stride - 1) / 2

        samples = self._sample(_dense(context, x, y, height, width), place)
        key, value = (layer(samples)[0, :, :, 0].T for layer in (self.to_k, self.to_v))
        size = place.new_tensor([max(shape[1] - 1, 1), max(shape[0] - 1, 1)])
        bias = self._pairs(2 * cells / size - 1, 2 * place / size - 1)
        dropout = self.dropout if self.training else 0.0
        mask = bias.to(q.dtype)[None]
        out = attend(q, key, value, self.heads, mask=mask, dropout=dropout)
        tokens = self.to_out(out.T[None, :, :, None])[0, :, :, 0].T
        return tokens, points, offsets

    def _sample(self, image: Tensor, place: Tensor) -> Tensor:
        """[1, C, P, 1] of a map [C, h, w] at places [P, G, 2]."""
        height, width = image.shape[1:]
        size = place.new_tensor([max(width - 1, 1), max(height - 1, 1)])
        at = (2 * place / size - 1).transpose(0, 1)[:, None]  # [G, 1, P, 2]
        grouped = image.unflatten(0, (self.n_groups, -1)).to(at.dtype)
        samples = functional.grid_sample(grouped, at, align_corners=True)
        return samples.flatten(0, 2)[None, :, :, None].to(image.dtype)

    def _pairs(self, query_at: Tensor, key_at: Tensor) -> Tensor:
        """[H, n, P], by way of [n, P, G, units] in every layer of the MLP."""
        offset = query_at[:, None, None] - key_at
        x = (offset.sign() * (offset.abs() + 1).log()).to(self.to_q.weight.dtype)
        for layer in self.rel_pos_bias.mlp:
            x = layer(x)
        return x.flatten(2).permute(2, 0, 1)


def _dense(rows: Tensor, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """A map [C, h, w] of rows [n, C] in their cells, and zeros where there is no tissue."""
    image = rows.new_zeros(height, width, rows.shape[1]).index_put((y, x), rows)
    return image.permute(2, 0, 1)
