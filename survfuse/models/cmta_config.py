"""Configuration and presets of CMTA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from survfuse.models.config import ModelConfig, Presets
from survfuse.models.patches_and_genes import check_gene_side, check_heads
from survfuse.models.settings import (
    check_choice,
    check_flags,
    check_integers,
    check_not_negative,
    check_probabilities,
    check_widths,
)

ALIGNMENTS = ("l1", "mse", "cosine", "kl", "none")


@dataclass(frozen=True)
class CMTAConfig(ModelConfig):
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

    Presets:
        "paper"; "released" (ELU where the paper has a self-normalising network); "released:large"
        with its wider networks in front.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "released": {"gene_activation": "elu"},
        "released:large": {
            "gene_activation": "elu",
            "gene_widths": (1024, 1024, 1024),
            "patch_widths": (512,),
        },
    }

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

    def _check(self) -> None:
        check_gene_side(self, "CMTA")
        lows = {"dim": 1, "encoder_heads": 1, "attention_heads": 1, "landmarks": 1}
        check_integers(self, {**lows, "bilinear_scale": 1})
        check_heads(self, "dim", "encoder_heads", "attention_heads")
        check_widths(self, "patch_widths")
        check_choice(self, "alignment", ALIGNMENTS)
        check_choice(self, "fusion", ("concat", "bilinear"))
        check_probabilities(self, "patch_dropout", "dropout")
        check_not_negative(self, "alignment_weight")
        check_flags(self, "recompute")
