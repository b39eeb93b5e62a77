"""SNN: a self-normalising network over the columns of all tables.

Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, as the omics-only
baseline of Chen et al., "Multimodal co-attention transformer for survival prediction in gigapixel
whole slide images", ICCV 2021; the presets "released" have the sizes of that paper's public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.self_normalizing_network import SelfNormalizingNetwork
from survfuse.models.base import FusionModel
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.encoders import is_vector
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import encode_inputs
from survfuse.models.settings import check_choice, check_probabilities, check_widths


@dataclass(frozen=True)
class SNNConfig(ModelConfig):
    """Settings of `SNN`.

    Attributes:
        modalities: tables only; all their columns are read, whatever their groups.
        outputs: number of logits by task.
        widths: of the layers.
        activation: "selu", or "elu" as the public code of the baseline has it.
        dropout: probability of alpha dropout behind every layer.

    Presets:
        "paper"; "released", four layers and ELU; "released:big", with wider ones.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "released": {"widths": (256,) * 4, "activation": "elu"},
        "released:big": {"widths": (1024, 1024, 1024, 256), "activation": "elu"},
    }

    widths: tuple[int, ...] = (256, 256)
    activation: str = "selu"
    dropout: float = 0.25

    def _check(self) -> None:
        for name, modality in self.modalities.items():
            if modality.kind != "table":
                raise ValueError(
                    f"modality {name!r} is a {modality.kind}; SNN reads tables only "
                    "(data.modalities chooses which a model is given)"
                )
            if not is_vector(modality) or modality.axes:
                raise ValueError(
                    f"modality {name!r} has axes={modality.axes} and table_tokens="
                    f"{modality.table_tokens!r}; SNN encodes no positions: they must be 0 and 'one'"
                )
        check_widths(self, "widths")
        check_choice(self, "activation", ("selu", "elu"))
        check_probabilities(self, "dropout")


class SNN(FusionModel):
    """logits = W snn([x_1, x_2, ...]) + b over the columns of all tables, one behind the other.

    Where a sample lacks a table, its columns are learned ones, at first zeros: the means of
    standardised columns.

    Args:
        config: see `SNNConfig`.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> model = SNN.from_preset("paper", modalities={"rna": ("table", 8)})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> model({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = SNNConfig
    config: SNNConfig

    def __init__(self, config: SNNConfig) -> None:
        super().__init__()
        self.config = config
        self.columns = [modality.channels for modality in config.modalities.values()]
        self.absent = nn.Parameter(torch.zeros(sum(self.columns)))
        self.network = SelfNormalizingNetwork(
            sum(self.columns), config.widths, activation=config.activation, dropout=config.dropout
        )
        self.readout = TaskHeads(config.widths[-1], config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A table may be absent for some samples (`present`), for all
                of them, or left out.

        Returns:
            logits by task; embeddings "joint" [B, widths[-1]].

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities)
        rows = []
        absences = self.absent.split(self.columns)
        for name, absent in zip(self.config.modalities, absences, strict=True):
            row = absent.expand(n_samples, -1)  # [B, F]
            if name in tokens:
                values = tokens[name].features.to(absent.dtype)  # [B, F]
                # selected, not multiplied: an absent sample may hold anything
                row = torch.where(tokens[name].present[:, None], values, row)  # [B, F]
            rows.append(row)
        joint = self.network(torch.cat(rows, 1))  # [B, widths[-1]]
        return ModelOutput(self.readout(joint), {"joint": joint}, {})

    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """Nothing: there are no patches."""
        return {}
