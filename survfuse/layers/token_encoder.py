"""A few tokens become one vector: a transformer among them, then gated attention pooling."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from survfuse.layers.latent_attention import zero_gradients


class TokenEncoder(nn.Module):
    """`dropout(relu(W sum_g a_g t_g + b))` with t the tokens behind a transformer.

    The weights are `a = softmax_g(w . (tanh(W_t t_g) * sigmoid(W_g t_g)))` with biases, hidden
    units dropped as in CLAM. Blocks of the transformer normalise behind the residual.

    Args:
        dim: width of a token.
        layers: blocks of the transformer.
        heads: of its attention; they divide `dim`.
        hidden: width of its feed-forward.
        dropout: probability, everywhere.
    """

    def __init__(self, dim: int, *, layers: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(dim, heads, hidden, dropout, batch_first=True)
        # nested tensors would drop the tokens that are left out, and change the shape
        self.transformer = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.value = nn.Linear(dim, dim)
        self.gate = nn.Linear(dim, dim)
        self.score = nn.Linear(dim, 1)
        self.drop = nn.Dropout(dropout)
        self.output = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, tokens: Tensor, usable: Tensor) -> Tensor:
        """[B, G, dim] to [B, dim]; `usable` [B, G] says which tokens count, at least one each."""
        if tokens.shape[0] == 0:
            # torch's attention cannot shape the mask of no sample
            tokens = zero_gradients(tokens, list(self.transformer.parameters()))
        else:
            tokens = self.transformer(tokens, src_key_padding_mask=~usable)
        hidden = self.drop(self.value(tokens).tanh()) * self.drop(self.gate(tokens).sigmoid())
        scores = self.score(hidden)[..., 0].masked_fill(~usable, -torch.inf)  # [B, G]
        # nothing that counts for nothing is multiplied by its weight of 0
        tokens = torch.where(usable[..., None], tokens, 0.0)
        pooled = (scores.softmax(1)[..., None] * tokens).sum(1)  # [B, dim]
        return self.output(pooled)
