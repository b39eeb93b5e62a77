"""A cohort: outcomes, covariates and modalities of units (patients or slides), and minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from survfuse.batch import Batch, TableBatch
from survfuse.data.labels import (
    assign_bins,
    check_known_survival,
    check_survival,
    discretize_survival,
    row_indices,
)
from survfuse.data.modalities import (
    ArrayModality,
    Source,
    TableModality,
    check_modalities,
    group_numbers,
    matching_modality,
)
from survfuse.data.names import shorten, unknown_name
from survfuse.data.preprocessing import DEFAULT_CLIP, TablePreprocessor
from survfuse.data.targets import ClassTarget, check_targets, matching_targets

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

STATE_VERSION = 1


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


class PreparedCohort:
    """A cohort with frozen preprocessing and time bins, which gives minibatches.

    Made by `Cohort.prepare` or, from saved numbers, by `PreparedCohort.from_state`.

    Attributes:
        cohort: the cohort it was made from; modalities the state does not know are left out.
        labels: [n] int64 time bin of every row, by the training rows' edges.
        edges: [bins + 1] float64, months, 0 to infinity.
        preprocessors: table name to its fitted `TablePreprocessor`.
    """

    def __init__(
        self,
        cohort: Cohort,
        labels: NDArray[np.int64],
        edges: NDArray[np.float64],
        preprocessors: Mapping[str, TablePreprocessor],
        channels: Mapping[str, tuple[str, int]],
        groups: Mapping[str, Mapping[str, Sequence[int]]] | None = None,
    ) -> None:
        self.cohort = cohort
        self.labels = labels
        self.edges = edges
        self.preprocessors = dict(preprocessors)
        self._channels = {
            name: (kind, len(self.preprocessors[name].selected) if kind == "table" else width)
            for name, (kind, width) in channels.items()
        }
        self._tables = {
            name: _prepared_table(cohort, name, fitted)
            for name, fitted in self.preprocessors.items()
        }
        # frozen with the rest: a model is rebuilt on tables that carry other groups, or none
        self._groups = {
            name: group_numbers(cohort.modalities[name], fitted.names)
            if groups is None
            else {g: np.asarray(c, dtype=np.int64) for g, c in groups.get(name, {}).items()}
            for name, fitted in self.preprocessors.items()
        }
        self._time = torch.from_numpy(cohort.time.astype(np.float32))
        self._event = torch.from_numpy(cohort.event)
        self._label = torch.from_numpy(labels)
        self._targets = {
            name: torch.from_numpy(target.labels) for name, target in cohort.targets.items()
        }

    def __len__(self) -> int:
        return len(self.cohort)

    @property
    def n_bins(self) -> int:
        """Number of time bins; fewer than asked for where edges coincided."""
        return len(self.edges) - 1

    def channels(self) -> dict[str, tuple[str, int]]:
        """Kind and width of each modality as a model sees it: {name: (kind, channels)}."""
        return dict(self._channels)

    def features(self, name: str) -> tuple[str, ...]:
        """Column names of a table as a model sees it."""
        if name not in self.preprocessors:
            raise ValueError(unknown_name("table", name, self.preprocessors))
        return self.preprocessors[name].names

    def groups(self, name: str) -> dict[str, NDArray[np.int64]]:
        """Column numbers of each group of a table (pathways, gene families) as a model sees it.

        Columns that feature selection dropped are left out; a group may be empty.
        """
        self.features(name)
        return dict(self._groups[name])

    def table(self, name: str) -> TableBatch:
        """All rows of a table, prepared: values [n, F'] with zeros where absent, present [n]."""
        self.features(name)
        return self._tables[name]

    def batch(self, rows: ArrayLike | Tensor, device: torch.device | str = "cpu") -> Batch:
        """The rows `rows` as a model reads them; the same rows give the same batch.

        A bag modality hands out the stored matrix itself where no copy is needed and it is on
        `device` already.

        Args:
            rows: [B] row numbers or a mask; repeats allowed.
            device: where the batch goes.

        Raises:
            ValueError: a row number is out of range.
        """
        rows = row_indices(rows, len(self), "rows")
        index = torch.from_numpy(rows)
        inputs = {}
        for name in self._channels:
            if name in self._tables:
                table = self._tables[name]
                inputs[name] = TableBatch(table.values[index], table.present[index]).to(device)
            else:
                inputs[name] = self.cohort.modalities[name].batch(rows, device=device)
        outcomes = (self._time[index], self._event[index], self._label[index], index)
        targets = {name: label[index].to(device) for name, label in self._targets.items()}
        return Batch(inputs, *(tensor.to(device) for tensor in outcomes), targets)

    @property
    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON can write it: bin edges, each table's statistics and groups."""
        return {
            "version": STATE_VERSION,
            "interior_edges": self.edges[1:-1].tolist(),
            "channels": {name: list(pair) for name, pair in self._channels.items()},
            "axes": {
                name: list(source.values.shape[1:-1])
                for name, source in self.cohort.modalities.items()
                if isinstance(source, ArrayModality)
            },
            "tables": {name: fitted.state() for name, fitted in self.preprocessors.items()},
            "groups": {
                name: {group: columns.tolist() for group, columns in groups.items()}
                for name, groups in self._groups.items()
            },
            "targets": {
                name: {"classes": list(target.classes), "ordinal": target.ordinal}
                for name, target in self.cohort.targets.items()
            },
        }

    @classmethod
    def from_state(cls, cohort: Cohort, state: Mapping[str, Any]) -> PreparedCohort:
        """Apply frozen preprocessing to a cohort, also to one it has never seen.

        Tables are matched by column name, whatever their order; further columns are ignored. A
        modality that the cohort lacks is absent from every row; one the state lacks is left out.
        Gene groups are those of the state, whatever groups the cohort's tables carry. Targets are
        matched by name: a class the state does not have is unknown.

        Args:
            cohort: the cohort.
            state: what `state` gave, possibly read from JSON.

        Raises:
            ValueError: another version, a modality of another kind or width, or a table that
                lacks a column; names it.
        """
        if (version := state.get("version")) != STATE_VERSION:
            raise ValueError(f"state has version {version}; it must be {STATE_VERSION}")
        edges = np.concatenate([[0.0], state["interior_edges"], [np.inf]])
        fitted = {
            name: TablePreprocessor.from_state(part) for name, part in state["tables"].items()
        }
        modalities = {}
        for name, (kind, width) in state["channels"].items():
            modalities[name] = matching_modality(
                cohort.modalities.get(name),
                name,
                kind,
                width,
                len(cohort),
                features=fitted[name].features if kind == "table" else (),
                axes=state["axes"].get(name, (1,)),
            )
        targets = matching_targets(cohort.targets, state.get("targets", {}), len(cohort))
        cohort = cohort._replace(modalities=modalities, targets=targets)
        unknown = np.isnan(cohort.time)
        labels = np.where(unknown, -1, assign_bins(np.where(unknown, 0.0, cohort.time), edges))
        return cls(cohort, labels, edges, fitted, cohort.channels(), state.get("groups"))


def _prepared_table(cohort: Cohort, name: str, fitted: TablePreprocessor) -> TableBatch:
    source = cohort.modalities[name]
    present = source.present
    values = fitted.transform(source.values)
    values[~present] = 0
    return TableBatch(torch.from_numpy(values), torch.from_numpy(present))
