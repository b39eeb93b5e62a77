"""MCAT: gene groups ask the patches, then both sides are encoded, pooled and fused.

Source: Chen et al., "Multimodal co-attention transformer for survival prediction in gigapixel
whole slide images", ICCV 2021, and a description of its public code. What differs from that code
is listed in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.bilinear_fusion import BilinearFusion, ConcatFusion
from survfuse.layers.latent_attention import zero_gradients
from survfuse.layers.projected_attention import ProjectedBagAttention
from survfuse.layers.token_encoder import TokenEncoder
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import Tokens, encode_inputs, token_width
from survfuse.models.patches_and_genes import (
    GeneSide,
    KnownTokens,
    check_gene_side,
    check_heads,
    check_piece_rows,
    patch_modality,
    weights_by_group,
)
from survfuse.models.settings import (
    check_choice,
    check_flags,
    check_integers,
    check_probabilities,
)

__all__ = ["MCAT", "MCATConfig"]


@dataclass(frozen=True)
class MCATConfig(ModelConfig):
    """Settings of `MCAT`.

    Attributes:
        modalities: at most one bag or graph, and tables with their gene groups.
        outputs: number of logits by task.
        dim: width of a token and of everything behind it.
        gene_widths: hidden widths of the network of a gene group, in front of `dim`.
        gene_activation: "selu" or "elu".
        gene_dropout: probability of alpha dropout in those networks.
        patch_dropout: probability with which a number of a projected patch is dropped.
        dropout: probability in transformers, pools and fusion.
        attention_heads: of the attention to the patches; they divide `dim`.
        encoder_layers, encoder_heads, encoder_hidden: of the transformer of either side.
        fusion: "concat" or "bilinear".
        bilinear_scale: by how much "bilinear" narrows either side in front of the product.
        recompute: project the bag a second time in the backward instead of keeping it projected.
        piece_rows: patches that are projected at a time; None for what suits the device.
        backend: of the ops; None for the fastest that can serve the call.

    Presets:
        "paper"; "released" (ELU where the paper has a self-normalising network); "released:big"
        with its larger gene networks. (Its larger projection of patches does not fit its own
        attention, so there is none.)

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "released": {"gene_activation": "elu"},
        "released:big": {"gene_activation": "elu", "gene_widths": (1024, 1024, 1024)},
    }
    MODEL: ClassVar[str] = "MCAT"

    dim: int = 256
    gene_widths: tuple[int, ...] = (256,)
    gene_activation: str = "selu"
    gene_dropout: float = 0.25
    patch_dropout: float = 0.25
    dropout: float = 0.25
    attention_heads: int = 1
    encoder_layers: int = 2
    encoder_heads: int = 8
    encoder_hidden: int = 512
    fusion: str = "concat"
    bilinear_scale: int = 8
    recompute: bool = False
    piece_rows: int | None = None
    backend: str | None = None

    def _check(self) -> None:
        check_gene_side(self, self.MODEL)
        lows = {"dim": 1, "attention_heads": 1, "encoder_layers": 1, "encoder_heads": 1}
        check_integers(self, {**lows, "encoder_hidden": 1, "bilinear_scale": 1})
        check_heads(self, "dim", "attention_heads", "encoder_heads")
        check_choice(self, "fusion", ("concat", "bilinear"))
        check_probabilities(self, "patch_dropout", "dropout")
        check_flags(self, "recompute")
        check_piece_rows(self)


class MCAT(FusionModel):
    """One token per gene group asks the projected patches; what they say is a token as well.

    Both rows of tokens, what was read and what asked, go through a transformer and a gated
    attention pool of their own, and the two vectors are fused.

    A gene group whose table a sample lacks is left out of both sides. A sample without any has
    learned tokens in place of them all, so that its patches are still read; one without patches
    has a learned vector in place of what was read.

    Args:
        config: see `MCATConfig`.

    Cost:
        2 N D dim operations forward and twice that backward for N patches of width D, which all
        else is small beside; one projected bag [N, dim] is kept, and none with `recompute`, which
        projects it again.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> config = MCATConfig({"rna": ("table", 8, {"a": (0, 1), "b": (2, 3)})})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> MCAT(config)({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = MCATConfig
    config: MCATConfig

    def __init__(self, config: MCATConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = patch_modality(config.modalities, config.MODEL)
        self.genes = GeneSide(
            config.modalities,
            [*config.gene_widths, config.dim],
            activation=config.gene_activation,
            dropout=config.gene_dropout,
        )
        shape = {"layers": config.encoder_layers, "heads": config.encoder_heads}
        shape |= {"hidden": config.encoder_hidden}
        self.gene_encoder = TokenEncoder(config.dim, **shape, dropout=config.dropout)
        if self.patches is not None:
            self.attention = self._make_attention(token_width(config.modalities[self.patches]))
            self.patch_encoder = TokenEncoder(config.dim, **shape, dropout=config.dropout)
        self.missing_patches = nn.Parameter(torch.zeros(config.dim))
        if config.fusion == "concat":
            self.fusion = ConcatFusion(config.dim)
        else:
            self.fusion = BilinearFusion(
                config.dim, scale=config.bilinear_scale, dropout=config.dropout
            )
        self.readout = TaskHeads(config.dim, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings "genes", "patches" and "joint", [B, dim] each.

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities)
        genes = self.genes(inputs, n_samples)  # [B, G, dim]
        gene_part = self.gene_encoder(genes.values, genes.usable)  # [B, dim]
        patch_part = self._read_patches(genes, tokens.get(self.patches), n_samples)  # [B, dim]
        joint = self.fusion(patch_part, gene_part)  # [B, dim]
        embeddings = {"genes": gene_part, "patches": patch_part, "joint": joint}
        return ModelOutput(self.readout(joint), embeddings, {})

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """How much each gene group looks at each patch, streamed; without dropout.

        Returns:
            By gene group [total], packed in batch order. The weights of a sample sum to 1, or to 0
            where it lacks the patches or, beside other groups, this one.
        """
        with evaluating(self):
            tokens, n_samples = encode_inputs(inputs, self.config.modalities)
            if self.patches not in tokens:
                return {}
            bag, genes = tokens[self.patches], self.genes(inputs, n_samples)
            weights = self._weights(genes, bag)
        return {self.patches: weights_by_group(self.genes, weights, genes.usable, bag)}

    def _make_attention(self, width: int) -> nn.Module:
        """The module that reads patches of this width."""
        config = self.config
        return ProjectedBagAttention(
            config.dim,
            width,
            heads=config.attention_heads,
            dropout=config.patch_dropout,
            recompute=config.recompute,
            piece_rows=config.piece_rows,
            backend=config.backend,
        )

    def _attend(self, genes: KnownTokens, bag: Tokens) -> Tensor:
        """What each gene group reads of the patches, [B, G, dim]."""
        return self.attention(genes.values, bag.features, bag.ragged)

    def _weights(self, genes: KnownTokens, bag: Tokens) -> Tensor:
        """How much each gene group looks at each patch, [total, G]."""
        return self.attention.weights(genes.values, bag.features, bag.ragged)

    def _read_patches(self, genes: KnownTokens, bag: Tokens | None, n_samples: int) -> Tensor:
        """What the gene groups read of the patches, as one vector [B, dim]."""
        missing = self.missing_patches.expand(n_samples, -1)
        if bag is None:
            if self.patches is None:
                return missing
            own = [*self.attention.parameters(), *self.patch_encoder.parameters()]
            return zero_gradients(missing, own)
        read = self._attend(genes, bag)  # [B, G, dim]
        read = self.patch_encoder(read, genes.usable)  # [B, dim]
        # selected, not multiplied: what came of an absent bag counts for nothing
        return torch.where(bag.present[:, None], read, missing)
