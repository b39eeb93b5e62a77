"""Configuration and presets of HEALNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any

from survfuse.layers.fourier import fourier_channels
from survfuse.ops.backends import check_backend

KINDS = ("bag", "table", "array", "graph")


@dataclass(frozen=True)
class ModalityConfig:
    """One modality of a HEALNet.

    Attributes:
        kind: "bag" (`BagBatch`), "table" (`TableBatch`), "array" (`ArrayBatch`), "graph"
            (`GraphBatch`).
        channels: features per patch, columns of the table, channels of the array, features per
            node.
        axes: coordinates that are Fourier encoded and appended to the channels. An array: its
            spatial axes (at least 1). A bag: 0 none (the order of the patches does not matter and
            the bag is read in place), 1 the patch's index (released code), 2 the patch's slide
            coordinates. A table: 0, or 1 for the column's index. A graph: 0.
        table_tokens: "one" (the row is one token whose channels are the columns, so attention over
            it is always 1) or "features" (one token per column: its value and its index, encoded).
        walk_steps: graphs only, number of random-walk return probabilities appended to each node.

    Raises:
        ValueError: a value is out of range or does not fit the kind.
    """

    kind: str
    channels: int
    axes: int = 0
    table_tokens: str = "one"
    walk_steps: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {list(KINDS)}")
        _check_integers(self, {"channels": 1, "axes": 0, "walk_steps": 0})
        if self.table_tokens not in ("one", "features"):
            raise ValueError(
                f"table_tokens is {self.table_tokens!r}; it must be 'one' or 'features'"
            )
        if self.kind != "table" and self.table_tokens != "one":
            raise ValueError(f"table_tokens is 'features' on a {self.kind}; only tables take it")
        if self.kind != "graph" and self.walk_steps:
            raise ValueError(f"walk_steps is {self.walk_steps} on a {self.kind}; it must be 0")
        low, high = {"bag": (0, 2), "table": (0, 1), "array": (1, None), "graph": (0, 0)}[self.kind]
        if self.axes < low or (high is not None and self.axes > high):
            allowed = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"axes is {self.axes} on a {self.kind}; it must be {allowed}")
        if self.table_tokens == "features" and self.axes == 0:
            raise ValueError(
                "axes is 0 with table_tokens 'features'; it must be 1, because without its "
                "encoded index a column cannot be told from another"
            )


@dataclass(frozen=True)
class HEALNetConfig:
    """Everything a HEALNet is built from; `asdict` and `HEALNetConfig(**dict)` round-trip.

    Attributes:
        modalities: by name, in the order in which they update the latents.
        out_dims: width of the logits (time bins, or 1 for a Cox risk); None leaves the readout out
            and the logits are the latents.
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

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    modalities: Mapping[str, ModalityConfig]
    out_dims: int | None = 4
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", _parse_modalities(self.modalities))
        lows = {"depth": 1, "n_latents": 1, "latent_dim": 1, "cross_heads": 1}
        lows |= {"cross_head_dim": 1, "latent_heads": 1, "latent_head_dim": 1}
        lows |= {"latent_blocks": 0, "fourier_bands": 0}
        if self.out_dims is not None:
            lows["out_dims"] = 1
        _check_integers(self, lows)
        choices = {
            "weight_sharing": ("all_layers", "after_first", "none"),
            "activation": ("selu", "gelu"),
            "latent_init": ("uniform", "normal"),
            "absorb": ("auto", "always", "never"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {list(allowed)}"
                )
        check_backend(self.backend)
        for name in ("fourier", "latent_blocks_when_absent"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.output_slope is not None:
            _check_number(self, "output_slope")
        for name in ("attention_dropout", "ff_dropout"):
            _check_number(self, name)
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("temperature", "max_frequency"):
            _check_number(self, name)
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name, modality in self.modalities.items():
            if modality.table_tokens == "features" and not self.fourier:
                raise ValueError(
                    f"fourier is False and modality {name!r} has table_tokens 'features'; it must "
                    "be True, because without its encoded index a column cannot be told apart"
                )

    def token_width(self, name: str) -> int:
        """Channels of one token of a modality, encodings included."""
        modality = self.modalities[name]
        own = 1 if modality.table_tokens == "features" else modality.channels
        encoded = fourier_channels(modality.axes, self.fourier_bands) if self.fourier else 0
        return own + encoded + modality.walk_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dicts, as JSON and YAML hold them."""
        return asdict(self)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        modalities: Mapping[str, ModalityConfig | tuple[str, int]],
        cohort: str | None = None,
        out_dims: int | None = 4,
        absorb: str = "auto",
        backend: str | None = None,
    ) -> HEALNetConfig:
        """The configuration of the paper or of the released code.

        Args:
            name: "paper", or "released" for what the public code v0.1.0 computes.
            modalities: a `ModalityConfig` each, or (kind, channels) as `Cohort.channels()` gives
                them: the preset then chooses the encodings.
            cohort: "blca", "brca", "kirp" or "ucec" for the released hyper-parameters of that
                cohort; None for the released constructor's defaults. The paper has one setting.
            out_dims: width of the logits; both train on four time bins.
            absorb: see `HEALNetConfig`.
            backend: see `HEALNetConfig`.

        Raises:
            ValueError: an unknown preset or cohort, a cohort given to "paper", or modalities that
                are not as above.
        """
        if isinstance(name, str) and name.startswith("released:"):
            # a configuration file writes both in one word
            raise ValueError(
                f"name is {name!r}; it must be 'released' with cohort={name.partition(':')[2]!r}"
            )
        if name not in ("paper", "released"):
            raise ValueError(f"name is {name!r}; it must be 'paper' or 'released'")
        if name == "paper" and cohort is not None:
            raise ValueError(f"cohort is {cohort!r} with preset 'paper'; it must be None")
        if not isinstance(modalities, Mapping):
            raise ValueError(
                f"modalities is {modalities!r}; it must map names to (kind, channels) or a "
                "ModalityConfig"
            )
        parsed = {}
        for key, value in modalities.items():
            if isinstance(value, ModalityConfig):
                parsed[key] = value
            elif isinstance(value, (tuple, list)) and len(value) == 2:
                parsed[key] = _default_modality(name, *value)
            else:
                raise ValueError(
                    f"modality {key!r} is {value!r}; it must be (kind, channels), for example "
                    "('bag', 1024), or a ModalityConfig"
                )
        settings = {} if name == "paper" else _released_settings(cohort)
        return cls(parsed, out_dims=out_dims, absorb=absorb, backend=backend, **settings)


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


def released_l1(cohort: str) -> float:
    """Weight of the L1 penalty the released recipe uses for a cohort."""
    return RELEASED_COHORTS[_check_cohort(cohort)]["l1"]


def _released_settings(cohort: str | None) -> dict[str, Any]:
    if cohort is None:
        found: dict[str, Any] = {"depth": 3, "n_latents": 128, "latent_dim": 128}
        found |= {"latent_blocks": 1, "max_frequency": 10.0}
    else:
        found = {**RELEASED_COHORTS[_check_cohort(cohort)], "cross_heads": 1}
        del found["l1"]
    return RELEASED_ARITHMETIC | {"weight_sharing": "none"} | found


def _check_cohort(cohort: str) -> str:
    if not isinstance(cohort, str) or cohort.lower() not in RELEASED_COHORTS:
        raise ValueError(f"cohort is {cohort!r}; it must be one of {[*RELEASED_COHORTS]}")
    return cohort.lower()


def _default_modality(preset: str, kind: str, channels: int) -> ModalityConfig:
    if kind == "array":
        raise ValueError(
            "an array needs ModalityConfig('array', channels, axes=...): (kind, channels) does not "
            "say how many spatial axes it has"
        )
    if kind == "graph":
        return ModalityConfig(kind, channels, walk_steps=8)
    # the released code encodes the index of a patch, and the one position of a table's token
    encoded = kind == "bag" or preset == "released"
    return ModalityConfig(kind, channels, axes=1 if encoded else 0)


def _parse_modalities(modalities: Mapping[str, Any]) -> dict[str, ModalityConfig]:
    if not isinstance(modalities, Mapping) or not modalities:
        raise ValueError(
            f"modalities is {modalities!r}; it must map at least one name to a ModalityConfig"
        )
    parsed = {}
    known = [field.name for field in fields(ModalityConfig)]
    for name, value in modalities.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"modalities has the name {name!r}; it must be a non-empty string")
        if isinstance(value, Mapping):
            unknown = [key for key in value if key not in known]
            if unknown:
                raise ValueError(
                    f"modality {name!r} has the unknown field {unknown[0]!r}; it takes {known}"
                )
            value = ModalityConfig(**value)
        if not isinstance(value, ModalityConfig):
            raise ValueError(
                f"modality {name!r} is {type(value).__name__}; it must be a ModalityConfig"
            )
        parsed[name] = value
    return parsed


def _check_integers(config: Any, lows: dict[str, int]) -> None:
    for name, low in lows.items():
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} is {value!r}; it must be an integer of at least {low}")


def _check_number(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be a number")
