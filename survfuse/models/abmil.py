"""ABMIL: one bag, pooled by gated attention.

Source: Ilse, Tomczak, Welling, "Attention-based deep multiple instance learning", ICML 2018,
equations 8 and 9, with the layer sizes of its histology experiments; the preset "clam" has those of
Lu et al., "Data-efficient and weakly supervised computational pathology on whole-slide images",
Nature Biomedical Engineering 2021, which survival studies use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.latent_attention import zero_gradients
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.encoders import PatchPool, check_one_bag
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import PositionEncoding, encode_inputs, token_width
from survfuse.models.settings import check_integers, check_positive, check_probabilities


@dataclass(frozen=True)
class ABMILConfig(ModelConfig):
    """Settings of `ABMIL`.

    Attributes:
        modalities: exactly one, a bag or a graph.
        outputs: number of logits by task.
        dim: width of a projected patch and of the pooled bag.
        hidden: units of the attention's gate.
        dropout: probability, of a number of a projected patch.
        attention_dropout: probability, of a patch's weight.
        fourier_bands, max_frequency: of the positions of a bag whose `axes` are not 0, see
            `survfuse.layers.fourier`.
        backend: of `survfuse.ops.gated_attention_pool`.

    Presets:
        "paper"; "clam", with a gate of 256 units.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {"paper": {}, "clam": {"hidden": 256}}

    dim: int = 512
    hidden: int = 128
    dropout: float = 0.25
    attention_dropout: float = 0.0
    fourier_bands: int = 2
    max_frequency: float = 2.0
    backend: str | None = None

    def _check(self) -> None:
        check_one_bag("ABMIL", self.modalities)
        check_integers(self, {"dim": 1, "hidden": 1, "fourier_bands": 0})
        check_probabilities(self, "dropout", "attention_dropout")
        check_positive(self, "max_frequency")


class ABMIL(FusionModel):
    """logits = W sum_i a_i h_i + b, with h_i = relu(U x_i + c) and gated attention weights a_i.

    A sample without the bag gets a learned vector, at first zeros, in place of its pooled one.

    Args:
        config: see `ABMILConfig`.

    Cost:
        One projected bag is kept for the backward.

    Example:
        >>> import torch
        >>> from survfuse import Ragged
        >>> from survfuse.batch import BagBatch
        >>> model = ABMIL.from_preset("paper", modalities={"slide": ("bag", 16)})
        >>> slide = BagBatch(torch.randn(9, 16), Ragged.from_lengths([5, 4]), torch.ones(2) > 0)
        >>> model({"slide": slide}).logits["survival"].shape
        torch.Size([2, 4])
    """

    config_class: ClassVar[type] = ABMILConfig
    config: ABMILConfig

    def __init__(self, config: ABMILConfig) -> None:
        super().__init__()
        self.config = config
        [(self.name, modality)] = config.modalities.items()
        self.positions = PositionEncoding(config.fourier_bands, config.max_frequency)
        self.pool = PatchPool(
            token_width(modality, self.positions),
            config.dim,
            hidden=config.hidden,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            backend=config.backend,
        )
        self.absent = nn.Parameter(torch.zeros(config.dim))
        self.readout = TaskHeads(config.dim, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name.

        Returns:
            logits by task; embeddings: the pooled bag [B, dim] under the modality's name.

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
        if self.name in tokens:
            found = tokens[self.name]
            pooled = self.pool(found)  # [B, dim]
            pooled = torch.where(found.present[:, None], pooled, self.absent)  # [B, dim]
        else:
            pooled = self.absent.expand(n_samples, -1)  # [B, dim]
            pooled = zero_gradients(pooled, list(self.pool.parameters()))
        return ModelOutput(self.readout(pooled), {self.name: pooled}, {})

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """The weight of every patch in the pool, [total], under "pool"."""
        with evaluating(self):
            tokens, _ = encode_inputs(inputs, self.config.modalities, self.positions)
            return {name: {"pool": self.pool.weights(found)} for name, found in tokens.items()}
