"""The layouts of feature files: recognise one and say where its rows and coordinates are.

`readers.py` is what users call; this module knows each format. Layouts were read in the sources of
CLAM, TRIDENT, STAMP, HistoSSLscaling and the Subspace fusion release.
"""

from __future__ import annotations

import pickletools
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from survfuse.extras import require

FEATURE_KEYS = ("features", "feats", "patch_embeddings", "Res_feature")
STORE_FORMAT = "survfuse-bags"


class BagFileError(ValueError):
    """A file does not hold a bag; the message says which file, what it holds and what it must."""


class Source(NamedTuple):
    """An opened file: shapes are known, rows are read when `load` is called."""

    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    coords_shape: tuple[int, ...] | None
    load_coords: Callable[[], Tensor] | None
    coords_unit: str | None
    patch_size_level0: float | None
    encoder: str | None
    layout: str


def open_h5_file(path: Path) -> Any:
    h5py = require("h5py", extra="train")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "truncated" in str(error):
            what = "is cut short: it holds fewer bytes than its header says"
        elif "signature" in str(error):
            what = "is no HDF5 file, or its beginning is damaged"
        else:
            what = "cannot be opened as HDF5"
        raise BagFileError(f"{path} {what} ({error}); copy or extract it again") from error


def open_h5(path: Path, file: Any) -> Source:
    h5py = require("h5py", extra="train")
    if file.attrs.get("format") == STORE_FORMAT:
        raise BagFileError(
            f"{path} is a store of many bags; open it with survfuse.data.BagStore, not read_bag"
        )
    key = next((key for key in FEATURE_KEYS if key in file), None)
    if key is None:
        found = ", ".join(sorted(file)) or "nothing"
        hint = "; it lists patches only, their features come from an encoder" * ("coords" in file)
        raise BagFileError(
            f"{path} holds {found}; a bag must hold one of {', '.join(FEATURE_KEYS)}{hint}"
        )
    data = file[key]
    if not isinstance(data, h5py.Dataset):
        raise BagFileError(f"{path}: {key!r} is a group; it must be a dataset (patches, width)")
    level = _text(file.attrs.get("feat_type"))
    if level not in (None, "tile"):
        raise BagFileError(
            f"{path} holds {level}-level features (feat_type); a bag needs tile-level features"
        )
    bfloat16 = data.dtype == np.uint16 and _text(data.attrs.get("dtype")) == "bfloat16"
    coords = file.get("coords")
    if coords is not None and not isinstance(coords, h5py.Dataset):
        raise BagFileError(f"{path}: 'coords' is a group; it must be a dataset (patches, 2)")
    attrs = {} if coords is None else coords.attrs
    unit = _coords_unit(file, key)
    return Source(
        shape=tuple(data.shape),
        load=lambda: _h5_tensor(data, bfloat16),
        coords_shape=None if coords is None else tuple(coords.shape),
        load_coords=None if coords is None else lambda: _h5_tensor(coords, False),
        coords_unit=unit,
        patch_size_level0=_patch_size(attrs),
        encoder=_text(data.attrs.get("encoder")) or _text(file.attrs.get("extractor")),
        layout=_h5_layout(key, data, attrs),
    )


def _h5_tensor(data: Any, bfloat16: bool) -> Tensor:
    array = np.ascontiguousarray(data[()])
    # torch has no big-endian tensors
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if bfloat16 else tensor


def _h5_layout(key: str, data: Any, coords_attrs: Any) -> str:
    if key in ("feats", "patch_embeddings"):
        return "stamp"
    if key == "Res_feature":
        return "subspace"
    if "encoder" in data.attrs or "patch_size_level0" in coords_attrs:
        return "trident"
    return "clam-derived" if data.ndim == 3 else "clam"


def _coords_unit(file: Any, key: str) -> str | None:
    unit = _text(file.attrs.get("unit"))
    if unit is not None:
        return unit
    if key in ("feats", "patch_embeddings"):
        # STAMP before the `unit` attribute: micrometres if it gives tile sizes in them
        return "um" if "tile_size_um" in file.attrs else None
    return "px"


def _patch_size(attrs: Any) -> float | None:
    """TRIDENT says it outright; CLAM gives the size at a level and that level's downsampling."""
    if "patch_size_level0" in attrs:
        return _number(attrs["patch_size_level0"])
    if "patch_size" in attrs and "downsample" in attrs:
        size, downsample = _number(attrs["patch_size"]), _number(attrs["downsample"])
        return None if size is None or downsample is None else size * downsample
    return None


def _number(value: Any) -> float | None:
    try:
        number = float(np.ravel(value)[0])
    except (ValueError, TypeError, IndexError):
        return None
    return number if np.isfinite(number) and number > 0 else None


def _text(value: Any) -> str | None:
    """An attribute as text; TRIDENT writes None as the word."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or str(value) in ("", "None"):
        return None
    return str(value)


def open_npy(path: Path) -> Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise BagFileError(
            f"{path} cannot be read as .npy: {error}; it must hold one array (patches, width)"
        ) from error
    if not isinstance(array, np.ndarray):
        raise BagFileError(f"{path} holds several arrays; it must hold one (patches, width)")
    if array.dtype.kind != "f":
        raise BagFileError(f"{path}: the array is {array.dtype}; features must be floating")
    prefix = _is_prefixed(array)
    skip = 3 if prefix else 0
    native = array.dtype.newbyteorder("=")
    return Source(
        shape=(*array.shape[:-1], array.shape[-1] - skip) if array.ndim else (),
        load=lambda: torch.from_numpy(np.array(array[..., skip:], dtype=native, order="C")),
        coords_shape=(array.shape[0], 2) if prefix else None,
        load_coords=(lambda: torch.from_numpy(array[:, 1:3].astype(np.int64))) if prefix else None,
        coords_unit="tile" if prefix else None,
        patch_size_level0=None,
        encoder=None,
        layout="histossl" if prefix else "npy",
    )


def _is_prefixed(array: np.ndarray) -> bool:
    """Whether the first three columns are HistoSSLscaling's DeepZoom address (level, x, y).

    Encoder widths are multiples of 8, so a prefixed width is not; and the columns must look like
    an address: whole numbers, one level of at least 1, no place twice.
    """
    if array.ndim != 2 or array.shape[1] <= 3 or (array.shape[1] - 3) % 8 != 0:
        return False
    head = np.asarray(array[:, :3], dtype=np.float64)
    if head.shape[0] == 0:
        return True
    whole = bool(np.isfinite(head).all()) and bool((head == np.floor(head)).all())
    if not whole or head.min() < 0 or not 1 <= head[0, 0] < 64 or np.ptp(head[:, 0]) > 0:
        return False
    return len(np.unique(head[:, 1:], axis=0)) == head.shape[0]


def open_pt(path: Path) -> Source:
    content = _load_pt(path)
    coords = None
    if isinstance(content, dict):
        key = next((key for key in FEATURE_KEYS if key in content), None)
        if key is None:
            found = ", ".join(str(name) for name in list(content)[:8]) or "nothing"
            raise BagFileError(
                f"{path} holds a dictionary with {found}; a bag must have one of "
                f"{', '.join(FEATURE_KEYS)}, and may have coords"
            )
        content, coords = content[key], content.get("coords")
    if isinstance(content, list | tuple) and content:
        # eva saves a list, of patches or of groups of patches
        tensors = [part for part in content if isinstance(part, Tensor) and part.dim() in (1, 2)]
        if len(tensors) == len(content) and len({part.shape[-1] for part in tensors}) == 1:
            content = torch.cat([torch.atleast_2d(part) for part in tensors])
    if not isinstance(content, Tensor) or content.layout != torch.strided:
        raise BagFileError(
            f"{path} holds {_describe(content)}; a bag must be a dense tensor (patches, width), "
            "or a dictionary with features and coords"
        )
    if coords is not None and not isinstance(coords, Tensor):
        raise BagFileError(f"{path}: coords is {_describe(coords)}; it must be a tensor")
    features = content.detach()
    return Source(
        shape=tuple(features.shape),
        # a view of a larger saved tensor would keep all of it alive
        load=lambda: features.clone(memory_format=torch.contiguous_format),
        coords_shape=None if coords is None else tuple(coords.shape),
        load_coords=None if coords is None else lambda: coords.detach().clone(),
        coords_unit=None if coords is None else "px",
        patch_size_level0=None,
        encoder=None,
        layout="pt",
    )


def _describe(content: Any) -> str:
    if isinstance(content, Tensor):
        return f"a tensor with layout {content.layout}"
    return f"a {type(content).__name__}"


def _load_pt(path: Path) -> Any:
    # files of torch 1.6 and later are zip archives, which can be mapped; older ones are not
    mapped = zipfile.is_zipfile(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        graph = next((name for name in _globals_of(path) if "torch_geometric" in name), None)
        if graph is not None:
            raise BagFileError(
                f"{path} holds a graph ({graph}), which cannot be read without running code from "
                "the file; where torch_geometric is installed, save its node features as a bag: "
                'torch.save({"features": graph.x, "coords": graph.centroid}, ...)'
            ) from error
        others = [name for name in _globals_of(path) if not name.startswith(("torch", "collect"))]
        if others:
            raise BagFileError(
                f"{path} holds Python objects ({', '.join(sorted(set(others))[:3])}), which are "
                "not read because that runs code from the file; it must hold a tensor, or a "
                "dictionary with features and coords"
            ) from error
        reason = str(error).strip().splitlines()
        raise BagFileError(
            f"{path} cannot be read as a .pt file, it is damaged, cut short or no torch file "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'})"
        ) from error


def _globals_of(path: Path) -> list[str]:
    """Names the file's pickle would import, found without running it."""
    names: list[str] = []
    try:
        with path.open("rb") as stream:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    member = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                    _collect_globals(archive.open(member), names)
            else:
                # a legacy file is a row of pickles; the content is the fourth
                for _ in range(4):
                    _collect_globals(stream, names)
    except Exception:
        # a damaged file: whatever was found until here
        return names
    return names


def _collect_globals(stream: Any, names: list[str]) -> None:
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(stream):
        if code.name == "GLOBAL":
            names.append(str(argument).replace(" ", "."))
        elif code.name == "STACK_GLOBAL":
            names.append(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
