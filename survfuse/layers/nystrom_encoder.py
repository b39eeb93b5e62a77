"""A class token and a sequence through two Nystrom attention layers: a vector and the rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from survfuse.layers.nystrom_attention import NystromSelfAttention
from survfuse.layers.square_convolution import SquareConvolution
from survfuse.ragged import Ragged


class NystromEncoder(nn.Module):
    """`LN(f_2(g(f_1([class token, x]))))` with `f(x) = x + attention(LN(x))`.

    g is nothing, or for rows that lie on a slide the convolutions of `SquareConvolution`.

    Args:
        dim: width of the rows.
        heads: of the attention; they divide `dim`.
        landmarks: of a sequence; one of so many rows or fewer has exact attention.
        dropout: probability, behind each attention.
        square: whether the rows are convolved between the layers.
        recompute: run each layer a second time in the backward and keep its input alone.
        backend: of the ops.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        landmarks: int,
        dropout: float,
        square: bool,
        recompute: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.class_token = nn.Parameter(torch.empty(1, dim))
        nn.init.normal_(self.class_token, std=1e-6)
        shape = {"heads": heads, "dim_head": dim // heads, "landmarks": landmarks}
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.attentions = nn.ModuleList(
            NystromSelfAttention(dim, **shape, dropout=dropout, backend=backend) for _ in range(2)
        )
        self.square = SquareConvolution(dim) if square else None
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, ragged: Ragged, lengths: list[int]) -> tuple[Tensor, Tensor]:
        """Encode sequences.

        Args:
            x: [total, dim], sequences one behind the other.
            ragged: their ranges.
            lengths: those of the ranges, on the host.

        Returns:
            The class tokens [B, dim] and the rows [total, dim], both normalised.
        """
        sequences = Ragged.from_lengths([n + 1 for n in lengths], device=x.device)
        # row 0 is the class token, row 1 + i is x_i; one more in front of every sequence
        place = torch.arange(sequences.total, device=x.device)
        first = sequences.places() == 0
        x = torch.cat([self.class_token.to(x.dtype), x])
        x = x.index_select(0, torch.where(first, 0, place - sequences.bags()))  # [total + B, dim]
        x = self._run(self._layer, 0, x, sequences)
        if self.square is not None:
            x = self._run(self.square, x, lengths)
        x = self.norm(self._run(self._layer, 1, x, sequences))
        rows = place[sequences.starts], (~first).nonzero()[:, 0]
        return x.index_select(0, rows[0]), x.index_select(0, rows[1])

    def _layer(self, i: int, x: Tensor, sequences: Ragged) -> Tensor:
        return x + self.attentions[i](self.norms[i](x), sequences)

    def _run(self, function, *arguments):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)
