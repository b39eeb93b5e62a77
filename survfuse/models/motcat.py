"""MOTCat: MCAT whose gene groups read the patches through optimal transport.

Source: Xu, Chen, "Multimodal optimal transport-based co-attention transformer with global
structure consistency for survival prediction", ICCV 2023, and a description of its public code.
What differs from that code is listed in docs/models.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from survfuse.layers.transport_attention import SOLVERS, TransportAttention
from survfuse.models.config import Presets
from survfuse.models.inputs import Tokens
from survfuse.models.mcat import MCAT, MCATConfig
from survfuse.models.patches_and_genes import KnownTokens
from survfuse.models.settings import check_choice, check_integers, check_positive

__all__ = ["MOTCat", "MOTCatConfig"]


@dataclass(frozen=True)
class MOTCatConfig(MCATConfig):
    """Settings of `MOTCat`: those of `MCATConfig`, and of the transport.

    `attention_heads` has no meaning here, and `recompute` must be False.

    Attributes:
        micro_batch: the most patches of one plan.
        transport_reg: of the entropy, relative to the greatest cost.
        transport_tau: of the marginals.
        solver: "torch" or "pot"; see `survfuse.layers.transport_attention.TransportAttention`.

    Presets:
        "paper"; "released" (ELU where the paper has a self-normalising network); "released:16384"
        with the larger micro-batch that the public code also names.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {
        "paper": {},
        "released": {"gene_activation": "elu"},
        "released:16384": {"gene_activation": "elu", "micro_batch": 16384},
    }
    MODEL: ClassVar[str] = "MOTCat"

    micro_batch: int = 256
    transport_reg: float = 0.1
    transport_tau: float = 0.5
    solver: str = "torch"

    def _check(self) -> None:
        super()._check()
        check_integers(self, {"micro_batch": 1})
        check_positive(self, "transport_reg", "transport_tau")
        # exp(-1 / reg) must be far from the least number of fp64
        if self.transport_reg < 0.005:
            raise ValueError(f"transport_reg is {self.transport_reg}; it must be at least 0.005")
        check_choice(self, "solver", SOLVERS)
        if self.recompute:
            raise ValueError(
                "recompute is True; it must be False: a plan needs all patches at once"
            )


class MOTCat(MCAT):
    """`MCAT` with transport plans in place of the attention of gene groups to patches.

    What a gene group reads is the sum of projected patches weighted by the plan, averaged over
    micro-batches; see `survfuse.layers.transport_attention.TransportAttention`. Everything else,
    missing modalities included, is as in `MCAT`.

    Args:
        config: see `MOTCatConfig`.

    Cost:
        Beside the projection 2 G operations per patch and Sinkhorn iteration (about 50 for the
        paper's regularisation) in fp64; one projected bag [N, dim] and one plan [N, G] are kept.
    """

    config_class: ClassVar[type] = MOTCatConfig
    export_obstacle: ClassVar[str | None] = "micro-batches are cut out of a bag by its length"
    config: MOTCatConfig

    def _make_attention(self, width: int) -> nn.Module:
        config = self.config
        return TransportAttention(
            config.dim,
            width,
            micro_batch=config.micro_batch,
            reg=config.transport_reg,
            tau=config.transport_tau,
            dropout=config.patch_dropout,
            solver=config.solver,
            piece_rows=config.piece_rows,
        )

    def _attend(self, genes: KnownTokens, bag: Tokens) -> Tensor:
        return self.attention(genes.values, genes.usable, bag.features, bag.ragged)

    def _weights(self, genes: KnownTokens, bag: Tokens) -> Tensor:
        return self.attention.weights(genes.values, genes.usable, bag.features, bag.ragged)
