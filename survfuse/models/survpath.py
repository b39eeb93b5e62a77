"""SurvPath: pathways and patches attend to one another, but patches not to patches.

Source: Jaume et al., "Modeling dense multimodal interactions between biological pathways and
histology for survival prediction", CVPR 2024, and a description of its public code. What differs
from that code is listed in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.bag_mean import bag_mean
from survfuse.layers.dropout import Dropout
from survfuse.layers.latent_attention import zero_gradients
from survfuse.layers.projected_attention import PatchProjection
from survfuse.layers.streaming import recomputed, stream
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import Tokens, encode_inputs, token_width
from survfuse.models.patches_and_genes import (
    GeneSide,
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
from survfuse.ops import (
    cross_attention,
    cross_attention_weights,
    cross_attention_with_lse,
    merge_attention,
)
from survfuse.ops.backends import plain_backend
from survfuse.ops.project_bag import form_heads
from survfuse.ragged import Ragged

__all__ = ["SurvPath", "SurvPathConfig"]

RECOMPUTE = ("none", "light", "all")


@dataclass(frozen=True)
class SurvPathConfig(ModelConfig):
    """Settings of `SurvPath`.

    Attributes:
        modalities: at most one bag or graph, and tables; a group of a table is a pathway.
        outputs: number of logits by task.
        dim: width of a token and of a projected patch.
        inner_dim: width of queries, keys and values, and of all that follows.
        heads: of the attention; they divide `inner_dim`.
        gene_widths: hidden widths of the network of a pathway, in front of `dim`.
        gene_activation: "selu" or "elu".
        gene_dropout: probability of alpha dropout in those networks.
        dropout: probability inside the feed-forward.
        shared_qkv: one projection makes queries, keys and values of both sides; False: one each.
        hidden: width of the layer in front of the heads.
        recompute: what of the patches is computed a second time in the backward instead of being
            kept: "none", "light" (the feed-forward, which holds more than all else and costs
            little) or "all".
        piece_rows: patches of a piece; None for what suits the device.
        backend: of the ops; None for the fastest that can serve the call.

    Presets:
        "paper"; "released" (ELU where the paper has a self-normalising network).

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {"paper": {}, "released": {"gene_activation": "elu"}}

    dim: int = 256
    inner_dim: int = 128
    heads: int = 1
    gene_widths: tuple[int, ...] = (256,)
    gene_activation: str = "selu"
    gene_dropout: float = 0.25
    dropout: float = 0.1
    shared_qkv: bool = True
    hidden: int = 64
    recompute: str = "light"
    piece_rows: int | None = None
    backend: str | None = None

    def _check(self) -> None:
        check_gene_side(self, "SurvPath")
        check_integers(self, {"dim": 1, "inner_dim": 1, "heads": 1, "hidden": 1})
        check_heads(self, "inner_dim", "heads")
        check_probabilities(self, "dropout")
        check_flags(self, "shared_qkv")
        check_choice(self, "recompute", RECOMPUTE)
        check_piece_rows(self)


class SurvPath(FusionModel):
    """One asymmetric attention: pathways over pathways and patches, patches over pathways.

    With P the normalised pathway tokens and H the normalised projected patches:
    `P' = softmax([P P^T, P H^T]) [P; H]` in one softmax, `H' = softmax(H P^T) P`, then per row
    `LN(FFN(.))`, the mean of each side, both side by side, a hidden layer, and the heads.

    Everything behind the attention is a function of one patch and the pathways, so the bag is
    streamed: piece by piece it is projected, attended to by the pathways (the pieces are merged by
    their logsumexps), attends to them, and adds to its mean.

    A pathway whose table a sample lacks is left out of keys and mean. A sample without any has
    learned tokens in place of them all; one without patches a learned vector in place of their
    mean, and its pathways attend to pathways alone.

    Args:
        config: see `SurvPathConfig`.

    Cost:
        For N patches and G pathways, of width D: 2 N D dim + 6 N dim inner + 8 N G inner
        operations forward. Kept are N (dim + 4 inner) numbers with `recompute` "light", at the
        price of one more feed-forward; nothing of the length of the bag with "all", at that of one
        more forward.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> config = SurvPathConfig({"rna": ("table", 8, {"a": (0, 1), "b": (2, 3)})})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> SurvPath(config)({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = SurvPathConfig
    config: SurvPathConfig

    def __init__(self, config: SurvPathConfig) -> None:
        super().__init__()
        self.config = config
        self.patches = patch_modality(config.modalities, "SurvPath")
        dim, inner = config.dim, config.inner_dim
        self.genes = GeneSide(
            config.modalities,
            [*config.gene_widths, dim],
            activation=config.gene_activation,
            dropout=config.gene_dropout,
        )
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        if self.patches is not None:
            width = token_width(config.modalities[self.patches])
            self.project = PatchProjection(width, dim, activation="none")
            shared = config.shared_qkv
            self.patch_qkv = None if shared else nn.Linear(dim, 3 * inner, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(inner),
            nn.Linear(inner, inner),
            nn.GELU(),
            Dropout(config.dropout),
            nn.Linear(inner, inner),
            nn.LayerNorm(inner),
        )
        self.missing_patches = nn.Parameter(torch.zeros(inner))
        self.hidden = nn.Sequential(nn.Linear(2 * inner, config.hidden), nn.ReLU())
        self.readout = TaskHeads(config.hidden, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings "genes" and "patches" [B, inner_dim], "joint" [B, hidden].

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities)
        genes = self.genes(inputs, n_samples)  # [B, G, dim]
        query, key, value = self._token_heads(genes.values)  # [B, G, H, d] each
        bias = genes.bias  # [B, G]
        # blocks [B, G, H, d] and logsumexps [B, G, H] of the pathways' joint softmax
        blocks = [
            cross_attention_with_lse(query, key, value, bias=bias, backend=self.config.backend)
        ]
        bag = tokens.get(self.patches)
        if bag is None:
            patches = self.missing_patches.expand(n_samples, -1)  # [B, inner]
        else:
            read, mean = self._stream(bag, query, key, value, bias)
            blocks += read
            # selected, not multiplied: what came of an absent bag counts for nothing
            patches = torch.where(bag.present[:, None], mean, self.missing_patches)  # [B, inner]
        read = merge_attention(*zip(*blocks))[0] if len(blocks) > 1 else blocks[0][0]
        rows = self.feed_forward(read.flatten(2))  # [B, G, inner]
        usable = genes.usable[..., None]
        pathways = torch.where(usable, rows, 0.0).sum(1) / usable.sum(1)  # [B, inner]
        joint = self.hidden(torch.cat([pathways, patches], -1))  # [B, hidden]
        if bag is None and self.patches is not None:
            joint = zero_gradients(joint, self._patch_parameters())
        embeddings = {"genes": pathways, "patches": patches, "joint": joint}
        return ModelOutput(self.readout(joint), embeddings, {})

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """How much each pathway looks at each patch, among patches alone; without dropout.

        Returns:
            By pathway [total], packed in batch order. The weights of a sample sum to 1, or to 0
            where it lacks the patches or, beside other pathways, this one.
        """
        with evaluating(self):
            tokens, n_samples = encode_inputs(inputs, self.config.modalities)
            genes = self.genes(inputs, n_samples)
            if self.patches not in tokens:
                return {}
            bag = tokens[self.patches]
            heads = self._token_heads(genes.values)
            blocks, _ = self._stream(bag, *heads, genes.bias)
            lse = torch.stack([lse for _, lse in blocks]).logsumexp(0)  # over the patches
            backend = plain_backend(self.config.backend)

            def run(part: Ragged) -> tuple[Tensor]:
                _, key, _ = self._patch_heads(bag.features, part)
                return (
                    cross_attention_weights(
                        heads[0],
                        key,
                        lse,
                        key_ragged=part.packed(),
                        reduce="heads",
                        backend=backend,
                    ),
                )

            rows = self.config.piece_rows
            found = torch.cat([x for (x,) in stream(run, bag.features, bag.ragged, rows=rows)])
        return {self.patches: weights_by_group(self.genes, found, genes.usable, bag)}

    def _stream(
        self, bag: Tokens, query: Tensor, key: Tensor, value: Tensor, bias: Tensor
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """What pathways read of each piece (out, lse), and the mean over patches [B, inner]."""
        backend = self.config.backend

        def run(part: Ragged) -> tuple[Tensor, Tensor, Tensor]:
            packed = part.packed()
            q, k, v = self._patch_heads(bag.features, part)  # [n, H, d] each
            read, lse = cross_attention_with_lse(query, k, v, key_ragged=packed, backend=backend)
            own = cross_attention(
                q, key, value, bias=bias, query_ragged=packed, backend=backend
            )  # [n, H, d]
            own = own.flatten(1).to(query.dtype)  # [n, inner]
            if self.config.recompute == "light":
                mean = recomputed(self._mean, own, packed, device=own.device)
            else:
                mean = self._mean(own, packed)
            return read, lse, mean * part.lengths[:, None]

        found = stream(
            run,
            bag.features,
            bag.ragged,
            recompute=self.config.recompute == "all",
            rows=self.config.piece_rows,
        )
        total = torch.stack([part for _, _, part in found]).sum(0)
        mean = total / bag.ragged.lengths.clamp(min=1)[:, None]
        # a bag that counts as absent may have rows: its part of the softmax is left out
        there = bag.present[:, None, None]
        read = [(out, torch.where(there, lse, -torch.inf)) for out, lse, _ in found]
        return read, mean.to(query.dtype)

    def _mean(self, own: Tensor, ragged: Ragged) -> Tensor:
        """The mean [B, inner] of what comes of the rows of every bag [n, inner]."""
        return bag_mean(self.feed_forward(own), ragged, backend=self.config.backend)

    def _token_heads(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of the pathways, [B, G, H, d] each."""
        return self._split(self.qkv(self.norm(tokens)))

    def _patch_heads(self, features: Tensor, part: Ragged) -> tuple[Tensor, ...]:
        """Those of the patches of a piece, [n, H, d] each, of the type of the bag.

        fp64 features keep it beside weights that are fp64 too.
        """
        rows = self.project(features, part)  # [n, dim]
        qkv = self.qkv if self.patch_qkv is None else self.patch_qkv
        if rows.dtype == torch.float64:
            rows = rows.to(qkv.weight.dtype)
        parts = form_heads(
            qkv.weight.unflatten(0, (3 * self.config.heads, -1)),
            None,
            bag=rows,
            norm_weight=self.norm.weight,
            norm_bias=self.norm.bias,
            norm_eps=self.norm.eps,
            bias=None,
            ragged=part.packed(),
        )  # [n, 3 H, d]
        return parts.unflatten(1, (3, -1)).unbind(1)

    def _split(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (3, self.config.heads, -1)).unbind(-3)

    def _patch_parameters(self) -> list[Tensor]:
        own = [self.project] if self.patch_qkv is None else [self.project, self.patch_qkv]
        return [parameter for module in own for parameter in module.parameters()]
