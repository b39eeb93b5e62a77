"""Real slides are tiled and encoded; the encoder's numbers mean what their names say."""

from __future__ import annotations

import struct

import h5py
import numpy as np
import pytest

from survfuse.data.packing import pack
from survfuse.data.readers import read_bag
from survfuse.data.slides import ENCODER, SlideError, _otsu, encode_slide, tile_slide
from survfuse.data.store import BagStore
from survfuse.data.texture import FEATURE_NAMES, describe_patches


@pytest.fixture
def tcga(shared_data):
    """A TCGA-HNSC section without micrometres per pixel."""
    return shared_data / "slides" / "tcga-cr-7395-01a-01-ts1.svs"


@pytest.fixture
def cmu(shared_data):
    """0.499 micrometres per pixel."""
    return shared_data / "slides" / "cmu-1-small-region.svs"


def test_tissue_patches_of_the_tcga_slide(tcga):
    """162 of the 221 tiles of 256 pixels are tissue; a few at the edge may go either way."""
    tiles = tile_slide(tcga, target_mpp=None)
    assert tiles.n_grid == 221
    assert abs(len(tiles.coords) - 162) <= 3
    assert (tiles.patch_size_level0, tiles.slide_mpp, tiles.target_mpp) == (256, None, None)
    assert (tiles.width, tiles.height) == (4443, 3567)
    assert bool((tiles.coords % 256 == 0).all())
    assert bool((tiles.coords.max(0) + 256 <= (4443, 3567)).all())
    assert len(np.unique(tiles.coords, axis=0)) == len(tiles.coords)
    assert bool((tiles.tissue >= 0.1).all())
    stricter = tile_slide(tcga, target_mpp=None, min_tissue=0.8)
    assert 0 < len(stricter.coords) < len(tiles.coords)


def test_a_slide_without_mpp_needs_a_word(tcga):
    with pytest.raises(SlideError, match=r"ts1\.svs does not say .*slide_mpp .* target_mpp=None"):
        tile_slide(tcga)
    tiles = tile_slide(tcga, slide_mpp=0.25)
    assert (tiles.patch_size_level0, tiles.n_grid) == (512, 48)
    assert (tiles.slide_mpp, tiles.target_mpp) == (0.25, 0.5)


def test_mpp_sets_the_size_on_the_slide(cmu):
    tiles = tile_slide(cmu)
    assert tiles.patch_size_level0 == round(256 * 0.5 / 0.499) == 257
    assert tile_slide(cmu, target_mpp=1.0).patch_size_level0 == 513
    assert tile_slide(cmu, slide_mpp=1.0).patch_size_level0 == 128
    assert tile_slide(cmu, target_mpp=None).target_mpp == 0.499


def test_patches_are_where_the_tissue_is(cmu):
    from openslide import OpenSlide

    tiles = tile_slide(cmu)
    kept = {tuple(corner) for corner in tiles.coords.tolist()}
    side = tiles.patch_size_level0
    columns = tiles.width // side
    inside, outside = [], []
    with OpenSlide(cmu) as slide:
        for i in range(tiles.n_grid):
            corner = (i % columns * side, i // columns * side)
            pixels = np.asarray(slide.read_region(corner, 0, (side, side)))[..., :3].astype(float)
            saturation = np.ptp(pixels, axis=2) / np.maximum(pixels.max(2), 1)
            (inside if corner in kept else outside).append(saturation.mean())
    assert min(inside) > max(outside) - 0.02
    assert np.mean(inside) > 3 * np.mean(outside)


def test_encoded_bag_is_in_tridents_layout(tmp_path, cmu):
    seen = []
    n_patches = encode_slide(
        cmu,
        tmp_path / "cmu.h5",
        target_mpp=1.0,
        progress=lambda done, total: seen.append((done, total)),
    )
    tiles = tile_slide(cmu, target_mpp=1.0)
    assert n_patches == len(tiles.coords) > 5
    assert seen[-1] == (n_patches, n_patches)
    bag = read_bag(tmp_path / "cmu.h5", check=True)
    assert (bag.layout, bag.encoder, bag.patch_size_level0) == ("trident", ENCODER, 513)
    assert bag.features.shape == (n_patches, len(FEATURE_NAMES))
    np.testing.assert_array_equal(bag.coords.numpy(), tiles.coords)
    with h5py.File(tmp_path / "cmu.h5", "r") as file:
        attributes = dict(file["coords"].attrs)
        assert file["features"].attrs["name"] == "cmu-1-small-region"
    assert attributes["level0_magnification"] == pytest.approx(20, rel=0.01)
    assert attributes["target_magnification"] == 10
    assert (attributes["level0_width"], attributes["level0_height"]) == (2220, 2967)
    assert list(tmp_path.iterdir()) == [tmp_path / "cmu.h5"]
    again = tmp_path / "again.h5"
    encode_slide(cmu, again, tiles=tiles)
    np.testing.assert_array_equal(read_bag(again).features.numpy(), bag.features.numpy())


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_patches_come_from_the_nearest_finer_level(tmp_path, tcga, factor):
    """The slide has levels of 1 and 2; a patch shrunk by 4 is made from the second."""
    from openslide import OpenSlide

    tiles = tile_slide(tcga, slide_mpp=0.5, target_mpp=0.5 * factor)
    tiles = tiles._replace(coords=tiles.coords[5:7])
    encode_slide(tcga, tmp_path / "s.h5", tiles=tiles)
    with OpenSlide(tcga) as slide:
        level = min(factor, 2) - 1
        extent = 256 * factor // (level + 1)
        regions = [
            slide.read_region(tuple(corner), level, (extent, extent)).convert("RGB")
            for corner in tiles.coords.tolist()
        ]
    patches = np.stack([np.asarray(region.resize((256, 256), 4)) for region in regions])
    features = read_bag(tmp_path / "s.h5").features.numpy()
    np.testing.assert_allclose(features, describe_patches(patches), atol=1e-5)


def test_real_slides_go_through_to_a_minibatch(tmp_path, tcga, cmu):
    encode_slide(tcga, tmp_path / "tcga.h5", slide_mpp=0.25, target_mpp=1.0)
    encode_slide(cmu, tmp_path / "cmu.h5", target_mpp=1.0)
    pack(tmp_path, tmp_path / "store.h5")
    bags = BagStore(tmp_path / "store.h5").bags()
    batch = bags.batch([[bags.index_of("tcga")], [], [bags.index_of("cmu")]])
    assert batch.present.tolist() == [True, False, True]
    assert batch.features.data_ptr() == bags.features.data_ptr()
    # no unknown magnification is made up
    assert bags.attributes["encoder"] == [ENCODER, ENCODER]


def test_a_slide_without_tissue_gives_an_empty_bag(tmp_path):
    glass = tmp_path / "glass.tiff"
    write_tiff(glass, np.full((1024, 1280, 3), 243, dtype=np.uint8))
    assert encode_slide(glass, tmp_path / "glass.h5", target_mpp=None) == 0
    assert read_bag(tmp_path / "glass.h5").features.shape == (0, len(FEATURE_NAMES))


def test_a_slide_that_is_all_tissue_is_kept_whole(tmp_path):
    pink = np.random.default_rng(0).normal((200, 120, 180), 12, (1024, 1280, 3))
    write_tiff(tmp_path / "full.tiff", pink.clip(0, 255).astype(np.uint8))
    tiles = tile_slide(tmp_path / "full.tiff", target_mpp=None, min_tissue=0.9)
    assert len(tiles.coords) == tiles.n_grid == 20


def test_a_slide_smaller_than_a_patch_has_none(tmp_path):
    write_tiff(tmp_path / "small.tiff", np.zeros((128, 512, 3), dtype=np.uint8))
    assert len(tile_slide(tmp_path / "small.tiff", target_mpp=None).coords) == 0


def write_tiff(path, pixels, side=256):
    """A tiled TIFF without compression, which OpenSlide reads as a slide without properties."""
    height, width, _ = pixels.shape
    rows, columns = -(-height // side), -(-width // side)
    padded = np.full((rows * side, columns * side, 3), 255, dtype=np.uint8)
    padded[:height, :width] = pixels
    tiles = padded.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
    n_bytes = side * side * 3
    # (tag, type 3 short or 4 long, values)
    fields = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [8, 8, 8]),
        (259, 3, [1]),
        (262, 3, [2]),
        (277, 3, [3]),
        (284, 3, [1]),
        (322, 4, [side]),
        (323, 4, [side]),
        (324, 4, [8 + i * n_bytes for i in range(len(tiles))]),
        (325, 4, [n_bytes] * len(tiles)),
    ]
    directory = 8 + len(tiles) * n_bytes
    beyond = directory + 2 + 12 * len(fields) + 4
    entries, extra = b"", b""
    for tag, kind, values in fields:
        content = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(content) > 4:
            value = struct.pack("<I", beyond + len(extra))
            extra += content + b"\0" * (-len(content) % 4)
        else:
            value = content.ljust(4, b"\0")
        entries += struct.pack("<HHI", tag, kind, len(values)) + value
    header = struct.pack("<2sHI", b"II", 42, directory)
    count, end = struct.pack("<H", len(fields)), struct.pack("<I", 0)
    path.write_bytes(header + tiles.tobytes() + count + entries + end + extra)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 4}, "patch_size is 4; it must be at least 8"),
        ({"min_tissue": 2.0}, "min_tissue is 2.0; it must be between 0 and 1"),
        ({"target_mpp": 0.0}, "target_mpp is 0.0; it must be positive"),
        ({"slide_mpp": float("nan")}, "slide_mpp is nan; it must be positive"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        tile_slide(tmp_path / "s.svs", **arguments)


def test_files_that_are_no_slide(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no slide .*s\.svs"):
        tile_slide(tmp_path / "s.svs")
    (tmp_path / "s.svs").write_bytes(b"no slide")
    with pytest.raises(SlideError, match=r"s\.svs cannot be read by OpenSlide"):
        encode_slide(tmp_path / "s.svs", tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


def described(pixels) -> dict[str, float]:
    pixels = np.asarray(pixels, dtype=np.uint8)
    return dict(zip(FEATURE_NAMES, describe_patches(pixels[None])[0].tolist()))


def test_feature_names_are_96_different_ones():
    assert len(FEATURE_NAMES) == len(set(FEATURE_NAMES)) == 96


def test_a_flat_patch():
    row = described(np.full((64, 64, 3), 128))
    assert row["density_mean_r"] == pytest.approx(np.log10(256 / 129), abs=1e-5)
    assert row["value_mean"] == pytest.approx(128 / 255, abs=1e-5)
    assert row["grey_p05"] == row["grey_p95"] == pytest.approx(128 / 255, abs=1e-5)
    for name in ("saturation_mean", "density_std_g", "gradient_full_mean", "grey_entropy"):
        assert row[name] == pytest.approx(0, abs=1e-5)
    # every neighbour of a flat pixel is at least as bright: eight ones
    assert row["lbp_grey_8"] == 1.0
    assert row["tissue"] == 0.0


def test_stains_are_told_apart():
    density = {"haematoxylin": (0.65, 0.70, 0.29), "eosin": (0.07, 0.99, 0.11)}
    for stain, other in (("haematoxylin", "eosin"), ("eosin", "haematoxylin")):
        vector = np.array(density[stain]) / np.linalg.norm(density[stain])
        row = described(np.full((16, 16, 3), 1) * np.rint(256 * 10 ** (-0.6 * vector) - 1))
        assert row[f"{stain}_mean"] == pytest.approx(0.6, abs=0.02)
        assert row[f"{other}_mean"] == pytest.approx(0.0, abs=0.02)
        assert row[f"{stain}_bin5"] + row[f"{stain}_bin6"] == pytest.approx(1.0)
        assert row["tissue"] == 1.0


def test_direction_and_hue():
    stripes = np.zeros((64, 64, 3))
    stripes[:, ::8] = 255
    assert described(stripes)["coherence"] == pytest.approx(1.0, abs=1e-4)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    assert described(noise)["coherence"] < 0.1
    assert described(noise)["grey_entropy"] > 7
    red = described(np.broadcast_to([200, 20, 20], (64, 64, 3)))
    assert (red["hue_cos"], red["hue_sin"]) == pytest.approx((1.0, 0.0), abs=1e-4)


def test_shares_sum_to_one_and_turning_changes_no_pattern():
    patch = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    row, turned = described(patch), described(np.rot90(patch))
    for stem in ("lbp_grey_", "lbp_grey_half_", "lbp_haematoxylin_"):
        shares = [row[f"{stem}{i}"] for i in range(10)]
        assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert sum(row[f"gradient_half_bin{i}"] for i in range(8)) == pytest.approx(1.0, abs=1e-5)
    for name, value in row.items():
        assert turned[name] == pytest.approx(value, abs=1e-4), name


def test_patches_are_described_one_by_one():
    patches = np.random.default_rng(2).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    together = describe_patches(patches)
    assert together.dtype == np.float32
    assert bool(np.isfinite(together).all())
    for i in range(3):
        np.testing.assert_allclose(together[i], describe_patches(patches[i : i + 1])[0], rtol=1e-5)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (np.zeros((1, 16, 16, 3)), "patches is float64"),
        (np.zeros((16, 16, 3), dtype=np.uint8), r"shape \(16, 16, 3\)"),
        (np.zeros((1, 4, 16, 3), dtype=np.uint8), "at least 8 by 8"),
    ],
)
def test_bad_patches(patches, message):
    with pytest.raises(ValueError, match=message):
        describe_patches(patches)


def test_otsu_separates_two_classes():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.1, 0.02, 700), rng.normal(0.6, 0.05, 300)])
    assert 0.15 < _otsu(values.clip(0, 1)) < 0.45
    assert 0.0 <= _otsu(np.full(10, 0.3)) <= 1.0
