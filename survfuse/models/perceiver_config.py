"""Configuration and presets of the Perceiver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from survfuse.models.config import ModelConfig, Presets
from survfuse.models.settings import (
    check_choice,
    check_integers,
    check_positive,
    check_probabilities,
)


@dataclass(frozen=True)
class PerceiverConfig(ModelConfig):
    """Settings of `survfuse.models.perceiver.Perceiver`.

    Attributes:
        modalities: by name; their order does not matter.
        outputs: number of logits by task.
        depth: iterations.
        n_latents, latent_dim: shape of the latent array.
        cross_heads, cross_head_dim: heads of the attention to the tokens and their size.
        latent_blocks: self-attention and feed-forward blocks of an iteration.
        latent_heads, latent_head_dim: those of the attention among latents.
        weight_sharing: "after_first" (the iterations behind the first share one set of weights),
            "all_layers" or "none".
        padding: how tokens of several widths become those of one: "linear" by a map per modality to
            `token_dim`, or "zero" by zeros behind them and `code_dim` channels of a code.
        token_dim: "linear" only, the common width.
        code_dim: "zero" only, channels of a modality's code.
        attention_dropout, ff_dropout: probabilities.
        activation: gate of the feed-forward, "selu" or "gelu".
        expansion: hidden width of the feed-forward as a multiple of `latent_dim`.
        fourier_bands, max_frequency: of the positions of modalities whose `axes` are not 0, see
            `survfuse.layers.fourier`.
        absorb, backend: of `survfuse.ops.tokens_attend_bag`.

    Presets:
        "paper", with the number and size of latents, heads and iterations that HEALNet is published
        with, so that both differ in how they fuse; "imagenet", with the sizes that Jaegle et al.
        chose for images of 50,176 pixels.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "imagenet": {
            "depth": 8,
            "n_latents": 512,
            "latent_dim": 1024,
            "latent_blocks": 6,
            "cross_heads": 1,
            "latent_head_dim": 128,
            "expansion": 1,
            "padding": "zero",
        },
    }

    depth: int = 2
    n_latents: int = 25
    latent_dim: int = 119
    cross_heads: int = 8
    cross_head_dim: int = 64
    latent_blocks: int = 1
    latent_heads: int = 8
    latent_head_dim: int = 64
    weight_sharing: str = "after_first"
    padding: str = "linear"
    token_dim: int = 256
    code_dim: int = 8
    attention_dropout: float = 0.0
    ff_dropout: float = 0.0
    activation: str = "gelu"
    expansion: int = 4
    fourier_bands: int = 2
    max_frequency: float = 2.0
    absorb: str = "auto"
    backend: str | None = None

    def _check(self) -> None:
        lows = {"depth": 1, "n_latents": 1, "latent_dim": 1, "cross_heads": 1, "cross_head_dim": 1}
        lows |= {"latent_blocks": 0, "latent_heads": 1, "latent_head_dim": 1, "token_dim": 1}
        check_integers(self, {**lows, "code_dim": 1, "expansion": 1, "fourier_bands": 0})
        check_choice(self, "weight_sharing", ("after_first", "all_layers", "none"))
        check_choice(self, "padding", ("linear", "zero"))
        check_choice(self, "activation", ("selu", "gelu"))
        check_choice(self, "absorb", ("auto", "always", "never"))
        check_probabilities(self, "attention_dropout", "ff_dropout")
        check_positive(self, "max_frequency")
