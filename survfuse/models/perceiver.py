"""Perceiver: latents that attend to the tokens of all modalities as to one sequence.

Source: Jaegle et al., "Perceiver: general perception with iterative attention", ICML 2021, as the
early-fusion baseline of HEALNet (see `survfuse.models.healnet`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.feed_forward import GatedFeedForward
from survfuse.layers.latent_attention import LatentSelfAttention, zero_gradients
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.heads import TaskHeads
from survfuse.models.inputs import PositionEncoding, Tokens, encode_inputs, token_width
from survfuse.models.perceiver_config import PerceiverConfig
from survfuse.models.settings import bags_and_graphs
from survfuse.ops import (
    merge_attention,
    tokens_attend_bag_weights,
    tokens_attend_bag_with_lse,
)
from survfuse.ops.backends import plain_backend
from survfuse.pooling import accumulation_type

__all__ = ["Perceiver", "PerceiverConfig"]


class Perceiver(FusionModel):
    """Latents `[n_latents, latent_dim]` that attend to the union of all modalities' tokens.

    A token x of modality m becomes `P_m LN_m(x) + c_m`, or `[LN_m(x), 0 ... 0, c_m]` with
    `padding="zero"`, of one width for all modalities, with a learned code c_m. Per iteration, with
    residuals: cross-attention of the latents to the tokens of all modalities under one softmax, a
    gated feed-forward, then self-attention and feed-forward blocks. The mean latent is normalised
    and projected to the logits.

    Neither the common tokens nor their concatenation exist: P_m goes into the projections of the
    keys and values, and the attention over each modality is merged with the others by its
    logsumexp, exactly.

    The tokens of an absent modality are not among the keys. A sample without any modality goes
    through the blocks among the latents only.

    Args:
        config: see `PerceiverConfig`.

    Cost:
        Per iteration and modality one read of the bag forward and one backward; nothing of the
        length of a bag is kept, except one copy of it if its positions are Fourier encoded.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> model = Perceiver.from_preset("paper", modalities={"rna": ("table", 8)})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> model({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = PerceiverConfig
    config: PerceiverConfig

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.positions = PositionEncoding(config.fourier_bands, config.max_frequency)
        self.latents = nn.Parameter(torch.randn(config.n_latents, config.latent_dim) * 0.02)
        self.common = CommonTokens(config, self.positions)
        n_sets = {"all_layers": 1, "after_first": min(config.depth, 2), "none": config.depth}
        self.layers = nn.ModuleList(
            PerceiverLayer(config, self.common.width) for _ in range(n_sets[config.weight_sharing])
        )
        self.readout = TaskHeads(config.latent_dim, config.outputs, norm=True)

    def forward(self, inputs: Mapping[str, Modality]) -> ModelOutput:
        """Logits of a batch.

        Args:
            inputs: by modality name. A modality may be absent for some samples (`present`), for
                all of them, or left out.

        Returns:
            logits by task; embeddings "latents" [B, latent_dim], their mean, and "latent_array"
            [B, n_latents, latent_dim].

        Raises:
            ValueError, TypeError: the inputs do not fit the configuration.
        """
        tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
        latents = self.latents.expand(n_samples, -1, -1)  # [B, Lq, dim]
        for i in range(self.config.depth):
            latents = self._layer(i)(latents, tokens, self.common)  # [B, Lq, dim]
        if len(tokens) < len(self.config.modalities):
            rest = [*self.common.parameters(), *self.layers.parameters()]
            latents = zero_gradients(latents, rest)  # [B, Lq, dim]
        mean = latents.mean(1)  # [B, dim]
        return ModelOutput(self.readout(mean), {"latents": mean, "latent_array": latents}, {})

    @torch.no_grad()
    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """Mean weight over latents and heads of every patch or node [total], per iteration.

        Within its modality: divided by what the latents spend on the modality as a whole.
        """
        found: dict[str, dict[str, Tensor]] = {}
        with evaluating(self):
            tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
            latents = self.latents.expand(n_samples, -1, -1)
            for i in range(self.config.depth):
                layer = self._layer(i)
                for name in bags_and_graphs(self.config.modalities):
                    if name in tokens:
                        weights = layer.attention.weights(latents, name, tokens[name], self.common)
                        found.setdefault(name, {})[f"layer {i}"] = weights
                latents = layer(latents, tokens, self.common)
        return found

    def _layer(self, i: int) -> PerceiverLayer:
        return self.layers[min(i, len(self.layers) - 1)]


class Projections(NamedTuple):
    """What one modality's own tokens are multiplied with, its map to the common ones included."""

    w_k: Tensor  # [H, d, C]
    b_k: Tensor  # [H, d]
    w_v: Tensor  # [H, d, C]
    b_v: Tensor  # [H, d]


class CommonTokens(nn.Module):
    """The map of every modality's tokens to those of one width, as weights, never as tokens."""

    def __init__(self, config: PerceiverConfig, positions: PositionEncoding) -> None:
        super().__init__()
        self.names = list(config.modalities)
        widths = [token_width(modality, positions) for modality in config.modalities.values()]
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)
        self.maps = None
        if config.padding == "linear":
            self.width = code = config.token_dim
            self.maps = nn.ModuleList(nn.Linear(width, code, bias=False) for width in widths)
        else:
            code = config.code_dim
            self.width = max(widths) + code
        self.codes = nn.Parameter(torch.randn(len(self.names), code) * 0.02)

    def norm(self, name: str) -> nn.LayerNorm:
        """The normalisation of a modality's own tokens."""
        return self.norms[self.names.index(name)]

    def absorb(self, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Weight [H, d, C] and bias [H, d] on own tokens, of a weight [H, d, width] on common ones.

        W (P x + c) = (W P) x + W c; of padded tokens, the columns of W behind x see zeros.
        """
        m = self.names.index(name)
        code = self.codes[m]
        if self.maps is not None:
            own = weight @ self.maps[m].weight  # [H, d, C]
        else:
            own = weight[..., : self.norms[m].normalized_shape[0]]  # [H, d, C]
        return own, weight[..., -code.shape[0] :] @ code  # [H, d, C], [H, d]


class PerceiverLayer(nn.Module):
    """One iteration: attention to the tokens of all modalities, then blocks among the latents."""

    def __init__(self, config: PerceiverConfig, width: int) -> None:
        super().__init__()
        self.attention = UnionAttention(config, width)
        self.feed_forward = _feed_forward(config)
        self.latent_attention = nn.ModuleList(
            LatentSelfAttention(
                config.latent_dim,
                heads=config.latent_heads,
                head_dim=config.latent_head_dim,
                dropout=config.attention_dropout,
            )
            for _ in range(config.latent_blocks)
        )
        self.latent_feed_forward = nn.ModuleList(
            _feed_forward(config) for _ in range(config.latent_blocks)
        )

    def forward(self, latents: Tensor, tokens: dict[str, Tokens], common: CommonTokens) -> Tensor:
        """The latents [B, Lq, dim] behind this iteration."""
        if tokens:
            updated = latents + self.attention(latents, tokens, common)  # [B, Lq, dim]
            updated = updated + self.feed_forward(updated)  # [B, Lq, dim]
            present = torch.stack([found.present for found in tokens.values()]).any(0)  # [B]
            latents = torch.where(present[:, None, None], updated, latents)  # [B, Lq, dim]
        blocks = zip(self.latent_attention, self.latent_feed_forward, strict=True)
        for attention, feed_forward in blocks:
            latents = latents + attention(latents)  # [B, Lq, dim]
            latents = latents + feed_forward(latents)  # [B, Lq, dim]
        return latents


class UnionAttention(nn.Module):
    """Latents attend to the common tokens of all modalities under one softmax."""

    def __init__(self, config: PerceiverConfig, width: int) -> None:
        super().__init__()
        self.heads, self.head_dim = config.cross_heads, config.cross_head_dim
        self.dropout = config.attention_dropout
        self.absorb, self.backend = config.absorb, config.backend
        inner = self.heads * self.head_dim
        self.query_norm = nn.LayerNorm(config.latent_dim)
        self.query = nn.Linear(config.latent_dim, inner, bias=False)
        self.key_weight = nn.Parameter(torch.empty(self.heads, self.head_dim, width))
        self.value_weight = nn.Parameter(torch.empty(self.heads, self.head_dim, width))
        self.output = nn.Linear(inner, config.latent_dim)
        for weight in (self.key_weight, self.value_weight):
            nn.init.uniform_(weight, -(width**-0.5), width**-0.5)

    def forward(self, latents: Tensor, tokens: dict[str, Tokens], common: CommonTokens) -> Tensor:
        """The update of the latents [B, Lq, dim], without the residual."""
        kind = accumulation_type(self.output.weight.dtype)
        outs, lses = [], []
        for name, found in tokens.items():
            out, lse = self._attend(latents, name, found, common)  # [B, Lq, H, d], [B, Lq, H]
            outs.append(out.to(kind))
            # a modality whose keys are none of the sample's has no share in its softmax
            lses.append(torch.where(found.present[:, None, None], lse.to(kind), -torch.inf))
        merged, _ = merge_attention(outs, lses)  # [B, Lq, H, d]
        return self.output(merged.flatten(2).to(self.output.weight.dtype))  # [B, Lq, dim]

    def weights(self, latents: Tensor, name: str, tokens: Tokens, common: CommonTokens) -> Tensor:
        """The mean weight [total] over latents and heads within one bag or graph."""
        _, lse = self._attend(latents, name, tokens, common)
        query, projections = self._projected(latents, name, tokens, common)
        norm = common.norm(name)
        weights = tokens_attend_bag_weights(
            query,
            tokens.features,
            projections.w_k,
            lse,
            b_k=projections.b_k,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
            ragged=tokens.ragged,
            reduce="rows",
            backend=plain_backend(self.backend),
        )
        return torch.where(tokens.ragged.per_patch(tokens.present), weights, 0.0)

    def _attend(
        self, latents: Tensor, name: str, tokens: Tokens, common: CommonTokens
    ) -> tuple[Tensor, Tensor]:
        query, projections = self._projected(latents, name, tokens, common)
        features, norm = tokens.features, common.norm(name)
        if tokens.ragged is None and features.dim() == 2:
            features = features[:, None]
        return tokens_attend_bag_with_lse(
            query,
            features,
            projections.w_k,
            projections.w_v,
            b_k=projections.b_k,
            b_v=projections.b_v,
            norm_weight=norm.weight,
            norm_bias=norm.bias,
            norm_eps=norm.eps,
            ragged=tokens.ragged,
            dropout_p=self.dropout if self.training else 0.0,
            absorb=self.absorb,
            backend=self.backend,
        )

    def _projected(
        self, latents: Tensor, name: str, tokens: Tokens, common: CommonTokens
    ) -> tuple[Tensor, Projections]:
        query = self.query(self.query_norm(latents)).unflatten(2, (self.heads, self.head_dim))
        query = query.to(torch.promote_types(query.dtype, tokens.features.dtype))
        keys = common.absorb(self.key_weight, name)
        values = common.absorb(self.value_weight, name)
        return query, Projections(*keys, *values)


def _feed_forward(config: PerceiverConfig) -> GatedFeedForward:
    return GatedFeedForward(
        config.latent_dim,
        expansion=config.expansion,
        activation=config.activation,
        dropout=config.ff_dropout,
    )
