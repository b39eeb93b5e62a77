"""Survival endpoints per patient: TCGA-CDR's workbook, and columns of a metadata table."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from survfuse.data.labels import DAYS_PER_MONTH, event_from_censorship
from survfuse.data.names import shorten, unknown_name
from survfuse.extras import require

if TYPE_CHECKING:
    import pandas as pd

ENDPOINTS = ("OS", "DSS", "DFI", "PFI")


def read_tcga_cdr(path: str | os.PathLike[str], *, endpoint: str = "OS") -> pd.DataFrame:
    """Outcomes of the TCGA Pan-Cancer Clinical Data Resource, one row per patient.

    The published `<endpoint>` column is 1 where the event was seen and `<endpoint>.time` is in
    days; a month is 365.25 / 12 days. Patients for whom the endpoint is not defined are left out.

    Args:
        path: the workbook `.xlsx` (its sheet TCGA-CDR), or that sheet as `.csv` or `.tsv`.
        endpoint: "OS", "DSS", "DFI" or "PFI". The resource's authors advise against OS where
            follow-up is short and events are few.

    Returns:
        Frame indexed by case id: `time` (months), `event` (bool), `type` (cancer type), `age`,
        `is_female`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the endpoint is unknown or the file lacks a column.
        ImportError: the workbook needs openpyxl.

    Source: Liu et al., Cell 2018.
    """
    if endpoint not in ENDPOINTS:
        raise ValueError(unknown_name("endpoint", endpoint, ENDPOINTS))
    pd = require("pandas", extra="train")
    columns = {
        "bcr_patient_barcode": "case_id",
        "type": "type",
        "age_at_initial_pathologic_diagnosis": "age",
        "gender": "is_female",
        endpoint: "event",
        f"{endpoint}.time": "time",
    }
    frame = _cdr_columns(path, columns)
    # the workbook marks what is not known by NaN or a word in brackets
    for column in ("age", "event", "time"):
        frame[column] = pd.to_numeric(frame[column], errors="coerce")
    frame = frame.dropna(subset=["event", "time"]).set_index("case_id")
    frame["time"] = frame["time"] / DAYS_PER_MONTH
    frame["event"] = frame["event"] == 1
    frame["is_female"] = frame["is_female"].map({"FEMALE": 1.0, "MALE": 0.0})
    return frame


def read_tcga_grades(path: str | os.PathLike[str]) -> pd.Series:
    """Histological grade of every patient of TCGA-CDR that has one, by case id, as published.

    The words in brackets that mark what is not known are left out. Glioblastomas have none: they
    are of grade 4 by definition.

    Args:
        path: as in `read_tcga_cdr`.

    Raises:
        FileNotFoundError, ValueError, ImportError: as `read_tcga_cdr`.
    """
    columns = {"bcr_patient_barcode": "case_id", "histological_grade": "grade"}
    frame = _cdr_columns(path, columns).set_index("case_id")
    grade = frame["grade"].astype("string").str.strip()
    return grade[grade.notna() & ~grade.str.startswith("[").fillna(True)]


def _cdr_columns(path: str | os.PathLike[str], columns: dict[str, str]) -> pd.DataFrame:
    """Columns of the workbook's sheet TCGA-CDR under other names."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"file {path} does not exist")
    pd = require("pandas", extra="train")
    if path.suffix.lower() in (".xlsx", ".xls"):
        require("openpyxl", extra="train")
        frame = pd.read_excel(path, sheet_name="TCGA-CDR")
    else:
        frame = pd.read_csv(path, sep="\t" if path.suffix.lower() == ".tsv" else ",")
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ValueError(f"{path} lacks the columns {shorten(missing)} of TCGA-CDR")
    return frame[list(columns)].rename(columns=columns)


def endpoint_columns(
    metadata: pd.DataFrame, *, endpoint: str = "OS", source: str = "table"
) -> pd.DataFrame:
    """Time (months) and event from the columns of a TCGA omics or SurvPath metadata table.

    OS is `survival_months` and `censorship`; DSS and PFI end in `_dss` and `_pfi`. Censorship is 1
    where the event was *not* seen and is inverted here.

    Returns:
        Frame with the index of `metadata`: `time`, NaN where it or censorship is unknown, and
        `event` (bool).

    Raises:
        ValueError: the endpoint is unknown, its columns are missing, or censorship is not binary.
    """
    if endpoint not in ENDPOINTS:
        raise ValueError(unknown_name("endpoint", endpoint, ENDPOINTS))
    suffix = "" if endpoint == "OS" else f"_{endpoint.lower()}"
    time, censorship = f"survival_months{suffix}", f"censorship{suffix}"
    for column in (time, censorship):
        if column not in metadata.columns:
            raise ValueError(
                f"{source} has no column {column!r}, which endpoint {endpoint} needs; "
                f"{unknown_name('column', column, metadata.columns)}"
            )
    frame = metadata[[time]].rename(columns={time: "time"})
    # a patient of unknown outcome often has neither
    known = frame["time"].notna() & metadata[censorship].notna()
    frame.loc[~known, "time"] = float("nan")
    frame["event"] = False
    frame.loc[known, "event"] = event_from_censorship(metadata.loc[known, censorship])
    return frame
