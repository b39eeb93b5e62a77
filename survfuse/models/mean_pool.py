"""A plain baseline: mean patch features beside table columns, one small network.

It ignores which patches matter and how modalities interact beyond one hidden layer, so what a
fusion model adds is the difference to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.bag_mean import bag_mean
from survfuse.layers.latent_attention import zero_gradients
from survfuse.models.base import FusionModel
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import Tokens, encode_inputs
from survfuse.models.settings import ModalityConfig, check_integers, check_probabilities


@dataclass(frozen=True)
class MeanPoolConfig(ModelConfig):
    """Settings of `MeanPool`.

    Attributes:
        modalities: by name.
        outputs: number of logits by task.
        width: hidden numbers per modality and of the joint layer.
        dropout: probability, after both layers.
        backend: of the pooling of patches; None for the fastest that can serve the call.

    Raises:
        ValueError: a value is out of range.
    """

    PRESETS: ClassVar[Presets] = {"default": {}}

    width: int = 64
    dropout: float = 0.25
    backend: str | None = None

    def _check(self) -> None:
        check_integers(self, {"width": 1})
        check_probabilities(self, "dropout")


class MeanPool(FusionModel):
    """logits = W relu(sum over present modalities of U_m relu(V_m norm(mean x_m)) + b).

    An absent modality adds nothing to the sum: a sample without any gets the readout of relu(b).
    """

    config_class: ClassVar[type] = MeanPoolConfig
    config: MeanPoolConfig

    def __init__(self, config: MeanPoolConfig) -> None:
        super().__init__()
        self.config = config
        # a module's name may not hold a dot, a modality's may
        self.names = list(config.modalities)
        self.read = {name: _without_encodings(item) for name, item in config.modalities.items()}
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
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings per modality and "joint", [B, width].

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.read)
        embeddings: dict[str, Tensor] = {}
        for name, branch in zip(self.names, self.branches):
            if name in tokens:
                mean = _mean(tokens[name], self.config.backend)  # [B, channels]
                embedded = branch(mean.to(self.bias.dtype))  # [B, width]
                # selected, not multiplied: an absent sample may hold anything
                present = tokens[name].present[:, None]
                embeddings[name] = torch.where(present, embedded, 0.0)  # [B, width]
            else:
                nothing = self.bias.new_zeros(n_samples, self.config.width)
                embeddings[name] = zero_gradients(nothing, list(branch.parameters()))
        joint = sum(embeddings.values()) + self.bias  # [B, width]
        return ModelOutput(self.readout(self.hidden(joint)), {**embeddings, "joint": joint}, {})

    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """Nothing: every patch weighs the same."""
        return {}


def _mean(tokens: Tokens, backend: str | None) -> Tensor:
    """[B, channels]; zeros where there is nothing to average."""
    if tokens.ragged is None and tokens.features.dim() == 2:
        return tokens.features
    return bag_mean(tokens.features, tokens.ragged, backend=backend)


def _without_encodings(modality: ModalityConfig) -> ModalityConfig:
    """The modality as it is stored: a mean has no use for positions, walks or column tokens."""
    axes = modality.axes if modality.kind == "array" else 0
    return replace(modality, axes=axes, walk_steps=0, table_tokens="one")
