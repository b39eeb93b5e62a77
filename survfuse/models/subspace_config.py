"""Configuration and presets of subspace fusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from survfuse.models.config import ModelConfig, Presets
from survfuse.models.gene_tokens import gene_groups
from survfuse.models.settings import (
    check_choice,
    check_flags,
    check_integers,
    check_not_negative,
    check_positive,
    check_probabilities,
)

BRANCHES = ("tumor", "microenvironment")

RELEASED_ARITHMETIC: dict[str, Any] = {
    "layout": "fixed",
    "consistency": "released",
    "released": True,
}


@dataclass(frozen=True)
class SubspaceFusionConfig(ModelConfig):
    """Everything a `SubspaceFusion` is built from; `asdict` and the constructor round-trip.

    Attributes:
        modalities: by name: one bag, and one or more tables with the gene groups of the branches.
            Without tables or without the bag, as single-modality baselines are, the branches are
            what they are where these are absent.
        outputs: number of logits by task.
        tumor, microenvironment: the gene groups each branch reads: "group", or "table/group" where
            several tables have a group of that name. A table without groups is one of its own name.
        dim: width of patches, genes and a branch's feature.
        gene_widths: layers of a branch's self-normalising network before the last, which has `dim`.
        gene_dropout: its alpha dropout.
        heads, dim_head: heads of the deformable attention and their size.
        offset_groups, downsample, offset_scale, kernel_size, bias, table_size, corners: as in
            `survfuse.layers.DeformableCrossAttention`.
        attention_dropout: probability with which one of its weights is dropped.
        pool: "mean" over the patches (released); "attention", gated, of `pool_width` units; or
            "genes", of `pool_heads` heads of `pool_head_dim`, where the branch's genes ask the
            patches and what these attended to: there the genes are fused with what they find and
            not with every patch. Every head is a question; rare patches need several.
        pool_temperature: divides the logits of "attention" and "genes". Below 1 a fresh pool
            already tells patches apart, which finds rare ones sooner.
        layout: "grid" puts patches at their coordinates; "square" row by row on a nearly square map
            of as many cells, whatever their coordinates; "fixed" on a dense map of `map_side` x
            `map_side` (released), repeating the patches of a shorter bag and taking those of a
            longer one at even distances.
        without_coords: what layout "grid" does with a bag without coordinates: "error", or "square"
            for that bag.
        patch_size: distance between patches in the unit of the coordinates, the same for all
            slides; None measures it in each bag, as the commonest step to the next patch in a row
            or column.
        map_side: of layout "fixed".
        consistency: gene-guided consistency of the "offsets"; "released", on maps of one size, for
            what the public code computes; "none" for no such loss.
        consistency_weight: of each branch's loss.
        released: the attention's arithmetic is that of the public code; with layout "fixed" only.
        backend: of the operations; None for the fastest.

    Presets:
        "paper": the released sizes on slides at their true places, with the consistency of offsets.
        "released": 50 x 50 maps of 2500 patches and the released arithmetic.

    Raises:
        ValueError: names the field, what it was and what it must be.
    """

    PRESETS: ClassVar[Presets] = {"paper": {}, "released": RELEASED_ARITHMETIC}

    tumor: tuple[str, ...] = ("tumor",)
    microenvironment: tuple[str, ...] = ("microenvironment",)
    dim: int = 128
    gene_widths: tuple[int, ...] = (64, 48, 32)
    gene_dropout: float = 0.1
    heads: int = 8
    dim_head: int = 64
    offset_groups: int | None = None
    downsample: int = 4
    offset_scale: float | None = None
    kernel_size: int | None = None
    attention_dropout: float = 0.1
    bias: str = "exact"
    table_size: int = 256
    corners: str = "zero"
    pool: str = "mean"
    pool_width: int = 128
    pool_heads: int = 8
    pool_head_dim: int = 8
    pool_temperature: float = 1.0
    layout: str = "grid"
    without_coords: str = "error"
    patch_size: float | None = None
    map_side: int = 50
    consistency: str = "offsets"
    consistency_weight: float = 0.5
    released: bool = False
    backend: str | None = None

    def _check(self) -> None:
        self._check_groups()
        lows = {"dim": 4, "heads": 1, "dim_head": 1, "downsample": 1, "pool_width": 1}
        lows |= {"pool_heads": 1, "pool_head_dim": 1}
        check_integers(self, lows | {"map_side": 1, "table_size": 2})
        for name in ("offset_groups", "kernel_size"):
            if getattr(self, name) is not None:
                check_integers(self, {name: 1})
        for name in ("offset_scale", "patch_size"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_probabilities(self, "gene_dropout", "attention_dropout")
        check_choice(self, "bias", ("exact", "table"))
        check_choice(self, "corners", ("zero", "renormalise"))
        check_choice(self, "pool", ("mean", "attention", "genes"))
        check_positive(self, "pool_temperature")
        check_choice(self, "layout", ("grid", "square", "fixed"))
        check_choice(self, "without_coords", ("error", "square"))
        check_choice(self, "consistency", ("offsets", "released", "none"))
        check_not_negative(self, "consistency_weight")
        check_flags(self, "released")
        for name in ("released", "consistency"):
            if getattr(self, name) in (True, "released") and self.layout != "fixed":
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} with layout {self.layout!r}; the released "
                    "arithmetic is one of maps of one size, layout 'fixed'"
                )

    def _check_groups(self) -> None:
        for name in BRANCHES:
            groups = getattr(self, name)
            if isinstance(groups, str) or not all(isinstance(group, str) for group in groups):
                raise ValueError(
                    f"{name} is {groups!r}; it must be a tuple of names of gene groups"
                )
            object.__setattr__(self, name, tuple(groups))
            if not groups:
                raise ValueError(f"{name} is empty; it must name at least one gene group")
        widths = self.gene_widths
        if isinstance(widths, int) or not all(isinstance(w, int) and w > 0 for w in widths):
            raise ValueError(f"gene_widths is {widths!r}; it must be a tuple of positive integers")
        object.__setattr__(self, "gene_widths", tuple(widths))

    @property
    def bag(self) -> str | None:
        """The one bag, or None.

        Raises:
            ValueError: there are several, or a modality the model cannot read.
        """
        bags = [name for name, item in self.modalities.items() if item.kind == "bag"]
        if len(bags) > 1:
            raise ValueError(f"modalities holds the bags {bags}; subspace fusion reads one")
        for name, item in self.modalities.items():
            if item.kind not in ("bag", "table"):
                raise ValueError(
                    f"modality {name!r} is of kind {item.kind!r}; subspace fusion reads one bag "
                    "and tables"
                )
        return bags[0] if bags else None

    def gene_columns(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Columns of each table, by branch and table; none where there is no table.

        Checked where a model is built: a preset is made before its groups are set.

        Raises:
            ValueError: a branch names a group that no table or several have, or a table feeds no
                branch.
        """
        groups = gene_groups(self.modalities)
        if not groups:
            return {branch: {} for branch in BRANCHES}
        found = {branch: self._columns(branch, groups) for branch in BRANCHES}
        for table in dict.fromkeys(table for table, _, _ in groups):
            if not any(table in columns for columns in found.values()):
                raise ValueError(
                    f"table {table!r} feeds no branch; leave it out, or name one of its gene "
                    "groups in tumor or microenvironment"
                )
        return found

    def _columns(
        self, branch: str, groups: list[tuple[str, str, tuple[int, ...]]]
    ) -> dict[str, tuple[int, ...]]:
        columns: dict[str, dict[int, None]] = {}
        for wanted in getattr(self, branch):
            matches = [
                (table, own)
                for table, group, own in groups
                if wanted in (group, f"{table}/{group}")
            ]
            if len(matches) != 1:
                have = [f"{table}/{group}" for table, group, _ in groups]
                what = "none" if not matches else "several"
                raise ValueError(
                    f"{branch} names the gene group {wanted!r}, which {what} of the tables has; "
                    f"the groups are {have}. survfuse.data.subspaces gives a table groups named "
                    "tumor and microenvironment"
                )
            table, own = matches[0]
            # genes of two groups are read once, in the order in which they come
            columns.setdefault(table, {}).update(dict.fromkeys(own))
        return {table: tuple(own) for table, own in columns.items()}
