"""Subspace fusion's deformable cross-attention in plain torch: what the layer is measured against.

The same mathematics and parameter names as `survfuse.layers.DeformableCrossAttention` with
`released=True`, so that one state dict serves both and their equality can be tested. Like the
public implementation it evaluates the MLP of positions for all pairs at once, holds every layer of
it and the logits, and leaves the rest to autograd. Coordinates stay fp32 beside 16-bit features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.layers import DeformableAttended, DeformableCrossAttention


class PlainDeformableCrossAttention(nn.Module):
    """Dense maps [B, h w, dim] with everything formed.

    Args:
        like: the layer whose sizes and weights it takes.
    """

    def __init__(self, like: DeformableCrossAttention) -> None:
        super().__init__()
        self.heads, self.n_groups = like.heads, like.offset_groups
        self.scale, self.offset_scale = like.dim_head**-0.5, like.offset_scale
        self.dropout = like.dropout
        for name in ("to_offsets", "rel_pos_bias", "to_q", "to_k", "to_v", "to_out"):
            setattr(self, name, getattr(like, name))

    def forward(self, query: Tensor, context: Tensor, shape: tuple[int, int]) -> Tensor:
        """Tokens [B, h w, dim]."""
        return self.attended(query, context, shape).tokens

    def attended(
        self, query: Tensor, context: Tensor, shape: tuple[int, int]
    ) -> DeformableAttended:
        """As of the layer."""
        n_bags = query.shape[0]
        images, places = (t.mT.unflatten(2, shape) for t in (query, context))
        q = self.to_q(images)
        hidden = self.to_offsets[:2](q.unflatten(1, (self.n_groups, -1)).flatten(0, 1))
        offsets = self.to_offsets[2](hidden).float().tanh() * self.offset_scale
        points = _cells(*offsets.shape[2:], offsets) + offsets
        at = _scaled(points)  # [B G, h', w', 2]
        grouped = places.unflatten(1, (self.n_groups, -1)).flatten(0, 1)
        samples = functional.grid_sample(grouped.to(at.dtype), at, align_corners=False)
        samples = samples.to(query.dtype).unflatten(0, (n_bags, -1)).flatten(1, 2)
        q, k, v = (
            t.flatten(2).unflatten(1, (self.heads, -1)).mT
            for t in (q, self.to_k(samples), self.to_v(samples))
        )
        logits = self.scale * (q @ k.mT) + self._bias(_scaled(_cells(*shape, at)), at, n_bags)
        weights = functional.dropout(logits.softmax(-1).to(v.dtype), self.dropout, self.training)
        out = (weights @ v).mT.flatten(1, 2).unflatten(2, shape)
        points, offsets = (x.flatten(2).mT.unflatten(0, (n_bags, -1)) for x in (points, offsets))
        return DeformableAttended(self.to_out(out).flatten(2).mT, points, None, offsets)

    def _bias(self, query_at: Tensor, key_at: Tensor, n_bags: int) -> Tensor:
        """[B, H, h w, M], by way of [B G, h w, M, units] in every layer."""
        offset = query_at.reshape(1, -1, 1, 2) - key_at.flatten(1, 2)[:, None]
        x = (offset.sign() * (offset.abs() + 1).log()).to(self.to_q.weight.dtype)
        for layer in self.rel_pos_bias.mlp:
            x = layer(x)
        return x.unflatten(0, (n_bags, self.n_groups)).movedim(-1, 2).flatten(1, 2)

    def bytes_needed(self, shape: tuple[int, int], n_bags: int, stride: int) -> int:
        """Of the MLP's layers, before and behind each ReLU, for all pairs in fp32."""
        pairs = n_bags * self.n_groups * shape[0] * shape[1]
        pairs *= (shape[0] // stride) * (shape[1] // stride)
        return 4 * pairs * 4 * self.rel_pos_bias.mlp[0][0].out_features


def _cells(height: int, width: int, like: Tensor) -> Tensor:
    """[2, height, width]: the (x, y) of each cell."""
    columns, rows = torch.meshgrid(
        torch.arange(width, device=like.device), torch.arange(height, device=like.device),
        indexing="xy",
    )  # fmt: skip
    return torch.stack([columns, rows]).to(like.dtype)


def _scaled(grid: Tensor) -> Tensor:
    """[..., 2, h, w] to [..., h, w, 2], x by the rows and y by the columns, as released."""
    height, width = grid.shape[-2:]
    x, y = grid.unbind(-3)
    return torch.stack([2 * x / max(height - 1, 1) - 1, 2 * y / max(width - 1, 1) - 1], -1)
