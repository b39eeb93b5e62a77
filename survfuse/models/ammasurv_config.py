"""Configuration, presets and ablation of AMMASurv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from survfuse.layers.fourier import fourier_channels
from survfuse.models.config import ModelConfig, Presets
from survfuse.models.settings import (
    check_choice,
    check_flags,
    check_integers,
    check_positive,
    check_probabilities,
    check_widths,
)

# who asks, then who is asked: patches (p) and genes (g)
BLOCKS = ("pp", "pg", "gp", "gg")

# the sets of blocks whose comparison says which direction of attention matters
ABLATION: dict[str, tuple[str, ...]] = {
    "none": (),
    "patches": ("pp",),
    "genes": ("gg",),
    "within": ("pp", "gg"),
    "genes_to_patches_bare": ("gp",),
    "genes_to_patches": ("gp", "gg"),
    "patches_to_genes": ("pg", "gg"),
    "crossing": ("pg", "gp"),
    "no_patch_self": ("pg", "gp", "gg"),
    "no_gene_self": ("pp", "pg", "gp"),
    "patches_dominate": ("pp", "gp", "gg"),
    "genes_dominate": ("pp", "pg", "gg"),
    "symmetric": BLOCKS,
}


@dataclass(frozen=True)
class AMMASurvConfig(ModelConfig):
    """Settings of `AMMASurv`; `asdict` and `AMMASurvConfig(**dict)` round-trip.

    Attributes:
        modalities: one bag, and at least one table, whose groups become tokens.
        outputs: number of logits by task.
        dim: width of a token.
        depth: layers of the encoder.
        heads, head_dim: of every attention.
        blocks: which attention is enabled, of "pp", "pg", "gp", "gg": who asks, then who is asked,
            p the patches and g the genes. One sequence for all layers, or one sequence per layer.
            Without a block in which it asks, a side passes a layer as it is.
        patch_attention_kind: of "pp": "exact"; "nystrom", through landmarks, at a cost that is
            linear in the patches; or "auto": exact on CUDA and for bags of at most `exact_limit`
            patches, through landmarks for longer ones. (torch.compile on a CPU cannot tell bags
            apart: there the longest one of a batch decides for all.)
        exact_limit: see there.
        landmarks, iterations: of the attention through landmarks, see `NystromSelfAttention`.
        learned_importance: a bias beta_m, learned per layer, on the logits of the keys of every
            modality m.
        count_normalised: subtract log n_m from those logits, n_m the number of the modality's keys,
            so that a few genes are not drowned by many patches.
        gene_temperature: divides the logits of genes to patches. Below 1 that attention starts with
            contrast, which finds few patches among many sooner than the mean of all.
        gate: of the fusion: "scalar", a learned number per modality; or "tokens", which adds a
            linear function of the pooled tokens.
        gate_activation: "softmax" over the modalities a sample has, or "sigmoid" of each.
        gene_hidden: widths of the hidden layers that make a gene group a token.
        gene_activation: "selu" or "elu".
        patch_activation: behind the projection of a patch, "relu" or "none".
        ff_expansion, ff_activation: of the gated feed-forward, "gelu" or "selu".
        pool_hidden: units of the gated attention that pools the patches.
        gene_dropout, attention_dropout, ff_dropout, readout_dropout: probabilities. Attention
            through landmarks drops no weight.
        fourier_bands, max_frequency: of positions, where the bag has axes, see
            `survfuse.layers.fourier`.
        checkpoint: compute layers again in the backward instead of keeping what they hold.
        backend: of the ops; None for the fastest that can serve the call.

    Presets:
        A named set of blocks; every other setting is ours in all of them. "paper", our reading of
        the abstract, which is all that is public: patches attend to patches, genes to genes and
        patches. "symmetric": all four blocks. "genes_to_patches": genes attend to genes and
        patches, patches to nothing.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "symmetric": {"blocks": ABLATION["symmetric"]},
        "genes_to_patches": {"blocks": ABLATION["genes_to_patches"]},
    }
    ABLATION: ClassVar[Mapping[str, tuple[str, ...]]] = ABLATION

    dim: int = 256
    depth: int = 2
    heads: int = 4
    head_dim: int = 64
    blocks: Sequence[str] | Sequence[Sequence[str]] = ABLATION["patches_dominate"]
    patch_attention_kind: str = "auto"
    exact_limit: int = 4096
    landmarks: int = 256
    iterations: int = 6
    learned_importance: bool = True
    count_normalised: bool = True
    gene_temperature: float = 1.0
    gate: str = "scalar"
    gate_activation: str = "softmax"
    gene_hidden: Sequence[int] = (256,)
    gene_activation: str = "selu"
    patch_activation: str = "relu"
    ff_expansion: int = 2
    ff_activation: str = "gelu"
    pool_hidden: int = 128
    gene_dropout: float = 0.0
    attention_dropout: float = 0.0
    ff_dropout: float = 0.0
    readout_dropout: float = 0.25
    fourier_bands: int = 4
    max_frequency: float = 32.0
    checkpoint: bool = False
    backend: str | None = None

    def _check(self) -> None:
        sizes = ("dim", "depth", "heads", "head_dim", "exact_limit", "landmarks", "iterations")
        check_integers(self, dict.fromkeys((*sizes, "ff_expansion", "pool_hidden"), 1))
        check_integers(self, {"fourier_bands": 0})
        check_choice(self, "patch_attention_kind", ("auto", "exact", "nystrom"))
        check_choice(self, "gate", ("scalar", "tokens"))
        check_choice(self, "gate_activation", ("softmax", "sigmoid"))
        check_choice(self, "gene_activation", ("selu", "elu"))
        check_choice(self, "patch_activation", ("relu", "none"))
        check_choice(self, "ff_activation", ("gelu", "selu"))
        dropouts = ("gene_dropout", "attention_dropout", "ff_dropout", "readout_dropout")
        check_probabilities(self, *dropouts)
        check_positive(self, "max_frequency", "gene_temperature")
        check_flags(self, "learned_importance", "count_normalised", "checkpoint")
        check_widths(self, "gene_hidden", least=0)
        object.__setattr__(self, "blocks", _check_blocks(self.blocks, self.depth))
        self._check_kinds()

    def _check_kinds(self) -> None:
        kinds = [modality.kind for modality in self.modalities.values()]
        unknown = sorted(set(kinds) - {"bag", "table"})
        if unknown or kinds.count("bag") != 1 or "table" not in kinds:
            found = {name: modality.kind for name, modality in self.modalities.items()}
            raise ValueError(
                f"modalities is {found}; it must be one bag and at least one table, whose groups "
                "are the gene tokens"
            )
        for name, modality in self.modalities.items():
            if modality.table_tokens != "one" or (modality.kind == "table" and modality.axes):
                raise ValueError(
                    f"modality {name!r} encodes the columns of a table; it must have axes 0 and "
                    "table_tokens 'one': tokens are made of its groups"
                )

    @property
    def bag(self) -> str:
        """Name of the modality that is the patches."""
        return next(name for name, item in self.modalities.items() if item.kind == "bag")

    @property
    def position_channels(self) -> int:
        """Channels that encode the position of a patch."""
        return fourier_channels(self.modalities[self.bag].axes, self.fourier_bands)

    @property
    def layer_blocks(self) -> tuple[tuple[str, ...], ...]:
        """The blocks of every layer, each in the order of `BLOCKS`."""
        of_all = not self.blocks or isinstance(self.blocks[0], str)
        layers = (self.blocks,) * self.depth if of_all else self.blocks
        return tuple(tuple(block for block in BLOCKS if block in layer) for layer in layers)


def _check_blocks(blocks: Any, depth: int) -> tuple[str, ...] | tuple[tuple[str, ...], ...]:
    """As tuples; one sequence for all layers stays one, so that `depth` can still be changed."""
    message = f"blocks is {blocks!r}; it must hold some of {BLOCKS}, or such a sequence per layer"
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise ValueError(message)
    layers = [blocks] if all(isinstance(block, str) for block in blocks) else blocks
    for layer in layers:
        if isinstance(layer, str) or not isinstance(layer, Sequence):
            raise ValueError(message)
        unknown = [block for block in layer if block not in BLOCKS]
        if unknown or len(set(layer)) < len(layer):
            raise ValueError(message)
    if layers is blocks and len(blocks) != depth:
        raise ValueError(
            f"blocks holds {len(blocks)} layers and depth is {depth}; they must be equal"
        )
    return tuple(blocks) if layers is not blocks else tuple(tuple(layer) for layer in blocks)
