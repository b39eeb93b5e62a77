"""A store: the bags of a cohort in one HDF5 file, read by mapping it into memory.

Layout (version 1), every dataset contiguous and little-endian; docs/data.md has it in full:

    features          [T, stride]  uint16 holding bfloat16, float16 or float32; stride = width
                                   rounded up to a multiple of 8, the rest of a row is zeros
    coords            [T, 2]       float32, NaN where unknown; absent if no bag has coordinates
    bags/lengths      [B]          int64
    bags/crc32        [B]          uint32, of a bag's feature rows followed by its coords rows
    bags/names, encoder, layout, coords_unit, source     [B] text
    bags/patch_size_level0  [B]    float64, 0 where unknown
    bags, attribute crc32          of all columns but crc32

Nothing is compressed or chunked: a row is found by arithmetic and the page cache does the rest.
"""

from __future__ import annotations

import mmap
import os
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from survfuse.data.atomic import atomic_path
from survfuse.data.bags import Bags
from survfuse.data.layouts import STORE_FORMAT, BagFileError
from survfuse.data.store_file import (
    DTYPES,
    TEXT_COLUMNS,
    VERSION,
    StorePlan,
    StoreWriter,
    check_dtype,
    create_store,
    header_checksum,
)
from survfuse.extras import require


class BagStore:
    """Bags in a file, mapped into memory: opening is instant, rows are read when touched.

    The mapping is private: writing to `features` in place changes this process's copy of the
    touched pages and never the file. It may be larger than memory. A store can be pickled (its
    path is), so data loader workers map the file anew.

    Args:
        path: a file that `pack` or `BagStore.write` made.

    Attributes:
        features: [T, D] view of the file, row stride a multiple of 8 elements.
        coords: [T, 2] float32 view of the file, NaN where unknown, or None.
        names: one per bag.  lengths: patches per bag.  checksums: CRC-32 per bag.
        columns: "encoder", "layout", "coords_unit", "source": one text per bag or None.
        patch_size_level0: side of a patch in level-0 pixels per bag, or None.

    Raises:
        FileNotFoundError: there is no such file.
        BagFileError: it is no store, cut short, or of a later version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no store {self.path}")
        h5py = require("h5py", extra="train")
        if sys.byteorder != "little":
            raise OSError("a store can be mapped on little-endian machines only")
        try:
            with h5py.File(self.path, "r") as file:
                self._read_header(file)
        except BagFileError:
            raise
        except (OSError, KeyError) as error:
            raise BagFileError(
                f"{self.path} is no store, damaged or cut short ({error}); pack it again"
            ) from error
        self._map()

    def _read_header(self, file: Any) -> None:
        if file.attrs.get("format") != STORE_FORMAT:
            raise BagFileError(
                f"{self.path} is an HDF5 file but no store; make one with `survfuse pack`, or "
                "read a single bag with read_bag"
            )
        version = int(file.attrs["version"])
        if version > VERSION:
            raise BagFileError(
                f"{self.path} has store version {version}; this survfuse reads up to {VERSION}"
            )
        data, bags = file["features"], file["bags"]
        self.dtype: str = str(data.attrs["dtype"])
        self.width = int(data.attrs["width"])
        self.lengths: list[int] = bags["lengths"][()].tolist()
        if sum(self.lengths) != data.shape[0] or self.dtype not in DTYPES:
            raise BagFileError(
                f"{self.path} is damaged: {sum(self.lengths)} patches in {data.shape[0]} rows "
                f"of {self.dtype}"
            )
        self.checksums: list[int] = bags["crc32"][()].tolist()
        text = {name: bags[name].asstr()[()].tolist() for name in TEXT_COLUMNS}
        sizes = bags["patch_size_level0"][()].tolist()
        if bags.attrs["crc32"] != header_checksum(self.lengths, text, sizes):
            raise BagFileError(
                f"{self.path} is damaged: names, lengths or other columns are not those that were "
                "written; pack it again"
            )
        self.names: list[str] = text.pop("names")
        self.columns = {key: [v or None for v in values] for key, values in text.items()}
        self.patch_size_level0 = [size or None for size in sizes]
        self._stride = int(data.shape[1])
        self._offset = data.id.get_offset() or 0
        coords = file.get("coords")
        self._coords_offset = None if coords is None else coords.id.get_offset() or 0

    def _map(self) -> None:
        n_rows = sum(self.lengths)
        torch_dtype, numpy_dtype = DTYPES[self.dtype]
        row = self._stride * numpy_dtype.itemsize
        self.coords: Tensor | None = None
        if n_rows == 0:
            self._raw = np.empty(0, dtype=np.uint8)
            self.features = torch.empty(0, self._stride, dtype=torch_dtype)[:, : self.width]
            if self._coords_offset is not None:
                self.coords = torch.empty(0, 2)
            return
        # HDF5 has refused a file shorter than its header says
        self._raw = _map_file(self.path)
        rows = self._raw[self._offset : self._offset + n_rows * row]
        matrix = torch.from_numpy(rows).view(torch_dtype).view(n_rows, self._stride)
        self.features = matrix[:, : self.width]
        if self._coords_offset is not None:
            rows = self._raw[self._coords_offset : self._coords_offset + n_rows * 8]
            self.coords = torch.from_numpy(rows).view(torch.float32).view(n_rows, 2)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return (
            f"BagStore({str(self.path)!r}: {len(self)} bags, {sum(self.lengths)} patches of "
            f"{self.width} features, {self.dtype})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return BagStore, (self.path,)

    def bags(self, names: Sequence[str] | None = None) -> Bags:
        """All bags, or those called `names` in that order; a view of the file.

        Raises:
            KeyError: a name is not in the store.
        """
        attributes = {**self.columns, "patch_size_level0": self.patch_size_level0}
        bags = Bags(
            self.features, self.lengths, self.names, coords=self.coords, attributes=attributes
        )
        return bags if names is None else bags.select([bags.index_of(name) for name in names])

    def verify(self, *, progress: Callable[[int, int], None] | None = None) -> None:
        """Read every row and compare its bag's checksum with the one written.

        Names, lengths and the other columns were compared on opening.

        Args:
            progress: called after each bag with bags done and bags in all.

        Raises:
            BagFileError: a checksum differs; the message names the bags.
        """
        row = self._stride * DTYPES[self.dtype][1].itemsize
        wrong, start = [], 0
        for i, (name, length) in enumerate(zip(self.names, self.lengths)):
            begin = self._offset + start * row
            crc = zlib.crc32(self._raw[begin : begin + length * row].data)
            if self._coords_offset is not None:
                begin = self._coords_offset + start * 8
                crc = zlib.crc32(self._raw[begin : begin + length * 8].data, crc)
            if crc != self.checksums[i]:
                wrong.append(name)
            start += length
            if progress is not None:
                progress(i + 1, len(self))
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise BagFileError(
                f"{self.path}: the rows of {len(wrong)} of {len(self)} bags are not what was "
                f"written: {', '.join(wrong[:5])}{more}; pack them again"
            )

    @staticmethod
    def write(path: str | os.PathLike[str], bags: Bags, *, dtype: str | None = None) -> BagStore:
        """Write bags that lie in memory to a store, atomically, and open it.

        Args:
            path: the file; an existing one is replaced.
            bags: what to write; attributes named like the store's columns are kept.
            dtype: "bfloat16", "float16" or "float32"; by default that of the features
                (float64 becomes float32).

        Raises:
            ValueError: `dtype` is none of the three.
            OSError: the disk is full; nothing is left behind.
        """
        if dtype is None:
            kind = str(bags.features.dtype).removeprefix("torch.")
            dtype = kind if kind in DTYPES else "float32"
        plan = _plan_of(bags, check_dtype(dtype))
        with atomic_path(path) as temporary:
            create_store(temporary, plan)
            writer = StoreWriter(temporary, plan)
            try:
                writer.reserve()
                checksums = []
                for i in range(len(bags)):
                    coords = bags.coords_of(i)
                    coords = None if coords is None else coords.cpu()
                    checksums.append(writer.write_bag(i, bags[i].cpu(), coords))
                writer.write_checksums(checksums)
            finally:
                writer.close()
        return BagStore(path)


def _plan_of(bags: Bags, dtype: str) -> StorePlan:
    blank: list[Any] = [None] * len(bags)
    columns = {
        column: [value or "" for value in bags.attributes.get(column, blank)]
        for column in TEXT_COLUMNS[1:]
    }
    sizes = bags.attributes.get("patch_size_level0", blank)
    return StorePlan(
        dtype=dtype,
        width=bags.width,
        lengths=bags.lengths.tolist(),
        has_coords=bags.coords is not None,
        columns={"names": list(bags.names), **columns},
        patch_size_level0=[float(size or 0) for size in sizes],
    )


def _map_file(path: Path) -> np.ndarray:
    """The whole file as bytes, copy-on-write."""
    # without MAP_NORESERVE (0x4000 on Linux, named only from Python 3.13 on) the kernel would
    # refuse a private mapping larger than memory
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    with path.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(),
            0,
            flags=mmap.MAP_PRIVATE | no_reserve,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )
    return np.frombuffer(mapped, dtype=np.uint8)
