"""`pack` and `encode` as commands: exit codes, messages, what lies on the disk afterwards."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from survfuse.cli import main
from survfuse.data.readers import read_bag
from survfuse.data.store import BagStore


class Result(NamedTuple):
    exit_code: int
    out: str
    err: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        return Result(caught.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "features"
    folder.mkdir()
    for name, length in (("a", 3), ("b", 5)):
        np.save(folder / f"{name}.npy", np.ones((length, 8), dtype=np.float32))
    return folder


def test_pack_writes_and_verifies(tmp_path, folder, run):
    result = run("pack", folder, "--out", tmp_path / "out.h5", "--dtype", "float16", "--verify")
    assert result.exit_code == 0, result.err
    assert "2 bags, 8 patches of 8 features, float16" in result.out
    assert "all checksums right" in result.out
    assert BagStore(tmp_path / "out.h5").dtype == "float16"


def test_pack_takes_a_pattern_and_refuses_to_overwrite(tmp_path, folder, run):
    assert run("pack", folder, "-o", tmp_path / "out.h5", "--pattern", "a*").exit_code == 0
    assert BagStore(tmp_path / "out.h5").names == ["a"]
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 2
    assert "exists already" in result.err
    assert run("pack", folder, "-o", tmp_path / "out.h5", "--overwrite").exit_code == 0
    assert len(BagStore(tmp_path / "out.h5")) == 2


def test_pack_names_the_bad_file_and_goes_on_when_mended(tmp_path, folder, run):
    (folder / "c.npy").write_bytes(b"garbage")
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 2
    assert "c.npy cannot be read as .npy" in result.err
    np.save(folder / "c.npy", np.full((1, 8), np.nan, dtype=np.float32))
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 2
    assert result.err.startswith("error: 1 of 3 files cannot be packed")
    assert "2 bags are kept" in result.err
    assert not (tmp_path / "out.h5").exists()
    np.save(folder / "c.npy", np.ones((1, 8), dtype=np.float32))
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert "3 bags, 2 of them from an earlier run" in result.out


def _truncated(folder: Path) -> None:
    with h5py.File(folder / "c.h5", "w") as file:
        file["features"] = np.ones((100, 8), dtype=np.float32)
    (folder / "c.h5").write_bytes((folder / "c.h5").read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, ["nowhere", "-o", "out.h5"], "there is no file or folder nowhere"),
        (None, ["features", "-o", "gone/out.h5"], "the folder gone does not exist"),
        (None, ["features", "-o", "features"], "features is a folder"),
        (None, ["features", "-o", "features", "--overwrite"], "features is a folder"),
        (None, ["features", "-o", "out.h5", "--pattern", "*.pt"], "no file matches '*.pt'"),
        (None, ["features", "-o", "x" * 300], "File name too long"),
        (
            lambda folder: (folder / "c.txt").write_text("x"),
            ["features/c.txt", "-o", "out.h5"],
            "c.txt: cannot read '.txt'",
        ),
        (
            lambda folder: np.save(folder / "c.npy", np.ones((2, 9), dtype=np.float32)),
            ["features", "-o", "out.h5"],
            "c.npy has 9 features per patch and",
        ),
        (_truncated, ["features", "-o", "out.h5"], "c.h5 is cut short"),
    ],
)
def test_bad_input_of_pack_exits_2(
    spoil, arguments: list[str], message: str, tmp_path, folder, run, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if spoil is not None:
        spoil(folder)
    result = run("pack", *arguments)
    assert result.exit_code == 2, result.err
    assert result.err.startswith("error: ")
    assert message in result.err
    assert "Traceback" not in result.err
    assert os.listdir(tmp_path) == ["features"]


def test_pack_exits_1_where_the_disk_is_at_fault(tmp_path, folder, run, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
        result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 1
    assert "no room for the store" in result.err
    assert result.err.startswith("error: ")

    def rotten(*arguments, **options):
        from survfuse.data.layouts import BagFileError

        raise BagFileError("the rows are not what was written")

    monkeypatch.setattr(BagStore, "verify", rotten)
    result = run("pack", folder, "-o", tmp_path / "out.h5", "--verify")
    assert result.exit_code == 1
    assert result.err == "error: the rows are not what was written\n"


def test_pack_stopped_from_the_keyboard(tmp_path, folder, run, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("survfuse.cli.pack.pack", stop)
    result = run("pack", folder, "-o", tmp_path / "out.h5")
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.err


def test_verifying_stopped_from_the_keyboard(tmp_path, folder, run, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(BagStore, "verify", stop)
    result = run("pack", folder, "-o", tmp_path / "out.h5", "--verify")
    assert result.exit_code == 130
    assert "out.h5 is whole, but its checksums were not all compared" in result.err


def test_help_teaches_with_an_example(run):
    text = run("pack", "--help").out
    assert "survfuse pack features_uni_v1/ --out blca.h5" in text
    for option in ("--dtype", "--verify", "--pattern", "--no-resume", "--overwrite"):
        assert option in text
    assert "the exit code is 2" in text
    text = run("encode", "--help").out
    assert "survfuse encode slides/*.svs --out bags/" in text
    assert "the exit code is 2" in text


def test_encode_then_pack(tmp_path, shared_data, run):
    slides = sorted((shared_data / "slides").glob("*.svs"))
    options = ("--slide-mpp", "0.25", "--mpp", "1.0", "--out", tmp_path / "bags")
    result = run("encode", *slides, *options)
    assert result.exit_code == 0, result.err
    assert read_bag(tmp_path / "bags" / f"{slides[0].stem}.h5").patch_size_level0 == 1024
    assert run("encode", *slides, *options).out.count("skipped") == 2
    assert run("pack", tmp_path / "bags", "-o", tmp_path / "out.h5").exit_code == 0
    assert BagStore(tmp_path / "out.h5").names == [slide.stem for slide in slides]


def test_encode_goes_on_after_a_bad_slide(tmp_path, shared_data, run):
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    good = shared_data / "slides" / "cmu-1-small-region.svs"
    # sound at both ends, where OpenSlide looks when it opens a slide
    content = bytearray(good.read_bytes())
    middle = slice(len(content) * 3 // 10, len(content) * 4 // 10)
    content[middle] = bytes(middle.stop - middle.start)
    (tmp_path / "damaged.svs").write_bytes(content)
    slides = (tmp_path / "bad.svs", tmp_path / "damaged.svs", tmp_path / "gone.svs", good)
    result = run("encode", *slides, "-o", tmp_path / "bags", "--mpp", "2")
    assert result.exit_code == 2
    bad, damaged, gone, total = result.err.splitlines()
    assert bad.startswith(f"error: {slides[0]} cannot be read by OpenSlide")
    assert damaged.startswith(f"error: {slides[1]}: the region at (0, ")
    assert gone == f"error: there is no slide {slides[2]}"
    assert total == "3 of 4 slides failed"
    with h5py.File(tmp_path / "bags" / f"{good.stem}.h5") as file:
        assert len(file["features"]) > 0
    assert os.listdir(tmp_path / "bags") == [f"{good.stem}.h5"]


def test_a_bad_option_of_encode_is_one_line(tmp_path, run):
    result = run("encode", "a.svs", "b.svs", "-o", tmp_path / "bags", "--patch-size", "2")
    assert result.exit_code == 2
    assert result.err == "error: patch_size is 2; it must be at least 8 pixels\n"
    (tmp_path / "file").touch()
    result = run("encode", "a.svs", "-o", tmp_path / "file")
    assert result.exit_code == 2
    assert result.err == f"error: {tmp_path / 'file'}: File exists\n"


def test_encode_leaves_nothing_of_a_bag_that_did_not_fit(tmp_path, shared_data, run):
    slide = shared_data / "slides" / "cmu-1-small-region.svs"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        result = run("encode", slide, tmp_path / "gone.svs", "-o", tmp_path / "bags", "--mpp", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1
    bag = tmp_path / "bags" / f"{slide.stem}.h5"
    assert result.err == f"error: {bag}: cannot be written (File too large)\n"
    assert os.listdir(tmp_path / "bags") == []


def test_encode_stops_at_a_full_disk(tmp_path, run, monkeypatch):
    tried = []

    def full(path, bag, **options):
        tried.append(path)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(bag))

    monkeypatch.setattr("survfuse.cli.encode.encode_slide", full)
    result = run("encode", "a.svs", "b.svs", "-o", tmp_path / "bags")
    assert result.exit_code == 1
    assert result.err == f"error: {tmp_path / 'bags' / 'a.h5'}: No space left on device\n"
    assert len(tried) == 1


def test_encode_refuses_two_slides_of_one_name(tmp_path, run):
    result = run("encode", "a/x.svs", "b/x.svs", "-o", tmp_path / "bags")
    assert result.exit_code == 2
    assert result.err.startswith("error: a/x.svs and b/x.svs would both be x.h5")
    assert os.listdir(tmp_path) == []
