"""Every published layout is read as its tool wrote it; everything else fails with a clear word."""

from __future__ import annotations

import collections
import pickle
import re

import h5py
import numpy as np
import pytest
import torch

from survfuse.data.layouts import BagFileError
from survfuse.data.readers import bag_name, read_bag, read_header

N, D = 37, 16


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((N, D)).astype(np.float32)


@pytest.fixture
def places() -> np.ndarray:
    return np.stack(np.divmod(np.arange(N), 7), axis=1) * 512


def write_clam(path, values, places):
    """CLAM, `extract_features_fp.py`: resizable, chunks of 32 rows, no attributes."""
    with h5py.File(path, "w") as file:
        for name, data in (("features", values), ("coords", places.astype(np.int32))):
            file.create_dataset(
                name, data=data, chunks=(32, data.shape[1]), maxshape=(None, data.shape[1])
            )


def write_trident(path, values, places, chunk=True):
    """TRIDENT, `save_h5`: chunks of one row, attributes on both, None as a word."""
    with h5py.File(path, "w") as file:
        chunks = (1, values.shape[1]) if chunk and values.size else None
        data = file.create_dataset("features", data=values, chunks=chunks)
        data.attrs.update({"name": "s", "savetodir": "/x", "encoder": "uni_v1"})
        coords = file.create_dataset("coords", data=places.astype(np.int64))
        coords.attrs.update(
            {
                "patch_size": 256,
                "patch_size_level0": 512,
                "level0_magnification": 40,
                "target_magnification": 20,
                "overlap": 0,
                "name": "None",
                "level0_width": 10000,
                "level0_height": 9000,
            }
        )


def write_stamp(path, values, places):
    with h5py.File(path, "w") as file:
        file["feats"] = values.astype(np.float16)
        file["coords"] = places * 0.25
        file.attrs.update(
            {
                "stamp_version": "2.5.0",
                "extractor": "ctranspath",
                "unit": "um",
                "tile_size_um": 256.0,
                "tile_size_px": 224,
                "code_hash": "0",
                "feat_type": "tile",
            }
        )


def test_clam(tmp_path, values, places):
    write_clam(tmp_path / "s.h5", values, places)
    bag = read_bag(tmp_path / "s.h5")
    assert (bag.layout, bag.coords_unit) == ("clam", "px")
    assert (bag.patch_size_level0, bag.encoder) == (None, None)
    np.testing.assert_array_equal(bag.features.numpy(), values)
    np.testing.assert_array_equal(bag.coords.numpy(), places)


def test_clam_coords_attributes_give_the_patch_size(tmp_path, values, places):
    write_clam(tmp_path / "s.h5", values, places)
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file["coords"].attrs.update({"patch_size": 256, "downsample": (4.0, 4.0)})
    assert read_bag(tmp_path / "s.h5").patch_size_level0 == 1024


def test_trident_in_both_precisions(tmp_path, values, places):
    for dtype in (np.float16, np.float32):
        write_trident(tmp_path / "s.h5", values.astype(dtype), places)
        bag = read_bag(tmp_path / "s.h5")
        assert (bag.layout, bag.encoder, bag.patch_size_level0) == ("trident", "uni_v1", 512)
        np.testing.assert_array_equal(bag.features.numpy(), values.astype(dtype))
        np.testing.assert_array_equal(bag.coords.numpy(), places)


def test_trident_slides_without_tissue(tmp_path, places):
    write_trident(tmp_path / "a.h5", np.zeros((0, D), dtype=np.float32), places[:0])
    assert read_bag(tmp_path / "a.h5").features.shape == (0, D)
    write_trident(tmp_path / "b.h5", np.zeros(0, dtype=np.float32), places[:0], chunk=False)
    assert read_bag(tmp_path / "b.h5").features.shape == (0, 0)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["features"] = np.zeros((0, D), dtype=np.float32)
        file["coords"] = np.zeros(0, dtype=np.int64)
    assert read_bag(tmp_path / "c.h5").coords is None


def test_stamp(tmp_path, values, places):
    write_stamp(tmp_path / "s.h5", values, places)
    bag = read_bag(tmp_path / "s.h5")
    assert (bag.layout, bag.coords_unit, bag.encoder) == ("stamp", "um", "ctranspath")
    assert bag.features.dtype == torch.float16
    np.testing.assert_array_equal(bag.coords.numpy(), places * 0.25)


def test_stamp_fallback_key_and_missing_unit(tmp_path, values, places):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["patch_embeddings"] = values
        file["coords"] = places
    bag = read_bag(tmp_path / "s.h5")
    assert (bag.layout, bag.coords_unit) == ("stamp", None)
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs["tile_size_um"] = 256.0
    assert read_bag(tmp_path / "s.h5").coords_unit == "um"


def test_subspace(tmp_path, values):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["Res_feature"] = values[None]
    bag = read_bag(tmp_path / "s.h5")
    assert (bag.layout, bag.coords) == ("subspace", None)
    np.testing.assert_array_equal(bag.features.numpy(), values)


def test_clam_derived_leading_dimension(tmp_path, values, places):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = values[None], places[None]
    bag = read_bag(tmp_path / "s.h5")
    assert bag.layout == "clam-derived"
    np.testing.assert_array_equal(bag.features.numpy(), values)
    np.testing.assert_array_equal(bag.coords.numpy(), places)


def test_bfloat16_in_h5_and_other_byte_order(tmp_path, values):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        rows = torch.from_numpy(values).bfloat16()
        file["features"] = rows.view(torch.uint16).numpy()
        file["features"].attrs["dtype"] = "bfloat16"
    assert torch.equal(read_bag(tmp_path / "s.h5").features, rows)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["features"] = values.astype(">f4")
    np.testing.assert_array_equal(read_bag(tmp_path / "b.h5").features.numpy(), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pt_tensors_of_every_type(tmp_path, values, dtype):
    rows = torch.from_numpy(values).to(dtype)
    torch.save(rows, tmp_path / "s.pt")
    bag = read_bag(tmp_path / "s.pt")
    assert bag.layout == "pt"
    assert bag.features.dtype == dtype
    assert torch.equal(bag.features, rows)


def test_pt_dictionary_leading_dimension_and_old_format(tmp_path, values, places):
    content = {"features": torch.from_numpy(values)[None], "coords": torch.from_numpy(places)}
    torch.save(content, tmp_path / "s.pt", _use_new_zipfile_serialization=False)
    bag = read_bag(tmp_path / "s.pt")
    np.testing.assert_array_equal(bag.features.numpy(), values)
    np.testing.assert_array_equal(bag.coords.numpy(), places)
    assert bag.coords_unit == "px"


def test_pt_with_gradient_or_strides(tmp_path, values):
    torch.save(torch.from_numpy(values).T.contiguous().T.requires_grad_(), tmp_path / "s.pt")
    bag = read_bag(tmp_path / "s.pt")
    assert not bag.features.requires_grad
    assert bag.features.is_contiguous()
    np.testing.assert_array_equal(bag.features.numpy(), values)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_eva_lists_of_patches(tmp_path, shape):
    parts = [torch.full(shape, float(i)) for i in range(3)]
    torch.save(parts, tmp_path / "s.pt")
    bag = read_bag(tmp_path / "s.pt")
    assert torch.equal(bag.features, torch.cat([part.reshape(-1, 4) for part in parts]))


def test_npy(tmp_path, values):
    np.save(tmp_path / "s.npy", values.astype(np.float16))
    bag = read_bag(tmp_path / "s.npy")
    assert (bag.layout, bag.coords, bag.features.dtype) == ("npy", None, torch.float16)
    np.testing.assert_array_equal(bag.features.numpy(), values.astype(np.float16))


def test_histossl_prefix(tmp_path, values):
    """HistoSSLscaling: level, x and y of DeepZoom before the features."""
    x, y = np.divmod(np.arange(N), 6)
    prefixed = np.column_stack([np.full(N, 17), x, y, values]).astype(np.float32)
    np.save(tmp_path / "features.npy", prefixed)
    bag = read_bag(tmp_path / "features.npy")
    assert (bag.layout, bag.coords_unit) == ("histossl", "tile")
    np.testing.assert_array_equal(bag.features.numpy(), values)
    np.testing.assert_array_equal(bag.coords.numpy(), np.column_stack([x, y]))
    assert read_header(tmp_path / "features.npy")[:3] == (N, D, True)


@pytest.mark.parametrize(
    "head",
    [
        np.zeros((N, 3)),  # ReLU features that are zero
        np.column_stack([np.full(N, 17.0), np.zeros(N), np.zeros(N)]),  # one place many times
        np.column_stack([np.full(N, 17.5), np.arange(N), np.zeros(N)]),  # no whole level
        np.column_stack([np.arange(N) + 1, np.arange(N), np.zeros(N)]),  # several levels
        np.column_stack([np.full(N, 17.0), -np.arange(N), np.zeros(N)]),  # negative place
        np.column_stack([np.full(N, np.nan), np.arange(N), np.zeros(N)]),
    ],
)
def test_what_only_resembles_a_prefix_is_kept(tmp_path, values, head):
    matrix = np.column_stack([head, values]).astype(np.float32)
    np.save(tmp_path / "s.npy", matrix)
    bag = read_bag(tmp_path / "s.npy")
    assert bag.layout == "npy"
    np.testing.assert_array_equal(bag.features.numpy(), matrix)


def test_one_row(tmp_path, values, places):
    write_trident(tmp_path / "s.h5", values[:1], places[:1])
    assert read_bag(tmp_path / "s.h5").features.shape == (1, D)
    np.save(tmp_path / "s.npy", values[:1])
    assert read_bag(tmp_path / "s.npy").features.shape == (1, D)


@pytest.mark.parametrize("suffix", ["h5", "pt", "npy"])
def test_header_agrees_with_the_bag(tmp_path, values, places, suffix):
    path = tmp_path / f"s.{suffix}"
    if suffix == "h5":
        write_trident(path, values, places)
    elif suffix == "pt":
        torch.save(torch.from_numpy(values), path)
    else:
        np.save(path, values)
    header, bag = read_header(path), read_bag(path)
    assert (header.n_rows, header.width) == bag.features.shape
    assert header.has_coords == (bag.coords is not None)
    assert header[3:] == bag[2:]


def test_nonfinite_values_are_counted(tmp_path, values):
    values[20, 3], values[5, 1], values[5, 2] = np.nan, np.inf, -np.inf
    np.save(tmp_path / "s.npy", values)
    assert read_bag(tmp_path / "s.npy").nonfinite() == (3, 5)
    with pytest.raises(BagFileError, match=r"s\.npy: 3 features are NaN or infinite, .* row 5 "):
        read_bag(tmp_path / "s.npy", check=True)
    np.save(tmp_path / "t.npy", values[6:20])
    assert read_bag(tmp_path / "t.npy", check=True).nonfinite() is None


def test_nonfinite_row_beyond_the_first_block(tmp_path):
    values = np.zeros((40000, 2), dtype=np.float16)
    values[39999, 1] = np.nan
    np.save(tmp_path / "s.npy", values)
    assert read_bag(tmp_path / "s.npy").nonfinite() == (1, 39999)


@pytest.mark.parametrize("suffix", ["h5", "pt", "npy"])
def test_cut_in_half(tmp_path, values, places, suffix):
    path = tmp_path / f"slide_7.{suffix}"
    if suffix == "h5":
        write_clam(path, values, places)
    elif suffix == "pt":
        torch.save(torch.from_numpy(values), path)
    else:
        np.save(path, values)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BagFileError, match=rf"slide_7\.{suffix} .*cut short|slide_7.npy cannot"):
        read_bag(path)


def test_damaged_rows_name_the_file(tmp_path, values):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("features", data=values, chunks=(8, D), compression="gzip")
        offset = file["features"].id.get_chunk_info(0).byte_offset
    with (tmp_path / "s.h5").open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 40)
    with pytest.raises(BagFileError, match=r"s\.h5: its rows cannot be read"):
        read_bag(tmp_path / "s.h5")


def h5_with(**datasets):
    def write(path):
        with h5py.File(path, "w") as file:
            for name, data in datasets.items():
                file[name] = data

    return write


def h5_with_group(group, **datasets):
    def write(path):
        h5_with(**datasets)(path)
        with h5py.File(path, "a") as file:
            file.create_group(group)

    return write


def h5_attr(**attributes):
    def write(path):
        with h5py.File(path, "w") as file:
            file["feats"] = np.zeros((2, 4), dtype=np.float32)
            file.attrs.update(attributes)

    return write


class Custom:
    """Something a feature file should not hold."""


BAD = [
    ("s.h5", h5_with(coords=np.zeros((3, 2))), "holds coords; .* patches only"),
    ("s.h5", h5_with(labels=np.zeros(3), x=np.zeros(3)), "holds labels, x; a bag must hold"),
    ("s.h5", h5_with(), "holds nothing"),
    ("s.h5", h5_with(**{"features/a": np.zeros(3)}), "'features' is a group"),
    ("s.h5", h5_with(features=np.zeros(8)), "one vector of 8 numbers, a slide-level"),
    ("s.h5", h5_with(features=np.zeros((2, 3, 4))), r"shape \(2, 3, 4\)"),
    ("s.h5", h5_with(features=np.float32(3)), r"shape \(\)"),
    ("s.h5", h5_with(features=np.zeros((3, 0))), "a patch needs features"),
    ("s.h5", h5_with(features=np.zeros((3, 4), dtype=np.int32)), "are torch.int32"),
    ("s.h5", h5_with(features=np.zeros((3, 4), dtype=np.uint16)), "are torch.uint16"),
    ("s.h5", h5_with(features=np.array([[b"a"]])), "s.h5: "),
    (
        "s.h5",
        h5_with(features=np.zeros((3, 4)), coords=np.zeros((2, 2))),
        r"coords has shape \(2, 2\) for 3 patches; it must be \(3, 2\)",
    ),
    ("s.h5", h5_with_group("coords", features=np.zeros((3, 4))), "'coords' is a group"),
    ("s.h5", h5_attr(feat_type="slide"), "slide-level features"),
    ("s.h5", h5_attr(format="survfuse-bags"), "open it with survfuse.data.BagStore"),
    ("s.h5", lambda path: path.write_bytes(b"not hdf5 at all"), "is no HDF5 file"),
    ("s.h5", lambda path: path.touch(), r"is empty \(0 bytes\)"),
    ("s.h5", lambda path: path.mkdir(), "is a folder"),
    ("s.zarr", lambda path: path.write_bytes(b"x"), "cannot read '.zarr'"),
    ("features", lambda path: path.write_bytes(b"x"), "a file without suffix"),
    ("s.npy", lambda path: np.save(path, np.zeros((3, 4), dtype=int)), "features must be floating"),
    ("s.npy", lambda path: np.save(path, np.array([{}])), "cannot be read as .npy"),
    ("s.npy", lambda path: path.write_bytes(b"garbage"), "cannot be read as .npy"),
    ("s.pt", lambda path: torch.save({"x": torch.zeros(2, 3)}, path), "a dictionary with x"),
    ("s.pt", lambda path: torch.save([torch.zeros(2, 3), 1], path), "holds a list"),
    ("s.pt", lambda path: torch.save([torch.zeros(2), torch.zeros(3)], path), "holds a list"),
    ("s.pt", lambda path: torch.save(torch.zeros(3, dtype=torch.int64), path), "one vector"),
    ("s.pt", lambda path: torch.save(torch.eye(3).to_sparse(), path), "layout torch.sparse_coo"),
    (
        "s.pt",
        lambda path: torch.save({"features": torch.zeros(2, 3), "coords": [1]}, path),
        "coords is a list",
    ),
    ("s.pt", lambda path: torch.save(Custom(), path), r"Python objects \(.*Custom\)"),
    ("s.pt", lambda path: path.write_bytes(b"garbage"), "damaged, cut short or no torch file"),
    (
        "s.pt",
        lambda path: path.write_bytes(pickle.dumps(collections.Counter("ab"))),
        "cannot be read as a .pt file",
    ),
]


@pytest.mark.parametrize(("name", "write", "message"), BAD)
def test_anything_else_fails_with_a_clear_word(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(BagFileError, match=message) as caught:
        read_bag(path)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*s\.h5"):
        read_bag(tmp_path / "s.h5")


def test_no_code_of_the_file_runs(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save(Payload(), tmp_path / "s.pt")
    with pytest.raises(BagFileError, match=re.escape("_io.open") + "|Python objects"):
        read_bag(tmp_path / "s.pt")
    assert not (tmp_path / "ran").exists()


def test_real_graphs_and_vectors_fail_clearly(shared_data):
    graph = next((shared_data / "bags").glob("TCGA-HT-7470*.pt"))
    with pytest.raises(BagFileError, match=r"holds a graph \(torch_geometric\.data\.data\.Data\)"):
        read_bag(graph)
    with pytest.raises(BagFileError, match="one vector of 1536 numbers"):
        read_bag(shared_data / "bags" / "prov_normal_000_1.pt")


def test_names():
    assert bag_name("a/TCGA-XF-A9SL-01Z-00-DX1.0A2C.h5") == "TCGA-XF-A9SL-01Z-00-DX1.0A2C"
    assert bag_name("a/slide.svs.h5") == "slide"
    assert bag_name("a/slide.svs/features.npy") == "slide"
    # not the characters of ".svs": that would eat the end of this one
    assert bag_name("a/lens.pt") == "lens"
