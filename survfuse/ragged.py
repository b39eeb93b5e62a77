"""Which rows of a packed matrix form which bag."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Ragged(NamedTuple):
    """Ranges of rows in a packed matrix [T, D]: bag b is rows starts[b] to starts[b] + lengths[b].

    Bags may come in any order, repeat, overlap and leave gaps, so a minibatch drawn from a cohort
    that lies in memory copies nothing. The two host integers spare every op a synchronisation with
    the device.

    Attributes:
        starts: [B] int64, first row of each bag.
        lengths: [B] int64, rows of each bag; 0 is an absent bag.
        total: sum of `lengths`.
        max_length: the longest bag; 0 for no bags.

    Example:
        >>> Ragged.from_lengths([3, 0, 2]).starts.tolist()
        [0, 3, 3]
    """

    starts: Tensor
    lengths: Tensor
    total: int
    max_length: int

    @classmethod
    def from_lengths(
        cls, lengths: Tensor | Sequence[int], *, device: torch.device | str | None = None
    ) -> Ragged:
        """Bags that lie one behind the other, starting at row 0.

        Args:
            lengths: [B] non-negative integers.
            device: where the two tensors go; by default that of `lengths`.

        Raises:
            ValueError: a length is negative, or `lengths` is not a vector of integers.
        """
        lengths = _int_vector(lengths, "lengths", device)
        ends = lengths.cumsum(0)
        return cls.from_ranges(ends - lengths, lengths)

    @classmethod
    def from_offsets(
        cls, offsets: Tensor | Sequence[int], *, device: torch.device | str | None = None
    ) -> Ragged:
        """From cumulative offsets `[B + 1]`, as flash-attn's `cu_seqlens`.

        Raises:
            ValueError: `offsets` is empty, starts below 0 or decreases.
        """
        offsets = _int_vector(offsets, "offsets", device)
        if offsets.numel() == 0:
            raise ValueError("offsets is empty; it must hold B + 1 cumulative row counts")
        lengths = offsets.diff()
        if int(offsets[0]) < 0 or bool((lengths < 0).any()):
            raise ValueError(
                "offsets starts below 0 or decreases; it must hold cumulative row counts"
            )
        return cls.from_ranges(offsets[:-1], lengths)

    @classmethod
    def from_jagged(cls, nested: Tensor) -> Ragged:
        """From a `torch.nested` tensor with jagged layout; its `.values()` is the packed matrix."""
        if not getattr(nested, "is_nested", False) or nested.layout != torch.jagged:
            raise ValueError("nested must be a nested tensor with layout torch.jagged")
        offsets = nested.offsets().to(torch.int64)
        lengths = nested.lengths()
        lengths = offsets.diff() if lengths is None else lengths.to(torch.int64)
        return cls.from_ranges(offsets[:-1], lengths)

    @classmethod
    def from_ranges(
        cls,
        starts: Tensor | Sequence[int],
        lengths: Tensor | Sequence[int],
        *,
        device: torch.device | str | None = None,
    ) -> Ragged:
        """From first rows and row counts in any order. Reads both on the host once.

        Raises:
            ValueError: shapes differ, or a value is negative.
        """
        starts = _int_vector(starts, "starts", device)
        lengths = _int_vector(lengths, "lengths", device)
        if starts.shape != lengths.shape:
            raise ValueError(
                f"starts has {starts.numel()} bags and lengths {lengths.numel()}; "
                "they must have the same number"
            )
        if starts.device != lengths.device:
            raise ValueError(
                f"starts is on {starts.device} and lengths on {lengths.device}; "
                "they must be on one device"
            )
        if lengths.numel() == 0:
            return cls(starts, lengths, 0, 0)
        low_start, low, high, total = torch.stack(
            [starts.min(), lengths.min(), lengths.max(), lengths.sum()]
        ).tolist()
        if low < 0:
            raise ValueError(f"lengths holds {low}; a bag has at least 0 rows")
        if high * lengths.numel() >= 2**63:
            raise ValueError(f"lengths holds {high}; {lengths.numel()} such bags pass 2^63 rows")
        if low_start < 0:
            raise ValueError(f"starts holds {low_start}; a first row must be at least 0")
        return cls(starts, lengths, total, high)

    @property
    def n_bags(self) -> int:
        """Number of bags B."""
        return self.lengths.shape[0]

    def select(self, indices: Tensor | Sequence[int]) -> Ragged:
        """The bags `indices`, in that order; the packed matrix stays where it is."""
        indices = _int_vector(indices, "indices", self.starts.device)
        return Ragged.from_ranges(self.starts[indices], self.lengths[indices])

    def to(self, device: torch.device | str) -> Ragged:
        """The same ranges with both tensors on `device`."""
        return self._replace(starts=self.starts.to(device), lengths=self.lengths.to(device))

    def packed(self) -> Ragged:
        """The ranges that per-patch results have: the same lengths, one behind the other."""
        ends = self.lengths.cumsum(0)
        return self._replace(starts=ends - self.lengths)

    def bags(self) -> Tensor:
        """The bag of every packed patch, [total] int64: 0, 0, 0, 1, 1, ..."""
        return self.per_patch(torch.arange(self.n_bags, device=self.lengths.device))

    def places(self) -> Tensor:
        """The place of every packed patch in its bag, [total] int64, from 0 in each."""
        place = torch.arange(self.total, device=self.lengths.device)
        return place - self.per_patch(self.packed().starts)

    def rows(self) -> Tensor:
        """The stored row of every packed patch, [total] int64: `bag[ragged.rows()]` is packed.

        Example:
            >>> Ragged.from_ranges([5, 0], [2, 3]).rows().tolist()
            [5, 6, 0, 1, 2]
        """
        place = torch.arange(self.total, device=self.lengths.device)
        return place + self.per_patch(self.starts - self.packed().starts)

    def per_patch(self, values: Tensor) -> Tensor:
        """Values [B, ...] of bags, each as often as its bag has patches: [total, ...]."""
        return values.repeat_interleave(self.lengths, 0, output_size=self.total)

    def check(self, n_rows: int, name: str = "ragged") -> None:
        """Raise unless every bag lies within a packed matrix of `n_rows` rows.

        Synchronises with the device; ops on CUDA clamp instead. `name` is that of the argument in
        the error.

        Raises:
            ValueError: names the first bag that does not fit, or the host integer that is wrong.
        """
        starts, lengths = self.starts.cpu(), self.lengths.cpu()
        # not starts + lengths > n_rows: that sum can pass 2^63
        wrong = (starts < 0) | (lengths < 0) | (starts > n_rows - lengths)
        if bool(wrong.any()):
            b = int(wrong.nonzero()[0])
            raise ValueError(
                f"{name}: bag {b} is rows {int(starts[b])} to {int(starts[b]) + int(lengths[b])}, "
                f"but the bag matrix has {n_rows} rows"
            )
        total = int(lengths.sum())
        longest = int(lengths.max()) if lengths.numel() else 0
        if (total, longest) != (self.total, self.max_length):
            raise ValueError(
                f"{name}: total and max_length are {self.total} and {self.max_length}, "
                f"but the lengths give {total} and {longest}"
            )


def _int_vector(
    values: Tensor | Sequence[int], name: str, device: torch.device | str | None
) -> Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} is {values!r}; it must be a vector of integers") from error
    if device is not None:
        tensor = tensor.to(_device(device))
    if tensor.numel() == 0:
        tensor = tensor.to(torch.int64)
    if tensor.dim() != 1 or not _is_integer(tensor.dtype):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; "
            "it must be a vector of integers"
        )
    return tensor.to(torch.int64)


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"device is {device!r}; it must be a torch.device or the name of one"
        ) from error


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def as_packed(
    bag: Tensor, ragged: Ragged | None, n_bags: int | None = None
) -> tuple[Tensor, Ragged]:
    """Bring any accepted form of a bag to a packed matrix and its ranges.

    Args:
        bag: [T, D], one bag if `ragged` is None; or dense [B, N, D] with `ragged` None.
        ragged: the ranges of a packed bag.
        n_bags: the number of bags the other arguments have, checked.

    Returns:
        The packed matrix [T, D] and its ranges.

    Raises:
        ValueError: names the argument, what it was and what it must be.
    """
    if bag.dim() == 3:
        if ragged is not None:
            raise ValueError(
                f"bag has shape {tuple(bag.shape)} and ragged is given; "
                "a dense [B, N, D] bag takes ragged=None, a ragged one is packed [T, D]"
            )
        b, n = bag.shape[:2]
        ragged = _dense_ranges(b, n, bag.device)
        bag = bag.reshape(b * n, bag.shape[2])
    elif bag.dim() == 2:
        ragged = _dense_ranges(1, bag.shape[0], bag.device) if ragged is None else ragged
    else:
        raise ValueError(
            f"bag has shape {tuple(bag.shape)}; it must be packed [T, D] or dense [B, N, D]"
        )
    check_ragged("ragged", ragged, "bag", bag.device, n_bags)
    return bag, ragged


def in_batch_order(
    matrix: Tensor, ragged: Ragged, *, may_wait: bool = False
) -> tuple[Tensor, Ragged]:
    """The rows [total, ...] of all bags, one bag behind the other, and their ranges.

    The matrix itself where it is known to hold just these rows in this order.

    Args:
        matrix: [T, ...].
        ragged: the ranges of the bags in it.
        may_wait: find that out on a device as well, which waits for it; else only one bag is known
            to fill a matrix there.

    Raises:
        ValueError: on the CPU, a range lies outside the matrix.
    """
    full = matrix.shape[0] == ragged.total
    known, on_host = full and ragged.n_bags == 1, matrix.device.type == "cpu"
    if not known and not torch.compiler.is_compiling() and (on_host or may_wait):
        if on_host:
            ragged.check(matrix.shape[0])
        known = full and torch.equal(ragged.starts, ragged.packed().starts)
    if known:
        return matrix, ragged
    return matrix.index_select(0, ragged.rows()), ragged.packed()


def as_packed_heads(
    name: str, tensor: Tensor, ragged: Ragged | None, n_bags: int | None = None
) -> tuple[Tensor, Ragged]:
    """Bring one side of an attention to packed rows [T, H, d] and their ranges.

    Args:
        name: of the argument, for errors.
        tensor: [T, H, d], one bag if `ragged` is None; or dense [B, L, H, d] with `ragged` None.
        ragged: the ranges of a packed side.
        n_bags: the number of bags the other side has, checked.

    Raises:
        TypeError, ValueError: names the argument, what it was and what it must be.
    """
    derived, packed = ragged is None, tensor.dim() == 3
    if tensor.dim() == 4:
        if ragged is not None:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and {name}_ragged is given; "
                f"a dense [B, L, H, d] takes {name}_ragged=None, a ragged one is packed [T, H, d]"
            )
        b, n = tensor.shape[:2]
        ragged = _dense_ranges(b, n, tensor.device)
        tensor = tensor.reshape(b * n, *tensor.shape[2:])
    elif tensor.dim() == 3:
        ragged = _dense_ranges(1, tensor.shape[0], tensor.device) if ragged is None else ragged
    else:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; it must be packed [T, H, d] or dense "
            "[B, L, H, d]"
        )
    check_ragged(f"{name}_ragged", ragged, name, tensor.device, None if derived else n_bags)
    if derived and n_bags is not None and ragged.n_bags != n_bags:
        hint = f"; without {name}_ragged, packed rows are one bag" if packed else ""
        raise ValueError(
            f"{name} holds {ragged.n_bags} bags, the other arguments {n_bags}; they must have the "
            f"same number{hint}"
        )
    return tensor, ragged


def _dense_ranges(n_bags: int, n_rows: int, device: torch.device) -> Ragged:
    starts = torch.arange(n_bags, device=device) * n_rows
    lengths = torch.full_like(starts, n_rows)
    return Ragged(starts, lengths, n_bags * n_rows, n_rows if n_bags else 0)


def check_ragged(
    name: str, ragged: Ragged, stored: str, device: torch.device, n_bags: int | None = None
) -> None:
    """Raise unless `ragged` is one, beside an argument `stored` on `device`, of `n_bags` bags."""
    if not isinstance(ragged, Ragged):
        raise TypeError(f"{name} is {type(ragged).__name__}; it must be a survfuse.Ragged")
    # a Ragged made by hand, not by one of its constructors, can hold anything
    for field, tensor in (("starts", ragged.starts), ("lengths", ragged.lengths)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}.{field} is {type(tensor).__name__}; it must be a tensor")
    # no len(), which would make their number a constant of an exported graph
    shape = ragged.lengths.shape
    for field, tensor in (("starts", ragged.starts), ("lengths", ragged.lengths)):
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or tensor.shape != shape:
            raise ValueError(
                f"{name}.{field} is {tensor.dtype} of shape {tuple(tensor.shape)}; both must be "
                "int64 vectors of one length"
            )
        if tensor.device != device:
            raise ValueError(
                f"{name}.{field} is on {tensor.device} and {stored} on {device}; "
                "they must be on one device (Ragged.to moves it)"
            )
    if n_bags is not None and ragged.lengths.shape[0] != n_bags:
        raise ValueError(
            f"{name} has {ragged.lengths.shape[0]} bags, the other arguments {n_bags}; "
            "they must have the same number"
        )
