"""The feed-forward block of the latent models."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

_ACTIVATIONS = {"selu": functional.selu, "gelu": functional.gelu}


class GatedFeedForward(nn.Module):
    """`W_2 (u * act(g)) + b_2` with `[u, g] = W_1 LN(x) + b_1`, then dropout.

    With `selu` this is the self-normalising block of HEALNet, with `gelu` a GEGLU block.

    Args:
        dim: width of the input and output.
        expansion: hidden width as a multiple of `dim`.
        activation: "selu" or "gelu".
        dropout: probability with which an output is dropped in training.

    Raises:
        ValueError: `activation` is unknown.

    Source:
        Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017; Shazeer, "GLU variants
        improve transformer", 2020.
    """

    def __init__(
        self, dim: int, *, expansion: int = 4, activation: str = "selu", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {[*_ACTIVATIONS]}")
        self.activation = activation
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, 2 * expansion * dim)
        self.contract = nn.Linear(expansion * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., dim], without the residual."""
        value, gate = self.expand(self.norm(x)).chunk(2, dim=-1)
        return self.dropout(self.contract(value * _ACTIVATIONS[self.activation](gate)))
