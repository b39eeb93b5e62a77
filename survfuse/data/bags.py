"""A set of bags that lie in one packed matrix."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from survfuse.batch import BagBatch
from survfuse.data.names import unknown_name
from survfuse.ragged import Ragged

# rows are padded to a multiple of this many elements, so that every row of a 16-bit matrix starts
# on a 16-byte boundary whatever its width (1029 occurs)
ROW_MULTIPLE = 8


def padded_width(width: int) -> int:
    """Elements from one row to the next: `width` rounded up to a multiple of 8."""
    return -(-width // ROW_MULTIPLE) * ROW_MULTIPLE


def empty_rows(
    n_rows: int, width: int, *, dtype: torch.dtype, device: torch.device | str | None = None
) -> Tensor:
    """An uninitialised `[n_rows, width]` matrix whose row stride is a multiple of 8 elements."""
    return torch.empty(n_rows, padded_width(width), dtype=dtype, device=device)[:, :width]


class Bags:
    """Bags of patch features, ranges of rows of one matrix `[T, D]`.

    The matrix may be larger than memory (a mapped `BagStore`): selecting bags and drawing a
    minibatch move no rows as long as every sample is one range of rows.

    Args:
        features: [T, D] floating matrix with unit last stride, frozen (no gradient).
        lengths: [B] rows of each bag.
        names: one name per bag, each once.
        coords: [T, 2] (x, y) of each patch's corner; NaN rows where unknown.
        attributes: facts per bag, each a sequence of B values, for example
            `{"patch_size_level0": [512.0, 256.0]}`.
        starts: [B] first row of each bag; by default the bags lie one behind the other.

    Raises:
        ValueError: shapes disagree, a bag reaches past the matrix, or a name occurs twice.

    Example:
        >>> bags = Bags(torch.zeros(5, 4), lengths=[3, 2], names=["a", "b"])
        >>> bags.batch([[1], []]).ragged.lengths.tolist()
        [2, 0]
    """

    def __init__(
        self,
        features: Tensor,
        lengths: Tensor | Sequence[int],
        names: Sequence[str],
        *,
        coords: Tensor | None = None,
        attributes: Mapping[str, Sequence[Any]] | None = None,
        starts: Tensor | Sequence[int] | None = None,
    ) -> None:
        names = [str(name) for name in names]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"names holds {twice!r} twice; every bag must have its own name")
        if starts is None:
            ragged = Ragged.from_lengths(lengths, device="cpu")
        else:
            ragged = Ragged.from_ranges(starts, lengths, device="cpu")
        self._set(features, ragged, names, coords, attributes)

    def _set(
        self,
        features: Tensor,
        ragged: Ragged,
        names: list[str],
        coords: Tensor | None,
        attributes: Mapping[str, Sequence[Any]] | None,
    ) -> None:
        if features.dim() != 2 or not features.dtype.is_floating_point:
            raise ValueError(
                f"features is {features.dtype} of shape {tuple(features.shape)}; "
                "it must be a floating matrix [rows, width]"
            )
        if features.shape[1] > 1 and features.stride(1) != 1:
            raise ValueError(
                f"features has strides {features.stride()}; its last stride must be 1 "
                "(call .contiguous())"
            )
        if ragged.n_bags != len(names):
            raise ValueError(f"there are {ragged.n_bags} lengths and {len(names)} names")
        ragged.check(features.shape[0])
        if coords is not None and tuple(coords.shape) != (features.shape[0], 2):
            raise ValueError(
                f"coords has shape {tuple(coords.shape)}; it must be [{features.shape[0]}, 2], "
                "one (x, y) per row of features"
            )
        if coords is not None and coords.device != features.device:
            raise ValueError(
                f"coords is on {coords.device} and features on {features.device}; "
                "they must be on one device"
            )
        attributes = {key: list(values) for key, values in (attributes or {}).items()}
        for key, values in attributes.items():
            if len(values) != len(names):
                raise ValueError(
                    f"attributes[{key!r}] has {len(values)} values; it must have one per bag, "
                    f"{len(names)}"
                )
        self.features = features
        self.names = names
        self.coords = coords
        self.attributes = attributes
        # host copies: drawing a minibatch must not wait for the device
        self._ragged = ragged
        self._starts: list[int] = ragged.starts.tolist()
        self._lengths: list[int] = ragged.lengths.tolist()
        self._index: dict[str, int] | None = None

    @classmethod
    def from_list(
        cls,
        matrices: Sequence[Tensor],
        names: Sequence[str],
        *,
        coords: Sequence[Tensor | None] | None = None,
        attributes: Mapping[str, Sequence[Any]] | None = None,
    ) -> Bags:
        """Pack one matrix `[N_i, D]` per bag into a new one; copies every row once.

        Args:
            matrices: at least one matrix, all of the same width, type and device.
            names: one per matrix.
            coords: one `[N_i, 2]` per bag, None where a bag has none.
            attributes: facts per bag.

        Raises:
            ValueError: a matrix differs in width, type or device; the message names the bag.
        """
        if not matrices:
            raise ValueError("matrices is empty; from_list needs at least one bag")
        if len(matrices) != len(names):
            raise ValueError(f"there are {len(matrices)} matrices and {len(names)} names")
        first = matrices[0]
        for name, matrix in zip(names, matrices):
            if matrix.dim() != 2:
                raise ValueError(
                    f"bag {name!r} has shape {tuple(matrix.shape)}; it must be [rows, width]"
                )
            if matrix.shape[1] != first.shape[1]:
                raise ValueError(
                    f"bag {name!r} has {matrix.shape[1]} features per patch and bag "
                    f"{names[0]!r} has {first.shape[1]}; all bags must have the same width"
                )
            if (matrix.dtype, matrix.device) != (first.dtype, first.device):
                raise ValueError(
                    f"bag {name!r} is {matrix.dtype} on {matrix.device} and bag {names[0]!r} is "
                    f"{first.dtype} on {first.device}; all bags must have the same"
                )
        lengths = [matrix.shape[0] for matrix in matrices]
        packed = empty_rows(sum(lengths), first.shape[1], dtype=first.dtype, device=first.device)
        for rows, matrix in zip(packed.split(lengths), matrices):
            rows.copy_(matrix.detach())
        packed_coords = None
        if coords is not None:
            packed_coords = _pack_coords(coords, lengths, names, first.device)
        return cls(packed, lengths, names, coords=packed_coords, attributes=attributes)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return (
            f"Bags({len(self)} bags, {self._ragged.total} patches of {self.width} features, "
            f"{self.features.dtype}, {self.features.device})"
        )

    def __getitem__(self, index: int) -> Tensor:
        """The rows of one bag, `[N, D]`, a view."""
        start = self._starts[index]
        return self.features[start : start + self._lengths[index]]

    def coords_of(self, index: int) -> Tensor | None:
        """The coordinates of one bag, `[N, 2]`, a view; None where the set has none."""
        if self.coords is None:
            return None
        start = self._starts[index]
        return self.coords[start : start + self._lengths[index]]

    @property
    def width(self) -> int:
        """Features per patch, D."""
        return self.features.shape[1]

    @property
    def lengths(self) -> Tensor:
        """[B] int64 on the host, patches of each bag."""
        return self._ragged.lengths

    @property
    def starts(self) -> Tensor:
        """[B] int64 on the host, first row of each bag."""
        return self._ragged.starts

    def index_of(self, name: str) -> int:
        """Position of the bag `name` (the first one, where a selection repeats it).

        Raises:
            KeyError: there is no such bag; the message holds the nearest names.
        """
        if self._index is None:
            self._index = {}
            for i, known in enumerate(self.names):
                self._index.setdefault(known, i)
        if name not in self._index:
            raise KeyError(unknown_name("bag", name, self.names))
        return self._index[name]

    def select(self, indices: Tensor | Sequence[int]) -> Bags:
        """The bags `indices` in that order, repeats allowed. Copies no rows.

        Raises:
            IndexError: an index is outside 0 to B - 1.
        """
        chosen = [self._checked(int(i)) for i in indices]
        bags = object.__new__(Bags)
        bags._set(
            self.features,
            self._ragged.select(chosen),
            [self.names[i] for i in chosen],
            self.coords,
            {key: [values[i] for i in chosen] for key, values in self.attributes.items()},
        )
        return bags

    def batch(
        self, groups: Sequence[Sequence[int]], *, device: torch.device | str | None = None
    ) -> BagBatch:
        """A minibatch: one bag per sample, made of the bags of its group.

        Without a copy when every group is one range of rows (no bag, one bag, or bags that lie
        one behind the other) and the features are on `device` already: the batch then holds the
        whole matrix and ranges into it. Otherwise the rows of the groups, and only those, are
        gathered into a new matrix on `device`.

        Args:
            groups: per sample the bags that belong to it; [] where the modality is absent.
            device: where the batch goes; by default where the features are.

        Returns:
            Bags in sample order. A sample whose bags hold no patch counts as absent.

        Raises:
            IndexError: a group holds an index outside 0 to B - 1.
            TypeError: a group is a number and not a list of them.
        """
        for sample, group in enumerate(groups):
            if isinstance(group, str) or not hasattr(group, "__iter__"):
                what = f"groups[{sample}] is {group!r}"
                raise TypeError(f"{what}; it must be a list of bag numbers, [] for no bag")
        groups = [[self._checked(int(i)) for i in group] for group in groups]
        device = self.features.device if device is None else torch.empty(0, device=device).device
        totals = [sum(self._lengths[i] for i in group) for group in groups]
        present = torch.tensor([n > 0 for n in totals], dtype=torch.bool).to(device)
        ranges = [self._range(group) for group in groups]
        if device == self.features.device and all(r is not None for r in ranges):
            starts, lengths = ([r[k] for r in ranges] for k in (0, 1))
            ragged = Ragged.from_ranges(starts, lengths, device="cpu").to(device)
            return BagBatch(self.features, ragged, present, self.coords)
        ragged = Ragged.from_lengths(totals, device="cpu").to(device)
        flat = [i for group in groups for i in group]
        features = empty_rows(sum(totals), self.width, dtype=self.features.dtype, device=device)
        _gather(features, self.features, self._starts, self._lengths, flat)
        coords = None
        if self.coords is not None:
            coords = torch.empty(sum(totals), 2, dtype=self.coords.dtype, device=device)
            _gather(coords, self.coords, self._starts, self._lengths, flat)
        return BagBatch(features, ragged, present, coords)

    def to(self, device: torch.device | str) -> Bags:
        """The same bags with the whole matrix on `device`, its row stride kept a multiple of 8."""
        device = torch.empty(0, device=device).device
        if device == self.features.device:
            return self
        features = empty_rows(
            self.features.shape[0], self.width, dtype=self.features.dtype, device=device
        )
        features.copy_(self.features)
        coords = None if self.coords is None else self.coords.to(device)
        bags = object.__new__(Bags)
        bags._set(features, self._ragged, self.names, coords, self.attributes)
        return bags

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"bag index {index} is out of range; there are {len(self)} bags")
        return index

    def _range(self, group: list[int]) -> tuple[int, int] | None:
        """First row and length where the group's bags lie one behind the other, else None."""
        parts = [(self._starts[i], self._lengths[i]) for i in group if self._lengths[i]]
        if not parts:
            return 0, 0
        for (start, length), (following, _) in itertools.pairwise(parts):
            if start + length != following:
                return None
        return parts[0][0], sum(length for _, length in parts)


def _gather(
    out: Tensor, rows: Tensor, starts: list[int], lengths: list[int], indices: list[int]
) -> None:
    """Copy the rows of the bags `indices` into `out`, one behind the other."""
    end = 0
    for i in indices:
        begin, end = end, end + lengths[i]
        out[begin:end].copy_(rows[starts[i] : starts[i] + lengths[i]])


def _pack_coords(
    coords: Sequence[Tensor | None],
    lengths: list[int],
    names: Sequence[str],
    device: torch.device,
) -> Tensor:
    if len(coords) != len(lengths):
        raise ValueError(f"there are {len(coords)} coords and {len(lengths)} bags")
    packed = torch.full((sum(lengths), 2), torch.nan, dtype=torch.float32, device=device)
    for rows, part, length, name in zip(packed.split(lengths), coords, lengths, names):
        if part is None:
            continue
        if tuple(part.shape) != (length, 2):
            raise ValueError(
                f"coords of bag {name!r} have shape {tuple(part.shape)}; they must be [{length}, 2]"
            )
        rows.copy_(part)
    return packed
