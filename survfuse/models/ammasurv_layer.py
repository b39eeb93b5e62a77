"""One encoder layer of AMMASurv: blocks of attention between patches and genes, any set of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from survfuse.layers.dropout import Dropout
from survfuse.layers.feed_forward import GatedFeedForward
from survfuse.layers.nystrom_attention import nystrom_attention, segment_means
from survfuse.models.ammasurv_config import AMMASurvConfig
from survfuse.ops import (
    bag_attends_tokens_with_lse,
    cross_attention_with_lse,
    merge_attention,
    tokens_attend_bag_with_lse,
)
from survfuse.pooling import accumulation_type
from survfuse.ragged import Ragged

# rows of a feed-forward that are computed, and computed again, at a time
_CHUNK = 8192


class Membership(NamedTuple):
    """Which tokens there are; the same in every layer."""

    ragged: Ragged  # of the patches, one bag behind the other
    has_patches: Tensor  # [B] bool
    has_genes: Tensor  # [B, G] bool


class Heads(NamedTuple):
    """Projections of one side, each [..., H, d]; None where no block needs them."""

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None


class Part(NamedTuple):
    """What a side got from one of the sides it attends to."""

    out: Tensor  # [..., H, d]
    lse: Tensor  # [..., H], with the importance of the side that is asked


class Side(nn.Module):
    """Parameters of one side in one layer, as far as its blocks need them."""

    def __init__(self, config: AMMASurvConfig, *, asks: bool, asked: bool) -> None:
        super().__init__()
        dim, inner = config.dim, config.heads * config.head_dim
        self.split = (config.heads, config.head_dim)
        self.checkpoint = config.checkpoint
        self.norm = nn.LayerNorm(dim) if asks or asked else None
        self.query = nn.Linear(dim, inner, bias=False) if asks else None
        self.key = nn.Linear(dim, inner, bias=False) if asked else None
        self.value = nn.Linear(dim, inner, bias=False) if asked else None
        # without a bias, whoever finds nothing to attend to is not changed by it
        self.output = nn.Linear(inner, dim, bias=False) if asks else None
        self.feed_forward = None
        if asks:
            self.feed_forward = GatedFeedForward(
                dim,
                expansion=config.ff_expansion,
                activation=config.ff_activation,
                dropout=config.ff_dropout,
            )
        self.dropout = Dropout(config.ff_dropout)

    def project(self, normed: Tensor) -> Heads:
        """Of normalised tokens [..., dim]."""
        layers = (self.query, self.key, self.value)
        return Heads(*(None if w is None else w(normed).unflatten(-1, self.split) for w in layers))

    def weight(self, name: str) -> Tensor:
        """One of the projections as [H, d, dim]."""
        return getattr(self, name).weight.unflatten(0, self.split)

    def norms(self) -> dict[str, Tensor | float]:
        """What the ops that normalise a bag as they read it are told."""
        norm = self.norm
        return {"norm_weight": norm.weight, "norm_bias": norm.bias, "norm_eps": norm.eps}

    def attended(self, parts: list[Part]) -> Tensor:
        """The update of the tokens [..., dim] by one softmax over all that they attended to."""
        out = parts[0].out
        if len(parts) > 1:
            outs = [part.out.to(out.dtype) for part in parts]
            out, _ = merge_attention(outs, [part.lse for part in parts])
        return self.dropout(self.output(out.flatten(-2).to(self.output.weight.dtype)))

    def transform(self, x: Tensor) -> Tensor:
        """The update of the tokens by the feed-forward."""
        long = x.dim() == 2 and self.checkpoint and torch.is_grad_enabled()
        if not long or torch.compiler.is_compiling():
            return self.feed_forward(x)
        parts = [checkpoint(self.feed_forward, rows, use_reentrant=False) for rows in chunks(x)]
        return torch.cat(parts)


def chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Runs of rows; one, without rows, of none."""
    return x.split(_CHUNK) if x.shape[0] else (x,)


def self_attention_of_one_bag(heads: Heads, dropout: float) -> tuple[Tensor, Tensor]:
    """out [N, H, d] by torch, and zeros [N, H] for a logsumexp that nothing is merged by."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in heads)
    out = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    out = out[0].transpose(0, 1)
    return out, torch.zeros(out.shape[:2], device=out.device)


class AsymmetricLayer(nn.Module):
    """Patches and genes attend to one another and themselves by the enabled blocks.

    Per side that asks, with residuals: one softmax over the keys of all sides it attends to, then a
    gated feed-forward; both sides read what the layer was given.

    Args:
        config: of the model.
        blocks: of this layer.
        tables: for each gene token the number of its modality, counted from 1 (0 is the patches).
    """

    def __init__(self, config: AMMASurvConfig, blocks: tuple[str, ...], tables: list[int]) -> None:
        super().__init__()
        self.config, self.blocks = config, blocks
        self.patches = self._side("p")
        self.genes = self._side("g")
        self.importance = None
        if config.learned_importance:
            self.importance = nn.Parameter(torch.zeros(1 + max(tables)))
        self.register_buffer("tables", torch.tensor(tables), persistent=False)
        counts = torch.bincount(self.tables)[self.tables] if config.count_normalised else 1
        log_count = torch.as_tensor(counts).expand(len(tables)).double().log()
        self.register_buffer("log_count", log_count.to(torch.get_default_dtype()), persistent=False)

    def _side(self, letter: str) -> Side:
        asks = any(block[0] == letter for block in self.blocks)
        asked = any(block[1] == letter for block in self.blocks)
        return Side(self.config, asks=asks, asked=asked)

    def forward(self, patches: Tensor, genes: Tensor, batch: Membership) -> tuple[Tensor, Tensor]:
        """Update both sides.

        Args:
            patches: [total, dim].
            genes: [B, G, dim].
            batch: which of them there are.

        Returns:
            Both, of the same shapes. What stands in absent tokens means nothing.
        """
        if not self.blocks:
            return patches, genes
        if self.config.checkpoint and torch.is_grad_enabled():
            asked = checkpoint(self._updates, patches, genes, batch, use_reentrant=False)
        else:
            asked = self._updates(patches, genes, batch)
        sides = zip((self.patches, self.genes), (patches, genes), asked, strict=True)
        updated = []
        for side, tokens, update in sides:
            if update is not None:
                tokens = tokens + update
                tokens = tokens + side.transform(tokens)
            updated.append(tokens)
        return updated[0], updated[1]

    def _updates(self, patches: Tensor, genes: Tensor, batch: Membership) -> list[Tensor | None]:
        heads = self.heads(genes)
        found = self.parts(patches, heads, batch)
        sides = {"p": self.patches, "g": self.genes}
        return [
            side.attended(list(found[k].values())) if found[k] else None
            for k, side in sides.items()
        ]

    def heads(self, genes: Tensor) -> Heads:
        """Of the genes; the patches' are formed only where patches attend to patches."""
        if self.genes.norm is None:
            return Heads(None, None, None)
        return self.genes.project(self.genes.norm(genes))

    def parts(self, patches: Tensor, genes: Heads, batch: Membership) -> dict[str, dict[str, Part]]:
        """What each side that asks (p, g) got from each side that it asks."""
        found: dict[str, dict[str, Part]] = {"p": {}, "g": {}}
        patch_bias, gene_bias = self.key_biases(batch)
        dropout = self.config.attention_dropout if self.training else 0.0
        # [total, H, d] each; without "pp" the ops below need no projection of the patches
        normed = self.patches.norm(patches) if "pp" in self.blocks else None
        heads = None if normed is None else self.patches.project(normed)
        if "pp" in self.blocks:
            out, lse = self._patches_to_patches(normed, heads, batch.ragged, dropout)
            found["p"]["p"] = Part(out, lse + batch.ragged.per_patch(patch_bias)[:, None])
        if "pg" in self.blocks:
            found["p"]["g"] = self.patches_to_genes(
                patches, heads, genes.key, genes.value, gene_bias, batch, dropout
            )
        if "gp" in self.blocks:
            out, lse = self.genes_to_patches(patches, heads, genes.query, batch, dropout)
            # a bag that is said to be absent may have rows
            out = torch.where(batch.has_patches[:, None, None, None], out, 0.0)
            found["g"]["p"] = Part(out, lse + patch_bias[:, None, None])
        if "gg" in self.blocks:
            found["g"]["g"] = self.genes_to_genes(genes, genes.value, gene_bias, dropout)
        return found

    def key_biases(self, batch: Membership) -> tuple[Tensor, Tensor]:
        """What is added to the logits of patches [B] and genes [B, G]; -inf where absent."""
        log_count = self.log_count.to(accumulation_type(self.log_count.dtype))
        beta = log_count.new_zeros(1).expand(len(self.tables) + 1)
        beta = beta if self.importance is None else self.importance.to(log_count.dtype)
        log_patches = batch.ragged.lengths.clamp(min=1).to(log_count.dtype).log()
        if not self.config.count_normalised:
            log_patches = torch.zeros_like(log_patches)
        patches = beta[0] - log_patches
        genes = (beta[self.tables] - log_count).expand(batch.has_genes.shape)
        return (
            torch.where(batch.has_patches, patches, -torch.inf),
            torch.where(batch.has_genes, genes, -torch.inf),
        )

    def _patches_to_patches(
        self, normed: Tensor, heads: Heads, ragged: Ragged, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """out [total, H, d] and lse [total, H]."""
        groups = self._exactness(ragged)
        results, places = [], []
        for exact, part in groups:
            if exact and self._flash_serves(heads, part):
                results.append(self_attention_of_one_bag(heads, dropout))
            elif exact:
                ranges = {"query_ragged": part, "key_ragged": part}
                results.append(
                    cross_attention_with_lse(
                        *heads, **ranges, dropout_p=dropout, backend=self.config.backend
                    )
                )
            else:
                results.append(self._through_landmarks(normed, heads, part))
            places.append(part.rows() if len(groups) > 1 else None)
        if len(groups) == 1:
            return results[0]
        # bags of both kinds: back into the order of the batch
        place = torch.cat(places)
        outs, lses = (torch.cat(tensors) for tensors in zip(*results, strict=True))
        return (
            torch.zeros_like(outs).index_copy(0, place, outs),
            torch.zeros_like(lses).index_copy(0, place, lses),
        )

    def _flash_serves(self, heads: Heads, ragged: Ragged) -> bool:
        """On a GPU torch has kernels for two long sides, for one bag and without a logsumexp."""
        alone = "pg" not in self.blocks and self.config.backend is None
        return heads.query.is_cuda and alone and ragged.n_bags == 1 and ragged.total > 0

    def _exactness(self, ragged: Ragged) -> list[tuple[bool, Ragged]]:
        """The bags whose attention is exact and those that go through landmarks."""
        kind, limit = self.config.patch_attention_kind, self.config.exact_limit
        on_host = ragged.lengths.device.type == "cpu"
        if kind != "auto" or ragged.lengths.is_cuda or ragged.max_length <= limit:
            return [(kind != "nystrom", ragged)]
        if not on_host or torch.compiler.is_compiling():
            return [(False, ragged)]
        short = ragged.lengths <= limit
        if not bool(short[ragged.lengths > 0].any()):
            return [(False, ragged)]
        return [
            (True, ragged.select(short.nonzero()[:, 0])),
            (False, ragged.select((~short).nonzero()[:, 0])),
        ]

    def _through_landmarks(
        self, normed: Tensor, heads: Heads, ragged: Ragged
    ) -> tuple[Tensor, Tensor]:
        backend = self.config.backend
        marks = segment_means(normed, ragged, self.config.landmarks, backend=backend)
        return nystrom_attention(
            tuple(heads),
            tuple(self.patches.project(marks.rows)),
            marks.present,
            ragged,
            iterations=self.config.iterations,
            backend=backend,
        )

    def patches_to_genes(
        self,
        patches: Tensor,
        heads: Heads | None,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        batch: Membership,
        dropout: float = 0.0,
    ) -> Part:
        """[total, H, dv]; `heads` of the patches where they were formed."""
        options = {"dropout_p": dropout, "backend": self.config.backend}
        if heads is not None:
            value = value.to(key.dtype)
            ranges = {"query_ragged": batch.ragged}
            return Part(
                *cross_attention_with_lse(heads.query, key, value, bias=bias, **ranges, **options)
            )
        kind = patches.dtype
        return Part(
            *bag_attends_tokens_with_lse(
                patches,
                self.patches.weight("query"),
                key.to(kind),
                value.to(kind),
                key_bias=bias,
                ragged=batch.ragged,
                **self.patches.norms(),
                **options,
            )
        )

    def contrasted(self, query: Tensor) -> Tensor:
        """Of the genes, as they ask patches."""
        temperature = self.config.gene_temperature
        return query if temperature == 1.0 else query / temperature

    def genes_to_patches(
        self, patches: Tensor, heads: Heads | None, query: Tensor, batch: Membership, dropout: float
    ) -> tuple[Tensor, Tensor]:
        """out [B, G, H, d] and lse [B, G, H]."""
        query = self.contrasted(query)
        options = {"dropout_p": dropout, "backend": self.config.backend}
        if heads is not None:
            return cross_attention_with_lse(
                query, heads.key, heads.value, key_ragged=batch.ragged, **options
            )
        return tokens_attend_bag_with_lse(
            query.to(patches.dtype),
            patches,
            self.patches.weight("key"),
            self.patches.weight("value"),
            ragged=batch.ragged,
            **self.patches.norms(),
            **options,
        )

    def genes_to_genes(
        self, genes: Heads, value: Tensor, bias: Tensor, dropout: float = 0.0
    ) -> Part:
        """[B, G, H, dv]."""
        return Part(
            *cross_attention_with_lse(
                genes.query,
                genes.key,
                value.to(genes.key.dtype),
                bias=bias,
                dropout_p=dropout,
                backend=self.config.backend,
            )
        )
