"""The kinds of input a cohort holds: table, bag, array, graph. Any may be absent for any row.

All four answer alike: `kind`, `channels`, `present`, `len()`, `subset(rows)`, and
`batch(rows, device=...)`, the batch a model reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from survfuse.batch import ArrayBatch, BagBatch, GraphBatch, Modality, TableBatch
from survfuse.data.bags import Bags
from survfuse.data.names import shorten
from survfuse.data.neighbourhood import surrounded_bags, surrounded_batch

Rows = NDArray[np.int64]
Device = torch.device | str | None


class Change(Protocol):
    """What training does to a batch, such as leaving patches out.

    The features of a bag are `blocks` equal parts, of which the further ones are means over others
    of its rows: what all rows of the first gain, all of the others do.
    """

    def __call__(self, modality: Modality, *, blocks: int = 1) -> Modality: ...


class BagSource(Protocol):
    """What a bag modality needs of its bags; `Bags`, and simulated bags made when asked for."""

    names: list[str]

    @property
    def width(self) -> int: ...

    @property
    def lengths(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def batch(self, groups: Sequence[Sequence[int]], *, device: Device = None) -> BagBatch: ...


@dataclass(frozen=True, eq=False)
class TableModality:
    """One row of named numbers per unit.

    Attributes:
        values: [n, F], NaN where unknown. A row without any known value is absent.
        features: F column names, each once.
        groups: named sets of columns, for example pathways or gene families; may overlap.

    Raises (when made):
        TypeError: values is no array of numbers, or features no sequence of names.
        ValueError: shapes disagree or a column name occurs twice.
    """

    kind: ClassVar[str] = "table"
    values: NDArray[np.floating]
    features: tuple[str, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.values, np.ndarray) or self.values.dtype.kind not in "fiub":
            found = getattr(self.values, "dtype", None)
            what = type(self.values).__name__ + (f" of {found}" if found is not None else "")
            raise TypeError(
                f"values is {what}; it must be a numpy array of numbers [rows, columns] "
                "(DataFrame.to_numpy(float) gives one)"
            )
        if isinstance(self.features, str) or not all(isinstance(f, str) for f in self.features):
            raise TypeError(f"features is {self.features!r}; it must be the names of the columns")
        object.__setattr__(self, "features", tuple(self.features))
        if self.values.ndim != 2 or self.values.shape[1] != len(self.features):
            raise ValueError(
                f"values has shape {self.values.shape}; it must be [rows, {len(self.features)}], "
                "one column per feature"
            )
        if not self.features:
            raise ValueError("features is empty; a table needs at least one column")
        if len(set(self.features)) != len(self.features):
            twice = next(name for name in self.features if self.features.count(name) > 1)
            raise ValueError(f"features holds {twice!r} twice; every column must have its own name")

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        """Number of columns, F."""
        return len(self.features)

    @property
    def present(self) -> NDArray[np.bool_]:
        """[n] rows with at least one known value."""
        return ~np.isnan(self.values).all(axis=1)

    def subset(self, rows: Rows) -> TableModality:
        return TableModality(self.values[rows], self.features, self.groups)

    def batch(self, rows: Rows, *, device: Device = None) -> TableBatch:
        """The raw values with zeros for NaN; `PreparedCohort.batch` gives prepared ones."""
        values = np.nan_to_num(self.values[rows], nan=0.0).astype(np.float32)
        present = torch.from_numpy(self.present[rows])
        return TableBatch(torch.from_numpy(values), present).to(device or "cpu")


@dataclass(frozen=True, eq=False)
class BagModality:
    """Bags of patches, several slides to a row.

    Attributes:
        bags: the stored bags, one per slide.
        groups: per row the indices of its bags; () where the row has none.
        neighbourhood: above 0, each patch carries the mean features of the patches of its bag at
            most so many cells away behind its own; bags need coordinates then. Up to 1 GiB of them
            is computed once and held; of more, each batch anew.
    """

    kind: ClassVar[str] = "bag"
    bags: BagSource
    groups: tuple[tuple[int, ...], ...]
    neighbourhood: int = 0

    def __post_init__(self) -> None:
        if not hasattr(self.bags, "batch"):
            raise TypeError(
                f"bags is {type(self.bags).__name__}; it must be Bags (BagStore(path).bags() gives "
                "those of a store)"
            )
        for row, group in enumerate(self.groups):
            if isinstance(group, str) or not hasattr(group, "__iter__"):
                raise TypeError(
                    f"groups: row {row} is {group!r}; it must be a tuple of bag numbers, () for no "
                    "bag"
                )
            outside = [i for i in group if not 0 <= i < len(self.bags)]
            if outside:
                raise ValueError(
                    f"groups: row {row} names bag {outside[0]}; there are {len(self.bags)} bags"
                )

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def channels(self) -> int:
        """Features per patch, D, those of its neighbourhood included."""
        return self.bags.width * (2 if self.neighbourhood else 1)

    @property
    def present(self) -> NDArray[np.bool_]:
        """[n] rows with at least one patch; a slide without tissue is no slide."""
        return self.n_patches > 0

    @property
    def n_patches(self) -> NDArray[np.int64]:
        """[n] patches of each row, to batch rows of like length."""
        lengths = self.bags.lengths.tolist()
        return np.array([sum(lengths[i] for i in group) for group in self.groups], dtype=np.int64)

    def subset(self, rows: Rows) -> BagModality:
        return replace(self, groups=tuple(self.groups[i] for i in rows))

    def batch(
        self,
        rows: Rows,
        *,
        device: Device = None,
        change: Change | None = None,
    ) -> BagBatch:
        """One bag per row: the stored matrix and ranges into it where no copy is needed.

        Args:
            rows: of the cohort.
            device: where the batch goes.
            change: what is done to the patches; those of a neighbourhood are means of all.
        """
        lengths = self.bags.lengths
        groups = [[i for i in self.groups[row] if lengths[i] > 0] for row in rows]
        if not self.neighbourhood:
            batch = self.bags.batch(groups, device=device)
        elif self._surrounded is not None:
            batch = self._surrounded.batch(groups, device=device)
        else:
            batch = surrounded_batch(self.bags, groups, self.neighbourhood, device=device)
        return batch if change is None else change(batch, blocks=2 if self.neighbourhood else 1)

    @cached_property
    def _surrounded(self) -> Bags | None:
        lengths = self.bags.lengths
        used = dict.fromkeys(i for group in self.groups for i in group if lengths[i] > 0)
        return surrounded_bags(self.bags, list(used), self.neighbourhood)


@dataclass(frozen=True, eq=False)
class ArrayModality:
    """An array with spatial axes per row, channels last, for example a volume or a time series.

    Attributes:
        values: [n, *axes, C].
        present: [n] bool; values of absent rows are ignored.
    """

    kind: ClassVar[str] = "array"
    values: Tensor
    present: NDArray[np.bool_]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError(f"values is {type(self.values).__name__}; it must be a tensor")
        if self.values.dim() < 3 or not self.values.dtype.is_floating_point:
            raise ValueError(
                f"values is {self.values.dtype} of shape {tuple(self.values.shape)}; it must be "
                "floating, [rows, one or more axes, channels]"
            )
        _check_present(self.present, self.values.shape[0])

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def channels(self) -> int:
        """Size of the last dimension, C."""
        return self.values.shape[-1]

    def subset(self, rows: Rows) -> ArrayModality:
        return ArrayModality(self.values[torch.from_numpy(rows)], self.present[rows])

    def batch(self, rows: Rows, *, device: Device = None) -> ArrayBatch:
        present = torch.from_numpy(self.present[rows])
        values = self.values[torch.from_numpy(rows)]
        # selected, not multiplied: an absent row may hold NaN
        mask = present.view(-1, *(1,) * (values.dim() - 1))
        values = torch.where(mask, values, values.new_zeros(()))
        return ArrayBatch(values, present).to(device or "cpu")


@dataclass(frozen=True, eq=False)
class GraphModality:
    """One graph per row.

    Attributes:
        nodes: node features, one bag per graph.
        edges: per graph [2, E_g] int64, node numbers within that graph.
        graph_of: [n] the graph of each row, -1 where absent.
    """

    kind: ClassVar[str] = "graph"
    nodes: Bags
    edges: tuple[Tensor, ...]
    graph_of: Rows

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.nodes):
            raise ValueError(f"there are {len(self.edges)} edge lists and {len(self.nodes)} graphs")
        if self.graph_of.size and not (
            self.graph_of.min() >= -1 and self.highest < len(self.nodes)
        ):
            raise ValueError(
                f"graph_of reaches from {self.graph_of.min()} to {self.highest}; "
                f"it must lie between -1 and {len(self.nodes) - 1}"
            )
        for graph, (edges, size) in enumerate(zip(self.edges, self.nodes.lengths.tolist())):
            if edges.dim() != 2 or edges.shape[0] != 2 or edges.dtype != torch.int64:
                raise ValueError(
                    f"edges of graph {graph} are {edges.dtype} of shape {tuple(edges.shape)}; "
                    "they must be int64 [2, number of edges]"
                )
            if edges.numel() and not (int(edges.min()) >= 0 and int(edges.max()) < size):
                raise ValueError(
                    f"edges of graph {graph} name node {int(edges.max())}; it has {size} nodes"
                )

    def __len__(self) -> int:
        return self.graph_of.size

    @property
    def highest(self) -> int:
        """The largest graph number in use."""
        return int(self.graph_of.max())

    @property
    def channels(self) -> int:
        """Features per node, D."""
        return self.nodes.width

    @property
    def present(self) -> NDArray[np.bool_]:
        """[n] rows with a graph."""
        return self.graph_of >= 0

    def subset(self, rows: Rows) -> GraphModality:
        return GraphModality(self.nodes, self.edges, self.graph_of[rows])

    def batch(self, rows: Rows, *, device: Device = None) -> GraphBatch:
        """Nodes without a copy where the bags allow it; edges moved to rows of the node matrix."""
        graphs = self.graph_of[rows].tolist()
        bags = self.nodes.batch([[g] if g >= 0 else [] for g in graphs], device=device)
        moved = [
            self.edges[graph] + start
            for graph, start in zip(graphs, bags.ragged.starts.tolist())
            if graph >= 0
        ]
        edges = torch.cat(moved, dim=1) if moved else torch.empty(2, 0, dtype=torch.int64)
        return GraphBatch(bags.features, bags.ragged, edges.to(bags.features.device), bags.present)


Source = TableModality | BagModality | ArrayModality | GraphModality


def absent(kind: str, channels: int, n_rows: int, *, axes: Sequence[int] = (1,)) -> Source:
    """A modality that no row has, of the width a trained model expects.

    Args:
        kind: "bag", "array" or "graph"; an absent table is made by the preprocessing.
        channels: features per patch, channel or node.
        n_rows: rows of the cohort.
        axes: spatial shape of an absent array.
    """
    if kind == "array":
        values = torch.zeros(n_rows, *axes, channels)
        return ArrayModality(values, np.zeros(n_rows, dtype=bool))
    nothing = Bags(torch.empty(0, channels), [], [])
    if kind == "bag":
        return BagModality(nothing, ((),) * n_rows)
    if kind == "graph":
        return GraphModality(nothing, (), np.full(n_rows, -1))
    raise ValueError(f"kind is {kind!r}; it must be 'bag', 'array' or 'graph'")


def check_modalities(modalities: Mapping[str, Source]) -> None:
    """Raise unless `modalities` maps at least one name to a modality."""
    if not isinstance(modalities, Mapping) or not modalities:
        found = "empty" if isinstance(modalities, Mapping) else type(modalities).__name__
        raise ValueError(f"modalities is {found}; it must map at least one name to a modality")
    for name, source in modalities.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"modalities has the name {name!r}; it must be a non-empty string")
        if not isinstance(source, Source):
            kinds = ", ".join(kind.__name__ for kind in get_args(Source))
            raise TypeError(
                f"modalities[{name!r}] is {type(source).__name__}; it must be one of {kinds}"
            )


def matching_modality(
    source: Source | None,
    name: str,
    kind: str,
    channels: int,
    n_rows: int,
    *,
    features: tuple[str, ...] = (),
    axes: Sequence[int] = (1,),
    neighbourhood: int = 0,
) -> Source:
    """A cohort's modality as a trained model reads it; absent from every row where there is none.

    Args:
        source: the cohort's, or None.
        name: what it is called, for errors.
        kind: "table", "bag", "array" or "graph".
        channels: features per patch, channel or node.
        n_rows: rows of the cohort.
        features: columns of a table.
        axes: spatial shape of an absent array.
        neighbourhood: of bags, as in training.

    Raises:
        ValueError: it is of another kind or width, or a table that lacks a column.
    """
    if source is not None and source.kind != kind:
        raise ValueError(f"modality {name!r} is a {source.kind}; it must be a {kind}")
    if kind == "table":
        return matching_table(source, name, features, n_rows)
    if source is None:
        return absent(kind, channels, n_rows, axes=axes)
    if isinstance(source, BagModality):
        source = replace(source, neighbourhood=neighbourhood)
    if source.channels != channels:
        raise ValueError(
            f"modality {name!r} has {source.channels} channels; it must have {channels}, "
            "as in training"
        )
    return source


def matching_table(
    source: Source | None, name: str, features: tuple[str, ...], n_rows: int
) -> TableModality:
    """The columns `features` of a table in that order; absent from every row where there is none.

    Raises:
        ValueError: it lacks a column.
    """
    if source is None:
        return TableModality(np.full((n_rows, len(features)), np.nan), features)
    if source.features == features:
        return source
    position = {feature: i for i, feature in enumerate(source.features)}
    missing = [feature for feature in features if feature not in position]
    if missing:
        raise ValueError(
            f"table {name!r} lacks {len(missing)} columns that training had: {shorten(missing)}"
        )
    columns = [position[feature] for feature in features]
    return TableModality(source.values[:, columns], features, source.groups)


def group_numbers(table: TableModality, features: Sequence[str]) -> dict[str, Rows]:
    """Each group of a table as numbers among the columns `features`; others are left out."""
    position = {feature: i for i, feature in enumerate(features)}
    return {
        group: np.array([position[c] for c in columns if c in position], dtype=np.int64)
        for group, columns in table.groups.items()
    }


def _check_present(present: NDArray[np.bool_], n_rows: int) -> None:
    if present.shape != (n_rows,) or present.dtype != np.bool_:
        raise ValueError(
            f"present is {present.dtype} of shape {present.shape}; it must be bool [{n_rows}]"
        )
