"""Fixtures of the tests of data."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest


@pytest.fixture(scope="session")
def tcga_cdr(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sheet of TCGA-CDR as a .csv: each reading of the workbook takes seconds."""
    pytest.importorskip("openpyxl", reason="reading TCGA-CDR's workbook needs openpyxl")
    path = tmp_path_factory.mktemp("tcga_cdr") / "outcome.csv"
    workbook = shared_data / "tcga_cdr" / "outcome.xlsx"
    pd.read_excel(workbook, sheet_name="TCGA-CDR").to_csv(path, index=False)
    return path
