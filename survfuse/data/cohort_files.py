"""Build a cohort from published files: omics tables, SurvPath's layout, TCGA-CDR, bags."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from survfuse.data.bags import Bags
from survfuse.data.cohort import Cohort
from survfuse.data.labels import check_survival
from survfuse.data.modalities import BagModality, TableModality
from survfuse.data.names import shorten, unknown_name
from survfuse.data.omics import METADATA, OmicsTable, strip_slide_suffix
from survfuse.data.outcomes import endpoint_columns, read_tcga_cdr

if TYPE_CHECKING:
    import pandas as pd

ROWS = ("patients", "slides")
TABLES = ("by_type", "merged", "healnet", "signatures")
HEALNET_COVARIATES = ("age", "is_female")


def read_cohort(
    omics: str | os.PathLike[str],
    *,
    metadata: str | os.PathLike[str] | None = None,
    rows: Literal["patients", "slides"] = "patients",
    tables: Literal["by_type", "merged", "healnet", "signatures"] = "by_type",
    types: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    signatures: str | os.PathLike[str] | None = None,
    outcomes: str | os.PathLike[str] | None = None,
    endpoint: str = "OS",
    missing_outcome: Literal["error", "drop", "keep"] = "error",
    bags: str | os.PathLike[str] | Bags | None = None,
    bag_name: str = "slides",
    name: str | None = None,
) -> Cohort:
    """A cohort from TCGA files.

    The `honest` protocol is the default: one row per patient, one table per omic type. HEALNet's
    released protocol is `rows="slides", tables="healnet"`: one row per slide and one table of all
    omics in the order of the file, behind `age` and `is_female`.

    Args:
        omics: `tcga_<cohort>_all_clean.csv[.zip]`, or SurvPath's `rna_clean.csv` together with
            `metadata`.
        metadata: SurvPath's `metadata/tcga_<cohort>.csv`.
        rows: what a row is. Slide rows repeat patients: no split by rows is honest then.
        tables: "by_type": "rnaseq", "cnv" and "mut", those that the file has; "merged": one table
            "omics"; "healnet": one table "omics" that begins with age and sex; "signatures": one
            table "omics" of the columns in any group of `signatures`, with its groups.
        types: omic types to take, in that order; None takes what there is.
        exclude: genes whose every column is left out, for those that define a label.
        signatures: a file of gene groups; with any `tables`, tables carry its groups.
        outcomes: TCGA-CDR's workbook; None takes the outcome columns of the table.
        endpoint: "OS", "DSS", "DFI" or "PFI".
        missing_outcome: a patient without the endpoint is an error, or is dropped and counted in
            the cohort's notes, or is kept with time NaN, to be scored by a trained model.
        bags: `Bags`, a bag store, or a folder with one bag file per slide, named by slide id.
        bag_name: name of the bag modality.
        name: of the cohort; by default from the file name.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        ValueError: a file is not as described, slides of a patient disagree, an omic type, an
            excluded gene or an endpoint is missing, an outcome is NaN or negative, or no bag
            belongs to the cohort.
    """
    for what, value, valid in (("rows", rows, ROWS), ("tables", tables, TABLES)):
        if value not in valid:
            raise ValueError(unknown_name(what, str(value), valid))
    if tables == "signatures" and signatures is None:
        raise ValueError("signatures is None; tables='signatures' needs a file of gene groups")
    table = _read_table(omics, metadata, rows)
    if exclude:
        table = table.without_genes(exclude)
    outcome, notes = _outcome(table, outcomes, endpoint, missing_outcome)
    keep = table.metadata.index.isin(outcome.index)
    about = table.metadata.loc[keep]
    time, event = outcome["time"].to_numpy(dtype=float), outcome["event"].to_numpy(dtype=bool)
    unknown = bool(np.isnan(time).any())
    if not unknown:
        time, event = check_survival(outcome["time"], event, time_name=f"{endpoint} time")
    cohort = Cohort(
        unit_ids=tuple(about.index),
        patient_ids=tuple(about["case_id"].astype(str)),
        time=time,
        event=event,
        covariates=_covariates(about),
        modalities=_tables(table, np.flatnonzero(keep), tables, types, signatures),
        name=name or _cohort_name(omics),
        notes=(*table.notes, *notes),
        unknown_outcome=unknown,
    )
    if bags is None:
        return cohort
    slides = _slides_of(about)
    modality = bags_of_slides(bags, slides)
    wanted = sum(len(group) for group in slides)
    without = wanted - sum(len(group) for group in modality.groups)
    note = f"{without} of {wanted} slides have no bag" if without else None
    return cohort.with_modality(bag_name, modality, note=note)


def bags_of_slides(
    bags: str | os.PathLike[str] | Bags, slides: Sequence[Sequence[str]]
) -> BagModality:
    """The bag modality of rows that name their slides.

    Args:
        bags: `Bags`, a bag store, or a folder of bag files. A folder is read into memory as a
            whole; pack it first (`survfuse pack`) where it is large.
        slides: per row the slide ids. Slides without a bag are left out; a row none of whose
            slides has one is absent.

    Raises:
        FileNotFoundError: the path does not exist, or the folder holds no bag file.
        ValueError: no slide has a bag, or two files are of one slide or differ in width.
    """
    wanted = {slide for group in slides for slide in group}
    source = bags if isinstance(bags, Bags) else _open_bags(Path(bags), wanted)
    index: dict[str, int] = {}
    for i, name in enumerate(source.names):
        index.setdefault(strip_slide_suffix(name), i)
    groups = tuple(tuple(index[s] for s in group if s in index) for group in slides)
    if not any(groups):
        raise ValueError(
            f"none of {len(wanted)} slides has a bag: the cohort asks for "
            f"{shorten(sorted(wanted), 2)}, the bags are {shorten(source.names, 2)}"
        )
    return BagModality(source, groups)


def _read_table(
    omics: str | os.PathLike[str], metadata: str | os.PathLike[str] | None, rows: str
) -> OmicsTable:
    if metadata is not None:
        if rows == "slides":
            raise ValueError("rows is 'slides'; SurvPath's expression has one row per patient")
        return OmicsTable.from_survpath(omics, metadata=metadata)
    table = OmicsTable.from_tcga(omics)
    if rows == "patients":
        return table.by_patient()
    table.check_slides_agree()
    return table


def _outcome(
    table: OmicsTable,
    outcomes: str | os.PathLike[str] | None,
    endpoint: str,
    missing_outcome: str,
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Time and event of each unit that has them, and what to note."""
    if missing_outcome not in ("error", "drop", "keep"):
        raise ValueError(
            f"missing_outcome is {missing_outcome!r}; it must be 'error', 'drop' or 'keep'"
        )
    if outcomes is None:
        frame = endpoint_columns(table.metadata, endpoint=endpoint, source=table.source)
        unknown = frame["time"].isna()
    else:
        cdr = read_tcga_cdr(outcomes, endpoint=endpoint)[["time", "event"]]
        frame = cdr.reindex(table.metadata["case_id"]).set_axis(table.metadata.index, axis=0)
        unknown = frame["time"].isna()
    if not unknown.any():
        return frame.astype({"event": bool}), ()
    if missing_outcome == "error":
        n = int(unknown.sum())
        raise ValueError(
            f"{endpoint} time or censorship is NaN for {n} rows of {table.source}: "
            f"{shorten(list(frame.index[unknown]), 3)}; missing_outcome='drop' leaves them out"
        )
    if missing_outcome == "keep":
        note = f"{int(unknown.sum())} rows have no known {endpoint}"
        # NaN is no event, and as a bool it would be one
        return frame.assign(event=frame["event"].where(~unknown, False).astype(bool)), (note,)
    note = f"{int(unknown.sum())} rows without {endpoint} were left out"
    return frame.loc[~unknown].astype({"event": bool}), (note,)


def _covariates(metadata: pd.DataFrame) -> pd.DataFrame:
    outcome = ("survival_months", "censorship")
    columns = [
        c
        for c in metadata.columns
        if c in METADATA and c not in ("case_id", "train") and not c.startswith(outcome)
    ]
    return metadata[columns].copy()


def _tables(
    table: OmicsTable,
    rows: np.ndarray,
    how: str,
    types: Sequence[str] | None,
    signatures: str | os.PathLike[str] | None,
) -> dict[str, TableModality]:
    blocks = {kind: table.block(kind) for kind in (types or table.types)}
    groups = table.signatures(signatures) if signatures is not None else {}
    if how == "by_type":
        return {kind: _modality(block, rows, groups) for kind, block in blocks.items()}
    taken = {column for block in blocks.values() for column in block.columns}
    merged = table.values[[column for column in table.values.columns if column in taken]]
    if how == "signatures":
        used = {column for columns in groups.values() for column in columns}
        merged = merged[[column for column in merged.columns if column in used]]
    if how == "healnet":
        for column in HEALNET_COVARIATES:
            if column not in table.metadata.columns:
                raise ValueError(f"{table.source} has no column {column!r}; 'healnet' needs it")
        clinical = table.metadata[list(HEALNET_COVARIATES)].astype(np.float64)
        merged = clinical.join(merged)
    return {"omics": _modality(merged, rows, groups)}


def _modality(
    frame: pd.DataFrame, rows: np.ndarray, groups: dict[str, tuple[str, ...]]
) -> TableModality:
    columns = set(frame.columns)
    kept = {name: tuple(c for c in group if c in columns) for name, group in groups.items()}
    return TableModality(frame.to_numpy(dtype=np.float64)[rows], tuple(frame.columns), kept)


def _slides_of(metadata: pd.DataFrame) -> list[tuple[str, ...]]:
    if "slide_ids" in metadata.columns:
        return list(metadata["slide_ids"])
    return [(strip_slide_suffix(slide),) for slide in metadata["slide_id"]]


def _open_bags(path: Path, wanted: set[str]) -> Bags:
    """The bags of a store, or those of the wanted slides in a folder."""
    from survfuse.data.readers import SUFFIXES, bag_name, read_bag
    from survfuse.data.store import BagStore

    if path.is_file():
        return BagStore(path).bags()
    if not path.is_dir():
        raise FileNotFoundError(f"bags: {path} is neither a bag store nor a folder")
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"bags: folder {path} holds no bag file ({', '.join(SUFFIXES)})")
    file_of: dict[str, Path] = {}
    for file in files:
        slide = strip_slide_suffix(bag_name(file))
        if slide in file_of:
            raise ValueError(f"bags: {file_of[slide]} and {file} are both of slide {slide!r}")
        file_of[slide] = file
    used = {slide: file for slide, file in file_of.items() if slide in wanted}
    if not used:
        raise ValueError(
            f"bags: none of {len(files)} files in {path} is of a slide of the cohort; a file must "
            f"be named by its slide, as {sorted(wanted)[0]!r}"
        )
    read = [read_bag(file) for file in used.values()]
    coords = [bag.coords for bag in read] if any(bag.coords is not None for bag in read) else None
    sizes = {"patch_size_level0": [bag.patch_size_level0 for bag in read]}
    features = _alike([bag.features for bag in read])
    return Bags.from_list(features, list(used), coords=coords, attributes=sizes)


def _alike(features: list[Tensor]) -> list[Tensor]:
    """Of one type, and slides without tissue, which some tools write as (0,), of the same width."""
    kinds = {bag.dtype for bag in features if len(bag)}
    widths = {bag.shape[1] for bag in features if len(bag)}
    if not kinds:
        return features
    kind = functools.reduce(torch.promote_types, kinds)
    empty = torch.empty((0, min(widths)), dtype=kind)
    return [bag.to(kind) if len(bag) else empty for bag in features]


def _cohort_name(path: str | os.PathLike[str]) -> str:
    path = Path(path)
    stem = path.name.split(".")[0]
    # SurvPath names the cohort by the folder
    return path.parent.name if stem == "rna_clean" else stem.removesuffix("_all_clean")
