"""The file under a store: its header, written once by HDF5, and its rows, written to known places.

The layout is described in `store.py`. `BagStore.write` and `pack` both write through this module.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from survfuse.data.bags import padded_width
from survfuse.data.layouts import STORE_FORMAT, BagFileError
from survfuse.extras import require

VERSION = 1
DTYPES = {
    "bfloat16": (torch.bfloat16, np.dtype("<u2")),
    "float16": (torch.float16, np.dtype("<f2")),
    "float32": (torch.float32, np.dtype("<f4")),
}
TEXT_COLUMNS = ("names", "encoder", "layout", "coords_unit", "source")
_ALIGNMENT = 4096
_BLOCK_ROWS = 16384  # rows converted at a time
# errors of a write that say there is no room: disk, quota, file size limit
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorePlan(NamedTuple):
    """Everything a store's header holds: fixed before the first row is written."""

    dtype: str
    width: int
    lengths: list[int]
    has_coords: bool
    columns: dict[str, list[str]]  # TEXT_COLUMNS, one value per bag, "" where unknown
    patch_size_level0: list[float]  # 0 where unknown

    @property
    def n_rows(self) -> int:
        return sum(self.lengths)

    @property
    def n_bytes(self) -> int:
        """Bytes of the rows; the header comes on top."""
        row = padded_width(self.width) * DTYPES[self.dtype][1].itemsize
        return self.n_rows * (row + (8 if self.has_coords else 0))


class StoreWriter:
    """Writes the rows of bags to their places in a file whose header `create_store` wrote.

    The header is written once by HDF5; rows and checksums then go to known offsets by plain
    writes, so that a process killed between two of them leaves a sound file.
    """

    def __init__(self, path: Path, plan: StorePlan) -> None:
        self.path = path
        self.plan = plan
        self._starts = np.concatenate([[0], np.cumsum(plan.lengths, dtype=np.int64)]).tolist()
        self._offsets = offsets_of(path)
        self._handle = os.open(path, os.O_RDWR)

    def close(self) -> None:
        os.close(self._handle)

    def write_bag(self, index: int, features: Tensor, coords: Tensor | None) -> int:
        """Write bag `index`, flush it to disk and return its checksum.

        Raises:
            BagFileError: a finite value does not fit the store's type.
            OSError: the disk is full; the message says so.
        """
        plan, start = self.plan, self._starts[index]
        torch_dtype, numpy_dtype = DTYPES[plan.dtype]
        stride = padded_width(plan.width)
        offset = self._offsets["features"] + start * stride * numpy_dtype.itemsize
        crc = 0
        for begin in range(0, features.shape[0], _BLOCK_ROWS):
            block = features[begin : begin + _BLOCK_ROWS]
            rows = torch.zeros(block.shape[0], stride, dtype=torch_dtype)
            rows[:, : plan.width].copy_(block)
            if not bool(torch.isfinite(rows).all()):
                self._check_range(index, block, rows)
            content = rows.view(torch.uint8).numpy().data.cast("B")
            crc = zlib.crc32(content, crc)
            offset = self._write(content, offset)
        if plan.has_coords:
            content = _coords_bytes(coords, plan.lengths[index])
            crc = zlib.crc32(content, crc)
            self._write(content, self._offsets["coords"] + start * 8)
        os.fdatasync(self._handle)
        return crc

    def write_checksums(self, checksums: Sequence[int]) -> None:
        content = np.asarray(checksums, dtype="<u4").tobytes()
        self._write(memoryview(content), self._offsets["crc32"])
        os.fsync(self._handle)

    def reserve(self) -> None:
        """Ask the file system for all bytes now, so that a full disk is known before any work."""
        size = os.fstat(self._handle).st_size
        if size == 0 or not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self._handle, 0, size)
        except OSError as error:
            if error.errno in FULL:
                raise full_error(error, self.path, size) from error
            # file systems that cannot reserve are written to without it
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise

    def _check_range(self, index: int, block: Tensor, rows: Tensor) -> None:
        over = torch.isfinite(block) & ~torch.isfinite(rows[:, : self.plan.width])
        if bool(over.any()):
            raise BagFileError(
                f"{self.plan.columns['source'][index] or self.plan.columns['names'][index]}: the "
                f"value {float(block[over].abs().max()):.6g} is outside the range of "
                f"{self.plan.dtype}; store the bags in a wider type"
            )

    def _write(self, content: memoryview, offset: int) -> int:
        try:
            while len(content):
                written = os.pwrite(self._handle, content, offset)
                content, offset = content[written:], offset + written
        except OSError as error:
            if error.errno in FULL:
                raise full_error(error, self.path, self.plan.n_bytes) from error
            raise
        return offset


def _coords_bytes(coords: Tensor | None, length: int) -> memoryview:
    if coords is None:
        array = np.full((length, 2), np.nan, dtype="<f4")
    else:
        array = np.ascontiguousarray(coords.to(torch.float32).numpy())
    return array.data.cast("B") if length else memoryview(b"")


def bytes_text(n_bytes: int) -> str:
    """A number of bytes for people, in powers of 1000.

    Example:
        >>> bytes_text(1_230_000)
        '1.23 MB'
    """
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def full_error(error: OSError, path: Path, n_bytes: int) -> OSError:
    """The same error, saying what did not fit where."""
    free = os.statvfs(path.parent)
    return OSError(
        error.errno,
        f"no room for the store: it needs {bytes_text(n_bytes)} and "
        f"{bytes_text(free.f_bavail * free.f_frsize)} are free in {path.parent} "
        f"({os.strerror(error.errno)})",
        str(path),
    )


def create_store(path: Path, plan: StorePlan) -> None:
    """Write a store's header; the rows are room without content yet.

    Raises:
        OSError: the disk is full.
    """
    h5py = require("h5py", extra="train")
    stride = padded_width(plan.width)
    text = h5py.string_dtype()
    try:
        with h5py.File(
            path, "w", alignment_threshold=_ALIGNMENT, alignment_interval=_ALIGNMENT
        ) as file:
            file.attrs["format"] = STORE_FORMAT
            file.attrs["version"] = VERSION
            data = _room(file, "features", (plan.n_rows, stride), DTYPES[plan.dtype][1])
            data.attrs["dtype"] = plan.dtype
            data.attrs["width"] = plan.width
            if plan.has_coords:
                _room(file, "coords", (plan.n_rows, 2), np.dtype("<f4"))
            bags = file.create_group("bags")
            bags.attrs["crc32"] = header_checksum(
                plan.lengths, plan.columns, plan.patch_size_level0
            )
            bags["lengths"] = np.asarray(plan.lengths, dtype="<i8")
            bags["patch_size_level0"] = np.asarray(plan.patch_size_level0, dtype="<f8")
            _room(bags, "crc32", (len(plan.lengths),), np.dtype("<u4"))
            for column in TEXT_COLUMNS:
                bags.create_dataset(column, data=plan.columns[column], dtype=text)
    except (OSError, RuntimeError) as error:
        # HDF5 gives the system's error number in its text only
        number = next((n for n in FULL if f"errno = {n}," in str(error)), None)
        if number is not None:
            raise full_error(OSError(number, ""), path, plan.n_bytes) from error
        raise


def header_checksum(
    lengths: Sequence[int], columns: Mapping[str, Sequence[str]], sizes: Sequence[float]
) -> int:
    """CRC-32 of what says which rows are whose: a wrong name would be another patient's slide."""
    text = [list(columns[name]) for name in TEXT_COLUMNS]
    numbers = [list(map(int, lengths)), list(map(float, sizes))]
    return zlib.crc32(json.dumps([text, numbers]).encode())


def _room(group: Any, name: str, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """A contiguous dataset whose bytes have a place in the file but are not written."""
    h5py = require("h5py", extra="train")
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_layout(h5py.h5d.CONTIGUOUS)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    # the same bags give the same bytes, whenever they are packed
    settings.set_obj_track_times(False)
    space = h5py.h5s.create_simple(shape)
    kind = h5py.h5t.py_create(dtype, logical=True)
    identifier = h5py.h5d.create(group.id, name.encode(), kind, space, settings)
    return h5py.Dataset(identifier)


def offsets_of(path: Path) -> dict[str, int]:
    """Where in the file each dataset begins, in bytes."""
    h5py = require("h5py", extra="train")
    with h5py.File(path, "r") as file:
        found = {"features": file["features"], "crc32": file["bags/crc32"]}
        if "coords" in file:
            found["coords"] = file["coords"]
        # a dataset without elements has no place
        return {name: data.id.get_offset() or 0 for name, data in found.items()}


def check_dtype(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    return dtype
