"""A cohort with frozen preprocessing, which gives minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from survfuse.batch import Batch, TableBatch
from survfuse.data.labels import assign_bins, row_indices
from survfuse.data.modalities import (
    ArrayModality,
    BagModality,
    Change,
    group_numbers,
    matching_modality,
)
from survfuse.data.names import unknown_name
from survfuse.data.preprocessing import TablePreprocessor
from survfuse.data.targets import matching_targets

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from survfuse.data.cohort import Cohort

STATE_VERSION = 1


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

    def batch(
        self,
        rows: ArrayLike | Tensor,
        device: torch.device | str = "cpu",
        *,
        change: Change | None = None,
    ) -> Batch:
        """The rows `rows` as a model reads them; the same rows give the same batch.

        A bag modality hands out the stored matrix itself where no copy is needed and it is on
        `device` already.

        Args:
            rows: [B] row numbers or a mask; repeats allowed.
            device: where the batch goes.
            change: what is done to tables and bags.

        Raises:
            ValueError: a row number is out of range.
        """
        rows = row_indices(rows, len(self), "rows")
        index = torch.from_numpy(rows)
        inputs = {}
        for name in self._channels:
            if name in self._tables:
                table = self._tables[name]
                found = TableBatch(table.values[index], table.present[index]).to(device)
                inputs[name] = found if change is None else change(found)
            elif isinstance(source := self.cohort.modalities[name], BagModality):
                inputs[name] = source.batch(rows, device=device, change=change)
            else:
                inputs[name] = source.batch(rows, device=device)
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
            "neighbourhoods": {
                name: source.neighbourhood
                for name, source in self.cohort.modalities.items()
                if isinstance(source, BagModality) and source.neighbourhood
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
                neighbourhood=state.get("neighbourhoods", {}).get(name, 0),
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
