"""Configuration and presets of CMTA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from survfuse.models.patches_and_genes import (
    check_heads,
    patch_modality,
)
from survfuse.models.settings import (
    ModalityConfig,
    check_choice,
    check_flags,
    check_integers,
    check_number,
    check_preset,
    check_probabilities,
    check_widths,
    parse_modalities,
    parse_outputs,
)
from survfuse.ops.backends import check_backend

ALIGNMENTS = ("l1", "mse", "cosine", "kl", "none")


@dataclass(frozen=True)
class CMTAConfig:
    """Settings of `CMTA`.

    Attributes:
        modalities: at most one bag or graph, and tables with their gene groups.
        outputs: number of logits by task.
        dim: width of a token and of everything behind it.
        gene_widths: hidden widths of the network of a gene group, in front of `dim`.
        patch_widths: hidden widths of the projection of patches, in front of `dim`.
        gene_activation: "selu" or "elu".
        gene_dropout: probability of alpha dropout in the networks of gene groups.
        patch_dropout: probability, behind every layer of the projection of patches.
        dropout: probability, behind the attention of encoders and decoders, and in "bilinear".
        encoder_heads, landmarks: of encoders and decoders; the heads divide `dim`.
        attention_heads: of the attention between the sides; they divide `dim`.
        alignment: what the distance of a side's class token and its decoded twin is: "l1", "mse",
            "cosine" (1 - cos), "kl" (of their softmaxes), or "none".
        alignment_weight: of the sum over both sides in the loss.
        fusion: "concat" or "bilinear".
        bilinear_scale: by how much "bilinear" narrows either side in front of the product.
        recompute: run each layer of the patches a second time in the backward and keep its input
            alone.
        backend: of the ops; None for the fastest that can serve the call.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[tuple[str, ...]] = ("paper", "released", "released:large")

    modalities: Mapping[str, ModalityConfig]
    outputs: Mapping[str, int] = field(default_factory=lambda: {"survival": 4})
    dim: int = 256
    gene_widths: tuple[int, ...] = (1024,)
    patch_widths: tuple[int, ...] = (256,)
    gene_activation: str = "selu"
    gene_dropout: float = 0.25
    patch_dropout: float = 0.25
    dropout: float = 0.1
    encoder_heads: int = 8
    landmarks: int = 128
    attention_heads: int = 1
    alignment: str = "l1"
    alignment_weight: float = 1.0
    fusion: str = "concat"
    bilinear_scale: int = 8
    recompute: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modalities", parse_modalities(self.modalities))
        object.__setattr__(self, "outputs", parse_outputs(self.outputs))
        patch_modality(self.modalities, "CMTA")
        lows = {"dim": 1, "encoder_heads": 1, "attention_heads": 1, "landmarks": 1}
        check_integers(self, {**lows, "bilinear_scale": 1})
        check_heads(self, "dim", "encoder_heads", "attention_heads")
        check_widths(self, "gene_widths", "patch_widths")
        check_choice(self, "gene_activation", ("selu", "elu"))
        check_choice(self, "alignment", ALIGNMENTS)
        check_choice(self, "fusion", ("concat", "bilinear"))
        check_probabilities(self, "gene_dropout", "patch_dropout", "dropout")
        check_number(self, "alignment_weight")
        if self.alignment_weight < 0:
            raise ValueError(f"alignment_weight is {self.alignment_weight}; it must be at least 0")
        check_flags(self, "recompute")
        check_backend(self.backend)

    @classmethod
    def from_preset(
        cls,
        name: str,
        *,
        modalities: Mapping[str, ModalityConfig | tuple],
        outputs: Mapping[str, int] | None = None,
    ) -> CMTAConfig:
        """The configuration of the paper or of the public code.

        Args:
            name: "paper"; "released" (ELU where the paper has a self-normalising network);
                "released:large" with its wider networks in front.
            modalities: a `ModalityConfig` each, or (kind, channels) and a table's groups.
            outputs: number of logits by task; by default four time bins.

        Raises:
            ValueError: an unknown preset, or modalities that are not as above.
        """
        check_preset(name, cls.PRESETS)
        settings: dict[str, Any] = {} if name == "paper" else {"gene_activation": "elu"}
        if name == "released:large":
            settings |= {"gene_widths": (1024, 1024, 1024), "patch_widths": (512,)}
        return cls(modalities, {"survival": 4} if outputs is None else outputs, **settings)
