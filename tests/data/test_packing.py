"""Packing: what goes wrong is told, what was done is kept."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import torch

from survfuse.data import packing, store_file
from survfuse.data.layouts import BagFileError
from survfuse.data.packing import find_bag_files, pack
from survfuse.data.store import BagStore

WIDTH = 12
LENGTHS = (4, 0, 1, 30, 7)


@pytest.fixture
def folder(tmp_path):
    """Five bags in every kind of file."""
    folder = tmp_path / "features"
    folder.mkdir()
    for i, length in enumerate(LENGTHS):
        rows = torch.randn(length, WIDTH)
        if i % 3 == 0:
            with h5py.File(folder / f"slide{i}.h5", "w") as file:
                file["features"] = rows.numpy()
                file["coords"] = np.arange(2 * length).reshape(length, 2)
                file["coords"].attrs["patch_size_level0"] = 512
        elif i % 3 == 1:
            torch.save(rows, folder / f"slide{i}.pt")
        else:
            np.save(folder / f"slide{i}.npy", rows.numpy())
    return folder


@pytest.fixture
def counted(monkeypatch):
    """Names of the files whose rows are read."""
    names = []
    original = packing.read_bag

    def read_bag(path, *, check):
        names.append(os.path.basename(path))
        return original(path, check=check)

    monkeypatch.setattr(packing, "read_bag", read_bag)
    return names


def expected(folder, dtype=torch.bfloat16):
    bags = [packing.read_bag(path, check=False) for path in find_bag_files(folder)]
    return torch.cat([bag.features for bag in bags]).to(dtype)


def test_packs_a_folder(tmp_path, folder):
    steps = []
    report = pack(folder, tmp_path / "out.h5", progress=steps.append)
    assert report == (tmp_path / "out.h5", 5, sum(LENGTHS), WIDTH, "bfloat16", 0)
    store = BagStore(report.path)
    store.verify()
    assert store.names == [f"slide{i}" for i in range(5)]
    assert torch.equal(store.features, expected(folder))
    bags = store.bags()
    assert bags.coords_of(3)[1].tolist() == [2.0, 3.0]
    assert bool(bags.coords_of(2).isnan().all())
    assert bags.attributes["patch_size_level0"] == [512.0, None, None, 512.0, None]
    assert bags.attributes["layout"] == ["trident", "pt", "npy", "trident", "pt"]
    assert bags.attributes["coords_unit"] == ["px", None, None, "px", None]
    assert {path.name for path in tmp_path.iterdir()} == {"features", "out.h5"}
    assert [step.done for step in steps if step.stage == "scan"] == [0, 1, 2, 3, 4, 5]
    assert steps[-1] == ("write", 5, 5, sum(LENGTHS), sum(LENGTHS), "slide4")


def test_list_pattern_and_type(tmp_path, folder):
    files = [*sorted(folder.glob("*.npy")), folder / "slide0.h5"]
    store = BagStore(pack(files, tmp_path / "out.h5", dtype="float32").path)
    assert store.names == ["slide0", "slide2"]
    pack(folder, tmp_path / "pt.h5", pattern="*.pt", dtype="float16")
    assert BagStore(tmp_path / "pt.h5").names == ["slide1", "slide4"]
    # the store may lie among its sources
    pack(folder, folder / "all.h5")
    pack(folder, folder / "all.h5", overwrite=True)
    assert len(BagStore(folder / "all.h5")) == 5


def test_nested_folders_named_after_the_slide(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.svs").mkdir()
        np.save(tmp_path / f"{name}.svs" / "features.npy", np.ones((2, 8), dtype=np.float32))
    pack(tmp_path, tmp_path / "out.h5", pattern="*/features.npy")
    assert BagStore(tmp_path / "out.h5").names == ["a", "b"]


def test_width_mismatch_names_both_files_before_writing(tmp_path, folder, counted):
    torch.save(torch.zeros(3, 7), folder / "odd.pt")
    with pytest.raises(BagFileError, match=r"slide0\.h5 has 12 .* and .*odd\.pt has 7"):
        pack(folder, tmp_path / "out.h5")
    assert counted == []
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_an_empty_bag_fits_every_width(tmp_path, folder):
    np.save(folder / "none.npy", np.zeros(0, dtype=np.float32))
    report = pack(folder, tmp_path / "out.h5")
    assert (report.n_bags, report.width) == (6, WIDTH)
    with pytest.raises(BagFileError, match="none of the 1 files holds a patch"):
        pack(folder / "none.npy", tmp_path / "none.h5")


def test_same_name_twice(tmp_path, folder):
    torch.save(torch.zeros(3, WIDTH), folder / "slide0.pt")
    with pytest.raises(BagFileError, match=r"slide0\.h5 and .*slide0\.pt are both called 'slide0'"):
        pack(folder, tmp_path / "out.h5")


def test_truncated_file_is_found_by_the_scan(tmp_path, folder):
    content = (folder / "slide3.h5").read_bytes()
    (folder / "slide3.h5").write_bytes(content[: len(content) // 2])
    with pytest.raises(BagFileError, match=r"1 of 5 files .*\n.*slide3\.h5 is cut short"):
        pack(folder, tmp_path / "out.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_all_bad_files_are_named_and_the_good_ones_kept(tmp_path, folder, counted):
    good = {}
    for name in ("slide2.npy", "slide3.h5"):
        good[name] = (folder / name).read_bytes()
    np.save(folder / "slide2.npy", np.full((1, WIDTH), np.nan, dtype=np.float32))
    with h5py.File(folder / "slide3.h5", "r+") as file:
        file["features"][4, 0] = np.inf
    with pytest.raises(BagFileError) as caught:
        pack(folder, tmp_path / "out.h5")
    text = str(caught.value)
    assert "2 of 5 files cannot be packed" in text
    assert "slide2.npy: 12 features are NaN or infinite, the first in row 0" in text
    assert "slide3.h5: 1 features are NaN or infinite, the first in row 4" in text
    assert "3 bags are kept" in text
    assert not (tmp_path / "out.h5").exists()
    # mended in place, only these two are read
    for name, content in good.items():
        (folder / name).write_bytes(content)
    counted.clear()
    report = pack(folder, tmp_path / "out.h5")
    assert (report.n_resumed, counted) == (3, ["slide2.npy", "slide3.h5"])
    BagStore(tmp_path / "out.h5").verify()
    assert torch.equal(BagStore(tmp_path / "out.h5").features, expected(folder))


def test_nothing_is_left_where_no_file_is_good(tmp_path):
    np.save(tmp_path / "a.npy", np.full((2, 8), np.nan, dtype=np.float32))
    with pytest.raises(BagFileError, match=r"1 of 1 files cannot be packed:\n.*16 features"):
        pack(tmp_path / "a.npy", tmp_path / "out.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_nonfinite_features_can_be_kept(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[1.0, np.nan]], dtype=np.float32))
    pack(tmp_path, tmp_path / "out.h5", pattern="*.npy", check=False)
    assert bool(BagStore(tmp_path / "out.h5").features[0, 1].isnan())


KILLED = """
    import os, signal, sys
    from survfuse.data.packing import pack
    def stop(progress):
        if progress.stage == "write" and progress.done == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    pack(sys.argv[1], sys.argv[2], progress=stop)
"""


def kill_after_three(folder, out):
    code = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder), str(out)]
    assert subprocess.run(code, timeout=120).returncode == -signal.SIGKILL


def stop_after(folder, out, n_done=3):
    """As a kill, without the seconds another process takes."""

    def stop(progress):
        if progress.stage == "write" and progress.done == n_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder, out, progress=stop)


def test_killed_and_resumed(tmp_path, folder, counted):
    out = tmp_path / "out.h5"
    kill_after_three(folder, out)
    assert not out.exists()
    assert (tmp_path / ".out.h5.partial").exists()
    report = pack(folder, out)
    assert (report.n_resumed, counted) == (3, ["slide3.h5", "slide4.pt"])
    assert {path.name for path in tmp_path.iterdir()} == {"features", "out.h5"}
    pack(folder, tmp_path / "undisturbed.h5")
    assert out.read_bytes() == (tmp_path / "undisturbed.h5").read_bytes()
    BagStore(out).verify()


def test_a_line_cut_short_by_the_kill_is_ignored(tmp_path, folder, counted):
    out = tmp_path / "out.h5"
    stop_after(folder, out)
    counted.clear()
    with (tmp_path / ".out.h5.journal").open("ab") as file:
        file.write(b'["' + str(folder / "slide3.h5").encode()[:20])
    assert pack(folder, out).n_resumed == 3
    assert counted == ["slide3.h5", "slide4.pt"]


def test_a_changed_file_is_read_again(tmp_path, folder, counted):
    out = tmp_path / "out.h5"
    stop_after(folder, out)
    counted.clear()
    with h5py.File(folder / "slide0.h5", "r+") as file:
        file["features"][:] = 5.0
    os.utime(folder / "slide0.h5", ns=(1, 1))
    assert pack(folder, out).n_resumed == 2
    assert counted == ["slide0.h5", "slide3.h5", "slide4.pt"]
    assert torch.equal(BagStore(out).features, expected(folder))


def test_killed_twice(tmp_path, folder, counted):
    out = tmp_path / "out.h5"
    stop_after(folder, out)
    counted.clear()
    os.utime(folder / "slide0.h5", ns=(1, 1))
    stop_after(folder, out, n_done=4)
    counted.clear()
    # the second run wrote slides 0 and 3
    assert pack(folder, out).n_resumed == 4
    assert counted == ["slide4.pt"]
    BagStore(out).verify()


def test_a_bag_counts_as_done_only_when_it_is_on_the_disk(tmp_path, folder, monkeypatch):
    order = []
    flush, add = os.fdatasync, packing._Journal.add
    monkeypatch.setattr(
        store_file.os, "fdatasync", lambda handle: (order.append("rows"), flush(handle))
    )
    monkeypatch.setattr(packing._Journal, "add", lambda *a: (order.append("journal"), add(*a)))
    pack(folder, tmp_path / "out.h5")
    assert order == ["rows", "journal"] * 5


def test_the_partial_file_appears_with_a_whole_header(tmp_path, folder, monkeypatch):
    create = packing.create_store

    def create_store(path, plan):
        assert not (tmp_path / ".out.h5.partial").exists()
        create(path, plan)
        assert not (tmp_path / ".out.h5.partial").exists()

    monkeypatch.setattr(packing, "create_store", create_store)
    assert pack(folder, tmp_path / "out.h5").n_bags == 5


@pytest.mark.parametrize("change", ["more files", "type", "resume", "partial", "journal"])
def test_a_changed_plan_starts_over(tmp_path, folder, counted, change):
    out = tmp_path / "out.h5"
    stop_after(folder, out)
    counted.clear()
    arguments = {}
    if change == "more files":
        torch.save(torch.zeros(2, WIDTH), folder / "another.pt")
    elif change == "type":
        arguments["dtype"] = "float16"
    elif change == "resume":
        arguments["resume"] = False
    elif change == "partial":
        (tmp_path / ".out.h5.partial").write_bytes(b"damaged")
    else:
        (tmp_path / ".out.h5.journal").write_text(json.dumps({"files": 3}) + "\n")
    report = pack(folder, out, **arguments)
    assert report.n_resumed == 0
    assert len(counted) == report.n_bags
    BagStore(out).verify()


def test_an_existing_store_is_not_replaced_unasked(tmp_path, folder):
    pack(folder, tmp_path / "out.h5")
    before = (tmp_path / "out.h5").read_bytes()
    with pytest.raises(FileExistsError, match=r"out\.h5 exists already; pass overwrite"):
        pack(folder, tmp_path / "out.h5", dtype="float32")
    assert (tmp_path / "out.h5").read_bytes() == before
    pack(folder, tmp_path / "out.h5", dtype="float32", overwrite=True)
    assert BagStore(tmp_path / "out.h5").dtype == "float32"
    assert {path.name for path in tmp_path.iterdir()} == {"features", "out.h5"}


def test_a_link_that_leads_nowhere_is_not_left_out(tmp_path, folder):
    (folder / "away.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"away\.pt is a link to a file that is not there"):
        pack(folder, tmp_path / "out.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def full_disk_after(monkeypatch, n_writes):
    original, calls = os.pwrite, []

    def pwrite(handle, content, offset):
        calls.append(offset)
        if len(calls) > n_writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle, content, offset)

    monkeypatch.setattr(store_file.os, "pwrite", pwrite)


def test_disk_full_in_between_keeps_what_was_done(tmp_path, folder, counted):
    with pytest.MonkeyPatch.context() as patch:
        full_disk_after(patch, 4)
        with pytest.raises(OSError, match=r"no room for the store: .* bags are kept in \.out\.h5"):
            pack(folder, tmp_path / "out.h5")
    assert not (tmp_path / "out.h5").exists()
    done = len(counted) - 1
    assert done >= 1
    assert pack(folder, tmp_path / "out.h5").n_resumed == done
    BagStore(tmp_path / "out.h5").verify()


def test_disk_full_at_once_leaves_nothing(tmp_path, folder):
    with pytest.MonkeyPatch.context() as patch:
        full_disk_after(patch, 0)
        with pytest.raises(OSError, match="no room for the store: it needs"):
            pack(folder, tmp_path / "out.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_a_disk_too_small_is_found_before_reading(tmp_path, folder, counted, monkeypatch):
    def statvfs(path):
        return os.statvfs_result((4096, 4096, 10, 0, 0, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    with pytest.raises(OSError, match=r"it needs 1\.68 kB and 0 B are free"):
        pack(folder, tmp_path / "out.h5")
    assert counted == []
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def refuse_to_reserve(monkeypatch, number):
    def posix_fallocate(handle, offset, size):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_file.os, "posix_fallocate", posix_fallocate)


def test_room_is_reserved_before_reading(tmp_path, folder, counted, monkeypatch):
    refuse_to_reserve(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="no room for the store"):
        pack(folder, tmp_path / "out.h5")
    assert counted == []
    assert [path.name for path in tmp_path.iterdir()] == ["features"]


def test_file_systems_that_cannot_reserve_are_written_to(tmp_path, folder, monkeypatch):
    refuse_to_reserve(monkeypatch, errno.EOPNOTSUPP)
    assert pack(folder, tmp_path / "out.h5").n_bags == 5
    refuse_to_reserve(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        pack(folder, tmp_path / "other.h5")


def test_a_real_small_disk(tmp_path):
    """A tmpfs of 1 MB, where the machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a tmpfs needs root")
    try:
        for i in range(3):
            np.save(tmp_path / f"s{i}.npy", np.zeros((1000, 256), dtype=np.float16))
        with pytest.raises(OSError, match=r"no room for the store: it needs 1\.54 MB"):
            pack(tmp_path, disk / "out.h5", pattern="*.npy")
        assert list(disk.iterdir()) == []
        pack([tmp_path / "s0.npy"], disk / "out.h5")
        BagStore(disk / "out.h5").verify()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_file_size_limit_leaves_nothing(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1000, 64), dtype=np.float32))
    script = """
        import resource, sys
        from survfuse.data.packing import pack
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            pack(sys.argv[1] + "/a.npy", sys.argv[1] + "/out.h5")
        except OSError as error:
            print(error)
    """
    code = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    result = subprocess.run(code, capture_output=True, text=True, timeout=120)
    assert "no room for the store: it needs 128 kB" in result.stdout, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_a_file_that_changes_meanwhile(tmp_path, folder):
    def change(progress):
        if progress.stage == "write" and progress.done == 0:
            np.save(folder / "slide2.npy", np.zeros((2, WIDTH), dtype=np.float32))

    with pytest.raises(BagFileError, match=r"slide2\.npy changed while it was packed"):
        pack(folder, tmp_path / "out.h5", progress=change)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("nowhere", "there is no file or folder"),
        ("empty", r"no file matches '\*' with one of \.h5"),
        ([], "no feature file was given"),
    ],
)
def test_bad_sources(tmp_path, sources, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    sources = tmp_path / sources if sources else []
    with pytest.raises(FileNotFoundError, match=message):
        pack(sources, tmp_path / "out.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_other_bad_arguments(tmp_path, folder):
    with pytest.raises(ValueError, match="dtype is 'fp8'"):
        pack(folder, tmp_path / "out.h5", dtype="fp8")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        pack(folder, tmp_path / "nowhere" / "out.h5")
