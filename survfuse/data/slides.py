"""Cut a whole-slide image into tissue patches and encode them without learned weights.

`tile_slide` finds the patches, `encode_slide` describes each by the colour and texture numbers of
`texture.py` and writes a bag in TRIDENT's HDF5 layout. The encoder is a plain baseline that runs
anywhere; features of a foundation model are read from the files other tools write.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from survfuse.data.atomic import atomic_path
from survfuse.data.texture import FEATURE_NAMES, describe_patches
from survfuse.extras import require

ENCODER = "survfuse-colour-texture-v1"
# side of a patch in the overview that tissue is found on
_OVERVIEW = 16
# Otsu's threshold is held in this range of saturation: on a slide that is all glass or all tissue
# it would split noise
_SATURATION = (0.05, 0.15)
_BATCH = 32


class SlideError(ValueError):
    """A slide cannot be tiled as asked; the message names the file and the way out."""


class TileGrid(NamedTuple):
    """Tissue patches of one slide."""

    coords: np.ndarray  # [N, 2] int64, upper left corners (x, y) in level-0 pixels
    tissue: np.ndarray  # [N] float, share of the patch that is tissue
    n_grid: int  # patches of the whole grid, glass included
    patch_size: int  # side of a patch as encoded, pixels
    patch_size_level0: int  # side of a patch on the slide, level-0 pixels
    slide_mpp: float | None  # micrometres per level-0 pixel
    target_mpp: float | None  # micrometres per pixel of a patch
    width: int  # slide, level-0 pixels
    height: int


def tile_slide(
    path: str | os.PathLike[str],
    *,
    patch_size: int = 256,
    target_mpp: float | None = 0.5,
    slide_mpp: float | None = None,
    min_tissue: float = 0.1,
) -> TileGrid:
    """Find the patches of a regular grid, without overlap, that hold tissue.

    Tissue is what is more saturated than Otsu's threshold on a blurred overview (16 pixels per
    patch side); the threshold is held between 0.05 and 0.15. Patches that would reach past the
    slide's edge are left out.

    Args:
        path: a slide OpenSlide reads.
        patch_size: side of a patch in pixels at `target_mpp`.
        target_mpp: micrometres per pixel patches are cut at, 0.5 for 20x; None cuts them in
            level-0 pixels, whatever those measure.
        slide_mpp: micrometres per level-0 pixel, overriding what the slide says.
        min_tissue: least share of a patch that must be tissue, 0 to 1.

    Returns:
        Patches in rows from the upper left. A slide without tissue gives none.

    Raises:
        ImportError: OpenSlide or Pillow is not installed.
        FileNotFoundError: there is no such file.
        SlideError: OpenSlide cannot read it or a region of it, or it does not say its micrometres
            per pixel and neither `slide_mpp` nor `target_mpp=None` was given.

    Source: Otsu, IEEE Trans. SMC 9, 1979 (threshold).
    """
    if patch_size < 8:
        raise ValueError(f"patch_size is {patch_size}; it must be at least 8 pixels")
    if not 0 <= min_tissue <= 1:
        raise ValueError(f"min_tissue is {min_tissue}; it must be between 0 and 1")
    for name, value in (("target_mpp", target_mpp), ("slide_mpp", slide_mpp)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}; it must be positive micrometres per pixel")
    path = Path(path)
    with _open_slide(path) as slide:
        mpp = slide_mpp if slide_mpp is not None else _mpp_of(path, slide)
        side = _side_level0(path, slide, patch_size, target_mpp, mpp)
        width, height = slide.dimensions
        columns, rows = width // side, height // side
        share = np.zeros((0, 0))
        if columns and rows:
            share = _tissue_share(path, slide, side, columns, rows)
    kept = np.argwhere(share >= min_tissue) if share.size else np.zeros((0, 2), dtype=np.int64)
    return TileGrid(
        coords=(kept[:, ::-1] * side).astype(np.int64),
        tissue=share[kept[:, 0], kept[:, 1]],
        n_grid=columns * rows,
        patch_size=patch_size,
        patch_size_level0=side,
        slide_mpp=mpp,
        target_mpp=target_mpp if target_mpp is not None else mpp,
        width=width,
        height=height,
    )


def encode_slide(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tiles: TileGrid | None = None,
    patch_size: int = 256,
    target_mpp: float | None = 0.5,
    slide_mpp: float | None = None,
    min_tissue: float = 0.1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Tile a slide, describe every tissue patch and write the bag `out` atomically.

    Args:
        path: a slide OpenSlide reads.
        out: the `.h5` to write, in TRIDENT's layout: `features` [N, 96] float32, `coords` [N, 2].
        tiles: patches to encode; by default those of `tile_slide` with the arguments below.
        patch_size: as `tile_slide`; so are `target_mpp`, `slide_mpp` and `min_tissue`.
        progress: called with patches done and patches in all.

    Returns:
        Number of patches N. A slide without tissue gives a bag without rows.

    Raises:
        As `tile_slide`; OSError when the bag cannot be written.
    """
    path = Path(path)
    require("h5py", extra="slides")
    if tiles is None:
        tiles = tile_slide(
            path,
            patch_size=patch_size,
            target_mpp=target_mpp,
            slide_mpp=slide_mpp,
            min_tissue=min_tissue,
        )
    n_patches = len(tiles.coords)
    features = np.zeros((n_patches, len(FEATURE_NAMES)), dtype=np.float32)
    with _open_slide(path) as slide:
        for begin in range(0, n_patches, _BATCH):
            corners = tiles.coords[begin : begin + _BATCH]
            patches = np.stack([_read_patch(path, slide, corner, tiles) for corner in corners])
            features[begin : begin + len(corners)] = describe_patches(patches)
            if progress is not None:
                progress(begin + len(corners), n_patches)
    _write_bag(Path(out), path.stem, features, tiles)
    return n_patches


def _open_slide(path: Path) -> Any:
    # OpenSlide's own import of Pillow would fail without a word about the extra
    require("PIL", extra="slides")
    openslide = require("openslide", extra="slides")
    if not path.is_file():
        raise FileNotFoundError(f"there is no slide {path}")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path} cannot be read by OpenSlide ({error})") from error


def _mpp_of(path: Path, slide: Any) -> float | None:
    """Micrometres per level-0 pixel as the slide says; None where it does not."""
    try:
        x, y = (float(slide.properties[f"openslide.mpp-{axis}"]) for axis in "xy")
    except (KeyError, ValueError):
        return None
    if not (x > 0 and y > 0):
        return None
    if abs(x - y) > 0.05 * max(x, y):
        raise SlideError(
            f"{path} has pixels of {x} by {y} micrometres; only square ones can be tiled (pass "
            "slide_mpp to treat them as square)"
        )
    return (x + y) / 2


def _side_level0(
    path: Path, slide: Any, patch_size: int, target_mpp: float | None, mpp: float | None
) -> int:
    if target_mpp is None:
        return patch_size
    if mpp is None:
        power = slide.properties.get("openslide.objective-power")
        hint = f" (its objective power is {power})" if power else ""
        raise SlideError(
            f"{path} does not say its micrometres per pixel{hint}; pass slide_mpp "
            "(--slide-mpp), for example 0.25 for a 40x and 0.5 for a 20x scan, or "
            "target_mpp=None (--level0) to cut patches in level-0 pixels"
        )
    side = round(patch_size * target_mpp / mpp)
    if side < 1:
        raise SlideError(f"{path}: {patch_size} pixels at {target_mpp} are less than one pixel")
    return side


def _tissue_share(path: Path, slide: Any, side: int, columns: int, rows: int) -> np.ndarray:
    """[rows, columns] share of each grid patch that is tissue."""
    image = require("PIL.Image", extra="slides")
    box = (columns * side, rows * side)
    level = slide.get_best_level_for_downsample(side / _OVERVIEW)
    downsample = slide.level_downsamples[level]
    overview = np.empty((rows * _OVERVIEW, columns * _OVERVIEW, 3), dtype=np.float32)
    # strips of patches: a slide with one level would not fit memory as a whole
    for row in range(rows):
        size = (max(1, round(box[0] / downsample)), max(1, round(side / downsample)))
        strip = _read_region(path, slide, (0, row * side), level, size)
        small = strip.resize((columns * _OVERVIEW, _OVERVIEW), image.Resampling.BOX)
        overview[row * _OVERVIEW : (row + 1) * _OVERVIEW] = np.asarray(small)
    high, low = overview.max(2), overview.min(2)
    saturation = (high - low) / np.maximum(high, 1.0)
    threshold = float(np.clip(_otsu(saturation), *_SATURATION))
    tissue = (saturation > threshold).reshape(rows, _OVERVIEW, columns, _OVERVIEW)
    return tissue.mean((1, 3))


def _otsu(values: np.ndarray) -> float:
    """The threshold that separates `values` in [0, 1] into the two most distinct classes."""
    counts, edges = np.histogram(values, bins=256, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)[:-1].astype(np.float64)
    above = counts.sum() - below
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sums[:-1] / below - (sums[-1] - sums[:-1]) / above
        between = np.where((below > 0) & (above > 0), below * above * gap**2, 0.0)
    return float(edges[1:-1][between.argmax()])


def _read_patch(path: Path, slide: Any, corner: np.ndarray, tiles: TileGrid) -> np.ndarray:
    """One patch [patch_size, patch_size, 3] uint8, read from the nearest finer level."""
    image = require("PIL.Image", extra="slides")
    side, size = tiles.patch_size_level0, tiles.patch_size
    # the small surplus lets a level of nominally the right size be used
    level = slide.get_best_level_for_downsample(side / size * 1.01)
    extent = max(1, round(side / slide.level_downsamples[level]))
    place = (int(corner[0]), int(corner[1]))
    region = _read_region(path, slide, place, level, (extent, extent))
    if extent != size:
        region = region.resize((size, size), image.Resampling.BOX)
    return np.asarray(region)


def _read_region(
    path: Path, slide: Any, place: tuple[int, int], level: int, size: tuple[int, int]
) -> Any:
    openslide = require("openslide", extra="slides")
    try:
        return _flatten(slide.read_region(place, level, size))
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: the region at {place} cannot be read ({error})") from error


def _flatten(region: Any) -> Any:
    """RGB on white: where a slide has no data OpenSlide gives transparent pixels."""
    image = require("PIL.Image", extra="slides")
    flat = image.new("RGB", region.size, (255, 255, 255))
    flat.paste(region, mask=region.getchannel("A"))
    return flat


def _write_bag(out: Path, name: str, features: np.ndarray, tiles: TileGrid) -> None:
    h5py = require("h5py", extra="slides")
    # TRIDENT writes the word where it does not know
    level0 = "None" if tiles.slide_mpp is None else 10.0 / tiles.slide_mpp
    target = "None" if tiles.target_mpp is None else 10.0 / tiles.target_mpp
    folder = str(out.parent)
    # in memory first: where the disk is full HDF5 crashes as it closes the file
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        data = file.create_dataset("features", data=features)
        data.attrs.update({"name": name, "savetodir": folder, "encoder": ENCODER})
        coords = file.create_dataset("coords", data=tiles.coords)
        coords.attrs.update(
            {
                "patch_size": tiles.patch_size,
                "patch_size_level0": tiles.patch_size_level0,
                "level0_magnification": level0,
                "target_magnification": target,
                "overlap": 0,
                "name": name,
                "savetodir": folder,
                "level0_width": tiles.width,
                "level0_height": tiles.height,
            }
        )
    with atomic_path(out) as temporary:
        try:
            temporary.write_bytes(content.getbuffer())
        except OSError as error:
            # a failed write does not know its file
            raise OSError(error.errno, f"cannot be written ({error.strerror})", str(out)) from error
