"""CMTA: each side is encoded, translated by the other, and held near its translation.

Source: Zhou, Chen, "Cross-modal translation and alignment for survival analysis", ICCV 2023, and a
description of its public code. What differs from that code is listed in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.bilinear_fusion import BilinearFusion, ConcatFusion
from survfuse.layers.dropout import Dropout
from survfuse.layers.latent_attention import zero_gradients
from survfuse.layers.nystrom_encoder import NystromEncoder
from survfuse.layers.projected_attention import PatchProjection
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.cmta_config import CMTAConfig
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import Tokens, encode_inputs, token_width
from survfuse.models.patches_and_genes import (
    GeneSide,
    KnownTokens,
    patch_modality,
    weights_by_group,
)
from survfuse.ops import (
    bag_attends_tokens,
    tokens_attend_bag,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.ops.backends import plain_backend
from survfuse.ragged import Ragged

__all__ = ["CMTA", "CMTAConfig"]


class CMTA(FusionModel):
    """Two encoders, attention across, two decoders, and a loss that aligns them.

    Patches and gene tokens each go through a `NystromEncoder`: a class token and rows. Encoded
    patches attend to encoded genes, and encoded genes to encoded patches; what they read goes
    through a decoder of the same shape, whose class token is the side as told by the other. The
    mean of both class tokens stands for the side. The auxiliary loss "alignment" draws decoded to
    encoded class tokens; the encoded ones are constants to its gradient.

    A gene group whose table a sample lacks is left out. A sample without any has learned tokens in
    place of them all; one without patches a learned vector in place of theirs, and for its genes
    the encoded class token alone. Only samples with both sides are aligned.

    Args:
        config: see `CMTAConfig`.

    Cost:
        O(N (D + landmarks + 49) dim) operations. A training step holds at most about 23 arrays of
        N x dim numbers, about 44 without `recompute`, which costs a quarter more time. The lengths
        of the bags are read on the host.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> config = CMTAConfig({"rna": ("table", 8, {"a": (0, 1), "b": (2, 3)})})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> CMTA(config)({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = CMTAConfig
    export_obstacle: ClassVar[str | None] = (
        "sequences are cut out and laid out as squares by their lengths"
    )
    config: CMTAConfig

    def __init__(self, config: CMTAConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = patch_modality(config.modalities, "CMTA")
        dim = config.dim
        self.genes = GeneSide(
            config.modalities,
            [*config.gene_widths, dim],
            activation=config.gene_activation,
            dropout=config.gene_dropout,
        )
        self.gene_encoder = self._make_encoder(square=False)
        if self.patches is not None:
            self.project = PatchLayers(config)
            self.patch_encoder = self._make_encoder(square=True)
            self.patches_read = CrossProjections(dim, config.attention_heads)
            self.genes_read = CrossProjections(dim, config.attention_heads)
            self.patch_decoder = self._make_encoder(square=True)
            self.gene_decoder = self._make_encoder(square=False)
        self.missing_patches = nn.Parameter(torch.zeros(dim))
        if config.fusion == "concat":
            self.fusion = ConcatFusion(dim)
        else:
            self.fusion = BilinearFusion(dim, scale=config.bilinear_scale, dropout=config.dropout)
        self.readout = TaskHeads(dim, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings "genes", "patches" and "joint", [B, dim] each; auxiliary
            "alignment", weighted, unless the configuration has none.

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities)
        genes = self.genes(inputs, n_samples)  # [B, G, dim]
        gene_token, rows, gene_ranges, gene_lengths = self._encode_genes(
            genes
        )  # [B, dim], [Tg, dim]
        bag = tokens.get(self.patches)
        if bag is None:
            missing = self.missing_patches.expand(n_samples, -1)  # [B, dim]
            if self.patches is not None:
                missing = zero_gradients(missing, self._patch_parameters())
            return self._result(missing, gene_token, gene_token.new_zeros(()))
        known = self._spread(genes, rows)  # [B, G, dim]
        ragged, lengths = bag.ragged.packed(), bag.ragged.lengths.tolist()
        patch_token, patches = self.patch_encoder(
            self.project(bag), ragged, lengths
        )  # [B, dim], [total, dim]
        told = self._patches_ask(patches, known, genes.bias, ragged)  # [total, dim]
        patch_twin, _ = self.patch_decoder(told, ragged, lengths)  # [B, dim]
        told = self._genes_ask(known, patches, ragged)[genes.usable]  # [Tg, dim]
        gene_twin, _ = self.gene_decoder(told, gene_ranges, gene_lengths)  # [B, dim]
        there = bag.present[:, None]
        # selected, not multiplied: what came of an absent bag counts for nothing
        patch_part = torch.where(there, (patch_token + patch_twin) / 2, self.missing_patches)
        gene_part = torch.where(there, (gene_token + gene_twin) / 2, gene_token)
        aligned = bag.present & genes.known
        alignment = self._distance(patch_twin, patch_token.detach(), aligned)
        alignment = alignment + self._distance(gene_twin, gene_token.detach(), aligned)
        return self._result(patch_part, gene_part, alignment)

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """How much each encoded gene group looks at each encoded patch; without dropout.

        Returns:
            By gene group [total], packed in batch order. The weights of a sample sum to 1, or to 0
            where it lacks the patches or, beside other groups, this one.
        """
        with evaluating(self):
            tokens, n_samples = encode_inputs(inputs, self.config.modalities)
            if self.patches not in tokens:
                return {}
            bag, genes = tokens[self.patches], self.genes(inputs, n_samples)
            known = self._spread(genes, self._encode_genes(genes)[1])
            ragged, lengths = bag.ragged.packed(), bag.ragged.lengths.tolist()
            _, patches = self.patch_encoder(self.project(bag), ragged, lengths)
            part = self.genes_read
            query = part.split(part.query(known))
            w_k, w_v = (part.split(layer.weight, 0) for layer in (part.key, part.value))
            backend = self.config.backend
            _, lse = tokens_attend_bag_with_lse(
                query, patches, w_k, w_v, ragged=ragged, backend=backend
            )
            weights = tokens_attend_bag_weights(
                query,
                patches,
                w_k,
                lse,
                ragged=ragged,
                reduce="heads",
                backend=plain_backend(backend),
            )
        return {self.patches: weights_by_group(self.genes, weights, genes.usable, bag)}

    def _make_encoder(self, *, square: bool) -> NystromEncoder:
        config = self.config
        return NystromEncoder(
            config.dim,
            heads=config.encoder_heads,
            landmarks=config.landmarks,
            dropout=config.dropout,
            square=square,
            recompute=config.recompute and square,
            backend=config.backend,
        )

    def _encode_genes(self, genes: KnownTokens) -> tuple[Tensor, Tensor, Ragged, list[int]]:
        """Class tokens [B, dim], and rows [Tg, dim] of usable groups alone with their ranges."""
        lengths = genes.usable.sum(1).tolist()
        ragged = Ragged.from_lengths(lengths, device=genes.values.device)
        token, rows = self.gene_encoder(genes.values[genes.usable], ragged, lengths)
        return token, rows, ragged, lengths

    def _spread(self, genes: KnownTokens, rows: Tensor) -> Tensor:
        """Rows of usable groups [Tg, dim] in their places [B, G, dim], beside zeros."""
        return torch.zeros_like(genes.values).masked_scatter(genes.usable[..., None], rows)

    def _patches_ask(self, patches: Tensor, genes: Tensor, bias: Tensor, ragged: Ragged) -> Tensor:
        """What patches [total, dim] read of gene groups [B, G, dim]: [total, dim]."""
        part = self.patches_read
        read = bag_attends_tokens(
            patches,
            part.split(part.query.weight, 0),
            part.split(part.key(genes)),
            part.split(part.value(genes)),
            b_q=part.split(part.query.bias),
            key_bias=bias,
            ragged=ragged,
            backend=self.config.backend,
        )
        return part.output(read.flatten(1))

    def _genes_ask(self, genes: Tensor, patches: Tensor, ragged: Ragged) -> Tensor:
        """What gene groups [B, G, dim] read of patches [total, dim]: [B, G, dim]."""
        part = self.genes_read
        read = tokens_attend_bag(
            part.split(part.query(genes)),
            patches,
            part.split(part.key.weight, 0),
            part.split(part.value.weight, 0),
            b_v=part.split(part.value.bias),
            ragged=ragged,
            backend=self.config.backend,
        )
        return part.output(read.flatten(2))

    def _distance(self, twin: Tensor, target: Tensor, aligned: Tensor) -> Tensor:
        """The mean distance of class tokens [B, dim] over the samples that are aligned."""
        kind = self.config.alignment
        if kind == "l1":
            each = (twin - target).abs().mean(1)
        elif kind == "mse":
            each = (twin - target).square().mean(1)
        elif kind == "cosine":
            each = 1.0 - functional.cosine_similarity(twin, target, dim=1)
        else:
            log_target = target.log_softmax(1)
            each = (log_target.exp() * (log_target - twin.log_softmax(1))).sum(1)
        return torch.where(aligned, each, 0.0).sum() / aligned.sum().clamp(min=1)

    def _result(self, patches: Tensor, genes: Tensor, alignment: Tensor) -> ModelOutput:
        joint = self.fusion(patches, genes)  # [B, dim]
        auxiliary = {}
        if self.config.alignment != "none":
            auxiliary["alignment"] = self.config.alignment_weight * alignment
        embeddings = {"genes": genes, "patches": patches, "joint": joint}
        return ModelOutput(self.readout(joint), embeddings, auxiliary)

    def _patch_parameters(self) -> list[Tensor]:
        modules = (self.project, self.patch_encoder, self.patch_decoder, self.gene_decoder)
        modules += (self.patches_read, self.genes_read)
        return [parameter for module in modules for parameter in module.parameters()]


class PatchLayers(nn.Module):
    """Layers of `dropout(relu(W x + b))` of every patch: [total, dim] of the parameters' type."""

    def __init__(self, config: CMTAConfig) -> None:
        super().__init__()
        width = token_width(config.modalities[patch_modality(config.modalities, "CMTA")])
        widths, dropout = [*config.patch_widths, config.dim], config.patch_dropout
        self.first = PatchProjection(width, widths[0], dropout=dropout)
        self.rest = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(before, after), nn.ReLU(), Dropout(dropout))
                for before, after in pairwise(widths)
            )
        )

    def forward(self, bag: Tokens) -> Tensor:
        """Packed in batch order."""
        rows = self.first(bag.features, bag.ragged)
        return self.rest(rows.to(self.first.weight.dtype))


class CrossProjections(nn.Module):
    """The projections of an attention of one side to the other.

    A bias of the keys would shift all logits of a query alike, so there is none.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)

    def split(self, x: Tensor, axis: int = -1) -> Tensor:
        """The heads apart: [..., H, d], or [H, d, ...] for a weight with axis 0."""
        return x.unflatten(axis, (self.heads, -1))
