"""The store: what is written is what is mapped, and damage is noticed."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import torch

from survfuse.data.bags import Bags
from survfuse.data.layouts import BagFileError
from survfuse.data.store import BagStore
from survfuse.data.store_file import StorePlan, StoreWriter, bytes_text, create_store

WIDTH = 1029


@pytest.fixture
def bags() -> Bags:
    matrices = [torch.randn(n, WIDTH) for n in (5, 0, 1, 12)]
    return Bags.from_list(
        matrices,
        ["a", "empty", "c", "d"],
        coords=[torch.rand(5, 2), None, None, torch.rand(12, 2) * 1e5],
        attributes={
            "encoder": ["uni", None, None, "uni"],
            "patch_size_level0": [256.0, None, 512.0, None],
        },
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_round_trip(tmp_path, bags, dtype):
    store = BagStore.write(tmp_path / "s.h5", bags, dtype=dtype)
    store.verify()
    read = store.bags()
    assert (len(store), store.names, store.lengths) == (4, bags.names, [5, 0, 1, 12])
    assert read.features.dtype == getattr(torch, dtype)
    assert torch.equal(read.features, bags.features.to(read.features.dtype))
    torch.testing.assert_close(read.coords, bags.coords, rtol=0, atol=0, equal_nan=True)
    assert read.attributes["encoder"] == ["uni", None, None, "uni"]
    assert read.attributes["patch_size_level0"] == [256.0, None, 512.0, None]
    assert list(tmp_path.iterdir()) == [tmp_path / "s.h5"]


def test_layout_is_what_the_documentation_says(tmp_path, bags):
    BagStore.write(tmp_path / "s.h5", bags, dtype="bfloat16")
    with h5py.File(tmp_path / "s.h5", "r") as file:
        data = file["features"]
        assert (data.dtype, data.shape, data.chunks) == (np.uint16, (18, 1032), None)
        assert (data.attrs["dtype"], data.attrs["width"]) == ("bfloat16", WIDTH)
        assert data.id.get_offset() % 4096 == 0
        np.testing.assert_array_equal(data[:, WIDTH:], 0)
        rows = torch.from_numpy(data[:, :WIDTH]).view(torch.bfloat16)
        assert torch.equal(rows, bags.features.bfloat16())
        assert file["bags/names"].asstr()[()].tolist() == bags.names


def test_default_type_is_that_of_the_bags(tmp_path):
    for dtype, expected in ((torch.float16, "float16"), (torch.float64, "float32")):
        bags = Bags.from_list([torch.ones(2, 4, dtype=dtype)], ["a"])
        assert BagStore.write(tmp_path / "s.h5", bags).dtype == expected


def test_reading_copies_nothing(tmp_path, bags):
    store = BagStore.write(tmp_path / "s.h5", bags)
    read = store.bags()
    batch = read.batch([[3], [], [0]])
    assert store.features.data_ptr() == read.features.data_ptr() == batch.features.data_ptr()
    assert batch.features.stride() == (1032, 1)
    assert batch.features.data_ptr() % 16 == 0
    assert batch.coords.data_ptr() == store.coords.data_ptr()
    assert store.bags(["d", "a"]).features.data_ptr() == store.features.data_ptr()
    # the pages are the file's: what is written to it shows
    with (tmp_path / "s.h5").open("r+b") as file, h5py.File(tmp_path / "s.h5", "r") as header:
        file.seek(header["features"].id.get_offset())
        file.write(np.float32(7).tobytes())
    assert store.features[0, 0] == 7


def test_writing_to_the_view_never_reaches_the_file(tmp_path, bags):
    store = BagStore.write(tmp_path / "s.h5", bags)
    store.features.zero_()
    again = BagStore(tmp_path / "s.h5")
    assert torch.equal(again.features, bags.features)
    again.verify()


def test_a_store_that_may_not_be_written_can_be_read(tmp_path, bags):
    BagStore.write(tmp_path / "s.h5", bags)
    (tmp_path / "s.h5").chmod(0o444)
    BagStore(tmp_path / "s.h5").verify()


def test_pickling_carries_the_path_only(tmp_path, bags):
    store = BagStore.write(tmp_path / "s.h5", bags)
    content = pickle.dumps(store)
    assert len(content) < 500
    assert torch.equal(pickle.loads(content).features, store.features)


def test_a_name_that_is_not_the_one_written_is_refused_on_opening(tmp_path, bags):
    path = tmp_path / "s.h5"
    BagStore.write(path, bags)
    with h5py.File(path, "a") as file:
        file["bags/names"][0] = "another"
    with pytest.raises(BagFileError, match=r"s\.h5 is damaged: names, lengths or other columns"):
        BagStore(path)


@pytest.mark.parametrize("where", ["features", "coords"])
def test_verify_names_the_damaged_bag(tmp_path, bags, where):
    store = BagStore.write(tmp_path / "s.h5", bags)
    with h5py.File(tmp_path / "s.h5", "r") as file:
        offset, row = file[where].id.get_offset(), file[where].shape[1] * 4
    with (tmp_path / "s.h5").open("r+b") as file:
        # bag "d" begins at row 6; its last row
        file.seek(offset + 17 * row)
        byte = file.read(1)
        file.seek(offset + 17 * row)
        file.write(bytes([byte[0] ^ 1]))
    seen = []
    with pytest.raises(BagFileError, match=r"the rows of 1 of 4 bags are not .*: d; pack"):
        store.verify(progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)


def test_store_without_rows(tmp_path):
    bags = Bags(torch.zeros(0, 12), [0, 0], ["a", "b"])
    store = BagStore.write(tmp_path / "s.h5", bags)
    store.verify()
    assert store.bags().batch([[0], [1]]).present.tolist() == [False, False]
    assert store.width == 12


def test_rows_beyond_2_to_the_31_elements(tmp_path):
    """A sparse file of 4.4 GB: only the last bag's rows take room on the disk."""
    rows, width = 2_150_000, 1024
    plan = StorePlan(
        dtype="bfloat16",
        width=width,
        lengths=[rows - 3, 3],
        has_coords=False,
        columns={
            "names": ["long", "last"],
            **{key: ["", ""] for key in ("encoder", "layout", "coords_unit", "source")},
        },
        patch_size_level0=[0.0, 0.0],
    )
    assert rows * width > 2**31
    create_store(tmp_path / "s.h5", plan)
    writer = StoreWriter(tmp_path / "s.h5", plan)
    last = torch.randn(3, width).bfloat16()
    writer.write_bag(1, last, None)
    writer.close()
    if (tmp_path / "s.h5").stat().st_blocks * 512 > 2**30:
        pytest.skip("this file system has no sparse files")
    bags = BagStore(tmp_path / "s.h5").bags()
    batch = bags.batch([[1]])
    start = int(batch.ragged.starts[0])
    assert start == rows - 3
    assert torch.equal(batch.features[start : start + 3], last)


def test_a_mapping_may_be_larger_than_memory(tmp_path):
    """Private writable mappings are counted as memory unless asked otherwise."""
    limit = 4 * 1024 * 2**30
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("the address space is limited here")
    from survfuse.data.store import _map_file

    with (tmp_path / "s").open("wb") as file:
        try:
            file.truncate(limit)
        except OSError:
            pytest.skip("this file system has no files of 4 TB")
    assert _map_file(tmp_path / "s").size == limit


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b"nothing of use"), "is no store, damaged or cut short"),
        (lambda path: h5py.File(path, "w").close(), "an HDF5 file but no store"),
    ],
)
def test_what_is_no_store(tmp_path, write, message):
    write(tmp_path / "s.h5")
    with pytest.raises(BagFileError, match=message):
        BagStore(tmp_path / "s.h5")


def test_cut_in_half(tmp_path, bags):
    BagStore.write(tmp_path / "s.h5", bags)
    content = (tmp_path / "s.h5").read_bytes()
    (tmp_path / "s.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(BagFileError, match=r"s\.h5 is no store, damaged or cut short"):
        BagStore(tmp_path / "s.h5")


def test_later_version_and_inconsistent_lengths(tmp_path, bags):
    BagStore.write(tmp_path / "s.h5", bags)
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(BagFileError, match="store version 2; this survfuse reads up to 1"):
        BagStore(tmp_path / "s.h5")
    with h5py.File(tmp_path / "s.h5", "r+") as file:
        file.attrs["version"] = 1
        file["bags/lengths"][0] = 4
    with pytest.raises(BagFileError, match="17 patches in 18 rows"):
        BagStore(tmp_path / "s.h5")


def test_missing_store_and_unknown_type(tmp_path, bags):
    with pytest.raises(FileNotFoundError, match=r"there is no store .*s\.h5"):
        BagStore(tmp_path / "s.h5")
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of bfloat16"):
        BagStore.write(tmp_path / "s.h5", bags, dtype="int8")


def test_values_outside_float16_are_refused(tmp_path):
    bags = Bags.from_list([torch.tensor([[1.0, 70000.0]])], ["big"])
    with pytest.raises(BagFileError, match="big: the value 70000 is outside the range of float16"):
        BagStore.write(tmp_path / "s.h5", bags, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    # an infinite value is no overflow
    bags.features[0, 1] = torch.inf
    assert BagStore.write(tmp_path / "s.h5", bags, dtype="float16").features[0, 1] == torch.inf


def test_disk_full_leaves_nothing(tmp_path):
    """The limit on file sizes fails like a full disk, in a process of its own."""
    script = """
        import resource, sys, torch
        from survfuse.data.bags import Bags
        from survfuse.data.store import BagStore
        bags = Bags(torch.zeros(1000, 64), [1000], ["a"])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            BagStore.write(sys.argv[1], bags)
        except OSError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "s.h5")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "no room for the store: it needs 256 kB" in result.stdout, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_bytes_for_people():
    assert [bytes_text(n) for n in (5, 1500, 2_000_000_000, 7e15)] == [
        "5 B",
        "1.5 kB",
        "2 GB",
        "7e+03 TB",
    ]
