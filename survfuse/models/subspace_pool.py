"""The pool of a branch of subspace fusion whose genes ask its patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from survfuse.layers.feed_forward import GatedFeedForward
from survfuse.layers.latent_attention import BagCrossAttention
from survfuse.ragged import Ragged


class GenePool(nn.Module):
    """A branch's genes g attend to its patches, and are multiplied with what they find.

        y = g + attention(g, [LN u, LN a]),  pooled = y + GatedFeedForward(y)

    with u the patches and a what they attended to, side by side, so that what all patches of a
    slide share in one does not blur the other.

    Args:
        dim: width of genes, of patches and of the result.
        heads, head_dim: of the attention.
        temperature: divides its logits.
        backend: of `survfuse.ops.tokens_attend_bag`.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        head_dim: int,
        temperature: float,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(dim)
        self.attended_norm = nn.LayerNorm(dim)
        # until the deformable attention has learned something, it only blurs what patches say
        nn.init.constant_(self.attended_norm.weight, 0.1)
        self.ask = BagCrossAttention(
            dim,
            2 * dim,
            heads=heads,
            head_dim=head_dim,
            temperature=temperature,
            backend=backend,
        )
        self.feed_forward = GatedFeedForward(dim, expansion=2, activation="gelu")

    def forward(
        self, genes: Tensor, patches: Tensor, attended: Tensor, ragged: Ragged | None = None
    ) -> Tensor:
        """[B, dim] of genes [B, dim] and two of [total, dim], or dense [B, cells, dim]."""
        tokens = self._tokens(patches, attended)
        return self._read(genes, self.ask(genes[:, None], tokens, ragged))

    def alone(self, genes: Tensor, patch: Tensor) -> Tensor:
        """[B, dim] of genes [B, dim] and one patch [dim] that attended to nothing."""
        token = self._tokens(patch, torch.zeros_like(patch)).expand(genes.shape[0], -1)
        return self._read(genes, self.ask.one_token(genes[:, None], token))

    def weights(
        self, genes: Tensor, patches: Tensor, attended: Tensor, ragged: Ragged | None = None
    ) -> Tensor:
        """The weight of each patch, [total] in batch order; heads count by what they change."""
        tokens = self._tokens(patches, attended)
        return self.ask.weights_by_effect(genes[:, None], tokens, ragged)

    def _tokens(self, patches: Tensor, attended: Tensor) -> Tensor:
        return torch.cat([self.patch_norm(patches), self.attended_norm(attended)], -1)

    def _read(self, genes: Tensor, found: Tensor) -> Tensor:
        pooled = genes + found[:, 0]
        return pooled + self.feed_forward(pooled)
