"""Read one bag of patch features from the files other tools write.

The layouts are those of CLAM, TRIDENT, STAMP, HistoSSLscaling, the CLAM-derived pipelines and the
Subspace fusion release; docs/data.md lists them with their datasets and attributes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from survfuse.data.layouts import BagFileError, Source, open_h5, open_h5_file, open_npy, open_pt

SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npy")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class BagFile(NamedTuple):
    """One bag as its file has it."""

    features: Tensor  # [N, D] in the file's own type
    coords: Tensor | None  # [N, 2] (x, y), or None
    coords_unit: str | None  # "px" level-0 pixels, "um" micrometres, "tile" DeepZoom address
    patch_size_level0: float | None  # side of a patch in level-0 pixels
    encoder: str | None
    layout: str  # which tool's layout was recognised

    def nonfinite(self) -> tuple[int, int] | None:
        """How many NaN or infinite values there are and the first row with one; None if none."""
        count, first = 0, -1
        # blocks of rows: the mask of a long bag would take half its memory again
        for begin in range(0, self.features.shape[0], 16384):
            bad = ~torch.isfinite(self.features[begin : begin + 16384])
            found = int(bad.sum())
            if found and first < 0:
                first = begin + int(bad.any(1).nonzero()[0])
            count += found
        return (count, first) if count else None


class BagHeader(NamedTuple):
    """What can be told of a bag without reading its rows."""

    n_rows: int
    width: int  # 0 where an empty bag does not say
    has_coords: bool
    coords_unit: str | None
    patch_size_level0: float | None
    encoder: str | None
    layout: str


def read_bag(path: str | os.PathLike[str], *, check: bool = False) -> BagFile:
    """Read the bag in `path`, whichever tool wrote it.

    Recognised: `.h5` of CLAM, TRIDENT, STAMP, CLAM-derived `(1, N, D)` and Subspace fusion
    (`Res_feature`); `.pt` holding a tensor, or a dictionary with `features` (or `feats`) and
    `coords`; `.npy`, with or without HistoSSLscaling's three leading columns (level, x, y).
    A `.pt` is read without running code from the file.

    Args:
        path: the feature file of one slide.
        check: raise if a feature is NaN or infinite.

    Returns:
        Features `[N, D]` in the file's own type (N may be 0) and what the file says about them.

    Raises:
        FileNotFoundError: there is no such file.
        BagFileError: the file is damaged or holds something else than the patches of one slide.
        ImportError: an `.h5` is read without h5py.
    """
    path = Path(path)
    with _opened(path) as source:
        n_rows, width = _matrix_shape(path, source.shape)
        features = _guarded(path, source.load).reshape(n_rows, width).contiguous()
        if features.dtype not in _FLOATS:
            raise BagFileError(
                f"{path}: the features are {features.dtype}; they must be float16, bfloat16, "
                "float32 or float64"
            )
        coords = None
        if source.load_coords is not None and _has_coords(path, source, n_rows):
            coords = _guarded(path, source.load_coords).reshape(n_rows, 2).contiguous()
        bag = BagFile(
            features,
            coords,
            source.coords_unit if coords is not None else None,
            source.patch_size_level0,
            source.encoder,
            source.layout,
        )
    if check and (bad := bag.nonfinite()) is not None:
        raise BagFileError(
            f"{path}: {bad[0]} features are NaN or infinite, the first in row {bad[1]} "
            f"(of {n_rows}); all must be finite"
        )
    return bag


def read_header(path: str | os.PathLike[str]) -> BagHeader:
    """What `read_bag` would find, without reading the rows where the format allows it.

    Raises:
        As `read_bag`.
    """
    path = Path(path)
    with _opened(path) as source:
        n_rows, width = _matrix_shape(path, source.shape)
        has_coords = source.load_coords is not None and _has_coords(path, source, n_rows)
        return BagHeader(
            n_rows,
            width,
            has_coords,
            source.coords_unit if has_coords else None,
            source.patch_size_level0,
            source.encoder,
            source.layout,
        )


def bag_name(path: str | os.PathLike[str]) -> str:
    """The slide's name: the file's, without its suffix.

    HistoSSLscaling calls every file `features.npy` in a folder named after the slide, so there
    the folder gives the name. A trailing `.svs` goes too.

    Example:
        >>> bag_name("h5_files/TCGA-XF-A9SL-01Z-00-DX1.0A2C.h5")
        'TCGA-XF-A9SL-01Z-00-DX1.0A2C'
        >>> bag_name("feats/TCGA-2Z-A9JD-01Z-00-DX1.svs/features.npy")
        'TCGA-2Z-A9JD-01Z-00-DX1'
    """
    path = Path(path)
    name = path.parent.name if path.name == "features.npy" else path.stem
    return name.removesuffix(".svs")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Source]:
    """Open `path` by its suffix; an HDF5 file stays open until the rows are read."""
    if path.is_dir():
        raise BagFileError(f"{path} is a folder; a bag is one feature file")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise BagFileError(
            f"{path}: cannot read {suffix or 'a file without suffix'!r}; a bag is a file "
            f"ending in {', '.join(SUFFIXES)}"
        )
    if path.stat().st_size == 0:
        raise BagFileError(f"{path} is empty (0 bytes); the tool that wrote it did not finish")
    if suffix in (".pt", ".pth"):
        yield open_pt(path)
    elif suffix == ".npy":
        yield open_npy(path)
    else:
        with open_h5_file(path) as file:
            yield open_h5(path, file)


def _guarded(path: Path, load: Callable[[], Tensor]) -> Tensor:
    try:
        return load()
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise BagFileError(
            f"{path}: its rows cannot be read, the file is damaged or cut short ({error})"
        ) from error


def _matrix_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and width of `(N, D)`, `(1, N, D)` or the `(0,)` that TRIDENT writes for no tissue."""
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if shape == (0,):
        return 0, 0
    if len(shape) == 1:
        raise BagFileError(
            f"{path}: the features are one vector of {shape[0]} numbers, a slide-level embedding; "
            "a bag must be (patches, width)"
        )
    if len(shape) != 2:
        raise BagFileError(
            f"{path}: the features have shape {shape}; they must be (patches, width) or "
            "(1, patches, width)"
        )
    if shape[1] == 0 and shape[0] != 0:
        raise BagFileError(f"{path}: the features have shape {shape}; a patch needs features")
    return shape


def _has_coords(path: Path, source: Source, n_rows: int) -> bool:
    shape = source.coords_shape
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    if n_rows == 0 and (len(shape) == 1 or shape[0] == 0):
        # an empty bag's coordinates say nothing, whatever their shape
        return shape == (0, 2)
    if shape != (n_rows, 2):
        raise BagFileError(
            f"{path}: coords has shape {shape} for {n_rows} patches; it must be ({n_rows}, 2)"
        )
    return True
