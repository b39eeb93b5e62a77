"""AMMASurv: asymmetrical attention between patches and genes in a Transformer encoder.

Source: Wang, Huang, Wang, Wu, "AMMASurv: asymmetrical multi-modal attention for accurate survival
analysis with whole slide images and gene expression data", BIBM 2021. Only the abstract is public:
an asymmetrical multi-modal attention inside a Transformer encoder, which uses the information
within each modality and adapts to modalities of different importance. All below that sentence is
our reading of it; positions of patches follow the same group's SeTranSurv (MICCAI 2021), which
fuses them with the features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import BagBatch, Modality, ModelOutput
from survfuse.layers.fourier import (
    coordinate_positions,
    fourier_encode,
    index_positions,
)
from survfuse.layers.gated_attention_pool import GatedAttentionPool
from survfuse.layers.latent_attention import zero_gradients
from survfuse.models.ammasurv_config import AMMASurvConfig
from survfuse.models.ammasurv_inspection import attention_masses, gene_weights
from survfuse.models.ammasurv_layer import AsymmetricLayer, Membership
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.gene_tokens import GeneTokens
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import check_places, encode_inputs
from survfuse.ops.project_bag import project_bag
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged

__all__ = ["AMMASurv", "AMMASurvConfig"]


class AMMASurv(FusionModel):
    r"""Patch tokens and gene tokens that attend to one another by any set of blocks.

    A token of side a attends to the sides U(a) that are enabled for it, by one softmax over all of
    their keys, in which every modality m (the patches, or one table) has an importance:

    .. math:: o = \sum_{i \in U(a)} \mathrm{softmax}_{i \in U(a)}\bigl(q \cdot k_i / \sqrt{d}
              + \beta_{m(i)} - \log n_{m(i)}\bigr)\, v_i

    Layers have the norm in front, and a gated feed-forward. Then each modality is pooled (patches
    by gated attention, gene tokens by their mean) and the pooled are added, each by its gate:
    `z = sum_m gate_m W_m LN(pool_m)`. Every task reads z.

    Patches attend to one another exactly or through landmarks (`patch_attention_kind`). Landmarks
    give a mean of values, and by the logsumexp over landmarks, each counted for the patches it
    stands for, an estimate of the weight of all patches; so merged, the union with genes is the
    exact one where a bag has no more patches than landmarks. Genes attend to patches exactly in
    either case. Landmarks are means of neighbouring rows, so that there the order of patches, which
    is otherwise nothing, has a small effect.

    A modality that a sample lacks is no key, is not pooled and has gate 0; a sample without
    anything gets a learned vector for z.

    Args:
        config: see `AMMASurvConfig`.

    Attributes:
        names: of the modalities, the bag first, in the order of "gates".

    Cost:
        Without "pp" one read of the patch tokens per block; without any block in which patches ask
        nothing of their length but the tokens is held. "pp" takes N^2 pairs, or N * landmarks.

    Example:
        >>> from survfuse.batch import TableBatch
        >>> modalities = {"slide": ("bag", 32), "rna": ("table", 6, {"a": (0, 1), "b": (2, 3, 5)})}
        >>> model = AMMASurv.from_preset("paper", modalities=modalities)
        >>> slide = BagBatch(torch.randn(50, 32), Ragged.from_lengths([50]), torch.tensor([True]))
        >>> rna = TableBatch(torch.randn(1, 6), torch.tensor([True]))
        >>> model({"slide": slide, "rna": rna}).logits["survival"].shape
        torch.Size([1, 4])
    """

    config_class: ClassVar[type] = AMMASurvConfig
    config: AMMASurvConfig

    def __init__(self, config: AMMASurvConfig) -> None:
        if not isinstance(config, AMMASurvConfig):
            raise TypeError(
                f"config is {type(config).__name__}; it must be an AMMASurvConfig "
                "(AMMASurvConfig(**values) makes one of a dict)"
            )
        super().__init__()
        self.config = config
        bag, dim = config.modalities[config.bag], config.dim
        self.names = [config.bag, *(name for name in config.modalities if name != config.bag)]
        self.patch_projection = nn.Linear(bag.channels, dim)
        self.position_projection = None
        if bag.axes:
            self.position_projection = nn.Linear(config.position_channels, dim, bias=False)
        self.gene_tokens = GeneTokens(
            config.modalities,
            [*config.gene_hidden, dim],
            activation=config.gene_activation,
            dropout=config.gene_dropout,
        )
        tables = [self.names.index(table) for table, _ in self.gene_tokens.names]
        self.register_buffer("tables", torch.tensor(tables), persistent=False)
        self.layers = nn.ModuleList(
            AsymmetricLayer(config, blocks, tables) for blocks in config.layer_blocks
        )
        self.pool = GatedAttentionPool(dim, config.pool_hidden, backend=config.backend)
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim)) for _ in self.names
        )
        self.gate_bias = nn.Parameter(torch.zeros(len(self.names)))
        self.gate_weight = None
        if config.gate == "tokens":
            self.gate_weight = nn.Parameter(torch.zeros(len(self.names), dim))
        self.nothing = nn.Parameter(torch.randn(dim))
        self.hidden = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Dropout(config.readout_dropout)
        )
        self.readout = TaskHeads(dim, config.outputs)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings: each modality [B, dim] as it is added, without its gate,
            zeros where absent; "gates" [B, M] in the order of `names`; and "joint" [B, dim].

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        patches, genes, batch = self._encode(inputs)  # [total, dim], [B, G, dim]
        pooled, present = self._pool(patches, genes, batch)  # [B, M, dim], [B, M]
        gates = self._gates(pooled, present)  # [B, M]
        joint = torch.einsum("bm,bmd->bd", gates, pooled)
        joint = torch.where(present.any(1, keepdim=True), joint, self.nothing)  # [B, dim]
        # where a block has nothing to choose between, an importance changes nothing
        idle = [layer.importance for layer in self.layers if layer.importance is not None]
        joint = zero_gradients(joint, [self.nothing, self.gate_bias, *idle])
        embeddings = dict(zip(self.names, pooled.unbind(1), strict=True))
        embeddings |= {"gates": gates, "joint": joint}
        return ModelOutput(self.readout(self.hidden(joint)), embeddings, {})

    def _encode(
        self, inputs: Mapping[str, Modality], seen: list[tuple] | None = None
    ) -> tuple[Tensor, Tensor, Membership]:
        """Tokens behind the last layer; what every layer was given is appended if asked."""
        patches, genes, batch = self._tokens(inputs)
        for layer in self.layers:
            if seen is not None:
                seen.append((layer, patches, genes, batch))
            patches, genes = layer(patches, genes, batch)
        return patches, genes, batch

    def _tokens(self, inputs: Mapping[str, Modality]) -> tuple[Tensor, Tensor, Membership]:
        """Tokens of both sides, and which there are."""
        encoded, n_samples = encode_inputs(inputs, self.config.modalities)
        weight = self.patch_projection.weight
        if self.config.bag in encoded:
            bag = inputs[self.config.bag]
            features, ragged = bag.features, bag.ragged
            present = encoded[self.config.bag].present
        else:
            bag, features = None, weight.new_zeros(0, weight.shape[1])
            lengths = torch.zeros(n_samples, dtype=torch.int64, device=weight.device)
            ragged, present = Ragged(lengths, lengths, 0, 0), lengths > 0
        patches = project_bag(
            features,
            weight,
            self.patch_projection.bias,
            ragged=ragged,
            bias=_without_denied(features, ragged, present),
        ).to(weight.dtype)  # [total, dim], bags one behind the other
        if self.position_projection is not None:
            patches = patches + self._positions(bag, ragged, present)
        if self.config.patch_activation == "relu":
            patches = functional.relu(patches)
        genes = self.gene_tokens(inputs, n_samples)
        return patches, genes.values, Membership(ragged.packed(), present, genes.present)

    def _positions(self, bag: BagBatch | None, ragged: Ragged, present: Tensor) -> Tensor:
        """Projected Fourier encoding of the patches [total, dim]."""
        weight, axes = self.position_projection.weight, self.config.modalities[self.config.bag].axes
        kind = accumulation_type(weight.dtype)
        if bag is None:
            places = weight.new_zeros(0, axes, dtype=kind)
        elif axes == 1:
            places = index_positions(ragged, dtype=kind)
        else:
            if bag.coords is None:
                raise ValueError(
                    f"inputs[{self.config.bag!r}].coords is None; modality {self.config.bag!r} has "
                    "axes=2, which encodes the slide coordinates [T, 2] of its patches"
                )
            places = coordinate_positions(bag.coords, ragged).to(kind)
            check_places(places, ragged, present)
            places = torch.where(ragged.per_patch(present)[:, None], places, 0.0)
        channels = fourier_encode(
            places, bands=self.config.fourier_bands, max_frequency=self.config.max_frequency
        )
        return self.position_projection(channels.to(weight.dtype)).to(weight.dtype)

    def _pool(self, patches: Tensor, genes: Tensor, batch: Membership) -> tuple[Tensor, Tensor]:
        """Of every modality [B, M, dim], zeros where absent, and which there are [B, M]."""
        found = [self.pool(patches, batch.ragged)[:, 0]]  # [B, dim]
        present = [batch.has_patches]
        for m in range(1, len(self.names)):
            mine = batch.has_genes & (self.tables == m)  # [B, G]
            total = torch.where(mine[..., None], genes, 0.0).sum(1)
            found.append(total / mine.sum(1, keepdim=True).clamp(min=1))
            present.append(mine.any(1))
        there = torch.stack(present, 1)
        vectors = [
            transform(vector.to(self.nothing.dtype))
            for transform, vector in zip(self.pooled, found, strict=True)
        ]
        return torch.where(there[..., None], torch.stack(vectors, 1), 0.0), there

    def _gates(self, pooled: Tensor, present: Tensor) -> Tensor:
        """[B, M], 0 where absent."""
        scores = self.gate_bias.expand(present.shape)
        if self.gate_weight is not None:
            scores = scores + torch.einsum("bmd,md->bm", pooled, self.gate_weight)
        if self.config.gate_activation == "sigmoid":
            return torch.where(present, scores.sigmoid(), 0.0)
        # finite also where nothing is present, whose gates are replaced behind the softmax
        scores = torch.where(present, scores, torch.finfo(scores.dtype).min)
        return torch.where(present, scores.softmax(1), 0.0)

    def key_importance(self) -> dict[str, dict[str, Tensor]]:
        """The learned bias beta of each modality's keys, by layer; empty where none is learned."""
        return {
            f"layer {i}": dict(zip(self.names, layer.importance.detach(), strict=True))
            for i, layer in enumerate(self.layers)
            if layer.importance is not None
        }

    @torch.no_grad()
    def attention_mass(
        self, inputs: Mapping[str, Modality]
    ) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The share of attention that each modality gets, without dropout.

        Returns:
            By layer ("layer 0"), by who asks ("patches", "genes"; only those that ask there) and by
            modality: [B], the mean over heads and the tokens that ask. They sum to 1 over
            modalities, and to 0 where the sample has no token that asks, or none to be asked.
        """
        masses: dict[str, dict[str, dict[str, Tensor]]] = {}
        seen: list[tuple] = []
        with evaluating(self):
            self._encode(inputs, seen)
            for i, (layer, *given) in enumerate(seen):
                by_side = attention_masses(layer, *given) if layer.blocks else {}
                masses[f"layer {i}"] = {
                    side: dict(zip(self.names, mass.unbind(1), strict=True))
                    for side, mass in by_side.items()
                }
        return masses

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """How much the pool and each gene group look at each patch, streamed; without dropout.

        Returns:
            By bag, "pool" and, for every layer with "gp", "layer 0 rna:growth" (table and group):
            weights [total], packed in batch order. The weights of a sample sum to 1, among its
            patches, and are 0 where it lacks the group. Nothing without any patch.
        """
        weights: dict[str, Tensor] = {}
        with evaluating(self):
            seen: list[tuple] = []
            patches, _, batch = self._encode(inputs, seen)
            if not batch.ragged.total:
                return {}
            for i, (layer, *given) in enumerate(seen):
                if "gp" in layer.blocks:
                    found = gene_weights(layer, *given)
                    for (table, group), column in zip(self.gene_tokens.names, found.unbind(1)):
                        weights[f"layer {i} {table}:{group}"] = column
            there = batch.ragged.per_patch(batch.has_patches)
            pool = self.pool.weights(patches, batch.ragged, reduce="rows")
            weights["pool"] = torch.where(there, pool, 0.0)
        return {self.config.bag: weights}


def _without_denied(features: Tensor, ragged: Ragged, present: Tensor) -> Tensor | None:
    """Bias [T] that is -inf at stored rows of no present bag, which may hold anything."""
    on_host = features.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and not bool((ragged.lengths > 0)[~present].any()):
        return None
    bias = torch.full((features.shape[0],), -torch.inf, device=features.device)
    allowed = torch.where(ragged.per_patch(present), 0.0, -torch.inf)
    return bias.scatter_reduce(0, ragged.rows(), allowed, "amax")
