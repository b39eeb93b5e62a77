"""A plain baseline: mean patch features beside table columns, one small network.

It ignores which patches matter and how modalities interact beyond one hidden layer, so what a
fusion model adds is the difference to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import ArrayBatch, BagBatch, GraphBatch, Modality, ModelOutput, TableBatch
from survfuse.layers.bag_mean import bag_mean
from survfuse.models.base import FusionModel
from survfuse.models.heads import TaskHeads
from survfuse.models.settings import (
    ModalityConfig,
    check_integers,
    check_preset,
    check_probabilities,
    parse_modalities,
    parse_outputs,
)


@dataclass(frozen=True)
class MeanPoolConfig:
    """Settings of `MeanPool`.

    Attributes:
        modalities: by name.
        outputs: number of logits by task.
        width: hidden numbers per modality and of the joint layer.
        dropout: probability, after both layers.

    Raises:
        ValueError: a value is out of range.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("default",)

    modalities: Mapping[str, ModalityConfig]
    outputs: Mapping[str, int] = field(default_factory=lambda: {"survival": 4})
    width: int = 64
    dropout: float = 0.25

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", parse_modalities(self.modalities))
        object.__setattr__(self, "outputs", parse_outputs(self.outputs))
        check_integers(self, {"width": 1})
        check_probabilities(self, "dropout")

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        modalities: Mapping[str, ModalityConfig | tuple],
        outputs: Mapping[str, int] | None = None,
    ) -> MeanPoolConfig:
        """The one preset, "default".

        Raises:
            ValueError: another name.
        """
        check_preset(name, cls.PRESETS)
        return cls(modalities, {"survival": 4} if outputs is None else outputs)


class MeanPool(FusionModel):
    """logits = W relu(sum over present modalities of U_m relu(V_m norm(mean x_m)) + b).

    An absent modality adds nothing to the sum.
    """

    config_class: ClassVar[type] = MeanPoolConfig
    config: MeanPoolConfig

    def __init__(self, config: MeanPoolConfig) -> None:
        super().__init__()
        self.config = config
        # a module's name may not hold a dot, a modality's may
        self.names = list(config.modalities)
        self.branches = nn.ModuleList(
            nn.Sequential(
                # columns of a table are standardised already and must keep their own size
                nn.Identity() if modality.kind == "table" else nn.LayerNorm(modality.channels),
                nn.Linear(modality.channels, config.width),
                nn.ReLU(),
                nn.Dropout(config.dropout),
                nn.Linear(config.width, config.width, bias=False),
            )
            for modality in config.modalities.values()
        )
        self.bias = nn.Parameter(torch.zeros(config.width))
        self.hidden = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout))
        self.readout = TaskHeads(config.width, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: one entry for every modality the model was built for.

        Returns:
            logits by task; embeddings per modality and "joint", [B, width].

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
        return ModelOutput(self.readout(self.hidden(joint)), {**embeddings, "joint": joint}, {})

    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """Nothing: every patch weighs the same."""
        return {}


def _mean(batch: Modality) -> Tensor:
    """[B, width], zeros where absent."""
    if isinstance(batch, TableBatch):
        return torch.where(batch.present[:, None], batch.values, 0.0)
    if isinstance(batch, ArrayBatch):
        mean = batch.values.flatten(1, -2).mean(dim=1)
        return torch.where(batch.present[:, None], mean, 0.0)
    if isinstance(batch, (BagBatch, GraphBatch)):
        return bag_mean(batch.features, batch.ragged)
    raise TypeError(f"no modality of type {type(batch).__name__} is known")
