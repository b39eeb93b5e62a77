"""One branch of subspace fusion: patches and one list of genes, to a vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from survfuse.batch import Modality
from survfuse.layers import (
    DeformableAttended,
    DeformableCrossAttention,
    GatedAttentionPool,
    SelfNormalizingNetwork,
)
from survfuse.layers.bag_mean import bag_mean
from survfuse.layers.latent_attention import zero_gradients
from survfuse.models.subspace_config import SubspaceFusionConfig
from survfuse.models.subspace_layout import SlideLayout
from survfuse.models.subspace_pool import GenePool
from survfuse.ops.project_bag import project_bag
from survfuse.ragged import Ragged


class BranchGenes(NamedTuple):
    """The vector of a branch's genes."""

    values: Tensor  # [B, dim]; the learned one where they are absent
    present: Tensor  # [B] bool


class BranchOutput(NamedTuple):
    """What a branch makes of a batch."""

    feature: Tensor  # [B, dim]
    patches: Tensor | None  # [total, dim] projected, packed; None without any patch
    attended: DeformableAttended | None


class Sides(NamedTuple):
    """What attends to what in a branch; dense maps as [n, cells, dim]."""

    of_patches: Tensor  # [total, dim]
    fused: Tensor  # [total, dim] with the genes
    query: Tensor  # [total, dim]
    context: Tensor  # [total, dim]
    where: dict  # the places of both


class SubspaceBranch(nn.Module):
    """Genes to a vector; patches fused with it, attending to points they choose; pooled.

    Args:
        config: of the model.
        columns: of each table, the genes of this branch.
    """

    def __init__(
        self, config: SubspaceFusionConfig, columns: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self.config, self.tables = config, list(columns)
        for i, index in enumerate(columns.values()):
            # which columns is part of the configuration, not of the weights
            self.register_buffer(f"columns_{i}", torch.tensor(index), persistent=False)
        dim = config.dim
        n_genes = sum(map(len, columns.values()))
        self.genes = None
        if n_genes:
            widths = [*config.gene_widths, dim]
            self.genes = SelfNormalizingNetwork(
                n_genes, widths, activation="elu", dropout=config.gene_dropout
            )
        self.absent_genes = nn.Parameter(torch.zeros(dim))
        self.absent_patch = nn.Parameter(torch.zeros(dim))
        self.fuse = nn.Linear(2 * dim, dim)
        self.pooler = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.norm = self.gated_pool = self.gene_pool = None
        if config.pool == "genes":
            self.gene_pool = GenePool(
                dim,
                heads=config.pool_heads,
                head_dim=config.pool_head_dim,
                temperature=config.pool_temperature,
                backend=config.backend,
            )
        else:
            self.norm = nn.LayerNorm(dim)
        if config.bag is not None:
            self._add_patches(config.modalities[config.bag].channels)

    def _add_patches(self, channels: int) -> None:
        config, dim = self.config, self.config.dim
        self.project = nn.Linear(channels, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = DeformableCrossAttention(
            dim,
            heads=config.heads,
            dim_head=config.dim_head,
            offset_groups=config.offset_groups,
            downsample=config.downsample,
            offset_scale=config.offset_scale,
            kernel_size=config.kernel_size,
            dropout=config.attention_dropout,
            bias=config.bias,
            table_size=config.table_size,
            corners=config.corners,
            released=config.released,
            backend=config.backend,
        )
        if config.pool == "attention":
            self.gated_pool = GatedAttentionPool(
                dim,
                config.pool_width,
                temperature=config.pool_temperature,
                backend=config.backend,
            )

    def encode_genes(self, inputs: Mapping[str, Modality], n_samples: int) -> BranchGenes:
        """The vector of the genes, absent where every table of the branch is.

        Columns of a table that is absent beside another that is not count as zeros, which for
        standardised columns is their mean.
        """
        kind = self.absent_genes
        present = torch.zeros(n_samples, dtype=torch.bool, device=kind.device)
        if self.genes is None:
            return BranchGenes(kind.expand(n_samples, -1), present)
        parts = []
        for i, table in enumerate(self.tables):
            columns = getattr(self, f"columns_{i}")
            if table in inputs:
                there = inputs[table].present  # [B]
                # an absent row may hold anything: it is replaced before any product
                part = torch.where(there[:, None], inputs[table].values[:, columns], 0.0)
                present = present | there
            else:
                part = kind.new_zeros(n_samples, len(columns))
            parts.append(part.to(kind.dtype))
        values = self.genes(torch.cat(parts, 1)).relu()  # [B, dim]
        return BranchGenes(torch.where(present[:, None], values, self.absent_genes), present)

    def forward(self, bag: Tensor, slides: SlideLayout | None, genes: Tensor) -> BranchOutput:
        """The branch's feature.

        Without patches it is that of one patch of learned features that attends to nothing, so that
        genes alone go the same way to the feature.

        Args:
            bag: [T, D].
            slides: places of the patches; None if there are none.
            genes: [B, dim].
        """
        alone = self._alone(genes)  # [B, dim]
        if slides is None:
            alone = zero_gradients(alone, self._only_with_patches())
            return BranchOutput(self._feature(alone), None, None)
        patches = self.project_patches(bag, slides)  # [total, dim]
        sides = self._sides(patches, slides, genes)
        attended = self.attention(sides.query, sides.context, **sides.where)
        pooled = self._pool_samples(sides, attended.tokens, genes, slides)  # [B, dim]
        there = (slides.stored.lengths > 0)[:, None]
        feature = self._feature(torch.where(there, pooled, alone))  # [B, dim]
        return BranchOutput(feature, patches, attended)

    def project_patches(self, bag: Tensor, slides: SlideLayout) -> Tensor:
        """[total, dim] of the patches, each projected once."""
        weight, bias = self.project.weight, self.project.bias
        patches = project_bag(bag, weight, bias, ragged=slides.stored)
        return patches.to(weight.dtype).relu()

    def received(self, patches: Tensor, slides: SlideLayout, genes: Tensor) -> Tensor:
        """The attention each patch receives, [total]; its sum over a slide is 1 (or 0)."""
        sides = self._sides(patches, slides, genes)
        received = self.attention.received(sides.query, sides.context, **sides.where)
        return _shares(_of_stored(received, slides), slides)

    def pool_weights(self, patches: Tensor, slides: SlideLayout, genes: Tensor) -> Tensor | None:
        """The weight of each patch in the pool, [total]; None where all weigh the same."""
        if self.gated_pool is None and self.gene_pool is None:
            return None
        sides = self._sides(patches, slides, genes)
        attended = self.attention(sides.query, sides.context, **sides.where).tokens
        ragged = slides.packed if slides.index is None else None
        if self.gene_pool is not None:
            genes = genes if ragged is not None else genes[slides.samples]
            weights = self.gene_pool.weights(genes, sides.of_patches, attended, ragged)
        else:
            tokens = self.norm(sides.fused + attended)
            weights = self.gated_pool.weights(tokens, ragged, reduce="rows")
        return _of_stored(weights, slides)

    def _alone(self, genes: Tensor) -> Tensor:
        """[B, dim] of samples without patches."""
        patch = self._of_patches(self.absent_patch)  # [dim]
        if self.gene_pool is not None:
            return self.gene_pool.alone(genes, patch)
        return self.norm(patch + self._of_genes(genes))

    def _pool_samples(
        self, sides: Sides, attended: Tensor, genes: Tensor, slides: SlideLayout
    ) -> Tensor:
        """[B, dim] of all patches; what a sample without a slide gets is not used."""
        if slides.index is None:
            return self._pool(sides, attended, genes, slides.packed)
        rows = self._pool(sides, attended, genes[slides.samples])  # [n, dim]
        everyone = rows.new_zeros(slides.stored.n_bags, rows.shape[1])
        return everyone.index_copy(0, slides.samples, rows)

    def _sides(self, patches: Tensor, slides: SlideLayout, genes: Tensor) -> Sides:
        """Fused tokens, what attends to what, and where both lie."""
        of_genes = self._of_genes(genes)  # [B, dim]
        if slides.index is None:
            bags = slides.packed
            of_genes = bags.per_patch(of_genes)
            where = {"grid": slides.grid, "ragged": bags}
        else:
            patches = patches[slides.index]  # [n, cells, dim]
            of_genes = of_genes[slides.samples, None]  # [n, 1, dim]
            where = {"shape": (self.config.map_side,) * 2}
        of_patches = self._of_patches(patches)
        fused = of_patches + of_genes
        query, context = self.attention_norm(fused), self.attention_norm(patches)
        # under autocast the patches are wider, which were projected outside of it
        return Sides(of_patches, fused, query, context.to(query.dtype), where)

    def _of_patches(self, patches: Tensor) -> Tensor:
        """The patches' part of `W [patch, genes] + b`; no pair of both is ever formed."""
        return functional.linear(patches, self.fuse.weight[:, : self.config.dim])

    def _of_genes(self, genes: Tensor) -> Tensor:
        return functional.linear(genes, self.fuse.weight[:, self.config.dim :], self.fuse.bias)

    def _pool(
        self, sides: Sides, attended: Tensor, genes: Tensor, ragged: Ragged | None = None
    ) -> Tensor:
        """One row per bag or dense map, each with its genes."""
        if self.gene_pool is not None:
            return self.gene_pool(genes, sides.of_patches, attended, ragged)
        tokens = self.norm(sides.fused + attended)
        if self.gated_pool is not None:
            return self.gated_pool(tokens, ragged)[:, 0]
        if ragged is None:
            return tokens.mean(1)
        return bag_mean(tokens, ragged, backend=self.config.backend).to(tokens.dtype)

    def _feature(self, pooled: Tensor) -> Tensor:
        return self.output(torch.tanh(self.pooler(pooled)))  # [B, dim]

    def _only_with_patches(self) -> list[Tensor]:
        used = [self.fuse]
        if self.config.bag is not None:
            used += [self.project, self.attention_norm, self.attention]
        used += [] if self.gated_pool is None else [self.gated_pool]
        return [parameter for module in used for parameter in module.parameters()]


def _of_stored(values: Tensor, slides: SlideLayout) -> Tensor:
    """[total] of values of tokens: what a repeated patch has in all its cells."""
    if slides.index is None:
        return values
    total = values.new_zeros(slides.packed.total)
    return total.index_add_(0, slides.index.flatten(), values.flatten())


def _shares(received: Tensor, slides: SlideLayout) -> Tensor:
    """Divided by the sum over each bag; zeros where nothing was received."""
    bags = slides.packed
    bag = bags.bags()
    sums = received.new_zeros(bags.n_bags).index_add_(0, bag, received)[bag]
    return torch.where(sums > 0, received / torch.where(sums > 0, sums, 1.0), 0.0)
