"""Genes of the tumour and of its microenvironment: a rule over signature files, or a file.

The lists of the paper that split a transcriptome into these two subspaces were not published, so
they are derived here from files that are, by a rule that can be read and changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from survfuse.data.modalities import TableModality
from survfuse.data.names import shorten
from survfuse.data.omics import TYPES, read_signatures

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort

SUBSPACES = ("tumor", "microenvironment")
# families of MCAT's signature file: drivers of the tumour, and signals and identities of cells
DRIVERS = ("Tumor Suppressor Genes", "Oncogenes")
SIGNALS = ("Cytokines and Growth Factors", "Cell Differentiation Markers")
# hallmarks of MSigDB: what a growing tumour cell does, and what its surroundings do
TUMOR_HALLMARKS = (
    "E2F_TARGETS",
    "G2M_CHECKPOINT",
    "MYC_TARGETS_V1",
    "MYC_TARGETS_V2",
    "MITOTIC_SPINDLE",
    "DNA_REPAIR",
    "P53_PATHWAY",
    "PI3K_AKT_MTOR_SIGNALING",
    "MTORC1_SIGNALING",
    "WNT_BETA_CATENIN_SIGNALING",
    "HEDGEHOG_SIGNALING",
    "NOTCH_SIGNALING",
)
MICROENVIRONMENT_HALLMARKS = (
    "INFLAMMATORY_RESPONSE",
    "INTERFERON_ALPHA_RESPONSE",
    "INTERFERON_GAMMA_RESPONSE",
    "IL2_STAT5_SIGNALING",
    "IL6_JAK_STAT3_SIGNALING",
    "ALLOGRAFT_REJECTION",
    "COMPLEMENT",
    "TNFA_SIGNALING_VIA_NFKB",
    "ANGIOGENESIS",
    "EPITHELIAL_MESENCHYMAL_TRANSITION",
    "COAGULATION",
    "TGF_BETA_SIGNALING",
)
_EXPRESSION = "_rnaseq"


def subspace_genes(
    families: str | os.PathLike[str], hallmarks: str | os.PathLike[str]
) -> dict[str, tuple[str, ...]]:
    """Gene names of the two subspaces by the rule; no gene is in both.

    Tumour: suppressors and oncogenes in a hallmark of proliferation, repair or its signalling, that
    are no cytokines, growth factors or differentiation markers. Microenvironment: those, in a
    hallmark of inflammation, vessels or stroma, that are no suppressors or oncogenes.

    Args:
        families: a file of gene families, MCAT's `signatures.csv`.
        hallmarks: a file of MSigDB hallmarks, SurvPath's `hallmarks_signatures.csv`; names may lack
            the `HALLMARK_`.

    Returns:
        {"tumor": genes, "microenvironment": genes}, sorted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file lacks a family or a hallmark of the rule; it is named.
    """
    family_of = read_signatures(families)
    hallmark_of = {
        name.removeprefix("HALLMARK_"): genes for name, genes in read_signatures(hallmarks).items()
    }
    drivers = _union(family_of, DRIVERS, families)
    signals = _union(family_of, SIGNALS, families)
    tumor = drivers & _union(hallmark_of, TUMOR_HALLMARKS, hallmarks)
    microenvironment = signals & _union(hallmark_of, MICROENVIRONMENT_HALLMARKS, hallmarks)
    return {
        "tumor": tuple(sorted(tumor - signals)),
        "microenvironment": tuple(sorted(microenvironment - drivers)),
    }


def read_subspace_genes(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Gene names of the two subspaces from a file of your own.

    Args:
        path: a CSV file with the columns `tumor` and `microenvironment`, one gene to a row, the
            shorter column padded with nothing. Other columns are ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or empty.
    """
    lists = read_signatures(path)
    for name in SUBSPACES:
        if not lists.get(name):
            found = "has an empty column" if name in lists else "has no column"
            raise ValueError(f"{path} {found} {name!r}; it must list genes; it has {[*lists]}")
    return {name: lists[name] for name in SUBSPACES}


def subspace_groups(
    columns: Sequence[str], genes: Mapping[str, Iterable[str]], *, source: str = "the table"
) -> dict[str, tuple[str, ...]]:
    """The expression columns of each list of genes, in the order of the table.

    Args:
        columns: of a table: `TP53_rnaseq` beside other kinds, or plain names of genes where the
            table holds expression only.
        genes: from `subspace_genes` or `read_subspace_genes`.
        source: what the columns are of, for error messages.

    Raises:
        ValueError: the table holds no expression, or none of a list.

    Example:
        >>> genes = {"tumor": ["TP53"], "microenvironment": ["IL6", "CCL5"]}
        >>> subspace_groups(["IL6_rnaseq", "TP53_mut", "TP53_rnaseq"], genes)
        {'tumor': ('TP53_rnaseq',), 'microenvironment': ('IL6_rnaseq',)}
    """
    gene_of = {c: c.removesuffix(_EXPRESSION) for c in columns if c.endswith(_EXPRESSION)}
    others = sorted({kind for kind in TYPES for c in columns if c.endswith(f"_{kind}")})
    if not gene_of and others:
        raise ValueError(
            f"{source} holds no expression, only {shorten(others)}; the tumour and "
            "microenvironment genes are lists of expression (rnaseq) columns"
        )
    gene_of = gene_of or {column: column for column in columns}
    groups = {}
    for name, listed in genes.items():
        wanted = set(listed)
        groups[name] = tuple(column for column, gene in gene_of.items() if gene in wanted)
        if not groups[name]:
            raise ValueError(
                f"{source} has an expression column for none of the {len(wanted)} genes of "
                f"{name!r}, such as {shorten(sorted(wanted), 3)}"
            )
    return groups


def with_subspaces(cohort: Cohort, name: str, genes: Mapping[str, Iterable[str]]) -> Cohort:
    """The cohort with the two lists as groups of one of its tables, in place of the table's own.

    Args:
        cohort: with a table of expression.
        name: of that table.
        genes: from `subspace_genes` or `read_subspace_genes`.

    Raises:
        ValueError: there is no such modality, it is no table, or it holds no expression.
    """
    source = cohort.modality(name)
    if not isinstance(source, TableModality):
        raise ValueError(f"name is {name!r}, a {source.kind} of {cohort.name}; it must be a table")
    groups = subspace_groups(source.features, genes, source=f"table {name!r} of {cohort.name}")
    return cohort.with_modality(name, replace(source, groups=groups))


def _union(
    sets: Mapping[str, Iterable[str]], names: Sequence[str], path: str | os.PathLike[str]
) -> set[str]:
    for name in names:
        if name not in sets:
            raise ValueError(f"{path} has no column {name!r}; it has {shorten(list(sets))}")
    return {gene for name in names for gene in sets[name]}
