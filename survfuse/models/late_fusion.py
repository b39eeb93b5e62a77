"""Late fusion: one vector per modality, fused by concatenation, sum or gated outer products.

Source: Chen et al., "Pathomic fusion", IEEE Transactions on Medical Imaging 2022 (gates and
Kronecker product, equations 5 and 6); Chen et al., "Pan-cancer integrative histology-genomic
analysis via multimodal deep learning" (PORPOISE), Cancer Cell 2022, whose sizes the preset "paper"
has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.encoders import VectorEncoder
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import PositionEncoding, encode_inputs
from survfuse.models.settings import (
    ModalityConfig,
    check_choice,
    check_flags,
    check_integers,
    check_positive,
    check_probabilities,
    check_widths,
    parse_modalities,
)

# entries of all outer products of a sample: with 256 units behind them 17 million weights
_MAX_PRODUCTS = 1 << 16


@dataclass(frozen=True)
class LateFusionConfig(ModelConfig):
    """Settings of `LateFusion`.

    Attributes:
        modalities: by name.
        outputs: number of logits by task.
        fusion: "concat", "add", "bilinear" (outer products of every two modalities) or "kronecker"
            (the outer product of all).
        dim: width of a modality's vector.
        rank: "bilinear" and "kronecker" only, width to which a vector is brought before products.
        hidden: width of the fused vector.
        gated: "bilinear" and "kronecker" only, gate every factor by all modalities' vectors.
        skip: "bilinear" and "kronecker" only, the vectors enter the last layer beside the products.
        table_widths: hidden layers of a table's network.
        activation: of those networks, "selu" or "elu".
        patch_dim, attention_hidden: width of a projected patch, units of the gate of its weight.
        dropout: probability, of every layer.
        fourier_bands, max_frequency: of the positions of modalities whose `axes` are not 0, see
            `survfuse.layers.fourier`.
        backend: of the ops.

    Presets:
        "paper" for PORPOISE; "pathomic" for the smaller vectors of Pathomic Fusion. Both are
        published for two modalities. The product of all is kept up to three; more are fused by
        products of every two, and twelve or more by concatenation.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "pathomic": {"dim": 32, "hidden": 64, "table_widths": (64, 48, 32)},
    }

    fusion: str = "kronecker"
    dim: int = 256
    rank: int = 32
    hidden: int = 256
    gated: bool = True
    skip: bool = True
    table_widths: tuple[int, ...] = (256,)
    activation: str = "elu"
    patch_dim: int = 512
    attention_hidden: int = 256
    dropout: float = 0.25
    fourier_bands: int = 2
    max_frequency: float = 2.0
    backend: str | None = None

    def _check(self) -> None:
        check_choice(self, "fusion", ("concat", "add", "bilinear", "kronecker"))
        lows = {"dim": 1, "rank": 1, "hidden": 1, "patch_dim": 1, "attention_hidden": 1}
        check_integers(self, {**lows, "fourier_bands": 0})
        check_flags(self, "gated", "skip")
        check_widths(self, "table_widths")
        check_choice(self, "activation", ("selu", "elu"))
        check_probabilities(self, "dropout")
        check_positive(self, "max_frequency")
        entries = sum((self.rank + 1) ** len(factors) for factors in self.products())
        if entries > _MAX_PRODUCTS:
            raise ValueError(
                f"fusion is {self.fusion!r} of {len(self.modalities)} modalities at rank "
                f"{self.rank}, which is {entries} products per sample; it must be at most "
                f"{_MAX_PRODUCTS}: lower rank, or choose 'bilinear', 'concat' or 'add'"
            )

    def products(self) -> list[tuple[int, ...]]:
        """The modalities, by number, that enter each outer product; none of "concat" and "add"."""
        if self.fusion not in ("bilinear", "kronecker"):
            return []
        n = len(self.modalities)
        return list(combinations(range(n), n if self.fusion == "kronecker" else min(n, 2)))

    @classmethod
    def _preset_settings(
        cls, name: str, modalities: Mapping[str, ModalityConfig | tuple]
    ) -> dict[str, Any]:
        n = len(parse_modalities(modalities))
        fusion = "kronecker" if n <= 3 else "bilinear" if n <= 11 else "concat"
        return {**cls.PRESETS[name], "fusion": fusion}


class LateFusion(FusionModel):
    r"""Vectors h_m of the modalities, fused into one.

    * "concat": `relu(B relu(A [h_1, h_2, ...] + a) + b)`; "add": the same of `h_1 + h_2 + ...`.
    * "kronecker": `relu(B [relu(A ([1, o_1] x [1, o_2] x ...) + a), h_1, h_2, ...] + b)` with
      factors `o_m = relu(V_m (sigmoid(Z_m [h_1, h_2, ...]) * relu(U_m h_m)))`;
    * "bilinear": the same of the products of every two, one behind the other.

    A table's h_m is that of a self-normalising network, any other modality's that of gated
    attention pooling and a layer. Where a sample lacks a modality, h_m is a learned vector, at
    first zeros, and o_m is zeros: its products are those of exactly the modalities that are there.

    Args:
        config: see `LateFusionConfig`.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> model = LateFusion.from_preset(
        ...     "pathomic", modalities={"rna": ("table", 8), "cnv": ("table", 5)}
        ... )
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> model({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = LateFusionConfig
    config: LateFusionConfig

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = PositionEncoding(config.fourier_bands, config.max_frequency)
        self.vectors = VectorEncoder(
            config.modalities,
            config.dim,
            table_widths=config.table_widths,
            patch_dim=config.patch_dim,
            attention_hidden=config.attention_hidden,
            activation=config.activation,
            dropout=config.dropout,
            positions=self.positions,
            backend=config.backend,
        )
        if config.products():
            self.fuse: nn.Module = ProductFusion(config)
        else:
            width = config.dim * (len(config.modalities) if config.fusion == "concat" else 1)
            self.fuse = nn.Sequential(
                nn.Linear(width, config.hidden),
                nn.ReLU(),
                nn.Linear(config.hidden, config.hidden),
                nn.ReLU(),
            )
        self.readout = TaskHeads(config.hidden, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings: the vector [B, dim] of each modality under its name, and
            "joint" [B, hidden].

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
        vectors, present = self.vectors(tokens, n_samples)  # [B, M, dim], [B, M]
        if self.config.products():
            joint = self.fuse(vectors, present)  # [B, hidden]
        elif self.config.fusion == "concat":
            joint = self.fuse(vectors.flatten(1))  # [B, hidden]
        else:
            joint = self.fuse(vectors.sum(1))  # [B, hidden]
        embeddings = dict(zip(self.config.modalities, vectors.unbind(1), strict=True))
        return ModelOutput(self.readout(joint), {**embeddings, "joint": joint}, {})

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """The weight of every patch or node in its pool, [total], by modality under "pool"."""
        with evaluating(self):
            tokens, _ = encode_inputs(inputs, self.config.modalities, self.positions)
            return self.vectors.patch_weights(tokens, self.config.modalities)


class ProductFusion(nn.Module):
    """Gated factors of the modalities, their outer products, and two layers behind them."""

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__()
        n, rank = len(config.modalities), config.rank
        self.products, self.skip = config.products(), config.skip
        self.reduce = nn.ModuleList(nn.Linear(config.dim, rank) for _ in range(n))
        self.gate = None
        if config.gated:
            self.gate = nn.ModuleList(nn.Linear(n * config.dim, rank) for _ in range(n))
        self.factor = nn.ModuleList(nn.Linear(rank, rank) for _ in range(n))
        self.dropout = nn.Dropout(config.dropout)
        entries = sum((rank + 1) ** len(factors) for factors in self.products)
        self.mix = nn.Linear(entries, config.hidden)
        beside = n * config.dim if config.skip else 0
        self.join = nn.Linear(config.hidden + beside, config.hidden)

    def forward(self, vectors: Tensor, present: Tensor) -> Tensor:
        """[B, hidden] of the vectors [B, M, dim] and which are there [B, M]."""
        together = vectors.flatten(1)  # [B, M * dim]
        factors = []
        for m, (reduce, factor) in enumerate(zip(self.reduce, self.factor, strict=True)):
            reduced = torch.relu(reduce(vectors[:, m]))  # [B, rank]
            if self.gate is not None:
                reduced = torch.sigmoid(self.gate[m](together)) * reduced  # [B, rank]
            reduced = self.dropout(torch.relu(factor(reduced)))  # [B, rank]
            reduced = torch.where(present[:, m, None], reduced, 0.0)  # [B, rank]
            factors.append(nn.functional.pad(reduced, (1, 0), value=1.0))  # [B, 1 + rank]
        products = []
        for chosen in self.products:
            product = factors[chosen[0]]  # [B, 1 + rank]
            for m in chosen[1:]:
                product = (product[:, :, None] * factors[m][:, None]).flatten(
                    1
                )  # [B, (1 + rank)^k]
            products.append(product)
        mixed = torch.relu(self.mix(self.dropout(torch.cat(products, 1))))  # [B, hidden]
        if self.skip:
            mixed = torch.cat([mixed, together], 1)  # [B, hidden + M * dim]
        return torch.relu(self.join(mixed))  # [B, hidden]
