"""Classes of TCGA-GBMLGG: the histological diagnosis and the grade.

Both are the labels of the 2007 WHO classification that TCGA was read by: histology under the
microscope. The 2021 classification, which needs IDH and 1p/19q, cannot be had from the public omics
tables: they hold no chromosome arms.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from survfuse.data.names import shorten
from survfuse.data.outcomes import read_tcga_grades
from survfuse.data.targets import ClassTarget

if TYPE_CHECKING:
    from survfuse.data.cohort import Cohort

DIAGNOSES = ("astrocytoma", "oligoastrocytoma", "oligodendroglioma", "glioblastoma")
GRADES = ("G2", "G3", "G4")
# AOAST is OncoTree's anaplastic oligoastrocytoma, but TCGA-CDR calls every one of these patients an
# oligodendroglioma, of grade 3; the anaplastic oligoastrocytomas are among OAST
_DIAGNOSIS_OF = {
    "ASTR": "astrocytoma",
    "AASTR": "astrocytoma",
    "OAST": "oligoastrocytoma",
    "ODG": "oligodendroglioma",
    "AOAST": "oligodendroglioma",
    "GBM": "glioblastoma",
}


def glioma_diagnosis(cohort: Cohort) -> ClassTarget:
    """The diagnosis by the covariate `oncotree_code`, grades of one histology together.

    Raises:
        ValueError: the cohort has no such covariate, or holds a code that is no glioma's.
    """
    codes = _codes(cohort)
    other = sorted({code for code in codes if code and code not in _DIAGNOSIS_OF})
    if other:
        raise ValueError(
            f"oncotree_code of {cohort.name} holds {shorten(other)}; it must be one of "
            f"{', '.join(_DIAGNOSIS_OF)}"
        )
    return ClassTarget.from_column([_DIAGNOSIS_OF.get(code) for code in codes], DIAGNOSES)


def glioma_grade(cohort: Cohort, workbook: str | os.PathLike[str]) -> ClassTarget:
    """The grade: 2 and 3 of lower-grade gliomas by TCGA-CDR; a glioblastoma is of grade 4.

    Unknown where the workbook has no grade or says that its sources differ.

    Args:
        cohort: has the covariate `oncotree_code`.
        workbook: as in `survfuse.data.outcomes.read_tcga_cdr`.

    Raises:
        FileNotFoundError, ValueError: the workbook or the covariate is missing or wrong.
    """
    published = read_tcga_grades(workbook)
    grades = [
        "G4" if code == "GBM" else published.get(case)
        for case, code in zip(cohort.patient_ids, _codes(cohort))
    ]
    return ClassTarget.from_column(grades, GRADES, ordinal=True)


def _codes(cohort: Cohort) -> list[str]:
    """OncoTree codes of the rows, "" where unknown."""
    if "oncotree_code" not in cohort.covariates.columns:
        raise ValueError(f"{cohort.name} has no covariate oncotree_code, which its classes need")
    column = cohort.covariates["oncotree_code"]
    return list(np.where(column.isna(), "", column.astype(str)))
