"""What a run leaves behind for evaluation: predictions and outcomes per fold, no model.

On disk a run is `predictions.csv` (one row per unit, fold and part) and `predictions.json` (model,
protocol, head, bin edges). Numbers are written so that reading gives back the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from survfuse.baseline_hazard import breslow_baseline
from survfuse.evaluation.curves import (
    SurvivalCurves,
    cox_survival_curves,
    nll_survival_curves,
)
from survfuse.evaluation.folds import Fold, FoldedPredictions, read_folds, row_names, write_folds
from survfuse.outcomes import check_outcomes, check_risk

Head = Literal["nll", "cox", "risk"]
# behind the names of fold, part, unit and patient, and before the logits
_COLUMNS = ("time", "event", "risk")


@dataclass(frozen=True)
class PatientTable:
    """Units (patients, or slides of patients) with outcomes and, if predicted, risks.

    Args:
        unit_ids: [n] unique names of the rows.
        patient_ids: [n] the patient of each row; rows of one patient have one outcome.
        time: [n] time of the event or of censoring.
        event: [n] bool or 0/1, 1 = event seen.
        risk: [n] higher = earlier event, or None where nothing was predicted.
        logits: [n, K] hazard logits of an NLL model, or None.

    Raises:
        ValueError: a shape, a value or a name is not valid.
    """

    unit_ids: Sequence[str]
    patient_ids: Sequence[str]
    time: ArrayLike
    event: ArrayLike
    risk: ArrayLike | None = None
    logits: ArrayLike | None = None

    def __post_init__(self) -> None:
        time, event = check_outcomes(self.time, self.event, need_event=False)
        units, patients = row_names(self.unit_ids, self.patient_ids)
        for name, ids in (("unit_ids", units), ("patient_ids", patients)):
            if len(ids) != time.size:
                raise ValueError(f"{name} holds {len(ids)} names; it must hold {time.size}")
        outcome: dict[str, tuple[float, bool]] = {}
        for name, *own in zip(patients, time, event):
            if outcome.setdefault(name, tuple(own)) != tuple(own):
                raise ValueError(f"patient {name!r} has rows with different time or event")
        risk = None if self.risk is None else check_risk(self.risk, time.size)
        logits = None if self.logits is None else np.asarray(self.logits, dtype=np.float64)
        if logits is not None and (
            logits.ndim != 2 or logits.shape[0] != time.size or np.isnan(logits).any()
        ):
            raise ValueError(
                f"logits has shape {logits.shape}; it must be ({time.size}, bins) without NaN"
            )
        values = (units, patients, time, event, risk, logits)
        for name, value in zip(self.__dataclass_fields__, values):
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.unit_ids)

    def per_patient(self) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
        """Return (time, event, mean risk) with one entry per patient, sorted by name."""
        if self.risk is None:
            raise ValueError("this table holds no risk")
        _, first, position = np.unique(self.patient_ids, return_index=True, return_inverse=True)
        mean = np.bincount(position, weights=self.risk) / np.bincount(position)
        return self.time[first], self.event[first], mean


@dataclass(frozen=True)
class FoldPredictions(Fold):
    """One fold: the test units with risks, the training units with outcomes.

    Args:
        fold: name of the fold.
        test: units the model was not fitted on; `risk` is required.
        train: units it was fitted on. Their outcomes give the censoring weights; their `risk`,
            if given, gives the cut of the risk groups and a Cox model's baseline.
        edges: [K + 1] time bins of an NLL model, first 0, last may be infinite.

    Raises:
        ValueError: the test table has no risk, or logits and edges do not belong together.
    """

    test: PatientTable
    train: PatientTable
    edges: ArrayLike | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test.risk is None:
            raise ValueError(f"fold {self.fold}: the test table holds no risk")
        if (self.test.logits is None) != (self.edges is None):
            raise ValueError(f"fold {self.fold}: give both test logits and edges, or neither")
        if self.edges is not None:
            edges = np.asarray(self.edges, dtype=np.float64)
            object.__setattr__(self, "edges", edges)
            nll_survival_curves(self.test.logits, edges)


@dataclass(frozen=True)
class Predictions(FoldedPredictions):
    """All folds of one model under one protocol.

    Args:
        model: name used in reports.
        head: how a risk becomes a survival curve: "nll" (logits and edges), "cox" (risk is a
            log-risk; needs training risks), "risk" (it does not; no Brier score).
        protocol: a name of `protocols.LEAKAGE`, or another with `leakage`.
        folds: at least one, names unique.
        endpoint, time_unit: named in reports and figures.
        leakage: what leaks, "" for nothing; None takes the protocol's note.

    Raises:
        ValueError: a setting is not valid, a fold lacks what the head needs, or the protocol says
            that nothing leaks while a patient is in training and test of one fold.
    """

    model: str
    head: Head
    protocol: str
    folds: Sequence[FoldPredictions]
    endpoint: str = "overall survival"
    time_unit: str = "months"
    leakage: str | None = None

    def __post_init__(self) -> None:
        if self.head not in ("nll", "cox", "risk"):
            raise ValueError(f"head is {self.head!r}; it must be 'nll', 'cox' or 'risk'")
        self._check_folds()
        for fold in self.folds:
            if self.head == "nll" and fold.test.logits is None:
                raise ValueError(f"fold {fold.fold}: an NLL head needs test logits and edges")

    def curves(self, fold: FoldPredictions) -> SurvivalCurves | None:
        """Return the predicted survival of a fold's test units, or None where there is none."""
        if self.head == "nll":
            return nll_survival_curves(fold.test.logits, fold.edges)
        if self.head == "cox" and fold.train.risk is not None and fold.train.event.any():
            train = fold.train
            baseline = breslow_baseline(train.risk, time=train.time, event=train.event)
            return cox_survival_curves(fold.test.risk, baseline)
        return None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `predictions.csv` and `predictions.json` into an existing folder."""
        n_bins = max(
            (f.test.logits.shape[1] for f in self.folds if f.test.logits is not None), default=0
        )

        def cells(table: PatientTable, row: int) -> list[str]:
            risk = "" if table.risk is None else repr(float(table.risk[row]))
            logits = [] if table.logits is None else [repr(float(x)) for x in table.logits[row]]
            outcome = [repr(float(table.time[row])), str(int(table.event[row]))]
            return [*outcome, risk, *logits, *[""] * (n_bins - len(logits))]

        about = {
            "model": self.model,
            "head": self.head,
            "protocol": self.protocol,
            "leakage": self.leakage,
            "endpoint": self.endpoint,
            "time_unit": self.time_unit,
            "edges": {
                # JSON has no infinity: null stands for the open last bin
                fold.fold: [float(e) if np.isfinite(e) else None for e in fold.edges]
                for fold in self.folds
                if fold.edges is not None
            },
        }
        columns = [*_COLUMNS, *(f"logit_{k}" for k in range(n_bins))]
        path = Path(folder) / "predictions.csv"
        write_folds(path, self.folds, columns, cells, about=about)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Predictions:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is not what `save` writes; the message names file and line.
        """
        about, tables = read_folds(Path(folder) / "predictions.csv", _COLUMNS, _table)
        folds = []
        for name, parts in tables.items():
            edges = about["edges"].get(name)
            if edges is not None:
                edges = [np.inf if edge is None else edge for edge in edges]
            folds.append(FoldPredictions(name, edges=edges, **parts))
        return cls(
            model=about["model"],
            head=about["head"],
            protocol=about["protocol"],
            folds=folds,
            endpoint=about["endpoint"],
            time_unit=about["time_unit"],
            leakage=about["leakage"],
        )


def _table(
    units: Sequence[str], patients: Sequence[str], cells: Sequence[list[str]]
) -> PatientTable:
    risks = [row[2] for row in cells]
    logits = [[value for value in row[3:] if value] for row in cells]
    return PatientTable(
        unit_ids=units,
        patient_ids=patients,
        time=[float(row[0]) for row in cells],
        event=[int(row[1]) for row in cells],
        risk=[float(value) for value in risks] if any(risks) else None,
        logits=np.array(logits, dtype=np.float64) if any(logits) else None,
    )
