"""Tumour and microenvironment genes: the rule on public files, lists of one's own, no RNA."""

from __future__ import annotations

import pytest

from survfuse.data import OmicsTable, read_cohort, simulate_cohort
from survfuse.data.subspaces import (
    DRIVERS,
    MICROENVIRONMENT_HALLMARKS,
    SIGNALS,
    SUBSPACES,
    TUMOR_HALLMARKS,
    read_subspace_genes,
    subspace_genes,
    subspace_groups,
    with_subspaces,
)


@pytest.fixture(scope="module")
def genes(shared_data):
    return subspace_genes(
        shared_data / "tcga_omics" / "mcat_signatures.csv",
        shared_data / "survpath" / "hallmarks_signatures.csv",
    )


def test_the_rule_on_the_public_files(shared_data, genes) -> None:
    assert {name: len(found) for name, found in genes.items()} == {
        "tumor": 90,
        "microenvironment": 228,
    }
    assert not set(genes["tumor"]) & set(genes["microenvironment"])
    assert {"TP53", "PTEN", "MYC"} <= set(genes["tumor"])
    assert {"IL6", "CCL5", "CD4"} <= set(genes["microenvironment"])
    table = OmicsTable.from_tcga(shared_data / "tcga_omics" / "tcga_kirp_all_clean.csv.zip")
    groups = subspace_groups(list(table.values.columns), genes)
    assert [len(groups[name]) for name in SUBSPACES] == [86, 221]
    assert all(c.endswith("_rnaseq") for group in groups.values() for c in group)


def test_a_cohort_without_expression_is_told(shared_data, genes) -> None:
    cohort = read_cohort(shared_data / "tcga_omics" / "tcga_ucec_all_clean.csv.zip")
    with pytest.raises(ValueError, match=r"table 'mut' of .* holds no expression, only 'mut'"):
        with_subspaces(cohort, "mut", genes)


def test_plain_names_of_genes_are_expression(shared_data, genes) -> None:
    path = shared_data / "survpath" / "raw_rna_data" / "xena" / "blca" / "rna_clean.csv"
    table = OmicsTable.from_survpath(path)
    groups = subspace_groups(list(table.values.columns), genes)
    assert [len(groups[name]) for name in SUBSPACES] == [24, 30]


def _write(path, columns):
    height = max(map(len, columns.values()))
    rows = [",".join(columns)]
    for i in range(height):
        rows.append(",".join(c[i] if i < len(c) else "" for c in columns.values()))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_the_rule_on_small_files(tmp_path) -> None:
    families = _write(
        tmp_path / "families.csv",
        {DRIVERS[0]: ["A", "B"], DRIVERS[1]: ["C", "X"], SIGNALS[0]: ["X", "I"], SIGNALS[1]: ["J"]},
    )
    hallmarks = {f"HALLMARK_{name}": ["A", "X"] for name in TUMOR_HALLMARKS}
    hallmarks |= {name: ["I", "X", "B"] for name in MICROENVIRONMENT_HALLMARKS}
    path = _write(tmp_path / "hallmarks.csv", hallmarks)
    # X is both, so neither; B, C and J are in no hallmark of their own side
    assert subspace_genes(families, path) == {"tumor": ("A",), "microenvironment": ("I",)}
    del hallmarks["HALLMARK_DNA_REPAIR"]
    short = _write(tmp_path / "short.csv", hallmarks)
    with pytest.raises(ValueError, match=r"short\.csv has no column 'DNA_REPAIR'"):
        subspace_genes(families, short)


def test_lists_from_a_file_become_groups_of_a_table(tmp_path) -> None:
    lists = {"tumor": ["G01", "G02"], "microenvironment": ["M03", "M01", "other"], "more": ["x"]}
    genes = read_subspace_genes(_write(tmp_path / "lists.csv", lists))
    cohort = simulate_cohort(n_patients=(4, 0, 0)).cohort
    grouped = with_subspaces(cohort, "genes", genes)
    assert grouped.modality("genes").groups == {
        "tumor": ("G01", "G02"),
        "microenvironment": ("M01", "M03"),
    }
    with pytest.raises(ValueError, match=r"'slides', a bag of .*; it must be a table"):
        with_subspaces(cohort, "slides", genes)
    with pytest.raises(ValueError, match="for none of the 1 genes of 'tumor', such as 'TP53'"):
        with_subspaces(cohort, "genes", {"tumor": ["TP53"], "microenvironment": ["M01"]})
    with pytest.raises(ValueError, match=r"has no column 'microenvironment'; it must list genes"):
        read_subspace_genes(_write(tmp_path / "half.csv", {"tumor": ["A"], "immune": ["B"]}))
