"""A cohort: outcomes, covariates and modalities of units (patients or slides), and minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from survfuse.data.labels import (
    check_known_survival,
    check_survival,
    discretize_survival,
    row_indices,
)
from survfuse.data.modalities import (
    Source,
    TableModality,
    check_modalities,
)
from survfuse.data.names import shorten, unknown_name
from survfuse.data.prepared import PreparedCohort
from survfuse.data.preprocessing import DEFAULT_CLIP, TablePreprocessor
from survfuse.data.targets import ClassTarget, check_targets

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Cohort:
    """Units with an outcome and any number of modalities, each absent for any unit.

    Attributes:
        unit_ids: n names of the rows: patients, or slides where rows are slides.
        patient_ids: n patients; equal names belong together in a split.
        time: [n] float64, months, at least 0.
        event: [n] bool, True where the event was seen.
        covariates: [n, ...] frame indexed by unit id: age, is_female, site and so on, NaN where
            unknown. Not given to a model unless a table modality holds them too.
        modalities: name to `TableModality`, `BagModality`, `ArrayModality` or `GraphModality`.
        name: what it is, for reports.
        notes: what a report must say about the data, for example that bags are simulated.
        targets: name to the class of every row: a diagnosis, a grade. Not given to a model.
        unknown_outcome: a time may be NaN, with event False: such a cohort can be scored by a
            trained model, not trained on.

    Raises (when made):
        ValueError: lengths differ, a unit id occurs twice, a time is NaN or negative, an event is
            not binary, the index of covariates is another, or there is no modality. Names the row.
        TypeError: covariates is no frame, or a modality none of the four kinds.
    """

    unit_ids: tuple[str, ...]
    patient_ids: tuple[str, ...]
    time: NDArray[np.float64]
    event: NDArray[np.bool_]
    covariates: pd.DataFrame
    modalities: Mapping[str, Source]
    name: str = "cohort"
    notes: tuple[str, ...] = field(default=())
    targets: Mapping[str, ClassTarget] = field(default_factory=dict)
    unknown_outcome: bool = False

    def __post_init__(self) -> None:
        check = check_known_survival if self.unknown_outcome else check_survival
        time, event = check(self.time, self.event, unit_ids=self.unit_ids)
        set_ = object.__setattr__
        set_(self, "time", time)
        set_(self, "event", event)
        set_(self, "unit_ids", tuple(str(name) for name in self.unit_ids))
        set_(self, "patient_ids", tuple(str(name) for name in self.patient_ids))
        n = len(self.time)
        check_modalities(self.modalities)
        if not hasattr(self.covariates, "columns"):
            what = type(self.covariates).__name__
            raise TypeError(f"covariates is {what}; it must be a DataFrame indexed by unit id")
        lengths = {
            "unit_ids": len(self.unit_ids),
            "patient_ids": len(self.patient_ids),
            "covariates": len(self.covariates),
            **{f"modalities[{name!r}]": len(source) for name, source in self.modalities.items()},
        }
        for what, length in lengths.items():
            if length != n:
                raise ValueError(f"{what} has {length} rows and time {n}; they must be the same")
        check_targets(self.targets, n)
        if len(set(self.unit_ids)) != n:
            twice = next(u for u in self.unit_ids if self.unit_ids.count(u) > 1)
            raise ValueError(f"unit_ids holds {twice!r} twice; every row must have its own name")
        # values in another order would silently be those of other patients
        for row, (label, unit) in enumerate(zip(self.covariates.index.astype(str), self.unit_ids)):
            if label != unit:
                what = f"covariates.index at row {row} is {label!r}"
                raise ValueError(f"{what}; it must be the unit id {unit!r}")

    def __repr__(self) -> str:
        who = f"{len(self)} units of {len(set(self.patient_ids))} patients"
        have = ""
        for name, source in self.modalities.items():
            have += f"; {name}: {source.kind} of {source.channels}, {source.present.sum()} present"
        return f"Cohort({self.name!r}, {who}, {self.event.sum()} events{have})"

    def __len__(self) -> int:
        return len(self.time)

    def channels(self) -> dict[str, tuple[str, int]]:
        """Kind and width of each modality before preprocessing: {name: (kind, channels)}."""
        return {name: (source.kind, source.channels) for name, source in self.modalities.items()}

    def modality(self, name: str) -> Source:
        """The modality `name`.

        Raises:
            ValueError: there is none; says the nearest name.
        """
        if name not in self.modalities:
            raise ValueError(unknown_name("modality", name, self.modalities, where=self.name))
        return self.modalities[name]

    def present(self, name: str) -> NDArray[np.bool_]:
        """[n] rows that have the modality `name`."""
        return self.modality(name).present

    def covariate_matrix(self, names: Sequence[str]) -> NDArray[np.float64]:
        """Clinical covariates as numbers, for example for a Cox baseline on age and sex.

        Args:
            names: columns of `covariates`.

        Returns:
            [n, len(names)], NaN where unknown.

        Raises:
            ValueError: an unknown column (says the nearest) or one that holds text.
        """
        for name in names:
            if name not in self.covariates.columns:
                valid = self.covariates.columns
                raise ValueError(unknown_name("covariate", name, valid, where=self.name))
        try:
            return self.covariates[list(names)].to_numpy(dtype=np.float64)
        except (TypeError, ValueError):
            text = [n for n in names if self.covariates[n].dtype.kind not in "biuf"]
            raise ValueError(
                f"covariate {shorten(text)} of {self.name} holds text; it must hold numbers"
            ) from None

    def with_modality(self, name: str, source: Source, *, note: str | None = None) -> Cohort:
        """The cohort with one more modality, and a note for reports."""
        notes = self.notes if note is None else (*self.notes, note)
        return self._replace(modalities={**self.modalities, name: source}, notes=notes)

    def only(self, names: Sequence[str]) -> Cohort:
        """The cohort with the modalities `names`, in that order; all rows stay."""
        return self._replace(modalities={name: self.modality(name) for name in names})

    def subset(self, rows: ArrayLike) -> Cohort:
        """The cohort's rows `rows` (indices or a mask), in that order; bags are not copied."""
        rows = row_indices(rows, len(self), "rows")
        return self._replace(
            unit_ids=tuple(self.unit_ids[i] for i in rows),
            patient_ids=tuple(self.patient_ids[i] for i in rows),
            time=self.time[rows],
            event=self.event[rows],
            covariates=self.covariates.iloc[rows],
            modalities={name: source.subset(rows) for name, source in self.modalities.items()},
            targets={name: target.subset(rows) for name, target in self.targets.items()},
        )

    def summary(self) -> dict[str, Any]:
        """Counts for logs and reports, as JSON can write them."""
        known = self.time[~np.isnan(self.time)]
        return {
            "name": self.name,
            "units": len(self),
            "patients": len(set(self.patient_ids)),
            "events": int(self.event.sum()),
            "median_time": float(np.median(known)) if len(known) else None,
            "modalities": {
                name: {
                    "kind": source.kind,
                    "channels": source.channels,
                    "present": int(source.present.sum()),
                }
                for name, source in self.modalities.items()
            },
            "targets": {
                name: {"classes": target.counts(), "unknown": int((~target.known).sum())}
                for name, target in self.targets.items()
            },
            "notes": list(self.notes),
        }

    def prepare(
        self,
        train_rows: ArrayLike | None,
        *,
        n_bins: int | None = 4,
        bin_rows: ArrayLike | None = None,
        impute: Literal["mean", "median", "zero"] = "mean",
        clip: float | None = DEFAULT_CLIP,
        scale: Literal["standard", "none"] = "standard",
        select: int | None = None,
    ) -> PreparedCohort:
        """Fit preprocessing and time bins on the training rows and apply them to all rows.

        `train_rows=None, clip=None, scale="none"` is the `healnet` protocol: bins and the filling
        of NaN see every row, test rows included.

        Args:
            train_rows: indices or a mask; None takes all rows.
            n_bins: number of time bins; None where nothing reads them: one bin, no event needed.
            bin_rows: rows whose uncensored times set the bin edges, where they are not the
                training rows: all rows in the `mcat` protocol. None takes `train_rows`.
            impute, clip, scale, select: as in `TablePreprocessor.fit`, for every table.

        Raises:
            ValueError: no training row has an event, a table is absent from every training row, or
                an argument is wrong.
        """
        train = row_indices(train_rows, len(self), "train_rows")
        if train.size == 0:
            raise ValueError("train_rows is empty; there must be at least one training row")
        fit_on = train if bin_rows is None else row_indices(bin_rows, len(self), "bin_rows")
        if n_bins is None:
            labels, edges = np.zeros(len(self), dtype=np.int64), np.array([0.0, np.inf])
        else:
            labels, edges = discretize_survival(
                self.time, event=self.event, n_bins=n_bins, fit_on=fit_on
            )
        fitted = {}
        for name, source in self.modalities.items():
            if not isinstance(source, TableModality):
                continue
            if not source.present[train].any():
                raise ValueError(
                    f"table {name!r} is absent from every training row of {self.name}; "
                    "there is nothing to fit on"
                )
            fitted[name] = TablePreprocessor.fit(
                source.values,
                features=source.features,
                rows=train,
                impute=impute,
                clip=clip,
                scale=scale,
                select=select,
            )
        return PreparedCohort(self, labels, edges, fitted, self.channels())

    def _replace(self, **changes: Any) -> Cohort:
        return replace(self, **changes)
