"""Omics tables of TCGA as the PORPOISE, MCAT and HEALNet family and SurvPath publish them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from survfuse.data.names import shorten, unknown_name
from survfuse.extras import require

if TYPE_CHECKING:
    import pandas as pd

TYPES = ("rnaseq", "cnv", "mut")
METADATA = (
    "case_id",
    "slide_id",
    "age",
    "site",
    "survival_months",
    "survival_months_dss",
    "survival_months_pfi",
    "censorship",
    "censorship_dss",
    "censorship_pfi",
    "is_female",
    "oncotree_code",
    "train",
)


@dataclass(frozen=True, eq=False)
class OmicsTable:
    """Omics values with one row per unit: a slide as published, or a patient.

    Attributes:
        values: [n, F] float64 frame; index = unit ids, columns as in the file (`TP53_mut`; plain
            gene names in SurvPath's tables).
        metadata: [n, ...] frame with the same index and at least `case_id`; empty otherwise where
            the file carries none. `censorship` is still 1 = censored here.
        types: column names of each omic type that the table has, in the order of the file.
        source: the file, for error messages.
        notes: what reading changed, for reports.

    A table without expression (TCGA-UCEC) has no entry "rnaseq": asking for it is an error.
    """

    values: pd.DataFrame
    metadata: pd.DataFrame
    types: dict[str, tuple[str, ...]]
    source: str = ""
    notes: tuple[str, ...] = ()

    @classmethod
    def from_tcga(cls, path: str | os.PathLike[str]) -> OmicsTable:
        """Read `tcga_<cohort>_all_clean.csv[.zip]`: one row per slide, patients repeated.

        Columns end in `_rnaseq` (z-scores), `_cnv` (-2 to 2) or `_mut` (0/1). Older tables have
        mutations without a suffix: such a column is taken as "mut" if it holds only 0 and 1.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a needed metadata column is missing, a slide or a column occurs twice, a
                column is neither metadata nor omics, or a value is not a number.
        """
        path = _existing(path)
        pd = require("pandas", extra="train")
        frame = pd.read_csv(path, low_memory=False, dtype={"site": str})
        frame = frame.loc[:, [c for c in frame.columns if not c.startswith("Unnamed")]]
        for column in ("case_id", "slide_id", "survival_months", "censorship"):
            if column not in frame.columns:
                raise ValueError(
                    f"{path} has no column {column!r}; a TCGA omics table must have it"
                )
        frame.index = pd.Index(frame["slide_id"].map(strip_slide_suffix), name="unit_id")
        _check_unique(frame.index, f"{path}: slide")
        metadata_columns = [c for c in frame.columns if c in METADATA]
        omics = frame.drop(columns=metadata_columns)
        types = _types_of(omics, path)
        metadata = frame[metadata_columns].copy()
        metadata["site"] = site_codes(metadata["case_id"], metadata.get("site"))
        return cls(_numbers(omics, path), metadata, types, str(path))

    @classmethod
    def from_survpath(
        cls,
        rna: str | os.PathLike[str],
        *,
        metadata: str | os.PathLike[str] | None = None,
        repeated: Literal["mean", "first", "error"] = "mean",
    ) -> OmicsTable:
        """Read SurvPath's `rna_clean.csv`: one row per case, log2 expression, plain gene names.

        Args:
            rna: `raw_rna_data/<source>/<cohort>/rna_clean.csv`.
            metadata: `metadata/tcga_<cohort>.csv`, one row per slide; its cases that have
                expression are kept, in its order, one row each.
            repeated: what to do with a case of several samples (three in TCGA-COADREAD): take
                their mean or the first, and note it, or raise.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a case occurs twice (and `repeated` is "error"), a value is not a number,
                slides of a case disagree, or no case is in both files.
        """
        if repeated not in ("mean", "first", "error"):
            raise ValueError(f"repeated is {repeated!r}; it must be 'mean', 'first' or 'error'")
        pd = require("pandas", extra="train")
        path = _existing(rna)
        frame = pd.read_csv(path, index_col=0, low_memory=False)
        frame.index = pd.Index(frame.index.astype(str), name="unit_id")
        values, notes = _one_sample_per_case(_numbers(frame, path), path, repeated)
        if metadata is None:
            about = pd.DataFrame({"case_id": values.index}, index=values.index)
            about["site"] = site_codes(about["case_id"], None)
        else:
            about = read_case_metadata(metadata)
            without = about.index[~about.index.isin(values.index)]
            if len(without):
                notes += (f"{len(without)} cases without expression were left out",)
            about = about.drop(without)
            if about.empty:
                raise ValueError(f"{path} and {metadata} have no case in common")
            values = values.loc[about.index]
        return cls(values, about, {"rnaseq": tuple(values.columns)}, str(path), notes)

    def __len__(self) -> int:
        return len(self.values)

    def block(self, kind: str) -> pd.DataFrame:
        """The columns of one omic type, [n, F_kind].

        Raises:
            ValueError: the table has no such type; says which it has.
        """
        if kind not in self.types:
            has = shorten(list(self.types))
            if kind in TYPES:
                raise ValueError(f"{self.source} has no {kind} columns; it has {has}")
            raise ValueError(unknown_name("omic type", kind, self.types, where=self.source))
        return self.values[list(self.types[kind])]

    def columns(self, names: Iterable[str]) -> pd.DataFrame:
        """The named omics columns, in that order.

        Raises:
            ValueError: a column does not exist; says the nearest that does.
        """
        names = list(names)
        for name in names:
            if name not in self.values.columns:
                where = self.source
                raise ValueError(unknown_name("column", name, self.values.columns, where=where))
        return self.values[names]

    def signatures(self, path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
        """Groups of this table's columns by a signature file: one column of gene names per group.

        A group holds, for each of its genes, every column of that gene the table has (expression,
        copy number and mutation), sorted by name. Groups share columns where they share genes.

        Args:
            path: MCAT's `signatures.csv` (6 gene families) or SurvPath's `*_signatures.csv`.

        Returns:
            Columns of each group, in the order of the file; a group may be empty.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: no gene of the file is in the table.
        """
        groups = group_columns(self.values.columns, read_signatures(path))
        if not any(groups.values()):
            raise ValueError(f"no gene of {path} is in {self.source or 'the table'}")
        return groups

    def without_genes(self, genes: Sequence[str]) -> OmicsTable:
        """The table without every column of the named genes: expression, copy number, mutation.

        For genes that define the label that a model is to predict.

        Raises:
            ValueError: the table has no column of a gene; says the nearest gene it has.
        """
        suffix = re.compile(rf"_(?:{'|'.join(TYPES)})$")
        gene_of = {column: suffix.sub("", column) for column in self.values.columns}
        known = set(gene_of.values())
        for gene in genes:
            if gene not in known:
                raise ValueError(unknown_name("gene", gene, sorted(known), where=self.source))
        kept = [column for column, gene in gene_of.items() if gene not in set(genes)]
        types = {
            kind: tuple(c for c in columns if gene_of[c] not in set(genes))
            for kind, columns in self.types.items()
        }
        types = {kind: columns for kind, columns in types.items() if columns}
        notes = self.notes
        if len(genes):
            left_out = len(gene_of) - len(kept)
            notes += (f"{left_out} columns of {len(set(genes))} excluded genes were left out",)
        return OmicsTable(self.values[kept], self.metadata, types, self.source, notes)

    def check_slides_agree(self) -> None:
        """Raise unless all rows of a patient hold the same omics, outcome and clinical values.

        Raises:
            ValueError: names the first patient and column that differ.
        """
        for frame in (self.metadata.drop(columns=["slide_id"], errors="ignore"), self.values):
            _check_agree(frame, self.metadata["case_id"], self.source)

    def by_patient(self) -> OmicsTable:
        """One row per patient, in the order of first appearance; the rows must agree.

        The column `slide_ids` of the metadata then holds a tuple of each patient's slides.

        Raises:
            ValueError: two slide rows of a patient differ; names patient and column.
        """
        self.check_slides_agree()
        first = ~self.metadata["case_id"].duplicated()
        metadata = self.metadata.loc[first].drop(columns=["slide_id"], errors="ignore")
        values = self.values.loc[first]
        if "slide_id" in self.metadata:
            slides = self.metadata["slide_id"].map(strip_slide_suffix)
            groups = slides.groupby(self.metadata["case_id"], sort=False).agg(tuple)
            metadata = metadata.assign(slide_ids=groups.to_numpy())
        index = metadata["case_id"].astype(str).rename("unit_id")
        return OmicsTable(
            values.set_axis(index, axis=0),
            metadata.set_axis(index, axis=0),
            self.types,
            self.source,
            self.notes,
        )


def group_columns(
    columns: Sequence[str], genes: Mapping[str, Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Columns of each group's genes, whatever their omic type, sorted; a group may be empty.

    Example:
        >>> group_columns(["TP53_mut", "TP53_cnv", "KRAS"], {"a": ["TP53"], "b": ["KRAS", "X"]})
        {'a': ('TP53_cnv', 'TP53_mut'), 'b': ('KRAS',)}
    """
    columns_of_gene: dict[str, list[str]] = {}
    suffix = re.compile(rf"_(?:{'|'.join(TYPES)})$")
    for column in columns:
        columns_of_gene.setdefault(suffix.sub("", column), []).append(column)
    return {
        group: tuple(sorted(column for gene in named for column in columns_of_gene.get(gene, ())))
        for group, named in genes.items()
    }


def read_signatures(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Gene names of each column of a signature file, duplicates dropped, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = _existing(path)
    pd = require("pandas", extra="train")
    frame = pd.read_csv(path, dtype=str)
    frame = frame.loc[:, [c for c in frame.columns if not c.startswith("Unnamed")]]
    # NaN pads the shorter groups
    return {
        str(group): tuple(dict.fromkeys(gene.strip() for gene in frame[group].dropna()))
        for group in frame.columns
    }


def read_case_metadata(path: str | os.PathLike[str]) -> pd.DataFrame:
    """A slide-level metadata file (SurvPath's `tcga_<cohort>.csv`) as one row per case.

    Returns:
        Frame indexed by case id, with `slide_ids`: a tuple of each case's slides.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a needed column is missing, or slides of a case disagree.
    """
    path = _existing(path)
    pd = require("pandas", extra="train")
    frame = pd.read_csv(path, dtype={"site": str})
    frame = frame.loc[:, [c for c in frame.columns if not c.startswith("Unnamed")]]
    for column in ("case_id", "slide_id"):
        if column not in frame.columns:
            raise ValueError(f"{path} has no column {column!r}; a metadata file must have it")
    slides = frame["slide_id"].map(strip_slide_suffix)
    frame = frame.drop(columns=["slide_id"])
    _check_agree(frame, frame["case_id"], str(path))
    groups = slides.groupby(frame["case_id"], sort=False).agg(tuple)
    frame = frame.drop_duplicates("case_id")
    frame.index = pd.Index(frame["case_id"].astype(str), name="unit_id")
    frame["site"] = site_codes(frame["case_id"], frame.get("site"))
    frame["slide_ids"] = groups.to_numpy()
    return frame


def site_codes(case_ids: Sequence[str], site: Sequence[object] | None) -> list[str]:
    """Tissue source site codes: the second field of a TCGA barcode, else the given column.

    The published `site` column lost leading zeros ("5" for "05"), the barcode did not.
    """
    given = ["" if s is None or s != s else str(s) for s in site] if site is not None else None
    codes = []
    for i, case in enumerate(case_ids):
        match = re.match(r"TCGA-([0-9A-Z]{2})-", str(case))
        codes.append(match[1] if match else (given[i] if given else ""))
    return codes


def strip_slide_suffix(slide_id: str) -> str:
    """The slide id without its file suffix (`.svs`, `.tif`, `.ndpi`, `.h5`, `.pt` and so on).

    Example:
        >>> strip_slide_suffix("TCGA-2F-A9KO-01Z-00-DX1.195576CF-vss.svs")
        'TCGA-2F-A9KO-01Z-00-DX1.195576CF-vss'
    """
    # slide ids hold dots themselves, so only known suffixes go
    return re.sub(r"\.(svs|tiff?|ndpi|mrxs|scn|h5|hdf5|pth?|npy)$", "", str(slide_id), flags=re.I)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    return path


def _one_sample_per_case(
    values: pd.DataFrame, path: Path, repeated: str
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    several = values.index[values.index.duplicated()].unique()
    if not len(several):
        return values, ()
    if repeated == "error":
        _check_unique(values.index, f"{path}: case")
    groups = values.groupby(level=0, sort=False)
    values = groups.mean() if repeated == "mean" else groups.nth(0)
    taken = "their mean" if repeated == "mean" else "the first"
    note = f"{len(several)} cases have several expression samples, taken is {taken}"
    return values, (f"{note}: {shorten(list(several), 3)}",)


def _check_unique(index: pd.Index, what: str) -> None:
    if index.has_duplicates:
        raise ValueError(f"{what} {str(index[index.duplicated()][0])!r} occurs twice")


def _check_agree(frame: pd.DataFrame, case_ids: pd.Series, source: str) -> None:
    cases = case_ids.astype(str).to_numpy()
    _, first, of_row = np.unique(cases, return_index=True, return_inverse=True)
    representative = frame.iloc[first[of_row]]
    for dtype_class in ("number", None):
        part = (
            frame.select_dtypes("number") if dtype_class else frame.select_dtypes(exclude="number")
        )
        mine, other = part.to_numpy(), representative[part.columns].to_numpy()
        # NaN equals NaN here: unknown in every row is agreement
        wrong = (mine != other) & ~((mine != mine) & (other != other))
        if wrong.any():
            row, column = (int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"{source}: rows of case {cases[row]!r} differ in column "
                f"{str(part.columns[column])!r}: {other[row, column]} and {mine[row, column]}; "
                "slides of one patient must agree"
            )


def _types_of(omics: pd.DataFrame, path: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {kind: [] for kind in TYPES}
    for column in omics.columns:
        kind = column.rpartition("_")[2]
        if kind in found:
            found[kind].append(column)
        elif set(omics[column].dropna().unique()) <= {0, 1}:
            found["mut"].append(column)
        else:
            raise ValueError(
                f"{path}: column {column!r} is neither metadata nor omics; an omics column must "
                "end in _rnaseq, _cnv or _mut, or hold only 0 and 1 (a mutation)"
            )
    return {kind: tuple(columns) for kind, columns in found.items() if columns}


def _numbers(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    text = frame.select_dtypes(exclude=["number", "bool"]).columns
    if len(text):
        raise ValueError(f"{path}: column {text[0]!r} holds something that is not a number")
    return frame.astype(np.float64)
