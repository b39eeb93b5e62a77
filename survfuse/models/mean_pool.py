"""A plain baseline: mean patch features beside table columns, one small network.

It ignores which patches matter and how modalities interact beyond one hidden layer, so what a
fusion model adds is the difference to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from survfuse.batch import ArrayBatch, BagBatch, GraphBatch, Modality, ModelOutput, TableBatch
from survfuse.ops import pool_bag
from survfuse.pooling import accumulation_type


@dataclass(frozen=True)
class MeanPoolConfig:
    """Settings of `MeanPool`.

    Attributes:
        width: hidden numbers per modality and of the joint layer.
        dropout: probability, after both layers.

    Raises:
        ValueError: a value is out of range.
    """

    width: int = 64
    dropout: float = 0.25

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width is {self.width}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be in [0, 1)")


class MeanPool(nn.Module):
    """logits = W relu(sum over present modalities of U_m relu(V_m norm(mean x_m)) + b).

    Args:
        config: settings.
        channels: (kind, width) of every modality by name, as `PreparedCohort.channels()` gives.
        out_dims: time bins, or 1 for a Cox risk.

    An absent modality adds nothing to the sum.
    """

    def __init__(
        self,
        config: MeanPoolConfig,
        channels: Mapping[str, tuple[str, int]],
        *,
        out_dims: int = 4,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels is empty; at least one modality is needed")
        self.config = config
        # a module's name may not hold a dot, a modality's may
        self.names = list(channels)
        self.branches = nn.ModuleList(
            nn.Sequential(
                # columns of a table are standardised already and must keep their own size
                nn.Identity() if kind == "table" else nn.LayerNorm(width),
                nn.Linear(width, config.width),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.width, config.width, bias=False),
            )
            for kind, width in channels.values()
        )
        self.bias = nn.Parameter(torch.zeros(config.width))
        self.head = nn.Sequential(
            nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(config.width, out_dims)
        )

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: one entry for every modality the model was built for.

        Returns:
            logits [B, out_dims]; embeddings per modality and "joint", [B, width].

        Raises:
            KeyError: a modality is missing from `inputs`; absent samples are marked by `present`.
        """
        embeddings: dict[str, Tensor] = {}
        for name, branch in zip(self.names, self.branches):
            if name not in inputs:
                raise KeyError(f"inputs lacks the modality {name!r}; it has {list(inputs)}")
            embedded = branch(_mean(inputs[name]).to(self.bias.dtype))
            # selected, not multiplied: an absent sample may hold anything
            embeddings[name] = torch.where(inputs[name].present[:, None], embedded, 0.0)
        joint = sum(embeddings.values()) + self.bias
        return ModelOutput(self.head(joint), {**embeddings, "joint": joint}, {})


def _mean(batch: Modality) -> Tensor:
    """[B, width], zeros where absent."""
    if isinstance(batch, TableBatch):
        return torch.where(batch.present[:, None], batch.values, 0.0)
    if isinstance(batch, ArrayBatch):
        mean = batch.values.flatten(1, -2).mean(dim=1)
        return torch.where(batch.present[:, None], mean, 0.0)
    if isinstance(batch, (BagBatch, GraphBatch)):
        # a zero query gives every patch the same weight
        features = batch.features
        shape = batch.present.shape[0], 1, features.shape[1]
        rows = features.new_zeros(shape, dtype=accumulation_type(features.dtype))
        return pool_bag(rows, features, ragged=batch.ragged).pooled[:, 0]
    raise TypeError(f"no modality of type {type(batch).__name__} is known")
