"""HEALNet: a latent array that attends to any number of modalities in turn.

Source: Hemker, Simidjievski, Jamnik, "HEALNet: multimodal fusion for heterogeneous biomedical
data", NeurIPS 2024, and its public code v0.1.0 (github.com/konst-int-i/healnet, Apache-2.0).
What the two say differently, and the presets that follow each, are listed in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from survfuse.batch import Modality, ModelOutput
from survfuse.layers.feed_forward import GatedFeedForward
from survfuse.layers.latent_attention import (
    BagCrossAttention,
    LatentSelfAttention,
    zero_gradients,
)
from survfuse.models.base import FusionModel, evaluating
from survfuse.models.heads import TaskHeads
from survfuse.models.healnet_config import HEALNetConfig
from survfuse.models.healnet_released import convert_released, released_config
from survfuse.models.inputs import Tokens, encode_inputs

__all__ = ["HEALNet"]


class HEALNet(FusionModel):
    """Latents `[n_latents, latent_dim]` updated by every modality in every fusion layer.

    Per layer and modality, with residuals: cross-attention of the latents to the modality's tokens,
    a gated feed-forward, and optionally self-attention blocks among the latents. The mean latent is
    normalised and projected to the logits.

    `gradient_importance` is the only importance per column of a table that is one token, because
    its attention weight is always 1; a table of features has `attention_maps` as well.

    A modality that is absent for a sample changes nothing in that sample's latents, in training and
    in evaluation; a sample without any modality gets the readout of the learned latents.

    Args:
        config: see `HEALNetConfig`.

    Cost:
        Per modality, layer and sample one read of the bag forward and one backward; nothing of the
        length of a bag is kept, except one copy of it if its positions are Fourier encoded.

    Example:
        >>> import torch
        >>> from survfuse.batch import TableBatch
        >>> config = HEALNetConfig.from_preset("paper", modalities={"rna": ("table", 8)})
        >>> rna = TableBatch(torch.zeros(3, 8), torch.tensor([True, True, False]))
        >>> HEALNet(config)({"rna": rna}).logits["survival"].shape
        torch.Size([3, 4])
    """

    config_class: ClassVar[type] = HEALNetConfig
    config: HEALNetConfig

    def __init__(self, config: HEALNetConfig) -> None:
        if not isinstance(config, HEALNetConfig):
            raise TypeError(
                f"config is {type(config).__name__}; it must be a HEALNetConfig "
                "(HEALNetConfig(**values) makes one of a dict)"
            )
        super().__init__()
        self.config = config
        draw = torch.rand if config.latent_init == "uniform" else torch.randn
        self.latents = nn.Parameter(draw(config.n_latents, config.latent_dim))
        n_sets = {"all_layers": 1, "after_first": min(config.depth, 2), "none": config.depth}
        # with tied weights the layers behind the first share the feed-forward over modalities too
        self.layers = nn.ModuleList(
            FusionLayer(
                config,
                n_feed_forward=1
                if config.weight_sharing == "after_first" and i > 0
                else len(config.modalities),
            )
            for i in range(n_sets[config.weight_sharing])
        )
        self.positions = config.positions
        self.readout = TaskHeads(config.latent_dim, config.outputs, norm=bool(config.outputs))

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
        latents = self._fuse(tokens, n_samples)
        mean = latents.mean(1)
        return ModelOutput(self.readout(mean), {"latents": mean, "latent_array": latents}, {})

    def _fuse(
        self,
        tokens: dict[str, Tokens],
        n_samples: int,
        maps: dict[str, list[Tensor]] | None = None,
    ) -> Tensor:
        latents = self.latents.expand(n_samples, -1, -1)
        names = list(self.config.modalities)
        for i in range(self.config.depth):
            layer = self.layers[min(i, len(self.layers) - 1)]
            for j, name in enumerate(names):
                weights = None if maps is None else maps.setdefault(name, [])
                latents = layer(latents, j, tokens.get(name), weights)
        if len(tokens) < len(names):
            latents = zero_gradients(latents, list(self.layers.parameters()))
        return latents

    @torch.no_grad()
    def attention_maps(self, inputs: Mapping[str, Modality]) -> dict[str, Tensor]:
        """How much the latents look at each token: the mean weight over latents and heads.

        Streamed: latents x tokens is never formed. Evaluated without dropout.

        Returns:
            By modality, first dimension the fusion layer: [depth, total] for bags and graphs,
            packed in batch order; [depth, B, *axes] for arrays; [depth, B, F] for a table of
            features, [depth, B] for a table of one token (always 1). Each sample's weights sum to
            1 in every layer, and are 0 where it lacks the modality. A modality that `inputs` does
            not hold, and bags or graphs without any row, are left out.
        """
        with evaluating(self):
            tokens, n_samples = encode_inputs(inputs, self.config.modalities, self.positions)
            maps: dict[str, list[Tensor]] = {}
            self._fuse(tokens, n_samples, maps)
        return {name: torch.stack(maps[name]) for name in tokens}

    def patch_attention(self, inputs: Mapping[str, Modality]) -> dict[str, dict[str, Tensor]]:
        """The bags and graphs of `attention_maps`, by fusion layer."""
        kinds = {name: modality.kind for name, modality in self.config.modalities.items()}
        return {
            name: {f"layer {i}": weights for i, weights in enumerate(layers)}
            for name, layers in self.attention_maps(inputs).items()
            if kinds[name] in ("bag", "graph")
        }

    @classmethod
    def from_released(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        n_modalities: int,
        channel_dims: Sequence[int],
        num_spatial_axes: Sequence[int],
        out_dims: int,
        depth: int = 3,
        num_freq_bands: int = 2,
        max_freq: float = 10.0,
        l_c: int = 128,
        l_d: int = 128,
        x_heads: int = 8,
        l_heads: int = 8,
        cross_dim_head: int = 64,
        latent_dim_head: int = 64,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        weight_tie_layers: bool = False,
        fourier_encode_data: bool = True,
        self_per_cross_attn: int = 1,
        final_classifier_head: bool = True,
        snn: bool = True,
        names: Sequence[str] | None = None,
        kinds: Sequence[str] | None = None,
        absorb: str = "auto",
        backend: str | None = None,
    ) -> HEALNet:
        """A model with the weights of the public package v0.1.0, computing what it computes.

        Args:
            state_dict: of the released `HealNet`; its type is that of the model.
            n_modalities .. snn: the released constructor's arguments, with its defaults.
            names: of the modalities here; by default "modality_0" and so on.
            kinds: of the modalities here: "array" (default; the released [B, *axes, C] tensors),
                or, with one spatial axis, "bag" (ragged, the patch's index is encoded) or "table"
                (the released [B, 1, F]).
            absorb: see `HEALNetConfig`.
            backend: see `HEALNetConfig`.

        Raises:
            ValueError: arguments the released code cannot run with, keys that are missing, left
                over or of another shape, or tied layers that differ.
        """
        config = released_config(
            n_modalities=n_modalities,
            channel_dims=channel_dims,
            num_spatial_axes=num_spatial_axes,
            names=names,
            kinds=kinds,
            tied=weight_tie_layers,
            settings={
                "outputs": {"survival": out_dims} if final_classifier_head else {},
                "depth": depth,
                "n_latents": l_c,
                "latent_dim": l_d,
                "cross_heads": x_heads,
                "cross_head_dim": cross_dim_head,
                "latent_heads": l_heads,
                "latent_head_dim": latent_dim_head,
                "latent_blocks": self_per_cross_attn,
                "attention_dropout": attn_dropout,
                "ff_dropout": ff_dropout,
                "activation": "selu" if snn else "gelu",
                "fourier": fourier_encode_data,
                "fourier_bands": num_freq_bands,
                "max_frequency": max_freq,
                "absorb": absorb,
                "backend": backend,
            },
        )
        model = cls(config)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        converted = convert_released(state_dict, config, shapes)
        model.to(converted["latents"].dtype).load_state_dict(converted)
        return model


class FusionLayer(nn.Module):
    """The modules of one fusion layer; `n_feed_forward` of 1 shares it over the modalities."""

    def __init__(self, config: HEALNetConfig, *, n_feed_forward: int) -> None:
        super().__init__()
        self.blocks_when_absent = config.latent_blocks_when_absent
        shared = {
            "temperature": config.temperature,
            "output_slope": config.output_slope,
            "dropout": config.attention_dropout,
        }
        self.attention = nn.ModuleList(
            BagCrossAttention(
                config.latent_dim,
                config.token_width(name),
                heads=config.cross_heads,
                head_dim=config.cross_head_dim,
                absorb=config.absorb,
                backend=config.backend,
                **shared,
            )
            for name in config.modalities
        )

        def feed_forward() -> GatedFeedForward:
            return GatedFeedForward(
                config.latent_dim, activation=config.activation, dropout=config.ff_dropout
            )

        self.feed_forward = nn.ModuleList(feed_forward() for _ in range(n_feed_forward))
        self.latent_attention = nn.ModuleList(
            LatentSelfAttention(
                config.latent_dim,
                heads=config.latent_heads,
                head_dim=config.latent_head_dim,
                **shared,
            )
            for _ in range(config.latent_blocks)
        )
        self.latent_feed_forward = nn.ModuleList(
            feed_forward() for _ in range(config.latent_blocks)
        )

    def forward(
        self,
        latents: Tensor,
        modality: int,
        tokens: Tokens | None,
        weights: list[Tensor] | None = None,
    ) -> Tensor:
        """Update the latents [B, Lq, dim] by one modality, and append its weights if asked."""
        if tokens is None:
            return self._latent_blocks(latents) if self.blocks_when_absent else latents
        present = tokens.present[:, None, None]
        updated = latents + self._attend(latents, self.attention[modality], tokens, weights)
        updated = updated + self.feed_forward[min(modality, len(self.feed_forward) - 1)](updated)
        if self.blocks_when_absent:
            return self._latent_blocks(torch.where(present, updated, latents))
        return torch.where(present, self._latent_blocks(updated), latents)

    def _attend(
        self,
        latents: Tensor,
        attention: BagCrossAttention,
        tokens: Tokens,
        weights: list[Tensor] | None,
    ) -> Tensor:
        dense = tokens.ragged is None
        if dense and tokens.features.dim() == 2:
            update, found = attention.one_token(latents, tokens.features), None
        elif weights is None:
            return attention(latents, tokens.features, tokens.ragged)
        else:
            update, found = attention.with_weights(latents, tokens.features, tokens.ragged)
        if weights is not None:
            found = update.new_ones(tokens.shape) if found is None else found.view(tokens.shape)
            present = tokens.present
            if not dense:
                present = tokens.ragged.per_patch(present)
            present = present.view(-1, *[1] * (found.dim() - 1))
            weights.append(torch.where(present, found, 0.0))
        return update

    def _latent_blocks(self, latents: Tensor) -> Tensor:
        for attention, feed_forward in zip(
            self.latent_attention, self.latent_feed_forward, strict=True
        ):
            latents = latents + attention(latents)
            latents = latents + feed_forward(latents)
        return latents
