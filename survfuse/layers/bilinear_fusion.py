"""Two vectors become one: side by side, or every number of one times every number of the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConcatFusion(nn.Sequential):
    """`relu(W_2 relu(W_1 [a, b]))` with biases, of width `dim` throughout."""

    def __init__(self, dim: int) -> None:
        layers = (nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())
        super().__init__(*layers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, dim] each to [B, dim]."""
        return super().forward(torch.cat([a, b], -1))


class BilinearFusion(nn.Module):
    """The gated Kronecker product of two vectors, each with a 1 behind it.

    Each vector is narrowed, and gated by what both say together:
    `o_a = relu(W_o (sigmoid(W_z [a, b]) * relu(W_h a)))`; then `[o_a, 1] x [o_b, 1]`, a hidden
    layer, and one more. With the 1 the products hold either vector alone.

    Args:
        dim: width of both vectors and of the result.
        scale: `dim // scale` is the width of a narrowed vector.
        dropout: probability, behind every layer and behind the product.

    Raises:
        ValueError: `scale` leaves no width.

    Source: Chen et al., "Pathomic fusion", IEEE TMI 2020, which calls it so.
    """

    def __init__(self, dim: int, *, scale: int = 8, dropout: float = 0.25) -> None:
        super().__init__()
        narrow = dim // scale
        if narrow < 1:
            raise ValueError(f"scale is {scale}; it must be at most dim {dim}")

        def layer(width: int, out: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, out), nn.ReLU(), nn.Dropout(dropout))

        self.narrow = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, narrow), nn.ReLU()) for _ in range(2)
        )
        self.gate = nn.ModuleList(nn.Linear(2 * dim, narrow) for _ in range(2))
        self.gated = nn.ModuleList(layer(narrow, narrow) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.encode = nn.Sequential(layer((narrow + 1) ** 2, dim), layer(dim, dim))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[B, dim] each to [B, dim]."""
        both = torch.cat([a, b], -1)
        sides = []
        for x, narrow, gate, gated in zip((a, b), self.narrow, self.gate, self.gated):
            side = gated(gate(both).sigmoid() * narrow(x))
            sides.append(torch.cat([side, side.new_ones(side.shape[0], 1)], -1))
        products = torch.einsum("bi,bj->bij", *sides).flatten(1)
        return self.encode(self.drop(products))
