"""A self-normalising network: what turns a set of genes into one token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ACTIVATIONS = {"selu": nn.SELU, "elu": nn.ELU}


class SelfNormalizingNetwork(nn.Sequential):
    """Layers of `AlphaDropout(act(W x + b))`.

    Weights are drawn with standard deviation 1 / sqrt(inputs), which keeps standardised inputs
    standardised through SELU; biases are 0.

    Args:
        dim: width of the input.
        widths: width of each layer; the last is that of the result.
        activation: "selu", or "elu" as public codes of this field have it.
        dropout: probability of alpha dropout behind every layer.

    Raises:
        ValueError: `widths` is empty, or `activation` is unknown.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017.

    Example:
        >>> import torch
        >>> SelfNormalizingNetwork(431, [256, 256], dropout=0.25)(torch.randn(3, 431)).shape
        torch.Size([3, 256])
    """

    def __init__(
        self, dim: int, widths: Sequence[int], *, activation: str = "selu", dropout: float = 0.0
    ) -> None:
        if not widths:
            raise ValueError("widths is empty; it must hold the width of at least one layer")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {[*_ACTIVATIONS]}")
        layers = []
        for width in widths:
            linear = nn.Linear(dim, width)
            nn.init.normal_(linear.weight, std=dim**-0.5)
            nn.init.zeros_(linear.bias)
            layers.append(
                nn.Sequential(linear, _ACTIVATIONS[activation](), nn.AlphaDropout(dropout))
            )
            dim = width
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to [..., widths[-1]]."""
        return super().forward(x)


def side_by_side(networks: Sequence[SelfNormalizingNetwork], inputs: Sequence[Tensor]) -> Tensor:
    """What networks of the same widths make of an input each, [B, G, widths[-1]].

    Layer by layer: what acts on one number at a time does so on those of all networks, which spares
    hundreds of them most of their small operations.

    Args:
        networks: G of them, alike but for the width of their inputs.
        inputs: of each, [B, its dim].
    """
    for layers in zip(*networks, strict=True):
        hidden = torch.stack([linear(x) for (linear, *_), x in zip(layers, inputs)], 1)
        for function in layers[0][1:]:
            hidden = function(hidden)  # [B, G, width]
        inputs = hidden.unbind(1)
    return hidden
