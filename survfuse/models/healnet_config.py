"""Configuration and presets of HEALNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from survfuse.models.config import ModelConfig, Presets
from survfuse.models.inputs import PositionEncoding, token_width
from survfuse.models.settings import (
    ModalityConfig,
    check_choice,
    check_flags,
    check_integers,
    check_number,
    check_positive,
    check_probabilities,
)

# config/best_hyperparams.yml of the released code; l1 is the weight of its L1 penalty
RELEASED_COHORTS: dict[str, dict[str, float]] = {
    "blca": {
        "depth": 2,
        "n_latents": 25,
        "latent_dim": 119,
        "cross_head_dim": 16,
        "latent_head_dim": 127,
        "attention_dropout": 0.08301797961946294,
        "ff_dropout": 0.47333212210978054,
        "l1": 0.00001165096910978314,
    },
    "brca": {
        "depth": 2,
        "n_latents": 17,
        "latent_dim": 126,
        "cross_head_dim": 63,
        "latent_head_dim": 20,
        "attention_dropout": 0.45526926537716805,
        "ff_dropout": 0.364741344399059,
        "l1": 0.00000682386175773137,
    },
    "kirp": {
        "depth": 5,
        "n_latents": 17,
        "latent_dim": 62,
        "cross_head_dim": 27,
        "latent_head_dim": 113,
        "attention_dropout": 0.31789955176609086,
        "ff_dropout": 0.04735283995174411,
        "l1": 0.00004627399922284714,
    },
    "ucec": {
        "depth": 2,
        "n_latents": 16,
        "latent_dim": 65,
        "cross_head_dim": 103,
        "latent_head_dim": 51,
        "attention_dropout": 0.24884810910180033,
        "ff_dropout": 0.05707504857865214,
        "l1": 0.00031851345313479773,
    },
}

# arithmetic of the released code that no constructor argument changes
RELEASED_ARITHMETIC: dict[str, Any] = {
    "temperature": 0.5,
    "output_slope": 0.01,
    "latent_init": "normal",
    "latent_blocks_when_absent": True,
}

_RELEASED = {**RELEASED_ARITHMETIC, "weight_sharing": "none"}


def _of_cohort(cohort: str) -> dict[str, Any]:
    sizes = {name: value for name, value in RELEASED_COHORTS[cohort].items() if name != "l1"}
    return {**_RELEASED, "cross_heads": 1, **sizes}


@dataclass(frozen=True)
class HEALNetConfig(ModelConfig):
    """Everything a HEALNet is built from; `asdict` and `HEALNetConfig(**dict)` round-trip.

    Attributes:
        modalities: by name, in the order in which they update the latents.
        outputs: number of logits by task (time bins, or 1 for a Cox risk); {} leaves the readout
            out.
        depth: fusion layers.
        n_latents, latent_dim: shape of the latent array.
        cross_heads, cross_head_dim: heads of the attention to a modality and their size.
        latent_heads, latent_head_dim: those of the attention among latents.
        latent_blocks: self-attention and feed-forward blocks after each modality.
        latent_blocks_when_absent: run those blocks although the modality is absent, as the
            released code does; False changes nothing in the latents of such a sample.
        weight_sharing: "all_layers" (one set per modality), "after_first" (released code with tied
            weights: the layers behind the first share one set, in which all modalities share one
            feed-forward) or "none".
        attention_dropout, ff_dropout: probabilities.
        activation: gate of the feed-forward, "selu" or "gelu".
        temperature: divides the logits of every softmax.
        output_slope: negative slope of the LeakyReLU behind every attention; None for none.
        latent_init: "uniform" on [0, 1) or "normal".
        fourier: append position encodings; False drops them for every modality.
        fourier_bands, max_frequency: of those encodings, see `survfuse.layers.fourier`.
        absorb, backend: of `survfuse.ops.tokens_attend_bag`.

    Presets:
        "paper"; "released" for what the public code v0.1.0 computes with the defaults of its
        constructor; "released:kirp" (blca, brca, kirp, ucec) with the released hyper-parameters of
        that cohort.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "released": {
            **_RELEASED,
            "depth": 3,
            "n_latents": 128,
            "latent_dim": 128,
            "latent_blocks": 1,
            "max_frequency": 10.0,
        },
        **{f"released:{cohort}": _of_cohort(cohort) for cohort in RELEASED_COHORTS},
    }

    depth: int = 2
    n_latents: int = 25
    latent_dim: int = 119
    cross_heads: int = 8
    cross_head_dim: int = 64
    latent_heads: int = 8
    latent_head_dim: int = 64
    latent_blocks: int = 0
    latent_blocks_when_absent: bool = False
    weight_sharing: str = "all_layers"
    attention_dropout: float = 0.0
    ff_dropout: float = 0.0
    activation: str = "selu"
    temperature: float = 1.0
    output_slope: float | None = None
    latent_init: str = "uniform"
    fourier: bool = True
    fourier_bands: int = 2
    max_frequency: float = 2.0
    absorb: str = "auto"
    backend: str | None = None

    def _check(self) -> None:
        lows = {"depth": 1, "n_latents": 1, "latent_dim": 1, "cross_heads": 1}
        lows |= {"cross_head_dim": 1, "latent_heads": 1, "latent_head_dim": 1}
        lows |= {"latent_blocks": 0, "fourier_bands": 0}
        check_integers(self, lows)
        check_choice(self, "weight_sharing", ("all_layers", "after_first", "none"))
        check_choice(self, "activation", ("selu", "gelu"))
        check_choice(self, "latent_init", ("uniform", "normal"))
        check_choice(self, "absorb", ("auto", "always", "never"))
        check_flags(self, "fourier", "latent_blocks_when_absent")
        if self.output_slope is not None:
            check_number(self, "output_slope")
        check_probabilities(self, "attention_dropout", "ff_dropout")
        check_positive(self, "temperature", "max_frequency")
        for name, modality in self.modalities.items():
            if modality.table_tokens == "features" and not self.fourier:
                raise ValueError(
                    f"fourier is False and modality {name!r} has table_tokens 'features'; it must "
                    "be True, because without its encoded index a column cannot be told apart"
                )

    def token_width(self, name: str) -> int:
        """Channels of one token of a modality, encodings included."""
        return token_width(self.modalities[name], self.positions)

    @property
    def positions(self) -> PositionEncoding | None:
        """How the axes of the modalities are encoded, if at all."""
        return PositionEncoding(self.fourier_bands, self.max_frequency) if self.fourier else None

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        modalities: Mapping[str, ModalityConfig | tuple],
        outputs: Mapping[str, int] | None = None,
        absorb: str = "auto",
        backend: str | None = None,
    ) -> HEALNetConfig:
        """The configuration of one of `PRESETS`; the class says what each is.

        Args:
            name: of the preset.
            modalities: a `ModalityConfig` each, or (kind, channels) as `Cohort.channels()` gives
                them: the preset then chooses the encodings.
            outputs: number of logits by task; by default four time bins of "survival".
            absorb: see `HEALNetConfig`.
            backend: see `HEALNetConfig`.

        Raises:
            ValueError: an unknown preset, or modalities that are not as above.
        """
        config = super().from_preset(name, modalities=modalities, outputs=outputs)
        # a pair leaves the encodings to the preset
        encoded = {
            key: _encoded(name, item) if isinstance(modalities[key], (tuple, list)) else item
            for key, item in config.modalities.items()
        }
        return replace(config, modalities=encoded, absorb=absorb, backend=backend)


def released_l1(cohort: str) -> float:
    """Weight of the L1 penalty the released recipe uses for a cohort."""
    if not isinstance(cohort, str) or cohort.lower() not in RELEASED_COHORTS:
        raise ValueError(f"cohort is {cohort!r}; it must be one of {[*RELEASED_COHORTS]}")
    return RELEASED_COHORTS[cohort.lower()]["l1"]


def _encoded(preset: str, modality: ModalityConfig) -> ModalityConfig:
    # the released code encodes the index of a patch, and the one position of a table's token
    encoded = modality.kind == "bag" or (modality.kind == "table" and preset != "paper")
    return replace(modality, axes=1) if encoded else modality
